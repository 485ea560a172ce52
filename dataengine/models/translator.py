# SPDX-License-Identifier: Apache-2.0
"""Text in any language -> English."""

from collections.abc import Sequence
from typing import Literal, Protocol

from dataengine.stage import Settings


class Translator(Protocol):
    """Translates texts into English."""

    model: str
    revision: str

    def translate(self, texts: Sequence[str], languages: Sequence[str | None]) -> list[str | None]:
        """Returns the English of each text, or None where it cannot tell.

        Args:
            texts: Not empty.
            languages: One per text: ISO 639-1, else 639-3; None where unknown.
        """
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

    def translate(self, texts: Sequence[str], languages: Sequence[str | None]) -> list[str | None]:
        """Returns None for each text."""
        return [None] * len(texts)


def build_translator(config: TranslatorConfig) -> Translator:
    """Returns the translator that a config names."""
    builders = {"source": SourceTranslator}
    return builders[config.kind]()
