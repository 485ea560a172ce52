# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + English transcript.

In this order: what is English already is kept; the source's own English subtitles are taken,
cut as in `dataengine.stages.transcribe`; what is left goes to the translator.
"""

import logging
from collections.abc import Sequence

import pyarrow as pa

from dataengine.models.answers import Author, Failure, Written
from dataengine.models.translator import (
    Foreign,
    SourceConfig,
    TranslatorConfig,
    build_translator,
)
from dataengine.stage import Kept, Outcome, Row, Stage, provenance
from dataengine.stages.transcribe import SUBTITLES, cut_cues, join_segments

logger = logging.getLogger(__name__)


class TranslateStage(Stage):
    """Writes ``transcript_en``; null where nothing is said or nobody can tell what it means."""

    name = "translate"
    inputs = (
        "clip_id", "transcript", "language", "language_score", "start_ms", "end_ms", "_subtitles",
        "provenance",
    )  # fmt: skip
    outputs = pa.schema([("transcript_en", pa.string())])

    class Config(Stage.Config):
        """Settings of translation."""

        model: TranslatorConfig = SourceConfig()
        """Who translates what has no English of its own."""

    config: Config

    def setup(self) -> None:
        """Loads the translator."""
        self._translator = build_translator(self.config.model)

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns one Kept per row."""
        answers = [self._from_source(row) for row in batch]
        open_rows = [
            index
            for index, row in enumerate(batch)
            if row.get("transcript") and answers[index] is None
        ]
        texts = [
            Foreign(
                batch[index].get("clip_id") or "",
                batch[index]["transcript"],
                batch[index].get("language"),
                batch[index].get("language_score"),
            )
            for index in open_rows
        ]
        translations = self._translator.translate(texts) if texts else []
        for index, answer in zip(open_rows, translations, strict=True):
            if isinstance(answer, Failure):
                logger.warning("No translation of %s: %s", batch[index].get("clip_id"), answer)
                author = Author(self._translator.model, self._translator.revision)
                answer = Written("", author, answer.note)
            answers[index] = answer
        return [Kept((_columns(answer),)) for answer in answers]

    def _from_source(self, row: Row) -> Written | None:
        transcript = row.get("transcript")
        if not transcript:
            return None
        if row.get("language") == "en":
            return Written(transcript, Author("source", "1"))
        cues = cut_cues(row.get("_subtitles"), "en", row["start_ms"], row["end_ms"])
        english = join_segments(cues)
        if english:
            return Written(english, Author(SUBTITLES, "en"))
        return _from_subtitles_before(row)


def _from_subtitles_before(row: Row) -> Written | None:
    """Returns English that was cut from subtitles before: an old corpus has no cues any more."""
    for entry in row.get("provenance") or ():
        if entry["column"] == "transcript_en" and entry["model"] == SUBTITLES:
            text = row.get("transcript_en")
            return Written(text, Author(SUBTITLES, entry["revision"] or "")) if text else None
    return None


def _columns(answer: Written | None) -> Row:
    if answer is None:
        return {"transcript_en": None, "provenance": []}
    author = answer.author
    entry = provenance(
        *("transcript_en", author.model, author.revision, author.prompt_hash), note=answer.note
    )
    return {"transcript_en": answer.text or None, "provenance": [entry]}
