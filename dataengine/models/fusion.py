# SPDX-License-Identifier: Apache-2.0
"""Captions of one clip -> captions of several modalities at once.

InternVideo2 (App. B.2) trains on five captions of a clip: video (V), audio (A), speech (S),
audio-video (AV) and audio-video-speech (AVS). There an LLM writes the last two; the template
here joins what the others say, and adds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field

from dataengine.models.answers import Author
from dataengine.prompts import Prompt, load_prompt
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
    author: Author | None = None
    """Who wrote them, where that is not the fuser itself, e.g. the template it fell back to."""
    note: str | None = None
    """What was unusual, e.g. ``template:bad_output``."""


class Fuser(Protocol):
    """Joins the captions of single modalities."""

    model: str
    revision: str
    prompt_hash: str | None

    def fuse(self, captions: Sequence[Captions]) -> list[FusedCaptions]:
        """Returns the fused captions of each clip, in order."""
        ...


class TemplateConfig(Settings):
    """Joins sentences by rule."""

    kind: Literal["template"] = "template"
    template: str = "prompts/fuse_template.v1.yaml"
    """Prompt file with the sentences that quote speech; its variables are declared in it."""
    max_quote_chars: int = Field(default=160, ge=10)
    """Longest quotation of a transcript; a longer one ends at a word with an ellipsis."""


FuserConfig = TemplateConfig
"""The families of fusion; a second kind makes this a union on ``kind``."""


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
    if len(line) > max_chars:
        head = line[: max_chars + 1]
        head = head.rsplit(" ", 1)[0] if " " in head else head[:max_chars]
        line = head[:max_chars].rstrip(" .,;:") + "..."
    return f'"{line}"'


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
    name = _LANGUAGES.get(language, "another language")
    return template.render("speech_foreign", quote=quote, language=name)


def join_sentences(*parts: str | None) -> str | None:
    """Returns the sentences that are there, in order, or None if there are none."""
    return " ".join(part for part in map(sentence, parts) if part) or None


class TemplateFuser:
    """Puts sentences behind each other: what is seen, what is heard, what is said."""

    model = "template"
    revision = "1"

    def __init__(self, config: TemplateConfig) -> None:
        self._max_quote_chars = config.max_quote_chars
        self.template = load_prompt(
            config.template,
            {"speech": {"quote"}, "speech_foreign": {"quote", "language"}},
        )
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


def build_fuser(config: FuserConfig) -> Fuser:
    """Returns the fuser that a config names."""
    builders = {"template": TemplateFuser}
    return builders[config.kind](config)
