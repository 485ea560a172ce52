# SPDX-License-Identifier: Apache-2.0
"""``python -m training RECIPE --dry-run``: what a recipe costs, before a GPU or a corpus is there."""

import dataclasses
import json
import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

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


def plan(config: TrainConfig, num_gpus: int, gpu_memory_gb: float) -> Plan:
    """Returns what a recipe costs.

    Args:
        config: The recipe; neither its corpora nor the weights it names are opened.
        num_gpus: Over which it is spread as ``run.parallel`` says.
        gpu_memory_gb: Of each GPU, 10**9 bytes.
    """
    rehearsal = Rehearsal(config)
    task = rehearsal.task
    every = sum(parameter.numel() for parameter in task.parameters())
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    steps = {kind: rehearsal.step(kind) for kind in config.data.mix}
    computes_again = "checkpoint_activations=True" in repr(config.model)
    model_steps = steps
    if computes_again:
        # What is computed twice is no work of the model's.
        plain = Rehearsal(config, checkpoint_activations=False)
        model_steps = {kind: plain.step(kind) for kind in config.data.mix}

    sharded = config.run.parallel == "fsdp" and num_gpus > 1
    shards = num_gpus if sharded else 1
    fixed = max(step.fixed_bytes for step in steps.values())
    if sharded:
        fixed = _gathered_bytes(task, config.run.precision == "bf16")
    memory = round(gpu_memory_gb * 1e9)
    weights, gradients = _FLOAT32 * every / shards, _FLOAT32 * trained / shards
    average = gradients if config.optim.ema_decay else 0
    resident = weights + 3 * gradients + average + rehearsal.teacher_bytes
    free = memory * _RESERVE - resident - fixed

    def step_plan(kind: MediaKind, step: Step) -> StepPlan:
        size = config.data.mix[kind].batch_size or config.data.batch_size
        return StepPlan(
            batch_size=math.ceil(size / num_gpus),
            forward_flops=model_steps[kind].forward_flops,
            training_flops=model_steps[kind].step_flops,
            activations=step.clip_bytes,
            largest_batch=max(int(free // max(step.clip_bytes, 1)), 0),
        )

    return Plan(
        model=config.model.kind,
        parameters=every,
        trained_parameters=trained,
        teacher_parameters_bytes=round(rehearsal.teacher_bytes),
        num_gpus=num_gpus,
        parallel=config.run.parallel,
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(2 * gradients),
        average=round(average),
        fixed=round(fixed),
        gpu_memory=memory,
        steps={kind: step_plan(kind, steps[kind]) for kind in config.data.mix},
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
    """Prints a recipe's plan as tables, or as JSON with all numbers in plain units."""
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
