# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + clip_score: how well a caption fits the frames.

The score is the mean cosine of CLIP's text embedding and the image embeddings of up to four
evenly spread frames (InternVid App. C samples four frames). Nothing is dropped for a low
score: subsets decide. A caption longer than the model's context is scored by its beginning.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataengine.media import jpeg_decode
from dataengine.models.clip import ClipScorerConfig, OpenClipConfig, build_clip_scorer
from dataengine.stage import Drop, Kept, Outcome, Row, Stage, provenance

CAPTION_COLUMNS = ("caption_video", "caption_video_coarse", "caption_av", "caption_avs", "caption")


def spread(num_items: int, num_wanted: int) -> list[int]:
    """Returns up to ``num_wanted`` indices spread evenly over ``num_items``, in order.

    Each is the middle of an equal part: 8 items, 4 wanted: 1, 3, 5, 7.
    """
    num = min(num_items, num_wanted)
    return [int((index + 0.5) * num_items / num) for index in range(num)]


class ScoreStage(Stage):
    """Writes ``clip_score``; null for a clip without a caption."""

    name = "score"
    inputs = ("frames", *CAPTION_COLUMNS)
    outputs = pa.schema([("clip_score", pa.float32())])

    class Config(Stage.Config):
        """Settings of scoring."""

        model: ClipScorerConfig = OpenClipConfig()
        """Who scores."""
        caption_column: Literal[
            "caption_video", "caption_video_coarse", "caption_av", "caption_avs", "caption"
        ] = "caption_video"
        """The text that is compared with the frames."""
        max_frames: int = Field(default=4, ge=1)
        """Most frames compared per clip."""

    config: Config

    def setup(self) -> None:
        """Loads the model."""
        self._scorer = build_clip_scorer(self.config.model)

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Scores all rows in one batch; returns Drop("bad_frames") where a JPEG is broken."""
        outcomes: list[Outcome | None] = [None] * len(batch)
        clips: list[list[np.ndarray]] = []
        texts: list[str] = []
        scored: list[int] = []
        for index, row in enumerate(batch):
            text, jpegs = row.get(self.config.caption_column), row.get("frames") or []
            if not text or not jpegs:
                outcomes[index] = Kept(({"clip_score": None},))
                continue
            try:
                chosen = spread(len(jpegs), self.config.max_frames)
                clips.append([jpeg_decode(jpegs[at]) for at in chosen])
            except ValueError as error:
                outcomes[index] = Drop("bad_frames", str(error))
                continue
            texts.append(text)
            scored.append(index)
        wrote = [provenance("clip_score", self._scorer.model, self._scorer.revision)]
        for index, score in zip(scored, self._scorer.score(clips, texts), strict=True):
            outcomes[index] = Kept(({"clip_score": score, "provenance": wrote},))
        return [outcome for outcome in outcomes if outcome is not None]
