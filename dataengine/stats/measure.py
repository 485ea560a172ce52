# SPDX-License-Identifier: Apache-2.0
"""A corpus or a part of it -> its statistics: the pictures of both papers, and what users of releases ask for.

Three scans count all numbers of the catalog together (`dataengine.stats.numbers`), clips per video and
categories take one each, and words are read from a bounded number of clips (`dataengine.stats.words`). DuckDB holds
and spills what does not fit; Python sees counts alone.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import Field

from dataengine.alarms import CaptionAlarms, check_captions
from dataengine.corpus import Corpus
from dataengine.funnel import Funnel, Loss
from dataengine.query.percentiles import Percentile
from dataengine.query.sql import connect, open_data
from dataengine.records import KEPT
from dataengine.stage import Settings
from dataengine.stats import numbers as numbers_of
from dataengine.stats import words as words_of
from dataengine.stats.numbers import Bins, Measured, Names, Numbers, Summary
from dataengine.stats.words import Actionness, Topic, Words

_MS_PER_HOUR = 3_600_000
_TEXTS = ("caption", "transcript")
"""Columns whose words are told."""


class StatsSettings(Settings):
    """What is counted, and how much of it."""

    where: str = ""
    """SQL condition on clips, percentile literals allowed; empty counts all."""
    num_texts: int = Field(default=1_000_000, ge=1)
    """Words are read from all clips up to so many, above from a sample of about so many."""
    exact_clips: int = Field(default=numbers_of.EXACT_CLIPS, ge=0)
    """Percentiles are exact up to so many clips."""
    alarms: bool | None = None
    """Looks for texts that stand on many videos, which reads all captions of the corpus three times; None
    does so in a corpus of at most ``num_texts`` clips."""
    seed: int = 0
    """Another one draws another sample."""
    memory: str | None = None
    """What DuckDB may hold, such as ``4GB``."""


@dataclass(frozen=True)
class StageCost:
    """What a stage took, over all runs.

    Attributes:
        stage: Its name.
        num_runs: Runs that had it.
        num_in: Rows that went in.
        num_out: Rows that came out.
        busy_hours: Hours its actors worked, added up.
        cpu_hours: Hours of processor time.
        gpu_hours: Hours of a GPU.
    """

    stage: str
    num_runs: int
    num_in: int
    num_out: int
    busy_hours: float
    cpu_hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Statistics:
    """What a corpus, or a part of it, is made of. `to_dict` is the JSON.

    Attributes:
        data: As it was asked for, ``CORPUS`` or ``CORPUS#SUBSET``.
        where: The condition on its clips; empty for all.
        percentiles: What the condition's percentile literals came to.
        num_clips: Clips.
        num_videos: Videos they are of.
        hours: Their length.
        num_texts: Clips whose texts were read: all, or a sample.
        sampled: Whether they are a sample.
        numbers: The duration, every column of numbers, clips per video.
        names: Resolutions, aspect ratios, languages, sound, categories.
        lengths: Words per text, of every column of captions and the transcript.
        words: Of captions.
        transcripts: Of transcripts, by language.
        actionness: Verbs of captions.
        bias: How captions speak of people.
        funnel: What became of the sources of all runs; of the whole corpus.
        costs: What stages took, over all runs; of the whole corpus.
        captions: What is suspicious about captions; of the whole corpus. None if not looked for.
        seconds: What counting took.
    """

    data: str
    where: str
    percentiles: tuple[Percentile, ...]
    num_clips: int
    num_videos: int
    hours: float
    num_texts: int
    sampled: bool
    numbers: tuple[Numbers, ...]
    names: tuple[Names, ...]
    lengths: tuple[Numbers, ...]
    words: Words
    transcripts: tuple[Words, ...]
    actionness: Actionness
    bias: tuple[Topic, ...]
    funnel: Funnel
    costs: tuple[StageCost, ...]
    captions: CaptionAlarms | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {"format": 1} | asdict(self)


@dataclass
class Side:
    """A corpus that is being counted: its connection, and what the first scan found."""

    db: duckdb.DuckDBPyConnection
    corpus: Corpus
    data: str
    settings: StatsSettings
    percentiles: tuple[Percentile, ...]
    num_clips: int
    hours: float
    exact: bool
    measured: list[Measured]
    summaries: dict[str, Summary]
    per_video: list[tuple[int, int]]

    @property
    def num_videos(self) -> int:
        """Videos that the clips are of."""
        return sum(num for _, num in self.per_video)


def measure(data: str, settings: StatsSettings | None = None) -> Statistics:
    """Returns the statistics of ``CORPUS`` or ``CORPUS#SUBSET``.

    Raises:
        CorpusError: If there is no such corpus or subset, or its catalog is damaged.
        ConfigError: If the condition is wrong.
    """
    started = time.monotonic()
    settings = settings or StatsSettings()
    with opened(data, settings) as side:
        numbers, names = distributions(side, bins_for(side))
        texts = read_texts(side)
        words = words_of.count_words(side.db, "caption")
        words_of.mark(side.db)
        funnel = _funnel(side.db)
        small = max(funnel.kept_clips, side.num_clips) <= settings.num_texts
        return Statistics(
            data=data,
            where=settings.where,
            percentiles=side.percentiles,
            num_clips=side.num_clips,
            num_videos=side.num_videos,
            hours=side.hours,
            num_texts=texts.num,
            sampled=texts.num < side.num_clips,
            numbers=tuple(numbers),
            names=tuple(map(numbers_of.shortened, names)),
            lengths=tuple(length_numbers(texts, c) for c, found in texts.lengths.items() if found),
            words=words,
            transcripts=tuple(words_of.count_by_language(side.db, "transcript")),
            actionness=words_of.actionness(side.db),
            bias=tuple(words_of.bias(side.db)),
            funnel=funnel,
            costs=tuple(_costs(side.corpus)),
            captions=check_captions(side.corpus)
            if (small if settings.alarms is None else settings.alarms)
            else None,
            seconds=time.monotonic() - started,
        )


@contextmanager
def opened(data: str, settings: StatsSettings) -> Iterator[Side]:
    """Opens a corpus or subset and makes the first scan of it; see `measure` for what it raises."""
    corpus, subset = open_data(data)
    with connect(corpus, subset=subset, memory=settings.memory) as db:
        percentiles = numbers_of.choose(db, settings.where)
        row = db.execute(
            f"select count(*), coalesce(sum(duration_ms), 0) / {_MS_PER_HOUR} from chosen"
        ).fetchone()
        assert row is not None
        exact = row[0] <= settings.exact_clips
        measured = numbers_of.measured_columns(corpus.catalog_schema, corpus.added_columns)
        summaries = numbers_of.survey(db, measured, exact=exact)
        per_video = db.execute(
            "select num, count(*) from (select count(*) as num from chosen group by video_id) "
            "group by num order by num"
        ).fetchall()
        yield Side(
            db=db,
            corpus=corpus,
            data=data,
            settings=settings,
            percentiles=percentiles,
            num_clips=row[0],
            hours=row[1],
            exact=exact,
            measured=measured,
            summaries=summaries,
            per_video=per_video,
        )


def bins_for(*sides: Side) -> dict[str, Bins]:
    """Returns bins for every number that any side has values of, the same for all sides."""
    found: dict[str, Bins] = {}
    for side in sides:
        for number in side.measured:
            given = [
                other.summaries[number.name] for other in sides if number.name in other.summaries
            ]
            bins = numbers_of.bins_of(*given, whole=number.whole)
            if bins:
                found[number.name] = bins
    per_video = [numbers_of.summary_of_counts(side.per_video) for side in sides]
    bins = numbers_of.bins_of(*per_video, whole=True)
    return found | ({"clips_per_video": bins} if bins else {})


def distributions(side: Side, bins: Mapping[str, Bins]) -> tuple[list[Numbers], list[Names]]:
    """Returns the distributions of all numbers and names, in three more scans."""
    db = side.db
    wanted = {
        number.name: (number, bins[number.name]) for number in side.measured if number.name in bins
    }
    in_bins, named = numbers_of.count_bins(
        db,
        wanted,
        {
            "language": "language",
            "has_audio": "has_audio",
            "resolution": "case when width is not null and height is not null "
            "then {'width': width, 'height': height} end",
        },
    )
    above = numbers_of.count_above(db, side.measured, side.summaries)
    found = [
        numbers_of.numbers(
            number,
            side.summaries[number.name],
            bins.get(number.name),
            in_bins.get(number.name, {}),
            above[number.name],
            side.num_clips,
            exact=side.exact,
        )
        for number in side.measured
    ]
    found.append(
        numbers_of.of_counts(
            "clips_per_video", side.per_video, of="videos", bins=bins.get("clips_per_video")
        )
    )
    sizes = [(_size(value), num) for value, num in named["resolution"]]
    resolutions = [(f"{width} x {height}", num) for (width, height), num in sizes]
    lines = [(f"{min(size)} lines", num) for size, num in sizes]
    aspects = [(numbers_of.aspect_name(*size), num) for size, num in sizes]
    sound = [("with sound" if value else "without sound", num) for value, num in named["has_audio"]]
    categories = db.execute(
        "select name, count(*) from (select unnest(list_distinct(categories)) as name from chosen) "
        "group by name order by count(*) desc, name"
    ).fetchall()
    total = side.num_clips
    category_names = numbers_of.names("category", "Categories", categories, total)
    names = [
        numbers_of.names("language", "Languages of speech", named["language"], total),
        numbers_of.names("resolution", "Resolutions", resolutions, total),
        numbers_of.names("short_side", "Shorter side", numbers_of.merged(lines), total),
        numbers_of.names("aspect_ratio", "Aspect ratios", numbers_of.merged(aspects), total),
        numbers_of.names("has_audio", "Sound", sound, total),
        category_names,
    ]
    return found, names


def _size(value: object) -> tuple[int, int]:
    assert isinstance(value, dict)
    return value["width"], value["height"]


@dataclass(frozen=True)
class Texts:
    """The texts that were read of a side: how many clips, and (words, texts) of every column of texts."""

    num: int
    lengths: Mapping[str, list[tuple[int, int]]]


def read_texts(side: Side) -> Texts:
    """Reads texts, of a sample where there are many, and splits captions and transcripts into words."""
    columns = [
        field.name
        for field in side.corpus.catalog_schema
        if pa.types.is_string(field.type) and field.name.startswith(("caption", "transcript"))
    ]
    settings = side.settings
    num = words_of.read_texts(side.db, columns, side.num_clips, settings.num_texts, settings.seed)
    return Texts(
        num,
        {
            column: words_of.split(side.db, column)
            if column in _TEXTS
            else words_of.lengths(side.db, column)
            for column in columns
        },
    )


def length_numbers(texts: Texts, column: str, bins: Bins | None = None) -> Numbers:
    """Returns how long the texts of a column are, in words; ``bins`` is None for round ones."""
    counts = texts.lengths.get(column, [])
    return numbers_of.of_counts(
        f"{column}_words",
        counts,
        of="clips",
        bins=bins,
        label=f"Length of {column}",
        unit="words",
        num_missing=texts.num - sum(num for _, num in counts),
    )


# ------------------------------------------------------------------------------------ whole corpus


def _funnel(db: duckdb.DuckDBPyConnection) -> Funnel:
    """Returns what became of every source that any run was given."""
    hours = f"coalesce(sum(duration_ms), 0) / {_MS_PER_HOUR}"
    kept = f"status = '{KEPT}'"
    row = db.execute(
        f"select count(*), {hours}, count(*) filter ({kept}), "
        f"coalesce(sum(duration_ms) filter ({kept}), 0) / {_MS_PER_HOUR}, "
        "count(*) filter (status = 'failed'), coalesce(sum(num_clips), 0)::bigint, "
        f"coalesce(sum(clips_ms), 0) / {_MS_PER_HOUR} from videos"
    ).fetchone()
    assert row is not None
    videos, video_hours, kept_videos, kept_hours, failed, clips, clip_hours = row
    video_losses = db.execute(
        f"select coalesce(stage, status), coalesce(reason, ''), count(*), {hours} from videos "
        f"where not {kept} group by all order by count(*) desc, 1, 2"
    ).fetchall()
    clip_losses = db.execute(
        "select coalesce(lost.stage, ''), coalesce(lost.reason, ''), sum(lost.num_clips)::bigint, "
        f"coalesce(sum(lost.duration_ms), 0) / {_MS_PER_HOUR} "
        "from (select unnest(dropped_clips) as lost from videos) "
        "group by 1, 2 order by 3 desc, 1, 2"
    ).fetchall()
    lost = tuple(Loss(*loss) for loss in clip_losses)
    return Funnel(
        num_videos=videos,
        video_hours=video_hours,
        kept_videos=kept_videos,
        kept_video_hours=kept_hours,
        video_losses=tuple(Loss(*loss) for loss in video_losses),
        failed_videos=failed,
        num_clips=clips + sum(loss.num for loss in lost),
        clip_hours=clip_hours + sum(loss.hours for loss in lost),
        kept_clips=clips,
        kept_clip_hours=clip_hours,
        clip_losses=lost,
    )


def _costs(corpus: Corpus) -> list[StageCost]:
    """Returns what stages took, the longest first; a run without readable metrics counts for nothing."""
    totals: dict[str, list[float]] = {}
    for path in corpus.run_files("metrics.json"):
        try:
            stages = json.loads(corpus.fs.cat_file(path))
        except (OSError, ValueError):
            continue
        for name, stage in stages.items():
            total = totals.setdefault(name, [0.0] * 6)
            total[0] += 1
            for place, key in enumerate(("num_in", "num_out", "busy_s", "cpu_s", "gpu_s"), start=1):
                total[place] += stage.get(key) or 0
    costs = [
        StageCost(name, int(runs), int(rows), int(out), busy / 3600, cpu / 3600, gpu / 3600)
        for name, (runs, rows, out, busy, cpu, gpu) in totals.items()
    ]
    return sorted(costs, key=lambda cost: (-cost.busy_hours, cost.stage))
