# SPDX-License-Identifier: Apache-2.0
"""Queries -> a list of videos: what is asked, once, what is listed, and how a stopped search goes on."""

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yt_dlp
from pydantic import ValidationError
from typer.testing import CliRunner
from yt_dlp.extractor.youtube import YoutubeSearchIE
from yt_dlp.utils import DownloadError

from dataengine import queries_cli
from dataengine.discover import (
    PROMPT_VARIABLES,
    DiscoverSettings,
    Search,
    ask,
    discover,
    excluded_ids,
    site_language,
    translate,
    translation,
)
from dataengine.errors import ConfigError, EngineError
from dataengine.fetch.faults import FetchError
from dataengine.fetch.settings import FetchSettings
from dataengine.lists import read_list
from dataengine.models.answers import Failure
from dataengine.prompts import load_prompt
from dataengine.sources import expand
from tests.fault_server import FaultServer
from tests.helpers import small_corpus


@pytest.fixture(autouse=True)
def own_node(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def video(name, **facts):
    """What a search tells of a video; the id is the name, filled up to eleven characters."""
    return {
        "id": f"{name:_<11}", "title": f"Title of {name}", "duration": 60, "channel": "C",
        "channel_id": "UC1", "live_status": None,
    } | facts  # fmt: skip


class Site:
    """Knows what it finds for (words, language); raises what is an error; remembers what it was asked."""

    def __init__(self, **results):
        self.results, self.asked = results, []

    def __call__(self, search, settings):
        self.asked.append((search.words, search.language))
        found = self.results.get(search.words, [])
        if isinstance(found, Exception):
            raise found
        return found


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_video_is_listed_once_with_all_queries_that_found_it(tmp_path):
    site = Site(run=[video("a"), video("b")], swim=[video("b"), video("c", duration=None)])
    settings = DiscoverSettings(languages=("en", "zh"), per_query=7)
    record = discover(["run", "swim"], tmp_path / "list.jsonl", settings, client=site)
    assert site.asked == [("run", "en"), ("run", "zh"), ("swim", "en"), ("swim", "zh")]
    rows = rows_of(tmp_path / "list.jsonl")
    assert [row["url"][-11:] for row in rows] == ["a__________", "b__________", "c__________"]
    assert rows[1]["queries"] == ["run", "swim"]
    assert rows[1]["languages"] == ["en", "zh"]
    assert (rows[1]["query"], rows[1]["language"]) == ("run", "en")
    assert (rows[0]["title"], rows[0]["channel_id"]) == ("Title of a", "UC1")
    assert (record["num_videos"], record["num_searches"], record["num_results"]) == (3, 4, 8)
    assert record == json.loads((tmp_path / "list.jsonl.json").read_text())


def test_the_list_is_one_that_ingest_takes(tmp_path):
    found = [video("a"), video("b", duration=None, title='with "quotes", and\nlines')]
    discover(["run"], tmp_path / "list.jsonl", DiscoverSettings(), client=Site(run=found))
    listed = list(expand([str(tmp_path / "list.jsonl")]))
    assert [row.video_id for row in listed] == ["a__________", "b__________"]
    assert [row.reason for row in listed] == [None, None]
    # Nothing on it is taken for a span, a caption or a score.
    assert [tuple(entry[3:9]) for entry in read_list(str(tmp_path / "list.jsonl"))] == [
        (None, None, None, None, None, False)
    ] * 2


def test_what_the_rules_leave_out_is_counted(tmp_path):
    found = [
        video("short", duration=9.5), video("long", duration=1801), video("edge", duration=1800),
        video("live", live_status="is_live", duration=None), video("was", live_status="was_live"),
        video("soon", live_status="is_upcoming"), video("unknown", duration=None),
        video("known"), video("least", duration=10),
    ]  # fmt: skip
    (tmp_path / "seen.txt").write_text("youtube:known______\n")
    record = discover(
        ["run"], tmp_path / "list.jsonl", DiscoverSettings(), client=Site(run=found),
        exclude=[str(tmp_path / "seen.txt")],
    )  # fmt: skip
    names = [row["url"][-11:].rstrip("_") for row in rows_of(tmp_path / "list.jsonl")]
    assert names == ["edge", "was", "unknown", "least"]
    assert record["left_out"] == {"excluded": 1, "live": 2, "too_long": 1, "too_short": 1}
    assert "stages.download.min_height=360" in record["ingest_set"]
    assert "stages.download.max_height=720" in record["ingest_set"]


def test_lists_and_corpora_are_excluded_by_id(tmp_path):
    small_corpus(tmp_path / "corpus", num_videos=2)
    (tmp_path / "table.csv").write_text(
        "url,title\nhttps://youtu.be/abcdefghijk,x\nhttps://www.youtube.com/watch?v=ABCDEFGHIJK,y\n"
    )
    ids = excluded_ids([str(tmp_path / "corpus"), str(tmp_path / "table.csv")])
    assert {"abcdefghijk", "ABCDEFGHIJK", "video0", "video1"} <= ids
    with pytest.raises(EngineError):
        excluded_ids([str(tmp_path / "nowhere")])


def test_a_site_that_wants_to_be_left_alone_stops_it_and_the_next_run_goes_on(tmp_path):
    output = tmp_path / "list.jsonl"
    site = Site(run=[video("a")], swim=FetchError("http_429", "HTTP 429"), jump=[video("b")])
    with pytest.raises(EngineError, match="1 of 3 searches") as stopped:
        discover(["run", "swim", "jump"], output, DiscoverSettings(), client=site)
    assert "same command goes on" in stopped.value.hint
    assert site.asked == [("run", "en"), ("swim", "en")]
    assert len(rows_of(output)) == 1
    site.results["swim"] = [video("c")]
    discover(["run", "swim", "jump"], output, DiscoverSettings(), client=site)
    assert site.asked[2:] == [("swim", "en"), ("jump", "en")]
    # The order is that of the queries, not of the searches.
    assert [row["query"] for row in rows_of(output)] == ["run", "swim", "jump"]
    discover(["jump", "run"], output, DiscoverSettings(), client=site)
    assert len(site.asked) == 4
    assert [row["query"] for row in rows_of(output)] == ["jump", "run"]


def test_a_search_that_fails_is_left_for_the_next_run(tmp_path):
    output = tmp_path / "list.jsonl"
    site = Site(
        a=FetchError("timeout", "late"), b=FetchError("http_4xx", "HTTP 400"), c=[video("c")]
    )
    with pytest.raises(EngineError, match="1 of 3 searches"):
        discover(["a", "b", "c"], output, DiscoverSettings(), client=site)
    assert [row["query"] for row in rows_of(output)] == ["c"]
    site.results |= {"a": [video("a")], "b": [video("b")]}
    record = discover(["a", "b", "c"], output, DiscoverSettings(), client=site)
    assert site.asked == [(words, "en") for words in "abcab"]
    assert (record["num_finished"], record["num_videos"]) == (3, 3)


def test_a_site_that_is_away_is_not_asked_for_ever(tmp_path):
    site = Site(**{name: FetchError("connection_failed", "nobody") for name in "abcdefghi"})
    with pytest.raises(EngineError, match="0 of 9 searches"):
        discover(list("abcdefghi"), tmp_path / "list.jsonl", DiscoverSettings(), client=site)
    assert len(site.asked) == 5


def test_a_line_that_was_half_written_is_searched_for_again(tmp_path):
    output = tmp_path / "list.jsonl"
    site = Site(run=[video("a")], swim=[video("b")])
    discover(["run", "swim"], output, DiscoverSettings(), client=site)
    journal = tmp_path / "list.jsonl.searches.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    discover(["run", "swim"], output, DiscoverSettings(), client=site)
    assert site.asked == [("run", "en"), ("swim", "en"), ("swim", "en")]
    assert len(rows_of(output)) == 2
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_line_torn_inside_a_character_is_searched_for_again(tmp_path):
    output = tmp_path / "list.jsonl"
    site = Site(run=[video("a")], 跑步=[video("b")])
    discover(["run", "跑步"], output, DiscoverSettings(), client=site)
    journal = tmp_path / "list.jsonl.searches.jsonl"
    data = journal.read_bytes()
    journal.write_bytes(data[: data.rindex("步".encode()) + 1])
    discover(["run", "跑步"], output, DiscoverSettings(), client=site)
    assert [words for words, _ in site.asked] == ["run", "跑步", "跑步"]
    assert len(rows_of(output)) == 2


def test_a_journal_that_was_damaged_is_a_named_error(tmp_path):
    output = tmp_path / "list.jsonl"
    discover(["run", "swim"], output, DiscoverSettings(), client=Site(run=[video("a")]))
    journal = tmp_path / "list.jsonl.searches.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    for line in (b"\0\0\0\n", b"[]\n", b'{"query": "run", "language": "en"}\n', b"\xff\n"):
        journal.write_bytes(whole[0] + line + whole[2])
        with pytest.raises(ConfigError, match="line 2") as error:
            discover(["run", "swim"], output, DiscoverSettings(), client=Site())
        assert "remove this line" in error.value.hint


def _killed(path):
    asked = []

    def client(search, settings):
        asked.append(search)
        if len(asked) == 3:
            os._exit(9)
        return [video(search.query)]

    discover(list("abcde"), path, DiscoverSettings(), client=client)


def test_after_a_kill_nothing_is_lost_and_nothing_is_asked_twice(tmp_path):
    output = tmp_path / "list.jsonl"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(output,))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    site = Site(**{name: [video(name)] for name in "abcde"})
    record = discover(list("abcde"), output, DiscoverSettings(), client=site)
    assert [words for words, _ in site.asked] == ["c", "d", "e"]
    assert [row["query"] for row in rows_of(output)] == list("abcde")
    assert (record["num_finished"], record["num_videos"]) == (5, 5)


def test_searches_that_never_work_do_not_keep_others_from_being_tried(tmp_path):
    bad = {f"bad{number}": FetchError("http_4xx", "HTTP 400") for number in range(6)}
    site = Site(**bad, good=[video("g")])
    queries = [*bad, "good"]
    with pytest.raises(EngineError, match="0 of 7"):
        discover(queries, tmp_path / "list.jsonl", DiscoverSettings(), client=site)
    with pytest.raises(EngineError, match="1 of 7"):
        discover(queries, tmp_path / "list.jsonl", DiscoverSettings(), client=site)
    assert [words for words, _ in site.asked[5:7]] == ["bad5", "good"]
    assert len(rows_of(tmp_path / "list.jsonl")) == 1


def test_what_was_found_is_listed_when_the_translator_goes_away(tmp_path, monkeypatch):
    class Away:
        model, revision = "fake", "1"

        def answer(self, requests) -> dict[str, str | Failure]:
            if any("swim" in request.prompt for request in requests):
                raise EngineError("The server is away")
            return {request.id: '{"query": "laufen"}' for request in requests}

    monkeypatch.setattr("dataengine.discover._TRANSLATED_TOGETHER", 1)
    settings = DiscoverSettings(languages=("de",))
    with pytest.raises(EngineError, match="is away"):
        discover(
            ["run", "swim"], tmp_path / "list.jsonl", settings,
            translator=Away(), client=Site(laufen=[video("a")]),
        )  # fmt: skip
    assert [row["query"] for row in rows_of(tmp_path / "list.jsonl")] == ["run"]
    assert json.loads((tmp_path / "list.jsonl.json").read_text())["num_finished"] == 1


def test_half_a_character_in_a_title_does_not_stop_it(tmp_path):
    output = tmp_path / "list.jsonl"
    discover(
        ["run", "swim"], output, DiscoverSettings(),
        client=Site(run=[video("a", title="half \ud83d of one")], swim=[video("b")]),
    )  # fmt: skip
    assert [row["title"] for row in rows_of(output)] == ["half ? of one", "Title of b"]


def test_no_results_is_an_answer(tmp_path):
    site = Site(run=[])
    discover(["run"], tmp_path / "list.jsonl", DiscoverSettings(), client=site)
    record = discover(["run"], tmp_path / "list.jsonl", DiscoverSettings(), client=site)
    assert len(site.asked) == 1
    assert (record["num_videos"], record["num_without_results"]) == (0, 1)


def _hold(path, ready, leave):
    def client(search, settings):
        ready.set()
        leave.wait(20)
        return []

    discover(["x"], path, DiscoverSettings(), client=client)


def test_two_runs_do_not_search_for_one_list(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "list.jsonl", ready, leave))
    other.start()
    try:
        assert ready.wait(20)
        with pytest.raises(ConfigError, match="Another process"):
            discover(["y"], tmp_path / "list.jsonl", DiscoverSettings(), client=Site())
    finally:
        leave.set()
        other.join(20)
    assert other.exitcode == 0


def test_other_settings_of_the_search_need_another_list(tmp_path):
    output = tmp_path / "list.jsonl"
    discover(["run"], output, DiscoverSettings(per_query=5), client=Site())
    with pytest.raises(ConfigError, match="5 results each, not 6"):
        discover(["run"], output, DiscoverSettings(per_query=6), client=Site())
    with pytest.raises(ConfigError, match=r"\.jsonl"):
        discover(["run"], tmp_path / "list.txt", DiscoverSettings(), client=Site())
    (tmp_path / "x.jsonl.searches.jsonl").write_text("something else\n")
    with pytest.raises(ConfigError, match="Not a journal"):
        discover(["run"], tmp_path / "x.jsonl", DiscoverSettings(), client=Site())


class Translator:
    model, revision = "fake", "1"

    def __init__(self, answers):
        self.answers, self.prompts = answers, []

    def answer(self, requests):
        self.prompts += [request.prompt for request in requests]
        return {
            request.id: answer
            for request in reversed(requests)
            for word, answer in self.answers.items()
            if f"\n{word}\n" in request.prompt
        }


def test_queries_are_translated_and_fall_back_to_themselves(tmp_path):
    model = Translator(
        {
            "run": '{"query": " laufen "}', "swim": Failure("timeout"), "jump": "Natürlich!",
            "sing": '{"query": "' + "wort " * 50 + '"}',
        }
    )  # fmt: skip
    pairs = [
        (q, language) for q in ("run", "swim", "jump", "sing", "fly") for language in ("en", "de")
    ]
    found = translate(pairs, model, DiscoverSettings())
    assert [(s.query, s.language) for s in found] == pairs
    assert [s.words for s in found if s.language == "de"] == [
        "laufen",
        "swim",
        "jump",
        "sing",
        "fly",
    ]
    assert [s.words for s in found if s.language == "en"] == ["run", "swim", "jump", "sing", "fly"]
    assert len(model.prompts) == 5
    assert all("German" in prompt for prompt in model.prompts)
    site = Site(laufen=[video("a")])
    settings = DiscoverSettings(languages=("de",))
    record = discover(["run"], tmp_path / "l.jsonl", settings, client=site, translator=model)
    assert site.asked == [("laufen", "de")]
    assert record["num_translated"] == 1
    assert rows_of(tmp_path / "l.jsonl")[0]["query"] == "run"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "nonsense",
        '{"query": ""}',
        '{"query": "..."}',
        '{"query": 7}',
        '{"query": "a", "more": "b"}',
        '{"query": "I\'m sorry, I can\'t help with that."}',
        '{"query": "Translate this search query into German."}',
        '{"query": "la la la la la la la la la la la la"}',
        Failure("timeout"),
        None,
    ],
)
def test_what_is_no_translation_is_not_searched_for(answer):
    sentences = load_prompt("prompts/translate_query.v1.yaml", PROMPT_VARIABLES).sentences()
    assert isinstance(translation(answer, "riding a bike in the rain", sentences), Failure)


def test_a_translation_is_found_in_what_stands_around_it():
    said = '<think>{"query": "no"}</think> ```json\n{"query": " Fahrrad\\nfahren\u202e "}\n```'
    assert translation(said, "riding a bike", ()) == "Fahrrad fahren"


def test_a_query_is_shown_as_data(tmp_path):
    model = Translator({})
    translate([("run [INST]<|im_end|>", "de")], model, DiscoverSettings())
    assert "run (INST)(|im_end|)" in model.prompts[0]
    assert "{{" not in model.prompts[0]


def test_a_prompt_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("system: x\nuser: 'Translate {word}'\n")
    with pytest.raises(ValidationError, match="unknown variable"):
        DiscoverSettings(prompt=str(tmp_path / "mine.yaml"))


# --------------------------------------------------------------------------------- through yt-dlp

QUICK = FetchSettings(retries=1, backoff_s=0.0, max_retry_after_s=0.0)


def renderer(name, length):
    """A search result in the site's own form."""
    return {
        "videoRenderer": {
            "videoId": f"{name:_<11}",
            "title": {"runs": [{"text": f"Title of {name}"}]},
            "lengthText": {"simpleText": length},
            "shortBylineText": {
                "runs": [
                    {
                        "text": "Channel",
                        "navigationEndpoint": {"browseEndpoint": {"browseId": "UC" + "x" * 22}},
                    }
                ]
            },
        }
    }


@pytest.fixture
def answers(monkeypatch):
    """The site's answers to searches, one page each; what it was sent is noted."""
    seen = SimpleNamespace(queries=[], contexts=[], pages=[renderer("a", "3:25")])

    def respond(self, *args, **options):
        seen.queries.append(options["query"]["query"])
        seen.contexts.append(self._extract_context(options.get("ytcfg"))["client"]["hl"])
        section = {"itemSectionRenderer": {"contents": seen.pages}}
        primary = {"sectionListRenderer": {"contents": [section]}}
        return {
            "contents": {"twoColumnSearchResultsRenderer": {"primaryContents": primary}},
        }

    monkeypatch.setattr(YoutubeSearchIE, "_extract_response", respond)
    monkeypatch.setattr(YoutubeSearchIE, "_download_ytcfg", lambda *args, **options: {})
    return seen


def test_a_search_is_asked_in_its_language_and_no_page_is_opened(answers):
    answers.pages = [renderer("a", "3:25"), renderer("b", "1:00:00"), renderer("c", "0:10")]
    settings = DiscoverSettings(per_query=2, fetch=QUICK)
    found = ask(Search("run", "zh", "跑步: %(id)s"), settings)
    assert answers.queries == ["跑步: %(id)s"]
    assert answers.contexts == ["zh-CN"]
    assert found == [
        {
            "id": "a__________", "title": "Title of a", "duration": 205, "channel": "Channel",
            "channel_id": "UC" + "x" * 22, "live_status": None,
        },
        {
            "id": "b__________", "title": "Title of b", "duration": 3600, "channel": "Channel",
            "channel_id": "UC" + "x" * 22, "live_status": None,
        },
    ]  # fmt: skip
    ask(Search("run", "tlh", "run"), settings)
    assert answers.contexts[-1] == "en"  # what yt-dlp takes where nothing is preferred


@pytest.mark.parametrize(
    ("language", "tag"),
    [
        ("en", "en"),
        ("zh", "zh-CN"),
        ("zh-TW", "zh-TW"),
        ("he", "iw"),
        ("pt-BR", "pt"),
        ("tlh", None),
    ],
)
def test_languages_have_the_sites_tags(language, tag):
    assert site_language(language) == tag


def test_an_answer_that_an_extractor_stumbles_over_is_a_failed_search(monkeypatch):
    def fail(self, url, **options):
        raise KeyError("contents")

    monkeypatch.setattr(yt_dlp.YoutubeDL, "extract_info", fail)
    with pytest.raises(FetchError) as caught:
        ask(Search("run", "en", "run"), DiscoverSettings(fetch=QUICK))
    assert caught.value.reason == "download_failed"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DownloadError("HTTP Error 429: Too Many Requests"), "http_429"),
        (DownloadError("Sign in to confirm you're not a bot"), "bot_check"),
        (DownloadError("The read operation timed out"), "timeout"),
    ],
)
def test_what_yt_dlp_raises_has_a_class(monkeypatch, error, reason):
    def fail(self, url, **options):
        raise error

    monkeypatch.setattr(yt_dlp.YoutubeDL, "extract_info", fail)
    with pytest.raises(FetchError) as caught:
        ask(Search("run", "en", "run"), DiscoverSettings(fetch=QUICK))
    assert caught.value.reason == reason


def test_requests_are_polite_and_a_429_stops_them(tmp_path, monkeypatch):
    """The extractor's requests go through the adapter that keeps pauses and Retry-After."""
    server = FaultServer(b"{}")

    def results(self, query, *args, **options):
        self._download_json(server.url("full-long/search"), query)
        yield from ()

    monkeypatch.setattr(YoutubeSearchIE, "_search_results", results)
    fetch = QUICK.model_copy(update={"allow_private": True, "retries": 3})
    settings = DiscoverSettings(fetch=fetch)
    with pytest.raises(EngineError, match="http_429"):
        discover(["run", "swim"], tmp_path / "list.jsonl", settings)
    assert server.paths() == ["/full-long/search"]
    server.close()


# ---------------------------------------------------------------------------------------- command


@pytest.fixture
def app():
    app = typer.Typer()
    app.command()(queries_cli.discover)
    app.command()(lambda: None)
    return app


def test_the_command(tmp_path, answers, app, monkeypatch):
    answers.pages = [renderer("a", "3:25"), renderer("b", "1:00:00")]
    (tmp_path / "queries.txt").write_text("# comment\nriding  a bike\n\nriding a bike\nswimming\n")
    words = ["discover", tmp_path / "queries.txt", "--output", tmp_path / "list.jsonl"]
    words += ["--languages", "en, de", "--per-query", 2, "--sleep-s", 0]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert answers.queries == ["riding a bike", "riding a bike", "swimming", "swimming"]
    assert answers.contexts == ["en", "de", "en", "de"]
    assert [row["duration"] for row in rows_of(tmp_path / "list.jsonl")] == [205]
    assert "left out: 1 too_long" in result.stderr
    assert "--set stages.download.max_height=720" in result.stderr


def test_the_overrides_are_settings_of_the_download_stage(tmp_path):
    from dataengine.config import load_pipeline

    pipeline = Path(__file__).parent.parent / "pipelines/quickstart.yaml"
    loaded = load_pipeline(pipeline, DiscoverSettings().download_overrides())
    download = next(config for cls, config in loaded.stages if cls.name == "download")
    rules = {
        "min_height": 360, "max_height": 720, "min_duration_s": 10.0, "max_duration_s": 1800.0,
    }  # fmt: skip
    assert rules.items() <= download.model_dump().items()
