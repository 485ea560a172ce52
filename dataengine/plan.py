# SPDX-License-Identifier: Apache-2.0
"""What of the listed sources is still to do, and what must not be done: rows -> a todo list.

Lists of millions never sit in the driver's memory: rows go to Parquet as they come, DuckDB joins
them with the ledger on disk, and the todo list is written in pieces.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import lists, records
from dataengine.errors import ConfigError, CorpusError
from dataengine.query.literals import exact, quoted
from dataengine.sources import (
    BAD_ID,
    BAD_NAME,
    LISTED_SCHEMA,
    NOT_A_FILE,
    REFUSED_SCHEME,
    UNREADABLE,
    VIDEO_SUFFIXES,
    Listed,
    describe,
    expand,
)

DUPLICATE, EXCLUDED, BAD_SPANS = "duplicate", "excluded", "bad_spans"
"""Why a plan refuses a source that could be fetched: it is in the list or the corpus under another
name, it is on an exclusion list, or none of its given spans can be."""

TODO_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("source_version", pa.string()),
        ("file_bytes", pa.int64()),
        ("attempts", pa.int32()),  # made before; null if none
        ("spans", pa.list_(records.SPAN_STRUCT)),  # by time; null for the whole video
        ("refusal", records.REFUSAL_STRUCT),  # null if there is none
    ]
)
"""One row of a todo list."""

_PIECE_ROWS = 10_000
_MEMORY = "600MB"
_NOT_FOR_EVER = (
    *(EXCLUDED, BAD_SPANS, BAD_ID, BAD_NAME, NOT_A_FILE, UNREADABLE),
    REFUSED_SCHEME,
)
"""Refusals that may be lifted: these sources are looked at again by every run that lists them."""

_HASH = re.compile(r"[0-9a-f]{16}")
_CLIP_OF_YOUTUBE = re.compile(r"([0-9A-Za-z_-]{11})_[0-9.]+_[0-9.]+")


@dataclass(frozen=True)
class Plan:
    """What a run was asked for and what is left to do.

    Attributes:
        num_listed: Distinct sources the user named.
        num_todo: Rows of the todo list.
        num_changed: Files whose clips are in the corpus but that have changed since; left alone.
        num_other_settings: Sources whose clips were made by a pipeline with other settings.
        num_kept_excluded: Sources with clips in the corpus that are on an exclusion list now.
        num_refused: Rows of the todo list that will end at once, each with its reason.
        num_again: The others that failed before.
        num_bad_spans: Given spans that cannot be, left out.
        num_more_captions: Captions left out because their span has another one already.
        todo: Path of the Parquet file with what is to do, in the order of the words.
        listed: Path of the Parquet file with the column ``source`` of all sources.
    """

    num_listed: int
    num_todo: int
    num_changed: int
    num_other_settings: int
    num_kept_excluded: int
    num_refused: int
    num_again: int
    num_bad_spans: int
    num_more_captions: int
    todo: Path
    listed: Path


def write_listed(
    words: Sequence[str], settings: lists.SourceSettings, folder: Path, limit: int | None = None
) -> int:
    """Expands the user's words and reads the exclusion lists, into Parquet files in a folder.

    Args:
        words: See `sources.expand`.
        settings: How lists are read, and what must not come in.
        folder: An existing local folder; `make_plan` takes it.
        limit: Takes only the first so many distinct sources.

    Returns:
        The number of rows: sources, repeats and all.

    Raises:
        ConfigError: For a word that stands for nothing, or a list that cannot be read.
    """
    num_rows = _write_rows(expand(words, settings.columns, limit), folder)
    _write_exclusions(settings, folder)
    return num_rows


def _write_rows(rows: Iterator[Listed], folder: Path) -> int:
    num_rows = 0
    with pq.ParquetWriter(folder / "rows.parquet", LISTED_SCHEMA) as writer:
        while piece := list(itertools.islice(rows, _PIECE_ROWS)):
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*piece, strict=True), LISTED_SCHEMA, strict=True)
            ]
            writer.write_batch(pa.record_batch(columns, schema=LISTED_SCHEMA))
            num_rows += len(piece)
    return num_rows


# ------------------------------------------------------------------------------------ exclusion

_EXCLUSION_SCHEMA = pa.schema([("kind", pa.string()), ("key", pa.string()), ("list", pa.string())])


def exclusion_keys(word: str, base: str = "") -> Iterator[tuple[str, str]]:
    """Yields what an entry of an exclusion list may match: (``id``, ``source`` or ``stem``, key).

    A YouTube id or URL matches that video by any address, and a file that is called like the id. Any
    other URL matches itself. A video id of a corpus matches that video, a local file by its bytes.
    A name without folder matches every file, object or direct URL of that name, with or without a
    suffix of a video; one with a folder matches that one file. ``<YouTube id>_<start>_<end>``, as
    several benchmarks name their clips, matches the video.
    """
    word = word.removeprefix("youtube:")
    if records.is_url(word):
        yield "id", records.url_video_id(word)
        return
    if records.is_object(word):
        yield "source", word
        return
    if records.youtube_id(f"https://{word}"):
        yield "id", records.url_video_id(f"https://{word}")
        return
    if "/" in word:
        yield "source", os.path.abspath(os.path.join(base, os.path.expanduser(word)))
        return
    stem, dot, last = word.rpartition(".")
    if f".{last.lower()}" not in VIDEO_SUFFIXES or not dot:
        stem = word
    yield "stem", stem
    yield "id", stem
    if clip := _CLIP_OF_YOUTUBE.fullmatch(stem):
        yield "id", clip[1]
        yield "stem", clip[1]


def _write_exclusions(settings: lists.SourceSettings, folder: Path) -> None:
    """Writes the keys of all exclusion lists."""
    keys = (
        (kind, key, os.path.basename(name))
        for name in settings.exclude
        for entry in lists.read_list(name, settings.columns, strict=False)
        for kind, key in exclusion_keys(entry.word, lists.base_of(name))
        if entry.word
    )
    with pq.ParquetWriter(folder / "exclusions.parquet", _EXCLUSION_SCHEMA) as writer:
        while piece := list(itertools.islice(keys, _PIECE_ROWS)):
            columns = [pa.array(values, pa.string()) for values in zip(*piece, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=_EXCLUSION_SCHEMA))


# ----------------------------------------------------------------------------------- the plans


def make_plan(
    folder: Path, ledger_parts: Sequence[str], fingerprint: str, max_attempts: int
) -> Plan:
    """Sets aside the listed sources that have ended before, and writes down the rest.

    A source has ended when the ledger knows it in this version, or has clips of it, or when it was
    removed. One that failed is tried again while it has attempts left, and one that was refused for a
    reason that may go away is looked at again. Of files with the same bytes only the first is worked
    on; the others end as duplicates of it. Files and objects are read for this only when another of
    the same size is listed or in the ledger, and files when an exclusion list names bytes.

    Args:
        folder: Where `write_listed` wrote.
        ledger_parts: Local paths of Parquet files of VIDEO_SCHEMA.
        fingerprint: Of the pipeline about to run.
        max_attempts: Attempts after which a source that failed is left to ``retry``.
    """
    with _database(folder) as db:
        _load_ledger(db, ledger_parts)
        _load_listed(db, folder)
        open_again = ", ".join(f"'{reason}'" for reason in _NOT_FOR_EVER)
        changed = "(listed.source_version <> '' and ledger.source_version <> listed.source_version)"
        db.execute(
            "create table todo as select listed.*, attempts, "
            "ledger.status = 'failed' as is_again, ledger.reason as reason_before, "
            f"{changed} as is_changed "
            "from listed left join ledger using (source) where ledger.source is null "
            f"or (ledger.status = 'failed' and (attempts < {max_attempts} or {changed})) "
            f"or (ledger.status = 'dropped' and (ledger.reason in ({open_again}) or {changed}))"
        )
        _mark_refusals(db)
        db.execute(
            "delete from todo using refusals where todo.source = refusals.source "
            "and refusals.reason = reason_before and not is_changed"
        )
        db.execute("delete from refusals where source not in (select source from todo)")
        counts = _row(
            db,
            f"select count(*) filter {changed}, count(*) filter (fingerprint <> ?), "
            "count(*) filter (listed.source in (select source from matches)) "
            "from listed join ledger using (source) where status = 'kept'",
            [fingerprint],
        )
        return _write_plan(db, folder, counts)


def make_retry_plan(
    folder: Path,
    settings: lists.SourceSettings,
    ledger_parts: Sequence[str],
    recorded: Callable[[str], str | None],
    reasons: Sequence[str] = (),
    limit: int | None = None,
) -> Plan:
    """Plans sources of the ledger again, with the spans they were planned with then.

    Args:
        folder: An existing local folder.
        settings: What must not come in.
        ledger_parts: Local paths of Parquet files of VIDEO_SCHEMA.
        recorded: Gives the local path of a run's todo list, None if there is none.
        reasons: Takes the sources that ended for one of these; none takes those that failed.
        limit: Takes only the first so many sources, by name.

    Raises:
        ConfigError: If no source ended for one of the reasons.
        CorpusError: If a run has left no todo list.
    """
    with _database(folder) as db:
        _load_ledger(db, ledger_parts)
        _check_reasons(db, reasons)
        wanted = "status = 'failed'" if not reasons else "status not in ('kept', 'removed')"
        db.execute(
            f"create table again as select source, source_version, run_id from ledger where {wanted} "
            + ("and reason in (select unnest(?)) " if reasons else "")
            + "order by source"
            + (f" limit {limit}" if limit is not None else ""),
            [list(reasons)] if reasons else [],
        )
        _write_rows(_recorded_rows(db, recorded), folder)
        _write_exclusions(settings, folder)
        _load_listed(db, folder)
        db.execute(
            "create table todo as select listed.*, attempts, true as is_again, "
            "null::varchar as reason_before, false as is_changed "
            "from listed join ledger using (source)"
        )
        _mark_refusals(db)
        return _write_plan(db, folder, (0, 0, 0))


def _check_reasons(db: duckdb.DuckDBPyConnection, reasons: Sequence[str]) -> None:
    """Raises ConfigError if a reason is not in the ledger."""
    known = db.execute(
        "select reason, count(*) from ledger where status not in ('kept', 'removed') "
        "group by reason order by count(*) desc, reason"
    ).fetchall()
    unknown = sorted(set(reasons) - {reason for reason, _ in known})
    if unknown:
        raise ConfigError(
            f"No source ended as {', '.join(unknown)}",
            "in the ledger are: " + (", ".join(f"{r} ({n:,})" for r, n in known) or "none"),
        )


def _recorded_rows(
    db: duckdb.DuckDBPyConnection, recorded: Callable[[str], str | None]
) -> Iterator[Listed]:
    """Yields the rows of the table ``again``, with the spans in their runs' todo lists."""
    runs = [run for (run,) in db.execute("select distinct run_id from again order by 1").fetchall()]
    fields = "start_ms bigint, end_ms bigint, caption varchar, aesthetic_score float, "
    db.execute(
        f"create table given (source varchar, spans struct({fields} video_text_score float)[])"
    )
    for run in runs:
        path = recorded(run)
        if path is None:
            raise CorpusError(
                f"Which spans were asked for is not known: run {run} has no sources.parquet",
                "name the sources again with: dataengine ingest",
            )
        if "spans" in pq.read_schema(path).names:
            db.execute(
                f"insert into given select source, spans from read_parquet({quoted(exact(path))}) "
                "join again using (source) where run_id = ?",
                [run],
            )
    answer = db.cursor().execute(
        "select source, source_version, spans from again left join given using (source) "
        "order by source"
    )
    while piece := answer.fetchmany(1000):
        for source, version, spans in piece:
            row = describe(source, version)
            if not spans:
                yield row
            for span in spans or ():
                yield row._replace(**span)


# ------------------------------------------------------------------------------------ the parts


def _database(folder: Path) -> duckdb.DuckDBPyConnection:
    """Returns a database that lies in a folder, and spills there what does not fit in memory."""
    db = duckdb.connect(str(folder / "plan.duckdb"))
    db.execute(f"set memory_limit = '{_MEMORY}'")
    db.execute(f"set temp_directory = {quoted(folder / 'spill')}")
    return db


def _load_ledger(db: duckdb.DuckDBPyConnection, ledger_parts: Sequence[str]) -> None:
    """Makes the table ``ledger``: how every source has ended, as far as a plan asks."""
    columns = (
        "source, source_version, status, reason, fingerprint, coalesce(attempts, 0) as attempts, "
        "file_bytes as ledger_bytes, video_id, run_id, finished_ms"
    )
    if ledger_parts:
        parts = ", ".join(quoted(exact(part)) for part in ledger_parts)
        origin = f"read_parquet([{parts}])"
    else:
        origin = "empty_ledger"
        db.register(origin, records.VIDEO_SCHEMA.empty_table())
    db.execute(
        f"create table ledger as select distinct on (source) {columns} from {origin} "
        "order by source, finished_ms desc"
    )


def _load_listed(db: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Makes the tables ``listed`` (a row per source) and ``exclusions``, and the view ``rows``."""
    db.execute(
        "create view rows as select *, file_row_number as position from "
        f"read_parquet({quoted(exact(folder / 'rows.parquet'))}, file_row_number = true)"
    )
    # A source may come with a version from a folder and without one from a list.
    db.execute(
        "create table listed as select source, min(position) as position, "
        "max(source_version) as source_version, max(file_bytes) as file_bytes, "
        "max(video_id) as video_id, max(stem) as stem, max(reason) as reason, "
        "max(detail) as detail, count(*) filter (bad_span) as num_bad, "
        "count(*) filter (bad_span) = count(*) as all_bad from rows group by source"
    )
    db.execute(
        "create table exclusions as select distinct * from "
        f"read_parquet({quoted(exact(folder / 'exclusions.parquet'))})"
    )
    db.execute(
        "create table matches as select source, min(list) as list from ("
        "select source, list from listed join exclusions on kind = 'id' and key = video_id "
        "union all select source, list from listed join exclusions on kind = 'stem' and key = stem "
        "union all select source, list from listed join exclusions on kind = 'source' and key = source "
        "union all select source, list from listed join ledger using (source) "
        "join exclusions on kind = 'id' and key = ledger.video_id) group by source"
    )


def _mark_refusals(db: duckdb.DuckDBPyConnection) -> None:
    """Makes the table ``refusals`` (source, reason, detail) of the sources in ``todo``."""
    _hash_files(db)
    # Everything whose identity is known: what is listed after what has ended before.
    db.execute(
        "create table named as "
        "select source, coalesce(hashed.id, video_id) as id, 1 + position as place, "
        "coalesce(matches.list, exclusions.list) as list, null::varchar as removed from todo "
        "left join hashed using (source) left join matches using (source) "
        "left join exclusions on kind = 'id' and key = hashed.id "
        "where coalesce(hashed.id, video_id) is not null and reason is null and not all_bad "
        "union all select source, video_id, 0, null, if(status = 'removed', source, null) "
        "from ledger where source not in (select source from todo) and (status in ('kept', 'removed') "
        "or (status = 'dropped' and ledger_bytes is not null))"
    )
    # What holds for one name of a video holds for all of them.
    db.execute(
        "create table videos as select id, arg_min(source, (place, source)) as first, min(list) as list, "
        "min(removed) as removed from named group by id"
    )
    db.execute(
        "create table refusals as select * from (select todo.source, case "
        "when todo.reason is not null then todo.reason "
        f"when removed is not null then '{records.REMOVED}' "
        f"when coalesce(videos.list, matches.list) is not null then '{EXCLUDED}' "
        f"when all_bad then '{BAD_SPANS}' "
        f"when first <> todo.source then '{DUPLICATE}' end as reason, case "
        "when todo.reason is not null then todo.detail "
        "when removed is not null then 'same video as ' || removed || ', which was removed' "
        "when coalesce(videos.list, matches.list) is not null "
        "then 'listed in ' || coalesce(videos.list, matches.list) "
        "when all_bad then 'none of ' || num_bad || ' given spans can be' "
        "when first <> todo.source then "
        "if(named.source is null or file_bytes is null, 'same video as ', 'same bytes as ') || first "
        "end as detail from todo left join matches using (source) "
        "left join (select distinct source, id from named where place > 0) named using (source) "
        "left join videos using (id)) where reason is not null"
    )


def _hash_files(db: duckdb.DuckDBPyConnection) -> None:
    """Makes the table ``hashed`` (source, id) of the files in ``todo`` whose bytes must be known."""
    by_bytes = _row(
        db,
        "select count(*) from exclusions where kind = 'id' and regexp_full_match(key, ?)",
        [_HASH.pattern],
    )[0]
    wanted = db.execute(
        "select source from todo where file_bytes > 0 and reason is null and "
        f"(({bool(by_bytes)} and source not like '%://%') "  # objects are far away
        "or file_bytes in (select file_bytes from todo group by file_bytes having count(*) > 1) "
        "or file_bytes in (select ledger_bytes from ledger where ledger_bytes is not null))"
    ).fetchall()
    paths = [path for (path,) in wanted]
    with ThreadPoolExecutor() as pool:
        ids = list(pool.map(_video_id_or_none, paths))
    hashed = pa.table({"source": pa.array(paths, pa.string()), "id": pa.array(ids, pa.string())})
    db.register("hashes", hashed)
    db.execute("create table hashed as select * from hashes where id is not null")


def _video_id_or_none(source: str) -> str | None:
    """Returns the id of a file or object by its bytes; None if it cannot be read."""
    try:
        if not records.is_object(source):
            return records.file_video_id(source)
        fs, path = lists.file_system(source)
        with fs.open(path, "rb") as file:
            return records.stream_video_id(cast(BufferedReader, file))
    except (OSError, ConfigError):
        return None  # the download stage will name the reason


# ---------------------------------------------------------------------------------- writing down


def _write_plan(db: duckdb.DuckDBPyConnection, folder: Path, counts: Sequence[int]) -> Plan:
    """Writes the two lists; ``counts`` are the plan's changed, other_settings and kept_excluded."""
    listed, todo = folder / "sources.parquet", folder / "todo.parquet"
    db.execute(
        f"copy (select source from listed order by position) to {quoted(listed)} (format parquet)"
    )
    answer = db.execute(
        "select todo.position, todo.source, todo.source_version, todo.file_bytes, "
        "todo.attempts, refusals.reason, refusals.detail, given.* exclude (source, place) "
        "from todo left join refusals using (source) left join ("
        f"select source, position as place, {', '.join(f.name for f in records.SPAN_STRUCT)} "
        "from rows where start_ms is not null) given using (source) "
        "order by todo.position, start_ms, end_ms, place"
    )
    with pq.ParquetWriter(todo, TODO_SCHEMA) as writer:
        num_todo = 0
        for batch in _grouped(answer.to_arrow_reader(_PIECE_ROWS)):
            writer.write_batch(batch)
            num_todo += batch.num_rows
    num_again, num_bad = _row(
        db,
        "select count(*) filter (is_again and reason is null), "
        "coalesce(sum(num_bad) filter (reason is null or reason = ?), 0) "
        "from (select source, is_again, num_bad from todo) left join refusals using (source)",
        [BAD_SPANS],
    )
    (num_more_captions,) = _row(
        db,
        "select coalesce(sum(n - 1), 0) from (select count(distinct caption) as n from rows "
        "semi join todo using (source) where start_ms is not null "
        "group by source, start_ms, end_ms) where n > 1",
    )
    num_listed, num_refused = _row(
        db, "select (select count(*) from listed), (select count(*) from refusals)"
    )
    changed, other_settings, kept_excluded = counts
    return Plan(
        num_listed=num_listed,
        num_todo=num_todo,
        num_changed=changed,
        num_other_settings=other_settings,
        num_kept_excluded=kept_excluded,
        num_refused=num_refused,
        num_again=num_again,
        num_bad_spans=num_bad,
        num_more_captions=num_more_captions,
        todo=todo,
        listed=listed,
    )


def _grouped(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yields batches of TODO_SCHEMA from span rows that come sorted by source and time.

    A source's rows may lie in several batches: its last ones wait for the next batch. Of spans with
    the same times the first stays.
    """
    waiting: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        table = table if waiting is None else pa.concat_tables([waiting, table])
        positions = table["position"].to_numpy()
        last = int(np.searchsorted(positions, positions[-1])) if len(positions) else 0
        if last:
            yield _group(table.slice(0, last))
        waiting = table.slice(last)
    if waiting is not None and waiting.num_rows:
        yield _group(waiting)


def _group(table: pa.Table) -> pa.RecordBatch:
    """Returns one row per source, its spans in a list."""
    table = table.combine_chunks()
    positions = table["position"].to_numpy()
    starts = np.flatnonzero(np.r_[True, positions[1:] != positions[:-1]])
    has_span = table["start_ms"].is_valid().to_numpy()
    times = [table[name].fill_null(-1).to_numpy() for name in ("start_ms", "end_ms")]
    repeated = np.zeros(len(positions), dtype=bool)
    repeated[1:] = positions[1:] == positions[:-1]
    for values in times:
        repeated[1:] &= values[1:] == values[:-1]
    kept = has_span & ~repeated
    lengths = np.add.reduceat(kept.astype(np.int32), starts)
    spans = table.filter(pa.array(kept)).combine_chunks()
    struct = pa.StructArray.from_arrays(
        [_one(spans[field.name]).cast(field.type) for field in records.SPAN_STRUCT],
        fields=list(records.SPAN_STRUCT),
    )
    offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int32())
    lists_ = pa.ListArray.from_arrays(offsets, struct, mask=pa.array(lengths == 0))
    first = table.take(pa.array(starts)).combine_chunks()
    refusal = pa.StructArray.from_arrays(
        [_one(first["reason"]), _one(first["detail"])],
        fields=list(records.REFUSAL_STRUCT),
        mask=_one(first["reason"]).is_null(),
    )
    columns = [
        *(_one(first[name]) for name in ("source", "source_version", "file_bytes", "attempts")),
        lists_,
        refusal,
    ]
    return pa.record_batch(
        [column.cast(field.type) for column, field in zip(columns, TODO_SCHEMA, strict=True)],
        schema=TODO_SCHEMA,
    )


def _one(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one piece."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _row(db: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> tuple[int, ...]:
    row = db.execute(sql, list(values)).fetchone()
    assert row is not None
    return tuple(int(value) for value in row)
