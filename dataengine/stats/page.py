# SPDX-License-Identifier: Apache-2.0
"""Statistics as one HTML page that needs no network: charts are inline SVG, words are text.

Where a bar stands is worked out here; ``charts.html.j2`` draws it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jinja2

from dataengine.funnel import clock, rows_of
from dataengine.stats.compare import Comparison
from dataengine.stats.measure import Statistics
from dataengine.stats.numbers import Names, Numbers
from dataengine.stats.words import Words

WIDTH, HEIGHT = 560, 250
"""Of a chart, in SVG units."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 52, 46
_ROW, _LABEL = 24, 150
_NUM_ROWS = 12
_NUM_CLOUD = 80
_SCORES = (
    "clip_score", "clip_score_frame", "aesthetic_score", "video_text_score", "motion_score", "still_score",
    "jump_score",
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One bar; ``tail`` stands for all values beyond the bins."""

    x: float
    y: float
    width: float
    height: float
    said: str
    tail: bool = False


@dataclass(frozen=True)
class Tick:
    """A number on an axis, or a percentile above the plot on one of three lines."""

    at: float
    said: str
    line: int = 0


@dataclass(frozen=True)
class Chart:
    """A chart of one or two distributions of a number, ready to draw.

    Attributes:
        title: With the unit left out.
        unit: Of the horizontal axis.
        of: Of the vertical axis.
        said: In words, for those who cannot see it.
        series: Per distribution, its bars.
        outlines: Per distribution, an SVG path along its bars.
        across: Ticks of the horizontal axis.
        up: Ticks of the vertical axis.
        lines: Where percentiles of the only distribution are.
        marks: Their labels.
        num: What is counted, in words.
    """

    title: str
    unit: str
    of: str
    said: str
    series: tuple[tuple[Bar, ...], ...]
    outlines: tuple[str, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    lines: tuple[float, ...]
    marks: tuple[Tick, ...]
    num: str


@dataclass(frozen=True)
class Row:
    """A name and its bars' lengths, one per distribution."""

    name: str
    y: int
    lengths: tuple[float, ...]
    said: tuple[str, ...]


def render(statistics: Statistics) -> str:
    """Returns the page of a corpus' statistics."""
    return (
        environment()
        .get_template("stats.html.j2")
        .render(
            stats=statistics,
            numbers={number.name: number for number in statistics.numbers},
            names={names.name: names for names in statistics.names},
            scores=sorted(
                (n for n in statistics.numbers if _is_score(n) and n.num), key=_score_place
            ),
            empty=[n.name for n in statistics.numbers if not n.num]
            + [n.name for n in statistics.names if not n.num],
            funnel=rows_of(statistics.funnel),
        )
    )


def render_comparison(found: Comparison, where: str = "") -> str:
    """Returns the page of two corpora side by side."""
    distances = [
        *((pair, "number") for pair in (*found.numbers, *found.lengths)),
        *((pair, "names") for pair in found.names),
    ]
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            found=found,
            where=where,
            labels=labels(found.a.data, found.b.data),
            distances=sorted(
                distances, key=lambda item: -1 if item[0].distance is None else item[0].distance
            )[::-1],
        )
    )


def labels(a: str, b: str) -> tuple[str, str]:
    """Returns short names for two corpora: the subsets' if that tells them apart, else the folders'."""
    for shorten in (
        lambda data: data.rpartition("#")[2].rstrip("/").rpartition("/")[2],
        lambda data: data.rstrip("/").rpartition("/")[2],
    ):
        if shorten(a) != shorten(b):
            return shorten(a), shorten(b)
    return (a, b) if a != b else (f"{a} (first)", f"{b} (second)")


def _is_score(number: Numbers) -> bool:
    return number.name not in ("duration_s", "fps", "clips_per_video")


def _score_place(number: Numbers) -> int:
    """Returns the order of scores: those that filters go by, then others, the language's last."""
    if number.name in _SCORES:
        return _SCORES.index(number.name)
    return len(_SCORES) + number.name.startswith("language_score")


def environment() -> jinja2.Environment:
    """Returns the templates with what they call."""
    templates = jinja2.PackageLoader("dataengine", "stats")
    made = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters |= {
        "whole": whole,
        "short": short,
        "value": value,
        "percent": percent,
        "clock": clock,
    }
    made.globals |= {
        "chart": chart,
        "rows": rows,
        "cloud": cloud,
        "direction": direction,
        "today": time.strftime("%Y-%m-%d", time.gmtime()),
        "WIDTH": WIDTH,
        "HEIGHT": HEIGHT,
        "PLOT": (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
        "LABEL": _LABEL,
        "ROW": _ROW,
    }
    return made


# --------------------------------------------------------------------------------------- charts


def chart(*distributions: Numbers, names: Sequence[str] = ()) -> Chart:
    """Returns one distribution as a chart of counts, or two on the same bins as shares.

    Args:
        distributions: Of one number; empty ones are left out of the drawing.
        names: What the two are called.
    """
    first = next((d for d in distributions if d.edges), distributions[0])
    edges, bins = first.edges, len(first.counts)
    shares = len(distributions) > 1
    below, above = any(d.num_below for d in distributions), any(d.num_above for d in distributions)
    room = (WIDTH - _LEFT - _RIGHT) / (bins + 2 * (below + above) or 1)
    start = _LEFT + 2 * room * below
    heights = [_heights(d, shares) for d in distributions]
    top = max((max(h, default=0) for h in heights), default=0) or 1
    up = [tick for tick in _ticks(0, top, 4) if shares or not tick % 1]
    top = max(top, up[-1])
    plot = HEIGHT - _TOP - _BOTTOM

    # An integer's tick stands below the middle of its bar.
    middle = room / 2 if first.whole and edges and edges[1] - edges[0] == 1 else 0

    def at(x: float) -> float:
        return start + middle + (x - edges[0]) / (edges[-1] - edges[0]) * room * bins

    series, outlines = [], []
    for distribution, height in zip(distributions, heights, strict=True):
        bars = []
        for place, share in enumerate(height):
            bin_ = place - 1
            x = start + bin_ * room
            if bin_ == -1:
                x, said = _LEFT, f"below {value(edges[0])}" if edges else ""
                num = distribution.num_below
            elif bin_ == bins:
                x, said = start + (bins + 1) * room, f"above {value(edges[-1])}" if edges else ""
                num = distribution.num_above
            else:
                said = f"{value(edges[bin_])} to {value(edges[bin_ + 1])}"
                said = value(edges[bin_]) if middle else said
                num = distribution.counts[bin_]
            if num:
                size = max(share / top * plot, 0.75)
                said = f"{said}: {whole(num)} {distribution.of} ({percent(num / distribution.num)})"
                bars.append(Bar(x, HEIGHT - _BOTTOM - size, room, size, said, bin_ in (-1, bins)))
        series.append(tuple(bars))
        outlines.append(_outline(height[1:-1], start, room, top, plot))
    lines, marks = ((), ()) if shares or not edges else _marks(first.percentiles, at, edges)
    num = ", ".join(
        f"{names[place] + ': ' if names else ''}{whole(d.num)} {d.of}"
        + (f" ({whole(d.num_missing)} without)" if d.num_missing else "")
        for place, d in enumerate(distributions)
    )
    return Chart(
        title=first.label,
        unit=first.unit,
        of=f"share of {first.of}" if shares else first.of,
        said=". ".join(
            f"{names[place] + ': ' if names else ''}{_in_words(d)}"
            for place, d in enumerate(distributions)
        ),
        series=tuple(series),
        outlines=tuple(outlines),
        across=tuple(
            Tick(at(x), value(x))
            for x in (_ticks(edges[0], edges[-1], 7) if edges else ())
            if at(x) <= start + room * bins + 0.01 and not (first.whole and x % 1)
        ),
        up=tuple(
            Tick(HEIGHT - _BOTTOM - y / top * plot, percent(y) if shares else short(y)) for y in up
        ),
        lines=lines,
        marks=marks,
        num=num,
    )


def _heights(distribution: Numbers, shares: bool) -> list[float]:
    counts = [distribution.num_below, *distribution.counts, distribution.num_above]
    divisor = distribution.num or 1
    return [num / divisor if shares else float(num) for num in counts]


def _outline(heights: Sequence[float], start: float, room: float, top: float, plot: float) -> str:
    floor = HEIGHT - _BOTTOM
    path = f"M{start:.1f},{floor}"
    for place, height in enumerate(heights):
        y = floor - height / top * plot
        path += f" L{start + place * room:.1f},{y:.1f} L{start + (place + 1) * room:.1f},{y:.1f}"
    return f"{path} L{start + len(heights) * room:.1f},{floor}"


def _marks(
    percentiles: Mapping[str, float], at: Callable[[float], float], edges: Sequence[float]
) -> tuple[tuple[float, ...], tuple[Tick, ...]]:
    """Returns where the percentiles are, and their labels: near ones share one, close labels get lines."""
    places = [at(min(max(number, edges[0]), edges[-1])) for number in percentiles.values()]
    groups: list[list[int]] = []
    for index, place in enumerate(places):
        if groups and place - places[groups[-1][-1]] < 14:
            groups[-1].append(index)
        else:
            groups.append([index])
    names = list(percentiles)
    labels: list[Tick] = []
    ends = [-math.inf] * 3
    for group in groups:
        first, last = names[group[0]], names[group[-1]]
        said = first if first == last else f"{first}\u2013{last}"
        half = 3.6 * len(said)
        middle = (places[group[0]] + places[group[-1]]) / 2
        middle = min(max(middle, half), WIDTH - half)
        line = next((line for line in range(3) if ends[line] <= middle - half), 2)
        ends[line] = middle + half + 4
        labels.append(Tick(middle, said, line))
    return tuple(places), tuple(labels)


def _in_words(distribution: Numbers) -> str:
    if not distribution.num:
        return f"{distribution.label}: no values"
    assert distribution.minimum is not None
    assert distribution.maximum is not None
    percentiles = ", ".join(f"{p} {value(v)}" for p, v in distribution.percentiles.items())
    return (
        f"{distribution.label} of {whole(distribution.num)} {distribution.of}, {distribution.unit}: "
        f"from {value(distribution.minimum)} to {value(distribution.maximum)}; {percentiles}"
    )


def rows(*distributions: Names) -> list[Row]:
    """Returns the most frequent names and their bars: lengths in [0, 1] of the longest."""
    shares = [dict(d.counts) for d in distributions]
    totals = [d.num or 1 for d in distributions]
    order: dict[str, float] = {}
    for counts, total in zip(shares, totals, strict=True):
        for name, num in counts.items():
            order[name] = order.get(name, 0) + num / total
    chosen = sorted(order, key=lambda name: (-order[name], name))[:_NUM_ROWS]
    table = [(name, [counts.get(name, 0) for counts in shares]) for name in chosen]
    rest = [
        d.num - sum(counts.get(name, 0) for name in chosen)
        for d, counts in zip(distributions, shares, strict=True)
    ]
    if any(rest):
        others = max(d.num_names for d in distributions) - len(chosen)
        table.append((f"{others:,} others", rest))
    longest = max(
        (num / total for _, nums in table for num, total in zip(nums, totals, strict=True)),
        default=1,
    )
    return [
        Row(
            name,
            place * _ROW,
            tuple(num / total / (longest or 1) for num, total in zip(nums, totals, strict=True)),
            tuple(
                f"{whole(num)} ({percent(num / total)})"
                for num, total in zip(nums, totals, strict=True)
            ),
        )
        for place, (name, nums) in enumerate(table)
    ]


def cloud(
    words: Words, most: int = _NUM_CLOUD, largest: float = 2.8
) -> list[tuple[str, int, float, float]]:
    """Returns (word, how often, size in em, strength in [0, 1]) in the order of the alphabet."""
    top = words.top[:most]
    if not top:
        return []
    sized = [(word, num, math.sqrt(num / top[0][1])) for word, num in top]
    return sorted(
        (word, num, 0.8 + (largest - 0.8) * share, 0.45 + 0.55 * share)
        for word, num, share in sized
    )


def direction(language: str) -> str:
    """Returns which way a language is written, as HTML says it."""
    return "rtl" if language in ("ar", "he", "fa", "ur", "ps", "yi") else "ltr"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Returns at most ``most + 1`` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


# ---------------------------------------------------------------------------------------- texts


def whole(number: float) -> str:
    """Returns a count with separators: 1234567 -> 1,234,567."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """Returns a count for an axis: 1500000 -> 1.5 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            size = 1e3 if letter == "k" else size
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def value(number: float | None) -> str:
    """Returns a number with as many digits as say something: 0.30000001 -> 0.3."""
    if number is None:
        return "-"
    if abs(number) >= 10_000:
        return f"{number:,.0f}"
    return f"{number:.4g}" if number else "0"


def percent(share: float | None) -> str:
    """Returns a share as percent: 0.0213 -> 2.13 %."""
    if share is None:
        return "-"
    number = 100 * share
    said = "0" if not number else f"{number:.3g}" if number >= 0.01 else "< 0.01"
    return f"{said}\u00a0%"
