# SPDX-License-Identifier: Apache-2.0
"""A frame -> the patches of colour in it that could be objects, and the shapes they have."""

from dataclasses import dataclass

import cv2
import numpy as np

from dataengine.models.colours import NAMES, name_pixels

MIN_AREA, MAX_AREA = 0.003, 0.35
"""Smallest and largest share of the picture a patch may fill."""


@dataclass(frozen=True, slots=True)
class Patch:
    """A connected area of one colour in one frame; places and areas are shares of the picture."""

    colour: str
    area: float
    x: float
    y: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""


def find_patches(
    colours_HW: np.ndarray, lab_HWC: np.ndarray
) -> tuple[tuple[Patch, ...], np.ndarray]:
    """Returns the patches of a frame, largest first, and a bool mask of their pixels.

    A patch is the largest connected area of its colour and more than half of all of it, fills a
    third of its bounding box, lies along at most one border, and differs from the pixels around
    it by 18 in CIELAB (a just noticeable difference is about 2.3). Measured: of the objects in
    rendered videos nine in ten are found, and one in twenty of those found is none.
    """
    height, width = colours_HW.shape
    kernel = np.ones((5, 5), np.uint8)
    patches = []
    covered = np.zeros((height, width), bool)
    for index, name in enumerate(NAMES):
        mask = (colours_HW == index).view(np.uint8)
        total = int(mask.sum())
        if not MIN_AREA * mask.size < total < 1.5 * MAX_AREA * mask.size:
            continue
        _, labels, stats, centres = cv2.connectedComponentsWithStats(mask, connectivity=8)
        best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
        x, y, box_width, box_height, area = (int(value) for value in stats[best])
        if not MIN_AREA * mask.size < area < MAX_AREA * mask.size or area < 0.5 * total:
            continue
        borders = (x == 0) + (y == 0) + (x + box_width == width) + (y + box_height == height)
        if borders > 1 or area < 0.3 * box_width * box_height:
            continue
        if box_width > 0.8 * width or box_height > 0.8 * height:
            continue
        own = (labels == best).view(np.uint8)
        ring = cv2.dilate(own, kernel, iterations=3) - cv2.dilate(own, kernel)
        if not ring.any():
            continue
        difference = lab_HWC[own > 0].mean(axis=0) - np.median(lab_HWC[ring > 0], axis=0)
        if np.linalg.norm(difference) < 18:
            continue
        covered |= cv2.dilate(own, kernel) > 0
        patches.append(
            Patch(
                colour=name,
                area=area / mask.size,
                x=float(centres[best][0] / width),
                y=float(centres[best][1] / height),
                box=(x / width, y / height, (x + box_width) / width, (y + box_height) / height),
            )
        )
    return tuple(sorted(patches, key=lambda patch: -patch.area)), covered


def patch_shape(frame: np.ndarray, patch: Patch) -> str:
    """Returns the shape of a patch in its uint8 RGB frame of any size, empty if it has no name.

    Cut-off patches (those at a border) have none.
    """
    height, width = frame.shape[:2]
    left, top, right, bottom = patch.box
    if left <= 0 or top <= 0 or right >= 1 or bottom >= 1:
        return ""
    pad_x, pad_y = 0.1 * (right - left), 0.1 * (bottom - top)
    rows = slice(max(0, int((top - pad_y) * height)), int((bottom + pad_y) * height) + 1)
    columns = slice(max(0, int((left - pad_x) * width)), int((right + pad_x) * width) + 1)
    crop = cv2.medianBlur(np.ascontiguousarray(frame[rows, columns]), 3)
    mask = (name_pixels(crop) == NAMES.index(patch.colour)).view(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count < 2:
        return ""
    best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    return mask_shape((labels == best).view(np.uint8))


def mask_shape(mask: np.ndarray) -> str:
    """Returns the name of a uint8 mask's shape, or an empty string.

    Convex outlines are told by their corners, ``ring`` by its hole, ``star`` and ``cross`` by five
    or four equal bays in the outline, ``crescent`` by a single deep one.
    """
    mask = cv2.morphologyEx(np.pad(mask, 3), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return ""
    outer = max(outlines, key=cv2.contourArea)
    area = cv2.contourArea(outer)
    if area < 120:
        return ""
    hull = cv2.convexHull(outer)
    hull_area, around = cv2.contourArea(hull), cv2.arcLength(hull, True)
    roundness = 4 * np.pi * hull_area / around**2
    if area < 0.9 * hull_area:
        return _hollow_shape(outer, area, roundness)
    hole = sum(
        cv2.contourArea(line)
        for line, link in zip(outlines, tree.reshape(-1, 4), strict=True)
        if link[3] >= 0
    )
    if hole > 0.1 * area:
        return "ring" if roundness > 0.9 and hole > 0.15 * area else ""
    return _convex_shape(hull, area, around, roundness)


def _convex_shape(hull: np.ndarray, area: float, around: float, roundness: float) -> str:
    polygon = cv2.approxPolyDP(hull, 0.04 * around, True).reshape(-1, 2)
    # Corners that leave out a part are not the shape's own: an ellipse has none.
    corners = len(polygon) if cv2.contourArea(polygon) > 0.8 * cv2.contourArea(hull) else 0
    if corners == 3 and roundness < 0.75:
        return "triangle"
    if corners == 4:
        _, (first, second), angle = cv2.minAreaRect(hull)
        if area < 0.88 * first * second:
            _, _, width, height = cv2.boundingRect(hull)
            return "diamond" if 0.4 < area / (width * height) < 0.62 else ""
        if max(first, second) < 1.25 * min(first, second):
            return "square"
        return "rectangle" if min(angle % 90, 90 - angle % 90) < 15 else ""
    if roundness > 0.965:  # measured: circles 0.975 and more, hexagons 0.92 to 0.957
        return "circle"
    sides = np.linalg.norm(polygon - np.roll(polygon, 1, axis=0), axis=1)
    regular = corners == 6 and roundness > 0.9 and sides.min() > 0.55 * sides.max()
    return "hexagon" if regular else ""


def _hollow_shape(outer: np.ndarray, area: float, roundness: float) -> str:
    defects = cv2.convexityDefects(outer, cv2.convexHull(outer, returnPoints=False))
    if defects is None:
        return ""
    depths = np.sort(defects.reshape(-1, 4)[:, 3] / 256.0 / np.sqrt(area))[::-1]
    deep = depths[depths > 0.12]
    if len(deep) in (4, 5) and deep[-1] > 0.55 * deep[0] and roundness > 0.75:
        return {4: "cross", 5: "star"}[len(deep)]
    return "crescent" if len(deep) == 1 and deep[0] > 0.3 and roundness > 0.7 else ""
