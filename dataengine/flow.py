# SPDX-License-Identifier: Apache-2.0
"""What happens to rows between stages: applying a stage to a table, settling videos at the end.

A table that flows holds one row per video until a stage gives ``clip_id``, then one per clip. The
struct column ``_video`` carries the video's ledger row along; ``_drop`` is null while a row lives.
A row that was dropped stays in the table, untouched, so that it can be counted at the end.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dataengine import records
from dataengine.errors import EngineError
from dataengine.stage import Drop, Kept, Outcome, Row, Stage

WORKER_CRASHED = "worker_crashed"
"""Reason of an item that killed its worker again and again."""

VIDEO_STRUCT = pa.struct(list(records.VIDEO_SCHEMA))
PROVENANCE_LIST = pa.list_(records.PROVENANCE_STRUCT)

_PIECE_ROWS = 64
"""Rows built into one Arrow array; bounds it far below the 2 GiB that ``binary`` can hold."""


class StageError(EngineError):
    """A stage broke its contract, or failed in a way that is not an item's fault."""


def source_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns the table that enters the first stage, from rows of a todo list."""
    videos = [
        {name: row[name] for name in ("source", "source_version", "file_bytes")}
        | {"attempts": row["attempts"]}
        for row in rows
    ]
    return pa.table(
        {
            "_video": pa.array(videos, VIDEO_STRUCT),
            "_refusal": pa.array([row["refusal"] for row in rows], records.REFUSAL_STRUCT),
            "_spans": pa.array([row["spans"] for row in rows], pa.list_(records.SPAN_STRUCT)),
            "provenance": pa.nulls(len(rows), PROVENANCE_LIST),
            "_drop": pa.nulls(len(rows), records.DROP_STRUCT),
        }
    )


def item_id(row: Mapping[str, Any]) -> str:
    """Returns what a row is called in messages: its clip, else its source."""
    return row.get("clip_id") or (row.get("_video") or {}).get("source") or "?"


def apply_stage(
    stage: Stage, table: pa.Table, process: Callable[[list[Row]], Sequence[Outcome]]
) -> pa.Table:
    """Runs a stage over the living rows of a table.

    Args:
        stage: Declares what is read and written.
        table: Rows with a ``_drop`` column.
        process: Gives one Outcome per living row, in order; usually wraps ``stage.process``.

    Returns:
        The table with the stage's output columns. A kept input becomes its rows; a dropped one
        stays as a single row with ``_drop`` filled in. Of a column that was there before, a row
        that does not mention it keeps the old value.

    Raises:
        StageError: If the stage breaks its contract.
    """
    dead = table["_drop"].is_valid().to_pylist()
    live = [index for index, is_dead in enumerate(dead) if not is_dead]
    names = list(dict.fromkeys([*stage.inputs, *(n for n in _NAMING if n in table.column_names)]))
    batch = table.select(names)
    if len(live) < table.num_rows:
        batch = batch.take(pa.array(live, pa.int64()))
    inputs = batch.to_pylist()
    outcomes = process(inputs) if inputs else []
    _check(stage, inputs, outcomes)

    by_index = dict(zip(live, outcomes, strict=True))
    origin: list[int] = []
    results: list[Mapping[str, Any]] = []
    for index in range(table.num_rows):
        outcome = by_index.get(index)
        rows: Sequence[Mapping[str, Any]]
        if outcome is None:
            rows = ({},)
        elif isinstance(outcome, Drop):
            rows = ({**outcome.columns, "_drop": _drop_row(stage, outcome)},)
        else:
            rows = outcome.rows
        origin.extend([index] * len(rows))
        results.extend(rows)

    if origin != list(range(table.num_rows)):
        table = table.take(pa.array(origin, pa.int64()))
    fields = {field.name: field.type for field in stage.outputs}
    fields["_drop"] = records.DROP_STRUCT
    for name, type_ in fields.items():
        table = _set_column(stage, table, name, type_, results)
    return _merge_provenance(table, results)


_NAMING = ("clip_id", "_video")
"""Columns that `item_id` reads; every stage is given them."""


def _check(stage: Stage, inputs: list[Row], outcomes: Sequence[object]) -> None:
    """Raises StageError unless there is one Outcome per input and no undeclared column."""
    if len(outcomes) != len(inputs):
        raise StageError(f"Stage {stage.name} gave {len(outcomes)} outcomes for {len(inputs)} rows")
    allowed = {*stage.outputs.names, "_drop", "provenance"}
    for row, outcome in zip(inputs, outcomes, strict=True):
        if isinstance(outcome, Kept):
            if not outcome.rows:
                raise StageError(f"Stage {stage.name} kept {item_id(row)} without any row")
            written = set().union(*outcome.rows)
        elif isinstance(outcome, Drop):
            written = set(outcome.columns)
        else:
            raise StageError(
                f"Stage {stage.name} gave {type(outcome).__name__} for {item_id(row)}, "
                "expected Kept or Drop"
            )
        if written - allowed:
            raise StageError(
                f"Stage {stage.name} wrote columns it does not declare: "
                + ", ".join(sorted(written - allowed))
            )


def _drop_row(stage: Stage, drop: Drop) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "reason": drop.reason,
        "detail": drop.detail,
        "retryable": drop.retryable,
    }


def _set_column(
    stage: Stage, table: pa.Table, name: str, type_: pa.DataType, rows: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """Returns the table with a column set from the rows that mention it."""
    exists = name in table.column_names
    if exists and not any(name in row for row in rows):
        return table
    if exists and not all(name in row for row in rows):
        old = table[name].to_pylist()
    else:
        old = [None] * len(rows)
    values = [row.get(name, before) for row, before in zip(rows, old, strict=True)]
    try:
        pieces = [
            pa.array(values[start : start + _PIECE_ROWS], type_)
            for start in range(0, len(values), _PIECE_ROWS)
        ]
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise StageError(f"Stage {stage.name} wrote {name} not as {type_}: {error}") from None
    column = pa.chunked_array(pieces, type_)
    if exists:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _merge_provenance(table: pa.Table, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns the table with the rows' provenance entries replacing those of the same columns."""
    if not any("provenance" in row for row in rows):
        return table
    old = table["provenance"].to_pylist()
    merged = []
    for row, before in zip(rows, old, strict=True):
        new = row.get("provenance") or []
        columns = {entry["column"] for entry in new}
        merged.append([e for e in before or [] if e["column"] not in columns] + list(new))
    column = pa.array(merged, PROVENANCE_LIST)
    return table.set_column(table.column_names.index("provenance"), "provenance", column)


# ------------------------------------------------------------------------------------ settling


def settle(table: pa.Table, max_attempts: int) -> tuple[pa.Table, list[Row]]:
    """Sorts what comes out of the last stage into clips to store and ledger rows.

    Args:
        table: All rows of some videos.
        max_attempts: What a crashed item has cost, for the ledger.

    Returns:
        The living clips with the columns of CLIP_SCHEMA, and one ledger row per video in the
        form `Corpus.commit` takes.
    """
    names = [n for n in ("clip_id", "duration_ms", "_video", "_drop") if n in table.column_names]
    videos: dict[str, list[Row]] = {}
    alive = []
    for row in table.select(names).to_pylist():
        videos.setdefault(row["_video"]["source"], []).append(row)
        alive.append(row["_drop"] is None and row.get("clip_id") is not None)
    clips = table if all(alive) else table.filter(pa.array(alive, pa.bool_()))
    for field in records.CLIP_SCHEMA:
        if field.name not in clips.column_names:
            clips = clips.append_column(field.name, pa.nulls(clips.num_rows, field.type))
    return clips.select(records.CLIP_SCHEMA.names), [
        _ledger_row(rows, max_attempts) for rows in videos.values()
    ]


def _ledger_row(rows: Sequence[Row], max_attempts: int) -> Row:
    """Returns how one video ended, from all its rows."""
    video = rows[-1]["_video"]
    clips = [row for row in rows if row.get("clip_id") is not None]
    kept = [row for row in clips if row["_drop"] is None]
    counts: Counter[tuple[str, str]] = Counter()
    lengths: Counter[tuple[str, str]] = Counter()
    for row in clips:
        if row["_drop"] is not None:
            key = (row["_drop"]["stage"], row["_drop"]["reason"])
            counts[key] += 1
            lengths[key] += row["duration_ms"] or 0
    ending: Row = {"status": records.KEPT, "stage": None, "reason": None, "detail": None}
    if not kept:
        whole = [row["_drop"] for row in rows if row.get("clip_id") is None]
        drop = whole[0] if whole else _all_clips_dropped(clips, counts)
        status = records.FAILED if drop["retryable"] else records.DROPPED
        ending = {**drop, "status": status}
        del ending["retryable"]
    crashed = any(row["_drop"] and row["_drop"]["reason"] == WORKER_CRASHED for row in rows)
    return {
        **video,
        **ending,
        "video_id": video["video_id"] or fallback_video_id(video["source"]),
        "attempts": (video["attempts"] or 0) + (max_attempts if crashed else 1),
        "finished_ms": int(time.time() * 1000),
        "num_clips": len(kept),
        "clips_ms": sum(row["duration_ms"] for row in kept),
        "dropped_clips": [
            {
                "stage": stage,
                "reason": reason,
                "num_clips": n,
                "duration_ms": lengths[stage, reason],
            }
            for (stage, reason), n in sorted(counts.items())
        ],
    }


def _all_clips_dropped(clips: Sequence[Row], counts: Counter[tuple[str, str]]) -> Row:
    (stage, reason), _ = counts.most_common(1)[0]
    detail = f"all {len(clips)} clips dropped, most at {stage}: {reason}"
    retryable = all(row["_drop"]["retryable"] for row in clips)
    return {
        "stage": stage,
        "reason": "all_clips_dropped",
        "detail": detail,
        "retryable": retryable,
    }


def fallback_video_id(source: str) -> str:
    """Returns the id of a source that was never opened: what is known of it is its name."""
    return records.url_video_id(source) if records.is_url(source) else records.digest(source)
