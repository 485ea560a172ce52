# SPDX-License-Identifier: Apache-2.0
"""Reading chosen clips with their media, a row group at a time, each row group once."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.corpus import Corpus, media_bytes
from dataengine.export.selection import PLACE_SCHEMA


class ClipStream:
    """Clips in the order of their places; holds two row groups: the next is read meanwhile.

    A clip that has left the corpus since its place was looked up is passed over.

    Args:
        corpus: Where they lie.
        places: PLACE_SCHEMA in order of shard, row group and row.
        columns: Columns to read, ``clip_id`` among them; None reads all.
    """

    def __init__(
        self,
        corpus: Corpus,
        places: Iterable[pa.RecordBatch],
        columns: Sequence[str] | None = None,
    ) -> None:
        schema = corpus.clip_schema
        self.schema = (
            schema if columns is None else pa.schema([schema.field(name) for name in columns])
        )
        self._corpus = corpus
        self._tables = _ahead(self._read(places))
        self._next: pa.Table | None = None

    @property
    def more(self) -> bool:
        """Whether there is another clip."""
        while self._next is None or not self._next.num_rows:
            self._next = next(self._tables, None)
            if self._next is None:
                return False
        return True

    def take(
        self, max_bytes: int | None = None, max_clips: int | None = None
    ) -> Iterator[pa.Table]:
        """Yields clips with the columns of PLACE_SCHEMA behind their own, at least one, up to limits.

        Args:
            max_bytes: Media bytes of all that is yielded; one clip may be larger. None for no limit.
            max_clips: Clips; None for no limit.
        """
        taken_bytes = taken = 0
        while self.more and self._next is not None:
            count = 0
            for size in media_bytes(self._next) if max_bytes else [0] * self._next.num_rows:
                over = max_bytes is not None and taken_bytes + size > max_bytes
                if taken and (over or (max_clips is not None and taken >= max_clips)):
                    break
                taken_bytes += size
                taken += 1
                count += 1
            table = self._next
            self._next = table.slice(count)
            if count:
                yield table.slice(0, count)
            if count < table.num_rows:
                return

    def _read(self, places: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        rows = (
            row
            for batch in places
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
        )
        for shard, of_shard in groupby(rows, key=lambda row: row[1]):
            with self._corpus.open_shard(shard) as file:
                for group, of_group in groupby(of_shard, key=lambda row: row[2]):
                    yield self._group(file, group, list(of_group))

    def _group(self, file: pq.ParquetFile, group: int, places: list[tuple]) -> pa.Table:
        there = set(file.schema_arrow.names)
        names = [name for name in self.schema.names if name in there]
        table = file.read_row_group(group, columns=names)
        rows = [place[3] for place in places]
        found = table["clip_id"].to_pylist()
        held = [
            row < len(found) and found[row] == place[0]
            for row, place in zip(rows, places, strict=True)
        ]
        if not all(held):
            places = [place for place, is_held in zip(places, held, strict=True) if is_held]
            rows = [place[3] for place in places]
        if rows and all(b - a == 1 for a, b in pairwise(rows)):
            table = table.slice(rows[0], len(rows))
        else:
            table = table.take(pa.array(rows, pa.int64()))
        columns = [
            table[field.name].cast(field.type)
            if field.name in there
            # A shard that annotation has not come to yet lacks the added columns.
            else pa.nulls(table.num_rows, field.type)
            for field in self.schema
        ]
        own = pa.Table.from_arrays(columns, schema=self.schema)
        behind = pa.Table.from_pylist(
            [dict(zip(PLACE_SCHEMA.names, place, strict=True)) for place in places],
            schema=PLACE_SCHEMA,
        )
        for field in PLACE_SCHEMA:
            if field.name != "clip_id":
                own = own.append_column(field, behind[field.name])
        return own


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yields tables, the next of which is read in a thread while this one is worked on."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="export-read")
    try:
        coming = pool.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = pool.submit(next, tables, None)
            yield table
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
