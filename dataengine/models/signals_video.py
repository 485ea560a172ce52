# SPDX-License-Identifier: Apache-2.0
"""Video measurements from a handful of frames: colour, light, texture, camera, objects, movement.

Nothing is recognised but that a face is one. An object is a patch of one named colour that holds together, stands out
from what surrounds it and is there in most frames. Lengths are shares of the picture's width or
height, areas of the picture. Thresholds without another source were set by reading captions of
48 real videos beside their frames, and on rendered ones with known truth.

Legend: H W a frame at working size (short side 120 px), C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.camera import Camera, changed_pixels, follow_camera
from dataengine.models.captioner import ClipFrames, SignalsVideoConfig, VideoCaptions
from dataengine.models.colours import NAMES, colour_shares, name_pixels
from dataengine.models.patches import Patch, find_patches, patch_shape
from dataengine.models.texture import name_texture
from dataengine.models.video_words import describe_clip, describe_frame

_SIDE = 120
_FACE_PIXELS = 160 * 213
_FACE_SIDE = 24

FaceDetector = Callable[[np.ndarray], np.ndarray]
"""uint8 RGB picture -> boxes [N, 4]: left, top, width, height in its pixels."""


@dataclass(frozen=True, slots=True)
class FrameSignals:
    """What is measured of one picture."""

    shares: dict[str, float]
    """Colour -> share of the picture, largest first."""
    ground: dict[str, float]
    """The same without the patches."""
    upper: str
    """Colour that holds most of the ground's upper third, empty if none does."""
    lower: str
    """The same for the lower third."""
    lightness: float
    """Mean CIELAB L, 0 black to 100 white."""
    texture: str
    """What the ground is like; see `dataengine.models.texture.name_texture`."""
    patches: tuple[Patch, ...]
    """Largest first."""
    shapes: tuple[str, ...]
    """One per patch, empty where it has no name."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A patch followed through the clip."""

    colour: str
    shape: str
    area: float
    """Largest."""
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
    """Last area over first, less the camera's zoom, if it changes steadily; else 1."""
    blinks: bool
    """Is gone in between, more than once, and back at the same place."""


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
    """Standard deviation of where, in diagonals: about 0.1 for a thing, 0.29 for everything."""
    brightening: float
    """Change of mean L from start to end, where it is steady."""
    flicker: float
    """Median change of mean L back and forth between neighbouring frames."""
    num_faces: int
    """In at least two of the frames searched; 0 where they are not looked for."""


def picture_box(grays: Sequence[np.ndarray]) -> tuple[slice, slice]:
    """Returns the rows and columns inside black bars that no frame lights up (letterbox).

    Bars narrower than 4 % of a side are kept, and so is a clip that is black for the most part.
    """
    brightest = np.maximum.reduce(list(grays))
    slices = []
    for axis, length in enumerate(brightest.shape[:2]):
        lit = np.flatnonzero(np.percentile(brightest, 98, axis=1 - axis) > 24)
        if len(lit) < 0.5 * length or len(lit) > 0.96 * length:
            slices.append(slice(0, length))
        else:
            slices.append(slice(int(lit[0]), int(lit[-1]) + 1))
    return slices[0], slices[1]


def shrink(frame: np.ndarray) -> np.ndarray:
    """Returns a uint8 RGB frame at working size."""
    height, width = frame.shape[:2]
    scale = _SIDE / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.medianBlur(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), 3)


def measure_frame(small_HWC: np.ndarray, frame_HWC: np.ndarray) -> FrameSignals:
    """Returns the measurements of one uint8 RGB picture, given at working size and in full."""
    colours = name_pixels(small_HWC)
    lab = cv2.cvtColor(small_HWC.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lightness = np.ascontiguousarray(lab[..., 0])
    patches, covered = find_patches(colours, lab)
    third = len(colours) // 3
    return FrameSignals(
        shares=colour_shares(colours),
        ground=colour_shares(colours[~covered]),
        upper=_majority(colours[:third][~covered[:third]]),
        lower=_majority(colours[-third:][~covered[-third:]]),
        lightness=float(lightness.mean()),
        texture=name_texture(lightness, covered),
        patches=patches,
        shapes=tuple(patch_shape(frame_HWC, patch) for patch in patches),
    )


def _majority(colours: np.ndarray) -> str:
    name, share = next(iter(colour_shares(colours).items()), ("", 0.0))
    return name if share > 0.55 else ""


def follow_things(frames: Sequence[FrameSignals], camera: Camera | None) -> list[Thing]:
    """Returns the objects of a clip, moving ones first, then by size."""
    things = []
    for colour in NAMES:
        there = [
            (number, patch, shape)
            for number, frame in enumerate(frames)
            for patch, shape in zip(frame.patches, frame.shapes, strict=True)
            if patch.colour == colour
        ]
        # Two frames make a way only in a clip of two.
        if len(there) < max(min(3, len(frames)), 0.5 * len(frames)):
            continue
        gone = [frames[i].shares.get(colour, 0.0) for i in _between({n for n, _, _ in there})]
        thing = _thing(colour, there, gone, len(frames), camera or Camera(0.0, 0.0, 1.0))
        if thing is not None:
            things.append(thing)
    return sorted(things, key=lambda thing: (-_liveliness(thing), -thing.area))


def _between(numbers: set[int]) -> list[int]:
    """Returns the numbers that lie between others, but are not among them."""
    return [n for n in range(min(numbers), max(numbers)) if n not in numbers]


def _liveliness(thing: Thing) -> float:
    """Returns how much a thing moves or changes, in coarse steps."""
    way = abs(thing.dx) + abs(thing.dy) + thing.sway_x + thing.sway_y
    return round(2 * (way + abs(np.log(thing.growth)) / 2 + 0.3 * thing.blinks))


def _thing(
    colour: str,
    there: Sequence[tuple[int, Patch, str]],
    gone: Sequence[float],
    num_frames: int,
    camera: Camera,
) -> Thing | None:
    """Returns one object from its patches, or None if they do not agree.

    Args:
        colour: Of all patches.
        there: Number of the frame, patch and shape.
        gone: The colour's share of the picture in the frames between without a patch.
        num_frames: Of the clip.
        camera: Its movement is taken off.
    """
    when = np.array([number for number, _, _ in there]) / max(1, num_frames - 1)
    zoom = camera.zoom**when
    area = np.array([patch.area for _, patch, _ in there])
    if area.max() > 12 * area.min():
        return None
    places = np.array([(patch.x, patch.y) for _, patch, _ in there])
    # The camera turns about the picture's centre, and zooms into it.
    own = 0.5 + (places - 0.5) / zoom[:, None] + np.outer(when, (camera.pan_x, camera.pan_y))
    (dx, sway_x), (dy, sway_y) = _steady(when, own[:, 0]), _steady(when, own[:, 1])
    growth, rest = _steady(when, np.log(area / zoom**2))
    # A patch that flows together with its surroundings and parts again only seems to sway.
    if growth == 0.0 and area.max() > 1.7 * area.min():
        sway_x = sway_y = 0.0
    shapes = [shape for _, _, shape in there if shape]
    shape = max(set(shapes), key=lambda name: (shapes.count(name), name), default="")
    numbers = [number for number, _, _ in there]
    gaps = sum(after - before > 1 for before, after in pairwise(numbers))
    return Thing(
        colour=colour,
        shape=shape if shapes.count(shape) > 0.5 * len(there) else "",
        area=float(area.max()),
        x=float(np.median(places[:, 0])),
        y=float(np.median(places[:, 1])),
        dx=dx,
        dy=dy,
        sway_x=sway_x,
        sway_y=sway_y,
        growth=float(np.exp(growth)) if abs(growth) > 2 * rest else 1.0,
        blinks=gaps >= 2 and bool(np.median(gone) < 0.3 * np.median(area)),
    )


def _steady(when: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Returns a line's rise over the whole clip, 0 if the values follow none, and the rest.

    The rest is the extent of what the line leaves.
    """
    if len(when) < 2 or np.ptp(when) == 0:
        return 0.0, 0.0
    slope, start = np.polyfit(when, values, 1)
    rest = values - (start + slope * when)
    if np.var(values) > 0 and np.var(rest) > 0.25 * np.var(values):
        return 0.0, float(np.ptp(values))
    return float(slope), float(np.ptp(rest))


def measure_clip(frames: Sequence[np.ndarray]) -> ClipSignals:
    """Returns the measurements of uint8 RGB frames of one size, at least one, in time order."""
    small = [shrink(frame) for frame in frames]
    rows, columns = picture_box([frame.max(axis=2) for frame in small])
    factor = frames[0].shape[0] / small[0].shape[0]
    full_rows, full_columns = (
        slice(round(part.start * factor), round(part.stop * factor)) for part in (rows, columns)
    )
    small = [np.ascontiguousarray(frame[rows, columns]) for frame in small]
    grays = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]
    signals = tuple(
        measure_frame(little, frame[full_rows, full_columns])
        for little, frame in zip(small, frames, strict=True)
    )
    camera, maps = follow_camera(grays)
    height, width = grays[0].shape[:2]
    change = np.zeros((height, width), np.float32)
    for (before, after), matrix in zip(pairwise(grays), maps, strict=True):
        change += changed_pixels(before, after, matrix) / len(maps)
    ys, xs = np.mgrid[0:height, 0:width]
    weight = change / (change.sum() + 1e-9)
    x, y = float((weight * xs).sum()), float((weight * ys).sum())
    spread = np.sqrt((weight * ((xs - x) ** 2 + (ys - y) ** 2)).sum())
    light = np.array([frame.lightness for frame in signals])
    steps = np.diff(light)
    turns = steps[1:] * steps[:-1] < 0
    return ClipSignals(
        frames=signals,
        things=tuple(follow_things(signals, camera)),
        camera=camera,
        moving=float(change.mean()),
        moving_x=x / width,
        moving_y=y / height,
        moving_spread=float(spread / np.hypot(height, width)),
        brightening=_steady(np.linspace(0, 1, len(light)), light)[0],
        flicker=float(np.median(np.abs(steps[1:][turns]))) if turns.sum() >= 3 else 0.0,
        num_faces=0,
    )


def haar_faces() -> FaceDetector:
    """Returns the detector of frontal faces that OpenCV 4 carries (Viola and Jones 2001).

    It looks for faces of a sixth of a 16:9 picture's height and more. Measured with `count_faces`
    on 101 clips of 48 real videos, 8 frames each, which also set the thresholds: a face is named
    in 9, all rightly; small and turned ones are missed. On 87 rendered clips without, none is
    seen in any frame. With larger scale steps, or fewer neighbours, food and hands pass for faces.

    Raises:
        DependencyError: If OpenCV has no cascades.
    """
    path = str(Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_alt2.xml")
    try:
        cascade = cv2.CascadeClassifier(path)
    except AttributeError as error:
        raise DependencyError(
            "OpenCV comes without Haar cascades (face detection)",
            "install opencv-python-headless 4, or set face_model to a YuNet ONNX file",
        ) from error
    if cascade.empty():
        raise DependencyError(
            f"Face detector cannot be loaded: {path}", "install opencv-python-headless again"
        )

    def detect(frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        scale = min(1.0, (_FACE_PIXELS / (height * width)) ** 0.5)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        least = _FACE_SIDE, _FACE_SIDE
        found = cascade.detectMultiScale(cv2.equalizeHist(gray), 1.1, 5, minSize=least)
        # Equalised, a dark wall has as much contrast as a face (before: 13 grey levels; faces: 19
        # and more).
        boxes = [(x, y, w, h) for x, y, w, h in found if gray[y : y + h, x : x + w].std() > 16]
        return np.array(boxes, float).reshape(-1, 4) / scale

    return detect


def yunet_faces(path: str) -> FaceDetector:
    """Returns YuNet with the weights of an ONNX file.

    Raises:
        DependencyError: If they cannot be loaded.
    """
    try:
        # 0.9 is the detector's own default score; below it, patterns look like faces.
        model = cv2.FaceDetectorYN.create(path, "", (320, 320), 0.9)
    except cv2.error as error:
        raise DependencyError(
            f"Face detector cannot be loaded: {path} ({error.err})",
            "set face_model to a YuNet ONNX file, or leave it out",
        ) from error

    def detect(frame: np.ndarray) -> np.ndarray:
        model.setInputSize((frame.shape[1], frame.shape[0]))
        _, faces = model.detect(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        return np.zeros((0, 4)) if faces is None else np.asarray(faces)[:, :4]

    return detect


def same_face(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two boxes of different frames may be one face.

    It may have moved by its own width and grown by 40 %.
    """
    small, large = sorted((float(one[2]), float(other[2])))
    way = np.hypot(*(one[:2] + one[2:] / 2 - other[:2] - other[2:] / 2))
    return large <= 1.4 * small and bool(way <= large)


def agreeing_faces(boxes: Sequence[np.ndarray]) -> int:
    """Returns how many faces at least two frames show, of those that another frame shows too.

    Args:
        boxes: Per frame, [N, 4] as a `FaceDetector` gives them.
    """
    counts = []
    for number, found in enumerate(boxes):
        others = [box for at, more in enumerate(boxes) if at != number for box in more]
        counts.append(sum(any(same_face(box, other) for other in others) for box in found))
    return sorted(counts)[-2] if len(counts) > 1 else 0


def count_faces(frames: Sequence[np.ndarray], detect: FaceDetector) -> int:
    """Returns how many faces a clip shows, searching four frames at most.

    A face in one frame alone is none: what a detector mistakes for one seldom stays. Where the
    first two frames searched show none, the others are not searched.
    """
    num = len(frames)
    quarters = sorted({int((quarter + 0.5) * num / 4) for quarter in range(4)})
    boxes: list[np.ndarray] = []
    for index in [*quarters[1:3], *quarters[:1], *quarters[3:]]:
        boxes.append(detect(frames[index]))
        if len(boxes) == 2 and not any(map(len, boxes)):
            break
    return agreeing_faces(boxes)


class SignalsVideoCaptioner:
    """Measures and says what it measured.

    Raises:
        DependencyError: If the face detector cannot be loaded.
    """

    model = "signals"
    revision = "2"
    prompt_hash: str | None = None

    def __init__(self, config: SignalsVideoConfig) -> None:
        self._faces = yunet_faces(config.face_model) if config.face_model else haar_faces()

    def caption(self, clips: Sequence[ClipFrames]) -> list[VideoCaptions]:
        """Returns the captions of each clip, in order."""
        return [self._caption_one(clip) for clip in clips]

    def _caption_one(self, clip: ClipFrames) -> VideoCaptions:
        num_faces = count_faces(clip.frames, self._faces)
        signals = replace(measure_clip(clip.frames), num_faces=num_faces)
        num = len(signals.frames)
        chosen = sorted({int((index + 0.5) * num / 4) for index in range(4)})
        return VideoCaptions(
            coarse=describe_frame(signals.frames[num // 2]),
            fine=tuple(describe_frame(signals.frames[index]) for index in chosen),
            caption=describe_clip(signals),
        )
