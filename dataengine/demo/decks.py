# SPDX-License-Identifier: Apache-2.0
"""What keeps the corpus varied: a schedule of oddities and decks of attributes.

Oddities (strobes, missing audio, fades, subtitles ...) follow a schedule that repeats every
`PERIOD` videos, so any `PERIOD` consecutive ones hold all of them. Attributes (colours, shapes,
actions ...) are dealt from shuffled decks over all shots of the corpus, so they come equally
often. Both depend on the seed, and never on the number of videos.
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from dataengine.demo.scene import TransitionKind

Item = TypeVar("Item")

PERIOD = 24
NUM_TRANSLATED = 8
"""Videos of a period with subtitles in a language other than English."""
_TRAITS = ("vfr", "vfr", "b_frames", "b_frames", "b_frames", "late_start", "late_video")

_TAGS = {
    name: number
    for number, name in enumerate(
        (
            "schedule",
            "language",
            "size",
            "rate",
            "colour",
            "shape",
            "action",
            "background",
            "ground",
            "camera",
            "sound",
            "num_things",
            "sentence",
        ),
        start=1,
    )
}
# Drawing for a deck starts a fresh generator from (seed, block, tag). The tag stands last and is
# never 0 because a seed sequence cannot tell (1, 2) from (1, 2, 0).


@dataclass(frozen=True, slots=True)
class Role:
    """What the schedule asks of one position in a period.

    Attributes:
        num_shots: Shots of the video.
        has_audio: Whether there is an audio stream.
        speaks: Whether some shots hold speech.
        english: Whether what is spoken also stands in English subtitles.
        translated: Number, within the period, of a video with foreign subtitles; None for others.
        changes: Transitions other than cuts.
        strobes: Whether one shot flashes.
        rests: Whether one shot is entirely still.
        trait: As in `Plan`.
    """

    num_shots: int
    has_audio: bool
    speaks: bool
    english: bool
    translated: int | None
    changes: tuple[TransitionKind, ...]
    strobes: bool
    rests: bool
    trait: str


@cache
def schedule(seed: int) -> tuple[Role, ...]:
    """Returns the roles of a period's positions."""
    rng = np.random.default_rng([seed, 0, _TAGS["schedule"]])
    by_sound, by_change, by_trait, by_length = (rng.permutation(PERIOD).tolist() for _ in range(4))
    silent, speaking = by_sound[:3], by_sound[3:10]
    translated = sorted(by_sound[10 : 10 + NUM_TRANSLATED])
    odd = dict(zip([p for p in by_trait if p not in silent], _TRAITS, strict=False))
    roles = []
    for position in range(PERIOD):
        change = by_change.index(position)
        num_shots = 3 + by_length.index(position) % 6
        if position in speaking:
            num_shots = min(num_shots, 6)  # a sentence needs a shot of some seconds
        changes: list[TransitionKind] = []
        if change < 8:
            changes.append("dissolve")
            if num_shots >= 6:
                changes.append("dissolve")
        if 5 <= change < 11:
            changes.append("fade_black" if change % 2 else "fade_white")
        roles.append(
            Role(
                num_shots=max(num_shots, len(changes) + 2),
                has_audio=position not in silent,
                speaks=position in speaking,
                english=position == speaking[0],
                translated=translated.index(position) if position in translated else None,
                changes=tuple(changes),
                strobes=change == 11,
                rests=12 <= change < 18,
                trait=odd.get(position, ""),
            )
        )
    return tuple(roles)


@cache
def languages(seed: int, available: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the order in which foreign languages take turns."""
    rng = np.random.default_rng([seed, 0, _TAGS["language"]])
    return tuple(available[i] for i in rng.permutation(len(available)))


class Decks:
    """Shuffled decks without end: each aligned run of ``len(items)`` draws holds each item once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, name: str, items: tuple[Item, ...], number: int) -> Item:
        """Returns the item that the deck of this name deals as its ``number``-th."""
        block, place = divmod(number, len(items))
        order = np.random.default_rng([self.seed, block, _TAGS[name]]).permutation(len(items))
        return items[int(order[place])]
