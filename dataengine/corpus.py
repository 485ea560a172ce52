# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk or in an object store: layout, commit protocol, readers.

The commit protocol, in the order of writing (each file appears whole under its name)::

    shards/<shard>.parquet           clips with their media
    videos/<run>-<shard>.parquet     one row per source video that ended with this shard
    catalog/<shard>.parquet          the same clips without media: THE COMMIT

    compacted/<snapshot>.json        optional: names merged copies of catalog files (`compact`)

A shard or a videos part without its catalog twin is garbage, ignored by every reader and removed
by the next writer. A shard holds whole videos only and is named by a hash of their ids and of the
pipeline, so a task that runs twice overwrites itself. Hence a writer can be killed at any point
and started again, and every clip is there exactly once.
"""

import contextlib
import fcntl
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq

from dataengine import records
from dataengine.errors import CorpusError

_DROPS = "drops"
"""Takes the shard's place in the name of a videos part that goes with no shard."""


MERGE_AGAIN = "merge it again from the shards' own files: dataengine compact CORPUS --full"
"""What mends a damaged merged catalog."""


class SupersededError(CorpusError):
    """Another run has taken the corpus over; this writer must not commit any more."""


@dataclass(frozen=True)
class CatalogPart:
    """Catalog files that are read together.

    Attributes:
        files: Paths as the corpus' file system names them.
        without: Shards whose rows in these files are out of date: they were written again or removed.
    """

    files: tuple[str, ...]
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Corpus:
    """Paths and files of one corpus. Cheap to make and to pickle.

    Args:
        url: A local folder or an fsspec URL such as ``s3://bucket/corpus``.
    """

    url: str

    # ------------------------------------------------------------------------------- opening

    @classmethod
    def create(cls, url: str) -> "Corpus":
        """Opens a corpus for writing, making it when there is none.

        Raises:
            CorpusError: If the folder holds other things, or a corpus of a newer format.
        """
        corpus = cls(_absolute(url))
        if corpus.fs.exists(corpus.path("corpus.json")):
            return cls.open(url)
        if corpus.fs.exists(corpus.root) and any(
            not PurePosixPath(name).name.startswith(".")
            for name in corpus.fs.ls(corpus.root, detail=False)
        ):
            raise CorpusError(
                f"Not a corpus, and not empty: {url}", "choose a new folder for --corpus"
            )
        about = {
            "format_version": records.FORMAT_VERSION,
            "schema": [f"{field.name}: {field.type}" for field in records.CLIP_SCHEMA],
            "created_ms": int(time.time() * 1000),
        }
        # First, so that whatever is killed after this leaves a corpus.
        corpus.publish("corpus.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
        for folder in ("shards", "videos", "catalog", "runs"):
            corpus.fs.makedirs(corpus.path(folder), exist_ok=True)
        return corpus

    @classmethod
    def open(cls, url: str) -> "Corpus":
        """Opens an existing corpus.

        Raises:
            CorpusError: If there is none, it is damaged, or its format is newer than this code.
        """
        corpus = cls(_absolute(url))
        try:
            about = json.loads(corpus.fs.cat_file(corpus.path("corpus.json")))
            version = int(about["format_version"])
        except FileNotFoundError:
            raise CorpusError(
                f"Not a corpus: {url} (it has no corpus.json)",
                "make one with: dataengine ingest PIPELINE --sources ... --corpus " + url,
            ) from None
        except (ValueError, KeyError, TypeError):
            raise CorpusError(
                f"Damaged: corpus.json of {url}",
                f'a corpus of this version says {{"format_version": {records.FORMAT_VERSION}}} there',
            ) from None
        if version > records.FORMAT_VERSION:
            raise CorpusError(
                f"Corpus format {version} of {url} is newer than this version",
                "update dataengine",
            )
        return corpus

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system the corpus lies on."""
        # Listings must be fresh: other processes write to the same corpus.
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)[0]

    @property
    def root(self) -> str:
        """The corpus' folder as its file system names it."""
        return fsspec.core.url_to_fs(self.url)[1].rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the corpus is a folder of this machine's file system."""
        return "file" in self.fs.protocol

    def path(self, *parts: str) -> str:
        """Returns a path inside the corpus as its file system names it."""
        return "/".join((self.root, *parts))

    @property
    def added_columns(self) -> dict[str, str]:
        """Columns that annotation has added: name -> the column of CLIP_SCHEMA it is typed like."""
        about = json.loads(cast(bytes, self.fs.cat_file(self.path("corpus.json"))))
        return dict(about.get("columns", {}))

    @property
    def shard_columns(self) -> tuple[str, ...]:
        """Columns that live in shards only: SHARD_COLUMNS, and added ones that are typed like them."""
        added = self.added_columns.items()
        only = (name for name, like in added if like in records.SHARD_COLUMNS)
        return (*records.SHARD_COLUMNS, *only)

    @property
    def clip_schema(self) -> pa.Schema:
        """Schema of a shard: CLIP_SCHEMA and the added columns."""
        return _with_columns(records.CLIP_SCHEMA, self.added_columns)

    @property
    def catalog_schema(self) -> pa.Schema:
        """Schema of a catalog file: CATALOG_SCHEMA and the added columns."""
        return _with_columns(records.CATALOG_SCHEMA, self.added_columns)

    def names(self, folder: str, suffix: str = ".parquet") -> list[str]:
        """Returns the sorted names, without suffix, of the finished files of a folder."""
        try:
            paths = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(path).name for path in paths)
        return sorted(n[: -len(suffix)] for n in names if n.endswith(suffix) and n[0] != ".")

    def run_files(self, name: str) -> list[str]:
        """Returns the sorted paths of the files that runs left under a name, ``runs/*/<name>``."""
        # A pattern would take special characters of the corpus' own path for its own.
        found = self.fs.find(self.path("runs"), maxdepth=2)
        return sorted(
            path
            for path in map(str, found)
            if path.split("/")[-1] == name and path.split("/")[-2] != "runs"
        )

    # ------------------------------------------------------------------------------- writing

    def publish(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        """Writes a file that appears under its name whole or not at all.

        On a local disk: a temporary name, flushed to the disk, then renamed. On an object store
        an upload is atomic by itself.
        """
        with self.publishing(name) as path, self.fs.open(path, "wb") as file:
            write(cast(BinaryIO, file))

    @contextlib.contextmanager
    def publishing(self, name: str) -> Iterator[str]:
        """Gives the path to write a file to that appears under its name when the body ends well."""
        target = self.path(name)
        if not self.is_local:
            yield target
            return
        folder, _, base = target.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{base}.{uuid.uuid4().hex}.tmp"
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds a local corpus for one writer; the lock goes with the process, however it ends.

        Object stores have no locks: there the newest run wins (`take_over`).

        Raises:
            CorpusError: If another process holds it.
        """
        if not self.is_local:
            yield
            return
        with open(self.path(".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CorpusError(
                    f"Another run is writing to {self.url}", "wait for it, or use another corpus"
                ) from None
            yield

    def take_over(self, run_id: str) -> None:
        """Makes a run the only one whose commits are accepted."""
        self.publish("runs/current", lambda file: file.write(run_id.encode()))

    def check_current(self, run_id: str) -> None:
        """Raises SupersededError unless the run is the one that took the corpus over last."""
        current = cast(bytes, self.fs.cat_file(self.path("runs/current"))).decode()
        if current != run_id:
            raise SupersededError(f"Run {run_id} was superseded by run {current}")

    def commit(
        self,
        clips: pa.Table,
        videos: Sequence[dict[str, Any]],
        *,
        run_id: str,
        fingerprint: str,
        row_group_bytes: int = 32 << 20,
    ) -> str | None:
        """Writes one shard of whole videos and the ledger rows of the videos that ended with it.

        Args:
            clips: Rows of CLIP_SCHEMA, added columns perhaps behind it; all clips of every kept video of
                ``videos``, no others.
            videos: Rows of VIDEO_SCHEMA without ``run_id``, ``fingerprint`` and ``shard``.
            run_id: The run that writes; it must be the current one.
            fingerprint: Hash of everything in the pipeline that changes what a clip holds.
            row_group_bytes: Media bytes after which a row group is closed.

        Returns:
            The shard's name, or None when there were no clips.

        Raises:
            SupersededError: If another run took the corpus over; nothing is committed then.
        """
        shard, catalog = None, None
        if clips.num_rows:
            clips = _sorted(clips)
            shard = records.digest(fingerprint, *clips["video_id"].unique().to_pylist())
        stamp = {"run_id": run_id, "fingerprint": fingerprint}
        rows = [{**v, **stamp, "shard": shard if v["num_clips"] else None} for v in videos]
        ledger = pa.Table.from_pylist(rows, schema=records.VIDEO_SCHEMA)
        part = shard or f"{_DROPS}-{records.digest(*sorted(v['source'] for v in videos))}"

        self.check_current(run_id)
        if shard:
            catalog = self._write_shard(shard, clips, row_group_bytes)
        self.publish(f"videos/{run_id}-{part}.parquet", lambda file: write_small(ledger, file))
        if shard and catalog is not None:
            # Last look before the commit: a run that was killed may still have live workers.
            self.check_current(run_id)
            self.publish(f"catalog/{shard}.parquet", lambda file: write_small(catalog, file))
        return shard

    def _write_shard(self, shard: str, clips: pa.Table, row_group_bytes: int) -> pa.Table:
        """Writes the shard file and returns its catalog twin."""
        given = clips
        clips = clips.select(records.CLIP_SCHEMA.names).cast(records.CLIP_SCHEMA)
        for field in list(self.clip_schema)[len(records.CLIP_SCHEMA) :]:
            values: Any = pa.nulls(clips.num_rows, field.type)
            if field.name in given.column_names:
                values = given[field.name].cast(field.type)
            clips = clips.append_column(field, values)
        clips = without_nan(clips)
        schema = clips.schema.with_metadata(records.hugging_face_metadata(clips.schema))
        groups = list(row_groups(media_bytes(clips), row_group_bytes))

        def write(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, schema, **writer_options(schema)) as writer:
                for start, stop in groups:
                    writer.write_table(
                        clips.slice(start, stop - start), row_group_size=stop - start
                    )

        self.publish(f"shards/{shard}.parquet", write)
        lengths = [stop - start for start, stop in groups]
        catalog = clips.drop_columns(list(records.SHARD_COLUMNS))
        locators = {
            "shard": pa.repeat(pa.scalar(shard), clips.num_rows),
            "row_group": pa.array([g for g, n in enumerate(lengths) for _ in range(n)], pa.int32()),
            "row": pa.array([row for n in lengths for row in range(n)], pa.int32()),
        }
        for name, column in locators.items():
            catalog = catalog.append_column(name, column)
        return catalog.select(self.catalog_schema.names).cast(self.catalog_schema)

    def sweep(self) -> int:
        """Removes what a killed writer left behind: everything without its commit.

        Only the run that holds the corpus may call this. Returns the number of files removed.
        """
        committed = set(self.names("catalog"))
        garbage = [f"shards/{n}.parquet" for n in self.names("shards") if n not in committed]
        garbage += [
            f"videos/{n}.parquet" for n in self.names("videos") if not _counts(n, committed)
        ]
        for folder in ("shards", "videos", "catalog"):
            with contextlib.suppress(FileNotFoundError):
                garbage += [
                    f"{folder}/{PurePosixPath(path).name}"
                    for path in self.fs.ls(self.path(folder), detail=False)
                    if path.endswith(".tmp")
                ]
        for name in garbage:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.path(name))
        return len(garbage)

    # ------------------------------------------------------------------------------- reading

    def video_parts(self) -> list[str]:
        """Returns the paths of the videos parts that count."""
        committed = set(self.names("catalog"))
        return [
            self.path("videos", f"{name}.parquet")
            for name in self.names("videos")
            if _counts(name, committed)
        ]

    def catalog_stamps(self) -> dict[str, str]:
        """Returns every committed shard and what changes when its catalog file is replaced."""
        if self.is_local:
            with (
                contextlib.suppress(FileNotFoundError),
                os.scandir(self.path("catalog")) as entries,
            ):
                return {
                    entry.name.removesuffix(".parquet"): _local_stamp(entry.stat())
                    for entry in entries
                    if entry.name.endswith(".parquet") and entry.name[0] != "."
                }
            return {}
        try:
            infos = self.fs.ls(self.path("catalog"), detail=True)
        except FileNotFoundError:
            return {}
        names = {PurePosixPath(info["name"]).name: info for info in infos}
        return {
            name.removesuffix(".parquet"): _object_stamp(info)
            for name, info in names.items()
            if name.endswith(".parquet") and name[0] != "."
        }

    def catalog_parts(self, snapshot: str = "") -> list[CatalogPart]:
        """Returns what makes up the catalog: merged files as far as they are up to date, then the rest.

        Args:
            snapshot: The catalog as it was when `compact` made this snapshot; empty: as it is now.

        Raises:
            CorpusError: If there is no such snapshot, or it is damaged.
        """
        snapshots = self.names("compacted", ".json")
        if snapshot and snapshot not in snapshots:
            raise CorpusError(
                f"No snapshot {snapshot} in {self.url}",
                f"snapshots: {', '.join(snapshots) or 'none; dataengine compact makes one'}",
            )
        fresh = {} if snapshot else self.catalog_stamps()
        parts: list[CatalogPart] = []
        for segment in self.segments(snapshot or snapshots[-1]) if snapshots else ():
            covered = self.covered(segment["name"])
            old = set(segment["without"])
            if not snapshot:
                old |= {name for name, stamp in covered.items() if fresh.get(name) != stamp}
            valid = covered.keys() - old
            if valid:
                fresh = {name: stamp for name, stamp in fresh.items() if name not in valid}
                files = tuple(self.path("compacted", segment["name"], f) for f in segment["files"])
                parts.append(CatalogPart(files, frozenset(old & covered.keys())))
        if fresh:
            files = tuple(self.path("catalog", f"{name}.parquet") for name in sorted(fresh))
            parts.append(CatalogPart(files))
        return parts

    def segments(self, snapshot: str) -> list[dict[str, Any]]:
        """Returns the merged pieces of a snapshot: ``name``, ``files``, ``without``, ``num_clips``.

        Raises:
            CorpusError: If the snapshot is damaged.
        """
        name = f"compacted/{snapshot}.json"
        content = cast(bytes, self.fs.cat_file(self.path(name)))
        segments, whole = [], False
        try:
            segments = json.loads(content)["segments"]
            whole = all({"name", "files", "without"} <= segment.keys() for segment in segments)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        if not whole:
            raise CorpusError(f"Damaged: {name} of {self.url}", MERGE_AGAIN)
        return segments

    def covered(self, segment: str) -> dict[str, str]:
        """Returns the shards that were merged into a segment, with their stamps of that time.

        Raises:
            CorpusError: If the list of them is damaged.
        """
        name = f"compacted/{segment}/shards.parquet"
        try:
            with self.fs.open(self.path(name), "rb") as file:
                table = pq.read_table(file)
            shards, stamps = table["shard"].to_pylist(), table["stamp"].to_pylist()
        except (OSError, KeyError, pa.ArrowException):
            raise CorpusError(f"Damaged: {name} of {self.url}", MERGE_AGAIN) from None
        return dict(zip(shards, stamps, strict=True))

    def catalog(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the catalog, or some columns of it.

        This holds the whole answer in memory: ask for few columns of a large corpus.
        """
        parts = [
            _read(self, part.files, self.catalog_schema, columns, part.without)
            for part in self.catalog_parts()
        ]
        empty = self.catalog_schema.empty_table()
        return (
            pa.concat_tables(parts) if parts else empty.select(list(columns or empty.column_names))
        )

    def videos(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the current row of every source, or some columns of it, sorted by source."""
        wanted = list(columns) if columns else records.VIDEO_SCHEMA.names
        needed = list(dict.fromkeys([*wanted, "source", "finished_ms"]))
        table = _read(self, self.video_parts(), records.VIDEO_SCHEMA, needed)
        table = table.sort_by([("source", "ascending"), ("finished_ms", "ascending")])
        sources = table["source"].to_pylist()
        newest = [i for i, s in enumerate(sources) if i + 1 == len(sources) or s != sources[i + 1]]
        return table.take(pa.array(newest, pa.int64())).select(wanted)

    def subset_path(self, name: str) -> str:
        """Returns the path of a subset's file.

        Raises:
            CorpusError: If there is no such subset.
        """
        known = self.names("subsets")
        if name not in known:
            raise CorpusError(
                f"Unknown subset: {name} of {self.url}",
                f"subsets: {', '.join(known) or 'none yet; dataengine subset makes one'}",
            )
        return self.path("subsets", f"{name}.parquet")

    def open_shard(self, shard: str) -> pq.ParquetFile:
        """Opens a shard for row-group reads. Close it when done.

        Raises:
            CorpusError: If the shard is missing or is not Parquet.
        """
        try:
            return pq.ParquetFile(self.fs.open(self.path("shards", f"{shard}.parquet"), "rb"))
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise CorpusError(f"Shard {shard} of {self.url} cannot be read: {error}") from None

    def read_clip(self, locator: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
        """Returns some columns of one clip, media included, by its catalog row."""
        with self.open_shard(locator["shard"]) as file:
            group = file.read_row_group(locator["row_group"], columns=list(columns))
        return group.slice(locator["row"], 1).to_pylist()[0]


# ----------------------------------------------------------------------------- pure functions


def row_groups(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Yields ``[start, stop)`` of consecutive rows whose sizes add up to at least the limit.

    Every group but the last reaches the limit; a group is closed as soon as it does, so it is
    never larger than the limit plus one row.
    """
    start, total = 0, 0
    for index, size in enumerate(sizes):
        total += size
        if total >= limit:
            yield start, index + 1
            start, total = index + 1, 0
    if start < len(sizes):
        yield start, len(sizes)


def without_nan(rows: pa.Table) -> pa.Table:
    """Returns the rows with null for every number that is none: it would count as the highest score."""
    for index, field in enumerate(rows.schema):
        if field.type in (pa.float32(), pa.float64()):
            finite = pc.call_function("is_finite", [rows[field.name]])
            null = pa.scalar(None, field.type)
            column = pc.call_function("if_else", [finite, rows[field.name], null])
            rows = rows.set_column(index, field, column)
    return rows


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """Returns how a shard is written: options of ``pyarrow.parquet.ParquetWriter``."""
    text = [n for n in schema.names if n not in (*records.SHARD_COLUMNS, "frame_ms")]
    return {
        # Media is compressed already; a dictionary or statistics of it only cost time.
        "compression": {path: _codec(path) for path in _leaf_paths(schema)},
        "use_dictionary": text,
        "write_statistics": text,
        "write_page_index": True,
    }


def _counts(part: str, committed: set[str]) -> bool:
    """Returns whether a videos part, ``<run>-<shard>`` or ``<run>-drops-<hash>``, is committed."""
    _, middle, last = ("-", *part.split("-"))[-3:]
    return middle == _DROPS or last in committed


def media_bytes(clips: pa.Table) -> list[int]:
    """Returns the media bytes of every row."""
    sizes: list[int] = []
    for batch in clips.select(records.MEDIA_COLUMNS).to_batches():
        mp4 = pc.call_function("binary_length", [batch["video"].field("bytes")]).to_pylist()
        frames = batch["frames"]
        jpegs = pc.call_function("binary_length", [frames.flatten()]).to_pylist()
        stops = itertools.accumulate(n or 0 for n in frames.value_lengths().to_pylist())
        starts = 0
        for video, stop in zip(mp4, stops, strict=True):
            sizes.append((video or 0) + sum(jpegs[starts:stop]))
            starts = stop
    return sizes


def _with_columns(schema: pa.Schema, added: Mapping[str, str]) -> pa.Schema:
    """Returns the schema with added columns behind its own; those kept in shards alone only there."""
    for name, like in added.items():
        if like in schema.names:
            schema = schema.append(pa.field(name, schema.field(like).type))
    return schema


def _sorted(clips: pa.Table) -> pa.Table:
    """Returns the clips by video and time, untouched (no copy of the media) if they are so."""
    keys = list(zip(clips["video_id"].to_pylist(), clips["start_ms"].to_pylist(), strict=True))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return clips if order == list(range(len(keys))) else clips.take(pa.array(order))


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Returns the dotted Parquet path of every leaf column."""

    def walk(path: str, type_: pa.DataType) -> Iterator[str]:
        if pa.types.is_struct(type_):
            for field in type_:
                yield from walk(f"{path}.{field.name}", field.type)
        elif pa.types.is_list(type_):
            yield from walk(f"{path}.list.element", type_.value_type)
        else:
            yield path

    return [leaf for field in schema for leaf in walk(field.name, field.type)]


def _codec(path: str) -> str:
    return "NONE" if path.split(".")[0] in records.MEDIA_COLUMNS else "ZSTD"


def write_small(table: pa.Table, file: BinaryIO) -> None:
    """Writes a table without media."""
    pq.write_table(table, file, compression="zstd", write_page_index=True)


def _read(
    corpus: Corpus,
    paths: Sequence[str],
    schema: pa.Schema,
    columns: Sequence[str] | None,
    without: Collection[str] = (),
) -> pa.Table:
    if not paths:
        return schema.empty_table().select(list(columns or schema.names))
    dataset = pa_dataset.dataset(list(paths), schema=schema, format="parquet", filesystem=corpus.fs)
    return dataset.to_table(
        columns=list(columns) if columns else None,
        filter=~pc.field("shard").isin(sorted(without)) if without else None,
    )


def _local_stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _object_stamp(info: Mapping[str, Any]) -> str:
    """Stores name their version of an object differently; all of them say at least one of these."""
    version = next((info[key] for key in ("ETag", "etag", "mtime", "created") if info.get(key)), "")
    return f"{info['size']}-{version}"


def _absolute(url: str) -> str:
    """Returns the URL with a local path made absolute: workers may run in another folder."""
    return url if "://" in url else os.path.abspath(url)
