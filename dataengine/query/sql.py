# SPDX-License-Identifier: Apache-2.0
"""Conditions and whole SELECTs over the catalog, in DuckDB, locked into the corpus."""

import contextlib
import csv
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import MERGE_AGAIN, CatalogPart, Corpus
from dataengine.errors import ConfigError, CorpusError, EngineError
from dataengine.query.literals import exact, identifier, quoted
from dataengine.query.percentiles import Percentile, resolve

DEFAULT_COLUMNS = ("clip_id", "duration_ms", "language", "clip_score", "motion_score", "caption")
"""What a query shows when nothing is selected."""

COUNTS = (
    "count(*) as clips, count(distinct video_id) as videos, "
    "round(coalesce(sum(duration_ms), 0) / 3600000, 3) as hours"
)
"""Selected in place of columns, it says how much there is."""

_SELECT = re.compile(r"\s*(select|with|from)\b", re.IGNORECASE)
_FILE = re.compile(r".*/(catalog|videos|compacted)/[^ ]+\.parquet")
_SIZE = re.compile(
    r"(\d{3,}(\.\d+)?\s*Mi?B)|((?!0+(\.0*)?\s*[GT])\d+(\.\d+)?\s*[GT]i?B)", re.IGNORECASE
)
_TERM = re.compile(r'"([^"]*)"|([^\s"]+)')
_BATCH_ROWS = 10_000


@contextlib.contextmanager
def connect(
    corpus: Corpus,
    shard: str | None = None,
    *,
    subset: str = "",
    snapshot: str = "",
    memory: str | None = None,
    threads: int | None = None,
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens a DuckDB connection with the views ``clips`` and ``videos``, and nothing else in reach.

    ``clips`` is the catalog, ``videos`` the current ledger row of every source. The SQL that runs
    on it can read the corpus' catalog and ledger, but no other file, and no network. No file is
    opened before a query needs it.

    Args:
        corpus: What to look at.
        shard: Shows the clips of this shard alone; None shows all.
        subset: Shows the clips of this subset alone.
        snapshot: Shows the clips as they were when `compact` made this snapshot.
        memory: What DuckDB may hold, such as ``4GB``; what does not fit goes to the temporary folder.
        threads: None takes all cores.

    Raises:
        CorpusError: If there is no such snapshot, or, from the body too, if a file is damaged.
        ConfigError: From the body: if its SQL is wrong.
    """
    with engine(corpus, memory=memory, threads=threads) as db:
        try:
            _add_views(db, corpus, shard, subset, snapshot)
            yield db
        except duckdb.Error as error:
            raise explained(db, error) from None


def _add_views(
    db: duckdb.DuckDBPyConnection, corpus: Corpus, shard: str | None, subset: str, snapshot: str
) -> None:
    if shard is None:
        parts = corpus.catalog_parts(snapshot)
    else:
        parts = [CatalogPart((corpus.path("catalog", f"{shard}.parquet"),))]
    ledger = [CatalogPart(tuple(corpus.video_parts()))]
    for name, files, schema in (
        ("clips", parts, corpus.catalog_schema),
        ("all_videos", ledger, records.VIDEO_SCHEMA),
    ):
        types = schema_types(db, schema)
        sql = catalog_select(corpus, files, types)
        if not any(part.files for part in files):
            nulls = ", ".join(f"null::{kind} as {identifier(n)}" for n, kind in types.items())
            sql = f"select {nulls} where false"
        if subset and name == "clips":
            path = corpus.subset_path(subset)
            with corpus.fs.open(path, "rb") as file:
                columns = pq.read_schema(file).names
            # A place is quicker to read and to compare than a clip_id; a foreign file may lack it.
            by = ("shard", "row_group", "row")
            keys = ", ".join(by if set(by) <= set(columns) else ("clip_id",))
            source = f"read_parquet({quoted(exact_url_of(corpus, path))})"
            sql = f"select * from ({sql}) semi join {source} using ({keys})"
        db.execute(f"create view {name} as {sql}")
    db.execute(
        "create view videos as select * from all_videos "
        "qualify row_number() over (partition by source order by finished_ms desc) = 1"
    )
    names = ("catalog", "videos", "compacted", "subsets")
    # What is asked for is checked as it is written, and so is what is found by it.
    folders = ", ".join(
        quoted(url(corpus, corpus.path(name)) + "/")
        for name in names
        for url in (url_of, exact_url_of)
    )
    db.execute(f"set allowed_directories = [{folders}]")
    db.execute("set enable_external_access = false")
    db.execute("set lock_configuration = true")


def open_data(data: str) -> tuple[Corpus, str]:
    """Opens ``CORPUS`` or ``CORPUS#SUBSET``; returns the corpus and the subset's name or "".

    Raises:
        CorpusError: If there is no such corpus or subset.
    """
    url, _, subset = data.partition("#")
    corpus = Corpus.open(url)
    if subset:
        corpus.subset_path(subset)
    return corpus, subset


def engine(
    corpus: Corpus, *, memory: str | None = None, threads: int | None = None
) -> duckdb.DuckDBPyConnection:
    """Returns a DuckDB connection that reads the corpus' file system and spills where it may.

    Raises:
        ConfigError: If ``memory`` is no size.
    """
    db = duckdb.connect()
    if not corpus.is_local:
        db.register_filesystem(corpus.fs)
    # Its own default is a folder in the working directory.
    spill = os.path.join(tempfile.gettempdir(), f"dataengine-duckdb-{uuid.uuid4().hex}")
    db.execute(f"set temp_directory = {quoted(spill)}")
    if memory:
        if not _SIZE.fullmatch(memory.strip()):
            raise ConfigError(f"Not a size: {memory}", "such as 4GB; at least 100MB")
        db.execute(f"set memory_limit = {quoted(memory)}")
    if threads:
        db.execute(f"set threads = {int(threads)}")
    return db


def schema_types(db: duckdb.DuckDBPyConnection, schema: pa.Schema) -> dict[str, str]:
    """Returns DuckDB's type for each column of an Arrow schema."""
    db.register("schema_of", schema.empty_table())
    rows = db.execute("select column_name, column_type from (describe schema_of)").fetchall()
    db.unregister("schema_of")
    return dict(rows)


def catalog_select(corpus: Corpus, parts: Sequence[CatalogPart], types: Mapping[str, str]) -> str:
    """Returns the SELECT over Parquet files, all columns, null where an old file lacks one.

    The types are said rather than found out, because finding out opens every file.
    """
    columns = ", ".join(
        f"{quoted(name)}: {{name: {quoted(name)}, type: {quoted(kind)}, default_value: null}}"
        for name, kind in types.items()
    )
    selects = []
    for part in parts:
        if not part.files:
            continue
        paths = ", ".join(quoted(exact_url_of(corpus, path)) for path in part.files)
        sql = (
            f"select * from read_parquet([{paths}], schema=map {{{columns}}}, "
            "hive_partitioning=false)"
        )
        if part.without:
            sql += f" where shard not in ({', '.join(map(quoted, sorted(part.without)))})"
        selects.append(sql)
    return " union all ".join(selects)


@dataclass(frozen=True)
class Statement:
    """A SELECT, and what its percentile literals came to."""

    sql: str
    percentiles: tuple[Percentile, ...] = ()


def select_statement(
    db: duckdb.DuckDBPyConnection,
    condition: str,
    select: str | None = None,
    order_by: str | None = None,
    limit: int | None = None,
    *,
    text: str = "",
    over_all: bool = False,
) -> Statement:
    """Returns the SQL for a condition over ``clips``, or the text itself if it is a whole SELECT.

    Args:
        db: See `connect`.
        condition: SQL with percentile literals (see `dataengine.query.percentiles`); empty for all
            clips. A whole SELECT has no percentile literals.
        select: Columns or expressions; None takes DEFAULT_COLUMNS.
        order_by: None orders by video and time.
        limit: At most so many rows.
        text: Words that the captions must hold; see `text_condition`.
        over_all: Takes percentiles over all clips, not over those that pass the other conditions.

    Raises:
        ConfigError: If a whole SELECT comes with other options, or the condition is no SQL.
    """
    condition = condition.strip().rstrip(";")
    if _SELECT.match(condition):
        if select or order_by or text or over_all:
            raise ConfigError("A whole SELECT takes no other option but --limit")
        sql = f"select * from ({condition}\n) limit {limit}" if limit is not None else condition
        return Statement(sql)
    resolved = resolve(db, with_text(db, condition, text), over_all=over_all)
    sql = f"select {select or ', '.join(DEFAULT_COLUMNS)} from clips"
    if resolved.condition:
        sql += f" where {resolved.condition}\n"  # a comment at its end must end there
    end = f" limit {limit}" if limit is not None else ""
    # Without an order the answer would depend on how threads raced.
    ordered = f"{sql} order by {order_by or 'video_id, start_ms, end_ms'}{end}"
    if select and not order_by:
        try:
            plan_of(db, ordered)
        except duckdb.BinderException:  # aggregates have no clip to go by
            return Statement(sql + end, resolved.percentiles)
    return Statement(ordered, resolved.percentiles)


def with_text(db: duckdb.DuckDBPyConnection, condition: str, text: str) -> str:
    """Returns a condition and that the captions hold a text, as one condition."""
    condition = condition.strip().rstrip(";")
    if not text.strip():
        return condition
    rows = db.execute(
        "select column_name from (describe clips) where column_type = 'VARCHAR' and "
        "regexp_matches(column_name, '^(caption|transcript|title|description)')"
    ).fetchall()
    searched = text_condition([name for (name,) in rows], text)
    return f"({condition}\n) and {searched}" if condition else searched


def text_condition(columns: Sequence[str], text: str) -> str:
    """Returns SQL that is true where every word of a text is in one of the columns.

    Case does not matter. ``"in quotes"`` is a phrase. A word is found where a word begins: ``dog``
    finds dogs, ``red`` does not find scattered. In scripts without spaces it is found anywhere.

    Raises:
        ConfigError: For a quote without its end.
    """
    if text.count('"') % 2:
        raise ConfigError(f"A quote without its end: {text}")
    terms = [phrase or word for phrase, word in _TERM.findall(text) if phrase or word]
    held = "lower(concat_ws(chr(10), " + ", ".join(map(identifier, columns)) + "))"
    conditions = []
    for term in terms:
        if term.isascii():
            start = r"(^|[^a-z0-9])" if term[0].isalnum() else ""
            pattern = quoted(start + re.escape(term.lower()))
            conditions.append(f"regexp_matches({held}, {pattern})")
        else:  # DuckDB lowers both, as languages differ in how
            conditions.append(f"contains({held}, lower({quoted(term)}))")
    return "(" + " and ".join(conditions or ["true"]) + ")"


def run(db: duckdb.DuckDBPyConnection, sql: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Runs a SELECT; returns its schema and its rows as they come.

    Raises:
        ConfigError: For SQL that is wrong, with the columns there are.
        CorpusError: If a file of the catalog is damaged.
    """
    try:
        _check_select(db, sql)
        reader = db.sql(sql).to_arrow_reader(_BATCH_ROWS)
    except duckdb.Error as error:
        raise explained(db, error) from None
    names = reader.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"Two columns have one name: {', '.join(twice)}", "name one of them with: AS other"
        )
    return reader.schema, _batches(db, reader)


def first_row(
    db: duckdb.DuckDBPyConnection, sql: str, parameters: object = None
) -> tuple[Any, ...]:
    """Returns the row of a SELECT that always gives one, such as an aggregate."""
    row = db.execute(sql, parameters).fetchone()
    assert row is not None
    return row


def plan_of(db: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Returns how DuckDB would run a SELECT.

    Raises:
        ConfigError: If it is not one SELECT.
    """
    _check_select(db, sql)
    row = db.execute(f"explain {sql}").fetchone()
    return row[1] if row else ""


def _check_select(db: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raises ConfigError unless the text is one SELECT: others might write into the corpus."""
    statements = db.extract_statements(sql)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise ConfigError("Expected one condition or one SELECT", _columns_hint(db))


def _batches(
    db: duckdb.DuckDBPyConnection, reader: pa.RecordBatchReader
) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except (duckdb.Error, pa.ArrowException) as error:
        raise explained(db, error) from None


def explained(db: duckdb.DuckDBPyConnection, error: Exception) -> EngineError:
    """Returns a one-line error; for an unknown name, with the names there are."""
    lines = str(error).strip().splitlines()
    message = next((line for line in lines if line.strip()), "it cannot be run")
    file = _FILE.search(message)
    # Thrift, in which Parquet's headers are written, does not know the file.
    if "TProtocolException" in message or (
        isinstance(error, duckdb.IOException | duckdb.InvalidInputException) and file
    ):
        return CorpusError(
            f"Damaged: the catalog cannot be read: {message}",
            MERGE_AGAIN
            if file and file[1] == "compacted"
            else "dataengine verify CORPUS names the files",
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return EngineError("The query needs more memory than it may have", "a larger --memory")
    hint = (
        _columns_hint(db)
        if isinstance(error, duckdb.BinderException | duckdb.CatalogException)
        else ""
    )
    return ConfigError(f"The query cannot be run: {message}", hint)


def _columns_hint(db: duckdb.DuckDBPyConnection) -> str:
    names = [row[0] for row in db.execute("select column_name from (describe clips)").fetchall()]
    return "columns of clips: " + ", ".join(names)


def url_of(corpus: Corpus, path: str) -> str:
    """Returns what DuckDB reads a path of the corpus' file system by."""
    if corpus.is_local:
        return path
    protocol = corpus.fs.protocol
    return f"{protocol if isinstance(protocol, str) else protocol[0]}://{path}"


def exact_url_of(corpus: Corpus, path: str) -> str:
    """Returns what ``read_parquet`` reads this one path by: ``*``, ``?`` and ``[`` stand for themselves."""
    return exact(url_of(corpus, path))


# -------------------------------------------------------------------------------------- output


def write_csv(schema: pa.Schema, batches: Iterator[pa.RecordBatch], file: TextIO) -> int:
    """Writes rows as CSV, lists and structs as JSON; returns their number."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(schema.names)
    count = 0
    for batch in batches:
        for row in batch.to_pylist():
            writer.writerow([_flat(value) for value in row.values()])
            count += 1
    return count


def write_jsonl(batches: Iterator[pa.RecordBatch], file: TextIO) -> int:
    """Writes rows as JSON, one a line; returns their number."""
    count = 0
    for batch in batches:
        for row in batch.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    return count


def write_parquet(schema: pa.Schema, batches: Iterator[pa.RecordBatch], file: BinaryIO) -> int:
    """Writes rows as Parquet; returns their number."""
    count = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def _flat(value: Any) -> Any:
    nested = isinstance(value, list | dict)
    return json.dumps(value, ensure_ascii=False, default=str) if nested else value
