# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + English transcript.

In this order: what is English already is kept; the source's own English subtitles are taken,
cut as in `dataengine.stages.transcribe`; what is left goes to the translator.
"""

from collections.abc import Sequence

import pyarrow as pa

from dataengine.models.translator import SourceConfig, TranslatorConfig, build_translator
from dataengine.stage import Kept, Outcome, Row, Stage, provenance
from dataengine.stages.transcribe import cut_cues, join_segments


class TranslateStage(Stage):
    """Writes ``transcript_en``; null where nothing is said or nobody can tell what it means."""

    name = "translate"
    inputs = ("transcript", "language", "start_ms", "end_ms", "_subtitles")
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
        texts = self._translator.translate(
            [batch[index]["transcript"] for index in open_rows],
            [batch[index].get("language") for index in open_rows],
        )
        for index, text in zip(open_rows, texts, strict=True):
            if text:
                answers[index] = (text, self._translator.model, self._translator.revision)
        return [Kept((self._columns(answer),)) for answer in answers]

    def _from_source(self, row: Row) -> tuple[str, str, str] | None:
        transcript = row.get("transcript")
        if not transcript:
            return None
        if row.get("language") == "en":
            return transcript, "source", "1"
        cues = cut_cues(row.get("_subtitles"), "en", row["start_ms"], row["end_ms"])
        english = join_segments(cues)
        return (english, "subtitles", "en") if english else None

    def _columns(self, answer: tuple[str, str, str] | None) -> Row:
        if answer is None:
            return {"transcript_en": None, "provenance": []}
        text, model, revision = answer
        wrote = [provenance("transcript_en", model, revision)]
        return {"transcript_en": text, "provenance": wrote}
