# SPDX-License-Identifier: Apache-2.0
"""Pictures whose texts are known: a scorer proves itself on them before it may score.

A model with damaged weights, another model's preprocessing or the wrong activation gives numbers
that look like any other. The pictures are plain enough for every image-text model, and differ in colour,
shape and ground at once, so that no model needs to know which colour belongs to which thing.

Each picture's own text is compared with the five others: 30 comparisons, of which a model may lose
one. Two texts of a picture can still be close: "blue square on orange" and "yellow circle on blue" share
blue, the two on white share their ground, and which colour belongs to which thing is what image-text
models are weakest at (Yuksekgonul et al. 2023, arXiv 2210.01936). A good model that loses one such
comparison should score all the same; two lost ones it has no excuse for.

Chance, where every order of the six texts is as likely as any other, for each picture by itself: no
comparison is lost in 1 of 6^6 cases; one alone is lost where one picture has its own text second, 6
of them. So 7 in 46,656, 1 in 6,665, pass; that five of six pictures be right would let 31 pass. A model
whose texts all look alike, or that prefers the same text for each picture, loses 15 comparisons or more.

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

MAX_LOST = 1
"""Comparisons that a model may lose."""


def check_known_pairs(
    model: str, pictures: Sequence[np.ndarray | Failure], texts: Sequence[np.ndarray | Failure]
) -> None:
    """Raises unless every picture is closer to its own text than to any other, but for one comparison.

    Args:
        model: What to call it in the message.
        pictures: Unit embedding [D] of each of `KNOWN_PAIRS`, or of a clip that shows it.
        texts: Unit embedding [D] of the text of each.

    Raises:
        DependencyError: With the first comparison that is lost.
    """
    for answer in (*pictures, *texts):
        if isinstance(answer, Failure):
            raise DependencyError(
                f"{model} cannot score a known pair: {answer.reason} {answer.detail}",
                "a smaller model, or a larger GPU, is needed",
            )
    cosines_PP = np.stack(pictures) @ np.stack(texts).T  # pyright: ignore[reportCallIssue,reportArgumentType]  no Failure is left
    # Not `<=`: embeddings that are not numbers are no proof either.
    lost_PP = ~(np.diagonal(cosines_PP)[:, None] > cosines_PP)
    np.fill_diagonal(lost_PP, False)
    lost = np.argwhere(lost_PP)
    if len(lost) > MAX_LOST:
        picture, text = lost[0]
        raise DependencyError(
            f"{model} scores a known pair wrongly: {KNOWN_PAIRS[picture].text!r} "
            f"{cosines_PP[picture, picture]:.3f}, {KNOWN_PAIRS[text].text!r} "
            f"{cosines_PP[picture, text]:.3f} for the same picture; it loses "
            f"{len(lost)} of {lost_PP.size - len(lost_PP)} such comparisons, {MAX_LOST} is allowed",
            "the weights are damaged, not this model's, or of a model that was hardly trained",
        )
