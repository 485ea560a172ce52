# SPDX-License-Identifier: Apache-2.0
"""Two corpora, or parts of them, side by side: what they share, how far apart they are, and in which words.

Distances of numbers are two-sample Kolmogorov-Smirnov statistics: the largest difference of the two
cumulative shares. Distances of names are total variations: half the sum of all differences of
shares. Both lie in [0, 1], 0 for equal distributions, and do not depend on sizes. Words are compared by their
log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn, "Fightin' Words", 2008,
equations 16, 22 and 23).
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from dataengine.stats import measure as stats_of
from dataengine.stats import numbers as numbers_of
from dataengine.stats import words as words_of
from dataengine.stats.measure import Side, StatsSettings, Texts
from dataengine.stats.numbers import Names, Numbers

EXACT_VALUES = 1_000_000
"""Kolmogorov-Smirnov distances are exact up to so many clips on a side; above, values are rounded to a
20,000th of where nearly all of them lie, and those far beyond are taken for one."""

NUM_WORDS = 60
"""Words that are told per side."""

PRIOR_WORDS = 1_000
"""How many words the prior weighs: both sides' words together, scaled to so many."""

_MOST_WORDS = 20_000
_GRID = 20_000
_SETS = 6
"""Numbers whose values are counted in one scan: their different values are held in memory."""


@dataclass(frozen=True)
class Part:
    """One of the two.

    Attributes:
        data: As asked for.
        num_clips: Clips.
        num_videos: Videos they are of.
        hours: Their length.
        num_texts: Clips whose texts were read.
        sampled: Whether these are a sample.
    """

    data: str
    num_clips: int
    num_videos: int
    hours: float
    num_texts: int
    sampled: bool


@dataclass(frozen=True)
class Overlap:
    """What is in both.

    Attributes:
        num_clips: Clips, by ``clip_id``.
        num_videos: Videos, by ``video_id``.
        clip_jaccard: Clips in both / clips in any; None if there are none.
        video_jaccard: The same of videos.
    """

    num_clips: int
    num_videos: int
    clip_jaccard: float | None
    video_jaccard: float | None


@dataclass(frozen=True)
class NumbersPair:
    """A number on both sides, in the same bins.

    Attributes:
        name: As in the JSON.
        a: Of the first.
        b: Of the second.
        distance: Kolmogorov-Smirnov, in [0, 1]; None where a side has no values.
        exact: Whether it is exact.
    """

    name: str
    a: Numbers
    b: Numbers
    distance: float | None
    exact: bool


@dataclass(frozen=True)
class NamesPair:
    """Names on both sides.

    Attributes:
        name: As in the JSON.
        a: Of the first.
        b: Of the second.
        distance: Total variation, in [0, 1]; None where a side has no names.
    """

    name: str
    a: Names
    b: Names
    distance: float | None


@dataclass(frozen=True)
class WordOdds:
    """A word that one side has more often than the other.

    Attributes:
        word: In lower case.
        num_a: How often the first has it.
        num_b: How often the second has it.
        log_odds: Of the first against the second, with the prior.
        z: log_odds / its standard deviation: beyond 2, it is hardly chance.
    """

    word: str
    num_a: int
    num_b: int
    log_odds: float
    z: float


@dataclass(frozen=True)
class Comparison:
    """Two corpora side by side. `to_dict` is the JSON.

    Attributes:
        a: The first.
        b: The second.
        overlap: What is in both.
        numbers: Every number that a side has, the farthest apart first.
        names: Languages, resolutions, and so on, the farthest apart first.
        lengths: Words per text, the farthest apart first.
        words_a: Caption words that the first has more often, the surest first.
        words_b: Those that the second has more often.
        seconds: What counting took.
    """

    a: Part
    b: Part
    overlap: Overlap
    numbers: tuple[NumbersPair, ...]
    names: tuple[NamesPair, ...]
    lengths: tuple[NumbersPair, ...]
    words_a: tuple[WordOdds, ...]
    words_b: tuple[WordOdds, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {"format": 1} | asdict(self)


def compare(a: str, b: str, settings: StatsSettings | None = None) -> Comparison:
    """Compares two of ``CORPUS`` or ``CORPUS#SUBSET``.

    Args:
        a: The first.
        b: The second.
        settings: The condition counts on both sides, but percentile literals have each side's values.

    Raises:
        CorpusError: If there is no such corpus or subset, or a catalog is damaged.
        ConfigError: If the condition is wrong.
    """
    started = time.monotonic()
    settings = settings or StatsSettings()
    with stats_of.opened(a, settings) as first, stats_of.opened(b, settings) as second:
        bins = stats_of.bins_for(first, second)
        numbers_a, names_a = stats_of.distributions(first, bins)
        numbers_b, names_b = stats_of.distributions(second, bins)
        numbers = _number_pairs(first, second, _paired(numbers_a, numbers_b))
        names = [
            NamesPair(
                x.name,
                numbers_of.shortened(x),
                numbers_of.shortened(y),
                total_variation(dict(x.counts), dict(y.counts)),
            )
            for x, y in zip(names_a, names_b, strict=True)
            if x.num or y.num
        ]
        texts_a, texts_b = stats_of.read_texts(first), stats_of.read_texts(second)
        for side in (first, second):
            words_of.count_words(side.db, "caption")
        odds = word_odds(*_word_counts(first.db, second.db))
        return Comparison(
            a=_part(first, texts_a),
            b=_part(second, texts_b),
            overlap=_overlap(first, second),
            numbers=tuple(sorted(numbers, key=_farthest)),
            names=tuple(sorted(names, key=_farthest)),
            lengths=tuple(sorted(_length_pairs(texts_a, texts_b), key=_farthest)),
            words_a=tuple(word for word in reversed(odds[-NUM_WORDS:]) if word.z > 0),
            words_b=tuple(word for word in odds[:NUM_WORDS] if word.z < 0),
            seconds=time.monotonic() - started,
        )


def _part(side: Side, texts: Texts) -> Part:
    return Part(
        side.data,
        side.num_clips,
        side.num_videos,
        side.hours,
        texts.num,
        texts.num < side.num_clips,
    )


def _farthest(pair: NumbersPair | NamesPair) -> float:
    return math.inf if pair.distance is None else -pair.distance


# ------------------------------------------------------------------------------------- distances


def kolmogorov_smirnov(
    values_a: np.ndarray, counts_a: np.ndarray, values_b: np.ndarray, counts_b: np.ndarray
) -> float | None:
    """Returns the largest difference of two cumulative shares, in [0, 1]; None if a side is empty.

    Args:
        values_a: (n,) different values of the first, in any order.
        counts_a: (n,) how often each occurs.
        values_b: (m,) of the second.
        counts_b: (m,) of the second.
    """
    if not values_a.size or not values_b.size:
        return None
    values = np.union1d(values_a, values_b)

    def shares(own: np.ndarray, counts: np.ndarray) -> np.ndarray:
        order = np.argsort(own)
        ends = np.concatenate([[0], np.cumsum(counts[order])])
        return ends[np.searchsorted(own[order], values, side="right")] / ends[-1]

    return float(np.abs(shares(values_a, counts_a) - shares(values_b, counts_b)).max())


def total_variation(a: Mapping[str, int], b: Mapping[str, int]) -> float | None:
    """Returns half the sum of all differences of shares, in [0, 1]; None if a side is empty."""
    total_a, total_b = sum(a.values()), sum(b.values())
    if not total_a or not total_b:
        return None
    return 0.5 * math.fsum(
        abs(a.get(name, 0) / total_a - b.get(name, 0) / total_b) for name in sorted({*a, *b})
    )


def _paired(a: Sequence[Numbers], b: Sequence[Numbers]) -> list[tuple[Numbers, Numbers]]:
    """Returns the numbers that any side has values of; one that a side lacks is empty there."""
    by_name = {n.name: n for n in a}, {n.name: n for n in b}
    pairs = []
    for name in dict.fromkeys([*by_name[0], *by_name[1]]):
        x, y = by_name[0].get(name), by_name[1].get(name)
        x, y = x or _empty(y, a), y or _empty(x, b)
        if x.num or y.num:
            pairs.append((x, y))
    return pairs


def _empty(other: Numbers | None, side: Sequence[Numbers]) -> Numbers:
    """Returns the distribution of a number that a side does not have."""
    assert other is not None
    num_clips = side[0].num + side[0].num_missing
    return numbers_of.of_counts(
        other.name, [], of=other.of, label=other.label, unit=other.unit, num_missing=num_clips
    )


def _number_pairs(
    first: Side, second: Side, pairs: Sequence[tuple[Numbers, Numbers]]
) -> list[NumbersPair]:
    """Returns the pairs with their distances, from one scan per side and _SETS numbers."""
    values: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    exact = {a.name: max(a.num, b.num) <= EXACT_VALUES for a, b in pairs}
    counted = [(a, b) for a, b in pairs if a.num and b.num and a.name != "clips_per_video"]
    for start in range(0, len(counted), _SETS):
        group = counted[start : start + _SETS]
        for side in (first, second):
            known = {number.name: number for number in side.measured}
            keys = [
                _value_sql(numbers_of.finite_sql(known[a.name]), a, exact[a.name]) for a, _ in group
            ]
            for (a, _), found in zip(group, _value_counts(side.db, keys), strict=True):
                values.setdefault(a.name, []).append(found)
    done = []
    for a, b in pairs:
        if a.name == "clips_per_video":
            distance = _distance_of_counts(first.per_video, second.per_video)
            done.append(NumbersPair(a.name, a, b, distance, exact=True))
        elif a.name in values:
            of_a, of_b = values[a.name]
            distance = kolmogorov_smirnov(*of_a, *of_b)
            done.append(NumbersPair(a.name, a, b, distance, exact[a.name]))
        else:
            done.append(NumbersPair(a.name, a, b, None, exact=True))
    return done


def _value_sql(value: str, number: Numbers, exact: bool) -> str:
    """Returns SQL of a value, on a grid over the bins where there are many, ends at five times their width."""
    if exact:
        return f"({value})::double"
    low, high = number.edges[0], number.edges[-1]
    step = (high - low) / _GRID
    return (
        f"greatest(least(round(({value} - {low!r}) / {step!r}), {5 * _GRID}), {-4 * _GRID})::double"
    )


def _value_counts(
    db: duckdb.DuckDBPyConnection, keys: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns each expression's different values and how often they occur, in one scan."""
    # The constant makes it a grouping by more than one column even for a single number.
    names = ["k", *(f"k{place}" for place in range(len(keys)))]
    columns = ", ".join(f"{key} as k{place}" for place, key in enumerate(keys))
    found = db.execute(
        f"select grouping_id({', '.join(names)}) as mask, coalesce({', '.join(names[1:])}) as value, "
        f"count(*) as num from (select 0 as k, {columns} from chosen) "
        f"group by grouping sets ({', '.join(f'({name})' for name in names)}) "
        "having value is not null"
    ).fetchnumpy()
    mask, value, num = (np.asarray(found[name]) for name in ("mask", "value", "num"))
    every = (1 << len(names)) - 1
    counts = []
    for place in range(len(keys)):
        # In the mask, the column that a row is grouped by has the only 0.
        own = mask == every - (1 << (len(keys) - 1 - place))
        counts.append((value[own], num[own]))
    return counts


def _distance_of_counts(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> float | None:
    values = [np.array(counts, np.int64).reshape(-1, 2) for counts in (a, b)]
    return kolmogorov_smirnov(*values[0].T, *values[1].T)


def _length_pairs(a: Texts, b: Texts) -> list[NumbersPair]:
    pairs = []
    for column in dict.fromkeys([*a.lengths, *b.lengths]):
        counts = a.lengths.get(column, []), b.lengths.get(column, [])
        if any(counts):
            bins = numbers_of.bins_of(*map(numbers_of.summary_of_counts, counts), whole=True)
            x, y = (stats_of.length_numbers(texts, column, bins) for texts in (a, b))
            pairs.append(NumbersPair(x.name, x, y, _distance_of_counts(*counts), exact=True))
    return pairs


# -------------------------------------------------------------------------------- overlap, words


def _overlap(first: Side, second: Side) -> Overlap:
    shared = []
    for select in (
        "select clip_id as id from chosen",
        "select distinct video_id as id from chosen",
    ):
        ids = first.db.sql(select).to_arrow_reader(100_000)
        second.db.register("other", ids)
        row = second.db.execute(
            f"select count(*) from ({select}) as own semi join other using (id)"
        ).fetchone()
        second.db.unregister("other")
        assert row is not None
        shared.append(int(row[0]))
    totals = [
        (first.num_clips + second.num_clips) - shared[0],
        (first.num_videos + second.num_videos) - shared[1],
    ]
    jaccard = [num / total if total else None for num, total in zip(shared, totals, strict=True)]
    return Overlap(shared[0], shared[1], jaccard[0], jaccard[1])


def _word_counts(
    a: duckdb.DuckDBPyConnection, b: duckdb.DuckDBPyConnection
) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Returns both sides' counts of the words that any has often, and both sides' numbers of words."""
    often: set[str] = set()
    for db in (a, b):
        often |= {
            word
            for (word,) in db.execute(
                f"select word from vocabulary_caption order by num desc, word limit {_MOST_WORDS}"
            ).fetchall()
        }
    counts, totals = [], []
    for db in (a, b):
        db.register("wanted", pa.table({"word": pa.array(sorted(often), pa.string())}))
        counts.append(
            dict(
                db.execute(
                    "select word, num from vocabulary_caption semi join wanted using (word)"
                ).fetchall()
            )
        )
        db.unregister("wanted")
        row = db.execute("select coalesce(sum(num), 0)::bigint from vocabulary_caption").fetchone()
        assert row is not None
        totals.append(int(row[0]))
    words = {word: (counts[0].get(word, 0), counts[1].get(word, 0)) for word in sorted(often)}
    return words, totals[0], totals[1]


def word_odds(counts: Mapping[str, tuple[int, int]], total_a: int, total_b: int) -> list[WordOdds]:
    """Returns words with their log-odds of the first side against the second, by falling sureness of the second.

    Args:
        counts: Word -> how often each side has it.
        total_a: All words of the first.
        total_b: All words of the second.

    Returns:
        Words in order of z: those of the second first, those of the first last; none if a side is empty.
    """
    if not total_a or not total_b:
        return []
    odds = []
    for word, (a, b) in counts.items():
        prior = PRIOR_WORDS * (a + b) / (total_a + total_b)
        rest_a, rest_b = total_a + PRIOR_WORDS - a - prior, total_b + PRIOR_WORDS - b - prior
        if rest_a <= 0 or rest_b <= 0:  # there is no other word
            continue
        delta = math.log((a + prior) / rest_a) - math.log((b + prior) / rest_b)
        variance = 1 / (a + prior) + 1 / (b + prior)
        odds.append(WordOdds(word, a, b, delta, delta / math.sqrt(variance)))
    return sorted(odds, key=lambda word: (word.z, word.word))
