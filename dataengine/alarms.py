# SPDX-License-Identifier: Apache-2.0
"""What is suspicious about a corpus' captions: one text on many videos, models that fail or fall back.

A captioner that is shown black frames, answers mixed up between clips, or a language model that
refuses all give captions that look right one by one. Over a corpus they show: the same text on clips of
different videos, and notes in the provenance. Only the catalog is read, and of it only texts and
provenance; memory does not grow with the number of different texts. Of a large corpus the videos with the
lowest ids are looked at: ids are hashes or as random, and a merged catalog is sorted by them, so that little of
it is read.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass

import duckdb
import pyarrow as pa
from pydantic import Field
from rich.console import Console

from dataengine.corpus import Corpus
from dataengine.query.literals import quoted
from dataengine.query.sql import connect, first_row
from dataengine.stage import Settings

FAILED, FALLBACK = "failed", "template"
"""What stands before the colon of a note: a column that is empty, one that a template wrote."""

MOST_CLIPS = 2_000_000
"""A corpus of more clips is looked at in a part of this size."""

_BUCKETS = 1 << 20
_LEAST_COPIES, _LEAST_SHARE = 2, 1e-4
"""A text is listed from this number of clips on, and from this share of them."""


class AlarmSettings(Settings):
    """When a corpus' captions are suspicious."""

    max_text_ratio: float = Field(default=0.1, gt=0, le=1)
    """One text may be on this share of a column's clips. A captioner that is shown nothing says the
    same of all; templates' honest "Silence." is on 7 % of the demo's clips."""
    min_videos: int = Field(default=10, ge=2)
    """... if they are of as many videos: a long lecture may honestly look the same for an hour, and in
    a corpus of few videos every share is large."""
    max_note_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of a column's clips on which its model may have failed or fallen back to a template."""
    num_texts: int = Field(default=5, ge=1)
    """Texts listed per column, the most frequent first."""
    num_examples: int = Field(default=3, ge=1)
    """Clips named per text, each of another video."""


@dataclass(frozen=True)
class RepeatedText:
    """One text on clips of different videos.

    Attributes:
        text: As one of the clips has it; others may differ in case and punctuation.
        num_clips: Clips that have it.
        num_videos: Videos they are of, at least two.
        clip_ratio: Their share of the column's clips, in (0, 1].
        clip_ids: Some of them, each of another video.
        alarm: Whether that is too many.
    """

    text: str
    num_clips: int
    num_videos: int
    clip_ratio: float
    clip_ids: tuple[str, ...]
    alarm: bool


@dataclass(frozen=True)
class ColumnTexts:
    """How often the texts of one caption column repeat.

    Attributes:
        column: E.g. ``caption_video``.
        num_clips: Clips that have a text in it.
        num_texts: Different ones, as far as case and punctuation do not matter; within about 2 % in
            columns of more than 100,000 clips.
        repeated: Those on clips of different videos, the most frequent first.
    """

    column: str
    num_clips: int
    num_texts: int
    repeated: tuple[RepeatedText, ...]


@dataclass(frozen=True)
class NoteCount:
    """How often something unusual was noted.

    Attributes:
        kind: ``failed`` (the column is empty), ``template`` (a template wrote it instead), or the note
            itself, such as ``no_sound``.
        reason: What comes after the colon, e.g. ``out_of_memory``; else empty.
        num_clips: Clips with this note.
    """

    kind: str
    reason: str
    num_clips: int


@dataclass(frozen=True)
class ColumnAuthor:
    """What one model did for one column.

    Attributes:
        column: Of the clip.
        model: Its id, as in the provenance. A fallback counts for the model that wrote, the template.
        revision: Of the model.
        num_clips: Clips whose provenance names it for this column.
        notes: What was unusual, the most frequent first.
    """

    column: str
    model: str
    revision: str
    num_clips: int
    notes: tuple[NoteCount, ...]


@dataclass(frozen=True)
class CaptionAlarms:
    """What was looked at, and what is suspicious.

    Attributes:
        texts: Per caption column with any text, in the catalog's order.
        authors: Per column and model, in order of column and number of clips.
        num_looked_at: Clips that all this is of.
        num_clips: Clips of the corpus.
        alarms: One sentence for each suspicion; none if there is none.
    """

    texts: tuple[ColumnTexts, ...]
    authors: tuple[ColumnAuthor, ...]
    num_looked_at: int
    num_clips: int
    alarms: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Returns plain values for JSON."""
        return asdict(self)


def check_captions(corpus: Corpus, settings: AlarmSettings | None = None) -> CaptionAlarms:
    """Returns what is suspicious about a corpus' captions.

    Args:
        corpus: Any, also an empty one.
        settings: Thresholds; None takes the defaults.

    Raises:
        CorpusError: If the catalog is damaged.
    """
    settings = settings or AlarmSettings()
    with connect(corpus) as db:
        (num_clips,) = first_row(db, "select count(*) from clips")
        num_looked_at = _look_at(db, num_clips)
        measured = (
            _texts(db, field.name, settings)
            for field in corpus.catalog_schema
            if field.name.startswith("caption") and pa.types.is_string(field.type)
        )
        texts = tuple(column for column in measured if column.num_clips)
        authors = _authors(db)
    alarms = [*map(_text_sentence, texts), *_note_sentences(authors, settings)]
    return CaptionAlarms(texts, authors, num_looked_at, num_clips, tuple(filter(None, alarms)))


def say_alarms(corpus: Corpus, console: Console, columns: Collection[str] = ()) -> None:
    """Prints a line for each suspicion: a run that failed on all it was given must not end in silence.

    Args:
        corpus: That a run has just ended in.
        console: Where to.
        columns: Says only what is about these; none takes all.
    """
    for sentence in check_captions(corpus).alarms:
        if not columns or sentence.partition(":")[0] in columns:
            line = f"warning: {sentence}"
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _look_at(db: duckdb.DuckDBPyConnection, num_clips: int) -> int:
    """Makes the view ``looked_at`` of the clips to look at; returns their number."""
    condition = ""
    if num_clips > MOST_CLIPS:
        bound = db.execute(
            f"select quantile_disc(video_id, {MOST_CLIPS / num_clips!r}) "
            "from (select video_id from clips using sample 100000 rows)"
        ).fetchone()
        if bound and bound[0] is not None:
            condition = f" where video_id <= {quoted(bound[0])}"
    db.execute(f"create temp view looked_at as select * from clips{condition}")
    return first_row(db, "select count(*) from looked_at")[0] if condition else num_clips


# ---------------------------------------------------------------------------------------- texts


def _texts(db: duckdb.DuckDBPyConnection, column: str, settings: AlarmSettings) -> ColumnTexts:
    """Counts texts in two passes: how many clips per hash, then the texts of the frequent hashes.

    A text on many clips makes its hash frequent, so none is missed, and only texts that share a frequent
    hash are held in memory.
    """
    # Case, punctuation and the width of spaces do not make another text.
    plain = f"""trim(regexp_replace(lower(nfc_normalize("{column}")), '[^\\p{{L}}\\p{{N}}]+', ' ', 'g'))"""
    db.execute(
        "create or replace temp table buckets as select hash(text) % ? as bucket, count(*) as num "
        f"from (select {plain} as text from looked_at) where text <> '' group by bucket",
        [_BUCKETS],
    )
    (num_clips,) = first_row(db, "select coalesce(sum(num), 0)::bigint from buckets")
    exact = num_clips <= 100_000
    distinct = "count(distinct text)" if exact else "approx_count_distinct(text)"
    (num_texts,) = first_row(
        db, f"select {distinct} from (select {plain} as text from looked_at) where text <> ''"
    )
    rows = db.execute(
        "with chosen as materialized (select bucket from buckets where num >= $least), "
        f"""by_video as (select text, video_id, count(*) as num, min(clip_id) as clip_id, min("{column}") as said """
        f"""from (select {plain} as text, video_id, clip_id, "{column}" from looked_at) """
        "where text <> '' and hash(text) % $buckets in (select bucket from chosen) "
        "group by text, video_id) "
        "select min(said), sum(num)::bigint, count(*), min(clip_id, $examples) from by_video group by text "
        "having count(*) > 1 and sum(num) >= $least "
        "order by sum(num) desc, count(*) desc, text limit $texts",
        {
            "least": max(_LEAST_COPIES, int(num_clips * _LEAST_SHARE)),
            "buckets": _BUCKETS,
            "examples": settings.num_examples,
            "texts": settings.num_texts,
        },
    ).fetchall()
    repeated = [
        RepeatedText(
            text=text,
            num_clips=num,
            num_videos=num_videos,
            clip_ratio=num / num_clips,
            clip_ids=tuple(clip_ids),
            alarm=num > settings.max_text_ratio * num_clips and num_videos >= settings.min_videos,
        )
        for text, num, num_videos, clip_ids in rows
    ]
    return ColumnTexts(column, num_clips, num_texts, tuple(repeated))


def _text_sentence(texts: ColumnTexts) -> str:
    worst = next((text for text in texts.repeated if text.alarm), None)
    if worst is None:
        return ""
    return (
        f"{texts.column}: one text is on {worst.num_clips:,} of {texts.num_clips:,} clips "
        f"({worst.clip_ratio:.0%}) of {worst.num_videos:,} videos: {_short(worst.text)}"
    )


def _short(text: str, max_chars: int = 80) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= max_chars else line[:max_chars].rstrip() + "...")


# -------------------------------------------------------------------------------------- authors


def _authors(db: duckdb.DuckDBPyConnection) -> tuple[ColumnAuthor, ...]:
    # Corpora of earlier versions have no notes.
    kind = db.execute("select any_value(typeof(provenance)) from looked_at").fetchone()
    note = "entry.note" if kind and kind[0] and "note VARCHAR" in kind[0] else "null"
    rows = db.execute(
        "select entry.\"column\", coalesce(entry.model, ''), coalesce(entry.revision, ''), "
        f"coalesce({note}, '') as note, count(*) as num "
        "from (select unnest(provenance) as entry from looked_at) "
        "group by all order by num desc, note"
    ).fetchall()
    totals: dict[tuple[str, str, str], int] = {}
    notes: dict[tuple[str, str, str], list[NoteCount]] = {}
    for column, model, revision, said, num in rows:
        key = (column or "", model, revision)
        totals[key] = totals.get(key, 0) + num
        if said:
            kind_of, _, reason = said.partition(":")
            notes.setdefault(key, []).append(NoteCount(kind_of, reason, num))
    return tuple(
        ColumnAuthor(*key, totals[key], tuple(notes.get(key, ())))
        for key in sorted(totals, key=lambda key: (key[0], -totals[key], key))
    )


def _note_sentences(authors: tuple[ColumnAuthor, ...], settings: AlarmSettings) -> list[str]:
    """Returns a sentence for every column whose models failed or were replaced too often."""
    sentences = []
    for column in dict.fromkeys(author.column for author in authors):
        of_column = [author for author in authors if author.column == column]
        total = sum(author.num_clips for author in of_column)
        for kind, said in ((FAILED, "the model failed on"), (FALLBACK, "a template stands in on")):
            counts: dict[str, int] = {}
            for author in of_column:
                for note in author.notes:
                    if note.kind == kind:
                        counts[note.reason] = counts.get(note.reason, 0) + note.num_clips
            num = sum(counts.values())
            if num > settings.max_note_ratio * total:
                reasons = ", ".join(
                    f"{reason} {count:,}"
                    for reason, count in sorted(counts.items(), key=lambda item: -item[1])
                )
                sentences.append(
                    f"{column}: {said} {num:,} of {total:,} clips ({num / total:.0%}): {reasons}"
                )
    return sentences
