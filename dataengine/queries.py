# SPDX-License-Identifier: Apache-2.0
"""Labels of datasets and phrases from texts -> one list of action queries (InternVid section 3.1).

Every line that goes in has an end that can be looked up: a query, a duplicate of which, or why it is
none. The same input gives the same bytes.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from rapidfuzz.distance import OSA

from dataengine.errors import ConfigError
from dataengine.phrases import phrase_stems, plain_phrase
from dataengine.prompts import one_line
from dataengine.stage import Settings

KEPT, DUPLICATE, NEAR_DUPLICATE = "kept", "duplicate", "near_duplicate"
EMPTY, TOO_LONG = "empty", "too_long"
"""How a label ends; `dataengine.actions` adds what happens to a model's answers."""

LABEL_SUFFIXES = (".txt", ".csv", ".tsv")
_LABEL_COLUMNS = (
    "label",
    "name",
    "action",
    "class",
    "phrase",
    "query",
    "activity",
    "text",
    "display_name",
)
_NUMBERED = re.compile(r"\s*\d+[\s,;:.)]+(?=\S)")


class MergeSettings(Settings):
    """What counts as the same query."""

    max_words: int = Field(default=12, ge=1)
    """Longer labels are sentences, which a search does not find."""
    max_chars: int = Field(default=100, ge=1)
    """The same, for scripts without blanks and for what is no words at all."""
    typo_letters: int = Field(default=7, ge=2)
    """English words of at least so many letters that begin alike and differ by one letter (or by two
    that changed places) are one word; shorter ones are often two (hair, chair)."""


@dataclass(frozen=True, slots=True)
class Label:
    """A line that may become a query.

    Attributes:
        input: File.
        line: Where it stands; of a phrase from a text, the first line of its piece.
        text: As it stands there.
        outcome: Why it is no query already; empty for one that is still to be looked at.
    """

    input: str
    line: int
    text: str
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a label: ``query`` is the one it became or repeats, empty if none."""

    input: str
    line: int
    text: str
    outcome: str
    query: str = ""


# ----------------------------------------------------------------------------------------- reading


def read_labels(path: Path) -> Iterator[Label]:
    """Yields the labels of a ``.txt`` (one a line), ``.csv`` or ``.tsv`` file.

    Numbers before the labels are taken off if all lines begin with one. Of a table, the column is
    taken whose header says label, name, action ..., else the one with the most letters.

    Raises:
        ConfigError: If the file cannot be read, or is of another kind.
    """
    if path.suffix.lower() not in LABEL_SUFFIXES:
        raise ConfigError(f"Not a list of labels: {path}", f"known: {', '.join(LABEL_SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Not UTF-8: {path} ({error.reason})", "save the list as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"Cannot be read: {path} ({error.strerror})") from None
    if path.suffix.lower() == ".txt":
        # Lines as an editor counts them; splitlines() would also break at form feeds and the like.
        yield from _numbered_labels(str(path), enumerate(io.StringIO(text, newline=None), 1))
    else:
        yield from _table_labels(str(path), text, "\t" if path.suffix.lower() == ".tsv" else ",")


def _numbered_labels(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[Label]:
    there = [(number, line.strip()) for number, line in lines]
    there = [(number, line) for number, line in there if line and line[0] != "#"]
    numbered = bool(there) and all(_NUMBERED.match(line) for _, line in there)
    for number, line in there:
        yield Label(name, number, _NUMBERED.sub("", line, count=1) if numbered else line)


def _table_labels(name: str, text: str, delimiter: str) -> Iterator[Label]:
    # Strict: a quotation mark that is never closed would take the rest of the file for one label.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ConfigError(
            f"{name}, line {reader.line_num}: {error}",
            "a cell that holds a quotation mark stands in quotation marks, the mark doubled",
        ) from None
    if not rows:
        return
    header = [cell.strip().lower() for cell in rows[0][1]]
    named = [header.index(word) for word in _LABEL_COLUMNS if word in header]
    if named:
        rows = rows[1:]
    letters = [
        sum(character.isalpha() for _, row in rows if at < len(row) for character in row[at])
        for at in range(max((len(row) for _, row in rows), default=0))
    ]
    if not letters:
        return
    # "label" is often the number of the class, and "name" what it is called.
    spoken = [at for at in named if at < len(letters) and letters[at]]
    column = next(iter(spoken), letters.index(max(letters)))
    for number, row in rows:
        yield Label(name, number, row[column].strip() if column < len(row) else "")


# ----------------------------------------------------------------------------------------- merging


def merge(labels: Sequence[Label], settings: MergeSettings) -> tuple[list[str], list[Ended]]:
    """Returns the queries, in order of first appearance, and how every label ended, in order.

    The first of several near-duplicates stays, as it was written.
    """
    phrases = [plain_phrase(label.text) if not label.outcome else "" for label in labels]
    too_long = {
        phrase
        for phrase in phrases
        if len(phrase) > settings.max_chars or len(phrase.split()) > settings.max_words
    }
    stems = {
        phrase: phrase_stems(phrase) for phrase in phrases if phrase and phrase not in too_long
    }
    spelling = one_spelling(stems.values(), settings.typo_letters)
    by_phrase: dict[str, str] = {}
    by_key: dict[str, str] = {}
    ended = []
    for label, phrase in zip(labels, phrases, strict=True):
        outcome, query = label.outcome, ""
        if outcome:
            pass
        elif not phrase:
            outcome = EMPTY
        elif phrase in too_long:
            outcome = TOO_LONG
        elif phrase in by_phrase:
            outcome, query = DUPLICATE, by_phrase[phrase]
        else:
            # Joined, so that "basket ball" is "basketball".
            key = "".join(spelling.get(stem, stem) for stem in stems[phrase])
            outcome = NEAR_DUPLICATE if key in by_key else KEPT
            query = by_phrase[phrase] = by_key.setdefault(key, phrase)
        ended.append(Ended(label.input, label.line, label.text, outcome, query))
    return list(by_key.values()), ended


def one_spelling(stems: Iterable[Sequence[str]], letters: int) -> dict[str, str]:
    """Returns the rarer spelling -> the more frequent one, of long words that differ by a letter.

    Only words of the letters a to z are compared: a character of Chinese is a word of its own, and
    numbers that differ by a digit are two.

    Of equally frequent ones the first stays. Candidates are words that have a form in common after one
    letter is left out, so the work grows with the number of words, not with its square. A word that
    stands for others is never replaced itself.
    """
    counts = Counter(
        word
        for words in stems
        for word in words
        if len(word) >= letters and word.isascii() and word.isalpha()
    )
    # most_common keeps the order of appearance among equals.
    rank = {word: place for place, (word, _) in enumerate(counts.most_common())}
    shortened: dict[str, list[str]] = defaultdict(list)
    for word in rank:
        for at in range(1, len(word)):
            shortened[word[:at] + word[at + 1 :]].append(word)
    pairs = set()
    for short, words in shortened.items():
        near = [*words, short] if short in rank else words
        pairs.update((rank[a], rank[b], a, b) for a in near for b in near if rank[a] < rank[b])
    spelling: dict[str, str] = {}
    standing: set[str] = set()
    for _, _, common, rare in sorted(pairs):
        if rare in spelling or common in spelling or rare in standing:
            continue
        if OSA.distance(rare, common, score_cutoff=1) <= 1:
            spelling[rare] = common
            standing.add(common)
    return spelling


# ----------------------------------------------------------------------------------------- writing


def write_queries(
    output: Path,
    queries: Sequence[str],
    ended: Sequence[Ended],
    about: Mapping[str, Any],
    report: Path | None = None,
) -> dict[str, Any]:
    """Writes the list, ``<output>.json`` with where it comes from, and how every label ended.

    Args:
        output: One query a line.
        queries: Of `merge`.
        ended: Of `merge`.
        about: Inputs with hashes, settings, models.
        report: JSON lines; None writes none.

    Returns:
        What went into ``<output>.json``.
    """
    body = "".join(f"{query}\n" for query in queries)
    record = {
        "num_queries": len(queries),
        "sha256": hashlib.sha256(body.encode()).hexdigest(),
        "outcomes": dict(sorted(Counter(end.outcome for end in ended).items())),
        **about,
    }
    if report is not None:
        lines = (json.dumps(asdict(end), ensure_ascii=False) + "\n" for end in ended)
        replace_file(report, "".join(lines))
    provenance = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    replace_file(output.with_name(f"{output.name}.json"), provenance)
    replace_file(output, body)
    return record


def replace_file(path: Path, text: str) -> None:
    """Writes a text file so that it is there as a whole or not at all.

    Halves of characters, which sites and models do give, become question marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(text.encode("utf-8", "replace"))
    os.replace(temporary, path)


def file_record(path: Path, num_labels: int) -> dict[str, Any]:
    """Returns what is noted of an input: name, hash of its bytes, labels taken from it."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": str(path), "sha256": sha256, "num_labels": num_labels}


def read_queries(path: Path) -> list[str]:
    """Returns the queries of a file, one a line; ``#`` begins a comment line.

    Raises:
        ConfigError: If it cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Not UTF-8: {path} ({error.reason})") from None
    except OSError as error:
        raise ConfigError(f"Queries cannot be read: {path} ({error.strerror})") from None
    queries = [one_line(line) for line in lines if not line.lstrip().startswith("#")]
    queries = [query for query in queries if query]
    if not queries:
        raise ConfigError(f"No queries in {path}")
    return list(dict.fromkeys(queries))
