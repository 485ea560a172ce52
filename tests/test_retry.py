# SPDX-License-Identifier: Apache-2.0
"""Runs without Ray: the plan is carried out by a stand-in that fails, drops and refuses."""

import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

import dataengine.runner
from dataengine import funnel
from dataengine.cli import app
from dataengine.config import load_pipeline
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError, EngineError
from dataengine.ingest import ingest, retry, stored_pipeline
from dataengine.progress import Snapshot
from tests.helpers import clip_row, clips_table, ledger_row

QUIET = Console(stderr=True, quiet=True)
QUICKSTART = Path(__file__).parent.parent / "pipelines" / "quickstart.yaml"
SPAN = {
    "start_ms": 0, "end_ms": 1000, "caption": "c", "aesthetic_score": 1.5, "video_text_score": 0.5,
}  # fmt: skip


@pytest.fixture
def works(monkeypatch):
    """What was worked on, and which names fail how."""
    works = {"seen": [], "fail": {}}

    def execute(pipeline, corpus, run_id, plan, *, address, display):
        rows = pq.read_table(plan.todo).to_pylist()
        works["seen"] = [(os.path.basename(row["source"]), row["spans"]) for row in rows]
        for row in rows:
            name = os.path.basename(row["source"])
            known = {"source": row["source"], "source_version": row["source_version"]}
            known |= {
                "attempts": (row["attempts"] or 0) + 1,
                "finished_ms": time.time_ns() // 10**6,
            }
            ending = {"status": "kept", "reason": None}
            if row["refusal"]:
                ending = {"status": "dropped", "stage": "download", **row["refusal"]}
            elif name in works["fail"]:
                status, reason = works["fail"][name]
                ending = {"status": status, "stage": "download", "reason": reason}
            clips = [clip_row(f"id-{name}", 0, 1000)] if ending["status"] == "kept" else []
            video = ledger_row(f"id-{name}", clips, **known, **ending)
            corpus.commit(clips_table(clips), [video], run_id=run_id, fingerprint="f")
        return Snapshot({})

    monkeypatch.setattr(dataengine.runner, "execute", execute)
    return works


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (folder / name).write_bytes(name.encode())
    (folder / "l.csv").write_text(
        "file,start,end,caption,aesthetic_score,umt_score\nb.mp4,0,1,c,1.5,0.5\n"
    )
    return folder


def run(sources, corpus, **options):
    words = [str(sources / "l.csv"), str(sources)]
    return ingest(load_pipeline(QUICKSTART), words, str(corpus), QUIET, **options)


def statuses(corpus):
    rows = Corpus.open(str(corpus)).videos(["source", "status", "reason", "attempts"]).to_pylist()
    return {os.path.basename(r["source"]): (r["status"], r["reason"], r["attempts"]) for r in rows}


def test_what_failed_is_worked_on_again_until_it_has_had_its_attempts(works, sources, tmp_path):
    corpus = tmp_path / "c"
    works["fail"] = {"b.mp4": ("failed", "timeout"), "c.mp4": ("dropped", "too_long")}
    seen = [[("b.mp4", [SPAN]), ("a.mp4", None), ("c.mp4", None)], [("b.mp4", [SPAN])]]
    for expected in (seen[0], seen[1], seen[1]):
        result = run(sources, corpus)
        assert works["seen"] == expected
        assert (result.funnel.failed_videos, result.funnel.kept_videos) == (1, 1)
    works["seen"] = []
    assert run(sources, corpus).run_id is None
    assert works["seen"] == []

    result = retry(stored_pipeline(Corpus.open(str(corpus))), str(corpus), QUIET)
    assert works["seen"] == [("b.mp4", [SPAN])], "a retry counts no attempts, and knows the spans"
    assert result is not None
    assert result.funnel.num_videos == result.funnel.failed_videos == 1
    works["fail"] = {}
    assert retry(load_pipeline(QUICKSTART), str(corpus), QUIET) is not None
    assert works["seen"] == [("b.mp4", [SPAN])], "also from the todo list of a retry"
    assert retry(load_pipeline(QUICKSTART), str(corpus), QUIET) is None
    assert statuses(corpus) == {
        "a.mp4": ("kept", None, 1), "b.mp4": ("kept", None, 5), "c.mp4": ("dropped", "too_long", 1),
    }  # fmt: skip
    retry(load_pipeline(QUICKSTART), str(corpus), QUIET, reasons=["too_long"])
    assert statuses(corpus)["c.mp4"] == ("kept", None, 2)


def test_the_stored_pipeline_is_the_one_that_ran(works, sources, tmp_path):
    corpus = tmp_path / "c[1]"
    changed = load_pipeline(QUICKSTART, ["stages.segment.num_frames=5", "name=mine"])
    ingest(changed, [str(sources)], str(corpus), QUIET)
    again = stored_pipeline(Corpus.open(str(corpus)))
    assert (again.name, again.resolved()) == ("mine", changed.resolved())
    assert again.fingerprint == changed.fingerprint
    later = corpus / "runs" / "99991231T235959-0000"
    later.mkdir()
    (corpus / "runs" / "99991231T235959-0001").mkdir()
    (later / "pipeline.yaml").write_text(again.resolved().replace("name: mine", "name: newest"))
    assert stored_pipeline(Corpus.open(str(corpus))).name == "newest"
    more = stored_pipeline(Corpus.open(str(corpus)), ["stages.segment.num_frames=7"])
    assert more.fingerprint != changed.fingerprint


def test_an_exclusion_list_goes_with_the_stored_pipeline(works, sources, tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text(
        "name: p\nsources: {exclude: [x.txt]}\nstages: {download: {}, segment: {}}\n"
    )
    (tmp_path / "x.txt").write_text("a\n")
    corpus = tmp_path / "c"
    ingest(load_pipeline(tmp_path / "p.yaml"), [str(sources)], str(corpus), QUIET)
    assert statuses(corpus)["a.mp4"][:2] == ("dropped", "excluded")
    monkeypatch.chdir("/")
    pipeline = stored_pipeline(Corpus.open(str(corpus)))
    assert pipeline.sources.exclude == (str(tmp_path / "x.txt"),)
    retry(pipeline, str(corpus), QUIET, reasons=["excluded"])
    assert statuses(corpus)["a.mp4"] == ("dropped", "excluded", 2)
    (tmp_path / "x.txt").write_text("other\n")
    run(sources, corpus)
    assert statuses(corpus)["a.mp4"][:2] == ("kept", None)


@pytest.mark.parametrize("word", ["nothing", "", "empty", "list.csv", "youtube:x"])
def test_a_mistyped_source_leaves_no_corpus(tmp_path, word):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("a,b\n")
    with pytest.raises(ConfigError):
        ingest(
            load_pipeline(QUICKSTART),
            [word if ":" in word or not word else str(tmp_path / word)],
            str(tmp_path / "c"),
            QUIET,
        )
    assert not (tmp_path / "c").exists()


def test_a_name_that_is_not_utf8_ends_in_the_ledger(works, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"a.mp4", b"caf\xe9.mp4"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(name)
    words = [str(folder), os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")]
    result = ingest(load_pipeline(QUICKSTART), words, str(tmp_path / "c"), QUIET)
    assert statuses(tmp_path / "c") == {
        "a.mp4": ("kept", None, 1), "caf\\xe9.mp4": ("dropped", "bad_name", 1),
    }  # fmt: skip
    record = json.loads((tmp_path / "c" / "runs" / result.run_id / "run.json").read_text())
    assert record["sources"][1].endswith("/caf\\udce9.mp4")
    assert ingest(load_pipeline(QUICKSTART), words, str(tmp_path / "c"), QUIET).run_id is None


def test_a_refusal_is_looked_at_again_when_the_file_has_changed(works, sources, tmp_path):
    (sources / "d.mp4").write_bytes(b"a.mp4")
    run(sources, tmp_path / "c")
    assert statuses(tmp_path / "c")["d.mp4"][:2] == ("dropped", "duplicate")
    (sources / "d.mp4").write_bytes(b"something else")
    run(sources, tmp_path / "c")
    assert statuses(tmp_path / "c")["d.mp4"] == ("kept", None, 2)


def cli(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if isinstance(result.exception, EngineError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_the_command_line_says_what_failed_and_what_to_type(works, sources, tmp_path):
    corpus = tmp_path / "c"
    works["fail"] = {"b.mp4": ("failed", "timeout"), "a.mp4": ("failed", "http_429")}
    said = cli("ingest", QUICKSTART, "-s", sources, "-c", corpus)
    assert "3 sources: 3 to do" in said
    assert "2 sources failed for reasons that may pass: " in said
    assert f"dataengine retry {corpus}" in said
    assert "2 to do (2 failed before), 1 ended before" in cli(
        "ingest", QUICKSTART, "-s", sources, "-c", corpus
    )
    with pytest.raises(ConfigError, match="No source ended as timeouts") as error:
        cli("retry", corpus, "--class", "timeouts, http_429")
    assert "http_429 (1), timeout (1)" in error.value.hint
    works["fail"] = {}
    cli("retry", corpus, "--class", "timeout", "--set", "stages.download.retries=9")
    assert [name for name, _ in works["seen"]] == ["b.mp4"]
    assert "1 source" in cli("retry", corpus, "--pipeline", QUICKSTART, "--limit", 5)
    assert "Nothing to retry" in cli("retry", corpus)
    with pytest.raises(CorpusError, match="Not a corpus"):
        cli("retry", tmp_path / "nowhere")


def test_bad_spans_are_said_in_one_line(works, tmp_path):
    (tmp_path / "l.csv").write_text("url,start,end\n" + "http://h.example/a.mp4,2,1\n" * 3)
    said = cli("ingest", QUICKSTART, "-s", tmp_path / "l.csv", "-c", tmp_path / "c")
    assert said.count("warning:") == 1
    assert "1 source: 1 to do (1 to refuse)" in said
    assert "warning: given spans left out, without a time or ending before they start: 3" in said
    assert statuses(tmp_path / "c") == {"a.mp4": ("dropped", "bad_spans", 1)}


def test_what_was_removed_is_shown_as_removed():
    loss = funnel.Loss("removed", "removed", 2, 0.0)
    told = funnel.Funnel(2, 0.0, 0, 0.0, (loss,), 0, 0, 0.0, 0, 0.0, ())
    assert ("removed", 2, 0.0) in funnel.rows_of(told)["videos"]
