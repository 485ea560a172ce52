# SPDX-License-Identifier: Apache-2.0
import itertools
import os
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine import plan as plan_module
from dataengine import records
from dataengine.errors import ConfigError, CorpusError
from dataengine.lists import SourceSettings
from dataengine.plan import exclusion_keys, make_plan, make_retry_plan, write_listed
from tests.helpers import ledger_row

WATCH = "https://www.youtube.com/watch?v="
A, B, C = (f"0123456789{letter}" for letter in "abc")


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name, data in {"b.mp4": b"bb", "a.MKV": b"a", "deep/c.webm": b"ccc", "x.txt": b"?"}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def planned(tmp_path):
    """Plans words against ledger rows; gives the plan and the rows of its todo list."""
    numbers = itertools.count()

    def planned(*words, ledger=(), exclude=(), limit=None, max_attempts=3):
        folder = tmp_path / f"plan{next(numbers)}"
        folder.mkdir()
        settings = SourceSettings(exclude=tuple(map(str, exclude)))
        write_listed([str(word) for word in words], settings, folder, limit)
        plan = make_plan(folder, write_ledger(folder / "l.parquet", ledger), "f", max_attempts)
        todo = pq.read_table(plan.todo)
        assert todo.num_rows == plan.num_todo
        assert pq.read_metadata(plan.listed).num_rows == plan.num_listed
        return plan, todo.to_pylist()

    return planned


def write_ledger(path, rows):
    if not rows:
        return []
    pq.write_table(pa.Table.from_pylist(list(rows), schema=records.VIDEO_SCHEMA), path)
    return [str(path)]


def refusals(rows):
    """Base name of the source -> why it is refused, None if it is to do."""
    return {
        row["source"].rpartition("/")[2].removeprefix("watch?v="): row["refusal"]
        and row["refusal"]["reason"]
        for row in rows
    }


def details(rows):
    return [row["refusal"]["detail"] for row in rows if row["refusal"]]


def version(path):
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


# ------------------------------------------------------------------------------------- in the list


def test_the_same_source_is_planned_once_in_the_order_of_the_words(videos, planned):
    plan, rows = planned(videos / "deep", videos, videos, videos / "b.mp4")
    assert (plan.num_listed, plan.num_todo) == (3, 3)
    assert list(refusals(rows)) == ["c.webm", "a.MKV", "b.mp4"]
    assert planned(videos, limit=2)[0].num_todo == 2


SPELLINGS = [
    f"youtube:{A}",
    f"https://youtu.be/{A}?si=x",
    f"https://www.youtube.com/shorts/{A}",
    f"http://M.YOUTUBE.com/watch?app=desktop&v={A}&t=7",
    f"www.youtube.com/watch?v={A}",
]


@pytest.mark.parametrize("words", list(itertools.permutations([*SPELLINGS[:3], f"youtube:{B}"])))
def test_every_order_of_the_spellings_gives_the_same_videos(planned, words):
    _, rows = planned(*words)
    assert {row["source"] for row in rows} == {WATCH + A, WATCH + B}
    assert rows[0]["source"] == WATCH + (B if words[0] == f"youtube:{B}" else A)


@pytest.mark.parametrize("word", SPELLINGS)
@pytest.mark.parametrize(
    ("status", "expected"), [("kept", "duplicate"), ("removed", "removed"), ("failed", None)]
)
def test_a_video_is_known_by_its_id_however_it_is_spelt(planned, word, status, expected):
    """The ledger has it under an address of its own, as other software may have written it."""
    old = ledger_row(A, [], source=f"https://youtu.be/{A}", status=status)
    _, rows = planned(word, f"youtube:{B}", ledger=[old])
    assert refusals(rows) == {A: expected, B: None}
    assert all(f"https://youtu.be/{A}" in detail for detail in details(rows))


def test_files_with_the_same_bytes_end_as_duplicates_of_the_first(videos, planned):
    (videos / "again.mp4").write_bytes(b"bb")
    (videos / "other.mp4").write_bytes(b"zz")
    (videos / "empty1.mp4").write_bytes(b"")
    (videos / "empty2.mp4").write_bytes(b"")
    _, rows = planned(videos)
    assert refusals(rows) == {
        "a.MKV": None, "again.mp4": None, "b.mp4": "duplicate", "c.webm": None,
        "empty1.mp4": None, "empty2.mp4": None, "other.mp4": None,
    }  # fmt: skip
    assert details(rows) == [f"same bytes as {videos / 'again.mp4'}"]


def test_objects_with_the_same_bytes_as_others_are_duplicates(videos, planned):
    fs = fsspec.filesystem("memory")
    for name, data in {"1.mp4": b"bb", "2.mp4": b"zz", "3.mp4": b"four", "4.mp4": b"four"}.items():
        fs.pipe(f"/plan/{name}", data)
    try:
        _, rows = planned(videos, "memory://plan")
        old = ledger_row("x", [], source="memory://plan/3.mp4", source_version="4-older")
        _, changed = planned("memory://plan/3.mp4", ledger=[old | {"status": "kept"}])
    finally:
        fs.rm("/plan", recursive=True)
    assert refusals(rows) == {
        "a.MKV": None, "b.mp4": None, "c.webm": None,
        "1.mp4": "duplicate", "2.mp4": None, "3.mp4": None, "4.mp4": "duplicate",
    }  # fmt: skip
    assert changed == []


def test_a_refused_file_does_not_stand_for_its_copies(videos, planned):
    (videos / "copy.mp4").write_bytes(b"bb")
    (videos / "l.csv").write_text("file,start,end\nb.mp4,2,1\n")
    _, rows = planned(videos / "l.csv", videos / "copy.mp4")
    assert refusals(rows) == {"b.mp4": "bad_spans", "copy.mp4": None}
    _, rows = planned(videos / "l.csv", videos / "b.mp4")
    assert refusals(rows) == {"b.mp4": None}, "the whole video is asked for too"


# --------------------------------------------------------------------------------- against the corpus


def test_what_has_ended_is_not_done_again(videos, planned):
    ledger = [
        ledger_row("k", [], source=str(videos / "a.MKV"), status="kept", fingerprint="old",
                   source_version=version(videos / "a.MKV")),
        ledger_row("d", [], source=str(videos / "b.mp4"), status="dropped",
                   source_version=version(videos / "b.mp4")),
    ]  # fmt: skip
    plan, rows = planned(videos, ledger=ledger)
    assert refusals(rows) == {"c.webm": None}
    assert (plan.num_listed, plan.num_changed, plan.num_other_settings) == (3, 0, 1)


def test_a_changed_file_is_tried_again_only_if_it_gave_no_clips(videos, planned):
    ledger = [
        ledger_row("k", [], source=str(videos / "a.MKV"), status="kept", fingerprint="f"),
        ledger_row("d", [], source=str(videos / "b.mp4"), status="dropped", attempts=2),
    ]
    plan, rows = planned(videos, ledger=ledger)
    assert plan.num_changed == 1
    assert {os.path.basename(row["source"]): row["attempts"] for row in rows} == {
        "b.mp4": 2, "c.webm": None,
    }  # fmt: skip


def test_a_file_that_was_moved_is_a_duplicate_of_what_is_in_the_corpus(videos, planned):
    moved = records.file_video_id(str(videos / "b.mp4"))
    ledger = [ledger_row(moved, [], source="/old/place.mp4", status="kept", file_bytes=2)]
    _, rows = planned(videos, ledger=ledger)
    assert refusals(rows) == {"a.MKV": None, "b.mp4": "duplicate", "c.webm": None}
    assert details(rows) == ["same bytes as /old/place.mp4"]


@pytest.mark.parametrize("attempts", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("status", ["kept", "dropped", "failed", "removed"])
def test_only_what_failed_is_tried_again_and_only_so_often(videos, planned, status, attempts):
    path = videos / "b.mp4"
    row = ledger_row(
        "x", [], source=str(path), status=status, attempts=attempts, source_version=version(path)
    )
    plan, rows = planned(path, ledger=[row], max_attempts=3)
    again = status == "failed" and attempts < 3
    assert (len(rows), plan.num_again, plan.num_listed) == (again, again, 1)


@pytest.mark.parametrize("status", ["kept", "dropped", "failed", "removed"])
def test_what_was_removed_never_comes_back_by_another_path(videos, planned, status):
    """Also when its file has changed: the source itself is what was taken out."""
    bytes_id = records.file_video_id(str(videos / "b.mp4"))
    row = ledger_row(bytes_id, [], source=str(videos / "old.mp4"), status=status, file_bytes=2)
    (videos / "old.mp4").write_bytes(b"other")
    _, rows = planned(videos / "old.mp4", videos / "b.mp4", ledger=[row])
    expected = {
        "kept": {"b.mp4": "duplicate"},
        "dropped": {"old.mp4": None, "b.mp4": None},
        "failed": {"old.mp4": None, "b.mp4": None},
        "removed": {"b.mp4": "removed"},
    }
    assert refusals(rows) == expected[status]


def test_the_newest_row_of_the_ledger_counts(planned):
    old = ledger_row(A, [], source=WATCH + A, status="kept", finished_ms=1)
    new = ledger_row(A, [], source=WATCH + A, status="failed", finished_ms=2, attempts=1)
    assert refusals(planned(f"youtube:{A}", ledger=[old, new])[1]) == {A: None}
    assert refusals(planned(f"youtube:{A}", ledger=[new, old | {"finished_ms": 3}])[1]) == {}


# ------------------------------------------------------------------------------------------ exclusion


@pytest.mark.parametrize(
    ("entry", "excluded"),
    [
        (A, {A, f"{A}.mp4"}),
        (f"youtube:{A}", {A, f"{A}.mp4"}),
        (f"https://youtu.be/{A}", {A}),
        (f"{A}_12_30", {A, f"{A}.mp4"}),
        (f"{A}_000012_000030.mp4", {A, f"{A}.mp4"}),
        ("video7010", {"video7010.mp4", "video7010.avi"}),
        ("video7010.avi", {"video7010.mp4", "video7010.avi"}),
        ("sub/video7010.mp4", {"video7010.mp4"}),
        ("http://H.example/v.mp4#x", {"v.mp4"}),
        ("v", {"v.mp4"}),
        ("{hash}", {"b.mp4"}),
        ("video701", set()),
        (A.upper(), set()),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_exclusion_lists_match_ids_urls_names_and_bytes(videos, planned, entry, excluded, suffix):
    (videos / "sub").mkdir()
    for name in (f"{A}.mp4", "sub/video7010.mp4", "video7010.avi"):
        (videos / name).write_bytes(name.encode())
    entry = entry.format(hash=records.file_video_id(str(videos / "b.mp4")))
    exclude = videos / f"msrvtt{suffix}"
    exclude.write_text(f"# test set\n{entry}\n" if suffix == ".txt" else f"n,video_id\n1,{entry}\n")
    words = (f"youtube:{A}", f"youtube:{B}", "http://h.example/v.mp4", videos)
    _, rows = planned(*words, exclude=[exclude])
    assert {name for name, reason in refusals(rows).items() if reason == "excluded"} == excluded
    assert set(details(rows)) <= {f"listed in msrvtt{suffix}"}
    assert len(rows) == 9


def test_a_video_is_excluded_under_all_its_names(videos, planned, tmp_path):
    (videos / "test1.mp4").write_bytes(b"bb")
    (tmp_path / "x.txt").write_text("test1\n")
    for words in itertools.permutations([videos / "b.mp4", videos / "test1.mp4"]):
        _, rows = planned(*words, exclude=[tmp_path / "x.txt"])
        assert refusals(rows) == {"b.mp4": "excluded", "test1.mp4": "excluded"}


def test_objects_are_not_read_for_an_exclusion_list(videos, planned, monkeypatch, tmp_path):
    read = []
    real = records.stream_video_id
    monkeypatch.setattr(records, "stream_video_id", lambda file: read.append(file) or real(file))
    (tmp_path / "x.txt").write_text("0123456789abcdef\n")
    fs = fsspec.filesystem("memory")
    fs.pipe("/plan/o.mp4", b"seven b")
    try:
        _, rows = planned(videos, "memory://plan", exclude=[tmp_path / "x.txt"])
    finally:
        fs.rm("/plan", recursive=True)
    assert (len(rows), len(read)) == (4, 3)


def test_what_was_excluded_is_planned_when_it_no_longer_is(planned, tmp_path):
    (tmp_path / "x.txt").write_text(A)
    (tmp_path / "y.txt").write_text(B)
    row = ledger_row(
        A, [], source=WATCH + A, status="dropped", reason="excluded", source_version=""
    )
    for exclude, expected in (("x.txt", {}), ("y.txt", {A: None})):
        _, rows = planned(f"youtube:{A}", ledger=[row], exclude=[tmp_path / exclude])
        assert refusals(rows) == expected


def test_what_is_in_the_corpus_and_excluded_now_is_counted(planned, tmp_path, videos):
    bytes_id = records.file_video_id(str(videos / "b.mp4"))
    (tmp_path / "x.txt").write_text(f"{A}\n{bytes_id}\n")
    ledger = [
        ledger_row(A, [], source=WATCH + A, status="kept", source_version=""),
        ledger_row(bytes_id, [], source=str(videos / "b.mp4"), status="kept", file_bytes=2,
                   source_version=version(videos / "b.mp4")),
        ledger_row(B, [], source=WATCH + B, status="kept", source_version=""),
    ]  # fmt: skip
    words = (f"youtube:{A}", f"youtube:{B}", videos / "b.mp4")
    plan, rows = planned(*words, ledger=ledger, exclude=[tmp_path / "x.txt"])
    assert (plan.num_kept_excluded, rows) == (2, [])


def test_an_exclusion_list_without_videos_is_an_error(planned, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"No column of .*x\.csv names the videos"):
        planned(f"youtube:{A}", exclude=[tmp_path / "x.csv"])


@pytest.mark.parametrize("word", ["", ".", "..", "a/", "http://[::1", "s3://b/k.mp4", "\udc80"])
def test_no_entry_of_an_exclusion_list_crashes(word):
    assert all(kind in ("id", "source", "stem") for kind, _ in exclusion_keys(word, "/x"))


# ---------------------------------------------------------------------------------------------- spans


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_spans_are_grouped_by_video_and_sorted_by_time(planned, tmp_path, monkeypatch, piece, seed):
    """Against a plain grouping in Python, wherever the pieces end."""
    monkeypatch.setattr(plan_module, "_PIECE_ROWS", piece)
    rng = random.Random(seed)
    rows = []
    for index in range(60):
        start = rng.randrange(5)
        rows.append(
            (rng.choice([A, B, C, "0123456789d"]), start, start + rng.randrange(-1, 4), index)
        )
    lines = [f"{video},{start},{end},c{n}\n" for video, start, end, n in rows]
    cut = rng.randrange(60)
    for name, part in (("1.csv", lines[:cut]), ("2.csv", lines[cut:])):
        (tmp_path / name).write_text("YoutubeID,start,end,caption\n" + "".join(part))
    expected = {}
    for video, start, end, n in rows:
        spans = expected.setdefault(WATCH + video, {})
        if end > start:
            spans.setdefault((start * 1000, end * 1000), f"c{n}")
    plan, todo = planned(tmp_path / "1.csv", tmp_path / "2.csv", f"youtube:{A[:-1]}e")
    assert [row["source"] for row in todo] == [*expected, f"{WATCH}{A[:-1]}e"]
    for row in todo[:-1]:
        got = [(s["start_ms"], s["end_ms"], s["caption"]) for s in row["spans"]]
        assert got == [(*times, c) for times, c in sorted(expected[row["source"]].items())]
    assert todo[-1]["spans"] is None
    assert plan.num_bad_spans == sum(end <= start for _, start, end, _ in rows)


def test_scores_are_kept_and_what_is_not_given_is_null(planned, tmp_path):
    (tmp_path / "l.csv").write_text(
        f"YoutubeID,Start_timestamp,End_timestamp,Caption,Aesthetic_Score,UMT_Score\n"
        f"{A},00:00:01.000,00:00:02.500,a cat,4.5,0.25\n{A},00:00:03.000,00:00:04.000,,x,\n"
    )
    _, rows = planned(tmp_path / "l.csv")
    null = {"caption": None, "aesthetic_score": None, "video_text_score": None}
    assert rows[0]["spans"] == [
        {"start_ms": 1000, "end_ms": 2500, "caption": "a cat", "aesthetic_score": 4.5,
         "video_text_score": 0.25},
        {"start_ms": 3000, "end_ms": 4000, **null},
    ]  # fmt: skip


def test_a_source_with_no_span_that_can_be_is_refused_until_its_list_is_mended(planned, tmp_path):
    path = tmp_path / "l.csv"
    path.write_text(f"YoutubeID,start,end\n{A},2,1\n{A},x,3\n{B},2,1\n{B},1,2\n")
    plan, rows = planned(path)
    assert (refusals(rows), plan.num_bad_spans) == ({A: "bad_spans", B: None}, 3)
    ledger = [
        ledger_row(A, [], source=WATCH + A, status="dropped", reason="bad_spans", source_version="")
    ]
    assert refusals(planned(path, ledger=ledger)[1]) == {B: None}
    path.write_text(f"YoutubeID,start,end\n{A},2,3\n")
    _, rows = planned(path, ledger=ledger)
    assert (refusals(rows), len(rows[0]["spans"])) == ({A: None}, 1)


# ---------------------------------------------------------------------------------------------- retry


@pytest.fixture
def retried(tmp_path):
    """Plans sources of a ledger again; the runs' todo lists are given as source -> spans."""
    numbers = itertools.count()

    def retried(ledger, runs=None, exclude=(), **options):
        folder = tmp_path / f"retry{next(numbers)}"
        folder.mkdir()
        paths = {}
        for run, spans in (runs or {"r": {}}).items():
            rows = [
                {"source": source, "source_version": "", "spans": given}
                for source, given in spans.items()
            ]
            paths[run] = str(folder / f"{run}.parquet")
            pq.write_table(pa.Table.from_pylist(rows, schema=plan_module.TODO_SCHEMA), paths[run])
        settings = SourceSettings(exclude=tuple(map(str, exclude)))
        parts = write_ledger(folder / "l.parquet", ledger)
        plan = make_retry_plan(folder, settings, parts, paths.get, **options)
        return plan, pq.read_table(plan.todo).to_pylist()

    return retried


def ended(video, status, reason, run="r", **columns):
    source = columns.pop("source", WATCH + video)
    known = {"source": source, "status": status, "reason": reason, "run_id": run, "attempts": 9}
    return ledger_row(video, [], **known, **columns)


LEDGER = [
    ended(A, "failed", "timeout"),
    ended(B, "failed", "http_429"),
    ended(C, "dropped", "private"),
    ended("0123456789d", "kept", None),
    ended("0123456789e", "removed", "removed"),
    ended("0123456789f", "dropped", "timeout"),
]


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        ((), [A, B]),
        (("timeout",), [A, "0123456789f"]),
        (("timeout", "private"), [A, C, "0123456789f"]),
        (("private", "http_429"), [B, C]),
    ],
)
def test_a_retry_takes_what_failed_or_what_is_named(retried, reasons, expected):
    plan, rows = retried(LEDGER, reasons=reasons)
    assert refusals(rows) == dict.fromkeys(expected)
    assert {row["attempts"] for row in rows} == {9}
    assert plan.num_listed == plan.num_todo == plan.num_again == len(expected)
    assert len(retried(LEDGER, reasons=reasons, limit=1)[1]) == 1


@pytest.mark.parametrize("reason", ["removed", "nonsense", "kept"])
def test_a_reason_that_nothing_ended_for_is_an_error(retried, reason):
    with pytest.raises(ConfigError, match=f"No source ended as {reason}") as error:
        retried(LEDGER, reasons=["timeout", reason])
    assert error.value.hint == "in the ledger are: timeout (2), http_429 (1), private (1)"


def test_a_retry_has_the_spans_of_the_run_that_recorded_the_source(retried):
    span = {
        "start_ms": 1,
        "end_ms": 2,
        "caption": "c",
        "aesthetic_score": 1.5,
        "video_text_score": 0.5,
    }
    ledger = [ended(A, "failed", "timeout", "r2"), ended(B, "failed", "timeout", "r1")]
    runs = {
        "r1": {WATCH + A: [{**span, "caption": "old"}], WATCH + B: None},
        "r2": {WATCH + A: [span, {**span, "start_ms": 5, "end_ms": 6}], WATCH + B: [span]},
    }
    _, rows = retried(ledger, runs)
    assert [row["spans"] for row in rows] == [[span, {**span, "start_ms": 5, "end_ms": 6}], None]
    with pytest.raises(CorpusError, match=r"run r2 has no sources\.parquet"):
        retried(ledger, {"r1": {}})


def test_a_retry_looks_at_files_again_and_keeps_to_exclusions(retried, videos):
    (videos / "x.txt").write_text(A)
    path = str(videos / "b.mp4")
    object_ = ended("o", "failed", "timeout", source="memory://b/o.mp4", source_version="5-tag")
    ledger = [ended(A, "failed", "timeout"), ended("f", "failed", "timeout", source=path), object_]
    _, rows = retried(ledger, exclude=[videos / "x.txt"])
    assert refusals(rows) == {"b.mp4": None, A: "excluded", "o.mp4": None}
    versions = {os.path.basename(row["source"]): row["source_version"] for row in rows}
    assert (versions["b.mp4"], versions["o.mp4"]) == (version(path), "5-tag")


def test_a_retry_with_nothing_to_do_is_an_empty_plan(retried):
    assert retried(LEDGER[3:5])[0].num_todo == 0
    assert retried([])[0].num_todo == 0


def test_captions_of_a_span_that_has_one_are_counted(tmp_path):
    rows = ["a.mp4,0,1,one", "a.mp4,0,1,two", "a.mp4,0,1,three", "a.mp4,1,2,one", "a.mp4,1,2,one"]
    (tmp_path / "l.csv").write_text("\n".join(["path,start,end,caption", *rows]) + "\n")
    folder = tmp_path / "plan"
    folder.mkdir()
    write_listed([str(tmp_path / "l.csv")], SourceSettings(), folder)
    plan = make_plan(folder, [], "f", 3)
    assert plan.num_more_captions == 2
    (row,) = pq.read_table(plan.todo).to_pylist()
    assert [span["caption"] for span in row["spans"]] == ["one", "one"]
