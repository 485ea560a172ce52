# SPDX-License-Identifier: Apache-2.0
"""Media of single clips out of the shards, with the row groups read last kept in memory."""

import threading
from collections import OrderedDict
from concurrent.futures import Future

import pyarrow as pa

from dataengine.corpus import Corpus
from dataengine.errors import CorpusError
from dataengine.viewer.catalog import Locator, NotFoundError

_Key = tuple[str, str, int, str]


class Media:
    """Reads videos and frames; made for several threads.

    A row group's media is about 32 MiB. A player that seeks asks for a clip many times, and a page of
    clips that follow each other asks for one row group many times, so what was read stays, up to a
    limit; what is being read is read once however many ask.

    Args:
        corpus: It is only read.
        cache_bytes: What may stay in memory; at least the column read last does.
    """

    def __init__(self, corpus: Corpus, cache_bytes: int = 256 << 20) -> None:
        self._corpus = corpus
        self._limit = cache_bytes
        self._lock = threading.Lock()
        self._columns: OrderedDict[_Key, Future[pa.Table]] = OrderedDict()

    def video(self, clip_id: str, locator: Locator) -> tuple[pa.Buffer, str]:
        """Returns a clip's MP4 without copying it, and a tag that changes when the file does.

        Raises:
            NotFoundError: If the clip is not there any more, or has frames alone.
        """
        cell, tag = self._cell(clip_id, locator, "video")
        data = cell["bytes"] if cell.is_valid else None
        if data is None or not data.is_valid:
            raise NotFoundError("Of this clip there are frames alone")
        return data.as_buffer(), tag

    def frame(self, clip_id: str, locator: Locator, number: int | None) -> bytes:
        """Returns a frame's JPEG, by its number from 0; None takes the middle one.

        Raises:
            NotFoundError: If the clip or the frame is not there.
        """
        cell, _ = self._cell(clip_id, locator, "frames")
        count = len(cell.values) if cell.is_valid else 0
        number = count // 2 if number is None else number
        data = cell.values[number] if 0 <= number < count else None
        if data is None or not data.is_valid:
            raise NotFoundError("There is no such frame")
        return data.as_py()

    def _cell(self, clip_id: str, locator: Locator, column: str) -> tuple[pa.Scalar, str]:
        shard, group, row = locator
        try:
            stamp = self._corpus.fs.ukey(self._corpus.path("shards", f"{shard}.parquet"))
        except FileNotFoundError:
            raise NotFoundError(f"The shard of clip {clip_id} is not there any more") from None
        table = self._column((shard, stamp, group, column))
        # What was removed leaves an empty row in its place.
        if row >= table.num_rows or table["clip_id"][row].as_py() != clip_id:
            raise NotFoundError(f"Clip {clip_id} was removed")
        return table[column][row], f"{stamp[:16]}-{group}-{row}"

    def _column(self, key: _Key) -> pa.Table:
        with self._lock:
            future = self._columns.get(key)
            mine = future is None
            if future is None:
                future = self._columns[key] = Future()
            self._columns.move_to_end(key)
        if mine:
            try:
                future.set_result(self._read(key))
            except BaseException as error:
                with self._lock:
                    self._columns.pop(key, None)
                future.set_exception(error)
                raise
            self._shrink()
        return future.result()

    def _read(self, key: _Key) -> pa.Table:
        shard, _, group, column = key
        with self._corpus.open_shard(shard) as file:
            if group >= file.num_row_groups:
                raise NotFoundError("The shard was written again")
            try:
                return file.read_row_group(group, columns=["clip_id", column])
            except (OSError, pa.ArrowException) as error:
                raise CorpusError(f"Shard {shard} cannot be read: {error}") from None

    def _shrink(self) -> None:
        with self._lock:
            held = {key: f.result().nbytes for key, f in self._columns.items() if f.done()}
            total = sum(held.values())
            for key in [*held][:-1]:
                if total <= self._limit:
                    break
                total -= held[key]
                del self._columns[key]
