# SPDX-License-Identifier: Apache-2.0
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError, EngineError
from dataengine.forecast import (
    Comparison,
    Forecast,
    Range,
    StagePlan,
    bootstrap,
    compare,
    load,
    make_forecast,
    parse_cluster,
    range_text,
    sample_run,
    show,
    store,
)
from dataengine.forecast.bootstrap import RUN_NOISE, Estimate
from dataengine.forecast.cluster_time import ClusterTime, WallTime
from dataengine.forecast.sample_run import BYTES, COUNT, LISTED, Sources, draw
from dataengine.plan import TODO_SCHEMA
from dataengine.pools import plan_pools
from dataengine.progress import Snapshot, StageCounts, VideoCost
from tests.fake_pipeline import fake_pipeline, make_sources, run_fake
from tests.helpers import clip_row, clips_table, ledger_row

NUM_SOURCES = 400


def known(sizes=None, kind=BYTES, num_sources=NUM_SOURCES):
    names = [f"/{i}.mp4" for i in range(num_sources)]
    return Sources(names, {} if sizes is None else {kind: sizes})


def estimate(costs, chosen, sources=None, name="cost"):
    measured = {name: [float(costs[i]) for i in chosen]}
    return Estimate.of(measured, sources or known(num_sources=len(costs)), chosen, seed=1)


def samples(num_sampled, num_times=200):
    return [draw(NUM_SOURCES, num_sampled, seed) for seed in range(num_times)]


def ends(result: Range) -> tuple[float, float]:
    """Returns the two ends of a range that has some."""
    assert result.low is not None
    assert result.high is not None
    return result.low, result.high


def quiet():
    return Console(file=io.StringIO())


# ------------------------------------------------------------------------------------ estimation


@pytest.mark.parametrize(("num_sampled", "least"), [(5, 0.8), (20, 0.83), (100, 0.85)])
def test_the_range_holds_the_truth_about_as_often_as_it_says(num_sampled, least):
    costs = np.random.default_rng(0).gamma(4, 10, NUM_SOURCES)
    ranges = [estimate(costs, chosen).range("cost") for chosen in samples(num_sampled)]
    holds = np.mean([ends(r)[0] <= costs.sum() <= ends(r)[1] for r in ranges])
    assert least <= holds <= 0.97
    assert all(ends(r)[0] <= r.value <= ends(r)[1] for r in ranges)


def test_the_range_narrows_with_the_sample():
    costs = np.random.default_rng(0).gamma(4, 10, NUM_SOURCES)

    def width(num_sampled):
        ranges = [estimate(costs, c).range("cost") for c in samples(num_sampled, 20)]
        return np.mean([ends(r)[1] - ends(r)[0] for r in ranges])

    # By the root of the sizes and of the share that was not drawn.
    expected = math.sqrt(160 / 10 * (1 - 10 / 400) / (1 - 160 / 400))
    assert width(10) / width(160) == pytest.approx(expected, rel=0.25)


def test_the_whole_list_is_no_estimate():
    costs = np.random.default_rng(0).gamma(4, 10, 30)
    total = pytest.approx(costs.sum())
    result = estimate(costs, list(range(30))).range("cost")
    assert (result.value, result.low, result.high) == (total, total, total)


def test_times_differ_from_run_to_run_and_counts_do_not():
    """Runs over the same list, each slower or faster as a whole, against a range of another."""
    costs = np.random.default_rng(0).gamma(4, 10, NUM_SOURCES)
    each = RUN_NOISE / math.sqrt(2)  # of both together it is RUN_NOISE
    paces = np.exp(np.random.default_rng(1).normal(0, each, (200, 2)))
    holds = []
    for (here, there), chosen in zip(paces, samples(100), strict=True):
        low, high = ends(estimate(costs * here, chosen, name="cpu_s x").range("cpu_s x"))
        holds.append(low <= costs.sum() * there <= high)
    assert 0.85 <= np.mean(holds) <= 0.97
    whole = list(range(NUM_SOURCES))
    low, high = ends(estimate(costs, whole, name="cpu_s x").range("cpu_s x"))
    assert high / low == pytest.approx(math.exp(2 * 1.645 * RUN_NOISE), rel=0.1)


def test_one_video_gives_no_range():
    assert estimate(np.full(10, 3.0), [4]).range("cost") == Range(30.0, None, None)
    assert estimate(np.full(10, 3.0), [4]).share("cost") == Range(30.0, None, None)


def test_what_size_explains_is_scaled_by_size_and_lies_closer():
    rng = np.random.default_rng(0)
    sizes = rng.gamma(2, 1e6, NUM_SOURCES)
    costs = sizes * rng.normal(1, 0.1, NUM_SOURCES)

    def error(sources):
        found = [estimate(costs, c, sources).values["cost"] for c in samples(20)]
        return np.sqrt(np.mean((np.array(found) / costs.sum() - 1) ** 2))

    assert estimate(costs, samples(20)[0], known(sizes)).scaled_by == {"cost": BYTES}
    by_size, by_count = error(known(sizes)), error(None)
    assert by_size < 0.05
    assert by_count > 3 * by_size


@pytest.mark.parametrize("kind", ["unrelated", "opposite", "constant"])
def test_what_size_does_not_explain_is_scaled_by_number(kind):
    rng = np.random.default_rng(0)
    sizes = rng.gamma(2, 1e6, NUM_SOURCES)
    costs = {
        "unrelated": rng.permutation(sizes),
        "opposite": sizes.max() - sizes,
        "constant": np.full(NUM_SOURCES, 7.0),
    }[kind]
    chosen = draw(NUM_SOURCES, 100, 0)
    result = estimate(costs, chosen, known(sizes))
    assert result.scaled_by == {"cost": COUNT}
    assert result.values["cost"] == pytest.approx(costs[chosen].mean() * NUM_SOURCES)


def test_a_ratio_needs_a_correlation_above_half_the_quotient_of_the_variations():
    sizes = np.array([1.0, 2.0, 3.0, 4.0])
    assert bootstrap._explains(sizes, sizes * 5)
    # A large constant part: correlation 1, but the quotient of the variations is 10.
    assert not bootstrap._explains(sizes, sizes + 25)
    assert not bootstrap._explains(sizes[:2], sizes[:2])


def test_shares_of_the_outcomes_add_up_whatever_the_sizes():
    sizes = np.linspace(1, 100, NUM_SOURCES)
    kept = (sizes > 50).astype(float)  # what is large is kept
    chosen = draw(NUM_SOURCES, 20, 3)
    measured = {
        "videos_kept": list(kept[chosen]),
        "videos_dropped": list(1 - kept[chosen]),
        "loss segment: too_short": list(1 - kept[chosen]),
    }
    result = Estimate.of(measured, known(sizes), chosen, 0)
    shares = {name: result.share(name) for name in measured}
    assert shares["videos_kept"].value + shares["videos_dropped"].value == NUM_SOURCES
    assert shares["loss segment: too_short"] == shares["videos_dropped"]
    for share in shares.values():
        low, high = ends(share)
        assert 0 <= low <= share.value <= high <= NUM_SOURCES


def test_what_happened_to_none_or_all_may_yet_happen():
    chosen = draw(NUM_SOURCES, 20, 0)
    # With 0 of 20 seen, shares above 1 - 0.05 ** (1 / 20) = 13.9 % are out of the question.
    doubt = pytest.approx(380 * 0.1391, rel=1e-3)
    none = estimate(np.zeros(NUM_SOURCES), chosen).share("cost")
    assert (none.value, none.low, none.high) == (0, 0, doubt)
    every = estimate(np.ones(NUM_SOURCES), chosen).share("cost")
    assert (every.value, NUM_SOURCES - ends(every)[0], every.high) == (
        NUM_SOURCES,
        doubt,
        NUM_SOURCES,
    )
    assert estimate(np.ones(20), list(range(20))).share("cost") == Range(20, 20, 20)


@pytest.mark.parametrize(("count", "t"), [(4, 2.353), (10, 1.833), (30, 1.699), (1000, 1.646)])
def test_ranges_of_few_are_as_wide_as_students_t(count, t):
    expected = t / 1.645 * math.sqrt(count / (count - 1))
    assert bootstrap._widening(count) == pytest.approx(expected, rel=0.03)


def test_a_draw_is_repeatable_and_another_seed_draws_others():
    drawn = draw(1000, 20, 5)
    assert drawn == draw(1000, 20, 5) == sorted(set(drawn))
    assert drawn != draw(1000, 20, 6)
    assert draw(3, 20, 5) == [0, 1, 2]


def test_sizes_count_where_every_source_has_one(tmp_path):
    def read(*rows):
        table = pa.Table.from_pylist(list(rows), schema=TODO_SCHEMA)
        pq.write_table(table, tmp_path / "todo.parquet")
        return Sources.read(tmp_path / "todo.parquet")

    span = {"start_ms": 1000, "end_ms": 4000}
    a = {"source": "a", "file_bytes": 10, "spans": [span, span]}
    b = {"source": "b", "file_bytes": 20, "spans": None}
    refused = {"source": "r", "refusal": {"reason": "excluded", "detail": ""}}
    sources = read(a, refused, b)
    assert sources.names == ["a", "b"]
    assert {name: list(sizes) for name, sizes in sources.sizes.items()} == {BYTES: [10, 20]}
    assert list(read(a).sizes) == [LISTED, BYTES]
    assert list(read(a).sizes[LISTED]) == [6000]
    assert read(a, {"source": "url"}).sizes == {}


# --------------------------------------------------------------------------------- time and pools


def speed(num_cpus, num_gpus=0.0, gpu=0.0, **resources):
    (first, one), (second, two) = fake_pipeline().stages
    stages = (
        (
            first,
            one.model_copy(update={"resources": one.resources.model_copy(update={"num_cpus": 1})}),
        ),
        (
            second,
            two.model_copy(
                update={
                    "resources": two.resources.model_copy(
                        update={"num_cpus": 1, "num_gpus": gpu} | resources
                    )
                }
            ),
        ),
    )
    return ClusterTime(plan_pools(stages, num_cpus, num_gpus), num_cpus, num_gpus)


def test_the_slowest_of_cores_gpus_and_actors_decides():
    cpu_s, busy_s = {"segment": 300.0, "caption": 100.0}, {"segment": 400.0, "caption": 200.0}
    bounds = speed(8).bounds(cpu_s, busy_s)
    assert bounds == {
        "CPUs": 50,
        "reserved CPUs": 75,
        "actors of segment": pytest.approx(400 / 7),
        "actors of caption": pytest.approx(200 / 7),
    }
    one_actor = speed(8, max_actors=1).bounds(cpu_s, busy_s)
    assert max(one_actor, key=lambda name: one_actor[name]) == "actors of caption"
    on_gpus = speed(8, num_gpus=2, gpu=0.5).bounds(cpu_s, busy_s)
    assert on_gpus["GPUs"] == 50
    assert on_gpus["actors of caption"] == 50  # four halves


def test_the_start_is_paid_once_and_the_overhead_once_or_with_the_work():
    wall = WallTime.of(whole_s=40, start_s=10, bound_s=20)
    assert (wall.start_s, wall.overhead_s) == (10, 10)
    assert wall.total(20, 0.0) == wall.total(20, 1.0) == 40  # the sample itself
    assert (wall.total(200, 0.0), wall.total(200, 1.0)) == (220, 310)
    draws = wall.draws(np.full(1000, 200.0), seed=0)
    assert np.quantile(draws, 0.05) < 225
    assert np.quantile(draws, 0.95) > 300
    assert draws.min() > 200


def test_a_start_that_was_not_seen_is_all_of_the_rest():
    assert WallTime.of(40, None, 20) == WallTime(20, 0, 20)
    assert WallTime.of(40, 30, 20) == WallTime(20, 0, 20)  # work went on while actors started
    assert WallTime.of(15, 2, 20) == WallTime(0, 0, 20)
    assert WallTime.of(40, 10, 0).total(0, 1.0) == 40


def test_the_start_ends_when_the_first_actor_is_ready():
    clock = sample_run._StartClock(quiet(), ["segment"], 3)
    clock.show(Snapshot({}))
    assert clock.ready is None
    clock.show(Snapshot({"segment": StageCounts(num_actors=1)}))
    first = clock.ready
    assert first is not None
    clock.show(Snapshot({"segment": StageCounts(num_actors=2)}))
    assert clock.ready == first


# ---------------------------------------------------------------------------- a plan without Ray


@pytest.fixture
def engine(monkeypatch):
    """Takes the place of the runner: a video of n clips costs n CPU seconds and 2 n in all."""
    ran: list[str] = []

    def execute(pipeline, corpus, run_id, plan, *, address, display):
        snapshot = Snapshot({name: StageCounts() for name in ("segment", "caption")})
        for counts in snapshot.stages.values():
            counts.num_actors, counts.setup_s = 2, 3.0
        for row in pq.read_table(plan.todo).to_pylist():
            ran.append(row["source"])
            num_clips = int(Path(row["source"]).stem.split("_")[-1])
            video_id = records.file_video_id(row["source"])
            clips = [clip_row(video_id, 1000 * i, 1000 * i + 1000) for i in range(num_clips)]
            ledger = ledger_row(video_id, clips, source=row["source"], file_bytes=num_clips)
            corpus.commit(clips_table(clips), [ledger], run_id=run_id, fingerprint="f")
            cost = VideoCost(busy_s=3.0 * num_clips, cpu_s=num_clips, wait_s=num_clips)
            snapshot.videos[row["source"]] = {"segment": cost, "caption": VideoCost()}
        return snapshot

    monkeypatch.setattr("dataengine.runner.execute", execute)
    return ran


@pytest.fixture
def sources(tmp_path):
    """Twelve files of 1 to 4 clips, ten bytes per clip."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(12):
        num_clips = index % 4 + 1
        (folder / f"{index}_{num_clips}.mp4").write_bytes(bytes([index]) * 10 * num_clips)
    return folder


def plan_of(sources, **options: Any) -> Forecast:
    words, options = [str(sources)], {"num_sample": 6} | options
    result = make_forecast(fake_pipeline(), words, quiet(), **options)
    assert result is not None
    return result


def test_a_sample_without_clips_is_no_forecast(engine, tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}_0.mp4").write_bytes(bytes([index]) * 10)

    def execute(pipeline, corpus, run_id, plan, *, address, display):
        rows = [
            ledger_row(
                records.file_video_id(row["source"]), [], source=row["source"], stage="download",
                status=records.DROPPED, reason="not_a_video",
            )
            for row in pq.read_table(plan.todo).to_pylist()
        ]  # fmt: skip
        corpus.commit(clips_table([]), rows, run_id=run_id, fingerprint="f")
        return Snapshot({name: StageCounts() for name in ("segment", "caption")})

    monkeypatch.setattr("dataengine.runner.execute", execute)
    with pytest.raises(EngineError, match="No clip came out of the sample of 2 sources") as error:
        make_forecast(fake_pipeline(), [str(folder)], quiet(), num_sample=6)
    assert error.value.message.endswith(": download: not_a_video 2")
    assert error.value.exit_code == 1


def test_a_plan_scales_what_the_sample_took(engine, sources, tmp_path):
    result = plan_of(sources)
    assert (result.num_sources, result.num_sampled, len(engine)) == (12, 6, 6)
    segment, caption = result.stages
    # 30 clips in all: costs are exactly as the files' sizes, so that only runs differ.
    slack = math.exp(1.645 * RUN_NOISE)
    assert segment.cpu_s.value == pytest.approx(30)
    assert ends(segment.cpu_s) == pytest.approx((30 / slack, 30 * slack), rel=0.05)
    assert segment.busy_s.value == pytest.approx(60)  # without the waiting for a core
    assert caption.cpu_s.value == 0
    assert segment.setup_s == 1.5
    assert result.totals["cpu_s"].value == pytest.approx(30)
    assert result.totals["clips"].value == pytest.approx(30)
    assert result.totals["clips_s"].value == pytest.approx(30)
    assert result.totals["videos_kept"].value == 12
    assert result.totals["download_bytes"].value == 0
    assert result.totals["shard_bytes"].value > 30 * 1000
    assert result.bottleneck.startswith("segment")
    assert any(BYTES in line for line in result.assumptions)
    assert ends(result.totals["clips"]) == pytest.approx((30, 30))


def test_a_plan_of_all_is_what_a_run_would_do(engine, sources):
    (sources / "12_0.mp4").write_bytes(b"another")
    result = plan_of(sources, num_sample=99)
    assert (result.num_sources, result.num_sampled) == (13, 13)
    assert result.totals["videos_kept"] == Range(12, 12, 12)
    assert result.totals["videos_dropped"] == Range(1, 1, 1)
    assert result.losses == {"segment: too_short": Range(1, 1, 1)}
    assert result.stages[0].dropped.value == 1
    # Counts come out the same again, times do not.
    low, high = ends(result.totals["cpu_s"])
    assert low < result.totals["cpu_s"].value < high


@pytest.mark.parametrize(("num_sample", "advised"), [(4, True), (11, True), (12, False)])
def test_more_than_a_small_sample_is_advised(engine, sources, num_sample, advised):
    lines = plan_of(sources, num_sample=num_sample).assumptions
    assert any("--sample 12 or more" in line for line in lines) == advised


def test_no_more_is_advised_than_there_is(engine, sources):
    lines = plan_of(sources, num_sample=3, limit=5).assumptions
    assert any("--sample 5 or more" in line for line in lines)
    assert not any("or more" in line for line in plan_of(sources, limit=4).assumptions)


def test_a_larger_cluster_takes_less_time_and_as_much_work(engine, sources):
    small = plan_of(sources, cluster=(2, 0))
    large = plan_of(sources, cluster=(64, 0))
    assert large.totals["cpu_s"] == small.totals["cpu_s"]
    assert large.totals["wall_s"].value < small.totals["wall_s"].value
    assert (large.num_cpus, small.num_cpus) == (64, 2)
    assert large.stages[0].num_actors > small.stages[0].num_actors


def test_a_plan_leaves_nothing_behind(engine, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_run.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    plan_of(sources, corpus_url=str(tmp_path / "corpus"))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "corpus").exists()


def test_what_has_ended_in_the_corpus_is_not_planned_again(engine, sources, tmp_path):
    corpus = Corpus.create(str(tmp_path / "corpus"))
    corpus.take_over("r-1")
    for path in sorted(sources.iterdir()):
        status = path.stat()
        row = ledger_row(
            records.file_video_id(str(path)), [], source=str(path),
            source_version=f"{status.st_size}-{status.st_mtime_ns}",
        )  # fmt: skip
        corpus.commit(clips_table([]), [row], run_id="r-1", fingerprint="f")
        if path.name.startswith("5"):
            break
    left = plan_of(sources, corpus_url=str(tmp_path / "corpus"))
    assert 0 < left.num_sources < 12
    assert not {Path(s).name for s in engine} & {"0_1.mp4", "5_2.mp4"}


def test_no_videos_is_an_error_and_nothing_runs(engine, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="No videos in"):
        plan_of(tmp_path / "empty")
    assert engine == []


def test_a_cluster_is_written_one_way():
    assert parse_cluster("cpus=128, gpus=8") == (128, 8)
    assert parse_cluster("cpus=2") == (2, 0)
    for text in ("", "cpus", "cpus=x", "gpus=8", "cpus=0", "cpus=nan", "cpus=inf", "tpus=1"):
        with pytest.raises(ConfigError):
            parse_cluster(text)


# ---------------------------------------------------------------------------- stored and compared


def simple_range(value):
    return Range(value, value / 2, value * 2)


def forecast_of(fingerprint="f", num_sources=4, cpu_s=10.0):
    stage = StagePlan(
        stage="segment",
        cpu_s=simple_range(cpu_s),
        gpu_s=Range(0.0, 0.0, 0.0),
        busy_s=simple_range(2 * cpu_s),
        eta_s=simple_range(cpu_s),
        setup_s=1.0,
        num_actors=2,
        dropped=Range(0.0, None, None),
        bytes_in=10.0,
        bytes_out=20.0,
    )
    totals = {
        "cpu_s": simple_range(cpu_s),
        "gpu_s": Range(0.0, 0.0, 0.0),
        "setup_s": Range(2.0, 2.0, 2.0),
        "wall_s": simple_range(30.0),
        "videos_kept": simple_range(4.0),
        "clips": simple_range(8.0),
        "clips_s": simple_range(8.0),
        "shard_bytes": simple_range(1e6),
    }
    return Forecast(
        pipeline="fake", fingerprint=fingerprint, made="2026-01-01T00:00:00Z", seed=0,
        num_sources=num_sources, num_refused=0, num_sampled=2, sample_s=5.0, num_cpus=2.0,
        num_gpus=0.0, stages=(stage,), totals=totals,
        losses={"segment: too_short": simple_range(1.0)}, bottleneck="segment", assumptions=("a",),
    )  # fmt: skip


def finished_run(path, num_sources=4, num_refused=1, seconds=33.0):
    """A corpus with a run of videos of two clips each, one of which was refused."""
    corpus = Corpus.create(str(path))
    corpus.take_over("r-1")
    todo = []
    for index in range(num_sources + num_refused):
        refused = index >= num_sources
        clips = [] if refused else [clip_row(f"v{index}", s, s + 1000) for s in (0, 1000)]
        corpus.commit(
            clips_table(clips), [ledger_row(f"v{index}", clips)], run_id="r-1", fingerprint="f"
        )
        refusal = {"reason": "excluded", "detail": ""} if refused else None
        todo.append({"source": f"/v{index}.mp4", "refusal": refusal})
    folder = path / "runs" / "r-1"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(todo, schema=TODO_SCHEMA), folder / "sources.parquet")
    (folder / "run.json").write_text(json.dumps({"fingerprint": "f", "seconds": seconds}))
    metrics = {"segment": {"cpu_s": 12.0, "gpu_s": 0.0, "setup_s": 3.0}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return corpus


def rows_of(comparisons: list[Comparison]) -> dict[str, Comparison]:
    return {f"{row.stage} {row.quantity}": row for row in comparisons}


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_plan_is_kept_beside_a_corpus_that_is_not_there_yet(tmp_path, slash):
    url = f"{tmp_path / 'corpus'}{slash}"
    plan = forecast_of()
    assert store(plan, url) == f"{tmp_path / 'corpus'}.plans/f.json"
    corpus = Corpus.create(url)
    assert load(corpus, "f") == plan
    assert load(corpus, "other") is None


def test_a_plan_in_the_corpus_counts_before_the_one_beside_it(tmp_path):
    url = str(tmp_path / "corpus")
    store(forecast_of(cpu_s=1.0), url)
    corpus = Corpus.create(url)
    newer = forecast_of(cpu_s=2.0)
    assert store(newer, url) == f"{url}/plans/f.json"
    assert load(corpus, "f") == newer


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stages": []}', '{"stages": [{"x": 1}]}'])
def test_a_plan_that_cannot_be_read_is_none(tmp_path, content):
    corpus = finished_run(tmp_path / "corpus")
    (tmp_path / "corpus" / "plans").mkdir()
    (tmp_path / "corpus" / "plans" / "f.json").write_text(content)
    assert load(corpus, "f") is None
    assert compare(corpus, "r-1") == []


def test_a_run_is_held_against_its_plan(tmp_path):
    corpus = finished_run(tmp_path / "corpus")
    store(forecast_of(), corpus.url)
    rows = rows_of(compare(corpus, "r-1"))
    assert set(rows) == {
        *("segment cpu_s", "all cpu_s", "all setup_s", "all wall_s", "all videos_kept"),
        *("all clips", "all clips_s", "all shard_bytes"),
    }
    assert rows["segment cpu_s"] == Comparison("segment", "cpu_s", Range(10, 5, 20), 12.0, 1.2)
    assert rows["all wall_s"].ratio == pytest.approx(33 / 30)
    assert (rows["all clips"].actual, rows["all clips_s"].actual) == (8, 8)
    assert rows["all videos_kept"].ratio == 1
    assert rows["all setup_s"].ratio == 1.5
    shards = sum(path.stat().st_size for path in (tmp_path / "corpus" / "shards").iterdir())
    assert rows["all shard_bytes"].actual == shards


def test_a_run_over_half_of_what_was_planned_is_held_against_half(tmp_path):
    corpus = finished_run(tmp_path / "corpus")
    store(forecast_of(num_sources=8, cpu_s=20.0), corpus.url)
    rows = rows_of(compare(corpus, "r-1"))
    assert rows["segment cpu_s"].planned == Range(10, 5, 20)
    assert rows["all clips"].planned.value == 4
    assert rows["all setup_s"].planned.value == 2  # not less for fewer videos
    assert "all wall_s" not in rows


def test_without_a_plan_there_is_nothing_to_compare_and_an_unfinished_run_is_an_error(tmp_path):
    corpus = finished_run(tmp_path / "corpus")
    assert compare(corpus, "r-1") == []
    store(forecast_of(fingerprint="other"), corpus.url)
    assert compare(corpus, "r-1") == []
    (tmp_path / "corpus" / "runs" / "r-1" / "metrics.json").unlink()
    with pytest.raises(CorpusError, match="did not finish"):
        compare(corpus, "r-1")


def test_other_runs_of_the_corpus_do_not_count(tmp_path):
    corpus = finished_run(tmp_path / "corpus")
    corpus.take_over("r-2")
    clips = [clip_row("late", 0, 1000)]
    corpus.commit(clips_table(clips), [ledger_row("late", clips)], run_id="r-2", fingerprint="f")
    store(forecast_of(), corpus.url)
    assert rows_of(compare(corpus, "r-1"))["all clips"].actual == 8


# ---------------------------------------------------------------------------------------- output


def test_a_plan_is_shown_with_units_ranges_and_what_it_rests_on():
    said = io.StringIO()
    show(forecast_of(), Console(file=said, width=160))
    text = said.getvalue()
    assert "clips" in text
    assert "10 s (5 s to 20 s)" in text
    assert "1.0 MB (500.0 kB to 2.0 MB)" in text
    assert "ended at segment: too_short" in text
    assert "- a\n" in text


def test_numbers_are_said_in_fitting_units():
    assert range_text(Range(7200, None, None), "cpu_s") == "2 h"
    assert range_text(Range(59, 50, 60), "cpu_s") == "59 s (50 s to 60 s)"
    assert range_text(Range(12345.6, None, None), "clips") == "12,346"


# ---------------------------------------------------------------------------------------- whole


@pytest.mark.slow
def test_a_plan_through_the_engine_and_the_run_that_follows(tmp_path, two_core_ray):
    sources = make_sources(tmp_path / "videos", [f"{i}_{i % 3}" for i in range(12)])
    pipeline = fake_pipeline(seconds=0.05)
    url = str(tmp_path / "corpus")
    plan = make_forecast(pipeline, [str(sources)], quiet(), num_sample=9, corpus_url=url)
    assert plan is not None
    store(plan, url)
    done = run_fake(sources, tmp_path / "corpus", pipeline)
    assert done.run_id is not None
    rows = rows_of(compare(Corpus.open(url), done.run_id))
    for quantity in ("videos_kept", "videos_dropped", "clips"):
        row = rows[f"all {quantity}"]
        low, high = ends(row.planned)
        assert low <= row.actual <= high
    assert rows["all clips"].actual == 12
    assert plan.losses.keys() == {"segment: no_clips"}
    assert load(Corpus.open(url), plan.fingerprint) == plan


_PLAN_THEN_INGEST = """
import io, sys
from rich.console import Console
from dataengine.forecast import make_forecast
from tests.fake_pipeline import fake_pipeline, run_fake
from pathlib import Path

folder = Path(sys.argv[1])
words = [str(folder / "videos")]
assert make_forecast(fake_pipeline(), words, Console(file=io.StringIO()), num_sample=2)
assert run_fake(folder / "videos", folder / "corpus").funnel.kept_clips == 4
"""


@pytest.mark.slow
def test_a_plan_and_a_run_in_one_process_that_starts_ray_for_each(tmp_path):
    make_sources(tmp_path / "videos", ["a_1", "b_1", "c_2"])
    command = [sys.executable, "-c", _PLAN_THEN_INGEST, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
