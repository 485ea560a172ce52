# SPDX-License-Identifier: Apache-2.0
"""One export from the command to the files: what is asked for, what is there, ``export.json``."""

import contextlib
import json
import os
import posixpath
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from rich.console import Console

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError
from dataengine.export.generation import GenerationWriter, write_tables
from dataengine.export.huggingface import HuggingFaceWriter, link_shards, write_card
from dataengine.export.interleaved import write_documents
from dataengine.export.internvid import write_lines
from dataengine.export.pieces import Report, Sync, Writer, sync, temporary_file
from dataengine.export.selection import Choice, choose, facts, write_places
from dataengine.export.settings import ExportSettings
from dataengine.export.webdataset import WebDatasetWriter
from dataengine.progress import ProgressDisplay, Snapshot
from dataengine.query import sql
from dataengine.query.subsets import read_definition

RECORD = "export.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Export:
    """What an export holds, and what this run did.

    Attributes:
        settings: What was asked for.
        facts: How much of the corpus was chosen.
        sync: Of formats with pieces; None for those that are written whole.
        counts: What was written, in the format's own units (lines, documents, clips).
    """

    settings: ExportSettings
    facts: dict[str, Any]
    sync: Sync | None
    counts: dict[str, int]


def export(
    settings: ExportSettings,
    out: str,
    *,
    replace: bool = False,
    memory: str | None = None,
    console: Console | None = None,
) -> Export:
    """Writes an export, goes on with one that was killed, or brings a finished one up to date.

    Args:
        settings: What to write.
        out: Folder or URL; for ``internvid`` it may be a file, ``NAME.jsonl``.
        replace: Replaces another export that lies there.
        memory: What DuckDB may hold, such as ``4GB``.
        console: For progress; None shows none.

    Raises:
        ConfigError: If something else lies at ``out``, or the settings are wrong.
        CorpusError: If the corpus cannot be read, or no clip passes.
    """
    corpus = Corpus.open(settings.corpus)
    settings = settings.model_copy(update={"corpus": corpus.url})
    if settings.subset:
        corpus.subset_path(settings.subset)
    target = _Target.of(out, settings)
    if settings.card_only and target.folder.root != corpus.root:
        raise ConfigError(
            "--card-only writes the card of the corpus into the corpus",
            f"dataengine export {corpus.url} huggingface {corpus.url} --card-only",
        )
    with target.held():
        before = target.open(settings, replace)
        with sql.connect(corpus, subset=settings.subset, memory=memory) as db:
            choice = choose(db, settings, before.get("resolved") if before else None)
            found = facts(corpus, db, choice)
            if not found["num_clips"] and before is None:
                raise CorpusError(
                    f"No clip passes: {choice.condition or 'the corpus is empty'}",
                    _none_hint(settings),
                )
            record = {
                "format_version": _FORMAT_VERSION,
                "settings": settings.stated,
                "resolved": choice.resolved,
                "content": settings.content,
                "subset": read_definition(corpus, settings.subset) if settings.subset else None,
                "added_columns": corpus.added_columns,
                "facts": found,
                "finished": False,
            }
            target.write(record)
            target.tell(corpus, settings)
            with _progress(console, found["num_clips"]) as report:
                done, counts = _write(corpus, db, choice, settings, target, found, report)
        record |= {"counts": counts, "finished": True}
        target.write(record)
    return Export(settings, found, done, counts)


def read_record(out: str) -> tuple[ExportSettings, dict[str, Any]]:
    """Returns the settings of an export, and all that its ``export.json`` says.

    Raises:
        ConfigError: If there is none.
    """
    folder, name = _record_place(out)
    try:
        record = json.loads(cast(bytes, folder.fs.cat_file(folder.path(name))))
        return ExportSettings.model_validate(record["settings"]), record
    except FileNotFoundError:
        raise ConfigError(f"Not an export: {out} (it has no {name})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"Damaged: {name} of {out}: {str(error).splitlines()[0]}") from None


def exports_of(corpus: Corpus) -> list[str]:
    """Returns where exports of a corpus were written, sorted; some may be gone."""
    notes = [
        json.loads(cast(bytes, corpus.fs.cat_file(corpus.path("exports", f"{name}.json"))))
        for name in corpus.names("exports", ".json")
    ]
    return sorted(note["out"] for note in notes)


def _write(
    corpus: Corpus,
    db: Any,
    choice: Choice,
    settings: ExportSettings,
    target: "_Target",
    found: dict[str, Any],
    report: Report,
) -> tuple[Sync | None, dict[str, int]]:
    folder = target.folder
    match settings.format:
        case "internvid":
            lines = [0]

            def write(file: Any) -> None:
                lines[0] = write_lines(db, choice, settings, file, report)

            folder.publish(target.file, write)
            return None, {"clips": lines[0]}
        case "interleaved":
            return None, write_documents(db, choice, settings, folder, report)
        case "huggingface" if settings.card_only:
            write_card(corpus, db, choice, settings, folder, found)
            return None, {"clips": found["num_clips"]}
    with temporary_file() as places:
        write_places(db, choice, places)
        match settings.format:
            case "huggingface":
                if settings.content["whole"]:
                    done = link_shards(corpus, folder, places, report)
                else:
                    writer = HuggingFaceWriter(corpus, folder, settings)
                    done = sync(corpus, folder, places, writer, report)
                write_card(corpus, db, choice, settings, folder, found)
            case "generation":
                writer: Writer = GenerationWriter(folder, settings)
                done = sync(corpus, folder, places, writer, report)
                write_tables(folder)
            case _:
                done = sync(corpus, folder, places, WebDatasetWriter(folder, settings), report)
    counts = {"clips": done.num_clips, "problems": done.num_problems, "pieces": done.num_pieces}
    return done, counts


class _Target:
    """Where an export lies: a folder, and in it a record; of a single file, both beside each other."""

    def __init__(self, out: str, folder: Corpus, file: str, record: str) -> None:
        self.out, self.folder, self.file, self.record = out, folder, file, record

    @classmethod
    def of(cls, out: str, settings: ExportSettings) -> "_Target":
        """Returns the place that a command names."""
        folder, record = _record_place(out)
        if record == RECORD:
            return cls(out, folder, "internvid.jsonl", RECORD)
        if settings.format != "internvid":
            raise ConfigError(f"{settings.format} is a folder, not a file: {out}")
        return cls(out, folder, record.removesuffix(f".{RECORD}"), record)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps a second export out of a local folder."""
        if self.record != RECORD or not self.folder.is_local:
            yield
            return
        os.makedirs(self.folder.root, exist_ok=True)
        with self.folder.locked():
            yield

    def open(self, settings: ExportSettings, replace: bool) -> dict[str, Any] | None:
        """Looks at what lies there; returns the record of the same export, None if there was none.

        Raises:
            ConfigError: If something else lies there, and may not be replaced.
        """
        fs, folder = self.folder.fs, self.folder
        if not fs.exists(folder.path(self.record)):
            if self.record != RECORD:
                taken = fs.exists(folder.path(self.file))
            else:
                taken = not settings.card_only and any(
                    not posixpath.basename(name).startswith(".")
                    for name in (fs.ls(folder.root, detail=False) if fs.exists(folder.root) else ())
                )
            if taken:
                raise ConfigError(f"Not an export, and not empty: {self.out}", "choose another OUT")
            return None
        _, record = read_record(self.out)
        same = record["settings"] == json.loads(json.dumps(settings.stated))
        if same and not replace:
            return record
        if not replace:
            raise ConfigError(
                f"Another export lies in {self.out}",
                "the same command brings it up to date; --replace writes this one in its place",
            )
        if record["content"] != json.loads(json.dumps(settings.content)):
            self._clear()
        return None

    def write(self, record: dict[str, Any]) -> None:
        """Writes the record."""
        data = json.dumps(record, indent=1, ensure_ascii=False).encode()
        self.folder.publish(self.record, lambda file: file.write(data))

    def tell(self, corpus: Corpus, settings: ExportSettings) -> None:
        """Notes in the corpus where this export is, so that a takedown can name it."""
        place = self.folder.path(self.file if self.record != RECORD else "").rstrip("/")
        note = json.dumps({"out": sql.url_of(self.folder, place), "format": settings.format})
        # A corpus that may only be read can be exported too.
        with contextlib.suppress(OSError):
            name = f"exports/{records.digest(place)}.json"
            corpus.publish(name, lambda file: file.write(note.encode()))

    def _clear(self) -> None:
        """Removes what exports write, and nothing else."""
        fs, folder = self.folder.fs, self.folder
        names = ["index", "data", "videos", "README.md", self.file]
        names += ["metadata.csv", "metadata.parquet", "interleaved.parquet", "interleaved.jsonl"]
        names += [f"{name}.tar" for name in folder.names("", ".tar")]
        for name in names:
            if fs.exists(folder.path(name)):
                fs.rm(folder.path(name), recursive=True)


def _record_place(out: str) -> tuple[Corpus, str]:
    """Returns the folder of an export and the name of its record."""
    url = out if "://" in out else os.path.abspath(out)
    if url.endswith(".jsonl"):
        parent, _, name = url.rpartition("/")
        return Corpus(parent or "/"), f"{name}.{RECORD}"
    return Corpus(url), RECORD


def _none_hint(settings: ExportSettings) -> str:
    if settings.format == "generation" and settings.min_aesthetic > 0:
        return "clips without an aesthetic score are taken with --min-aesthetic 0"
    return ""


@contextlib.contextmanager
def _progress(console: Console | None, num_clips: int) -> Iterator[Report]:
    if console is None:
        yield lambda _: None
        return
    with ProgressDisplay(console, (), num_clips, unit="clips") as display:
        yield lambda done: display.show(Snapshot({}, done))


def summary(done: Export) -> dict[str, Any]:
    """Returns what a run did, for programs."""
    return {
        "facts": done.facts,
        "counts": done.counts,
        "sync": asdict(done.sync) if done.sync else None,
    }
