# SPDX-License-Identifier: Apache-2.0
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from dataengine.errors import DependencyError
from dataengine.models.asr import (
    SAMPLE_RATE,
    PocketsphinxConfig,
    PocketsphinxTranscriber,
    Segment,
    WhisperConfig,
    build_transcriber,
    group_words,
    spoken_word,
)

SENTENCE = "the quick brown fox jumps over the lazy dog"


def speak(text):
    """Speech from flite in a system ffmpeg, float32 mono; skips where there is none."""
    ffmpeg = shutil.which("ffmpeg") or pytest.skip("no ffmpeg")
    command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", f"flite=text='{text}':voice=rms"]
    command += ["-ar", str(SAMPLE_RATE), "-ac", "1", "-f", "f32le", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("ffmpeg without flite")
    return np.frombuffer(done.stdout, "<f4")


def test_words_are_grouped_by_pauses():
    words = [Segment(0, 200, "good"), Segment(300, 500, "morning"), Segment(1000, 1400, "all")]
    assert group_words(words, 500) == [Segment(0, 500, "good morning"), Segment(1000, 1400, "all")]
    assert group_words(words, 501) == [Segment(0, 1400, "good morning all")]
    assert group_words([], 500) == []


def test_fillers_are_no_words():
    tokens = ["<s>", "the(2)", "<sil>", "[NOISE]", "++BREATH++", "dog"]
    assert [spoken_word(token) for token in tokens] == [None, "the", None, None, None, "dog"]


def test_pocketsphinx_writes_down_a_sentence():
    waveform = speak(SENTENCE)
    transcriber = build_transcriber(PocketsphinxConfig())
    (first,) = transcriber.transcribe([waveform])
    assert isinstance(first, list)
    heard = " ".join(segment.text for segment in first).split()
    assert len(set(heard) & set(SENTENCE.split())) >= 6  # of 8 different words
    assert 0 <= first[0].start_ms < first[-1].end_ms <= len(waveform) / SAMPLE_RATE * 1000 + 20
    # What it heard before must not change what it hears next.
    transcriber.transcribe([0.1 * waveform[::-1].copy()])
    assert transcriber.transcribe([waveform]) == [first]


def test_pocketsphinx_hears_the_same_after_any_other_sound():
    """The mean of the features shows it sooner than the words."""
    rng = np.random.default_rng(0)
    sounds = [rng.normal(0, level, SAMPLE_RATE).astype(np.float32) for level in (0.05, 0.2)]
    transcriber = PocketsphinxTranscriber(PocketsphinxConfig())
    features = []
    for sound in (sounds[0], sounds[1], sounds[0]):
        transcriber.transcribe([sound])
        features.append(transcriber._decoder.get_cmn())
    assert features[0] == features[2] != features[1]


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory):
    """A random one-layer model in openai-whisper's own checkpoint format."""
    import torch
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, 32, 2, 1, 51865, 448, 32, 2, 1)
    path = tmp_path_factory.mktemp("whisper") / "tiny.pt"
    model = Whisper(dims)
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)
    return path


def test_whisper_checkpoint_loads_and_transcribes_the_same_twice(tiny_whisper):
    config = WhisperConfig(model=str(tiny_whisper), language="en", max_tokens=8)
    transcriber = build_transcriber(config)
    waveform = np.random.default_rng(0).normal(0, 0.1, 2 * SAMPLE_RATE).astype(np.float32)
    (segments,) = transcriber.transcribe([waveform])
    assert [segments] == transcriber.transcribe([waveform])
    assert transcriber.model == f"whisper:{tiny_whisper}"


def test_whisper_is_asked_for_plain_greedy_text(tiny_whisper, monkeypatch):
    asked = {}

    def transcribe(waveform, **options):
        asked.update(options)
        entries = [(0.0, 1.26, " Good morning. "), (1.26, 2.0, " "), (3.5, 3.4, "all")]
        return {"segments": [dict(zip(("start", "end", "text"), e, strict=True)) for e in entries]}

    transcriber = build_transcriber(WhisperConfig(model=str(tiny_whisper)))
    monkeypatch.setattr(transcriber, "_model", SimpleNamespace(transcribe=transcribe))
    assert transcriber.transcribe([np.zeros(SAMPLE_RATE, np.float32)]) == [
        [Segment(0, 1260, "Good morning."), Segment(3500, 3500, "all")]
    ]
    assert (asked["condition_on_previous_text"], asked["temperature"]) == (False, 0.0)


def test_whisper_that_is_not_there_is_an_error_that_names_it(tmp_path):
    missing = str(tmp_path / "none.pt")
    with pytest.raises(DependencyError, match=r"none\.pt"):
        build_transcriber(WhisperConfig(model=missing))


def test_damaged_whisper_is_an_error(tmp_path, tiny_whisper):
    import torch

    checkpoint = torch.load(tiny_whisper, weights_only=True)
    del checkpoint["model_state_dict"]["decoder.ln.weight"]
    damaged = tmp_path / "damaged.pt"
    torch.save(checkpoint, damaged)
    with pytest.raises(DependencyError, match=r"decoder\.ln\.weight"):
        build_transcriber(WhisperConfig(model=str(damaged)))
