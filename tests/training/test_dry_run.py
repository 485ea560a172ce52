# SPDX-License-Identifier: Apache-2.0
import json
import math
import subprocess
import sys

import pytest
import torch

from dataengine.errors import ConfigError
from training.__main__ import main
from training.config import RECIPES_DIR, inputs_of, load_recipe
from training.data.batch import Inputs, Pairs
from training.dry_run import _count, plan, print_plan
from training.flops import peak_flops
from training.models import build_task
from training.rehearsal import Rehearsal


@pytest.fixture
def small(recipe):
    """Returns a function: a ViCLIP whose shape makes sums easy."""

    def make(**overrides):
        video = {"image_size": 32, "patch_size": 16, "num_frames": 2, "width": 64, "layers": 3}
        return recipe(
            model__video={**video, "heads": 2, **overrides.pop("video", {})},
            model__text={"context_length": 8, "width": 32, "layers": 1, "heads": 2},
            **overrides,
        )

    return make


def test_flops_are_those_of_the_matrices(small):
    # N tokens, D width: 24 N D^2 of a block's matrices and 4 N^2 D of its attention.
    def block(tokens, width):
        return 24 * tokens * width**2 + 4 * tokens**2 * width

    patches = 2 * 8 * (3 * 16 * 16) * 64  # 8 patches of 2 frames
    expected = patches + 3 * block(9, 64) + block(8, 32) + 2 * 64 * 16 + 2 * 32 * 16
    rehearsed = Rehearsal(small()).step("video")
    # The similarities of the batch are not a clip's.
    assert rehearsed.forward_flops == pytest.approx(expected, rel=2e-3)
    assert 2.7 < rehearsed.step_flops / rehearsed.forward_flops < 3.1


def test_masked_patches_cost_nothing(small):
    whole = Rehearsal(small()).step("video")
    masked = Rehearsal(small(video={"mask_ratio": 0.75})).step("video")
    assert masked.forward_flops < 0.6 * whole.forward_flops
    assert masked.clip_bytes < 0.6 * whole.clip_bytes


def held_by_torch(config, size):
    """The most that a real step holds beside weights, by torch's own accounting of allocations."""
    task, spec = build_task(config), inputs_of(config.model)
    task.train()
    numbers = torch.arange(size)
    inputs = Inputs(
        "video",
        torch.zeros(size, spec.num_frames, 3, spec.image_size, spec.image_size),
        None,
        torch.ones(size, spec.context_length, dtype=torch.int64),
        Pairs(torch.ones(size, dtype=torch.bool), numbers, numbers),
    )
    dtype = {"fp32": None, "bf16": torch.bfloat16}[config.run.precision]
    with torch.profiler.profile(profile_memory=True) as profiler:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = task(inputs).losses["vtc"]
        loss.backward()
    held = most = 0
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    memory = [event for event in events if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, held)
    return most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True])
def test_activations_are_what_torch_allocates(small, precision, again):
    # Wide enough in tokens that a clip outweighs gradients, which torch's sum holds too.
    video = {"image_size": 128, "num_frames": 4, "checkpoint_activations": again, "layers": 6}
    config = small(video=video, run__precision=precision)
    told = Rehearsal(config).step("video").clip_bytes
    real = (held_by_torch(config, 16) - held_by_torch(config, 8)) / 8
    assert told == pytest.approx(real, rel=0.1)


def test_computing_again_saves_memory_and_is_no_work_of_the_model(small):
    video = {"layers": 8, "image_size": 64}
    plain = plan(small(video=video), 1, 80)
    again = plan(small(video={**video, "checkpoint_activations": True}), 1, 80)
    ours, theirs = again.steps["video"], plain.steps["video"]
    assert ours.activations < 0.5 * theirs.activations
    assert ours.training_flops == theirs.training_flops
    assert ours.largest_batch > theirs.largest_batch


def test_memory_of_weights_is_counted_and_shared_out(small):
    one = plan(small(model__freeze_text=True, optim__ema_decay=0.9), 4, 80)
    task = build_task(small(model__freeze_text=True))
    every = sum(p.numel() for p in task.parameters())
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert (one.parameters, one.trained_parameters) == (every, trained)
    assert one.trained_parameters < one.parameters
    assert (one.weights, one.gradients) == (4 * every, 4 * trained)
    assert (one.optimizer, one.average) == (8 * trained, 4 * trained)
    assert one.resident == 4 * every + 16 * trained
    shared = plan(small(model__freeze_text=True, run__parallel="fsdp"), 4, 80)
    assert shared.weights == every
    assert shared.optimizer == 2 * trained
    assert one.steps["video"].batch_size == 2  # 8 over 4 GPUs


def test_nothing_fits_into_too_small_a_gpu(small):
    assert plan(small(), 1, 0.001).steps["video"].largest_batch == 0


def test_plan_is_told_without_data(tmp_path, capsys):
    assert main(["viclip_tiny", "--dry-run", "--json", "--num-gpus", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "viclip"
    assert told["steps"]["video"]["batch_size"] == 32
    assert main(["viclip_tiny", "--dry-run"]) == 0
    assert "GFLOPs" in capsys.readouterr().out


def test_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("num_gpus", "memory_gb", "said"),
    [
        (0, 80, "--num-gpus 0"),
        (-2, 80, "--num-gpus -2"),
        (8, 0, "--gpu-memory-gb 0"),
        (8, -1, "--gpu-memory-gb -1"),
        (8, math.nan, "--gpu-memory-gb nan"),
        (8, math.inf, "--gpu-memory-gb inf"),
    ],
)
def test_gpus_that_cannot_be_are_refused(small, num_gpus, memory_gb, said):
    for ask in (plan, print_plan):
        with pytest.raises(ConfigError, match=said):
            ask(small(), num_gpus, memory_gb)


def memory_for(counted, clips):
    """GB of a GPU that holds some clips beside what a step always holds."""
    (step,) = counted.steps.values()
    return (sum(counted.held(1)) + (clips + 0.5) * step.clip_bytes) / 0.9 / 1e9


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gpus_that_hold_the_batch_are_counted(small, parallel, monkeypatch):
    config = small(run__parallel=parallel, data__batch_size=512)
    counted = _count(config)
    monkeypatch.setattr("training.dry_run._count", lambda config: counted)
    memory_gb = memory_for(counted, 100)
    found = {n: plan(config, n, memory_gb).steps["video"] for n in (1, 2, 3, 4, 8, 16)}
    fitting = {n for n, step in found.items() if step.batch_size <= step.largest_batch}
    assert fitting in ({8, 16}, {4, 8, 16})
    for num_gpus in (1, 2, 3):
        assert found[num_gpus].gpus_needed == min(fitting)
    assert [found[n].gpus_needed for n in sorted(fitting)] == sorted(fitting)
    # 512 clips over four GPUs are 128, over eight 64; shared weights leave room for more.
    assert min(fitting) == {"ddp": 8, "fsdp": 4}[parallel]


def test_a_batch_that_does_not_fit_is_said(small, capsys, monkeypatch):
    config = small(data__batch_size=512)
    counted = _count(config)
    monkeypatch.setattr("training.dry_run._count", lambda config: counted)
    print_plan(config, 1, memory_for(counted, 100))
    printed = capsys.readouterr()
    assert "video does not fit: 512 clips a GPU, 100 at most; 8 GPUs hold the batch" in printed.out
    assert printed.err == "counting a step of viclip, up to a minute or two\n"
    print_plan(config, 1, 0.001)
    expected = "video does not fit: 512 clips a GPU, none at most; more GPUs do not help"
    assert expected in capsys.readouterr().out
    print_plan(config, 3, 80)
    assert "does not fit" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_every_recipe_has_a_plan(name):
    command = [sys.executable, "-m", "training", name, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert set(told["steps"]) == set(load_recipe(name).data.mix)
    for step in told["steps"].values():
        assert 0 < step["forward_flops"] < step["training_flops"]
        assert step["activations"] > 0
