# SPDX-License-Identifier: Apache-2.0
"""Rows of a query as a file that is sent while it is written."""

import codecs
import contextlib
import io
import queue
import threading
import time
from typing import BinaryIO, Literal, TextIO, cast

import duckdb

from dataengine.query import sql
from dataengine.viewer.catalog import Catalog

Format = Literal["csv", "jsonl", "parquet"]

_CHUNK_BYTES = 1 << 20
_MOST_WAITING = 4
"""Chunks that are written but not yet sent; then the writer waits for the reader."""

_STALLED_S = 600.0
"""A reader that takes nothing for so long is gone."""

_SLOTS = threading.Semaphore(2)
"""Rows are written for so many readers at once; others wait."""


class Export:
    """Writes rows in a thread of its own, for a reader that takes them chunk by chunk.

    Args:
        catalog: Where the rows are.
        subset: Whose clips the statement sees; empty for all.
        statement: A SELECT.
        kind: Of the file.
    """

    def __init__(self, catalog: Catalog, subset: str, statement: str, kind: Format) -> None:
        self._catalog = catalog
        self._subset = subset
        self._statement = statement
        self._kind = kind
        self._pipe = _Pipe()
        self._db: duckdb.DuckDBPyConnection | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="export", daemon=True)

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def take(self) -> bytes | None:
        """Returns the next chunk, or None after the last; call it until then, or `stop`.

        Raises:
            Exception: What stopped the writer, so that a file that is not whole does not look so.
        """
        chunk = self._pipe.waiting.get()
        if chunk is None and self._error is not None:
            raise self._error
        return chunk

    def stop(self) -> None:
        """Gives up what is not yet written."""
        self._pipe.cancel()
        while self._thread.is_alive():
            db = self._db
            if db is not None:
                with contextlib.suppress(duckdb.Error):
                    db.interrupt()
            self._thread.join(0.05)

    def _work(self) -> None:
        try:
            while not _SLOTS.acquire(timeout=0.1):
                if self._pipe.cancelled:
                    return
            try:
                self._write()
            finally:
                _SLOTS.release()
        except BrokenPipeError:
            pass
        except Exception as error:  # noqa: BLE001  the reader raises it
            self._error = error
        finally:
            self._pipe.end()

    def _write(self) -> None:
        try:
            with self._catalog.connection(self._subset) as connection:
                self._db = connection.db
                schema, batches = sql.run(connection.db, self._statement)
                match self._kind:
                    case "parquet":
                        sql.write_parquet(schema, batches, cast(BinaryIO, self._pipe))
                    case "csv" | "jsonl":
                        text = cast(TextIO, codecs.getwriter("utf-8")(self._pipe))
                        if self._kind == "csv":
                            sql.write_csv(schema, batches, text)
                        else:
                            sql.write_jsonl(batches, text)
                self._pipe.send()
        finally:
            self._db = None


class _Pipe(io.RawIOBase):
    """A file whose chunks wait in a short queue."""

    def __init__(self) -> None:
        self.waiting: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._buffer = bytearray()
        self._written = 0
        self.cancelled = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = memoryview(data).nbytes
        self._buffer += data
        self._written += size
        if len(self._buffer) >= _CHUNK_BYTES:
            self.send()
        return size

    def send(self) -> None:
        if self._buffer:
            self._put(bytes(self._buffer))
            self._buffer.clear()

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._put(None)

    def cancel(self) -> None:
        self.cancelled = True

    def _put(self, chunk: bytes | None) -> None:
        ends = time.monotonic() + _STALLED_S
        while not self.cancelled and time.monotonic() < ends:
            try:
                self.waiting.put(chunk, timeout=0.1)
            except queue.Full:
                continue
            return
        raise BrokenPipeError
