# SPDX-License-Identifier: Apache-2.0
"""Text in any language -> English.

InternVideo2 (App. B.2) translates with SeamlessM4T, and gives what its language identification is
less than 0.95 sure of to a language model instead.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import Field

from dataengine.models.answers import Failure, Written
from dataengine.models.llm import LLMConfig
from dataengine.needs import Need, Package, Weights
from dataengine.prompts import PromptFile
from dataengine.stage import Settings

LANGUAGE_UNSUPPORTED = "language_unsupported"
"""Reason of a `Failure`: the translator knows no such language, and there is no language model."""
LANGUAGE_UNSURE = "language_unsure"
"""Note of a translation from a language that is not sure, for want of a language model."""
PROMPT_VARIABLES = {"system": set(), "ask": {"language", "transcript"}, "retry": {"problem"}}


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


class LLMTranslatorConfig(Settings):
    """A language model; its answer is checked, and asked for once more where it is not usable."""

    kind: Literal["llm"] = "llm"
    llm: LLMConfig
    """Who translates."""
    prompt: Annotated[str, PromptFile(PROMPT_VARIABLES)] = Field(
        default="prompts/translate.v1.yaml", validate_default=True
    )
    """Prompt file; its variables are declared in it."""
    max_chars: int = Field(default=3000, ge=100)
    """Longest piece of a transcript in one request; a longer one is cut at the end of a sentence."""
    max_tokens: int = Field(default=2048, ge=16)
    """Most tokens of one answer."""


class SeamlessConfig(Settings):
    """SeamlessM4T, first or second version, text to text (weights: CC-BY-NC 4.0)."""

    kind: Literal["seamless"] = "seamless"
    model: str
    """Hub id (``facebook/seamless-m4t-v2-large``, ``facebook/hf-seamless-m4t-medium``) or a local folder."""
    revision: str = ""
    """Commit, tag or branch on the hub; empty takes the newest."""
    llm: LLMTranslatorConfig | None = None
    """Who translates instead where the language is not sure, or SeamlessM4T does not know it. Without one,
    what is not sure is translated by SeamlessM4T all the same, with the note ``language_unsure``,
    and languages it does not know end as ``language_unsupported``."""
    min_language_score: float = Field(default=0.95, ge=0, le=1)
    """Below this the language is not sure (InternVideo2 App. B.2)."""
    num_beams: int = Field(default=5, ge=1)
    """Width of the beam search (5 in SeamlessM4T's own evaluations); 1 is greedy."""
    max_tokens: int = Field(default=128, ge=16)
    """Longest piece of a transcript, in tokens; a longer one is cut at the end of a sentence: the
    model was trained on single sentences and skips some of many."""
    max_new_tokens: int = Field(default=256, ge=16)
    """Most tokens of one piece's translation."""
    batch_size: int = Field(default=32, ge=1)
    """Most pieces, all of one language, in one call of the model."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""

    neutral: ClassVar[frozenset[str]] = frozenset({"batch_size", "device"})

    def needs(self) -> tuple[Need, ...]:
        """Returns the packages and the weights."""
        return (
            Package("transformers"),
            Package("sentencepiece"),
            Weights("hub", self.model, self.revision),
        )


TranslatorConfig = Annotated[
    SourceConfig | SeamlessConfig | LLMTranslatorConfig, Field(discriminator="kind")
]


_SENTENCE_END = re.compile(r"(?<=[.!?…؟।])\s+|(?<=[.!?…][\"')»\u201d])\s+|(?<=[。\uff01\uff1f])")


def split_text(text: str, size: Callable[[str], int], limit: int) -> list[str]:
    """Returns a text in pieces no larger than ``limit``, cut where sentences end where possible.

    A sentence that is too large alone is cut between words, or, in scripts written without spaces,
    between characters.

    Args:
        text: Any.
        size: Of a piece, e.g. in tokens; no piece may be larger than what holds it.
        limit: Largest piece.
    """
    pieces: list[str] = []
    for sentence in re.split(_SENTENCE_END, text):
        sentence = (sentence or "").strip()
        if not sentence:
            continue
        parts = [sentence] if size(sentence) <= limit else _cut_sentence(sentence, size, limit)
        for part in parts:
            joined = f"{pieces[-1]} {part}" if pieces else part
            if pieces and size(joined) <= limit:
                pieces[-1] = joined
            else:
                pieces.append(part)
    return pieces


def _cut_sentence(sentence: str, size: Callable[[str], int], limit: int) -> list[str]:
    """Returns a sentence in the longest parts that fit, each of whole words where words fit."""
    words = [
        part
        for word in sentence.split()
        for part in ([word] if size(word) <= limit else _longest(list(word), "", size, limit))
    ]
    return _longest(words, " ", size, limit)


def _longest(units: Sequence[str], space: str, size: Callable[[str], int], limit: int) -> list[str]:
    """Returns units joined into the longest parts that fit; a unit too large alone stays whole."""
    parts = []
    start = 0
    while start < len(units):
        low, high = start + 1, len(units)  # the largest end that fits, by halving
        while low < high:
            middle = (low + high + 1) // 2
            if size(space.join(units[start:middle])) <= limit:
                low = middle
            else:
                high = middle - 1
        parts.append(space.join(units[start:low]))
        start = low
    return parts


class SourceTranslator:
    """Knows no language, and says nothing it does not know."""

    model = "source"
    revision = "1"

    def translate(self, texts: Sequence[Foreign]) -> list[None]:
        """Returns None for each text."""
        return [None] * len(texts)


def build_translator(
    config: SourceConfig | SeamlessConfig | LLMTranslatorConfig,
) -> Translator:
    """Returns the translator that a config names.

    Raises:
        DependencyError: If its package or its weights are missing or unfit.
    """
    match config:
        case SourceConfig():
            return SourceTranslator()
        case SeamlessConfig():
            from dataengine.models.seamless import SeamlessTranslator

            return SeamlessTranslator(config)
        case LLMTranslatorConfig():
            from dataengine.models.llm_translator import LLMTranslator

            return LLMTranslator(config)
