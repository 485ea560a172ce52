# SPDX-License-Identifier: Apache-2.0
"""Plans what is heard and what the subtitles say."""

import math
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from dataengine.demo.decks import NUM_TRANSLATED, Decks, Role, languages
from dataengine.demo.scene import LOUDNESS_DBFS, Cue, Sound
from dataengine.demo.sound import VOICES

_KINDS = ("tone", "melody", "noise", "rhythm", "silence", "melody", "chord", "rhythm", "noise")
_SPEECH_MIN_MS = 3300
"""Shortest shot that is given a sentence; the longest one takes 2.8 s (measured)."""
_PITCHES_HZ = (110, 147, 196, 262, 349, 440, 587, 880, 1175, 1760)
_SCALE = (1.0, 9 / 8, 5 / 4, 3 / 2, 5 / 3, 2.0)  # major pentatonic: no wrong notes
_CHORDS = {"major": (1.0, 5 / 4, 3 / 2), "minor": (1.0, 6 / 5, 3 / 2)}


@cache
def sentences() -> dict[str, Any]:
    """Returns ``sentences.yaml``: spoken, meanings, subtitles by language."""
    text = files("dataengine.demo").joinpath("sentences.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def plan_sounds(
    decks: Decks,
    number: int,
    spans_ms: list[tuple[int, int]],
    speaks: bool,
    rng: np.random.Generator,
) -> tuple[Sound, ...]:
    """Returns sounds that fill the video without gaps and change only where shots do.

    Args:
        decks: Deal the kinds.
        number: Of the first shot in the whole corpus.
        spans_ms: The shots.
        speaks: Whether to speak in about half of the shots, the longest ones.
        rng: The video's generator; advanced.
    """
    lengths = [end - start for start, end in spans_ms]
    longest = sorted(range(len(spans_ms)), key=lambda i: -lengths[i])[: math.ceil(len(lengths) / 2)]
    speaking = {i for i in longest if speaks and lengths[i] >= _SPEECH_MIN_MS}
    texts = rng.permutation(len(sentences()["spoken"]))
    voice = VOICES[int(rng.integers(len(VOICES)))]
    sounds: list[Sound] = []
    for i, (start_ms, end_ms) in enumerate(spans_ms):
        sound = _plan_sound(decks.draw("sound", _KINDS, number + i), start_ms, end_ms, rng)
        if i in speaking:
            text = sentences()["spoken"][int(texts[i])]
            loudness = ("medium", "loud")[int(rng.integers(2))]
            sound = Sound("speech", start_ms, end_ms, loudness, {}, 0, text, voice, sound)
        elif sounds and sounds[-1].kind not in ("speech", "silence") and rng.random() < 0.35:
            last = sounds.pop()  # the sound goes on over the cut, as music does
            sound = Sound(last.kind, last.start_ms, end_ms, last.loudness, last.values, last.seed)
        sounds.append(sound)
    return tuple(sounds)


def _plan_sound(kind: str, start_ms: int, end_ms: int, rng: np.random.Generator) -> Sound:
    """Returns a sound that needs no synthesiser."""
    loudness = list(LOUDNESS_DBFS)[int(rng.integers(len(LOUDNESS_DBFS)))]
    root = float(rng.choice(_PITCHES_HZ))
    bpm = float(rng.choice([72, 90, 108, 120, 138, 160]))
    values: dict[str, float | str | list[float]] = {}
    if kind == "tone":
        values = {"pitch_hz": root}
    elif kind == "chord":
        quality = ("major", "minor")[int(rng.integers(2))]
        root = min(root, 440.0)
        values = {
            "chord": quality,
            "pitches_hz": [round(root * step, 1) for step in _CHORDS[quality]],
        }
    elif kind == "melody":
        root = float(rng.choice([196, 220, 262, 294]))
        steps = rng.integers(0, len(_SCALE), 8)
        values = {"bpm": bpm * 2, "pitches_hz": [round(root * _SCALE[i], 1) for i in steps]}
    elif kind == "noise":
        values = {"noise": str(rng.choice(["white", "pink", "brown"]))}
    elif kind == "rhythm":
        values = {"drum": str(rng.choice(["clicks", "drums"])), "bpm": bpm}
    return Sound(kind, start_ms, end_ms, loudness, values, int(rng.integers(2**31)))


def plan_subtitles(
    seed: int,
    cycle: int,
    role: Role,
    spans_ms: list[tuple[int, int]],
    sounds: tuple[Sound, ...],
    rng: np.random.Generator,
) -> dict[str, tuple[Cue, ...]]:
    """Returns language -> cues, each inside one shot; no languages for most roles.

    A translated video carries its language and, two times in three, English as well.
    """
    if role.english:
        spoken = [sound for sound in sounds if sound.kind == "speech"]
        return {"en": tuple(_cue(s.start_ms, s.end_ms, s.text) for s in spoken)}
    if role.translated is None:
        return {}
    texts = sentences()
    turn = cycle * NUM_TRANSLATED + role.translated
    order = languages(seed, tuple(texts["subtitles"]))
    language = order[turn % len(order)]
    spans: list[tuple[int, int]] = []
    for start, end in spans_ms:
        middle = (start + end) // 2
        spans += [(start, middle), (middle, end)] if end - start > 4200 else [(start, end)]
    chosen = rng.permutation(len(texts["meanings"]))[: len(spans)].tolist()
    both = {language: texts["subtitles"][language]}
    if turn % 3 != 2:
        both["en"] = texts["meanings"]
    return {
        name: tuple(_cue(*span, lines[i]) for span, i in zip(spans, chosen, strict=False))
        for name, lines in both.items()
    }


def _cue(start_ms: int, end_ms: int, text: str) -> Cue:
    """Returns a cue that leaves a little of its span on either side."""
    return Cue(start_ms + 120, end_ms - 160, text)
