# SPDX-License-Identifier: Apache-2.0
"""Annotation stages run again over a finished corpus: a new model, a new prompt.

Shards are the unit of work. A shard that these settings have annotated last is left alone, so a run
that was cut short goes on where it stopped, and every clip is annotated exactly once.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from dataengine import records
from dataengine.config import Pipeline
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError
from dataengine.flow import VIDEO_STRUCT
from dataengine.ingest import run_record
from dataengine.progress import ProgressDisplay
from dataengine.rewrite import is_marked, rewrite_shard, rewrite_twin
from dataengine.stage import Row, Stage

NOTHING_TO_DO = "nothing_to_do"
"""Reason in the row of a shard of which no clip was asked for."""

ABSENT = ("_subtitles", "_video")
"""Columns that stages may read although a corpus does not hold them; they are null then."""


@dataclass(frozen=True)
class Annotation:
    """What is run over the shards of a corpus.

    Attributes:
        pipeline: Its stages are those to run, in order.
        suffix: Appended to the names of the columns they write; empty replaces the columns.
        where: SQL condition on clips; empty takes all.
        mark: Fingerprint of all of it.
    """

    pipeline: Pipeline
    suffix: str
    where: str
    mark: str

    @property
    def outputs(self) -> dict[str, pa.DataType]:
        """Columns that the stages write, by the names they know them."""
        fields = (field for cls, _ in self.pipeline.stages for field in cls.outputs)
        return {field.name: field.type for field in fields}

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Columns of the shards that change, with their types."""
        named = {name + self.suffix: type_ for name, type_ in self.outputs.items()}
        return {**named, "provenance": pa.list_(records.PROVENANCE_STRUCT)}

    @property
    def inputs(self) -> list[str]:
        """Columns of the shards that are read: all that a stage reads, and what it may leave as it is."""
        read = {name for cls, _ in self.pipeline.stages for name in cls.inputs}
        needed = [*read, *self.outputs, "clip_id", "provenance"]
        return sorted({name for name in needed if name not in ABSENT})

    def update(self, before: Row, after: Row) -> Row:
        """Returns the new values of a clip's columns.

        Args:
            before: The row as it lies in the shard, with ``provenance``.
            after: The same after the stages.
        """
        entries = after["provenance"] or []
        own = [
            entry
            for entry in entries
            # Of a column that is empty now, an entry without a note is about what was there before.
            if entry["column"] in self.outputs
            and (after[entry["column"]] is not None or entry["note"])
        ]
        renamed = [entry | {"column": entry["column"] + self.suffix} for entry in own]
        written = {name + self.suffix for name in self.outputs}
        kept = [e for e in before["provenance"] or [] if e["column"] not in written]
        values = {name + self.suffix: after[name] for name in self.outputs}
        return {**values, "provenance": [*kept, *renamed]}


@dataclass(frozen=True)
class AnnotationResult:
    """How a run ended.

    Attributes:
        run_id: None when there was nothing to do.
        num_shards: Shards that were worked on.
        num_clips: Clips that were annotated.
        skipped: Stage -> clips that it could not work on, which keep what they had.
        seconds: Wall time.
    """

    run_id: str | None
    num_shards: int
    num_clips: int
    skipped: dict[str, int]
    seconds: float


def make_annotation(
    pipeline: Pipeline, names: Sequence[str], suffix: str = "", where: str = ""
) -> Annotation:
    """Returns what to run: the named stages of a pipeline.

    Raises:
        ConfigError: If a stage is not in the pipeline or annotates nothing, or a name is taken.
    """
    known = {cls.name: cls for cls, _ in pipeline.stages}
    can = [name for name, cls in known.items() if _annotates(cls)]
    problems = [
        f"{name}: {'writes no annotation' if name in known else 'not in the pipeline'}"
        for name in names
        if name not in can
    ]
    if problems or not names:
        raise ConfigError(
            f"Nothing to run of {pipeline.source}: {'; '.join(problems) or 'no stage is named'}",
            f"name with --stage one or more of: {', '.join(can)}",
        )
    if suffix and not (suffix.startswith("_") and suffix.isidentifier()):
        raise ConfigError(f"Not a suffix for columns: {suffix}", "such as _qwen3")
    stages = tuple((cls, config) for cls, config in pipeline.stages if cls.name in names)
    chosen = replace(pipeline, stages=stages)
    mark = records.digest(chosen.fingerprint, suffix, where)
    annotation = Annotation(chosen, suffix, where, mark)
    # All annotations add to the provenance.
    taken = sorted(set(_own(list(annotation.columns))) & set(records.CLIP_SCHEMA.names))
    if suffix and taken:
        raise ConfigError(f"Columns of that name exist: {', '.join(taken)}", "another --suffix")
    return annotation


def _annotates(cls: type[Stage]) -> bool:
    """Returns whether a stage can run over clips that are cut already."""
    fixed = {"clip_id", "video_id", "start_ms", "end_ms", *records.MEDIA_COLUMNS}
    written = set(cls.outputs.names)
    return written <= set(records.CLIP_SCHEMA.names) - fixed and set(cls.inputs) <= {
        *records.CLIP_SCHEMA.names,
        *ABSENT,
    }


def annotate(
    annotation: Annotation,
    corpus_url: str,
    console: Console,
    *,
    address: str | None = None,
    again: bool = False,
) -> AnnotationResult:
    """Runs annotation stages over a corpus.

    Args:
        annotation: What to run.
        corpus_url: An existing corpus.
        console: Where progress goes.
        address: Of a Ray cluster; None uses ``RAY_ADDRESS``, or this machine.
        again: Also takes the shards that these settings have annotated already.

    Raises:
        EngineError: If something is wrong that the user can mend.
    """
    start = time.time()
    corpus = Corpus.open(corpus_url)
    if annotation.where:
        _check_condition(corpus, annotation.where)
    with corpus.locked():
        run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        todo, half_done = _todo(corpus, annotation, again)
        console.print(
            f"{len(corpus.names('catalog'))} shards: {len(todo)} to do"
            + (f", {len(half_done)} to finish" if half_done else ""),
            highlight=False,
        )
        if not todo and not half_done:
            return AnnotationResult(None, 0, 0, {}, time.time() - start)
        corpus.take_over(run_id)
        corpus.sweep()
        _declare(corpus, annotation)
        for shard in half_done:
            rewrite_twin(corpus, shard, run_id)
        record = _record(annotation, run_id, corpus)
        stages = [cls.name for cls, _ in annotation.pipeline.stages]
        result = AnnotationResult(run_id, len(todo) + len(half_done), 0, {}, 0.0)
        if todo:
            with ProgressDisplay(console, stages, len(todo), "shards") as display:
                # Ray takes seconds to import; a run with nothing to do never does.
                from dataengine.runner import execute_annotation

                snapshot = execute_annotation(
                    annotation, corpus, run_id, todo, address=address, display=display
                )
            metrics = {name: asdict(counts) for name, counts in snapshot.stages.items()}
            _publish(corpus, run_id, "metrics.json", metrics)
            result = replace(
                result,
                num_clips=snapshot.stages[stages[0]].num_in if snapshot.stages else 0,
                skipped={n: c.num_dropped for n, c in snapshot.stages.items() if c.num_dropped},
            )
        result = replace(result, seconds=time.time() - start)
        _publish(corpus, run_id, "run.json", record | {"finished": True, "seconds": result.seconds})
        return result


def clips_to_annotate(corpus: Corpus, annotation: Annotation, shard: str) -> pa.Table:
    """Returns a shard's clips as the stages read them, in the form `flow.apply_stage` takes.

    A shard without a clip to do gives one row without a clip_id, so that it is marked all the same.
    """
    schema = corpus.clip_schema
    with corpus.open_shard(shard) as file:
        there = [name for name in annotation.inputs if name in file.schema_arrow.names]
        table = file.read(columns=there)
    wanted = _matching(corpus, annotation.where, shard) if annotation.where else None
    clip_ids = table["clip_id"].to_pylist()
    rows = [
        index
        for index, clip_id in enumerate(clip_ids)
        if clip_id is not None and (wanted is None or clip_id in wanted)
    ]
    count = max(len(rows), 1)
    table = table.take(pa.array(rows or [None], pa.int64()))
    for name in annotation.inputs:
        if name not in there:
            table = table.append_column(name, pa.nulls(count, schema.field(name).type))
    drop: Row | None = None
    if not rows:
        drop = {"stage": "", "reason": NOTHING_TO_DO, "detail": "", "retryable": False}
    own = {
        # The unit of progress takes the place of the video.
        "_video": pa.array([{"source": shard}] * count, VIDEO_STRUCT),
        "_subtitles": pa.nulls(count, pa.list_(records.SUBTITLE_STRUCT)),
        "_before": table["provenance"],
        "_drop": pa.array([drop] * count, records.DROP_STRUCT),
    }
    for name, column in own.items():
        table = table.append_column(name, column)
    return table


def _matching(corpus: Corpus, where: str, shard: str) -> set[str]:
    """Returns the ids of a shard's clips that a condition selects."""
    from dataengine.query import sql

    with sql.connect(corpus, shard) as db:
        statement = sql.select_statement(db, where, "clip_id", "clip_id")
        _, batches = sql.run(db, statement.sql)
        return {name for batch in batches for name in batch["clip_id"].to_pylist()}


def store(corpus: Corpus, annotation: Annotation, table: pa.Table, run_id: str) -> None:
    """Writes what the stages made of whole shards into them.

    Raises:
        SupersededError: If another run took the corpus over.
    """
    names = ["clip_id", "provenance", *annotation.outputs, "_before", "_drop", "_video"]
    shards: dict[str, dict[str, Row]] = {}
    for row in table.select(list(dict.fromkeys(names))).to_pylist():
        updates = shards.setdefault(row["_video"]["source"], {})
        if row["_drop"] is None:
            updates[row["clip_id"]] = annotation.update({"provenance": row["_before"]}, row)
    for shard, updates in shards.items():
        rewrite_shard(corpus, shard, updates, annotation.columns, annotation.mark, run_id)


def _check_condition(corpus: Corpus, where: str) -> None:
    """Raises ConfigError for a condition that is wrong, before anything starts."""
    from dataengine.query import sql

    with sql.connect(corpus) as db:
        statement = sql.select_statement(db, where, "clip_id", "clip_id", 0)
        if statement.percentiles:  # its value changes while what it is of is annotated
            first = statement.percentiles[0]
            raise ConfigError(
                "--where of annotate takes values, not percentiles",
                f"p{first.percent:g} of {first.column} is {first.text} now",
            )
        sql.run(db, statement.sql)


def _todo(corpus: Corpus, annotation: Annotation, again: bool) -> tuple[list[str], list[str]]:
    """Returns the shards to annotate, and those of which only the commit is missing."""
    todo, half_done = [], []
    columns = list(annotation.columns)
    for shard in corpus.names("catalog"):
        path = corpus.path("catalog", f"{shard}.parquet")
        twin = pq.read_schema(path, filesystem=corpus.fs).metadata
        if again:
            todo.append(shard)
        elif not is_marked(twin, _own(columns), annotation.mark):
            with corpus.open_shard(shard) as file:
                is_written = is_marked(file.schema_arrow.metadata, _own(columns), annotation.mark)
            (half_done if is_written else todo).append(shard)
    return todo, half_done


def _own(columns: Sequence[str]) -> list[str]:
    """Returns the columns without provenance, which every annotation writes."""
    return [name for name in columns if name != "provenance"]


def _declare(corpus: Corpus, annotation: Annotation) -> None:
    """Notes new columns in ``corpus.json``, before any shard has them."""
    if not annotation.suffix:
        return
    about = json.loads(corpus.fs.cat_file(corpus.path("corpus.json")))  # pyright: ignore[reportArgumentType]  one path gives bytes
    new = {name + annotation.suffix: name for name in annotation.outputs}
    if not new.items() <= about.get("columns", {}).items():
        about["columns"] = {**about.get("columns", {}), **new}
        corpus.publish("corpus.json", lambda file: file.write(json.dumps(about, indent=1).encode()))


def _record(annotation: Annotation, run_id: str, corpus: Corpus) -> dict[str, Any]:
    """Writes down what is run, and returns it."""
    names = [cls.name for cls, _ in annotation.pipeline.stages]
    words = ["annotate", *names, f"--suffix={annotation.suffix}", f"--where={annotation.where}"]
    record = run_record(annotation.pipeline, words, run_id)
    corpus.fs.makedirs(corpus.path("runs", run_id), exist_ok=True)
    # Not pipeline.yaml: `dataengine retry` takes the newest of those to ingest with.
    text = annotation.pipeline.resolved().encode()
    corpus.publish(f"runs/{run_id}/annotate.yaml", lambda file: file.write(text))
    _publish(corpus, run_id, "run.json", record)
    return record


def _publish(corpus: Corpus, run_id: str, name: str, content: object) -> None:
    data = json.dumps(content, indent=1, ensure_ascii=False).encode()
    corpus.publish(f"runs/{run_id}/{name}", lambda file: file.write(data))
