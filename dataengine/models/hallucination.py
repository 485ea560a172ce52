# SPDX-License-Identifier: Apache-2.0
"""Guards against what a recogniser writes although nobody says it.

Whisper was trained on subtitles of the web: over music, noise and silence it writes what stands there
at such places (credits, thanks for watching), or says one thing again and again. A guard that trips
leaves a segment out; what is left is the transcript, and the reason is noted with it.
"""

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from dataengine.stage import Settings

NO_SPEECH = "no_speech"
COMPRESSION = "compression"
REPETITION = "repetition"
BOILERPLATE = "boilerplate"
SPEECH_RATE = "speech_rate"

_WIDE_WEIGHT = 3
"""Letters that one character of Chinese, Japanese or Korean counts as: speakers of those say 5 to 8
characters a second where others say 15 to 20 letters."""

_LONGEST_CREDIT = 24
"""Words (characters of Chinese or Japanese) beyond which a text is a story and no credit."""

# Credits of subtitles: nobody says them.
_CREDITS = (
    r"subtitles? (?:are )?(?:made |created |provided )?by\b",
    r"(?:transcribed|transcript(?:ion)?|translated|translation|captions?|captioned|captioning) by\b",
    r"amara\s?\.\s?org",
    r"untertitel(?:ung)? (?:im auftrag des|des|von|der|aufgrund)\b",
    r"sous[- ]titr(?:es|age) .*\b(?:par|société|st)\b",
    r"subtítulos (?:realizados )?por\b",
    r"subt[ií]tulos creados\b",
    r"sottotitoli (?:creati|e revisione|a cura)\b",
    r"legendas? (?:pela|por)\b",
    r"napisy (?:stworzone|wykonan[ey]) przez\b",
    r"ondertiteling? (?:door|ingediend)|ondertiteld door",
    r"субтитры (?:сделал|делал|создавал|подогнал|предоставил)",
    r"редактор субтитров",
    r"altyaz[\u0131i] m\.?\s?k\.?",
    r"字幕由|字幕by|字幕志愿者|字幕製作|字幕制作",
    r"明镜与点点",
)
# What people do say, at the end of a video; whisper writes it where nobody does.
_FAREWELLS = (
    r"(?:thank you|thanks)(?: (?:so much|very much|guys|all))? for (?:watching|listening|viewing)",
    r"(?:please |don't forget to |and )*(?:like,? (?:and|&) )?subscribe(?: to (?:my|our|the) channel)?",
    r"see you (?:in the )?next (?:time|video)",
    r"vielen dank fürs? (?:zuschauen|zusehen|zuhören)",
    r"merci d'avoir regardé(?: cette vidéo)?",
    r"abonnez-vous(?: à la chaîne)?",
    r"gracias por ver(?: el v[ií]deo)?",
    r"suscr[ií]bete(?: al canal)?",
    r"obrigad[oa] por assistir",
    r"inscreva-se no canal",
    r"grazie per (?:la visione|aver guardato)(?: il video)?",
    r"bedankt voor het kijken",
    r"dzięki za (?:oglądanie|obejrzenie)",
    r"спасибо за (?:просмотр|внимание)",
    r"продолжение следует",
    r"подписывайтесь на (?:мой |наш )?канал",
    r"izlediğiniz için teşekkür(?:ler| ederim| ederiz)",
    r"ご視聴ありがとうございました",
    r"チャンネル登録(?:お願いします|をお願いいたします)?",
    r"시청해\s?주셔서 감사합니다",
    r"구독과 좋아요(?: 부탁드립니다)?",
    r"(?:谢谢|感谢|感謝|謝謝)(?:大家)?(?:的)?(?:观看|收看|觀看|收看|收听|收聽)",
    r"请不吝点赞",
)
_CREDIT = re.compile("|".join(_CREDITS))
_FAREWELL = re.compile("|".join(_FAREWELLS))


class GuardsConfig(Settings):
    """Which segments are left out; None switches a guard off."""

    no_speech: float | None = Field(default=0.6, ge=0, le=1)
    """Probability of ``<|nospeech|>`` above which a window is held to be silent, if its words are
    unlikely too; and above which a farewell is not believed (whisper's own threshold)."""
    min_logprob: float = Field(default=-1.0, le=0)
    """Mean log-probability per token below which the words are unlikely (whisper's own)."""
    max_compression: float | None = Field(default=2.4, gt=1)
    """How many times smaller zlib may make a window's text; more is repetition (whisper's own)."""
    max_repeats: int | None = Field(default=4, ge=2)
    """Most times that a phrase, or a whole segment, may follow itself. People say "no, no, no, no";
    single words are therefore counted from twice as many."""
    boilerplate: bool = True
    """Whether credits of subtitles, and farewells in windows that sound silent, are left out."""
    max_chars_per_s: float | None = Field(default=40.0, gt=0)
    """Fastest speech in letters per second, a Chinese, Japanese or Korean character being three.
    Subtitlers' guides allow 17 to 20, a fast speaker reaches 25; twice that nobody does."""
    min_chars_per_s: float | None = Field(default=0.5, ge=0)
    """Slowest: a "you" over ten seconds of music."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """A segment as a recogniser gives it, before anybody believes it.

    Attributes:
        start_ms: Where it begins in its window.
        end_ms: Where it ends.
        text: Of the segment.
        no_speech_prob: Of its window, in [0, 1].
        avg_logprob: Of its window, per token.
        window_text: All text of its window.
    """

    start_ms: int
    end_ms: int
    text: str
    no_speech_prob: float = 0.0
    avg_logprob: float = 0.0
    window_text: str = ""


def judge(utterances: Sequence[Utterance], guards: GuardsConfig) -> list[str | None]:
    """Returns why each utterance of one sound is to be left out, or None where it may stay."""
    looping = repeated([utterance.text for utterance in utterances], guards.max_repeats)
    return [
        _reason(utterance, guards) or (REPETITION if loops else None)
        for utterance, loops in zip(utterances, looping, strict=True)
    ]


def _reason(utterance: Utterance, guards: GuardsConfig) -> str | None:
    sounds_silent = guards.no_speech is not None and utterance.no_speech_prob > guards.no_speech
    if sounds_silent and utterance.avg_logprob < guards.min_logprob:
        return NO_SPEECH
    if guards.boilerplate and (
        is_credit(utterance.text) or (sounds_silent and is_farewell(utterance.text))
    ):
        return BOILERPLATE
    limit = guards.max_compression
    if limit is not None and compression_ratio(utterance.window_text) > limit:
        return COMPRESSION
    if guards.max_repeats is not None and has_loop(utterance.text, guards.max_repeats):
        return REPETITION
    rate = chars_per_s(utterance.text, utterance.end_ms - utterance.start_ms)
    if guards.max_chars_per_s is not None and rate > guards.max_chars_per_s:
        return SPEECH_RATE
    if guards.min_chars_per_s is not None and rate < guards.min_chars_per_s:
        return SPEECH_RATE
    return None


def note(reasons: Sequence[str | None]) -> str | None:
    """Returns ``guard:<reason>,<reason>``, each once and in order of the alphabet; None without any."""
    tripped = sorted({reason for reason in reasons if reason})
    return f"guard:{','.join(tripped)}" if tripped else None


def compression_ratio(text: str) -> float:
    """Returns how many times smaller zlib makes a text; 0 for an empty one."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def letters(text: str) -> int:
    """Returns how many letters and digits a text has; one of Chinese, Japanese or Korean is three."""
    return sum(
        _WIDE_WEIGHT if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
        if char.isalnum() or unicodedata.category(char).startswith("M")
    )


def chars_per_s(text: str, duration_ms: int) -> float:
    """Returns `letters` per second; infinity for what takes no time."""
    return letters(text) / (duration_ms / 1000) if duration_ms > 0 else float("inf")


def units(text: str) -> list[str]:
    """Returns a text's words without punctuation; characters where a script writes no spaces."""
    words = re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.casefold())
    split = []
    for word in words:
        wide = sum(unicodedata.east_asian_width(char) in "WF" for char in word)
        split += list(word) if wide > len(word) / 2 else [word]
    return split


def has_loop(text: str, max_repeats: int, max_words: int = 12) -> bool:
    """Returns whether a phrase follows itself too often.

    Args:
        text: Of a segment.
        max_repeats: Most times in a row for a phrase of two words or more; a single word may twice
            as often.
        max_words: Longest phrase looked for.
    """
    words = units(text)
    for length in range(1, max_words + 1):
        allowed = max_repeats * 2 if length == 1 else max_repeats
        in_a_row = 0  # words equal to the one a phrase earlier
        for first, second in zip(words, words[length:], strict=False):
            in_a_row = in_a_row + 1 if first == second else 0
            if in_a_row >= allowed * length:
                return True
    return False


def repeated(texts: Sequence[str], max_repeats: int | None) -> list[bool]:
    """Returns which texts are part of a loop: more than ``max_repeats`` equal ones in a row.

    The first of a loop may be real and stays.
    """
    plain = [" ".join(units(text)) for text in texts]
    loops = [False] * len(plain)
    if max_repeats is None:
        return loops
    start = 0
    for index in range(1, len(plain) + 1):
        if index == len(plain) or plain[index] != plain[start]:
            if index - start > max_repeats and plain[start]:
                loops[start + 1 : index] = [True] * (index - start - 1)
            start = index
    return loops


def is_credit(text: str) -> bool:
    """Returns whether a segment is short and begins as credits of subtitles do."""
    plain = _plain(text)
    short = len(units(plain)) <= _LONGEST_CREDIT
    return short and (_CREDIT.match(plain) is not None or "amara.org" in plain)


def is_farewell(text: str) -> bool:
    """Returns whether a segment is mostly what a video says at its end."""
    plain = _plain(text)
    covered = sum(len(match.group()) for match in _FAREWELL.finditer(plain))
    return covered > 0 and covered >= len(plain) / 2


def _plain(text: str) -> str:
    # U+0307 is what case folding leaves of the Turkish capital I with a dot.
    folded = text.casefold().replace("\u0307", "").replace("\u2019", "'")
    return " ".join(folded.split()).strip(" .,!?…。\uff01\uff1f♪-\"'")
