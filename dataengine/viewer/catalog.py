# SPDX-License-Identifier: Apache-2.0
"""What the viewer asks the catalog: pages of clips, counts, one clip with its video's others.

Pages follow each other by key, not by number: the next page starts behind the last clip's place in
the order, so the thousandth page costs what the first does. A page is found in two steps: the keys
alone from the catalog, which reads few columns of many rows, then what is shown of these few clips
from the catalog files of their shards.
"""

import base64
import binascii
import contextlib
import json
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import duckdb

from dataengine.corpus import CatalogPart, Corpus
from dataengine.errors import ConfigError
from dataengine.query import sql
from dataengine.query.literals import identifier, quoted
from dataengine.query.percentiles import Resolved, resolve

_KEY = ("video_id", "start_ms", "end_ms")
"""Makes every order total: no two clips share these."""

_SHOWN = ("caption", "language", "has_audio", "width", "height", "clip_score", "aesthetic_score")
"""What a page shows of a clip, besides its span and what it is ordered by."""

_MOST_ANSWERS = 200
_MOST_LOCATORS = 50_000
_MOST_SIBLINGS = 5000
_REFRESH_S = 60.0
_SELECT = re.compile(r"\s*(select|with|from)\b", re.IGNORECASE)


class NotFoundError(Exception):
    """There is no such clip, or no longer."""


@dataclass(frozen=True)
class Filter:
    """Which clips are looked at.

    Attributes:
        where: SQL condition on ``clips``, percentile literals allowed; empty for all.
        text: Words that the captions must hold.
        subset: Looks at the clips of this subset alone.
    """

    where: str = ""
    text: str = ""
    subset: str = ""


@dataclass(frozen=True)
class Order:
    """How pages follow each other.

    Attributes:
        column: Of numbers, texts or booleans; empty goes by video and time.
        descending: Clips without a value come last either way.
    """

    column: str = ""
    descending: bool = False


Locator = tuple[str, int, int]
"""Shard, row group, row."""

_Place = tuple[str | None, str, int, int]
"""What a page starts behind: value that the order goes by, video, start, end."""


class Catalog:
    """Answers questions about a corpus' clips from several threads at once.

    One DuckDB database per subset, so that its cache and its memory limit are shared; it is opened again
    when the corpus has changed.

    Args:
        corpus: It is only read, and may grow meanwhile.
        memory: What DuckDB may hold of each database, such as ``2GB``; the rest is spilled.
        threads: None takes all cores.
    """

    def __init__(self, corpus: Corpus, *, memory: str = "2GB", threads: int | None = None) -> None:
        self.corpus = corpus
        self._memory = memory
        self._threads = threads
        self._lock = threading.Lock()
        self._databases: OrderedDict[str, _Database] = OrderedDict()
        self._answers: OrderedDict[Hashable, Any] = OrderedDict()
        self._locators: OrderedDict[str, Locator] = OrderedDict()

    # ------------------------------------------------------------------------------ connections

    @contextlib.contextmanager
    def connection(self, subset: str = "") -> Iterator["Connection"]:
        """Gives a connection for one question; another thread may interrupt it.

        Raises:
            CorpusError: If there is no such subset, or, from the body too, if a file is damaged.
            ConfigError: From the body: if its SQL is wrong.
        """
        database = self._lease(subset)
        try:
            with contextlib.closing(database.db.cursor()) as cursor:
                try:
                    yield Connection(cursor, database)
                except duckdb.Error as error:
                    raise sql.explained(cursor, error) from None
        finally:
            self._release(database)

    def close(self) -> None:
        """Closes what no question uses."""
        with self._lock:
            retired = [*self._databases.values()]
            self._databases.clear()
        for database in retired:
            self._retire(database)

    def _lease(self, subset: str) -> "_Database":
        stamp = self._stamp(subset)
        with self._lock:
            database = self._databases.get(subset)
            retired = []
            if database is None or database.stamp != stamp:
                retired.append(self._databases.pop(subset, None))
                database = _Database(self.corpus, subset, stamp, self._memory, self._threads)
                self._databases[subset] = database
                if len(self._databases) > 3:
                    retired.append(self._databases.popitem(last=False)[1])
            self._databases.move_to_end(subset)
            database.leases += 1
        for old in filter(None, retired):
            self._retire(old)
        return database

    def _release(self, database: "_Database") -> None:
        with self._lock:
            database.leases -= 1
            close = database.retired and not database.leases
        if close:
            database.close()

    def _retire(self, database: "_Database") -> None:
        with self._lock:
            database.retired = True
            close = not database.leases
        if close:
            database.close()

    def _stamp(self, subset: str) -> Hashable:
        """Returns what changes when the corpus does; in an object store, that is once a minute."""
        if not self.corpus.is_local:
            return int(time.monotonic() / _REFRESH_S)
        stamps = []
        for name in ("corpus.json", "catalog", "compacted", "videos", f"subsets/{subset}.parquet"):
            with contextlib.suppress(OSError):
                stamps.append(self.corpus.fs.ukey(self.corpus.path(name)))
        return tuple(stamps)

    # -------------------------------------------------------------------------------- questions

    def resolved(self, connection: "Connection", wanted: Filter) -> Resolved:
        """Returns the condition of a filter with its percentiles worked out.

        Raises:
            ConfigError: If the condition is no SQL expression, or a whole SELECT.
        """
        if _SELECT.match(wanted.where):
            raise ConfigError(
                "A condition is expected here, not a whole SELECT",
                "such as: clip_score > p70 and language = 'en'; dataengine query takes a SELECT",
            )

        def work() -> Resolved:
            db = connection.db
            found = resolve(db, sql.with_text(db, wanted.where, wanted.text))
            # Wrong names and types are found here, where they are the reader's own words.
            condition = f" where {found.condition}\n" if found.condition else ""
            sql.run(db, f"select 1 from clips{condition} limit 0")
            return found

        return self._remembered(connection, ("resolved", wanted), work)

    def page(
        self, connection: "Connection", wanted: Filter, order: Order, after: str, limit: int
    ) -> dict[str, Any]:
        """Returns one page of clips.

        Args:
            connection: See `connection`, of the filter's subset.
            wanted: Which clips.
            order: How they follow each other.
            after: The answer's ``next`` of the page before; empty for the first.
            limit: Clips on the page.

        Returns:
            ``clips`` (with ``clip_id``, span, caption and what the order goes by), ``next`` (None on the
            last page) and ``percentiles``.

        Raises:
            ConfigError: If the condition, the order or ``after`` is wrong.
        """
        resolved = self.resolved(connection, wanted)
        kind = self._order_type(connection, order)
        passing = [f"({resolved.condition}\n)"] if resolved.condition else []
        key = _decoded(after) if after else None
        behind = [_behind(order, kind, key)] if key else []
        bounds = self._bounds(connection, passing, order, kind, key, limit + 1)
        column = f"{identifier(order.column)} as _value" if order.column else "null as _value"
        # Turned into text outside, or it would be done for every clip.
        statement = (
            "select * replace (_value::varchar as _value) from ("
            f"select video_id, start_ms, end_ms, shard, row_group, row, {column} from clips"
            f"{_where([*passing, *bounds, *behind])} order by {_order_by(order)} "
            f"limit {int(limit) + 1})"
        )
        _, batches = sql.run(connection.db, statement)
        rows = [row for batch in batches for row in batch.to_pylist()]
        more, rows = len(rows) > limit, rows[:limit]
        clips = self._shown(connection, rows, order)
        last = rows[-1] if rows else None
        following = [last["_value"], *(last[name] for name in _KEY)] if last and more else None
        return {
            "clips": clips,
            "next": _encoded(following) if following else None,
            "percentiles": [asdict(percentile) for percentile in resolved.percentiles],
        }

    def count(self, connection: "Connection", wanted: Filter) -> dict[str, Any]:
        """Returns how many ``clips``, ``videos`` and ``hours`` pass a filter."""
        resolved = self.resolved(connection, wanted)

        def work() -> dict[str, Any]:
            condition = f" where {resolved.condition}\n" if resolved.condition else ""
            _, batches = sql.run(connection.db, f"select {sql.COUNTS} from clips{condition}")
            return next(row for batch in batches for row in batch.to_pylist())

        return self._remembered(connection, ("count", wanted), work)

    def select(self, connection: "Connection", wanted: Filter, order: Order) -> str:
        """Returns the SQL of all rows that pass, all columns.

        By video and time, rows come as they are stored: files one after the other, inside which they
        are in this order. That needs no sort, so a whole corpus can be streamed.
        """
        resolved = self.resolved(connection, wanted)
        self._order_type(connection, order)
        statement = "select * from clips"
        if resolved.condition:
            statement += f" where {resolved.condition}\n"
        return f"{statement} order by {_order_by(order)}" if order.column else statement

    def known_locator(self, clip_id: str) -> Locator | None:
        """Returns where a clip's media lay when a page showed it; None if none did."""
        with self._lock:
            return self._locators.get(clip_id)

    def locate(self, connection: "Connection", clip_id: str) -> Locator:
        """Returns where a clip's media lies.

        Args:
            connection: Of the whole corpus.
            clip_id: As a reader sent it; any text.

        Raises:
            NotFoundError: If the catalog holds no such clip.
        """
        video_id, start_ms, end_ms = _parts(clip_id)
        rows = connection.db.execute(
            "select shard, row_group, row from clips "
            "where video_id = ? and start_ms = ? and end_ms = ?",
            [video_id, start_ms, end_ms],
        ).fetchall()
        if not rows:
            with self._lock:
                self._locators.pop(clip_id, None)
            raise NotFoundError(f"There is no clip {clip_id} in the corpus, or no longer")
        self._remember_locators({clip_id: rows[0]})
        return rows[0]

    def clip(self, connection: "Connection", clip_id: str) -> dict[str, Any]:
        """Returns everything the catalog says of a clip, and the video's other clips.

        Args:
            connection: Of the whole corpus.
            clip_id: As a reader sent it; any text.

        Returns:
            ``clip`` (its row) and ``siblings`` (``clip_id``, ``start_ms``, ``end_ms`` and ``caption``
            of the clips of the same video, itself among them, in order).

        Raises:
            NotFoundError: If there is no such clip.
        """
        twin = self._twins(connection, [self.locate(connection, clip_id)[0]])
        rows = _rows(connection, f"select * from ({twin}) where clip_id = {quoted(clip_id)}")
        if not rows:
            raise NotFoundError(f"Clip {clip_id} was removed")
        siblings = _rows(
            connection,
            f"select clip_id, start_ms, end_ms, caption from ({twin}) where video_id = "
            f"{quoted(rows[0]['video_id'])} order by start_ms, end_ms limit {_MOST_SIBLINGS}",
        )
        return {"clip": plain(rows[0]), "siblings": siblings}

    # ---------------------------------------------------------------------------------- parts

    def _order_type(self, connection: "Connection", order: Order) -> str:
        if order.column and order.column not in connection.orders:
            raise ConfigError(
                f"Clips cannot be ordered by {order.column}",
                f"columns: {', '.join(connection.orders)}",
            )
        return connection.types.get(order.column, "")

    def _bounds(
        self,
        connection: "Connection",
        passing: list[str],
        order: Order,
        kind: str,
        key: _Place | None,
        limit: int,
    ) -> list[str]:
        """Returns conditions that the next clips in order fulfil and few others; none if there are none.

        Finding them reads one column. Without them the keys of every clip would be read, most of them
        for nothing.
        """
        if not order.column or (key and key[0] is None):
            return []
        column = identifier(order.column)
        ahead, back = ("<", ">") if order.descending else (">", "<")
        beyond, up_to = f"{column} is not null", []
        if key and key[0] is not None:
            start = f"cast({quoted(key[0])} as {kind})"
            beyond, up_to = f"{column} {ahead} {start}", [f"{column} {ahead}= {start}"]
        found = connection.db.execute(
            f"select _value::varchar from (select {column} as _value from clips"
            f"{_where([*passing, beyond])} order by _value {'desc' if order.descending else 'asc'} "
            f"limit {int(limit)})"
        ).fetchall()
        if len(found) < limit:
            return []
        return [*up_to, f"{column} {back}= cast({quoted(found[-1][0])} as {kind})"]

    def _shown(
        self, connection: "Connection", rows: list[dict[str, Any]], order: Order
    ) -> list[dict[str, Any]]:
        """Returns what is shown of clips, by their keys."""
        if not rows:
            return []
        locators = {
            f"{row['video_id']}_{row['start_ms']}_{row['end_ms']}": (
                (row["shard"], row["row_group"], row["row"])
            )
            for row in rows
        }
        self._remember_locators(locators)
        names = ["clip_id", *_SHOWN]
        if order.column and order.column not in (*names, *_KEY, "duration_ms"):
            names.append(order.column)
        twins = self._twins(connection, sorted({row["shard"] for row in rows}))
        found = _rows(
            connection,
            f"select {', '.join(map(identifier, names))} from ({twins}) "
            f"where clip_id in ({', '.join(map(quoted, locators))})",
        )
        shown = {row["clip_id"]: plain(row) for row in found}
        return [
            {
                "clip_id": clip_id,
                **{name: row[name] for name in _KEY},
                "duration_ms": row["end_ms"] - row["start_ms"],
                **shown.get(clip_id, {}),
            }
            for clip_id, row in zip(locators, rows, strict=True)
        ]

    def _twins(self, connection: "Connection", shards: list[str]) -> str:
        """Returns the SELECT over the catalog files of shards that the catalog named."""
        files = tuple(self.corpus.path("catalog", f"{shard}.parquet") for shard in shards)
        return sql.catalog_select(self.corpus, [CatalogPart(files)], connection.types)

    def _remember_locators(self, locators: dict[str, Locator]) -> None:
        with self._lock:
            self._locators.update(locators)
            while len(self._locators) > _MOST_LOCATORS:
                self._locators.popitem(last=False)

    def _remembered(
        self, connection: "Connection", question: Hashable, work: Callable[[], Any]
    ) -> Any:
        """Returns the answer to a question asked before of the same state of the corpus."""
        key = (connection.database.stamp, question)
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        answer = work()
        with self._lock:
            self._answers[key] = answer
            if len(self._answers) > _MOST_ANSWERS:
                self._answers.popitem(last=False)
        return answer


class _Database:
    """One open DuckDB database."""

    def __init__(
        self, corpus: Corpus, subset: str, stamp: Hashable, memory: str, threads: int | None
    ) -> None:
        self.stamp = (subset, stamp)
        self.leases = 0
        self.retired = False
        with contextlib.ExitStack() as stack:
            self.db = stack.enter_context(
                sql.connect(corpus, subset=subset, memory=memory, threads=threads)
            )
            rows = self.db.execute("select column_name, column_type from (describe clips)")
            self.types: dict[str, str] = dict(rows.fetchall())
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Connection:
    """A connection for one question, and the database it goes to."""

    db: duckdb.DuckDBPyConnection
    database: _Database

    @property
    def types(self) -> dict[str, str]:
        """The columns of ``clips`` and their types in SQL."""
        return self.database.types

    @property
    def orders(self) -> list[str]:
        """The columns that clips can be ordered by."""
        return [name for name, kind in self.types.items() if _is_orderable(kind)]


def plain(value: Any) -> Any:
    """Returns a value as JSON can say it: numbers that are none become texts."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list():
            return [plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return str(value)


def _where(conditions: list[str]) -> str:
    return f" where {' and '.join(conditions)}" if conditions else ""


def _order_by(order: Order) -> str:
    direction = "desc" if order.descending else "asc"
    if not order.column:
        return ", ".join(f"{name} {direction}" for name in _KEY)
    return f"{identifier(order.column)} {direction} nulls last, {', '.join(_KEY)}"


def _rows(connection: Connection, statement: str) -> list[dict[str, Any]]:
    _, batches = sql.run(connection.db, statement)
    return [row for batch in batches for row in batch.to_pylist()]


def _is_orderable(kind: str) -> bool:
    return "[" not in kind and not kind.startswith(("STRUCT", "MAP", "BLOB"))


def _parts(clip_id: str) -> tuple[str, int, int]:
    """Returns what a clip's id is made of."""
    parts = clip_id.rsplit("_", 2)
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and len(p) < 16 for p in parts[1:]):
        raise NotFoundError(f"There is no clip {clip_id[:200]}")
    return parts[0], int(parts[1]), int(parts[2])


def _encoded(key: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def _decoded(after: str) -> _Place:
    try:
        match json.loads(base64.urlsafe_b64decode(after)):
            case [None | str() as value, str() as video_id, int() as start_ms, int() as end_ms]:
                return value, video_id, start_ms, end_ms
    except (binascii.Error, ValueError, RecursionError):
        pass
    raise ConfigError("This page cannot be found again", "start with the first page")


def _behind(order: Order, kind: str, key: _Place) -> str:
    """Returns SQL that is true of the clips that come behind one."""
    value, video_id, start_ms, end_ms = key
    video = quoted(video_id)
    back = order.descending and not order.column
    sign = "<" if back else ">"
    # Said so that row groups of other videos need not be read.
    tie = (
        f"(video_id {sign}= {video} and (video_id {sign} {video} or start_ms {sign} {start_ms} "
        f"or (start_ms = {start_ms} and end_ms {sign} {end_ms})))"
    )
    if not order.column:
        return tie
    column = identifier(order.column)
    if value is None:
        return f"({column} is null and {tie})"
    bound = f"cast({quoted(value)} as {kind})"
    sign = "<" if order.descending else ">"
    return f"({column} {sign} {bound} or ({column} = {bound} and {tie}) or {column} is null)"
