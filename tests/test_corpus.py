# SPDX-License-Identifier: Apache-2.0
import json
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dataengine import media, records
from dataengine.cli import app
from dataengine.compact import compact
from dataengine.corpus import MERGE_AGAIN, Corpus, SupersededError, row_groups
from dataengine.errors import CorpusError
from dataengine.query.sql import connect
from dataengine.query.verify import verify
from dataengine.remove import remove
from tests import media_factory
from tests.helpers import MP4, clip_row, clips_table, ledger_row, small_corpus


def test_a_committed_corpus_reads_back_and_verifies(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=3, num_clips=2)
    catalog = corpus.catalog()
    assert catalog.num_rows == 6
    assert catalog["clip_id"].to_pylist()[0].startswith("video")
    row = catalog.to_pylist()[3]
    clip = corpus.read_clip(row, ["clip_id", "video"])
    assert clip["clip_id"] == row["clip_id"]
    assert clip["video"]["bytes"] == MP4
    result = verify(corpus)
    assert result.problems == []
    assert (result.num_shards, result.num_clips, result.num_videos) == (3, 6, 3)


def test_commit_sorts_rows_and_cuts_row_groups(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    rows = [clip_row(v, s, s + 500) for v in ("b", "a") for s in (1000, 0)]
    ledger = [ledger_row(v, [r for r in rows if r["video_id"] == v]) for v in ("a", "b")]
    shard = corpus.commit(
        clips_table(rows), ledger, run_id="r-1", fingerprint="f", row_group_bytes=2000
    )
    catalog = corpus.catalog().to_pylist()
    assert [row["clip_id"] for row in catalog] == [
        "a_0_500",
        "a_1000_1500",
        "b_0_500",
        "b_1000_1500",
    ]
    assert [(row["row_group"], row["row"]) for row in catalog] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with corpus.open_shard(str(shard)) as file:
        column = file.metadata.row_group(0).column(
            next(
                c
                for c in range(file.metadata.num_columns)
                if file.metadata.row_group(0).column(c).path_in_schema == "video.bytes"
            )
        )
        assert column.compression == "UNCOMPRESSED"
        assert not column.has_dictionary_page
        assert b"huggingface" in file.schema_arrow.metadata
    assert verify(corpus).problems == []


def test_the_shard_name_depends_on_videos_and_pipeline_only(tmp_path):
    names = set()
    for folder, fingerprint in (("x", "f"), ("y", "f"), ("z", "g")):
        corpus = Corpus.create(str(tmp_path / folder))
        corpus.take_over("r-1")
        rows = [clip_row("a", 0, 500)]
        ledger = [ledger_row("a", rows)]
        names.add(corpus.commit(clips_table(rows), ledger, run_id="r-1", fingerprint=fingerprint))
    assert len(names) == 2


STEPS = ("shards/", "videos/", "catalog/")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_cut_short_leaves_no_trace_once_repeated(tmp_path, monkeypatch, step, when):
    """Kills the commit before and after each file it publishes, then does what a new run does."""
    corpus = small_corpus(tmp_path / "c", num_videos=2)
    rows = [clip_row("late", 0, 700)]
    publish = Corpus.publish

    def killed(self, name, write):
        if when == "after":
            publish(self, name, write)
        if name.startswith(step):
            raise KeyboardInterrupt
        if when == "before":
            publish(self, name, write)

    monkeypatch.setattr(Corpus, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        corpus.commit(clips_table(rows), [ledger_row("late", rows)], run_id="r-1", fingerprint="f")
    monkeypatch.undo()

    committed = step == "catalog/" and when == "after"
    assert corpus.catalog().num_rows == 4 + committed
    assert corpus.videos().num_rows == 2 + committed, "a videos part counts only with its shard"
    corpus.take_over("r-2")
    corpus.sweep()
    assert set(corpus.names("shards")) == set(corpus.names("catalog"))
    assert len(corpus.names("videos")) == len(corpus.video_parts())
    if not committed:
        corpus.commit(clips_table(rows), [ledger_row("late", rows)], run_id="r-2", fingerprint="f")
    assert corpus.catalog().num_rows == 5
    assert verify(corpus).problems == []


def test_temporary_files_are_never_seen_and_are_swept(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=1)
    for folder in ("shards", "videos", "catalog"):
        (tmp_path / "c" / folder / ".x.parquet.123.tmp").write_bytes(b"half")
    assert len(corpus.names("catalog")) == 1
    assert corpus.sweep() == 3
    assert not [
        name for _, _, files in os.walk(tmp_path) for name in files if name.endswith(".tmp")
    ]


def test_a_superseded_run_commits_nothing(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=1, run_id="r-1")
    corpus.take_over("r-2")
    rows = [clip_row("late", 0, 700)]
    with pytest.raises(SupersededError, match="superseded by run r-2"):
        corpus.commit(clips_table(rows), [ledger_row("late", rows)], run_id="r-1", fingerprint="f")
    assert corpus.catalog().num_rows == 2
    assert corpus.names("shards") == corpus.names("catalog")


def test_a_run_superseded_while_writing_the_shard_does_not_commit(tmp_path, monkeypatch):
    corpus = small_corpus(tmp_path / "c", num_videos=1, run_id="r-1")
    publish = Corpus.publish

    def slow(self, name, write):
        publish(self, name, write)
        if name.startswith("shards/"):
            self.take_over("r-2")

    monkeypatch.setattr(Corpus, "publish", slow)
    rows = [clip_row("late", 0, 700)]
    with pytest.raises(SupersededError):
        corpus.commit(clips_table(rows), [ledger_row("late", rows)], run_id="r-1", fingerprint="f")
    monkeypatch.undo()
    assert corpus.catalog().num_rows == 2


def test_dropped_videos_are_committed_without_a_shard(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=1)
    none = records.CLIP_SCHEMA.empty_table()
    corpus.commit(none, [ledger_row("bad", [])], run_id="r-1", fingerprint="f")
    assert corpus.sweep() == 0
    statuses = dict(
        zip(*(corpus.videos()[c].to_pylist() for c in ("video_id", "status")), strict=True)
    )
    assert statuses == {"video0": "kept", "bad": "dropped"}
    assert verify(corpus).problems == []


def test_the_newest_ledger_row_of_a_source_counts(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=1)
    none = records.CLIP_SCHEMA.empty_table()
    for run, time_ms, status in (("r-2", 5, "failed"), ("r-3", 9, "dropped"), ("r-4", 7, "failed")):
        corpus.take_over(run)
        row = ledger_row("bad", [], status=status, finished_ms=time_ms)
        corpus.commit(none, [row], run_id=run, fingerprint="f")
    rows = corpus.videos(["video_id", "status"]).to_pylist()
    assert {"video_id": "bad", "status": "dropped"} in rows
    assert len(rows) == 2


def _break_twin(corpus, change):
    name = corpus.names("catalog")[0]
    path = corpus.path("catalog", f"{name}.parquet")
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=records.CATALOG_SCHEMA), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.append(rows[0]), "is there 2 times"),
        (lambda rows: rows.pop(), "is not in the catalog twin"),
        (lambda rows: rows[0].update(caption="other"), "differs in caption"),
        (lambda rows: rows[0].update(row_group=7), "differs in row_group"),
        (lambda rows: rows[0].update(end_ms=0), "span [0, 0)"),
        (lambda rows: rows[0].update(end_ms=1500), "overlaps"),
        (lambda rows: rows[0].update(clip_id="x"), "does not match its video"),
        (lambda rows: rows[0].update(clip_score=2.0), "outside [-1, 1]"),
        (lambda rows: [r.update(video_id="stranger") for r in rows], "not kept in the ledger"),
    ],
)
def test_verify_finds_what_is_wrong(tmp_path, change, said):
    corpus = small_corpus(tmp_path / "c", num_videos=2)
    _break_twin(corpus, change)
    assert said in "\n".join(verify(corpus).problems)


FRAME = b"\xff\xd8\xff" + b"j" * 100
HASH = {"column": "caption", "model": "m", "input_hash": records.digest(FRAME)}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"frames": []}, "0 frames with 2 times"),
        ({"frames": None, "frame_ms": None}, "0 frames with 0 times"),
        ({"frame_ms": [0]}, "2 frames with 1 times"),
        ({"frame_ms": [300, 300]}, "not in order"),
        ({"frame_ms": [300, 200]}, "not in order"),
        ({"frame_ms": [0, 1000]}, "outside the span"),
        ({"frame_ms": [-1, 500]}, "outside the span"),
        ({"frame_ms": [0, None]}, "has no time"),
        ({"frames": [FRAME, b"PNG"]}, "not a JPEG"),
        ({"video": {"bytes": b"RIFF" * 5, "path": None}}, "not an MP4"),
        ({"video": {"bytes": None, "path": None}}, "not an MP4"),
        ({"provenance": [HASH]}, "caption was written about other frames"),
    ],
)
def test_verify_finds_media_that_is_not_what_it_should_be(tmp_path, columns, said):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    rows = [clip_row("a", 1000 * i, 1000 * i + 1000) for i in range(5)]
    rows[3] |= columns
    if columns.get("frame_ms"):
        rows[3]["frame_ms"] = [None if ms is None else 3000 + ms for ms in columns["frame_ms"]]
    rows[1] |= {"video": None}  # a pipeline may store frames only
    rows[2] |= {"frames": [FRAME], "frame_ms": [2000], "provenance": [HASH]}
    corpus.commit(
        clips_table(rows), [ledger_row("a", rows)], run_id="r-1", fingerprint="f",
        row_group_bytes=2500,
    )  # fmt: skip
    (problem,) = verify(corpus).problems
    assert said in problem
    assert "clip a_3000_4000" in problem


def test_verify_sees_past_rows_that_were_removed(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    rows = [clip_row(v, 0, 1000, caption=f"of {v}") for v in "abc"]
    ledger = [ledger_row(v, [row]) for v, row in zip("abc", rows, strict=True)]
    corpus.commit(clips_table(rows), ledger, run_id="r-1", fingerprint="f", row_group_bytes=1)
    remove(corpus, ["b"])
    assert verify(corpus).problems == []
    (shard,) = corpus.names("shards")
    with corpus.open_shard(shard) as file:
        table = file.read()
    left = table["caption"].to_pylist()
    left[1] = "still here"
    table = table.set_column(table.column_names.index("caption"), "caption", pa.array(left))
    pq.write_table(
        table, corpus.path("shards", f"{shard}.parquet"), row_group_size=1, use_dictionary=False,
        compression="none",
    )  # fmt: skip
    assert verify(corpus).problems == [
        f"shard {shard}: row group 1, row 0: no clip_id, but not empty"
    ]


def test_verify_in_processes_and_of_a_sample(tmp_path, monkeypatch):
    corpus = small_corpus(tmp_path / "c", num_videos=12)
    monkeypatch.setattr("dataengine.query.verify._TASK_SHARDS", 3)
    for name in corpus.names("catalog")[:6]:
        path = corpus.path("catalog", f"{name}.parquet")
        rows = pq.read_table(path).to_pylist()
        rows[1]["caption"] = "other"
        pq.write_table(pa.Table.from_pylist(rows, schema=records.CATALOG_SCHEMA), path)
    told = []
    here = verify(corpus, jobs=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(at + 1, 12) for at in range(12)]
    assert len(here.problems) == 6
    assert verify(corpus, jobs=2) == here
    part = verify(corpus, sample=4, seed=1, jobs=1)
    assert (part.num_shards, part.num_clips, part.checked_shards, part.checked_clips) == (
        12,
        24,
        4,
        8,
    )
    assert set(part.problems) < set(here.problems)
    assert part == verify(corpus, sample=4, seed=1, jobs=1)
    found = {
        problem
        for seed in range(4)
        for problem in verify(corpus, sample=8, seed=seed, jobs=1).problems
    }
    assert found == set(here.problems), "every shard's turn comes"
    result = CliRunner().invoke(app, ["verify", corpus.url, "--sample", "3", "--jobs", "1"])
    assert "Looked into 3 of 12 shards (25 %, 6 clips)" in result.stderr


def test_verify_compares_merged_files_with_what_they_stand_for(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=4)
    compact(corpus)
    rows = [clip_row("late", 0, 700)]
    corpus.commit(clips_table(rows), [ledger_row("late", rows)], run_id="r-1", fingerprint="f")
    assert verify(corpus).problems == []
    ((merged,), _) = (part.files for part in corpus.catalog_parts())
    table = pq.read_table(merged)
    shards = table["shard"].to_pylist()

    def replaced(name, at, value):
        values = table[name].to_pylist()
        values[at] = value
        field = table.schema.field(name)
        return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))

    pq.write_table(replaced("caption", 3, "other"), merged)
    assert verify(corpus).problems == [
        f"shard {shards[3]}: the merged catalog differs from its catalog file; {MERGE_AGAIN}"
    ]
    pq.write_table(table.slice(1), merged)
    problems = verify(corpus).problems
    assert (
        f"shard {shards[0]}: the merged catalog differs from its catalog file: 1 clips instead of 2; {MERGE_AGAIN}"
        in problems
    )
    pq.write_table(table.slice(2), merged)
    assert any("0 clips instead of 2" in problem for problem in verify(corpus).problems)


def test_verify_finds_a_missing_shard_and_a_video_in_two_shards(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=2)
    rows = [clip_row("video0", 8000, 9000)]
    corpus.commit(clips_table(rows), [], run_id="r-1", fingerprint="g")
    os.unlink(corpus.path("shards", corpus.names("catalog")[0] + ".parquet"))
    text = "\n".join(verify(corpus).problems)
    assert "lies in 2 shards" in text
    assert "its file is missing" in text


def test_opening_what_is_no_corpus_says_so(tmp_path):
    with pytest.raises(CorpusError, match="Not a corpus"):
        Corpus.open(str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match="not empty"):
        Corpus.create(str(tmp_path))
    (tmp_path / "corpus.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CorpusError, match="newer"):
        Corpus.open(str(tmp_path))


@pytest.mark.parametrize("sizes", [[], [5], [100], [1] * 10, [4, 4, 4], [100, 1, 100], [0, 0, 0]])
@pytest.mark.parametrize("limit", [1, 4, 10])
def test_row_groups_cover_every_row_once_and_close_at_the_limit(sizes, limit):
    groups = list(row_groups(sizes, limit))
    assert [i for start, stop in groups for i in range(start, stop)] == list(range(len(sizes)))
    for start, stop in groups[:-1]:
        assert sum(sizes[start:stop]) >= limit
    for start, stop in groups:
        assert sum(sizes[start : stop - 1]) < limit


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"format_version": "x"}'])
def test_a_damaged_corpus_json_is_one_message(tmp_path, text):
    corpus = small_corpus(tmp_path / "c")
    (tmp_path / "c" / "corpus.json").write_text(text)
    with pytest.raises(CorpusError, match=r"Damaged: corpus\.json"):
        Corpus.open(corpus.url)


@pytest.mark.parametrize("folder", ["catalog", "videos"])
@pytest.mark.parametrize("content", [b"", b"PAR1 this is not Parquet"])
def test_a_damaged_catalog_is_named_and_the_rest_is_still_checked(tmp_path, folder, content):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    broken = sorted((tmp_path / "c" / folder).glob("*.parquet"))[1]
    broken.write_bytes(content)
    problems = verify(corpus).problems
    assert any(f"{folder}/{broken.name} cannot be read" in problem for problem in problems)
    with pytest.raises(CorpusError, match="Damaged"), connect(corpus) as db:
        db.execute("select * from clips, videos").fetchall()


def test_a_folder_left_by_a_kill_right_after_its_making_is_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(type(Corpus(str(tmp_path)).fs), "makedirs", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Corpus.create(str(tmp_path / "c"))
    monkeypatch.undo()
    assert Corpus.create(str(tmp_path / "c")).catalog().num_rows == 0


def test_a_number_that_is_none_is_stored_as_no_number(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    scores = [0.5, math.nan, math.inf, -math.inf, None]
    rows = [clip_row("v", 1000 * i, 1000 * i + 1000, clip_score=s) for i, s in enumerate(scores)]
    corpus.commit(clips_table(rows), [ledger_row("v", rows)], run_id="r-1", fingerprint="f")
    assert corpus.catalog(["clip_score"])["clip_score"].to_pylist() == [0.5, None, None, None, None]
    assert verify(corpus).problems == []


def test_decoding_finds_damage_that_players_hide(tmp_path):
    """Packets that do not decode, pictures that were made up, a file that breaks off."""
    path = media_factory.make_video(tmp_path / "v.mp4", (35, 35), index_first=True)
    good = path.read_bytes()
    jpeg = media.jpeg_encode(np.zeros((240, 320, 3), np.uint8))
    with media.open_container(good) as container:
        packets = list(media.video_stream(container).index_entries)
    assert len(packets) == 70
    zeroed = bytearray(good)
    for packet in packets[40:55]:
        zeroed[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    made_up = bytearray(good)
    largest = max(packets, key=lambda packet: packet.size)
    middle = largest.pos + largest.size // 2
    made_up[middle : largest.pos + largest.size] = b"\x55" * (largest.size - largest.size // 2)
    cut_off = good[: packets[50].pos]
    problems = {}
    for name, mp4 in {"good": good, "zeroed": zeroed, "made_up": made_up, "cut": cut_off}.items():
        corpus = Corpus.create(str(tmp_path / name))
        corpus.take_over("r-1")
        video = {"bytes": bytes(mp4), "path": None}
        row = clip_row("v", 0, 2800, video=video, frames=[jpeg], frame_ms=[0])
        corpus.commit(clips_table([row]), [ledger_row("v", [row])], run_id="r-1", fingerprint="f")
        problems[name] = " ".join(verify(corpus, decode=True).problems)
    assert problems["good"] == ""
    assert "of the video's 70 frames decode" in problems["zeroed"]
    assert "decode with errors" in problems["made_up"] or "do not decode" in problems["made_up"]
    assert "20 of 70 packets of the video are cut off" in problems["cut"]
