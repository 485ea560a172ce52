# SPDX-License-Identifier: Apache-2.0
"""Audio captions on sounds made here, so that the truth is known."""

import shutil
import subprocess
import wave

import numpy as np
import pytest

from dataengine.models.signals_audio import describe_audio, find_tempo, measure_audio
from dataengine.models.voice import (
    RATE,
    SPEECH_SEEN,
    build_voice_detector,
    levels_db,
    power_spectra,
    speech_ratio,
)

SECONDS = np.arange(6 * RATE) / RATE
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal(len(SECONDS))


def tone(hz, level=0.1):
    return level * np.sin(2 * np.pi * hz * SECONDS)


def beats(bpm, hit):
    sound = np.zeros(len(SECONDS))
    for start in np.arange(0, len(SECONDS) - len(hit), 60 / bpm * RATE).astype(int):
        sound[start : start + len(hit)] = hit
    return sound


def pink():
    spectrum = np.fft.rfft(NOISE) / np.sqrt(np.maximum(np.arange(len(NOISE) // 2 + 1), 8))
    sound = np.fft.irfft(spectrum)
    return 0.1 * sound / sound.std()


def brown():
    spectrum = np.fft.rfft(NOISE) / np.maximum(np.arange(len(NOISE) // 2 + 1), 8)
    sound = np.fft.irfft(spectrum)
    return 0.05 * sound / sound.std()


def melody():
    notes = [262, 330, 392, 523, 349, 294]
    moment = np.arange(RATE // 2) / RATE
    played = [
        np.exp(-5 * moment) * sum(np.sin(2 * np.pi * hz * k * moment) / k for k in (1, 2, 3))
        for hz in notes * 2
    ]
    return 0.1 * np.concatenate(played)


SWEEP = 0.1 * np.sin(2 * np.pi * (200 * SECONDS + 150 * SECONDS**2))
CLICK = 0.5 * np.sin(2 * np.pi * 1800 * SECONDS[:800]) * np.exp(-120 * SECONDS[:800])

SOUNDS = {
    "silence": (np.zeros(len(SECONDS)), "Silence."),
    "dither": (NOISE * 1e-5, "Silence."),
    "tone": (tone(440), "A steady tone at about 440 Hz."),
    "low tone": (tone(110), "A steady low tone at about 110 Hz."),
    "loud high tone": (tone(2000, 0.3), "A loud steady high tone at about 2000 Hz."),
    "sweep up": (SWEEP, "A rising high tone at about 1100 Hz."),
    "sweep down": (SWEEP[::-1], "A falling high tone at about 1100 Hz."),
    "white noise": (0.1 * NOISE, "A hissing noise."),
    "quiet white noise": (0.01 * NOISE, "A quiet hissing noise."),
    "pink noise": (pink(), "A rushing noise."),
    "brown noise": (brown(), "A low rumbling sound."),
    "clicks": (
        beats(120, CLICK),
        "A series of short clicks with a regular beat of about 120 per minute.",
    ),
    "melody": (melody(), "A music-like sound with a regular beat of about 120 per minute."),
}


VIBRATO = np.cumsum(2 * np.pi * 220 * 2 ** (0.1 * np.sin(2 * np.pi * 3 * SECONDS)) / RATE)
TREMOLO = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * SECONDS)
NOT_SPOKEN = {name: sound for name, (sound, _) in SOUNDS.items()} | {
    "held notes that come and go": tone(220) * np.maximum(0, np.sin(2 * np.pi * 2 * SECONDS)),
    "siren that swells": 0.1 * np.sin(VIBRATO) * TREMOLO,
}


@pytest.fixture(scope="module")
def detector():
    return build_voice_detector()


@pytest.mark.parametrize("name", SOUNDS)
def test_sound_is_described(name, detector):
    waveform, text = SOUNDS[name]
    assert describe_audio(measure_audio(waveform.astype(np.float32), detector)) == text


@pytest.mark.parametrize("name", NOT_SPOKEN)
def test_no_speech_is_heard_where_nobody_speaks(name, detector):
    assert speech_ratio(NOT_SPOKEN[name].astype(np.float32), detector) < SPEECH_SEEN


@pytest.mark.parametrize("bpm", [75, 100, 128, 150])
def test_tempo(bpm):
    envelope = np.zeros(600)
    envelope[np.arange(0, 600, 6000 / bpm).astype(int)] = 10
    tempo = find_tempo(envelope)
    assert tempo == pytest.approx(bpm, rel=0.02)


def test_sound_that_comes_at_random_has_no_tempo():
    envelope = np.zeros(800)
    envelope[RNG.integers(0, 800, 25)] = 10
    assert find_tempo(envelope) is None


def test_level_of_a_full_sine_is_three_decibels_down():
    level = levels_db(power_spectra(np.sin(2 * np.pi * 1000 * SECONDS)))
    assert np.median(level) == pytest.approx(-3.0, abs=0.1)


@pytest.mark.parametrize("num_samples", [1, 100, 1023, 5000])
def test_sound_of_any_length_is_measured(num_samples, detector):
    waveform = (0.1 * NOISE[:num_samples]).astype(np.float32)
    assert describe_audio(measure_audio(waveform, detector)).endswith(".")


@pytest.mark.parametrize("voice", ["slt", "rms"])
def test_voice_is_heard_as_a_voice(voice, tmp_path, detector):
    waveform = speak("the quick brown fox jumps over the lazy dog", voice, tmp_path)
    assert "voice speaks" in describe_audio(measure_audio(waveform, detector))
    assert speech_ratio(waveform, detector) > 0.5


def test_voice_between_silences_still_counts_as_speech(tmp_path, detector):
    waveform = speak("the quick brown fox jumps over the lazy dog", "slt", tmp_path)
    padded = np.concatenate([np.zeros(5 * RATE, np.float32), waveform, np.zeros(5 * RATE)])
    assert speech_ratio(padded, detector) > 0.5
    assert describe_audio(measure_audio(padded, detector)).endswith("with silence in between.")


def speak(text, voice, folder):
    """Speech from the flite voices in a system ffmpeg; skips where there is none."""
    ffmpeg = shutil.which("ffmpeg")
    path = folder / "speech.wav"
    command = [ffmpeg or "ffmpeg", "-v", "error", "-f", "lavfi", "-i"]
    command += [f"flite=text='{text}':voice={voice}", "-ar", str(RATE), "-ac", "1", str(path)]
    if ffmpeg is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no ffmpeg with flite")
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
