# SPDX-License-Identifier: Apache-2.0
"""Lightness of a picture -> one word for what its surface is like."""

import cv2
import numpy as np


def steepness(lightness: np.ndarray) -> np.ndarray:
    """Returns how much CIELAB L changes per pixel, float32 HW."""
    slope_x = cv2.Sobel(lightness, cv2.CV_32F, 1, 0, scale=0.125)
    slope_y = cv2.Sobel(lightness, cv2.CV_32F, 0, 1, scale=0.125)
    return cv2.magnitude(slope_x, slope_y)


def name_texture(lightness: np.ndarray, covered: np.ndarray) -> str:
    """Returns a word for a picture's ground, empty if none fits.

    Args:
        lightness: float32 HW, 0 to 100, about 120 px on the short side.
        covered: bool HW, True for objects, which are no part of the ground.

    Returns:
        ``plain``, ``horizontally striped``, ``vertically striped``, ``diagonally striped``,
        ``checkered``, ``dotted``, ``starry`` (a few small lights on dark), ``gradient``,
        ``grainy``, ``soft`` (changes slowly), ``detailed`` (edges all over), or empty.
    """
    ground = lightness[~covered]
    if not len(ground):
        return ""
    spread = float(ground.std())
    filled = np.where(covered, float(ground.mean()), lightness).astype(np.float32)
    steep = steepness(filled)
    edges = float((steep > 4).mean())
    small = cv2.resize(filled, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    hidden = cv2.resize(covered.astype(np.uint8), small.shape[::-1]) > 0
    patterned = spread > 2.5 and edges > 0.005
    pattern = _stripes(small) if patterned else ""
    pattern = pattern or _dots(filled, covered, edges) or (_checks(small) if patterned else "")
    if pattern:
        return pattern
    if spread > 1.5 and _plane_share(small, hidden) > 0.8 and edges < 0.08:
        return "gradient"
    rough = filled - cv2.GaussianBlur(filled, (0, 0), 3)
    roughness = float(rough[~covered].std())
    # Noise is rough everywhere (0.8 if Gaussian), print and stars in few places.
    everywhere = float(np.abs(rough[~covered]).mean()) > 0.7 * roughness
    if roughness > 1 and roughness > 0.75 * spread and everywhere:
        return "grainy"
    if edges < 0.05:
        soft = roughness < 0.35 * spread and float((steep > 10).mean()) < 0.002
        return "plain" if spread < 4 else "soft" if soft else ""
    return "detailed" if edges > 0.3 else ""


def _stripes(picture: np.ndarray) -> str:
    """Returns which way stripes run, if lightness depends on one direction alone, and alternates.

    Stripes explain 70 % of the variance by the mean along their direction, which crosses its own
    average at least four times (a horizon does so once).
    """
    ys, xs = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]]
    lines = {
        "horizontally striped": ys,
        "vertically striped": xs,
        "diagonally striped": xs + ys,
        "diagonally striped ": xs - ys + picture.shape[0],
    }
    values = picture.ravel()
    for name, line in lines.items():
        where = line.ravel()
        count = np.bincount(where)
        mean = np.bincount(where, values) / np.maximum(count, 1)
        explained = np.average((mean[where] - values.mean()) ** 2) / (values.var() + 1e-9)
        profile = mean[count > 0.3 * count.max()]
        if explained > 0.7 and _crossings(profile) >= 4:
            return name.strip()
    return ""


def _checks(picture: np.ndarray) -> str:
    """Returns ``checkered`` if the picture is the product of a row and a column that alternate.

    The first term of the singular value decomposition then holds most of the variance.
    """
    left, sizes, right = np.linalg.svd(picture - picture.mean(), full_matrices=False)
    if sizes[0] ** 2 < 0.6 * np.sum(sizes**2):
        return ""
    for profile in (left[:, 0], right[0]):
        level = np.abs(profile).mean() / (profile.std() + 1e-9)
        if _crossings(profile) < 3 or level < 0.75:  # a sine has 0.9, a few lines on a page less
            return ""
    return "checkered"


def _crossings(profile: np.ndarray) -> int:
    """Returns how often a profile goes from well above its middle to well below, or back."""
    middle = (np.percentile(profile, 10) + np.percentile(profile, 90)) / 2
    swing = np.ptp(np.percentile(profile, [10, 90])) / 4
    far = (profile - middle)[np.abs(profile - middle) > swing]
    return int((np.sign(far[1:]) != np.sign(far[:-1])).sum())


def _dots(lightness: np.ndarray, covered: np.ndarray, edges: float) -> str:
    """Returns ``dotted`` for many spots of one size, ``starry`` for small lights on a dark ground.

    Spots are what differs from the middle lightness by 40 % of the range or more.
    """
    low, middle, high = np.percentile(lightness[~covered], [1, 50, 99.5])
    if high - low < 6 or edges > 0.4:
        return ""
    for sign in (1, -1):
        reach = high - middle if sign > 0 else middle - low
        if reach < 5:
            continue
        mask = ((sign * (lightness - middle) > 0.4 * reach) & ~covered).astype(np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        areas = stats[1:, cv2.CC_STAT_AREA]
        share = mask[~covered].mean()
        if count > 12 and share < 0.04 and middle < 45 and sign > 0 and np.median(areas) < 8:
            return "starry"
        whole = areas[areas > 0.4 * np.median(areas)] if len(areas) else areas
        even = len(whole) > 10 and whole.std() < 0.35 * whole.mean() and whole.mean() > 12
        if even and 0.08 < share < 0.42:
            return "dotted"
    return ""


def _plane_share(picture: np.ndarray, hidden: np.ndarray) -> float:
    """Returns how much of the variance a plane explains: light that falls off evenly."""
    rows, columns = np.mgrid[-1 : 1 : picture.shape[0] * 1j, -1 : 1 : picture.shape[1] * 1j]
    values = picture[~hidden]
    plane = np.stack([rows[~hidden], columns[~hidden], np.ones(len(values))], axis=1)
    slope, *_ = np.linalg.lstsq(plane, values, rcond=None)
    return float(1 - np.var(values - plane @ slope) / (np.var(values) + 1e-9))
