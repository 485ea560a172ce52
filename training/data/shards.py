# SPDX-License-Identifier: Apache-2.0
"""(shard, row group) -> a few of its columns, kept in memory, fetched ahead from object stores."""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.corpus import Corpus
from dataengine.errors import CorpusError
from training.data.index import Shard, arrow_filesystem

_MAX_OPEN_FILES = 32
"""A footer of a large shard is some hundred kB; re-reading one costs a round trip."""


class DamagedError(Exception):
    """A row group that cannot be read in a shard that can."""


class Place(NamedTuple):
    """A read: columns of a row group."""

    shard: Shard
    row_group: int
    columns: tuple[str, ...]
    """Leaves of structs by their dotted path."""


@dataclass(frozen=True)
class RowGroup:
    """What was read."""

    columns: dict[str, pa.Array]
    """By the name of the whole column."""
    num_rows: int
    num_bytes: int


class ShardReader:
    """Reads row groups of any corpora and keeps the last ones in memory.

    Parquet's smallest read is a column of a row group, so clips that share one should be asked
    for close together; the epoch's plan sees to that.

    Args:
        cache_mb: Row groups kept, MiB. One is kept whatever its size.
        read_ahead: Row groups of those that `expect` names that are fetched before they are asked
            for, while the caller is busy with others; local files need none.
    """

    def __init__(self, cache_mb: int, read_ahead: int = 0) -> None:
        self._cache_bytes = cache_mb << 20
        self._cached_bytes = 0
        self._groups: OrderedDict[Place, RowGroup] = OrderedDict()
        self._files: OrderedDict[Shard, _OpenShard] = OrderedDict()
        self._read_ahead = read_ahead
        self._expected: deque[Place] = deque()
        self._coming: dict[Place, Future[RowGroup]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self.num_reads = 0
        """Row groups taken so far that were not in memory."""

    def expect(self, places: Iterable[Place]) -> None:
        """Says what will be asked for next, in this order."""
        self._expected = deque(dict.fromkeys(places))
        for place in self._coming.keys() - set(self._expected):
            self._coming.pop(place).cancel()

    def group(self, place: Place) -> RowGroup:
        """Returns a row group.

        Raises:
            CorpusError: If the shard cannot be opened, or lacks a column or the row group.
            DamagedError: If this row group alone cannot be read.
        """
        if place in self._groups:
            self._groups.move_to_end(place)
            return self._groups[place]
        future = self._coming.pop(place, None)
        # Before this one is waited for: the next one travels meanwhile.
        self._fetch_ahead(place)
        group = future.result() if future else self._file(place.shard).read(place)
        self.num_reads += 1
        self._groups[place] = group
        self._cached_bytes += group.num_bytes
        while self._cached_bytes > self._cache_bytes and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._cached_bytes -= oldest.num_bytes
        return group

    def _fetch_ahead(self, place: Place) -> None:
        if place in self._expected:
            while self._expected.popleft() != place:
                pass
        for coming in self._expected:
            if len(self._coming) >= self._read_ahead:
                break
            if coming not in self._groups and coming not in self._coming:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(self._read_ahead, "read-ahead")
                file = self._file(coming.shard)
                self._coming[coming] = self._threads.submit(file.read, coming)

    def _file(self, shard: Shard) -> "_OpenShard":
        if shard not in self._files:
            self._files[shard] = _OpenShard(shard)
            if len(self._files) > _MAX_OPEN_FILES:
                # Not closed: a thread may be reading it. It closes when nobody holds it.
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]


class _OpenShard:
    """A shard's file, opened when it is first read; one read at a time."""

    def __init__(self, shard: Shard) -> None:
        self._corpus, self._name = Corpus(shard.url), f"shards/{shard.name}.parquet"
        self._file: pq.ParquetFile | None = None
        self._lock = threading.Lock()

    def read(self, place: Place) -> RowGroup:
        with self._lock:
            try:
                table = self._table(place)
            except _UnreadableError:
                # What has gone away is not damage: then it cannot be opened again either.
                self._file = None
                try:
                    table = self._table(place)
                except _UnreadableError as error:
                    where = f"row group {place.row_group} of {self._name}"
                    raise DamagedError(f"{where} is damaged: {error}") from error
        missing = {name.split(".")[0] for name in place.columns} - set(table.column_names)
        if missing:
            raise CorpusError(f"{self._name} lacks {', '.join(sorted(missing))}")
        columns = {name: _whole(table[name]) for name in table.column_names}
        return RowGroup(columns, len(table), table.nbytes)

    def _table(self, place: Place) -> pa.Table:
        if self._file is None:
            self._file = self._open()
        if place.row_group >= self._file.num_row_groups:
            raise CorpusError(
                f"{self._name} has no row group {place.row_group}",
                "the catalog and the shard do not belong together: ingest the videos again",
            )
        try:
            # One thread: readers run beside each other, and the training process needs its cores.
            return self._file.read_row_group(
                place.row_group, columns=list(place.columns), use_threads=False
            )
        except Exception as error:  # Arrow's, and whatever an object store's client raises
            raise _UnreadableError(str(error)) from error

    def _open(self) -> pq.ParquetFile:
        try:
            path = self._corpus.path(self._name)
            filesystem = arrow_filesystem(self._corpus)
            return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=not self._corpus.is_local)
        except Exception as error:  # as above
            raise CorpusError(f"Cannot read {self._name}: {error}") from error


class _UnreadableError(Exception):
    """A row group could not be read, for now."""


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
