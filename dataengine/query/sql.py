# SPDX-License-Identifier: Apache-2.0
"""Conditions and whole SELECTs over the catalog, in DuckDB, locked into the corpus."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, TextIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError

DEFAULT_COLUMNS = ("clip_id", "duration_ms", "language", "clip_score", "motion_score", "caption")
"""What a query shows when nothing is selected."""

_SELECT = re.compile(r"\s*(select|with|from)\b", re.IGNORECASE)
_BATCH_ROWS = 10_000


def connect(corpus: Corpus, shard: str | None = None) -> duckdb.DuckDBPyConnection:
    """Returns a DuckDB connection with the views ``clips`` and ``videos``, and nothing else in reach.

    ``clips`` is the catalog, ``videos`` the current ledger row of every source. The SQL that runs
    on it can read the corpus' catalog and ledger, but no other file, and no network.

    Args:
        corpus: What to look at.
        shard: Shows the clips of this shard alone; None shows all.

    Raises:
        CorpusError: If the catalog or the ledger is damaged.
    """
    db = duckdb.connect()
    if not corpus.is_local:
        db.register_filesystem(corpus.fs)
    try:
        parts = corpus.catalog_parts()
        if shard is not None:
            parts = [corpus.path("catalog", f"{shard}.parquet")]
        _view(db, "clips", corpus, parts, corpus.catalog_schema)
        _view(db, "all_videos", corpus, corpus.video_parts(), records.VIDEO_SCHEMA)
    except duckdb.Error as error:
        raise CorpusError(
            f"Damaged: the catalog of {corpus.url} cannot be read: {str(error).splitlines()[0]}",
            f"dataengine verify {corpus.url} names the files",
        ) from None
    db.execute(
        "create view videos as select * from all_videos "
        "qualify row_number() over (partition by source order by finished_ms desc) = 1"
    )
    if corpus.is_local:
        folders = ", ".join(_quoted(corpus.path(name) + "/") for name in ("catalog", "videos"))
        db.execute(f"set allowed_directories = [{folders}]")
        db.execute("set enable_external_access = false")
    db.execute("set lock_configuration = true")
    return db


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


def _explained(db: duckdb.DuckDBPyConnection, error: Exception) -> ConfigError:
    """Returns a one-line error; for an unknown name, with the names there are."""
    lines = str(error).strip().splitlines()
    message = next((line for line in lines if line.strip()), "it cannot be run")
    hint = (
        _columns_hint(db)
        if isinstance(error, duckdb.BinderException | duckdb.CatalogException)
        else ""
    )
    return ConfigError(f"The query cannot be run: {message}", hint)


def _columns_hint(db: duckdb.DuckDBPyConnection) -> str:
    names = [row[0] for row in db.execute("select column_name from (describe clips)").fetchall()]
    return "columns of clips: " + ", ".join(names)


def _view(
    db: duckdb.DuckDBPyConnection,
    name: str,
    corpus: Corpus,
    parts: Sequence[str],
    schema: pa.Schema,
) -> None:
    if not parts:
        db.register(f"empty_{name}", schema.empty_table())
        db.execute(f"create view {name} as select * from empty_{name}")
        return
    prefix = (
        ""
        if corpus.is_local
        else f"{corpus.fs.protocol if isinstance(corpus.fs.protocol, str) else corpus.fs.protocol[0]}://"
    )
    paths = ", ".join(_quoted(prefix + part) for part in parts)
    db.execute(f"create view {name} as select * from read_parquet([{paths}], union_by_name=true)")


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
