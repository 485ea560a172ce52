# SPDX-License-Identifier: Apache-2.0
import json
import os
import random
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
from torch import multiprocessing, nn

from dataengine.errors import ConfigError, EngineError
from training import checkpoint
from training.__main__ import parse_init, parse_source
from training.config import SourceConfig
from training.distributed import World, start
from training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))

# Masks and stochastic depth draw from the generators that a resume must restore.
RANDOM = {"model__video__mask_ratio": 0.5, "model__video__drop_path": 0.2}


@pytest.fixture
def on_shapes(recipe, shapes_corpus):
    """Returns a function: dotted overrides -> a recipe that reads the shapes."""

    def make(**overrides):
        config = recipe(**overrides)
        data = config.data.model_copy(update={"sources": (SourceConfig(data=shapes_corpus),)})
        return config.model_copy(update={"data": data})

    return make


def state(output):
    """Every tensor of a run's newest checkpoint."""
    return checkpoint.read(checkpoint.locate(output))


def assert_equal_state(output, other):
    ours, theirs = state(output), state(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    metas = [checkpoint.read_meta(checkpoint.locate(each)) for each in (output, other)]
    assert metas[0]["loader"] == metas[1]["loader"]


def losses(output):
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run_as_rank(rank, port, config, output, options):
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    with start() as world:
        trainer = Trainer(config, output, world)
        if options.get("kill_at") and rank == 1:
            die_at(trainer, options["kill_at"])
        if options.get("poison_at") and rank == 1:
            poison(trainer, options["poison_at"])
        trainer.run(options.get("stop_at"))


def die_at(trainer, step):
    do_step = trainer.train_step

    def train_step(batch):
        if trainer.step == step:
            while checkpoint.newest(trainer.output) is None:  # it is written meanwhile
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return do_step(batch)

    trainer.train_step = train_step


def poison(trainer, steps):
    """Makes the loss of some steps infinite on this rank."""
    forward = trainer.task.forward

    def poisoned(inputs):
        output = forward(inputs)
        if trainer.step in steps:
            output.losses["vtc"] = output.losses["vtc"] * float("inf")
        return output

    trainer.task.forward = poisoned


def run_two(config, output, **options):
    """Trains in two processes; forked, for two interpreters would take longer than all of this."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        run_as_rank, args=(port, config, output, options), nprocs=2, start_method="fork"
    )


def test_resumed_run_is_bit_equal(on_shapes, tmp_path):
    config = on_shapes(optim__steps=20, optim__ema_decay=0.9, **RANDOM)
    Trainer(config, tmp_path / "whole", ALONE).run()
    first = Trainer(config, tmp_path / "parts", ALONE).run(stop_at=11)
    assert (first.step, first.after) == (11, None)
    second = Trainer(config, tmp_path / "parts", ALONE)
    assert (second.step, second.resumed) == (11, True)
    result = second.run()
    assert result.step == 20
    assert result.before is None
    assert_equal_state(tmp_path / "parts", tmp_path / "whole")
    assert {name.split(".")[0] for name in state(tmp_path / "parts")} == {
        "model", "ema", "optim", "random",
    }  # fmt: skip


def test_metrics_of_a_resumed_run_are_those_of_a_whole_one(on_shapes, tmp_path):
    config = on_shapes(optim__steps=8, run__log_every=1, run__checkpoint_every=3, **RANDOM)
    Trainer(config, tmp_path / "whole", ALONE).run()
    killed = Trainer(config, tmp_path / "killed", ALONE)
    die = killed.train_step

    def train_step(batch):
        if killed.step == 5:
            raise KeyboardInterrupt
        return die(batch)

    killed.train_step = train_step
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    # It did five steps and has a checkpoint of the third; the other two are done and told again.
    assert list(losses(tmp_path / "killed")) == [1, 2, 3, 4, 5]
    Trainer(config, tmp_path / "killed", ALONE).run()
    text = (tmp_path / "killed" / "metrics.jsonl").read_text()
    assert text.count('"step": 4') == 1
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_evaluation_on_the_way_changes_nothing(on_shapes, tmp_path):
    common = {"optim__steps": 6, "optim__ema_decay": 0.8, **RANDOM}
    plain = on_shapes(**common)
    watched = on_shapes(run__eval_every=2, run__checkpoint_every=3, **common)
    Trainer(plain, tmp_path / "plain", ALONE).run()
    Trainer(watched, tmp_path / "watched", ALONE).run()
    assert_equal_state(tmp_path / "plain", tmp_path / "watched")


def test_starting_over_does_not_resume(on_shapes, tmp_path):
    Trainer(on_shapes(), tmp_path, ALONE).run()
    again = Trainer(on_shapes(), tmp_path, ALONE, resume=False)
    assert (again.step, again.resumed) == (0, False)
    assert (tmp_path / "checkpoints.old-1" / "metrics.jsonl").is_file()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_run_of_another_recipe_is_refused_unless_accepted(on_shapes, tmp_path):
    Trainer(on_shapes(optim__ema_decay=0.5), tmp_path, ALONE).run(stop_at=2)
    with pytest.raises(ConfigError, match=r"optim.lr \(0.001 then, 0.1 now\)"):
        Trainer(on_shapes(optim__ema_decay=0.5, optim__lr=0.1), tmp_path, ALONE)
    # What changes nothing in what is learnt is no other recipe.
    same = on_shapes(optim__ema_decay=0.5, run__log_every=1, data__num_workers=1)
    assert Trainer(same, tmp_path, ALONE).step == 2
    # The average is left behind where it is no longer wanted.
    other = Trainer(on_shapes(optim__lr=1e-4), tmp_path, ALONE, accept_changes=True)
    assert (other.step, other.average) == (2, None)
    assert other.run().step == 6


def test_run_that_has_done_more_steps_than_asked_for_claims_nothing(on_shapes, tmp_path):
    Trainer(on_shapes(), tmp_path, ALONE).run()
    with pytest.raises(ConfigError, match="has done 6 steps, more than the 4 asked for"):
        Trainer(on_shapes(optim__steps=4), tmp_path, ALONE, accept_changes=True)


def test_checkpoint_in_other_data_is_refused(on_shapes, tmp_path):
    Trainer(on_shapes(), tmp_path, ALONE).run(stop_at=2)
    with pytest.raises(ConfigError, match="batch_size: 8 then, 4 now"):
        Trainer(on_shapes(data__batch_size=4), tmp_path, ALONE, accept_changes=True)


def test_checkpoint_whose_bytes_changed_is_passed_over(on_shapes, tmp_path, caplog):
    config = on_shapes(run__checkpoint_every=2, run__keep_checkpoints=3)
    Trainer(config, tmp_path, ALONE).run(stop_at=4)
    for file in (tmp_path / "checkpoints" / "step_00000004").glob("*.distcp"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert Trainer(config, tmp_path, ALONE).step == 2
    assert "step_00000004 is damaged" in caplog.text


def test_folder_of_a_running_training_is_refused(on_shapes, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from training import checkpoint\n"
        "held = checkpoint.lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(EngineError, match="Another process trains in"):
            Trainer(on_shapes(), tmp_path, ALONE)
        other.kill()
    assert Trainer(on_shapes(), tmp_path, ALONE).step == 0


def test_output_that_cannot_be_written_is_a_users_mistake(on_shapes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write to"):
        Trainer(on_shapes(), tmp_path / "file" / "run", ALONE)


def test_steps_that_are_not_finite_are_left_out(on_shapes, tmp_path):
    config = on_shapes(optim__ema_decay=0.5, run__log_every=1)
    trainer = Trainer(config, tmp_path, ALONE)
    poison(trainer, {2, 3})
    before = {}
    do_step = trainer.train_step

    def train_step(batch):
        kept = {name: tensor.clone() for name, tensor in trainer._state().items()}
        values = do_step(batch)
        before[trainer.step - 1] = [
            name for name, tensor in trainer._state().items() if not torch.equal(tensor, kept[name])
        ]
        return values

    trainer.train_step = train_step
    trainer.run()
    assert before[2] == before[3] == []
    for step in (0, 1, 4, 5):
        assert {name.split(".")[0] for name in before[step]} == {"model", "ema", "optim"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = [row["skipped_steps"] for row in rows if "skipped_steps" in row]
    assert skipped == [0, 0, 1, 2, 2, 2]


def test_too_many_steps_that_are_not_finite_end_the_run(on_shapes, tmp_path):
    config = on_shapes(optim__max_skipped_steps=2, run__checkpoint_every=1)
    trainer = Trainer(config, tmp_path, ALONE)
    poison(trainer, {1, 3, 4, 5})
    with pytest.raises(EngineError, match=r"3 steps in a row have no finite loss .* step 6"):
        trainer.run()
    weights = [tensor for name, tensor in state(tmp_path).items() if name.startswith("model.")]
    assert all(tensor.isfinite().all() for tensor in weights)


def test_weights_that_are_not_finite_reach_no_checkpoint(on_shapes, tmp_path):
    trainer = Trainer(on_shapes(), tmp_path, ALONE)
    with torch.no_grad():
        next(trainer.task.parameters()).fill_(float("nan"))
    with pytest.raises(EngineError, match="not finite after step 0"):
        trainer.save()
    assert checkpoint.newest(tmp_path) is None


def test_held_out_clips_are_no_training_clips(on_shapes, tmp_path):
    corpora = Trainer(on_shapes(), tmp_path, ALONE).corpora
    assert len(corpora.held_out_index) + len(corpora.train_index) == 90
    assert len(corpora.held_out_index) > 0


def test_average_is_what_is_evaluated_and_exported(on_shapes, tmp_path):
    trainer = Trainer(on_shapes(optim__ema_decay=0.5), tmp_path, ALONE)
    name = "network.vision_encoder.proj"
    expected = trainer.task.state_dict()[name].clone()
    do_step = trainer.train_step

    def train_step(batch):
        nonlocal expected
        values = do_step(batch)
        expected = 0.5 * expected + 0.5 * trainer.task.state_dict()[name]
        return values

    trainer.train_step = train_step
    trainer.run()
    exported = load_file(tmp_path / "model" / "model.safetensors")["vision_encoder.proj"]
    torch.testing.assert_close(exported, expected)
    assert not torch.equal(exported, trainer.task.state_dict()[name])
    network = trainer.task.network
    checkpoint.load_weights(checkpoint.locate(tmp_path), network)
    assert torch.equal(network.state_dict()["vision_encoder.proj"], exported)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(on_shapes, tmp_path, parallel):
    common = {"optim__steps": 20, "optim__ema_decay": 0.9, "run__log_every": 1}
    # An epsilon above rounding noise: Adam would blow up the noise of gradients that are zero.
    common |= {"optim__grad_clip": 1.0, "optim__eps": 1e-3}
    Trainer(on_shapes(**common), tmp_path / "one", ALONE).run()
    run_two(on_shapes(run__parallel=parallel, **common), tmp_path / "two")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == list(range(1, 21))
    assert two == pytest.approx(one, abs=1e-5)
    ours, theirs = state(tmp_path / "one"), state(tmp_path / "two")
    assert {"random.0.cpu", "random.1.cpu"} <= theirs.keys()
    assert not torch.equal(theirs["random.0.cpu"], theirs["random.1.cpu"])
    for name in ours.keys() & theirs.keys():
        if name.startswith(("model.", "ema.")):
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4)
    exported = load_file(tmp_path / "two" / "model" / "model.safetensors")
    torch.testing.assert_close(exported["temp"], theirs["ema.network.temp"])


def test_sharded_run_goes_on_alone_and_back(on_shapes, tmp_path):
    common = {"optim__steps": 9, "run__log_every": 1, "optim__ema_decay": 0.9}
    Trainer(on_shapes(**common), tmp_path / "whole", ALONE).run()
    run_two(on_shapes(run__parallel="fsdp", **common), tmp_path / "moved", stop_at=3)
    Trainer(on_shapes(**common), tmp_path / "moved", ALONE).run(stop_at=6)
    run_two(on_shapes(run__parallel="ddp", **common), tmp_path / "moved")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_step_is_left_out_on_all_processes_if_one_is_not_finite(on_shapes, tmp_path):
    config = on_shapes(run__log_every=1, optim__steps=4)
    run_two(config, tmp_path, poison_at={1})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows if "loss" in row] == [0, 1, 1, 1]
    weights = [tensor for name, tensor in state(tmp_path).items() if name.startswith("model.")]
    assert all(tensor.isfinite().all() for tensor in weights)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_of_which_a_process_was_killed_goes_on_bit_equal(on_shapes, tmp_path, parallel):
    config = on_shapes(
        optim__steps=12, run__checkpoint_every=4, run__log_every=1, run__parallel=parallel, **RANDOM
    )
    run_two(config, tmp_path / "whole")
    with pytest.raises(multiprocessing.ProcessExitedException):  # pyright: ignore[reportPrivateImportUsage]
        run_two(config, tmp_path / "killed", kill_at=6)
    assert checkpoint.read_meta(checkpoint.locate(tmp_path / "killed"))["step"] == 4
    run_two(config, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_equal_state(tmp_path / "killed", tmp_path / "whole")


def test_sigterm_ends_with_a_checkpoint(on_shapes, tmp_path):
    trainer = Trainer(on_shapes(optim__steps=50), tmp_path, ALONE)
    do_step = trainer.train_step

    def train_step(batch):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return do_step(batch)

    trainer.train_step = train_step
    handler = signal.getsignal(signal.SIGTERM)
    result = trainer.run()
    assert (result.step, result.stopped_by, result.after) == (4, signal.SIGTERM, None)
    assert checkpoint.read_meta(checkpoint.locate(tmp_path))["step"] == 4
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (tmp_path / "model").exists()


def test_blocks_that_are_computed_again_change_nothing(on_shapes, tmp_path):
    Trainer(on_shapes(**RANDOM), tmp_path / "plain", ALONE).run()
    again = on_shapes(model__video__checkpoint_activations=True, **RANDOM)
    Trainer(again, tmp_path / "again", ALONE).run()
    assert_equal_state(tmp_path / "again", tmp_path / "plain")


def test_arguments_name_corpora_and_weights():
    assert parse_source("a/b#c=0.5") == SourceConfig(data="a/b#c", weight=0.5)
    assert parse_source("s3://b/x=y") == SourceConfig(data="s3://b/x=y")
    assert parse_source("a=1.2.3") == SourceConfig(data="a=1.2.3")
    with pytest.raises(ConfigError, match="above 0"):
        parse_source("a=0")
    assert parse_init("clip:ViT-B-32@openai").path == "ViT-B-32@openai"
    with pytest.raises(ConfigError, match="expected KIND:PATH"):
        parse_init("ViT-B-32")


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


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.mark.slow
def test_torchrun_trains_one_model(shapes_corpus, recipe_file, repository, tmp_path):
    command = [
        "training",
        recipe_file(),
        "--data",
        shapes_corpus,
        "--output",
        str(tmp_path / "two"),
    ]
    done = run([*TORCHRUN, *command], repository)
    assert re.search(r"^text->video R@1 [\d.]+ % \(chance [\d.]+ %, [\d.]+x\)$", done.stdout, re.M)
    assert done.stdout.count("steps done") == 1
    assert "2 process(es)" in done.stderr
    assert checkpoint.read_meta(checkpoint.locate(tmp_path / "two"))["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_killed_at_any_moment_goes_on_bit_equal(
    shapes_corpus, recipe_file, repository, tmp_path, parallel
):
    path = recipe_file(
        optim__steps=60, run__checkpoint_every=5, run__log_every=1, run__parallel=parallel, **RANDOM
    )
    command = [*TORCHRUN, "training", path, "--data", shapes_corpus, "--output"]
    run([*command, str(tmp_path / "whole")], repository)
    moments = random.Random(7)
    for _ in range(4):
        begun = len(losses(tmp_path / "killed")) if (tmp_path / "killed").exists() else 0
        with subprocess.Popen(
            [sys.executable, "-m", *command, str(tmp_path / "killed")],
            cwd=repository,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as process:
            metrics = tmp_path / "killed" / "metrics.jsonl"
            while not (metrics.exists() and len(losses(tmp_path / "killed")) != begun):
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1.5))
            workers = children(process.pid)
            if workers:
                os.kill(moments.choice(workers), signal.SIGKILL)
            process.wait()
    run([*command, str(tmp_path / "killed")], repository)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_equal_state(tmp_path / "killed", tmp_path / "whole")


def children(pid):
    path = f"/proc/{pid}/task/{pid}/children"
    return [int(child) for child in open(path).read().split()]


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
    assert headline in again.stdout


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(on_shapes, tmp_path):
    common = {"optim__steps": 5, "run__log_every": 1}
    Trainer(on_shapes(**common), tmp_path / "plain", ALONE).run()
    compiled = Trainer(on_shapes(run__compile=True, **common), tmp_path / "compiled", ALONE)
    compiled.run()
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    assert isinstance(compiled.task, nn.Module)
