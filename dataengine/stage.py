# SPDX-License-Identifier: Apache-2.0
"""The stage contract: a thin class over pure functions, one Outcome per input, in order.

A stage is what the runner hosts in an actor. It never imports ray, never sees a cluster, and
can be run by hand::

    stage = SegmentStage(SegmentStage.Config())
    stage.setup()
    outcomes = stage.process([{"video_id": "a", "_path": "a.mp4"}])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dataengine.needs import Need

Row = dict[str, Any]
"""Column name -> plain Python value, as ``pyarrow.Table.to_pylist`` gives it."""


class Settings(BaseModel):
    """Base of every configuration: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    neutral: ClassVar[frozenset[str]] = frozenset()
    """Settings that change how something works but not what a clip holds."""

    def needs(self) -> tuple[Need, ...]:
        """Returns what must be there before these settings can run; nested ones speak for themselves."""
        return ()


class Resources(Settings):
    """What one actor of a stage asks of the cluster, and how many actors there may be."""

    num_cpus: float = Field(default=1.0, gt=0)
    """Cores an actor keeps busy; scaled down on a machine too small for the whole pipeline."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs an actor holds; may be a fraction."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Heap an actor reserves for scheduling; None reserves nothing."""
    min_actors: int = Field(default=1, ge=1)
    """Actors that are always up."""
    max_actors: int | None = Field(default=None, ge=1)
    """Most actors to scale to; None means as many as the cluster's cores (or GPUs) allow."""
    batch_size: int = Field(default=16, ge=1)
    """Rows handed to ``process`` at a time."""
    colocate: bool = False
    """Runs in the actor of the stage before: for stages that are cheap, or need its local files."""

    @model_validator(mode="after")
    def _ordered(self) -> "Resources":
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) < min_actors ({self.min_actors})")
        return self


@dataclass(frozen=True, slots=True)
class Kept:
    """An input that goes on, as one row, or as many when a video becomes clips.

    Each row holds only columns of ``Stage.outputs``; all other columns of the input are carried
    over by the runner, and an output that a row does not mention keeps its old value, null if it
    had none. A row may also hold ``provenance``: a list of dicts (see `provenance`) that replace
    the entries of the same columns.
    """

    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """An input that ends here, with a snake_case reason and one line of detail for the ledger.

    ``retryable`` says that a later attempt may succeed (a time-out, a full server): the video
    ends as ``failed`` instead of ``dropped``. ``columns`` are those of ``Stage.outputs`` that became
    known nevertheless, such as the length of a video without clips.
    """

    reason: str
    detail: str = ""
    retryable: bool = field(default=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


Outcome = Kept | Drop


class Stage:
    """One room of the corridor. Subclasses fill in what is declared here; nothing is inherited.

    The constructor must be cheap and the instance picklable; models load in `setup`, which runs
    once on the actor. `process` returns one Outcome per input, in order. A bad item is a `Drop`;
    an exception that leaves `process` is a programming error and stops the run.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    """Columns that `process` reads. Columns starting with ``_`` travel but are never stored."""
    outputs: ClassVar[pa.Schema]
    """Columns that `process` may write."""

    class Config(Settings):
        """Settings of a stage; subclasses add theirs."""

        neutral: ClassVar[frozenset[str]] = frozenset({"resources"})

        resources: Resources = Resources()
        """What an actor of this stage needs."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def setup(self) -> None:
        """Loads models and opens what the actor keeps."""

    def process(self, batch: Sequence[Row]) -> Sequence[Outcome]:
        """Turns a batch of rows into one Outcome each, in the same order."""
        raise NotImplementedError


def provenance(
    column: str,
    model: str,
    revision: str = "",
    prompt_hash: str | None = None,
    *,
    input_hash: str | None = None,
    note: str | None = None,
) -> dict[str, str | None]:
    """Returns one entry of the ``provenance`` column: who wrote ``column`` of this row.

    Args:
        column: Of the clip.
        model: Its id.
        revision: Of the model.
        prompt_hash: SHA-256 of the prompt file.
        input_hash: `records.digest` of the frames that the model was shown.
        note: What was unusual: ``failed:<reason>`` for a column that is empty because its model failed,
            ``no_sound``, ``template:<reason>`` for a fallback; docs/annotation.md lists them all.
    """
    return {
        "column": column,
        "model": model,
        "revision": revision,
        "prompt_hash": prompt_hash,
        "input_hash": input_hash,
        "note": note,
    }
