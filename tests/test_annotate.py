# SPDX-License-Identifier: Apache-2.0
"""Stages run again over a finished corpus: what they write changes, everything else stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dataengine import records
from dataengine.annotate import (
    _todo,
    annotate,
    clips_to_annotate,
    make_annotation,
    store,
)
from dataengine.config import load_pipeline
from dataengine.corpus import Corpus, SupersededError
from dataengine.errors import ConfigError
from dataengine.flow import apply_stage
from dataengine.query.verify import verify
from dataengine.remove import remove
from dataengine.stage import provenance
from tests.fake_pipeline import recaption_pipeline
from tests.helpers import JPEG, clip_row, clips_table, ledger_row, small_corpus

QUIET = Console(quiet=True)


def make(suffix="", where="", **settings):
    return make_annotation(recaption_pipeline(**settings), ["recaption"], suffix, where)


def run_here(corpus, annotation, run_id="r-1", shards=None):
    """Does what the graph does, in this process."""
    ((cls, config),) = annotation.pipeline.stages
    stage = cls(config)
    stage.setup()
    for shard in shards or corpus.names("catalog"):
        table = clips_to_annotate(corpus, annotation, shard)
        store(corpus, annotation, apply_stage(stage, table, stage.process), run_id)


def everything(corpus):
    """Returns every clip with its media, by id, in the order of the shards."""
    clips = {}
    for shard in corpus.names("catalog"):
        with corpus.open_shard(shard) as file:
            for row in file.read().to_pylist():
                clips[row["clip_id"]] = {**row, "_shard": shard}
    return clips


def authors(clip):
    return {entry["column"]: entry["revision"] for entry in clip["provenance"]}


def test_in_place_the_columns_change_and_nothing_else(tmp_path):
    corpus = small_corpus(tmp_path / "c")
    before, locators = everything(corpus), corpus.catalog(["clip_id", "shard", "row_group", "row"])
    run_here(corpus, make(mute="video1"))
    after = everything(corpus)
    assert list(after) == list(before)
    assert corpus.catalog(["clip_id", "shard", "row_group", "row"]).equals(locators)
    for clip_id, clip in after.items():
        is_mute = clip_id.startswith("video1")
        assert clip["caption"] == (None if is_mute else f"new {clip_id}")
        assert authors(clip) == ({} if is_mute else {"caption": "new", "clip_score": "new"})
        same = set(clip) - {"caption", "clip_score", "provenance"}
        assert {name: clip[name] for name in same} == {name: before[clip_id][name] for name in same}
    assert not verify(corpus).problems


def test_new_columns_stand_beside_the_old_ones(tmp_path):
    corpus = small_corpus(tmp_path / "c")
    run_here_with_columns(corpus, make("_x", word="other"))
    for clip_id, clip in everything(corpus).items():
        assert (clip["caption"], clip["caption_x"]) == (
            f"clip of {clip['video_id']}", f"other {clip_id}",
        )  # fmt: skip
        assert authors(clip) == {"caption": "1", "caption_x": "other", "clip_score_x": "other"}
    assert corpus.catalog(["caption_x"])["caption_x"].null_count == 0
    assert not verify(corpus).problems


def run_here_with_columns(corpus, annotation, **options):
    from dataengine.annotate import _declare

    _declare(corpus, annotation)
    run_here(corpus, annotation, **options)


def test_a_corpus_with_new_columns_goes_on_as_before(tmp_path):
    """Annotation of one shard of three; then an ingest, a removal, and training on the column."""
    from training.data.index import open_index

    corpus = small_corpus(tmp_path / "c")
    first = corpus.names("catalog")[0]
    run_here_with_columns(corpus, make("_x"), shards=[first])
    rows = [clip_row("later", 0, 1000)]
    corpus.commit(clips_table(rows), [ledger_row("later", rows)], run_id="r-1", fingerprint="f")
    assert not verify(corpus).problems
    assert len(open_index(corpus.url, "caption_x")) == 2
    assert sum(text is not None for text in corpus.catalog()["caption_x"].to_pylist()) == 2
    remove(corpus, ["video0"])
    corpus.take_over("r-3")
    run_here(corpus, make("_x"), run_id="r-3")
    assert not verify(corpus).problems
    assert len(open_index(corpus.url, "caption_x")) == 5


@pytest.mark.parametrize("where", ["start_ms = 0", "start_ms = 0 -- of each video", "false"])
def test_only_the_clips_of_a_condition(tmp_path, where):
    corpus = small_corpus(tmp_path / "c")
    annotation = make(where=where)
    run_here(corpus, annotation)
    changed = {name for name, clip in everything(corpus).items() if "new" in clip["caption"]}
    assert changed == (set() if where == "false" else {f"video{i}_0_1000" for i in range(3)})
    assert _todo(corpus, annotation, again=False) == ([], [])
    assert not verify(corpus).problems


def test_a_clip_that_is_dropped_keeps_what_it_had(tmp_path):
    corpus = small_corpus(tmp_path / "c")
    before = everything(corpus)
    run_here(corpus, make(bad="video2"))
    for clip_id, clip in everything(corpus).items():
        assert (clip == before[clip_id]) == clip_id.startswith("video2")


def test_what_is_done_is_known_by_its_settings(tmp_path):
    corpus = small_corpus(tmp_path / "c")
    run_here(corpus, make())
    shards = corpus.names("catalog")
    assert _todo(corpus, make(), again=False) == ([], [])
    assert _todo(corpus, make(), again=True) == (shards, [])
    assert _todo(corpus, make(word="newer"), again=False) == (shards, [])
    run_here(corpus, make(word="newer"))
    assert _todo(corpus, make(), again=False) == (shards, []), "others have written since"


def test_a_kill_between_a_shard_and_its_twin_costs_only_the_twin(tmp_path, monkeypatch):
    corpus = small_corpus(tmp_path / "c")
    publish = Corpus.publish

    def killed(self, name, write):
        if name.startswith("catalog/"):
            raise KeyboardInterrupt
        publish(self, name, write)

    shards = corpus.names("catalog")
    monkeypatch.setattr(Corpus, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        run_here(corpus, make(), shards=shards[:1])
    monkeypatch.undo()
    assert verify(corpus).problems
    assert _todo(corpus, make(), again=False) == (shards[1:], shards[:1])


def test_a_caption_of_other_frames_is_found(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    rows = [clip_row("v", 0, 1000), clip_row("v", 1000, 2000, frames=[JPEG, JPEG + b"x"])]
    for row, frames in zip(rows, (rows[0]["frames"], rows[0]["frames"]), strict=True):
        entry = provenance("caption_video", "m", input_hash=records.digest(*frames))
        row |= {"caption_video": "a text", "provenance": [entry]}
    corpus.commit(clips_table(rows), [ledger_row("v", rows)], run_id="r-1", fingerprint="f")
    (problem,) = verify(corpus).problems
    assert "v_1000_2000: caption_video was written about other frames" in problem


def test_a_superseded_run_writes_nothing(tmp_path):
    corpus = small_corpus(tmp_path / "c")
    before = everything(corpus)
    corpus.take_over("r-2")
    with pytest.raises(SupersededError):
        run_here(corpus, make())
    assert everything(corpus) == before


def test_words_that_cannot_be_run_are_refused(tmp_path):
    pipeline = load_pipeline("pipelines/quickstart.yaml")
    with pytest.raises(ConfigError, match="segment: writes no annotation"):
        make_annotation(pipeline, ["segment"])
    with pytest.raises(ConfigError, match="scores: not in the pipeline"):
        make_annotation(pipeline, ["score", "scores"])
    with pytest.raises(ConfigError, match="exist: clip_score_frame"):
        make_annotation(pipeline, ["score"], "_frame")
    with pytest.raises(ConfigError, match="suffix"):
        make_annotation(pipeline, ["score"], "-x; drop")
    corpus = small_corpus(tmp_path / "c")
    with pytest.raises(ConfigError, match="languge"):
        annotate(make(where="languge = 'en'"), corpus.url, QUIET)


def test_every_annotation_stage_of_the_quickstart_can_be_run_again():
    pipeline = load_pipeline("pipelines/quickstart.yaml")
    names = [cls.name for cls, _ in pipeline.stages][3:]
    assert [cls.name for cls, _ in make_annotation(pipeline, names).pipeline.stages] == names


def test_a_run_on_ray(tmp_path, two_core_ray):
    corpus = small_corpus(tmp_path / "c")
    result = annotate(make(bad="video2"), corpus.url, QUIET)
    assert (result.num_shards, result.num_clips, result.skipped) == (3, 6, {"recaption": 2})
    again = annotate(make(bad="video2"), corpus.url, QUIET)
    assert again.run_id is None
    assert sum("new" in clip["caption"] for clip in everything(corpus).values()) == 4
    assert not verify(corpus).problems


@pytest.mark.slow
def test_killed_at_any_moment_every_clip_is_annotated_once(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=12, num_clips=3)
    command = [sys.executable, "-m", "tests.fake_pipeline", "annotate", corpus.url]
    marked, process = [], None
    for _ in range(12):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        target = len(marked) + 3
        while process.poll() is None and time.monotonic() < deadline:
            marked = [n for n in corpus.names("catalog") if is_done(corpus, n)]
            if len(marked) >= target:
                break
            time.sleep(0.05)
        if process.poll() is not None:
            break
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for child in children:
            child.kill()
    assert process is not None
    assert process.returncode == 0
    assert {name: clip["caption"] for name, clip in everything(corpus).items()} == {
        f"video{v}_{1000 * i}_{1000 * i + 1000}": f"new video{v}_{1000 * i}_{1000 * i + 1000}"
        for v in range(12)
        for i in range(3)
    }
    assert not verify(corpus).problems


def is_done(corpus, shard):
    path = Path(corpus.path("catalog", f"{shard}.parquet"))
    return b"dataengine.annotated" in (pq.read_schema(path).metadata or {})


def test_only_columns_that_clash_are_named():
    pipeline = load_pipeline("pipelines/quickstart.yaml")
    with pytest.raises(ConfigError, match=r"Columns of that name exist: caption_video_coarse$"):
        make_annotation(pipeline, ["caption_video"], "_coarse")
