# SPDX-License-Identifier: Apache-2.0
"""Query and subset at the size of InternVid: filter, percentile and DIV over 234 million clips.

    python benchmarks/query.py --rows 234000000 --num-clips 10000000 --json

Makes a synthetic merged catalog (scalar columns as ours, lengths of videos distributed lognormally with
33 clips a video on average, 100,000 shards; about 27 bytes a row on disk), then, each in a process of its
own, in turns:

- ``dataengine subset --preset flt``: 1-120 s, top 30 % by score, DIV to ``--num-clips``;
- the same SQL written by hand in DuckDB over a bare table of the columns it needs;
- opening the corpus, and the clips of one video (`--repeat` times, other videos each time);
- the way of InternVid's released script: a JSON list in memory and one ``numpy.random.choice`` with
  weights, on as many rows as it survives.

The last line with ``--json``: ``seconds``, ``peak_gib``, ``ratio_to_bare_duckdb`` and the rest.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

FILTER = "duration_ms between 1000 and 120000"
NUM_SHARDS = 100_000
CHUNK = 100_000
"""Videos a file of the synthetic catalog holds."""


def make_catalog(folder: Path, num_rows: int) -> None:
    """Writes the synthetic corpus: merged catalog, and empty files that stand for the shards' own."""
    import duckdb
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dataengine.corpus import Corpus

    corpus = Corpus.create(str(folder))
    rng = np.random.default_rng(0)
    letters = np.frombuffer(
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", dtype="S1"
    )
    num_videos = int(num_rows / 33 * 1.1) + 10
    ids = np.unique(letters[rng.integers(0, 64, (num_videos, 11))].view("S11").ravel())
    sizes = np.maximum(1, np.round(rng.lognormal(np.log(33) - 0.5, 1.0, len(ids)))).astype(np.int64)
    stop = int(np.searchsorted(np.cumsum(sizes), num_rows)) + 1
    ids, sizes = ids[:stop], sizes[:stop].copy()
    sizes[-1] -= sizes.sum() - num_rows
    num_shards = max(1, min(NUM_SHARDS, len(ids) // 10))
    shard_of = rng.integers(0, num_shards, len(ids))
    names = [f"{number:016x}" for number in range(num_shards)]
    segment = folder / "compacted" / f"{int(time.time() * 1000):013d}-00000000"
    segment.mkdir(parents=True)
    files = []
    with duckdb.connect() as db:
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            db.register(
                "videos",
                pa.table({
                    "video_id": ids[part].astype("U11"), "n": sizes[part], "s": shard_of[part]
                }),
            )  # fmt: skip
            files.append(f"part-{start // CHUNK:05d}.parquet")
            db.execute(
                f"copy ({_ROWS}) to '{segment / files[-1]}' "
                "(format parquet, compression zstd, row_group_size 122880)"
            )
            print(
                f"\r{min(start + CHUNK, len(ids)):,} of {len(ids):,} videos",
                end="",
                file=sys.stderr,
            )
    print(file=sys.stderr)
    for name in names:
        (folder / "catalog" / f"{name}.parquet").touch()
    stamps = corpus.catalog_stamps()
    covered = pa.table({"shard": names, "stamp": [stamps[name] for name in names]})
    pq.write_table(covered, segment / "shards.parquet")
    entry = {"name": segment.name, "files": files, "num_clips": num_rows, "without": []}
    (folder / "compacted" / "20260101T000000-000.json").write_text(
        json.dumps({"segments": [{**entry, "num_shards": num_shards}]})
    )


_ROWS = """
select video_id || '_' || start_ms || '_' || (start_ms + duration_ms) as clip_id, video_id,
  'https://www.youtube.com/watch?v=' || video_id as source_url,
  start_ms, start_ms + duration_ms as end_ms, duration_ms,
  29.97::float as fps, 1280::int as width, 720::int as height, h % 10 > 0 as has_audio,
  ['en', 'en', 'en', 'zh', 'es', 'ko', 'hi', 'ja'][(1 + hv % 8)::bigint] as language,
  ((h >> 8) % 1000 / 1000)::float as language_score,
  (0.1 + 0.3 * ((h >> 16) % 65536) / 65536)::float as clip_score,
  (0.1 + 0.3 * ((h >> 24) % 65536) / 65536)::float as clip_score_frame,
  (2 + 5 * ((h >> 32) % 65536) / 65536)::float as aesthetic_score,
  (0.1 + 0.3 * ((h >> 40) % 65536) / 65536)::float as video_text_score,
  (((h >> 12) % 65536) / 65536)::float as motion_score,
  printf('%016x', s) as shard, (k // 48)::int as row_group, (k % 48)::int as row
from (
  select *, k * 140000 as start_ms, 500 + (h % 1000) * (case when h % 20 = 0 then 130 else 20 end) as duration_ms
  from (
    select *, hash(video_id, k) as h, hash(video_id) as hv
    from (select video_id, n, s, unnest(range(n)) as k from videos)
  )
)
"""


def ours(folder: Path, num_clips: int, memory: str) -> dict[str, float]:
    """The product: open, draw, write the subset."""
    from dataclasses import replace

    from dataengine.corpus import Corpus
    from dataengine.query.subsets import make_subset, preset

    begun = time.perf_counter()
    corpus = Corpus.open(str(folder))
    wanted = replace(preset("flt"), num_clips=num_clips)
    made = make_subset(corpus, "flt", wanted, replace_existing=True, memory=memory)
    return {"seconds": time.perf_counter() - begun, "clips": made.num_clips}


def bare(folder: Path, num_clips: int, memory: str) -> dict[str, float]:
    """The same in SQL as one writes it by hand, over a table of the columns that it needs."""
    import duckdb

    out = folder.parent / "bare.parquet"
    with duckdb.connect() as db:
        db.execute(f"set memory_limit = '{memory}'; set temp_directory = '{folder.parent}/spill'")
        begun = time.perf_counter()
        db.execute(f"""
            copy (
              with passing as (
                select * from '{folder.parent}/bare/*.parquet' where {FILTER} and clip_score > (
                  select quantile_disc(clip_score, 0.7) from '{folder.parent}/bare/*.parquet' where {FILTER})
              ), sizes as (select video_id, count(*) as n from passing group by video_id)
              select clip_id, passing.video_id, shard, row_group, row from passing join sizes using (video_id)
              order by -ln((hash(clip_id, 0) + 1.0) / 18446744073709551617.0) * n limit {num_clips}
            ) to '{out}' (format parquet, compression zstd)""")
        seconds = time.perf_counter() - begun
        counted = db.execute(f"select count(*) from '{out}'").fetchone()
    return {"seconds": seconds, "clips": counted[0] if counted else 0}


def opening(folder: Path, repeat: int) -> dict[str, float]:
    """Opening a corpus, and asking for the clips of one video."""
    import duckdb

    from dataengine.corpus import Corpus
    from dataengine.query.sql import connect

    with duckdb.connect() as db:
        files = sorted(str(path) for path in folder.glob("compacted/*/part-*.parquet"))
        ids = [
            row[0]
            for path in files[:: max(1, len(files) // repeat)]
            for row in db.execute(f"select video_id from '{path}' limit 1 offset 60000").fetchall()
        ]
    opens, points = [], []
    for video_id in ids:
        begun = time.perf_counter()
        with connect(Corpus.open(str(folder))) as db:
            opens.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            rows = db.execute(
                "select * from clips where video_id = ? order by start_ms", [video_id]
            )
            assert rows.fetchall()
            points.append(time.perf_counter() - begun)
    return {"open_seconds": statistics.median(opens), "point_seconds": statistics.median(points)}


def paper(folder: Path, num_rows: int, share: float) -> dict[str, float]:
    """A JSON list in memory, weights by video, one choice without replacement."""
    import duckdb
    import numpy as np

    path = folder.parent / "paper.jsonl"
    with duckdb.connect() as db:
        db.execute(
            f"copy (select clip_id, video_id, duration_ms, clip_score, shard, row_group, row "
            f"from '{folder}/compacted/*/part-*.parquet' limit {num_rows}) to '{path}' (format json)"
        )
    limit = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    begun = time.perf_counter()
    with open(path) as file:
        clips = [json.loads(line) for line in file]
    clips = [clip for clip in clips if 1000 <= clip["duration_ms"] <= 120_000]
    bound = np.quantile([clip["clip_score"] for clip in clips], 0.7)
    clips = [clip for clip in clips if clip["clip_score"] > bound]
    sizes: dict[str, int] = {}
    for clip in clips:
        sizes[clip["video_id"]] = sizes.get(clip["video_id"], 0) + 1
    weights = np.array([1 / sizes[clip["video_id"]] for clip in clips])
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(clips), int(share * num_rows), replace=False, p=weights / weights.sum())
    drawn = [clips[index] for index in chosen]
    return {"seconds": time.perf_counter() - begun, "clips": len(drawn)}


def apart(*arguments: str) -> dict[str, float] | None:
    """Runs one part in a process of its own; adds its peak memory. None if it did not survive."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", *arguments], stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    """Runs the parts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--num-clips", type=int)
    parser.add_argument("--folder", type=Path, default=Path("out/benchmark-query"))
    parser.add_argument("--memory", default="4GB", help="of DuckDB, for ours")
    parser.add_argument("--bare-memory", default="4GB", help="of DuckDB, for the bare SQL")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--paper-rows", type=int, default=4_000_000, help="first try; 0 leaves it out"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _run_part(*options.part)
        return
    num_clips = options.num_clips or round(options.rows / 23.4)
    folder = (options.folder / str(options.rows) / "corpus").absolute()
    if not (folder / "compacted").exists() or not list(folder.glob("compacted/*.json")):
        shutil.rmtree(folder.parent, ignore_errors=True)
        make_catalog(folder, options.rows)
    bare_table = folder.parent / "bare"
    if not bare_table.exists():
        _copy_columns(folder, bare_table)
    disk = sum(path.stat().st_size for path in folder.glob("compacted/*/*.parquet"))
    print(f"{options.rows:,} rows, {disk / 2**30:.2f} GiB; subset of {num_clips:,}")
    results: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    for turn in range(options.rounds):
        parts = [("ours", options.memory), ("bare", options.bare_memory)]
        for name, memory in parts if turn % 2 == 0 else parts[::-1]:
            found = apart(name, str(folder), str(num_clips), memory)
            print(f"{name}: {found}", flush=True)
            if found:
                results[name].append(found)
    opened = apart("opening", str(folder), str(options.repeat))
    print(f"opening {folder.parent.name}: {opened}", flush=True)
    papers: dict[str, float] = {}
    rows = min(options.paper_rows, options.rows)
    while rows:
        found = apart("paper", str(folder), str(rows), str(num_clips / options.rows))
        print(f"JSON list and choice, {rows:,} rows: {found}", flush=True)
        if not found:
            break
        papers = {"rows": rows, **found}
        if rows == options.rows or found["seconds"] > 300:
            break
        rows = min(2 * rows, options.rows)
    ours_s, bare_s = (statistics.median(r["seconds"] for r in results[n]) for n in ("ours", "bare"))
    summary = {
        "rows": options.rows, "num_clips": num_clips, "disk_gib": round(disk / 2**30, 2),
        "seconds": round(ours_s, 2), "peak_gib": max(r["peak_gib"] for r in results["ours"]),
        "bare_seconds": round(bare_s, 2), "bare_peak_gib": max(r["peak_gib"] for r in results["bare"]),
        "ratio_to_bare_duckdb": round(ours_s / bare_s, 3), "opening": opened, "json_list": papers,
    }  # fmt: skip
    print(json.dumps(summary) if options.json else summary)


def _run_part(name: str, folder: str, *rest: str) -> None:
    match name:
        case "ours":
            found = ours(Path(folder), int(rest[0]), rest[1])
        case "bare":
            found = bare(Path(folder), int(rest[0]), rest[1])
        case "opening":
            found = opening(Path(folder), int(rest[0]))
        case _:
            found = paper(Path(folder), int(rest[0]), float(rest[1]))
    found = {key: round(value, 3) for key, value in found.items()}
    print(json.dumps({**found, "peak_gib": round(_peak_kib() / 2**20, 2)}))


def _peak_kib() -> int:
    """Returns this process' peak memory; what getrusage says includes the parent's before exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    lines = status.read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _copy_columns(folder: Path, target: Path) -> None:
    """Writes the bare table: the columns that the hand-written SQL needs, and no others."""
    import duckdb

    target.mkdir(parents=True)
    with duckdb.connect() as db:
        for path in sorted(folder.glob("compacted/*/part-*.parquet")):
            db.execute(
                "copy (select clip_id, video_id, duration_ms, clip_score, shard, row_group, row "
                f"from '{path}') to '{target / path.name}' (format parquet, compression zstd)"
            )


if __name__ == "__main__":
    main()
