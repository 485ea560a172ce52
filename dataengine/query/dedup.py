# SPDX-License-Identifier: Apache-2.0
"""De-duplication: of clips that show the same thing, one stays.

Two meanings of "the same", each with its threshold:

- **Near-duplicates**: the same pictures in another encoding, size or brightness. Every stored frame
  gets a perceptual hash of 64 bits (pHash: signs of a picture's lowest DCT frequencies around their
  median; Zauner 2010, section 3.2.1). Clips of as many frames are the same if no frame differs from its
  counterpart in more than so many bits. All such pairs are found: hashes that differ in at most b bits
  agree in one of b + 1 bands of bits, so only clips that share bands are compared.
- **Semantic duplicates** (SemDeDup, Abbas et al. 2023, arXiv 2303.09540): clips whose CLIP image
  embeddings have a cosine above a threshold. K-means splits the clips into about sqrt(N) clusters, and
  clips are compared within their cluster, exactly. Up to 20,000 clips there is one cluster; beyond that
  a pair that a cluster's border parts is not found.

Clips are gone through from the highest score to the lowest, ties by id; a clip goes if it is the same
as one that stays. So every clip that goes has its like among those that stay, and no two that are
compared and the same stay both. Nothing depends on shards or threads.

Legend: N clips, F frames of a clip, D embedding width, K clusters.
"""

import io
import itertools
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from dataengine.corpus import Corpus
from dataengine.errors import ConfigError
from dataengine.query.embeddings import (
    Piece,
    coverage,
    in_threads,
    pieces,
    read_column,
    read_vectors,
)

NEAR, SEMANTIC = "near", "semantic"
"""Names of the two in the count of what was removed."""

MAX_BITS = 16
"""Most differing bits; half of 64 is what two strangers differ in, and beyond a quarter a search is none."""

_EXACT_CLIPS = 20_000
"""As many are compared all with all."""

_POINTS_PER_CLUSTER = 64
"""Clips that k-means learns each centre from; below 39 faiss warns."""

_ROUNDS = 10
"""Of k-means: neighbourhoods are wanted, not the best clusters."""

_BLOCK = 1024

_SIDE = 32
"""Side of the grey picture whose DCT is taken."""

_FLAT = 4.0
"""Amplitude of the orthonormal DCT, in grey levels, below which a frequency counts as absent. Of plain
pictures most are, and their signs would be those of the JPEG's noise: with 1 instead of 4, a tenth of the
demo's plain clips was not found again at 8 bits after JPEG quality 30; with 8, strangers were found."""


def remove_duplicates(
    db: duckdb.DuckDBPyConnection,
    corpus: Corpus,
    source: str,
    *,
    near_bits: int | None = None,
    semantic: float | None = None,
    score: str = "clip_score",
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, int]:
    """Makes the table ``kept``: ``video_id, start_ms, end_ms`` of the clips that stay.

    Near-duplicates go first. Clips without frames or without an embedding are like no other and stay.
    Memory: about 40 bytes a clip and, for near-duplicates, four times its hashes (8 bytes a frame); for
    semantic ones k-means' sample (64 K vectors) and the largest cluster. The embeddings lie in the
    temporary folder (2 N D bytes).

    Args:
        db: With the view ``clips``.
        corpus: The same corpus.
        source: What follows FROM: ``clips where ...``.
        near_bits: Most bits that differ between hashes of near-duplicates, 0 to MAX_BITS.
        semantic: Cosine above which clips are semantic duplicates, in (0, 1).
        score: Column that says which one stays; nulls last.
        seed: Of k-means.
        threads: Shards read at once; None takes as many as there are cores.

    Returns:
        How many clips each meaning removed.

    Raises:
        ConfigError: If a threshold is out of its range.
        CorpusError: If no embeddings were kept, or a shard cannot be read.
    """
    if near_bits is not None and not 0 <= near_bits <= MAX_BITS:
        raise ConfigError(f"--dedup-near takes 0 to {MAX_BITS} bits of 64, not {near_bits}")
    if semantic is not None and not 0 < semantic < 1:
        raise ConfigError(f"--dedup-semantic takes a cosine between 0 and 1, not {semantic}")
    if semantic is not None:
        coverage(db, source)
    # A clip's rank says which of two stays: the lower one.
    db.execute(
        "create temp table pool as select video_id, start_ms, end_ms, shard, row_group, row, "
        f"row_number() over (order by {score} desc nulls last, video_id, start_ms, end_ms) - 1 "
        f"as rank from {source}"
    )
    counted = db.execute("select count(*) from pool").fetchone()
    stays = np.ones(counted[0] if counted else 0, bool)
    removed = {}
    threads = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="dataengine-dedup-") as folder:
        if near_bits is not None:
            before = int(stays.sum())
            _remove_near(db, corpus, stays, near_bits, threads, Path(folder))
            removed[NEAR] = before - int(stays.sum())
        if semantic is not None:
            before = int(stays.sum())
            _remove_semantic(db, corpus, stays, semantic, seed, threads, Path(folder))
            removed[SEMANTIC] = before - int(stays.sum())
    db.register("gone", pa.table({"rank": np.flatnonzero(~stays)}))
    db.execute(
        "create temp table kept as select video_id, start_ms, end_ms from pool "
        "anti join gone using (rank)"
    )
    db.unregister("gone")
    db.execute("drop table pool")
    return removed


# ------------------------------------------------------------------------------- near-duplicates


def _remove_near(
    db: duckdb.DuckDBPyConnection,
    corpus: Corpus,
    stays: np.ndarray,
    bits: int,
    threads: int,
    folder: Path,
) -> None:
    """Sets ``stays`` of near-duplicates to False; clips of as many frames are compared."""

    def hashed(piece: Piece) -> list[tuple[int, np.ndarray]]:
        found = []
        for ranks, values in read_column(corpus, piece, "frames"):
            for rank, frames in zip(ranks, values, strict=True):
                hashes = frame_hashes(frames.as_py() or [])
                if hashes.any():  # all frames plain: nothing to tell it by
                    found.append((rank, hashes))
        return found

    files: dict[int, _Spill] = {}
    sql = "select shard, row_group, row, rank as key from pool"
    for found in in_threads(hashed, pieces(db, sql), threads):
        for rank, hashes in found:
            if len(hashes) not in files:
                files[len(hashes)] = _Spill(folder / f"hashes-{len(hashes)}")
            files[len(hashes)].add(np.concatenate(([np.uint64(rank)], hashes)))
    for width, file in files.items():
        rows = file.read(np.uint64, width + 1)
        rows = rows[np.argsort(rows[:, 0])]  # by rank
        ranks = rows[:, 0].astype(np.int64)
        stays[ranks[near_duplicates(rows[:, 1:], bits)]] = False


def frame_hashes(jpegs: list[bytes]) -> np.ndarray:
    """Returns pHash of each picture, uint64 [F]; 0 of a plain one, and of what is no picture."""
    from PIL import Image

    pictures = np.zeros((len(jpegs), _SIDE, _SIDE), np.float32)
    for at, jpeg in enumerate(jpegs):
        try:
            with Image.open(io.BytesIO(jpeg)) as picture:
                picture.draft("L", (2 * _SIDE, 2 * _SIDE))  # decodes an eighth of the work
                grey = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
                pictures[at] = np.asarray(grey)
        except (OSError, ValueError, SyntaxError):
            continue
    return phash(pictures)


def phash(pictures_FHW: np.ndarray) -> np.ndarray:
    """Returns perceptual hashes, uint64 [F], of grey pictures [F, 32, 32] with values 0 to 255."""
    if not len(pictures_FHW):
        return np.empty(0, np.uint64)
    basis = _dct_basis()
    low = (basis @ pictures_FHW.astype(np.float32) @ basis.T).reshape(len(pictures_FHW), 64)
    low[:, 0] = 0  # brightness
    middle = np.maximum(np.median(low[:, 1:], axis=1), _FLAT)
    return np.packbits(low > middle[:, None], axis=1).view(np.uint64)[:, 0]


def _dct_basis() -> np.ndarray:
    """Returns the eight lowest rows of the orthonormal DCT-II of length 32."""
    k, n = np.arange(8)[:, None], np.arange(_SIDE)[None]
    basis = np.cos(np.pi * (2 * n + 1) * k / (2 * _SIDE)) * math.sqrt(2 / _SIDE)
    basis[0] /= math.sqrt(2)
    return basis.astype(np.float32)


def near_duplicates(hashes_NF: np.ndarray, bits: int) -> np.ndarray:
    """Returns which clips go: ascending indices; a clip stays before those behind it.

    Args:
        hashes_NF: uint64, one row per clip, from the one to keep first to the one to keep last.
        bits: Most bits that differ in any frame.
    """
    different, first = np.unique(np.ascontiguousarray(hashes_NF), axis=0, return_index=True)
    # `different` is in the order of its bits; what counts is the order of the clips.
    order = np.argsort(first)
    gone = np.zeros(len(different), bool)
    pairs = _close_pairs(different[order], bits)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(different) + 1))
    for at in np.unique(pairs[:, 0]):
        if not gone[at]:
            gone[pairs[starts[at] : starts[at + 1], 1]] = True
    stay = np.zeros(len(hashes_NF), bool)
    stay[first[order][~gone]] = True
    return np.flatnonzero(~stay)


def _close_pairs(hashes_NF: np.ndarray, bits: int) -> np.ndarray:
    """Returns the pairs [P, 2], i < j, sorted, of rows that differ in at most ``bits`` in each frame."""
    num, width = hashes_NF.shape
    if num < 2:
        return np.empty((0, 2), np.int64)
    found = np.empty(0, np.int64)
    for key in _band_keys(hashes_NF, bits, num, width):
        order = np.argsort(key, kind="stable")
        key = key[order]
        start = np.arange(num - 1)
        parts = [found]
        for offset in range(1, num):
            start = start[: np.searchsorted(start, num - offset)]
            start = start[key[start] == key[start + offset]]
            if not len(start):
                break
            for block in np.array_split(start, len(start) // 1_000_000 + 1):
                a, b = order[block], order[block + offset]
                for frame in range(width):  # most strangers are gone after one
                    distance = np.bitwise_count(hashes_NF[a, frame] ^ hashes_NF[b, frame])
                    a, b = a[distance <= bits], b[distance <= bits]
                parts.append(np.minimum(a, b) * num + np.maximum(a, b))
        found = np.unique(np.concatenate(parts))
    return np.stack([found // num, found % num], axis=1)


def _band_keys(hashes_NF: np.ndarray, bits: int, num: int, width: int) -> Iterator[np.ndarray]:
    """Yields keys uint64 [N]: two rows that are close share at least one of them.

    In each frame of a close pair one of bits + 1 bands is the same, so with g frames one of (bits + 1)^g
    combinations of bands is. More frames give more keys and fewer strangers that share one.
    """
    num_bands = bits + 1

    def cost(num_frames: int) -> float:
        shared = num / 2.0 ** (num_frames * 64 / num_bands)
        return num_bands**num_frames * (math.log2(num) + shared)

    chosen = min(range(1, min(width, 4) + 1), key=cost)
    # Not the first and the last, which are black more often than others.
    frames = [int((at + 0.5) * width / chosen) for at in range(chosen)]
    edges = [round(64 * band / num_bands) for band in range(num_bands + 1)]
    for bands in itertools.product(range(num_bands), repeat=chosen):
        key = np.zeros(num, np.uint64)
        for frame, band in zip(frames, bands, strict=True):
            size = edges[band + 1] - edges[band]
            mask = np.uint64((1 << size) - 1)
            part = (hashes_NF[:, frame] >> np.uint64(edges[band])) & mask
            key = key * np.uint64(0x9E3779B97F4A7C15) + part + np.uint64(1)
        yield key


# ----------------------------------------------------------------------------- semantic duplicates


def _remove_semantic(
    db: duckdb.DuckDBPyConnection,
    corpus: Corpus,
    stays: np.ndarray,
    threshold: float,
    seed: int,
    threads: int,
    folder: Path,
) -> None:
    """Sets ``stays`` of semantic duplicates to False."""

    def read(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        keys, vectors = read_vectors(corpus, piece)
        return np.array(keys, np.int64), vectors.astype(np.float16)

    ranks_file, vectors_file = _Spill(folder / "ranks"), _Spill(folder / "vectors")
    sql = "select shard, row_group, row, rank as key from pool"
    width = 0
    for ranks, vectors in in_threads(read, pieces(db, sql), threads):
        wanted = stays[ranks]
        if wanted.any():
            width = vectors.shape[1]
            ranks_file.add(ranks[wanted])
            vectors_file.add(vectors[wanted])
    if not width:
        return
    ranks = ranks_file.read(np.int64, 1)[:, 0]
    vectors = vectors_file.read(np.float16, width)
    order = np.argsort(ranks)
    for members in _clusters(vectors, order, seed):
        stays[ranks[members[semantic_duplicates(vectors, members, threshold)]]] = False


def _clusters(vectors_ND: np.ndarray, order: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yields indices of the clips of each cluster, in ``order``."""
    num = len(order)
    if num <= _EXACT_CLIPS:
        yield order
        return
    import faiss

    count = round(math.sqrt(num))
    sample = np.random.default_rng(seed).permutation(num)[: count * _POINTS_PER_CLUSTER]
    kmeans = faiss.Kmeans(
        vectors_ND.shape[1], count, niter=_ROUNDS, seed=seed, spherical=True,
        max_points_per_centroid=_POINTS_PER_CLUSTER,
    )  # fmt: skip
    kmeans.train(vectors_ND[order[np.sort(sample)]].astype(np.float32))
    nearest = np.empty(num, np.int32)
    for start in range(0, num, 1 << 16):
        block = order[start : start + (1 << 16)]
        found = kmeans.index.search(vectors_ND[block].astype(np.float32), 1)[1]
        nearest[start : start + len(block)] = found[:, 0]
    by_cluster = np.argsort(nearest, kind="stable")
    edges = np.searchsorted(nearest[by_cluster], np.arange(count + 1))
    for start, stop in itertools.pairwise(edges):
        yield order[by_cluster[start:stop]]


def semantic_duplicates(
    vectors_ND: np.ndarray, members: np.ndarray, threshold: float
) -> np.ndarray:
    """Returns which members go: positions in ``members``; one stays before those behind it.

    Args:
        vectors_ND: Unit vectors.
        members: Indices of the vectors that are compared, from the one to keep first.
        threshold: Cosine above which two are the same.
    """
    kept: list[np.ndarray] = []
    gone: list[int] = []
    for start in range(0, len(members), _BLOCK):
        block = vectors_ND[members[start : start + _BLOCK]].astype(np.float32)
        dropped = np.zeros(len(block), bool)
        for others in kept:
            dropped |= (block @ others.T > threshold).any(axis=1)
        like = np.triu(block @ block.T > threshold, 1)
        for at in np.flatnonzero(like.any(axis=1)):
            if not dropped[at]:
                dropped |= like[at]
        kept.append(block[~dropped])
        gone += (start + np.flatnonzero(dropped)).tolist()
    return np.array(gone, np.int64)


class _Spill:
    """Rows of numbers in a file of the temporary folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def add(self, rows: np.ndarray) -> None:
        rows.tofile(self._file)

    def read(self, dtype: type, width: int) -> np.ndarray:
        """Returns all rows [N, width]; they stay in the file."""
        self._file.close()
        if not self._path.stat().st_size:
            return np.empty((0, width), dtype)
        return np.memmap(self._path, dtype, "r").reshape(-1, width)
