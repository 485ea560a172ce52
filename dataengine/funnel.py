# SPDX-License-Identifier: Apache-2.0
"""Where everything went: sources, clips and hours, in = kept + dropped."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

from dataengine.errors import CorpusError
from dataengine.query.literals import exact, quoted
from dataengine.records import REMOVED


@dataclass(frozen=True)
class Loss:
    """What ended at one stage for one reason."""

    stage: str
    reason: str
    num: int
    hours: float


@dataclass(frozen=True)
class Funnel:
    """What went in and what became of it.

    Attributes:
        num_videos: Sources asked for.
        video_hours: Their length, as far as it could be measured.
        kept_videos: Sources that gave clips.
        kept_video_hours: Their length.
        video_losses: The others, by where and why.
        failed_videos: Those of the others that a later attempt may save.
        num_clips: Clips found in the sources that were segmented.
        clip_hours: Their length.
        kept_clips: Clips in the corpus.
        kept_clip_hours: Their length.
        clip_losses: The others, by where and why.
    """

    num_videos: int
    video_hours: float
    kept_videos: int
    kept_video_hours: float
    video_losses: tuple[Loss, ...]
    failed_videos: int
    num_clips: int
    clip_hours: float
    kept_clips: int
    kept_clip_hours: float
    clip_losses: tuple[Loss, ...]

    def to_dict(self) -> dict[str, object]:
        """Returns plain values for JSON."""
        return asdict(self)


_MS_PER_HOUR = 3_600_000


def measure(ledger_parts: Sequence[str], listed: Path, num_listed: int) -> Funnel:
    """Returns the funnel of the listed sources, over all runs that worked on them.

    Args:
        ledger_parts: Local Parquet files of VIDEO_SCHEMA that count.
        listed: Parquet file with a column ``source``.
        num_listed: Distinct sources that went in; the funnel must account for each.

    Raises:
        CorpusError: If a source has no ending: in != kept + dropped.
    """
    parts = ", ".join(quoted(exact(part)) for part in ledger_parts)
    with duckdb.connect() as db:
        db.execute(
            "create table videos as select distinct on (source) * from "
            f"(select * from read_parquet([{parts}]) semi join "
            f"(select source from read_parquet({quoted(exact(listed))})) "
            "using (source)) order by source, finished_ms desc"
        )
        hours = f"coalesce(sum(duration_ms), 0) / {_MS_PER_HOUR}"
        videos, video_hours = _row(db, f"select count(*), {hours} from videos")
        kept, kept_hours = _row(db, f"select count(*), {hours} from videos where status = 'kept'")
        failed, _ = _row(db, f"select count(*), {hours} from videos where status = 'failed'")
        video_losses = db.execute(
            f"select coalesce(stage, status), reason, count(*), {hours} from videos where status <> 'kept' "
            "group by all order by count(*) desc, 1, 2"
        ).fetchall()
        clips, clip_hours = _row(
            db,
            "select coalesce(sum(num_clips), 0), "
            f"coalesce(sum(clips_ms), 0) / {_MS_PER_HOUR} from videos",
        )
        clip_losses = db.execute(
            "select lost.stage, lost.reason, sum(lost.num_clips), "
            f"sum(lost.duration_ms) / {_MS_PER_HOUR} "
            "from (select unnest(dropped_clips) as lost from videos) "
            "group by lost.stage, lost.reason order by sum(lost.num_clips) desc, 1, 2"
        ).fetchall()
    losses = [Loss(str(s), str(r), int(n), float(h)) for s, r, n, h in clip_losses]
    if videos != num_listed:
        raise CorpusError(
            f"{num_listed - videos} of {num_listed} sources have no ending in the ledger",
            "run the same command again; if it stays so, please report it",
        )
    return Funnel(
        num_videos=videos,
        video_hours=video_hours,
        kept_videos=kept,
        kept_video_hours=kept_hours,
        video_losses=tuple(Loss(str(s), str(r), n, h) for s, r, n, h in video_losses),
        failed_videos=failed,
        num_clips=clips + sum(loss.num for loss in losses),
        clip_hours=clip_hours + sum(loss.hours for loss in losses),
        kept_clips=clips,
        kept_clip_hours=clip_hours,
        clip_losses=tuple(losses),
    )


def _row(db: duckdb.DuckDBPyConnection, sql: str) -> tuple[int, float]:
    row = db.execute(sql).fetchone()
    assert row is not None
    return int(row[0]), float(row[1])


def show(funnel: Funnel, console: Console) -> None:
    """Prints the funnel as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("time", justify="right")
    for unit, rows in rows_of(funnel).items():
        for label, num, hours in rows:
            table.add_row(f"{unit} {label}", f"{num:,}", clock(hours))
        table.add_section()
    console.print(table)


def rows_of(funnel: Funnel) -> dict[str, list[tuple[str, int, float]]]:
    """Returns the funnel as (label, count, hours) rows for ``videos`` and ``clips``."""
    return {
        "videos": [
            ("in", funnel.num_videos, funnel.video_hours),
            *_loss_rows(funnel.video_losses),
            ("kept", funnel.kept_videos, funnel.kept_video_hours),
        ],
        "clips": [
            ("in", funnel.num_clips, funnel.clip_hours),
            *_loss_rows(funnel.clip_losses),
            ("kept", funnel.kept_clips, funnel.kept_clip_hours),
        ],
    }


def _loss_rows(losses: Sequence[Loss]) -> list[tuple[str, int, float]]:
    return [(_loss_label(loss), loss.num, loss.hours) for loss in losses]


def _loss_label(loss: Loss) -> str:
    at_stage = loss.stage != REMOVED
    return f"dropped at {loss.stage}: {loss.reason}" if at_stage else "removed"


def clock(hours: float) -> str:
    """Returns hours as ``h:mm:ss``."""
    seconds = round(hours * 3600)
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
