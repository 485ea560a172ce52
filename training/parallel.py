# SPDX-License-Identifier: Apache-2.0
"""How a task is spread over processes: DDP, or FSDP2 whose weights are shards.

The only module that names either. Under FSDP2 (``torch.distributed.fsdp.fully_shard``) every block
of `Task.blocks` and what is left at the root are gathered when they are needed. Parameters that are
scalars, such as a temperature, cannot be sharded: every process keeps them whole.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from training.config import TrainConfig
from training.distributed import World, any_rank
from training.models.task import Task

_EVALUATED = ("encode_video", "encode_text", "video_tokens", "text_states", "match")
"""Methods of a task that evaluation calls instead of its forward."""


def spread(task: Task, config: TrainConfig, world: World) -> nn.Module:
    """Moves a task to its device, spreads it in place, and returns what the training step calls.

    Args:
        task: On the CPU, with the same weights in every process.
        config: The recipe; ``run.parallel``, ``run.precision`` and ``run.compile`` are read.
        world: This process among all. Alone, nothing is spread.
    """
    if config.run.compile:
        for block in task.blocks():
            # Only what a block computes, not its hooks: FSDP's gather weights, and run in between.
            block.forward = torch.compile(block.forward)
    if world.size == 1:
        return task.to(world.device)
    if config.run.parallel == "fsdp":
        return _shard(task, config, world)
    task.to(world.device)
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        task,
        device_ids=device_ids,
        # Models have no buffers that training changes.
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        # Steps of stage 2 differ in what they use: sound has an encoder of its own.
        find_unused_parameters=config.model.kind == "internvideo2_stage2",
    )


def _shard(task: Task, config: TrainConfig, world: World) -> nn.Module:
    scalars = {parameter for parameter in task.parameters() if parameter.ndim == 0}
    # Weights stay float32; what is gathered and computed with is bfloat16. Inputs are left to
    # autocast, so that the residual stream is as wide as it is without sharding.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.run.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in (*task.blocks(), task):
        inside = {parameter for parameter in scalars if _holds(module, parameter)}
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=inside)
    for scalar in scalars:
        scalar.data = scalar.data.to(world.device)
    for name in _EVALUATED:
        if hasattr(task, name):
            register_fsdp_forward_method(task, name)
    return task


def _holds(module: nn.Module, parameter: nn.Parameter) -> bool:
    return any(parameter is own for own in module.parameters())


def average_scalar_gradients(task: Task) -> None:
    """Averages over processes the gradients that FSDP does not: those of scalars."""
    if not isinstance(task, FSDPModule):
        return
    for parameter in task.parameters():
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def clip_gradients(task: Task, limit: float) -> torch.Tensor:
    """Scales all gradients so that their norm over all weights is at most ``limit``.

    Args:
        task: After the backward pass.
        limit: Largest norm; 0 leaves the gradients as they are.

    Returns:
        The norm before, a scalar equal on all processes; not finite if any gradient is not.
    """
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    sharded = [grad.to_local() for grad in gradients if isinstance(grad, DTensor)]
    whole = [grad for grad in gradients if not isinstance(grad, DTensor)]
    device = gradients[0].device
    squared = _squared_norm(sharded, device)
    if sharded:
        dist.all_reduce(squared)
    norm = (squared + _squared_norm(whole, device)).sqrt()
    if limit:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*sharded, *whole], factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _squared_norm(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()  # pyright: ignore[reportPrivateImportUsage]


def is_finite(task: Task, averaged: Iterable[torch.Tensor] = ()) -> bool:
    """Returns whether all weights are, on all processes; every process must call it.

    Args:
        task: Its weights are looked at.
        averaged: And these, where there is a running average.
    """
    parts = (local(tensor.detach()) for tensor in (*task.parameters(), *averaged))
    # A process may have no part of a tensor.
    weights = [part for part in parts if part.numel()]
    norms = torch.stack(torch._foreach_norm(weights, torch.inf))  # pyright: ignore[reportPrivateImportUsage]
    return not any_rank((~torch.isfinite(norms.max())).float().reshape(1))[0]


@contextmanager
def gathered(task: Task) -> Iterator[None]:
    """Inside, every process holds all weights, so that they need not call the task in step.

    Evaluation deals clips out unevenly. Weights are held in the precision they are computed with.
    """
    sharded = [module for module in task.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            # The root is needed again by the backward pass at once; the others are not.
            module.set_reshard_after_forward(module is not task, recurse=False)
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process' shard of a tensor, the tensor itself if it is whole; memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(state: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Returns tensors put together from their shards, on the CPU; empty but in the main process.

    Every process must call it.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole
