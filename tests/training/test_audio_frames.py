# SPDX-License-Identifier: Apache-2.0
"""Sound of a clip -> the spectrogram of stage 2, from sounds that are known."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from tests.media_factory import make_video
from training.data.audio import NUM_FRAMES, clip_fbank

RATE = 16_000
KALDI = [[-0.15104, 0.16738, 0.44355, 0.68719], [-0.04689, 0.29414, 0.44768, 0.72247]]
"""Bins 0, 10, 31 and 63 of frames 0 and 3 of the seeded noise below."""
SILENCE = float((np.log(np.finfo(np.float32).eps) - 15.41663) / (2 * 6.55582))


def sound_file(wave_CS, rate=RATE):
    """A QuickTime file of uncompressed 16-bit sound, float [channels, samples] in [-1, 1]."""
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        layout = "mono" if len(wave_CS) == 1 else "stereo"
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        samples = np.round(wave_CS * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)
        for start in range(0, samples.shape[1], 1024):
            part = np.ascontiguousarray(samples[:, start : start + 1024].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(part, "s16", layout)
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def tone(seconds, hertz=1000.0, rate=RATE, level=0.5):
    return level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)[None]


def test_the_numbers_are_kaldis():
    """Computed by torchaudio's compliance.kaldi.fbank from the same 16-bit noise, then normalised."""
    noise = np.random.default_rng(7).normal(0, 0.1, (1, 1000))
    noise = np.round(noise * 2**15) / 2**15
    fbank = clip_fbank(sound_file(noise), None)
    assert fbank.shape == (998, 64)
    assert fbank.dtype == np.float32
    assert fbank[0, [0, 10, 31, 63]] == pytest.approx(KALDI[0], abs=2e-4)
    assert fbank[3, [0, 10, 31, 63]] == pytest.approx(KALDI[1], abs=2e-4)
    # 1000 samples hold 4 frames; what is missing is zero, not silence.
    assert not fbank[4:].any()


def test_a_tone_is_in_its_mel_bin():
    def mel(hertz):
        return 1127 * np.log1p(hertz / 700)

    for hertz in (300.0, 1000.0, 4000.0):
        fbank = clip_fbank(sound_file(tone(1, hertz)), None)
        bin_ = (mel(hertz) - mel(20)) / (mel(8000) - mel(20)) * 65 - 1
        assert abs(fbank[50].argmax() - bin_) < 1


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_other_rates_are_resampled(rate):
    ours = clip_fbank(sound_file(tone(2, rate=rate), rate), None)
    plain = clip_fbank(sound_file(tone(2)), None)
    peak = plain[50].argmax()
    assert ours[100, peak] == pytest.approx(plain[100, peak], abs=0.01)
    assert np.count_nonzero(ours.any(axis=1)) == np.count_nonzero(plain.any(axis=1)) == 198


def test_stereo_is_averaged():
    both = np.concatenate([tone(1), np.zeros_like(tone(1))])
    halved, full = (clip_fbank(sound_file(wave), None)[50] for wave in (both, tone(1)))
    peak = full.argmax()
    assert full[peak] - halved[peak] == pytest.approx(np.log(4) / (2 * 6.55582), abs=2e-3)


def marked(seconds, at_s):
    """Faint noise, and a tone for 0.1 s."""
    wave = np.random.default_rng(0).normal(0, 1e-3, (1, int(seconds * RATE)))
    start = int(at_s * RATE)
    wave[:, start : start + RATE // 10] += tone(0.1)
    return sound_file(wave)


def loud_frame(fbank):
    return int(fbank.max(axis=1).argmax())


def test_evaluation_hears_the_middle_of_a_long_sound():
    fbank = clip_fbank(marked(14, at_s=5.0), None)
    assert fbank.any(axis=1).sum() == NUM_FRAMES
    assert loud_frame(fbank) == pytest.approx(300, abs=10)


def test_training_hears_any_10_s_and_the_same_for_the_same_draw():
    file = marked(14, at_s=6.0)
    places = [loud_frame(clip_fbank(file, np.random.default_rng(seed))) for seed in range(25)]
    assert places[3] == loud_frame(clip_fbank(file, np.random.default_rng(3)))
    assert 190 <= min(places) < 280
    assert 520 < max(places) <= 612


def test_silence_is_kaldis_floor():
    assert clip_fbank(sound_file(np.zeros((1, RATE))), None)[50] == pytest.approx(SILENCE)


def test_compressed_sound_of_a_video(tmp_path):
    video = make_video(tmp_path / "a.mp4", shot_frames=(25, 25), audio="aac")
    fbank = clip_fbank(video.read_bytes(), None)
    # A click of 20 ms at the start of each shot of 1 s.
    energy = fbank[:198].max(axis=1)
    assert energy[98:104].max() > energy[20:90].max() + 0.5


@pytest.mark.parametrize("audio", [None, "short"])
def test_no_sound_is_an_error(audio, tmp_path: Path):
    if audio is None:
        data = make_video(tmp_path / "a.mp4", shot_frames=(5,)).read_bytes()
    else:
        data = sound_file(tone(0.01))
    with pytest.raises(ValueError, match="no sound"):
        clip_fbank(data, None)


def test_broken_file_is_an_error():
    for data in (b"", b"no video" * 100):
        with pytest.raises(ValueError, match="undecodable sound"):
            clip_fbank(data, None)
