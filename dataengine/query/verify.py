# SPDX-License-Identifier: Apache-2.0
"""Checks that a corpus keeps its contract: every invariant of docs/architecture.md, in words.

What concerns the whole (unique ids, one shard per video, the ledger's counts, merged catalog files)
is asked in SQL. What concerns one shard (the catalog twin says the same, media is what it says) is
checked shard by shard in processes, of all shards or of a sample; columns are compared whole, and only
rows with something odd are looked at one by one.
"""

import itertools
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import MERGE_AGAIN, CatalogPart, Corpus
from dataengine.errors import CorpusError, EngineError, MediaError
from dataengine.query.literals import identifier, quoted
from dataengine.query.sql import catalog_select, connect, exact_url_of, schema_types

_MOST_PROBLEMS = 50
"""Problems reported of one kind; a broken corpus has millions."""

_TASK_SHARDS = 8
"""Shards that a process checks before it reports."""

_FEW_SHARDS = 64
"""As many are checked without processes."""

_FOOTER_THREADS = 16
"""Files whose footers are read at once: mostly waiting for a store."""

Progress = Callable[[int, int], None]
"""Told how many shards of how many are checked."""


@dataclass
class Verification:
    """What was looked at, and what is wrong with it.

    Attributes:
        num_shards: All shards.
        num_clips: Clips of all shards, as the catalog counts them.
        num_videos: All sources.
        problems: In words.
        checked_shards: Shards whose rows and media were looked at: all, or the sample.
        checked_clips: Clips in them.
    """

    num_shards: int
    num_clips: int
    num_videos: int
    problems: list[str]
    checked_shards: int
    checked_clips: int


def verify(
    corpus: Corpus,
    *,
    decode: bool = False,
    sample: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks a corpus.

    Args:
        corpus: What to check; it is only read.
        decode: Also decodes every clip and frame of the shards that are checked, which takes as long as
            playing them all at full speed.
        sample: Looks into so many shards, drawn with equal chances; what concerns the whole is checked
            whole. None looks into all.
        seed: Another seed draws other shards.
        jobs: Processes; None takes as many as there are cores, or none for a few shards.
        progress: Told after every few shards.

    Raises:
        CorpusError: If the processes run out of memory.
    """
    shards = corpus.names("catalog")
    chosen = shards
    if sample is not None and sample < len(shards):
        chosen = sorted(random.Random(seed).sample(shards, sample))
    problems = [*_files(corpus)]
    damaged = [*_damaged(corpus)]
    num_clips = num_videos = 0
    if damaged:  # no question can be asked of the whole
        problems += damaged
    else:
        try:
            num_clips, num_videos, found = _whole(corpus, chosen)
            problems += found
        except CorpusError as error:  # of a file the footer alone can be read
            damaged = [str(error), *_damaged(corpus, whole=True)]
            problems += damaged
    problems += _subsets(corpus, ask=not damaged)
    checked_clips = 0
    for done, (count, found) in enumerate(_each_shard(corpus, chosen, decode, jobs), 1):
        checked_clips += count
        problems += found
        if progress:
            progress(done, len(chosen))
    return Verification(
        num_shards=len(shards),
        num_clips=num_clips if not damaged else checked_clips,
        num_videos=num_videos,
        problems=problems,
        checked_shards=len(chosen),
        checked_clips=checked_clips,
    )


def _each_shard(
    corpus: Corpus, shards: Sequence[str], decode: bool, jobs: int | None
) -> Iterator[tuple[int, list[str]]]:
    """Yields each shard's number of clips and its problems, in order."""
    added = sorted(corpus.added_columns)
    tasks = [shards[at : at + _TASK_SHARDS] for at in range(0, len(shards), _TASK_SHARDS)]
    if jobs is None:  # a process takes seconds to start
        jobs = (os.cpu_count() or 1) if len(shards) > _FEW_SHARDS else 1
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        for task in tasks:
            yield from _check_shards(corpus, task, added, decode)
        return
    # Threads of libraries do not survive a fork.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        try:
            for found in pool.map(
                _check_shards,
                itertools.repeat(corpus),
                tasks,
                itertools.repeat(added),
                itertools.repeat(decode),
            ):
                yield from found
        except BrokenProcessPool:
            raise CorpusError(
                "A process that checked shards was killed, most likely for its memory",
                "fewer processes: --jobs 1",
            ) from None


def _check_shards(
    corpus: Corpus, shards: Sequence[str], added: Collection[str], decode: bool
) -> list[tuple[int, list[str]]]:
    """Returns, for each shard, the rows of its catalog twin and what is wrong."""
    results = []
    for shard in shards:
        num_clips = 0
        try:
            with corpus.open_shard(shard) as file:
                path = corpus.path("catalog", f"{shard}.parquet")
                with corpus.fs.open(path, "rb") as opened, pq.ParquetFile(opened) as twin:
                    catalog = twin.read()
                found = [
                    *_shard_format(file, added),
                    *_shard_rows(shard, file, catalog, corpus.shard_columns, decode),
                ]
                num_clips = catalog.num_rows
        except (CorpusError, OSError, pa.ArrowException) as error:
            found = [str(error)]
        results.append(
            (num_clips, [f"shard {shard}: {problem}" for problem in found[:_MOST_PROBLEMS]])
        )
    return results


def _files(corpus: Corpus) -> Iterator[str]:
    """Every catalog file has its shard; a shard without its twin is a writer's leftover."""
    shards = set(corpus.names("shards"))
    for name in corpus.names("catalog"):
        if name not in shards:
            yield f"shard {name} is in the catalog but its file is missing"


def _damaged(corpus: Corpus, whole: bool = False) -> Iterator[str]:
    """Every file of the catalog and of the ledger is Parquet; ``whole`` reads more than the footers."""
    twins = [corpus.path("catalog", f"{name}.parquet") for name in corpus.names("catalog")]
    merged: list[str] = []
    try:
        merged = [path for part in corpus.catalog_parts() for path in part.files]
        for snapshot in corpus.names("compacted", ".json"):
            corpus.segments(snapshot)
    except CorpusError as error:
        yield f"{error}; {error.hint}"

    def problem(path: str) -> str | None:
        try:
            with corpus.fs.open(path, "rb") as opened, pq.ParquetFile(opened) as file:
                for _ in file.iter_batches() if whole else ():
                    pass
        except (OSError, pa.ArrowException) as error:
            name = path.removeprefix(f"{corpus.root}/")
            mend = f"; {MERGE_AGAIN}" if name.startswith("compacted/") else ""
            return f"{name} cannot be read: {str(error).splitlines()[0]}{mend}"
        return None

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        paths = list(dict.fromkeys([*twins, *merged, *corpus.video_parts()]))
        yield from filter(None, pool.map(problem, paths))


def _subsets(corpus: Corpus, *, ask: bool) -> Iterator[str]:
    """Every subset is Parquet, and the catalog holds its clips; ``ask`` reads the catalog for each."""
    for name in corpus.names("subsets"):
        path = corpus.path("subsets", f"{name}.parquet")
        try:
            with corpus.fs.open(path, "rb") as file:
                columns = pq.read_schema(file).names
            if "clip_id" not in columns:
                yield f"subsets/{name}.parquet has no column clip_id"
                continue
            if not ask:
                continue
            keys = ["clip_id", *(key for key, _ in records.LOCATOR_FIELDS)]
            # A file that was made elsewhere may have no locators.
            using = ", ".join(keys if set(keys) <= set(columns) else keys[:1])
            with connect(corpus) as db:
                row = db.execute(
                    f"select count(*), min(clip_id) from read_parquet({quoted(exact_url_of(corpus, path))}) "
                    f"anti join clips using ({using})"
                ).fetchone()
        except (OSError, pa.ArrowException, EngineError) as error:
            yield f"subsets/{name}.parquet cannot be read: {str(error).splitlines()[0]}"
            continue
        if row and row[0]:
            yield (
                f"subset {name}: {row[0]} of its clips are not in their places in the catalog, such "
                f"as {row[1]}; draw it again"
            )


def _merged(db: duckdb.DuckDBPyConnection, corpus: Corpus, shards: Sequence[str]) -> Iterator[str]:
    """Merged catalog files say what the catalog files say that they stand for, in as many rows."""
    parts = corpus.catalog_parts()
    # What no merged file stands for is read from the catalog files themselves.
    own = {path for part in parts for path in part.files if path.startswith(corpus.path("catalog"))}
    merged = [part for part in parts if part.files and part.files[0] not in own]
    names = [name for name in shards if corpus.path("catalog", f"{name}.parquet") not in own]
    if not merged or not names:
        return
    twins = CatalogPart(tuple(corpus.path("catalog", f"{name}.parquet") for name in names))
    columns = ", ".join(map(identifier, corpus.catalog_schema.names))
    types = schema_types(db, corpus.catalog_schema)
    db.register("looked_at", pa.table({"shard": names}))
    for name, sources in (("merged", merged), ("twins", [twins])):
        db.execute(
            f"create temp table {name} as select shard, count(*) as n, "
            # One sum for all rows of a shard, whatever their order.
            f"sum(hash({columns})::hugeint) as total from ({catalog_select(corpus, sources, types)}) "
            "semi join looked_at using (shard) group by shard"
        )
    found = db.execute(
        "select shard, coalesce(merged.n, 0), coalesce(twins.n, 0) "
        "from merged full join twins using (shard) where merged.n is distinct from twins.n "
        f"or merged.total is distinct from twins.total order by shard limit {_MOST_PROBLEMS}"
    ).fetchall()
    for shard, num_merged, num_twin in found:
        counts = f": {num_merged} clips instead of {num_twin}" if num_merged != num_twin else ""
        yield f"shard {shard}: the merged catalog differs from its catalog file{counts}; {MERGE_AGAIN}"


def _whole(corpus: Corpus, shards: Sequence[str]) -> tuple[int, int, list[str]]:
    """Asks what concerns all shards at once; the catalog is read four times, the ledger once.

    Returns:
        Number of clips, number of sources, and what is wrong.
    """
    with connect(corpus) as db:
        db.execute(
            "create temp table per_video as select video_id, count(*) as n, "
            "sum(duration_ms)::bigint as ms, min(shard) as shard, max(shard) as last_shard "
            "from clips group by video_id"
        )
        db.execute(
            "create temp table ledger as select source, status, reason, video_id, num_clips, "
            "clips_ms, shard from videos"
        )
        counts = db.execute(
            "select (select coalesce(sum(n), 0)::bigint from per_video), count(*) from ledger"
        ).fetchone()
        assert counts is not None  # an aggregate always gives one row
        problems = [*_catalog(db), *_ledger(db), *_merged(db, corpus, shards)]
    return (*counts, problems)


def _catalog(db: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Ids are unique and made as documented; a video lies in one shard; spans are sane."""
    # Published spans may overlap; ours partition the video.
    given = (
        "list_contains([p.column || ' ' || p.model for p in provenance], "
        f"'start_ms {records.GIVEN}')"
    )
    checks = {
        "wrong_id": "clip_id is distinct from video_id || '_' || start_ms || '_' || end_ms",
        "wrong_span": "not coalesce(start_ms >= 0 and end_ms > start_ms "
        "and duration_ms = end_ms - start_ms, false)",
        "wrong_score": "coalesce(abs(clip_score) > 1.001, false)",
        "crosses": "coalesce(not given and next_ms < end_ms, false)",
    }
    db.execute(
        "create temp table odd as select * from (select clip_id, start_ms, end_ms, duration_ms, "
        f"clip_score, next_id, {', '.join(f'{sql} as {name}' for name, sql in checks.items())} from ("
        "select *, lead(clip_id) over spans as next_id, lead(start_ms) over spans as next_ms from ("
        f"select clip_id, video_id, start_ms, end_ms, duration_ms, clip_score, {given} as given "
        # What is given must not stand between two that are ours.
        "from clips) window spans as (partition by video_id, given order by start_ms))) "
        f"where {' or '.join(checks)}"
    )
    yield from _rows(
        db,
        {
            "clip_id {0} is there {1} times": (
                "select clip_id, count(*) from clips group by clip_id having count(*) > 1"
            ),
            "video {0} lies in {1} shards": (
                "select video_id, count(distinct shard) from clips semi join "
                "(select video_id from per_video where shard <> last_shard) using (video_id) "
                "group by video_id"
            ),
            "clip_id {0} does not match its video and span": (
                "select clip_id from odd where wrong_id"
            ),
            "clip {0}: span [{1}, {2}) with duration_ms {3}": (
                "select clip_id, start_ms, end_ms, duration_ms from odd where wrong_span"
            ),
            "clip {0} overlaps {1}": "select clip_id, next_id from odd where crosses",
            "clip {0}: {1} score {2} outside [-1, 1]": (
                "select clip_id, 'clip', clip_score from odd where wrong_score"
            ),
        },
    )


def _ledger(db: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Every source has one ending, and the ledger's counts are the catalog's."""
    checks = {
        "source {0} has the unknown status {1}": (
            "select source, status from ledger "
            "where status not in ('kept', 'dropped', 'failed', 'removed')"
        ),
        "source {0} is {1} without a reason": (
            "select source, status from ledger where status <> 'kept' and reason is null"
        ),
        "source {0}: the ledger has {1} clips, the catalog {2}": (
            "select source, num_clips, coalesce(n, 0) from ledger left join per_video "
            "using (video_id) where status = 'kept' and (num_clips <> coalesce(n, 0) "
            "or num_clips = 0)"
        ),
        "source {0}: the ledger has {1} ms of clips, the catalog {2}": (
            "select source, clips_ms, ms from ledger join per_video using (video_id) "
            "where status = 'kept' and clips_ms <> ms"
        ),
        "source {0}: the ledger says shard {1}, the catalog {2}": (
            "select source, ledger.shard, per_video.shard from ledger join per_video "
            "using (video_id) where status = 'kept' and ledger.shard <> per_video.shard"
        ),
        "video {0} is in the catalog but not kept in the ledger": (
            "select video_id from per_video "
            "anti join (select video_id from ledger where status = 'kept') using (video_id)"
        ),
        "video {0} is kept for {1} sources": (
            "select video_id, count(*) from ledger where status = 'kept' "
            "group by video_id having count(*) > 1"
        ),
    }
    yield from _rows(db, checks)


def _rows(db: duckdb.DuckDBPyConnection, checks: dict[str, str]) -> Iterator[str]:
    """Yields a problem for each row that a check finds."""
    for message, sql in checks.items():
        for row in db.execute(f"{sql} order by all limit {_MOST_PROBLEMS}").fetchall():
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
    # Twins of older versions hold added embeddings too.
    catalog = catalog.select([name for name in catalog.column_names if name not in shard_only])
    kept = [name for name in file.schema_arrow.names if name not in shard_only]
    expected_names = kept + [name for name, _ in records.LOCATOR_FIELDS]
    if sorted(catalog.schema.names) != sorted(expected_names):
        yield "the catalog twin has another schema; an annotation that was cut short is to be run again"
        return
    position = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.read_row_group(group)
        is_clip = rows["clip_id"].is_valid().to_numpy()
        for index in np.flatnonzero(~is_clip & _any_value(rows)):
            # What was removed leaves an empty row in its place.
            yield f"row group {group}, row {index}: no clip_id, but not empty"
        own = rows.select(kept).filter(pa.array(is_clip))
        count = own.num_rows
        locators = (
            pa.repeat(pa.scalar(shard), count),
            pa.repeat(pa.scalar(group, pa.int32()), count),
            pa.array(np.flatnonzero(is_clip), pa.int32()),
        )
        for (name, _), column in zip(records.LOCATOR_FIELDS, locators, strict=True):
            own = own.append_column(name, column)
        yield from _differing(own, catalog.slice(position, count))
        for index in np.flatnonzero(is_clip & (_is_odd(rows) | decode)):
            (row,) = rows.slice(index, 1).to_pylist()
            for problem in _media(row, decode):
                yield f"clip {row['clip_id']}: {problem}"
        position += count
        if position > catalog.num_rows:
            yield f"clip {own['clip_id'][catalog.num_rows - position].as_py()} is not in the catalog twin"
            return
    if position < catalog.num_rows:
        yield f"clip {catalog['clip_id'][position].as_py()} is in the catalog twin only"


def _differing(own: pa.Table, twin: pa.Table) -> Iterator[str]:
    """Yields the clips in which two tables differ, as far as the shorter one goes."""
    count = min(own.num_rows, twin.num_rows)
    own, twin = own.slice(0, count), twin.slice(0, count)
    names = [name for name in own.column_names if not own[name].equals(twin[name])]
    if not names:
        return
    ids = own["clip_id"].to_pylist()
    columns = [(own[name].to_pylist(), twin[name].to_pylist()) for name in names]
    for index, clip_id in enumerate(ids):
        differing = [
            name
            for name, (values, others) in zip(names, columns, strict=True)
            if values[index] != others[index]
        ]
        if differing:
            yield f"clip {clip_id}: the catalog differs in {', '.join(differing)}"


def _any_value(rows: pa.Table) -> np.ndarray:
    """Returns which rows hold anything, bool [N]."""
    held = np.zeros(rows.num_rows, bool)
    for column in rows.columns:
        held |= column.is_valid().to_numpy()
    return held


def _is_odd(rows: pa.Table) -> np.ndarray:
    """Returns which rows `_media` may have something to say about, bool [N]: all that it has, and more."""
    frames, times = rows["frames"].combine_chunks(), rows["frame_ms"].combine_chunks()
    num_frames, num_times = (_int(column.value_lengths()) for column in (frames, times))
    odd = (num_frames == 0) | (num_frames != num_times)

    start = pc.call_function("binary_slice", [frames.flatten()], pc.SliceOptions(0, 3))
    is_jpeg = pc.call_function("equal", [start, pa.scalar(b"\xff\xd8\xff")])
    odd[np.repeat(np.arange(len(odd)), num_frames)[~_true(is_jpeg)]] = True

    clip_of_time = np.repeat(np.arange(len(odd)), num_times)
    ms = times.flatten()
    odd[clip_of_time[ms.is_null().to_numpy(zero_copy_only=False)]] = True
    ms = _int(ms)
    starts, ends = _int(rows["start_ms"]), _int(rows["end_ms"])
    odd[clip_of_time[(ms < starts[clip_of_time]) | (ms >= ends[clip_of_time])]] = True
    not_later = (ms[1:] <= ms[:-1]) & (clip_of_time[1:] == clip_of_time[:-1])
    odd[clip_of_time[1:][not_later]] = True

    provenance = rows["provenance"].combine_chunks()
    num_entries = _int(provenance.value_lengths())
    has_hash = provenance.flatten().field("input_hash").is_valid()
    odd[np.repeat(np.arange(len(odd)), num_entries)[_true(has_hash)]] = True

    video = rows["video"].combine_chunks()
    box = pc.call_function("binary_slice", [video.field("bytes")], pc.SliceOptions(4, 8))
    is_mp4 = pc.call_function("equal", [box, pa.scalar(b"ftyp")])
    return odd | (_true(video.is_valid()) & ~_true(is_mp4))


def _int(column: Any) -> np.ndarray:
    """Returns integers, 0 for null."""
    return pc.fill_null(column, 0).to_numpy(zero_copy_only=False)


def _true(column: Any) -> np.ndarray:
    """Returns booleans, False for null."""
    return pc.fill_null(column, False).to_numpy(zero_copy_only=False)


def _media(row: dict[str, Any], decode: bool) -> Iterator[str]:
    """Frames lie inside the span, in order; the containers are MP4 and JPEG."""
    frames, times = row["frames"] or [], row["frame_ms"] or []
    if not frames or len(frames) != len(times):
        yield f"{len(frames)} frames with {len(times)} times"
    if None in times:
        yield "a frame has no time"
        return
    if any(a >= b for a, b in pairwise(times)):
        yield "frame times are not in order"
    if times and not (row["start_ms"] <= times[0] and times[-1] < row["end_ms"]):
        yield "frame times lie outside the span"
    if any((frame or b"")[:3] != b"\xff\xd8\xff" for frame in frames):
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
    from dataengine import cut, media

    try:
        with media.VideoReader(mp4) as reader:
            shown = [(media.floor_ms(f.time_us), f.picture.is_corrupt) for f in reader]
        times_ms = [time_ms for time_ms, _ in shown]
        num_shown = len(cut.read_timeline(mp4).video_us)
        with media.open_container(mp4) as container:
            packets = media.video_stream(container).index_entries
            num_cut_off = sum(packet.pos + packet.size > len(mp4) for packet in packets)
        if num_cut_off:
            yield f"{num_cut_off} of {len(packets)} packets of the video are cut off"
        if num_corrupt := sum(is_corrupt for _, is_corrupt in shown):
            # What the decoder has made up for lost macroblocks.
            yield f"{num_corrupt} of {len(shown)} frames decode with errors"
        if reader.num_errors or reader.truncated:
            broken = " and the file breaks off" if reader.truncated else ""
            yield f"{reader.num_errors} packets of the video do not decode{broken}"
        if len(times_ms) < num_shown:
            yield f"{len(times_ms)} of the video's {num_shown} frames decode"
        if not times_ms:
            yield "no frame of the video decodes"
        elif times_ms[0] < 0 or times_ms[-1] > duration_ms:
            yield f"frames from {times_ms[0]} to {times_ms[-1]} ms in {duration_ms} ms of video"
        for frame in frames:
            media.jpeg_decode(frame)
    except (MediaError, ValueError) as error:
        yield f"media does not decode: {error}"
