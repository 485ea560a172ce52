# SPDX-License-Identifier: Apache-2.0
"""What the user names with --sources, and what of it is still to do.

A plan is a Parquet file of source rows, so that a list of millions never sits in the driver's
memory; DuckDB does the joining.
"""

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.errors import ConfigError

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
"""Files taken from a folder; a file named by itself is taken whatever its suffix."""

PLAN_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("source_version", pa.string()),  # "<bytes>-<mtime ns>" of a local file, else empty
        ("file_bytes", pa.int64()),
        ("spans", pa.list_(records.SPAN_STRUCT)),
    ]
)
"""A listed source. The todo list adds ``attempts`` made before, and ``refusal``: why it must not be
fetched."""


@dataclass(frozen=True)
class Plan:
    """What a run was asked for and what is left to do.

    Attributes:
        num_listed: Distinct sources the user named.
        num_todo: Rows of the todo list.
        num_changed: Files whose clips are in the corpus but that have changed since; left alone.
        num_other_settings: Sources whose clips were made by a pipeline with other settings.
        todo: Path of the Parquet file with what is to do.
        listed: Path of the Parquet file with all sources.
    """

    num_listed: int
    num_todo: int
    num_changed: int
    num_other_settings: int
    todo: Path
    listed: Path


def expand(sources: Sequence[str]) -> Iterator[str]:
    """Yields every source that the user's words stand for, files as absolute paths.

    A word is a folder (all videos below it), a file, a glob, an http(s) URL, a YouTube URL, a
    YouTube id written ``youtube:ID``, or a ``.txt`` list of such words, one a line, ``#`` starting a
    comment; relative paths in a list are relative to the list.

    Raises:
        ConfigError: For a word that stands for nothing.
    """
    for word in sources:
        yield from _expand(word, Path.cwd())


def _expand(word: str, base: Path) -> Iterator[str]:
    if records.is_url(word):
        video = records.youtube_id(word)
        yield f"https://www.youtube.com/watch?v={video}" if video else records.canonical_url(word)
        return
    if word.startswith("youtube:"):
        yield from _expand(f"https://youtu.be/{word.removeprefix('youtube:')}", base)
        return
    path = base / Path(word).expanduser()
    if path.is_dir():
        yield from _walk(path)
    elif path.is_file() and path.suffix == ".txt":
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            entry = line.partition(" #")[0].strip()
            if entry and not entry.startswith("#"):
                yield from _expand_listed(entry, path.parent)
    elif path.is_file():
        yield os.path.abspath(path)
    else:
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise ConfigError(
                f"No such source: {word}",
                "expected a folder, a file, a glob, a URL, youtube:ID or a .txt list of these",
            )
        for match in matches:
            if os.path.isdir(match):
                yield from _walk(Path(match))
            elif Path(match).suffix.lower() in VIDEO_SUFFIXES:
                yield os.path.abspath(match)


def _expand_listed(entry: str, base: Path) -> Iterator[str]:
    """Expands a line of a list; a missing file stays in, to end in the ledger by name."""
    try:
        yield from _expand(entry, base)
    except ConfigError:
        yield os.path.abspath(base / entry)


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield os.path.abspath(os.path.join(parent, name))


def describe(source: str) -> dict[str, str | int | None]:
    """Returns the plan row of one source; a file's version changes when its content may have."""
    row: dict[str, str | int | None] = {"source": source, "source_version": "", "file_bytes": None, "spans": None}
    if not records.is_url(source):
        try:
            status = os.stat(source)
        except OSError:
            return row  # the download stage will name the reason
        row["source_version"] = f"{status.st_size}-{status.st_mtime_ns}"
        row["file_bytes"] = status.st_size
    return row


def make_plan(
    words: Sequence[str],
    ledger_parts: Sequence[str],
    fingerprint: str,
    folder: Path,
    limit: int | None = None,
) -> Plan:
    """Lists the sources, sets aside those that have ended before, and writes down the rest.

    A source has ended when the ledger knows it in this version, or has clips of it. Of files with
    the same bytes only the first is worked on; the others end as duplicates of it. Files are read
    for this only when another of the same size is listed or in the ledger.

    Args:
        words: The user's words; see `expand`.
        ledger_parts: Local paths of Parquet files of VIDEO_SCHEMA.
        fingerprint: Of the pipeline about to run.
        folder: An existing local folder for the two Parquet files.
        limit: Takes only the first so many distinct sources.
    """
    listed, todo = folder / "sources.parquet", folder / "todo.parquet"
    _write_listed(words, listed)
    with duckdb.connect() as db:
        db.execute(
            "create table listed as select * from "
            f"(select distinct on (source) * from read_parquet('{_quoted(listed)}', "
            "file_row_number=true) order by source, file_row_number) "
            "order by file_row_number" + (f" limit {limit}" if limit is not None else "")
        )
        columns = (
            "source, source_version, status, fingerprint, attempts, "
            "file_bytes as ledger_bytes, video_id, finished_ms"
        )
        if ledger_parts:
            parts = ", ".join(f"'{_quoted(part)}'" for part in ledger_parts)
            db.execute(
                f"create table ledger as select distinct on (source) {columns} from "
                f"read_parquet([{parts}]) order by source, finished_ms desc"
            )
        else:
            db.register("empty_ledger", records.VIDEO_SCHEMA.empty_table())
            db.execute(f"create table ledger as select {columns} from empty_ledger")
        db.execute(
            "create table todo as select listed.*, attempts from listed left join ledger using (source) "
            "where ledger.source is null or (ledger.status <> 'kept' "
            "and ledger.source_version <> listed.source_version)"
        )
        _mark_duplicates(db)
        db.execute(
            "copy (select source, source_version, file_bytes, spans, attempts, "
            "case when duplicate_of is not null then {'reason': 'duplicate', "
            "'detail': 'same bytes as ' || duplicate_of} end as refusal from todo "
            "left join duplicates using (source) order by file_row_number) "
            f"to '{_quoted(todo)}' (format parquet)"
        )
        counts = db.execute(
            "select (select count(*) from listed), (select count(*) from todo), "
            "count(*) filter (ledger.source_version <> listed.source_version), "
            "count(*) filter (fingerprint <> ?) "
            "from listed join ledger using (source) where status = 'kept'",
            [fingerprint],
        ).fetchone()
    assert counts is not None
    return Plan(*counts, todo=todo, listed=listed)


def _write_listed(words: Sequence[str], path: Path) -> None:
    """Writes one row per source, in batches, so that the list is never held in memory."""
    with pq.ParquetWriter(path, PLAN_SCHEMA) as writer:
        rows = (describe(source) for source in expand(words))
        while batch := list(itertools.islice(rows, 10_000)):
            writer.write_table(pa.Table.from_pylist(batch, schema=PLAN_SCHEMA))


def _mark_duplicates(db: duckdb.DuckDBPyConnection) -> None:
    """Adds the table ``duplicates`` (source, duplicate_of) for the files in ``todo``."""
    same_size = db.execute(
        "select source from todo where file_bytes > 0 and (file_bytes in (select file_bytes from todo "
        "group by file_bytes having count(*) > 1) or file_bytes in (select ledger_bytes from ledger))"
    ).fetchall()
    paths = [path for (path,) in same_size]
    with ThreadPoolExecutor() as pool:
        ids = list(pool.map(_video_id_or_none, paths))
    hashed = pa.table({"source": pa.array(paths, pa.string()), "id": pa.array(ids, pa.string())})
    db.register("hashed", hashed)
    db.execute(
        "create table duplicates as with named as ("
        "select source, id, 1 + file_row_number as position from hashed join todo using (source) "
        "where id is not null "
        "union all select source, video_id, 0 from ledger where ledger_bytes is not null "
        "and source not in (select source from todo)), "
        "first as (select id, arg_min(source, position) as source from named group by id) "
        "select named.source, first.source as duplicate_of from named join first using (id) "
        "where named.position > 0 and named.source <> first.source"
    )


def _video_id_or_none(path: str) -> str | None:
    try:
        return records.file_video_id(path)
    except OSError:
        return None  # the download stage will name the reason


def _quoted(path: str | Path) -> str:
    """Returns a path for use inside single quotes in SQL."""
    return str(path).replace("'", "''")
