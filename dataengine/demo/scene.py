# SPDX-License-Identifier: Apache-2.0
"""What a demo video is made of: the vocabulary, and the frozen records a plan consists of.

Lengths are pixels, angles radians, colours 8-bit RGB. Inside a plan time is counted in ticks: one
tick is one frame at the video's nominal rate, and tick 0 is the first frame.
"""

from dataclasses import dataclass
from typing import Literal

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (212, 36, 36),
    "orange": (246, 130, 30),
    "yellow": (250, 220, 48),
    "green": (44, 158, 62),
    "cyan": (44, 206, 214),
    "blue": (38, 76, 212),
    "purple": (128, 48, 168),
    "pink": (246, 146, 188),
    "white": (246, 246, 246),
    "black": (16, 16, 16),
    "grey": (128, 128, 128),
    "brown": (120, 72, 34),
}
"""Colour names far enough apart that a name is never a matter of taste."""

DARKENED = {"red", "green", "blue", "purple", "cyan", "grey"}
"""Colours that keep their name when darkened (a dark orange is a brown)."""
LIGHTENED = {"green", "blue", "purple", "pink", "cyan", "grey"}
"""Colours that keep their name when mixed with white."""

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "diamond",
    "heart",
    "hexagon",
    "crescent",
)
TURNABLE = {"square", "triangle", "star", "cross", "heart", "crescent"}
"""Shapes whose rotation can be seen and does not turn one shape into another."""

ACTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "grows",
    "shrinks",
    "rotates",
    "bounces",
    "blinks",
    "orbits",
)
STAYS = "stays"

BACKGROUNDS = (
    "plain",
    "gradient",
    "checkered",
    "striped",
    "cloudy",
    "grainy",
    "dotted",
    "mountains",
    "sea",
    "city",
    "starry",
)
SCENES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mountains": (
        ("blue", "cyan", "orange", "pink", "grey", "yellow", "white"),
        ("brown", "green", "purple", "black", "red"),
    ),
    "sea": (("orange", "pink", "yellow", "white", "grey", "purple"), ("blue", "cyan", "green")),
    "city": (
        ("orange", "purple", "blue", "pink", "cyan", "red", "yellow"),
        ("black", "grey", "brown"),
    ),
    "starry": (("black", "blue", "purple", "green"), ("white",)),
}
"""Backgrounds that show a place: colours its sky may have, and its ground (stars for starry)."""

CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out")
SIZES = {"small": 0.15, "medium": 0.25, "large": 0.42}
"""Diameter over the shorter side of the picture."""

LOUDNESS_DBFS = {"quiet": -34.0, "medium": -24.0, "loud": -14.0}
"""Root mean square level a sound is brought to, unless its peaks would clip."""

TransitionKind = Literal["cut", "dissolve", "fade_black", "fade_white"]


@dataclass(frozen=True, slots=True)
class Background:
    """What fills the picture behind the objects.

    ``shade`` is "", "dark" or "light" and already inside ``rgbs``; ``seed`` fixes the texture.
    ``direction`` is used by stripes and gradients: horizontal, vertical or diagonal.
    """

    kind: str
    colours: tuple[str, str]
    rgbs: tuple[RGB, RGB]
    shade: str
    direction: str
    seed: int


@dataclass(frozen=True, slots=True)
class Thing:
    """An object and its path, as if the camera stood still.

    Its centre goes from ``start`` to ``end``; ``rate`` is hertz of a bounce or blink and turns per
    second of a rotation or orbit; ``radius`` is the orbit's. ``diameter`` is at its largest.
    """

    shape: str
    colour: str
    rgb: RGB
    size: str
    diameter: float
    action: str
    start: tuple[float, float]
    end: tuple[float, float]
    rate: float
    radius: float
    phase: float
    shaded: bool


@dataclass(frozen=True, slots=True)
class Shot:
    """A stretch of one camera: ``[first, last)`` ticks are seen, ``[start, end)`` are its own.

    The two differ where a dissolve or fade overlaps; shots' own ticks part the video.
    ``strobe_hz`` is 0 unless the light flashes.
    """

    first: int
    start: int
    end: int
    last: int
    background: Background
    things: tuple[Thing, ...]
    camera: str
    strobe_hz: float

    @property
    def still(self) -> bool:
        """Whether nothing at all moves or changes."""
        unmoved = all(thing.action == STAYS for thing in self.things)
        return unmoved and self.camera == "still" and not self.strobe_hz


@dataclass(frozen=True, slots=True)
class Transition:
    """How shot i becomes shot i + 1: blended over ``[start, end)`` ticks, new from ``cut`` on."""

    kind: TransitionKind
    start: int
    cut: int
    end: int


@dataclass(frozen=True, slots=True)
class Sound:
    """A span of one sound, in milliseconds of the video.

    ``values`` are the kind's parameters (``pitch_hz``, ``bpm``, ``noise`` ...). A "speech" sound
    holds ``text`` and ``voice``; ``fallback`` is what is heard where nothing can speak them.
    """

    kind: str
    start_ms: int
    end_ms: int
    loudness: str
    values: dict[str, float | str | list[float]]
    seed: int
    text: str = ""
    voice: str = ""
    fallback: "Sound | None" = None


@dataclass(frozen=True, slots=True)
class Cue:
    """A subtitle, in milliseconds of the video."""

    start_ms: int
    end_ms: int
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a demo video will show, sound and say.

    Attributes:
        index: Number of the video in its demo.
        rate: Ticks per second.
        ticks: Ticks that become frames, ascending from 0; all of them unless the rate varies.
        num_ticks: Duration.
        trait: What is odd about the file: "", "vfr", "b_frames", "late_start" or "late_video".
        has_audio: Whether there is an audio stream; without one, ``sounds`` is empty.
        sample_rate: Of the audio, in hertz.
        keyframe_ticks: Longest distance between key frames.
        subtitles: Language -> cues.
    """

    index: int
    width: int
    height: int
    rate: int
    ticks: tuple[int, ...]
    num_ticks: int
    trait: str
    has_audio: bool
    sample_rate: int
    keyframe_ticks: int
    shots: tuple[Shot, ...]
    transitions: tuple[Transition, ...]
    sounds: tuple[Sound, ...]
    subtitles: dict[str, tuple[Cue, ...]]

    @property
    def name(self) -> str:
        """Stem of the files of this video."""
        return f"demo_{self.index:04d}"

    def ms(self, tick: int) -> int:
        """Returns the presentation time of a tick, rounded to the nearest millisecond."""
        return round(1000 * tick / self.rate)
