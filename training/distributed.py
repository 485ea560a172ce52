# SPDX-License-Identifier: Apache-2.0
"""One process or many: start, gather, agree. How a model is spread is `training.parallel`'s."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dataengine.errors import EngineError

T = TypeVar("T")


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
    """Joins the processes that torchrun started, or stands alone; leaves them at the end.

    Where something else has joined them already, as Ray Train does, it stays theirs to leave.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), device)
        return
    if size == 1:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


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


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Returns the mean over ranks of scalars that every rank has under the same names."""
    stacked = torch.stack([value.detach().double() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


def any_rank(flags: torch.Tensor) -> list[bool]:
    """Returns for each flag whether any rank raised it; float, 0 or 1, on the rank's device."""
    if world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [flag > 0 for flag in flags.tolist()]


def on_main(work: Callable[[], T]) -> T:
    """Runs something in the first process and returns its answer in every one.

    Raises:
        EngineError: In every process, if the first raised it: none is left waiting.
    """
    answer: Any = None
    if rank() == 0:
        try:
            answer = work()
        except EngineError as error:
            error.is_shared = world_size() > 1
            answer = error
    answer = gather_objects(answer)[0]
    if isinstance(answer, EngineError):
        raise answer
    return answer


def main_first(work: Callable[[], T]) -> T:
    """Runs something in the first process and then, if it went well there, in all others.

    Raises:
        EngineError: As `on_main`.
    """
    done: list[T] = []
    on_main(lambda: done.append(work()))
    return done[0] if done else work()


def barrier() -> None:
    """Waits until every process is here."""
    if world_size() > 1:
        dist.barrier()
