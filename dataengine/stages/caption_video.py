# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + video captions at two scales (InternVid section 3.2).

``caption_video_coarse`` describes the middle frame, ``caption_video_fine`` frame after frame,
and ``caption_video`` the clip as a whole.
"""

import logging
from collections.abc import Sequence

import pyarrow as pa

from dataengine.media import jpeg_decode
from dataengine.models.answers import Author, Failure
from dataengine.models.captioner import (
    CaptionerConfig,
    ClipFrames,
    SignalsVideoConfig,
    VideoCaptions,
    build_captioner,
)
from dataengine.stage import Drop, Kept, Outcome, Row, Stage, provenance

logger = logging.getLogger(__name__)

BAD_FRAMES = "bad_frames"
"""Drop reason: a clip without frames, or with one that is not a JPEG."""


def decode_frames(row: Row) -> ClipFrames:
    """Returns a row's frames as pictures.

    Raises:
        ValueError: If there are none, or one does not decode.
    """
    jpegs = row.get("frames") or []
    if not jpegs:
        raise ValueError("no frames")
    frames = [jpeg_decode(jpeg) for jpeg in jpegs]
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError("frames of different sizes")
    times = row.get("frame_ms") or []
    if len(times) != len(frames):
        raise ValueError(f"{len(frames)} frames with {len(times)} times")
    return ClipFrames(frames, times, row.get("clip_id") or "", jpegs)


class CaptionVideoStage(Stage):
    """Writes ``caption_video_coarse``, ``caption_video_fine`` and ``caption_video``."""

    name = "caption_video"
    inputs = ("clip_id", "frames", "frame_ms")
    outputs = pa.schema(
        [
            ("caption_video_coarse", pa.string()),
            ("caption_video_fine", pa.list_(pa.string())),
            ("caption_video", pa.string()),
        ]
    )

    class Config(Stage.Config):
        """Settings of video captions."""

        model: CaptionerConfig = SignalsVideoConfig()
        """Who describes the clips."""

    config: Config

    def setup(self) -> None:
        """Loads the captioner."""
        self._captioner = build_captioner(self.config.model)

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Captions all rows in one batch.

        A clip whose model fails keeps its other columns and says so in its provenance; one with a
        broken JPEG is no clip to train on and ends as Drop("bad_frames").
        """
        clips: list[ClipFrames | Drop] = []
        for row in batch:
            try:
                clips.append(decode_frames(row))
            except ValueError as error:
                clips.append(Drop(BAD_FRAMES, str(error)))
        good = [clip for clip in clips if isinstance(clip, ClipFrames)]
        answers = self._captioner.caption(good) if good else []
        captions = iter(zip(good, answers, strict=True))
        return [
            clip if isinstance(clip, Drop) else Kept((self._columns(*next(captions)),))
            for clip in clips
        ]

    def _columns(self, clip: ClipFrames, captions: VideoCaptions | Failure) -> Row:
        captioner = self._captioner
        own = Author(captioner.model, captioner.revision, captioner.prompt_hash)
        if isinstance(captions, Failure):
            logger.warning("No caption of %s: %s", clip.clip_id, captions)
            captions = VideoCaptions(None, (), None, notes={"caption_video": captions.note})
        columns: Row = {
            "caption_video_coarse": captions.coarse,
            "caption_video_fine": list(captions.fine) or None,
            "caption_video": captions.caption,
        }
        shown = clip.input_hash
        wrote = []
        for name, value in columns.items():
            author, note = captions.authors.get(name, own), captions.notes.get(name)
            if value or note:
                entry = provenance(
                    *(name, author.model, author.revision, author.prompt_hash),
                    input_hash=shown,
                    note=note,
                )
                wrote.append(entry)
        return columns | {"provenance": wrote}
