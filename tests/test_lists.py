# SPDX-License-Identifier: Apache-2.0
import csv
import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine.errors import ConfigError
from dataengine.lists import Entry, SourceColumns, parse_ms, read_list

INTERNVID = {
    "YoutubeID": ["dQw4w9WgXcQ", "-abcdefghi_", "dQw4w9WgXcQ"],
    "Start_timestamp": ["00:00:08.120", "01:02:03.000", "00:00:01.000"],
    "End_timestamp": ["00:00:10.500", "01:02:13.999", "00:00:00.000"],
    "Caption": ['a man, "talking"', "Straße\nsecond line", "x"],
    "Aesthetic_Score": [4.5, 5.25, 1.0],
    "UMT_Score": [0.25, 0.5, 0.125],
}
INTERNVID_ENTRIES = [
    ("dQw4w9WgXcQ", True, 8120, 10500, 'a man, "talking"', 4.5, 0.25, False),
    ("-abcdefghi_", True, 3723000, 3733999, "Straße\nsecond line", 5.25, 0.5, False),
    ("dQw4w9WgXcQ", True, None, None, None, None, None, True),
]


def write_list(path, columns):
    """Writes the same table as whatever the path's suffix says."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table(columns), path)
        case ".jsonl":
            path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
        case suffix:
            with open(path, "w", encoding="utf-8-sig", newline="") as file:
                writer = csv.DictWriter(file, columns, delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_published_list_says_the_same_in_every_format(tmp_path, suffix):
    name = write_list(tmp_path / f"l{suffix}", INTERNVID)
    assert [entry[1:] for entry in read_list(name)] == INTERNVID_ENTRIES


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        ("00:00:08.120", 8120),
        ("1:02:03", 3723000),
        ("02:03.5", 123500),
        ("00:00:01,250", 1250),
        ("8.25", 8250),
        (" 8 ", 8000),
        (8, 8000),
        (8.0004, 8000),
        (0, 0),
        (datetime.time(0, 1, 2, 3000), 62003),
        (datetime.timedelta(seconds=1.5), 1500),
        *[(bad, None) for bad in ("", "x", "1:2:3:4", "-1", -1, "nan", float("nan"), "inf", True)],
        *[(bad, None) for bad in (None, [], "1_0", 1e30, "00:00:-3", "1e300", b"1x")],
    ],
)  # fmt: skip
def test_times(value, ms):
    assert parse_ms(value) == ms


@pytest.mark.parametrize("ms", [0, 1, 999, 1001, 59_999, 3_599_999, 36_000_001, 86_399_999])
def test_every_way_to_write_a_time_is_the_same_time(ms):
    clock = f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}.{ms % 1000:03d}"
    assert {
        parse_ms(clock),
        parse_ms(ms / 1000),
        parse_ms(str(ms / 1000)),
        parse_ms(ms, 0.001),
    } == {ms}


@pytest.mark.parametrize(
    ("header", "is_id"),
    [
        *[(name, False) for name in ("source", "URL", "path", "Video", "file", "source_url")],
        *[(name, True) for name in ("youtube_id", "YoutubeID", "videoID", "video_id", "YTID")],
    ],
)
def test_columns_are_known_by_their_usual_names(tmp_path, header, is_id):
    name = write_list(tmp_path / "l.csv", {"n": [1], header: ["dQw4w9WgXcQ"]})
    assert list(read_list(name)) == [Entry(2, "dQw4w9WgXcQ", is_id)]


@pytest.mark.parametrize("start", ["start", "Start Time", "start_s", "start_ms"])
def test_spans_are_known_by_their_usual_names(tmp_path, start):
    end, unit = start.replace("tart", "nd").replace("snd", "end").replace("Snd", "End"), 1000
    if start == "start_ms":
        unit = 1
    name = write_list(tmp_path / "l.parquet", {"url": ["u"], start: [2], end: [3], "TEXT": ["t"]})
    entry = next(read_list(name))
    assert (entry.start_ms, entry.end_ms, entry.caption) == (2 * unit, 3 * unit, "t")


def test_columns_can_be_named(tmp_path):
    name = write_list(
        tmp_path / "l.csv",
        {
            "where": ["a.mp4"],
            "url": ["b.mp4"],
            "t0": ["1"],
            "t1": ["2"],
            "say": ["hm"],
            "text": ["no"],
        },
    )
    columns = SourceColumns(source="where", start="t0", end="t1", caption="say")
    assert list(read_list(name, columns)) == [Entry(2, "a.mp4", False, 1000, 2000, "hm")]
    assert next(read_list(name, SourceColumns(source="where"))).start_ms is None
    with pytest.raises(
        ConfigError, match=r"no column weher \(sources.columns.source\).*where, url"
    ):
        list(read_list(name, SourceColumns(source="weher")))
    assert next(read_list(name, SourceColumns(source="weher"), strict=False)).word == "b.mp4"


def test_a_row_without_times_is_the_whole_video_and_half_a_span_is_bad(tmp_path):
    name = write_list(
        tmp_path / "l.csv",
        {"url": list("abcd"), "start": ["", "1", "", "1"], "end": ["", "", "2", "2"]},
    )
    entries = list(read_list(name))
    assert [(e.start_ms, e.bad_span) for e in entries] == [
        (None, False), (None, True), (None, True), (1000, False),
    ]  # fmt: skip


def test_the_url_wins_over_the_id_where_both_are_there(tmp_path):
    name = write_list(tmp_path / "l.csv", {"url": ["a.mp4", ""], "YoutubeID": ["x", "dQw4w9WgXcQ"]})
    assert [(e.word, e.is_id) for e in read_list(name)] == [
        ("a.mp4", False), ("dQw4w9WgXcQ", True),
    ]  # fmt: skip


def test_lines_of_json_may_leave_keys_out(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"url": "a"}\n{"start": 1, "end": 2, "url": "b", "caption": null}\n')
    assert list(read_list(str(path))) == [Entry(1, "a"), Entry(2, "b", False, 1000, 2000)]


def test_a_column_that_is_named_is_missing_when_no_line_has_it(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"at": "a", "url": "x"}\n{"at": "b", "say": "hm", "start": 1, "end": 2}\n')
    rows = list(read_list(str(path), SourceColumns(source="at", caption="say")))
    assert [(row.word, row.caption) for row in rows] == [("a", None), ("b", "hm")]
    with pytest.raises(ConfigError, match=r"no column told \(sources.columns.caption\); .* say"):
        list(read_list(str(path), SourceColumns(source="at", caption="told")))
    path.write_text('{"at": "a"}\n{"url": "x"}\n')
    with pytest.raises(ConfigError, match="line 2 names the videos; its columns: url"):
        list(read_list(str(path), SourceColumns(source="at")))
    path.write_text('{"url": "a", "start": 1, "end": 2}\n{"url": "b", "start": 1}\n')
    assert [row.bad_span for row in read_list(str(path))] == [False, True]


def test_an_exclusion_list_is_asked_for_videos_alone(tmp_path):
    name = write_list(tmp_path / "l.csv", {"id": [1], "start": [2], "youtube_id": ["dQw4w9WgXcQ"]})
    rows = read_list(name, SourceColumns(source="elsewhere"), strict=False)
    assert [row.word for row in rows] == ["dQw4w9WgXcQ"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("l.txt", b"a.mp4\nb\xff.mp4\n", r"Not UTF-8: .*l.txt, line 2"),
        ("l.csv", b"url\na\n\xe9\n", r"Not UTF-8: .*l.csv, line 3"),
        ("l.csv", "url\na\n".encode("utf-16"), r"Not UTF-8: .*l.csv, line 1"),
        ("l.jsonl", b'{"url": "\xff"}', r"Not UTF-8: .*l.jsonl, line 1"),
        ("l.csv", b"", "Empty list"),
        ("l.csv", b"a,b\n1,2\n", r"No column of .*l.csv names the videos; its columns: a, b"),
        ("l.csv", b"url,caption\nx,y\nx,y, z\n", r"l.csv, line 3: 3 fields, but the header has 2"),
        ("l.csv", b"url,start\nx,1\n", r"has start \(start\) but not the other end"),
        ("l.jsonl", b'{"url": "a"}\n{"id": 1}\n', r"l.jsonl, line 2 names the videos"),
        ("l.jsonl", b'{"url": "a"}\n["a"]\n', r"l.jsonl, line 2: not a JSON object"),
        ("l.jsonl", b'{"url": "a"\n', r"l.jsonl, line 1: not JSON"),
        ("l.jsonl", b"[" * 100_000, r"l.jsonl, line 1: not JSON"),
        ("l.parquet", b"PAR1 it is not", r"Not a Parquet file"),
        ("gone.csv", None, r"cannot be read: .*gone.csv \(No such file"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_clear_error(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        list(read_list(str(tmp_path / name)))


def test_text_lists_have_comments(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes("\ufeff# mine\na b.mp4\r\n\n  c#1.mp4 # gone\n".encode())
    assert list(read_list(str(path))) == [Entry(2, "a b.mp4"), Entry(4, "c#1.mp4")]
