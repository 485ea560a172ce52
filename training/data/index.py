# SPDX-License-Identifier: Apache-2.0
"""Catalog -> the index of clips: where each one's media lies and which video it is from.

The index holds two numbers a clip and no text, so that hundreds of millions fit in memory; captions
are read from the shards together with the media. Row groups are runs of it, so that an epoch is
planned by runs. Kept in a folder, it opens in milliseconds as long as the catalog stays the same.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

INDEX_VERSION = 1
"""Of the files that keep an index; others are left alone and the catalog is read."""


class Shard(NamedTuple):
    """A file of media."""

    url: str
    """The corpus, without ``#subset``."""
    name: str


@dataclass(frozen=True)
class ClipIndex:
    """Clips in the order of the shards; position is a clip's place here.

    Arrays of a kept index are mapped files: what is not looked at takes no memory.
    """

    shards: tuple[Shard, ...]
    group_shard: NDArray[np.int32]
    """Position in ``shards`` of every row group that holds clips, [G]."""
    group_number: NDArray[np.int32]
    """Its number in the shard, [G]."""
    group_start: NDArray[np.int64]
    """Position of its first clip, rising, and the number of clips at the end, [G + 1]."""
    row: NDArray[np.int32]
    """Row inside the row group, one a clip."""
    video_hash: NDArray[np.int64]
    """A hash of the video's id, one a clip."""
    num_videos: int
    fingerprint: str
    """Changes whenever a clip, its place or the order changes."""
    folder: str = ""
    """Where it is kept, if it is."""

    def __len__(self) -> int:
        return len(self.row)

    def __reduce__(self) -> tuple[Any, ...]:
        """Reader processes that are spawned open the files instead of getting a copy."""
        if self.folder:
            return _load, (Path(self.folder),)
        return ClipIndex, tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @classmethod
    def of(
        cls,
        shards: tuple[Shard, ...],
        shard_number: NDArray[np.int32],
        row_group: NDArray[np.int32],
        row: NDArray[np.int32],
        video_hash: NDArray[np.int64],
    ) -> "ClipIndex":
        """Returns the index of clips that are sorted by shard, row group and row."""
        changes_N = (np.diff(shard_number) != 0) | (np.diff(row_group) != 0)
        start = np.concatenate([[0], np.flatnonzero(changes_N) + 1])[: len(row)]
        hasher = hashlib.blake2b("\n".join(s.name for s in shards).encode(), digest_size=8)
        for array in (shard_number, row_group, row, video_hash):
            hasher.update(np.ascontiguousarray(array).data)
        return cls(
            shards,
            shard_number[start],
            row_group[start],
            np.append(start, len(row)).astype(np.int64),
            row,
            video_hash,
            _num_distinct(video_hash),
            hasher.hexdigest(),
        )

    @classmethod
    def join(cls, parts: Sequence["ClipIndex"]) -> "ClipIndex":
        """Returns the clips of several indexes behind each other."""
        if len(parts) == 1:
            return parts[0]
        num_shards = np.cumsum([0, *(len(part.shards) for part in parts)])
        num_clips = np.cumsum([0, *(len(part) for part in parts)])
        video_hash = np.concatenate([part.video_hash for part in parts])
        return cls(
            tuple(shard for part in parts for shard in part.shards),
            np.concatenate([p.group_shard + n for p, n in zip(parts, num_shards[:-1], strict=True)])
            .astype(np.int32),
            np.concatenate([part.group_number for part in parts]),
            np.concatenate(
                [p.group_start[:-1] + n for p, n in zip(parts, num_clips[:-1], strict=True)]
                + [num_clips[-1:]]
            ).astype(np.int64),
            np.concatenate([part.row for part in parts]),
            video_hash,
            _num_distinct(video_hash),
            records.digest(*(part.fingerprint for part in parts)),
        )  # fmt: skip

    def take(self, positions: NDArray[np.int64]) -> "ClipIndex":
        """Returns the clips at these rising positions."""
        return ClipIndex.of(
            self.shards,
            self.shard_number[positions],
            self.row_group[positions],
            self.row[positions],
            self.video_hash[positions],
        )

    def group_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns which of the G row groups these clips lie in."""
        return np.searchsorted(self.group_start, positions, side="right") - 1

    @property
    def shard_number(self) -> NDArray[np.int32]:
        """Position in ``shards`` of every clip."""
        return np.repeat(self.group_shard, np.diff(self.group_start))

    @property
    def row_group(self) -> NDArray[np.int32]:
        """Row group, as its shard counts, of every clip."""
        return np.repeat(self.group_number, np.diff(self.group_start))


def open_index(data: str, caption: str | None, *, sound: bool = False) -> ClipIndex:
    """Reads the index of a corpus.

    Args:
        data: ``CORPUS`` or ``CORPUS#subset``; CORPUS is a local folder or an fsspec URL.
        caption: The text column that training will read; clips without one are left out. None takes
            them all.
        sound: Whether clips without sound are left out.

    Raises:
        CorpusError: If there is no such corpus or subset, or it holds no clip to train on.
        ConfigError: If the column is no text column of the catalog.
    """
    url, _, subset = data.partition("#")
    corpus = Corpus.open(url)
    if caption is not None:
        check_caption_column(corpus, caption)
    names = tuple(corpus.names("catalog"))
    chosen = _Chosen.read(corpus, subset, names) if subset else None
    by_id = chosen is not None and chosen.keys is None
    wanted = [*_PLACE, "video_id", *["clip_id"] * by_id, *["has_audio"] * sound]
    wanted += [caption] if caption is not None else []

    number_of = {shard: number for number, shard in enumerate(names)}
    parts: list[_Columns] = []
    num_bare, first_bare, num_silent, num_found = 0, None, 0, 0
    for batch in _catalog_batches(corpus, wanted):
        shard = batch["shard"].dictionary_encode()
        shard_N = np.array([number_of.get(n, -1) for n in shard.dictionary.to_pylist()], np.int32)
        columns = _Columns(
            shard_N[shard.indices.to_numpy()],
            batch["row_group"].to_numpy().astype(np.int32),
            batch["row"].to_numpy().astype(np.int32),
            _hashed(batch["video_id"]),
        )
        asked_N = np.ones(len(columns.row), dtype=bool)
        if chosen is not None:
            asked_N = chosen.holds(columns, batch["clip_id"] if by_id else None)
            num_found += int(asked_N.sum())
        if sound:
            heard_N = batch["has_audio"].fill_null(False).to_numpy(zero_copy_only=False)
            num_silent += int((asked_N & ~heard_N).sum())
            asked_N &= heard_N
        if caption is not None:
            text = pc.call_function("binary_length", [batch[caption]])
            told_N = pc.call_function("greater", [text, 0])
            told_N = told_N.fill_null(False).to_numpy(zero_copy_only=False)
            bare_N = np.flatnonzero(asked_N & ~told_N)
            if len(bare_N):
                first_bare = first_bare or {n: batch[n][int(bare_N[0])].as_py() for n in _PLACE}
                num_bare += len(bare_N)
            asked_N &= told_N
        parts.append(columns if asked_N.all() else columns.take(np.flatnonzero(asked_N)))

    if chosen is not None and num_found != chosen.num_clips:
        raise CorpusError(
            f"Subset {subset} names {chosen.num_clips - num_found} clips that {url} does not hold",
            "make the subset again: the corpus has changed",
        )
    if num_silent:
        logger.warning("%d clips of %s have no sound and are left out", num_silent, data)
    if first_bare:
        logger.warning(
            "%d clips have no %s and are left out, the first is %s",
            num_bare,
            caption,
            _clip_id(corpus, first_bare),
        )
    if not sum(len(part.row) for part in parts):
        raise _nothing(corpus, data, caption, num_silent)
    clips = _Columns.join(parts)
    del parts
    if int(clips.shard_number.min()) < 0:
        raise CorpusError(f"The catalog points into shards that are not committed: {url}")
    # Merged catalogs are sorted by video; the order of the shards is the order of reading.
    key_N = clips.key
    if not (key_N[1:] >= key_N[:-1]).all():
        clips = clips.take(np.argsort(key_N, kind="stable"))
    shards = tuple(Shard(corpus.url, name) for name in names)
    return ClipIndex.of(shards, clips.shard_number, clips.row_group, clips.row, clips.video_hash)


def open_split(
    data: str,
    caption: str | None,
    *,
    sound: bool = False,
    held_out: float = 0.0,
    cache: Path | None = None,
) -> tuple[ClipIndex, ClipIndex]:
    """Returns the index of the training clips and of the held-out ones.

    Args:
        data: As in `open_index`.
        caption: As in `open_index`.
        sound: As in `open_index`.
        held_out: Share of the videos that is held out.
        cache: A local folder in which both are kept, for as long as catalog and subset are the same.

    Raises:
        CorpusError: As in `open_index`.
        ConfigError: As in `open_index`.
    """
    if cache is None:
        index = open_index(data, caption, sound=sound)
        train, rest = split_by_video(index, held_out)
        return (index, index.take(rest)) if not len(rest) else (index.take(train), index.take(rest))
    url, _, subset = data.partition("#")
    corpus = Corpus.open(url)
    # Before the catalog is read: what changes meanwhile is read again next time.
    state = {
        "version": INDEX_VERSION,
        "catalog": records.digest(json.dumps(corpus.catalog_stamps(), sort_keys=True)),
        "subset": str(corpus.fs.ukey(corpus.subset_path(subset))) if subset else "",
    }
    question = records.digest(json.dumps([corpus.url, subset, caption, sound, held_out]))
    folder = cache / f"{question}-{records.digest(json.dumps(state))}"
    if folder.is_dir():
        try:
            return _load(folder / "train"), _load(folder / "held_out")
        except (OSError, EOFError, ValueError, KeyError) as error:
            logger.warning("%s is damaged and made again: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    sides = open_split(data, caption, sound=sound, held_out=held_out)
    try:
        _keep(folder, sides)
        for old in cache.glob(f"{question}-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        # Mapped, so that reader processes share the files.
        return _load(folder / "train"), _load(folder / "held_out")
    except OSError as error:
        logger.warning("the index of %s cannot be kept in %s: %s", data, cache, error)
        return sides


_ARRAYS = ("group_shard", "group_number", "group_start", "row", "video_hash")


def _keep(folder: Path, sides: tuple[ClipIndex, ClipIndex]) -> None:
    """Writes both sides of a split into a folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".index-", dir=folder.parent))
    try:
        for side, index in zip(("train", "held_out"), sides, strict=True):
            (made / side).mkdir()
            for name in _ARRAYS:
                np.save(made / side / f"{name}.npy", getattr(index, name))
            about = {
                "shards": index.shards,
                "num_clips": len(index),
                "num_videos": index.num_videos,
                "fingerprint": index.fingerprint,
            }
            (made / side / "index.json").write_text(json.dumps(about))
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first: its files are as good
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _load(folder: Path) -> ClipIndex:
    about = json.loads((folder / "index.json").read_text())
    arrays = {}
    for name in _ARRAYS:
        # Nothing cannot be mapped. A view is indexed as a plain array, at a tenth of memmap's cost.
        array = np.load(folder / f"{name}.npy", mmap_mode="r" if about["num_clips"] else None)
        arrays[name] = array.view(np.ndarray)
    if len(arrays["row"]) != about["num_clips"]:
        raise ValueError(f"it holds {len(arrays['row'])} of {about['num_clips']} clips")
    return ClipIndex(
        shards=tuple(Shard(*shard) for shard in about["shards"]),
        **arrays,
        num_videos=about["num_videos"],
        fingerprint=about["fingerprint"],
        folder=str(folder),
    )


def _num_distinct(hashes: NDArray[np.int64]) -> int:
    ordered = np.sort(hashes)
    return len(ordered) and 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


@dataclass(frozen=True)
class _Columns:
    """Four numbers a clip."""

    shard_number: NDArray[np.int32]
    row_group: NDArray[np.int32]
    row: NDArray[np.int32]
    video_hash: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence["_Columns"]) -> "_Columns":
        return cls(
            np.concatenate([part.shard_number for part in parts]),
            np.concatenate([part.row_group for part in parts]),
            np.concatenate([part.row for part in parts]),
            np.concatenate([part.video_hash for part in parts]),
        )

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

    def holds(self, columns: _Columns, clip_id_N: pa.Array | None) -> NDArray[np.bool_]:
        """Returns which of the clips are in the subset."""
        if self.keys is None:
            found = pc.call_function("is_in", [clip_id_N], pc.SetLookupOptions(self.ids))
            return found.to_numpy(zero_copy_only=False)
        key_N = columns.key
        at_N = np.minimum(np.searchsorted(self.keys, key_N), len(self.keys) - 1)
        return self.keys[at_N] == key_N if len(self.keys) else np.zeros(len(key_N), dtype=bool)


_PLACE = ("shard", "row_group", "row")


def _catalog_batches(
    corpus: Corpus, names: list[str], where: pc.Expression | None = None
) -> Iterator[pa.RecordBatch]:
    """Yields columns of the catalog, merged files as far as they are up to date."""
    for part in corpus.catalog_parts():
        dataset = pa_dataset.dataset(
            list(part.files),
            schema=corpus.catalog_schema,
            format="parquet",
            filesystem=arrow_filesystem(corpus),
        )
        stale = ~pc.field("shard").isin(sorted(part.without)) if part.without else None
        asked = stale if where is None or stale is None else stale & where
        yield from dataset.to_batches(
            columns=names,
            filter=where if asked is None else asked,
            # Captions are read only to see whether there is one: few at a time.
            batch_readahead=2,
            fragment_readahead=2,
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


def _clip_id(corpus: Corpus, place: dict[str, Any]) -> str:
    """Returns the id of the clip that lies there."""
    here = [pc.field(name) == value for name, value in place.items()]
    for batch in _catalog_batches(corpus, ["clip_id"], here[0] & here[1] & here[2]):
        if len(batch["clip_id"]):
            return batch["clip_id"][0].as_py()
    return "/".join(map(str, place.values()))


def _nothing(corpus: Corpus, data: str, caption: str | None, num_silent: int) -> CorpusError:
    """Returns what is wrong with a corpus of which no clip is left."""
    if num_silent:
        return CorpusError(
            f"No clip with sound{f' and a {caption}' if caption else ''} in {data}",
            "leave audio out of data.mix, or name what this source feeds in its kinds",
        )
    if caption is None:
        return CorpusError(f"No clip in {data}")
    filled = _filled_captions(corpus)
    return CorpusError(
        f"No clip with a {caption} in {data}",
        f"--set data.caption={filled[0]} (columns with text: {', '.join(filled)})"
        if filled
        else "no caption column has text: run an ingest pipeline that captions",
    )


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
