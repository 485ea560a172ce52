# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataengine.compact import compact
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError
from dataengine.query import percentiles, subsets
from dataengine.query.percentiles import resolve
from dataengine.query.sql import connect
from dataengine.query.subsets import Definition, make_subset, preset, read_definition
from tests.helpers import clip_row, clips_table, ledger_row

SIZES = (1, 2, 3, 5, 8, 13, 21, 34)
"""Clips of the videos of the corpus below: 87 clips."""


def make_corpus(path, per_shard: int = 1) -> Corpus:
    corpus = Corpus.create(str(path))
    corpus.take_over("r-1")
    rng = np.random.default_rng(0)
    videos = []
    for video, size in enumerate(SIZES):
        rows = []
        for clip in range(size):
            start, scores = 200_000 * clip, rng.random(3)
            rows.append(
                clip_row(
                    f"v{video}", start, start + 400 + 20_000 * (clip % 8),
                    clip_score=None if clip == 3 else float(scores[0]),
                    aesthetic_score=10 * float(scores[1]),
                )
            )  # fmt: skip
        videos.append((f"v{video}", rows))
    for at in range(0, len(videos), per_shard):
        rows = [row for _, part in videos[at : at + per_shard] for row in part]
        ledger = [ledger_row(name, part) for name, part in videos[at : at + per_shard]]
        corpus.commit(clips_table(rows), ledger, run_id="r-1", fingerprint="f")
    return corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("s") / "c")


def ids(corpus, name):
    return pq.read_table(corpus.path("subsets", f"{name}.parquet"))["clip_id"].to_pylist()


def one(db, sql):
    """The single value that a SELECT gives."""
    ((value,),) = db.execute(sql).fetchall()
    return value


def draw(corpus, name, definition, **options):
    subset = make_subset(corpus, name, definition, replace_existing=True, **options)
    drawn = ids(corpus, name)
    assert len(drawn) == len(set(drawn)) == subset.num_clips
    return drawn


def test_locators_lead_to_the_clips(corpus):
    draw(corpus, "x", Definition(order="div", num_clips=20))
    rows = pq.read_table(corpus.path("subsets", "x.parquet")).to_pylist()
    assert rows == sorted(rows, key=lambda r: (r["shard"], r["row_group"], r["row"]))
    for row in rows:
        clip = corpus.read_clip(row, ["clip_id", "video_id"])
        assert clip == {"clip_id": row["clip_id"], "video_id": row["video_id"]}


def test_the_same_seed_draws_the_same_clips_however_they_are_stored(corpus, tmp_path):
    definition = Definition(order="div", num_clips=30, seed=7)
    expected = set(draw(corpus, "x", definition))
    assert expected == set(draw(corpus, "y", definition, threads=1))
    other = make_corpus(tmp_path / "c", per_shard=3)
    assert expected == set(draw(other, "x", definition))
    compact(other)
    assert expected == set(draw(other, "x", definition, memory="500MB"))
    assert expected != set(draw(other, "x", replace(definition, seed=8)))


def test_div_draws_clips_as_often_as_their_weights_say(tmp_path):
    """The first clip drawn is of each video equally often: weight 1 / size, size clips."""
    corpus = make_corpus(tmp_path / "c", per_shard=8)
    num_draws = 300
    first, drawn = np.zeros(len(SIZES)), np.zeros(len(SIZES))
    with connect(corpus) as db:
        for seed in range(num_draws):
            subsets._draw(db, corpus, "x", Definition(order="div", num_clips=1, seed=seed))
            video = one(db, "select video_id from drawn")
            first[int(video[1:])] += 1
        for seed in range(num_draws):
            subsets._draw(db, corpus, "x", Definition(order="uniform", num_clips=1, seed=seed))
            video = one(db, "select video_id from drawn")
            drawn[int(video[1:])] += 1
    # 99.9 % of chi-square with 7 degrees of freedom
    assert _chi_square(first, np.full(len(SIZES), num_draws / len(SIZES))) < 24.3
    assert _chi_square(drawn, num_draws * np.array(SIZES) / sum(SIZES)) < 24.3
    # ... and neither passes for the other, so the test can fail.
    assert _chi_square(drawn, np.full(len(SIZES), num_draws / len(SIZES))) > 24.3


def _chi_square(seen, expected):
    return float(((seen - expected) ** 2 / expected).sum())


def test_clips_per_video_of_a_large_draw_are_those_of_drawing_one_by_one(tmp_path):
    """Against NumPy's own weighted choice without replacement, over many draws."""
    corpus = make_corpus(tmp_path / "c", per_shard=8)
    num_draws, num_clips = 200, 25
    video_of = np.repeat(np.arange(len(SIZES)), SIZES)
    weights = 1 / np.array(SIZES)[video_of]
    rng = np.random.default_rng(1)
    expected = np.zeros(len(SIZES))
    for _ in range(4000):
        chosen = rng.choice(len(video_of), num_clips, replace=False, p=weights / weights.sum())
        expected += np.bincount(video_of[chosen], minlength=len(SIZES))
    expected *= num_draws / 4000
    seen = np.zeros(len(SIZES))
    with connect(corpus) as db:
        for seed in range(num_draws):
            subsets._draw(db, corpus, "x", Definition(order="div", num_clips=num_clips, seed=seed))
            for video, count in db.execute(
                "select video_id, count(*) from drawn group by all"
            ).fetchall():
                seen[int(video[1:])] += count
    # Draws without replacement vary less than independent ones, so this is a strict bound.
    assert _chi_square(seen, expected) < 24.3


def test_flt_is_length_then_the_top_30_percent_then_div(corpus):
    drawn = draw(corpus, "x", preset("flt"))
    rows = corpus.catalog(["clip_id", "duration_ms", "clip_score"]).to_pylist()
    fitting = [r for r in rows if 1000 <= r["duration_ms"] <= 120_000]
    scores = sorted(r["clip_score"] for r in fitting if r["clip_score"] is not None)
    bound = np.quantile(np.array(scores, dtype=np.float32), 0.7, method="inverted_cdf")
    expected = {r["clip_id"] for r in fitting if r["clip_score"] and r["clip_score"] > bound}
    assert set(drawn) == expected
    about = read_definition(corpus, "x")
    assert about["percentiles"][0]["percent"] == 70
    assert str(bound)[:6] in about["percentiles"][0]["value"]


def test_top_takes_the_highest_scores(corpus):
    drawn = draw(corpus, "x", replace(preset("internvid2"), num_clips=11))
    rows = corpus.catalog(["clip_id", "clip_score"]).to_pylist()
    rows = sorted((r for r in rows if r["clip_score"] is not None), key=lambda r: -r["clip_score"])
    assert set(drawn) == {r["clip_id"] for r in rows[:11]}


def test_aes_has_no_number_and_takes_all_that_pass(corpus):
    drawn = draw(corpus, "x", preset("aes"))
    rows = corpus.catalog(["clip_id", "aesthetic_score"]).to_pylist()
    assert set(drawn) == {r["clip_id"] for r in rows if r["aesthetic_score"] >= 4}


@pytest.mark.parametrize("order", ["uniform", "div"])
def test_at_most_so_many_clips_of_a_video(corpus, order):
    drawn = draw(corpus, "x", Definition(order=order, per_video=2))
    counts = {v: sum(i.startswith(f"v{v}_") for i in drawn) for v in range(len(SIZES))}
    assert counts == {v: min(2, size) for v, size in enumerate(SIZES)}
    assert len(draw(corpus, "x", Definition(order=order, per_video=2, num_clips=9))) == 9


def test_more_than_there_are_is_all(corpus):
    assert len(draw(corpus, "x", Definition(order="div", num_clips=10_000))) == sum(SIZES)


@pytest.mark.parametrize("order", ["div", "uniform", "top"])
def test_every_number_of_clips_is_met_exactly(corpus, order):
    scores = corpus.catalog(["clip_score"])["clip_score"].to_pylist()
    most = sum(s is not None for s in scores) if order == "top" else len(scores)
    for num_clips in (1, 2, 44, most - 1, most, most + 1):
        drawn = draw(corpus, "x", Definition(order=order, num_clips=num_clips))
        assert len(drawn) == min(num_clips, most)


def test_a_bound_that_was_too_low_is_raised(corpus, monkeypatch):
    expected = set(draw(corpus, "x", Definition(order="div", num_clips=40)))
    exact = subsets._key_bound
    monkeypatch.setattr(subsets, "_key_bound", lambda sizes, n: exact(sizes, n - 60 + 1e-9))
    assert set(draw(corpus, "x", Definition(order="div", num_clips=40))) == expected


def test_a_mixture_has_its_shares_and_no_clip_twice(corpus):
    draw(corpus, "a", Definition(where="clip_score > p50"))
    draw(corpus, "b", Definition(where="aesthetic_score > p40"))
    drawn = draw(corpus, "m", Definition(mix={"a": 3.0, "b": 1.0}, num_clips=21))
    about = read_definition(corpus, "m")
    assert about["taken"] == {"a": 16, "b": 5}
    assert sum(i in set(ids(corpus, "a")) for i in drawn) >= 16
    assert drawn == draw(corpus, "m", Definition(mix={"a": 3.0, "b": 1.0}, num_clips=21))


def test_what_one_subset_cannot_give_the_others_give(corpus):
    draw(corpus, "a", Definition(num_clips=4))
    draw(corpus, "b", Definition(num_clips=50))
    draw(corpus, "c", Definition(num_clips=60, seed=1))
    union = set(ids(corpus, "a")) | set(ids(corpus, "b")) | set(ids(corpus, "c"))
    for num_clips in (20, 40, len(union), 500):
        drawn = draw(
            corpus, "m", Definition(mix={"a": 8.0, "b": 1.0, "c": 1.0}, num_clips=num_clips)
        )
        assert len(drawn) == min(num_clips, len(union))
        assert set(ids(corpus, "a")) <= set(drawn)
    assert set(drawn) == union


def test_the_file_says_how_to_make_it_again(corpus):
    definition = Definition(where="clip_score > 0.5 -- half", order="div", num_clips=9, seed=3)
    drawn = draw(corpus, "x", definition)
    about = read_definition(corpus, "x")
    assert Definition(**about["definition"]) == definition
    assert about["corpus"]["num_clips"] == sum(SIZES)
    assert about["num_clips"] == 9 < about["num_candidates"]
    assert draw(corpus, "x", Definition(**about["definition"])) == drawn


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (Definition(where="nonsense > 1"), "nonsense"),
        (Definition(where="clip_score > p101"), "between p0 and p100"),
        (Definition(where="clip_score >"), "syntax"),
        (Definition(where="clip_score > 99"), "No clip passes"),
        (Definition(order="div", num_clips=0), "at least 1"),
        (Definition(per_video=0), "at least 1"),
        (Definition(order="top", num_clips=5, score="nonsense"), "nonsense"),
        (Definition(mix={"nowhere": 1.0}, num_clips=3), "Unknown subset"),
        (Definition(mix={"x": 1.0}), "How many"),
    ],
)
def test_what_cannot_be_drawn_is_said(corpus, definition, message):
    draw(corpus, "x", Definition(num_clips=3))
    with pytest.raises((ConfigError, CorpusError), match=message):
        make_subset(corpus, "never", definition)
    assert "never" not in corpus.names("subsets")


def test_a_name_is_taken_once_and_must_be_a_name(corpus):
    draw(corpus, "x", Definition(num_clips=3))
    with pytest.raises(CorpusError, match="already"):
        make_subset(corpus, "x", Definition(num_clips=3))
    for name in ("", "a/b", "../x", ".x", "a b"):
        with pytest.raises(ConfigError, match="cannot be called"):
            make_subset(corpus, name, Definition(num_clips=3))


# ----------------------------------------------------------------------------- percentiles


@pytest.mark.parametrize("percent", [0, 1, 37, 50, 70, 99, 100])
def test_a_percentile_is_numpys(corpus, percent):
    scores = [s for s in corpus.catalog(["clip_score"])["clip_score"].to_pylist() if s is not None]
    bound = np.quantile(np.array(scores, np.float32), percent / 100, method="inverted_cdf")
    with connect(corpus) as db:
        found = resolve(db, f"clip_score <= p{percent}")
        count = one(db, f"select count(*) from clips where {found.condition}")
    assert count == sum(np.float32(s) <= bound for s in scores)


@pytest.mark.parametrize("column", ["clip_score", "duration_ms", "video_id", "fps"])
def test_a_percentile_of_many_clips_is_the_same(tmp_path, monkeypatch, column):
    """The way that does not sort: many values, few different ones, all equal."""
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    rng = np.random.default_rng(0)
    rows = [
        clip_row(f"v{i % 7}", 1000 * i, 1000 * i + 500 + 100 * (i % 3), clip_score=float(s))
        for i, s in enumerate(rng.random(30_000))
    ]
    for row in rows:
        row |= {"video": None, "frames": [b"j"], "frame_ms": [0]}
    by_video = sorted(rows, key=lambda row: row["video_id"])
    ledger = [
        ledger_row(f"v{v}", [row for row in by_video if row["video_id"] == f"v{v}"])
        for v in range(7)
    ]
    corpus.commit(clips_table(by_video), ledger, run_id="r-1", fingerprint="f")
    condition = " and ".join(f"{column} >= p{p}" for p in (0, 3, 50, 70, 100))
    with connect(corpus) as db:
        expected = resolve(db, condition).percentiles
        monkeypatch.setattr(percentiles, "_SORTED_CLIPS", 0)
        monkeypatch.setattr(percentiles, "_MARGIN", 0.2)  # a sample of few blocks
        assert resolve(db, condition).percentiles == expected


def test_percentiles_are_over_the_clips_that_pass_the_other_conditions(corpus):
    condition = "video_id = 'v7' and clip_score > p50"
    rows = corpus.catalog(["video_id", "clip_score"]).to_pylist()
    scores = [
        r["clip_score"] for r in rows if r["video_id"] == "v7" and r["clip_score"] is not None
    ]
    everyone = [r["clip_score"] for r in rows if r["clip_score"] is not None]
    with connect(corpus) as db:
        for over_all, values in ((False, scores), (True, everyone)):
            resolved = resolve(db, condition, over_all=over_all)
            found = one(db, f"select {resolved.percentiles[0].value}::double")
            assert found == pytest.approx(np.quantile(values, 0.5, method="inverted_cdf"))


@pytest.mark.parametrize(
    ("condition", "columns"),
    [
        ("(clip_score > p50 or aesthetic_score > p99_5) and width > 0", ["clip_score", "aesthetic_score"]),
        ("duration_ms between p10 and p90 -- most", ["duration_ms", "duration_ms"]),
        ("not (p50 < clip_score)", ["clip_score"]),
        ("caption like '%p50%'", []),
    ],
)  # fmt: skip
def test_percentiles_stand_anywhere_in_a_condition(corpus, condition, columns):
    with connect(corpus) as db:
        resolved = resolve(db, condition)
        db.execute(f"select count(*) from clips where {resolved.condition}\n").fetchone()
    assert [percentile.column for percentile in resolved.percentiles] == columns


@pytest.mark.parametrize("condition", ["p50", "p50 > 3", "abs(p50) > clip_score", "p10 < p20", "clip_score > p50) or (true"])  # fmt: skip
def test_a_percentile_needs_a_column_to_be_one_of(corpus, condition):
    with connect(corpus) as db, pytest.raises(ConfigError):
        resolve(db, condition)
