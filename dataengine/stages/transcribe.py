# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + transcript: from the source's own subtitles, else from its sound.

A subtitle cue belongs to the clip that holds the cue's middle, so to the one that holds most of
it, and never to two; its times are trimmed to the clip. Where a source has subtitles in several
languages, the original is the one that the source says is spoken, else the one that the site's
recogniser heard, else the first one that is not English (subtitles in other people's languages
are mostly translations from or into English, and a video with one foreign and one English track
was, by this rule, spoken in the foreign one); with English alone, English is. What people wrote
goes before what was recognised.

Recognition runs only where enough of the clip sounds like speech: a recogniser that is given
music or noise writes words all the same. What it writes is weighed by guards
(`dataengine.models.hallucination`); what they leave out is named in the provenance,
``guard:<reason>,...``.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataengine.models.answers import Failure
from dataengine.models.asr import (
    PocketsphinxConfig,
    Segment,
    TranscriberConfig,
    build_transcriber,
)
from dataengine.models.voice import (
    RATE,
    SPEECH_SEEN,
    build_voice_detector,
    power_spectra,
    speech_windows,
)
from dataengine.records import SEGMENT_STRUCT
from dataengine.stage import Kept, Outcome, Row, Stage, provenance
from dataengine.stages.caption_audio import clip_waveform

logger = logging.getLogger(__name__)

_LONG_CODES = {
    "eng": "en", "deu": "de", "ger": "de", "fra": "fr", "fre": "fr", "spa": "es", "ita": "it",
    "por": "pt", "rus": "ru", "zho": "zh", "chi": "zh", "jpn": "ja", "kor": "ko", "ara": "ar",
    "hin": "hi", "nld": "nl", "dut": "nl", "pol": "pl", "tur": "tr", "ukr": "uk", "vie": "vi",
}  # fmt: skip
_NOT_SPOKEN = re.compile(r"<[^<>]*>|\{[^{}]*\}|\[[^\]]*\]|\([^)]*\)|[♩-♯]")
_UNKNOWN = "und"
_MINUTE = 60 * RATE
SUBTITLES = "subtitles"
"""Model name, in the provenance, of a text cut from the source's own subtitles."""
ORIGINS = ("sidecar", "manual", "automatic")
"""Where subtitles come from, the most trusted first; see `records.SUBTITLE_STRUCT`."""


def base_language(tag: str | None) -> str:
    """Returns a subtitle track's language as ISO 639-1 where there is one, ``und`` if unknown.

    ``en-US``, ``EN`` and ``eng`` are all ``en``.
    """
    code = re.split(r"[-_.]", (tag or "").strip().lower())[0]
    return _LONG_CODES.get(code, code) or _UNKNOWN


def original_language(
    languages: Sequence[str], spoken: str | None = None, heard: Sequence[str] = ()
) -> str | None:
    """Returns which of the subtitle languages (in listed order) is the one that is spoken.

    Args:
        languages: ISO 639-1 codes.
        spoken: What the source itself says; None if it does not.
        heard: Languages of automatic subtitles.
    """
    for language in (spoken, *heard):
        if language in languages:
            return language
    foreign = [language for language in languages if language != "en"]
    return next(iter(foreign or languages), None)


def spoken_text(text: str) -> str:
    """Returns a cue without mark-up, sound descriptions (``[music]``, ``(laughs)``) and line breaks."""
    return " ".join(_NOT_SPOKEN.sub(" ", text).split())


def cut_cues(
    cues: Sequence[Row] | None,
    language: str,
    start_ms: int,
    end_ms: int,
    origin: str | None = None,
) -> list[Segment]:
    """Returns a language's cues whose middle lies in [start_ms, end_ms), trimmed to it, in order.

    Only those of one origin are taken, if one is named.

    Times stay on the source's clock. Cues without spoken text, or without length, are left out.
    """
    segments = []
    for cue in cues or ():
        if base_language(cue["language"]) != language or cue["end_ms"] <= cue["start_ms"]:
            continue
        if origin is not None and cue_origin(cue) != origin:
            continue
        text = spoken_text(cue["text"] or "")
        if text and start_ms <= (cue["start_ms"] + cue["end_ms"]) // 2 < end_ms:
            first, last = max(cue["start_ms"], start_ms), min(cue["end_ms"], end_ms)
            segments.append(Segment(first, last, text))
    return sorted(segments, key=lambda segment: (segment.start_ms, segment.end_ms))


def subtitle_languages(cues: Sequence[Row] | None) -> list[str]:
    """Returns the languages of a source's cues in the order in which they first appear."""
    return list(dict.fromkeys(base_language(cue["language"]) for cue in cues or ()))


def cue_origin(cue: Row) -> str:
    """Returns where a cue comes from: ``sidecar``, ``manual`` or ``automatic``."""
    return cue.get("origin") or ORIGINS[0]


def best_origin(cues: Sequence[Row] | None, language: str) -> str:
    """Returns which of a language's tracks to believe: people before recognisers."""
    found = {cue_origin(cue) for cue in cues or () if base_language(cue["language"]) == language}
    return next((origin for origin in ORIGINS if origin in found), ORIGINS[0])


def sounds_like_speech(waveform: np.ndarray, min_ratio: float) -> bool:
    """Returns whether enough of what is heard sounds like speech (`speech_windows`).

    Args:
        waveform: float32 mono in [-1, 1] at 16 kHz.
        min_ratio: Least share, in [0, 1], of the audible one-second windows.

    Raises:
        DependencyError: If the voice detector is not installed.
    """
    # A new detector for every clip: it adapts to what it hears, and a clip must not depend on others.
    detect = build_voice_detector()
    num_speech = num_heard = 0
    for start in range(0, len(waveform), _MINUTE):  # bounds the memory that spectra take
        part = waveform[start : start + _MINUTE]
        voice = detect((np.clip(part, -1, 1) * 32767).astype(np.int16))
        speech, heard = speech_windows(power_spectra(part), voice)
        num_speech += int(speech.sum())
        num_heard += int(heard.sum())
    return num_speech >= min_ratio * max(1, num_heard)


def join_segments(segments: Sequence[Segment]) -> str | None:
    """Returns the text of segments in one line, or None if there is none."""
    return " ".join(segment.text for segment in segments) or None


def on_source_clock(segments: Sequence[Segment], start_ms: int, end_ms: int) -> list[Segment]:
    """Returns segments of a clip moved to the source's clock and trimmed to the clip."""
    return [
        Segment(
            min(segment.start_ms + start_ms, end_ms),
            min(segment.end_ms + start_ms, end_ms),
            segment.text,
        )
        for segment in segments
    ]


class TranscribeStage(Stage):
    """Writes ``transcript`` and ``transcript_segments``; null where nothing is said."""

    name = "transcribe"
    inputs = (
        "clip_id", "video", "has_audio", "start_ms", "end_ms", "_subtitles", "_video", "provenance",
    )  # fmt: skip
    outputs = pa.schema(
        [("transcript", pa.string()), ("transcript_segments", pa.list_(SEGMENT_STRUCT))]
    )

    class Config(Stage.Config):
        """Settings of transcription."""

        prefer: Literal["subtitles", "asr"] = "subtitles"
        """What is tried first. A source with subtitles is then taken at their word: a clip in
        which they say nothing has no transcript. With ``asr``, they serve where it hears nothing.
        """
        model: TranscriberConfig | None = PocketsphinxConfig()
        """Who writes down speech; None takes subtitles alone."""
        min_speech_ratio: float = Field(default=SPEECH_SEEN, ge=0, le=1)
        """Least share of what is heard that must sound like speech for recognition to run; 0 runs
        always."""

    config: Config

    def setup(self) -> None:
        """Loads the recogniser."""
        self._transcriber = None
        if self.config.model is not None:
            self._transcriber = build_transcriber(self.config.model)
            build_voice_detector()  # a missing package shows now and not at the first clip

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns one Kept per row; all sounds of the batch are heard together."""
        languages = [_subtitle_language(row) for row in batch]
        prefers_subtitles = self.config.prefer == "subtitles"
        candidates = [
            index
            for index, (row, language) in enumerate(zip(batch, languages, strict=True))
            if not (prefers_subtitles and (language or _has_subtitle_transcript(row)))
        ]
        # Decoding and the spectra leave Python's lock to others; a recogniser on a GPU would wait.
        with ThreadPoolExecutor(max(1, round(self.config.resources.num_cpus))) as threads:
            sounds = threads.map(self._audible, [batch[index] for index in candidates])
            open_rows = {
                index: waveform
                for index, waveform in zip(candidates, sounds, strict=True)
                if waveform is not None
            }
        heard = self._listen(open_rows, batch)
        outcomes: list[Outcome] = []
        for index, (row, language) in enumerate(zip(batch, languages, strict=True)):
            if prefers_subtitles and language is None and _has_subtitle_transcript(row):
                # A corpus that is annotated again has no cues any more; what was cut from them stays.
                outcomes.append(Kept(({},)))
                continue
            segments, author, note = heard.get(index, ([], None, None))
            if language and not segments:
                segments, author = self._from_subtitles(row, language)
                note = None
            outcomes.append(Kept((_columns(segments, author, note),)))
        return outcomes

    def _audible(self, row: Row) -> np.ndarray | None:
        """Returns a clip's sound if it is worth the recogniser's time."""
        waveform = clip_waveform(row) if self._transcriber else None
        least = self.config.min_speech_ratio
        if waveform is None or least <= 0 or sounds_like_speech(waveform, least):
            return waveform
        return None

    def _listen(
        self, sounds: Mapping[int, np.ndarray], rows: Sequence[Row]
    ) -> dict[int, tuple[list[Segment], tuple[str, str], str | None]]:
        """Returns segments on the source's clock, their author and a note, for each sound."""
        if self._transcriber is None or not sounds:
            return {}
        author = self._transcriber.model, self._transcriber.revision
        heard: dict[int, tuple[list[Segment], tuple[str, str], str | None]] = {}
        answers = self._transcriber.transcribe(list(sounds.values()))
        for index, answer in zip(sounds, answers, strict=True):
            if isinstance(answer, Failure):
                logger.warning("No transcript of %s: %s", rows[index].get("clip_id"), answer)
                heard[index] = [], author, answer.note
            else:
                start_ms, end_ms = rows[index]["start_ms"], rows[index]["end_ms"]
                segments = on_source_clock(answer.segments, start_ms, end_ms)
                heard[index] = segments, author, answer.note
        return heard

    def _from_subtitles(self, row: Row, language: str) -> tuple[list[Segment], tuple[str, str]]:
        origin = best_origin(row["_subtitles"], language)
        cues = cut_cues(row["_subtitles"], language, row["start_ms"], row["end_ms"], origin)
        return cues, (f"{SUBTITLES}/{origin}", language)


def _subtitle_language(row: Row) -> str | None:
    """Returns the language of a row's subtitles that is the spoken one; None without subtitles."""
    cues = row.get("_subtitles")
    said = (row.get("_video") or {}).get("language")
    return original_language(
        subtitle_languages(cues),
        base_language(said) if said else None,
        subtitle_languages([cue for cue in cues or () if cue_origin(cue) == "automatic"]),
    )


def _has_subtitle_transcript(row: Row) -> bool:
    """Returns whether a row's transcript was cut from subtitles before."""
    return any(
        entry["column"] == "transcript" and entry["model"].startswith(f"{SUBTITLES}/")
        for entry in row.get("provenance") or ()
    )


def _columns(segments: Sequence[Segment], author: tuple[str, str] | None, note: str | None) -> Row:
    names = TranscribeStage.outputs.names
    return {
        "transcript": join_segments(segments),
        "transcript_segments": [
            {"start_ms": s.start_ms, "end_ms": s.end_ms, "text": s.text} for s in segments
        ]
        or None,
        "provenance": [provenance(name, *author, note=note) for name in names if author],
    }
