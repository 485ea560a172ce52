# SPDX-License-Identifier: Apache-2.0
"""Video measurements -> sentences. What sets a clip apart comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # signals_video says its measurements with these words
    from dataengine.models.camera import Camera
    from dataengine.models.signals_video import ClipSignals, FrameSignals, Thing

_PATTERNED = ("striped", "checkered", "dotted")


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
    return "small" if area < 0.02 else "large" if area > 0.07 else ""


def place_words(x: float, y: float) -> str:
    """Returns where a point is in the picture: thirds across and down."""
    across = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    down = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    if across and down:
        return f"at the {down} {across}"
    if across:
        return f"on the {across}"
    return {"upper": "at the top", "lower": "at the bottom", "": "in the centre"}[down]


def thing_words(colour: str, shape: str, area: float) -> str:
    """Returns an object's name with its article: "a small red circle"."""
    return with_article(" ".join(filter(None, (size_word(area), colour, shape or "patch"))))


def thing_action(thing: Thing) -> str:
    """Returns what an object does, with its verb, or an empty string if it rests.

    A way of a tenth of the picture, or a change of size by half, can be seen at a glance.
    """
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
    return "blinks" if thing.blinks else ""


def ground_words(frames: Sequence[FrameSignals], noun: str) -> str:
    """Returns what fills the frames as a noun phrase: "a dark plain green background"."""
    textures = [frame.texture for frame in frames]
    texture = max(sorted(set(textures)), key=textures.count)
    light = light_word(sum(frame.lightness for frame in frames) / len(frames))
    middle = frames[len(frames) // 2]
    upper, lower = middle.upper, middle.lower
    split = upper and lower and upper != lower and not texture.endswith(_PATTERNED)
    colours = [] if split else ground_colours(frames)
    if colours in (["black"], ["white"]):
        light = ""  # the colour says it
    words = " ".join(filter(None, (light, texture, join_words(colours) if colours else "", noun)))
    return with_article(words) + (f", {upper} above and {lower} below" if split else "")


def ground_colours(frames: Sequence[FrameSignals]) -> list[str]:
    """Returns the one or two colours that fill most of the frames, objects aside."""
    total: dict[str, float] = {}
    for frame in frames:
        for name, share in frame.ground.items():
            total[name] = total.get(name, 0.0) + share / len(frames)
    ranked = sorted(total, key=lambda name: (-total[name], name))
    return [name for name in ranked[:2] if total[name] > 0.2] or ranked[:1]


def camera_words(camera: Camera | None) -> str:
    """Returns what the camera does, empty where nobody can tell.

    Shifts below 8 % of the picture and zooms below 10 % pass for a hand that is not quite still.
    """
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


def describe_frame(frame: FrameSignals) -> str:
    """Returns one sentence for one picture."""
    things = [
        f"{thing_words(patch.colour, shape, patch.area)} {place_words(patch.x, patch.y)}"
        for patch, shape in zip(frame.patches[:2], frame.shapes[:2], strict=True)
    ]
    if not things:
        return _sentence(ground_words([frame], "scene"))
    return _sentence(f"{join_words(things)} against {ground_words([frame], 'background')}")


def describe_clip(signals: ClipSignals) -> str:
    """Returns one sentence of about thirty words at most, with as many objects as that allows."""
    for num_things in (3, 2, 1):
        text = _describe(signals, signals.things[:num_things])
        if len(text.split()) <= 30:
            break
    return text


def _describe(signals: ClipSignals, things: Sequence[Thing]) -> str:
    said = [
        f"{thing_words(thing.colour, thing.shape, thing.area)} "
        + (thing_action(thing) or place_words(thing.x, thing.y))
        for thing in things
    ]
    lead = ground_words(signals.frames, "background" if said else "scene")
    if said:
        lead = f"{join_words(said)} against {lead}"
    faces = {0: "", 1: "a face is seen", 2: "two faces are seen"}.get(
        signals.num_faces, "several faces are seen"
    )
    light = ""
    if signals.flicker > 5:
        light = "the light flickers"
    elif abs(signals.brightening) > 12:
        light = "it gets brighter" if signals.brightening > 0 else "it gets darker"
    active = any(thing_action(thing) for thing in things)
    motion = "" if active or light else _motion_words(signals)
    return _sentence(lead, faces, motion, light, camera_words(signals.camera))


def _motion_words(signals: ClipSignals) -> str:
    """Returns what moves where no object does, empty where there is little to say."""
    if signals.moving < 0.002 and len(signals.frames) > 1:
        return "nothing moves"
    if signals.moving > 0.35:
        return "much of the picture moves"
    if signals.moving > 0.004 and signals.moving_spread < 0.25:
        return f"something moves {place_words(signals.moving_x, signals.moving_y)}"
    return ""


def _sentence(*parts: str) -> str:
    text = "; ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + "."
