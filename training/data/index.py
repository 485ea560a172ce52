# SPDX-License-Identifier: Apache-2.0
"""Catalog -> the index of clips: where each one's media lies and which video it is from.

The index holds four numbers a clip and no text, so that hundreds of millions fit in memory;
captions are read from the shards together with the media.
"""

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as arrow_fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipIndex:
    """Clips with a caption, in catalog order. All arrays have one entry a clip."""

    url: str
    """The corpus, without ``#subset``."""
    shards: tuple[str, ...]
    shard_number: NDArray[np.int32]
    """Positions in ``shards``."""
    row_group: NDArray[np.int32]
    row: NDArray[np.int32]
    """Row inside the row group."""
    video_hash: NDArray[np.int64]
    """A hash of the video's id."""
    fingerprint: str
    """Changes whenever a clip, its place or the order changes."""

    def __len__(self) -> int:
        return len(self.shard_number)

    def take(self, positions: NDArray[np.int64]) -> "ClipIndex":
        """Returns the clips at these positions, in their order."""
        return ClipIndex(
            self.url,
            self.shards,
            self.shard_number[positions],
            self.row_group[positions],
            self.row[positions],
            self.video_hash[positions],
            records.digest(self.fingerprint, positions.astype(np.int64).tobytes()),
        )

    @property
    def group(self) -> NDArray[np.int64]:
        """A number for each clip's (shard, row group) pair."""
        return self.shard_number.astype(np.int64) << 32 | self.row_group

    @property
    def num_videos(self) -> int:
        """Distinct videos."""
        return len(np.unique(self.video_hash))


def open_index(data: str, caption: str) -> ClipIndex:
    """Reads the index of a corpus.

    Args:
        data: ``CORPUS`` or ``CORPUS#subset``; CORPUS is a local folder or an fsspec URL.
        caption: The text column that training will read; clips without one are left out.

    Raises:
        CorpusError: If there is no such corpus or subset, or it holds no clip to train on.
        ConfigError: If the column is no text column of the catalog.
    """
    url, _, subset = data.partition("#")
    corpus = Corpus.open(url)
    check_caption_column(corpus, caption)
    chosen = _subset_ids(corpus, subset) if subset else None

    shards = tuple(corpus.names("catalog"))
    columns = ["clip_id", "video_id", "shard", "row_group", "row", caption]
    parts: list[tuple[NDArray[np.int32], ...]] = []
    videos: list[NDArray[np.int64]] = []
    hasher = hashlib.blake2b(digest_size=8)
    num_bare, first_bare, num_found = 0, "", 0
    filesystem = arrow_filesystem(corpus)
    for position, shard in enumerate(shards):
        path = corpus.path("catalog", f"{shard}.parquet")
        # The handle is closed by the with statement; a ParquetFile on a path would keep it.
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file)
            table = parquet.read([name for name in columns if name in parquet.schema_arrow.names])
        if caption not in table.column_names:  # annotation has not come to this shard yet
            table = table.append_column(caption, pa.nulls(len(table), pa.string()))
        if chosen is not None:
            table = table.filter(
                pc.call_function("is_in", [table["clip_id"]], pc.SetLookupOptions(chosen))
            )
            num_found += len(table)
        has_text = pc.field(caption).is_valid() & (pc.field(caption) != "")
        bare = table.filter(~has_text)
        if len(bare):
            first_bare = first_bare or bare["clip_id"][0].as_py()
            num_bare += len(bare)
            table = table.filter(has_text)
        if not set(table["shard"].unique().to_pylist()) <= {shard}:
            raise CorpusError(f"catalog/{shard}.parquet points into other shards: {url}")
        for clip_id in table["clip_id"].to_pylist():
            hasher.update(clip_id.encode() + b"\n")
        shard_N = np.full(len(table), position, dtype=np.int32)
        row_group_N, row_N = (
            table[name].to_numpy().astype(np.int32) for name in ("row_group", "row")
        )
        hasher.update(row_group_N.tobytes() + row_N.tobytes())
        parts.append((shard_N, row_group_N, row_N))
        videos.append(_hashed(table["video_id"].combine_chunks()))

    if chosen is not None and num_found != len(chosen):
        raise CorpusError(
            f"Subset {subset} names {len(chosen) - num_found} clips that {url} does not hold",
            "make the subset again: the corpus has changed",
        )
    if num_bare:
        logger.warning(
            "%d clips have no %s and are left out, the first is %s", num_bare, caption, first_bare
        )
    if not sum(map(len, videos)):
        filled = _filled_captions(corpus)
        raise CorpusError(
            f"No clip with a {caption} in {data}",
            f"--set data.caption={filled[0]} (columns with text: {', '.join(filled)})"
            if filled
            else "no caption column has text: run an ingest pipeline that captions",
        )
    shard_N, row_group_N, row_N = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ClipIndex(
        url, shards, shard_N, row_group_N, row_N, np.concatenate(videos), hasher.hexdigest()
    )


def split_by_video(
    index: ClipIndex, held_out: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns positions of training clips and of held-out clips; no video is on both sides.

    A video's side depends on its id and the share alone: it stays where it is when the corpus
    grows, and a larger share keeps what a smaller one held out.
    """
    is_held_out = (index.video_hash.view(np.uint64) / 2.0**64) < held_out
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def check_caption_column(corpus: Corpus, name: str) -> None:
    """Raises ConfigError unless the catalog has a column of that name that holds text."""
    texts = [field.name for field in corpus.catalog_schema if field.type == pa.string()]
    if name not in texts:
        known = [text for text in texts if text.startswith(("caption", "transcript", "title"))]
        raise ConfigError(
            f"data.caption: {name} is not a text column", f"choose one of {', '.join(known)}"
        )


def arrow_filesystem(corpus: Corpus) -> arrow_fs.FileSystem:
    """Returns the corpus' file system for Arrow, which is much faster on its own local one."""
    if corpus.is_local:
        return arrow_fs.LocalFileSystem()
    return arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(corpus.fs))


def _filled_captions(corpus: Corpus) -> list[str]:
    """Returns the caption columns that hold text for any clip."""
    schema = corpus.catalog_schema
    names = [f.name for f in schema if f.name.startswith("caption") and f.type == pa.string()]
    table = corpus.catalog(names)
    return [name for name in names if table[name].null_count < len(table)]


def _subset_ids(corpus: Corpus, name: str) -> pa.Array:
    if name not in corpus.names("subsets"):
        known = ", ".join(corpus.names("subsets")) or "none yet"
        raise CorpusError(
            f"Unknown subset: {name} of {corpus.url}",
            f"subsets: {known}; a subset is {corpus.url}/subsets/{name}.parquet with a column clip_id",
        )
    with arrow_filesystem(corpus).open_input_file(
        corpus.path("subsets", f"{name}.parquet")
    ) as file:
        return pq.read_table(file, columns=["clip_id"])["clip_id"].unique()


def _hashed(video_id_N: pa.Array) -> NDArray[np.int64]:
    """Returns a uniform 64-bit hash of each video id."""
    encoded = video_id_N.dictionary_encode()
    hashes = [int(records.digest("video", id_), 16) for id_ in encoded.dictionary.to_pylist()]
    table = np.array(hashes, dtype=np.uint64).view(np.int64)
    return table[encoded.indices.to_numpy()]
