# SPDX-License-Identifier: Apache-2.0
"""``python -m training RECIPE --dry-run``: what a recipe costs, before a GPU or a corpus is there."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dataengine.errors import ConfigError
from training.config import MediaKind, TrainConfig
from training.console import say
from training.rehearsal import Rehearsal, Step

_RESERVE = 0.9
"""Share of a GPU's memory that is planned with; the rest is CUDA's context, NCCL, fragmentation."""

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Plan:
    """What a recipe costs. Memory is in bytes, and of one GPU."""

    model: str
    parameters: int
    trained_parameters: int
    teacher_parameters_bytes: int
    """Frozen networks beside the model, whole on every GPU."""
    num_gpus: int
    parallel: str
    weights: int
    gradients: int
    optimizer: int
    average: int
    fixed: int
    """Held in a step whatever the batch: weights brought to bfloat16, or gathered by FSDP."""
    gpu_memory: int
    steps: dict[MediaKind, "StepPlan"]

    @property
    def resident(self) -> int:
        """Held between steps."""
        parts = self.weights, self.gradients, self.optimizer, self.average
        return sum(parts) + self.teacher_parameters_bytes


@dataclass(frozen=True)
class StepPlan:
    """Steps of one kind of media."""

    batch_size: int
    """Of the recipe, per GPU; the last GPU may have fewer."""
    forward_flops: float
    """Of a clip, frozen teachers included; a multiplication with its addition is two."""
    training_flops: float
    """Forward and backward; what checkpointed activations compute again not included."""
    activations: float
    """Of a clip: the most that a step holds for each further one."""
    largest_batch: int
    """Clips per GPU that fit; 0 if not even one does."""
    gpus_needed: int
    """That hold the recipe's batch: the first of ``num_gpus`` and the powers of two above it that do;
    0 if none does."""


class _Held(NamedTuple):
    """Bytes on each GPU that do not depend on the batch, as in `Plan`."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    teachers: float
    fixed: float


@dataclass(frozen=True)
class _Counted:
    """A recipe's steps, counted once for any number of GPUs."""

    config: TrainConfig
    parameters: int
    trained_parameters: int
    teacher_bytes: float
    gathered_bytes: float
    """What FSDP holds whole at once."""
    steps: dict[MediaKind, Step]
    model_steps: dict[MediaKind, Step]
    """The same without what checkpointed activations compute again."""

    def held(self, num_gpus: int) -> _Held:
        sharded = self.config.run.parallel == "fsdp" and num_gpus > 1
        shards = num_gpus if sharded else 1
        gradients = _FLOAT32 * self.trained_parameters / shards
        unsharded_fixed = max(step.fixed_bytes for step in self.steps.values())
        return _Held(
            weights=_FLOAT32 * self.parameters / shards,
            gradients=gradients,
            optimizer=2 * gradients,
            average=gradients if self.config.optim.ema_decay else 0,
            teachers=self.teacher_bytes,
            fixed=self.gathered_bytes if sharded else unsharded_fixed,
        )

    def recipe_batch(self, kind: MediaKind) -> int:
        """Returns the clips of a step over all GPUs."""
        return self.config.data.mix[kind].batch_size or self.config.data.batch_size

    def batches(self, kind: MediaKind, num_gpus: int, memory: int) -> tuple[int, int]:
        """Returns the clips per GPU: the recipe's, and the most that fit."""
        free = memory * _RESERVE - sum(self.held(num_gpus))
        largest = int(free // max(self.steps[kind].clip_bytes, 1))
        return math.ceil(self.recipe_batch(kind) / num_gpus), max(largest, 0)

    def gpus_needed(self, kind: MediaKind, num_gpus: int, memory: int) -> int:
        """Returns the first of ``num_gpus`` and larger powers of two that hold the batch, or 0."""
        tried = num_gpus
        # More GPUs than clips would stand idle.
        while tried <= max(num_gpus, self.recipe_batch(kind)):
            batch_size, largest = self.batches(kind, tried, memory)
            if batch_size <= largest:
                return tried
            tried = 1 << tried.bit_length()
        return 0


def plan(config: TrainConfig, num_gpus: int, gpu_memory_gb: float) -> Plan:
    """Returns what a recipe costs.

    Args:
        config: The recipe; neither its corpora nor the weights it names are opened.
        num_gpus: Over which it is spread as ``run.parallel`` says.
        gpu_memory_gb: Of each GPU, 10**9 bytes.

    Raises:
        ConfigError: If there is no GPU, or none with memory.
    """
    _check(num_gpus, gpu_memory_gb)
    counted = _count(config)
    memory = round(gpu_memory_gb * 1e9)
    held = counted.held(num_gpus)

    def step_plan(kind: MediaKind) -> StepPlan:
        batch_size, largest = counted.batches(kind, num_gpus, memory)
        return StepPlan(
            batch_size=batch_size,
            forward_flops=counted.model_steps[kind].forward_flops,
            training_flops=counted.model_steps[kind].step_flops,
            activations=counted.steps[kind].clip_bytes,
            largest_batch=largest,
            gpus_needed=counted.gpus_needed(kind, num_gpus, memory),
        )

    return Plan(
        model=config.model.kind,
        parameters=counted.parameters,
        trained_parameters=counted.trained_parameters,
        teacher_parameters_bytes=round(held.teachers),
        num_gpus=num_gpus,
        parallel=config.run.parallel,
        weights=round(held.weights),
        gradients=round(held.gradients),
        optimizer=round(held.optimizer),
        average=round(held.average),
        fixed=round(held.fixed),
        gpu_memory=memory,
        steps={kind: step_plan(kind) for kind in config.data.mix},
    )


def _check(num_gpus: int, gpu_memory_gb: float) -> None:
    if num_gpus < 1:
        raise ConfigError(f"--num-gpus {num_gpus} is less than 1", "how many GPUs to plan for")
    if not 0 < gpu_memory_gb < math.inf:
        raise ConfigError(
            f"--gpu-memory-gb {gpu_memory_gb:g} is no size of a memory", "of one GPU, such as 80"
        )


def _count(config: TrainConfig) -> _Counted:
    rehearsal = Rehearsal(config)
    task = rehearsal.task
    steps: dict[MediaKind, Step] = {kind: rehearsal.step(kind) for kind in config.data.mix}
    model_steps: dict[MediaKind, Step] = steps
    if "checkpoint_activations=True" in repr(config.model):
        # What is computed twice is no work of the model's.
        plain = Rehearsal(config, checkpoint_activations=False)
        model_steps = {kind: plain.step(kind) for kind in config.data.mix}
    return _Counted(
        config=config,
        parameters=sum(p.numel() for p in task.parameters()),
        trained_parameters=sum(p.numel() for p in task.parameters() if p.requires_grad),
        teacher_bytes=rehearsal.teacher_bytes,
        gathered_bytes=_gathered_bytes(task, config.run.precision == "bf16"),
        steps=steps,
        model_steps=model_steps,
    )


def _gathered_bytes(task: torch.nn.Module, is_bf16: bool) -> float:
    """Returns what FSDP holds whole at once: the root's weights, two blocks, a block's gradients."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in task.blocks()]  # pyright: ignore[reportCallIssue]
    root = sum(p.numel() for p in task.parameters()) - sum(blocks)
    largest = max(blocks, default=0)
    size = _BFLOAT16 if is_bf16 else _FLOAT32
    # Gradients are computed in the precision of the weights and summed up in float32.
    return size * (root + 2 * largest) + (size + _FLOAT32) * max(root, largest)


def print_plan(
    config: TrainConfig, num_gpus: int, gpu_memory_gb: float, *, as_json: bool = False
) -> None:
    """Prints a recipe's plan as tables, or as JSON with all numbers in plain units.

    Raises:
        ConfigError: If there is no GPU, or none with memory.
    """
    _check(num_gpus, gpu_memory_gb)
    sys.stderr.write(f"counting a step of {config.model.kind}, up to a minute or two\n")
    sys.stderr.flush()
    made = plan(config, num_gpus, gpu_memory_gb)
    if as_json:
        say(json.dumps(dataclasses.asdict(made) | {"resident": made.resident}, indent=2))
        return
    console = Console()
    say(
        f"{made.model}: {made.parameters / 1e6:,.1f} M parameters, "
        f"{made.trained_parameters / 1e6:,.1f} M of them trained; "
        f"{made.num_gpus} GPUs of {made.gpu_memory / 1e9:g} GB, {made.parallel}"
    )
    memory = Table("held on each GPU", "GB")
    memory.columns[1].justify = "right"
    for name, size in (
        ("weights, float32", made.weights),
        ("gradients", made.gradients),
        ("AdamW's moments", made.optimizer),
        ("running average", made.average),
        ("teachers", made.teacher_parameters_bytes),
        ("in a step, whatever the batch", made.fixed),
    ):
        if size:
            memory.add_row(name, f"{size / 1e9:,.2f}")
    console.print(memory)
    steps = Table(
        "a clip of", "forward", "forward + backward", "activations", "batch per GPU", "largest"
    )
    for column in steps.columns[1:]:
        column.justify = "right"
    for kind, step in made.steps.items():
        steps.add_row(
            kind,
            f"{step.forward_flops / 1e9:,.1f} GFLOPs",
            f"{step.training_flops / 1e9:,.1f} GFLOPs",
            f"{step.activations / 1e6:,.1f} MB",
            str(step.batch_size),
            str(step.largest_batch) if step.largest_batch else "none",
        )
    console.print(steps)
    say(
        "batch per GPU: the recipe's over these GPUs; largest: what fits with a tenth of memory left"
    )
    for kind, step in made.steps.items():
        if step.gpus_needed != made.num_gpus:
            say(_too_large(kind, step, made.parallel))


def _too_large(kind: MediaKind, step: StepPlan, parallel: str) -> str:
    most = step.largest_batch or "none"
    line = f"{kind} does not fit: {step.batch_size} clips a GPU, {most} at most; "
    if step.gpus_needed:
        return f"{line}{step.gpus_needed} GPUs hold the batch"
    return f"{line}more GPUs do not help" + (
        "" if parallel == "fsdp" else ", run.parallel=fsdp may: it shares the weights out"
    )
