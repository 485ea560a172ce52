# SPDX-License-Identifier: Apache-2.0
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import multiprocessing

from dataengine.errors import ConfigError, EngineError
from training import checkpoint
from training.data.loader import Batch, TrainLoader
from training.distributed import World, start
from training.trainer import Trainer, reader

ALONE = World(0, 1, torch.device("cpu"))


def weights(output):
    return load_file(checkpoint.locate(output) / "model.safetensors")


def assert_equal_weights(output, other):
    ours, theirs = weights(output), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# Masks and stochastic depth draw from the generators that a resume must restore.
RANDOM = {"model__video__mask_ratio": 0.5, "model__video__drop_path": 0.2}


def test_resumed_run_is_bit_equal(shapes_corpus, recipe, tmp_path):
    config = recipe(optim__steps=20, **RANDOM)
    Trainer(config, shapes_corpus, tmp_path / "whole", ALONE).run()
    first = Trainer(config, shapes_corpus, tmp_path / "parts", ALONE).run(stop_at=11)
    assert (first.step, first.after) == (11, None)
    second = Trainer(config, shapes_corpus, tmp_path / "parts", ALONE)
    assert (second.step, second.resumed) == (11, True)
    result = second.run()
    assert result.step == 20
    assert result.before is None
    assert_equal_weights(tmp_path / "parts", tmp_path / "whole")
    states = [
        checkpoint.load_state(checkpoint.locate(tmp_path / name)) for name in ("whole", "parts")
    ]
    assert states[0]["loader"] == states[1]["loader"]
    assert torch.equal(states[0]["random"][0]["cpu"], states[1]["random"][0]["cpu"])


def test_evaluation_on_the_way_changes_nothing(shapes_corpus, recipe, tmp_path):
    plain = recipe(optim__steps=6, **RANDOM)
    watched = recipe(optim__steps=6, run__eval_every=2, run__checkpoint_every=3, **RANDOM)
    Trainer(plain, shapes_corpus, tmp_path / "plain", ALONE).run()
    Trainer(watched, shapes_corpus, tmp_path / "watched", ALONE).run()
    assert_equal_weights(tmp_path / "plain", tmp_path / "watched")


def test_starting_over_does_not_resume(shapes_corpus, recipe, tmp_path):
    Trainer(recipe(), shapes_corpus, tmp_path, ALONE).run()
    again = Trainer(recipe(), shapes_corpus, tmp_path, ALONE, resume=False)
    assert (again.step, again.resumed) == (0, False)


def test_checkpoint_in_other_data_is_refused(shapes_corpus, recipe, tmp_path):
    Trainer(recipe(), shapes_corpus, tmp_path, ALONE).run(stop_at=2)
    with pytest.raises(ConfigError, match="batch_size: 8 then, 4 now"):
        Trainer(recipe(data__batch_size=4), shapes_corpus, tmp_path, ALONE)


def test_loss_that_is_not_finite_never_reaches_a_checkpoint(shapes_corpus, recipe, tmp_path):
    trainer = Trainer(recipe(run__log_every=100), shapes_corpus, tmp_path, ALONE)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    # Else the evaluation before would meet the same numbers.
    trainer.resumed = True
    with pytest.raises(EngineError, match="The loss is nan at step 6"):
        trainer.run()
    assert checkpoint.newest(tmp_path) is None


def test_held_out_clips_are_no_training_clips(shapes_corpus, recipe, tmp_path):
    trainer = Trainer(recipe(), shapes_corpus, tmp_path, ALONE)
    held_out = trainer.held_out_index
    assert len(held_out) + len(trainer.train_index) == 90
    assert len(held_out) > 0
    assert not set(held_out.video_hash) & set(trainer.train_index.video_hash)


def run(command, repository, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        **kwargs,
    )


@pytest.fixture
def recipe_file(recipe, tmp_path):
    def write(**overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(**overrides).model_dump(mode="json")))
        return str(path)

    return write


def train_as_rank(rank, port, config, data, output):
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    with start() as world:
        Trainer(config, data, output, world).run()


def test_two_processes_equal_one_with_their_batches_joined(shapes_corpus, recipe, tmp_path):
    # An epsilon above rounding noise: Adam would blow up the noise of gradients that are zero.
    config = recipe(data__batch_size=4, optim__eps=1e-3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked: starting two interpreters would take longer than all of this file.
    multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        train_as_rank,
        args=(port, config, shapes_corpus, tmp_path / "two"),
        nprocs=2,
        start_method="fork",
    )

    one = Trainer(config, shapes_corpus, tmp_path / "one", ALONE)
    loaders = [
        TrainLoader(
            reader(one.train_index, config),
            one.train_index,
            config.data,
            seed=config.run.seed,
            rank=rank,
            world_size=2,
        )
        for rank in range(2)
    ]
    streams = [iter(loader) for loader in loaders]
    for _ in range(6):
        halves = [next(stream) for stream in streams]
        tensors = (torch.cat(parts) for parts in zip(*(half[:-1] for half in halves), strict=True))
        one.train_step(Batch._make([*tensors, []]))
    joined = one.model.state_dict()
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, joined[name], rtol=1e-4, atol=1e-6)
    state = checkpoint.load_state(checkpoint.locate(tmp_path / "two"))
    generators = [each["cpu"] for each in state["random"]]
    assert len(generators) == 2
    assert not torch.equal(*generators)


@pytest.mark.slow
def test_torchrun_trains_one_model(shapes_corpus, recipe, recipe_file, repository, tmp_path):
    path = recipe_file(data__batch_size=4)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "training", path, "--data", shapes_corpus, "--output", str(tmp_path / "two")]
    done = run([*torchrun, *command], repository)
    assert re.search(r"^text->video R@1 [\d.]+ % \(chance [\d.]+ %, [\d.]+x\)$", done.stdout, re.M)
    assert done.stdout.count("steps done") == 1
    assert "2 process(es)" in done.stderr
    state = checkpoint.load_state(checkpoint.locate(tmp_path / "two"))
    assert state["loader"]["world_size"] == 2


@pytest.mark.slow
def test_killed_run_goes_on_bit_equal(shapes_corpus, recipe, recipe_file, repository, tmp_path):
    path = recipe_file(optim__steps=60, run__checkpoint_every=5, **RANDOM)
    command = ["training", path, "--data", shapes_corpus, "--output"]
    run([*command, str(tmp_path / "whole")], repository)
    with subprocess.Popen(
        [sys.executable, "-m", *command, str(tmp_path / "killed")],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        while not list((tmp_path / "killed").glob("checkpoints/step_*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    step = checkpoint.read_meta(checkpoint.locate(tmp_path / "killed"))["step"]
    assert 5 <= step < 60
    run([*command, str(tmp_path / "killed")], repository)
    assert_equal_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_training_learns_and_evaluation_agrees(shapes_corpus, recipe_file, repository, tmp_path):
    path = recipe_file(optim__steps=300, data__batch_size=32)
    output = str(tmp_path / "run")
    done = run(["training", path, "--data", shapes_corpus, "--output", output], repository)
    headline = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"text->video R@1 [\d.]+ % \(chance [\d.]+ %, ([\d.]+)x\)", headline)
    assert found
    assert float(found[1]) >= 4
    again = run(["training.evaluate", output, "--data", shapes_corpus], repository)
    assert again.stdout.splitlines()[-1] == headline
