# SPDX-License-Identifier: Apache-2.0
"""Checks that a corpus keeps its contract: every invariant of docs/architecture.md, in words."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import CorpusError, MediaError
from dataengine.query.sql import connect

_MOST_PROBLEMS = 50
"""Problems reported of one kind; a broken corpus has millions."""


@dataclass
class Verification:
    """What was looked at, and what is wrong with it."""

    num_shards: int
    num_clips: int
    num_videos: int
    problems: list[str]


def verify(corpus: Corpus, *, decode: bool = False) -> Verification:
    """Checks a corpus whole.

    Args:
        corpus: What to check; it is only read.
        decode: Also decodes every clip and frame, which takes as long as playing them all at full
            speed.
    """
    problems = [*_files(corpus)]
    damaged = [*_damaged(corpus)]
    if damaged:  # no question can be asked of the whole
        problems += damaged
    else:
        problems += [*_catalog(corpus), *_ledger(corpus)]
    shards = corpus.names("catalog")
    added = corpus.added_columns
    num_clips = 0
    for shard in shards:
        try:
            with corpus.open_shard(shard) as file:
                catalog = pq.read_table(
                    corpus.path("catalog", f"{shard}.parquet"), filesystem=corpus.fs
                )
                found = [
                    *_shard_format(file, added),
                    *_shard_rows(shard, file, catalog, corpus.shard_columns, decode),
                ]
            num_clips += catalog.num_rows
        except (CorpusError, OSError, pa.ArrowException) as error:
            found = [str(error)]
        problems += [f"shard {shard}: {problem}" for problem in found[:_MOST_PROBLEMS]]
    num_videos = 0 if damaged else corpus.videos(["source"]).num_rows
    return Verification(len(shards), num_clips, num_videos, problems)


def _files(corpus: Corpus) -> Iterator[str]:
    """Every catalog file has its shard; a shard without its twin is a writer's leftover."""
    shards = set(corpus.names("shards"))
    for name in corpus.names("catalog"):
        if name not in shards:
            yield f"shard {name} is in the catalog but its file is missing"


def _damaged(corpus: Corpus) -> Iterator[str]:
    """Every file of the catalog and of the ledger is Parquet."""
    twins = [corpus.path("catalog", f"{name}.parquet") for name in corpus.names("catalog")]
    merged = [path for part in corpus.catalog_parts() for path in part.files]
    for path in dict.fromkeys([*twins, *merged, *corpus.video_parts()]):
        try:
            pq.read_metadata(path, filesystem=corpus.fs)
        except (OSError, pa.ArrowException) as error:
            name = "/".join(path.split("/")[-2:])
            yield f"{name} cannot be read: {str(error).splitlines()[0]}"


def _catalog(corpus: Corpus) -> Iterator[str]:
    """Ids are unique and made as documented; a video lies in one shard; spans are sane."""
    checks = {
        "clip_id {0} is there {1} times": (
            "select clip_id, count(*) from clips group by clip_id having count(*) > 1"
        ),
        "video {0} lies in {1} shards": (
            "select video_id, count(distinct shard) from clips "
            "group by video_id having count(distinct shard) > 1"
        ),
        "clip_id {0} does not match its video and span": (
            "select clip_id from clips "
            "where clip_id is distinct from video_id || '_' || start_ms || '_' || end_ms"
        ),
        "clip {0}: span [{1}, {2}) with duration_ms {3}": (
            "select clip_id, start_ms, end_ms, duration_ms from clips "
            "where not coalesce(start_ms >= 0 and end_ms > start_ms "
            "and duration_ms = end_ms - start_ms, false)"
        ),
        "clip {0} overlaps {1}": (
            "select clip_id, next_id from (select clip_id, end_ms, "
            "lead(clip_id) over spans as next_id, lead(start_ms) over spans as next_ms from clips "
            # Published spans may overlap; ours partition the video.
            "where not list_contains([p.column || ' ' || p.model for p in provenance], "
            f"'start_ms {records.GIVEN}') "
            "window spans as (partition by video_id order by start_ms)) where next_ms < end_ms"
        ),
        "clip {0}: {1} score {2} outside [-1, 1]": (
            "select clip_id, 'clip', clip_score from clips where abs(clip_score) > 1.001"
        ),
    }
    yield from _rows(corpus, checks)


def _ledger(corpus: Corpus) -> Iterator[str]:
    """Every source has one ending, and the ledger's counts are the catalog's."""
    counts = "select video_id, count(*) as n, sum(duration_ms) as ms, any_value(shard) as shard from clips group by video_id"
    checks = {
        "source {0} has the unknown status {1}": (
            "select source, status from videos where status not in ('kept', 'dropped', 'failed', 'removed')"
        ),
        "source {0} is {1} without a reason": (
            "select source, status from videos where status <> 'kept' and reason is null"
        ),
        "source {0}: the ledger has {1} clips, the catalog {2}": (
            f"select source, num_clips, coalesce(n, 0) from videos left join ({counts}) "
            "using (video_id) where status = 'kept' and (num_clips <> coalesce(n, 0) "
            "or num_clips = 0)"
        ),
        "source {0}: the ledger has {1} ms of clips, the catalog {2}": (
            f"select source, clips_ms, ms from videos join ({counts}) using (video_id) "
            "where status = 'kept' and clips_ms <> ms"
        ),
        "source {0}: the ledger says shard {1}, the catalog {2}": (
            f"select source, videos.shard, counts.shard from videos join ({counts}) as counts "
            "using (video_id) where status = 'kept' and videos.shard <> counts.shard"
        ),
        "video {0} is in the catalog but not kept in the ledger": (
            "select distinct video_id from clips "
            "where video_id not in (select video_id from videos where status = 'kept')"
        ),
        "video {0} is kept for {1} sources": (
            "select video_id, count(*) from videos where status = 'kept' "
            "group by video_id having count(*) > 1"
        ),
    }
    yield from _rows(corpus, checks)


def _rows(corpus: Corpus, checks: dict[str, str]) -> Iterator[str]:
    """Yields a problem for each row that a check finds."""
    with connect(corpus) as db:
        for message, sql in checks.items():
            for row in db.execute(f"{sql} limit {_MOST_PROBLEMS}").fetchall():
                yield message.format(*row)


def _shard_format(file: pq.ParquetFile, added: Collection[str]) -> Iterator[str]:
    """The schema is ours, the Hugging Face metadata is there, media is stored plain."""
    schema = file.schema_arrow
    # A shard that annotation has not come to yet lacks the added columns.
    own = pa.schema([field for field in schema if field.name not in added])
    if not own.equals(records.CLIP_SCHEMA):
        differing = sorted(
            {f"{f.name}: {f.type}" for f in own}
            ^ {f"{f.name}: {f.type}" for f in records.CLIP_SCHEMA}
        )
        yield f"schema differs: {', '.join(differing) or 'order of columns'}"
    if b"huggingface" not in (schema.metadata or {}):
        yield "Hugging Face feature metadata is missing"
    for group in range(file.metadata.num_row_groups):
        meta = file.metadata.row_group(group)
        for index in range(meta.num_columns):
            column = meta.column(index)
            if column.path_in_schema not in ("video.bytes", "frames.list.element"):
                continue
            if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
                yield f"row group {group}: {column.path_in_schema} is compressed or a dictionary"


def _shard_rows(
    shard: str,
    file: pq.ParquetFile,
    catalog: pa.Table,
    shard_only: Collection[str],
    decode: bool,
) -> Iterator[str]:
    """The catalog twin says the same as the shard, row by row, and media is what it says."""
    # Twins written before annotation knew embeddings of its own hold them too, as nulls or not.
    catalog = catalog.select([n for n in catalog.column_names if n not in shard_only])
    expected_names = [n for n in file.schema_arrow.names if n not in shard_only]
    expected_names += [name for name, _ in records.LOCATOR_FIELDS]
    if sorted(catalog.schema.names) != sorted(expected_names):
        yield "the catalog twin has another schema; an annotation that was cut short is to be run again"
        return
    twin = catalog.to_pylist()
    position = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.read_row_group(group).to_pylist()
        for index, row in enumerate(rows):
            if row["clip_id"] is None:  # what was removed leaves an empty row in its place
                if any(value is not None for value in row.values()):
                    yield f"row group {group}, row {index}: no clip_id, but not empty"
                continue
            if position == len(twin):
                yield f"clip {row['clip_id']} is not in the catalog twin"
                return
            expected = {
                **{name: row[name] for name in row if name not in shard_only},
                "shard": shard,
                "row_group": group,
                "row": index,
            }
            if twin[position] != expected:
                differing = [name for name in expected if twin[position][name] != expected[name]]
                yield f"clip {row['clip_id']}: the catalog differs in {', '.join(differing)}"
            for problem in _media(row, decode):
                yield f"clip {row['clip_id']}: {problem}"
            position += 1
    if position < len(twin):
        yield f"clip {twin[position]['clip_id']} is in the catalog twin only"


def _media(row: dict[str, Any], decode: bool) -> Iterator[str]:
    """Frames lie inside the span, in order; the containers are MP4 and JPEG."""
    frames, times = row["frames"] or [], row["frame_ms"] or []
    if not frames or len(frames) != len(times):
        yield f"{len(frames)} frames with {len(times)} times"
    if any(a >= b for a, b in pairwise(times)):
        yield "frame times are not in order"
    if times and not (row["start_ms"] <= times[0] and times[-1] < row["end_ms"]):
        yield "frame times lie outside the span"
    if any(frame[:3] != b"\xff\xd8\xff" for frame in frames):
        yield "a frame is not a JPEG"
    shown = {entry["input_hash"]: entry["column"] for entry in row["provenance"] or ()}
    for input_hash in shown.keys() - {None, records.digest(*frames)}:
        yield f"{shown[input_hash]} was written about other frames"
    if row["video"] is None:
        return  # a pipeline may store frames only
    mp4 = row["video"]["bytes"] or b""
    if mp4[4:8] != b"ftyp":
        yield "video is not an MP4"
    elif decode:
        yield from _decoded(mp4, frames, row["duration_ms"])


def _decoded(mp4: bytes, frames: list[bytes], duration_ms: int) -> Iterator[str]:
    """Every frame of the clip decodes and lies inside it, and every JPEG decodes."""
    from dataengine import media

    try:
        with media.VideoReader(mp4) as reader:
            times_ms = [media.floor_ms(frame.time_us) for frame in reader]
        if not times_ms:
            yield "no frame of the video decodes"
        elif times_ms[0] < 0 or times_ms[-1] > duration_ms:
            yield f"frames from {times_ms[0]} to {times_ms[-1]} ms in {duration_ms} ms of video"
        for frame in frames:
            media.jpeg_decode(frame)
    except (MediaError, ValueError) as error:
        yield f"media does not decode: {error}"
