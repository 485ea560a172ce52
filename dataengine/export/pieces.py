# SPDX-License-Identifier: Apache-2.0
"""Keeping an export's files up to date with the corpus: what is gone goes, what is new is added.

An export with media is made of pieces (a tar, a Parquet file, a folder of videos). Beside each piece
lies its index, ``index/<piece>.parquet``: which clips it holds, and a hash of what the catalog said of
each. The index is written last: a piece without one does not count and is written again. A run compares
all indexes with what is chosen now:

- a piece of which a clip is gone, or says something else now, is written again without or with it, and
  a piece of which nothing is left is removed;
- chosen clips that no index lists go into new pieces, in the order of their places.

Going on after a kill, following the corpus as it grows, and a takedown are hence the same thing, and
what comes of a first run does not depend on how often it was killed.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.corpus import Corpus, write_small
from dataengine.export.clips import ClipStream
from dataengine.export.selection import PLACE_SCHEMA, read_places
from dataengine.query.literals import quoted
from dataengine.query.sql import engine, exact_url_of

INDEX_SCHEMA = pa.schema(
    [pa.field("piece", pa.string()), *PLACE_SCHEMA, pa.field("problem", pa.string())]
)
"""One row of ``index/<piece>.parquet``. ``problem`` says why a clip is not in the piece after all."""

Report = Callable[[int], None]
"""Told how many clips are done, counted from the start of the run."""


class Writer(Protocol):
    """A format made of pieces."""

    @property
    def columns(self) -> Sequence[str] | None:
        """Columns of a shard that it reads; None reads all."""

    @property
    def max_bytes(self) -> int | None:
        """Media bytes of a piece; None for no limit."""

    @property
    def max_clips(self) -> int | None:
        """Clips of a piece; None for no limit."""

    @property
    def folders(self) -> tuple[str, ...]:
        """Where its pieces lie below the export's folder."""
        ...

    def write(self, piece: str, clips: Iterable[pa.Table]) -> pa.Table | None:
        """Writes a piece whole, or not at all.

        Args:
            piece: Its name.
            clips: Columns asked for and those of PLACE_SCHEMA; to be read to the end.

        Returns:
            Further columns of the index, a row per clip, ``problem`` perhaps among them.
        """
        ...

    def remove(self, piece: str) -> None:
        """Removes a piece; it may be gone already."""
        ...


@dataclass
class Sync:
    """What a run did.

    Attributes:
        num_clips: Clips that the export holds now.
        num_problems: Clips left out, each with its reason in the index.
        num_pieces: Pieces there are now.
        num_written: Clips written by this run.
        bytes_written: Their media.
        rewritten: Pieces that were written again.
        removed: Pieces that were removed.
        added: Number of new pieces.
    """

    num_clips: int = 0
    num_problems: int = 0
    num_pieces: int = 0
    num_written: int = 0
    bytes_written: int = 0
    rewritten: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    added: int = 0


def sync(corpus: Corpus, folder: Corpus, places: str, writer: Writer, report: Report) -> Sync:
    """Brings the pieces of an export up to date.

    Args:
        corpus: Where the clips are.
        folder: Where the export is.
        places: Local file of PLACE_SCHEMA: what is chosen now.
        writer: The format.
        report: Called as clips are done.
    """
    sweep(folder, ("index", *writer.folders))
    done = Sync()
    with comparison(folder, places) as db:
        stale = db.execute(
            "select piece, count(chosen.clip_id) > 0 from held left join chosen "
            "on held.clip_id = chosen.clip_id and held.digest = chosen.digest "
            "group by piece having count(*) > count(chosen.clip_id) order by piece"
        ).fetchall()
        # A clip that says something else now belongs to the piece that holds it.
        kept = (
            "select chosen.* from chosen semi join (select clip_id from held where piece = {}) "
            "using (clip_id) order by shard, row_group, row"
        )
        for piece, _ in stale:
            statement = kept.format(quoted(piece))
            stream = ClipStream(corpus, _batches(db, statement), writer.columns)
            if stream.more:
                _write(folder, writer, piece, stream.take(), done, report)
                done.rewritten += (piece,)
            else:
                writer.remove(piece)
                remove_file(folder, f"index/{piece}.parquet")
                done.removed += (piece,)
        missing = (
            "select chosen.* from chosen anti join held using (clip_id) "
            "order by shard, row_group, row"
        )
        untouched = not folder.names("index")
        new = read_places(places) if untouched else _batches(db, missing)
        stream = ClipStream(corpus, new, writer.columns)
        number = _next_number(folder)
        while stream.more:
            clips = stream.take(writer.max_bytes, writer.max_clips)
            _write(folder, writer, f"{number:06d}", clips, done, report)
            done.added += 1
            number += 1
    count(folder, done)
    return done


@contextlib.contextmanager
def comparison(folder: Corpus, places: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens a connection with the tables ``chosen`` (a file of PLACE_SCHEMA) and ``held`` (all indexes)."""
    with engine(folder) as db:
        db.execute(f"create view chosen as select * from read_parquet({quoted(places)})")
        if folder.names("index"):
            pattern = exact_url_of(folder, folder.path("index")) + "/*.parquet"
            # A table, because files change while it is asked. Indexes hold far less than clips.
            db.execute(
                "create table held as select piece, clip_id, digest "
                f"from read_parquet({quoted(pattern)}, union_by_name = true)"
            )
        else:
            db.execute("create table held (piece varchar, clip_id varchar, digest ubigint)")
        yield db


def count(folder: Corpus, done: Sync) -> None:
    """Fills in what an export holds, from its indexes."""
    done.num_pieces = len(folder.names("index"))
    if done.num_pieces:
        pattern = exact_url_of(folder, folder.path("index")) + "/*.parquet"
        with engine(folder) as db:
            row = db.execute(
                "select count(*) filter (problem is null), count(problem) "
                f"from read_parquet({quoted(pattern)}, union_by_name = true)"
            ).fetchone()
        assert row is not None  # an aggregate always gives one row
        done.num_clips, done.num_problems = row


def commit(folder: Corpus, piece: str, places: list[pa.Table], more: pa.Table | None) -> None:
    """Writes a piece's index, which makes the piece count."""
    index = pa.concat_tables(places).combine_chunks()
    index = index.add_column(0, "piece", pa.repeat(pa.scalar(piece), index.num_rows))
    for name in more.column_names if more is not None else ():
        index = index.append_column(name, more[name]) if more is not None else index
    if "problem" not in index.column_names:
        index = index.append_column("problem", pa.nulls(index.num_rows, pa.string()))
    folder.publish(f"index/{piece}.parquet", lambda file: write_small(index, file))


def remove_file(folder: Corpus, name: str) -> None:
    """Removes a file; it may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        folder.fs.rm_file(folder.path(name))


def sweep(folder: Corpus, names: Iterable[str]) -> None:
    """Removes what a killed run left half written."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            for path in folder.fs.ls(folder.path(name), detail=False):
                if PurePosixPath(path).name.endswith(".tmp"):
                    folder.fs.rm(path, recursive=True)


@contextlib.contextmanager
def temporary_file() -> Iterator[str]:
    """Gives the name of a file that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="dataengine-export-") as folder:
        yield os.path.join(folder, "places.parquet")


def _write(
    folder: Corpus,
    writer: Writer,
    piece: str,
    clips: Iterator[pa.Table],
    done: Sync,
    report: Report,
) -> None:
    places: list[pa.Table] = []

    def noted() -> Iterator[pa.Table]:
        for table in clips:
            yield table
            places.append(table.select(PLACE_SCHEMA.names))
            done.num_written += table.num_rows
            done.bytes_written += table.nbytes
            report(done.num_written)

    more = writer.write(piece, noted())
    commit(folder, piece, places, more)


def _batches(db: duckdb.DuckDBPyConnection, statement: str) -> Iterator[pa.RecordBatch]:
    # On a cursor of its own: other questions are asked while its answer is read.
    for batch in db.cursor().sql(statement).to_arrow_reader(10_000):
        yield batch.cast(PLACE_SCHEMA)


def _next_number(folder: Corpus) -> int:
    numbers = [int(name) for name in folder.names("index") if name.isdigit()]
    return max(numbers, default=-1) + 1


def index_rows(folder: Corpus) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields every piece and the rows of its index, in order of the pieces."""
    for piece in folder.names("index"):
        with folder.fs.open(folder.path("index", f"{piece}.parquet"), "rb") as file:
            yield piece, pq.read_table(file).to_pylist()
