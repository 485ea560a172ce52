# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline on Ray: the only module that imports it.

A run is one streaming Ray Data graph: source rows -> an actor pool per stage -> a datasink that
commits shards. Ray Data owns scheduling, back-pressure, autoscaling and retries. Blocks are never
split (``target_max_block_size = None``): a video's rows stay in one block from the stage that
makes its clips to the sink, so a shard holds whole videos.

A worker that dies takes only its current batch with it. The batch is tried again item by item, and
an item that kills its worker ``max_attempts`` times ends as a Drop with reason `WORKER_CRASHED`.
"""

import contextlib
import logging
import os
import re
import resource
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

# Under `uv run` Ray would rebuild the driver's environment for every worker, and hang.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
if not os.environ.get("DATAENGINE_DEBUG"):
    # Ray prints these with a traceback on the driver's stdout. Each is handled: a stage that cannot
    # start ends the run with one message, a crashed worker is begun again.
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "retries remaining|retry|died or was killed|actor is dead"
    )

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dataengine import records
from dataengine.annotate import Annotation, clips_to_annotate, store
from dataengine.config import Pipeline
from dataengine.corpus import Corpus
from dataengine.errors import DependencyError, EngineError
from dataengine.fetch.cache import forget
from dataengine.flow import WORKER_CRASHED, StageError, apply_stage, item_id, settle, source_table
from dataengine.plan import Plan
from dataengine.pools import WRITE_CPUS, Pool, StageSpec, plan_pools
from dataengine.progress import ProgressDisplay, Snapshot, StageCounts, VideoCost
from dataengine.stage import Drop, Outcome, Row, Stage
from dataengine.stages.download import DownloadStage

_POLL_S = 0.5
_SCHEDSTAT = "/proc/thread-self/schedstat"
"""Linux: nanoseconds on a core, nanoseconds waiting for one, time slices."""
_MOST_VIDEOS_COSTED = 1000
"""Videos whose cost is remembered one by one; a plan's sample is smaller."""
_FAILURE_S = 60.0
"""How long the control may take to answer on a busy machine; one that has died says so at once."""
_LONGEST_MESSAGE = 1000
"""In characters, of an error that is not ours."""
READ_CPUS = 0.1
"""Cores reserved by a task that reads a shard: it mostly waits for the disk."""


def execute(
    pipeline: Pipeline,
    corpus: Corpus,
    run_id: str,
    plan: Plan,
    *,
    address: str | None,
    display: ProgressDisplay,
) -> Snapshot:
    """Runs a pipeline over a todo list and commits what comes out.

    Args:
        pipeline: What to run.
        corpus: Where to; ``run_id`` must be its current run.
        run_id: The run's name.
        plan: What is to do.
        address: Of a Ray cluster; None uses ``RAY_ADDRESS``, or starts Ray on this machine. A
            process that is connected to Ray already stays as it is.
        display: Shows how it goes.

    Returns:
        What every stage has done.

    Raises:
        EngineError: If the cluster is too small, a model is missing or a stage fails.
    """
    with _session(pipeline, address, display) as (pools, control):
        for rows in _waves(plan.todo, pipeline.runtime.videos_per_wave):
            dataset = ray.data.from_arrow([source_table([row]) for row in rows])
            dataset = _through(dataset, pools, control, pipeline.runtime.max_attempts)
            sink = _CorpusSink(corpus, run_id, pipeline)
            dataset.write_datasink(sink, ray_remote_args={"num_cpus": WRITE_CPUS})
        return ray.get(control.ended.remote())


def execute_annotation(
    annotation: Annotation,
    corpus: Corpus,
    run_id: str,
    shards: Sequence[str],
    *,
    address: str | None,
    display: ProgressDisplay,
) -> Snapshot:
    """Runs annotation stages over shards of a corpus and commits each as it is done.

    Args:
        annotation: What to run.
        corpus: Which; ``run_id`` must be its current run.
        run_id: The run's name.
        shards: Names of the shards to do.
        address: As in `execute`.
        display: Shows how it goes; counts shards.

    Returns:
        What every stage has done.

    Raises:
        EngineError: If the cluster is too small, a model is missing or a stage fails.
    """
    pipeline = annotation.pipeline
    with _session(pipeline, address, display, of_clips=True, other_cpus=READ_CPUS) as (
        pools,
        control,
    ):
        wave = pipeline.runtime.videos_per_wave
        for start in range(0, len(shards), wave):
            tables = [pa.table({"shard": [shard]}) for shard in shards[start : start + wave]]
            dataset = ray.data.from_arrow(tables).map_batches(
                _ShardReader(corpus, annotation),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=READ_CPUS,
            )
            dataset = _through(dataset, pools, control, pipeline.runtime.max_attempts)
            sink = _AnnotationSink(corpus, run_id, annotation)
            dataset.write_datasink(sink, ray_remote_args={"num_cpus": WRITE_CPUS})
        return ray.get(control.snapshot.remote())


@contextlib.contextmanager
def _session(
    pipeline: Pipeline,
    address: str | None,
    display: ProgressDisplay,
    *,
    of_clips: bool = False,
    other_cpus: float = 0.0,
) -> Iterator[tuple[list[Pool], Any]]:
    """Connects to Ray, plans the actor pools and shows progress; errors leave in a user's words.

    Args:
        pipeline: What to run.
        address: As in `execute`.
        display: Shows how it goes.
        of_clips: Whether the first stage is given clips, not whole videos.
        other_cpus: Cores needed by tasks beside the pools.
    """
    ours = not ray.is_initialized()
    if ours:
        _start_ray(address)
    control: Any = None
    try:
        num_cpus, num_gpus = _cluster_size()
        pools = plan_pools(pipeline.stages, num_cpus - other_cpus, num_gpus, of_clips=of_clips)
        context = ray.data.DataContext.get_current()
        context.target_max_block_size = None
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = pipeline.runtime.no_progress_timeout_s
        context.max_errored_blocks = 0
        # Ray Data's own wrapper loses its cause between processes; an EngineError keeps its words.
        context.raise_original_map_exception = True
        context.print_on_execution_start = False
        # Pinned to the driver's node: it must live exactly as long as the run.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        control = ray.remote(_Control).options(num_cpus=0, scheduling_strategy=node).remote()
        with _Poller(control, display):
            yield pools, control
    except Exception as error:
        raise _ours(error) or _setup_failure(control) or _unforeseen(error) from error
    finally:
        if ours:
            ray.shutdown()


def _waves(todo: Path, size: int) -> Iterable[list[Row]]:
    """Yields the todo list in pieces that a driver can remember."""
    with pq.ParquetFile(todo) as file:
        for batch in file.iter_batches(batch_size=size):
            yield batch.to_pylist()


# ------------------------------------------------------------------------------------- the graph


def _through(
    dataset: ray.data.Dataset, pools: Sequence[Pool], control: Any, max_attempts: int
) -> ray.data.Dataset:
    """Returns the dataset after an actor pool for every stage, or for stages that share one."""
    for index, pool in enumerate(pools):
        options: dict[str, Any] = {"memory": pool.memory_bytes} if pool.memory_bytes else {}
        dataset = dataset.map_batches(
            _Room,
            batch_size=pool.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.min_actors, max_size=pool.max_actors, initial_size=pool.min_actors
            ),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            fn_constructor_kwargs={
                "stages": pool.stages,
                "control": control,
                "max_attempts": max_attempts,
                "is_last": index == len(pools) - 1,
            },
            **options,
        )
    return dataset


class _Room:
    """One actor: a stage, or several that share an actor."""

    def __init__(
        self, stages: Sequence[StageSpec], control: Any, max_attempts: int, is_last: bool
    ) -> None:
        # A worker is in a background process group of the user's terminal: a child that reads from
        # it (ffmpeg does) would stop the whole group, and the run would wait for ever.
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        self._control = control
        self._max_attempts = max_attempts
        self._is_last = is_last
        self._last_source: str | None = None
        # Whatever stage is at work, the actor holds what the greediest one of its stages asks for.
        self._num_gpus = max(config.resources.num_gpus for _, config in stages)
        self._stages: list[Stage] = []
        for cls, config in stages:
            start = time.perf_counter()
            stage = cls(config)
            try:
                stage.setup()
            except Exception as error:
                # Ray reports a dead actor as text; the error itself travels through the control.
                ray.get(control.fail.remote(_setup_error(cls, error)))
                raise
            seconds = time.perf_counter() - start
            control.report.remote(cls.name, StageCounts(setup_s=seconds, num_actors=1), 0, {})
            self._stages.append(stage)

    def __call__(self, table: pa.Table) -> pa.Table:
        for stage in self._stages:
            before, bytes_in = table["_drop"].null_count, table.nbytes
            rows_of = _rows_of_videos(table)
            start = _clocks()
            table = apply_stage(stage, table, lambda rows, stage=stage: self._process(stage, rows))
            busy_s, cpu_s, wait_s = (b - a for a, b in zip(start, _clocks(), strict=True))
            cost = VideoCost(busy_s, cpu_s, busy_s * self._num_gpus, wait_s)
            counts = StageCounts(
                num_in=before,
                num_out=table["_drop"].null_count,
                num_dropped=sum(
                    1 for drop in table["_drop"].to_pylist() if drop and drop["stage"] == stage.name
                ),
                bytes_in=bytes_in,
                bytes_out=table.nbytes,
                **vars(cost),
            )
            is_end = self._is_last and stage is self._stages[-1]
            self._control.report.remote(
                stage.name, counts, self._new_videos(table) if is_end else 0, _shares(cost, rows_of)
            )
        return table

    def _new_videos(self, table: pa.Table) -> int:
        """Returns how many videos begin in a table; one may have begun in the batch before."""
        sources = [video["source"] for video in table["_video"].to_pylist()]
        begun = sum(a != b for a, b in pairwise([self._last_source, *sources]))
        self._last_source = sources[-1] if sources else self._last_source
        return begun

    def _process(self, stage: Stage, rows: list[Row]) -> list[Outcome]:
        """Runs a stage batch by batch, and item by item where a batch has killed a worker."""
        size = stage.config.resources.batch_size
        outcomes: list[Outcome] = []
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            if len(batch) == 1:
                outcomes += self._guarded(stage, batch)
                continue
            key = records.digest(stage.name, *(item_id(row) for row in batch))
            if ray.get(self._control.begin.remote(key)) == 0:
                outcomes += _call(stage, batch)
            else:
                for row in batch:
                    outcomes += self._guarded(stage, [row])
            self._control.end.remote(key)
        return outcomes

    def _guarded(self, stage: Stage, batch: list[Row]) -> Sequence[Outcome]:
        """Processes a single item, unless it has killed its worker too often."""
        key = records.digest(stage.name, item_id(batch[0]))
        crashes: int = ray.get(self._control.begin.remote(key))
        if crashes >= self._max_attempts:
            outcomes: Sequence[Outcome] = [
                Drop(WORKER_CRASHED, f"killed its worker {crashes} times", retryable=True)
            ]
        else:
            outcomes = _call(stage, batch)
        self._control.end.remote(key)
        return outcomes


def _rows_of_videos(table: pa.Table) -> Counter[str]:
    """Returns how many living rows each video has in a table."""
    living = zip(table["_video"].to_pylist(), table["_drop"].is_null().to_pylist(), strict=True)
    return Counter(video["source"] for video, lives in living if lives)


def _shares(cost: VideoCost, rows_of: Counter[str]) -> dict[str, VideoCost]:
    """Returns what each video has cost, by its rows."""
    parts = {source: rows / rows_of.total() for source, rows in rows_of.items()}
    return {
        source: VideoCost(**{name: value * part for name, value in vars(cost).items()})
        for source, part in parts.items()
    }


def _clocks() -> tuple[float, float, float]:
    """Returns seconds of the wall, of CPU (with ended children) and of waiting for a core."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() + children.ru_utime + children.ru_stime
    waited = 0
    with contextlib.suppress(OSError, ValueError, IndexError), open(_SCHEDSTAT) as file:
        waited = int(file.read().split()[1])
    return time.perf_counter(), cpu, waited / 1e9


def _call(stage: Stage, batch: list[Row]) -> Sequence[Outcome]:
    """Calls a stage; what it raises is a programming error and gets a place and a name."""
    try:
        return stage.process(batch)
    except EngineError:
        raise
    except Exception as error:  # whatever it is stops the run, with its place named
        names = ", ".join(item_id(row) for row in batch[:3])
        more = f" and {len(batch) - 3} more" if len(batch) > 3 else ""
        frames = reversed(traceback.extract_tb(error.__traceback__)[-3:])
        place = ", called at ".join(f"{at.filename}:{at.lineno} ({at.name})" for at in frames)
        raise StageError(
            f"Stage {stage.name} failed on {names}{more}: {type(error).__name__}: {error}",
            f"this is a fault in the stage, not in the video; it was raised at {place}",
        ) from error


def _setup_error(cls: type[Stage], error: Exception) -> EngineError:
    """Returns what to tell the user when a stage cannot start."""
    if isinstance(error, EngineError):
        return error
    return DependencyError(
        f"Stage {cls.name} cannot start: {type(error).__name__}: {error}",
        f"check the settings of stages.{cls.name}",
    )


class _CorpusSink(ray.data.Datasink):
    """Commits blocks of whole videos as shards."""

    def __init__(self, corpus: Corpus, run_id: str, pipeline: Pipeline) -> None:
        self._corpus = corpus
        self._run_id = run_id
        self._fingerprint = pipeline.fingerprint
        self._max_attempts = pipeline.runtime.max_attempts
        self._shards = pipeline.shards
        self._caches = [
            config.cache_dir
            for _, config in pipeline.stages
            if isinstance(config, DownloadStage.Config) and not config.keep
        ]

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        """Writes one shard; called in a task of its own, and again if that task dies."""
        settled = [settle(block, self._max_attempts) for block in blocks if block.num_rows]
        videos = sorted(
            (video for _, rows in settled for video in rows), key=lambda video: video["video_id"]
        )
        if not videos:
            return
        clips = pa.concat_tables([_plain(clips) for clips, _ in settled])
        self._corpus.commit(
            clips,
            videos,
            run_id=self._run_id,
            fingerprint=self._fingerprint,
            row_group_bytes=self._shards.row_group_mb << 20,
        )
        for video in videos:
            if records.is_url(video["source"]) or records.is_object(video["source"]):
                for cache in self._caches:
                    forget(cache, video["video_id"])

    @property
    def min_bytes_per_write(self) -> int:
        """Media after which a shard is written."""
        return self._shards.shard_mb << 20


def _plain(clips: pa.Table) -> pa.Table:
    """Returns the clips with exactly the stored types, so that blocks can be put together."""
    return clips.cast(records.CLIP_SCHEMA)


# ------------------------------------------------------------------------ annotating a corpus


class _ShardReader:
    """Shard name -> its clips, with the columns that stages read; a task, so nothing is kept."""

    def __init__(self, corpus: Corpus, annotation: Annotation) -> None:
        self._corpus = corpus
        self._annotation = annotation

    def __call__(self, table: pa.Table) -> pa.Table:
        return clips_to_annotate(self._corpus, self._annotation, table["shard"][0].as_py())


class _AnnotationSink(ray.data.Datasink):
    """Writes new annotations into their shards."""

    def __init__(self, corpus: Corpus, run_id: str, annotation: Annotation) -> None:
        self._corpus = corpus
        self._run_id = run_id
        self._annotation = annotation

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        """Rewrites each block's shard; called in a task of its own, and again if that task dies."""
        for block in blocks:
            if block.num_rows:
                store(self._corpus, self._annotation, block, self._run_id)


# --------------------------------------------------------------------------------------- control


class _Control:
    """Actor that remembers what is being worked on, to know who killed a worker, and counts."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._failure: EngineError | None = None
        self._snapshot = Snapshot(stages={})
        self._videos: dict[str, dict[str, VideoCost]] = {}

    def begin(self, key: str) -> int:
        """Notes the start of work; returns how often it was begun before and never ended."""
        before = self._begun.get(key, 0)
        self._begun[key] = before + 1
        return before

    def end(self, key: str) -> None:
        self._begun.pop(key, None)

    def report(
        self,
        stage: str,
        counts: StageCounts,
        num_videos_done: int,
        costs: dict[str, VideoCost],
    ) -> None:
        _add(self._snapshot.stages.setdefault(stage, StageCounts()), counts)
        self._snapshot.num_videos_done += num_videos_done
        for source, cost in costs.items():
            if source in self._videos or len(self._videos) < _MOST_VIDEOS_COSTED:
                stages = self._videos.setdefault(source, {})
                _add(stages.setdefault(stage, VideoCost()), cost)

    def snapshot(self) -> Snapshot:
        return self._snapshot

    def ended(self) -> Snapshot:
        """Returns the last state, with what every video has cost."""
        return replace(self._snapshot, videos=self._videos)

    def fail(self, error: EngineError) -> None:
        self._failure = self._failure or error

    def failure(self) -> EngineError | None:
        return self._failure


def _add(total: StageCounts | VideoCost, part: StageCounts | VideoCost) -> None:
    """Adds every number of a part to a total of the same class."""
    for name, value in vars(part).items():
        setattr(total, name, getattr(total, name) + value)


class _Poller:
    """Shows the state of a run every half second, from a thread, while in its ``with`` block."""

    def __init__(self, control: Any, display: ProgressDisplay) -> None:
        self._control = control
        self._display = display
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._display.show(ray.get(self._control.snapshot.remote(), timeout=5))
            except ray.exceptions.RayError:
                continue  # the run itself will say what is wrong


# -------------------------------------------------------------------------------- starting Ray


def _start_ray(address: str | None) -> None:
    debug = bool(os.environ.get("DATAENGINE_DEBUG"))
    if not debug:
        # Ray's C++ side warns of what it then handles; real errors come as exceptions.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    level = logging.INFO if debug else logging.ERROR
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": debug}
    if address is None and not os.environ.get("RAY_ADDRESS"):
        options["include_dashboard"] = False
        # A machine that is busy takes longer than Ray's 30 s.
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "150")
    elif address is not None:
        options["address"] = address
    logging.getLogger("ray").setLevel(level)
    # What fails is raised as well, and explained; Ray Data's own account of it is a traceback.
    logging.getLogger("ray.data").setLevel(level if debug else logging.CRITICAL)
    try:
        with contextlib.nullcontext() if debug else _silent_stderr():
            ray.init(**options)
    except Exception as error:  # noqa: BLE001 - Ray raises a bare one when its start times out
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise EngineError(
            f"Ray cannot be reached at {where}: {error}",
            "check --address and RAY_ADDRESS (and RAY_AUTH_MODE=token, if the cluster uses tokens); "
            "without an address, Ray is started on this machine",
        ) from None


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keeps Ray's C++ side from writing to the terminal while it starts; errors are raised anyway."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cluster_size(address: str | None) -> tuple[float, float]:
    """Returns the cores and GPUs of a cluster that is connected to for that alone.

    Args:
        address: As in `execute`.

    Raises:
        EngineError: If it cannot be reached.
    """
    ours = not ray.is_initialized()
    if ours:
        _start_ray(address)
    try:
        return _cluster_size()
    finally:
        if ours:
            ray.shutdown()


def _cluster_size() -> tuple[float, float]:
    """Returns the cores and GPUs of the cluster."""
    size = ray.cluster_resources()
    return size.get("CPU", 0.0), size.get("GPU", 0.0)


# --------------------------------------------------------------------------- what went wrong


def _ours(error: BaseException) -> EngineError | None:
    """Returns the first EngineError in the chain of what Ray raises; None without one."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or current in seen:
            continue
        seen.append(current)
        # Ray raises a mixture of its own class and the cause's, which reads as a traceback.
        if isinstance(current, EngineError) and not isinstance(current, ray.exceptions.RayError):
            return current
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]
    return None


def _setup_failure(control: Any) -> EngineError | None:
    """Returns why a stage could not start; None if none said so."""
    if control is None:
        return None
    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(control.failure.remote(), timeout=_FAILURE_S)
    return None


def _unforeseen(error: BaseException) -> EngineError:
    """Returns what to tell the user about an error of Ray's, or of ours that is none of his."""
    while isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    return EngineError(
        f"The run failed: {type(error).__name__}: {_without_frames(str(error))}",
        "what was committed is safe; run the same command again to go on, or with "
        "DATAENGINE_DEBUG=1 to see where it fails",
    )


def _without_frames(text: str) -> str:
    """Returns a message as one line; of a traceback in it only what was raised in the end."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    frames = [i for i, line in enumerate(lines) if re.match(r"Traceback |File \"|ray::", line)]
    if frames:
        lines = [*lines[: frames[0]], *lines[max(frames) + 1 :][-1:]]
    return " ".join(lines)[:_LONGEST_MESSAGE]
