# SPDX-License-Identifier: Apache-2.0
"""What changed between two states: two snapshots of a corpus, or two corpora.

Clips are the same if their ids are; one has changed if any column of the catalog differs, where its media
lies left out. So a corpus that was made twice, or packed into other shards, does not differ from itself.
Media is not compared: a clip's id is made of its video's bytes and its span.

First only ids and a hash of each row are joined; columns are compared of clips whose hashes differ.
Of two states of one corpus, merged files that both are made of are not read at all.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dataengine import records
from dataengine.corpus import CatalogPart, Corpus
from dataengine.errors import ConfigError
from dataengine.query.literals import identifier, quoted
from dataengine.query.sql import (
    catalog_select,
    engine,
    explained,
    first_row,
    run,
    schema_types,
    write_csv,
    write_jsonl,
    write_parquet,
)
from dataengine.terminal import cell

EXAMPLES = 3
"""Clips that are named for each kind of change."""

_SHOWN_CHARS = 60
"""Of a value, on a terminal."""

_SNAPSHOT = re.compile(r"\d{8}T\d{6}-\d{3}")

_STATES = ("before", "after")

_LOCATORS = tuple(name for name, _ in records.LOCATOR_FIELDS)


@dataclass(frozen=True)
class State:
    """A corpus as it is, or as it was when `compact` made a snapshot.

    Attributes:
        corpus: The corpus.
        snapshot: Empty for now.
    """

    corpus: Corpus
    snapshot: str = ""

    @classmethod
    def open(cls, text: str) -> "State":
        """Opens ``CORPUS`` or ``CORPUS@SNAPSHOT``.

        Raises:
            CorpusError: If there is no such corpus.
        """
        url, at, snapshot = text.rpartition("@")
        if at and _SNAPSHOT.fullmatch(snapshot):
            return cls(Corpus.open(url), snapshot)
        return cls(Corpus.open(text))


@dataclass(frozen=True)
class ColumnChange:
    """A column whose values changed.

    Attributes:
        column: Its name.
        num_clips: Clips in which it did.
        examples: Some of them: clip id, value before, value after.
    """

    column: str
    num_clips: int
    examples: tuple[tuple[str, Any, Any], ...]


@dataclass(frozen=True)
class Counts:
    """How many of something there are, and how many changed.

    Attributes:
        before: All in the first state.
        after: All in the second.
        added: Those of the second alone.
        removed: Those of the first alone.
        changed: Those of both that differ.
    """

    before: int
    after: int
    added: int
    removed: int
    changed: int


@dataclass(frozen=True)
class Difference:
    """What is between two states.

    Attributes:
        clips: Counts of clips.
        videos: Counts of videos that have clips; one has changed if any of its clips did.
        columns: Columns of clips that changed, those of most clips first.
        columns_added: Columns that only the second state has; they are not compared.
        columns_removed: Columns that only the first state has.
        examples: Ids of some clips, by ``added`` and ``removed``.
    """

    clips: Counts
    videos: Counts
    columns: tuple[ColumnChange, ...]
    columns_added: tuple[str, ...]
    columns_removed: tuple[str, ...]
    examples: dict[str, list[str]]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        clips = self.clips
        return not (
            clips.added or clips.removed or clips.changed
            or self.columns_added or self.columns_removed
        )  # fmt: skip


def diff(
    before: State, after: State, *, output: Path | None = None, memory: str | None = None
) -> Difference:
    """Compares two states of the catalog.

    Args:
        before: The first.
        after: The second.
        output: File for a row per clip that differs: ``clip_id, video_id, change`` (added, removed,
            changed) and the ``columns`` that changed; .parquet, .csv or .jsonl.
        memory: What DuckDB may hold, such as ``4GB``; the rest goes to the temporary folder.

    Raises:
        ConfigError: If the output's name says no format.
        CorpusError: If there is no such snapshot, or a catalog file is damaged.
    """
    if output is not None and output.suffix not in (".parquet", ".csv", ".jsonl"):
        raise ConfigError(f"--output: {output}", "a name that ends with .parquet, .csv or .jsonl")
    with engine(before.corpus, memory=memory) as db:
        if not after.corpus.is_local:
            db.register_filesystem(after.corpus.fs)
        try:
            return _diff(db, before, after, output)
        except duckdb.Error as error:
            raise explained(db, error) from None


def show(found: Difference, console: Console) -> None:
    """Prints what differs, for reading."""
    table = Table("", "before", "after", "added", "removed", "changed", box=None, pad_edge=False)
    for name, counts in (("clips", found.clips), ("videos", found.videos)):
        numbers = (counts.before, counts.after, counts.added, counts.removed, counts.changed)
        table.add_row(name, *(f"{number:,}" for number in numbers))
    console.print(table)
    if found.columns:
        table = Table("column", "clips", "for example", "before", "after", box=None, pad_edge=False)
        for change in found.columns:
            clip_id, *values = change.examples[0]
            table.add_row(
                change.column, f"{change.num_clips:,}", clip_id,
                *(escape(_short(cell(value))) for value in values),
            )  # fmt: skip
        console.print()
        console.print(table)
    lines = {
        "columns added": found.columns_added,
        "columns removed": found.columns_removed,
        "added, for example": found.examples["added"],
        "removed, for example": found.examples["removed"],
    }
    for word, names in lines.items():
        if names:
            console.print(f"{word}: {', '.join(names)}", highlight=False, markup=False)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


def _diff(
    db: duckdb.DuckDBPyConnection, before: State, after: State, output: Path | None
) -> Difference:
    columns = _add_views(db, before, after)
    names = ", ".join(map(identifier, columns))
    rows = f"select clip_id, video_id, hash({names}) as hash from"
    db.execute(
        "create temp table differing as select coalesce(a.clip_id, b.clip_id) as clip_id, "
        "coalesce(a.video_id, b.video_id) as video_id, "
        "case when b.clip_id is null then 'removed' when a.clip_id is null then 'added' "
        "else 'changed' end as change "
        f"from ({rows} before) a full join ({rows} after) b on a.clip_id = b.clip_id "
        "where a.hash is distinct from b.hash"
    )
    listed = ", ".join(
        f"case when a.{name} is distinct from b.{name} then {quoted(column)} end"
        for column, name in zip(columns, map(identifier, columns), strict=True)
    )
    db.execute("create temp table ids as select clip_id from differing where change = 'changed'")
    db.execute(
        "create temp table changed as select clip_id, "
        f"list_filter([{listed}], lambda name: name is not null) as columns "
        f"from (select {names} from before semi join ids using (clip_id)) a "
        f"join (select {names} from after semi join ids using (clip_id)) b using (clip_id)"
    )
    difference = Difference(
        clips=_clips(db),
        videos=_videos(db),
        columns=_columns(db),
        columns_added=_only(after, before),
        columns_removed=_only(before, after),
        examples={
            change: [
                clip_id
                for (clip_id,) in db.execute(
                    f"select clip_id from differing where change = '{change}' "
                    f"order by clip_id limit {EXAMPLES}"
                ).fetchall()
            ]
            for change in ("added", "removed")
        },
    )
    if output is not None:
        _write(db, output)
    return difference


def _add_views(db: duckdb.DuckDBPyConnection, before: State, after: State) -> list[str]:
    """Makes the views ``before`` and ``after``, ``all_before`` and ``all_after``.

    The first two leave out what is in both because it is the same file.

    Returns:
        The columns that are compared.
    """
    parts = [state.corpus.catalog_parts(state.snapshot) for state in (before, after)]
    own = list(parts)
    if before.corpus.url == after.corpus.url:
        shared = {part.files: part.without for part in parts[0]}
        shared = {p.files: shared[p.files] | p.without for p in parts[1] if p.files in shared}
        own = [[part for part in side if part.files not in shared] for side in parts]
    else:
        shared = {}
    for name, state, every, few, others in (
        ("before", before, parts[0], own[0], parts[1]),
        ("after", after, parts[1], own[1], parts[0]),
    ):
        types = schema_types(db, state.corpus.catalog_schema)
        selects = [catalog_select(state.corpus, few, types)]
        for part in every:
            if part.files in shared:
                # Of a file that both are made of, the shards that only this one takes from it.
                theirs = next(other for other in others if other.files == part.files)
                if alone := sorted(theirs.without - part.without):
                    whole = catalog_select(state.corpus, [CatalogPart(part.files)], types)
                    selects.append(f"{whole} where shard in ({', '.join(map(quoted, alone))})")
        _view(db, name, state, " union all ".join(filter(None, selects)))
        _view(db, f"all_{name}", state, catalog_select(state.corpus, every, types))
    both = set(before.corpus.catalog_schema.names) & set(after.corpus.catalog_schema.names)
    return [
        name
        for name in before.corpus.catalog_schema.names
        if name in both and name not in _LOCATORS
    ]


def _view(db: duckdb.DuckDBPyConnection, name: str, state: State, sql: str) -> None:
    if not sql:
        db.register(f"no_{name}", state.corpus.catalog_schema.empty_table())
        sql = f"select * from no_{name}"
    db.execute(f"create view {name} as {sql}")


def _only(state: State, other: State) -> tuple[str, ...]:
    names = other.corpus.catalog_schema.names
    return tuple(name for name in state.corpus.catalog_schema.names if name not in names)


def _clips(db: duckdb.DuckDBPyConnection) -> Counts:
    before, after = (first_row(db, f"select count(*) from all_{name}")[0] for name in _STATES)
    return Counts(before, after, *_by_change(db, "differing"))


def _videos(db: duckdb.DuckDBPyConnection) -> Counts:
    before, after = (
        first_row(db, f"select count(distinct video_id) from all_{name}")[0] for name in _STATES
    )
    db.execute(
        "create temp table touched as select video_id, "
        "case when not bool_or(there) then 'added' when not bool_or(here) then 'removed' "
        "else 'changed' end as change from ("
        "select video_id, true as there, false as here from all_before union all "
        "select video_id, false, true from all_after) "
        "semi join differing using (video_id) group by video_id"
    )
    return Counts(before, after, *_by_change(db, "touched"))


def _by_change(db: duckdb.DuckDBPyConnection, table: str) -> tuple[int, int, int]:
    counts = dict(db.execute(f"select change, count(*) from {table} group by change").fetchall())
    return counts.get("added", 0), counts.get("removed", 0), counts.get("changed", 0)


def _columns(db: duckdb.DuckDBPyConnection) -> tuple[ColumnChange, ...]:
    found = db.execute(
        f"select name, count(*) as n, min(clip_id, {EXAMPLES}) "
        "from (select clip_id, unnest(columns) as name from changed) "
        "group by name order by n desc, name"
    ).fetchall()
    changes = []
    for column, count, clip_ids in found:
        name = identifier(column)
        ids = ", ".join(map(quoted, clip_ids))
        values = db.execute(
            f"select clip_id, a.{name}, b.{name} from "
            f"(select clip_id, {name} from before where clip_id in ({ids})) a join "
            f"(select clip_id, {name} from after where clip_id in ({ids})) b using (clip_id) "
            "order by clip_id"
        ).fetchall()
        changes.append(ColumnChange(column, count, tuple(values)))
    return tuple(changes)


def _write(db: duckdb.DuckDBPyConnection, output: Path) -> None:
    schema, batches = run(
        db,
        "select clip_id, video_id, change, coalesce(columns, []) as columns "
        "from differing left join changed using (clip_id) order by video_id, clip_id",
    )
    match output.suffix:
        case ".parquet":
            with output.open("wb") as file:
                write_parquet(schema, batches, file)
        case ".csv":
            with output.open("w", encoding="utf-8") as file:
                write_csv(schema, batches, file)
        case _:
            with output.open("w", encoding="utf-8") as file:
                write_jsonl(batches, file)
