# SPDX-License-Identifier: Apache-2.0
import logging

import pytest
import torch
from torch import nn

from training import checkpoint
from training.checkpoint import CheckpointError


@pytest.fixture
def save(tmp_path, recipe):
    def write(step, keep=3, model=None):
        return checkpoint.save(
            tmp_path,
            step=step,
            model=model or nn.Linear(3, 2),
            state={"loader": {"step": step}, "random": [torch.arange(step)]},
            config=recipe(),
            keep=keep,
        )

    return write


def test_what_was_saved_is_loaded(save, recipe):
    model = nn.Linear(3, 2)
    folder = save(5, model=model)
    other = nn.Linear(3, 2)
    checkpoint.load_weights(folder, other)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(checkpoint.load_state(folder)["random"][0], torch.arange(5))
    assert checkpoint.read_config(folder) == recipe()
    assert checkpoint.read_meta(folder)["step"] == 5


def test_only_the_newest_are_kept(save, tmp_path):
    for step in (9, 10, 100, 1000):
        save(step, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000100", "step_00001000"]


@pytest.mark.parametrize("damaged", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_checkpoint_is_passed_over_aloud(save, tmp_path, caplog, damaged, how):
    good, bad = save(1), save(2)
    if how == "gone":
        (bad / damaged).unlink()
    else:
        (bad / damaged).write_bytes((bad / damaged).read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == good
    assert "step_00000002" in caplog.text


def test_writer_killed_half_way_leaves_no_checkpoint(save, tmp_path, monkeypatch):
    first = save(1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) == first
    # What it left does not stand in the way of the next attempt.
    assert save(2) == checkpoint.newest(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_weights_of_another_model_are_refused(save):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.load_weights(save(1), nn.Linear(4, 2))


def test_no_checkpoint_is_a_clear_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="No checkpoint in"):
        checkpoint.locate(tmp_path)


def test_starting_over_deletes_nothing(save, tmp_path):
    save(1)
    assert checkpoint.set_aside(tmp_path) == tmp_path / "checkpoints.old-1"
    assert checkpoint.newest(tmp_path) is None
    save(2)
    assert checkpoint.set_aside(tmp_path) == tmp_path / "checkpoints.old-2"
    assert checkpoint.set_aside(tmp_path) is None
