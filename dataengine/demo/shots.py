# SPDX-License-Identifier: Apache-2.0
"""Plans single shots: which objects do what, before which background, under which camera."""

import math

import cv2
import numpy as np

from dataengine.demo.backgrounds import draw_background
from dataengine.demo.decks import Decks
from dataengine.demo.scene import (
    ACTIONS,
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    DARKENED,
    LIGHTENED,
    RGB,
    SCENES,
    SHAPES,
    SIZES,
    STAYS,
    TURNABLE,
    Background,
    Shot,
    Thing,
)

_CAMERA_DECK = ("still",) * 8 + CAMERAS[1:]
_NUM_THINGS_DECK = (1, 1, 1, 2, 2, 3)
_MIN_OBJECT_CONTRAST = 42.0
"""CIE76 distance between an object and its background: both names are beyond doubt."""
_MIN_PATTERN_CONTRAST = 28.0
_MIN_CUT_CONTRAST = 48.0
"""Mean difference of two backgrounds, in RGB and in HSV, so that a cut is seen as one.

A common threshold of content detectors is 27 in HSV; objects and coding take some of the rest.
"""
_SHADES = ("", "", "", "dark", "dark", "light")


def plan_shot(
    decks: Decks,
    number: int,
    ticks: tuple[int, int, int, int],
    size: tuple[int, int],
    rate: int,
    mood: str,
    before: Background | None,
    rng: np.random.Generator,
) -> Shot:
    """Returns a shot that differs visibly from the one before.

    Args:
        decks: Deal the main object, the background and the camera.
        number: Of the shot in the whole corpus.
        ticks: ``first, start, end, last`` of the shot.
        size: Width and height of the video.
        rate: Ticks per second.
        mood: "", "still" or "strobe".
        before: Background of the previous shot.
        rng: The video's generator; advanced.
    """
    camera = "still" if mood else decks.draw("camera", _CAMERA_DECK, number)
    action = decks.draw("action", ACTIONS, number)
    if mood:
        action = STAYS
    elif camera != "still":
        action = "rotates" if rng.random() < 0.3 else STAYS
    things = _plan_things(decks, number, action, size, mood, camera, rng)
    return Shot(
        *ticks,
        background=_plan_background(decks, number, things, before, rng),
        things=things,
        camera=camera,
        strobe_hz=float(rng.choice([8, 10, rate / 3])) if mood == "strobe" else 0.0,
    )


def _plan_things(
    decks: Decks,
    number: int,
    action: str,
    size: tuple[int, int],
    mood: str,
    camera: str,
    rng: np.random.Generator,
) -> tuple[Thing, ...]:
    """Returns one to three objects, each in a lane of its own, the main one first."""
    count = decks.draw("num_things", _NUM_THINGS_DECK, number)
    if action == "orbits" or camera.startswith("zoom"):
        count = min(count, 2)
    if action in ("moves left", "moves right") or camera.startswith("pan"):
        rows = True
    elif action in ("moves up", "moves down", "bounces"):
        rows = False
    else:
        rows = bool(size[1] > size[0])
    colours: list[str] = []
    things: list[Thing] = []
    for place, lane in enumerate(rng.permutation(count).tolist()):
        if place == 0:
            colour = decks.draw("colour", tuple(COLOURS), number)
            shape = decks.draw("shape", SHAPES, number)
        else:
            others = [COLOURS[name] for name in colours]
            colour = _pick(
                [
                    name
                    for name, rgb in COLOURS.items()
                    if all(contrast(rgb, other) >= _MIN_OBJECT_CONTRAST for other in others)
                ],
                rng,
            )
            shape = _pick([name for name in SHAPES if name != things[0].shape], rng)
            if not mood:
                action = _companion_action(rows, camera, rng)
        if action == "rotates" and shape not in TURNABLE:
            shape = _pick(sorted(TURNABLE), rng)
        colours.append(colour)
        box = _lane(rows, lane, count, size)
        crowded = count == 3 or (count == 2 and camera != "still")
        things.append(_place(shape, colour, action, box, size, crowded, rows, rng))
    return tuple(things)


def _companion_action(rows: bool, camera: str, rng: np.random.Generator) -> str:
    if camera != "still" or rng.random() < 0.4:
        return STAYS
    along = ["moves left", "moves right"] if rows else ["moves up", "moves down", "bounces"]
    return _pick([*along, "rotates", "blinks"], rng)


def _lane(
    rows: bool, lane: int, count: int, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Returns (left, top, right, bottom) of one of ``count`` rows or columns of the picture."""
    width, height = size
    if rows:
        return 0.0, height * lane / count, float(width), height * (lane + 1) / count
    return width * lane / count, 0.0, width * (lane + 1) / count, float(height)


def _place(
    shape: str,
    colour: str,
    action: str,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    crowded: bool,
    rows: bool,
    rng: np.random.Generator,
) -> Thing:
    """Returns an object that stays inside its lane whatever it does."""
    left, top, right, bottom = box
    sizes = ["small", "medium", "large"]
    if crowded or action in ("orbits", "blinks"):
        sizes.remove("large")
    if action in ("grows", "shrinks"):
        sizes.remove("small")
    word = _pick(sizes, rng)
    room = min(right - left, bottom - top)
    diameter = min(SIZES[word] * min(size) * rng.uniform(0.92, 1.08), room * 0.86)
    reach = diameter / 2 + 3
    low_x, high_x = left + reach, right - reach
    low_y, high_y = top + reach, bottom - reach
    x, y = (left + right) / 2, (top + bottom) / 2
    # Off the middle along the lane, but not so far that a camera move cuts the object off.
    if rows:
        x += rng.uniform(-0.12, 0.12) * (right - left)
    else:
        y += rng.uniform(-0.12, 0.12) * (bottom - top)
    start = end = (x, y)
    slack = rng.uniform(0, 0.12, 2)
    rate, radius = 0.0, 0.0
    if action in ("moves left", "moves right"):
        ends = (low_x + slack[0] * (high_x - low_x), high_x - slack[1] * (high_x - low_x))
        start, end = ((ends[0], y), (ends[1], y))
        if action == "moves left":
            start, end = end, start
    elif action in ("moves up", "moves down"):
        ends = (low_y + slack[0] * (high_y - low_y), high_y - slack[1] * (high_y - low_y))
        start, end = ((x, ends[0]), (x, ends[1]))
        if action == "moves up":
            start, end = end, start
    elif action == "bounces":
        top_y = low_y + (0.1 + 3 * slack[0]) * (high_y - low_y)
        start, end = (x, top_y), (x, high_y)
        rate = rng.uniform(0.7, 1.1)
    elif action == "orbits":
        x, y = (left + right) / 2, (top + bottom) / 2
        start = end = (x, y)
        radius = room / 2 - reach
        rate = rng.uniform(0.3, 0.5) * float(rng.choice([-1, 1]))
    elif action == "rotates":
        rate = rng.uniform(0.2, 0.5) * float(rng.choice([-1, 1]))
    elif action == "blinks":
        rate = rng.uniform(0.8, 1.4)
    phase = 0.0 if action == "rotates" else rng.uniform(0, 2 * math.pi)
    rgb = _vary(COLOURS[colour], rng)
    return Thing(
        shape, colour, rgb, word, diameter, action, start, end, rate, radius, phase,
        shaded=bool(rng.random() < 0.5),
    )  # fmt: skip


def _plan_background(
    decks: Decks,
    number: int,
    things: tuple[Thing, ...],
    before: Background | None,
    rng: np.random.Generator,
) -> Background:
    """Returns a background the objects stand out from and the cut to which is seen.

    The deck's kind and colour are given up, in this order of patience, only if nothing fits.
    """
    best, best_score = None, -1.0
    previous = None if before is None else _thumbnail(before)
    for attempt in range(120):
        kind = decks.draw("background", BACKGROUNDS, number)
        if attempt >= 60:
            kind = _pick(list(BACKGROUNDS), rng)
        wanted = decks.draw("ground", tuple(COLOURS), number) if attempt < 12 else None
        candidate = _random_background(kind, wanted, rng)
        score = min(
            contrast(thing.rgb, rgb) / _MIN_OBJECT_CONTRAST
            for thing in things
            for rgb in _ground_rgbs(candidate)
        )
        if kind not in ("plain", "starry"):
            score = min(score, contrast(*candidate.rgbs) / _MIN_PATTERN_CONTRAST)
        if previous is not None and score > best_score:
            score = min(score, difference(previous, _thumbnail(candidate)) / _MIN_CUT_CONTRAST)
        if score > best_score:
            best, best_score = candidate, score
        if best_score >= 1:
            break
    assert best is not None
    return best


def _ground_rgbs(background: Background) -> list[RGB]:
    """Returns the colours an object may lie on, what two of them blend to included."""
    first, second = background.rgbs
    if background.kind in ("plain", "starry"):
        return [first]
    if background.kind not in ("gradient", "cloudy", "grainy"):
        return [first, second]
    red, green, blue = ((a + b) // 2 for a, b in zip(first, second, strict=True))
    return [first, second, (red, green, blue)]


def _random_background(kind: str, wanted: str | None, rng: np.random.Generator) -> Background:
    if kind in SCENES:
        skies, grounds = SCENES[kind]
        first, second = _pick(list(skies), rng), _pick(list(grounds), rng)
        if wanted in skies:
            first = wanted
        shade = "dark" if kind == "starry" and first != "black" else ""
    else:
        first = wanted or _pick(list(COLOURS), rng)
        second = _pick([name for name in COLOURS if name != first], rng)
        shade = _pick(list(_SHADES), rng)
        named = {first} if kind == "plain" else {first, second}
        if not named <= {"dark": DARKENED, "light": LIGHTENED}.get(shade, named):
            shade = ""
    rgbs = tuple(_vary(_shaded(COLOURS[name], shade), rng) for name in (first, second))
    if kind == "starry":
        rgbs = (rgbs[0], COLOURS["white"])
    direction = _pick(["horizontal", "vertical", "diagonal"], rng)
    return Background(
        kind, (first, second), (rgbs[0], rgbs[1]), shade, direction, int(rng.integers(2**31))
    )


def _shaded(rgb: RGB, shade: str) -> RGB:
    if shade == "dark":
        return (int(rgb[0] * 0.42), int(rgb[1] * 0.42), int(rgb[2] * 0.42))
    if shade == "light":
        return (128 + rgb[0] // 2, 128 + rgb[1] // 2, 128 + rgb[2] // 2)
    return rgb


def _vary(rgb: RGB, rng: np.random.Generator) -> RGB:
    """Returns a colour a little off, as no two real reds are the same."""
    red, green, blue = np.clip(np.array(rgb) + rng.integers(-9, 10, 3), 0, 255).tolist()
    return red, green, blue


def _pick(items: list[str], rng: np.random.Generator) -> str:
    return items[int(rng.integers(len(items)))]


def contrast(first: RGB, second: RGB) -> float:
    """Returns the CIE76 distance of two colours: 2 is barely visible, 100 black and white."""
    pair = np.array([[first, second]], np.float32) / 255
    lab = cv2.cvtColor(pair, cv2.COLOR_RGB2Lab)[0]
    return float(np.linalg.norm(lab[0] - lab[1]))


def _thumbnail(background: Background) -> np.ndarray:
    return draw_background(background, 48, 36)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean absolute difference of two pictures in RGB or HSV, whichever is less."""
    in_hsv = cv2.absdiff(
        cv2.cvtColor(first, cv2.COLOR_RGB2HSV), cv2.cvtColor(second, cv2.COLOR_RGB2HSV)
    )
    return float(min(cv2.absdiff(first, second).mean(), in_hsv.mean()))
