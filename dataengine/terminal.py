# SPDX-License-Identifier: Apache-2.0
"""What the commands share: messages on stderr, data on stdout or in a file."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

LIVE = Console(stderr=True)
"""Progress and messages; stdout is for data."""

CorpusArgument = Annotated[str, typer.Argument(help="Folder or URL of a corpus.")]
DataArgument = Annotated[str, typer.Argument(help="CORPUS, or CORPUS#SUBSET.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs, on stdout.")]


def say(text: str) -> None:
    """Writes a message as it is: brackets are no markup, long lines are not broken."""
    LIVE.print(text, highlight=False, markup=False, soft_wrap=True)


class OutputFormat(StrEnum):
    """How rows are written."""

    TABLE = "table"
    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


def print_table(
    names: Sequence[str], rows: Iterable[Mapping[str, Any]], output: Path | None = None
) -> None:
    """Prints rows as a table, on a terminal or into a file, and their number."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    count = 0
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row.values()))
        count += 1
    with text_output(output) as file:
        console(file).print(table)
    LIVE.print(f"{count:,} row{'s' * (count != 1)}", highlight=False)


def console(file: TextIO) -> Console:
    """Returns a console for results: in a file, lines are not cut at a terminal's width."""
    return Console(file=file, width=None if file.isatty() else 200)


def cell(value: object) -> str:
    """Returns a value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def text_output(output: Path | None) -> Iterator[TextIO]:
    """Opens a file for text, or stdout, which stays open."""
    if output is None:
        yield sys.stdout
        return
    with open(output, "w", encoding="utf-8") as file:
        yield file
