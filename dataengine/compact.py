# SPDX-License-Identifier: Apache-2.0
"""Merges the catalog's many files into few, sorted by video, so that a query opens and reads little.

Nothing depends on it: the catalog files of the shards stay the truth, and what is merged is a copy
that readers use as far as it is up to date. So a merge may run while an ingest goes on committing::

    compacted/<segment>/part-*.parquet   rows of many shards, sorted by video and time
    compacted/<segment>/shards.parquet   which shards, and the stamps of their catalog files
    compacted/<snapshot>.json            the segments that make up the catalog: written last

A merge takes the shards that no segment holds yet, and with them every segment that is not much
larger (as log-structured merge trees do), so that a growing corpus is written a few times over its
life and not once for every merge.
"""

import contextlib
import fcntl
import glob
import json
import os
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataengine.corpus import CatalogPart, Corpus, write_small
from dataengine.errors import CorpusError
from dataengine.query.literals import quoted
from dataengine.query.sql import catalog_select, engine, explained, schema_types

_GROWTH = 2
"""A segment is merged again once what is new holds more than 1/_GROWTH of its shards."""

_STALE_SHARE = 0.2
"""A segment is merged again once this share of its shards is out of date."""

_ROW_GROUP_ROWS = 122_880
"""DuckDB's own default; a video's rows lie in one group or two."""

_FILE_BYTES = "1GB"


@dataclass(frozen=True)
class Compaction:
    """What a merge did.

    Attributes:
        snapshot: The newest snapshot's name; empty where there is nothing to merge at all.
        num_clips: Clips that were written, in this merge.
        num_shards: Shards that they come from.
        num_files: Files of the whole catalog after it.
        seconds: Wall time.
    """

    snapshot: str
    num_clips: int
    num_shards: int
    num_files: int
    seconds: float


def compact(
    corpus: Corpus, *, full: bool = False, keep: int = 2, memory: str | None = None
) -> Compaction:
    """Merges what no segment holds yet, and publishes a new snapshot.

    Args:
        corpus: Others may read it and write to it meanwhile.
        full: Merges everything into one segment, from the shards' own catalog files: so it mends
            merged files that are damaged.
        keep: Snapshots that stay readable, the new one included; readers that started on an older
            one need it until they end.
        memory: Memory of the sort, such as ``8GB``; what does not fit goes to the temporary folder.

    Raises:
        CorpusError: If another merge is at work, or a catalog file is damaged.
    """
    if keep < 1:
        raise CorpusError("A merge keeps at least its own snapshot")
    begun = time.monotonic()
    with merging(corpus):
        stamps = corpus.catalog_stamps()
        names = corpus.names("compacted", ".json")
        segments = corpus.segments(names[-1]) if names and not full else ()
        held = [_Segment.read(corpus, segment, stamps) for segment in segments]
        kept = [segment for segment in held if segment.valid]
        owned = {name for segment in kept for name in segment.valid}
        new = stamps.keys() - owned
        merged = _to_merge(kept, len(new))
        rest = [segment for segment in kept if segment not in merged]
        settled = len(merged) == 1 and not new and not merged[0].stale
        if (not new and not merged) or settled:
            _sweep(corpus, keep)
            files = sum(len(part.files) for part in corpus.catalog_parts())
            return Compaction(names[-1] if names else "", 0, 0, files, time.monotonic() - begun)

        parts = [segment.part(corpus) for segment in merged]
        if new:
            paths = tuple(corpus.path("catalog", f"{name}.parquet") for name in sorted(new))
            parts.append(CatalogPart(paths))
        sources = {name: stamps[name] for name in new}
        for segment in merged:
            sources |= segment.valid
        written = _write(corpus, parts, sources, memory)
        snapshot = (
            time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + f"-{int(time.time() * 1e3) % 1000:03d}"
        )
        entries = [segment.entry() for segment in rest] + [written]
        about = {"snapshot": snapshot, "created_ms": int(time.time() * 1000), "segments": entries}
        body = json.dumps(about, indent=1).encode()
        corpus.publish(f"compacted/{snapshot}.json", lambda file: file.write(body))
        _sweep(corpus, keep)
    files = sum(len(part.files) for part in corpus.catalog_parts())
    seconds = time.monotonic() - begun
    return Compaction(snapshot, written["num_clips"], len(sources), files, seconds)


@contextlib.contextmanager
def merging(corpus: Corpus) -> Iterator[None]:
    """Keeps other merges of a local corpus away; in an object store the newest snapshot counts.

    Raises:
        CorpusError: If another process holds it.
    """
    if not corpus.is_local:
        yield
        return
    os.makedirs(corpus.path("compacted"), exist_ok=True)
    with open(corpus.path("compacted", ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"Another process is merging the catalog of {corpus.url}", "wait for it"
            ) from None
        yield


def purge(corpus: Corpus, video_ids: Collection[str]) -> list[str]:
    """Takes the rows of videos out of every merged file; call it with `merging` held.

    Readers do not see those rows once the catalog files have changed; this is for good.

    Returns:
        Names of damaged files, which may still hold them.
    """
    asked = pc.SetLookupOptions(pa.array(sorted(video_ids), pa.string()))
    damaged = []
    for path in sorted(map(str, corpus.fs.find(corpus.path("compacted"), maxdepth=2))):
        if _is_part(path):
            try:
                _purge_file(corpus, path, asked)
            except (OSError, KeyError, pa.ArrowException):
                damaged.append(path.removeprefix(f"{corpus.root}/"))
    return damaged


def _purge_file(corpus: Corpus, path: str, asked: pc.SetLookupOptions) -> None:
    def is_asked(rows: pa.RecordBatch | pa.Table) -> pa.Array:
        return pc.call_function("is_in", [rows["video_id"]], asked)

    with corpus.fs.open(path, "rb") as opened, pq.ParquetFile(opened) as file:
        if not any(is_asked(batch).true_count for batch in file.iter_batches(columns=["video_id"])):
            return

        def write(out: BinaryIO) -> None:
            with pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
                for group in range(file.metadata.num_row_groups):
                    rows = file.read_row_group(group)
                    rows = rows.filter(pc.call_function("invert", [is_asked(rows)]))
                    writer.write_table(rows, row_group_size=_ROW_GROUP_ROWS)

        corpus.publish(path.removeprefix(f"{corpus.root}/"), write)


# ------------------------------------------------------------------------------- pieces


@dataclass(frozen=True, eq=False)
class _Segment:
    about: dict[str, Any]
    valid: dict[str, str]
    """Shards that are as they were when they were merged, with their stamps."""
    stale: frozenset[str]

    @classmethod
    def read(cls, corpus: Corpus, about: dict[str, Any], stamps: dict[str, str]) -> "_Segment":
        covered = corpus.covered(about["name"])
        old = set(about["without"])
        valid = {n: s for n, s in covered.items() if n not in old and stamps.get(n) == s}
        return cls(about, valid, frozenset(covered.keys() - valid.keys()))

    def part(self, corpus: Corpus) -> CatalogPart:
        folder = ("compacted", self.about["name"])
        files = tuple(corpus.path(*folder, name) for name in self.about["files"])
        return CatalogPart(files, self.stale)

    def entry(self) -> dict[str, Any]:
        return {**self.about, "without": sorted(self.stale)}


def _to_merge(segments: list[_Segment], num_new: int) -> list[_Segment]:
    """Returns the segments that go into the new one: small ones, and those that are out of date."""
    chosen: list[_Segment] = []
    total = num_new
    for segment in sorted(segments, key=lambda s: len(s.valid)):
        size = len(segment.valid)
        if len(segment.stale) > _STALE_SHARE * (size + len(segment.stale)) or (
            total and size <= _GROWTH * total
        ):
            chosen.append(segment)
            total += size
    return chosen


def _write(
    corpus: Corpus, parts: list[CatalogPart], shards: dict[str, str], memory: str | None
) -> dict[str, Any]:
    """Writes one segment and returns its entry of a snapshot."""
    name = f"{int(time.time() * 1000):013d}-{uuid.uuid4().hex[:8]}"
    folder = corpus.path("compacted", name)
    if corpus.is_local:
        os.makedirs(folder)
    target = folder if corpus.is_local else corpus.fs.unstrip_protocol(folder)
    with engine(corpus, memory=memory) as db:
        rows = catalog_select(corpus, parts, schema_types(db, corpus.catalog_schema))
        # The sort is total, so the result does not depend on how many threads made it.
        try:
            copied = db.execute(
                f"copy ({rows} order by video_id, start_ms, clip_id) to {quoted(target)} (format "
                f"parquet, compression zstd, row_group_size {_ROW_GROUP_ROWS}, file_size_bytes "
                f"'{_FILE_BYTES}', filename_pattern 'part-{{i}}', overwrite_or_ignore true)"
            ).fetchone()
            counted = db.execute(f"select count(*) from ({rows})").fetchone()
        except duckdb.Error as error:
            raise explained(db, error) from None
    files = sorted(filter(_is_part, map(str, corpus.fs.ls(folder, detail=False))))
    num_clips = sum(pq.read_metadata(path, filesystem=corpus.fs).num_rows for path in files)
    if copied is None or counted is None or not num_clips == copied[0] == counted[0]:
        raise CorpusError(
            f"Of {counted and counted[0]} clips {num_clips} came out of the merge of {corpus.url}; "
            "nothing was published",
            "merge again; dataengine verify CORPUS names damaged files",
        )
    if corpus.is_local:
        for path in (*files, folder):
            _flush(path)
    table = pa.table({"shard": list(shards), "stamp": list(shards.values())})
    corpus.publish(f"compacted/{name}/shards.parquet", lambda file: write_small(table, file))
    return {
        "name": name,
        "files": [PurePosixPath(path).name for path in files],
        "num_clips": num_clips,
        "num_shards": len(shards),
        "without": [],
    }


def _is_part(path: str) -> bool:
    name = PurePosixPath(path).name
    return name.startswith("part-") and name.endswith(".parquet")


def _flush(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(corpus: Corpus, keep: int) -> None:
    """Removes old and damaged snapshots, and segments that none of those left names."""
    used: set[str] = set()
    num_kept = 0
    for name in reversed(corpus.names("compacted", ".json")):
        try:
            segments = corpus.segments(name) if num_kept < keep else None
        except CorpusError:
            segments = None
        if segments is None:
            corpus.fs.rm_file(corpus.path("compacted", f"{name}.json"))
        else:
            num_kept += 1
            used |= {segment["name"] for segment in segments}
    # Another merge of an object store may be writing its segment right now.
    oldest_ms = time.time() * 1000 - (0 if corpus.is_local else 24 * 3600 * 1000)
    for path in corpus.fs.ls(corpus.path("compacted"), detail=False):
        name = PurePosixPath(path).name
        stamp = name.partition("-")[0]
        is_segment = len(stamp) == 13 and stamp.isdigit()
        if is_segment and name not in used and int(stamp) < oldest_ms:
            # A store, but not a disk, takes a pattern.
            corpus.fs.rm(path if corpus.is_local else glob.escape(path), recursive=True)
