# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + video_text_score: how well a caption fits the frames taken together.

The cosine of a video-text model's embeddings of clip and caption, in the place of InternVid's UMT-SIM
(section 3.3). Nothing is dropped for a low score: subsets decide. A caption longer than the model's
context is scored by its beginning.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataengine.models.answers import Failure
from dataengine.models.video_text import (
    VideoTextConfig,
    build_video_text,
    check_video_text,
    middle_frames,
)
from dataengine.stage import Drop, Kept, Outcome, Row, Stage, provenance
from dataengine.stages.score import BAD_FRAMES, CAPTION_COLUMNS, CaptionColumn, prepare_jpegs

logger = logging.getLogger(__name__)


class ScoreVideoTextStage(Stage):
    """Writes ``video_text_score``; null for a clip without a caption."""

    name = "score_video_text"
    inputs = ("clip_id", "frames", *CAPTION_COLUMNS)
    outputs = pa.schema([("video_text_score", pa.float32())])

    class Config(Stage.Config):
        """Settings of video-text scoring."""

        model: VideoTextConfig
        """Who scores."""
        caption_column: CaptionColumn = "caption_video"
        """The text that is compared with the clip."""
        decode_threads: int = Field(default=2, ge=1)
        """JPEGs decoded side by side while the model works."""
        neutral: ClassVar[frozenset[str]] = Stage.Config.neutral | {"decode_threads"}

    config: Config

    def setup(self) -> None:
        """Loads the model, which proves itself on known pairs first."""
        self._scorer = build_video_text(self.config.model)
        check_video_text(self._scorer)
        self._pool = ThreadPoolExecutor(self.config.decode_threads, "decode")

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Scores all rows in one batch.

        A clip whose model fails keeps its other columns and says so in its provenance; one with a broken
        JPEG is no clip to train on and ends as Drop("bad_frames").
        """
        column = self.config.caption_column
        rows = [row for row in batch if row.get("frames") and row.get(column)]
        chosen = [middle_frames(len(row["frames"]), self._scorer.num_frames) for row in rows]
        # Frames that a short clip shows again are decoded once.
        jpegs = [
            row["frames"][at]
            for row, places in zip(rows, chosen, strict=True)
            for at in dict.fromkeys(places)
        ]
        prepared = prepare_jpegs(self._scorer, jpegs, self._pool)
        texts = self._scorer.embed_texts([row[column] for row in rows]) if rows else []

        videos: list[np.ndarray | Failure] = []
        places_left = iter(chosen)
        while group := list(islice(places_left, self._scorer.batch_size)):
            clips = [_stacked(places, prepared) for places in group]
            good = [clip for clip in clips if not isinstance(clip, Failure)]
            embedded = iter(self._scorer.embed_videos(good) if good else ())
            videos += [clip if isinstance(clip, Failure) else next(embedded) for clip in clips]

        outcomes = iter(map(self._outcome, rows, videos, texts))
        return [
            next(outcomes)
            if row.get("frames") and row.get(column)
            else Kept(({"video_text_score": None},))
            for row in batch
        ]

    def _outcome(
        self, row: Row, video: np.ndarray | Failure, text: np.ndarray | Failure
    ) -> Outcome:
        by = (self._scorer.model, self._scorer.revision)
        for answer in (video, text):
            if isinstance(answer, Failure):
                if answer.reason == BAD_FRAMES:
                    return Drop(BAD_FRAMES, answer.detail)
                logger.warning("No video_text_score of %s: %s", row.get("clip_id"), answer)
                wrote = [provenance("video_text_score", *by, note=answer.note)]
                return Kept(({"video_text_score": None, "provenance": wrote},))
        assert isinstance(video, np.ndarray)
        assert isinstance(text, np.ndarray)
        score = float(np.clip(video @ text, -1.0, 1.0))
        wrote = [provenance("video_text_score", *by)]
        return Kept(({"video_text_score": score, "provenance": wrote},))


def _stacked(
    places: Sequence[int], prepared: Iterator[np.ndarray | Failure]
) -> np.ndarray | Failure:
    """Takes one clip's pictures off those of all clips; returns them as uint8 [T, S, S, 3]."""
    pictures = {at: next(prepared) for at in dict.fromkeys(places)}
    for picture in pictures.values():
        if isinstance(picture, Failure):
            return picture
    return np.stack([pictures[at] for at in places])  # pyright: ignore[reportArgumentType, reportCallIssue]  none is a Failure
