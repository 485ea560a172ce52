# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine.compact import compact, merging
from dataengine.corpus import Corpus
from dataengine.errors import CorpusError
from dataengine.query.sql import connect
from dataengine.query.subsets import Definition, make_subset
from dataengine.query.verify import verify
from dataengine.remove import remove
from dataengine.rewrite import rewrite_shard
from tests.helpers import clip_row, clips_table, ledger_row, small_corpus


def add_videos(corpus: Corpus, names: list[str], run_id: str = "r-1") -> None:
    for name in names:
        rows = [clip_row(name, 1000 * i, 1000 * i + 1000) for i in range(2)]
        corpus.commit(clips_table(rows), [ledger_row(name, rows)], run_id=run_id, fingerprint="f")


def twins(corpus: Corpus) -> list[dict]:
    """The catalog as the shards' own files say it."""
    rows = []
    for name in corpus.names("catalog"):
        rows += pq.read_table(corpus.path("catalog", f"{name}.parquet")).to_pylist()
    return sorted(rows, key=lambda row: row["clip_id"])


def seen(corpus: Corpus, snapshot: str = "") -> list[dict]:
    with connect(corpus, snapshot=snapshot) as db:
        return db.sql("select * from clips order by clip_id").to_arrow_table().to_pylist()


def check(corpus: Corpus) -> None:
    """Every reader sees what the shards' own files say."""
    expected = twins(corpus)
    assert seen(corpus) == expected
    assert sorted(corpus.catalog().to_pylist(), key=lambda row: row["clip_id"]) == expected


def test_a_merged_catalog_says_the_same_and_what_comes_later_is_seen(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=5)
    done = compact(corpus)
    assert (done.num_clips, done.num_shards, done.num_files) == (10, 5, 1)
    check(corpus)
    add_videos(corpus, ["later0", "later1", "later2"])
    check(corpus)
    assert [len(part.files) for part in corpus.catalog_parts()] == [1, 3]
    assert compact(corpus).num_shards == 8  # the new ones are many, so all are merged
    check(corpus)
    assert compact(corpus).num_clips == 0


def test_a_merged_file_is_sorted_by_video_and_time(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=9, num_clips=3)
    compact(corpus)
    (part,) = corpus.catalog_parts()
    rows = pq.read_table(part.files[0]).to_pylist()
    assert rows == sorted(rows, key=lambda row: (row["video_id"], row["start_ms"]))


def test_a_large_segment_is_left_until_much_is_new(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=9)
    compact(corpus)
    add_videos(corpus, ["later0"])
    assert compact(corpus).num_shards == 1
    assert len(corpus.catalog_parts()) == 2
    check(corpus)
    assert compact(corpus, full=True).num_shards == 10
    assert len(corpus.catalog_parts()) == 1
    check(corpus)


def test_shards_written_again_are_read_from_their_own_file(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=6)
    compact(corpus)
    shard = corpus.names("catalog")[2]
    path = corpus.path("catalog", f"{shard}.parquet")
    table = pq.read_table(path)
    changed = [{**row, "caption": "another"} for row in table.to_pylist()]
    corpus.publish(
        f"catalog/{shard}.parquet",
        lambda file: pq.write_table(type(table).from_pylist(changed, schema=table.schema), file),
    )
    check(corpus)
    assert sum(row["caption"] == "another" for row in seen(corpus)) == 2
    compact(corpus)
    check(corpus)
    merged, stale = 0, 0
    for part in corpus.catalog_parts():
        merged += len(part.files)
        stale += len(part.without)
    assert (merged, stale) == (2, 1)


def test_a_removed_video_is_in_no_file_any_more_not_even_in_an_old_snapshot(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=4)
    first = compact(corpus).snapshot
    add_videos(corpus, ["later"])
    compact(corpus, full=True)
    assert len(seen(corpus, first)) == 8
    remove(corpus, ["video2"])
    check(corpus)
    assert len(seen(corpus)) == 8
    assert {row["video_id"] for row in seen(corpus, first)} == {"video0", "video1", "video3"}
    for folder, _, files in os.walk(corpus.path("compacted")):
        for name in files:
            assert b"video2" not in Path(folder, name).read_bytes()
    assert verify(corpus).problems == []


def test_an_old_snapshot_shows_the_corpus_of_then_until_it_is_swept(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    first = compact(corpus).snapshot
    add_videos(corpus, ["later"])
    compact(corpus, full=True)
    assert len(seen(corpus, first)) == 6
    add_videos(corpus, ["last"])
    compact(corpus, full=True, keep=1)
    with pytest.raises(CorpusError, match="No snapshot") as error:
        seen(corpus, first)
    assert corpus.names("compacted", ".json")[-1] in error.value.hint
    folders = [e.name for e in os.scandir(corpus.path("compacted")) if e.is_dir()]
    assert len(folders) == 1
    check(corpus)


def test_without_its_merged_files_a_corpus_is_whole(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    compact(corpus)
    shutil.rmtree(corpus.path("compacted"))
    check(corpus)
    # A copy that does not keep the files' times makes every merged row out of date, not wrong.
    compact(corpus)
    for name in corpus.names("catalog"):
        os.utime(corpus.path("catalog", f"{name}.parquet"), ns=(1, 1))
    check(corpus)
    assert all("/catalog/" in path for part in corpus.catalog_parts() for path in part.files)


def test_columns_that_annotation_adds_are_merged_and_missing_ones_are_null(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    compact(corpus)
    about = json.loads((tmp_path / "c" / "corpus.json").read_text())
    about["columns"] = {"caption_x": "caption"}
    (tmp_path / "c" / "corpus.json").write_text(json.dumps(about))
    assert [row["caption_x"] for row in seen(corpus)] == [None] * 6
    shard = corpus.names("catalog")[0]
    with connect(corpus, shard) as db:
        ids = [clip_id for (clip_id,) in db.execute("select clip_id from clips").fetchall()]
    updates = {clip_id: {"caption_x": f"of {clip_id}"} for clip_id in ids}
    rewrite_shard(corpus, shard, updates, {"caption_x": pa.string()}, "mark", "r-1")
    for _ in range(2):
        texts = {row["clip_id"]: row["caption_x"] for row in seen(corpus)}
        assert texts == {i: f"of {i}" if i in ids else None for i in texts}
        assert corpus.catalog(["caption_x"])["caption_x"].null_count == 4
        compact(corpus, full=True)


def test_merging_needs_no_quiet_and_two_merges_do_not_meet(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    with corpus.locked():  # an ingest holds this
        compact(corpus)
    with merging(corpus), pytest.raises(CorpusError, match="Another process"):
        compact(corpus)


def test_a_merge_that_was_killed_leaves_nothing_that_counts(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=4)
    compact(corpus)
    before = seen(corpus)
    add_videos(corpus, ["later0", "later1", "later2"])
    code = (
        "import os, sys, dataengine.compact as c\n"
        "from dataengine.corpus import Corpus\n"
        "c.write_small = lambda *a: os._exit(9)\n"
        "c.compact(Corpus.open(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, corpus.url]).returncode == 9
    assert len(seen(corpus)) == len(before) + 6
    compact(corpus)
    check(corpus)
    used = {
        segment["name"]
        for name in corpus.names("compacted", ".json")
        for segment in corpus.segments(name)
    }
    assert {e.name for e in os.scandir(corpus.path("compacted")) if e.is_dir()} == used


def test_a_store_that_is_no_local_disk(tmp_path):
    corpus = Corpus.create("memory://merged/c")
    corpus.take_over("r-1")
    add_videos(corpus, ["a", "b", "c"])
    assert compact(corpus).num_clips == 6
    assert len(seen(corpus)) == 6
    add_videos(corpus, ["d"])
    assert len(seen(corpus)) == 8
    assert corpus.catalog(["clip_id"]).num_rows == 8


@pytest.mark.parametrize("name", ["c5[x]", "c*", "q?", "it's", "[*]?'"])
def test_a_corpus_path_with_special_characters_stands_for_itself(tmp_path, name):
    """Neighbours that the path would match as a pattern are neither read nor touched."""
    for neighbour in ("c5x", "cAA", "qq"):
        compact(small_corpus(tmp_path / neighbour, num_videos=1))
    corpus = small_corpus(tmp_path / name, num_videos=4)
    check(corpus)
    done = compact(corpus)
    assert (done.num_clips, done.num_files) == (8, 1)
    check(corpus)
    assert all("/compacted/" in path for part in corpus.catalog_parts() for path in part.files)
    make_subset(corpus, "some", Definition(num_clips=4))
    make_subset(corpus, "mixed", Definition(num_clips=2, mix={"some": 1.0}))
    with connect(corpus, subset="some") as db:
        assert db.execute("select count(*) from clips").fetchall() == [(4,)]
    corpus.publish("runs/r-1/funnel.json", lambda file: file.write(b"{}"))
    corpus.publish("runs/funnel.json", lambda file: file.write(b"{}"))
    assert corpus.run_files("funnel.json") == [corpus.path("runs", "r-1", "funnel.json")]
    remove(corpus, ["video2"])
    for path in Path(corpus.root, "compacted").glob("*/part-*.parquet"):
        assert b"video2" not in path.read_bytes()
    assert len(seen(corpus)) == 6
    compact(corpus, full=True, keep=1)
    check(corpus)
    assert verify(corpus).problems == []
    for neighbour in ("c5x", "cAA", "qq"):
        assert len(seen(Corpus.open(str(tmp_path / neighbour)))) == 2


def test_a_merge_that_lost_rows_is_not_published(tmp_path, monkeypatch):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    monkeypatch.setattr("dataengine.compact._is_part", lambda path: False)
    with pytest.raises(CorpusError, match="Of 6 clips 0 came out of the merge"):
        compact(corpus)
    assert corpus.names("compacted", ".json") == []
    check(corpus)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("*/part-0.parquet", lambda content: content[: len(content) // 2]),
        ("*/part-0.parquet", lambda content: content[:200] + bytes(1500) + content[1700:]),
        ("*/part-0.parquet", None),
        ("*/shards.parquet", lambda content: b"junk"),
        ("*/shards.parquet", None),
        ("*.json", lambda content: content[:40]),
        ("*.json", lambda content: b'{"segments": [{"name": "x"}]}'),
        ("*.json", lambda content: b"\xff\x00"),
    ],
)
def test_a_damaged_merged_catalog_is_named_and_merged_again(tmp_path, name, damage):
    corpus = small_corpus(tmp_path / "c", num_videos=5, num_clips=20)
    compact(corpus)
    (path,) = Path(corpus.path("compacted")).glob(name)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(CorpusError, match="Damaged") as error:
        seen(corpus)
    # DuckDB does not always know which file it is.
    assert any(f"dataengine {command}" in error.value.hint for command in ("compact", "verify"))
    problems = verify(corpus).problems
    assert any("compacted/" in p and "compact CORPUS --full" in p for p in problems), problems
    compact(corpus, full=True)
    check(corpus)
    assert verify(corpus).problems == []
    assert compact(corpus).num_clips == 0


def test_a_damaged_snapshot_with_the_newest_name_is_swept(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    compact(corpus)
    corpus.publish("compacted/zzz.json", lambda file: file.write(b"junk"))
    compact(corpus, full=True)
    assert len(corpus.names("compacted", ".json")) == 2
    check(corpus)


def test_a_merge_of_damaged_merged_files_says_how_to_mend_them(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=3)
    compact(corpus)
    (path,) = Path(corpus.path("compacted")).glob("*/part-0.parquet")
    path.write_bytes(b"junk" * 10)
    add_videos(corpus, ["later0", "later1"])
    with pytest.raises(CorpusError, match="Damaged") as error:
        compact(corpus)
    assert "dataengine compact CORPUS --full" in error.value.hint
