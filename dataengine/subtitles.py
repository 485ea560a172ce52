# SPDX-License-Identifier: Apache-2.0
"""Subtitle files -> cues: SRT and WebVTT, sidecars beside a video, rolling captions made plain."""

import html
import logging
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
_SUFFIXES = (".srt", ".vtt")
_TAG = re.compile(r"<[^<>]*>")
_TIME = re.compile(r"(?:(\d+):)?(\d{2}):(\d{2})\.(\d{3})")
_ROLLING_GAP_MS = 100
_ROLLING_SHARE = 0.5


def subtitle_language(video_stem: str, subtitle_name: str) -> str | None:
    """Returns the language of a sidecar ``<stem>.<language>.srt``, or None if it is not one.

    ``<stem>.srt`` without a language gives ``und`` (ISO 639-2: undetermined).
    """
    base, suffix = os.path.splitext(subtitle_name)
    if suffix.lower() not in _SUFFIXES or not base.startswith(video_stem):
        return None
    rest = base[len(video_stem) :]
    if rest == "":
        return "und"
    language = rest.removeprefix(".")
    return language if rest[0] == "." and _LANGUAGE.fullmatch(language) else None


def parse_subtitles(text: str, language: str, origin: str = "sidecar") -> list[dict[str, Any]]:
    """Returns the cues of an SRT or WebVTT text as SUBTITLE_STRUCT dicts, mark-up removed.

    Args:
        text: The whole file.
        language: Of its cues, a BCP 47 tag.
        origin: ``sidecar``, ``manual`` or ``automatic``.

    Raises:
        ValueError: If the text is in neither format.
    """
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n")
    cues = _parse_vtt(plain) if plain.startswith("WEBVTT") else _parse_srt(plain)
    return [
        {
            "language": language,
            "start_ms": start,
            "end_ms": end,
            "text": " ".join(lines),
            "origin": origin,
        }
        for start, end, lines in unroll(cues)
        if lines and end > start
    ]


def _parse_vtt(text: str) -> list[tuple[int, int, list[str]]]:
    """Returns the cues of a WebVTT text (W3C, section 4.1).

    Word times inside a cue (``<00:00:01.000>``) and names before one must not be taken for times
    and texts of cues, which is why this is not left to a library for SRT.
    """
    cues = []
    for block in re.split(r"\n\n+", text):  # a line of spaces does not end a cue
        lines = block.split("\n")
        at = next((i for i, line in enumerate(lines[:2]) if "-->" in line), None)
        times = [] if at is None else _TIME.findall(lines[at])
        if at is not None and len(times) == 2:
            start, end = (
                ((int(h or 0) * 60 + int(m)) * 60 + int(s)) * 1000 + int(ms)
                for h, m, s, ms in times
            )
            cues.append((start, end, _plain_lines(lines[at + 1 :])))
    return cues


def _parse_srt(text: str) -> list[tuple[int, int, list[str]]]:
    from pysubs2 import SSAFile
    from pysubs2.exceptions import Pysubs2Error

    try:
        parsed = SSAFile.from_string(text)
    except Pysubs2Error as error:
        raise ValueError(str(error)) from None
    return [(cue.start, cue.end, _plain_lines(cue.plaintext.splitlines())) for cue in parsed]


def _plain_lines(lines: Sequence[str]) -> list[str]:
    """Returns lines without mark-up, entities and spare spaces; empty ones are left out."""
    plain = (" ".join(html.unescape(_TAG.sub("", line)).split()) for line in lines)
    return [line for line in plain if line]


def unroll(cues: Sequence[tuple[int, int, list[str]]]) -> list[tuple[int, int, list[str]]]:
    """Removes from rolling captions the lines that a cue repeats from the cue before.

    Recognisers' captions roll: a cue shows the line before once more above its own, with a cue of
    a few milliseconds in between, so every line would be read two or three times. A text in which
    fewer than half of the cues begin with what the cue before ended with does not roll, and is
    returned as it is: there, a repeated line was said twice.

    Args:
        cues: (start in ms, end in ms, lines), in order.
    """
    shared = [0]
    for (_, end, before), (start, _, lines) in pairwise(cues):
        shared.append(_overlap(before, lines) if start - end <= _ROLLING_GAP_MS else 0)
    if sum(count > 0 for count in shared) < max(2, _ROLLING_SHARE * len(cues)):
        return list(cues)
    return [
        (start, end, lines[count:]) for (start, end, lines), count in zip(cues, shared, strict=True)
    ]


def _overlap(before: list[str], lines: list[str]) -> int:
    """Returns the most lines that end one cue and begin the next."""
    most = min(len(before), len(lines))
    return next((n for n in range(most, 0, -1) if before[-n:] == lines[:n]), 0)


def sidecars(path: str) -> list[dict[str, Any]] | None:
    """Returns the cues of all subtitle files that lie beside a video, by language; None if none.

    A subtitle file that cannot be read is passed over: the video is worth more than its subtitles.
    """
    video = Path(path)
    cues: list[dict[str, Any]] = []
    found = sorted(
        (language, entry)
        for entry in _subtitle_files(str(video.parent), os.stat(video.parent).st_mtime_ns)
        if (language := subtitle_language(video.stem, entry)) is not None
    )
    for language, name in found:
        try:
            text = (video.parent / name).read_text(encoding="utf-8-sig")
            cues += parse_subtitles(text, language)
        except (OSError, ValueError) as error:
            logging.getLogger(__name__).warning("Subtitles %s passed over: %s", name, error)
    return cues or None


@lru_cache(maxsize=16)
def _subtitle_files(folder: str, mtime_ns: int) -> tuple[str, ...]:
    """Returns the subtitle files of a folder; listed once, not once for each of its videos."""
    return tuple(name for name in os.listdir(folder) if name.lower().endswith(_SUFFIXES))
