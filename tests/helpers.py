# SPDX-License-Identifier: Apache-2.0
"""Small corpora and ledger rows made by hand."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from dataengine import records
from dataengine.corpus import Corpus

JPEG = b"\xff\xd8\xff" + b"j" * 100
MP4 = b"\x00\x00\x00\x18ftyp" + b"m" * 1000


def clip_row(video_id: str, start_ms: int, end_ms: int, **columns: Any) -> dict[str, Any]:
    return {
        "clip_id": records.clip_id(video_id, start_ms, end_ms),
        "video_id": video_id,
        "source_url": f"file:///{video_id}.mp4",
        "start_ms": start_ms,
        "end_ms": end_ms,
        "duration_ms": end_ms - start_ms,
        "fps": 25.0,
        "width": 320,
        "height": 240,
        "has_audio": True,
        "video": {"bytes": MP4, "path": None},
        "frames": [JPEG, JPEG],
        "frame_ms": [start_ms, (start_ms + end_ms) // 2],
        "caption": f"clip of {video_id}",
        "tags": ["a", "b"],
        "provenance": [{"column": "caption", "model": "m", "revision": "1", "prompt_hash": None}],
    } | columns


def clips_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=records.CLIP_SCHEMA)


def ledger_row(video_id: str, clips: list[dict[str, Any]], **columns: Any) -> dict[str, Any]:
    return {
        "source": f"/{video_id}.mp4",
        "source_version": "1-1",
        "video_id": video_id,
        "status": "kept" if clips else "dropped",
        "stage": None if clips else "segment",
        "reason": None if clips else "too_short",
        "attempts": 1,
        "finished_ms": 1000,
        "num_clips": len(clips),
        "clips_ms": sum(clip["duration_ms"] for clip in clips),
        "dropped_clips": [],
        "duration_ms": 10_000,
    } | columns


def small_corpus(
    path: Path, num_videos: int = 3, num_clips: int = 2, run_id: str = "r-1"
) -> Corpus:
    """A corpus of one shard per video, every clip one second long."""
    corpus = Corpus.create(str(path))
    corpus.take_over(run_id)
    for index in range(num_videos):
        video_id = f"video{index}"
        rows = [clip_row(video_id, 1000 * i, 1000 * i + 1000) for i in range(num_clips)]
        corpus.commit(
            clips_table(rows), [ledger_row(video_id, rows)], run_id=run_id, fingerprint="f"
        )
    return corpus
