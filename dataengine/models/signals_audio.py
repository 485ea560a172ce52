# SPDX-License-Identifier: Apache-2.0
"""Audio captions from measurements: level, silence, speech, tone, noise, beat.

Everything said is measured, nothing is recognised: "music-like" is sound with steady pitches,
not a statement that somebody plays. Thresholds without another source were set on 26 sound
tracks of real videos (speech, music, wind, applause, engines, a dog, silence) and on synthetic
sounds with known truth.

Legend: T frames of 64 ms every 10 ms, F frequency bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataengine.models.voice import (
    FFT,
    FRAMES_PER_S,
    RATE,
    SILENT_DB,
    SPEECH_SEEN,
    VoiceDetector,
    build_voice_detector,
    levels_db,
    pitch_track,
    power_spectra,
    speech_share,
)

_MAX_S = 60


@dataclass(frozen=True, slots=True)
class AudioSignals:
    """What is measured of a sound."""

    level_db: float
    """RMS of the parts that are not silent, in dB below full scale."""
    silence_ratio: float
    """Share of frames below the silence level."""
    speech_ratio: float
    """Share of the audible one-second windows that sound like speech."""
    flatness: float
    """Median spectral flatness of 60-6000 Hz: 0 a pure tone, about 0.56 white noise."""
    centroid_hz: float
    """Median centre of gravity of the spectrum."""
    tone_hz: float | None
    """Frequency of a single tone that outlasts everything else; None if there is none."""
    tone_octaves: float
    """How far the tone moves from its start to its end, in octaves; 0 for a steady one."""
    pitched_ratio: float
    """Share of frames with a pitch that stays where it is, as a held note does."""
    onsets_per_s: float
    """Sudden rises in level per second."""
    tempo_bpm: float | None
    """Beats per minute, where rises come at regular intervals."""


def find_tone(spectra_TF: np.ndarray, loud: np.ndarray) -> tuple[float | None, float]:
    """Returns the frequency in Hz of a tone that carries the loud frames, and its glide.

    A tone is the fundamental of what sounds: the strongest bin or a simple harmonic series on
    it holds most of the power in nearly every frame, and moves smoothly. The glide is in octaves
    from start to end.
    """
    frames = spectra_TF[loud]
    if len(frames) < max(FRAMES_PER_S // 2, 0.6 * len(spectra_TF)):
        return None, 0.0
    top = frames[:, 4:].argmax(axis=1) + 4
    near = np.arange(-4, 5)
    around = np.take_along_axis(frames, np.clip(top[:, None] + near, 0, frames.shape[1] - 1), 1)
    share = around.sum(axis=1) / (frames.sum(axis=1) + 1e-12)
    hz = (around * (top[:, None] + near)).sum(axis=1) / around.sum(axis=1) * RATE / FFT
    octaves = np.log2(hz)
    jumps = np.abs(np.diff(octaves)) > 0.03
    if np.median(share) < 0.6 or jumps.sum() > max(1, 0.005 * len(jumps)):
        return None, 0.0
    edge = max(1, len(hz) // 10)
    glide = float(np.median(octaves[-edge:]) - np.median(octaves[:edge]))
    if abs(glide) < 0.1 and np.std(octaves) > 0.05:
        return None, 0.0
    return float(np.median(hz)), glide if abs(glide) >= 0.1 else 0.0


def onset_strength(spectra_TF: np.ndarray) -> np.ndarray:
    """Returns the spectral flux [T]: the mean rise in dB of 24 log-spaced bands, frame to frame."""
    edges = np.unique(np.geomspace(6, spectra_TF.shape[1], 25).astype(int))
    bands = np.add.reduceat(spectra_TF, edges[:-1], axis=1)[:, : len(edges) - 1]
    # The floor keeps quantisation noise in silence from counting as a rise.
    decibel = 10 * np.log10(bands + bands.max() * 1e-5 + 1e-9)
    flux = np.maximum(0, decibel[3:] - decibel[:-3]).mean(axis=1)
    return np.pad(flux, (3, 0))[: len(spectra_TF)]


def find_tempo(onsets: np.ndarray) -> float | None:
    """Returns the beats per minute of an onset envelope (100 values a second), or None.

    The highest peak of its autocorrelation between 40 and 200 bpm, weighted by a log-normal
    around 120 bpm with a width of one octave (Ellis 2007, "Beat tracking by dynamic
    programming"). A beat must return: the envelope correlates with itself one and two beats
    later. Measured: clicks and drum loops above 0.5, speech and wind below 0.3.
    """
    if len(onsets) < 2.5 * FRAMES_PER_S or np.sort(onsets)[-4] < 2:  # four rises of 2 dB
        return None
    smooth = np.convolve(onsets - onsets.mean(), np.hanning(7) / np.hanning(7).sum(), "same")
    spectrum = np.abs(np.fft.rfft(smooth, 2 * len(smooth))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(smooth)]
    correlation /= np.arange(len(smooth), 0, -1)
    correlation /= correlation[0] + 1e-12
    lags = np.arange(30, min(151, len(correlation) // 2))
    bpm = 60 * FRAMES_PER_S / lags
    weight = np.exp(-0.5 * np.log2(bpm / 120) ** 2)
    best = int(np.argmax(correlation[lags] * weight))
    lag = lags[best]
    if min(correlation[lag], correlation[2 * lag - 1 : 2 * lag + 2].max()) < 0.4:
        return None
    # A parabola through the peak and its neighbours: lags alone are 2 bpm apart.
    left, top, right = correlation[lag - 1 : lag + 2]
    shift = 0.5 * (left - right) / (left - 2 * top + right - 1e-12)
    return float(60 * FRAMES_PER_S / (lag + np.clip(shift, -0.5, 0.5)))


def measure_audio(waveform: np.ndarray, detector: VoiceDetector) -> AudioSignals:
    """Returns the measurements of a float32 mono waveform in [-1, 1] at 16 kHz.

    Of a longer sound, the first 60 s are measured.
    """
    waveform = waveform[: _MAX_S * RATE]
    spectra = power_spectra(waveform)
    level = levels_db(spectra)
    loud = level > SILENT_DB
    if not loud.any():
        return AudioSignals(-120.0, 1.0, 0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0, None)
    semitones, periodicity = pitch_track(spectra)
    active = loud & (level > level.max() - 30)
    band = spectra[active, 60 * FFT // RATE : 6000 * FFT // RATE] + 1e-12
    flatness = np.exp(np.log(band).mean(axis=1)) / band.mean(axis=1)
    centroid = spectra[active] @ np.arange(spectra.shape[1]) / spectra[active].sum(axis=1)
    tone_hz, glide = find_tone(spectra, active)
    held = (np.abs(np.diff(semitones, prepend=semitones[0])) < 0.05) & (periodicity > 0.55)
    onsets = onset_strength(spectra)
    heard = np.flatnonzero(active)
    rising = (onsets[1:-1] >= onsets[:-2]) & (onsets[1:-1] > onsets[2:]) & (onsets[1:-1] > 3)
    return AudioSignals(
        level_db=float(10 * np.log10(np.mean(10 ** (level[loud] / 10)))),
        silence_ratio=float(1 - loud.mean()),
        speech_ratio=speech_share(spectra, waveform, detector),
        flatness=float(np.median(flatness)),
        centroid_hz=float(np.median(centroid) * RATE / FFT),
        tone_hz=tone_hz,
        tone_octaves=glide,
        pitched_ratio=float(held[active].mean()),
        onsets_per_s=float(rising.sum() * FRAMES_PER_S / len(level)),
        tempo_bpm=find_tempo(onsets[heard[0] : heard[-1] + 1]),
    )


def _loudness(level_db: float) -> str:
    """Returns a word for a level, empty around what broadcasts are set to (-23, EBU R 128)."""
    for least, word in ((-10, "very loud"), (-19, "loud"), (-29, ""), (-45, "quiet")):
        if level_db > least:
            return word
    return "faint"


def _kind(signals: AudioSignals) -> str:
    """Returns what sounds, without its loudness, as a noun phrase without an article."""
    if signals.tone_hz is not None:
        moving = "rising" if signals.tone_octaves > 0 else "falling"
        how = moving if signals.tone_octaves else "steady"
        height = "low " if signals.tone_hz < 200 else "high " if signals.tone_hz > 800 else ""
        return f"{how} {height}tone at about {_round_hz(signals.tone_hz)} Hz"
    if signals.tempo_bpm and signals.silence_ratio > 0.3:
        return f"series of short {'clicks' if signals.centroid_hz > 500 else 'low beats'}"
    if signals.flatness > 0.25:
        return "hissing noise" if signals.centroid_hz > 2500 else "rushing noise"
    if signals.pitched_ratio > 0.3 or (signals.flatness < 0.01 and signals.silence_ratio < 0.3):
        return "music-like sound"
    if signals.centroid_hz < 500:
        return "low rumbling sound"
    return "rhythmic sound" if signals.tempo_bpm else "mixed sound"


def _round_hz(hz: float) -> int:
    """Returns a frequency to two significant digits, 440 as 440."""
    step = 10 ** max(0, int(np.log10(hz)) - 1)
    return int(round(hz / step) * step)


def describe_audio(signals: AudioSignals) -> str:
    """Returns one sentence for what is measured; "Silence." below the silence level."""
    if signals.silence_ratio > 0.99:
        return "Silence."
    loudness = _loudness(signals.level_db)
    speaks = signals.speech_ratio >= SPEECH_SEEN
    subject = f"{loudness} {'voice' if speaks else _kind(signals)}".strip()
    parts = [f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}"]
    if speaks:
        parts.append("speaks" if signals.speech_ratio > 0.6 else "speaks some of the time")
        if signals.speech_ratio < 0.4 and signals.tempo_bpm is None:
            parts.append(f"over a {_kind(signals)}")
    if signals.tempo_bpm is not None:
        joint = "over" if speaks else "with"
        parts.append(f"{joint} a regular beat of about {round(signals.tempo_bpm)} per minute")
    if signals.silence_ratio > 0.2 and not signals.tempo_bpm:
        parts.append("with silence in between")
    text = " ".join(parts)
    return text[0].upper() + text[1:] + "."


class SignalsAudioCaptioner:
    """Measures and says what it measured."""

    model = "signals"
    revision = "1"
    prompt_hash: str | None = None
    rate = RATE

    def __init__(self) -> None:
        self._detector = build_voice_detector()

    def caption(self, waveforms: Sequence[np.ndarray], clip_ids: Sequence[str]) -> list[str | None]:
        """Returns one sentence per waveform."""
        return [describe_audio(measure_audio(waveform, self._detector)) for waveform in waveforms]
