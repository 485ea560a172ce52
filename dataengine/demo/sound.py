# SPDX-License-Identifier: Apache-2.0
"""Sounds as pure functions of a `Sound`, and speech from the flite voices of a system ffmpeg."""

import shutil
import subprocess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.demo.scene import LOUDNESS_DBFS, Sound

Wave = NDArray[Any]
"""Mono float32 samples in [-1, 1]."""

VOICES = ("slt", "rms", "awb")
"""flite's voices that an offline recogniser understands."""
SPEECH_DELAY_MS = 200
"""Silence before the first word of a spoken span."""
_EDGE_S = 0.008
_PEAK = 0.95


def find_synthesiser() -> str | None:
    """Returns the path of an ffmpeg that can speak (has the flite filter), if there is one."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        return None
    command = [ffmpeg, "-hide_banner", "-nostdin", "-filters"]
    filters = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    ).stdout
    return ffmpeg if " flite " in filters else None


def speak(ffmpeg: str, text: str, voice: str, sample_rate: int) -> Wave:
    """Returns a sentence read aloud, from its first to its last audible sample.

    Raises:
        subprocess.CalledProcessError: If ffmpeg fails.
    """
    source = f"flite=text='{text}':voice={voice}"
    command = [ffmpeg, "-nostdin", "-v", "error", "-f", "lavfi", "-i", source]
    command += ["-ar", str(sample_rate), "-ac", "1", "-f", "f32le", "-"]
    spoken = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    wave = np.frombuffer(spoken.stdout, "<f4")
    audible = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[audible[0] : audible[-1] + 1] if len(audible) else wave


def render_sound(sound: Sound, sample_rate: int, spoken: Wave | None = None) -> Wave:
    """Returns the samples of a span, at the loudness it asks for.

    Args:
        sound: The span; "speech" needs ``spoken``.
        sample_rate: In hertz.
        spoken: What `speak` returned; cut where the span ends.
    """
    num_samples = (sound.end_ms - sound.start_ms) * sample_rate // 1000
    seconds = np.arange(num_samples, dtype=np.float32) / sample_rate
    rng = np.random.default_rng(sound.seed)
    values = sound.values
    if sound.kind == "silence":
        return np.zeros(num_samples, np.float32)
    if sound.kind == "speech":
        if spoken is None:
            raise ValueError("a speech sound needs its spoken samples")
        wave = np.zeros(num_samples, np.float32)
        offset = SPEECH_DELAY_MS * sample_rate // 1000
        levelled = level(spoken, LOUDNESS_DBFS[sound.loudness])[: num_samples - offset]
        wave[offset : offset + len(levelled)] = levelled
        return wave
    if sound.kind == "tone":
        wave = _sine(_number(values["pitch_hz"]), seconds)
    elif sound.kind == "chord":
        pitches = values["pitches_hz"]
        wave = np.sum([_voice(pitch, seconds) for pitch in _numbers(pitches)], axis=0)
        wave = wave * (1 + 0.2 * _sine(5.0, seconds))  # a tremolo, as strings have
    elif sound.kind == "melody":
        notes = _numbers(values["pitches_hz"])
        wave = _melody(notes, _number(values["bpm"]), num_samples, sample_rate)
    elif sound.kind == "noise":
        wave = _noise(str(values["noise"]), num_samples, sample_rate, rng)
    elif sound.kind == "rhythm":
        wave = _rhythm(str(values["drum"]), _number(values["bpm"]), num_samples, sample_rate, rng)
    else:
        raise ValueError(f"unknown sound: {sound.kind}")
    edge = np.minimum(np.minimum(seconds, seconds[::-1]) / _EDGE_S, 1)
    return level(wave.astype(np.float32), LOUDNESS_DBFS[sound.loudness]) * edge


def level(wave: Wave, dbfs: float) -> Wave:
    """Returns a wave brought to a root mean square level, or as near as its peaks allow."""
    power = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) or 1.0
    peak = float(np.abs(wave).max(initial=0.0)) or 1.0
    return (wave * min(10 ** (dbfs / 20) / power, _PEAK / peak)).astype(np.float32)


def level_dbfs(wave: Wave) -> float:
    """Returns the root mean square level of a wave; -120 for silence."""
    power = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if len(wave) else 0.0
    return round(20 * float(np.log10(max(power, 1e-6))), 1)


def _number(value: float | str | list[float]) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _numbers(value: float | str | list[float]) -> list[float]:
    assert isinstance(value, list)
    return value


def _sine(pitch_hz: float, seconds: Wave) -> Wave:
    return np.sin(2 * np.pi * pitch_hz * seconds, dtype=np.float32)


def _voice(pitch_hz: float, seconds: Wave) -> Wave:
    """Returns a steady tone with three weaker overtones."""
    wave = np.zeros_like(seconds)
    for partial in range(1, 5):
        wave += _sine(pitch_hz * partial, seconds) / partial**1.5
    return wave


def _melody(pitches: list[float], bpm: float, num_samples: int, sample_rate: int) -> Wave:
    """Returns plucked notes, one a beat, each dying away over a low held note."""
    beat = round(60 / bpm * sample_rate)
    wave = np.zeros(num_samples, np.float32)
    seconds = np.arange(2 * beat, dtype=np.float32) / sample_rate
    decay = np.exp(-3.5 * seconds) * np.minimum(seconds / 0.01, 1)
    for number, start in enumerate(range(0, num_samples, beat)):
        note = _voice(pitches[number % len(pitches)], seconds) * decay
        length = min(len(note), num_samples - start)
        wave[start : start + length] += note[:length]
    drone = np.sin(2 * np.pi * pitches[0] / 2 * np.arange(num_samples) / sample_rate)
    return wave + 0.25 * drone.astype(np.float32)


def _noise(colour: str, num_samples: int, sample_rate: int, rng: np.random.Generator) -> Wave:
    """Returns white, pink (power falls as 1/f) or brown (1/f^2) noise."""
    wave = rng.standard_normal(num_samples, np.float32)
    if colour == "white":
        return wave
    # Shaped in blocks of a power of two: an FFT of an odd length can be a hundred times slower.
    size = 1 << max(num_samples - 1, 1).bit_length()
    spectrum = np.fft.rfft(wave, size)
    # Flat below 60 Hz, or most of the power would be where nobody hears it.
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / sample_rate), 60.0)
    spectrum /= frequencies ** {"pink": 0.5, "brown": 1.0}[colour]
    return np.fft.irfft(spectrum, size)[:num_samples].astype(np.float32)


def _rhythm(
    drum: str, bpm: float, num_samples: int, sample_rate: int, rng: np.random.Generator
) -> Wave:
    """Returns a beat of clicks, or of drums with every other beat a snare."""
    beat = round(60 / bpm * sample_rate)
    wave = np.zeros(num_samples, np.float32)
    seconds = np.arange(min(beat, sample_rate // 4), dtype=np.float32) / sample_rate
    if drum == "clicks":
        hits = [np.sin(2 * np.pi * 1800 * seconds) * np.exp(-120 * seconds)]
    else:
        kick = np.sin(2 * np.pi * (55 + 90 * np.exp(-30 * seconds)) * seconds)
        snare = rng.standard_normal(len(seconds), np.float32)
        hits = [kick * np.exp(-14 * seconds), 0.6 * snare * np.exp(-25 * seconds)]
    for number, start in enumerate(range(0, num_samples, beat)):
        hit = hits[number % len(hits)]
        length = min(len(hit), num_samples - start)
        wave[start : start + length] += hit[:length]
    return wave
