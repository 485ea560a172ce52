# SPDX-License-Identifier: Apache-2.0
"""Files and a table for text-to-video trainers, in the columns that Open-Sora's loaders read.

``videos/<piece>/<clip>.mp4`` beside ``metadata.csv`` and ``metadata.parquet``, whose ``path`` is relative
to the folder. InternVid-Aes is the clips with an aesthetic score of at least 4 (InternVid, section 5.2).
"""

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, DependencyError, MediaError
from dataengine.export.pieces import index_rows
from dataengine.export.plain import plain_mp4s
from dataengine.export.settings import ExportSettings
from dataengine.export.webdataset import sample_key

TABLE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("text", pa.string()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("aspect_ratio", pa.float64()),  # height / width
        ("resolution", pa.int64()),  # height * width
        ("fps", pa.float32()),
        ("aes", pa.float32()),
        ("match", pa.float32()),  # CLIP score
        ("motion", pa.float32()),
        ("duration", pa.float64()),  # seconds
        ("language", pa.string()),
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
    ]
)
"""One row of ``metadata.csv`` and ``metadata.parquet``; the first eight are those Open-Sora needs."""

_CLIPS_PER_FOLDER = 1000


class GenerationWriter:
    """Writes pieces as folders of MP4 files; see `dataengine.export.pieces.Writer`."""

    max_bytes = None
    max_clips: int | None = _CLIPS_PER_FOLDER
    folders = ("videos",)

    def __init__(self, folder: Corpus, settings: ExportSettings) -> None:
        if not folder.is_local:
            raise ConfigError(
                "generation writes one file per clip, to a local folder",
                "webdataset writes tars to an object store",
            )
        self._folder = folder
        self._caption = settings.caption
        self._reencode = settings.reencode
        names = ["clip_id", "video_id", "video", "frames", "duration_ms", "fps", "width", "height"]
        names += ["language", "aesthetic_score", "clip_score", "motion_score", self._caption]
        self.columns: list[str] | None = list(dict.fromkeys(names))

    def write(self, piece: str, clips: Iterable[pa.Table]) -> pa.Table | None:
        """Writes a folder. A clip without a video that plays is left out, with the reason."""
        target = self._folder.path("videos", piece)
        temporary = self._folder.path("videos", f".{piece}.tmp")
        os.makedirs(temporary)
        rows: list[dict[str, Any]] = []
        for table in clips:
            clips_of = table.to_pylist()
            videos = [(row["video"] or {}).get("bytes") for row in clips_of]
            if self._reencode:
                videos = plain_mp4s(videos)
            for row, video in zip(clips_of, videos, strict=True):
                rows.append(self._add(piece, temporary, row, video))
        os.sync()  # once, because waiting for the disk after every file takes longer than writing them
        self.remove(piece)
        os.rename(temporary, target)
        fields = [field for field in TABLE_SCHEMA if field.name != "clip_id"]
        return pa.Table.from_pylist(
            rows, schema=pa.schema([*fields, pa.field("problem", pa.string())])
        )

    def remove(self, piece: str) -> None:
        """Removes a folder."""
        shutil.rmtree(self._folder.path("videos", piece), ignore_errors=True)

    def _add(
        self, piece: str, folder: str, row: dict[str, Any], data: bytes | MediaError | None
    ) -> dict[str, Any]:
        if data is None:
            return {"problem": "no_video: the corpus holds frames only"}
        if isinstance(data, MediaError):
            return {"problem": str(data)}
        try:
            num_frames = _count_frames(data)
        except MediaError as error:
            return {"problem": str(error)}
        name = f"{sample_key(row['clip_id'])}.mp4"
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
        height, width = row["height"], row["width"]
        if self._reencode:  # yuv420p has even sides
            height, width = height // 2 * 2, width // 2 * 2
        return {
            "path": f"videos/{piece}/{name}",
            "text": row[self._caption],
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "aspect_ratio": height / width,
            "resolution": height * width,
            "fps": row["fps"],
            "aes": row["aesthetic_score"],
            "match": row["clip_score"],
            "motion": row["motion_score"],
            "duration": row["duration_ms"] / 1000,
            "language": row["language"],
            "video_id": row["video_id"],
        }


def write_tables(folder: Corpus) -> None:
    """Writes ``metadata.parquet`` and ``metadata.csv`` from the indexes of the pieces."""

    def write_parquet(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, TABLE_SCHEMA, compression="zstd") as writer:
            for rows in _table_rows(folder):
                writer.write_table(pa.Table.from_pylist(rows, schema=TABLE_SCHEMA))

    def write_csv(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(
            text, TABLE_SCHEMA.names, lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        for rows in _table_rows(folder):
            writer.writerows(rows)
        text.detach()

    folder.publish("metadata.parquet", write_parquet)
    folder.publish("metadata.csv", write_csv)


def _table_rows(folder: Corpus) -> Iterator[list[dict[str, Any]]]:
    for _, rows in index_rows(folder):
        yield [row for row in rows if row["problem"] is None]


def _count_frames(data: bytes) -> int:
    """Returns how many frames a clip shows, without decoding it."""
    try:
        from dataengine.cut import read_timeline
    except ImportError:
        raise DependencyError(
            "Counting frames takes PyAV", "pip install 'dataengine[ingest]'"
        ) from None
    return len(read_timeline(data).video_us)
