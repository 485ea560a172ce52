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
from typing import Any, BinaryIO, TextIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import CatalogPart, Corpus
from dataengine.errors import ConfigError, CorpusError, EngineError

DEFAULT_COLUMNS = ("clip_id", "duration_ms", "language", "clip_score", "motion_score", "caption")
"""What a query shows when nothing is selected."""

_SELECT = re.compile(r"\s*(select|with|from)\b", re.IGNORECASE)
_FILE = re.compile(r"/(catalog|videos|compacted)/[^ ]+\.parquet")
_BATCH_ROWS = 10_000


@contextlib.contextmanager
def connect(
    corpus: Corpus, shard: str | None = None, *, snapshot: str = "", memory: str | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens a DuckDB connection with the views ``clips`` and ``videos``, and nothing else in reach.

    ``clips`` is the catalog, ``videos`` the current ledger row of every source. The SQL that runs
    on it can read the corpus' catalog and ledger, but no other file, and no network. No file is
    opened before a query needs it.

    Args:
        corpus: What to look at.
        shard: Shows the clips of this shard alone; None shows all.
        snapshot: Shows the clips as they were when `compact` made this snapshot.
        memory: What DuckDB may hold, such as ``4GB``; what does not fit goes to the temporary folder.

    Raises:
        CorpusError: If there is no such snapshot, or, from the body too, if a file is damaged.
        ConfigError: From the body: if its SQL is wrong.
    """
    with engine(corpus, memory=memory) as db:
        _add_views(db, corpus, shard, snapshot)
        try:
            yield db
        except duckdb.Error as error:
            raise _explained(db, error) from None


def _add_views(
    db: duckdb.DuckDBPyConnection, corpus: Corpus, shard: str | None, snapshot: str
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
        sql = catalog_select(corpus, files, schema_types(db, schema))
        if not any(part.files for part in files):
            db.register(f"empty_{name}", schema.empty_table())
            sql = f"select * from empty_{name}"
        db.execute(f"create view {name} as {sql}")
    db.execute(
        "create view videos as select * from all_videos "
        "qualify row_number() over (partition by source order by finished_ms desc) = 1"
    )
    if corpus.is_local:
        names = ("catalog", "videos", "compacted")
        folders = ", ".join(_quoted(corpus.path(name) + "/") for name in names)
        db.execute(f"set allowed_directories = [{folders}]")
        db.execute("set enable_external_access = false")
    db.execute("set lock_configuration = true")


def engine(corpus: Corpus, *, memory: str | None = None) -> duckdb.DuckDBPyConnection:
    """Returns a DuckDB connection that reads the corpus' file system and spills where it may.

    Raises:
        ConfigError: If ``memory`` is no size.
    """
    db = duckdb.connect()
    if not corpus.is_local:
        db.register_filesystem(corpus.fs)
    # Its own default is a folder in the working directory.
    spill = os.path.join(tempfile.gettempdir(), f"dataengine-duckdb-{uuid.uuid4().hex}")
    db.execute(f"set temp_directory = {_quoted(spill)}")
    if memory:
        try:
            db.execute(f"set memory_limit = {_quoted(memory)}")
        except duckdb.Error:
            raise ConfigError(f"Not a size: {memory}", "such as 4GB") from None
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
    prefix = ""
    if not corpus.is_local:
        protocol = corpus.fs.protocol
        prefix = f"{protocol if isinstance(protocol, str) else protocol[0]}://"
    columns = ", ".join(
        f"{_quoted(name)}: {{name: {_quoted(name)}, type: {_quoted(kind)}, default_value: null}}"
        for name, kind in types.items()
    )
    selects = []
    for part in parts:
        if not part.files:
            continue
        paths = ", ".join(_quoted(prefix + path) for path in part.files)
        sql = (
            f"select * from read_parquet([{paths}], schema=map {{{columns}}}, "
            "hive_partitioning=false)"
        )
        if part.without:
            sql += f" where shard not in ({', '.join(map(_quoted, sorted(part.without)))})"
        selects.append(sql)
    return " union all ".join(selects)


def select_statement(
    condition: str,
    select: str | None = None,
    order_by: str | None = None,
    limit: int | None = None,
) -> str:
    """Returns the SQL for a condition over ``clips``, or the text itself if it is a whole SELECT.

    Raises:
        ConfigError: If a whole SELECT comes with --select or --order-by.
    """
    condition = condition.strip().rstrip(";")
    if _SELECT.match(condition):
        if select or order_by:
            raise ConfigError("A whole SELECT takes no --select and no --order-by")
        sql = condition
        return f"select * from ({sql}\n) limit {limit}" if limit is not None else sql
    sql = f"select {select or ', '.join(DEFAULT_COLUMNS)} from clips"
    if condition:
        sql += f" where {condition}\n"  # a comment at its end must end there
    # Without an order the answer would depend on how threads raced.
    sql += f" order by {order_by or 'video_id, start_ms'}"
    return sql + (f" limit {limit}" if limit is not None else "")


def run(db: duckdb.DuckDBPyConnection, sql: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Runs a SELECT; returns its schema and its rows as they come.

    Raises:
        ConfigError: For SQL that is wrong, with the columns there are.
        CorpusError: If a file of the catalog is damaged.
    """
    try:
        statements = db.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError("Expected one condition or one SELECT", _columns_hint(db))
        reader = db.sql(sql).to_arrow_reader(_BATCH_ROWS)
    except duckdb.Error as error:
        raise _explained(db, error) from None
    names = reader.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"Two columns have one name: {', '.join(twice)}", "name one of them with: AS other"
        )
    return reader.schema, _batches(db, reader)


def _batches(
    db: duckdb.DuckDBPyConnection, reader: pa.RecordBatchReader
) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except (duckdb.Error, pa.ArrowException) as error:
        raise _explained(db, error) from None


def _explained(db: duckdb.DuckDBPyConnection, error: Exception) -> EngineError:
    """Returns a one-line error; for an unknown name, with the names there are."""
    lines = str(error).strip().splitlines()
    message = next((line for line in lines if line.strip()), "it cannot be run")
    if isinstance(error, duckdb.IOException | duckdb.InvalidInputException) and _FILE.search(
        message
    ):
        return CorpusError(
            f"Damaged: the catalog cannot be read: {message}",
            "dataengine verify CORPUS names the files",
        )
    hint = (
        _columns_hint(db)
        if isinstance(error, duckdb.BinderException | duckdb.CatalogException)
        else ""
    )
    return ConfigError(f"The query cannot be run: {message}", hint)


def _columns_hint(db: duckdb.DuckDBPyConnection) -> str:
    names = [row[0] for row in db.execute("select column_name from (describe clips)").fetchall()]
    return "columns of clips: " + ", ".join(names)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


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
