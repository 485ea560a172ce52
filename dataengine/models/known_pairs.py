# SPDX-License-Identifier: Apache-2.0
"""Pictures whose texts are known: a scorer proves itself on them before it may score.

A model with damaged weights, another model's preprocessing or the wrong activation gives numbers
that look like any other. The pictures are plain enough for every image-text model, and differ in colour,
shape and ground at once, so that no model needs to know which colour belongs to which thing. By luck a
model passes once in ``len(KNOWN_PAIRS) ** len(KNOWN_PAIRS)`` times, 1 in 46,656.

P pictures, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.answers import Failure

Colour = tuple[int, int, int]

HEIGHT_PX, WIDTH_PX = 240, 320

_COLOURS: dict[str, Colour] = {
    "red": (214, 36, 36),
    "green": (40, 150, 60),
    "blue": (40, 70, 200),
    "yellow": (235, 205, 40),
    "white": (240, 240, 240),
    "black": (16, 16, 16),
    "orange": (246, 130, 30),
    "purple": (140, 40, 170),
}


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A thing of one colour in the middle of a plain ground, or the ground alone."""

    ground: str
    colour: str = ""
    shape: Literal["circle", "square", "triangle", ""] = ""

    @property
    def text(self) -> str:
        """What is seen."""
        if not self.shape:
            return f"A plain {self.ground} scene."
        return f"A large {self.colour} {self.shape} on a {self.ground} background."

    def draw(self) -> np.ndarray:
        """Returns the picture, uint8 RGB [240, 320, 3]."""
        picture = np.full((HEIGHT_PX, WIDTH_PX, 3), _COLOURS[self.ground], np.uint8)
        x, y, r = WIDTH_PX // 2, HEIGHT_PX // 2, HEIGHT_PX // 3
        match self.shape:
            case "circle":
                cv2.circle(picture, (x, y), r, _COLOURS[self.colour], -1, cv2.LINE_AA)
            case "square":
                cv2.rectangle(picture, (x - r, y - r), (x + r, y + r), _COLOURS[self.colour], -1)
            case "triangle":
                corners = np.array([[x, y - r], [x - r, y + r], [x + r, y + r]])
                cv2.fillPoly(picture, [corners], _COLOURS[self.colour], cv2.LINE_AA)
        return picture


KNOWN_PAIRS = (
    KnownPair("white", "red", "circle"),
    KnownPair("blue", "yellow", "circle"),
    KnownPair("black", "green", "triangle"),
    KnownPair("orange", "blue", "square"),
    KnownPair("white", "black", "square"),
    KnownPair("purple"),
)


def check_known_pairs(
    model: str, pictures: Sequence[np.ndarray | Failure], texts: Sequence[np.ndarray | Failure]
) -> None:
    """Raises unless every picture is closer to its own text than to any other.

    Args:
        model: What to call it in the message.
        pictures: Unit embedding [D] of each of `KNOWN_PAIRS`, or of a clip that shows it.
        texts: Unit embedding [D] of the text of each.

    Raises:
        DependencyError: With the first pair that is judged wrongly.
    """
    for answer in (*pictures, *texts):
        if isinstance(answer, Failure):
            raise DependencyError(
                f"{model} cannot score a known pair: {answer.reason} {answer.detail}",
                "a smaller model, or a larger GPU, is needed",
            )
    cosines_PP = np.stack(pictures) @ np.stack(texts).T  # pyright: ignore[reportCallIssue,reportArgumentType]  no Failure is left
    for number, pair in enumerate(KNOWN_PAIRS):
        row = cosines_PP[number]
        wrong = np.where(np.arange(len(row)) == number, -np.inf, row)
        # Not `<=`: embeddings that are not numbers are no proof either.
        if not row[number] > wrong.max():
            other = KNOWN_PAIRS[int(np.argmax(wrong))].text
            raise DependencyError(
                f"{model} scores a known pair wrongly: {pair.text!r} {row[number]:.3f}, "
                f"{other!r} {wrong.max():.3f} for the same picture",
                "the weights are damaged, not this model's, or of a model that was hardly trained",
            )
