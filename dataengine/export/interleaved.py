# SPDX-License-Identifier: Apache-2.0
"""Interleaved documents of clips and text, in the three forms of InternVid-ICL.

Source: InternVid (arXiv 2307.06942), section 3.4 and appendix D:

- ``sequence`` (a): the clips of a video with their captions, in order of time.
- ``transcript`` (b): the same, each caption followed by what is said in the clip.
- ``pair`` (c): two documents of form (a), of two videos, one after the other.

"Videos are randomly dropped with a probability (0.3)": the clip's video is left out of the document and
its text stays, so that texts follow each other as they do in the paper's table 8. The paper says nothing
of documents that would lose all their videos; here the clip whose draw was nearest to staying stays.

What is drawn depends on the seed and the ids alone (BLAKE2b, MD5), so that (b) without its
transcripts is (a), and a video that leaves the corpus changes no document of forms (a) and (b) but its
own. Pairs are neighbours in the order of a hash: without one video, those behind it pair anew.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.export.pieces import Report, remove_file
from dataengine.export.selection import Choice
from dataengine.export.settings import ExportSettings
from dataengine.query.literals import identifier

PART_STRUCT = pa.struct(
    [
        ("type", pa.string()),  # clip or text
        ("clip_id", pa.string()),  # of a text: the clip it is about
        ("column", pa.string()),  # of a text: where it comes from
        ("text", pa.string()),
        ("start_ms", pa.int64()),
        ("end_ms", pa.int64()),
        *[pa.field(name, type_) for name, type_ in records.LOCATOR_FIELDS],  # of a clip
    ]
)
"""One part of a document."""

DOCUMENT_SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("form", pa.string()),
        ("video_ids", pa.list_(pa.string())),
        ("num_clips", pa.int32()),
        ("parts", pa.list_(PART_STRUCT)),
    ]
)
"""One row of ``interleaved.parquet``."""

_ROWS_PER_GROUP = 1_000
_BATCH_ROWS = 10_000

Row = dict[str, Any]


def write_documents(
    db: duckdb.DuckDBPyConnection,
    choice: Choice,
    settings: ExportSettings,
    folder: Corpus,
    report: Report,
) -> dict[str, int]:
    """Writes ``interleaved.parquet``, and ``interleaved.jsonl`` where that is asked for.

    Returns:
        Number of documents of each form, and of clips that take part.
    """
    counts: dict[str, int] = dict.fromkeys(("clips", *settings.forms), 0)

    def documents() -> Iterator[list[Row]]:
        waiting: list[Row] = []
        counts.update(dict.fromkeys(counts, 0))
        for document in _documents(db, choice, settings, counts, report):
            counts[document["form"]] += 1
            waiting.append(document)
            if len(waiting) == _ROWS_PER_GROUP:
                yield waiting
                waiting = []
        yield waiting

    def write_parquet(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, DOCUMENT_SCHEMA, compression="zstd") as writer:
            for rows in documents():
                writer.write_table(pa.Table.from_pylist(rows, schema=DOCUMENT_SCHEMA))

    folder.publish("interleaved.parquet", write_parquet)
    if not settings.jsonl:
        remove_file(folder, "interleaved.jsonl")
        return counts

    def write_jsonl(file: BinaryIO) -> None:
        with (
            folder.fs.open(folder.path("interleaved.parquet"), "rb") as opened,
            pq.ParquetFile(opened) as source,
        ):
            for batch in source.iter_batches(_ROWS_PER_GROUP):
                for row in batch.to_pylist():
                    for part in row["parts"]:
                        for name in [name for name, value in part.items() if value is None]:
                            del part[name]
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    folder.publish("interleaved.jsonl", write_jsonl)
    return counts


def _documents(
    db: duckdb.DuckDBPyConnection,
    choice: Choice,
    settings: ExportSettings,
    counts: dict[str, int],
    report: Report,
) -> Iterator[Row]:
    """Yields the documents, form by form: one pass over the catalog in order of videos, one in that of pairs."""
    if {"sequence", "transcript"} & set(settings.forms):
        for clips in _videos(db, choice, settings, "video_id"):
            counts["clips"] += len(clips)
            report(counts["clips"])
            if "sequence" in settings.forms:
                yield _document("sequence", [_parts(clips, settings)], [clips])
            if "transcript" in settings.forms and any(clip["speech"] for clip in clips):
                yield _document("transcript", [_parts(clips, settings, speech=True)], [clips])
    if "pair" in settings.forms:
        first: list[Row] | None = None
        num_clips = 0
        # MD5 rather than the database's own hash, which may change with its version.
        drawn = f"md5(video_id || ':{settings.seed}'), video_id"
        for clips in _videos(db, choice, settings, drawn):
            num_clips += len(clips)
            report(max(counts["clips"], num_clips))
            if first is None:
                first = clips
                continue
            parts = [_parts(first, settings), _parts(clips, settings)]
            yield _document("pair", parts, [first, clips])
            first = None
        counts["clips"] = max(counts["clips"], num_clips)


def _videos(
    db: duckdb.DuckDBPyConnection, choice: Choice, settings: ExportSettings, order: str
) -> Iterator[list[Row]]:
    """Yields the captioned clips of each video that has enough of them, in order of time."""
    columns = "video_id, clip_id, start_ms, end_ms, shard, row_group, row"
    condition = f"trim({identifier(settings.caption)}) <> ''"
    if choice.condition:
        condition += f" and ({choice.condition}\n)"
    reader = db.cursor().sql(
        f"select {columns}, {identifier(settings.caption)} as caption, "
        f"nullif(trim({identifier(settings.transcript)}), '') as speech "
        f"from clips where {condition} order by {order}, start_ms, end_ms"
    )
    rows: Iterable[Row] = (
        row for batch in reader.to_arrow_reader(_BATCH_ROWS) for row in batch.to_pylist()
    )
    for _, clips in groupby(rows, key=lambda row: row["video_id"]):
        found = list(clips)
        if len(found) >= settings.min_clips:
            yield found


def _parts(clips: list[Row], settings: ExportSettings, *, speech: bool = False) -> list[Row]:
    """Returns the parts of one video's document."""
    draws = [_draw(settings.seed, clip["clip_id"]) for clip in clips]
    best = max(draws)
    parts: list[Row] = []
    for clip, draw in zip(clips, draws, strict=True):
        span = {name: clip[name] for name in ("clip_id", "start_ms", "end_ms")}
        if draw >= settings.drop_video or draw == best:
            place = {name: clip[name] for name, _ in records.LOCATOR_FIELDS}
            parts.append({"type": "clip", **span, **place})
        text = {"type": "text", **span}
        parts.append({**text, "column": settings.caption, "text": clip["caption"]})
        if speech and clip["speech"]:
            parts.append({**text, "column": settings.transcript, "text": clip["speech"]})
    return parts


def _document(form: str, parts: list[list[Row]], videos: list[list[Row]]) -> Row:
    video_ids = [clips[0]["video_id"] for clips in videos]
    joined = [part for some in parts for part in some]
    return {
        "document_id": records.digest(form, *video_ids),
        "form": form,
        "video_ids": video_ids,
        "num_clips": sum(part["type"] == "clip" for part in joined),
        "parts": joined,
    }


def _draw(seed: int, clip_id: str) -> float:
    """Returns a number in [0, 1) that depends on the clip and the seed alone."""
    return int(records.digest(str(seed), clip_id), 16) / 2**64
