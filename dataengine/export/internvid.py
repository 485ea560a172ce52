# SPDX-License-Identifier: Apache-2.0
"""JSON lines with the columns that InternVid was released with (arXiv 2307.06942).

``YoutubeID``, ``Start_timestamp`` and ``End_timestamp`` (``HH:MM:SS.mmm``), ``Caption``,
``Aesthetic_Score``, ``UMT_Score``. A video that is not from YouTube has its video id of the corpus in
``YoutubeID``. Where there are such videos, every line has one key more, ``source``: the path or URL
that the video came from, null for YouTube's. `dataengine ingest --sources` reads either form.

The lines come from the catalog alone, by video and time; the database makes them, in all threads.
"""

from typing import BinaryIO

import duckdb
import pyarrow as pa

from dataengine.export.pieces import Report
from dataengine.export.selection import Choice, where_clause
from dataengine.export.settings import ExportSettings
from dataengine.query.literals import identifier, quoted
from dataengine.records import YOUTUBE_ID

COLUMNS = (
    "YoutubeID",
    "Start_timestamp",
    "End_timestamp",
    "Caption",
    "Aesthetic_Score",
    "UMT_Score",
)
"""As released, in order."""

_BATCH_ROWS = 10_000


def write_lines(
    db: duckdb.DuckDBPyConnection,
    choice: Choice,
    settings: ExportSettings,
    file: BinaryIO,
    report: Report,
) -> int:
    """Writes the chosen clips as JSON lines; returns their number.

    Args:
        db: See `dataengine.query.sql.connect`.
        choice: Which clips.
        settings: Which columns are the caption and the score.
        file: Gets UTF-8.
        report: Called as clips are done.
    """
    chosen = f"(select * from clips{where_clause(choice)})"
    row = db.execute(
        f"select count(*) from {chosen} where not regexp_full_match(video_id, "
        f"{quoted(YOUTUBE_ID.pattern)})"
    ).fetchone()
    elsewhere = row is not None and row[0] > 0
    fields = {
        "YoutubeID": "video_id",
        "Start_timestamp": _timestamp("start_ms"),
        "End_timestamp": _timestamp("end_ms"),
        "Caption": identifier(settings.caption),
        "Aesthetic_Score": _number("aesthetic_score"),
        "UMT_Score": _number(identifier(settings.umt_score)),
    }
    source = chosen
    if elsewhere:
        fields["source"] = (
            f"case when regexp_full_match(video_id, {quoted(YOUTUBE_ID.pattern)}) then null "
            "else coalesce(source, source_url) end"
        )
        source = (
            f"{chosen} left join (select video_id, source from videos where status = 'kept') "
            "using (video_id)"
        )
    struct = ", ".join(f"{quoted(name)}: {value}" for name, value in fields.items())
    reader = db.sql(
        f"select to_json({{{struct}}})::varchar as line from {source} "
        "order by video_id, start_ms, end_ms"
    ).to_arrow_reader(_BATCH_ROWS)
    count = 0
    for batch in reader:
        lines = batch.column(0).cast(pa.string()).to_pylist()
        file.write(("\n".join(lines) + "\n").encode() if lines else b"")
        count += len(lines)
        report(count)
    return count


def _timestamp(column: str) -> str:
    """Returns SQL of milliseconds as ``HH:MM:SS.mmm``."""
    return (
        f"printf('%02d:%02d:%02d.%03d', {column} // 3600000, {column} // 60000 % 60, "
        f"{column} // 1000 % 60, {column} % 1000)"
    )


def _number(column: str) -> str:
    """Returns SQL of a float as the shortest number that reads back as the same, null if not finite."""
    return f"case when isfinite({column}) then {column}::varchar::double end"
