# SPDX-License-Identifier: Apache-2.0
"""Reading what lies in shards alone: embeddings, and any other column, of clips chosen in SQL.

Legend: N clips, D embedding width.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import duckdb
import numpy as np
import pyarrow as pa

from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError

IMAGE_EMBEDDING = "clip_image_embedding"
"""Column of the clips' unit vectors: what is searched and compared."""

ADD_EMBEDDINGS = (
    "dataengine annotate CORPUS --pipeline FILE --stage score --set stages.score.embeddings=true"
)
"""What to type where there are none."""

_AHEAD = 4
"""Pieces per thread that may be ready or under way: bounds what is held in memory."""

_PIECE_ROWS = 8192
"""Clips of one shard that are read at a time."""

_BATCH_ROWS = 100_000

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Author:
    """The model that wrote a column, as the provenance names it."""

    model: str
    revision: str


@dataclass(frozen=True)
class Coverage:
    """Who wrote the embeddings of some clips.

    Attributes:
        author: The one model.
        num_with: Clips that have an embedding.
        num_without: Clips that have none, because their model failed.
    """

    author: Author
    num_with: int
    num_without: int


@dataclass
class Piece:
    """Clips of one shard.

    Attributes:
        shard: Its name.
        keys: Of each clip, what the caller knows it by.
        groups: Row group of each clip, ascending.
        rows: Row inside the row group of each clip.
    """

    shard: str
    keys: list[object] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def coverage(db: duckdb.DuckDBPyConnection, source: str) -> Coverage:
    """Returns who wrote the embeddings of clips; the catalog's provenance says it.

    Args:
        db: With the view ``clips``.
        source: What follows FROM: ``clips where ...``.

    Raises:
        CorpusError: If no clip has an embedding, whole shards lack them, or two models wrote them.
            Vectors of two models cannot be compared.
    """
    # Asked without alternatives: an entry with a note is of a model that failed on that clip.
    entry = (
        f"list_filter(provenance, lambda p: p.column = '{IMAGE_EMBEDDING}' and p.note is null)[1]"
    )
    db.execute(
        "create or replace temp table authors as select shard, entry.model as model, "
        "coalesce(entry.revision, '') as revision, count(*) as n "
        f"from (select shard, {entry} as entry from {source}) group by all"
    )
    found = db.execute(
        "select model, revision, sum(n)::bigint from authors where model is not null "
        "group by all order by all"
    ).fetchall()
    without = db.execute(
        "select coalesce(sum(n), 0)::bigint from authors where model is null"
    ).fetchone()
    bare = db.execute(
        "select count(*), (select count(distinct shard) from authors), coalesce(sum(n), 0)::bigint "
        "from (select sum(n) as n from authors group by shard having count(model) = 0)"
    ).fetchone()
    db.execute("drop table authors")
    assert without is not None  # an aggregate always gives one row
    assert bare is not None
    if not found:
        if not without[0]:
            raise CorpusError("No clip passes the conditions")
        raise CorpusError(
            f"No embeddings were kept: none of {without[0]:,} clips has one", ADD_EMBEDDINGS
        )
    if len(found) > 1:
        models = "; ".join(f"{model} {revision} ({n:,} clips)" for model, revision, n in found)
        raise CorpusError(
            f"The embeddings are of {len(found)} models, which cannot be compared: {models}",
            f"write all with one: {ADD_EMBEDDINGS}",
        )
    if bare[0]:
        raise CorpusError(
            f"{bare[0]:,} of {bare[1]:,} shards lack embeddings ({bare[2]:,} clips)",
            f"finish them, with the same settings: {ADD_EMBEDDINGS}",
        )
    ((model, revision, num_with),) = found
    return Coverage(Author(model, revision), num_with, without[0])


def pieces(db: duckdb.DuckDBPyConnection, sql: str) -> Iterator[Piece]:
    """Yields the clips of a SELECT, shard after shard, in the order in which they lie there.

    Args:
        db: Nothing else may run on it before the last piece.
        sql: SELECT of ``shard, row_group, row, key``.
    """
    reader = db.sql(
        f"select shard, row_group, row, key from ({sql}) order by shard, row_group, row"
    ).to_arrow_reader(_BATCH_ROWS)
    piece = Piece("")
    for batch in reader:
        columns = [batch[name].to_pylist() for name in ("shard", "row_group", "row", "key")]
        for shard, group, row, key in zip(*columns, strict=True):
            if shard != piece.shard or len(piece.keys) == _PIECE_ROWS:
                if piece.keys:
                    yield piece
                piece = Piece(shard)
            piece.groups.append(group)
            piece.rows.append(row)
            piece.keys.append(key)
    if piece.keys:
        yield piece


def in_threads(
    work: Callable[[Piece], ResultT], asked: Iterator[Piece], threads: int
) -> Iterator[ResultT]:
    """Yields ``work`` of each piece, in order; a few are ready before they are asked for."""
    with ThreadPoolExecutor(threads, "shards") as pool:
        waiting = collections.deque()
        try:
            for piece in asked:
                waiting.append(pool.submit(work, piece))
                if len(waiting) >= threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_column(
    corpus: Corpus, piece: Piece, column: str
) -> Iterator[tuple[list[object], pa.Array]]:
    """Yields keys and values of a piece's clips, row group after row group.

    Raises:
        CorpusError: If the shard cannot be read or is not what the catalog says.
    """
    try:
        with corpus.open_shard(piece.shard) as file:
            if column not in file.schema_arrow.names:
                raise CorpusError(f"Shard {piece.shard} has no column {column}")
            for group, start, stop in _runs(piece.groups):
                values = file.read_row_group(group, columns=[column])[column].combine_chunks()
                yield piece.keys[start:stop], values.take(pa.array(piece.rows[start:stop]))
    except (OSError, pa.ArrowException, IndexError) as error:
        raise CorpusError(
            f"Shard {piece.shard} cannot be read: {str(error).splitlines()[0]}",
            "dataengine verify CORPUS says what is wrong",
        ) from None


def read_vectors(corpus: Corpus, piece: Piece) -> tuple[list[object], np.ndarray]:
    """Returns the keys of those clips of a piece that have an embedding, and the embeddings.

    Returns:
        N keys, and float32 unit vectors [N, D].

    Raises:
        CorpusError: If the shard cannot be read, or its embeddings differ in width.
    """
    keys: list[object] = []
    parts: list[np.ndarray] = []
    for names, values in read_column(corpus, piece, IMAGE_EMBEDDING):
        if values.null_count:
            names = [
                name for name, held in zip(names, values.is_valid(), strict=True) if held.as_py()
            ]
            values = values.drop_null()
        if not len(values):
            continue
        (width, *others) = values.value_lengths().unique().to_pylist()
        if others or not width:
            raise CorpusError(f"Shard {piece.shard}: its embeddings differ in width")
        parts.append(values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width))
        keys += names
    if len({part.shape[1] for part in parts}) > 1:
        raise CorpusError(f"Shard {piece.shard}: its embeddings differ in width")
    vectors = np.concatenate(parts) if parts else np.empty((0, 0), np.float16)
    return keys, unit(vectors)


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Returns float32 vectors of length 1; float16 has rounded them. Nulls stay null vectors."""
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))
    return vectors_ND / np.maximum(lengths, 1e-12)[:, None]


def check_width(vectors_ND: np.ndarray, width: int) -> None:
    """Raises ConfigError unless the vectors are of that width."""
    if len(vectors_ND) and vectors_ND.shape[1] != width:
        raise ConfigError(
            f"The corpus' embeddings have {vectors_ND.shape[1]} numbers, what is searched for {width}"
        )


def _runs(groups: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yields (value, start, stop) of each run of equal values."""
    start = 0
    for stop in range(1, len(groups) + 1):
        if stop == len(groups) or groups[stop] != groups[start]:
            yield groups[start], start, stop
            start = stop
