# SPDX-License-Identifier: Apache-2.0
"""List files: ``.txt`` with one entry a line, ``.csv``, ``.tsv``, ``.jsonl`` and ``.parquet`` with columns.

A list is read in pieces, never whole. A row may give a span of its video, with a caption and scores:
that is how published annotation lists name clips (InternVid, arXiv 2307.06942: YoutubeID,
Start_timestamp, End_timestamp, Caption, Aesthetic_Score, UMT_Score).
"""

import contextlib
import csv
import datetime
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dataengine import records
from dataengine.errors import ConfigError
from dataengine.stage import Settings

LIST_SUFFIXES = frozenset([".txt", ".csv", ".tsv", ".jsonl", ".parquet"])

_PIECE_ROWS = 10_000
_LONGEST_MS = 10**10
"""115 days: a time beyond this is a mistake, such as milliseconds that were taken for seconds."""

_DEFAULT_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "source": ("source", "url", "path", "video", "file", "source_url", "video_url", "video_path"),
    "youtube_id": ("youtube_id", "ytid", "video_id"),
    "start": ("start_timestamp", "start", "start_time", "start_s"),
    "end": ("end_timestamp", "end", "end_time", "end_s"),
    "start_ms": ("start_ms",),
    "end_ms": ("end_ms",),
    "caption": ("caption", "text"),
    "aesthetic_score": ("aesthetic_score",),
    "video_text_score": ("video_text_score", "umt_score"),
}
"""What a column may be called, best first; case, ``_``, ``-`` and blanks do not count."""


class SourceColumns(Settings):
    """Which columns of a list say what.

    None finds the column by its name: source, url, path, video, file, source_url, video_url or
    video_path; youtube_id, YTID or video_id; Start_timestamp, start, start_time or start_s, the same
    with end; start_ms and end_ms; caption or text; aesthetic_score; video_text_score or UMT_Score.
    Case, ``_``, ``-`` and blanks do not count. An empty text takes no column.
    """

    source: str | None = None
    """URL, ``youtube:ID`` or file; wins over youtube_id where a row has both."""
    youtube_id: str | None = None
    """Eleven characters."""
    start: str | None = None
    """``HH:MM:SS.mmm``, or seconds."""
    end: str | None = None
    """The same."""
    start_ms: str | None = None
    """Milliseconds; wins over start."""
    end_ms: str | None = None
    """The same."""
    caption: str | None = None
    """The span's caption; kept as it is."""
    aesthetic_score: str | None = None
    """The span's aesthetic score."""
    video_text_score: str | None = None
    """Likeness of the span's video and caption, such as InternVid's UMT_Score."""


class SourceSettings(Settings):
    """How lists are read, and what must not come in."""

    columns: SourceColumns = SourceColumns()
    """Which columns of a list say what."""
    exclude: tuple[str, ...] = ()
    """List files of videos to leave out, such as the test sets of known benchmarks (InternVid,
    section 3.1). An entry is a YouTube id or URL, any other URL, a video id of a corpus, or a file
    name with or without its suffix."""


class Entry(NamedTuple):
    """One row of a list.

    Attributes:
        line: Where it stands; in Parquet the number of the row.
        word: What names the video, stripped.
        is_id: Whether ``word`` must be a YouTube id.
        start_ms: Of the span; None if the whole video is meant, or the span is bad.
        end_ms: The same.
        caption: Of the span.
        aesthetic_score: Of the span.
        video_text_score: Of the span.
        bad_span: Whether there is a span that cannot be: no time, or an end before its start.
    """

    line: int
    word: str
    is_id: bool = False
    start_ms: int | None = None
    end_ms: int | None = None
    caption: str | None = None
    aesthetic_score: float | None = None
    video_text_score: float | None = None
    bad_span: bool = False


# -------------------------------------------------------------------------------------- opening


def suffix(name: str) -> str:
    """Returns the suffix of a path or URL in lower case, ``.mp4``; empty if there is none."""
    path = urlsplit(name).path if records.is_url(name) else name
    return PurePosixPath(path).suffix.lower()


def is_list(name: str) -> bool:
    """Returns whether a path or URL names a list rather than a video."""
    return suffix(name) in LIST_SUFFIXES


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system behind an object-store URL, and the path as it names it.

    Raises:
        ConfigError: If the scheme is not known, or its package is missing.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(
            f"A package is missing to read {url}: {error}",
            "install it beside dataengine, e.g. s3fs for s3://, gcsfs for gs://, adlfs for abfs://",
        ) from None
    except ValueError as error:
        raise ConfigError(f"Not an address that can be read: {url} ({error})") from None


@contextlib.contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """Opens a list, wherever it lies, for reading from any place in it."""
    try:
        if records.is_url(name):
            with _fetched(name) as file:
                yield file
        elif records.is_object(name):
            fs, path = file_system(name)
            with fs.open(path, "rb") as file:
                yield cast(BinaryIO, file)
        else:
            with open(name, "rb") as file:
                yield file
    except OSError as error:
        raise ConfigError(f"List cannot be read: {name} ({error.strerror or error})") from None


@contextlib.contextmanager
def _fetched(url: str) -> Iterator[BinaryIO]:
    import requests

    with tempfile.TemporaryFile() as file:
        try:
            with requests.get(url, stream=True, timeout=60) as answer:
                answer.raise_for_status()
                for chunk in answer.iter_content(1 << 20):
                    file.write(chunk)
        except requests.RequestException as error:
            raise ConfigError(f"List cannot be fetched: {url} ({error})") from None
        file.seek(0)
        yield cast(BinaryIO, file)


# -------------------------------------------------------------------------------------- reading


def read_list(
    name: str, columns: SourceColumns | None = None, *, strict: bool = True
) -> Iterator[Entry]:
    """Yields the rows of a list, in order.

    Args:
        name: Path or URL of a list; its suffix says what it is.
        columns: Which columns say what; None finds them by their names.
        strict: Whether a column of ``columns`` that is not there is an error, and half a span too;
            else its usual names stand in.

    Raises:
        ConfigError: With file and line, if the list cannot be read as what it says it is.
    """
    columns = columns or SourceColumns()
    with _opened(name) as file:
        match suffix(name):
            case ".txt":
                yield from _text_entries(name, file)
            case ".jsonl":
                yield from _json_entries(name, file, columns, strict)
            case ".parquet":
                yield from _parquet_entries(name, file, columns, strict)
            case other:
                delimiter = "\t" if other == ".tsv" else ","
                yield from _csv_entries(name, file, delimiter, columns, strict)


def _lines(name: str, file: BinaryIO) -> Iterator[str]:
    """Yields the lines of a UTF-8 text, the byte order mark removed."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"Not UTF-8: {name}, line {number} ({error.reason})", "save the list as UTF-8"
            ) from None
        yield text.removeprefix("\ufeff") if number == 1 else text


def _text_entries(name: str, file: BinaryIO) -> Iterator[Entry]:
    for number, line in enumerate(_lines(name, file), 1):
        word = line.partition(" #")[0].strip()
        if word and not word.startswith("#"):
            yield Entry(number, word)


def _csv_entries(
    name: str, file: BinaryIO, delimiter: str, columns: SourceColumns, strict: bool
) -> Iterator[Entry]:
    reader = csv.reader(_lines(name, file), delimiter=delimiter)
    try:
        header = next(reader, None)
        if header is None:
            raise ConfigError(f"Empty list: {name}")
        found = _find_columns(name, header, columns, strict)
        places = {kind: header.index(column) for kind, column in found.items()}
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ConfigError(
                    f"{name}, line {reader.line_num}: {len(row)} fields, "
                    f"but the header has {len(header)}",
                    "put fields that hold the separator in double quotes",
                )
            yield _entry(reader.line_num, {kind: row[place] for kind, place in places.items()})
    except csv.Error as error:
        raise ConfigError(f"{name}, line {reader.line_num}: {error}") from None


def _json_entries(
    name: str, file: BinaryIO, columns: SourceColumns, strict: bool
) -> Iterator[Entry]:
    # Lines may leave keys out: each set of keys is looked at once, and a column that the user
    # named is missing only when no line has it.
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for number, line in enumerate(_lines(name, file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{name}, line {number}: not a JSON object")
        keys = tuple(row)
        if keys not in found:
            where = f"{name}, line {number}"
            found[keys] = _match_columns(where, keys, columns, defaults=not strict)
        yield _entry(number, {kind: row[column] for kind, column in found[keys].items()})
    if strict and found:
        _check_columns(name, list(dict.fromkeys(key for keys in found for key in keys)), columns)


def _parquet_entries(
    name: str, file: BinaryIO, columns: SourceColumns, strict: bool
) -> Iterator[Entry]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            found = _find_columns(name, table.schema_arrow.names, columns, strict)
            wanted = list(dict.fromkeys(found.values()))
            for batch in table.iter_batches(batch_size=_PIECE_ROWS, columns=wanted):
                values = [batch.column(column).to_pylist() for column in found.values()]
                for row in zip(*values, strict=True):
                    number += 1
                    yield _entry(number, dict(zip(found, row, strict=True)))
    except pa.ArrowException as error:
        raise ConfigError(f"Not a Parquet file that can be read: {name} ({error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"Not UTF-8: {name}, after row {number}") from None


def _find_columns(
    name: str, names: Sequence[str], columns: SourceColumns, strict: bool
) -> dict[str, str]:
    """Returns which of a table's columns says what: kind -> column.

    Raises:
        ConfigError: If no column names the videos; if the table is read strictly, also if a column
            that the user named is missing, or there are starts without ends.
    """
    if strict:
        _check_columns(name, names, columns)
    found = _match_columns(name, names, columns, defaults=not strict)
    for start, end in (("start", "end"), ("start_ms", "end_ms")):
        if strict and (start in found) != (end in found):
            there = start if start in found else end
            raise ConfigError(
                f"{name} has {there} ({found[there]}) but not the other end of a span; "
                f"its columns: {', '.join(names)}",
                f'name both under sources.columns in the pipeline file, or neither: {there}: ""',
            )
    return found


def _check_columns(name: str, names: Sequence[str], columns: SourceColumns) -> None:
    """Raises ConfigError if a column that the user named is missing."""
    for kind, wanted in columns.model_dump().items():
        if wanted and wanted not in names:
            raise ConfigError(
                f"{name} has no column {wanted} (sources.columns.{kind}); "
                f"its columns: {', '.join(names)}"
            )


def _match_columns(
    name: str, names: Sequence[str], columns: SourceColumns, *, defaults: bool
) -> dict[str, str]:
    """Returns which column says what: kind -> column.

    Args:
        name: Of the list, for messages.
        names: Its columns.
        columns: What the user says.
        defaults: Whether the usual names stand in for a column of the user's that is missing.

    Raises:
        ConfigError: If no column names the videos.
    """
    plain = {_plain(column): column for column in reversed(names) if column}
    found = {}
    for kind, usual in _DEFAULT_COLUMNS.items():
        wanted = getattr(columns, kind)
        if wanted and wanted in names:
            found[kind] = wanted
        elif wanted is None or (wanted and defaults):
            match = next((plain[_plain(n)] for n in usual if _plain(n) in plain), None)
            if match is not None:
                found[kind] = match
    if "source" not in found and "youtube_id" not in found:
        raise ConfigError(
            f"No column of {name} names the videos; its columns: {', '.join(names)}",
            "say in the pipeline file which one does:\n"
            "sources:\n  columns: {source: COLUMN}  # or youtube_id: COLUMN",
        )
    return found


def _plain(column: object) -> str:
    return "".join(letter for letter in str(column).lower() if letter not in "_- ")


def _entry(line: int, row: Mapping[str, Any]) -> Entry:
    """Returns a row, by kind of column, as an entry."""
    word, is_id = _text(row.get("source")), False
    if word is None:
        word, is_id = _text(row.get("youtube_id")) or "", True
    start, end = row.get("start_ms"), row.get("end_ms")
    unit_s = 0.001
    if _is_empty(start) and _is_empty(end):
        start, end, unit_s = row.get("start"), row.get("end"), 1.0
    if _is_empty(start) and _is_empty(end):
        return Entry(line, word, is_id)
    start_ms, end_ms = parse_ms(start, unit_s), parse_ms(end, unit_s)
    if start_ms is None or end_ms is None or end_ms <= start_ms:
        return Entry(line, word, is_id, bad_span=True)
    return Entry(
        line,
        word,
        is_id,
        start_ms,
        end_ms,
        _text(row.get("caption")),
        _number(row.get("aesthetic_score")),
        _number(row.get("video_text_score")),
    )


# ----------------------------------------------------------------------------- pure functions


def parse_ms(value: object, unit_s: float = 1.0) -> int | None:
    """Returns a time as milliseconds, or None if it is none.

    Args:
        value: ``HH:MM:SS.mmm``, ``MM:SS``, or a number of ``unit_s``, as text or not.
        unit_s: Seconds that a bare number counts.
    """
    seconds = 0.0
    try:
        match value:
            case str():
                parts = value.replace(",", ".").split(":")
                if len(parts) > 3 or "-" in value or "_" in value:
                    return None
                for part in parts:
                    seconds = seconds * 60 + float(part)
                if len(parts) == 1:
                    seconds *= unit_s
            case datetime.timedelta():
                seconds = value.total_seconds()
            case datetime.time():
                moment = datetime.timedelta(
                    hours=value.hour, minutes=value.minute, seconds=value.second
                )
                seconds = moment.total_seconds() + value.microsecond / 1e6
            case None | bool():
                return None
            case _:
                seconds = float(cast(Any, value)) * unit_s
    except (TypeError, ValueError, OverflowError):
        return None
    if not 0 <= seconds * 1000 <= _LONGEST_MS:  # also false for nan
        return None
    return round(seconds * 1000)


def _is_empty(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, str) and not value.strip())


def _text(value: object) -> str | None:
    """Returns a cell as a stripped text; None if there is nothing in it."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    text = value.strip() if isinstance(value, str) else str(value)
    # Half a surrogate pair can be written in JSON, but in no Parquet file.
    return text.encode(errors="backslashreplace").decode() or None


def _number(value: object) -> float | None:
    """Returns a cell as a finite number, else None."""
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


@cache
def base_of(name: str) -> str:
    """Returns the folder of a list, to which its relative entries are relative."""
    if records.is_url(name) or records.is_object(name):
        return name.rpartition("/")[0]
    return os.path.dirname(os.path.abspath(name))
