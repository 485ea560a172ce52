# SPDX-License-Identifier: Apache-2.0
# Outcomes may be drops; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
"""Training of the audio captioner: tones to sentences, from a WavCaps list to captions of clips."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dataengine.errors import ConfigError, EngineError
from dataengine.models.audio import BeatsCaptionerConfig
from dataengine.models.audio_llm import wav_bytes
from dataengine.stages.caption_audio import CaptionAudioStage
from tests.helpers import clip_row
from tests.tiny_beats import (
    SENTENCES,
    save_sentence_lm,
    sound_of,
    write_checkpoint,
    write_wav,
)
from training import checkpoint
from training.audio_caption.config import load_audio_recipe
from training.audio_caption.data import Order, read_sounds, split_sounds
from training.audio_caption.trainer import AudioCaptionTrainer
from training.audio_captioner import main

KINDS = list(SENTENCES)
QFORMER = {
    "num_queries": 4, "width": 32, "mlp_width": 64, "layers": 2, "heads": 4, "dropout": 0.0,
    "window_s": 1.0, "max_windows": 2, "cross_attention_frequency": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """BEATs at random, a language model that knows four sentences, 24 sounds and their list."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("audio")
    write_checkpoint(folder / "beats.pt")
    save_sentence_lm(folder / "lm")
    (folder / "wav").mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for number in range(24):
        kind = KINDS[number % 4]
        write_wav(folder / "wav" / f"{kind}{number}.wav", sound_of(kind, rng, 0.6))
        entries.append({"id": f"{kind}{number}", "caption": SENTENCES[kind], "duration": 0.6})
    (folder / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    # WavCaps' own file holds one JSON object.
    (folder / "list.json").write_text(json.dumps({"num_captions_per_audio": 1, "data": entries}))
    return folder


def write_recipe(root, path, **overrides):
    """Writes a recipe that takes a few hundredths of a second a step."""
    document = {
        "beats": str(root / "beats.pt"),
        "language_model": str(root / "lm"),
        "prompt": {"before": "Sound", "after": "Caption"},
        "qformer": {**QFORMER},
        "data": {"batch_size": 12, "max_tokens": 10},
        "optim": {"lr": 1e-2, "weight_decay": 0.0, "steps": 8, "grad_clip": 1.0},
        "run": {"seed": 3, "log_every": 5, "checkpoint_every": 3},
    }
    for name, value in overrides.items():
        section, field = name.split("__")
        document[section][field] = value
    path.write_text(yaml.safe_dump(document))
    return path


def trainer(root, output, *, data="list.jsonl", audio="wav", resume=True, **overrides):
    output.mkdir(parents=True, exist_ok=True)
    config = load_audio_recipe(str(write_recipe(root, output / "recipe.yaml", **overrides)))
    return AudioCaptionTrainer(config, root / data, root / audio, output, resume=resume)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_weights(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


class Killed(BaseException):
    """What no code catches."""


def run_until(run, step):
    """Runs until the computation of a step begins, then ends at once; returns the losses so far."""
    losses, train_on = [], run._train_on

    def watched(waves, captions):
        if run.step == step:
            raise Killed
        losses.append(train_on(waves, captions))
        return losses[-1]

    run._train_on = watched
    with pytest.raises(Killed):
        run.run()
    return losses


DROPOUT = {"qformer__dropout": 0.2}
"""Draws from the generator that a resumed run must find where it was."""


# -------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run that was never stopped, and its losses."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    losses = trainer(root, folder, **DROPOUT).run()
    return folder, losses


def test_killed_and_resumed_run_is_bit_equal(root, whole, tmp_path):
    folder, losses = whole
    assert len(losses) == 8
    first = run_until(trainer(root, tmp_path, **DROPOUT), 5)
    assert first == losses[:5]
    assert not (tmp_path / "config.json").exists()  # nothing is loaded that is not trained
    second = trainer(root, tmp_path, **DROPOUT)
    assert second.step == 3
    assert second.run() == losses[3:]
    assert_equal_weights(tmp_path, folder)
    states = [checkpoint.read(checkpoint.locate(path)) for path in (tmp_path, folder)]
    assert torch.equal(states[0]["random.0.cpu"], states[1]["random.0.cpu"])


def test_finished_run_does_nothing_more(root, whole, tmp_path):
    folder, _ = whole
    done = trainer(root, folder, **DROPOUT)
    before = weights(folder), (folder / "config.json").read_bytes()
    assert (done.step, done.run()) == (8, [])
    after = weights(folder), (folder / "config.json").read_bytes()
    assert before[1] == after[1]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def test_run_that_is_not_resumed_sets_the_old_one_aside(root, tmp_path):
    run_until(trainer(root, tmp_path), 4)
    again = trainer(root, tmp_path, resume=False)
    assert again.step == 0
    assert (tmp_path / "checkpoints.old-1" / "step_00000003").is_dir()


def test_checkpoint_of_another_captioner_is_refused(root, tmp_path, caplog):
    run_until(trainer(root, tmp_path), 4)
    with pytest.raises(checkpoint.CheckpointError, match="belongs to another captioner"):
        trainer(root, tmp_path, qformer__num_queries=5)
    with pytest.raises(checkpoint.CheckpointError, match="belongs to another captioner"):
        trainer(root, tmp_path, prompt__after="Other")
    assert not [record for record in caplog.records if record.name.startswith("training")]
    trainer(root, tmp_path, optim__lr=1e-3)
    assert "the recipe differs from the checkpoint's in optim" in caplog.text


def test_order_of_the_sounds_is_a_function_of_the_step():
    whole = list(Order(10, 4, seed=2, first_step=0, steps=9))
    assert [list(Order(10, 4, 2, step, 9)) for step in range(10)] == [
        whole[step:] for step in range(10)
    ]
    for epoch in range(3):
        seen = [index for batch in whole[3 * epoch : 3 * epoch + 3] for index, _ in batch]
        assert sorted(seen) == list(range(10))
    assert whole != list(Order(10, 4, seed=3, first_step=0, steps=9))


# ------------------------------------------------------------------------------------ the data


def test_both_of_wavcaps_formats_are_read_alike(root):
    lines = read_sounds(root / "list.jsonl", root / "wav")
    assert lines == read_sounds(root / "list.json", root / "wav")
    assert len(lines) == 24
    assert {sound.caption for sound in lines} == set(SENTENCES.values())
    train, held_out = split_sounds(lines, 0.3)
    assert sorted(map(str, train + held_out)) == sorted(map(str, lines))
    assert 0 < len(held_out) < 16


def test_sound_that_cannot_be_decoded_is_left_out_and_none_at_all_is_an_error(root, tmp_path):
    (tmp_path / "wav").mkdir()
    write_wav(tmp_path / "wav" / "good.wav", sound_of("tone", np.random.default_rng(0), 0.6))
    for name in ("a", "b", "c"):
        (tmp_path / "wav" / f"{name}.wav").write_bytes(b"no sound")
    entries = [{"id": name, "caption": "A tone."} for name in ("good", "a", "b", "c")]
    for name, chosen in (("some", entries), ("none", entries[1:])):
        (tmp_path / name).write_text("".join(json.dumps(entry) + "\n" for entry in chosen))
    options = {"audio": tmp_path / "wav", "data__batch_size": 2, "optim__steps": 4}
    run = trainer(root, tmp_path / "out", data=tmp_path / "some", **options)
    # Two epochs of two batches; the good sound is in one of each.
    assert len(run.run()) == 2
    run = trainer(root, tmp_path / "nothing", data=tmp_path / "none", **options)
    with pytest.raises(ConfigError, match="No sound could be decoded"):
        run.run()
    assert checkpoint.newest(tmp_path / "nothing") is None
    assert not (tmp_path / "nothing" / "config.json").exists()


def test_loss_that_is_no_number_never_reaches_a_checkpoint(root, tmp_path, monkeypatch):
    run = trainer(root, tmp_path)
    loss = run._loss
    monkeypatch.setattr(run, "_loss", lambda *a: loss(*a) * (float("nan") if run.step == 4 else 1))
    with pytest.raises(EngineError, match="The loss is nan at step 4"):
        run.run()
    saved = checkpoint.read(tmp_path / "checkpoints" / "step_00000003")
    assert all(tensor.isfinite().all() for tensor in saved.values())


# ------------------------------------------------------------------- from a list to captions


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """What the command writes after enough steps to tell four kinds of sound apart."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    config = write_recipe(root, folder / "recipe.yaml", optim__steps=60, run__checkpoint_every=50)
    command = [str(config), "--data", str(root / "list.json"), "--audio", str(root / "wav")]
    assert main([*command, "--output", str(folder / "out"), "--set", "data.held_out=0.1"]) == 0
    return folder / "out"


def clips_of(kinds, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for number, kind in enumerate(kinds):
        sound = {"bytes": wav_bytes(sound_of(kind, rng, rng.uniform(0.5, 0.7))), "path": None}
        start = 1000 * number
        rows.append(clip_row("v", start, start + 1000, video=sound, has_audio=True))
    return rows


def captions_of(folder, rows, batch_size):
    model = BeatsCaptionerConfig(captioner=str(folder), batch_size=batch_size)
    stage = CaptionAudioStage(CaptionAudioStage.Config(model=model))
    stage.setup()
    return [outcome.rows[0]["caption_audio"] for outcome in stage.process(rows)]


def test_trained_captioner_names_sounds_it_never_heard(trained):
    """Of four kinds of sound, the right sentence for nearly every one; in any batch the same."""
    kinds = KINDS * 4
    rows = clips_of(kinds, seed=99)
    captions = captions_of(trained, rows, batch_size=5)
    right = [c == SENTENCES[k].strip() for c, k in zip(captions, kinds, strict=True)]
    assert sum(right) >= 14, captions
    assert captions_of(trained, rows, batch_size=1) == captions
    assert captions_of(trained, rows[::-1], batch_size=16) == captions[::-1]


def test_loss_falls_by_most_of_it(root, trained):
    resumed = trainer(root, trained, optim__steps=60, data__held_out=0.1)
    assert resumed.step == 60
    fresh = trainer(root, trained.parent / "fresh", data__held_out=0.1)
    before, after = fresh.held_out_loss(), resumed.held_out_loss()
    assert before is not None
    assert after is not None
    assert after < 0.3 * before


# -------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_processes_that_decode_change_nothing(root, whole, tmp_path):
    folder, losses = whole
    assert trainer(root, tmp_path, data__num_workers=2, **DROPOUT).run() == losses
    assert_equal_weights(tmp_path, folder)


@pytest.mark.slow
def test_command_that_was_killed_goes_on(root, whole, tmp_path):
    """The process is killed from outside between two checkpoints, wherever it is."""
    folder, _ = whole
    config = write_recipe(root, tmp_path / "recipe.yaml", run__checkpoint_every=1, **DROPOUT)
    command = [
        *(sys.executable, "-m", "training.audio_captioner", str(config)),
        *("--data", str(root / "list.jsonl"), "--audio", str(root / "wav")),
        *("--output", str(tmp_path / "out")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("checkpoints/step_*")):
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = checkpoint.read_meta(checkpoint.locate(tmp_path / "out"))["step"]
    assert 1 <= step < 8
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"going on from step {step}" in again.stderr + again.stdout
    assert_equal_weights(tmp_path / "out", folder)
