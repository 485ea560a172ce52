# SPDX-License-Identifier: Apache-2.0
"""Distributions of a catalog's numbers and names, in two scans whatever their number of columns.

All functions read the relation ``chosen`` of a DuckDB connection, which `choose` makes: the clips that
are counted. The first scan finds each number's extremes, mean and percentiles, the second counts all
columns into bins at once. Values that are null, NaN or infinite are missing.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import duckdb
import pyarrow as pa

from dataengine.query.literals import identifier
from dataengine.query.percentiles import Percentile, resolve

PERCENTS = (10, 30, 50, 70, 90)
"""Percentiles that are told: InternVid's filter keeps what lies above the 70th."""

EXACT_CLIPS = 5_000_000
"""Up to so many clips, percentiles are exact; above, a t-digest (Dunning and Ertl, 2019) in DuckDB
answers in little memory, within about a tenth of a percentile."""

NUM_NAMES = 200
"""Names that are told of a distribution of names, the most frequent first."""

_TAILS = (2, 98)
"""Percentiles between which a chart shows bins, where the tails are long."""

_MOST_BINS = 40
_SETS = 24
"""Grouping sets of one scan."""

RATIOS = (
    "32:9",
    "21:9",
    "2:1",
    "16:9",
    "3:2",
    "4:3",
    "5:4",
    "11:9",
    "1:1",
    "3:4",
    "2:3",
    "9:16",
    "1:2",
)
"""Aspect ratios that have a name; a picture within 2 % of one counts as it."""

_NOT_MEASURED = frozenset({"start_ms", "end_ms", "width", "height", "row_group", "row"})

_LABELS = {
    "duration_s": ("Clip duration", "seconds"),
    "fps": ("Frame rate", "frames per second"),
    "language_score": ("Confidence of the language", "0 to 1"),
    "clip_score": ("CLIP score of frames and caption", "cosine, -1 to 1"),
    "clip_score_frame": ("CLIP score of one frame", "cosine, -1 to 1"),
    "aesthetic_score": ("Aesthetic score", "about 1 to 10"),
    "video_text_score": ("Video-text score", "cosine, -1 to 1"),
    "motion_score": ("Motion", "mean change of luma per frame, 0 to 1"),
    "still_score": ("Stillness", "share of the clip's time, 0 to 1"),
    "jump_score": ("Abrupt changes", "per second"),
    "clips_per_video": ("Clips per video", "clips"),
}


@dataclass(frozen=True)
class Measured:
    """A number that every clip may have.

    Attributes:
        name: Stable, as in the JSON.
        sql: The number, of ``chosen``.
        label: For people.
        unit: Of the number.
        whole: Whether it is an integer.
    """

    name: str
    sql: str
    label: str
    unit: str
    whole: bool = False


@dataclass(frozen=True)
class Bins:
    """Bins of equal width, whose edges are multiples of it.

    Attributes:
        first: The lowest edge, in widths.
        width: Of each; bins hold their lower edge, and the last one its upper edge too.
        num: How many there are.
    """

    first: int
    width: float
    num: int

    @property
    def edges(self) -> tuple[float, ...]:
        """The bins' edges, ``num + 1`` of them."""
        return tuple(_tidy((self.first + place) * self.width) for place in range(self.num + 1))

    @property
    def low(self) -> float:
        """Where the first bin begins."""
        return self.edges[0]

    @property
    def high(self) -> float:
        """Where the last bin ends."""
        return self.edges[-1]


@dataclass(frozen=True)
class Summary:
    """A number's values before they are put into bins; see `Numbers`."""

    num: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    percentiles: dict[float, float]


@dataclass(frozen=True)
class Numbers:
    """How a number is distributed over clips.

    Attributes:
        name: As in the JSON.
        label: For people.
        unit: Of all its values.
        of: What is counted: ``clips`` or ``videos``.
        num: Clips that have a value.
        num_missing: Clips that have none.
        minimum: None where no clip has a value, as are the mean and the maximum.
        maximum: See minimum.
        mean: See minimum.
        percentiles: ``p10`` ... ``p90``: the smallest value that at least so many percent of the values
            do not exceed (NumPy's ``inverted_cdf``); empty where no clip has a value.
        above: ``p10`` ... ``p90``: clips whose value is greater, which is what ``score > p70`` keeps. Where
            many clips have the same value, it may be far from 30 %.
        exact: Whether the percentiles are exact.
        whole: Whether the values are integers.
        edges: Of the bins, one more than counts.
        counts: Clips per bin, lower edges included; the last bin holds its upper edge too.
        num_below: Clips below the first bin.
        num_above: Clips above the last bin.
    """

    name: str
    label: str
    unit: str
    of: str
    num: int
    num_missing: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    percentiles: Mapping[str, float]
    above: Mapping[str, int]
    exact: bool
    whole: bool
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    num_below: int
    num_above: int


@dataclass(frozen=True)
class Names:
    """How often names occur.

    Attributes:
        name: As in the JSON.
        label: For people.
        of: What is counted.
        num: Clips that have a name.
        num_missing: Clips that have none.
        num_names: Different names.
        counts: (name, clips), the most frequent first.
    """

    name: str
    label: str
    of: str
    num: int
    num_missing: int
    num_names: int
    counts: tuple[tuple[str, int], ...]


def choose(db: duckdb.DuckDBPyConnection, where: str = "") -> tuple[Percentile, ...]:
    """Makes the relation ``chosen`` from the view ``clips``.

    Args:
        db: See `dataengine.query.sql.connect`.
        where: SQL condition, percentile literals allowed; empty for all clips.

    Returns:
        What percentile literals came to.

    Raises:
        ConfigError: If the condition is no SQL expression.
    """
    resolved = resolve(db, where)
    condition = f" where {resolved.condition}\n" if resolved.condition else ""
    db.execute(f"create or replace temp view chosen as select * from clips{condition}")
    return resolved.percentiles


def measured_columns(schema: pa.Schema, added: Mapping[str, str]) -> list[Measured]:
    """Returns the numbers of a catalog: the duration and every column of numbers.

    Args:
        schema: Of the catalog.
        added: Column that annotation added -> the column that it is like.
    """
    found = [Measured("duration_s", "duration_ms / 1000.0", *_LABELS["duration_s"])]
    for field in schema:
        whole = pa.types.is_integer(field.type)
        if field.name in _NOT_MEASURED | {"duration_ms"}:
            continue
        if whole or pa.types.is_floating(field.type):
            like = added.get(field.name, field.name)
            label, unit = _LABELS.get(like, (field.name, "as written"))
            if like != field.name and like in _LABELS:
                label = f"{label} ({field.name})"
            found.append(Measured(field.name, identifier(field.name), label, unit, whole))
    return found


# -------------------------------------------------------------------------------------- numbers


def survey(
    db: duckdb.DuckDBPyConnection, measured: Sequence[Measured], *, exact: bool
) -> dict[str, Summary]:
    """Returns extremes, mean and percentiles of all numbers, in one scan."""
    percents: list[float] = sorted({*PERCENTS, *_TAILS})
    shares = ", ".join(repr(percent / 100) for percent in percents)
    quantile = "quantile_disc" if exact else "approx_quantile"
    columns = ", ".join(
        f"count({x}), min({x}), max({x}), avg({x}), {quantile}({x}, [{shares}])"
        for x in map(finite_sql, measured)
    )
    if not columns:
        return {}
    row = db.execute(f"select {columns} from chosen").fetchone()
    assert row is not None
    summaries = {}
    for place, number in enumerate(measured):
        num, minimum, maximum, mean, values = row[5 * place : 5 * place + 5]
        if not exact and values:
            # Interpolation must not leave the values there are.
            values = [min(max(value, minimum), maximum) for value in values]
        found = dict(zip(percents, map(float, values), strict=True)) if num else {}
        summaries[number.name] = Summary(
            int(num), _float(minimum), _float(maximum), _float(mean), found
        )
    return summaries


def count_above(
    db: duckdb.DuckDBPyConnection,
    measured: Sequence[Measured],
    summaries: Mapping[str, Summary],
) -> dict[str, dict[str, int]]:
    """Returns, per number, how many clips lie above each of its percentiles, in one scan."""
    keys = [
        (number, percent)
        for number in measured
        for percent in PERCENTS
        if percent in summaries[number.name].percentiles
    ]
    found: dict[str, dict[str, int]] = {number.name: {} for number in measured}
    if not keys:
        return found
    # A literal with a point would be a decimal number, and rounded on its way to a double.
    counts = ", ".join(
        f"count(*) filter (({finite_sql(number)})::double > '{summaries[number.name].percentiles[percent]!r}'::double)"
        for number, percent in keys
    )
    row = db.execute(f"select {counts} from chosen").fetchone()
    assert row is not None
    for (number, percent), num in zip(keys, row, strict=True):
        found[number.name][f"p{percent}"] = num
    return found


def bins_of(*summaries: Summary, whole: bool = False) -> Bins | None:
    """Returns bins with round edges that hold nearly all values of all summaries.

    The more values, the more bins, up to _MOST_BINS. Long tails stay outside, so that one clip of an
    hour does not squeeze all others into one bin. None where there are no values.
    """
    filled = [s for s in summaries if s.minimum is not None and s.maximum is not None]
    if not filled:
        return None
    least = min(s.minimum for s in filled if s.minimum is not None)
    most = max(s.maximum for s in filled if s.maximum is not None)
    low = min(_reach(s, _TAILS[0], 10, least) for s in filled)
    high = max(_reach(s, _TAILS[1], 90, most) for s in filled)
    if most - least <= 2 * (high - low) or high == low:
        low, high = least, most
    spread = high - low
    wanted = min(max(2 * math.sqrt(max(s.num for s in filled)), 8), _MOST_BINS)
    width = _round_up(spread / wanted) if spread else (_round_up(abs(low) / 20) or 1.0)
    if whole:
        width = max(1.0, float(math.ceil(width)))
    first = math.floor(low / width + 1e-9)
    num = max(1, math.ceil(high / width - 1e-9) - first)
    if whole and high >= (first + num) * width:
        num += 1  # an integer on the last edge gets its own bin
    if num == 1:  # a lone bar stands in the middle
        around = min(2, first) if first >= 0 else 2
        first, num = first - around, around + 3
    return Bins(first, width, num)


def _reach(summary: Summary, tail: float, decile: float, extreme: float) -> float:
    """Returns how far bins reach on one side: to the tail, but not beyond thrice the decile's way there."""
    percentiles = summary.percentiles
    if not percentiles:
        return extreme
    other = percentiles[_TAILS[0] if tail == _TAILS[1] else _TAILS[1]]
    reach = other + 3 * (percentiles[decile] - other)
    return min(reach, percentiles[tail]) if tail > 50 else max(reach, percentiles[tail])


def count_bins(
    db: duckdb.DuckDBPyConnection,
    bins: Mapping[str, tuple[Measured, Bins]],
    names: Mapping[str, str],
) -> tuple[dict[str, dict[int, int]], dict[str, list[tuple[object, int]]]]:
    """Counts numbers into bins and names, all in one scan per 24 of them.

    Args:
        db: With ``chosen``.
        bins: Number's name -> the number and its bins.
        names: Name -> SQL of an expression whose values are counted.

    Returns:
        Per number, bin -> clips (-1 is below the bins, ``num`` above); per name, (value, clips), the
        most frequent first, missing ones left out.
    """
    keys = {
        name: f"case when {x} is null then null when {x} < {b.low!r} then -1 when {x} > {b.high!r} then {b.num} "
        f"else greatest(least(floor({x} / {b.width!r} - {b.first})::int, {b.num - 1}), 0) end"
        for name, (number, b) in bins.items()
        for x in [finite_sql(number)]
    }
    keys |= names
    in_bins: dict[str, dict[int, int]] = {name: {} for name in bins}
    of_names: dict[str, list[tuple[object, int]]] = {name: [] for name in names}
    every = list(keys)
    for start in range(0, len(every), _SETS):
        group = every[start : start + _SETS]
        columns = ", ".join(f"{keys[name]} as k{place}" for place, name in enumerate(group))
        places = ", ".join(f"k{place}" for place in range(len(group)))
        sets = ", ".join(f"(k{place})" for place in range(len(group)))
        rows = db.execute(
            f"select grouping_id({places}) as mask, {places}, count(*) as num "
            f"from (select {columns} from chosen) group by grouping sets ({sets}) order by num desc, {places}"
            if len(group) > 1
            else f"select 0, {places}, count(*) as num from (select {columns} from chosen) "
            "group by k0 order by num desc, k0"
        ).fetchall()
        for mask, *values, num in rows:
            # In the mask, the column that a row is grouped by has the only 0.
            place = len(group) - (~mask & ((1 << len(group)) - 1)).bit_length()
            name, value = group[place], values[place]
            if value is None:
                continue
            if name in in_bins:
                in_bins[name][int(value)] = num
            else:
                of_names[name].append((value, num))
    return in_bins, of_names


def numbers(
    number: Measured,
    summary: Summary,
    bins: Bins | None,
    counted: Mapping[int, int],
    above: Mapping[str, int],
    num_clips: int,
    *,
    exact: bool,
    of: str = "clips",
) -> Numbers:
    """Puts together what the two scans found of one number."""
    return Numbers(
        name=number.name,
        label=number.label,
        unit=number.unit,
        of=of,
        num=summary.num,
        num_missing=num_clips - summary.num,
        minimum=summary.minimum,
        maximum=summary.maximum,
        mean=summary.mean,
        percentiles={f"p{p}": summary.percentiles[p] for p in PERCENTS if summary.num},
        above=above,
        exact=exact,
        whole=number.whole,
        edges=bins.edges if bins else (),
        counts=tuple(counted.get(place, 0) for place in range(bins.num)) if bins else (),
        num_below=counted.get(-1, 0),
        num_above=counted.get(bins.num, 0) if bins else 0,
    )


def of_counts(
    name: str,
    counts: Sequence[tuple[int, int]],
    *,
    of: str,
    bins: Bins | None = None,
    label: str = "",
    unit: str = "",
    num_missing: int = 0,
) -> Numbers:
    """Returns the distribution of a whole number that is counted already.

    Args:
        name: As in the JSON.
        counts: (value, how often), in any order.
        of: What has the value.
        bins: None takes round ones.
        label: For people; empty takes the name's own.
        unit: Of the values; empty takes the name's own.
        num_missing: How many have no value.
    """
    known = _LABELS.get(name, (name, ""))
    number = Measured(name, "", label or known[0], unit or known[1], whole=True)
    summary = summary_of_counts(counts)
    bins = bins or bins_of(summary, whole=True)
    placed: dict[int, int] = {}
    for value, num in counts:
        if bins:
            place = min(math.floor(value / bins.width - bins.first), bins.num - 1)
            place = bins.num if value > bins.high else max(place, -1)
            placed[place] = placed.get(place, 0) + num
    above = {
        f"p{percent}": sum(num for value, num in counts if value > summary.percentiles[percent])
        for percent in PERCENTS
        if summary.num
    }
    return numbers(
        number, summary, bins, placed, above, summary.num + num_missing, exact=True, of=of
    )


def summary_of_counts(counts: Sequence[tuple[int, int]]) -> Summary:
    """Returns the summary of a whole number that is counted already."""
    ordered = sorted(counts)
    total = sum(num for _, num in ordered)
    if not total:
        return Summary(0, None, None, None, {})
    ends, end = [], 0
    for _, num in ordered:
        end += num
        ends.append(end)
    percentiles: dict[float, float] = {
        percent: float(
            ordered[bisect_left(ends, math.ceil(Fraction(str(percent)) * total / 100))][0]
        )
        for percent in {*PERCENTS, *_TAILS}
    }
    mean = sum(value * num for value, num in ordered) / total
    return Summary(total, float(ordered[0][0]), float(ordered[-1][0]), mean, percentiles)


def finite_sql(number: Measured) -> str:
    """Returns SQL for a number that is null where it is NaN or infinite."""
    return number.sql if number.whole else f"case when isfinite({number.sql}) then {number.sql} end"


def _float(value: float | int | None) -> float | None:
    return None if value is None else float(value)


def _round_up(value: float) -> float:
    """Returns the smallest of 1, 2, 2.5, 5 times a power of ten that is not below a value."""
    if not value > 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    for step in (1, 2, 2.5, 5, 10):
        if step * power >= value * (1 - 1e-9):
            return _tidy(step * power)
    return _tidy(10 * power)


def _tidy(value: float) -> float:
    """Returns a number without the dust of adding in binary: 0.30000000000000004 -> 0.3."""
    return float(f"{value:.12g}")


# ---------------------------------------------------------------------------------------- names


def names(
    name: str, label: str, counted: Sequence[tuple[object, int]], num_clips: int, of: str = "clips"
) -> Names:
    """Returns a distribution of names from (name, clips), the most frequent first."""
    ordered = sorted(
        ((str(value), num) for value, num in counted), key=lambda item: (-item[1], item[0])
    )
    total = sum(num for _, num in ordered)
    return Names(name, label, of, total, num_clips - total, len(ordered), tuple(ordered))


def shortened(names: Names) -> Names:
    """Returns a distribution with at most NUM_NAMES names."""
    return replace(names, counts=names.counts[:NUM_NAMES])


def aspect_name(width: int, height: int) -> str:
    """Returns an aspect ratio's name, such as ``16:9``; ``other`` where none is within 2 %."""
    if width <= 0 or height <= 0:
        return "other"
    for ratio in RATIOS:
        across, down = map(int, ratio.split(":"))
        if abs(width * down / (height * across) - 1) <= 0.02:
            return ratio
    return "other"


def merged(counted: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Returns (name, clips) in which every name stands once."""
    totals: dict[str, int] = {}
    for value, num in counted:
        totals[value] = totals.get(value, 0) + num
    return list(totals.items())
