# SPDX-License-Identifier: Apache-2.0
"""Statistics on a terminal: the numbers of the page, without its pictures."""

import sys

from rich.markup import escape
from rich.table import Table

from dataengine.funnel import clock
from dataengine.funnel import show as show_funnel
from dataengine.stats.compare import Comparison
from dataengine.stats.measure import Statistics
from dataengine.stats.page import labels, percent, value, whole
from dataengine.terminal import console

_NUM_NAMES = 6
_NUM_WORDS = 12


def show(statistics: Statistics) -> None:
    """Prints statistics on stdout."""
    out = console(sys.stdout)
    where = f" where {statistics.where}" if statistics.where else ""
    out.print(
        f"{statistics.data}{where}: {whole(statistics.num_clips)} clips of "
        f"{whole(statistics.num_videos)} videos, {clock(statistics.hours)}",
        highlight=False,
        markup=False,
    )
    table = _table("", "clips", "least", "p10", "p30", "p50", "p70", "p90", "most", "mean")
    for number in (*statistics.numbers, *statistics.lengths, statistics.actionness.per_caption):
        if number.num:
            table.add_row(
                number.name,
                whole(number.num),
                value(number.minimum),
                *map(value, number.percentiles.values()),
                value(number.maximum),
                value(number.mean),
            )
    out.print(table)
    table = _table("", "clips", "the most frequent", left=2)
    for names in statistics.names:
        if names.num:
            top = ", ".join(f"{n} {percent(c / names.num)}" for n, c in names.counts[:_NUM_NAMES])
            table.add_row(names.name, whole(names.num), escape(top))
    for words in (statistics.words, *statistics.transcripts):
        if words.top:
            top = ", ".join(word for word, _ in words.top[:_NUM_WORDS])
            table.add_row(
                f"{words.column} {words.language}".strip(), whole(words.num_clips), escape(top)
            )
    for topic in statistics.bias:
        if topic.num_captions:
            top = ", ".join(f"{g.name} {percent(g.mention_ratio)}" for g in topic.groups)
            table.add_row(topic.name, whole(topic.num_captions), top)
    out.print(table)
    out.print(
        f"{whole(statistics.actionness.num_verbs)} different verbs, "
        f"{value(statistics.actionness.mean)} a caption"
        + (
            f"; words from a sample of {whole(statistics.num_texts)} clips"
            if statistics.sampled
            else ""
        )
        + "\n",
        highlight=False,
    )
    show_funnel(statistics.funnel, out)
    if statistics.costs:
        table = _table("stage, all runs", "rows in", "busy", "CPU", "GPU")
        for cost in statistics.costs:
            table.add_row(
                escape(cost.stage),
                whole(cost.num_in),
                *map(clock, (cost.busy_hours, cost.cpu_hours, cost.gpu_hours)),
            )
        out.print(table)
    for alarm in statistics.captions.alarms if statistics.captions else ():
        out.print(f"Alarm: {alarm}", highlight=False, markup=False)


def show_comparison(found: Comparison) -> None:
    """Prints two corpora side by side on stdout."""
    out = console(sys.stdout)
    names = labels(found.a.data, found.b.data)
    table = _table("", *map(escape, names), "in both", "of all in any")
    both = found.overlap
    table.add_row(
        "clips",
        whole(found.a.num_clips),
        whole(found.b.num_clips),
        whole(both.num_clips),
        percent(both.clip_jaccard),
    )
    table.add_row(
        "videos",
        whole(found.a.num_videos),
        whole(found.b.num_videos),
        whole(both.num_videos),
        percent(both.video_jaccard),
    )
    table.add_row("h:mm:ss", clock(found.a.hours), clock(found.b.hours), "", "")
    out.print(table)
    table = _table("", "distance", *(f"{escape(name)} median" for name in names))
    for pair in (*found.numbers, *found.lengths):
        table.add_row(
            pair.name,
            value(pair.distance),
            *(value(side.percentiles.get("p50")) for side in (pair.a, pair.b)),
        )
    for pair in found.names:
        tops = (side.counts[0][0] if side.counts else "-" for side in (pair.a, pair.b))
        table.add_row(pair.name, value(pair.distance), *map(escape, tops))
    out.print(table)
    for name, words in zip(names, (found.words_a, found.words_b), strict=True):
        said = ", ".join(f"{word.word} ({word.num_a}/{word.num_b})" for word in words[:_NUM_WORDS])
        out.print(f"More often in {name}: {said or '-'}", highlight=False, markup=False)


def _table(*names: str, left: int = 0) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place in (0, left) else "right")
    return table
