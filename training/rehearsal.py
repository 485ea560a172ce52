# SPDX-License-Identifier: Apache-2.0
"""A training step without values: how much it computes and how much it holds.

Tensors are torch's fake ones: they have a shape, a type and a device, and no memory, so that a model of
any size is rehearsed anywhere, with its real masks and under autocast. Only a model with an open_clip
teacher, which open_clip itself loads, is rehearsed with values.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from training.config import DistilConfig, MediaKind, TrainConfig, config_from_dict, inputs_of
from training.data.batch import Inputs, Pairs
from training.models import build_task
from training.models.task import Task

_FBANK = (998, 64)
"""Frames and mel bins of 10 s of sound."""

_CLIPS = 32

_LARGE = 1 << 20

_aten = torch.ops.aten


class Step(NamedTuple):
    """What a training step takes, batch by batch."""

    forward_flops: float
    """Of a clip, a multiplication with its addition being two; frozen teachers included."""
    step_flops: float
    """Of a clip, forward and backward; what checkpointed activations compute again included."""
    clip_bytes: float
    """Most memory held at once for each further clip, beside weights and gradients."""
    fixed_bytes: float
    """The same for the batch as a whole, such as weights brought to bfloat16."""


class Rehearsal:
    """A task of a recipe whose steps can be tried.

    Args:
        config: The recipe. Weights of teachers are not read.
        checkpoint_activations: Whether blocks are computed again in the backward pass; None leaves it
            to the recipe.

    Attributes:
        task: Of fake tensors.
        teacher_bytes: Frozen networks that are no part of the task, as the step holds them.
    """

    def __init__(self, config: TrainConfig, checkpoint_activations: bool | None = None) -> None:
        self._config = _without_files(config, checkpoint_activations)
        self._spec = inputs_of(config.model)
        model = self._config.model
        reads = isinstance(model, DistilConfig) and model.clip_teacher.kind == "open_clip"
        self._fake = nullcontext() if reads else FakeTensorMode(allow_non_fake_inputs=True)
        self._held = _Held()
        with torch.random.fork_rng(devices=[]), self._fake, self._held, _undrawn():
            self.task: Task = build_task(self._config)
        self.task.train()
        self._own_bytes = sum(
            tensor.numel() * tensor.element_size() for tensor in self.task.state_dict().values()
        )
        self.teacher_bytes = self._measure_teachers()

    def flops(self, kind: MediaKind) -> float:
        """Returns what a step computes for a clip, forward and backward."""
        forward, backward = _counter(), _counter()
        self._try(kind, 2, forward, backward)
        return (forward.get_total_flops() + backward.get_total_flops()) / 2

    def step(self, kind: MediaKind) -> Step:
        """Returns what steps of a kind take, from batches of 32 clips and of half as many."""
        # The first step also brings teachers to the precision they run in; what counts operations
        # holds on to tensors.
        forward, backward = _counter(), _counter()
        self._try(kind, 2, forward, backward)
        self.teacher_bytes = self._measure_teachers()
        # In small batches other moments of the step hold the most than in large ones.
        half, whole = self._try(kind, _CLIPS // 2), self._try(kind, _CLIPS)
        per_clip = (whole - half) / (_CLIPS - _CLIPS // 2)
        flops = forward.get_total_flops(), backward.get_total_flops()
        fixed = max(whole - _CLIPS * per_clip, 0)
        return Step(flops[0] / 2, sum(flops) / 2, per_clip, fixed)

    def _measure_teachers(self) -> int:
        if not isinstance(self._config.model, DistilConfig):
            return 0
        gc.collect()
        return max(self._held.bytes - self._own_bytes, 0)

    def _try(
        self,
        kind: MediaKind,
        size: int,
        forward: AbstractContextManager[Any] | None = None,
        backward: AbstractContextManager[Any] | None = None,
    ) -> float:
        """Returns the most bytes held in a step beside what was held before."""
        task, held = self.task, self._held
        dtype = {"fp32": None, "bf16": torch.bfloat16}[self._config.run.precision]
        trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(held.leave_out_gradient) for p in trained]
        with torch.random.fork_rng(devices=[]), self._fake, held, _undrawn():
            inputs = self._inputs(kind, size)
            gc.collect()
            before = held.restart()
            with (
                forward or nullcontext(),
                torch.autocast("cpu", dtype, enabled=dtype is not None),
            ):
                losses = task(inputs).losses
                loss = torch.stack([value.float() for value in losses.values()]).sum()
            with backward or nullcontext():
                loss.backward()
            most = held.most - before
        for hook in hooks:
            hook.remove()
        task.zero_grad(set_to_none=True)
        return most

    def _inputs(self, kind: MediaKind, size: int) -> Inputs:
        spec = self._spec
        num_frames = 1 if kind == "image" else spec.num_frames
        shape = size, num_frames, 3, spec.image_size, spec.image_size
        numbers = torch.arange(size)
        return Inputs(
            kind,
            None if kind == "audio" else torch.zeros(shape),
            torch.ones(size, *_FBANK) if kind in ("audio", "audio_video") else None,
            torch.ones(size, spec.context_length, dtype=torch.int64),
            Pairs(torch.ones(size, dtype=torch.bool), numbers, numbers),
        )


class _Held(TorchDispatchMode):
    """Adds up the memory of all tensors that exist, without gradients of parameters.

    It also answers what without values nobody knows. A mask chooses half of its elements, the share of
    words that InternVideo2 hides; a number that code asks for is large: how long is the longest text?
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> int:
        """Forgets the most that was held; returns what is held now."""
        self.most = self.bytes
        return self.bytes

    def leave_out_gradient(self, parameter: torch.Tensor) -> None:
        """Counts a parameter's gradient no longer."""
        if parameter.grad is not None:
            self._forget(id(parameter.grad.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _half(index)])
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else _LARGE
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self.bytes += size
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)


def _half(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Returns the places that a mask without values chooses; another index as it is."""
    if index is None or index.dtype != torch.bool or not isinstance(index, FakeTensor):
        return [index]
    places = torch.zeros(index.numel() // 2, dtype=torch.int64)
    return [places] * index.ndim


def _counter() -> FlopCounterMode:
    # The kernel of CPUs does what the counted ones of GPUs do.
    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    on_cpu = {
        _aten._scaled_dot_product_flash_attention_for_cpu: attention,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


@contextmanager
def _undrawn() -> Iterator[None]:
    """Inside, weights without values are neither drawn by looking at them nor swapped by module."""

    def leave(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    def convert(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        for part in module.modules():
            for name, own in part._parameters.items():
                if own is not None:
                    converted = own.detach().to(*args, **kwargs)
                    part._parameters[name] = nn.Parameter(converted, own.requires_grad)
        return module

    with patch.object(nn.init, "trunc_normal_", leave), patch.object(nn.Module, "to", convert):
        yield


def _without_files(config: TrainConfig, checkpoint_activations: bool | None) -> TrainConfig:
    """Returns the recipe with random teachers of the same shape."""
    document = config.model_dump(mode="json")

    def change(node: Any) -> None:
        if not isinstance(node, dict):
            return
        if node.get("kind") in ("internvit", "videomae", "internvideo2") and "weights" in node:
            node["weights"] = None
        if checkpoint_activations is not None and "checkpoint_activations" in node:
            node["checkpoint_activations"] = checkpoint_activations
        for child in node.values():
            change(child)

    change(document["model"])
    document["init"] = []
    return config_from_dict(document, "the rehearsal")
