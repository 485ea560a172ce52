# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments in, one message out. The work is done elsewhere."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from dataengine import __version__
from dataengine.corpus_cli import corpus_app
from dataengine.errors import EngineError
from dataengine.queries_cli import discover, queries_app
from dataengine.terminal import LIVE, CorpusArgument, JsonOption, console, say

if TYPE_CHECKING:
    from dataengine.ingest import RunResult

app = typer.Typer(
    name="dataengine",
    help="From a list of videos to a captioned, queryable, trainable video-text corpus.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(corpus_app)
app.add_typer(queries_app)
app.command()(discover)

PipelineArgument = Annotated[
    Path, typer.Argument(help="Pipeline file, e.g. pipelines/quickstart.yaml.")
]
SourcesOption = Annotated[
    list[str],
    typer.Option(
        "--sources",
        "-s",
        help="Folder, file, glob, URL, s3://prefix, youtube:ID, playlist or channel, "
        "ytsearchN:words, or a .txt, .csv, .jsonl or .parquet list; may be repeated.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting: stages.segment.num_frames=16."),
]


@app.command()
def ingest(
    pipeline: Annotated[
        Path, typer.Argument(help="Pipeline file, e.g. pipelines/quickstart.yaml.")
    ],
    sources: SourcesOption,
    corpus: Annotated[str, typer.Option("--corpus", "-c", help="Where to; made if missing.")],
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: stages.segment.num_frames=16."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N sources.")] = None,
) -> None:
    """Bring videos into a corpus. Run it again to go on, or to add what is new."""
    from dataengine.config import load_pipeline
    from dataengine.ingest import ingest as run_ingest

    loaded = load_pipeline(pipeline, overrides or [])
    with _interruptible():
        result = run_ingest(loaded, sources, corpus, LIVE, address=address, limit=limit)
    _say_result(result, corpus)


@app.command()
def retry(
    corpus: CorpusArgument,
    classes: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="Reasons, with commas: timeout,http_429. Default: all that may pass.",
        ),
    ] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="Pipeline file. Default: that of the newest run.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: stages.download.retries=9."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N sources.")] = None,
) -> None:
    """Work once more on the sources that failed, or that ended for the reasons of --class."""
    from dataengine.config import load_pipeline
    from dataengine.corpus import Corpus
    from dataengine.ingest import retry as run_retry
    from dataengine.ingest import stored_pipeline

    reasons = [reason.strip() for reason in (classes or "").split(",") if reason.strip()]
    if pipeline is None:
        loaded = stored_pipeline(Corpus.open(corpus), overrides or [])
    else:
        loaded = load_pipeline(pipeline, overrides or [])
    with _interruptible():
        result = run_retry(loaded, corpus, LIVE, reasons=reasons, address=address, limit=limit)
    if result is None:
        LIVE.print("Nothing to retry: no source has failed.")
    else:
        _say_result(result, corpus)


@app.command()
def annotate(
    corpus: CorpusArgument,
    pipeline: Annotated[Path, typer.Option(help="Pipeline file with the stages' new settings.")],
    stage: Annotated[
        list[str],
        typer.Option(help="Stage to run again, e.g. caption_video; may be repeated."),
    ],
    suffix: Annotated[
        str, typer.Option(help="Write to new columns, e.g. _qwen3. Default: in place.")
    ] = "",
    where: Annotated[
        str, typer.Option(help="Only clips that a SQL condition selects: caption_video is null.")
    ] = "",
    again: Annotated[
        bool, typer.Option(help="Also shards that these settings have annotated already.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: stages.score.max_frames=8."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """Run annotation stages again over a corpus: a new model, a new prompt."""
    from dataengine.alarms import say_alarms
    from dataengine.annotate import annotate as run_annotation
    from dataengine.annotate import make_annotation
    from dataengine.config import load_pipeline
    from dataengine.corpus import Corpus

    chosen = make_annotation(load_pipeline(pipeline, overrides or []), stage, suffix, where)
    with _interruptible():
        result = run_annotation(chosen, corpus, LIVE, address=address, again=again)
    if result.run_id is None:
        LIVE.print(
            "Nothing to do: these settings have annotated every shard (--again does it over)."
        )
        return
    columns = ", ".join(name for name in chosen.columns if name != "provenance")
    say(
        f"{result.num_clips:,} clips in {result.num_shards:,} shards annotated after "
        f"{result.seconds:.0f} s: {columns}"
    )
    for name, num_clips in result.skipped.items():
        say(f"{name}: {num_clips:,} clips could not be worked on and stay")
    say_alarms(Corpus.open(corpus), LIVE, chosen.columns)
    if not suffix and "caption_video" in stage and "fuse" not in stage:
        say(
            "Training reads the column caption, which the stage fuse writes: add --stage fuse to "
            "bring it up to date, or train with data.caption=caption_video."
        )


@app.command()
def doctor(
    pipeline: PipelineArgument,
    overrides: SetOption = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster whose CPUs and GPUs count; default this machine."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", "-c", help="Where clips will go: its disk is checked.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a pipeline needs that is not here: packages, weights, servers, GPUs, disk.

    Exit status: 0 nothing is missing, 1 something is, 2 the pipeline or the command is wrong.
    """
    from dataengine import doctor as checks
    from dataengine.config import load_pipeline

    findings = checks.examine(
        load_pipeline(pipeline, overrides or []), address=address, corpus=corpus
    )
    ready = checks.is_ready(findings)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        typer.echo(json.dumps({"ready": ready, "findings": rows}, indent=1, ensure_ascii=False))
    else:
        checks.show(findings, console(sys.stdout), shlex.quote(str(pipeline)))
    raise typer.Exit(0 if ready else 1)


@app.command()
def prefetch(
    pipeline: PipelineArgument,
    overrides: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be fetched.")
    ] = False,
) -> None:
    """Fetch the weights of a pipeline's models, as far as they are not here.

    Exit status: 0 all are here (with --dry-run: or can be fetched), 1 some are not and cannot be
    fetched, 2 the pipeline or the command is wrong, 130 interrupted.
    """
    from dataengine.config import load_pipeline
    from dataengine.prefetch import prefetch as run_prefetch

    loaded = load_pipeline(pipeline, overrides or [])
    with _interruptible("interrupted: run the same command to go on"):
        good = run_prefetch(loaded, LIVE, dry_run=dry_run)
    raise typer.Exit(0 if good else 1)


@app.command()
def plan(
    pipeline: PipelineArgument,
    sources: SourcesOption,
    sample: Annotated[int, typer.Option(min=1, help="How many sources to run; 12 or more.")] = 20,
    seed: Annotated[int, typer.Option(help="Another seed draws others.")] = 0,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            "-c",
            help="Where the real run will go: what has ended there is left out, and the plan is kept "
            "with it for the run's report.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="To plan for: cpus=128,gpus=8. Default: where the sample runs."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")
    ] = None,
    overrides: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N sources.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a sample of the sources, and say what all of them will take and give.

    Every total has a range, which aims to hold the truth in 90 % of cases. Exit status: 0 planned, or
    nothing left to plan; 1 the sample could not be run; 2 the pipeline or the command is wrong, or
    something that it needs is missing; 130 interrupted.
    """
    from dataengine import forecast
    from dataengine.config import load_pipeline

    loaded = load_pipeline(pipeline, overrides or [])
    size = forecast.parse_cluster(cluster) if cluster else None
    with _interruptible("interrupted: nothing was kept"):
        result = forecast.make_forecast(
            loaded, sources, LIVE, num_sample=sample, seed=seed, corpus_url=corpus,
            address=address, cluster=size, limit=limit,
        )  # fmt: skip
    if result is None:
        LIVE.print("Nothing to plan: every source has ended in this corpus, or is refused.")
        return
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=1, ensure_ascii=False))
    else:
        forecast.show(result, console(sys.stdout))
    if corpus:
        path = forecast.store(result, corpus)
        say(f"Kept for the run's report: {path}")


@contextlib.contextmanager
def _interruptible(
    said: str = "interrupted: what was committed is safe; run the same command to go on",
) -> Iterator[None]:
    """Ends the process in words when a run is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        LIVE.print(f"\n{said}")
        # Ray's threads can crash an interpreter that is taken down in the middle of a run.
        os._exit(130)


def _say_result(result: "RunResult", corpus: str) -> None:
    """Prints how a run ended, what is suspicious about its corpus, and what to type next."""
    from dataengine import funnel
    from dataengine.alarms import say_alarms
    from dataengine.corpus import Corpus

    LIVE.print()
    funnel.show(result.funnel, LIVE)
    LIVE.print()
    where = shlex.quote(corpus)
    failed = result.funnel.failed_videos
    if result.run_id is None:
        ended = "Nothing to do: every source has ended in this corpus before."
        say(ended)
    else:
        say(f"{result.funnel.kept_clips:,} clips in {corpus} after {result.seconds:.0f} s.")
        report = f"{corpus.rstrip('/')}/runs/{result.run_id}/report.html"
        say(f"Report:  {report}")
        say_alarms(Corpus.open(corpus), LIVE)
    if failed:
        say(
            f"Retry:   {failed:,} source{'s' * (failed != 1)} failed for reasons that may pass: "
            f"{_python()} -m dataengine retry {where}"
        )
    say(
        f'Next:    {_python()} -m dataengine query {where} "motion_score > 0.01" --limit 5\n'
        f"         {_python()} -m training viclip_tiny --data {where}"
    )


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Folder for the videos and truth.json.")],
    num_videos: Annotated[int, typer.Option(min=1, help="How many videos.")] = 24,
    seed: Annotated[int, typer.Option(help="Another seed gives other videos.")] = 0,
) -> None:
    """Render procedural videos whose cuts, objects, sounds and speech are known."""
    from dataengine.demo import render_demo

    with Progress(console=LIVE, transient=True, disable=not LIVE.is_terminal) as bars:
        task = bars.add_task("rendering videos", total=num_videos)
        truth = render_demo(
            directory,
            num_videos=num_videos,
            seed=seed,
            progress=lambda done, _: bars.update(task, completed=done),
        )
    say(f"{num_videos} videos in {directory}, what is in them in {truth}")


@app.command()
def remove(
    corpus: CorpusArgument,
    video_id: Annotated[
        list[str], typer.Option(help="Column video_id; of YouTube, its own id. May be repeated.")
    ],
) -> None:
    """Take videos out of a corpus everywhere, for good: a later ingest will not bring them back."""
    from dataengine.corpus import Corpus
    from dataengine.export.run import exports_of
    from dataengine.remove import remove as run_remove

    removal = run_remove(Corpus.open(corpus), video_id)
    say(
        f"Removed: {removal.num_videos:,} videos, {removal.num_clips:,} clips, "
        f"{len(removal.shards):,} shards rewritten."
    )
    for out in exports_of(Corpus.open(corpus)):
        say(
            f"Exported to {out}. Take them out there too: dataengine export --refresh {shlex.quote(out)}"
        )


@app.command()
def report(
    corpus: CorpusArgument,
    run: Annotated[str | None, typer.Option(help="Default: the newest run.")] = None,
) -> None:
    """Write a run's report.html again."""
    from dataengine.corpus import Corpus
    from dataengine.report import write_report

    say(write_report(Corpus.open(corpus), run))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """From a list of videos to a captioned, queryable, trainable video-text corpus."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _python() -> str:
    """Returns this interpreter as one would type it here."""
    inside = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if inside.startswith("..") else inside)


def main() -> None:
    """Runs the command line: one message and a hint for a user's mistake, never a traceback."""
    # Ray would rebuild the environment of `uv run` for every worker, and hang.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Several actors share few cores: an idle OpenMP thread must sleep, not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except EngineError as error:
        if os.environ.get("DATAENGINE_DEBUG"):
            raise
        say(f"error: {error.message}")
        if error.hint:
            say(f"\nhint: {error.hint}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads the rest
        sys.exit(0)
    except OSError as error:
        if os.environ.get("DATAENGINE_DEBUG") or error.filename is None:
            raise
        what = f"error: {error.strerror}: {error.filename}"
        say(what)
        sys.exit(1)
