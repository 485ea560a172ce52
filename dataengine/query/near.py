# SPDX-License-Identifier: Apache-2.0
"""Nearest clips by CLIP embedding: exact search, shard by shard, in bounded memory.

The query, a text or a picture, is embedded by the model that wrote the embeddings: the provenance
names it, and the settings it was run with stand in the corpus' runs. Every clip that passes the
conditions is compared; of each shard only the embeddings are read.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import duckdb
import numpy as np
import pyarrow as pa
import yaml

from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError, DependencyError
from dataengine.query.embeddings import (
    Author,
    Coverage,
    Piece,
    check_width,
    coverage,
    in_threads,
    pieces,
    read_vectors,
    unit,
)
from dataengine.query.literals import CLIP_ID, quoted
from dataengine.query.percentiles import resolve
from dataengine.query.sql import DEFAULT_COLUMNS, Statement, with_text

if TYPE_CHECKING:
    from dataengine.models.clip import ClipScorer

DEFAULT_LIMIT = 10
"""Clips that are found unless told otherwise."""

_DECIMALS = 6
"""Of a similarity. Beyond them the answer would depend on how many clips were compared at once; the
embeddings themselves are float16 and hold three."""

THREADS = 8
"""Shards read at once: mostly waiting for a disk or a store."""


def near_statement(
    db: duckdb.DuckDBPyConnection,
    corpus: Corpus,
    condition: str = "",
    select: str | None = None,
    order_by: str | None = None,
    limit: int | None = None,
    *,
    near: str = "",
    near_image: Path | None = None,
    near_clip: str = "",
    text: str = "",
    over_all: bool = False,
    threads: int = THREADS,
) -> tuple[Statement, Coverage]:
    """Finds the nearest clips, and returns the SELECT that shows them with their ``similarity``.

    Args:
        db: See `dataengine.query.sql.connect`.
        corpus: The same corpus.
        condition: SQL condition on clips; only those that pass are compared.
        select: Columns or expressions; None takes the usual ones, ``similarity`` first.
        order_by: None puts the nearest first.
        limit: How many clips are found; None takes DEFAULT_LIMIT.
        near: A text, or:
        near_image: a picture, or:
        near_clip: a clip of the corpus, which is not among those found.
        text: Words that the captions must hold.
        over_all: Takes percentiles over all clips.
        threads: Shards read at once.

    Returns:
        The statement, and who wrote the embeddings.

    Raises:
        ConfigError: If not exactly one of the three is given, or the condition is no SQL.
        CorpusError: If clips have no embeddings, or of two models (see `coverage`).
        DependencyError: If the model cannot be loaded.
    """
    if sum((bool(near), near_image is not None, bool(near_clip))) != 1:
        raise ConfigError(
            "Near what?", "one of --near TEXT, --near-image FILE, --near-clip CLIP_ID"
        )
    resolved = resolve(db, with_text(db, condition, text), over_all=over_all)
    source = f"clips where ({resolved.condition or 'true'}\n)"
    covered = coverage(db, source)
    if near:
        vector = text_vector(corpus, covered.author, near)
    elif near_image is not None:
        vector = image_vector(corpus, covered.author, near_image)
    else:
        vector = clip_vector(db, corpus, near_clip)
        source += f" and {CLIP_ID} <> {quoted(near_clip)}"
    count = DEFAULT_LIMIT if limit is None else limit
    db.register("near", find(db, corpus, source, vector, count, threads=threads))
    columns = select or f"similarity, {', '.join(DEFAULT_COLUMNS)}"
    sql = (
        f"select {columns} from (select clips.*, near.similarity from clips join near "
        f"using (clip_id)) as clips order by {order_by or 'similarity desc, clip_id'}"
    )
    return Statement(sql, resolved.percentiles), covered


def text_vector(corpus: Corpus, author: Author, text: str) -> np.ndarray:
    """Returns a text's unit vector [D], by the model that wrote a corpus' embeddings.

    Raises:
        DependencyError: If the model cannot be loaded.
    """
    return _answer(load_scorer(corpus, author).embed_texts([text])[0])


def image_vector(corpus: Corpus, author: Author, path: Path) -> np.ndarray:
    """Returns a picture's unit vector [D], by the model that wrote a corpus' embeddings.

    Raises:
        ConfigError: If the file is not a picture.
        DependencyError: If the model cannot be loaded.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except OSError as error:  # PIL's own error of what is no picture is one, too
        raise ConfigError(f"Not a picture: {path} ({error.strerror or 'unknown format'})") from None
    scorer = load_scorer(corpus, author)
    return _answer(scorer.embed_images([scorer.prepare(pixels)])[0])


def clip_vector(db: duckdb.DuckDBPyConnection, corpus: Corpus, clip_id: str) -> np.ndarray:
    """Returns a clip's own unit vector [D].

    Raises:
        CorpusError: If there is no such clip, or it has no embedding.
    """
    sql = (
        f"select shard, row_group, row, clip_id as key from clips where clip_id = {quoted(clip_id)}"
    )
    for piece in list(pieces(db, sql)):
        _, vectors = read_vectors(corpus, piece)
        if not len(vectors):
            raise CorpusError(f"Clip {clip_id} has no embedding")
        return vectors[0]
    raise CorpusError(f"No clip {clip_id} in {corpus.url}")


def find(
    db: duckdb.DuckDBPyConnection,
    corpus: Corpus,
    source: str,
    vector_D: np.ndarray,
    limit: int,
    *,
    threads: int = THREADS,
) -> pa.Table:
    """Returns the clips nearest to a vector.

    Every clip that has an embedding is compared, by the cosine in float32, rounded to six decimals;
    equal ones come in the order of their ids. So the answer is the same however the corpus is stored
    and however many threads read it.

    Args:
        db: With the view ``clips``.
        corpus: Whose shards are read.
        source: What follows FROM: ``clips where ...``.
        vector_D: A vector of any length.
        limit: How many, K.
        threads: Shards read at once.

    Returns:
        At most K rows of ``clip_id`` and ``similarity`` in [-1, 1], nearest first.

    Raises:
        CorpusError: If a shard cannot be read.
        ConfigError: If the vector is not as wide as the embeddings.
    """
    vector_D = unit(np.asarray(vector_D)[None])[0]

    def compare(piece: Piece) -> tuple[list[object], np.ndarray]:
        keys, vectors = read_vectors(corpus, piece)
        if not keys:
            return [], np.empty(0, np.float32)
        check_width(vectors, len(vector_D))
        return keys, np.round(np.clip(vectors @ vector_D, -1.0, 1.0), _DECIMALS)

    sql = f"select shard, row_group, row, {CLIP_ID} as key from {source}"
    best: list[tuple[float, str]] = []  # (minus similarity, clip_id): sorted, it is the answer
    bar = -np.inf
    for keys, similarities in in_threads(compare, pieces(db, sql), threads):
        for at in np.flatnonzero(similarities >= bar):
            best.append((-float(similarities[at]), cast(str, keys[at])))
        if len(best) > 2 * limit:
            best = sorted(best)[:limit]
            bar = -best[-1][0] if best else np.inf
    best = sorted(best)[:limit]
    return pa.table(
        {
            "clip_id": pa.array([clip_id for _, clip_id in best], pa.string()),
            "similarity": pa.array([-value for value, _ in best], pa.float32()),
        }
    )


# ------------------------------------------------------------------------------------- the model


def load_scorer(corpus: Corpus, author: Author) -> "ClipScorer":
    """Loads the model that wrote a corpus' embeddings, with the settings of the run that did.

    Raises:
        DependencyError: If no run's settings name it, or its weights are missing or others now.
    """
    from pydantic import ValidationError

    from dataengine.models.clip import OpenClipConfig, build_clip_scorer, scorer_name

    problems = []
    for settings in _scorer_settings(corpus):
        try:
            # Where it ran says nothing about where it runs now.
            config = OpenClipConfig.model_validate(settings | {"device": None})
        except ValidationError:
            continue  # of another version of this code
        if scorer_name(config) != author.model:
            continue
        try:
            scorer = build_clip_scorer(config)
        except DependencyError as error:
            problems.append(error)
            continue
        if scorer.revision == author.revision:
            return scorer
        problems.append(
            DependencyError(
                f"The weights of {author.model} are others now: {scorer.revision or 'unknown'}, the "
                f"embeddings are of {author.revision}",
                "bring those weights back, or search with --near-clip, which needs no model",
            )
        )
    if problems:
        raise problems[0]
    raise DependencyError(
        f"No run of {corpus.url} says how to load {author.model}, which wrote the embeddings",
        "search with --near-clip, which needs no model",
    )


def _scorer_settings(corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Yields the settings of models that runs scored with, newest run first, each once."""
    seen: list[dict[str, Any]] = []
    for name in ("annotate.yaml", "pipeline.yaml"):
        for path in reversed(corpus.run_files(name)):
            try:
                content = yaml.safe_load(corpus.fs.cat_file(path))
                settings = content["stages"]["score"]["model"]
            except (yaml.YAMLError, KeyError, TypeError):
                continue  # a run without this stage
            if isinstance(settings, dict) and settings not in seen:
                seen.append(settings)
                yield settings


def _answer(answer: Any) -> np.ndarray:
    """Returns a model's vector, or says why there is none."""
    if not isinstance(answer, np.ndarray):
        raise DependencyError(f"The model cannot embed it: {answer}")
    return answer
