# SPDX-License-Identifier: Apache-2.0
"""The viewer through a real server, and once through a real browser."""

import contextlib
import csv
import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.resources import files

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from dataengine.corpus import Corpus
from dataengine.query import subsets
from dataengine.query.sql import connect, run, select_statement
from dataengine.remove import remove
from dataengine.viewer.catalog import NotFoundError
from dataengine.viewer.media import Media
from dataengine.viewer.server import Viewer, address_of, byte_range, listen, server
from tests.helpers import clip_row, clips_table, ledger_row
from tests.media_factory import make_video

TOKEN = "a-token-for-tests"
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
FRAMES = [b"\xff\xd8\xff" + bytes([n]) * 50 for n in range(5)]
SLOW = "(select count(*) from range(100000000000) a) > 0"


class Client:
    """Asks a viewer with its cookie, as its page does."""

    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}"
        self.session = requests.Session()
        self.session.cookies.set(f"dataengine_view_{port}", TOKEN)

    def raw(self, path, headers=None, **parameters):
        return self.session.get(self.base + path, params=parameters, headers=headers, timeout=60)

    def get(self, path, **parameters):
        response = self.raw(path, **parameters)
        assert response.status_code == 200, response.text
        return response.json()

    def error(self, path, status=400, **parameters):
        response = self.raw(path, **parameters)
        assert response.status_code == status, response.text
        assert "Traceback" not in response.text
        return response.json()

    def post(self, body, **options):
        return self.session.post(self.base + "/api/subsets", json=body, timeout=60, **options)

    def all_ids(self, limit=4, **parameters):
        ids, after = [], ""
        while after is not None:
            page = self.get("/api/clips", after=after, limit=limit, **parameters)
            assert len(page["clips"]) <= limit
            ids += [clip["clip_id"] for clip in page["clips"]]
            after = page["next"]
        return ids


@contextlib.contextmanager
def viewing(corpus, **options):
    with listen("127.0.0.1", 0) as sock:
        running = server(corpus, sock, token=TOKEN, **options)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield Client(sock.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def commit(corpus, video_id, rows):
    return corpus.commit(
        clips_table(rows), [ledger_row(video_id, rows)], run_id="r-1", fingerprint="f"
    )


def make_corpus(url):
    """Five videos of six clips with ties, nulls, infinities and no-numbers among their scores."""
    corpus = Corpus.create(url)
    corpus.take_over("r-1")
    scores = [0.25, 0.25, None, 0.1, float("nan"), float("-inf"), 0.5]
    for video in range(5):
        rows = [
            clip_row(
                f"v_{video}", 1000 * i, 1000 * i + 1000,
                clip_score=scores[(video + i) % len(scores)],
                language=("en", None, "de", "en")[(video + i) % 4],
                has_audio=i % 2 == 0,
                caption=HOSTILE if (video, i) == (0, 0) else f"a dog, clip {i} of video {video}",
                video={"bytes": bytes((video * 40 + i * 7 + n) % 256 for n in range(5000)), "path": None},
                frames=FRAMES,
                frame_ms=[1000 * i + 200 * n for n in range(5)],
            )
            for i in range(6)
        ]  # fmt: skip
        commit(corpus, f"v_{video}", rows)
    return corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(str(tmp_path_factory.mktemp("viewer") / "it's a corpus"))


@pytest.fixture(scope="module")
def viewer(corpus):
    with viewing(corpus) as client:
        yield client


ADDRESSES = [
    "/", "/viewer.js", "/viewer.css", "/api/corpus", "/api/clips", "/api/count", "/api/clip?id=v_0_0_1000",
    "/api/export", "/media/poster?id=v_0_0_1000", "/media/frame?id=v_0_0_1000&n=0", "/media/video?id=v_0_0_1000",
]  # fmt: skip

# ------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize("path", ADDRESSES)
def test_every_address_needs_the_token(viewer, path):
    url = viewer.base + path
    assert requests.get(url, timeout=60).status_code == 403
    wrong = {f"dataengine_view_{url.split(':')[2].split('/')[0]}": TOKEN + "x"}
    assert requests.get(url, cookies=wrong, timeout=60).status_code == 403
    assert viewer.raw(path).status_code == 200
    assert requests.post(viewer.base + "/api/subsets", json={}, timeout=60).status_code == 403


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(viewer):
    assert requests.get(viewer.base + "/?token=wrong", timeout=60).status_code == 403
    answer = requests.get(f"{viewer.base}/?token={TOKEN}", timeout=60)
    assert answer.status_code == 200
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=Strict" in answer.headers["set-cookie"]
    assert requests.get(viewer.base + "/api/corpus", cookies=answer.cookies, timeout=60).ok
    # The token opens the page alone; an address with it that leaks into a log opens no data.
    assert requests.get(f"{viewer.base}/api/corpus?token={TOKEN}", timeout=60).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403), ("[", 403),
        ("localhost:9999", 200), ("127.0.0.1", 200), ("[::1]:80", 200),
    ],
)  # fmt: skip
def test_a_name_that_was_pointed_here_is_refused(viewer, host, status):
    port = int(viewer.base.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    cookie = f"dataengine_view_{port}={TOKEN}"
    connection.request("GET", "/api/corpus", headers={"Host": host, "Cookie": cookie})
    assert connection.getresponse().status == status
    connection.close()


def test_other_pages_of_the_browser_reach_nothing(viewer):
    for value, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        got = viewer.raw("/media/poster", headers={"Sec-Fetch-Site": value}, id="v_0_0_1000")
        assert got.status_code == status
    body = {"name": "never"}
    assert viewer.post(body, headers={"Origin": "http://127.0.0.1:1"}).status_code == 403
    form = viewer.session.post(viewer.base + "/api/subsets", data=json.dumps(body), timeout=60)
    assert form.status_code == 400  # what a plain form can send is not taken
    assert "never" not in viewer.get("/api/corpus")["subsets"]


def test_answers_forbid_what_the_page_does_not_need(viewer):
    for path in ("/", "/api/corpus", "/nothing"):
        headers = viewer.raw(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_from_elsewhere():
    page = files("dataengine.viewer").joinpath("page")
    html = page.joinpath("index.html").read_text()
    for address in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert address.startswith("/"), address
    assert not re.findall(r"\son\w+=|style=", html)
    script = page.joinpath("viewer.js").read_text()
    assert "http://www.w3.org/2000/svg" in script
    assert re.findall(r"https?://[\w.]+", script) == ["http://www.w3.org"]
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in script


# ------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("", ""),
        ("clip_score > p40", ""),
        ("language = 'en' and clip_score >= p50 -- a comment", ""),
        ("", '"clip 3" dog'),
        ("has_audio or language is null", "dog"),
    ],
)
def test_a_filter_finds_what_a_query_finds(corpus, viewer, where, text):
    with connect(corpus) as db:
        statement = select_statement(db, where, "clip_id, duration_ms", text=text)
        expected = [row for batch in run(db, statement.sql)[1] for row in batch.to_pylist()]
    assert viewer.all_ids(where=where, text=text) == [row["clip_id"] for row in expected]
    count = viewer.get("/api/count", where=where, text=text)
    assert count["clips"] == len(expected)
    assert count["videos"] == len({row["clip_id"].split("_")[1] for row in expected})
    found = viewer.get("/api/clips", where=where, text=text)["percentiles"]
    assert [p["value"] for p in found] == [p.value for p in statement.percentiles]


@pytest.mark.parametrize(
    "where",
    [
        "scor > 1", "clip_score >", "select * from clips", "1=1) or (1=1", "1; drop view clips",
        "nonsense(clip_score)", "caption > 5 +", "p70 > 0.5", "'",
        "exists (from read_text('/etc/passwd'))", "exists (from read_parquet('/tmp/*'))",
        "exists (from 'https://example.org/x.parquet')", "cast(caption as integer) = 1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/api/clips", "/api/count", "/api/export"])
def test_wrong_sql_is_answered_in_words(viewer, path, where):
    error = viewer.error(path, where=where)
    assert error["message"]
    assert "\n" not in error["message"]


def test_a_wrong_name_is_answered_with_the_names_there_are(viewer):
    error = viewer.error("/api/clips", where="scor > 1")
    assert "scor" in error["message"]
    assert error["hint"].startswith("columns of clips: clip_id, ")
    assert "clip_score" in viewer.error("/api/clips", order="clip_score; drop")["hint"]
    assert (
        "caption_video_fine" not in viewer.error("/api/clips", order="caption_video_fine")["hint"]
    )
    assert "quote" in viewer.error("/api/clips", text='"open')["message"]


@pytest.mark.parametrize("after", ["x", "====", "W10=", "WzEsMiwzLDRd", "bnVsbA==", "é"])
def test_a_place_that_is_none_is_refused(viewer, after):
    assert "first page" in viewer.error("/api/clips", after=after)["hint"]


def test_bad_numbers_are_refused_in_words(viewer):
    assert "limit" in viewer.error("/api/clips", limit=0)["message"]
    assert "limit" in viewer.error("/api/clips", limit="many")["message"]
    assert "format" in viewer.error("/api/export", format="exe")["message"]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "order", ["", "clip_score", "language", "has_audio", "duration_ms", "caption"]
)
def test_pages_show_every_clip_once(viewer, order, descending):
    whole = viewer.get("/api/clips", order=order, descending=descending, limit=500)
    assert whole["next"] is None
    expected = [clip["clip_id"] for clip in whole["clips"]]
    assert len(set(expected)) == len(expected) == 30
    assert viewer.all_ids(4, order=order, descending=descending) == expected


def test_orders_are_what_they_say(viewer):
    def values(order, descending):
        answer = viewer.get("/api/clips", order=order, descending=descending, limit=500)
        return [clip[order] for clip in answer["clips"]]

    rising, falling = values("clip_score", False), values("clip_score", True)
    finite = [value for value in rising if value is not None]
    assert finite == sorted(finite)
    assert len(finite) > 10
    # What is no number was stored as null, and null comes last either way.
    assert rising[len(finite) :] == falling[len(finite) :] == [None] * (len(rising) - len(finite))
    assert falling[: len(finite)] == finite[::-1]
    assert viewer.all_ids(30, descending=True) == viewer.all_ids(30)[::-1]


def test_a_commit_shows_without_a_restart(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    with viewing(corpus) as client:
        assert client.all_ids() == []
        assert client.get("/api/count")["clips"] == 0
        assert client.get("/api/count")["hours"] == 0
        assert "clip_score" in client.get("/api/corpus")["orders"]
        assert client.raw("/api/export").text.startswith("clip_id,")
        commit(corpus, "v", [clip_row("v", 0, 1000)])
        assert client.all_ids() == ["v_0_1000"]
        assert client.get("/api/count")["clips"] == 1


# ------------------------------------------------------------------------------------- one clip


def test_a_clip_is_told_whole_and_verbatim(viewer):
    answer = viewer.get("/api/clip", id="v_0_0_1000")
    clip = answer["clip"]
    assert clip["caption"] == HOSTILE
    assert clip["tags"] == ["a", "b"]
    assert clip["provenance"][0]["model"] == "m"
    assert "video" not in clip
    assert [s["clip_id"] for s in answer["siblings"]] == [
        f"v_0_{1000 * i}_{1000 * i + 1000}" for i in range(6)
    ]
    page = viewer.get("/api/clips", where="video_id = 'v_0'", limit=1)
    assert page["clips"][0]["caption"] == HOSTILE


@pytest.mark.parametrize(
    "clip_id",
    ["", "x", "v_0_0_1001", "../../etc/passwd", "v_0_-1_1000", "v_0_99999999999999999999_1", "' or 1=1 --_0_1", "v_0_٣_1000"],
)  # fmt: skip
def test_what_is_no_clip_is_not_found(viewer, clip_id):
    for path in ("/api/clip", "/media/poster", "/media/video"):
        viewer.error(path, 404, id=clip_id)
    viewer.error("/media/frame", 404, id=clip_id, n=0)


def test_frames_come_by_number_and_the_poster_is_the_middle_one(viewer):
    for number, frame in enumerate(FRAMES):
        answer = viewer.raw("/media/frame", id="v_1_0_1000", n=number)
        assert answer.content == frame
        assert answer.headers["content-type"] == "image/jpeg"
    assert viewer.raw("/media/poster", id="v_1_0_1000").content == FRAMES[2]
    viewer.error("/media/frame", 404, id="v_1_0_1000", n=5)
    viewer.error("/media/frame", 400, id="v_1_0_1000", n=-1)


@pytest.mark.parametrize(
    ("header", "status", "start", "stop"),
    [
        (None, 200, 0, 5000), ("bytes=0-", 206, 0, 5000), ("bytes=10-19", 206, 10, 20),
        ("bytes=4990-9999", 206, 4990, 5000), ("bytes=-7", 206, 4993, 5000), ("bytes=-9999", 206, 0, 5000),
        ("bytes=4999-4999", 206, 4999, 5000), ("bytes=0-0,5-6", 200, 0, 5000), ("bytes=7-3", 200, 0, 5000),
        ("pages=1-2", 200, 0, 5000), ("bytes=-", 200, 0, 5000), ("bytes=a-b", 200, 0, 5000),
        ("bytes=5000-", 416, 0, 0), ("bytes=-0", 416, 0, 0),
    ],
)  # fmt: skip
def test_a_player_may_ask_for_any_part(viewer, header, status, start, stop):
    whole = bytes((2 * 40 + 3 * 7 + n) % 256 for n in range(5000))
    headers = {"Range": header} if header else {}
    answer = viewer.raw("/media/video", headers=headers, id="v_2_3000_4000")
    assert answer.status_code == status
    assert answer.headers["accept-ranges"] == "bytes"
    if status == 416:
        assert answer.headers["content-range"] == "bytes */5000"
        return
    assert answer.content == whole[start:stop]
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["content-type"] == "video/mp4"
    if status == 206:
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/5000"
    assert (byte_range(header or "", 5000) is not None) == (status == 206)


def test_a_part_of_another_version_is_not_mixed_in(viewer):
    etag = viewer.raw("/media/video", id="v_2_0_1000").headers["etag"]
    for known, status in ((etag, 206), ('"other"', 200)):
        headers = {"Range": "bytes=5-9", "If-Range": known}
        assert viewer.raw("/media/video", headers=headers, id="v_2_0_1000").status_code == status


def test_seeking_reads_a_row_group_once(corpus, monkeypatch):
    reads = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self, *args, **options):
        reads.append(options["columns"])
        return read_row_group(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    with viewing(corpus) as client:
        for start in range(0, 5000, 500):
            client.raw("/media/video", headers={"Range": f"bytes={start}-"}, id="v_3_0_1000")
        client.raw("/media/video", id="v_3_1000_2000")  # of the same row group
    assert reads == [["clip_id", "video"]]


def test_what_was_read_is_forgotten_in_time(corpus):
    places = {}
    with connect(corpus) as db:
        for clip_id, *place in db.execute(
            "select clip_id, shard, row_group, row from clips"
        ).fetchall():
            places[clip_id] = tuple(place)
    media = Media(corpus, cache_bytes=70_000)
    for clip_id, place in places.items():
        assert len(media.video(clip_id, place)[0]) == 5000
    held = [future.result().nbytes for future in media._columns.values()]
    assert 0 < sum(held) <= 70_000
    with pytest.raises(NotFoundError, match="removed"):  # never another clip's media
        media.video("v_0_0_1000", places["v_0_1000_2000"])


def test_a_clip_of_frames_alone_has_no_video(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    commit(corpus, "v", [clip_row("v", 0, 1000, video=None)])
    with viewing(corpus) as client:
        assert "frames alone" in client.error("/media/video", 404, id="v_0_1000")["message"]
        assert client.raw("/media/poster", id="v_0_1000").status_code == 200


def test_a_removed_video_is_gone_at_once(tmp_path):
    corpus = make_corpus(str(tmp_path / "c"))
    with viewing(corpus) as client:
        assert len(client.all_ids(30)) == 30
        for path in ("/media/video", "/media/poster", "/api/clip"):
            assert client.raw(path, id="v_1_0_1000").status_code == 200
        remove(corpus, ["v_1"])
        for path in ("/media/video", "/media/poster", "/api/clip"):
            client.error(path, 404, id="v_1_0_1000")
            assert client.raw(path, id="v_2_0_1000").status_code == 200
        assert len(client.all_ids(30)) == 24


def test_a_corpus_in_an_object_store_is_shown():
    corpus = make_corpus("memory://viewer/c")
    with viewing(corpus) as client:
        ids = client.all_ids(where="clip_score > p50")
        assert 0 < len(ids) < 30
        assert (
            client.raw("/media/video", headers={"Range": "bytes=0-9"}, id=ids[0]).status_code == 206
        )
        assert client.raw("/media/poster", id=ids[0]).content == FRAMES[2]
        assert len(client.get("/api/clip", id=ids[0])["siblings"]) == 6


# ------------------------------------------------------------------------------------- what is kept


def test_a_filter_is_saved_as_a_subset_and_shown(tmp_path):
    corpus = make_corpus(str(tmp_path / "c"))
    with viewing(corpus) as client:
        where, text = "clip_score >= p30", '"clip 3"'
        expected = client.all_ids(where=where, text=text)
        made = client.post({"name": "good", "where": where, "text": text})
        assert made.status_code == 200, made.text
        assert made.json()["num_clips"] == len(expected) > 0
        assert made.json()["subsets"] == ["good"]
        assert client.all_ids(subset="good") == expected
        assert client.get("/api/count", subset="good")["clips"] == len(expected)
        drawn = client.post(
            {"name": "two", "order": "div", "num_clips": 2, "seed": 3, "per_video": 1}
        )
        assert drawn.json()["num_clips"] == 2
        definition = subsets.read_definition(corpus, "two")["definition"]
        assert (definition["order"], definition["seed"], definition["per_video"]) == ("div", 3, 1)
        flt = client.post({"name": "flt", "preset": "flt", "where": "has_audio"}).json()
        assert flt["num_candidates"] < 30
        again = client.post({"name": "good"})
        assert (again.status_code, again.json()["hint"]) == (400, "replace it with --replace")
        assert client.post({"name": "good", "replace": True}).json()["num_clips"] == 30
        assert len(client.all_ids(30, subset="good")) == 30  # not what it was
    with viewing(corpus, subset="two") as client:
        assert client.get("/api/corpus")["subset"] == "two"


@pytest.mark.parametrize(
    "body",
    [
        {"name": "../../x"}, {"name": ""}, {"name": "/tmp/x"}, {"name": ".x"}, {"name": "a" * 300}, {},
        {"name": "x", "where": "scor > 1"}, {"name": "x", "where": "duration_ms > 9999"},
        {"name": "x", "preset": "no"}, {"name": "x", "order": "no"}, {"name": "x", "num_clips": 0},
        {"name": "x", "preset": "flt", "order": "top"}, {"name": "x", "order": "top", "score": "a desc; --"},
    ],
)  # fmt: skip
def test_a_subset_that_cannot_be_is_refused_in_words(corpus, viewer, body):
    answer = viewer.post(body)
    assert answer.status_code == 400
    assert answer.json()["message"]
    assert corpus.names("subsets") == []


def test_an_unknown_subset_is_named(viewer):
    assert "no-such" in viewer.error("/api/clips", subset="no-such")["message"]
    viewer.error("/api/clips", subset="../catalog/x")


def test_a_download_holds_the_rows_that_pass(viewer):
    parameters = {"where": "clip_score > p40", "order": "clip_score", "descending": True}
    expected = viewer.all_ids(**parameters)
    text = viewer.raw("/api/export", format="csv", **parameters).text
    assert [row["clip_id"] for row in csv.DictReader(io.StringIO(text))] == expected
    lines = viewer.raw("/api/export", format="jsonl", **parameters).text.splitlines()
    assert [json.loads(line)["clip_id"] for line in lines] == expected
    answer = viewer.raw("/api/export", format="parquet", **parameters)
    table = pq.read_table(pa.BufferReader(answer.content))
    assert table["clip_id"].to_pylist() == expected
    assert "clips.parquet" in answer.headers["content-disposition"]
    whole = viewer.raw("/api/export", format="jsonl").text.splitlines()
    assert sorted(json.loads(line)["clip_id"] for line in whole) == sorted(viewer.all_ids())


# ------------------------------------------------------------------------------------- long questions


def leases(viewer):
    return [database.leases for database in viewer.catalog._databases.values()]


@pytest.fixture
def watched(corpus, monkeypatch):
    """Viewers that were started, so that a test can see what still runs in them."""
    made = []
    init = Viewer.__init__

    def remembered(self, *args, **options):
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Viewer, "__init__", remembered)
    return made


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_a_question_that_takes_too_long_is_given_up(corpus, watched):
    with viewing(corpus, query_seconds=0.5) as client:
        error = client.error("/api/count", where=SLOW)
        assert "given up" in error["message"]
        assert len(client.all_ids()) == 30
        wait_until(lambda: leases(watched[0]) == [0])
    assert leases(watched[0]) == []  # closed with the server


def test_a_question_nobody_waits_for_is_given_up(corpus, watched):
    with viewing(corpus) as client:
        assert len(client.all_ids()) == 30
        for _ in range(6):  # more than there are connections
            with pytest.raises(requests.Timeout):
                client.session.get(
                    client.base + "/api/clips", params={"where": SLOW}, timeout=(10, 0.3)
                )
        wait_until(lambda: leases(watched[0]) == [0])
        assert len(client.all_ids()) == 30


def test_a_download_nobody_takes_is_given_up(tmp_path, watched):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    long = "x" * 20_000
    commit(corpus, "v", [clip_row("v", i, i + 1, caption=long) for i in range(2000)])
    with viewing(corpus) as client:
        answer = client.session.get(
            client.base + "/api/export", params={"format": "jsonl"}, stream=True, timeout=60
        )
        assert next(answer.iter_content(1000))
        answer.close()
        wait_until(lambda: leases(watched[0]) == [0])
        threads = [thread.name for thread in threading.enumerate()]
        assert "export" not in threads


# ------------------------------------------------------------------------------------- addresses


def test_a_port_that_is_taken_is_said():
    from dataengine.errors import ConfigError

    with listen("127.0.0.1", 0) as sock:
        assert address_of(sock, "t").startswith("http://127.0.0.1:")
        with pytest.raises(ConfigError, match="Cannot listen"):
            listen("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(ConfigError, match="Cannot listen"):
        listen("256.0.0.1", 0)


def test_the_command_prints_the_address_and_ends_on_request(corpus):
    command = [sys.executable, "-m", "dataengine", "view", corpus.url, "--no-open"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        url = started.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", url)
        assert requests.get(url, timeout=60).status_code == 200
        started.send_signal(signal.SIGINT)
        # 0 where the tests run in a shell's background, which ignores interrupts.
        assert started.wait(60) in (130, 0)
        assert started.stderr.read() == ""


# ------------------------------------------------------------------------------------- a browser


@pytest.mark.slow
def test_a_reader_filters_plays_and_saves(tmp_path):
    browser_path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser_path is None:
        pytest.skip("no chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    mp4 = make_video(tmp_path / "v.mp4", (50, 50)).read_bytes()
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    jpeg = _jpeg()
    rows = [
        clip_row(
            "v", 4000 * i, 4000 * i + 4000, clip_score=i / 10, caption=HOSTILE if i == 2 else f"clip {i}",
            video=None if i == 3 else {"bytes": mp4, "path": None}, frames=[jpeg] * 3,
            frame_ms=[4000 * i, 4000 * i + 1000, 4000 * i + 2000],
        )
        for i in range(5)
    ]  # fmt: skip
    commit(corpus, "v", rows)
    with viewing(corpus) as client, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        problems, elsewhere = [], []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((client.base, "blob:")) or elsewhere.append(request.url)
            ),
        )
        page.goto(f"{client.base}/?token={TOKEN}")
        shows(page, "document.querySelectorAll('.clip').length === 5")
        assert "token" not in page.url
        assert page.locator(".clip p").nth(2).inner_text() == HOSTILE
        shows(page, "document.querySelector('.poster img').naturalWidth > 0")

        page.fill("#where", "scor > 1")
        page.keyboard.press("Enter")
        page.wait_for_selector("#error .chip")
        assert "scor" in page.inner_text("#error p")

        page.fill("#where", "clip_score >= p50")
        page.keyboard.press("Enter")
        shows(page, "document.querySelectorAll('.clip').length === 3")
        shows(page, "document.querySelector('#count').textContent.startsWith('3 clips')")
        assert "p50 of clip_score is 0.2" in page.inner_text("#percentiles")

        page.locator(".clip").nth(0).click()
        shows(page, "player.readyState >= 2 && player.currentTime > 0.2")
        shows(page, "document.querySelectorAll('#timeline rect').length === 5")
        shows(
            page,
            "document.querySelector('#timeline rect.here') === timeline.querySelectorAll('rect')[2]",
        )
        assert page.inner_text("#facts .caption") == HOSTILE
        page.evaluate("player.currentTime = 3")
        shows(page, "player.readyState >= 2 && player.currentTime >= 3 && !player.seeking")

        page.keyboard.press("ArrowRight")  # of frames alone
        page.wait_for_selector("#no-video:not([hidden])")
        shows(page, "document.querySelectorAll('#frames.large img').length === 3")
        page.keyboard.press("ArrowRight")
        shows(page, "!player.hidden && player.readyState >= 1")

        page.keyboard.press("s")
        page.fill("#save-name", "from-the-page")
        page.click("#save-go")
        shows(page, "document.querySelector('#save-answer').textContent.includes('3 clips')")
        page.click("#save-cancel")
        page.select_option("#subset", "from-the-page")
        page.fill("#where", "")
        page.click("#show")
        shows(page, "document.querySelector('#count').textContent.startsWith('3 clips')")
        title = page.title()
        browser.close()
    assert corpus.names("subsets") == ["from-the-page"]
    assert title != "broken"
    assert problems == []
    assert elsewhere == []


def shows(page, expression):
    """Waits until an expression is true; the page's policy forbids Playwright's own way."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def _jpeg():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()
