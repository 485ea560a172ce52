# SPDX-License-Identifier: Apache-2.0
"""New annotations into finished shards: a shard and its catalog twin, replaced whole.

Rows stay where they are, so locators, subsets and running readers stay right. The shard is replaced
first and its twin last: THE COMMIT. A file's metadata says which settings wrote which columns last
(`marks`), so work that was cut short is known: a shard whose twin lacks the mark is annotated again,
or, where the shard itself has it already, only its twin is made again.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus, without_nan, write_small, writer_options

_MARKS = b"dataengine.annotated"


def marks(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    """Returns column -> fingerprint of the settings that annotated it last, from a file's metadata."""
    return json.loads((metadata or {}).get(_MARKS, b"{}"))


def is_marked(metadata: Mapping[bytes, bytes] | None, columns: Sequence[str], mark: str) -> bool:
    """Returns whether all the columns were annotated last with settings of that fingerprint."""
    found = marks(metadata)
    return all(found.get(name) == mark for name in columns)


def rewrite_shard(
    corpus: Corpus,
    shard: str,
    updates: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, pa.DataType],
    mark: str,
    run_id: str,
) -> None:
    """Replaces columns of a committed shard, then its catalog twin.

    Args:
        corpus: Whose current run is ``run_id``.
        shard: Its name.
        updates: clip_id -> column -> new value; other clips and other columns stay as they are.
        columns: The columns that are written, new ones among them, with their types.
        mark: Fingerprint of the settings that made the values.
        run_id: The run that writes.

    Raises:
        SupersededError: If another run took the corpus over.
    """
    with corpus.open_shard(shard) as file:
        old = file.schema_arrow
        schema = _marked(_with_columns(old, columns), mark, columns)

        def write(out: BinaryIO) -> None:
            with pq.ParquetWriter(out, schema, **writer_options(schema)) as writer:
                for group in range(file.metadata.num_row_groups):
                    rows = _updated(file.read_row_group(group), updates, columns)
                    rows = without_nan(rows.select(schema.names).cast(schema))
                    writer.write_table(rows, row_group_size=max(rows.num_rows, 1))

        corpus.check_current(run_id)
        corpus.publish(f"shards/{shard}.parquet", write)
    rewrite_twin(corpus, shard, run_id)


def rewrite_twin(corpus: Corpus, shard: str, run_id: str) -> None:
    """Makes a shard's catalog twin again, from the shard: the commit.

    Raises:
        SupersededError: If another run took the corpus over.
    """
    shard_only = corpus.shard_columns
    with corpus.open_shard(shard) as file:
        kept = [name for name in file.schema_arrow.names if name not in shard_only]
        groups = []
        for group in range(file.metadata.num_row_groups):
            rows = file.read_row_group(group, columns=kept)
            count = rows.num_rows
            locators = {
                "shard": pa.repeat(pa.scalar(shard), count),
                "row_group": pa.repeat(pa.scalar(group, pa.int32()), count),
                "row": pa.array(range(count), pa.int32()),
            }
            for name, column in locators.items():
                rows = rows.append_column(name, column)
            groups.append(rows.filter(rows["clip_id"].is_valid()))  # removed clips are empty rows
        metadata = {_MARKS: json.dumps(marks(file.schema_arrow.metadata)).encode()}
    catalog = pa.concat_tables(groups).replace_schema_metadata(metadata)
    corpus.check_current(run_id)
    corpus.publish(f"catalog/{shard}.parquet", lambda out: write_small(catalog, out))


def _with_columns(schema: pa.Schema, columns: Mapping[str, pa.DataType]) -> pa.Schema:
    for name, type_ in columns.items():
        if name not in schema.names:
            schema = schema.append(pa.field(name, type_))
    return schema


def _marked(schema: pa.Schema, mark: str, columns: Mapping[str, Any]) -> pa.Schema:
    """Returns the schema with Hugging Face's features of all columns, and the mark."""
    all_marks = marks(schema.metadata) | dict.fromkeys(columns, mark)
    return schema.with_metadata(
        records.hugging_face_metadata(schema) | {_MARKS: json.dumps(all_marks).encode()}
    )


def _updated(
    rows: pa.Table, updates: Mapping[str, Mapping[str, Any]], columns: Mapping[str, pa.DataType]
) -> pa.Table:
    """Returns the rows with new values; an empty row stays empty."""
    clip_ids = rows["clip_id"].to_pylist()
    for name, type_ in columns.items():
        exists = name in rows.column_names
        old = rows[name].to_pylist() if exists else [None] * rows.num_rows
        values = [
            updates.get(clip_id or "", {}).get(name, before)
            for clip_id, before in zip(clip_ids, old, strict=True)
        ]
        column = pa.array(values, type_)
        if exists:
            rows = rows.set_column(rows.column_names.index(name), name, column)
        else:
            rows = rows.append_column(name, column)
    return rows
