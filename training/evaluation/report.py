# SPDX-License-Identifier: Apache-2.0
"""An evaluation on the terminal, and as a file with everything that it depends on."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.evaluation.classification import Classification
from training.evaluation.measure import Evaluated
from training.evaluation.multiple_choice import Accuracy, MeanPrecision
from training.evaluation.retrieval import CUTOFFS, Ranking, Retrieval, bootstrap

_NAMED = 5
"""Clips that could not be read which the terminal names; the file names all."""


def print_evaluated(evaluated: Evaluated) -> None:
    """Prints a table, what is missing, and one line with the number to look at, to stdout."""
    # A pipe has no width of its own, and a table that is cut says nothing.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(_table(evaluated))
    # A name may hold what rich takes for markup.
    for line in _lines(evaluated):
        console.print(line, markup=False, soft_wrap=True)


def _table(evaluated: Evaluated) -> Table:
    table = Table()
    measured = evaluated.measured
    match measured:
        case Retrieval():
            names = [f"R@{k}" for k in CUTOFFS]
            for name in ("", *names, "95 % interval", "median rank", "mean rank", "of", "queries"):
                table.add_column(name, justify="right" if name else "left")
            table.add_row("text->video", *_row(measured.text_to_video))
            table.add_row("video->text", *_row(measured.video_to_text))
            by_chance = measured.text_to_video.chance
            table.add_row("chance t->v", *(_percent(by_chance[k]) for k in CUTOFFS), style="dim")
        case Classification():
            for name in ("top-1", "95 %", "top-5", "mean", "chance", "classes", "clips"):
                table.add_column(name, justify="right")
            table.add_row(
                _percent(measured.top1), _interval(bootstrap(measured.hits)),
                _percent(measured.top5), _percent(measured.mean), _percent(measured.chance),
                str(measured.num_classes), str(measured.num_clips),
            )  # fmt: skip
        case Accuracy():
            for name in ("accuracy", "95 %", "chance", "questions"):
                table.add_column(name, justify="right")
            table.add_row(
                _percent(measured.accuracy), _interval(bootstrap(measured.hits)),
                _percent(measured.chance), str(measured.num_questions),
            )  # fmt: skip
        case MeanPrecision():
            for name in ("mAP", "chance", "options", "videos"):
                table.add_column(name, justify="right")
            table.add_row(
                _percent(measured.mean_average_precision), _percent(measured.chance),
                str(measured.num_options), str(measured.num_questions),
            )  # fmt: skip
    return table


def _row(ranking: Ranking) -> list[str]:
    return [
        *(_percent(ranking.recall[k]) for k in CUTOFFS),
        _interval(ranking.interval()),
        f"{ranking.median_rank:g}",
        f"{ranking.mean_rank:.1f}",
        str(ranking.num_candidates),
        str(ranking.num_queries),
    ]


def _lines(evaluated: Evaluated) -> list[str]:
    lines = [f"evaluated on {evaluated.num_clips} of {evaluated.num_listed} clips"]
    failures = list(evaluated.failures.items())
    lines += [f"  left out: {name} ({reason})" for name, reason in failures[:_NAMED]]
    if len(failures) > _NAMED:
        lines.append(f"  and {len(failures) - _NAMED} more, all named in --json FILE")
    return [*lines, evaluated.measured.headline()]


def write_json(path: Path, evaluated: Evaluated, settings: dict[str, Any]) -> None:
    """Writes all numbers and all settings as one JSON object."""
    measured = evaluated.measured
    if isinstance(measured, Retrieval):
        results: dict[str, Any] = {
            "text_to_video": measured.text_to_video.values(),
            "video_to_text": measured.video_to_text.values(),
        }
    else:
        results = measured.values()
        if not isinstance(measured, MeanPrecision):
            low, high = bootstrap(measured.hits)
            results |= {"low": low, "high": high}
    document = {
        "settings": settings,
        "clips": evaluated.num_clips,
        "clips_listed": evaluated.num_listed,
        "texts": evaluated.num_texts,
        "left_out": evaluated.failures,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f} %"
