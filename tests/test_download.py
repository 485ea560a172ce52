# SPDX-License-Identifier: Apache-2.0
"""Fetching, against a local server with every fault a host can have; the extractor is yt-dlp itself."""

import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import imageio_ffmpeg
import psutil
import pyarrow as pa
import pytest
from pydantic import SecretStr, ValidationError

from dataengine import media, records
from dataengine.errors import ConfigError, DependencyError
from dataengine.fetch.cache import Cache, CacheUser, forget
from dataengine.fetch.content import is_text
from dataengine.fetch.faults import CLASSES, FetchError, classify_message, one_line
from dataengine.fetch.fetcher import Job, fetch, inspect_source, recipe_of, suffix_of
from dataengine.fetch.http import fetch_file
from dataengine.fetch.pages import classify, facts_of, refuse
from dataengine.fetch.process import FetchProcess
from dataengine.fetch.session import Visit, retry_after_s
from dataengine.fetch.settings import FetchSettings
from dataengine.stage import Drop, Kept
from dataengine.stages.download import DownloadStage
from tests.fault_server import FaultServer
from tests.media_factory import make_video

QUICK: dict[str, Any] = {
    "allow_private": True,
    "retries": 1,
    "backoff_s": 0.01,
    "timeout_s": 5,
    "max_file_mb": 1,
}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    return make_video(path, shot_frames=(10,), size=(64, 64)).read_bytes()


@pytest.fixture
def server(video):
    server = FaultServer(video)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def own_node(tmp_path, monkeypatch):
    """Locks and stamps of this test alone, here and in the processes it starts."""
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setenv("TMPDIR", str(node))
    monkeypatch.setattr(tempfile, "tempdir", None)


def job(url, cache, **settings):
    suffix = suffix_of(url)
    return Job(
        source=url,
        suffix=suffix if suffix == ".mp4" else "",
        user="nobody:0",
        fetch=FetchSettings.model_validate(QUICK | {"cache_dir": str(cache)} | settings),
    )


def fault_of(url, cache, **settings):
    with pytest.raises(FetchError) as caught:
        fetch(job(url, cache, **settings))
    return caught.value.reason


def locate(source, cache, refusal=None, attempts=None, **settings):
    config = DownloadStage.Config.model_validate(QUICK | {"cache_dir": str(cache)} | settings)
    stage = DownloadStage(config)
    stage.setup()
    video = {"source": source, "video_id": None, "attempts": attempts}
    (outcome,) = stage.process([{"_video": video, "_refusal": refusal}])
    return outcome


def names(folder):
    return sorted(os.listdir(folder))


# ------------------------------------------------------------------------------- every class

FAULTS = {
    "loop": ("redirect_loop", False), "odd": ("refused_scheme", False), "slow": ("timeout", True),
    "stall": ("timeout", True), "cut": ("incomplete", True), "gone": ("http_4xx", False),
    "missing": ("http_4xx", False), "forbidden": ("http_4xx", False), "full": ("http_429", True),
    "full-long": ("http_429", True), "broken": ("http_5xx", True), "hangs-up": ("connection_failed", True),
    "text": ("not_a_video", False), "disguised": ("not_a_video", False), "empty": ("empty_file", False),
    "large": ("too_large", False), "large-unsaid": ("too_large", False),
}  # fmt: skip


@pytest.mark.parametrize("path", ["{}/a.mp4", "watch/{}/a"], ids=["file", "page"])
@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_has_its_class(server, tmp_path, kind, path):
    reason, retryable = FAULTS[kind]
    settings = {"slow": {"fetch_timeout_s": 1}, "stall": {"timeout_s": 0.3}}.get(kind, {})
    assert fault_of(server.url(path.format(kind)), tmp_path / "c", **settings) == reason
    assert CLASSES[reason][1] is retryable
    if not retryable:
        assert names(tmp_path / "c") == [], "something was left behind"
    tries = [hit for hit in server.hits if f"/{kind}/" in hit.path and "watch" not in hit.path]
    if kind == "full-long":
        assert len(tries) == 1, "a server that wants a day's rest was asked again"
    elif kind != "loop":
        assert len(tries) <= 3


@pytest.mark.parametrize("path", ["{}/a.mp4", "watch/{}/a"], ids=["file", "page"])
@pytest.mark.parametrize("kind", ["ok", "weak", "moved", "cut-once", "changed", "broken-once"])
def test_what_can_be_mended_is_fetched_whole(server, tmp_path, kind, path):
    entry = fetch(job(server.url(path.format(kind)), tmp_path / "c"))
    assert entry.path.read_bytes() == server.video
    assert entry.path.parent.name == entry.video_id == names(tmp_path / "c")[0]
    assert len(names(tmp_path / "c")) == 1
    if kind == "cut-once":
        assert any(hit.range for hit in server.hits), "the first half was fetched twice"


@pytest.mark.parametrize("path", ["{}/a.mp4", "watch/{}/a"], ids=["file", "page"])
@pytest.mark.parametrize("kind", ["stall-once", "reset-once"])
def test_a_body_that_stops_is_continued_where_it_stopped(server, tmp_path, kind, path):
    server.video = bytes(1) + os.urandom(100_000)
    entry = fetch(job(server.url(path.format(kind)), tmp_path / "c", timeout_s=0.5))
    assert entry.path.read_bytes() == server.video
    (begin,) = [hit.range for hit in server.hits if hit.range]
    assert begin == f"bytes={len(server.video) // 2}-" or "watch" in path


def test_a_page_without_a_video_or_with_two_is_named(server, tmp_path):
    assert fault_of(server.url("text/page"), tmp_path / "c") == "unsupported"
    assert fault_of(server.url("watch-two/a"), tmp_path / "c") == "playlist"
    assert fault_of(server.url("missing/page"), tmp_path / "c") == "http_4xx"
    assert len(server.hits) == 3, "a list was followed"


def test_nobody_there_is_worth_another_try(tmp_path):
    assert fault_of("http://127.0.0.1:9/x.mp4", tmp_path) == "connection_failed"
    assert fault_of("http://127.0.0.1:9/x", tmp_path) == "connection_failed"
    assert fault_of("http://no-such-host.invalid/x", tmp_path) == "connection_failed"


def test_a_server_that_names_a_pause_is_given_it(server, tmp_path):
    fetch(job(server.url("full-once/a.mp4"), tmp_path / "c"))
    first, second = (hit.time_s for hit in server.hits)
    assert second - first > 0.95  # its Retry-After says 1


def test_one_extraction_gives_video_subtitles_and_facts(server, tmp_path):
    entry = fetch(job(server.url("watch/ok/a"), tmp_path / "c", subtitles=["en", "de"]))
    assert server.paths() == ["/watch/ok/a", "/ok/a.mp4", "/subtitles/en.vtt", "/subtitles/de.vtt"]
    assert entry.facts["title"].startswith("A day")
    assert entry.subtitles == [
        {
            "language": tag,
            "start_ms": 0,
            "end_ms": 800,
            "text": f"said in {tag}",
            "origin": "manual",
        }
        for tag in ("en", "de")
    ]


def test_a_video_without_its_subtitles_is_still_a_video(server, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fault_server._Handler.subtitles", lambda self: self.fail(404))
    entry = fetch(job(server.url("watch/ok/a"), tmp_path / "c"))
    assert (entry.path.read_bytes(), entry.subtitles) == (server.video, None)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A stream whose picture and sound come apart, in two sizes: name -> bytes and content type."""
    folder = tmp_path_factory.mktemp("stream")
    source = make_video(folder / "a.mp4", shot_frames=(5,) * 20, size=(64, 64), audio="aac")
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(source), "-c", "copy"]
    for name, kind in (("picture", "v"), ("sound", "a")):
        hls = ["-map", f"0:{kind}", "-f", "hls", "-hls_playlist_type", "vod", f"{name}.m3u8"]
        subprocess.run([*ffmpeg, *hls], cwd=folder, check=True, stdin=subprocess.DEVNULL)
    picture = 'AUDIO="s",CODECS="avc1.64000a,mp4a.40.2"'
    master = (
        '#EXTM3U\n#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="s",NAME="en",DEFAULT=YES,URI="sound.m3u8"\n'
        f"#EXT-X-STREAM-INF:BANDWIDTH=9000,RESOLUTION=64x64,{picture}\npicture.m3u8\n"
        f"#EXT-X-STREAM-INF:BANDWIDTH=900000,RESOLUTION=3840x2160,{picture}\nnever.m3u8\n"
    )
    kinds = {".m3u8": "application/vnd.apple.mpegurl", ".ts": "video/mp2t"}
    files = {
        path.name: (path.read_bytes(), kinds[path.suffix])
        for path in folder.iterdir()
        if path.suffix in kinds
    }
    return files | {"master.m3u8": (master.encode(), kinds[".m3u8"])}


def test_picture_and_sound_that_come_apart_are_put_together(server, stream, tmp_path):
    server.files = stream
    entry = fetch(job(server.url("static/master.m3u8"), tmp_path))
    with media.VideoReader(str(entry.path)) as reader:
        assert (reader.info.width, reader.info.audio_codec) == (64, "aac")
        assert len(list(reader)) == 100
    assert not any("never" in path for path in server.paths()), "more than 720 lines were taken"
    assert [path.name for path in entry.path.parent.iterdir() if "video" in path.name] == [
        entry.path.name
    ]


def test_a_stream_with_a_hole_is_not_the_stream(server, stream, tmp_path):
    server.files = {name: file for name, file in stream.items() if name != "picture1.ts"}
    assert fault_of(server.url("static/master.m3u8"), tmp_path) == "http_4xx"


def test_a_video_has_one_request_at_work_at_a_time(server, tmp_path):
    """yt-dlp looks into a file to see what it is, and asks for it once more to fetch it."""
    server.slow_s = 0.5
    fetch(job(server.url("slow/a"), tmp_path))
    assert len(server.hits) == 2
    assert server.most_at_work() == {"127.0.0.1": 1}


def test_a_playlist_inside_a_stream_is_not_followed(server, stream, tmp_path):
    """ffmpeg, which mends streams, would read what a playlist in place of a segment names."""
    trap = f"#EXTM3U\n#EXTINF:1,\n{server.url('ok/trap.mp4')}\n#EXT-X-ENDLIST\n".encode()
    server.files = {
        name: (trap if name.endswith(".ts") else body, kind)
        for name, (body, kind) in stream.items()
    }
    assert fault_of(server.url("static/picture.m3u8"), tmp_path) == "not_a_video"
    assert not any("trap" in path for path in server.paths())


# ------------------------------------------------------------------------------------- cache


def test_what_is_cached_is_not_asked_for_again(server, tmp_path):
    """As after a crash between download and commit: a new process finds file, facts and subtitles."""
    first = fetch(job(server.url("watch/ok/a"), tmp_path / "c"))
    num_hits = len(server.hits)
    outcome = locate(server.url("watch/ok/a"), tmp_path / "c")
    assert isinstance(outcome, Kept)
    row = outcome.rows[0]
    assert (row["_path"], row["_subtitles"]) == (str(first.path), first.subtitles)
    assert row["_video"]["title"] == first.facts["title"]
    assert len(server.hits) == num_hits
    locate(server.url("watch/ok/a"), tmp_path / "c", timeout_s=9, sleep_interval_s=0.01)
    assert len(server.hits) == num_hits, "a setting that changes no clip"
    fetch(job(server.url("watch/ok/a"), tmp_path / "c", max_height=360))
    assert len(server.hits) > num_hits, "another choice of formats is another file"
    assert len(names(tmp_path / "c")) == 1


def test_a_file_is_named_after_its_video_alone_and_forgotten_with_it(server, tmp_path):
    url, other = server.url("ok/..%2F..%2Fetc.mp4"), server.url("moved/..%2F..%2Fetc.mp4")
    entry, beside = (fetch(job(each, tmp_path / "c")) for each in (url, other))
    assert entry.path == tmp_path / "c" / records.url_video_id(url) / "video.mp4"
    forget(str(tmp_path / "c"), entry.video_id[:-1])
    forget(str(tmp_path / "c"), entry.video_id)
    assert names(tmp_path / "c") == [beside.video_id]
    forget(str(tmp_path / "nowhere"), entry.video_id)


def test_half_a_file_is_finished_by_a_later_run(server, tmp_path):
    assert fault_of(server.url("cut-once/a.mp4"), tmp_path / "c", retries=0) == "incomplete"
    assert names(tmp_path / "c")[0].endswith(".partial")
    entry = fetch(job(server.url("cut-once/a.mp4"), tmp_path / "c", retries=0))
    assert entry.path.read_bytes() == server.video
    assert [hit.range for hit in server.hits] == ["", f"bytes={len(server.video) // 2}-"]


def test_half_of_another_version_is_thrown_away(server, tmp_path):
    assert fault_of(server.url("cut-once/a.mp4"), tmp_path / "c", retries=0) == "incomplete"
    server.etag, server.video = '"9"', bytes(1) + server.video[::-1]
    entry = fetch(job(server.url("cut-once/a.mp4"), tmp_path / "c", retries=0))
    assert entry.path.read_bytes() == server.video


def test_room_is_made_from_what_was_used_least_recently(tmp_path):
    user = CacheUser()
    cache = Cache(tmp_path / "c", 1, user.name)
    old = Cache(tmp_path / "c", 1, "gone:0".replace("gone", user.name.partition(":")[0]))

    def put(where, key, kib):
        with where.partial(key, time.monotonic()) as folder:
            (folder / "v.mp4").write_bytes(bytes(kib << 10))
            where.publish(key, key, "r", folder / "v.mp4", {}, None)

    keys = [f"{n:016x}" for n in range(5)]
    for age, key in enumerate(keys[:3]):
        put(old, key, 400)
        os.utime(tmp_path / "c" / key, (age, age))
    put(cache, keys[3], 400)
    os.utime(tmp_path / "c" / keys[3], (0, 0))
    assert old.find(keys[0], "r") is not None  # used again: now the youngest
    (tmp_path / "c" / "holiday-photos").mkdir()
    cache.make_room()
    assert names(tmp_path / "c") == sorted([keys[0], keys[3], "holiday-photos"])
    user.close()
    cache.make_room()
    put(old, keys[4], 500)
    cache.make_room()
    assert keys[3] not in names(tmp_path / "c"), "its user is gone"


def test_one_process_at_a_time_fetches_a_video(tmp_path):
    cache = Cache(tmp_path / "c", 1, "nobody:0")
    with (
        cache.partial("k" * 16, time.monotonic()),
        pytest.raises(FetchError, match="another process"),
        cache.partial("k" * 16, time.monotonic() + 0.2),
    ):
        pass
    assert names(tmp_path / "c") == []


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("path", ["ok/a.mp4", "watch/ok/a"])
def test_private_addresses_are_refused_before_a_byte_is_sent(server, tmp_path, monkeypatch, path):
    monkeypatch.setenv("no_proxy", "localhost")
    for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
        assert fault_of(server.url(path, host), tmp_path, allow_private=False) == "private_address"
    assert server.hits == []


@pytest.mark.parametrize(
    "path", ["elsewhere/127.0.0.9/ok/a.mp4", "elsewhere/127.0.0.9/ok/a", "watch-away/a"]
)
def test_a_way_from_an_allowed_to_a_private_host_is_closed(server, tmp_path, path):
    """By a redirect of a file, of a page, and by a video that a page embeds."""
    assert fault_of(server.url(path), tmp_path, allow_private=["127.0.0.1"]) == "private_address"
    assert {hit.host for hit in server.hits} == {"127.0.0.1"}
    allowed = fetch(job(server.url(path), tmp_path, allow_private=["127.0.0.0/24"]))
    assert allowed.path.read_bytes() == server.video


def test_other_schemes_are_refused(tmp_path):
    for source in (
        "file:///etc/passwd",
        "ftp://h/a.mp4",
        "data:video/mp4,x",
        "http+unix://x/a",
        "http://[x",
    ):
        outcome = locate(source, tmp_path)
        assert isinstance(outcome, Drop)
        assert (outcome.reason, outcome.retryable) == ("refused_scheme", False)
    assert inspect_source("https://a/b").key == records.url_video_id("https://a/b")


def test_a_text_is_never_taken_for_a_video(video):
    assert is_text(b"#EXTM3U\nfile:///etc/passwd")
    assert is_text("ffconcat version 1.0\nfile 'ä'".encode()[:-2])
    assert is_text(b"\xef\xbb\xbf<html>")
    assert is_text(b"#EXTM3U\n\x00\xff\xff")
    assert not is_text(b"RIFF    AVI LIST")
    assert not is_text(video[:512])
    assert not is_text(b"\x00\x00\x00\x18ftyp")
    assert not is_text(b"\x1aE\xdf\xa3")


# -------------------------------------------------------------------------------- what is wanted


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"is_live": True}, "live"),
        ({"live_status": "is_upcoming"}, "live"),
        ({"live_status": "was_live"}, None),
        ({"age_limit": 18}, "age_limited"),
        ({"age_limit": 12}, None),
        ({"duration": 4}, "too_short"),
        ({"duration": 61}, "too_long"),
        ({"duration": 60}, None),
        ({"duration": None}, None),
        ({"formats": [{"height": 144}, {"height": 240}, {}]}, "too_small"),
        ({"formats": [{"height": 144}, {"height": 360}]}, None),
        ({"formats": [{"height": None}]}, None),
        ({"requested_formats": [{"filesize": 1 << 20}, {"filesize": 1}]}, "too_large"),
        ({"filesize": 1 << 20}, None),
    ],
)
def test_what_a_page_says_is_judged(info, reason):
    settings = FetchSettings(max_file_mb=1, min_duration_s=5, max_duration_s=60, min_height=360)
    refusal = refuse(info, settings)
    assert (refusal and refusal.reason) == reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"is_live": True}, "live"),
        ({"duration": 99.0}, "too_long"),
        ({"age_limit": 18}, "age_limited"),
    ],
)
def test_no_media_is_fetched_of_what_is_not_wanted(server, tmp_path, monkeypatch, facts, reason):
    import yt_dlp

    extract = yt_dlp.YoutubeDL.extract_info
    monkeypatch.setattr(
        yt_dlp.YoutubeDL, "extract_info", lambda *args, **more: extract(*args, **more) | facts
    )
    assert fault_of(server.url("ok/page"), tmp_path, max_duration_s=60) == reason
    assert server.paths() == ["/ok/page"]


def test_a_files_header_is_judged_where_no_page_tells(video, tmp_path):
    (tmp_path / "a.mp4").write_bytes(video)
    for settings, reason in (
        ({"min_height": 65}, "too_small"),
        ({"min_duration_s": 0.5}, "too_short"),
        ({"max_duration_s": 0.3}, "too_long"),
        ({"min_height": 64, "min_duration_s": 0.3, "max_duration_s": 0.5}, None),
    ):
        outcome = locate(str(tmp_path / "a.mp4"), tmp_path, **settings)
        assert (outcome.reason if isinstance(outcome, Drop) else None) == reason


def test_a_page_that_makes_an_extractor_stumble_costs_one_video(server, tmp_path, monkeypatch):
    import yt_dlp

    def stumble(*args, **more):
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(yt_dlp.YoutubeDL, "extract_info", stumble)
    assert fault_of(server.url("ok/page"), tmp_path) == "download_failed"


def test_what_a_page_says_can_be_stored():
    facts = facts_of(
        {"title": "half \ud83d", "tags": ["a", 1, None, "\udc00"], "categories": "one", "age_limit": 12.0,
         "license": {"a": 1}, "channel_id": 7}
    )  # fmt: skip
    pa.array([facts], pa.struct([records.VIDEO_SCHEMA.field(name) for name in facts]))
    assert facts["title"] == "half ?"
    assert (facts["tags"], facts["categories"], facts["age_limit"]) == (["a", "1", "?"], None, 12)
    assert (facts["license"], facts["channel_id"], facts["description"]) == (None, "7", None)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Video unavailable. This video has been removed by the uploader", "unavailable"),
        ("Private video. Sign in if you've been granted access to this video", "private"),
        ("Sign in to confirm you’re not a bot", "bot_check"),  # noqa: RUF001 - its own words
        ("Sign in to confirm your age", "age_limited"),
        ("HTTP Error 429: Too Many Requests", "http_429"),
        ("The uploader has not made this video available in your country", "geo"),
        ("Unable to download webpage: HTTP Error 404: Not Found", "http_4xx"),
        ("This live event will begin in 3 days.", "live"),
        ("This video is DRM protected", "drm"),
        ("Requested format is not available", "unsupported"),
        ("<urlopen error timed out>", "timeout"),
        ("something new", "download_failed"),
    ],
)
def test_what_yt_dlp_says_has_a_class(message, reason):
    from yt_dlp.utils import DownloadError, ExtractorError

    assert classify_message(message) == reason
    said: Any = ExtractorError(message, expected=True, video_id="not a bot")
    outer = DownloadError(f"ERROR: {said}", (type(said), said, None))  # type: ignore[arg-type]
    assert classify(outer).reason == reason


def test_the_ledger_learns_no_passwords_and_no_novels():
    line = one_line("\x1b[31mERROR:\x1b[0m\nfailed at http://me:secret@proxy:80/ " + "x" * 999)
    assert line.startswith("ERROR: failed at http://***@proxy:80/ x")
    assert len(line) == 300
    with pytest.raises(KeyError):
        assert FetchError("no such class", "").retryable


def test_retry_after_is_seconds_or_a_date():
    now = 784_111_777.0  # the date of RFC 9110's example
    for said, seconds in {
        "120": 120, "Sun, 06 Nov 1994 08:51:37 GMT": 120, "Sun, 06 Nov 1994 08:00:00 GMT": 0,
        "soon": None, "": None,
    }.items():  # fmt: skip
        assert retry_after_s({"Retry-After": said} if said else {}, now) == seconds


# ------------------------------------------------------------------------------------ settings


def test_proxies_take_turns_and_stay_secret(server, tmp_path):
    settings = FetchSettings.model_validate({"proxies": ["http://u:pw@a:1", "http://u:pw@b:1"]})
    assert {Visit(settings, n).proxy for n in range(2)} == {"http://u:pw@a:1", "http://u:pw@b:1"}
    assert Visit(settings, 5).proxy == Visit(settings, 7).proxy != Visit(settings, 6).proxy
    assert "pw" not in settings.model_dump_json()
    # The server stands in for a proxy, which is sent whole URLs; nobody else is asked.
    for url in ("http://8.8.8.8/ok/a.mp4", "http://8.8.8.8/ok/a"):
        fault_of(url, tmp_path, proxies=[server.url("")], allow_private=False, retries=0)
    assert {hit.path for hit in server.hits} == {"http://8.8.8.8/ok/a.mp4", "http://8.8.8.8/ok/a"}
    private = "http://10.0.0.1/ok/a.mp4"
    reason = fault_of(private, tmp_path, proxies=[server.url("")], allow_private=False)
    assert reason == "private_address"


@pytest.mark.parametrize("path", ["ok/a.mp4", "ok/a"])
def test_the_environments_proxy_is_no_way_around_the_guard(server, tmp_path, monkeypatch, path):
    monkeypatch.setenv("http_proxy", server.url(""))
    assert fault_of(f"http://10.0.0.1/{path}", tmp_path, allow_private=False) == "private_address"
    assert server.hits == []
    fault_of(f"http://8.8.8.8/{path}", tmp_path, allow_private=False, retries=0)
    assert server.hits


@pytest.mark.parametrize("path", ["ok/a.mp4", "watch/ok/a"])
def test_cookies_are_sent_and_the_users_file_stays_as_it_is(server, tmp_path, path):
    cookies = tmp_path / "cookies.txt"
    cookies.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsid\tme\n")
    before = cookies.read_bytes()
    fetch(job(server.url(path), tmp_path / "c", cookies_file=str(cookies)))
    assert set(server.cookies) == {"sid=me"}
    assert cookies.read_bytes() == before
    assert [p.name for p in (tmp_path / "c").rglob("*cookies*")] == []


def test_cookies_or_a_cache_that_cannot_be_used_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("no cookies")
    for settings, said in (
        ({"cookies_file": str(tmp_path / "none.txt")}, "Cookies cannot be read"),
        ({"cookies_file": str(tmp_path / "file")}, "Cookies cannot be read"),
        ({"cache_dir": str(tmp_path / "file" / "c")}, "No cache can be kept"),
    ):
        config = DownloadStage.Config.model_validate({"cache_dir": str(tmp_path / "c")} | settings)
        with pytest.raises(ConfigError, match=said):
            DownloadStage(config).setup()


@pytest.mark.parametrize("path", ["ok/a.mp4", "ok/a"])
def test_a_download_keeps_to_its_rate(server, tmp_path, path):
    server.video = bytes(1) + os.urandom(60_000)
    begin = time.monotonic()
    fetch(job(server.url(path), tmp_path, rate_limit_mbps=0.8))
    assert time.monotonic() - begin > 0.4  # 60 kB at 100 kB/s, and one buffer


def test_settings_that_contradict_each_other_are_refused():
    for settings in (
        {"sleep_interval_s": 2, "max_sleep_interval_s": 1},
        {"min_duration_s": 2, "max_duration_s": 1},
        {"allow_private": ["intranet"]},
        {"proxies": ["proxy:8080"]},
        {
            "proxies": FetchSettings(proxies=(SecretStr("http://a"),)).model_dump(mode="json")[
                "proxies"
            ]
        },
    ):
        with pytest.raises(ValidationError):
            FetchSettings.model_validate(settings)
    assert recipe_of(FetchSettings(retries=9)) == recipe_of(FetchSettings())
    assert recipe_of(FetchSettings(max_height=9)) != recipe_of(FetchSettings())


# --------------------------------------------------------------------------- stores and files


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def test_an_object_is_fetched_under_the_hash_of_its_bytes(store, video, tmp_path):
    store.pipe("/bucket/a.mp4", video)
    request = job("memory://bucket/a.mp4", tmp_path / "c")
    entry = fetch(request)
    assert entry.path.read_bytes() == video
    assert entry.video_id == records.file_video_id(str(entry.path))
    store.pipe("/bucket/a.mp4", b"never read")
    assert fetch(request) == entry, "the cache was not used"
    forget(tmp_path / "c", entry.video_id)
    assert names(tmp_path / "c") == []


def test_objects_that_give_no_video_have_classes(store, tmp_path):
    store.pipe({"/bucket/d/empty.mp4": b"", "/bucket/large.mp4": bytes(3 << 20)})
    store.pipe("/bucket/text.mp4", b"words")
    for name, reason in {
        "none.mp4": "missing_file", "d": "missing_file", "d/empty.mp4": "empty_file",
        "large.mp4": "too_large", "text.mp4": "not_a_video",
    }.items():  # fmt: skip
        assert fault_of(f"memory://bucket/{name}", tmp_path) == reason

    class Guarded(io.RawIOBase):
        def seek(self, *args):
            raise PermissionError("not yours")

    store.pipe("/bucket/secret.mp4", b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "open", lambda *args, **more: Guarded())
        assert fault_of("memory://bucket/secret.mp4", tmp_path) == "permission"


def test_a_store_without_its_package_is_a_users_mistake(tmp_path, monkeypatch):
    def missing(*args, **more):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("dataengine.fetch.objects.fsspec.url_to_fs", missing)
    with pytest.raises(DependencyError, match="s3fs"):
        fetch(job("s3://bucket/a.mp4", tmp_path))


def test_local_files_are_used_where_they_lie(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"x")
    (tmp_path / "a.de.srt").write_text("1\n00:00:01,000 --> 00:00:02,500\nGuten <i>Tag</i>\n")
    outcome = locate(str(video), tmp_path / "cache")
    assert isinstance(outcome, Kept)
    row = outcome.rows[0]
    assert row["_path"] == str(video)
    assert row["video_id"] == records.file_video_id(str(video))
    assert row["_subtitles"] == [
        {
            "language": "de",
            "start_ms": 1000,
            "end_ms": 2500,
            "text": "Guten Tag",
            "origin": "sidecar",
        }
    ]
    missing = locate(str(tmp_path / "b.mp4"), tmp_path)
    assert isinstance(missing, Drop)
    assert missing.reason == "missing_file"
    (tmp_path / "big.mp4").write_bytes(bytes(2 << 20))
    big = locate(str(tmp_path / "big.mp4"), tmp_path)
    assert isinstance(big, Drop)
    assert big.reason == "too_large"
    again = locate(str(video), tmp_path, refusal={"reason": "duplicate", "detail": "x"})
    assert isinstance(again, Drop)
    assert again.reason == "duplicate"


# ------------------------------------------------------------------------------- the process


@pytest.fixture(scope="module")
def process():
    process = FetchProcess()
    yield process
    process.close()


def test_the_stage_fetches_in_a_process_of_its_own(server, tmp_path):
    config = DownloadStage.Config.model_validate(QUICK | {"cache_dir": str(tmp_path / "c")})
    stage = DownloadStage(config)
    stage = pickle.loads(pickle.dumps(stage))
    stage.setup()
    rows = [
        {"_video": {"source": server.url(path), "attempts": None}, "_refusal": None}
        for path in ("ok/a.mp4", "missing/a.mp4", "full/a.mp4")
    ]
    kept, dropped, failed = stage.process(rows)
    assert isinstance(kept, Kept)
    assert kept.rows[0]["source_url"] == server.url("ok/a.mp4")
    assert kept.rows[0]["_video"]["file_bytes"] == len(server.video)
    assert dropped == Drop("http_4xx", "HTTP 404", False)
    assert failed == Drop("http_429", "HTTP 429", True)


def test_a_fetch_that_hangs_or_dies_takes_nobody_along(server, tmp_path, process, monkeypatch):
    monkeypatch.setattr("dataengine.fetch.process._GRACE_S", -0.5)
    with pytest.raises(FetchError, match="was stopped"):
        process.fetch(job(server.url("stall/a.mp4"), tmp_path, timeout_s=60, fetch_timeout_s=2))
    monkeypatch.setattr("dataengine.fetch.process._GRACE_S", 10)
    assert process.fetch(job(server.url("ok/a.mp4"), tmp_path)).path.exists()
    child = process._child
    child.kill()
    child.wait()
    assert process.fetch(job(server.url("ok/b.mp4"), tmp_path)).path.exists()


def test_the_process_does_not_outlive_who_asked_it(server, tmp_path):
    request = job(server.url("stall/a.mp4"), tmp_path, timeout_s=60)
    code = (
        "import sys; from dataengine.fetch import process; from dataengine.fetch.fetcher import Job\n"
        "process.FetchProcess().fetch(Job.model_validate_json(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, request.model_dump_json()])
    while not server.hits:
        time.sleep(0.01)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    child.wait(timeout=10)


def test_the_process_says_what_is_missing_or_wrong(server, tmp_path, process):
    with pytest.raises(DependencyError, match="s3fs"):
        process.fetch(job("s3://bucket/a.mp4", tmp_path))
    request = job(server.url("bomb/a"), tmp_path, memory_mb=256, timeout_s=10)
    with pytest.raises(FetchError, match="out_of_memory"):
        process.fetch(request)
    assert process.fetch(job(server.url("ok/a"), tmp_path)).path.exists()


def test_a_part_that_is_whole_is_not_fetched_again(server, tmp_path):
    (tmp_path / "video.part").write_bytes(server.video)
    (tmp_path / "part.json").write_text(f'{{"tag": "1", "total": {len(server.video)}}}')
    with Visit(FetchSettings(allow_private=True)) as visit:
        path = fetch_file(server.url("ok/a.mp4"), tmp_path, ".mp4", visit)
    assert (Path(path).read_bytes(), server.hits) == (server.video, [])


def test_credentials_in_a_url_stay_out_of_the_shards(server, tmp_path):
    url = server.url("ok/a.mp4")
    stage = DownloadStage(DownloadStage.Config(cache_dir=str(tmp_path), allow_private=True))
    stage.setup()
    video = {"source": url.replace("://", "://user:secret@"), "video_id": None}
    (outcome,) = stage.process([{"_video": video, "_refusal": None}])
    assert isinstance(outcome, Kept)
    assert outcome.rows[0]["source_url"] == url


def test_the_documented_classes_are_those_there_are():
    table = Path("docs/fetching.md").read_text().split("## How a fetch may end")[1].split("## ")[0]
    documented = {}
    for line in (line for line in table.splitlines() if line.startswith("| `")):
        names, *_, passes = (cell.strip() for cell in line.strip("|").split("|"))
        documented |= {name: passes == "yes" for name in re.findall(r"`(\w+)`", names)}
    assert documented == {name: retryable for name, (_, retryable) in CLASSES.items()}
