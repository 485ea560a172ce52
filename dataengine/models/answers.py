# SPDX-License-Identifier: Apache-2.0
"""What a model says about one item: a text with its author, or why there is none.

An item that a model fails on must cost that item alone: models answer with a `Failure` in its place
and never raise for it. `Batcher` gives the whole batch to a model and, when a GPU runs out of
memory, halves it instead of dying.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

OUT_OF_MEMORY = "out_of_memory"
BAD_OUTPUT = "bad_output"
TIMEOUT = "timeout"
REFUSED = "request_refused"


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes: model id, its revision, hash of the prompt file (None without one)."""

    model: str
    revision: str = ""
    prompt_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A text, who wrote it, and what was unusual about it (see `Failure.note`)."""

    text: str
    author: Author
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model has nothing to say about an item it was asked about.

    Attributes:
        reason: snake_case, e.g. `OUT_OF_MEMORY`, `BAD_OUTPUT`, `TIMEOUT`, `REFUSED`.
        detail: One line for the log.
    """

    reason: str
    detail: str = ""

    @property
    def note(self) -> str:
        """What the provenance of the empty column says: ``failed:<reason>``."""
        return f"failed:{self.reason}"


class Batcher:
    """Calls a model on batches that fit its memory.

    Args:
        size: Most items per call; halved for good whenever CUDA runs out of memory.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, size)

    def run(
        self, items: Sequence[Item], call: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> list[Result | Failure]:
        """Returns one result per item, in order.

        Args:
            items: Any number.
            call: Gives one result per item, in order; may raise ``torch.OutOfMemoryError``.
        """
        import torch

        results: list[Result | Failure] = []
        while len(results) < len(items):
            part = items[len(results) : len(results) + self.size]
            try:
                answers = call(part)
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                if len(part) == 1:
                    results.append(Failure(OUT_OF_MEMORY, str(error).partition("\n")[0]))
                    continue
                self.size = len(part) // 2
                logger.warning("CUDA is out of memory: batches of %d from here on", self.size)
                continue
            if len(answers) != len(part):
                raise ValueError(f"{len(answers)} answers for {len(part)} items")
            results += answers
        return results
