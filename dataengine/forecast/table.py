# SPDX-License-Identifier: Apache-2.0
"""A forecast as a person reads it: two tables and what they rest on."""

from rich.console import Console
from rich.table import Table

from dataengine.forecast.result import Forecast, range_text
from dataengine.prefetch import size_text
from dataengine.progress import duration

_LABELS = {
    "cpu_s": "CPU",
    "gpu_s": "GPU",
    "setup_s": "set-up of actors",
    "wall_s": "time on that cluster",
    "videos_kept": "videos kept",
    "videos_dropped": "videos dropped",
    "videos_failed": "videos failed",
    "clips": "clips",
    "clips_s": "hours of video kept",
    "shard_bytes": "shards",
    "download_bytes": "downloads",
}


def show(forecast: Forecast, console: Console) -> None:
    """Prints a forecast as two tables and what it rests on."""
    stages = Table(box=None, pad_edge=False, header_style="bold")
    stages.add_column("stage")
    for name in ("CPU", "GPU", "actors", "set-up", "dropped", "bytes out", "time alone"):
        stages.add_column(name, justify="right")
    for stage in forecast.stages:
        stages.add_row(
            stage.stage,
            range_text(stage.cpu_s, "cpu_s"),
            range_text(stage.gpu_s, "gpu_s") if stage.gpu_s.value else "-",
            str(stage.num_actors),
            f"{stage.setup_s:.1f} s",
            range_text(stage.dropped, "clips") if stage.dropped.value else "-",
            size_text(round(stage.bytes_out)),
            range_text(stage.eta_s, "wall_s"),
        )
    console.print(stages)
    console.print()
    totals = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    for name, total in forecast.totals.items():
        if total.value or total.high:
            totals.add_row(_LABELS[name], range_text(total, name))
    for name, total in forecast.losses.items():
        totals.add_row(f"  ended at {name}", range_text(total, "videos_dropped"))
    console.print(totals)
    refused = f", {forecast.num_refused:,} more refused" if forecast.num_refused else ""
    console.print(
        f"\n{forecast.num_sources:,} sources{refused}; {forecast.num_sampled:,} were run in "
        f"{duration(forecast.sample_s)} (seed {forecast.seed})\n"
        f"Cluster: {forecast.num_cpus:g} CPUs, {forecast.num_gpus:g} GPUs. "
        f"Bottleneck: {forecast.bottleneck}.",
        highlight=False,
    )
    for line in forecast.assumptions:
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)
