# SPDX-License-Identifier: Apache-2.0
"""Video -> clips: one decoding pass finds the shots, samples their frames and measures what happens.

The shots partition the video: the first starts with the first frame, each ends where the next
starts, and the last ends when its last frame has been shown. What of a shot is too long, too short,
still or too restless becomes dropped clips, so that every second is accounted for.

A source with given spans (a published annotation list) is not segmented: its clips are those spans,
with the captions and scores that came with them, and only what they need is decoded.

Source: InternVid (arXiv 2307.06942), section 3.1; InternVideo2 (arXiv 2403.15377), appendix B.2.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import cv2
import pyarrow as pa
from pydantic import Field

from dataengine import clip_rules, media, records
from dataengine.activity import ActivityMeter
from dataengine.errors import MediaError
from dataengine.models.shots import (
    ContentSettings,
    ShotDetector,
    ShotSettings,
    agreement,
    build_shot_detector,
)
from dataengine.sampling import FrameSampler, even_times
from dataengine.spans import SpanSampler
from dataengine.stage import Drop, Kept, Outcome, Row, Stage, provenance

# Why a video ends here.
TOO_SHORT, TOO_LONG = "too_short", "too_long"
NO_CLIPS, TIMEOUT, OUT_OF_MEMORY = "no_clips", "segment_timeout", "segment_memory"
# Why a clip ends here.
CLIP_TOO_SHORT, OUTSIDE_WINDOW = "clip_too_short", "outside_window"
STILL, RESTLESS = "still", "extreme_dynamics"
SPAN_OUTSIDE, SPAN_REPEATED = "span_outside_video", "span_repeated"

HELD_BYTES = 256 * 2**20
"""Decoded pictures an actor may hold for sampling; larger ones are held shrunk."""
SEEK_GAP_US = 15_000_000
"""Between given spans further apart than this, the pass seeks instead of decoding."""
_LEAD_US = 1_000_000
"""Frames this far before a group of given spans are kept: a published start may be rounded up."""
AGREEMENT_US = 200_000
"""Boundaries of two detectors that are nearer than this are one."""
_MEMORY_CHECK_FRAMES = 256


class SegmentConfig(Stage.Config):
    """How a video becomes clips."""

    detector: ShotSettings = ContentSettings()
    """Finds the shot boundaries."""
    also: tuple[ShotSettings, ...] = ()
    """Further detectors. They cut nothing; ``start_detectors`` and ``end_detectors`` tell which of
    all see a boundary where a clip starts and ends."""
    min_clip_ms: int = Field(default=1000, ge=0)
    """Shots shorter than this are dropped as ``clip_too_short``."""
    max_clip_ms: int | None = Field(default=30_000, ge=1000)
    """Longest clip; None sets no limit."""
    long_shots: Literal["split", "random"] = "split"
    """What becomes of a longer shot: equal pieces, or one window of ``max_clip_ms`` at a random
    place (seeded by the shot's id), the rest dropped as ``outside_window``: InternVideo2, B.2."""
    max_still: float | None = Field(default=None, ge=0, le=1)
    """Clips whose ``still_score`` is larger are dropped as ``still``; None keeps them."""
    max_jumps: float | None = Field(default=None, ge=0)
    """Clips whose ``jump_score`` is larger are dropped as ``extreme_dynamics``; None keeps them."""
    num_frames: int = Field(default=8, ge=1)
    """Frames sampled from each clip, at the middles of as many equal parts."""
    frame_short_side: int = Field(default=320, ge=16)
    """Pixels of the sampled frames' shorter side; smaller pictures stay as they are."""
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    """Of the sampled frames."""
    min_duration_s: float = Field(default=0.0, ge=0)
    """Shorter videos are dropped as ``too_short``."""
    max_duration_s: float = Field(default=3600.0, gt=0)
    """Longer videos are dropped as ``too_long``, unless their spans are given."""
    max_pixels: int = Field(default=media.MAX_PIXELS, ge=1)
    """Videos with more pixels per frame are dropped as ``too_large``."""
    hwaccel: media.Hardware | None = None
    """Decodes on hardware where there is some, else on the processor; ``auto`` takes what it finds."""
    max_memory_mb: int = Field(default=4096, ge=256)
    """A video with which the process grows beyond this is dropped as ``segment_memory``."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """Decoding a video longer than this fails it as ``segment_timeout``."""

    neutral: ClassVar[frozenset[str]] = frozenset(
        {"resources", "hwaccel", "max_memory_mb", "timeout_s"}
    )


class SegmentStage(Stage):
    """Decodes each video once and gives one row per clip."""

    name = "segment"
    inputs = ("video_id", "source_url", "_video", "_path", "_spans")
    outputs = pa.schema(
        [
            records.CLIP_SCHEMA.field(name)
            for name in (
                *("clip_id", "start_ms", "end_ms", "duration_ms", "fps", "width", "height"),
                *("has_audio", "frames", "frame_ms", "motion_score", "still_score", "jump_score"),
                *("start_detectors", "end_detectors"),
                *("caption", "aesthetic_score", "video_text_score"),  # of given spans
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
        """Loads the detectors' networks, and keeps OpenCV to one thread: actors share the cores."""
        cv2.setNumThreads(1)
        for settings in (self.config.detector, *self.config.also):
            build_shot_detector(settings)  # missing weights stop the run here

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns a `Kept` with all clips of each video, or the `Drop` that ended it."""
        return [self._segment(row) for row in batch]

    def _segment(self, row: Row) -> Outcome:
        make = _GivenSpans if row.get("_spans") else _Shots
        try:
            with media.VideoReader(
                row["_path"], hwaccel=self.config.hwaccel, max_pixels=self.config.max_pixels
            ) as reader:
                drop = self._refuse(reader.info, make is _GivenSpans)
                return drop or make(self.config, row, reader).run()
        except MediaError as error:
            return Drop(error.reason, error.detail)
        except _LimitError as limit:
            return limit.drop

    def _refuse(self, info: media.MediaInfo, has_spans: bool) -> Drop | None:
        """Returns the drop of a video whose header already breaks a limit."""
        if not has_spans and info.duration_ms > self.config.max_duration_s * 1000:
            return Drop(TOO_LONG, f"{info.duration_ms / 1000:.1f} s")
        return None


class _LimitError(Exception):
    """A limit that a video breaks in the middle of the pass."""

    def __init__(self, drop: Drop) -> None:
        super().__init__(drop.reason)
        self.drop = drop


class _Pass:
    """What the two kinds of pass over a video share: reading within limits, and making rows."""

    def __init__(self, config: SegmentConfig, row: Row, reader: media.VideoReader) -> None:
        self.config, self.row, self.reader, self.info = config, row, reader, reader.info
        self.meter = ActivityMeter()
        self.end_us = 0
        self._deadline = time.monotonic() + config.timeout_s
        self._memory_limit = config.max_memory_mb << 20

    def frames(self) -> Iterator[media.Frame]:
        """Yields the reader's frames while the pass keeps its limits of time and memory."""
        for number, frame in enumerate(self.reader):
            if time.monotonic() > self._deadline:
                raise _LimitError(
                    Drop(TIMEOUT, f"over {self.config.timeout_s:g} s", retryable=True)
                )
            if number % _MEMORY_CHECK_FRAMES == 0 and resident_bytes() > self._memory_limit:
                raise _LimitError(Drop(OUT_OF_MEMORY, f"over {self.config.max_memory_mb} MiB"))
            yield frame

    def measure(self, frame: media.Frame, small_px: int) -> Any:
        """Feeds the meter with a frame; returns its small picture, uint8 BGR."""
        small = media.small_bgr(frame.picture, self.info.rotation, small_px)
        self.meter.push(frame.time_us, small)
        self.end_us = frame.time_us + frame.duration_us
        return small

    def span(self, start_us: int, end_us: int) -> dict[str, Any]:
        """Returns the columns that say which span of the video a clip is."""
        start_ms, end_ms = media.floor_ms(start_us), media.floor_ms(end_us)
        return {
            "clip_id": records.clip_id(self.row["video_id"], start_ms, end_ms),
            "start_ms": start_ms,
            "end_ms": end_ms,
            "duration_ms": end_ms - start_ms,
        }

    def dropped(self, start_us: int, end_us: int, reason: str, detail: str = "") -> dict[str, Any]:
        """Returns the row of a span that is no clip."""
        drop = {"stage": "segment", "reason": reason, "detail": detail}
        return self.span(start_us, end_us) | {"_drop": drop}

    def activity(self, first: int, after: int, end_us: int) -> dict[str, float]:
        """Returns the scores of the frames ``[first, after)``."""
        return {
            "motion_score": self.meter.motion_score(first, after),
            "still_score": self.meter.still_score(first, after),
            "jump_score": self.meter.jump_score(first, after, end_us),
        }

    def media_columns(
        self, first: int, after: int, end_us: int, sampled: list[tuple[int, bytes]]
    ) -> dict[str, Any]:
        """Returns a clip's frames and frame times; seeks for frames of which too few were held."""
        times_us = self.meter.times_us[first:after]
        if len(sampled) < min(self.config.num_frames, len(times_us)):
            sampled = self._sample_again(times_us, end_us)
        return {
            "frames": [jpeg for _, jpeg in sampled],
            "frame_ms": [media.floor_ms(time_us) for time_us, _ in sampled],
            "_frame_us": [*times_us, end_us],
        }

    def _sample_again(self, times_us: list[int], end_us: int) -> list[tuple[int, bytes]]:
        wanted = [
            times_us[min(bisect_left(times_us, t), len(times_us) - 1)]
            for t in even_times(times_us[0], end_us, min(self.config.num_frames, len(times_us)))
        ]
        frames = media.read_frames(self.row["_path"], sorted(set(wanted)))
        return [(frame.time_us, self.jpeg(frame.picture)) for frame in frames]

    def jpeg(self, picture: media.Picture) -> bytes:
        """Returns a sampled frame as it is stored."""
        rgb = media.upright_rgb(picture, self.info, self.config.frame_short_side)
        return media.jpeg_encode(rgb, self.config.jpeg_quality)

    def outcome(
        self, clips: list[dict[str, Any]], duration_ms: int, fps: float, origin: dict[str, Any]
    ) -> Outcome:
        """Adds what is known of the whole video to its clips; ``origin`` says who chose the spans."""
        config, info = self.config, self.info
        video = (self.row.get("_video") or {}) | {
            "duration_ms": duration_ms,
            "fps": fps,
            "width": info.width,
            "height": info.height,
            "video_codec": info.video_codec,
            "audio_codec": info.audio_codec,
            "file_bytes": info.file_bytes,
            "decode_errors": self.reader.num_errors,
            "truncated": self.reader.truncated,
        }
        if duration_ms < config.min_duration_s * 1000:
            return Drop(TOO_SHORT, f"{duration_ms / 1000:.1f} s", columns={"_video": video})
        if all("_drop" in clip for clip in clips):
            reasons = sorted({clip["_drop"]["reason"] for clip in clips})
            detail = f"{len(clips)} spans, all dropped: {', '.join(reasons)}"
            return Drop(NO_CLIPS, detail, columns={"_video": video})
        whole = {
            "fps": fps,
            "width": info.width,
            "height": info.height,
            "has_audio": info.audio_codec is not None,
        }
        return Kept(
            tuple(
                clip | {"_video": video}
                if "_drop" in clip
                else clip
                | whole
                | {"_video": video, "provenance": [origin, *clip.get("provenance", ())]}
                for clip in clips
            )
        )


class _Shots(_Pass):
    """Clips from shots: boundaries are found while frames are sampled and measured."""

    def __init__(self, config: SegmentConfig, row: Row, reader: media.VideoReader) -> None:
        super().__init__(config, row, reader)
        self.detectors: list[ShotDetector] = [
            build_shot_detector(settings) for settings in (config.detector, *config.also)
        ]
        self.found_us: list[list[int]] = [[] for _ in self.detectors]
        frame_us = round(1e6 / self.info.fps) if self.info.fps else 40_000
        self.max_clip_us = config.max_clip_ms * 1000 if config.max_clip_ms else None
        # Seven: three per frame wanted in the lag, four on the grid.
        num_held = 7 * config.num_frames
        num_fit = HELD_BYTES // max(self.info.width * self.info.height * 3 // 2, 1)
        self.shrink_first = num_fit < num_held
        self.sampler = FrameSampler(
            config.num_frames,
            self.detectors[0].lag_us(frame_us),
            self.max_clip_us,
            self.jpeg,
            max_aside=max(num_fit - num_held, 0),
        )
        self.clips: list[dict[str, Any]] = []
        self.first = 0  # of the shot that is open

    def run(self) -> Outcome:
        """Decodes everything; returns the clips, or why there are none."""
        small_px = max(detector.frame_px for detector in self.detectors)
        for frame in self.frames():
            if frame.time_us > self.config.max_duration_s * 1e6:
                return Drop(TOO_LONG, f"over {self.config.max_duration_s:g} s")
            small = self.measure(frame, small_px)
            self.sampler.push(frame.time_us, partial(self._hold, frame.picture))
            for found_us, detector in zip(self.found_us, self.detectors, strict=True):
                found_us += detector.push(frame.time_us, small)
            self._close_before_last_boundary()
        for found_us, detector in zip(self.found_us, self.detectors, strict=True):
            found_us += detector.flush()
        self._close_before_last_boundary()
        times_us = self.meter.times_us
        self._close(max(self.end_us, times_us[-1] + 1000))
        if len(self.detectors) > 1:
            self._add_agreement()
        length_us = self.end_us - times_us[0]
        fps = len(times_us) * 1e6 / length_us if length_us > 0 else self.info.fps
        main = self.detectors[0]
        origin = provenance("start_ms", main.name, main.revision)
        return self.outcome(self.clips, media.floor_ms(self.end_us), fps, origin)

    def _close_before_last_boundary(self) -> None:
        """Ends the shots whose end has become certain."""
        boundaries = self.found_us[0]
        start_us = self.meter.times_us[self.first]
        for boundary_us in boundaries[bisect_left(boundaries, start_us + 1) :]:
            self._close(boundary_us)

    def _close(self, end_us: int) -> None:
        """Ends the open shot; the next one begins with the frame at ``end_us``."""
        after = bisect_left(self.meter.times_us, end_us)
        if after > self.first:
            self.clips += self._shot(self.first, after, end_us)
            self.first = min(after, len(self.meter.times_us) - 1)

    def _shot(self, first: int, after: int, end_us: int) -> Iterable[dict[str, Any]]:
        """Returns the rows of one shot."""
        times_us = self.meter.times_us[first:after]
        rows: list[dict[str, Any]] = []
        kept: list[tuple[int, int, int]] = []
        for a, b, piece_end_us, reason in self._pieces(times_us, end_us):
            start_us = times_us[a]
            scores = self.activity(first + a, first + b, piece_end_us)
            reason = reason or self._fault(start_us, piece_end_us, scores)
            if reason:
                rows.append(self.dropped(start_us, piece_end_us, reason))
            else:
                kept.append((first + a, first + b, piece_end_us))
                rows.append(self.span(start_us, piece_end_us) | scores)
        # The empty span at the end lets the sampler forget this shot.
        wanted = [(self.meter.times_us[a], end) for a, _, end in kept]
        sampled = self.sampler.take([*wanted, (end_us, end_us)])
        whole = (row for row in rows if "_drop" not in row)
        for row, (a, b, end), frames in zip(whole, kept, sampled, strict=False):
            row |= self.media_columns(a, b, end, frames)
        return rows

    def _pieces(
        self, times_us: list[int], end_us: int
    ) -> Iterator[tuple[int, int, int, str | None]]:
        """Yields first and last + 1 frame, end and, where it is no clip, the reason of each piece."""
        limit_us = self.max_clip_us
        if limit_us is None or end_us - times_us[0] <= limit_us:
            yield 0, len(times_us), end_us, None
        elif self.config.long_shots == "split":
            for a, b in clip_rules.split_shot(times_us, end_us, limit_us):
                yield a, b, times_us[b] if b < len(times_us) else end_us, None
        else:
            seed = self.span(times_us[0], end_us)["clip_id"]
            a, b, stop_us = clip_rules.random_window(times_us, end_us, limit_us, seed)
            if a:
                yield 0, a, times_us[a], OUTSIDE_WINDOW
            yield a, b, stop_us, None
            if b < len(times_us):
                yield b, len(times_us), end_us, OUTSIDE_WINDOW

    def _fault(self, start_us: int, end_us: int, scores: dict[str, float]) -> str | None:
        """Returns why a piece is no clip."""
        config = self.config
        length_ms = media.floor_ms(end_us) - media.floor_ms(start_us)
        if length_ms < max(config.min_clip_ms, 1):
            return CLIP_TOO_SHORT
        if config.max_still is not None and scores["still_score"] > config.max_still:
            return STILL
        if config.max_jumps is not None and scores["jump_score"] > config.max_jumps:
            return RESTLESS
        return None

    def _add_agreement(self) -> None:
        """Notes at each clip which detectors see its start and its end; none where a piece was cut."""
        names = [detector.name for detector in self.detectors]
        keys = [
            name if names.count(name) == 1 else f"{name} ({detector.revision})"
            for name, detector in zip(names, self.detectors, strict=True)
        ]
        found_us = dict(zip(keys, self.found_us, strict=True))
        others = agreement(found_us, AGREEMENT_US)
        seen_by = {
            time_us: [keys[0], *names]
            for time_us, names in zip(self.found_us[0], others, strict=True)
        }
        for clip in self.clips:
            if "_drop" not in clip:
                clip["start_detectors"] = seen_by.get(clip["_frame_us"][0], [])
                clip["end_detectors"] = seen_by.get(clip["_frame_us"][-1], [])

    def _hold(self, picture: media.Picture) -> media.Picture:
        if self.shrink_first:
            return media.scale_picture(picture, self.info, self.config.frame_short_side)
        return picture


class _GivenSpans(_Pass):
    """Clips from a published annotation list: only the spans are decoded."""

    def run(self) -> Outcome:
        """Returns the given clips in order of time, or why there are none."""
        spans = sorted(self.row["_spans"], key=lambda span: (span["start_ms"], span["end_ms"]))
        spans_us = [(span["start_ms"] * 1000, span["end_ms"] * 1000) for span in spans]
        clips: list[dict[str, Any]] = []
        seen: set[str] = set()
        for start_us, end_us, members in clip_rules.group_spans(spans_us, SEEK_GAP_US):
            sampler = SpanSampler([spans_us[i] for i in members], self.config.num_frames, self.jpeg)
            begin = self._decode(start_us, end_us, sampler)
            for i, sampled in zip(members, sampler.finish(), strict=True):
                clip = self._clip(spans[i], begin, sampled)
                if clip["clip_id"] in seen and "_drop" not in clip:
                    clip = self.dropped(*spans_us[i], SPAN_REPEATED)
                seen.add(clip["clip_id"])
                clips.append(clip)
        duration_ms = max(self.info.duration_ms, media.floor_ms(self.end_us))
        return self.outcome(
            clips, duration_ms, self.info.fps, provenance("start_ms", records.GIVEN)
        )

    def _decode(self, start_us: int, end_us: int, sampler: SpanSampler) -> int:
        """Decodes a group of spans; returns the index of the first frame that was kept."""
        seeks = start_us > SEEK_GAP_US
        if seeks:
            self.reader.seek(start_us)
        frames = self.frames()
        frame = next(frames, None)
        if seeks and (frame is None or frame.time_us > start_us):
            # Not every container can be sought; from its start, every frame is found.
            self.reader.seek(0)
            frames = self.frames()
            frame = next(frames, None)
        begin = len(self.meter.times_us)
        while frame is not None:
            if frame.time_us >= start_us - _LEAD_US:
                self.measure(frame, media.GRID_PX)
                sampler.push(frame.time_us, frame.picture)
            if frame.time_us > end_us:
                break
            frame = next(frames, None)
        return begin

    def _clip(self, span: Row, begin: int, sampled: list[tuple[int, bytes]]) -> dict[str, Any]:
        """Returns the row of one span, whose group was decoded from frame ``begin`` on."""
        given_us = span["start_ms"] * 1000, span["end_ms"] * 1000
        times_us = self.meter.times_us[begin:]
        frames = clip_rules.snap_span(times_us, self.end_us, given_us)
        if frames is None:
            end_ms = max(self.end_us // 1000, self.info.duration_ms)
            return self.dropped(*given_us, SPAN_OUTSIDE, f"the video ends at {end_ms} ms")
        first, after = begin + frames[0], begin + frames[1]
        end_us = times_us[frames[1]] if frames[1] < len(times_us) else self.end_us
        start_us = times_us[frames[0]]
        inside = [(time_us, jpeg) for time_us, jpeg in sampled if start_us <= time_us < end_us]
        kept = {
            name: span[name]
            for name in ("caption", "aesthetic_score", "video_text_score")
            if span[name] is not None
        }
        return (
            self.span(start_us, end_us)
            | self.activity(first, after, end_us)
            | self.media_columns(first, after, end_us, inside)
            | kept
            | {"provenance": [provenance(name, records.GIVEN) for name in kept]}
        )


def resident_bytes() -> int:
    """Returns the memory this process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError):
        return 0
