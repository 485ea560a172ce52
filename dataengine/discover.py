# SPDX-License-Identifier: Apache-2.0
"""Queries x languages -> a list of videos that ``dataengine ingest`` takes (InternVid section 3.1).

Each query is searched for once in each language, through yt-dlp's search, which asks for no video's
page. Every search, finished or failed, is a line of ``<output>.searches.jsonl``; the list is made from
these lines, so a search that was stopped goes on where it was, and other rules for the list need no
new search.
"""

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import requests
from pydantic import Field
from yt_dlp.utils import YoutubeDLError

from dataengine import lists, records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, EngineError
from dataengine.fetch.faults import FetchError
from dataengine.fetch.pages import PoliteDownloader, classify
from dataengine.fetch.session import Visit
from dataengine.fetch.settings import FetchSettings
from dataengine.models.answers import BAD_OUTPUT, Failure
from dataengine.models.llm import LanguageModel, Request
from dataengine.models.validate import (
    Answer,
    echo_problem,
    parse_object,
    refusal_problem,
    repetition_problem,
)
from dataengine.plan import exclusion_keys
from dataengine.prompts import (
    PromptFile,
    as_data,
    data_block,
    data_marker,
    load_prompt,
    one_line,
    prompt_sha256,
)
from dataengine.queries import replace_file
from dataengine.records import digest
from dataengine.stage import Settings

logger = logging.getLogger(__name__)

LEAVE_ALONE = frozenset({"http_429", "bot_check"})
"""Classes of `dataengine.fetch.faults` at which nothing more is asked."""
EXCLUDED, TOO_SHORT, TOO_LONG, LIVE = "excluded", "too_short", "too_long", "live"
"""Why a video that was found is not on the list."""
_MOST_FAILURES = 5
_MOST_QUERY_CHARS = 300
_TRANSLATED_TOGETHER = 64
_FACTS = ("title", "duration", "channel", "channel_id", "live_status")
_ENGLISH = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pl": "Polish",
    "pt": "Portuguese", "ru": "Russian", "th": "Thai", "tr": "Turkish", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip
"""What a model is told to translate into; other languages are named by their code."""


PROMPT_VARIABLES = {"system": set(), "user": {"query", "language"}}
"""Texts of the prompt file and their variables."""


class QueryAnswer(Answer):
    """What a model is asked for."""

    query: str


class DiscoverSettings(Settings):
    """What is searched for, and which results are listed."""

    languages: tuple[str, ...] = ("en",)
    """BCP 47 tags: what the site is asked to prefer, and what queries are translated into."""
    per_query: int = Field(default=20, ge=1)
    """Results asked for per query and language."""
    query_language: str = "en"
    """Of the queries; they are not translated into it."""
    min_duration_s: float = Field(default=10.0, ge=0)
    """Shorter videos are left out (InternVid, section 3.1); of unknown length stay in."""
    max_duration_s: float = Field(default=1800.0, gt=0)
    """Longer ones are left out: 30 minutes, as there."""
    min_height: int = Field(default=360, ge=0)
    """Search results tell no height: noted for the download stage (as there)."""
    max_height: int = Field(default=720, ge=1)
    """The same."""
    prompt: Annotated[str, PromptFile(PROMPT_VARIABLES)] = Field(
        default="prompts/translate_query.v1.yaml", validate_default=True
    )
    fetch: FetchSettings = FetchSettings(
        sleep_interval_s=2.0, max_sleep_interval_s=5.0, fetch_timeout_s=600.0
    )
    """Pauses between requests, tries, proxies and cookies."""

    def download_overrides(self) -> list[str]:
        """Returns what ``dataengine ingest --set`` must say for the same rules to hold there."""
        names = ("min_duration_s", "max_duration_s", "min_height", "max_height")
        return [f"stages.download.{name}={getattr(self, name):g}" for name in names]


@dataclass(frozen=True, slots=True)
class Search:
    """One question to the site.

    Attributes:
        query: As listed.
        language: One of the settings' languages.
        words: What is searched for: the query or its translation.
    """

    query: str
    language: str
    words: str


Client = Callable[[Search, DiscoverSettings], list[dict[str, Any]]]
"""Asks the site; see `ask`."""


# --------------------------------------------------------------------------------------- searching


def site_language(language: str) -> str | None:
    """Returns the tag under which the site knows a language, None if it does not.

    The site's own tags are those in yt-dlp: Chinese has one per script, Hebrew its old code.
    """
    from yt_dlp.extractor.youtube._base import YoutubeBaseInfoExtractor

    known = list(YoutubeBaseInfoExtractor._SUPPORTED_LANG_CODES)
    base = {"he": "iw"}.get(language, language)
    same = [tag for tag in known if tag.split("-")[0] == base.split("-")[0]]
    return next((tag for tag in [base, base.split("-")[0]] if tag in known), None) or next(
        iter(same), None
    )


def ask(search: Search, settings: DiscoverSettings) -> list[dict[str, Any]]:
    """Returns the videos a search finds, best first: id, title, duration in s, channel, channel_id.

    Raises:
        FetchError: With the class of what went wrong.
    """
    preferred = site_language(search.language)
    arguments = {"raise_incomplete_data": ["true"]}  # half an answer is none
    options: Any = {
        "extract_flat": True,
        "socket_timeout": settings.fetch.timeout_s,
        "extractor_retries": settings.fetch.retries,
        "extractor_args": {"youtube": arguments | ({"lang": [preferred]} if preferred else {})},
        "proxy": None,
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "color": "never",
        "logger": logging.Logger("searches", logging.CRITICAL),
    }
    words = f"ytsearch{settings.per_query}:{search.words}"
    try:
        number = int(digest(search.query, search.language), 16)
        with Visit(settings.fetch, number) as visit:
            options["proxy"] = visit.proxy
            with PoliteDownloader(visit, options) as client:
                info = client.extract_info(words, download=False)
                found = [dict(entry) for entry in (info or {}).get("entries") or () if entry]
    except FetchError:
        raise
    except (YoutubeDLError, requests.RequestException, OSError) as error:
        raise classify(error) from None
    except Exception as error:  # noqa: BLE001 - what a site answers must not end in a traceback
        raise FetchError("download_failed", f"{type(error).__name__}: {error}") from None
    return [
        {"id": entry["id"], **{name: entry.get(name) for name in _FACTS}}
        for entry in found
        if records.YOUTUBE_ID.fullmatch(str(entry.get("id")))
    ]


def translate(
    pairs: Sequence[tuple[str, str]], model: LanguageModel | None, settings: DiscoverSettings
) -> list[Search]:
    """Returns the searches for (query, language) pairs, in order.

    A query whose translation fails is searched for as it is.
    """
    foreign = [
        pair for pair in pairs if pair[1].split("-")[0] != settings.query_language.split("-")[0]
    ]
    words: dict[tuple[str, str], str] = {}
    if model is not None and foreign:
        prompt = load_prompt(settings.prompt, PROMPT_VARIABLES)
        requests = []
        for number, (query, language) in enumerate(foreign):
            data = as_data(query, _MOST_QUERY_CHARS)
            text = prompt.render(
                "user",
                query=data_block("query", data, data_marker([data])),
                language=_ENGLISH.get(language.split("-")[0], language),
            )
            requests.append(
                Request(
                    id=f"query-{number}",
                    input_hash=digest(query, language),
                    prompt=text,
                    system=prompt.texts["system"],
                    schema=QueryAnswer.model_json_schema(),
                    max_tokens=96,
                )
            )
        answers = model.answer(requests)
        for request, pair in zip(requests, foreign, strict=True):
            found = translation(answers.get(request.id), pair[0], prompt.sentences())
            if isinstance(found, Failure):
                why = f"{found.reason} ({found.detail})" if found.detail else found.reason
                logger.warning("%s is not translated into %s: %s", *pair, why)
            else:
                words[pair] = found
    return [
        Search(query, language, words.get((query, language), query)) for query, language in pairs
    ]


def translation(
    answer: str | Failure | None, query: str, sentences: Sequence[str]
) -> str | Failure:
    """Returns a translation that can be searched for, or why an answer is none.

    Args:
        answer: Of the model.
        query: What was to be translated.
        sentences: The prompt's own, which no query repeats.
    """
    if not isinstance(answer, str):
        return answer or Failure(BAD_OUTPUT, "no answer")
    found = parse_object(answer, QueryAnswer)
    if isinstance(found, Failure):
        return found
    words = one_line(found.query)
    # Scripts differ in length, but no translation of a few words is a paragraph.
    if not any(map(str.isalnum, words)) or len(words) > 40 + 4 * len(query):
        return Failure(BAD_OUTPUT, f"not a query: {words[:80]!r}")
    problem = refusal_problem(words) or echo_problem(words, sentences) or repetition_problem(words)
    return problem or words


# ----------------------------------------------------------------------------------------- journal


@dataclass
class Journal:
    """The searches of one list, finished and failed, and the file that more are written to.

    Attributes:
        file: Opened and locked.
        finished: (query, language) -> its line: query, language, words, results.
        num_failures: (query, language) -> how often it failed before.
    """

    file: BinaryIO
    finished: dict[tuple[str, str], dict[str, Any]]
    num_failures: Counter[tuple[str, str]]

    def add(self, search: Search, **outcome: Any) -> None:
        """Writes down, for good, what came of a search: ``results``, or the class of an ``error``."""
        row = {"query": search.query, "language": search.language, "words": search.words, **outcome}
        _append(self.file, row)
        self._note(row)

    def _note(self, row: dict[str, Any]) -> None:
        pair = row["query"], row["language"]
        if "error" in row:
            self.num_failures[pair] += 1
        elif isinstance(row["words"], str) and isinstance(row["results"], list):
            self.finished[pair] = row
        else:
            raise TypeError

    def read(self, path: Path, settings: DiscoverSettings) -> None:
        """Reads what is there; a line that was half written when the machine stopped is cut off.

        Raises:
            ConfigError: If it is of searches for another number of results, or no journal.
        """
        whole = 0
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line)
                if number > 1:
                    self._note(row)
                    continue
                per_query = row["per_query"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ConfigError(
                    f"Not a journal of searches: {path}, line {number}",
                    "name another output" if number == 1 else "remove this line, and run again",
                ) from None
            if per_query != settings.per_query:
                raise ConfigError(
                    f"{path} holds searches for {per_query} results each, not {settings.per_query}",
                    f"give --per-query {per_query}, or another --output",
                )
        self.file.seek(whole)
        self.file.truncate()
        if whole == 0:
            _append(self.file, {"per_query": settings.per_query})


@contextmanager
def open_journal(path: Path, settings: DiscoverSettings) -> Iterator[Journal]:
    """Opens the searches done so far for more, for this process alone.

    Raises:
        ConfigError: If another process has it open, or it is not of this list.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"Another process is searching for the same list: {path}") from None
        file.seek(0)
        journal = Journal(file, {}, Counter())
        journal.read(path, settings)
        yield journal


def _append(file: BinaryIO, row: Mapping[str, Any]) -> None:
    # Titles may hold halves of characters.
    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    file.flush()
    os.fsync(file.fileno())


# -------------------------------------------------------------------------------------------- list


def excluded_ids(names: Iterable[str]) -> frozenset[str]:
    """Returns the YouTube ids that lists and corpora name.

    Args:
        names: Paths or URLs of lists (see `dataengine.lists`) or of corpora.

    Raises:
        EngineError: If one is neither.
    """
    ids: set[str] = set()
    for name in names:
        if lists.is_list(name):
            for entry in lists.read_list(name, strict=False):
                keys = exclusion_keys(entry.word, lists.base_of(name)) if entry.word else ()
                ids.update(key for kind, key in keys if kind == "id")
        else:
            for row in Corpus.open(name).videos(["source", "video_id"]).to_pylist():
                ids.update(filter(None, (row["video_id"], records.youtube_id(row["source"]))))
    return frozenset(ids)


def left_out(found: Mapping[str, Any], excluded: frozenset[str], settings: DiscoverSettings) -> str:
    """Returns why a video is not listed, empty if it is; what is not known is no reason."""
    if found["id"] in excluded:
        return EXCLUDED
    if found.get("live_status") in ("is_live", "is_upcoming"):
        return LIVE
    seconds = found.get("duration")
    if seconds is not None and seconds < settings.min_duration_s:
        return TOO_SHORT
    return TOO_LONG if seconds is not None and seconds > settings.max_duration_s else ""


def make_list(
    searches: Iterable[Mapping[str, Any]],
    wanted: Mapping[tuple[str, str], int],
    excluded: frozenset[str],
    settings: DiscoverSettings,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Returns one row per video, and how many videos were left out for which reason.

    Args:
        searches: Finished ones, in any order; those not wanted any more are passed over.
        wanted: (query, language) -> place, which orders the list.
        excluded: Ids that must not be on it.
        settings: Rules.
    """
    ordered = sorted(
        (search for search in searches if (search["query"], search["language"]) in wanted),
        key=lambda search: wanted[search["query"], search["language"]],
    )
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for search in ordered:
        query, language = search["query"], search["language"]
        for found in search["results"]:
            reason = left_out(found, excluded, settings)
            if reason:
                refused[found["id"]] = reason
                continue
            row = rows.get(found["id"])
            if row is None:
                row = rows[found["id"]] = {
                    "url": f"https://www.youtube.com/watch?v={found['id']}",
                    "title": found["title"],
                    "duration": found["duration"],
                    "channel": found["channel"],
                    "channel_id": found["channel_id"],
                    "query": query,
                    "language": language,
                    "queries": [],
                    "languages": [],
                }
            row["queries"] += [query] * (query not in row["queries"])
            row["languages"] += [language] * (language not in row["languages"])
    return list(rows.values()), Counter(refused.values())


def discover(
    queries: Sequence[str],
    output: Path,
    settings: DiscoverSettings,
    *,
    exclude: Sequence[str] = (),
    translator: LanguageModel | None = None,
    client: Client = ask,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Searches for what was not searched for yet, writes the list and ``<output>.json``.

    Args:
        queries: Distinct.
        output: ``.jsonl``; its journal lies beside it.
        settings: What to search for.
        exclude: Lists and corpora whose videos stay out.
        translator: Translates queries; None searches for them as they are in every language.
        client: Asks the site.
        progress: Called with (searches done, searches in all).

    Returns:
        What went into ``<output>.json``.

    Raises:
        EngineError: If the site wants to be left alone, or does not answer any more. What was found is
            on the list by then; calling again goes on.
    """
    if output.suffix != ".jsonl":
        raise ConfigError(f"Not a .jsonl file: {output}", "that is how the list is written")
    excluded = excluded_ids(exclude)
    pairs = [(query, language) for query in queries for language in settings.languages]
    wanted = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    path = output.with_name(f"{output.name}.searches.jsonl")
    with open_journal(path, settings) as journal:
        try:
            stopped = _search_all(
                wanted, journal, settings, translator, client, progress or (lambda *_: None)
            )
        finally:  # also when the translator is away, or somebody presses Ctrl-C
            record = _write_list(output, journal, wanted, excluded, settings, translator)
    if stopped is not None:
        raise EngineError(
            f"{record['num_finished']:,} of {len(wanted):,} searches are done, the last failure was "
            f"{stopped.reason} ({stopped.detail})",
            f"{output} holds what was found; the same command goes on with what is missing"
            + ("; wait some hours first" if stopped.reason in LEAVE_ALONE else ""),
        )
    return record


def _write_list(
    output: Path,
    journal: Journal,
    wanted: Mapping[tuple[str, str], int],
    excluded: frozenset[str],
    settings: DiscoverSettings,
    translator: LanguageModel | None,
) -> dict[str, Any]:
    """Writes the list of all that was found so far, and returns what went into ``<output>.json``."""
    ended = [journal.finished[pair] for pair in wanted if pair in journal.finished]
    rows, refused = make_list(ended, wanted, excluded, settings)
    record = {
        "num_videos": len(rows),
        "num_searches": len(wanted),
        "num_finished": len(ended),
        "num_translated": sum(search["words"] != search["query"] for search in ended),
        "num_results": sum(len(search["results"]) for search in ended),
        "num_without_results": sum(not search["results"] for search in ended),
        "left_out": dict(sorted(refused.items())),
        "ingest_set": settings.download_overrides(),
        "translator": None
        if translator is None
        else {
            "model": translator.model,
            "revision": translator.revision,
            "prompt_sha256": prompt_sha256(settings.prompt),
        },
        "settings": settings.model_dump(mode="json", exclude={"fetch"}),
    }
    replace_file(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    text = json.dumps(record, indent=2, ensure_ascii=False, sort_keys=True)
    replace_file(output.with_name(f"{output.name}.json"), text + "\n")
    return record


def _search_all(
    wanted: Iterable[tuple[str, str]],
    journal: Journal,
    settings: DiscoverSettings,
    translator: LanguageModel | None,
    client: Client,
    progress: Callable[[int, int], None],
) -> FetchError | None:
    """Searches for what is missing; returns why it stopped before the end, None if it did not.

    A fault leaves its search for the next run, which comes to it last, so that a few searches that
    never work do not keep others from being tried; several faults in a row stop this run.
    """
    wanted = list(wanted)
    missing = [pair for pair in wanted if pair not in journal.finished]
    missing.sort(key=lambda pair: journal.num_failures[pair])
    failures, num_done = 0, len(wanted) - len(missing)
    left: FetchError | None = None
    progress(num_done, len(wanted))
    for start in range(0, len(missing), _TRANSLATED_TOGETHER):
        group = missing[start : start + _TRANSLATED_TOGETHER]
        for search in translate(group, translator, settings):
            try:
                results = client(search, settings)
            except FetchError as error:
                logger.warning(
                    "%s (%s): %s (%s)", search.words, search.language, error.reason, error.detail
                )
                if error.reason in LEAVE_ALONE:
                    return error
                # No search is at fault by itself: whatever it is, the next run tries again.
                journal.add(search, error=error.reason)
                failures, left = failures + 1, error
                if failures >= _MOST_FAILURES:
                    return error
                continue
            failures = 0
            journal.add(search, results=results)
            num_done += 1
            progress(num_done, len(wanted))
    return left
