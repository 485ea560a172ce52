# SPDX-License-Identifier: Apache-2.0
"""Text in any language -> English."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dataengine.models.answers import Failure, Written
from dataengine.stage import Settings


@dataclass(frozen=True, slots=True)
class Foreign:
    """A text to translate.

    Attributes:
        clip_id: Whose it is.
        text: Not empty.
        language: ISO 639-1, else 639-3; None where unknown.
        language_score: How sure that is, in [0, 1]; None where unknown.
    """

    clip_id: str
    text: str
    language: str | None = None
    language_score: float | None = None


class Translator(Protocol):
    """Translates texts into English."""

    model: str
    revision: str

    def translate(self, texts: Sequence[Foreign]) -> Sequence[Written | Failure | None]:
        """Returns the English of each text, None where it cannot tell, or why it failed; in order."""
        ...


class SourceConfig(Settings):
    """No model: English stays as it is, and a source's own English subtitles are taken."""

    kind: Literal["source"] = "source"


TranslatorConfig = SourceConfig
"""The families of translation; a second kind makes this a union on ``kind``."""


class SourceTranslator:
    """Knows no language, and says nothing it does not know."""

    model = "source"
    revision = "1"

    def translate(self, texts: Sequence[Foreign]) -> list[None]:
        """Returns None for each text."""
        return [None] * len(texts)


def build_translator(config: TranslatorConfig) -> Translator:
    """Returns the translator that a config names."""
    builders = {"source": SourceTranslator}
    return builders[config.kind]()
