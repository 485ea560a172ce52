# SPDX-License-Identifier: Apache-2.0
"""One run: plan, take the corpus over, execute, account for everything, write it all down."""

import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from rich.console import Console

from dataengine import __version__, funnel
from dataengine.config import Pipeline, parse_pipeline
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError
from dataengine.plan import Plan, make_plan, make_retry_plan, write_listed
from dataengine.progress import ProgressDisplay, Snapshot
from dataengine.report import write_report
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
    with tempfile.TemporaryDirectory(prefix="dataengine-") as temporary:
        folder = Path(temporary)
        # Before there is a corpus: a mistyped word must not leave an empty one behind.
        with console.status("Listing the sources"):
            num_rows = write_listed(words, pipeline.sources, folder, limit)
        if not num_rows:
            raise ConfigError(f"No videos in: {' '.join(map(printable, words))}")
        corpus = Corpus.create(corpus_url)
        with corpus.locked():
            parts = local_ledger(corpus, folder)
            attempts = pipeline.runtime.max_attempts
            plan = make_plan(folder, parts, pipeline.fingerprint, attempts)
            _say_plan(plan, console)
            if plan.num_todo:
                return _run(pipeline, plan, corpus, folder, console, words, address, start)
            result = funnel.measure(parts, plan.listed, plan.num_listed)
            return RunResult(None, result, time.time() - start)


def retry(
    pipeline: Pipeline,
    corpus_url: str,
    console: Console,
    *,
    reasons: Sequence[str] = (),
    address: str | None = None,
    limit: int | None = None,
) -> RunResult | None:
    """Works once more on sources of a corpus that failed, however often they did.

    Args:
        pipeline: What to do to them; see `stored_pipeline`.
        corpus_url: An existing corpus.
        console: Where progress goes.
        reasons: Takes the sources that ended for one of these, even if a later attempt is not
            expected to succeed; none takes those that failed.
        address: Of a Ray cluster; None uses ``RAY_ADDRESS``, or this machine.
        limit: Works on the first so many sources only.

    Returns:
        How it ended; None when there is nothing to retry.

    Raises:
        EngineError: If something is wrong that the user can mend.
    """
    start = time.time()
    corpus = Corpus.open(corpus_url)
    with tempfile.TemporaryDirectory(prefix="dataengine-") as temporary, corpus.locked():
        folder = Path(temporary)
        parts = local_ledger(corpus, folder)
        recorded = partial(_recorded_sources, corpus, folder)
        plan = make_retry_plan(folder, pipeline.sources, parts, recorded, reasons, limit)
        if not plan.num_todo:
            return None
        _say_plan(plan, console)
        words = [f"retry {' '.join(reasons)}".strip()]
        return _run(pipeline, plan, corpus, folder, console, words, address, start)


def stored_pipeline(corpus: Corpus, overrides: Sequence[str] = ()) -> Pipeline:
    """Returns the pipeline of the newest run of a corpus.

    Args:
        corpus: Has had a run.
        overrides: ``a.b.c=value`` settings.

    Raises:
        CorpusError: If no run is recorded.
        ConfigError: If the pipeline cannot be run any more.
    """
    for folder in sorted(corpus.fs.ls(corpus.path("runs"), detail=False), reverse=True):
        path = f"{folder.rstrip('/')}/pipeline.yaml"
        if corpus.fs.exists(path):
            text = cast(bytes, corpus.fs.cat_file(path)).decode()
            return parse_pipeline(text, path, overrides)
    raise CorpusError(f"No run is recorded in {corpus.url}", "name a file with --pipeline")


def _run(
    pipeline: Pipeline,
    plan: Plan,
    corpus: Corpus,
    folder: Path,
    console: Console,
    words: Sequence[str],
    address: str | None,
    start: float,
) -> RunResult:
    """Works through a plan and writes down how it went; the corpus is locked."""
    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    corpus.take_over(run_id)
    corpus.sweep()
    record = run_record(pipeline, words, run_id)
    _write_record(corpus, run_id, pipeline, plan, record)
    stages = [cls.name for cls, _ in pipeline.stages]
    with ProgressDisplay(console, stages, plan.num_todo) as display:
        # Ray takes seconds to import; a run with nothing to do never does.
        from dataengine.runner import execute

        working = _with_cache(pipeline, corpus)
        snapshot = execute(working, corpus, run_id, plan, address=address, display=display)
    parts = local_ledger(corpus, folder)
    result = funnel.measure(parts, plan.listed, plan.num_listed)
    seconds = time.time() - start
    _finish_record(corpus, run_id, record, result, snapshot, seconds)
    write_report(corpus, run_id)
    return RunResult(run_id, result, seconds)


def _recorded_sources(corpus: Corpus, folder: Path, run_id: str) -> str | None:
    """Returns a local path of a run's todo list; None if it has none."""
    path = corpus.path("runs", run_id, "sources.parquet")
    if not corpus.fs.exists(path):
        return None
    if corpus.is_local:
        return path
    target = str(folder / f"{run_id}.parquet")
    corpus.fs.get(path, target)
    return target


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


def _say_plan(plan: Plan, console: Console) -> None:
    done = plan.num_listed - plan.num_todo
    parts = []
    if plan.num_refused:
        parts.append(f"{plan.num_refused} to refuse")
    if plan.num_again:
        parts.append(f"{plan.num_again} failed before")
    console.print(
        f"{plan.num_listed} source{'s' * (plan.num_listed != 1)}: {plan.num_todo} to do"
        + (f" ({', '.join(parts)})" if parts else "")
        + (f", {done} ended before" if done else ""),
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
    if plan.num_kept_excluded:
        console.print(
            f"warning: {plan.num_kept_excluded} sources with clips in the corpus are on an exclusion "
            "list now; their clips stay until they are taken out with: dataengine remove",
            highlight=False,
        )
    if plan.num_bad_spans:
        console.print(
            "warning: given spans left out, without a time or ending before they start: "
            f"{plan.num_bad_spans}",
            highlight=False,
        )
    if plan.num_more_captions:
        console.print(
            "warning: captions left out, because a clip has one and their spans were given several: "
            f"{plan.num_more_captions}",
            highlight=False,
        )


# ---------------------------------------------------------------------------------- run record


def run_record(pipeline: Pipeline, words: Sequence[str], run_id: str) -> dict[str, object]:
    """Returns what is needed to know, later, what this run was."""
    return {
        "run_id": run_id,
        "pipeline": pipeline.name,
        "pipeline_file": pipeline.source,
        "fingerprint": pipeline.fingerprint,
        "sources": [printable(word) for word in words[:100]],
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
    with open(plan.todo, "rb") as todo:
        corpus.publish(f"{folder}/sources.parquet", lambda file: shutil.copyfileobj(todo, file))


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


def printable(word: str) -> str:
    """Returns a word of the command line that can be written as UTF-8."""
    return word.encode(errors="backslashreplace").decode()


def _git_commit() -> str | None:
    """Returns the commit of the checkout this code runs from, ``-dirty`` if it was changed."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        answer = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty", "--match="],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
