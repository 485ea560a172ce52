# SPDX-License-Identifier: Apache-2.0
"""A clip's MP4 bytes -> the mel spectrogram that InternVideo2's second stage hears.

S samples, F frames of 10 ms, M mel bins.
"""

import io

import av
import numpy as np
import torch
from av.error import FFmpegError
from numpy.typing import NDArray

from dataengine.networks.beats import FBANK_MEAN, FBANK_STD, FRAME, RATE, SHIFT, kaldi_fbank

WINDOW_S = 10
NUM_FRAMES = 1 + (WINDOW_S * RATE - FRAME) // SHIFT
"""998: frames of 25 ms every 10 ms that fit into 10 s."""
NUM_BINS = 64
"""The released stage-2 code uses half of the bins of BEATs' own."""


def clip_fbank(mp4: bytes, rng: np.random.Generator | None) -> NDArray[np.float32]:
    """Returns float32 [998, 64]: Kaldi's log mel filter bank of 10 s, normalised.

    As ``load_full_audio_av`` of the released code: 16 kHz, mono, times 2^15, 64 bins, minus AudioSet's
    mean, divided by twice its deviation; then zeros behind the end of a shorter sound.

    Args:
        mp4: The file.
        rng: Chooses the 10 s of a longer sound in training. Without it the middle is taken, so that an
            evaluation can be repeated; the released code draws there too.

    Raises:
        ValueError: If there is no sound, or it cannot be decoded.
    """
    wave = _mono(mp4)
    spare = len(wave) - WINDOW_S * RATE
    if spare > 0:
        start = int(rng.integers(spare + 1)) if rng is not None else spare // 2
        wave = wave[start : start + WINDOW_S * RATE]
    fbank_FM = kaldi_fbank(torch.from_numpy(wave)[None], NUM_BINS)[0].numpy()
    normalised_FM = np.zeros((NUM_FRAMES, NUM_BINS), np.float32)
    normalised_FM[: len(fbank_FM)] = (fbank_FM - FBANK_MEAN) / (2 * FBANK_STD)
    return normalised_FM


def _mono(mp4: bytes) -> NDArray[np.float32]:
    """Returns the first sound track in [-1, 1], at least one frame long, [S]."""
    try:
        with av.open(io.BytesIO(mp4), mode="r") as container:
            stream = next(iter(container.streams.audio), None)
            if stream is None:
                raise ValueError("no sound")
            # Channels are averaged here: libav's mix to mono adds them, 3 dB too loud.
            resampler = av.AudioResampler(format="fltp", rate=RATE)
            pieces: list[NDArray[np.float32]] = []
            for frame in container.decode(stream):
                # Without a time the resampler neither fills nor drops: sound is taken as it comes.
                frame.pts = None
                pieces += [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]
            if pieces:
                pieces += [part.to_ndarray().mean(axis=0) for part in resampler.resample(None)]
            # libav decodes the last packet whole, also where the edit list of a clip ends inside it.
            length = None
            if stream.duration and stream.time_base:
                length = round(float(stream.duration * stream.time_base) * RATE)
    except FFmpegError as error:
        raise ValueError(f"undecodable sound: {error.strerror}") from error
    wave = np.concatenate(pieces)[:length] if pieces else np.zeros(0, np.float32)
    if len(wave) < FRAME:
        raise ValueError("no sound")
    return wave
