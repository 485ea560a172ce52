# SPDX-License-Identifier: Apache-2.0
"""Subsets: which clips to train on, drawn exactly, repeatably and in bounded memory.

The presets are those of the papers:

- ``div`` (InternVid, section 3.4 and appendix): clips are drawn without replacement with weight
  1 / (candidate clips of the same video), so that long videos do not crowd out the others.
- ``flt``: clips of 1-120 s, of these the top 30 % by CLIP score, of these ``div``.
- ``aes``: clips of an aesthetic score of at least 4.
- ``internvid2`` (InternVideo2, section 4): the clips with the highest CLIP scores.

Drawing without replacement by weight is a sort: with u uniform in (0, 1), the N clips with the smallest
-ln(u) / weight are such a draw (Efraimidis and Spirakis, 2006). u is a hash of the clip and the seed,
so the same seed draws the same clips whatever the number of shards, files and threads. Nothing is
sorted that is not drawn: how many keys lie below a bound follows from the videos' weights alone, so one
pass keeps little more than N rows.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError
from dataengine.query.dedup import remove_duplicates
from dataengine.query.literals import CLIP_ID, quoted
from dataengine.query.percentiles import Percentile, resolve
from dataengine.query.sql import connect, exact_url_of, first_row, url_of

SUBSET_SCHEMA = pa.schema(
    [("clip_id", pa.string()), ("video_id", pa.string()), *records.LOCATOR_FIELDS]
)
"""One row of ``subsets/*.parquet``, in the order of the locators."""

DEFINITION = b"dataengine"
"""Key of the subset file's metadata under which its definition stands, as JSON."""

Order = Literal["uniform", "div", "top"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class Definition:
    """What a subset is. Its JSON form stands in the file.

    Attributes:
        where: Condition on ``clips``, percentile literals allowed; empty for all.
        order: How ``num_clips`` are drawn from the clips that pass: ``div`` with weight 1 / clips of
            the video, ``uniform`` with equal weights, ``top`` by score.
        score: Column that ``top`` goes by.
        num_clips: How many; None for all that pass.
        seed: Of the draw.
        per_video: At most so many clips of one video, before all else: those with the highest scores
            for ``top``, else drawn with equal weights.
        dedup_near: Removes near-duplicates before that: hashes of their frames differ in at most so many
            bits (see `dataengine.query.dedup`).
        dedup_semantic: Then removes clips whose embeddings have a cosine above this. Of duplicates, the
            one with the highest ``score`` stays.
        preset: Name of the preset this came from, for the reader.
        mix: Names of subsets and their weights, where this is a mixture. No clip is drawn twice; what a
            subset is too small to give, the others give.
    """

    where: str = ""
    order: Order = "uniform"
    score: str = "clip_score"
    num_clips: int | None = None
    seed: int = 0
    per_video: int | None = None
    dedup_near: int | None = None
    dedup_semantic: float | None = None
    preset: str = ""
    mix: Mapping[str, float] = field(default_factory=dict)


def preset(name: str, *, score: str = "clip_score") -> Definition:
    """Returns a preset's definition.

    Args:
        name: ``div``, ``flt``, ``aes`` or ``internvid2``.
        score: Column that stands for the CLIP score. InternVid's recipe scores one frame drawn at
            random, which is ``clip_score_frame``.

    Raises:
        ConfigError: For another name.
    """
    match name:
        case "div":
            return Definition(order="div", preset=name)
        case "flt":
            # InternVid, section 3.4: shorter than 1 s or longer than 120 s goes, top 30 % stays.
            where = f"duration_ms between 1000 and 120000 and {score} > p70"
            return Definition(where=where, order="div", preset=name)
        case "aes":
            return Definition(where="aesthetic_score >= 4", preset=name)
        case "internvid2":
            return Definition(order="top", score=score, preset=name)
    raise ConfigError(f"Unknown preset: {name}", "presets: div, flt, aes, internvid2")


@dataclass(frozen=True)
class Subset:
    """A subset that was written.

    Attributes:
        name: As in ``CORPUS#NAME``.
        num_candidates: Clips that passed the conditions, of which was drawn.
        num_clips: Clips it holds.
        num_videos: Videos they come from.
        percentiles: What percentile literals came to.
        removed: Duplicates that were removed first, of each kind.
    """

    name: str
    num_candidates: int
    num_clips: int
    num_videos: int
    percentiles: tuple[Percentile, ...] = ()
    removed: Mapping[str, int] = field(default_factory=dict)


def check_order(name: str) -> Order:
    """Returns a way of drawing by its name.

    Raises:
        ConfigError: For another name.
    """
    match name:
        case "uniform" | "div" | "top":
            return name
    raise ConfigError(f"Unknown order: {name}", "orders: uniform, div, top")


def check_name(name: str) -> None:
    """Raises ConfigError unless a subset may be called so."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"A subset cannot be called {name!r}", "letters, digits, dots, dashes and underscores"
        )


def make_subset(
    corpus: Corpus,
    name: str,
    definition: Definition,
    *,
    replace_existing: bool = False,
    memory: str | None = None,
    threads: int | None = None,
) -> Subset:
    """Draws a subset and writes it as ``subsets/<name>.parquet``.

    Args:
        corpus: It may grow meanwhile; the subset is of what is committed when it starts.
        name: Letters, digits, dots, dashes and underscores.
        definition: What to draw.
        replace_existing: Replaces a subset of that name.
        memory: What the draw may hold, such as ``4GB``; what does not fit goes to the temporary folder.
        threads: None takes all cores; the result is the same.

    Raises:
        ConfigError: If the definition contradicts itself or its SQL is wrong.
        CorpusError: If the name is taken, or no clip passes.
    """
    check_name(name)
    if name in corpus.names("subsets") and not replace_existing:
        raise CorpusError(f"There is a subset {name} already", "replace it with --replace")
    with connect(corpus, memory=memory, threads=threads) as db:
        columns = [
            name for (name,) in db.execute("select column_name from (describe clips)").fetchall()
        ]
        if definition.score not in columns:
            raise ConfigError(f"No column {definition.score}", f"columns: {', '.join(columns)}")
        about = {"definition": asdict(definition)}
        if definition.mix:
            subset, about["taken"] = _draw_mix(db, corpus, name, definition)
        else:
            subset = _draw(db, corpus, name, definition)
        _publish(db, corpus, subset, about)
    return subset


def read_definition(corpus: Corpus, name: str) -> dict[str, Any]:
    """Returns what a subset's file says of itself; empty if it was made elsewhere."""
    with corpus.fs.open(corpus.path("subsets", f"{name}.parquet"), "rb") as file:
        metadata = pq.read_schema(file).metadata or {}
    return json.loads(metadata.get(DEFINITION, b"{}"))


# -------------------------------------------------------------------------------------- drawing


def _draw(db: duckdb.DuckDBPyConnection, corpus: Corpus, name: str, wanted: Definition) -> Subset:
    """Makes the table ``drawn``, SUBSET_SCHEMA in no order, from the clips that pass."""
    if wanted.num_clips is not None and wanted.num_clips < 1:
        raise ConfigError("--num-clips takes at least 1")
    if wanted.per_video is not None and wanted.per_video < 1:
        raise ConfigError("--per-video takes at least 1")
    where = wanted.where
    if wanted.order == "top":
        scored = f"{wanted.score} is not null"
        where = f"({where}\n) and {scored}" if where.strip() else scored
    resolved = resolve(db, where)
    candidates = "from clips" + (f" where {resolved.condition}\n" if resolved.condition else "")
    removed = {}
    if wanted.dedup_near is not None or wanted.dedup_semantic is not None:
        removed = remove_duplicates(
            db, corpus, candidates.removeprefix("from "), near_bits=wanted.dedup_near,
            semantic=wanted.dedup_semantic, score=wanted.score, seed=wanted.seed,
        )  # fmt: skip
        candidates = (
            "from (from clips semi join kept using (video_id, start_ms, end_ms)) where true"
        )
    if wanted.per_video is not None:
        best = f"{wanted.score} desc" if wanted.order == "top" else _hash(wanted.seed, 1)
        candidates = (
            f"from ({candidates} qualify row_number() over "
            f"(partition by video_id order by {best}, start_ms, end_ms) <= {wanted.per_video}) where true"
        )
    db.execute(
        "create or replace temp table weights as select video_id, count(*)::integer as num_clips "
        f"from (select video_id {candidates}) group by video_id"
    )
    (num_candidates,) = first_row(db, "select coalesce(sum(num_clips), 0)::bigint from weights")
    if not num_candidates:
        raise CorpusError(f"No clip passes: {resolved.condition or 'the corpus is empty'}")
    columns = f"{CLIP_ID} as clip_id, video_id, shard, row_group, row"
    num_clips = wanted.num_clips
    if num_clips is None or num_clips >= num_candidates:
        # A view: all clips of a large corpus do not fit into memory.
        db.execute(f"create or replace temp view drawn as select {columns} {candidates}")
    elif wanted.order == "top":
        # At least num_clips scores reach this percentile; sorting those alone is enough.
        share = max(0.0, 1 - num_clips / num_candidates - 1e-9)
        db.execute(
            f"create temp table drawn as select {columns} {candidates} "
            f"and {wanted.score} >= "
            f"(select quantile_disc({wanted.score}, {share!r}) {candidates}) "
            f"order by {wanted.score} desc, video_id, start_ms, end_ms limit {num_clips}"
        )
    else:
        _draw_weighted(db, candidates, columns, wanted, num_clips)
    num_drawn, num_videos = first_row(db, "select count(*), count(distinct video_id) from drawn")
    return Subset(name, num_candidates, num_drawn, num_videos, resolved.percentiles, removed)


def _draw_weighted(
    db: duckdb.DuckDBPyConnection, candidates: str, columns: str, wanted: Definition, num_clips: int
) -> None:
    """Draws clips without replacement, each with the weight of its video."""
    n = "num_clips" if wanted.order == "div" else "1"
    sizes = db.execute(
        f"select {n} as n, sum(num_clips)::bigint from weights group by n"
    ).fetchall()
    key = f"-ln({_uniform(wanted.seed)}) * {n}"
    kept = "video_id, start_ms, duration_ms, shard, row_group, row"
    source = f"(select {kept} {candidates})"
    if wanted.order == "div":
        source += " join weights using (video_id)"
    slack = 6.0  # standard deviations: once in a billion draws the bound has to be raised
    while True:
        bound = _key_bound(sizes, num_clips + slack * math.sqrt(num_clips) + slack)
        db.execute(
            f"create or replace temp table keyed as select {kept}, {key} as key from {source} "
            f"where key <= '{bound!r}'::double"
        )
        (found,) = first_row(db, "select count(*) from keyed")
        if found >= num_clips:
            break
        slack *= 2
    # Sorting the keys alone is quicker than sorting the rows by them.
    (last,) = first_row(db, f"select key from keyed order by key limit 1 offset {num_clips - 1}")
    at_most, below = first_row(
        db, f"select count(*), count(*) filter (key < '{last!r}'::double) from keyed "
        f"where key <= '{last!r}'::double"
    )  # fmt: skip
    db.execute(
        f"create or replace temp view drawn as select {columns} from keyed where key <= '{last!r}'::double"
    )
    if (
        at_most > num_clips
    ):  # equal keys are as good as impossible, but a subset must not depend on them
        db.execute(
            "delete from keyed where rowid in (select rowid from keyed "
            f"where key = '{last!r}'::double order by video_id, start_ms, duration_ms "
            f"offset {num_clips - below})"
        )


def _key_bound(sizes: list[tuple[int, int]], expected: float) -> float:
    """Returns the bound below which ``expected`` keys are expected to lie.

    A key -n ln(u) is distributed exponentially: it lies below t with probability 1 - exp(-t / n).

    Args:
        sizes: Pairs of n and the number of clips that have it.
        expected: Number of keys.
    """
    if expected >= sum(count for _, count in sizes):
        return 1e300

    def below(bound: float) -> float:
        return -sum(count * math.expm1(-bound / n) for n, count in sizes)

    low, high = 0.0, 1.0
    while below(high) < expected and high < 1e300:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < expected else (low, middle)
    return high


def _draw_mix(
    db: duckdb.DuckDBPyConnection, corpus: Corpus, name: str, wanted: Definition
) -> tuple[Subset, dict[str, int]]:
    """Makes the table ``drawn`` from subsets, each with its share, no clip twice.

    Returns:
        The subset, and how many clips came from each.
    """
    if wanted.num_clips is None:
        raise ConfigError("How many clips?", "a mixture needs --num-clips")
    own = (wanted.per_video, wanted.dedup_near, wanted.dedup_semantic)
    if wanted.where or wanted.order != "uniform" or any(value is not None for value in own):
        raise ConfigError("A mixture is of finished subsets", "make them with conditions first")
    known = corpus.names("subsets")
    for part, weight in wanted.mix.items():
        if part not in known:
            raise CorpusError(f"Unknown subset: {part}", f"subsets: {', '.join(known) or 'none'}")
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"{part}: a weight is a number above 0")
    names = ", ".join(SUBSET_SCHEMA.names)
    db.execute(f"create temp table drawn as select {names} from clips limit 0")
    sources = {
        part: f"read_parquet({quoted(exact_url_of(corpus, corpus.subset_path(part)))})"
        for part in wanted.mix
    }
    every = " union ".join(f"select clip_id from {source}" for source in sources.values())
    (num_candidates,) = first_row(db, f"select count(*) from ({every})")
    taken = dict.fromkeys(sources, 0)
    left, missing = dict(wanted.mix), min(wanted.num_clips, num_candidates)
    while missing:  # what a subset cannot give, the others give by their weights
        for part, share in _shares(left, missing).items():
            db.execute(
                f"insert into drawn select {names} from {sources[part]} anti join drawn "
                f"using (clip_id) order by hash(clip_id, {wanted.seed}), clip_id limit {share}"
            )
            now = first_row(db, "select count(*) from drawn")[0] - sum(taken.values())
            taken[part] += now
            if now < share:
                del left[part]
        missing = min(wanted.num_clips, num_candidates) - sum(taken.values())
    num_drawn, num_videos = first_row(db, "select count(*), count(distinct video_id) from drawn")
    return Subset(name, num_candidates, num_drawn, num_videos), taken


def _shares(mix: Mapping[str, float], total: int) -> dict[str, int]:
    """Splits a total by weights into whole numbers that add up to it (largest remainder)."""
    whole = sum(mix.values())
    exact = {name: total * weight / whole for name, weight in mix.items()}
    shares = {name: math.floor(value) for name, value in exact.items()}
    rest = sorted(mix, key=lambda name: (shares[name] - exact[name], name))
    for name in rest[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


# -------------------------------------------------------------------------------------- writing


def _publish(
    db: duckdb.DuckDBPyConnection, corpus: Corpus, subset: Subset, about: dict[str, Any]
) -> None:
    """Writes the table ``drawn``, in the order of the shards."""
    (num_clips,) = first_row(db, "select count(*) from clips")
    shards = corpus.names("catalog")
    snapshots = corpus.names("compacted", ".json")
    definition = {
        **about,
        "name": subset.name,
        "removed": dict(subset.removed),
        "num_candidates": subset.num_candidates,
        "num_clips": subset.num_clips,
        "num_videos": subset.num_videos,
        "percentiles": [asdict(percentile) for percentile in subset.percentiles],
        "corpus": {
            "num_clips": num_clips,
            "num_shards": len(shards),
            "shards_digest": records.digest(*shards),
            "snapshot": snapshots[-1] if snapshots else None,
        },
        "created_ms": int(time.time() * 1000),
        "dataengine": version("dataengine"),
        "duckdb": version("duckdb"),  # the draw depends on its hash function
    }
    text = json.dumps(definition)
    names = ", ".join(SUBSET_SCHEMA.names)
    with corpus.publishing(f"subsets/{subset.name}.parquet") as path:
        db.execute(
            f"copy (select {names} from drawn order by shard, row_group, row) "
            f"to {quoted(url_of(corpus, path))} (format parquet, compression zstd, "
            f"kv_metadata {{{DEFINITION.decode()}: {quoted(text)}}})"
        )


def _hash(seed: int, stream: int) -> str:
    """Returns SQL of 64 bits that depend on the clip, the seed and the stream alone."""
    return f"hash(video_id, start_ms, duration_ms, {seed}::bigint, {stream}::bigint)"


def _uniform(seed: int) -> str:
    """Returns SQL of a double in (0, 1)."""
    return f"(({_hash(seed, 0)} >> 11)::double + 0.5) / {2**53}::double"
