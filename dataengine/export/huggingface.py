# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face dataset: Parquet files with the ``Video`` feature, and a dataset card.

A part of a corpus is written as ``data/000000.parquet`` and on, with the schema, the metadata and the
row groups of a shard. A whole corpus needs no writing: ``data/<shard>.parquet`` is the shard itself,
as a hard link where the disk allows, else as a copy. Only a shard that cannot stand as it is is
written: one with rows that were emptied by a takedown, or without columns that others have.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus, media_bytes, row_groups, writer_options
from dataengine.errors import CorpusError
from dataengine.export.card import card
from dataengine.export.clips import ClipStream
from dataengine.export.pieces import (
    Report,
    Sync,
    commit,
    comparison,
    count,
    remove_file,
    sweep,
)
from dataengine.export.selection import PLACE_SCHEMA, Choice
from dataengine.export.settings import ExportSettings
from dataengine.query.literals import quoted

ROW_GROUP_BYTES = 32 << 20
"""Media of a row group, as in shards."""


class HuggingFaceWriter:
    """Writes pieces as ``data/000000.parquet``; see `dataengine.export.pieces.Writer`."""

    columns = None
    max_clips = None
    folders = ("data",)

    def __init__(self, corpus: Corpus, folder: Corpus, settings: ExportSettings) -> None:
        self.max_bytes: int | None = settings.max_bytes
        self._folder = folder
        schema = corpus.clip_schema
        self._schema = schema.with_metadata(records.hugging_face_metadata(schema))

    def write(self, piece: str, clips: Iterable[pa.Table]) -> pa.Table | None:
        """Writes a Parquet file."""

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, self._schema, **writer_options(self._schema)) as writer:
                for group in _regrouped(clips, self._schema):
                    writer.write_table(group, row_group_size=group.num_rows)

        self._folder.publish(f"data/{piece}.parquet", write)
        return None

    def remove(self, piece: str) -> None:
        """Removes a Parquet file."""
        remove_file(self._folder, f"data/{piece}.parquet")


def link_shards(corpus: Corpus, folder: Corpus, places: str, report: Report) -> Sync:
    """Brings a whole corpus' files up to date; see `dataengine.export.pieces.sync`."""
    sweep(folder, ("index", "data"))
    done = Sync()
    settings = ExportSettings(corpus=corpus.url, format="huggingface")
    writer = HuggingFaceWriter(corpus, folder, settings)
    with comparison(folder, places) as db:
        summed = "count(*) as n, bit_xor(hash(clip_id, digest)) as x"
        rows = db.execute(
            f"with wanted as (select shard, {summed} from chosen group by shard), "
            f"there as (select piece, {summed} from held group by piece) "
            "select coalesce(shard, piece), wanted.n, piece is not null, "
            "wanted.n is not distinct from there.n and wanted.x is not distinct from there.x "
            "from wanted full join there on shard = piece order by 1"
        ).fetchall()
        clips_done = 0
        for shard, num_clips, known, same in rows:
            if num_clips is None:
                writer.remove(shard)
                remove_file(folder, f"index/{shard}.parquet")
                done.removed += (shard,)
                continue
            clips_done += num_clips
            if not same:
                table = db.execute(
                    f"select * from chosen where shard = {quoted(shard)} order by row_group, row"
                ).to_arrow_table()
                _link_or_write(corpus, folder, writer, shard, table.cast(PLACE_SCHEMA))
                done.num_written += num_clips
                done.added += not known
                done.rewritten += (shard,) if known else ()
            report(clips_done)
    count(folder, done)
    return done


def write_card(
    corpus: Corpus,
    db: duckdb.DuckDBPyConnection,
    choice: Choice,
    settings: ExportSettings,
    folder: Corpus,
    found: dict[str, Any],
) -> None:
    """Writes ``README.md``.

    Raises:
        CorpusError: If the shards are to be the dataset's files, but hold emptied rows.
    """
    if settings.card_only:
        removed = db.execute(
            f"select count(*) from videos where status = {quoted(records.REMOVED)} "
            "and shard is not null"
        ).fetchone()
        if removed is not None and removed[0]:
            raise CorpusError(
                f"{removed[0]} videos were removed from this corpus: its shards hold empty rows",
                "export to a folder of its own, without --card-only",
            )
    files = "shards/*.parquet" if settings.card_only else "data/*.parquet"
    text = card(corpus, db, choice, settings, found, files)
    folder.publish("README.md", lambda file: file.write(text.encode()))


def _link_or_write(
    corpus: Corpus, folder: Corpus, writer: HuggingFaceWriter, shard: str, places: pa.Table
) -> None:
    with corpus.open_shard(shard) as file:
        whole = file.metadata.num_rows == places.num_rows
        whole = whole and file.schema_arrow.equals(corpus.clip_schema)
        # A takedown may have come since the catalog was asked.
        whole = whole and not file.read(columns=["clip_id"])["clip_id"].null_count
    if whole:
        _link(corpus, folder, f"shards/{shard}.parquet", f"data/{shard}.parquet")
        commit(folder, shard, [places], None)
        return
    held: list[pa.Table] = []

    def noted() -> Iterator[pa.Table]:
        for table in ClipStream(corpus, places.to_batches()).take():
            held.append(table.select(PLACE_SCHEMA.names))
            yield table

    writer.write(shard, noted())
    commit(folder, shard, held, None)


def _link(corpus: Corpus, folder: Corpus, name: str, target: str) -> None:
    """Makes a hard link, or a copy where there can be none."""
    if corpus.is_local and folder.is_local:
        os.makedirs(os.path.dirname(folder.path(target)), exist_ok=True)
        temporary = folder.path(f"{target}.{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(OSError):  # another disk, or one without hard links
            os.link(corpus.path(name), temporary)
            os.replace(temporary, folder.path(target))
            # Two names of one file: then rename does nothing and leaves both.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            return

    def write(file: BinaryIO) -> None:
        with corpus.fs.open(corpus.path(name), "rb") as source:
            shutil.copyfileobj(cast(BinaryIO, source), file, 16 << 20)

    folder.publish(target, write)


def _regrouped(clips: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields clips in row groups of their own; holds little more than one."""
    waiting: list[pa.Table] = []
    waiting_bytes = 0
    for table in clips:
        rows = table.select(schema.names)
        sizes = media_bytes(rows)
        for start, stop in row_groups(sizes, max(ROW_GROUP_BYTES - waiting_bytes, 1)):
            waiting.append(rows.slice(start, stop - start))
            waiting_bytes += sum(sizes[start:stop])
            if waiting_bytes >= ROW_GROUP_BYTES:
                yield pa.concat_tables(waiting).cast(schema)
                waiting, waiting_bytes = [], 0
    if waiting:
        yield pa.concat_tables(waiting).cast(schema)
