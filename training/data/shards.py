# SPDX-License-Identifier: Apache-2.0
"""(shard, row group, row) -> the clip's caption and media, by whole row groups of few columns."""

from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.corpus import Corpus
from dataengine.errors import CorpusError
from training.data.index import arrow_filesystem

_MAX_OPEN_FILES = 32
"""A footer of a large shard is some hundred kB; re-reading one costs a round trip."""


class ShardReader:
    """Reads rows of shards and keeps the last row groups in memory.

    Parquet's smallest read is a column of a row group, so clips that share one should be asked
    for close together; the epoch's plan sees to that.

    Args:
        url: The corpus.
        columns: What to read; columns left out (the MP4s, for one) cost nothing.
        cache_mb: Row groups kept, MiB. One is kept whatever its size.
    """

    def __init__(self, url: str, columns: tuple[str, ...], cache_mb: int) -> None:
        self._corpus = Corpus(url)
        self._filesystem = arrow_filesystem(self._corpus)
        self._columns = columns
        self._cache_bytes = cache_mb << 20
        self._cached_bytes = 0
        self._tables: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self.num_reads = 0
        """Row groups read so far."""

    def row(self, shard: str, row_group: int, row: int) -> dict[str, Any]:
        """Returns one clip's columns as Python values.

        Raises:
            CorpusError: If the shard cannot be read or lacks a column or the row.
        """
        table = self._table(shard, row_group)
        if row >= len(table):
            raise CorpusError(
                f"shards/{shard}.parquet, row group {row_group} has no row {row}",
                "the catalog and the shard do not belong together: ingest the videos again",
            )
        return table.slice(row, 1).to_pylist()[0]

    def _table(self, shard: str, row_group: int) -> pa.Table:
        key = (shard, row_group)
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        try:
            # One thread: readers run beside each other, and the training process needs its cores.
            table = self._file(shard).read_row_group(
                row_group, columns=list(self._columns), use_threads=False
            )
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"Cannot read shards/{shard}.parquet: {error}") from error
        missing = set(self._columns) - set(table.column_names)
        if missing:
            raise CorpusError(f"shards/{shard}.parquet lacks {', '.join(sorted(missing))}")
        self.num_reads += 1
        self._tables[key] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._tables) > 1:
            _, oldest = self._tables.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return table

    def _file(self, shard: str) -> pq.ParquetFile:
        if shard not in self._files:
            path = self._corpus.path("shards", f"{shard}.parquet")
            self._files[shard] = pq.ParquetFile(path, filesystem=self._filesystem, pre_buffer=True)
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]
