# SPDX-License-Identifier: Apache-2.0
"""Video measurements from a handful of frames: colour, light, texture, camera, objects, movement.

Nothing is recognised. An object is a patch of one named colour that holds together, stands out
from what surrounds it and is there in most frames. Lengths are shares of the picture's width or
height, areas of the picture. Thresholds without another source were set by reading captions of
48 real videos beside their frames, and on rendered ones with known truth.

Legend: H W a frame at working size (short side 120 px), T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.captioner import ClipFrames, SignalsVideoConfig, VideoCaptions
from dataengine.models.colours import NAMES, name_pixels
from dataengine.models.video_words import describe_clip, describe_frame

_SIDE = 120
_MIN_AREA, _MAX_AREA = 0.003, 0.35


@dataclass(frozen=True, slots=True)
class Patch:
    """A connected area of one colour in one frame."""

    colour: str
    area: float
    x: float
    y: float
    shape: str
    """``round``, ``square``, ``triangular``, ``ring-shaped``, or empty."""


@dataclass(frozen=True, slots=True)
class FrameSignals:
    """What is measured of one picture."""

    shares: dict[str, float]
    """Colour -> share of the picture, largest first."""
    upper: str
    """Commonest colour of the upper third if it holds most of it, else empty."""
    lower: str
    """The same for the lower third."""
    lightness: float
    """Mean CIELAB L, 0 black to 100 white."""
    contrast: float
    """Standard deviation of L."""
    edges: float
    """Share of pixels on an edge."""
    pattern: str
    """``horizontally striped``, ``vertically striped``, ``diagonally striped``, ``checkered``,
    ``shaded`` (light falls off evenly across the picture), or empty."""
    patches: tuple[Patch, ...]
    """Largest first."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A patch followed through the clip."""

    colour: str
    shape: str
    area: float
    """Median."""
    x: float
    y: float
    """Median place of the centre."""
    dx: float
    dy: float
    """Way from first to last frame, less the camera's, if it is a steady one; else 0."""
    sway_x: float
    sway_y: float
    """Extent of the way, less the steady part."""
    growth: float
    """Last area over first, if it changes steadily; else 1."""
    blinks: bool
    """Is there in some frames and not in others, in turns."""


@dataclass(frozen=True, slots=True)
class Camera:
    """How the whole picture shifts from the first to the last frame."""

    pan_x: float
    """Way of the camera, positive to the right; what is seen goes the other way."""
    pan_y: float
    """Positive down."""
    zoom: float
    """Magnification of the end over the start."""


@dataclass(frozen=True, slots=True)
class ClipSignals:
    """What is measured of a clip."""

    frames: tuple[FrameSignals, ...]
    things: tuple[Thing, ...]
    """Those that move first."""
    camera: Camera | None
    """None where the picture gives no hold to tell."""
    moving: float
    """Share of pixels that change between neighbouring frames, beyond the camera's movement."""
    moving_x: float
    moving_y: float
    """Where they are, on average."""
    moving_spread: float
    """How widely they are spread: about 0.1 for a thing, 0.4 for the whole picture."""
    brightening: float
    """Change of mean L from start to end, where it is steady."""
    flicker: float
    """Change of mean L back and forth between neighbouring frames."""
    num_faces: int
    """Median number of faces per frame; 0 where they are not looked for."""


def shrink(frame: np.ndarray) -> np.ndarray:
    """Returns a uint8 RGB frame at working size."""
    height, width = frame.shape[:2]
    scale = _SIDE / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.medianBlur(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), 3)


def patch_shape(mask: np.ndarray) -> str:
    """Returns the shape of a uint8 mask if it is a plain one, else an empty string."""
    outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return ""
    outer = max(outlines, key=cv2.contourArea)
    area = cv2.contourArea(outer)
    if area < 60:
        return ""
    hull = cv2.convexHull(outer)
    hull_area, around = cv2.contourArea(hull), cv2.arcLength(hull, True)
    if area / hull_area < 0.88:
        return ""
    hole = sum(
        cv2.contourArea(line) for line, link in zip(outlines, tree[0], strict=True) if link[3] >= 0
    )
    roundness = 4 * np.pi * hull_area / around**2
    if hole > 0.15 * area:
        return "ring-shaped" if roundness > 0.88 else ""
    corners = len(cv2.approxPolyDP(hull, 0.035 * around, True))
    if corners == 3 and roundness < 0.75:
        return "triangular"
    _, (width, height), _ = cv2.minAreaRect(outer)
    if corners == 4 and area / (width * height + 1e-9) > 0.88:
        return "square" if max(width, height) < 1.25 * min(width, height) else "rectangular"
    return "round" if roundness > 0.9 and corners > 4 else ""


def find_patches(colours_HW: np.ndarray, lab_HWC: np.ndarray) -> list[Patch]:
    """Returns the patches of a frame that could be objects, largest first.

    A patch is the largest connected area of its colour and more than half of all of it, fills its
    bounding box by a third, does not run along the border, and differs from the pixels around it
    by at least 18 in CIELAB (a just noticeable difference is about 2.3).
    """
    height, width = colours_HW.shape
    patches = []
    kernel = np.ones((5, 5), np.uint8)
    for index, name in enumerate(NAMES):
        mask = (colours_HW == index).view(np.uint8)
        total = int(mask.sum())
        if not _MIN_AREA * mask.size < total < 1.5 * _MAX_AREA * mask.size:
            continue
        _, labels, stats, centres = cv2.connectedComponentsWithStats(mask, connectivity=8)
        best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
        x, y, box_width, box_height, area = stats[best]
        if not _MIN_AREA * mask.size < area < _MAX_AREA * mask.size or area < 0.5 * total:
            continue
        at_border = (x == 0) + (y == 0) + (x + box_width == width) + (y + box_height == height)
        if at_border > 1 or area < 0.3 * box_width * box_height:
            continue
        if max(box_width / width, box_height / height) > 0.8:
            continue
        own = (labels == best).view(np.uint8)
        ring = cv2.dilate(own, kernel, iterations=3) - cv2.dilate(own, kernel)
        difference = lab_HWC[own > 0].mean(axis=0) - np.median(lab_HWC[ring > 0], axis=0)
        if np.linalg.norm(difference) < 18:
            continue
        place = float(centres[best][0] / width), float(centres[best][1] / height)
        patches.append(Patch(name, float(area / mask.size), *place, patch_shape(own)))
    return sorted(patches, key=lambda patch: -patch.area)


def find_pattern(lightness_HW: np.ndarray) -> str:
    """Returns the pattern that fills a picture: stripes, a checkerboard, even shading, or none.

    Stripes put most of the spectrum's power on one line through its centre, at a few multiples
    of one frequency; a checkerboard on two crossed diagonals.
    """
    height, width = lightness_HW.shape
    side = min(height, width)
    square = lightness_HW[
        (height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2
    ].astype(np.float32)
    spread = float(square.std())
    if spread < 3:
        return ""
    rows, columns = np.mgrid[-1 : 1 : square.shape[0] * 1j, -1 : 1 : square.shape[1] * 1j]
    plane = np.stack([rows.ravel(), columns.ravel(), np.ones(square.size)], axis=1)
    slope, *_ = np.linalg.lstsq(plane, square.ravel(), rcond=None)
    rest = square - (plane @ slope).reshape(square.shape)
    if float(rest.std()) < 0.35 * spread:
        return "shaded"
    window = np.hanning(square.shape[0])[:, None] * np.hanning(square.shape[1])
    power = np.abs(np.fft.fftshift(np.fft.fft2(rest * window))) ** 2
    centre = np.array(power.shape) // 2
    power[centre[0] - 2 : centre[0] + 3, centre[1] - 2 : centre[1] + 3] = 0
    power[: centre[0]] = 0  # the other half mirrors this one
    total = float(power.sum()) + 1e-9
    peaks = []
    for _ in range(2):
        y, x = np.unravel_index(int(power.argmax()), power.shape)
        near = np.s_[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        peaks.append((int(y - centre[0]), int(x - centre[1]), float(power[near].sum()) / total))
        power[near] = 0
    (y1, x1, first), (y2, x2, second) = peaks
    angle = np.degrees(np.arctan2(y1, abs(x1)))
    crossed = abs(y1 - y2) <= 2 and abs(x1 + x2) <= 2 and 25 < angle < 65
    if crossed and first + second > 0.5 and second > 0.4 * first:
        return "checkered"
    if first < 0.45:
        return ""
    if angle > 70:
        return "horizontally striped"
    return "vertically striped" if angle < 20 else "diagonally striped"


def measure_frame(rgb_HWC: np.ndarray) -> FrameSignals:
    """Returns the measurements of one picture at working size."""
    colours = name_pixels(rgb_HWC)
    lab = cv2.cvtColor(rgb_HWC.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lightness = np.ascontiguousarray(lab[..., 0])
    slope = cv2.magnitude(
        cv2.Sobel(lightness, cv2.CV_32F, 1, 0, scale=0.125),
        cv2.Sobel(lightness, cv2.CV_32F, 0, 1, scale=0.125),
    )
    third = len(colours) // 3
    counts = np.bincount(colours.ravel(), minlength=len(NAMES)) / colours.size
    order = np.argsort(-counts, kind="stable")
    return FrameSignals(
        shares={NAMES[i]: float(counts[i]) for i in order if counts[i] > 0},
        upper=_majority(colours[:third]),
        lower=_majority(colours[-third:]),
        lightness=float(lightness.mean()),
        contrast=float(lightness.std()),
        edges=float((slope > 4).mean()),
        pattern=find_pattern(lightness),
        patches=tuple(find_patches(colours, lab)),
    )


def _majority(colours: np.ndarray) -> str:
    counts = np.bincount(colours.ravel(), minlength=len(NAMES))
    return NAMES[int(counts.argmax())] if counts.max() > 0.55 * colours.size else ""


def follow_camera(grays: Sequence[np.ndarray]) -> tuple[Camera | None, list[np.ndarray | None]]:
    """Returns the camera's movement, and per neighbouring pair the map from one to the next.

    ORB features matched between neighbours give a similarity by RANSAC. It counts as the
    camera's only if its inliers are spread over the picture: those of one object are not.
    """
    detector = cv2.ORB.create(nfeatures=250, edgeThreshold=8, patchSize=17, fastThreshold=8)
    matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)
    height, width = grays[0].shape[:2]
    found = [detector.detectAndCompute(gray, None) for gray in grays]
    maps = [_similarity(matcher, before, after, width, height) for before, after in pairwise(found)]
    known = [matrix for matrix in maps if matrix is not None]
    if len(known) < 0.6 * len(maps) or not known:
        return None, maps
    centre = np.array([width / 2, height / 2, 1])
    shifts = np.array([matrix @ centre - centre[:2] for matrix in known])
    scales = [float(np.hypot(matrix[0, 0], matrix[1, 0])) for matrix in known]
    # Unknown pairs are taken to move as the known ones do.
    share = len(maps) / len(known)
    pan_x, pan_y = -shifts.sum(axis=0) * share / (width, height)
    return Camera(float(pan_x), float(pan_y), float(np.prod(scales) ** share)), maps


def _similarity(
    matcher: cv2.BFMatcher, before: tuple, after: tuple, width: int, height: int
) -> np.ndarray | None:
    """Returns the 2x3 map that most features agree on, or None."""
    (points_a, codes_a), (points_b, codes_b) = before, after
    if codes_a is None or codes_b is None:
        return None
    matches = matcher.match(codes_a, codes_b)
    if len(matches) < 12:
        return None
    a = np.array([points_a[match.queryIdx].pt for match in matches], np.float32)
    b = np.array([points_b[match.trainIdx].pt for match in matches], np.float32)
    matrix, inliers = cv2.estimateAffinePartial2D(a, b, ransacReprojThreshold=2.5)
    if matrix is None or inliers.sum() < max(10, 0.25 * len(matches)):
        return None
    scale = np.hypot(matrix[0, 0], matrix[1, 0])
    cells = {(int(x * 4 / width), int(y * 4 / height)) for x, y in a[inliers[:, 0] > 0]}
    return matrix if len(cells) >= 5 and 0.6 < scale < 1.7 else None


def follow_things(frames: Sequence[FrameSignals], camera: Camera | None) -> list[Thing]:
    """Returns the objects of a clip, moving ones first, then by size."""
    things = []
    for colour in NAMES:
        seen = [next((p for p in f.patches if p.colour == colour), None) for f in frames]
        there = [(i, patch) for i, patch in enumerate(seen) if patch is not None]
        if len(there) >= max(2, 0.5 * len(frames)):
            things.append(_thing(colour, there, len(frames), camera))
    return sorted(
        (thing for thing in things if thing is not None),
        key=lambda t: (-round(abs(t.dx) + abs(t.dy) + t.sway_x + t.sway_y, 1), -t.area),
    )


def _thing(
    colour: str, there: list[tuple[int, Patch]], num_frames: int, camera: Camera | None
) -> Thing | None:
    """Returns one object from its patches (with frame numbers), or None if they do not agree."""
    when = np.array([i for i, _ in there]) / max(1, num_frames - 1)
    area = np.array([patch.area for _, patch in there])
    places = np.array([(patch.x, patch.y) for _, patch in there])
    if area.max() > 9 * area.min():
        return None
    own = places + np.outer(when, (camera.pan_x, camera.pan_y)) if camera else places
    way, sway = [], []
    for axis in range(2):
        slope, rest = _steady(when, own[:, axis])
        way.append(slope)
        sway.append(rest)
    growth, rest = _steady(when, np.log(area))
    shapes = [patch.shape for _, patch in there]
    shape = max(set(shapes), key=shapes.count)
    gaps = int((np.diff([i for i, _ in there]) > 1).sum())
    return Thing(
        colour=colour,
        shape=shape if shapes.count(shape) >= 0.5 * len(shapes) else "",
        area=float(np.median(area)),
        x=float(np.median(places[:, 0])),
        y=float(np.median(places[:, 1])),
        dx=way[0],
        dy=way[1],
        sway_x=sway[0],
        sway_y=sway[1],
        growth=float(np.exp(growth)) if abs(growth) > 2 * rest else 1.0,
        blinks=gaps >= 2,
    )


def _steady(when: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Returns a line's rise over the whole clip, 0 if the values follow none, and the rest.

    The rest is the extent of what the line leaves.
    """
    if len(when) < 2 or np.ptp(when) == 0:
        return 0.0, 0.0
    slope, start = np.polyfit(when, values, 1)
    rest = values - (start + slope * when)
    if np.var(values) > 0 and 1 - np.var(rest) / np.var(values) < 0.75:
        return 0.0, float(np.ptp(values))
    return float(slope), float(np.ptp(rest))


def measure_clip(frames: Sequence[np.ndarray]) -> ClipSignals:
    """Returns the measurements of uint8 RGB frames of one size, at least one, in time order."""
    small = [shrink(frame) for frame in frames]
    grays = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]
    signals = tuple(measure_frame(frame) for frame in small)
    camera, maps = follow_camera(grays)
    height, width = grays[0].shape[:2]
    change = np.zeros((height, width), np.float32)
    for before, after, matrix in zip(grays[:-1], grays[1:], maps, strict=True):
        change += _changed(before, after, matrix)
    change /= max(1, len(maps))
    moving = float(change.mean())
    ys, xs = np.mgrid[0:height, 0:width]
    weight = change / (change.sum() + 1e-9)
    x, y = float((weight * xs).sum()), float((weight * ys).sum())
    spread = np.sqrt((weight * ((xs - x) ** 2 + (ys - y) ** 2)).sum())
    light = np.array([frame.lightness for frame in signals])
    steady, _ = _steady(np.linspace(0, 1, len(light)), light)
    steps = np.diff(light)
    turns = steps[1:] * steps[:-1] < 0
    return ClipSignals(
        frames=signals,
        things=tuple(follow_things(signals, camera)),
        camera=camera,
        moving=moving,
        moving_x=x / width,
        moving_y=y / height,
        moving_spread=float(spread / np.hypot(height, width)),
        brightening=steady,
        flicker=float(np.median(np.abs(steps[1:][turns]))) if turns.sum() >= 3 else 0.0,
        num_faces=0,
    )


def _changed(before: np.ndarray, after: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Returns a float32 mask of the pixels of ``after`` that the camera's map does not explain."""
    height, width = before.shape
    seen = np.ones_like(before)
    if matrix is not None:
        before = cv2.warpAffine(before, matrix, (width, height))
        seen = cv2.warpAffine(seen, matrix, (width, height))
    difference = cv2.GaussianBlur(cv2.absdiff(before, after), (5, 5), 0)
    return ((difference > 18) & (seen > 0)).astype(np.float32)


class SignalsVideoCaptioner:
    """Measures and says what it measured.

    Raises:
        DependencyError: If a face detector is asked for and cannot be loaded.
    """

    model = "signals"
    revision = "1"
    prompt_hash: str | None = None

    def __init__(self, config: SignalsVideoConfig) -> None:
        self._faces = None
        if config.face_model:
            try:
                self._faces = cv2.FaceDetectorYN.create(config.face_model, "", (320, 320), 0.9)
            except cv2.error as error:
                raise DependencyError(
                    f"Face detector cannot be loaded: {config.face_model} ({error})",
                    "set face_model to a YuNet ONNX file, or leave it out",
                ) from error

    def caption(self, clips: Sequence[ClipFrames]) -> list[VideoCaptions]:
        """Returns the captions of each clip, in order."""
        return [self._caption_one(clip) for clip in clips]

    def _caption_one(self, clip: ClipFrames) -> VideoCaptions:
        signals = measure_clip(clip.frames)
        num = len(signals.frames)
        chosen = sorted({int((index + 0.5) * num / 4) for index in range(4)})
        return VideoCaptions(
            coarse=describe_frame(signals.frames[num // 2]),
            fine=tuple(describe_frame(signals.frames[index]) for index in chosen),
            caption=describe_clip(signals),
        )
