# SPDX-License-Identifier: Apache-2.0
"""What a run's processes do when all of them are told to stop, as Ctrl-C and schedulers do."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from training import checkpoint

LOADS = """
import multiprocessing, sys
from training.config import load_recipe
from training.data.corpora import open_corpora

def read():
    stream = iter(open_corpora(load_recipe(sys.argv[1], [])).train_loader())
    next(stream)
    return stream

stream = read()
assert len(multiprocessing.active_children()) == 2
"""
ENDS = {
    "dropped": "del stream; assert not multiprocessing.active_children()",
    "held": "",
    "held by an exception": "raise KeyError('the trainer fails')",
}


@pytest.fixture
def write_recipe(recipe, shapes_corpus, tmp_path):
    """Returns a function: dotted overrides -> the path of a recipe that reads the shapes."""

    def write(**overrides):
        config = recipe(data__sources=[{"data": shapes_corpus}], **overrides)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return str(path)

    return write


@pytest.fixture
def start(repository):
    """Returns a function: arguments of Python -> a process that leads a group of its own."""
    started = []

    def begin(*arguments):
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def group_is_gone(group, timeout_s=20):
    """Whether no process of a group is left, at last."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint(write_recipe, start, tmp_path, number):
    recipe = write_recipe(optim__steps=100_000, run__log_every=1, data__num_workers=1)
    output = tmp_path / "out"
    run = start("-m", "training", recipe, "--output", str(output))
    metrics = output / "metrics.jsonl"
    while not (metrics.is_file() and '"loss"' in metrics.read_text()):
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    os.killpg(run.pid, number)
    errors = run.communicate(timeout=90)[1]
    assert run.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert checkpoint.read_meta(checkpoint.locate(output))["step"] >= 1
    assert group_is_gone(run.pid)


@pytest.mark.parametrize(
    "end", ["dropped", pytest.param("held", marks=pytest.mark.slow), "held by an exception"]
)
def test_readers_and_interpreter_end_however_a_loader_is_left(write_recipe, start, end):
    script = LOADS + ENDS[end]
    run = start("-c", script, write_recipe(data__num_workers=2))
    errors = run.communicate(timeout=90)[1]
    assert (run.returncode == 1) == ("exception" in end), errors
    assert "DataLoader worker" not in errors
    assert group_is_gone(run.pid)
