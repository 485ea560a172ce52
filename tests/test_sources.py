# SPDX-License-Identifier: Apache-2.0
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine import records
from dataengine.errors import ConfigError
from dataengine.sources import expand, make_plan
from tests.helpers import ledger_row


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name, data in {"b.mp4": b"bb", "a.MKV": b"a", "deep/c.webm": b"ccc", "x.txt": b"?"}.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_gives_its_videos_in_order(videos):
    assert [os.path.relpath(s, videos) for s in expand([str(videos)])] == [
        "a.MKV", "b.mp4", "deep/c.webm",
    ]  # fmt: skip


def test_lists_urls_and_globs(videos):
    listing = videos / "list.txt"
    listing.write_text(
        "# mine\nb.mp4\n\nmissing.mp4 # gone\nhttp://Host.example/a.mp4#t=3\n"
        "https://youtu.be/0123456789a?si=x\nyoutube:0123456789b\ndeep\n"
    )
    assert list(expand([str(listing), str(videos / "*.mp4")])) == [
        str(videos / "b.mp4"),
        str(videos / "missing.mp4"),
        "http://host.example/a.mp4",
        "https://www.youtube.com/watch?v=0123456789a",
        "https://www.youtube.com/watch?v=0123456789b",
        str(videos / "deep" / "c.webm"),
        str(videos / "b.mp4"),
    ]


def test_a_word_that_stands_for_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"No such source: .*nothing"):
        list(expand([str(tmp_path / "nothing")]))


def write_ledger(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, schema=records.VIDEO_SCHEMA), path)
    return [str(path)]


def todo_of(plan):
    return {
        os.path.basename(row["source"]): row["refusal"]
        and os.path.basename(row["refusal"]["detail"])
        for row in pq.read_table(plan.todo).to_pylist()
    }


def version(path):
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def test_the_same_source_is_planned_once(videos, tmp_path):
    plan = make_plan([str(videos), str(videos), str(videos / "b.mp4")], [], "f", tmp_path)
    assert (plan.num_listed, plan.num_todo) == (3, 3)
    assert make_plan([str(videos)], [], "f", tmp_path, limit=2).num_todo == 2


def test_what_has_ended_is_not_done_again(videos, tmp_path):
    ledger = write_ledger(
        tmp_path / "l.parquet",
        [
            ledger_row("k", [], source=str(videos / "a.MKV"), status="kept", fingerprint="old",
                       source_version=version(videos / "a.MKV")),
            ledger_row("d", [], source=str(videos / "b.mp4"), status="dropped",
                       source_version=version(videos / "b.mp4")),
        ],
    )  # fmt: skip
    plan = make_plan([str(videos)], ledger, "f", tmp_path)
    assert todo_of(plan) == {"c.webm": None}
    assert (plan.num_listed, plan.num_changed, plan.num_other_settings) == (3, 0, 1)


def test_a_changed_file_is_tried_again_only_if_it_gave_no_clips(videos, tmp_path):
    ledger = write_ledger(
        tmp_path / "l.parquet",
        [
            ledger_row("k", [], source=str(videos / "a.MKV"), status="kept", fingerprint="f"),
            ledger_row("d", [], source=str(videos / "b.mp4"), status="dropped", attempts=2),
        ],
    )
    plan = make_plan([str(videos)], ledger, "f", tmp_path)
    assert todo_of(plan) == {"b.mp4": None, "c.webm": None}
    assert plan.num_changed == 1
    attempts = {
        os.path.basename(r["source"]): r["attempts"] for r in pq.read_table(plan.todo).to_pylist()
    }
    assert attempts == {"b.mp4": 2, "c.webm": None}


def test_files_with_the_same_bytes_end_as_duplicates_of_the_first(videos, tmp_path):
    (videos / "again.mp4").write_bytes(b"bb")
    (videos / "other.mp4").write_bytes(b"zz")
    (videos / "empty1.mp4").write_bytes(b"")
    (videos / "empty2.mp4").write_bytes(b"")
    plan = make_plan([str(videos)], [], "f", tmp_path)
    assert todo_of(plan) == {
        "a.MKV": None, "again.mp4": None, "b.mp4": "again.mp4", "c.webm": None,
        "empty1.mp4": None, "empty2.mp4": None, "other.mp4": None,
    }  # fmt: skip


def test_a_file_that_was_moved_is_a_duplicate_of_what_is_in_the_corpus(videos, tmp_path):
    moved = records.file_video_id(str(videos / "b.mp4"))
    ledger = write_ledger(
        tmp_path / "l.parquet",
        [ledger_row(moved, [], source="/old/place.mp4", status="kept", file_bytes=2)],
    )
    plan = make_plan([str(videos)], ledger, "f", tmp_path)
    assert todo_of(plan) == {"a.MKV": None, "b.mp4": "place.mp4", "c.webm": None}


@pytest.mark.parametrize(
    ("url", "video"),
    [
        ("https://www.youtube.com/watch?v=dQw4w9WgXcQ&t=1", "dQw4w9WgXcQ"),
        ("https://youtu.be/dQw4w9WgXcQ", "dQw4w9WgXcQ"),
        ("https://youtube.com/shorts/dQw4w9WgXcQ", "dQw4w9WgXcQ"),
        ("https://www.youtube.com/watch?v=short", None),
        ("https://example.org/watch?v=dQw4w9WgXcQ", None),
    ],
)
def test_youtube_ids(url, video):
    assert records.youtube_id(url) == video


def test_ids_do_not_depend_on_the_path(tmp_path):
    for name in ("a.mp4", "b.mkv"):
        (tmp_path / name).write_bytes(b"same")
    assert len({records.file_video_id(str(p)) for p in tmp_path.iterdir()}) == 1
    assert records.digest("ab", "c") != records.digest("a", "bc")
