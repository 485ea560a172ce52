# SPDX-License-Identifier: Apache-2.0
"""Captions of one clip -> captions of several modalities at once.

InternVideo2 (App. B.2) trains on five captions of a clip: video (V), audio (A), speech (S),
audio-video (AV) and audio-video-speech (AVS). There an LLM writes the last two (`LLMFuserConfig`);
the template here joins what the others say, and adds nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

from pydantic import Field

from dataengine.models.answers import Author
from dataengine.models.llm import LLMConfig
from dataengine.models.validate import TextChecks
from dataengine.prompts import Prompt, PromptFile, cut_at_word, load_prompt
from dataengine.stage import Settings


@dataclass(frozen=True, slots=True)
class Captions:
    """What single modalities say about a clip; None where one has nothing to say."""

    video: str | None
    audio: str | None
    transcript: str | None
    """In English where known, else as spoken."""
    language: str | None
    """Of the transcript given: ISO 639-1, else 639-3."""
    clip_id: str = ""
    """Whose they are."""


@dataclass(frozen=True, slots=True)
class FusedCaptions:
    """The captions made of others: speech (S), audio-video (AV), audio-video-speech (AVS)."""

    speech: str | None
    audio_video: str | None
    audio_video_speech: str | None
    authors: Mapping[str, Author] = field(default_factory=dict)
    """Column (``caption_speech`` ...) -> who wrote it, where that is not the fuser itself."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Column -> what was unusual about it, e.g. ``template:refusal``."""


class Fuser(Protocol):
    """Joins the captions of single modalities."""

    model: str
    revision: str
    prompt_hash: str | None

    def fuse(self, captions: Sequence[Captions]) -> list[FusedCaptions]:
        """Returns the fused captions of each clip, in order."""
        ...


TEMPLATE_VARIABLES = {"speech": {"quote"}, "speech_foreign": {"quote", "language"}}
"""Texts of the template's file and their variables."""


class TemplateConfig(Settings):
    """Joins sentences by rule."""

    kind: Literal["template"] = "template"
    template: Annotated[str, PromptFile(TEMPLATE_VARIABLES)] = Field(
        default="prompts/fuse_template.v1.yaml", validate_default=True
    )
    """Prompt file with the sentences that quote speech; its variables are declared in it."""
    max_quote_chars: int = Field(default=160, ge=10)
    """Longest quotation of a transcript; a longer one ends at a word with an ellipsis."""


LLM_VARIABLES = {
    "system": set(),
    "ask_av": {"sources"},
    "ask_avs": {"sources"},
    "ask_av_avs": {"sources"},
    "retry": {"problem"},
}
"""Texts of the language model's prompt file and their variables."""


class LLMFuserConfig(Settings):
    """A language model writes AV and AVS, one request per clip; what it gets wrong, the template does.

    A clip of which one modality alone is known needs no language model, and speech (S) is always
    quoted by the template: it is what was said, and a model could only change it.
    """

    kind: Literal["llm"] = "llm"
    llm: LLMConfig
    """Who is asked."""
    prompt: Annotated[str, PromptFile(LLM_VARIABLES)] = Field(
        default="prompts/fuse_llm.v1.yaml", validate_default=True
    )
    """Prompt file."""
    max_caption_chars: int = Field(default=1200, ge=10)
    """Longest video or audio caption shown; a longer one ends at a word."""
    max_transcript_chars: int = Field(default=1500, ge=10)
    """Longest transcript shown: about 100 s of speech. A longer one ends at a word."""
    max_tokens: int = Field(default=400, ge=16)
    """Longest answer, with its JSON."""
    checks: TextChecks = TextChecks()
    """What a caption must be like."""
    min_shared_words: int = Field(default=1, ge=0)
    """Words of the video and audio captions that a fused one must hold: one that shares none tells of
    something else, such as what a transcript orders it to say. 0 does not look."""
    min_shared_ratio: float = Field(default=0.35, ge=0, le=1)
    """Share of a fused caption's words that must be in the video and audio captions (fewer will do where
    they are 40 % of those captions' words); words of the transcript alone do not count. 0 does not
    look."""
    template: TemplateConfig = Field(default_factory=TemplateConfig)
    """Who quotes speech, and fuses where the language model fails."""


FuserConfig = Annotated[TemplateConfig | LLMFuserConfig, Field(discriminator="kind")]


_LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def sentence(text: str | None) -> str | None:
    """Returns text as one sentence: first letter upper case, a stop at the end; None if empty."""
    line = " ".join((text or "").split()).rstrip(" .,;:")
    if not line:
        return None
    return line[0].upper() + line[1:] + ("" if line[-1] in '!?"' else ".")


def quotation(text: str, max_chars: int) -> str:
    """Returns text as data inside double quotes: one line, inner quotes made single, cut short.

    A text longer than ``max_chars`` ends at a word boundary with ``...`` (in languages written
    without spaces, at the last character that fits).
    """
    line = " ".join(text.replace('"', "'").split())
    return f'"{cut_at_word(line, max_chars)}"'


def language_name(language: str) -> str:
    """Returns the English name of an ISO 639 code, or "another language"."""
    return _LANGUAGES.get(language, "another language")


def speech_caption(
    transcript: str | None, language: str | None, max_chars: int, template: Prompt
) -> str | None:
    """Returns what is said as a caption, or None if nothing is.

    A language other than English is named, as far as this module knows its name.
    """
    if not (transcript or "").strip():
        return None
    quote = quotation(transcript or "", max_chars)
    if language in (None, "en"):
        return template.render("speech", quote=quote)
    return template.render("speech_foreign", quote=quote, language=language_name(language))


def join_sentences(*parts: str | None) -> str | None:
    """Returns the sentences that are there, in order, or None if there are none."""
    return " ".join(part for part in map(sentence, parts) if part) or None


class TemplateFuser:
    """Puts sentences behind each other: what is seen, what is heard, what is said."""

    model = "template"
    revision = "1"

    def __init__(self, config: TemplateConfig) -> None:
        self._max_quote_chars = config.max_quote_chars
        self.template = load_prompt(config.template, TEMPLATE_VARIABLES)
        self.prompt_hash: str | None = self.template.sha256

    def fuse(self, captions: Sequence[Captions]) -> list[FusedCaptions]:
        """Returns the fused captions of each clip, in order."""
        return [self._fuse_one(clip) for clip in captions]

    def _fuse_one(self, clip: Captions) -> FusedCaptions:
        speech = speech_caption(
            clip.transcript, clip.language, self._max_quote_chars, self.template
        )
        return FusedCaptions(
            speech=speech,
            audio_video=join_sentences(clip.video, clip.audio),
            audio_video_speech=join_sentences(clip.video, clip.audio, speech),
        )


def build_fuser(config: TemplateConfig | LLMFuserConfig) -> Fuser:
    """Returns the fuser that a config names.

    Raises:
        DependencyError: If its language model, or what checks its answers, is missing.
    """
    match config:
        case TemplateConfig():
            return TemplateFuser(config)
        case LLMFuserConfig():
            from dataengine.models.fusion_llm import LLMFuser

            return LLMFuser(config)
