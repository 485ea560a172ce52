# SPDX-License-Identifier: Apache-2.0
"""Statistics and comparisons of small corpora, every number checked by hand or by NumPy."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from dataengine.corpus import Corpus
from dataengine.corpus_cli import corpus_app
from dataengine.errors import ConfigError, CorpusError, EngineError
from dataengine.query import subsets
from dataengine.stats import compare as compare_of
from dataengine.stats import numbers as numbers_of
from dataengine.stats.compare import compare
from dataengine.stats.measure import Statistics, StatsSettings, measure
from dataengine.stats.numbers import Names, Numbers
from dataengine.stats.page import chart, render, render_comparison
from tests.helpers import clip_row, clips_table, ledger_row

PERCENTS = (10, 30, 50, 70, 90)


def make(path: Path, videos: dict[str, list[dict[str, Any]]]) -> str:
    """A corpus of videos whose clips lie one after another; ``ms`` is a clip's length."""
    corpus = Corpus.create(str(path))
    corpus.take_over("r-1")
    for video_id, clips in videos.items():
        rows, start = [], 0
        for columns in clips:
            length = columns.get("ms", 1000)
            rest = {name: value for name, value in columns.items() if name != "ms"}
            rows.append(clip_row(video_id, start, start + length, **rest))
            start += length
        ledger = ledger_row(video_id, rows, duration_ms=start)
        corpus.commit(clips_table(rows), [ledger], run_id="r-1", fingerprint="f")
    return str(path)


def number(found: Statistics, name: str) -> Numbers:
    return next(n for n in (*found.numbers, *found.lengths) if n.name == name)


def names(found: Statistics, name: str) -> Names:
    return next(n for n in found.names if n.name == name)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve clips of three videos."""
    rng = np.random.default_rng(5)
    clips = [
        {
            "ms": int(ms),
            "clip_score": float(np.float32(score)),
            "aesthetic_score": None if language is None else float(np.float32(10 * score)),
            "language": language,
            "transcript": "hola el mundo" if language == "es" else None,
            "width": width,
            "height": height,
            "has_audio": language is not None,
            "categories": ["Music", "Music"] if width == 320 else None,
            "caption": caption,
        }
        for ms, score, language, (width, height), caption in zip(
            rng.integers(800, 20_000, 12),
            rng.normal(0.3, 0.1, 12),
            ["es", "en", None, "es", None, "en", "es", None, None, "es", "de", "es"],
            [(1920, 1080), (320, 240), (1080, 1920)] * 4,
            ["A man is running.", "Two women dance.", "A red car drives past a black man."] * 4,
            strict=True,
        )
    ]
    path = tmp_path_factory.mktemp("known") / "corpus"
    return make(path, {"a": clips[:2], "b": clips[2:5], "c": clips[5:]})


def catalog(data: str, *columns: str) -> pa.Table:
    return Corpus.open(data).catalog(list(columns))


def test_numbers_are_numpys(known: str) -> None:
    found = measure(known)
    table = catalog(known, "duration_ms", "clip_score", "aesthetic_score")
    for name, values in (
        ("duration_s", table["duration_ms"].to_numpy() / 1000),
        ("clip_score", table["clip_score"].to_numpy().astype(float)),
        ("aesthetic_score", table["aesthetic_score"].drop_null().to_numpy().astype(float)),
    ):
        told = number(found, name)
        assert told.num == len(values)
        assert told.num_missing == 12 - len(values)
        assert told.minimum == values.min()
        assert told.maximum == values.max()
        assert told.mean == pytest.approx(values.mean(), rel=1e-6)
        for percent in PERCENTS:
            at = np.percentile(values, percent, method="inverted_cdf")
            assert told.percentiles[f"p{percent}"] == at
            assert told.above[f"p{percent}"] == (values > at).sum()
        counts, _ = np.histogram(values, told.edges)
        assert told.counts == tuple(counts)
        assert told.num_below == (values < told.edges[0]).sum()
        assert sum(told.counts) + told.num_below + told.num_above == len(values)
    assert found.hours == pytest.approx(table["duration_ms"].to_numpy().sum() / 3.6e6)


def test_clips_per_video_resolutions_languages_and_categories(known: str) -> None:
    found = measure(known)
    assert (found.num_clips, found.num_videos) == (12, 3)
    per_video = number(found, "clips_per_video")
    assert (per_video.minimum, per_video.maximum, per_video.mean) == (2, 7, 4)
    assert per_video.percentiles["p50"] == 3
    by_size = dict(zip(per_video.edges, per_video.counts, strict=False))
    assert {size: num for size, num in by_size.items() if num} == {2: 1, 3: 1, 7: 1}
    assert names(found, "language").counts == (("es", 5), ("en", 2), ("de", 1))
    assert names(found, "language").num_missing == 4
    assert dict(names(found, "resolution").counts) == {
        "1920 x 1080": 4,
        "320 x 240": 4,
        "1080 x 1920": 4,
    }
    assert dict(names(found, "aspect_ratio").counts) == {"16:9": 4, "4:3": 4, "9:16": 4}
    assert dict(names(found, "short_side").counts) == {"1080 lines": 8, "240 lines": 4}
    assert dict(names(found, "has_audio").counts) == {"with sound": 8, "without sound": 4}
    assert names(found, "category").counts == (("Music", 4),)


def test_words_verbs_and_people(known: str) -> None:
    found = measure(known)
    assert found.words.num_words == 4 * (4 + 3 + 8)
    assert dict(found.words.top)["man"] == 8
    assert "a" not in dict(found.words.top)
    assert number(found, "caption_words").percentiles["p90"] == 8
    (spanish,) = found.transcripts
    assert (spanish.language, spanish.num_clips, spanish.num_words) == ("es", 5, 15)
    assert spanish.top == (("hola", 5), ("mundo", 5))
    assert dict(found.actionness.top) == {"run": 4, "dance": 4, "drive": 4}
    assert (found.actionness.num_verbs, found.actionness.mean) == (3, 1.0)
    topics = {topic.name: topic for topic in found.bias}
    gender = {group.name: group for group in topics["gender"].groups}
    assert (gender["men"].num_mentions, gender["women"].num_mentions) == (8, 4)
    assert gender["men"].mention_ratio == pytest.approx(2 / 3)
    assert gender["men"].published == {"InternVid": 0.6427, "InternVideo2": 0.6204}
    assert topics["gender"].caption_ratio == 1
    # The car is red and the man is black: only the second is said of a person.
    race = {group.name: group.num_captions for group in topics["race"].groups}
    assert race == {"Asian": 0, "Black": 4, "White": 0, "Middle Eastern": 0, "Latin American": 0}


@pytest.mark.parametrize(
    ("caption", "verbs"),
    [
        ("The dancing man walks.", {"walk"}),
        ("People walk on a walk.", {"walk"}),
        ("A building with paintings.", set()),
        ("She is frobnicating it, then swam away.", {"frobnicating", "swim"}),
        ("Rides, rode, riding.", {"ride"}),
    ],
)
def test_a_verb_is_a_verb_where_no_noun_stands(
    tmp_path: Path, caption: str, verbs: set[str]
) -> None:
    found = measure(make(tmp_path / "c", {"a": [{"caption": caption}]}))
    assert {verb for verb, _ in found.actionness.top} == verbs


def test_scripts_without_spaces_count_in_pairs(tmp_path: Path) -> None:
    clips = [
        {"language": "zh", "transcript": "今天去公园 OK"},
        {"language": "th", "transcript": "กำลัง"},
        {"language": "ar", "transcript": "الأطفال يلعبون"},
        {"language": None, "transcript": "l\u2019été don't"},
        {"language": "fr", "transcript": " -- "},
    ]
    found = measure(make(tmp_path / "c", {"a": clips}))
    told = {words.language: dict(words.top) for words in found.transcripts}
    assert told["zh"] == {"今天": 1, "天去": 1, "去公": 1, "公园": 1, "ok": 1}
    assert set(told["th"]) == {"กำลั", "ลัง"}
    assert set(told["ar"]) == {"الأطفال", "يلعبون"}
    assert set(told["unknown"]) == {"l\u2019été", "don't"}
    assert "fr" not in told
    assert number(found, "transcript_words").num_missing == 1


def test_where_and_subsets(known: str) -> None:
    found = measure(known, StatsSettings(where="clip_score > p70 -- the best"))
    assert found.num_clips == 3
    assert [p.column for p in found.percentiles] == ["clip_score"]
    subsets.make_subset(
        Corpus.open(known),
        "best",
        subsets.Definition(where="clip_score > p70"),
        replace_existing=True,
    )
    assert measure(f"{known}#best").num_clips == 3
    with pytest.raises(ConfigError):
        measure(known, StatsSettings(where="nonsense > 3"))
    with pytest.raises(CorpusError):
        measure(f"{known}#nothing")


def test_nothing_and_one_and_null(tmp_path: Path) -> None:
    empty = measure(make(tmp_path / "empty", {}))
    assert (empty.num_clips, empty.num_videos, empty.hours) == (0, 0, 0)
    assert "No clip to count" in render(empty)
    one = measure(make(tmp_path / "one", {"a": [{"ms": 2500, "clip_score": 0.25}]}))
    told = number(one, "duration_s")
    assert set(told.percentiles.values()) == {2.5}
    assert sum(told.counts) == 1
    render(one)
    nothing = dict.fromkeys(
        ["caption", "tags", "width", "height", "has_audio", "fps", "clip_score"]
    )
    null = measure(make(tmp_path / "null", {"a": [nothing, nothing | {"clip_score": math.nan}]}))
    assert number(null, "clip_score").num == 0
    assert number(null, "clip_score").num_missing == 2
    assert null.words.num_words == 0
    assert null.actionness.num_captions == 0
    assert "Without values" in render(null)
    for found in (empty, one, null):
        json.dumps(found.to_dict(), allow_nan=False)
    both = compare(str(tmp_path / "empty"), str(tmp_path / "one"))
    assert both.overlap.clip_jaccard == 0
    assert all(pair.distance is None for pair in both.numbers)
    render_comparison(both)


def test_added_columns_are_counted(tmp_path: Path) -> None:
    path = make(tmp_path / "c", {"a": [{"clip_score": 0.1}, {"clip_score": 0.3}]})
    corpus = Corpus.open(path)
    about = json.loads((tmp_path / "c" / "corpus.json").read_text())
    about["columns"] = {"clip_score_two": "clip_score", "caption_llm": "caption"}
    corpus.publish("corpus.json", lambda file: file.write(json.dumps(about).encode()))
    found = measure(path)
    assert number(found, "clip_score_two").num_missing == 2
    assert "clip_score_two" in render(found)


def test_a_large_corpus_is_sampled_always_alike(known: str) -> None:
    sampled = StatsSettings(num_texts=6, exact_clips=3)
    found = measure(known, sampled)
    assert found.sampled
    assert 0 < found.num_texts < 12
    assert not number(found, "duration_s").exact
    durations = catalog(known, "duration_ms")["duration_ms"].to_numpy() / 1000
    assert (
        abs(number(found, "duration_s").percentiles["p50"] - np.median(durations))
        < np.ptp(durations) / 4
    )
    assert measure(known, sampled).words == found.words
    assert f"a sample of {found.num_texts} clips" in render(found)
    assert found.captions is None


def test_the_page_is_one_file_and_escapes(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script> & <b>bold</b>"
    clips = [{"caption": nasty, "language": "<i>", "transcript": nasty, "categories": [nasty]}] * 2
    clips = [clip | {"ms": 1000 + place} for place, clip in enumerate(clips)]
    path = make(tmp_path / "c<u>d", {video: clips for video in "abcdefghijkl"})
    for page in (render(measure(path)), render_comparison(compare(path, path))):
        assert "<script" not in page
        assert "<b>bold" not in page
        assert "<i>" not in page
        assert "<u>" not in page
        assert not re.search(r'(src|href)="(?!#)', page)
        assert "@import" not in page
        assert page.count('role="img"') == page.count("<svg")


def test_a_chart_says_what_it_shows(known: str) -> None:
    made = chart(number(measure(known), "duration_s"))
    assert made.unit == "seconds"
    assert made.of == "clips"
    assert "12 clips" in made.said
    assert "p50" in made.said
    floor = made.up[0].at
    assert all(bar.y + bar.height == pytest.approx(floor) for bar in made.series[0])
    assert next(mark.said for mark in made.marks).startswith("p10")


def test_funnel_and_costs_are_of_all_runs(tmp_path: Path) -> None:
    path = make(tmp_path / "c", {"a": [{}, {}], "b": [{}]})
    corpus = Corpus.open(path)
    lost = {
        "stage": "segment",
        "reason": "clip_too_short",
        "num_clips": 3,
        "duration_ms": 3_600_000,
    }
    dropped = ledger_row("d", [], dropped_clips=[lost], duration_ms=7_200_000)
    corpus.commit(clips_table([]), [dropped], run_id="r-1", fingerprint="f")
    stage = {"num_in": 5, "num_out": 4, "busy_s": 1800.0, "cpu_s": 900.0, "gpu_s": 0.0}
    for run in ("r-1", "r-2"):
        corpus.publish(
            f"runs/{run}/metrics.json", lambda f: f.write(json.dumps({"score": stage}).encode())
        )
    corpus.publish("runs/r-3/metrics.json", lambda file: file.write(b"{"))
    found = measure(path)
    assert (found.funnel.num_videos, found.funnel.kept_videos, found.funnel.num_clips) == (3, 2, 6)
    assert [(loss.stage, loss.num, loss.hours) for loss in found.funnel.clip_losses] == [
        ("segment", 3, 1.0)
    ]
    (cost,) = found.costs
    assert (cost.stage, cost.num_runs, cost.num_in, cost.busy_hours, cost.cpu_hours) == (
        "score",
        2,
        10,
        1.0,
        0.5,
    )


# ---------------------------------------------------------------------------------------- compare


def test_two_sides(tmp_path: Path) -> None:
    shared = [{"ms": 1000, "clip_score": 0.1, "language": "en", "caption": "a dog runs"}] * 2
    a = make(
        tmp_path / "a", {"x": shared, "y": [{"ms": 9000, "clip_score": 0.9, "caption": "dog dog"}]}
    )
    b = make(
        tmp_path / "b", {"x": shared, "z": [{"ms": 1500, "language": "de", "caption": "a cat"}] * 2}
    )
    found = compare(a, b)
    assert found.overlap == compare_of.Overlap(2, 1, 2 / 5, 1 / 3)
    distances = {
        pair.name: pair.distance for pair in (*found.numbers, *found.names, *found.lengths)
    }
    # Durations: 1, 1, 9 and 1, 1, 1.5, 1.5: after 1, two thirds against a half; after 1.5, against all.
    assert distances["duration_s"] == pytest.approx(1 / 3)
    assert distances["clip_score"] == pytest.approx(1 / 3)
    assert distances["language"] == pytest.approx(0.5)
    assert distances["clips_per_video"] == pytest.approx(0.5)
    assert distances["caption_words"] == pytest.approx(1 / 6)
    assert distances["resolution"] == 0
    for pair in found.numbers:
        assert pair.a.edges == pair.b.edges
    assert found.words_a[0].word == "dog"
    assert (found.words_a[0].num_a, found.words_a[0].num_b) == (4, 2)
    assert found.words_b[0].word == "cat"
    render_comparison(found)


def test_many_values_are_compared_on_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    paths = [
        make(
            tmp_path / name,
            {
                "v": [
                    {"ms": int(ms), "clip_score": score}
                    for ms, score in zip(lengths, scores, strict=True)
                ]
            },
        )
        for name, lengths, scores in (
            ("a", rng.integers(900, 9000, 60), rng.normal(0.3, 0.1, 60)),
            ("b", [*rng.integers(900, 9000, 49), 900_000], [None, *rng.normal(0.4, 0.1, 49)]),
        )
    ]
    exact = {pair.name: pair for pair in compare(paths[0], paths[1]).numbers}
    monkeypatch.setattr(compare_of, "EXACT_VALUES", 10)
    gridded = {pair.name: pair for pair in compare(paths[0], paths[1]).numbers}
    assert (exact["clip_score"].exact, gridded["clip_score"].exact) == (True, False)
    for name, pair in exact.items():
        assert gridded[name].distance == pytest.approx(pair.distance, abs=0.02)


def test_kolmogorov_smirnov_by_hand() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 30, 200), rng.integers(5, 40, 300)
    expected = max(abs((a <= x).mean() - (b <= x).mean()) for x in range(41))
    values = [np.unique(sample, return_counts=True) for sample in (a, b)]
    assert compare_of.kolmogorov_smirnov(*values[0], *values[1]) == pytest.approx(expected)
    assert compare_of.kolmogorov_smirnov(*values[0], *values[0]) == 0
    far = values[0][0] + 100, values[0][1]
    assert compare_of.kolmogorov_smirnov(*values[0], *far) == 1


def test_the_odds_are_monroes() -> None:
    counts = {"dog": (30, 10), "cat": (5, 20), "the": (65, 170)}
    odds = {word.word: word for word in compare_of.word_odds(counts, 100, 200)}
    prior = 1000 * np.array([40, 25, 235]) / 300
    a, b = np.array([30, 5, 65]) + prior, np.array([10, 20, 170]) + prior
    delta = np.log(a / (1100 - a)) - np.log(b / (1200 - b))
    z = delta / np.sqrt(1 / a + 1 / b)
    for place, word in enumerate(counts):
        assert odds[word].log_odds == pytest.approx(delta[place])
        assert odds[word].z == pytest.approx(z[place])
    assert list(odds)[-1] == "dog"
    assert compare_of.word_odds({"a": (3, 4)}, 3, 4) == []


def test_bins_hold_nearly_all_and_end_round() -> None:
    values = [*range(100), 100_000]
    summary = numbers_of.summary_of_counts([(value, 1) for value in values])
    bins = numbers_of.bins_of(summary, whole=True)
    assert bins is not None
    assert bins.high < 200
    told = numbers_of.of_counts("n", [(value, 1) for value in values], of="clips")
    assert told.num_above >= 1
    assert sum(told.counts) + told.num_below + told.num_above == 101


# ------------------------------------------------------------------------------------ command line


def test_the_commands(known: str, tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(corpus_app, ["stats", known])
    assert shown.exit_code == 0, shown.output
    assert "12 clips of 3 videos" in shown.output
    page = tmp_path / "page.html"
    told = run(corpus_app, ["stats", known, "--html", str(page), "--json", "--no-alarms"])
    data = json.loads(told.stdout)
    assert (data["format"], data["num_clips"], data["captions"]) == (1, 12, None)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    told = run(corpus_app, ["compare", known, known, "--json", "--html", str(page)])
    assert json.loads(told.stdout)["overlap"]["clip_jaccard"] == 1
    nowhere = run(corpus_app, ["stats", known, "--html", str(tmp_path / "no" / "page.html")])
    assert isinstance(nowhere.exception, EngineError)
    shown = run(corpus_app, ["compare", known, known])
    assert shown.exit_code == 0, shown.output
