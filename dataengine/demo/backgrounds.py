# SPDX-License-Identifier: Apache-2.0
"""Backgrounds as pure functions of a `Background` and a size.

Cells, stripes and dots are measured in heights of the picture, so size changes only sharpness.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dataengine.demo.scene import Background

Mask = NDArray[Any]
"""float32, height x width, in [0, 1]."""
Picture = NDArray[Any]
"""uint8 RGB, height x width x 3. (OpenCV's stubs do not say which type comes out.)"""

Colours = NDArray[Any]
"""float32 RGB in [0, 255]: one colour, or a picture not yet clipped and rounded."""


def draw_background(background: Background, width: int, height: int) -> Picture:
    """Returns the background; the same one, coarser or finer, whatever the size."""
    rng = np.random.default_rng(background.seed)
    first, second = (np.array(rgb, np.float32) for rgb in background.rgbs)
    kind = background.kind
    if kind == "plain":
        light = _fractal(width, height, (3, 2), 1, 1.0, rng)
        picture = first * (0.96 + 0.08 * light[..., None])
    elif kind == "mountains":
        picture = _mountains(first, second, width, height, rng)
    elif kind == "sea":
        picture = _sea(first, second, width, height, rng)
    elif kind == "city":
        picture = _city(first, second, width, height, rng)
    elif kind == "starry":
        picture = _starry(first, second, width, height, rng)
    else:
        mask = _mask(kind, background.direction, width, height, rng)[..., None]
        picture = first * mask + second * (1 - mask)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _mask(kind: str, direction: str, width: int, height: int, rng: np.random.Generator) -> Mask:
    """Returns how much of the first colour each pixel has."""
    if kind == "cloudy":
        noise = _fractal(width, height, (4, 3), 5, 0.55, rng)
        return np.clip((noise - 0.5) * 1.8 + 0.5, 0, 1)
    if kind == "grainy":
        # Grain of about two pixels, whose picture survives both encoding and a slow pan.
        grain = rng.random((180, 240), np.float32)
        noise = cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)
        return np.clip(noise * 1.6 - 0.3, 0, 1).astype(np.float32)
    xs, ys = np.meshgrid(
        np.arange(width, dtype=np.float32) / height, np.arange(height, dtype=np.float32) / height
    )
    along = {"horizontal": ys, "vertical": xs, "diagonal": (xs + ys) * 0.7071}[direction]
    if kind == "gradient":
        return ((along - along.min()) / (along.max() - along.min())).astype(np.float32)
    cell = float(rng.choice([0.08, 0.14, 0.22]))
    soft = 200 * max(1.0, height / 240)  # an edge of about one pixel, so nothing shimmers
    if kind == "striped":
        return _edge(np.sin(along * np.pi / cell), cell, soft)
    if kind == "checkered":
        return _edge(np.sin(xs * np.pi / cell) * np.sin(ys * np.pi / cell), cell, soft)
    if kind == "dotted":
        pitch = max(cell, 0.12)
        dx = (xs + (np.floor(ys / pitch) % 2) * pitch / 2) % pitch - pitch / 2
        dy = ys % pitch - pitch / 2
        return np.clip((np.hypot(dx, dy) - 0.28 * pitch) * soft + 0.5, 0, 1).astype(np.float32)
    raise ValueError(f"unknown background: {kind}")


def _edge(wave: Mask, cell: float, soft: float) -> Mask:
    """Returns a wave in [-1, 1] turned into steps from 0 to 1 with edges one pixel wide."""
    return np.clip(wave * soft * cell / np.pi + 0.5, 0, 1).astype(np.float32)


def _fractal(
    width: int,
    height: int,
    grid: tuple[int, int],
    octaves: int,
    gain: float,
    rng: np.random.Generator,
) -> Mask:
    """Returns smooth noise in [0, 1]: octaves of random grids, each finer and weaker."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        size = (grid[1] << octave, grid[0] << octave)
        layer = cv2.resize(
            rng.random(size, np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
        total += gain**octave * layer
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _ridge(width: int, low: float, high: float, points: int, rng: np.random.Generator) -> Mask:
    """Returns a jagged line: one height in [low, high] per column."""
    line = np.zeros(width, np.float32)
    for octave in range(4):
        knots = rng.random(points * 2**octave + 1)
        line += 0.5**octave * np.interp(
            np.linspace(0, len(knots) - 1, width), np.arange(len(knots)), knots
        ).astype(np.float32)
    return low + (high - low) * (line - line.min()) / (np.ptp(line) + 1e-6)


def _sky(colour: Colours, width: int, height: int, rng: np.random.Generator) -> Colours:
    """Returns a sky that pales towards the horizon, with faint clouds."""
    fall = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    clouds = np.clip(_fractal(width, height, (3, 6), 4, 0.5, rng) - 0.6, 0, 1) * 0.7
    pale = np.clip(0.22 * fall + clouds, 0, 1)[..., None]
    return colour * (1 - pale) + 255 * pale


def _mountains(
    sky: Colours,
    ground: Colours,
    width: int,
    height: int,
    rng: np.random.Generator,
) -> Colours:
    """Returns three ridges, each nearer, lower and darker than the one behind."""
    picture = _sky(sky, width, height, rng)
    rows = np.arange(height, dtype=np.float32)[:, None] / height
    for top, bottom, haze in ((0.34, 0.56, 0.35), (0.5, 0.7, 0.15), (0.66, 0.84, 0.0)):
        ridge = _ridge(width, top, bottom, 4, rng)
        inside = np.clip((rows - ridge) * height, 0, 1)[..., None]
        fold = 0.9 + 0.2 * _fractal(width, height, (12, 8), 3, 0.6, rng)[..., None]
        picture = picture * (1 - inside) + (ground * (1 - haze) + sky * haze) * fold * inside
    return picture


def _sea(
    sky: Colours,
    water: Colours,
    width: int,
    height: int,
    rng: np.random.Generator,
) -> Colours:
    """Returns a flat horizon over water with flat waves, broader towards the viewer."""
    horizon = int(height * 0.45)
    picture = _sky(sky, width, height, rng)
    waves = _fractal(width, height - horizon, (5, 24), 3, 0.7, rng)[..., None]
    picture[horizon:] = water * (0.72 + 0.5 * waves)
    return picture


def _city(
    sky: Colours,
    wall: Colours,
    width: int,
    height: int,
    rng: np.random.Generator,
) -> Colours:
    """Returns two rows of houses with some lit windows."""
    picture = _sky(sky, width, height, rng)
    for base, haze in ((0.35, 0.3), (0.55, 0.0)):
        x = 0.0
        while x < 1.6:
            house = rng.uniform(0.07, 0.15)
            top = base + rng.uniform(0, 0.28)
            left, right = int(x * height), min(int((x + house) * height) + 1, width)
            colour = wall * (1 - haze) + sky * haze
            picture[int(top * height) :, left:right] = colour * rng.uniform(0.85, 1.1)
            lit = rng.random((14, 4)) < 0.3
            for row, column in zip(*np.nonzero(lit), strict=True):
                y0 = int((top + 0.03 + row * 0.05) * height)
                x0 = left + int((0.15 + column * 0.2) * house * height)
                side = max(height // 80, 1)
                if haze == 0 and x0 + side < right:
                    picture[y0 : y0 + side + 1, x0 : x0 + side] = (250, 224, 150)
            x += house + rng.uniform(0, 0.02)
    return picture


def _starry(
    sky: Colours,
    star: Colours,
    width: int,
    height: int,
    rng: np.random.Generator,
) -> Colours:
    """Returns a dark sky with stars of several sizes."""
    glow = _fractal(width, height, (3, 4), 3, 0.5, rng)[..., None]
    picture = sky * (0.8 + 0.5 * glow)
    layer = np.zeros((height, width), np.uint8)
    for x, y, radius in zip(rng.random(150), rng.random(150), rng.random(150), strict=True):
        centre = (int(x * 1.6 * height * 16), int(y * height * 16))
        size = int((0.4 + 1.3 * radius**4) * 16 * height / 240)
        cv2.circle(layer, centre, size, 255, -1, cv2.LINE_AA, 4)
    weight = layer[..., None].astype(np.float32) / 255
    return picture * (1 - weight) + star * weight
