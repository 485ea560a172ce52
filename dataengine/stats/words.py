# SPDX-License-Identifier: Apache-2.0
"""Words of captions and transcripts: how long texts are, which words, which verbs, and who is spoken of.

A word is a run of letters, marks and digits, apostrophes inside it, in lower case. Chinese, Japanese, Thai,
Lao, Khmer and Burmese have no spaces: there, pairs of neighbouring characters stand for words.

All is counted over the table ``texts``, which `read_texts` makes: every chosen clip, or a sample of
them in a large corpus. The sample is drawn by a hash of the clip's id, so it is the same every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import duckdb
import yaml

from dataengine.phrases import word_stem
from dataengine.query.literals import identifier, quoted
from dataengine.query.sql import first_row
from dataengine.stats.numbers import Numbers, of_counts

NUM_WORDS = 200
"""Words that are told, the most frequent first."""

NUM_LANGUAGES = 12
"""Languages whose words are told, those of most clips first."""

UNKNOWN = "unknown"
"""The language of a transcript whose language is not known."""

_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
_WORD = r"[\p{L}\p{M}\p{N}]+(?:['\x{2019}][\p{L}\p{M}]+)*"
_BE = ("am", "is", "are", "was", "were", "be", "been", "being")


@dataclass(frozen=True)
class Words:
    """The words of one column, in one language.

    Attributes:
        column: ``caption`` or ``transcript``.
        language: Of the words; empty for a column that is not told apart by language.
        num_clips: Clips whose texts were read.
        num_words: How many words they have, function words too.
        num_different: Different ones.
        top: (word, how often), the most frequent first, without function words.
    """

    column: str
    language: str
    num_clips: int
    num_words: int
    num_different: int
    top: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Actionness:
    """How much captions say of what happens (InternVid, appendix C).

    InternVid tags parts of speech with NLTK and counts different verbs. Here a word is a verb if it is
    an inflection of a verb of ``words.yaml`` and not where a noun stands ("a walk"), or ends in -ing after
    a form of "to be". English only; inflections of one verb are one verb.

    Attributes:
        num_captions: Captions that were read.
        num_verbs: Different verbs in all of them.
        mean: Different verbs per caption.
        per_caption: Distribution of different verbs per caption.
        top: (verb, captions that have it), the most frequent first.
    """

    num_captions: int
    num_verbs: int
    mean: float
    per_caption: Numbers
    top: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Group:
    """How often captions speak of one group of people.

    Attributes:
        name: Such as ``women``.
        num_mentions: Words that mean it.
        num_captions: Captions that have one.
        mention_ratio: Its share of its topic's mentions, in [0, 1]; None without mentions.
        published: Paper -> the share it reports, in [0, 1].
    """

    name: str
    num_mentions: int
    num_captions: int
    mention_ratio: float | None
    published: dict[str, float]


@dataclass(frozen=True)
class Topic:
    """How captions speak of age, gender, or race.

    Attributes:
        name: ``age``, ``gender`` or ``race``.
        num_captions: Captions with a word of any group.
        caption_ratio: Their share of all captions read, in [0, 1]; None without captions.
        published: Paper -> the share of captions it reports, in [0, 1].
        groups: In the order of ``bias.yaml``.
    """

    name: str
    num_captions: int
    caption_ratio: float | None
    published: dict[str, float]
    groups: tuple[Group, ...]


@cache
def _data(name: str) -> dict[str, Any]:
    text = files("dataengine.stats").joinpath(name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def stop_words(language: str) -> frozenset[str]:
    """Returns the words of a language that say nothing by themselves; none for a language unheard of."""
    return frozenset(_data("words.yaml")["stop_words"].get(language, "").split())


def words_sql(text: str) -> str:
    """Returns SQL for the list of a text's words."""
    plain = f"lower(nfc_normalize({text}))"
    apart = f"regexp_replace({plain}, '([{_SPACELESS}]+)', ' \\1 ', 'g')"
    word = quoted(_WORD)
    pairs = (
        f"flatten(list_transform(regexp_extract_all({apart}, {word}), lambda run: "
        f"case when regexp_matches(run, '^[{_SPACELESS}]') and length_grapheme(run) > 1 "
        "then list_transform(range(1, length_grapheme(run)), "
        "lambda place: substring_grapheme(run, place, 2)) else [run] end))"
    )
    return (
        f"case when regexp_matches({text}, '[{_SPACELESS}]') then {pairs} "
        f"else regexp_extract_all({plain}, {word}) end"
    )


# ----------------------------------------------------------------------------------------- texts


def read_texts(
    db: duckdb.DuckDBPyConnection, columns: Sequence[str], num_clips: int, most: int, seed: int
) -> int:
    """Makes the table ``texts`` of the chosen clips' texts; returns how many clips it holds.

    Args:
        db: With ``chosen``.
        columns: Of texts.
        num_clips: How many clips are chosen.
        most: From more than these, about so many are drawn.
        seed: Another draws others.
    """
    selected = ", ".join(map(identifier, ["language", *columns]))
    sampled = ""
    if num_clips > most:
        sampled = (
            f" where hash(clip_id, {int(seed)}::bigint) < {int(most / num_clips * 2**64)}::ubigint"
        )
    db.execute(f"create or replace temp table texts as select {selected} from chosen{sampled}")
    return first_row(db, "select count(*) from texts")[0]


def lengths(db: duckdb.DuckDBPyConnection, column: str) -> list[tuple[int, int]]:
    """Returns (words, texts that have so many) of a column; texts without a word do not count."""
    return db.execute(
        f"select num, count(*) from (select len({words_sql(identifier(column))}) as num from texts) "
        "where num > 0 group by num order by num"
    ).fetchall()


def split(db: duckdb.DuckDBPyConnection, column: str) -> list[tuple[int, int]]:
    """Makes the table ``words_<column>`` (row, language, words); returns what `lengths` does."""
    table = identifier(f"words_{column}")
    db.execute(
        f"create or replace temp table {table} as select * from (select rowid as row, language, "
        f"{words_sql(identifier(column))} as words from texts where {identifier(column)} is not null) "
        "where len(words) > 0"
    )
    return db.execute(
        f"select len(words) as num, count(*) from {table} group by num order by num"
    ).fetchall()


def count_words(db: duckdb.DuckDBPyConnection, column: str) -> Words:
    """Makes the table ``vocabulary_<column>`` (word, num); returns the most frequent words.

    Needs `split` first.
    """
    table, source = identifier(f"vocabulary_{column}"), identifier(f"words_{column}")
    db.execute(
        f"create or replace temp table {table} as select word, count(*) as num from "
        f"(select unnest(words) as word from {source}) group by word"
    )
    row = db.execute(f"select coalesce(sum(num), 0)::bigint, count(*) from {table}").fetchone()
    assert row is not None
    stops = stop_words("en")
    rows = db.execute(
        f"select word, num from {table} order by num desc, word limit {NUM_WORDS + len(stops)}"
    ).fetchall()
    top = [(word, num) for word, num in rows if _telling(word, stops)][:NUM_WORDS]
    num_clips = first_row(db, f"select count(*) from {source}")[0]
    return Words(column, "", num_clips, row[0], row[1], tuple(top))


def count_by_language(db: duckdb.DuckDBPyConnection, column: str) -> list[Words]:
    """Returns the most frequent words of each language. Needs `split` first."""
    source = identifier(f"words_{column}")
    languages = db.execute(
        f"select coalesce(language, '{UNKNOWN}') as tongue, count(*), sum(len(words))::bigint "
        f"from {source} group by tongue order by count(*) desc, tongue limit {NUM_LANGUAGES}"
    ).fetchall()
    most = NUM_WORDS + max((len(stop_words(language)) for language, _, _ in languages), default=0)
    db.execute(
        f"create or replace temp table by_language as select coalesce(language, '{UNKNOWN}') as tongue, "
        f"word, count(*) as num from (select language, unnest(words) as word from {source}) group by all"
    )
    found = []
    for language, num_clips, num_words in languages:
        stops = stop_words(language)
        rows = db.execute(
            f"select word, num from by_language where tongue = ? order by num desc, word limit {most}",
            [language],
        ).fetchall()
        different = first_row(db, "select count(*) from by_language where tongue = ?", [language])[
            0
        ]
        top = tuple((word, num) for word, num in rows if _telling(word, stops))[:NUM_WORDS]
        found.append(Words(column, language, num_clips, num_words, different, top))
    return found


def _telling(word: str, stops: frozenset[str]) -> bool:
    return word not in stops and not word.isdigit() and (len(word) > 1 or not word.isascii())


# ----------------------------------------------------------------------------------- verbs, people


def mark(db: duckdb.DuckDBPyConnection) -> None:
    """Makes the table ``marked`` (row, kind, name, num): verbs and people in each caption.

    Needs `count_words` of ``caption`` first.
    """
    rows = db.execute(
        "select word from vocabulary_caption where regexp_full_match(word, '[a-z]+')"
    ).fetchall()
    verbs = [(word, *found) for (word,) in rows if (found := _verb(word))]
    terms = list(_terms())
    _table(db, "verb_forms", ("word", "verb", "form"), verbs)
    _table(db, "terms", ("word", "previous", "kind", "name"), terms)
    words = _data("words.yaml")
    for name in ("before_noun", "before_plain"):
        _table(db, name, ("word",), [(word,) for word in words[name].split()])
    _table(db, "be", ("word",), [(word,) for word in _BE])
    db.execute(
        "create or replace temp table marked as "
        "with pairs as (select row, unnest(words) as word, "
        "unnest(list_prepend('', words[:-2])) as previous from words_caption) "
        "select row, 'verb' as kind, verb as name, count(*) as num from pairs join verb_forms using (word) where "
        "case form when 'plain' then previous in (from before_plain) "
        "when 'unlisted' then previous in (from be) "
        "else previous not in (from before_noun) end group by all "
        "union all select row, terms.kind, terms.name, count(*) from pairs join terms on "
        "pairs.word = terms.word and (terms.previous = '' or terms.previous = pairs.previous) group by all"
    )


def _table(
    db: duckdb.DuckDBPyConnection, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    import pyarrow as pa

    values = {
        column: pa.array([row[place] for row in rows], pa.string())
        for place, column in enumerate(columns)
    }
    db.register("given", pa.table(values))
    db.execute(f"create or replace temp table {name} as select * from given")
    db.unregister("given")


@cache
def _verb_stems() -> dict[str, str]:
    return {word_stem(verb): verb for verb in _data("words.yaml")["verbs"].split()}


@cache
def _not_verbs() -> frozenset[str]:
    return frozenset(_data("words.yaml")["not_verbs"].split())


def _verb(word: str) -> tuple[str, str] | None:
    """Returns a word's verb and form, ``plain``, ``inflected`` or ``unlisted``; None for other words."""
    if word in _not_verbs():
        return None
    verb = _verb_stems().get(word_stem(word))
    if verb:
        return verb, "plain" if word == verb else "inflected"
    if word.endswith("ing") and len(word) > 5:
        return word, "unlisted"
    return None


def _terms() -> list[tuple[str, str, str, str]]:
    """Returns (word, word before it or "", topic, group) of ``bias.yaml``."""
    data = _data("bias.yaml")
    found = set()
    for topic, about in data["topics"].items():
        for group, terms in about["groups"].items():
            for term in terms:
                for person in data["persons"] if "{person}" in term else [""]:
                    *before, word = term.replace("{person}", person).split()
                    found.add((word, before[-1] if before else "", topic, group))
    return sorted(found)


def actionness(db: duckdb.DuckDBPyConnection) -> Actionness:
    """Returns how much captions say of what happens. Needs `mark` first."""
    num_captions = first_row(db, "select count(*) from words_caption")[0]
    rows = db.execute(
        "select num, count(*) from (select row, count(*) as num from marked where kind = 'verb' "
        "group by row) group by num"
    ).fetchall()
    without = num_captions - sum(num for _, num in rows)
    per_caption = of_counts(
        "verbs_per_caption",
        [*rows, *([(0, without)] if without else [])],
        of="captions",
        label="Different verbs per caption",
        unit="verbs",
    )
    top = db.execute(
        "select name, count(*) as num from marked where kind = 'verb' group by name "
        f"order by num desc, name limit {NUM_WORDS}"
    ).fetchall()
    num_verbs = first_row(db, "select count(distinct name) from marked where kind = 'verb'")[0]
    return Actionness(num_captions, num_verbs, per_caption.mean or 0.0, per_caption, tuple(top))


def bias(db: duckdb.DuckDBPyConnection) -> list[Topic]:
    """Returns how captions speak of people, by topic. Needs `mark` first."""
    num_captions = first_row(db, "select count(*) from words_caption")[0]
    rows = db.execute(
        "select kind, name, sum(num)::bigint, count(*) from marked where kind <> 'verb' group by all"
    ).fetchall()
    counts = {(kind, name): (mentions, captions) for kind, name, mentions, captions in rows}
    topics = []
    for topic, about in _data("bias.yaml")["topics"].items():
        published = about.get("published", {})
        total = sum(mentions for (kind, _), (mentions, _) in counts.items() if kind == topic)
        groups = []
        for name in about["groups"]:
            mentions, captions = counts.get((topic, name), (0, 0))
            said = {
                p: v["groups"][name] for p, v in published.items() if name in v.get("groups", {})
            }
            groups.append(
                Group(name, mentions, captions, mentions / total if total else None, said)
            )
        with_any = first_row(db, "select count(distinct row) from marked where kind = ?", [topic])[
            0
        ]
        topics.append(
            Topic(
                topic,
                with_any,
                with_any / num_captions if num_captions else None,
                {p: v["captions"] for p, v in published.items() if "captions" in v},
                tuple(groups),
            )
        )
    return topics
