# SPDX-License-Identifier: Apache-2.0
"""Shot boundary detectors that work online: frames go in one at a time, boundaries come out.

A detector sees small frames in presentation order together with their times and says, possibly
some frames later, at which of those times a new shot began. So it shares the one decoding pass with
everything else that needs frames.
"""

from fractions import Fraction
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from dataengine.stage import Settings


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


ShotSettings = Annotated[
    WholeSettings | ContentSettings | AdaptiveSettings, Field(discriminator="kind")
]


def build_shot_detector(settings: ShotSettings, fps: float) -> ShotDetector:
    """Returns a fresh detector for one video.

    Args:
        settings: Which detector, and its thresholds.
        fps: The video's average rate, a hint only: decisions are made on time.
    """
    match settings:
        case WholeSettings():
            return WholeDetector()
        case ContentSettings() | AdaptiveSettings():
            return SceneDetectDetector(settings, fps)


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


class SceneDetectDetector:
    """PySceneDetect's own detector classes, driven frame by frame with real times.

    Source: https://github.com/Breakthrough/PySceneDetect (BSD-3-Clause), 0.7.
    """

    frame_px = 120  # finds the same as PySceneDetect's own 256 (measured on 48 videos)

    def __init__(self, settings: ContentSettings | AdaptiveSettings, fps: float) -> None:
        import scenedetect
        from scenedetect import detectors

        self.name = f"scenedetect/{settings.kind}"
        self.revision = f"{scenedetect.__version__}, threshold {settings.threshold:g}"
        self._settings = settings
        # PySceneDetect wants a rate beside every time; no decision depends on it.
        self._fps = Fraction(fps if fps > 0 else 25.0).limit_denominator(100_000)
        self._detector: Any
        if isinstance(settings, ContentSettings):
            self._detector = detectors.ContentDetector(
                threshold=settings.threshold, min_scene_len=float(settings.min_scene_s)
            )
        else:
            self._detector = detectors.AdaptiveDetector(
                adaptive_threshold=settings.threshold,
                min_scene_len=float(settings.min_scene_s),
                window_width=settings.window,
                min_content_val=settings.min_content,
            )
        self._zero_us: int | None = None
        self._last: Any = None

    def lag_us(self, frame_us: int) -> int:
        """Returns the length of the merge window, or half the averaging window."""
        if isinstance(self._settings, ContentSettings):
            return round(self._settings.min_scene_s * 1e6) + 2 * frame_us
        return (self._settings.window + 1) * frame_us

    def push(self, time_us: int, frame_bgr: np.ndarray) -> list[int]:
        """Takes a frame, returns the boundaries that are certain now; see `ShotDetector`."""
        from scenedetect.common import FrameTimecode, Timecode

        if self._zero_us is None:
            self._zero_us = time_us  # PySceneDetect refuses negative times
        self._last = FrameTimecode(
            Timecode(time_us - self._zero_us, Fraction(1, 1_000_000)), self._fps
        )
        return self._times(self._detector.process_frame(self._last, frame_bgr))

    def flush(self) -> list[int]:
        """Returns what the detector still held back; see `ShotDetector`."""
        return self._times(self._detector.post_process(self._last)) if self._last else []

    def _times(self, cuts: list[Any]) -> list[int]:
        return [cut.pts + self._zero_us for cut in cuts]
