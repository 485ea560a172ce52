# SPDX-License-Identifier: Apache-2.0
"""Takes videos out of a corpus everywhere, for a takedown, and keeps them from coming back.

What is removed leaves an empty row (all columns null) in its shard, so that every other clip keeps
its place and readers and subsets stay right at every moment. The order is: ledger, catalog, shard,
merged catalog, subsets, runs, cache. Each file is replaced whole, each step may be done again: after a kill, the same
command finishes the work. What stays is the source's name and video id with the status ``removed``.
"""

import contextlib
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.compact import merging, purge
from dataengine.corpus import Corpus, write_small, writer_options
from dataengine.errors import CorpusError
from dataengine.fetch.cache import forget
from dataengine.plan import DUPLICATE
from dataengine.query.subsets import DEFINITION
from dataengine.report import write_report

_KEPT_FACTS = (
    *("source", "source_version", "video_id", "attempts", "run_id", "fingerprint", "shard"),
    "file_bytes",  # by which a copy of the file is recognised
)


@dataclass(frozen=True)
class Removal:
    """What was taken out."""

    num_videos: int
    num_clips: int
    shards: tuple[str, ...]


def remove(corpus: Corpus, video_ids: Collection[str]) -> Removal:
    """Removes videos, by id, from every file of a corpus.

    Args:
        corpus: No run may be writing to it.
        video_ids: As in the column ``video_id``; a YouTube video has its YouTube id.

    Returns:
        What this call found and took out: nothing is left when it is called again.

    Raises:
        CorpusError: If the ledger does not know one of the ids (then nothing is touched), another
            run holds the corpus, or, when all else is done, subsets or merged files are damaged.
    """
    asked = frozenset(video_ids)
    # A merge that read the catalog before would bring the rows back.
    with corpus.locked(), merging(corpus):
        ids, num_videos, shards, runs = _look_up(corpus, asked)
        corpus.take_over(f"remove-{int(time.time() * 1000)}")
        corpus.sweep()
        for path in corpus.video_parts():
            _rewrite(corpus, path, records.VIDEO_SCHEMA, lambda table: _tombstones(table, ids))
        num_clips = 0
        for shard in shards:
            name = f"catalog/{shard}.parquet"
            before = pq.read_metadata(corpus.path(name), filesystem=corpus.fs).num_rows
            _rewrite(
                corpus,
                corpus.path(name),
                None,
                lambda table: _without(table, ids),
            )
            after = pq.read_metadata(corpus.path(name), filesystem=corpus.fs).num_rows
            num_clips += before - after
            _blank(corpus, shard, ids)
        damaged = purge(corpus, ids)
        for name in corpus.names("subsets"):
            path = corpus.path("subsets", f"{name}.parquet")
            try:
                _rewrite(corpus, path, None, lambda table: _smaller(table, ids))
            except (OSError, KeyError, pa.ArrowException):
                damaged.append(f"subsets/{name}.parquet")
        _clean_runs(corpus, ids, runs)
        if corpus.is_local:
            for video_id in ids:
                forget(corpus.path("cache"), video_id)
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        raise CorpusError(
            "The videos are out of everything but damaged files, which may still hold them: "
            f"{', '.join(damaged[:5])}{more}",
            "delete the subsets, merge the catalog again (dataengine compact CORPUS --full --keep 1), "
            "and remove the videos again",
        )
    return Removal(num_videos, num_clips, tuple(shards) if num_clips else ())


def _look_up(
    corpus: Corpus, asked: frozenset[str]
) -> tuple[frozenset[str], int, list[str], list[str]]:
    """Finds the videos, their copies and where they are.

    Returns:
        The ids asked for and those of sources that ended as their duplicates; how many videos asked
        for are not removed yet; the shards that hold them; the runs that worked on them.
    """
    columns = ["source", "video_id", "status", "reason", "detail", "shard", "run_id"]
    rows = [
        row for path in corpus.video_parts() for row in _read(corpus, path, columns).to_pylist()
    ]
    found = [row for row in rows if row["video_id"] in asked]
    unknown = sorted(asked - {row["video_id"] for row in found})
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CorpusError(
            f"No video {', '.join(unknown[:5])}{more} in {corpus.url}; nothing was removed",
            'dataengine query CORPUS "select video_id, source from videos" lists them',
        )
    sources = {row["source"] for row in found}
    found += [
        row
        for row in rows
        if row["reason"] == DUPLICATE and (row["detail"] or "").partition(" as ")[2] in sources
    ]
    new = {row["video_id"] for row in found if row["status"] != records.REMOVED} & asked
    shards = {row["shard"] for row in found if row["shard"]}
    ids = asked | {row["video_id"] for row in found}
    return ids, len(new), sorted(shards), sorted({row["run_id"] for row in found})


def _read(corpus: Corpus, path: str, columns: list[str] | None = None) -> pa.Table:
    with corpus.fs.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


def _rewrite(
    corpus: Corpus,
    path: str,
    schema: pa.Schema | None,
    change: Callable[[pa.Table], pa.Table | None],
) -> None:
    """Replaces a small Parquet file by what ``change`` makes of it; None leaves it.

    A ``schema`` of None keeps that of the file, and with it what annotation has noted there.
    """
    changed = change(_read(corpus, path))
    if changed is not None:
        final = changed if schema is None else changed.cast(schema)
        name = path.removeprefix(f"{corpus.root}/")
        corpus.publish(name, lambda file: write_small(final, file))


def _tombstones(table: pa.Table, ids: frozenset[str]) -> pa.Table | None:
    """Returns ledger rows in which those of the videos say only that they were removed."""
    rows = table.to_pylist()
    hit = [row["video_id"] in ids and row["status"] != records.REMOVED for row in rows]
    if not any(hit):
        return None
    now_ms = int(time.time() * 1000)
    gone = dict.fromkeys(table.column_names)
    for index, (row, is_hit) in enumerate(zip(rows, hit, strict=True)):
        if is_hit:
            rows[index] = {
                **gone,
                **{name: row[name] for name in _KEPT_FACTS},
                "status": records.REMOVED,
                "reason": records.REMOVED,
                "finished_ms": now_ms,
                "num_clips": 0,
                "clips_ms": 0,
                "dropped_clips": [],
            }
    return pa.Table.from_pylist(rows, schema=table.schema)


def _without(table: pa.Table, ids: frozenset[str]) -> pa.Table | None:
    """Returns the rows that are not of the videos; None if all are to stay."""
    if "video_id" in table.column_names:
        names = table["video_id"].to_pylist()
    else:  # clip_id is <video_id>_<start_ms>_<end_ms>
        names = [clip_id.rsplit("_", 2)[0] for clip_id in table["clip_id"].to_pylist()]
    keep = [name not in ids for name in names]
    return None if all(keep) else table.filter(pa.array(keep))


def _smaller(table: pa.Table, ids: frozenset[str]) -> pa.Table | None:
    """Returns a subset without the videos, and its definition saying so; None if all rows are to stay."""
    kept = _without(table, ids)
    if kept is None:
        return None
    metadata = dict(kept.schema.metadata or {})
    with contextlib.suppress(KeyError, ValueError, TypeError):  # a foreign file has no definition
        about = json.loads(metadata[DEFINITION])
        about["num_removed"] = about.get("num_removed", 0) + table.num_rows - kept.num_rows
        about["num_clips"] = kept.num_rows
        if "video_id" in kept.column_names:
            about["num_videos"] = len(kept["video_id"].unique())
        metadata[DEFINITION] = json.dumps(about).encode()
    return kept.replace_schema_metadata(metadata or None)


def _blank(corpus: Corpus, shard: str, ids: frozenset[str]) -> None:
    """Replaces a shard by one in which the rows of the videos are empty."""
    with corpus.open_shard(shard) as file:
        schema = file.schema_arrow
        if ids.isdisjoint(file.read(columns=["video_id"])["video_id"].to_pylist()):
            return

        def write(out: BinaryIO) -> None:
            with pq.ParquetWriter(out, schema, **writer_options(schema)) as writer:
                for group in range(file.metadata.num_row_groups):
                    rows = file.read_row_group(group)
                    writer.write_table(_emptied(rows, ids), row_group_size=max(rows.num_rows, 1))

        corpus.publish(f"shards/{shard}.parquet", write)


def _emptied(rows: pa.Table, ids: frozenset[str]) -> pa.Table:
    """Returns the rows with those of the videos replaced by nulls, in their places."""
    held = enumerate(rows["video_id"].to_pylist())
    # Taking a null index gives a null row.
    index = pa.array([None if video_id in ids else i for i, video_id in held], pa.int64())
    return rows.take(index).cast(rows.schema)


def _clean_runs(corpus: Corpus, ids: frozenset[str], runs: Collection[str]) -> None:
    """Takes the videos' given captions out of the runs' source lists, their frames out of reports."""
    sources = {
        row["source"]
        for row in corpus.videos(["source", "video_id"]).to_pylist()
        if row["video_id"] in ids
    }
    # Of all runs: one that was killed has listed the video, but has no ledger row of it.
    for path in corpus.run_files("sources.parquet"):
        _forget_spans(corpus, path, sources)
    for run in runs:
        if corpus.fs.exists(corpus.path("runs", run, "report.html")):
            with contextlib.suppress(CorpusError):
                write_report(corpus, run)


def _forget_spans(corpus: Corpus, path: str, sources: Collection[str]) -> None:
    """Replaces a run's source list by one without the spans of the sources; it may be very long."""

    def is_hit(row: dict[str, Any]) -> bool:
        return bool(row.get("spans")) and row["source"] in sources

    with corpus.fs.open(path, "rb") as opened, pq.ParquetFile(opened) as file:
        if "spans" not in file.schema_arrow.names or not any(
            map(is_hit, (row for batch in file.iter_batches() for row in batch.to_pylist()))
        ):
            return

        def write(out: BinaryIO) -> None:
            with pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
                for batch in file.iter_batches():
                    rows = batch.to_pylist()
                    kept = [row | {"spans": None} if is_hit(row) else row for row in rows]
                    writer.write_table(pa.Table.from_pylist(kept, schema=file.schema_arrow))

        corpus.publish(path.removeprefix(f"{corpus.root}/"), write)
