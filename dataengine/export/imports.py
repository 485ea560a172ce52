# SPDX-License-Identifier: Apache-2.0
"""A corpus from an export of one: the same clips, columns, provenance and media, in shards again.

The files are read in order; whole videos are committed a shard at a time, and a video that the corpus
knows already, for whatever reason (an earlier run of the same import, a takedown), is passed over.
"""

import io
import json
import os
import secrets
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from dataengine import records
from dataengine.corpus import Corpus, media_bytes
from dataengine.errors import ConfigError, CorpusError
from dataengine.export.run import read_record
from dataengine.progress import ProgressDisplay, Snapshot
from dataengine.query.literals import quoted
from dataengine.query.sql import engine, exact_url_of

SHARD_BYTES = 256 << 20
"""Media after which a shard is committed, at the end of a video."""

_PIECE_BYTES = 32 << 20
_FINGERPRINT = "import"


@dataclass
class Import:
    """What an import did.

    Attributes:
        num_clips: Clips committed.
        num_videos: Their videos.
        num_shards: Their shards.
        num_known: Videos that were passed over, because the corpus knows them.
    """

    num_clips: int = 0
    num_videos: int = 0
    num_shards: int = 0
    num_known: int = 0


def import_export(
    source: str, corpus_url: str, *, console: Console | None = None, shard_bytes: int = SHARD_BYTES
) -> Import:
    """Makes a corpus from an export, or adds the export to one; run again, it goes on.

    Args:
        source: Folder or URL of a ``huggingface`` or ``webdataset`` export, with its ``export.json``.
        corpus_url: Where to; made if missing.
        console: For progress; None shows none.
        shard_bytes: Media after which a shard is committed.

    Raises:
        ConfigError: If ``source`` is no such export.
        CorpusError: If clips of one video lie apart in it, or it is damaged.
    """
    settings, record = read_record(source)
    if settings.format not in ("huggingface", "webdataset") or settings.card_only:
        raise ConfigError(
            f"{source} has no media in it: {settings.format}",
            "what can be imported: huggingface and webdataset exports",
        )
    folder = Corpus(source if "://" in source else os.path.abspath(source))
    _check_contiguous(folder)
    corpus = Corpus.create(corpus_url)
    with corpus.locked():
        run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        corpus.take_over(run_id)
        corpus.sweep()
        _declare(corpus, record["added_columns"])
        about = json.dumps(
            {"run_id": run_id, "imported": settings.stated, "facts": record["facts"]}
        )
        corpus.publish(f"runs/{run_id}/run.json", lambda file: file.write(about.encode()))
        read = _parquet_clips if settings.format == "huggingface" else _tar_clips
        writer = _Shards(corpus, run_id, shard_bytes)
        num_clips = int(record["counts"]["clips"])
        if console is None:
            for table in read(folder, corpus.clip_schema):
                writer.add(table)
        else:
            with ProgressDisplay(console, (), num_clips, unit="clips") as display:
                for table in read(folder, corpus.clip_schema):
                    writer.add(table)
                    display.show(Snapshot({}, writer.num_read))
        writer.flush()
    return writer.done


class _Shards:
    """Collects clips until there is a shard of whole videos."""

    def __init__(self, corpus: Corpus, run_id: str, shard_bytes: int) -> None:
        self.done = Import()
        self.num_read = 0
        self._corpus, self._run_id, self._limit = corpus, run_id, shard_bytes
        # The ids of all videos: some hundred megabytes for the largest corpora there are.
        self._known = set(corpus.videos(["video_id"])["video_id"].to_pylist())
        self._passed: set[str] = set()
        self._committed: set[str] = set()
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0

    def add(self, clips: pa.Table) -> None:
        """Takes the next clips; commits what is whole once it is enough."""
        self.num_read += clips.num_rows
        ids = clips["video_id"].to_pylist()
        again = self._committed.intersection(ids)
        if again:
            raise _apart(min(again))
        self._passed.update(self._known.intersection(ids))
        mask = [video_id not in self._known for video_id in ids]
        if not all(mask):
            clips = clips.filter(pa.array(mask, pa.bool_()))
        if not clips.num_rows:
            return
        self._waiting.append(clips)
        self._waiting_bytes += sum(media_bytes(clips))
        if self._waiting_bytes < self._limit:
            return
        table = pa.concat_tables(self._waiting)
        ids = table["video_id"].to_pylist()
        whole = ids.index(ids[-1])  # the last video may go on
        if whole:
            rest = table.slice(whole)
            self._commit(table.slice(0, whole))
            self._waiting, self._waiting_bytes = [rest], sum(media_bytes(rest))

    def flush(self) -> None:
        """Commits the rest."""
        if self._waiting:
            self._commit(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_bytes = [], 0
        self.done.num_known = len(self._passed)

    def _commit(self, clips: pa.Table) -> None:
        videos = _ledger_rows(clips)
        self._corpus.commit(clips, videos, run_id=self._run_id, fingerprint=_FINGERPRINT)
        self._committed.update(video["video_id"] for video in videos)
        self.done.num_shards += 1
        self.done.num_clips += clips.num_rows
        self.done.num_videos += len(videos)


def _ledger_rows(clips: pa.Table) -> list[dict[str, Any]]:
    """Returns what the ledger says of the clips' videos."""
    facts = ["title", "description", "tags", "categories", "fps"]
    plain = clips.select(["video_id", "source_url", "duration_ms", *facts]).to_pylist()
    videos: dict[str, dict[str, Any]] = {}
    now_ms = int(time.time() * 1000)
    for clip in plain:
        video = videos.setdefault(
            clip["video_id"],
            {
                "source": _source(clip["source_url"], clip["video_id"]),
                "source_version": "",
                "video_id": clip["video_id"],
                "status": records.KEPT,
                "attempts": 1,
                "finished_ms": now_ms,
                "num_clips": 0,
                "clips_ms": 0,
                "dropped_clips": [],
                **{name: clip[name] for name in facts},
            },
        )
        video["num_clips"] += 1
        video["clips_ms"] += clip["duration_ms"]
    return list(videos.values())


def _source(url: str | None, video_id: str) -> str:
    """Returns the ledger's key of a video: a path for a file, else its URL."""
    if not url:
        return f"{_FINGERPRINT}:{video_id}"
    return unquote(urlsplit(url).path) if url.startswith("file://") else url


# -------------------------------------------------------------------------------------- reading


def _parquet_clips(folder: Corpus, schema: pa.Schema) -> Iterator[pa.Table]:
    for name in folder.names("data"):
        try:
            with (
                folder.fs.open(folder.path("data", f"{name}.parquet"), "rb") as opened,
                pq.ParquetFile(opened) as file,
            ):
                for group in range(file.metadata.num_row_groups):
                    yield _conformed(file.read_row_group(group), schema)
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"data/{name}.parquet cannot be read: {error}") from None


def _tar_clips(folder: Corpus, schema: pa.Schema) -> Iterator[pa.Table]:
    for name in folder.names("", ".tar"):
        try:
            with folder.fs.open(folder.path(f"{name}.tar"), "rb") as file:
                waiting: list[dict[str, Any]] = []
                waiting_bytes = 0
                for row, row_bytes in _samples(cast(BinaryIO, file)):
                    waiting.append(row)
                    waiting_bytes += row_bytes
                    if waiting_bytes >= _PIECE_BYTES:
                        yield pa.Table.from_pylist(waiting, schema=schema)
                        waiting, waiting_bytes = [], 0
                if waiting:
                    yield pa.Table.from_pylist(waiting, schema=schema)
        except (OSError, tarfile.TarError, ValueError, KeyError, pa.ArrowException) as error:
            raise CorpusError(f"{name}.tar cannot be read: {error}") from None


def _samples(file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the clips of a tar and their bytes; the files of a sample follow each other."""
    key, files = "", {}
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            data = tar.extractfile(member)
            if data is None:
                continue
            start, _, ending = member.name.partition(".")
            if start != key and files:
                yield _clip(files)
                files = {}
            key = start
            files[ending] = data.read()
    if files:
        yield _clip(files)


def _clip(files: dict[str, bytes]) -> tuple[dict[str, Any], int]:
    row = json.loads(files["json"])
    path = row.pop("video_path", None)
    video = files.get("mp4")
    row["video"] = None if video is None and path is None else {"bytes": video, "path": path}
    row["frames"] = [files[name] for name in sorted(files) if name.endswith(".jpg")]
    for name, data in files.items():
        if name.endswith(".npy"):
            row[name.removesuffix(".npy")] = np.load(io.BytesIO(data), allow_pickle=False)
    return row, sum(map(len, files.values()))


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns the rows that hold a clip, in the corpus' columns."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    conformed = pa.Table.from_arrays(columns, schema=schema)
    return conformed.filter(conformed["clip_id"].is_valid())


def _check_contiguous(folder: Corpus) -> None:
    """Raises CorpusError if clips of a video do not follow each other."""
    if not folder.names("index"):
        return  # it is noticed on the way
    pattern = exact_url_of(folder, folder.path("index")) + "/*.parquet"
    with engine(folder) as db:
        row = db.execute(
            "select video_id from (select regexp_replace(clip_id, '_[0-9]+_[0-9]+$', '') as video_id, "
            "row_number() over (order by piece, shard, row_group, row) as place "
            f"from read_parquet({quoted(pattern)}, union_by_name = true)) "
            "group by video_id having max(place) - min(place) + 1 <> count(*) limit 1"
        ).fetchone()
    if row is not None:
        raise _apart(row[0])


def _apart(video_id: str) -> CorpusError:
    return CorpusError(
        f"Clips of the video {video_id} lie apart in this export",
        "it was extended since it was made; export to a new folder and import that",
    )


def _declare(corpus: Corpus, added: dict[str, str]) -> None:
    """Notes the export's added columns in ``corpus.json``, before any shard has them."""
    if added.items() <= corpus.added_columns.items():
        return
    about = json.loads(cast(bytes, corpus.fs.cat_file(corpus.path("corpus.json"))))
    about["columns"] = {**about.get("columns", {}), **added}
    corpus.publish("corpus.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
