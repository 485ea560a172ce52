# SPDX-License-Identifier: Apache-2.0
"""Video measurements -> sentences. What sets a clip apart comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataengine.models.signals_video import Camera, ClipSignals, FrameSignals, Patch, Thing


def join_words(words: Sequence[str]) -> str:
    """Returns words as "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def with_article(phrase: str) -> str:
    """Returns a noun phrase behind its indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def light_word(lightness: float) -> str:
    """Returns a word for a mean CIELAB lightness; middle light has none."""
    for most, word in ((12, "very dark"), (30, "dark"), (68, ""), (85, "bright")):
        if lightness < most:
            return word
    return "very bright"


def size_word(area: float) -> str:
    """Returns a word for an object's share of the picture."""
    return "small" if area < 0.025 else "large" if area > 0.09 else ""


def place_words(x: float, y: float) -> str:
    """Returns where a point is in the picture: thirds across and down."""
    across = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    down = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    if across and down:
        return f"at the {down} {across}"
    if across:
        return f"on the {across}"
    return {"upper": "at the top", "lower": "at the bottom", "": "in the centre"}[down]


def thing_words(thing: Thing | Patch) -> str:
    """Returns an object's name with its article: "a small red round shape"."""
    noun = "ring" if thing.shape == "ring-shaped" else "disc" if thing.shape == "round" else "shape"
    shape = "" if noun != "shape" else thing.shape
    noun, shape = {
        "square": ("square", ""),
        "triangular": ("triangle", ""),
        "rectangular": ("rectangle", ""),
    }.get(shape, (noun if thing.shape else "patch", ""))
    return with_article(
        " ".join(word for word in (size_word(thing.area), thing.colour, noun) if word)
    )


def thing_action(thing: Thing) -> str:
    """Returns what an object does, with its verb; where it stays if it does nothing."""
    if max(abs(thing.dx), abs(thing.dy)) > 0.1:
        across = "to the right" if thing.dx > 0 else "to the left"
        down = "down" if thing.dy > 0 else "up"
        if abs(thing.dx) > 2 * abs(thing.dy):
            return f"moves {across}"
        if abs(thing.dy) > 2 * abs(thing.dx):
            return f"moves {down}"
        return f"moves {down} and {across}"
    if thing.growth > 1.5:
        return "grows"
    if thing.growth < 0.67:
        return "shrinks"
    if max(thing.sway_x, thing.sway_y) > 0.12:
        if thing.sway_y > 2.5 * thing.sway_x:
            return "moves up and down"
        if thing.sway_x > 2.5 * thing.sway_y:
            return "moves back and forth"
        return "moves about"
    if thing.blinks:
        return "blinks " + place_words(thing.x, thing.y)
    return place_words(thing.x, thing.y)


def ground_colours(frames: Sequence[FrameSignals], without: Sequence[str] = ()) -> list[str]:
    """Returns the one or two colours that fill most of the frames."""
    total: dict[str, float] = {}
    for frame in frames:
        for name, share in frame.shares.items():
            total[name] = total.get(name, 0.0) + share / len(frames)
    ranked = sorted(
        ((share, name) for name, share in total.items() if name not in without), reverse=True
    )
    if not ranked:
        return []
    chosen = [name for share, name in ranked[:3] if share > 0.2 or share > 0.6 * ranked[0][0]]
    return chosen[:2] or [ranked[0][1]]


def texture_word(edges: float, contrast: float) -> str:
    """Returns a word for how much there is to see."""
    if edges < 0.02:
        return "plain" if contrast < 8 else "smooth"
    return "detailed" if edges > 0.3 else ""


def ground_words(frames: Sequence[FrameSignals], noun: str, without: Sequence[str] = ()) -> str:
    """Returns the scene as a noun phrase: "a dark striped scene in green and blue"."""
    middle = frames[len(frames) // 2]
    mean = sum(frame.lightness for frame in frames) / len(frames)
    patterns = [frame.pattern for frame in frames]
    pattern = max(set(patterns), key=patterns.count)
    edges = sorted(frame.edges for frame in frames)[len(frames) // 2]
    texture = pattern or texture_word(edges, middle.contrast)
    head = ", ".join(word for word in (light_word(mean), texture) if word)
    phrase = with_article(" ".join(word for word in (head, noun) if word))
    colours = ground_colours(frames, without)
    words = f"{phrase} in {join_words(colours)}" if colours else phrase
    if not pattern and middle.upper and middle.lower and middle.upper != middle.lower:
        words = f"{phrase}, {middle.upper} above and {middle.lower} below"
    return words


def camera_words(camera: Camera | None) -> str:
    """Returns what the camera does, empty where nobody can tell."""
    if camera is None:
        return ""
    moves = []
    if abs(camera.pan_x) > 0.08 and abs(camera.pan_x) > 0.5 * abs(camera.pan_y):
        moves.append("pans right" if camera.pan_x > 0 else "pans left")
    if abs(camera.pan_y) > 0.08 and abs(camera.pan_y) > 0.5 * abs(camera.pan_x):
        moves.append("tilts down" if camera.pan_y > 0 else "tilts up")
    if camera.zoom > 1.1 or camera.zoom < 1 / 1.1:
        moves.append("zooms in" if camera.zoom > 1 else "zooms out")
    return f"the camera {join_words(moves or ['is still'])}"


def _sentence(*parts: str) -> str:
    text = "; ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + "."


def describe_frame(frame: FrameSignals) -> str:
    """Returns one sentence for one picture."""
    things = [
        f"{thing_words(patch)} {place_words(patch.x, patch.y)}" for patch in frame.patches[:2]
    ]
    ground = ground_words([frame], "picture", [patch.colour for patch in frame.patches[:2]])
    return _sentence(join_words(things) + f" of {ground}" if things else ground)


def describe_clip(signals: ClipSignals) -> str:
    """Returns one sentence of at most about thirty words for a clip."""
    things = [f"{thing_words(thing)} {thing_action(thing)}" for thing in signals.things[:2]]
    without = [thing.colour for thing in signals.things[:2]]
    ground = ground_words(signals.frames, "scene", without)
    motion = ""
    if not any(" moves" in text or "grows" in text or "shrinks" in text for text in things):
        if signals.moving < 0.004:
            motion = "nothing moves"
        elif signals.moving > 0.35:
            motion = "much of it moves"
        elif signals.moving_spread < 0.25:
            motion = f"something moves {place_words(signals.moving_x, signals.moving_y)}"
    light = ""
    if signals.flicker > 5:
        light = "the light flickers"
    elif abs(signals.brightening) > 12:
        light = "it gets brighter" if signals.brightening > 0 else "it gets darker"
    lead = join_words(things) + f" in {ground}" if things else ground
    return _sentence(lead, motion, light, camera_words(signals.camera))
