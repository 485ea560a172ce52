# SPDX-License-Identifier: Apache-2.0
"""One process or many: start, wrap, gather. The only module that names DDP."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process logs, evaluates and writes."""
        return self.rank == 0


@contextmanager
def start() -> Iterator[World]:
    """Joins the processes that torchrun started, or stands alone; leaves them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World) -> nn.Module:
    """Returns the model as the training step calls it; gradients are averaged over processes."""
    if world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    # Models have no buffers that training changes.
    return DistributedDataParallel(
        model, device_ids=device_ids, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def world_size() -> int:
    """Returns the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process' number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Concatenation over ranks whose backward sums what every rank asks of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.num_rows = len(local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows]


def gather(local: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all ranks in rank order; differentiable. Ranks give equal shapes."""
    if world_size() == 1:
        return local
    if local.dtype == torch.bool:  # gloo does not carry it
        return gather(local.to(torch.uint8)).bool()
    return _Gather.apply(local)  # pyright: ignore[reportReturnType]  apply is untyped


def gather_local(local: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all ranks; only this rank's own send a gradient back, as published."""
    everyone = gather(local.detach())
    if world_size() == 1:
        return local
    start = rank() * len(local)
    return torch.cat([everyone[:start], local, everyone[start + len(local) :]])


def gather_objects(value: Any) -> list[Any]:
    """Returns every rank's value in rank order; for small things and uneven ones."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every process is here."""
    if world_size() > 1:
        dist.barrier()
