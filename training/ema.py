# SPDX-License-Identifier: Apache-2.0
"""The running average of the weights that is evaluated and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training.models.task import Task
from training.parallel import local


class Average:
    """An exponential moving average of the weights that train, sharded as they are.

    ``average <- decay * average + (1 - decay) * weights`` after each step (Polyak averaging; as
    timm's ModelEma does). It starts at the first weights, so there is nothing to correct.

    Args:
        task: Already spread.
        decay: Share of the old average that is kept in a step.
    """

    def __init__(self, task: Task, decay: float) -> None:
        self._decay = decay
        self._weights = {
            name: parameter
            for name, parameter in task.named_parameters()
            if parameter.requires_grad
        }
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}
        """The average of each trained parameter."""

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights in after a step."""
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  torch's own way
            [local(tensor) for tensor in self.tensors.values()],
            [local(weight.detach()) for weight in self._weights.values()],
            1 - self._decay,
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the task has the average for weights; afterwards its own again, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            own, average = local(weight.detach()), local(self.tensors[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)
