# SPDX-License-Identifier: Apache-2.0
"""Sound -> windows of at most 30 s that hold its speech, and times in them -> times in the sound.

Whisper reads 30 s at a time and pays for all of them, however little is said. So the spoken parts of a
sound are laid end to end, with their long silences left out, until a window is full; a window
never mixes two sounds. Silence is what whisper writes inventions about, so leaving it out
helps twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from dataengine.stage import Settings

WINDOW_MS = 30_000
"""Longest window: what whisper reads at a time."""
FRAME_MS = 30
"""Length of what the voice detector judges at a time (`dataengine.models.voice`)."""
SAMPLES_PER_MS = 16
_LEAST_VOICE_MS = 90
"""Less voice than this, alone between two long silences, is a click and no word."""
_QUIET_MS = 90
"""Stretch over which loudness is averaged where a long part is cut: about the stop inside a word."""


class PiecesConfig(Settings):
    """Which part of a sound is listened to."""

    pad_ms: int = Field(default=300, ge=0, le=2000)
    """Kept before and after what the voice detector hears: it wakes up late and misses soft endings."""
    max_gap_ms: int = Field(default=2000, ge=0)
    """A longer silence between two parts is left out (faster-whisper's default)."""


@dataclass(frozen=True, slots=True)
class Window:
    """Parts of one sound, end to end.

    Attributes:
        clip: Index of the sound.
        parts: Half-open spans in ms on the sound's clock, in order, at least one.
    """

    clip: int
    parts: tuple[tuple[int, int], ...]

    @property
    def duration_ms(self) -> int:
        """Length of all parts together."""
        return sum(end - start for start, end in self.parts)

    def cut(self, waveform: np.ndarray) -> np.ndarray:
        """Returns the window's own sound: float32 [samples] at 16 kHz."""
        parts = [
            waveform[start * SAMPLES_PER_MS : end * SAMPLES_PER_MS] for start, end in self.parts
        ]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def to_clip(self, window_ms: int, *, is_end: bool = False) -> int:
        """Returns where a moment of the window lies in the sound, in ms.

        A moment on the seam of two parts is the begin of the later one, or, if something ends there,
        the end of the earlier one. What lies outside the window is moved to its edge.
        """
        left = max(0, window_ms)
        for start, end in self.parts:
            length = end - start
            if left < length or (is_end and left == length):
                return start + left
            left -= length
        return self.parts[-1][1]

    def rest(self, from_ms: int) -> "Window":
        """Returns what comes after a moment that lies inside the window."""
        parts, left = [], from_ms
        for start, end in self.parts:
            if left < end - start:
                parts.append((start + max(0, left), end))
            left -= end - start
        return Window(self.clip, tuple(parts))


def voiced_spans(
    voice: np.ndarray, duration_ms: int, *, pad_ms: int, max_gap_ms: int
) -> list[tuple[int, int]]:
    """Returns the spans, in ms and in order, that hold speech, with their surroundings.

    Args:
        voice: bool, one per 30 ms.
        duration_ms: Length of the sound.
        pad_ms: Added on both sides.
        max_gap_ms: Longest silence that stays inside a span.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], voice.astype(np.int8), [0]])))
    spans: list[list[int]] = []  # start, end, voice inside; in ms
    for start, end in (edges.reshape(-1, 2) * FRAME_MS).tolist():
        if spans and start - spans[-1][1] <= max(max_gap_ms, 2 * pad_ms):
            spans[-1][1:] = [end, spans[-1][2] + end - start]
        else:
            spans.append([start, end, end - start])
    padded = [
        (max(0, start - pad_ms), min(duration_ms, end + pad_ms))
        for start, end, heard in spans
        if heard >= _LEAST_VOICE_MS
    ]
    return [(start, end) for start, end in padded if start < end]


def split_long(
    span: tuple[int, int], waveform: np.ndarray, max_ms: int = WINDOW_MS
) -> list[tuple[int, int]]:
    """Returns a span cut into parts of at most ``max_ms``, each cut at the quietest moment.

    The moment is looked for in the second half of what fits, so that parts are never short.
    """
    start, end = span
    parts = []
    while end - start > max_ms:
        first, last = start + max_ms // 2, start + max_ms
        frames = waveform[first * SAMPLES_PER_MS : last * SAMPLES_PER_MS]
        frames = frames[: len(frames) // (10 * SAMPLES_PER_MS) * (10 * SAMPLES_PER_MS)]
        power = np.square(frames.astype(np.float32)).reshape(-1, 10 * SAMPLES_PER_MS).mean(axis=1)
        width = _QUIET_MS // 10
        level = np.convolve(power, np.ones(width), "valid")
        cut = first + (int(np.argmin(level)) + width // 2) * 10
        parts.append((start, cut))
        start = cut
    return [*parts, (start, end)]


def pack(clip: int, spans: Sequence[tuple[int, int]], max_ms: int = WINDOW_MS) -> list[Window]:
    """Returns windows of at most ``max_ms`` that hold the spans in order; none is cut.

    Raises:
        ValueError: If a span alone is too long.
    """
    groups: list[list[tuple[int, int]]] = []
    room = 0
    for start, end in spans:
        length = end - start
        if length > max_ms:
            raise ValueError(f"span of {length} ms is longer than {max_ms} ms")
        if length > room:
            groups.append([])
            room = max_ms
        groups[-1].append((start, end))
        room -= length
    return [Window(clip, tuple(group)) for group in groups]


def speech_windows_of(clip: int, waveform: np.ndarray, config: PiecesConfig | None) -> list[Window]:
    """Returns the windows of one sound, none where no voice is heard.

    Args:
        clip: Index of the sound.
        waveform: float32 mono in [-1, 1] at 16 kHz.
        config: None takes everything, voice or not.

    Raises:
        DependencyError: If the voice detector is not installed.
    """
    duration_ms = len(waveform) // SAMPLES_PER_MS
    if config is None:
        spans = [(0, duration_ms)] if duration_ms else []
    else:
        # A new one for every sound: it adapts to what it hears, and a clip's text must not depend
        # on the clips before it.
        from dataengine.models.voice import build_voice_detector

        detect = build_voice_detector()
        voice = detect((np.clip(waveform, -1, 1) * 32767).astype(np.int16))
        spans = voiced_spans(voice, duration_ms, pad_ms=config.pad_ms, max_gap_ms=config.max_gap_ms)
    parts = [part for span in spans for part in split_long(span, waveform)]
    return pack(clip, parts)
