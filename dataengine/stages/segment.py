# SPDX-License-Identifier: Apache-2.0
"""Video -> clips: one decoding pass finds the shots, samples their frames and measures motion.

The shots partition the video: the first starts with the first frame, each ends where the next
starts, and the last ends when its last frame has been shown. Shots that are too long are cut into
equal pieces; shots that are too short become dropped clips, so that every second is accounted for.

Source: InternVid (arXiv 2307.06942), section 3.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from dataengine import media, records
from dataengine.errors import MediaError
from dataengine.models.shots import ContentSettings, ShotDetector, ShotSettings, build_shot_detector
from dataengine.sampling import FrameSampler, even_times
from dataengine.stage import Drop, Kept, Outcome, Row, Stage, provenance

TOO_SHORT, TOO_LONG, TOO_LARGE = "too_short", "too_long", "too_large"
NO_CLIPS, TIMEOUT = "no_clips", "segment_timeout"
CLIP_TOO_SHORT = "clip_too_short"

HELD_BYTES = 256 * 2**20
"""Decoded pictures an actor may hold for sampling; larger ones are held shrunk."""


class SegmentConfig(Stage.Config):
    """How a video becomes clips."""

    detector: ShotSettings = ContentSettings()
    """Finds the shot boundaries."""
    min_clip_ms: int = Field(default=1000, ge=0)
    """Shots shorter than this are dropped as ``clip_too_short``."""
    max_clip_ms: int | None = Field(default=30_000, ge=1000)
    """Longer shots are cut into equal pieces; None sets no limit."""
    num_frames: int = Field(default=8, ge=1)
    """Frames sampled from each clip, at the middles of as many equal parts."""
    frame_short_side: int = Field(default=320, ge=16)
    """Pixels of the sampled frames' shorter side; smaller pictures stay as they are."""
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    """Of the sampled frames."""
    min_duration_s: float = Field(default=0.0, ge=0)
    """Shorter videos are dropped as ``too_short``."""
    max_duration_s: float = Field(default=3600.0, gt=0)
    """Longer videos are dropped as ``too_long``."""
    max_pixels: int = Field(default=8192 * 4320, ge=1)
    """Videos with more pixels per frame are dropped as ``too_large``."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """Decoding a video longer than this fails it as ``segment_timeout``."""


def split_shot(times_us: Sequence[int], end_us: int, max_us: int | None) -> list[tuple[int, int]]:
    """Cuts a shot into the fewest equal pieces that are not longer than ``max_us``.

    Args:
        times_us: Times of the shot's frames, ascending.
        end_us: When the last frame has been shown.
        max_us: Longest piece, None for no limit.

    Returns:
        ``[first, last + 1)`` frame indices of each piece. Pieces start at frames, so a piece may be
        one frame longer than ``max_us``.
    """
    length_us = end_us - times_us[0]
    if max_us is None or length_us <= max_us:
        return [(0, len(times_us))]
    num = -(-length_us // max_us)
    starts = [bisect_left(times_us, times_us[0] + i * length_us // num) for i in range(num)]
    return list(pairwise([*sorted({s for s in starts if s < len(times_us)}), len(times_us)]))


def mean_motion(motion: Sequence[float]) -> float:
    """Returns a clip's motion score from its frames' differences to the frame before.

    The first frame's difference is to another clip, and is left out.
    """
    return float(np.mean(motion[1:])) if len(motion) > 1 else 0.0


class SegmentStage(Stage):
    """Decodes each video once and gives one row per clip."""

    name = "segment"
    inputs = ("video_id", "source_url", "_video", "_path")
    outputs = pa.schema(
        [
            records.CLIP_SCHEMA.field(name)
            for name in (
                *("clip_id", "start_ms", "end_ms", "duration_ms", "fps", "width", "height"),
                *("has_audio", "frames", "frame_ms", "motion_score"),
            )
        ]
        + [
            pa.field("_video", pa.struct(list(records.VIDEO_SCHEMA))),
            pa.field("_drop", records.DROP_STRUCT),
            # Exact frame times in microseconds and the clip's end, for the cut.
            pa.field("_frame_us", pa.list_(pa.int64())),
        ]
    )
    Config = SegmentConfig
    config: SegmentConfig

    def setup(self) -> None:
        """Keeps OpenCV to one thread: actors share the cores."""
        cv2.setNumThreads(1)

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns a `Kept` with all clips of each video, or the `Drop` that ended it."""
        return [self._segment(row) for row in batch]

    def _segment(self, row: Row) -> Outcome:
        try:
            with media.VideoReader(row["_path"]) as reader:
                drop = self._refuse(reader.info)
                return drop or _Pass(self.config, row, reader).run()
        except MediaError as error:
            return Drop(error.reason, error.detail)

    def _refuse(self, info: media.MediaInfo) -> Drop | None:
        """Returns the drop of a video whose header already breaks a limit."""
        if info.duration_ms > self.config.max_duration_s * 1000:
            return Drop(TOO_LONG, f"{info.duration_ms / 1000:.1f} s")
        if info.width * info.height > self.config.max_pixels:
            return Drop(TOO_LARGE, f"{info.width}x{info.height}")
        return None


class _Pass:
    """The state of one video's decoding pass."""

    def __init__(self, config: SegmentConfig, row: Row, reader: media.VideoReader) -> None:
        self.config, self.row, self.reader, self.info = config, row, reader, reader.info
        self.detector: ShotDetector = build_shot_detector(config.detector, self.info.fps)
        frame_us = round(1e6 / self.info.fps) if self.info.fps else 40_000
        self.max_clip_us = config.max_clip_ms * 1000 if config.max_clip_ms else None
        self.sampler = FrameSampler(
            config.num_frames, self.detector.lag_us(frame_us), self.max_clip_us, self._jpeg
        )
        # Seven: three per frame wanted in the lag, four on the grid.
        picture_bytes = self.info.width * self.info.height * 3 // 2
        self.shrink_first = picture_bytes * 7 * config.num_frames > HELD_BYTES
        self.times_us: list[int] = []
        self.motion: list[float] = []

    def run(self) -> Outcome:
        """Decodes everything; returns the clips, or why there are none."""
        deadline = time.monotonic() + self.config.timeout_s
        shots: list[dict[str, Any]] = []
        first, end_us, before = 0, 0, None
        for frame in self.reader:
            if time.monotonic() > deadline:
                return Drop(TIMEOUT, f"over {self.config.timeout_s:g} s", retryable=True)
            if frame.time_us > self.config.max_duration_s * 1e6:
                return Drop(TOO_LONG, f"over {self.config.max_duration_s:g} s")
            small = media.small_bgr(frame.picture, self.info.rotation, self.detector.frame_px)
            luma = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
            changed = 0.0  # also where the picture size changes in mid-stream
            if before is not None and before.shape == luma.shape:
                changed = cv2.norm(luma, before, cv2.NORM_L1) / luma.size / 255
            self.times_us.append(frame.time_us)
            self.motion.append(changed)
            before, end_us = luma, frame.time_us + frame.duration_us
            self.sampler.push(frame.time_us, partial(self._hold, frame.picture))
            for boundary_us in self.detector.push(frame.time_us, small):
                first = self._close(shots, first, boundary_us)
        for boundary_us in self.detector.flush():
            first = self._close(shots, first, boundary_us)
        self._close(shots, first, max(end_us, self.times_us[-1] + 1000))
        return self._outcome(shots, self.times_us[0], end_us)

    def _close(self, shots: list[dict[str, Any]], first: int, end_us: int) -> int:
        """Ends the shot that starts with frame ``first``; returns the next shot's first frame."""
        after = bisect_left(self.times_us, end_us)
        if after > first:
            shots += self._clips(first, after, end_us)
        return max(after, first)

    def _clips(self, first: int, after: int, end_us: int) -> Iterator[dict[str, Any]]:
        """Yields the rows of one shot's pieces."""
        times_us = self.times_us[first:after]
        pieces = split_shot(times_us, end_us, self.max_clip_us)
        ends_us = [times_us[b] if b < len(times_us) else end_us for _, b in pieces]
        spans = [(times_us[a], end) for (a, _), end in zip(pieces, ends_us, strict=True)]
        for (a, b), (start, end), sampled in zip(
            pieces, spans, self.sampler.take(spans), strict=True
        ):
            start_ms, end_ms = media.floor_ms(start), media.floor_ms(end)
            clip: dict[str, Any] = {
                "clip_id": records.clip_id(self.row["video_id"], start_ms, end_ms),
                "start_ms": start_ms,
                "end_ms": end_ms,
                "duration_ms": end_ms - start_ms,
            }
            if end_ms - start_ms < max(self.config.min_clip_ms, 1):
                clip["_drop"] = {"stage": "segment", "reason": CLIP_TOO_SHORT, "detail": ""}
                yield clip
                continue
            if len(sampled) < min(self.config.num_frames, b - a):
                sampled = self._sample_again(times_us[a:b], start, end)
            yield clip | {
                "frames": [jpeg for _, jpeg in sampled],
                "frame_ms": [media.floor_ms(time_us) for time_us, _ in sampled],
                "motion_score": mean_motion(self.motion[first + a : first + b]),
                "_frame_us": [*times_us[a:b], end],
            }

    def _sample_again(self, times_us: list[int], start: int, end: int) -> list[tuple[int, bytes]]:
        """Seeks for the frames of a clip of which the pass held too few."""
        wanted = [
            times_us[min(bisect_left(times_us, t), len(times_us) - 1)]
            for t in even_times(start, end, min(self.config.num_frames, len(times_us)))
        ]
        frames = media.read_frames(self.row["_path"], sorted(set(wanted)))
        return [(frame.time_us, self._jpeg(frame.picture)) for frame in frames]

    def _outcome(self, clips: list[dict[str, Any]], start_us: int, end_us: int) -> Outcome:
        """Adds what is known of the whole video to its clips."""
        config, info = self.config, self.info
        duration_ms = media.floor_ms(end_us)
        if duration_ms < config.min_duration_s * 1000:
            return Drop(TOO_SHORT, f"{duration_ms / 1000:.1f} s")
        if all("_drop" in clip for clip in clips):
            return Drop(NO_CLIPS, f"{len(clips)} shots, none of {config.min_clip_ms} ms")
        fps = len(self.times_us) * 1e6 / (end_us - start_us) if end_us > start_us else info.fps
        video = (self.row.get("_video") or {}) | {
            "duration_ms": duration_ms,
            "fps": fps,
            "width": info.width,
            "height": info.height,
            "video_codec": info.video_codec,
            "audio_codec": info.audio_codec,
            "file_bytes": info.file_bytes,
        }
        whole = {
            "fps": fps,
            "width": info.width,
            "height": info.height,
            "has_audio": info.audio_codec is not None,
            "_video": video,
            "provenance": [provenance("start_ms", self.detector.name, self.detector.revision)],
        }
        return Kept(
            tuple(clip | ({"_video": video} if "_drop" in clip else whole) for clip in clips)
        )

    def _hold(self, picture: media.Picture) -> media.Picture:
        if self.shrink_first:
            return media.scale_picture(picture, self.info, self.config.frame_short_side)
        return picture

    def _jpeg(self, picture: media.Picture) -> bytes:
        rgb = media.upright_rgb(picture, self.info, self.config.frame_short_side)
        return media.jpeg_encode(rgb, self.config.jpeg_quality)
