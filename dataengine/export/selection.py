# SPDX-License-Identifier: Apache-2.0
"""Which clips an export holds: asked of the catalog once, in the order of their places."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError
from dataengine.export.settings import ExportSettings
from dataengine.query.literals import identifier
from dataengine.query.percentiles import resolve

PLACE_SCHEMA = pa.schema(
    [("clip_id", pa.string()), *records.LOCATOR_FIELDS, ("digest", pa.uint64())]
)
"""Where a chosen clip lies, and a hash of all that the catalog says of it."""

_BATCH_ROWS = 122_880


@dataclass(frozen=True)
class Choice:
    """The clips of an export as SQL.

    Attributes:
        condition: On ``clips``, without percentile literals; empty for all.
        resolved: What the literals came to, as it stands in ``export.json``.
    """

    condition: str
    resolved: dict[str, Any]


def choose(
    db: duckdb.DuckDBPyConnection, settings: ExportSettings, before: dict[str, Any] | None = None
) -> Choice:
    """Returns the condition of an export.

    Args:
        db: See `dataengine.query.sql.connect`.
        settings: What is asked for.
        before: What an earlier run of the same export resolved: its percentiles stay, so that a
            refresh only takes out what is gone and adds what is new.

    Raises:
        ConfigError: If the condition is wrong, or a column is not there.
    """
    names = {row[0] for row in db.execute("select column_name from (describe clips)").fetchall()}
    for option in ("caption", "umt_score", "transcript"):
        column = getattr(settings, option)
        if option in settings.stated and column not in names:
            raise ConfigError(
                f"--{option.replace('_', '-')}: no column {column}",
                "columns: " + ", ".join(sorted(names)),
            )
    if before is None:
        found = resolve(db, settings.where)
        before = {
            "condition": found.condition,
            "percentiles": [asdict(percentile) for percentile in found.percentiles],
        }
    conditions = [before["condition"]]
    if settings.format == "generation":
        if settings.min_aesthetic > 0:
            conditions.append(f"aesthetic_score >= {settings.min_aesthetic!r}")
        conditions.append(f"duration_ms >= {round(settings.min_seconds * 1000)}")
        conditions.append(f"{identifier(settings.caption)} <> ''")
    return Choice(" and ".join(f"({part}\n)" for part in conditions if part), before)


def where_clause(choice: Choice) -> str:
    """Returns the WHERE of a choice; empty for all clips."""
    return f" where {choice.condition}" if choice.condition else ""


def write_places(db: duckdb.DuckDBPyConnection, choice: Choice, path: str) -> int:
    """Writes PLACE_SCHEMA of the chosen clips to a local file, in order; returns their number."""
    columns = [row[0] for row in db.execute("select column_name from (describe clips)").fetchall()]
    places = [name for name, _ in records.LOCATOR_FIELDS]
    content = ", ".join(identifier(name) for name in columns if name not in places)
    reader = db.sql(
        f"select clip_id, shard, row_group, row, hash({content}) as digest "
        f"from clips{where_clause(choice)} order by shard, row_group, row"
    ).to_arrow_reader(_BATCH_ROWS)
    count = 0
    with pq.ParquetWriter(path, PLACE_SCHEMA, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch.cast(PLACE_SCHEMA))
            count += batch.num_rows
    return count


def read_places(path: str) -> Iterator[pa.RecordBatch]:
    """Yields what `write_places` wrote."""
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(_BATCH_ROWS)


def facts(corpus: Corpus, db: duckdb.DuckDBPyConnection, choice: Choice) -> dict[str, Any]:
    """Returns how much was chosen, and of what: for ``export.json`` and the dataset card."""
    row = db.execute(
        "select count(*), count(distinct video_id), coalesce(sum(duration_ms), 0)::bigint "
        f"from clips{where_clause(choice)}"
    ).fetchone()
    assert row is not None  # an aggregate always gives one row
    shards = corpus.names("catalog")
    snapshots = corpus.names("compacted", ".json")
    return {
        "num_clips": row[0],
        "num_videos": row[1],
        "hours": round(row[2] / 3_600_000, 3),
        "corpus_shards": len(shards),
        "corpus_shards_digest": records.digest(*shards),
        "corpus_snapshot": snapshots[-1] if snapshots else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dataengine": version("dataengine"),
        "duckdb": version("duckdb"),  # digests depend on its hash function
    }
