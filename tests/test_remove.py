# SPDX-License-Identifier: Apache-2.0
"""Takedown: what is removed is in no file any more, everything else is where it was."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine import records
from dataengine.compact import compact
from dataengine.corpus import Corpus
from dataengine.errors import CorpusError
from dataengine.query.subsets import Definition, make_subset, read_definition
from dataengine.query.verify import verify
from dataengine.remove import remove
from tests.helpers import MP4, clip_row, clips_table, ledger_row

SECRET = "hunter2-secret"


def _rows(video_id: str, text: str) -> list[dict]:
    media = {"bytes": MP4 + text.encode(), "path": None}
    return [
        clip_row(video_id, s, s + 500, caption=text, title=text, video=media) for s in (0, 500, 900)
    ][:2]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Two shards: one with the videos a, gone, z in small row groups, one with gone2 alone."""
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    for videos in (("a", "gone", "z"), ("gone2",)):
        rows = {v: _rows(v, SECRET if v.startswith("gone") else f"kept {v}") for v in videos}
        ledger = [ledger_row(v, rows[v], title=rows[v][0]["title"]) for v in videos]
        corpus.commit(
            clips_table([row for part in rows.values() for row in part]),
            [*ledger, ledger_row(f"dropped-{videos[0]}", [])],
            run_id="r-1",
            fingerprint="f",
            row_group_bytes=3000,
        )
    spans = [{"start_ms": 0, "end_ms": 500, "caption": SECRET}]
    listed = [{"source": "/gone.mp4", "spans": spans}, {"source": "/a.mp4", "spans": None}]
    schema = pa.schema([("source", pa.string()), ("spans", pa.list_(records.SPAN_STRUCT))])
    table = pa.Table.from_pylist(listed, schema=schema)
    corpus.publish("runs/r-1/sources.parquet", lambda file: pq.write_table(table, file))
    chosen = pa.table({"clip_id": ["a_0_500", "gone_0_500", "gone2_500_1000"]})
    corpus.publish("subsets/mine.parquet", lambda file: pq.write_table(chosen, file))
    cache = Path(corpus.path("cache"))
    cache.mkdir()
    (cache / "gone.mp4").write_text("fetched")
    (cache / "a.mp4").write_text("kept")
    return corpus


def _everything(corpus: Corpus) -> list[str]:
    """Returns the files in which the secret can be found, compressed or not."""
    found = []
    for path in Path(corpus.url).rglob("*"):
        if not path.is_file():
            continue
        held = path.read_bytes()
        if path.suffix == ".parquet":
            held += str(pq.read_table(path).to_pylist()).encode()
        if SECRET.encode() in held:
            found.append(str(path.relative_to(corpus.url)))
    return found


def _media(corpus: Corpus, rows: list[dict]) -> list[dict]:
    return [corpus.read_clip(row, ["clip_id", "video", "frames"]) for row in rows]


def test_a_removed_video_is_in_no_file_and_all_others_stay_where_they_were(corpus):
    kept = [row for row in corpus.catalog().to_pylist() if not row["video_id"].startswith("gone")]
    before = _media(corpus, kept)
    assert len(_everything(corpus)) >= 7
    removal = remove(corpus, ["gone", "gone2"])
    assert (removal.num_videos, removal.num_clips, len(removal.shards)) == (2, 4, 2)
    assert _everything(corpus) == []
    assert corpus.catalog().to_pylist() == kept
    assert _media(corpus, kept) == before
    assert verify(corpus).problems == []
    statuses = {row["source"]: row["status"] for row in corpus.videos().to_pylist()}
    assert statuses == {
        "/a.mp4": "kept",
        "/gone.mp4": "removed",
        "/z.mp4": "kept",
        "/gone2.mp4": "removed",
        "/dropped-a.mp4": "dropped",
        "/dropped-gone2.mp4": "dropped",
    }
    subset = pq.read_table(corpus.path("subsets", "mine.parquet"))
    assert subset["clip_id"].to_pylist() == ["a_0_500"]
    assert (Path(corpus.url) / "cache" / "a.mp4").exists()


def test_removing_again_changes_nothing(corpus):
    remove(corpus, ["gone"])
    files = {p: p.read_bytes() for p in Path(corpus.url).rglob("*.parquet")}
    again = remove(corpus, ["gone"])
    assert again.num_clips == 0
    assert {p: p.read_bytes() for p in Path(corpus.url).rglob("*.parquet")} == files


def test_an_unknown_id_stops_before_anything_is_touched(corpus):
    with pytest.raises(CorpusError, match="nosuch"):
        remove(corpus, ["gone", "nosuch"])
    assert verify(corpus).num_clips == 8


def test_another_writer_is_not_disturbed(corpus):
    with corpus.locked(), pytest.raises(CorpusError, match="Another run"):
        remove(corpus, ["gone"])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(9))
def test_a_removal_cut_short_is_finished_by_the_next(corpus, monkeypatch, step, when):
    """Kills it before and after each file it replaces; others' clips are readable at every moment."""
    kept = [row for row in corpus.catalog().to_pylist() if not row["video_id"].startswith("gone")]
    before = _media(corpus, kept)
    publish, calls = Corpus.publish, []

    def killed(self, name, write):
        calls.append(name)
        if len(calls) == step + 1 and when == "before":
            raise KeyboardInterrupt
        publish(self, name, write)
        if len(calls) == step + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Corpus, "publish", killed)
    try:
        remove(corpus, ["gone", "gone2"])
    except KeyboardInterrupt:
        pass
    else:
        assert len(calls) <= step
    monkeypatch.setattr(Corpus, "publish", publish)
    now = {row["clip_id"]: row for row in corpus.catalog().to_pylist()}
    assert _media(corpus, [now[row["clip_id"]] for row in kept]) == before
    remove(corpus, ["gone", "gone2"])
    assert _everything(corpus) == []
    assert verify(corpus).problems == []
    assert _media(corpus, kept) == before


def test_copies_of_a_removed_video_are_forgotten_too(corpus):
    copy = ledger_row("copy", [], source="/copy.mp4", reason="duplicate", title=SECRET)
    copy |= {"detail": "same bytes as /gone.mp4", "stage": "download"}
    corpus.take_over("r-2")
    corpus.commit(clips_table([]), [copy], run_id="r-2", fingerprint="f")
    remove(corpus, ["gone", "gone2"])
    assert _everything(corpus) == []
    statuses = {row["source"]: row["status"] for row in corpus.videos().to_pylist()}
    assert statuses["/copy.mp4"] == "removed"


def test_a_damaged_subset_stops_nothing_else_and_is_named(corpus):
    junk = Path(corpus.path("subsets", "bad.parquet"))
    junk.write_bytes(b"junk")
    (Path(corpus.path("subsets", "no_ids.parquet"))).write_bytes(b"")
    compact(corpus)
    (merged,) = Path(corpus.path("compacted")).glob("*/part-0.parquet")
    good = merged.read_bytes()
    merged.write_bytes(good[:-10])
    with pytest.raises(
        CorpusError, match=r"subsets/bad\.parquet, subsets/no_ids\.parquet"
    ) as error:
        remove(corpus, ["gone", "gone2"])
    assert merged.name in str(error.value)
    assert "dataengine compact CORPUS --full --keep 1" in error.value.hint
    merged.unlink()
    junk.unlink()
    Path(corpus.path("subsets", "no_ids.parquet")).unlink()
    assert _everything(corpus) == []
    compact(corpus, full=True, keep=1)
    remove(corpus, ["gone", "gone2"])
    assert verify(corpus).problems == []


def test_a_subset_says_how_many_clips_it_holds_after_a_removal(corpus):
    make_subset(corpus, "all", Definition())
    remove(corpus, ["gone"])
    about = read_definition(corpus, "all")
    assert (about["num_clips"], about["num_videos"], about["num_removed"]) == (6, 3, 2)
    remove(corpus, ["gone2"])
    about = read_definition(corpus, "all")
    assert (about["num_clips"], about["num_videos"], about["num_removed"]) == (4, 2, 4)
    assert about["definition"]["order"] == "uniform"


def test_verify_names_subsets_that_the_catalog_does_not_bear_out(corpus):
    make_subset(corpus, "good", Definition())
    assert verify(corpus).problems == []
    rows = pq.read_table(corpus.path("subsets", "good.parquet"))
    moved = rows.set_column(rows.column_names.index("row"), "row", pa.array([9] * 8, pa.int32()))
    elsewhere = pa.table({"clip_id": ["a_0_500", "nosuch_0_500"]})
    for name, table in {"moved": moved, "other": elsewhere, "odd": pa.table({"x": [1]})}.items():
        pq.write_table(table, corpus.path("subsets", f"{name}.parquet"))
    Path(corpus.path("subsets", "bad.parquet")).write_bytes(b"junk")
    problems = verify(corpus).problems
    assert [problem.partition(" ")[2].partition(";")[0] for problem in problems[1:3]] == [
        "moved: 8 of its clips are not in their places in the catalog, such as a_0_500",
        "has no column clip_id",
    ]
    assert "bad.parquet cannot be read" in problems[0]
    assert "other: 1 of its clips" in problems[3]
    assert "nosuch_0_500" in problems[3]
    assert len(problems) == 4
