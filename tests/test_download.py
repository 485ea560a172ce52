# SPDX-License-Identifier: Apache-2.0
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dataengine import records
from dataengine.stage import Drop, Kept
from dataengine.stages.download import (
    DownloadStage,
    classify_yt_dlp,
    forget,
    parse_subtitles,
    sidecars,
    subtitle_language,
)

BODY = b"\x00\x00\x00\x18ftypmp42" + bytes(5000)


class Handler(BaseHTTPRequestHandler):
    """Answers as the path says; counts what it is asked."""

    hits: dict[str, int] = {}  # noqa: RUF012 - shared on purpose: one server, many handlers

    def do_GET(self):
        name = self.path.strip("/").split(".")[0]
        self.hits[name] = self.hits.get(name, 0) + 1
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", "/ok.mp4")
            self.end_headers()
        elif name in ("404", "410", "503"):
            self.answer(int(name), b"<html>gone</html>", "text/html")
        elif name == "429":
            if self.hits[name] == 1:
                self.send_response(429)
                self.send_header("Retry-After", "1")
                self.end_headers()
            else:
                self.answer(200, BODY, "video/mp4")
        elif name == "page":
            self.answer(200, b"<html>not a video</html>", "text/html; charset=utf-8")
        elif name == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY) * 2))
            self.end_headers()
            self.wfile.write(BODY)
        elif name == "slow":
            time.sleep(3)
        else:
            self.answer(200, BODY, "video/mp4")

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(source, cache, refusal=None, **settings):
    stage = DownloadStage(DownloadStage.Config(cache_dir=str(cache), **settings))
    stage.setup()
    row = {"_video": {"source": source, "video_id": None}, "_refusal": refusal}
    (outcome,) = stage.process([row])
    return outcome


def test_a_file_is_fetched_once_and_kept_under_its_id(server, tmp_path):
    url = f"{server}/ok.mp4"
    outcome = fetch(url, tmp_path)
    assert isinstance(outcome, Kept)
    row = dict(outcome.rows[0])
    assert os.path.basename(row["_path"]) == records.url_video_id(url) + ".mp4"
    assert Path(row["_path"]).read_bytes() == BODY
    assert row["source_url"] == url
    assert row["_video"]["file_bytes"] == len(BODY)
    hits = Handler.hits["ok"]
    fetch(url, tmp_path)
    assert Handler.hits["ok"] == hits, "the cache was not used"
    forget(str(tmp_path), records.url_video_id(url)[:-1])
    assert os.listdir(tmp_path), "another video's file was removed"
    forget(str(tmp_path), records.url_video_id(url))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "reason", "retryable"),
    [
        ("404", "http_4xx", False),
        ("410", "http_4xx", False),
        ("503", "http_5xx", True),
        ("page", "not_a_video", False),
        ("cut", "incomplete", True),
        ("slow", "timeout", True),
    ],
)
def test_a_url_that_gives_no_video_ends_with_a_reason(server, tmp_path, name, reason, retryable):
    outcome = fetch(f"{server}/{name}.mp4", tmp_path, retries=0, timeout_s=1)
    assert isinstance(outcome, Drop)
    assert (outcome.reason, outcome.retryable) == (reason, retryable)
    assert os.listdir(tmp_path) == [], "half a file was left behind"


def test_redirects_are_followed_and_a_full_server_is_asked_again(server, tmp_path):
    assert isinstance(fetch(f"{server}/moved.mp4", tmp_path), Kept)
    assert isinstance(fetch(f"{server}/429.mp4", tmp_path, retries=2), Kept)
    assert Handler.hits["429"] == 2


def test_a_server_that_is_not_there_is_worth_another_try(tmp_path):
    outcome = fetch("http://127.0.0.1:9/x.mp4", tmp_path, retries=0)
    assert isinstance(outcome, Drop)
    assert (outcome.reason, outcome.retryable) == ("connection_failed", True)


def test_a_page_goes_through_yt_dlp(server, tmp_path):
    """A URL without a video suffix: yt-dlp's generic extractor finds the direct file."""
    outcome = fetch(f"{server}/watch", tmp_path)
    assert isinstance(outcome, Kept), outcome
    path = outcome.rows[0]["_path"]
    assert Path(path).read_bytes() == BODY
    outcome = fetch(f"{server}/404", tmp_path, retries=0)
    assert isinstance(outcome, Drop)
    assert outcome.reason == "http_4xx"


def test_a_file_larger_than_the_limit_is_dropped(tmp_path):
    (tmp_path / "big.mp4").write_bytes(bytes(2 << 20))
    outcome = fetch(str(tmp_path / "big.mp4"), tmp_path, max_file_mb=1)
    assert isinstance(outcome, Drop)
    assert outcome.reason == "too_large"


def test_local_files_are_used_where_they_lie(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"x")
    (tmp_path / "a.de.srt").write_text("1\n00:00:01,000 --> 00:00:02,500\nGuten <i>Tag</i>\n")
    outcome = fetch(str(video), tmp_path / "cache")
    assert isinstance(outcome, Kept)
    row = outcome.rows[0]
    assert row["_path"] == str(video)
    assert row["video_id"] == records.file_video_id(str(video))
    assert row["_subtitles"] == [
        {"language": "de", "start_ms": 1000, "end_ms": 2500, "text": "Guten Tag"}
    ]
    missing = fetch(str(tmp_path / "b.mp4"), tmp_path)
    assert isinstance(missing, Drop)
    assert missing.reason == "missing_file"
    again = fetch(str(video), tmp_path, refusal={"reason": "duplicate", "detail": "x"})
    assert isinstance(again, Drop)
    assert again.reason == "duplicate"


def test_subtitles_that_cannot_be_read_cost_nothing(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a.en.srt").write_bytes(b"\xff\xfe\x00 not subtitles")
    (tmp_path / "a.fr.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nBonjour\n")
    cues = sidecars(str(tmp_path / "a.mp4"))
    assert cues is not None
    assert [cue["text"] for cue in cues] == ["Bonjour"]


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("a.de.srt", "de"), ("a.srt", "und"), ("a.pt-BR.vtt", "pt-BR"), ("ab.de.srt", None),
        ("a.de.txt", None), ("a.final cut.srt", None),
    ],
)  # fmt: skip
def test_sidecar_names(name, language):
    assert subtitle_language("a", name) == language


def test_text_in_no_subtitle_format_is_refused():
    with pytest.raises(ValueError, match=r".+"):
        parse_subtitles("just words", "en")


@pytest.mark.parametrize(
    ("message", "reason", "retryable"),
    [
        ("ERROR: [youtube] x: Video unavailable", "unavailable", False),
        (
            "ERROR: [youtube] x: Private video. Sign in if you've been granted access",
            "private",
            False,
        ),
        ("Sign in to confirm you’re not a bot", "bot_check", True),  # noqa: RUF001 - its own words
        ("HTTP Error 429: Too Many Requests", "http_429", True),
        ("The uploader has not made this video available in your country", "geo", False),
        ("Unable to download webpage: HTTP Error 404: Not Found", "http_4xx", False),
        ("<urlopen error timed out>", "timeout", True),
        ("something new", "download_failed", True),
    ],
)
def test_what_yt_dlp_says_becomes_a_reason(message, reason, retryable):
    assert classify_yt_dlp(message) == (reason, retryable)
