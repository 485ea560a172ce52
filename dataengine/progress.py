# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run goes on: a line for the videos and one per stage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_PLAIN_INTERVAL_S = 10.0
_UNCHANGED_INTERVAL_S = 60.0


@dataclass
class StageCounts:
    """What a stage has done so far; retried work is counted each time it is done.

    Attributes:
        num_in: Rows it was given.
        num_out: Rows that live after it.
        num_dropped: Rows it dropped.
        busy_s: Seconds spent in ``process``, added up over all actors, like all seconds here.
        setup_s: Seconds spent in ``setup``.
        cpu_s: CPU seconds of ``process``, of all threads, and of the child processes that ended in it.
        gpu_s: ``busy_s`` times the GPUs that the actor holds.
        wait_s: Part of ``busy_s`` in which the actor waited for a core; 0 where the system does not say.
        num_actors: Actors that have started, those in place of one that died included.
        bytes_in: Rows it was given, as Arrow tables, media included.
        bytes_out: The tables after it.
    """

    num_in: int = 0
    num_out: int = 0
    num_dropped: int = 0
    busy_s: float = 0.0
    setup_s: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    wait_s: float = 0.0
    num_actors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass
class VideoCost:
    """What one video has cost at one stage; a batch of several videos is shared out by their rows."""

    busy_s: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    wait_s: float = 0.0


@dataclass
class Snapshot:
    """The state of a run at one moment.

    Attributes:
        stages: Name -> what it has done.
        num_videos_done: Videos that have left the last stage.
        videos: Source -> stage -> cost, of the first videos of a run; only when it has ended.
    """

    stages: dict[str, StageCounts]
    num_videos_done: int = 0
    videos: dict[str, dict[str, VideoCost]] = field(default_factory=dict)


class ProgressDisplay:
    """Live bars on a terminal, elsewhere a line every ten seconds, or every minute while nothing ends.

    Use as a context manager.

    Args:
        console: Where to.
        stages: Their names, in order.
        num_videos: How many units there are in all.
        unit: What the whole is counted in; the stages' counts are rows: videos, then clips.
    """

    def __init__(
        self, console: Console, stages: Sequence[str], num_videos: int, unit: str = "videos"
    ) -> None:
        self._console = console
        self._unit = unit
        self._num_videos = num_videos
        self._start = time.monotonic()
        self._last_plain = self._start
        self._last_counts: list[int] = []
        self._bars = Progress(
            TextColumn("  {task.description:<18}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>7.0f} of {task.fields[known]:<7}"),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._videos = self._add(unit, num_videos)
        self._stages: dict[str, TaskID] = {name: self._add(name, None) for name in stages}

    def __enter__(self) -> "ProgressDisplay":
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Draws a state."""
        elapsed = time.monotonic() - self._start
        done = snapshot.num_videos_done
        whole = _rate(done, elapsed, self._unit)
        if 0 < done < self._num_videos:
            left = f"{duration(elapsed / done * (self._num_videos - done))} left"
            whole = f"{whole}, {left}" if whole else left
        self._update(self._videos, done, self._num_videos, whole)
        # A shard's clips are not counted before.
        upstream = self._num_videos if self._unit == "videos" else None
        for name, task in self._stages.items():
            counts = snapshot.stages.get(name, StageCounts())
            rate = _rate(counts.num_in, counts.busy_s, "rows")
            note = f"{rate} busy" if rate else "" if counts.num_in else "waiting"
            if counts.num_dropped:
                note += f", {counts.num_dropped} dropped"
            total = None if upstream is None else max(upstream, counts.num_in)
            self._update(task, counts.num_in, total, note)
            upstream = counts.num_out
        if not self._console.is_terminal:
            self._show_plain(snapshot, elapsed, whole)

    def _show_plain(self, snapshot: Snapshot, elapsed: float, whole: str) -> None:
        done = snapshot.num_videos_done
        stages = [snapshot.stages.get(name, StageCounts()) for name in self._stages]
        counts = [
            done,
            *(stage.num_in for stage in stages),
            *(stage.num_actors > 0 for stage in stages),
        ]
        since_s = time.monotonic() - self._last_plain
        unchanged = counts == self._last_counts
        if since_s <= (_UNCHANGED_INTERVAL_S if unchanged else _PLAIN_INTERVAL_S):
            return
        self._last_plain, self._last_counts = time.monotonic(), counts
        parts = [f"{self._unit} {done} of {self._num_videos}", whole]
        parts += [
            f"{name} {stage.num_in:,}" if stage.num_actors else f"{name} starting"
            for name, stage in zip(self._stages, stages, strict=True)
        ]
        if done >= self._num_videos > 0:
            parts.append("finishing")
        line = "  ".join(part for part in parts if part)
        self._console.print(f"{duration(elapsed):>7}  {line}", highlight=False, soft_wrap=True)

    def _add(self, name: str, total: int | None) -> TaskID:
        return self._bars.add_task(name, total=total, known="", note="")

    def _update(self, task: TaskID, completed: int, total: int | None, note: str) -> None:
        known = "?" if total is None else str(total)
        self._bars.update(task, completed=completed, total=total, known=known, note=note)


def duration(seconds: float) -> str:
    """Returns seconds as a person says them: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _rate(count: int, seconds: float, unit: str) -> str:
    """Returns how many a second; empty where that is less than can be said in one decimal."""
    rate = count / seconds if seconds > 0.5 else 0.0
    return f"{rate:.1f} {unit}/s" if rate >= 0.05 else ""
