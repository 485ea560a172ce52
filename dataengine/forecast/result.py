# SPDX-License-Identifier: Apache-2.0
"""What a forecast says: totals with their ranges, stage by stage and in all."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dataengine.prefetch import size_text
from dataengine.progress import duration


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate; ``low`` and ``high`` are None where one video alone was measured."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage will take.

    Attributes:
        stage: Its name.
        cpu_s: CPU seconds of the work itself.
        gpu_s: GPU seconds: time at work times the GPUs its actor holds.
        busy_s: Seconds of actors at work, without waiting for a core.
        eta_s: Seconds that it needs with as many actors as the cluster has room for, all others waiting.
        setup_s: Seconds that one actor needs before it can work.
        num_actors: Actors expected while the run is at full speed.
        dropped: Videos and clips that will end there.
        bytes_in: Rows that go in, media included.
        bytes_out: Rows that come out.
    """

    stage: str
    cpu_s: Range
    gpu_s: Range
    busy_s: Range
    eta_s: Range
    setup_s: float
    num_actors: int
    dropped: Range
    bytes_in: float
    bytes_out: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run over all sources will take and give.

    Attributes:
        pipeline: Its name.
        fingerprint: Of the pipeline; what the forecast is kept under.
        made: When, UTC.
        seed: Of the draw.
        num_sources: Sources that a run would work on.
        num_refused: Further ones that the plan of a run refuses; they cost nothing.
        num_sampled: Sources that were run.
        sample_s: Seconds that the sample took.
        num_cpus: Of the cluster that is planned for.
        num_gpus: The same.
        stages: In order.
        totals: Name -> what all stages together take or give: ``cpu_s``, ``gpu_s``, ``setup_s``,
            ``wall_s``, ``videos_kept``, ``videos_dropped``, ``videos_failed``, ``clips``,
            ``clips_s``, ``shard_bytes``, ``download_bytes``.
        losses: ``stage: reason`` -> sources that will end so.
        bottleneck: What decides how long it takes.
        assumptions: What has to hold for all of this, in a few words each.
    """

    pipeline: str
    fingerprint: str
    made: str
    seed: int
    num_sources: int
    num_refused: int
    num_sampled: int
    sample_s: float
    num_cpus: float
    num_gpus: float
    stages: tuple[StagePlan, ...]
    totals: Mapping[str, Range]
    losses: Mapping[str, Range]
    bottleneck: str
    assumptions: tuple[str, ...]


def to_json(forecast: Forecast) -> bytes:
    """Returns a forecast as it is kept."""
    return json.dumps(asdict(forecast), indent=1, ensure_ascii=False).encode()


def from_json(content: dict[str, Any]) -> Forecast:
    """Returns a forecast that was kept.

    Raises:
        KeyError, TypeError, AttributeError: If another version of this program wrote it.
    """

    def ranges(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: Range(**value) if isinstance(value, dict) else value
            for name, value in mapping.items()
        }

    return Forecast(
        **{
            **content,
            "stages": tuple(StagePlan(**ranges(stage)) for stage in content["stages"]),
            "totals": ranges(content["totals"]),
            "losses": ranges(content["losses"]),
            "assumptions": tuple(content["assumptions"]),
        }
    )


def range_text(total: Range, quantity: str) -> str:
    """Returns a range as a person reads it, in units that fit the quantity."""

    def text(value: float) -> str:
        if quantity.endswith("bytes"):
            return size_text(round(value))
        if quantity == "wall_s":
            return duration(value)
        if quantity.endswith("_s"):
            return f"{value / 3600:,.3g} h" if value >= 360 else f"{value:,.3g} s"
        return f"{value:,.0f}"

    if total.low is None or total.high is None:
        return text(total.value)
    return f"{text(total.value)} ({text(total.low)} to {text(total.high)})"
