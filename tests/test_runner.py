# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback

import psutil
import pytest
import ray.exceptions

from dataengine import runner
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError, DependencyError, EngineError
from dataengine.flow import WORKER_CRASHED
from dataengine.pools import plan_pools
from dataengine.query.verify import verify
from dataengine.stage import Resources
from tests.fake_pipeline import FakeCaption, FakeSegment, fake_pipeline, make_sources, run_fake


def specs(*needs: Resources):
    classes = (FakeSegment, FakeCaption)
    return [
        (classes[min(i, 1)], classes[min(i, 1)].Config(resources=need))
        for i, need in enumerate(needs)
    ]


@pytest.mark.parametrize("num_cpus", [1, 2, 4, 64])
@pytest.mark.parametrize("num_stages", [1, 3, 12])
@pytest.mark.parametrize("asked", [0.1, 1, 4])
def test_every_pool_can_start_on_any_machine(num_cpus, num_stages, asked):
    pools = plan_pools(specs(*[Resources(num_cpus=asked)] * num_stages), num_cpus, 0)
    assert len(pools) == num_stages
    assert sum(pool.num_cpus * pool.min_actors for pool in pools) < num_cpus
    assert all(pool.num_cpus > 0 for pool in pools)
    if num_cpus > num_stages * asked + 1:
        assert {pool.num_cpus for pool in pools} == {asked}, "a large cluster gives what is asked"


def test_colocated_stages_share_an_actor_and_videos_come_one_by_one():
    pools = plan_pools(
        specs(
            Resources(num_cpus=0.5, batch_size=8),
            Resources(num_cpus=2, colocate=True, num_gpus=0.5),
            Resources(batch_size=8),
        ),
        16,
        4,
    )
    assert [len(pool.stages) for pool in pools] == [2, 1]
    assert (pools[0].num_cpus, pools[0].num_gpus, pools[0].max_actors) == (2, 0.5, 8)
    assert [pool.batch_size for pool in pools] == [1, 8]


def test_a_pipeline_that_needs_gpus_is_refused_without_them():
    with pytest.raises(ConfigError, match="needs 2 GPUs, the cluster has 1"):
        plan_pools(specs(Resources(num_gpus=1, min_actors=2)), 8, 1)


def clips_of(corpus):
    return sorted(corpus.catalog(["clip_id"])["clip_id"].to_pylist())


def expected_clips(sources):
    from dataengine import records

    return sorted(
        records.clip_id(records.file_video_id(str(path)), 1000 * i, 1000 * i + 1000)
        for path in sources.iterdir()
        if path.stem.split("_")[-1].isdigit()
        for i in range(int(path.stem.split("_")[-1]))
        if i not in (7, 8)
    )


def test_every_source_and_every_clip_is_accounted_for(two_core_ray, tmp_path):
    """Two workers are killed, by a video and by a clip; the run goes on without them."""
    names = [f"v{i}_{i % 5}" for i in range(12)] + ["long_10", "kill_3"]
    sources = make_sources(tmp_path / "in", names)
    result = run_fake(sources, tmp_path / "c", fake_pipeline(waves=9))
    corpus = Corpus.open(str(tmp_path / "c"))

    funnel = result.funnel
    assert (funnel.num_videos, funnel.kept_videos) == (14, 10)
    assert {(x.stage, x.reason): x.num for x in funnel.video_losses} == {
        ("segment", "no_clips"): 3,
        ("segment", WORKER_CRASHED): 1,
    }
    assert {(x.stage, x.reason): x.num for x in funnel.clip_losses} == {
        ("caption", WORKER_CRASHED): 1,
        ("caption", "mute"): 1,
    }
    assert funnel.num_clips == funnel.kept_clips + 2
    (sources / "kill_3.mp4").unlink()
    assert clips_of(corpus) == expected_clips(sources)
    killed = next(row for row in corpus.videos().to_pylist() if "kill" in row["source"])
    assert (killed["status"], killed["attempts"]) == ("failed", 2)
    assert [p for p in verify(corpus).problems if "MP4" not in p and "JPEG" not in p] == []

    again = run_fake(make_sources(sources, ["kill_3"]), tmp_path / "c", fake_pipeline())
    assert again.run_id is None or corpus.videos().num_rows == 14


def test_a_finished_run_does_nothing_again(two_core_ray, tmp_path):
    sources = make_sources(tmp_path / "in", ["a_1", "b_0"])
    assert run_fake(sources, tmp_path / "c").run_id
    before = sorted(str(p) for p in (tmp_path / "c").rglob("*"))
    result = run_fake(sources, tmp_path / "c")
    assert result.run_id is None
    assert result.funnel.kept_clips == 1
    assert sorted(str(p) for p in (tmp_path / "c").rglob("*")) == before

    make_sources(sources, ["c_2"])
    assert run_fake(sources, tmp_path / "c").funnel.kept_clips == 3


def test_a_programming_error_stops_the_run_and_names_stage_item_and_place(two_core_ray, tmp_path):
    sources = make_sources(tmp_path / "in", ["a_1", "bug_1"])
    with pytest.raises(EngineError) as caught:
        run_fake(sources, tmp_path / "c")
    assert re.fullmatch(
        r"Stage segment failed on \S+bug_1\.mp4: ZeroDivisionError: a bug", str(caught.value)
    )
    (line,) = caught.value.hint.splitlines()
    assert re.search(r"raised at \S+fake_pipeline\.py:\d+ \(_one\), called at ", line)


def test_what_a_stage_says_to_the_user_arrives_word_by_word(two_core_ray, tmp_path):
    """A server that stays away is such a case; the run stops, and nobody is shown a traceback."""
    sources = make_sources(tmp_path / "in", ["a_1", "away_1"])
    with pytest.raises(EngineError) as caught:
        run_fake(sources, tmp_path / "c")
    assert type(caught.value) is EngineError
    assert (caught.value.message, caught.value.hint) == ("No answer", "start the server")


def from_a_worker(cause: Exception) -> ray.exceptions.RayTaskError:
    """Returns what `cause`, raised in a worker, arrives as in the driver."""
    try:
        raise cause
    except type(cause) as error:
        told = "".join(traceback.format_exception(error))
        sent = ray.exceptions.RayTaskError("f", told, error, "ray::f", 1, "127.0.0.1")
    return pickle.loads(pickle.dumps(sent))


@pytest.mark.parametrize("cause", [EngineError("No answer", "start it"), ConfigError("No", "yes")])
def test_an_error_of_ours_survives_the_way_from_a_worker(cause):
    raised = from_a_worker(cause).as_instanceof_cause()
    assert "File" in str(raised)  # what Ray would show
    outer = RuntimeError("the executor gave up")
    outer.__context__ = raised
    for error in (raised, outer):
        found = runner._ours(error)
        assert found is not None
        assert type(found) is type(cause)
        assert (found.message, found.hint, str(found)) == (cause.message, cause.hint, cause.message)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            from_a_worker(ValueError("\x1b[31mtwo\nlines")).as_instanceof_cause(),
            "ValueError: two lines",
        ),
        (
            ray.exceptions.ActorDiedError(from_a_worker(ValueError("no such thing"))),
            "ActorDiedError: The actor died because of an error raised in its creation task, "
            "ray::f() (pid=1, ip=127.0.0.1) ValueError: no such thing",
        ),
        (RuntimeError("x" * 5000), "RuntimeError: " + "x" * 1000),
    ],
    ids=["an error in a stage", "an actor that died", "a long one"],
)
def test_no_error_reaches_a_user_as_a_traceback(error, message):
    assert runner._ours(error) is None
    told = runner._unforeseen(error)
    assert told.message == f"The run failed: {message}"
    assert "run the same command again" in told.hint


def test_a_missing_model_is_one_clear_error(two_core_ray, tmp_path):
    sources = make_sources(tmp_path / "in", ["a_1"])
    with pytest.raises(DependencyError, match="Model is missing: nowhere"):
        run_fake(sources, tmp_path / "c", fake_pipeline(broken_setup=True))


def test_two_writers_at_once_are_refused(two_core_ray, tmp_path):
    import fcntl

    sources = make_sources(tmp_path / "in", ["a_1"])
    Corpus.create(str(tmp_path / "c"))
    with open(tmp_path / "c" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CorpusError, match="Another run"):
            run_fake(sources, tmp_path / "c")


def _start(sources, corpus, seconds):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fake_pipeline", str(sources), str(corpus), str(seconds)],
        start_new_session=True,
    )


def _workers(driver):
    """The actor processes of a driver's own Ray."""
    return [
        child.pid
        for child in psutil.Process(driver).children(recursive=True)
        if child.name().startswith("ray::MapWorker")
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kill_after_s", [9, 12, 15, 18])
def test_killing_the_driver_loses_nothing_and_doubles_nothing(tmp_path, kill_after_s):
    """SIGKILL to the driver at several moments, then the same command until it is through."""
    sources = make_sources(tmp_path / "in", [f"v{i}_{i % 4}" for i in range(40)])
    process = _start(sources, tmp_path / "c", 0.2)
    time.sleep(kill_after_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert _start(sources, tmp_path / "c", 0).wait(timeout=500) == 0
    corpus = Corpus.open(str(tmp_path / "c"))
    assert clips_of(corpus) == expected_clips(sources)
    assert corpus.videos().num_rows == 40
    assert verify(corpus).problems == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killing_workers_loses_nothing_and_doubles_nothing(tmp_path):
    sources = make_sources(tmp_path / "in", [f"v{i}_{i % 4}" for i in range(40)])
    process = _start(sources, tmp_path / "c", 0.3)
    for _ in range(60):
        time.sleep(2)
        if process.poll() is not None:
            break
        for pid in _workers(process.pid)[:1]:
            os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    corpus = Corpus.open(str(tmp_path / "c"))
    statuses = set(corpus.videos()["reason"].to_pylist()) - {None, "no_clips"}
    assert statuses <= {WORKER_CRASHED}
    kept = {row["video_id"] for row in corpus.videos().to_pylist() if row["status"] == "kept"}
    assert clips_of(corpus) == [c for c in expected_clips(sources) if c.split("_")[0] in kept]
    assert verify(corpus).problems == []
