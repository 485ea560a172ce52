# SPDX-License-Identifier: Apache-2.0
"""Frames of a plan as pure functions: poses of objects, the camera, blends between shots.

Pictures are uint8 RGB, height x width x 3. Affine maps are 2 x 3 float64, as OpenCV takes them.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from dataengine.demo.backgrounds import Picture, draw_background
from dataengine.demo.scene import STAYS, Plan, Shot, Thing

CANVAS = 1.3
"""A background's size over the frame's: the room in which the camera pans."""
PAN = 0.26
"""Distance of a pan over the frame's width; less than CANVAS - 1."""
ZOOM = 1.3
"""Magnification at the long end of a zoom."""
_SUPERSAMPLE = 4


def pose(thing: Thing, seconds: float, done: float) -> tuple[float, float, float, float, float]:
    """Returns (x, y, scale, angle, opacity) of an object before the camera moves.

    Args:
        thing: The object.
        seconds: Time since the shot was first seen.
        done: Part of the shot that is over, in [0, 1].
    """
    (x0, y0), (x1, y1) = thing.start, thing.end
    turn = 2 * math.pi * thing.rate * seconds + thing.phase
    scale, angle, opacity = 1.0, 0.0, 1.0
    x, y = x0, y0
    if thing.action.startswith("moves"):
        x, y = x0 + (x1 - x0) * done, y0 + (y1 - y0) * done
    elif thing.action == "grows":
        scale = 0.35 + 0.65 * done
    elif thing.action == "shrinks":
        scale = 1 - 0.65 * done
    elif thing.action == "rotates":
        angle = turn
    elif thing.action == "bounces":
        y = y1 + (y0 - y1) * abs(math.sin(turn / 2))
    elif thing.action == "blinks":
        opacity = min(max(0.5 + 1.2 * math.sin(turn), 0.0), 1.0)
    elif thing.action == "orbits":
        x, y = x0 + thing.radius * math.cos(turn), y0 + thing.radius * math.sin(turn)
    elif thing.action != STAYS:
        raise ValueError(f"unknown action: {thing.action}")
    return x, y, scale, angle, opacity


def camera_map(camera: str, done: float, width: int, height: int) -> NDArray[np.float64]:
    """Returns the map from a resting picture to what the camera shows, at a part of the shot."""
    zoom, shift = 1.0, 0.0
    if camera == "pan right":
        shift = PAN * width * (0.5 - done)
    elif camera == "pan left":
        shift = PAN * width * (done - 0.5)
    elif camera == "zoom in":
        zoom = ZOOM**done
    elif camera == "zoom out":
        zoom = ZOOM ** (1 - done)
    elif camera != "still":
        raise ValueError(f"unknown camera: {camera}")
    centre_x, centre_y = width / 2, height / 2
    return np.array(
        [[zoom, 0, centre_x * (1 - zoom) + shift], [0, zoom, centre_y * (1 - zoom)]], np.float64
    )


def outline(shape: str) -> list[NDArray[np.float64]]:
    """Returns a shape's polygons inside the unit circle, y down; a second one is a hole."""
    ring = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    circle = np.stack([np.cos(ring), np.sin(ring)], 1)
    if shape == "circle":
        return [circle]
    if shape == "ring":
        return [circle, circle * 0.58]
    if shape == "square":
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8]
    if shape == "diamond":
        return [np.array([[0, -1], [0.72, 0], [0, 1], [-0.72, 0]])]
    if shape == "triangle":
        return [np.array([[0, -1], [0.9, 0.72], [-0.9, 0.72]])]
    if shape == "hexagon":
        return [circle[[0, 11, 21, 32, 43, 53]]]
    if shape == "star":
        turn = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return [np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)]
    if shape == "cross":
        a, b = 0.32, 0.95
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return [np.array(corners + [(-x, -y) for x, y in corners])]
    if shape == "heart":
        x = 16 * np.sin(ring) ** 3
        y = 13 * np.cos(ring) - 5 * np.cos(2 * ring) - 2 * np.cos(3 * ring) - np.cos(4 * ring)
        return [np.stack([x / 17, -(y + 2.5) / 15.5], 1)]
    if shape == "crescent":
        half = math.acos(0.25)  # where the hollow circle, moved by half, meets the outer one
        outer = np.linspace(half, 2 * math.pi - half, 48)
        inner = np.linspace(2 * math.pi - (math.pi - half), math.pi - half, 48)
        return [
            np.concatenate(
                [
                    np.stack([np.cos(outer), np.sin(outer)], 1),
                    np.stack([np.cos(inner) + 0.5, np.sin(inner)], 1),
                ]
            )
        ]
    raise ValueError(f"unknown shape: {shape}")


def sprite(thing: Thing) -> tuple[Picture, Picture]:
    """Returns an object's picture times its coverage, and what of the ground stays, both 0..255."""
    side = math.ceil(thing.diameter) + 4
    big = side * _SUPERSAMPLE
    mask = np.zeros((big, big), np.uint8)
    for level, polygon in zip((255, 0), outline(thing.shape), strict=False):
        points = polygon * thing.diameter / 2 * _SUPERSAMPLE + big / 2
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], level)
    coverage = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)[..., None]
    light = np.ones((side, side, 1), np.float32)
    if thing.shaded:
        axis = np.linspace(-1, 1, side, dtype=np.float32)
        light = 1.08 - 0.16 * np.hypot(axis[None, :] + 0.4, axis[:, None] + 0.4)[..., None]
    colour = np.clip(np.array(thing.rgb, np.float32) * light, 0, 255)
    premultiplied = (colour * (coverage / 255.0)).astype(np.uint8)
    return premultiplied, np.repeat(255 - coverage, 3, axis=2)


class ShotPainter:
    """Draws the frames of one shot from a background and sprites made once."""

    def __init__(self, shot: Shot, width: int, height: int, rate: int) -> None:
        self.shot, self.width, self.height, self.rate = shot, width, height, rate
        canvas = (math.ceil(width * CANVAS), math.ceil(height * CANVAS))
        self.margin = ((canvas[0] - width) // 2, (canvas[1] - height) // 2)
        self.background = draw_background(shot.background, *canvas)
        self.sprites = [sprite(thing) for thing in shot.things]

    def frame(self, tick: int) -> Picture:
        """Returns the frame at a tick of the video."""
        done, camera = self._camera(tick)
        left, top = self.margin
        if self.shot.camera == "still":
            frame = self.background[top : top + self.height, left : left + self.width].copy()
        else:
            matrix = _chain(camera, np.array([[1, 0, -left], [0, 1, -top]], np.float64))
            frame = cv2.warpAffine(self.background, matrix, (self.width, self.height))
        seconds = (tick - self.shot.first) / self.rate
        for thing, picture in zip(self.shot.things, self.sprites, strict=True):
            self._paste(frame, thing, picture, camera, seconds, done)
        if self.shot.strobe_hz and int(2 * self.shot.strobe_hz * seconds) % 2:
            frame = cv2.convertScaleAbs(frame, alpha=0.2)
        return frame

    def box(self, thing: Thing, tick: int) -> tuple[int, int, int, int]:
        """Returns (left, top, right, bottom) of an object at a tick, clipped to the frame."""
        done, camera = self._camera(tick)
        x, y, scale, *_ = pose(thing, (tick - self.shot.first) / self.rate, done)
        centre_x, centre_y = camera @ (x, y, 1.0)
        reach = thing.diameter / 2 * scale * camera[0, 0]
        return (
            max(round(centre_x - reach), 0),
            max(round(centre_y - reach), 0),
            min(round(centre_x + reach), self.width),
            min(round(centre_y + reach), self.height),
        )

    def _camera(self, tick: int) -> tuple[float, NDArray[np.float64]]:
        done = (tick - self.shot.first) / max(self.shot.last - 1 - self.shot.first, 1)
        return done, camera_map(self.shot.camera, done, self.width, self.height)

    def _paste(
        self,
        frame: Picture,
        thing: Thing,
        picture: tuple[Picture, Picture],
        camera: NDArray[np.float64],
        seconds: float,
        done: float,
    ) -> None:
        """Draws one object into ``frame``, touching only the pixels under it."""
        x, y, scale, angle, opacity = pose(thing, seconds, done)
        if opacity <= 0:
            return
        middle = picture[0].shape[0] / 2
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        place = np.array(
            [
                [cos, -sin, x - cos * middle + sin * middle],
                [sin, cos, y - sin * middle - cos * middle],
            ]
        )
        matrix = _chain(camera, place)
        centre = matrix @ (middle, middle, 1.0)
        reach = middle * scale * camera[0, 0] * 1.1 + 2
        left, top = (max(math.floor(value - reach), 0) for value in centre)
        right = min(math.ceil(centre[0] + reach), self.width)
        bottom = min(math.ceil(centre[1] + reach), self.height)
        if right <= left or bottom <= top:
            return
        matrix[:, 2] -= (left, top)
        size = (right - left, bottom - top)
        colour = cv2.warpAffine(picture[0], matrix, size)
        ground = cv2.warpAffine(picture[1], matrix, size, borderValue=(255, 255, 255))
        if opacity < 1:
            colour = cv2.convertScaleAbs(colour, alpha=opacity)
            ground = cv2.convertScaleAbs(ground, alpha=opacity, beta=255 * (1 - opacity))
        area = frame[top:bottom, left:right]
        area[:] = cv2.add(cv2.multiply(area, ground, scale=1 / 255), colour)


def _chain(outer: NDArray[np.float64], inner: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the map that applies ``inner``, then ``outer``."""
    return outer @ np.vstack([inner, [0.0, 0.0, 1.0]])


def mix_at(plan: Plan, tick: int) -> list[tuple[int | str, float]]:
    """Returns what a frame is a sum of: (shot number, or "black" or "white", weight) pairs."""
    number = next(i for i, shot in enumerate(plan.shots) if tick < shot.end)
    for i in (number - 1, number):
        if not 0 <= i < len(plan.transitions):
            continue
        change = plan.transitions[i]
        if not change.start <= tick < change.end:
            continue
        if change.kind == "dissolve":
            weight = (tick - change.start + 1) / (change.end - change.start + 1)
            return [(i, 1 - weight), (i + 1, weight)]
        # A fade: down to one colour at the cut, up again from it, resting there for a moment.
        colour = change.kind.removeprefix("fade_")
        if tick < change.cut:
            weight = (tick - change.start + 1) / (change.cut - change.start)
        else:
            weight = (change.end - tick) / (change.end - change.cut)
        weight = min(weight * 1.15, 1.0)
        return [(number, 1 - weight), (colour, weight)]
    return [(number, 1.0)]


class VideoPainter:
    """Draws the frames of a plan, making each shot's pictures when they are first needed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._painters: dict[int, ShotPainter] = {}

    def painter(self, number: int) -> ShotPainter:
        """Returns the painter of a shot, made when first asked for."""
        if number not in self._painters:
            plan = self.plan
            self._painters[number] = ShotPainter(
                plan.shots[number], plan.width, plan.height, plan.rate
            )
        return self._painters[number]

    def frame(self, tick: int) -> Picture:
        """Returns the frame at a tick."""
        frames: list[tuple[Picture, float]] = []
        for part, weight in mix_at(self.plan, tick):
            if isinstance(part, int):
                frames.append((self.painter(part).frame(tick), weight))
            else:
                shape = (self.plan.height, self.plan.width, 3)
                frames.append((np.full(shape, 255 if part == "white" else 0, np.uint8), weight))
        if len(frames) == 1:
            return frames[0][0]
        (first, weight), (second, other) = frames
        return cv2.addWeighted(first, weight, second, other, 0)
