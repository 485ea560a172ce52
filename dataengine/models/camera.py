# SPDX-License-Identifier: Apache-2.0
"""Neighbouring frames -> how the camera moved between them.

Frames are fractions of a second apart, so what is seen may shift by a third of the picture.
Matched ORB features bridge that where there is detail, tracked grid points where there is none;
each proposes a similarity, and the pictures decide: a proposal counts only if it explains most
of the textured picture, and better than a camera at rest does. Textures in one place only are
those of an object and say nothing of the camera.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

_CELLS = (6, 8)
_CONTRAST = 2.5  # of 255: less is JPEG noise


_Features = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True, slots=True)
class Camera:
    """How the view moves from the first frame to the last."""

    pan_x: float
    """Way of the camera in widths, positive to the right; what is seen goes the other way."""
    pan_y: float
    """The same in heights, positive down."""
    zoom: float
    """Magnification of the end over the start."""


def follow_camera(grays: Sequence[np.ndarray]) -> tuple[Camera | None, list[np.ndarray | None]]:
    """Returns the camera's movement, and per neighbouring pair the 2x3 map from one to the next.

    Args:
        grays: uint8 HW, of one size, in time order.

    Returns:
        None instead of a camera where fewer than half of the pairs can be told, and instead of
        each map that cannot.
    """
    features = [_find_features(gray) for gray in grays]
    maps = [
        _map_between(before, after, *found)
        for (before, after), found in zip(pairwise(grays), pairwise(features), strict=True)
    ]
    known = [matrix for matrix in maps if matrix is not None]
    if not known or len(known) < 0.5 * len(maps):
        return None, maps
    height, width = grays[0].shape[:2]
    centre = np.array([width / 2, height / 2, 1.0])
    shifts = np.array([matrix @ centre - centre[:2] for matrix in known])
    scales = [float(np.hypot(matrix[0, 0], matrix[1, 0])) for matrix in known]
    whole = len(maps) / len(known)  # pairs that cannot be told move as the others do
    pan_x, pan_y = -shifts.sum(axis=0) * whole / (width, height)
    return Camera(float(pan_x), float(pan_y), float(np.prod(scales) ** whole)), maps


def changed_pixels(before: np.ndarray, after: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Returns a bool mask of the pixels of ``after`` that the camera's map does not explain."""
    difference, seen = _difference(before, after, matrix)
    return (difference > 18) & seen


def _difference(
    before: np.ndarray, after: np.ndarray, matrix: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smoothed absolute difference after the map, and where both frames are seen."""
    seen = np.ones(before.shape, np.uint8)
    if matrix is not None:
        size = before.shape[1], before.shape[0]
        before = cv2.warpAffine(before, matrix, size)
        seen = cv2.erode(cv2.warpAffine(seen, matrix, size), np.ones((3, 3), np.uint8))
    return cv2.GaussianBlur(cv2.absdiff(before, after), (5, 5), 0), seen > 0


def _map_between(
    before: np.ndarray, after: np.ndarray, features_before: _Features, features_after: _Features
) -> np.ndarray | None:
    """Returns the map of the camera between two frames, or None if it cannot be told."""
    rest = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    contrast = _cells(after, np.std)
    textured = contrast > _CONTRAST
    halves = (textured[:3].any(), textured[3:].any(), textured[:, :4].any(), textured[:, 4:].any())
    if textured.mean() < 0.3 or not all(halves):
        return None
    rest_error = _cells(_difference(before, after, None)[0], np.mean)
    # A frame that is all but the same was taken by a camera at rest.
    if np.mean(rest_error[textured] < 2.0) > 0.9:
        return rest
    best, best_ratio = rest, 0.7
    for propose in (
        lambda: _match_features(features_before, features_after),
        lambda: _track_points(before, after),
    ):
        matrix = propose() if best_ratio > 0.5 else None
        if matrix is None or not 0.6 < np.hypot(matrix[0, 0], matrix[1, 0]) < 1.7:
            continue
        difference, seen = _difference(before, after, matrix)
        error = _cells(difference, np.mean)
        overlap = textured & (_cells(seen, np.mean) > 0.9)
        if overlap.sum() < 0.2 * textured.size:
            continue
        explained = np.mean(error[overlap] < 0.5 * contrast[overlap] + 1.5)
        ratio = float(np.median((error[overlap] + 0.7) / (rest_error[overlap] + 0.7)))
        if explained > 0.5 and ratio < best_ratio:
            best, best_ratio = matrix, ratio
    if best is rest and np.mean(rest_error[textured] < 0.5 * contrast[textured] + 1.5) < 0.6:
        return None
    return best


def _cells(picture: np.ndarray, measure: Callable[..., np.ndarray]) -> np.ndarray:
    """Returns a measure of each cell of a grid over a picture, float [6, 8]."""
    rows, columns = _CELLS
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    blocks = picture[: height * rows, : width * columns].reshape(rows, height, columns, width)
    return measure(blocks.astype(np.float32), axis=(1, 3))


def _find_features(gray: np.ndarray) -> _Features:
    """Returns the places [N, 2] and descriptors of a picture's ORB features."""
    detector = cv2.ORB.create(nfeatures=250, edgeThreshold=8, patchSize=17, fastThreshold=8)
    points, codes = detector.detectAndCompute(gray, None)
    return np.array([point.pt for point in points], np.float32).reshape(-1, 2), codes


def _match_features(before: _Features, after: _Features) -> np.ndarray | None:
    """Returns the similarity that most matched ORB features agree on, or None."""
    (points_a, codes_a), (points_b, codes_b) = before, after
    if codes_a is None or codes_b is None:
        return None
    matches = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(codes_a, codes_b)
    if len(matches) < 8:
        return None
    a = points_a[[match.queryIdx for match in matches]]
    b = points_b[[match.trainIdx for match in matches]]
    matrix, _ = cv2.estimateAffinePartial2D(a, b, ransacReprojThreshold=2.5)
    return matrix


def _track_points(before: np.ndarray, after: np.ndarray) -> np.ndarray | None:
    """Returns the similarity that most points of a grid agree on when tracked, or None."""
    height, width = before.shape[:2]
    xs, ys = np.meshgrid(np.linspace(0.1, 0.9, 10) * width, np.linspace(0.1, 0.9, 8) * height)
    grid = np.stack([xs.ravel(), ys.ravel()], axis=1).astype(np.float32)[:, None]
    moved, found, _ = cv2.calcOpticalFlowPyrLK(
        before, after, grid, np.empty_like(grid), winSize=(21, 21), maxLevel=3
    )
    good = found.ravel() > 0
    if good.sum() < 20:
        return None
    matrix, _ = cv2.estimateAffinePartial2D(grid[good], moved[good], ransacReprojThreshold=1.5)
    return matrix
