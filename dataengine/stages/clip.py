# SPDX-License-Identifier: Apache-2.0
"""Clip -> its own MP4: the source's bits where possible, exact to the frame at both ends.

See `dataengine.cut` for the method. How each clip was made, and why it had to be encoded if it was,
stands in its provenance; so does why its sound was encoded or left out.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import pyarrow as pa
from pydantic import Field

from dataengine import media, records
from dataengine.cut import Cut, cut
from dataengine.errors import MediaError
from dataengine.stage import Drop, Kept, Outcome, Resources, Row, Stage, provenance

CUT_FAILED, CUT_TIMEOUT = "cut_failed", "cut_timeout"


class ClipConfig(Stage.Config):
    """How clips are stored."""

    resources: Resources = Resources(colocate=True)
    """Runs where the video's file is."""
    max_short_side: int = Field(default=720, ge=16)
    """Larger pictures are shrunk to this short side, which means encoding them."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Limit for each run of ffmpeg; a clip that takes longer is dropped as ``cut_timeout``."""


class ClipStage(Stage):
    """Writes ``video``: one MP4 per clip, with its sound."""

    name = "clip"
    inputs = ("clip_id", "_path", "_frame_us")
    outputs = pa.schema(
        [records.CLIP_SCHEMA.field(name) for name in ("video", "width", "height", "has_audio")]
    )
    Config = ClipConfig
    config: ClipConfig

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns each clip with its video, or the `Drop` of one that cannot be cut."""
        return [self._clip(row) for row in batch]

    def _clip(self, row: Row) -> Outcome:
        try:
            clip = cut(
                row["_path"],
                _probe(row["_path"]),
                row["_frame_us"],
                self.config.max_short_side,
                self.config.timeout_s,
            )
        except MediaError as error:
            known = error.reason in {CUT_FAILED, CUT_TIMEOUT}
            reason = error.reason if known else CUT_FAILED
            return Drop(reason, error.detail if known else str(error), reason == CUT_TIMEOUT)
        return Kept((_row(row["clip_id"], clip),))


def _row(clip_id: str, clip: Cut) -> Row:
    """Returns the columns of a finished clip."""
    how = "copy" if clip.mode == "copy" else "libx264 crf 20"
    origins = [provenance("video", f"ffmpeg/{how}", clip.why)]
    if clip.sound_why:  # it was not copied
        origins.append(provenance("has_audio", f"ffmpeg/{clip.sound}", clip.sound_why))
    return {
        "video": {"bytes": clip.data, "path": f"{clip_id}.mp4"},
        "width": clip.width,
        "height": clip.height,
        "has_audio": clip.has_audio,
        "provenance": origins,
    }


def _probe(path: str) -> media.MediaInfo:
    """Returns a file's facts, remembered for the clips that follow."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise MediaError("unreadable_file", error.strerror or str(error)) from error
    return _probe_version(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _probe_version(path: str, size: int, mtime_ns: int) -> media.MediaInfo:
    return media.probe(path)
