# SPDX-License-Identifier: Apache-2.0
import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dataengine import records
from dataengine.cli import app
from dataengine.compact import compact
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError
from dataengine.query.diff import Counts, State, diff
from dataengine.remove import remove
from tests.helpers import clip_row, clips_table, ledger_row


def build(path, changes=None, *, per_shard=2, videos="abcdef", num_clips=3) -> Corpus:
    """A corpus of clips of one second, some of them changed: clip id -> columns, None for no clip."""
    corpus = Corpus.create(str(path))
    corpus.take_over("r-1")
    commit(corpus, changes or {}, per_shard, videos, num_clips)
    return corpus


def commit(corpus, changes, per_shard, videos, num_clips=3):
    for at in range(0, len(videos), per_shard):
        rows, ledger = [], []
        for video in videos[at : at + per_shard]:
            own = [clip_row(video, 1000 * i, 1000 * i + 1000) for i in range(num_clips)]
            own = [
                row | (changes.get(row["clip_id"]) or {})
                for row in own
                if changes.get(row["clip_id"], {}) is not None
            ]
            rows += own
            ledger.append(ledger_row(video, own))
        corpus.commit(clips_table(rows), ledger, run_id="r-1", fingerprint="f")


def compare(a, b, *args):
    return CliRunner().invoke(app, ["diff", a, b, *args])


def test_the_same_clips_in_other_shards_are_no_difference(tmp_path):
    one = build(tmp_path / "1")
    other = build(tmp_path / "2", per_shard=5)
    compact(other)
    found = diff(State(one), State(other))
    assert found.is_equal
    assert found.clips == Counts(18, 18, 0, 0, 0)
    assert found.videos == Counts(6, 6, 0, 0, 0)
    result = compare(one.url, other.url)
    assert result.exit_code == 0
    assert result.stdout.split() == [
        *("before", "after", "added", "removed", "changed"),
        *("clips", "18", "18", "0", "0", "0", "videos", "6", "6", "0", "0", "0"),
    ]


CHANGES = {
    "a_0_1000": {"caption": "other", "clip_score": 0.5},
    "a_1000_2000": {"caption": None},
    "b_0_1000": {"tags": ["a", "c"]},
    "c_1000_2000": None,
    "f_2000_3000": {"fps": float("nan")},
}


def test_what_was_added_removed_and_changed_is_counted(tmp_path):
    one = build(tmp_path / "1", {"f_2000_3000": {"fps": float("nan")}})
    other = build(tmp_path / "2", CHANGES, per_shard=3, videos="abcfgh")
    found = diff(State(one), State(other))
    assert not found.is_equal
    assert found.clips == Counts(18, 17, added=6, removed=7, changed=3)
    assert found.videos == Counts(6, 6, added=2, removed=2, changed=3)
    assert [(change.column, change.num_clips) for change in found.columns] == [
        ("caption", 2), ("clip_score", 1), ("tags", 1),
    ]  # fmt: skip
    assert found.columns[0].examples == (
        ("a_0_1000", "clip of a", "other"), ("a_1000_2000", "clip of a", None),
    )  # fmt: skip
    assert found.columns[2].examples == (("b_0_1000", ["a", "b"], ["a", "c"]),)
    assert found.examples == {
        "added": ["g_0_1000", "g_1000_2000", "g_2000_3000"],
        "removed": ["c_1000_2000", "d_0_1000", "d_1000_2000"],
    }
    back = diff(State(other), State(one))
    assert back.clips == Counts(17, 18, added=7, removed=6, changed=3)


def test_rows_go_to_a_file_and_everything_to_programs(tmp_path):
    one = build(tmp_path / "1")
    other = build(tmp_path / "2", CHANGES | {"f_2000_3000": {}})
    for suffix in ("parquet", "csv", "jsonl"):
        result = compare(one.url, other.url, "--json", "-o", str(tmp_path / f"x.{suffix}"))
        assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["clips"] == {"before": 18, "after": 17, "added": 0, "removed": 1, "changed": 3}
    assert said["columns"][0]["column"] == "caption"
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert rows == [
        {"clip_id": "a_0_1000", "video_id": "a", "change": "changed", "columns": ["caption", "clip_score"]},
        {"clip_id": "a_1000_2000", "video_id": "a", "change": "changed", "columns": ["caption"]},
        {"clip_id": "b_0_1000", "video_id": "b", "change": "changed", "columns": ["tags"]},
        {"clip_id": "c_1000_2000", "video_id": "c", "change": "removed", "columns": []},
    ]  # fmt: skip
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == rows
    with (tmp_path / "x.csv").open() as file:
        assert next(csv.DictReader(file))["columns"] == '["caption", "clip_score"]'


def replace_twin(corpus, video, **columns):
    for name in corpus.names("catalog"):
        path = corpus.path("catalog", f"{name}.parquet")
        rows = pq.read_table(path).to_pylist()
        if rows[0]["video_id"] == video:
            rows[0] |= columns
            pq.write_table(pa.Table.from_pylist(rows, schema=records.CATALOG_SCHEMA), path)


def test_a_snapshot_is_compared_with_what_came_after_it(tmp_path):
    corpus = build(tmp_path / "c", per_shard=1)
    snapshot = compact(corpus).snapshot
    then = State.open(f"{corpus.url}@{snapshot}")
    assert then == State(corpus, snapshot)
    assert diff(then, State(corpus)).is_equal
    commit(corpus, {}, 1, "xy")
    replace_twin(corpus, "b", caption="new")
    remove(corpus, ["e"])
    found = diff(then, State(corpus))
    # What is removed goes from merged files, too: a takedown is for good.
    assert found.clips == Counts(15, 21, added=6, removed=0, changed=1)
    assert found.videos == Counts(5, 7, added=2, removed=0, changed=1)
    assert [change.column for change in found.columns] == ["caption"]
    assert diff(State(corpus), then).clips == Counts(21, 15, added=0, removed=6, changed=1)
    second = compact(corpus).snapshot
    between = diff(then, State(corpus, second))
    assert between.clips == found.clips
    assert diff(State(corpus, second), State(corpus)).is_equal
    result = compare(f"{corpus.url}@{snapshot}", corpus.url)
    assert result.exit_code == 1
    assert "caption" in result.stdout
    assert "added, for example: x_0_1000" in result.stdout


def test_of_what_both_are_made_of_nothing_is_read(tmp_path, monkeypatch):
    """Merged files of both states are counted, their rows are not compared."""
    corpus = build(tmp_path / "c", per_shard=1)
    snapshot = compact(corpus).snapshot
    commit(corpus, {}, 1, "x")
    asked = []
    from dataengine.query import diff as module

    select = module.catalog_select

    def watched(corpus, parts, types):
        asked.append([path for part in parts for path in part.files])
        return select(corpus, parts, types)

    monkeypatch.setattr(module, "catalog_select", watched)
    assert diff(State(corpus, snapshot), State(corpus)).clips.added == 3
    compared_before, _, compared_after, _ = asked
    assert compared_before == []
    assert len(compared_after) == 1
    assert "/catalog/" in compared_after[0]


def test_columns_that_one_side_lacks_are_named(tmp_path):
    one = build(tmp_path / "1", videos="a")
    other = build(tmp_path / "2", videos="a")
    about = json.loads((tmp_path / "2" / "corpus.json").read_text())
    (tmp_path / "2" / "corpus.json").write_text(
        json.dumps(about | {"columns": {"caption_x": "caption"}})
    )
    found = diff(State(one), State(other))
    assert (found.columns_added, found.columns_removed) == (("caption_x",), ())
    assert not found.is_equal
    assert diff(State(other), State(one)).columns_removed == ("caption_x",)
    assert "columns added: caption_x" in compare(one.url, other.url).stdout


def test_an_empty_corpus_and_wrong_arguments(tmp_path):
    one = build(tmp_path / "1", videos="ab")
    empty = Corpus.create(str(tmp_path / "e"))
    assert diff(State(empty), State(one)).clips == Counts(0, 6, 6, 0, 0)
    assert diff(State(empty), State(empty)).is_equal
    with pytest.raises(ConfigError, match="--output"):
        diff(State(one), State(one), output=tmp_path / "x.txt")
    with pytest.raises(CorpusError, match="No snapshot"):
        diff(State.open(f"{one.url}@20260101T000000-000"), State(one))
    for name in one.names("catalog"):
        (tmp_path / "1" / "catalog" / f"{name}.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(CorpusError, match="Damaged"):
        diff(State(one), State(empty))
    result = CliRunner().invoke(app, ["diff", one.url, str(tmp_path / "nowhere")])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
