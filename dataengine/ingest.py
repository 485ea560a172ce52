# SPDX-License-Identifier: Apache-2.0
"""One run: plan, take the corpus over, execute, account for everything, write it all down."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from dataengine import __version__, funnel
from dataengine.config import Pipeline
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError
from dataengine.progress import ProgressDisplay, Snapshot
from dataengine.report import write_report
from dataengine.sources import Plan, make_plan
from dataengine.stages.download import DownloadStage


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_id: None when there was nothing to do.
        funnel: Of all sources that were asked for.
        seconds: Wall time.
    """

    run_id: str | None
    funnel: funnel.Funnel
    seconds: float


def ingest(
    pipeline: Pipeline,
    words: Sequence[str],
    corpus_url: str,
    console: Console,
    *,
    address: str | None = None,
    limit: int | None = None,
) -> RunResult:
    """Brings sources into a corpus; what has ended there before is left alone.

    Args:
        pipeline: What to do to them.
        words: What the user named; see `sources.expand`.
        corpus_url: The corpus, made when there is none.
        console: Where progress goes.
        address: Of a Ray cluster; None uses ``RAY_ADDRESS``, or this machine.
        limit: Works on the first so many sources only.

    Raises:
        EngineError: If something is wrong that the user can mend.
    """
    start = time.time()
    corpus = Corpus.create(corpus_url)
    pipeline = _with_cache(pipeline, corpus)
    with _locked(corpus), tempfile.TemporaryDirectory(prefix="dataengine-") as folder:
        parts = local_ledger(corpus, Path(folder))
        plan = make_plan(words, parts, pipeline.fingerprint, Path(folder), limit)
        if not plan.num_listed:
            raise ConfigError(f"No videos in: {' '.join(words)}")
        _say_plan(plan, console)
        if not plan.num_todo:
            result = funnel.measure(parts, plan.listed, plan.num_listed)
            return RunResult(None, result, time.time() - start)
        run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        corpus.take_over(run_id)
        corpus.sweep()
        record = _record(pipeline, words, run_id)
        _write_record(corpus, run_id, pipeline, plan, record)
        with ProgressDisplay(
            console, [cls.name for cls, _ in pipeline.stages], plan.num_todo
        ) as display:
            # Ray takes seconds to import; a run with nothing to do never does.
            from dataengine.runner import execute

            snapshot = execute(pipeline, corpus, run_id, plan, address=address, display=display)
        parts = local_ledger(corpus, Path(folder))
        result = funnel.measure(parts, plan.listed, plan.num_listed)
        seconds = time.time() - start
        _finish_record(corpus, run_id, record, result, snapshot, seconds)
        write_report(corpus, run_id)
    return RunResult(run_id, result, seconds)


def _with_cache(pipeline: Pipeline, corpus: Corpus) -> Pipeline:
    """Returns the pipeline with a place for what it downloads."""
    place = (
        corpus.path("cache")
        if corpus.is_local
        else os.path.join(tempfile.gettempdir(), "dataengine-cache")
    )
    stages = tuple(
        (cls, config.model_copy(update={"cache_dir": place}))
        if isinstance(config, DownloadStage.Config) and not config.cache_dir
        else (cls, config)
        for cls, config in pipeline.stages
    )
    return replace(pipeline, stages=stages)


def local_ledger(corpus: Corpus, folder: Path) -> list[str]:
    """Returns local paths of the ledger's parts, fetching them from an object store."""
    parts = corpus.video_parts()
    if corpus.is_local or not parts:
        return parts
    target = folder / "ledger"
    target.mkdir(exist_ok=True)
    corpus.fs.get(parts, str(target))
    return [str(target / Path(part).name) for part in parts]


@contextlib.contextmanager
def _locked(corpus: Corpus) -> Iterator[None]:
    """Holds a local corpus for one writer; the lock goes with the process, however it ends.

    Object stores have no locks: there the newest run wins (`Corpus.take_over`).
    """
    if not corpus.is_local:
        yield
        return
    with open(corpus.path(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"Another run is writing to {corpus.url}", "wait for it, or use another corpus"
            ) from None
        yield


def _say_plan(plan: Plan, console: Console) -> None:
    done = plan.num_listed - plan.num_todo
    console.print(
        f"{plan.num_listed} source{'s' * (plan.num_listed != 1)}: {plan.num_todo} to do"
        + (f", {done} done before" if done else ""),
        highlight=False,
    )
    if plan.num_changed:
        console.print(
            f"warning: {plan.num_changed} files have changed since their clips were made; "
            "the clips stay as they are",
            highlight=False,
        )
    if plan.num_other_settings:
        console.print(
            f"warning: {plan.num_other_settings} sources were ingested with other settings; "
            "their clips stay as they are (use a new corpus to make them again)",
            highlight=False,
        )


# ---------------------------------------------------------------------------------- run record


def _record(pipeline: Pipeline, words: Sequence[str], run_id: str) -> dict[str, object]:
    """Returns what is needed to know, later, what this run was."""
    return {
        "run_id": run_id,
        "pipeline": pipeline.name,
        "pipeline_file": pipeline.source,
        "fingerprint": pipeline.fingerprint,
        "sources": list(words)[:100],
        "prompt_hashes": pipeline.prompt_hashes(),
        "dataengine": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _write_record(
    corpus: Corpus, run_id: str, pipeline: Pipeline, plan: Plan, record: dict[str, object]
) -> None:
    folder = f"runs/{run_id}"
    config = pipeline.resolved().encode()
    corpus.fs.makedirs(corpus.path(folder), exist_ok=True)
    corpus.publish(f"{folder}/pipeline.yaml", lambda file: file.write(config))
    corpus.publish(f"{folder}/run.json", lambda file: file.write(_json(record)))
    todo = pq.read_table(plan.todo)
    corpus.publish(f"{folder}/sources.parquet", lambda file: pq.write_table(todo, file))


def _finish_record(
    corpus: Corpus,
    run_id: str,
    record: dict[str, object],
    result: funnel.Funnel,
    snapshot: Snapshot,
    seconds: float,
) -> None:
    folder = f"runs/{run_id}"
    record |= {"seconds": round(seconds, 1), "finished": True}
    stages = {name: asdict(counts) for name, counts in snapshot.stages.items()}
    corpus.publish(f"{folder}/funnel.json", lambda file: file.write(_json(result.to_dict())))
    corpus.publish(f"{folder}/metrics.json", lambda file: file.write(_json(stages)))
    corpus.publish(f"{folder}/run.json", lambda file: file.write(_json(record)))


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def _git_commit() -> str | None:
    """Returns the commit of the checkout this code runs from, ``-dirty`` if it was changed."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        answer = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty", "--match="],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
