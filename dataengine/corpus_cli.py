# SPDX-License-Identifier: Apache-2.0
"""Commands on a finished corpus: query, subset, compact, export, import, verify, stats, compare."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from dataengine.errors import ConfigError, EngineError
from dataengine.terminal import (
    LIVE,
    CorpusArgument,
    DataArgument,
    JsonOption,
    OutputFormat,
    console,
    print_table,
    say,
    text_output,
)

if TYPE_CHECKING:
    from dataengine.query.percentiles import Percentile

corpus_app = typer.Typer()

MemoryOption = Annotated[
    str | None, typer.Option(help="What DuckDB may hold, e.g. 4GB; the rest goes to $TMPDIR.")
]
TextOption = Annotated[
    str, typer.Option("--text", "-t", help='Words the captions must hold; "in quotes" a phrase.')
]


@corpus_app.command()
def query(
    data: DataArgument,
    condition: Annotated[
        str,
        typer.Argument(
            help="SQL condition on clips, such as \"clip_score > p70 and language = 'en'\", "
            "or a whole SELECT over clips or videos."
        ),
    ] = "",
    text: TextOption = "",
    select: Annotated[str | None, typer.Option(help="Columns or expressions.")] = None,
    order_by: Annotated[str | None, typer.Option(help="Default: video and time.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="At most so many rows.")] = None,
    near: Annotated[
        str, typer.Option(help="Clips nearest to a text by CLIP embedding, the nearest first.")
    ] = "",
    near_image: Annotated[Path | None, typer.Option(help="... to a picture.")] = None,
    near_clip: Annotated[str, typer.Option(help="... to a clip of the corpus, by its id.")] = "",
    percentiles_of_all: Annotated[
        bool, typer.Option(help="p70 over all clips, not those that pass the other conditions.")
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="How many clips, videos, hours.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="The SQL and its plan.")] = False,
    output_format: Annotated[OutputFormat, typer.Option("--format", "-f")] = OutputFormat.TABLE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File instead of stdout.")
    ] = None,
    snapshot: Annotated[str, typer.Option(help="The corpus as of a merge of compact.")] = "",
    memory: MemoryOption = None,
) -> None:
    """Look at clips with SQL over the catalog; media is never read."""
    from dataengine.query import sql

    if output_format is OutputFormat.PARQUET and output is None:
        raise EngineError("Parquet is not for a terminal", "name a file with --output")
    if count and (select or order_by or limit is not None):
        raise ConfigError("--count takes no --select, --order-by and --limit")
    if count and (near or near_image or near_clip):
        raise ConfigError("--count takes no --near: every clip is more or less near")
    corpus, subset = sql.open_data(data)
    with sql.connect(corpus, subset=subset, snapshot=snapshot, memory=memory) as db:
        if count:
            select, order_by = sql.COUNTS, "all"
        if near or near_image or near_clip:
            from dataengine.query.near import near_statement

            statement, covered = near_statement(
                db, corpus, condition, select, order_by, limit, near=near, near_image=near_image,
                near_clip=near_clip, text=text, over_all=percentiles_of_all,
            )  # fmt: skip
            _say_without(covered.num_without, "are not found")
        else:
            statement = sql.select_statement(
                db, condition, select, order_by, limit, text=text, over_all=percentiles_of_all
            )
        _say_percentiles(statement.percentiles)
        if explain:
            with text_output(output) as file:
                file.write(f"{statement.sql}\n\n{sql.plan_of(db, statement.sql)}\n")
            return
        schema, batches = sql.run(db, statement.sql)
        if output_format is OutputFormat.TABLE:
            print_table(schema.names, (row for b in batches for row in b.to_pylist()), output)
        elif output_format is OutputFormat.PARQUET and output is not None:
            with open(output, "wb") as file:
                sql.write_parquet(schema, batches, file)
        else:
            with text_output(output) as file:
                if output_format is OutputFormat.CSV:
                    sql.write_csv(schema, batches, file)
                else:
                    sql.write_jsonl(batches, file)


@corpus_app.command()
def subset(
    corpus: CorpusArgument,
    name: Annotated[str, typer.Option(help="Trained on as CORPUS#NAME.")],
    preset: Annotated[
        str,
        typer.Option(
            help="div: weight 1 / clips of the video; flt: 1-120 s, top 30 % by CLIP score, then div; "
            "aes: aesthetic score of at least 4; internvid2: highest CLIP scores."
        ),
    ] = "",
    where: Annotated[str, typer.Option(help="SQL condition; p70 is a percentile.")] = "",
    text: TextOption = "",
    order: Annotated[
        str, typer.Option(help="How to draw without a preset: uniform, div, or top (by --score).")
    ] = "",
    score: Annotated[
        str, typer.Option(help="Column for flt, internvid2, top; clip_score_frame is one frame.")
    ] = "clip_score",
    num_clips: Annotated[int | None, typer.Option("--num-clips", "-n", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other clips.")] = 0,
    per_video: Annotated[
        int | None, typer.Option(min=1, help="At most so many clips of a video.")
    ] = None,
    dedup_near: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of clips with the same pictures keep one: frames differ in at most so many bits "
            "of 64 (pHash). 8 finds other encodings.",
        ),
    ] = None,
    dedup_semantic: Annotated[
        float | None,
        typer.Option(help="Of clips whose CLIP embeddings have a cosine above this keep one."),
    ] = None,
    mix: Annotated[str, typer.Option(help="Of finished subsets, by weight: flt=0.7,aes=0.3")] = "",
    replace_existing: Annotated[bool, typer.Option("--replace")] = False,
    memory: MemoryOption = None,
) -> None:
    """Choose clips to train on, by condition and by the papers' ways of drawing."""
    from dataengine.corpus import Corpus
    from dataengine.query import sql, subsets

    opened = Corpus.open(corpus)
    wanted = subsets.preset(preset, score=score) if preset else subsets.Definition(score=score)
    if order:
        if preset:
            raise ConfigError("A preset has its own --order")
        wanted = replace(wanted, order=subsets.check_order(order))
    with sql.connect(opened) as db:
        where = sql.with_text(db, where, text)
    if where:
        where = f"({wanted.where}) and ({where}\n)" if wanted.where else where
        wanted = replace(wanted, where=where)
    wanted = replace(
        wanted, num_clips=num_clips, seed=seed, per_video=per_video, mix=_weights(mix),
        dedup_near=dedup_near, dedup_semantic=dedup_semantic,
    )  # fmt: skip
    made = subsets.make_subset(
        opened, name, wanted, replace_existing=replace_existing, memory=memory
    )
    _say_percentiles(made.percentiles)
    for kind, count in made.removed.items():
        say(f"{count:,} {kind} duplicates removed.")
    short = num_clips is not None and made.num_clips < num_clips
    say(
        f"{made.num_clips:,} clips of {made.num_videos:,} videos, out of {made.num_candidates:,} "
        f"that pass{' (fewer than asked for: these are all)' if short else ''}.\n"
        f"Next:    python -m training RECIPE --data '{corpus}#{name}'"
    )


@corpus_app.command()
def compact(
    corpus: CorpusArgument,
    full: Annotated[
        bool,
        typer.Option(
            help="Merge everything anew, from the shards' own files; mends damaged merged files."
        ),
    ] = False,
    keep: Annotated[int, typer.Option(min=1, help="Snapshots that stay readable.")] = 2,
    memory: MemoryOption = None,
) -> None:
    """Merge the catalog's files, so that queries open few and read little; ingest may go on."""
    from dataengine.compact import compact as run_compact
    from dataengine.corpus import Corpus

    done = run_compact(Corpus.open(corpus), full=full, keep=keep, memory=memory)
    if not done.num_clips:
        say("Nothing to merge.")
        return
    say(
        f"{done.num_clips:,} clips of {done.num_shards:,} shards merged in {done.seconds:.1f} s; the "
        f"catalog is {done.num_files:,} files now. Snapshot {done.snapshot}."
    )


@corpus_app.command()
def export(
    data: Annotated[str, typer.Argument(help="CORPUS, or CORPUS#SUBSET.")] = "",
    format_name: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="internvid, webdataset, huggingface, interleaved or generation; see docs/exports.md.",
        ),
    ] = "",
    out: Annotated[
        str, typer.Argument(help="Folder or URL; of internvid perhaps a file, NAME.jsonl.")
    ] = "",
    where: Annotated[
        str | None, typer.Option("--where", "-w", help="SQL condition; p70 is a percentile.")
    ] = None,
    caption: Annotated[str | None, typer.Option(help="Column written as the text.")] = None,
    replace_existing: Annotated[
        bool, typer.Option("--replace", help="In the place of another export that lies there.")
    ] = False,
    refresh: Annotated[
        str, typer.Option(help="Bring this finished export up to date; takes nothing else.")
    ] = "",
    max_bytes: Annotated[
        str | None, typer.Option(help="Media of one tar or Parquet file; default 1GiB.")
    ] = None,
    reencode: Annotated[
        bool | None,
        typer.Option("--reencode", help="Videos with nothing hidden behind an edit list."),
    ] = None,
    card_only: Annotated[
        bool | None,
        typer.Option("--card-only", help="huggingface: the card alone, into the corpus itself."),
    ] = None,
    umt_score: Annotated[
        str | None, typer.Option(help="internvid: column written as UMT_Score.")
    ] = None,
    forms: Annotated[
        str | None, typer.Option(help="interleaved: of sequence,transcript,pair.")
    ] = None,
    transcript: Annotated[
        str | None, typer.Option(help="interleaved: column written as speech.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="interleaved: of what is drawn.")] = None,
    min_clips: Annotated[
        int | None, typer.Option(help="interleaved: fewest clips of a video; default 2.")
    ] = None,
    drop_video: Annotated[
        float | None,
        typer.Option(help="interleaved: share of clips whose video is left out; default 0.3."),
    ] = None,
    jsonl: Annotated[
        bool | None, typer.Option("--jsonl", help="interleaved: JSON lines too.")
    ] = None,
    min_aesthetic: Annotated[
        float | None, typer.Option(help="generation: default 4; 0 takes clips without a score.")
    ] = None,
    min_seconds: Annotated[
        float | None, typer.Option(help="generation: shortest clip; default 2.")
    ] = None,
    memory: MemoryOption = None,
) -> None:
    """Write a corpus, or a part of it, in a form that others read; run it again to go on."""
    from dataengine.export.run import export as run_export
    from dataengine.export.run import read_record
    from dataengine.export.settings import bytes_of, forms_of, settings_of

    options = {
        "where": where,
        "caption": caption,
        "max_bytes": bytes_of(max_bytes) if max_bytes else None,
        "reencode": reencode,
        "card_only": card_only,
        "umt_score": umt_score,
        "forms": forms_of(forms) if forms else None,
        "transcript": transcript,
        "seed": seed,
        "min_clips": min_clips,
        "drop_video": drop_video,
        "jsonl": jsonl,
        "min_aesthetic": min_aesthetic,
        "min_seconds": min_seconds,
    }
    if refresh:
        if data or replace_existing or any(value is not None for value in options.values()):
            raise ConfigError("--refresh takes nothing else: the export knows what it is")
        settings, _ = read_record(refresh)
        out = refresh
    else:
        if not (data and format_name and out):
            raise ConfigError("What is missing: CORPUS, FORMAT or OUT", "dataengine export --help")
        url, _, name = data.partition("#")
        settings = settings_of(format_name, options | {"corpus": url, "subset": name})
    done = run_export(settings, out, replace=replace_existing, memory=memory, console=LIVE)
    counts = ", ".join(f"{number:,} {name}" for name, number in done.counts.items())
    say(f"{counts}.")
    if done.sync is not None:
        say(
            f"Written now: {done.sync.num_written:,} clips; {done.sync.added:,} new files, "
            f"{len(done.sync.rewritten):,} written again, {len(done.sync.removed):,} removed."
        )
    if done.counts.get("problems"):
        say(f"Why clips were left out: column problem of {out}/index.")


@corpus_app.command("import")
def import_export(
    source: Annotated[str, typer.Argument(help="A huggingface or webdataset export.")],
    corpus: Annotated[str, typer.Option("--corpus", "-c", help="Where to; made if missing.")],
) -> None:
    """Make a corpus from an export of one: clips, captions, scores, provenance and media."""
    from dataengine.export.imports import import_export as run_import

    done = run_import(source, corpus, console=LIVE)
    say(
        f"{done.num_clips:,} clips of {done.num_videos:,} videos in {done.num_shards:,} shards; "
        f"{done.num_known:,} videos were there already."
    )


@corpus_app.command()
def diff(
    before: Annotated[str, typer.Argument(help="CORPUS, or CORPUS@SNAPSHOT of a merge.")],
    after: Annotated[str, typer.Argument(help="The same, or another corpus.")],
    as_json: JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A row per clip: .parquet, .csv or .jsonl."),
    ] = None,
    memory: MemoryOption = None,
) -> None:
    """Say which clips were added, removed and changed, and in which columns.

    Exit status: 0 the two are equal, 1 they differ, 2 they cannot be compared.
    """
    from dataengine.query import diff as differences

    try:
        found = differences.diff(
            differences.State.open(before), differences.State.open(after),
            output=output, memory=memory,
        )  # fmt: skip
    except EngineError as error:  # 1 means something else here
        raise ConfigError(error.message, error.hint) from None
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, ensure_ascii=False, default=str))
    else:
        differences.show(found, console(sys.stdout))
    raise typer.Exit(0 if found.is_equal else 1)


@corpus_app.command()
def verify(
    corpus: CorpusArgument,
    decode: Annotated[bool, typer.Option(help="Also decode every clip and frame.")] = False,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Look into so many shards; what concerns the whole stays whole."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed looks into other shards.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
) -> None:
    """Check that a corpus keeps its contract: nothing lost, nothing twice, media where it says.

    Exit status: 0 all in order, 1 there are problems.
    """
    from dataengine.corpus import Corpus
    from dataengine.query.verify import verify as run_verify

    with Progress(console=LIVE, transient=True, disable=not LIVE.is_terminal) as bars:
        task = bars.add_task("catalog", total=None)
        result = run_verify(
            Corpus.open(corpus), decode=decode, sample=sample, seed=seed, jobs=jobs,
            progress=lambda done, total: bars.update(
                task, description="shards", completed=done, total=total
            ),
        )  # fmt: skip
    for problem in result.problems:
        typer.echo(problem)
    if result.checked_shards < result.num_shards:
        share = 100 * result.checked_shards / result.num_shards
        say(
            f"Looked into {result.checked_shards:,} of {result.num_shards:,} shards ({share:.3g} %, "
            f"{result.checked_clips:,} clips); catalog and ledger were checked whole."
        )
    say(
        f"{result.num_clips:,} clips in {result.num_shards:,} shards, {result.num_videos:,} sources: "
        + (f"{len(result.problems):,} problems" if result.problems else "all in order")
    )
    raise typer.Exit(1 if result.problems else 0)


@corpus_app.command()
def view(
    data: DataArgument,
    host: Annotated[str, typer.Option(help="Another one lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open/--no-open")] = True,
    memory: Annotated[
        str, typer.Option(help="What DuckDB may hold; the rest goes to $TMPDIR.")
    ] = "2GB",
) -> None:
    """Filter, watch and read clips in a browser; the page is for you alone."""
    from dataengine.viewer.server import view as run_view

    if host not in ("127.0.0.1", "localhost", "::1"):
        say(
            f"Whoever reaches {host} and has the address may look and save subsets, over plain HTTP."
        )
    run_view(data, host=host, port=port, open_browser=open_browser, memory=memory, say=typer.echo)


def _say_percentiles(percentiles: "tuple[Percentile, ...]") -> None:
    for percentile in percentiles:
        say(f"p{percentile.percent:g} of {percentile.column} is {percentile.text}")


def _say_without(num_clips: int, outcome: str) -> None:
    if num_clips:
        say(f"{num_clips:,} clips have no embedding and {outcome}.")


def _weights(text: str) -> dict[str, float]:
    """Returns the weights of ``a=0.7,b=0.3``."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight)
        except ValueError:
            raise ConfigError(
                f"--mix: not NAME=WEIGHT: {part}", "such as flt=0.7,aes=0.3"
            ) from None
    return weights


@corpus_app.command()
def stats(
    data: DataArgument,
    where: Annotated[str, typer.Option(help="SQL condition; p70 is a percentile.")] = "",
    html: Annotated[Path | None, typer.Option(help="A page of charts, in one file.")] = None,
    as_json: JsonOption = False,
    alarms: Annotated[
        bool | None,
        typer.Option(
            "--alarms/--no-alarms",
            help="Look for texts that stand on many videos; unasked only up to --num-texts clips.",
        ),
    ] = None,
    num_texts: Annotated[
        int, typer.Option(min=1, help="Read words from a sample above so many clips.")
    ] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Another seed draws another sample.")] = 0,
    memory: MemoryOption = None,
) -> None:
    """What a corpus is made of: durations, scores, languages, words, verbs, people, costs."""
    from dataengine.stats.measure import StatsSettings, measure

    _check_page(html)
    settings = StatsSettings(
        where=where, num_texts=num_texts, alarms=alarms, seed=seed, memory=memory
    )
    found = measure(data, settings)
    if html:
        from dataengine.stats.page import render

        _write_page(html, render(found))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    elif not html:
        from dataengine.stats.show import show

        show(found)


@corpus_app.command()
def compare(
    first: DataArgument,
    second: DataArgument,
    where: Annotated[str, typer.Option(help="SQL condition on both sides.")] = "",
    html: Annotated[Path | None, typer.Option(help="A page of charts, in one file.")] = None,
    as_json: JsonOption = False,
    num_texts: Annotated[
        int, typer.Option(min=1, help="Read words from a sample above so many clips.")
    ] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Another seed draws another sample.")] = 0,
    memory: MemoryOption = None,
) -> None:
    """Two corpora or subsets side by side: what both have, how far apart they are, in which words."""
    from dataengine.stats.compare import compare as run_compare
    from dataengine.stats.measure import StatsSettings

    _check_page(html)
    settings = StatsSettings(where=where, num_texts=num_texts, seed=seed, memory=memory)
    found = run_compare(first, second, settings)
    if html:
        from dataengine.stats.page import render_comparison

        _write_page(html, render_comparison(found, where))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    elif not html:
        from dataengine.stats.show import show_comparison

        show_comparison(found)


def _check_page(path: Path | None) -> None:
    """Raises EngineError, before a long count, if a page cannot be written there."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise EngineError(f"Not a place for a page: {path}", "name a file in a folder that exists")


def _write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise EngineError(f"The page cannot be written: {error}") from None
    say(f"Page:    {path}")
