# SPDX-License-Identifier: Apache-2.0
import logging
import threading

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from training import checkpoint
from training.checkpoint import CheckpointError


def tensors_of(model, step):
    weights = {f"model.network.{name}": tensor for name, tensor in model.state_dict().items()}
    return weights | {"random.0.cpu": torch.arange(step)}


@pytest.fixture
def save(tmp_path, recipe):
    def write(step, keep=3, model=None):
        writer = checkpoint.Writer(tmp_path, keep)
        about = {"config": recipe().model_dump(mode="json"), "loader": {"step": step}}
        writer.save(step, tensors_of(model or nn.Linear(3, 2), step), about)
        writer.wait()
        writer.close()
        return checkpoint.locate(tmp_path)

    return write


def test_what_was_saved_is_loaded(save, recipe):
    model = nn.Linear(3, 2)
    folder = save(5, model=model)
    other = nn.Linear(3, 2)
    checkpoint.load_weights(folder, other)
    assert torch.equal(other.weight, model.weight)
    wanted = tensors_of(nn.Linear(3, 2), 5)
    wanted["random.0.cpu"].zero_()
    checkpoint.load(folder, wanted)
    assert torch.equal(wanted["random.0.cpu"], torch.arange(5))
    assert torch.equal(wanted["model.network.bias"], model.bias)
    assert checkpoint.read_config(folder) == recipe()
    meta = checkpoint.read_meta(folder)
    assert (meta["step"], meta["loader"]) == (5, {"step": 5})


def test_average_takes_the_place_of_weights(tmp_path, recipe):
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    tensors = tensors_of(model, 1) | {"ema.network.weight": average.weight.detach()}
    writer = checkpoint.Writer(tmp_path, 1)
    writer.save(1, tensors, {"config": {}})
    writer.close()
    loaded = nn.Linear(3, 2)
    checkpoint.load_weights(checkpoint.locate(tmp_path), loaded)
    assert torch.equal(loaded.weight, average.weight)
    assert torch.equal(loaded.bias, model.bias)  # did not train, and has no average


def test_run_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, writes = threading.Event(), []
    write_data = FileSystemWriter.write_data

    def slow(self, *args, **kwargs):
        writes.append(self)
        assert may_write.wait(60)
        return write_data(self, *args, **kwargs)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    weight = torch.ones(3)
    writer = checkpoint.Writer(tmp_path, 2)
    writer.save(1, {"model.network.weight": weight}, {"config": {}})
    weight += 1  # the next step, while the first save is held up
    assert checkpoint.newest(tmp_path) is None

    second = threading.Thread(
        target=writer.save, args=(2, {"model.network.weight": weight}, {"config": {}})
    )
    second.start()
    second.join(0.3)
    assert second.is_alive()  # waits for the first
    assert len(writes) <= 1
    may_write.set()
    second.join()
    writer.close()
    for step, value in ((1, 1.0), (2, 2.0)):
        read = {"model.network.weight": torch.zeros(3)}
        checkpoint.load(tmp_path / "checkpoints" / f"step_{step:08d}", read)
        assert read["model.network.weight"].tolist() == [value] * 3


def test_only_the_newest_are_kept(save, tmp_path):
    for step in (9, 10, 100, 1000):
        save(step, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000100", "step_00001000"]


@pytest.mark.parametrize("damaged", ["__0_0.distcp", ".metadata", "meta.json"])
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


def test_failed_write_is_told_and_leaves_no_checkpoint(save, tmp_path, monkeypatch):
    first = save(1)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    writer = checkpoint.Writer(tmp_path, 2)
    writer.save(2, tensors_of(nn.Linear(3, 2), 2), {"config": {}})
    with pytest.raises(CheckpointError, match=r"could not be written.*no space left"):
        writer.wait()
    writer.close()
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) == first
    # What it left does not stand in the way of the next attempt.
    assert save(2).name == "step_00000002"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_weights_of_another_model_are_refused(save):
    folder = save(1)
    with pytest.raises(CheckpointError, match=r"of another shape model.network.weight \[2, 3\]"):
        checkpoint.load_weights(folder, nn.Linear(4, 2))
    with pytest.raises(CheckpointError, match=r"left over model.network.bias"):
        checkpoint.load_weights(folder, nn.Linear(3, 2, bias=False))
    with pytest.raises(CheckpointError, match=r"missing model.network.0.bias"):
        checkpoint.load_weights(folder, nn.Sequential(nn.Linear(3, 2)))


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


def test_damaged_checkpoints_cost_good_ones_no_place(save, tmp_path):
    damaged = save(20)
    (damaged / "meta.json").write_text("{")
    good = [save(step, keep=2) for step in (5, 10, 15)]
    assert [folder.is_dir() for folder in good] == [False, True, True]
    assert checkpoint.newest(tmp_path) == good[-1]


def test_nothing_but_damaged_checkpoints_is_no_fresh_start(save, tmp_path):
    (save(1) / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="None of the checkpoints in"):
        checkpoint.newest(tmp_path)


def test_bytes_that_changed_are_noticed(save):
    folder = save(1)
    assert checkpoint.damage(folder) == ""
    (file,) = folder.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{file.name} is not what was written" in checkpoint.damage(folder)
