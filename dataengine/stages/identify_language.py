# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + language: identifies the language of each transcript.

A clip without a transcript has no language. A short transcript keeps the score the model gives
it: selection decides what is sure enough (InternVideo2 sends what is below 0.95 to an LLM
instead of the translator, App. B.2; see `dataengine.stages.translate`).
"""

from collections.abc import Sequence

import pyarrow as pa

from dataengine.models.lid import (
    FastTextConfig,
    LanguageIdentifierConfig,
    build_language_identifier,
)
from dataengine.stage import Kept, Outcome, Row, Stage, provenance


class IdentifyLanguageStage(Stage):
    """Writes ``language`` and ``language_score``."""

    name = "identify_language"
    inputs = ("transcript",)
    outputs = pa.schema([("language", pa.string()), ("language_score", pa.float32())])

    class Config(Stage.Config):
        """Settings of language identification."""

        model: LanguageIdentifierConfig = FastTextConfig()
        """Who identifies."""

    config: Config

    def setup(self) -> None:
        """Loads the model."""
        self._identifier = build_language_identifier(self.config.model)

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns one Kept per row; both columns are null where nothing is said."""
        texts = [(row.get("transcript") or "").strip() for row in batch]
        answers = iter(self._identifier.identify([text for text in texts if text]))
        outcomes: list[Outcome] = []
        for text in texts:
            language, score = next(answers) if text else (None, None)
            wrote = [
                provenance(column, self._identifier.model, self._identifier.revision)
                for column in self.outputs.names
                if text
            ]
            columns = {"language": language, "language_score": score, "provenance": wrote}
            outcomes.append(Kept((columns,)))
        return outcomes
