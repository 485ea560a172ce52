# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + fused captions, and the one that training reads.

The five captions of InternVideo2 (App. B.2) are ``caption_video`` (V), ``caption_audio`` (A),
``caption_speech`` (S), ``caption_av`` (AV) and ``caption_avs`` (AVS). ``caption`` is a copy of
one of them: the video caption unless told otherwise, since that is what InternVid trains ViCLIP
on, and a model that sees frames alone cannot learn what is only heard. A caption that came with a
published annotation list stays.
"""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from pydantic import Field

from dataengine import records
from dataengine.models.answers import Author
from dataengine.models.fusion import (
    Captions,
    FusedCaptions,
    FuserConfig,
    TemplateConfig,
    build_fuser,
)
from dataengine.stage import Kept, Outcome, Row, Stage, provenance


class FuseStage(Stage):
    """Writes ``caption_speech``, ``caption_av``, ``caption_avs`` and ``caption``."""

    name = "fuse"
    inputs = (
        "clip_id", "caption_video", "caption_audio", "transcript", "transcript_en", "language", "caption",
        "provenance",
    )  # fmt: skip
    outputs = pa.schema(
        [(name, pa.string()) for name in ("caption_speech", "caption_av", "caption_avs", "caption")]
    )

    class Config(Stage.Config):
        """Settings of fusion."""

        model: FuserConfig = Field(default_factory=TemplateConfig)
        """Who joins the captions."""
        caption: Literal["caption_video", "caption_av", "caption_avs"] = "caption_video"
        """The column that ``caption``, which training reads, is a copy of."""

    config: Config

    def setup(self) -> None:
        """Loads the fuser."""
        self._fuser = build_fuser(self.config.model)

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns one Kept per row."""
        fused = self._fuser.fuse([_captions(row) for row in batch])
        outcomes: list[Outcome] = []
        for row, captions in zip(batch, fused, strict=True):
            columns: Row = {
                "caption_speech": captions.speech,
                "caption_av": captions.audio_video,
                "caption_avs": captions.audio_video_speech,
            }
            wrote = [self._entry(name, captions) for name, text in columns.items() if text]
            if not _is_given(row):
                chosen = self.config.caption
                columns["caption"] = row.get(chosen) if chosen not in columns else columns[chosen]
                # Annotation again: what the row says of a column that is written now is out of date.
                authors = wrote if chosen in columns else row.get("provenance") or ()
                wrote += [
                    entry | {"column": "caption"}
                    for entry in authors
                    if entry["column"] == chosen and columns["caption"]
                ]
            outcomes.append(Kept((columns | {"provenance": wrote},)))
        return outcomes

    def _entry(self, column: str, captions: FusedCaptions) -> Row:
        """Returns the provenance of a column that was written."""
        fuser = self._fuser
        own = Author(fuser.model, fuser.revision, fuser.prompt_hash)
        author = captions.authors.get(column, own)
        # No input_hash: that is of frames, and fusion is shown texts, which stand in the row.
        return provenance(
            *(column, author.model, author.revision, author.prompt_hash),
            note=captions.notes.get(column),
        )


def _is_given(row: Row) -> bool:
    """Returns whether a clip's caption came with it."""
    return bool(row.get("caption")) and any(
        entry["column"] == "caption" and entry["model"] == records.GIVEN
        for entry in row.get("provenance") or ()
    )


def _captions(row: Row) -> Captions:
    """Returns a row's captions, with the transcript in English where it is known."""
    english = row.get("transcript_en")
    return Captions(
        video=row.get("caption_video"),
        audio=row.get("caption_audio"),
        transcript=english or row.get("transcript"),
        language="en" if english else row.get("language"),
        clip_id=row.get("clip_id") or "",
    )
