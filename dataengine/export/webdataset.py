# SPDX-License-Identifier: Apache-2.0
"""Tars in the WebDataset convention: the files of a sample share their name up to the first dot.

A sample is ``<key>.mp4`` (unless the corpus holds frames only), ``<key>.json`` (all columns but media
and embeddings), ``<key>.txt`` (the caption), ``<key>.000.jpg`` and on (the frames), and one
``<key>.<column>.npy`` per embedding, float16. The key is the clip's id.
Headers say nothing of the machine or the time: the same clips give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from dataengine.corpus import Corpus
from dataengine.errors import MediaError
from dataengine.export.pieces import remove_file
from dataengine.export.plain import PLAIN_PROVENANCE, plain_mp4s
from dataengine.export.selection import PLACE_SCHEMA
from dataengine.export.settings import ExportSettings

_ESCAPED = {"%": "%25", ".": "%2E", "/": "%2F"}


class WebDatasetWriter:
    """Writes pieces as ``000000.tar``; see `dataengine.export.pieces.Writer`."""

    columns = None
    max_clips = None
    folders = ("",)

    def __init__(self, folder: Corpus, settings: ExportSettings) -> None:
        self.max_bytes: int | None = settings.max_bytes
        self._folder = folder
        self._caption = settings.caption
        self._reencode = settings.reencode

    def write(self, piece: str, clips: Iterable[pa.Table]) -> pa.Table | None:
        """Writes a tar. A clip that cannot be encoded again is left out, with the reason."""
        problems: list[str | None] = []

        def write(file: BinaryIO) -> None:
            for table in clips:
                rows = list(_rows(table))
                videos = [(row["video"] or {}).get("bytes") for row in rows]
                if self._reencode:
                    videos = plain_mp4s(videos)
                for row, video in zip(rows, videos, strict=True):
                    problems.append(self._add(file, row, video))
            file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar

        self._folder.publish(f"{piece}.tar", write)
        return pa.table({"problem": pa.array(problems, pa.string())})

    def remove(self, piece: str) -> None:
        """Removes a tar."""
        remove_file(self._folder, f"{piece}.tar")

    def _add(
        self, file: BinaryIO, row: dict[str, Any], video: bytes | MediaError | None
    ) -> str | None:
        if isinstance(video, MediaError):
            return str(video)
        row["video_path"] = (row.pop("video") or {}).get("path")
        frames = row.pop("frames") or []
        arrays = {name: row.pop(name) for name in list(row) if isinstance(row[name], np.ndarray)}
        if video is not None and self._reencode:
            others = [entry for entry in row["provenance"] or () if entry["column"] != "video"]
            row["provenance"] = [*others, PLAIN_PROVENANCE]
            row["width"], row["height"] = (side // 2 * 2 for side in (row["width"], row["height"]))
        key = sample_key(row["clip_id"])
        if video is not None:
            _add_file(file, f"{key}.mp4", video)
        _add_file(file, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())
        _add_file(file, f"{key}.txt", (row[self._caption] or "").encode())
        for number, frame in enumerate(frames):
            _add_file(file, f"{key}.{number:03d}.jpg", frame)
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            _add_file(file, f"{key}.{name}.npy", buffer.getvalue())
        return None


def sample_key(clip_id: str) -> str:
    """Returns a clip's key: its id, in which a dot would end the key and a slash make a folder."""
    return "".join(_ESCAPED.get(letter, letter) for letter in clip_id)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yields clips as plain values; lists of float16 as arrays."""
    own = [name for name in table.column_names if name not in PLACE_SCHEMA.names[1:]]
    vectors = [name for name in own if table.schema.field(name).type == pa.list_(pa.float16())]
    plain = table.select([name for name in own if name not in vectors])
    columns = {name: table[name] for name in vectors}
    for index, row in enumerate(plain.to_pylist()):
        for name, column in columns.items():
            value = column[index]
            if value.is_valid:
                row[name] = value.values.to_numpy(zero_copy_only=False).astype(np.float16)
        yield row


def _add_file(file: BinaryIO, name: str, data: bytes) -> None:
    # `tarfile.addfile` copies each header and each content once more: a third of the work.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    file.write(info.tobuf(tarfile.GNU_FORMAT))
    file.write(data)
    file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
