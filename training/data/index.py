# SPDX-License-Identifier: Apache-2.0
"""Catalog -> the index of clips: where each one's media lies and which video it is from.

The index holds four numbers a clip and no text, so that hundreds of millions fit in memory;
captions are read from the shards together with the media.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
import pyarrow.fs as arrow_fs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipIndex:
    """Clips with a caption, in the order of the shards. All arrays have one entry a clip."""

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
    shards = tuple(corpus.names("catalog"))
    chosen = _Chosen.read(corpus, subset, shards) if subset else None

    number_of = {shard: number for number, shard in enumerate(shards)}
    parts: list[_Columns] = []
    num_bare, first_bare, num_found = 0, "", 0
    for batch in _catalog_batches(corpus, ["clip_id", *_PLACE, "video_id", caption]):
        shard = batch["shard"].dictionary_encode()
        shard_N = np.array([number_of.get(n, -1) for n in shard.dictionary.to_pylist()], np.int32)
        columns = _Columns(
            shard_N[shard.indices.to_numpy()],
            batch["row_group"].to_numpy().astype(np.int32),
            batch["row"].to_numpy().astype(np.int32),
            _hashed(batch["video_id"]),
        )
        text = batch[caption]
        keep_N = pc.call_function("greater", [pc.call_function("binary_length", [text]), 0])
        keep_N = keep_N.fill_null(False).to_numpy(zero_copy_only=False)
        if chosen is not None:
            asked_N = chosen.holds(columns, batch["clip_id"])
            num_found += int(asked_N.sum())
        else:
            asked_N = np.ones(len(keep_N), dtype=bool)
        bare_N = np.flatnonzero(asked_N & ~keep_N)
        if len(bare_N):
            first_bare = first_bare or batch["clip_id"][int(bare_N[0])].as_py()
            num_bare += len(bare_N)
        parts.append(columns.take(np.flatnonzero(asked_N & keep_N)))

    if chosen is not None and num_found != chosen.num_clips:
        raise CorpusError(
            f"Subset {subset} names {chosen.num_clips - num_found} clips that {url} does not hold",
            "make the subset again: the corpus has changed",
        )
    if num_bare:
        logger.warning(
            "%d clips have no %s and are left out, the first is %s", num_bare, caption, first_bare
        )
    if not sum(len(part.row) for part in parts):
        filled = _filled_captions(corpus)
        raise CorpusError(
            f"No clip with a {caption} in {data}",
            f"--set data.caption={filled[0]} (columns with text: {', '.join(filled)})"
            if filled
            else "no caption column has text: run an ingest pipeline that captions",
        )
    clips = _Columns(
        np.concatenate([part.shard_number for part in parts]),
        np.concatenate([part.row_group for part in parts]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.video_hash for part in parts]),
    )
    if int(clips.shard_number.min()) < 0:
        raise CorpusError(f"The catalog points into shards that are not committed: {url}")
    # Merged catalogs are sorted by video; the order of the shards is the order of reading.
    clips = clips.take(np.lexsort((clips.row, clips.row_group, clips.shard_number)))
    hasher = hashlib.blake2b("\n".join(shards).encode(), digest_size=8)
    for array in clips.arrays():
        hasher.update(array.tobytes())
    return ClipIndex(url, shards, *clips.arrays(), hasher.hexdigest())


@dataclass(frozen=True)
class _Columns:
    """Four numbers a clip, as in `ClipIndex`."""

    shard_number: NDArray[np.int32]
    row_group: NDArray[np.int32]
    row: NDArray[np.int32]
    video_hash: NDArray[np.int64]

    def arrays(
        self,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        return self.shard_number, self.row_group, self.row, self.video_hash

    def take(self, positions: NDArray[np.int64]) -> "_Columns":
        return _Columns(
            self.shard_number[positions],
            self.row_group[positions],
            self.row[positions],
            self.video_hash[positions],
        )

    @property
    def key(self) -> NDArray[np.int64]:
        """One number a clip: 2^23 shards, 2^20 row groups a shard, 2^20 rows a group."""
        shard = self.shard_number.astype(np.int64)
        return shard << 40 | self.row_group.astype(np.int64) << 20 | self.row


@dataclass(frozen=True)
class _Chosen:
    """The clips of a subset: by locator, or by id where the file has nothing else."""

    num_clips: int
    keys: NDArray[np.int64] | None
    ids: pa.Array | None

    @classmethod
    def read(cls, corpus: Corpus, name: str, shards: tuple[str, ...]) -> "_Chosen":
        path = corpus.subset_path(name)
        with arrow_filesystem(corpus).open_input_file(path) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            if not set(_PLACE) <= set(names):
                if "clip_id" not in names:
                    raise CorpusError(
                        f"Not a subset: {path} has neither a clip_id nor a place in the shards"
                    )
                ids = parquet.read(["clip_id"])["clip_id"].unique()
                return cls(len(ids), None, ids)
            table = parquet.read(list(_PLACE))
        shard = table["shard"].combine_chunks().dictionary_encode()
        number_of = {shard: number for number, shard in enumerate(shards)}
        shard_N = np.array([number_of.get(n, -1) for n in shard.dictionary.to_pylist()], np.int64)
        row_group_N, row_N = (table[n].to_numpy().astype(np.int64) for n in ("row_group", "row"))
        keys = np.unique(shard_N[shard.indices.to_numpy()] << 40 | row_group_N << 20 | row_N)
        return cls(len(keys), keys, None)

    def holds(self, columns: _Columns, clip_id_N: pa.Array) -> NDArray[np.bool_]:
        """Returns which of the clips are in the subset."""
        if self.keys is None:
            found = pc.call_function("is_in", [clip_id_N], pc.SetLookupOptions(self.ids))
            return found.to_numpy(zero_copy_only=False)
        key_N = columns.key
        at_N = np.minimum(np.searchsorted(self.keys, key_N), len(self.keys) - 1)
        return self.keys[at_N] == key_N if len(self.keys) else np.zeros(len(key_N), dtype=bool)


_PLACE = ("shard", "row_group", "row")


def _catalog_batches(corpus: Corpus, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields columns of the catalog, merged files as far as they are up to date."""
    for part in corpus.catalog_parts():
        dataset = pa_dataset.dataset(
            list(part.files),
            schema=corpus.catalog_schema,
            format="parquet",
            filesystem=arrow_filesystem(corpus),
        )
        stale = ~pc.field("shard").isin(sorted(part.without)) if part.without else None
        yield from dataset.to_batches(columns=names, filter=stale)


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


def _hashed(video_id_N: pa.Array) -> NDArray[np.int64]:
    """Returns a uniform 64-bit hash of each video id."""
    encoded = video_id_N.dictionary_encode()
    hashes = [int(records.digest("video", id_), 16) for id_ in encoded.dictionary.to_pylist()]
    table = np.array(hashes, dtype=np.uint64).view(np.int64)
    return table[encoded.indices.to_numpy()]
