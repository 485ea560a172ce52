# SPDX-License-Identifier: Apache-2.0
"""Percentile literals: ``clip_score > p70`` keeps the top 30 % without knowing the scores' scale.

``p70`` stands for the smallest value of the column it is compared with that at least 70 % of the
column's values do not exceed (NumPy's ``inverted_cdf``), nulls left out. The values are those of the
clips that pass the *other* conditions, joined by AND, that hold no percentile themselves: in
``duration_ms between 1000 and 120000 and clip_score > p70`` the top 30 % of the clips of that length.
``over_all`` counts all clips instead. A digit group may follow an underscore: ``p99_5`` is 99.5 %.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from dataengine.errors import ConfigError
from dataengine.query.literals import quoted

_SORTED_CLIPS = 2_000_000
"""Up to so many clips, a percentile is found by sorting them."""

_MARGIN = 0.01
"""How far, as a share of the values, a quantile may lie from where a sample says."""

_MOST_INSIDE = 0.1
"""More values than this share between the bounds are not sorted: many are equal."""

_LITERAL = re.compile(r"p(\d{1,3})(?:_(\d{1,6}))?", re.IGNORECASE)


@dataclass(frozen=True)
class Percentile:
    """One percentile literal and what it came to.

    Attributes:
        column: The expression it is compared with, as SQL.
        percent: In [0, 100].
        value: As SQL, of the column's type; ``NULL`` where no clip has a value.
    """

    column: str
    percent: float
    value: str

    @property
    def text(self) -> str:
        """The value as a person reads it."""
        return self.value.partition("'")[2].rpartition("'")[0] or "nothing: no clip has a value"


@dataclass(frozen=True)
class Resolved:
    """A condition without percentile literals.

    Attributes:
        condition: SQL; empty for all clips.
        percentiles: What each literal came to, in the order of the text.
    """

    condition: str
    percentiles: tuple[Percentile, ...] = ()


def resolve(db: duckdb.DuckDBPyConnection, condition: str, *, over_all: bool = False) -> Resolved:
    """Replaces the percentile literals of a condition on ``clips`` by values.

    Args:
        db: With the view ``clips``.
        condition: SQL; a name such as ``p70`` that is a column of ``clips`` stays a column.
        over_all: Takes percentiles over all clips, not over those that pass the other conditions.

    Raises:
        ConfigError: If the condition is no SQL expression, or a percentile is not compared with a
            column or lies above 100.
        duckdb.Error: If a column is unknown.
    """
    if not condition.strip():
        return Resolved("")
    # In brackets it must be one expression, without them it must not close a bracket it has not
    # opened. The line break ends a comment that it may end with.
    _parse(db, f"select * from clips where {condition}\n")
    tree = _parse(db, f"select * from clips where ({condition}\n)")
    where = tree["statements"][0]["node"]["where_clause"]
    columns = {
        name.lower()
        for (name,) in db.execute("select column_name from (describe clips)").fetchall()
    }
    found = list(_literals({"where": where}, columns))
    if not found:
        return Resolved(condition.strip())
    terms = where["children"] if where["type"] == "CONJUNCTION_AND" else [where]
    base = (
        [] if over_all else [term for term in terms if not any(_literals({"term": term}, columns))]
    )
    others = _conjunction(db, base)
    percentiles = []
    for literal in found:
        column = _sql(db, literal.target)
        value = _quantile(db, column, literal.percent / 100, others)
        cast = _parse(db, f"select {value}")["statements"][0]["node"]["select_list"][0]
        literal.parent[literal.key] = cast
        percentiles.append(Percentile(column, literal.percent, value))
    return Resolved(_conjunction(db, terms), tuple(percentiles))


def _quantile(db: duckdb.DuckDBPyConnection, column: str, share: float, others: str) -> str:
    """Returns the SQL of a quantile, exact, of the clips that pass the other conditions."""
    values = f"(select {column} as t from clips" + (f" where {others}" if others else "") + ")"
    ((_, kind, *_),) = db.execute(f"describe select {column} as t from clips").fetchall()
    ((num_clips,),) = db.execute("select count(*) from clips").fetchall()
    found = _narrowed(db, values, kind, share) if num_clips > _SORTED_CLIPS else None
    if found is None:
        ((found,),) = db.execute(
            f"select quantile_disc(t, {share!r})::varchar from {values}"
        ).fetchall()
    return f"cast(null as {kind})" if found is None else _value(found, kind)


def _narrowed(db: duckdb.DuckDBPyConnection, values: str, kind: str, share: float) -> str | None:
    """Returns a quantile of many values without holding them: those around it are found by a sample.

    Returns:
        The value's text; None where the sample misleads, or too many values are equal to it.
    """
    wanted = (max(0.0, share - _MARGIN), min(1.0, share + _MARGIN))
    ((low, high),) = db.execute(
        f"select quantile_disc(t, {wanted[0]!r})::varchar, quantile_disc(t, {wanted[1]!r})::varchar "
        f"from (from {values} using sample 1% (system))"
    ).fetchall()
    if low is None:
        return None
    low, high = _value(low, kind), _value(high, kind)
    ((num_values, below, inside),) = db.execute(
        f"select count(t), count(*) filter (t < {low}), count(*) filter (t between {low} and {high}) "
        f"from {values}"
    ).fetchall()
    rank = max(1, math.ceil(share * num_values))
    if not below < rank <= below + inside or inside > _MOST_INSIDE * num_values:
        return None
    ((found,),) = db.execute(
        f"select t::varchar from {values} where t between {low} and {high} "
        f"order by t limit 1 offset {rank - below - 1}"
    ).fetchall()
    return found


def _value(text: str, kind: str) -> str:
    return f"cast({quoted(text)} as {kind})"


@dataclass(frozen=True)
class _Literal:
    percent: float
    target: dict[str, Any]
    parent: dict[str, Any]
    key: str


def _literals(node: Any, columns: set[str]) -> Iterator[_Literal]:
    """Yields the percentile literals of a syntax tree, with what each is compared with."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    kind = node.get("type")  # of a value it is a dict
    sides: dict[Any, str] = {}
    if kind in ("COMPARE_BETWEEN", "COMPARE_NOT_BETWEEN"):
        sides = {"lower": "input", "upper": "input"}
    elif isinstance(kind, str) and kind.startswith("COMPARE_"):
        sides = {"left": "right", "right": "left"}
    for key, child in node.items():
        percent = _percent(child, columns)
        if percent is None:
            yield from _literals(child, columns)
            continue
        target = node.get(sides.get(key, ""))
        if target is None or not _has_column(target, columns):
            raise ConfigError(
                f"{child['column_names'][0]} is a percentile and must be compared with a column",
                "such as: clip_score > p70",
            )
        yield _Literal(percent, target, node, key)


def _has_column(node: Any, columns: set[str]) -> bool:
    """Returns whether an expression depends on a column."""
    if isinstance(node, list):
        return any(_has_column(child, columns) for child in node)
    if not isinstance(node, dict):
        return False
    if node.get("type") == "COLUMN_REF":
        return _percent(node, columns) is None
    return any(_has_column(child, columns) for child in node.values())


def _percent(node: Any, columns: set[str]) -> float | None:
    """Returns the percentage that a column reference stands for, or None."""
    if not isinstance(node, dict) or node.get("type") != "COLUMN_REF":
        return None
    names = node["column_names"]
    match = _LITERAL.fullmatch(names[0]) if len(names) == 1 else None
    if match is None or names[0].lower() in columns:
        return None
    percent = float(f"{match[1]}.{match[2] or 0}")
    if percent > 100:
        raise ConfigError(f"{names[0]}: a percentile lies between p0 and p100")
    return percent


def _parse(db: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    row = db.execute("select json_serialize_sql(?)", [sql]).fetchone()
    assert row is not None
    tree = json.loads(row[0])
    if tree["error"]:
        message = " ".join(tree.get("error_message", "it is no SQL").split())
        raise ConfigError(f"The query cannot be run: {message}")
    if len(tree["statements"]) != 1:
        raise ConfigError("Expected one condition or one SELECT")
    return tree


def _sql(db: duckdb.DuckDBPyConnection, expression: dict[str, Any]) -> str:
    """Returns an expression's SQL."""
    tree = _parse(db, "select 1")
    tree["statements"][0]["node"]["select_list"] = [expression]
    row = db.execute("select json_deserialize_sql(?::json)", [json.dumps(tree)]).fetchone()
    assert row is not None
    return row[0].strip().removeprefix("SELECT ").removesuffix(";")


def _conjunction(db: duckdb.DuckDBPyConnection, terms: list[dict[str, Any]]) -> str:
    return " AND ".join(f"({_sql(db, term)})" for term in terms)
