# SPDX-License-Identifier: Apache-2.0
import itertools
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import yt_dlp
from yt_dlp.utils import DownloadError

from dataengine import records
from dataengine.errors import ConfigError
from dataengine.lists import SourceColumns
from dataengine.sources import describe, expand

WATCH = "https://www.youtube.com/watch?v="


def sources_of(*words, **options):
    return [row.source for row in expand([str(word) for word in words], **options)]


# ---------------------------------------------------------------------------------------- local


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    names = ("b.mp4", "a.MKV", "deep/c.webm", "x.txt", ".d.mp4", ".hidden/e.mp4")
    for name, data in zip(names, (b"bb", b"a", b"ccc", b"?", b"", b""), strict=True):
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_gives_its_videos_in_order_and_nothing_hidden(videos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.mp4").touch()
    (videos / "link").symlink_to(tmp_path / "elsewhere")
    (videos / "link.mp4").symlink_to(tmp_path / "elsewhere" / "z.mp4")
    found = [os.path.relpath(source, videos) for source in sources_of(videos)]
    assert found == ["a.MKV", "b.mp4", "link.mp4", "deep/c.webm"]


def test_pipes_do_not_hang_and_end_by_name(videos):
    os.mkfifo(videos / "pipe.mp4")
    (videos / "list.txt").write_text("pipe.mp4\n")
    for word in (videos, videos / "list.txt", videos / "*.mp4"):
        rows = {os.path.basename(row.source): row.reason for row in expand([str(word)])}
        assert rows["pipe.mp4"] == "not_a_file"
    with pytest.raises(ConfigError, match="Not a regular file"):
        sources_of(videos / "pipe.mp4")


def test_a_name_that_is_not_utf8_is_refused_and_the_others_go_on(videos):
    with open(os.fsencode(videos) + b"/caf\xe9.mp4", "wb"):
        pass
    for word in (videos, os.fsdecode(os.fsencode(videos) + b"/c*.mp4")):
        refused = [row for row in expand([str(word)]) if row.reason]
        assert [(os.path.basename(row.source), row.reason) for row in refused] == [
            ("caf\\xe9.mp4", "bad_name")
        ]
    assert len(sources_of(videos)) == 4


def test_lists_urls_and_globs(videos):
    listing = videos / "list.txt"
    (videos / "0123456789d").write_bytes(b"a file that is called like an id")
    listing.write_text(
        "# mine\nb.mp4\n\nmissing.mp4 # gone\nhttp://Host.example/a.mp4#t=3\n"
        "https://youtu.be/0123456789a?si=x\nyoutube:0123456789b\ndeep\n0123456789c\n0123456789d\n"
        "youtu.be/0123456789e\n"
    )
    assert sources_of(listing, videos / "*.mp4") == [
        str(videos / "b.mp4"),
        str(videos / "missing.mp4"),
        "http://host.example/a.mp4",
        WATCH + "0123456789a",
        WATCH + "0123456789b",
        str(videos / "deep" / "c.webm"),
        WATCH + "0123456789c",
        str(videos / "0123456789d"),
        WATCH + "0123456789e",
        str(videos / "b.mp4"),
    ]


def test_a_glob_may_spell_out_its_suffix(videos):
    (videos / "film.bin").touch()
    (videos / "more.csv").write_text("file\nb.mp4\n")
    assert sources_of(videos / "*.bin") == [str(videos / "film.bin")]
    assert sources_of(videos / "*.csv") == [str(videos / "b.mp4")]
    assert str(videos / "film.bin") not in sources_of(videos / "*")


def test_a_folder_with_a_pattern_in_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    (folder / "v.mp4").touch()
    assert sources_of(folder) == sources_of(folder / "v.mp4") == [str(folder / "v.mp4")]
    monkeypatch.chdir(folder)
    assert sources_of("*.mp4") == [str(folder / "v.mp4")]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("{}/nothing", "No such source: .*nothing"),
        ("{}/*.mp4", "No such source"),
        ("", "Empty source"),
        ("  ", "Empty source"),
        ("youtube:short", "No such source: youtube:short .not a YouTube id"),
        ("http://[::1/a.mp4", "No such source"),
        ("nope://bucket/videos", "Not an address that can be read: nope://"),
        ("a\0b", "No such source"),
    ],
)
def test_a_word_that_stands_for_nothing_is_an_error(tmp_path, word, said):
    with pytest.raises(ConfigError, match=said) as error:
        sources_of(word.format(tmp_path))
    assert error.value.hint or "nope" in word


def test_a_bare_id_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        sources_of("dQw4w9WgXcQ")
    assert "youtube:dQw4w9WgXcQ" in error.value.hint


@pytest.mark.parametrize("length", [1, 2, 3])
def test_lists_that_name_each_other_are_an_error(tmp_path, length):
    for index in range(length):
        (tmp_path / f"{index}.txt").write_text(f"v.mp4\n./{(index + 1) % length}.txt\n")
    with pytest.raises(ConfigError, match=r"names itself: .*0\.txt -> .*0\.txt"):
        sources_of(tmp_path / "0.txt")
    (tmp_path / "end.txt").write_text("v.mp4\n")
    (tmp_path / "0.txt").write_text("end.txt\nend.txt\n")
    assert sources_of(tmp_path / "0.txt") == [str(tmp_path / "v.mp4")] * 2


def test_lists_in_lists_without_end_are_an_error(tmp_path):
    for index in range(1200):
        (tmp_path / f"{index}.txt").write_text(f"{index + 1}.txt\n")
    with pytest.raises(ConfigError, match="Lists in lists"):
        sources_of(tmp_path / "0.txt")


def test_an_error_in_a_list_says_where(tmp_path):
    (tmp_path / "inner.csv").write_text("a,b\n1,2\n")
    (tmp_path / "outer.txt").write_text("# lists\ninner.csv\n")
    with pytest.raises(ConfigError, match=r"outer\.txt, line 2: No column of .*inner\.csv"):
        sources_of(tmp_path / "outer.txt")


def test_spans_of_a_list_come_with_their_sources(videos):
    (videos / "l.csv").write_text(
        "video,start,end,caption,video_id\n"
        "b.mp4,1,2,one,\n0123456789a,3,4,two,\n,5,6,three,0123456789b\n,7,8,four,nope\n,1,2,five,\n"
        "http://[::1/,1,2,six,\ngone.mp4,2,1,seven,\n"
    )
    rows = list(expand([str(videos / "l.csv")]))
    assert [(r.source, r.start_ms, r.caption, r.bad_span, r.reason) for r in rows] == [
        (str(videos / "b.mp4"), 1000, "one", False, None),
        (WATCH + "0123456789a", 3000, "two", False, None),
        (WATCH + "0123456789b", 5000, "three", False, None),
        ("nope", 7000, "four", False, "bad_id"),
        (f"{videos / 'l.csv'}#6", None, None, False, "bad_id"),
        ("http://[::1/", 1000, "six", False, "bad_id"),
        (str(videos / "gone.mp4"), None, None, True, None),
    ]
    assert rows[0].file_bytes == 2


def test_columns_are_as_the_pipeline_says(videos):
    (videos / "l.csv").write_text("x,video\nb.mp4,gone.mp4\n")
    assert sources_of(videos / "l.csv", columns=SourceColumns(source="x")) == [
        str(videos / "b.mp4")
    ]


@pytest.mark.parametrize("limit", range(1, 6))
def test_a_limit_counts_sources_and_keeps_all_their_spans(videos, limit):
    ids = ["0123456789a", "0123456789b", "0123456789a", "0123456789c", "0123456789b"]
    (videos / "l.csv").write_text(
        "youtube_id,start,end\n" + "".join(f"{v},{i},{i + 1}\n" for i, v in enumerate(ids))
    )
    words = [str(videos / "l.csv"), str(videos), str(videos / "x.txt")]
    wanted = list(dict.fromkeys(sources_of(*words)))[:limit]
    found = sources_of(*words, limit=limit)
    assert list(dict.fromkeys(found)) == wanted
    assert [found.count(WATCH + v) for v in ids] == [
        ids.count(v) if WATCH + v in wanted else 0 for v in ids
    ]


def test_a_known_source_is_described_as_it_was_listed(videos):
    for word in (str(videos / "b.mp4"), "http://h.example/a.mp4", "youtube:0123456789a"):
        (row,) = expand([word])
        assert describe(row.source) == row
    assert describe("memory://x/a.mp4", "3-tag").source_version == "3-tag"


@pytest.mark.parametrize(
    ("url", "video"),
    [
        ("https://www.youtube.com/watch?v=dQw4w9WgXcQ&t=1", "dQw4w9WgXcQ"),
        ("https://youtu.be/dQw4w9WgXcQ", "dQw4w9WgXcQ"),
        ("https://youtube.com/shorts/dQw4w9WgXcQ", "dQw4w9WgXcQ"),
        ("https://www.youtube-nocookie.com/embed/dQw4w9WgXcQ?rel=0", "dQw4w9WgXcQ"),
        ("http://WWW.youtube.com/v/dQw4w9WgXcQ", "dQw4w9WgXcQ"),
        ("https://www.youtube.com/watch/?v=dQw4w9WgXcQ", "dQw4w9WgXcQ"),
        ("https://www.youtube.com.example.org/watch?v=dQw4w9WgXcQ", None),
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


# ------------------------------------------------------------------------------------- object stores


@pytest.fixture
def store():
    fs = fsspec.filesystem("memory")
    contents = {"b.mp4": b"bb", "a.mkv": b"a", "deep/c.mp4": b"ccc", ".h/d.mp4": b"", "n.txt": b""}
    for name, data in contents.items():
        fs.pipe(f"/bucket/videos/{name}", data)
    yield fs
    fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize("end", ["", "/"])
def test_a_prefix_gives_its_videos_in_order(store, end):
    rows = list(expand([f"memory://bucket/videos{end}"]))
    assert [row.source for row in rows] == [
        f"memory://bucket/videos/{name}" for name in ("a.mkv", "b.mp4", "deep/c.mp4")
    ]
    assert [row.stem for row in rows] == ["a", "b", "c"]
    assert all(records.is_object(row.source) and not records.is_url(row.source) for row in rows)
    before = rows[1].source_version
    assert before.startswith("2-")
    store.pipe("/bucket/videos/b.mp4", b"xx")
    assert next(expand(["memory://bucket/videos/b.mp4"])).source_version != before


def test_an_object_a_glob_and_a_list_in_a_store(store):
    names = "b.mp4\n/nowhere.mp4\n0123456789a\nhttp://h.example/x.mp4\nmemory://other/y.mp4\n"
    store.pipe("/bucket/lists/l.txt", names.encode())
    assert sources_of("memory://bucket/videos/b.mp4") == ["memory://bucket/videos/b.mp4"]
    assert sources_of("memory://bucket/videos/*.mp4") == ["memory://bucket/videos/b.mp4"]
    assert sources_of("memory://bucket/lists/l.txt") == [
        "memory://bucket/lists/b.mp4",
        "/nowhere.mp4",
        WATCH + "0123456789a",
        "http://h.example/x.mp4",
        "memory://other/y.mp4",
    ]
    with pytest.raises(ConfigError, match=r"Cannot be listed: memory://bucket/nothing"):
        sources_of("memory://bucket/nothing")
    with pytest.raises(ConfigError, match=r"List cannot be read: memory://bucket/no.csv"):
        sources_of("memory://bucket/no.csv")


def test_a_store_is_not_walked_further_than_the_limit(store, monkeypatch):
    walked = []
    real = type(store).ls
    monkeypatch.setattr(
        type(store), "ls", lambda self, path, **kw: walked.append(path) or real(self, path, **kw)
    )
    assert len(sources_of("memory://bucket/videos", limit=2)) == 2
    assert not any("deep" in path for path in walked)


def test_a_missing_driver_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for word in ("s3://bucket/videos", "s3://bucket/list.csv"):
        with pytest.raises(ConfigError, match=r"package is missing .* s3fs"):
            sources_of(word)


# ----------------------------------------------------------------------------------- over the network


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_list_may_lie_behind_a_url(server):
    folder, url = server
    (folder / "l.csv").write_text("url,start,end\na.mp4,1,2\nhttp://h.example/b.mp4,1,2\n")
    assert sources_of(f"{url}/l.csv") == [f"{url}/a.mp4", "http://h.example/b.mp4"]
    with pytest.raises(ConfigError, match=r"List cannot be fetched: .*gone\.csv .*404"):
        sources_of(f"{url}/gone.csv")


def test_a_page_that_yt_dlp_sees_as_a_playlist(server):
    folder, url = server
    items = "".join(f"<item><link>{url}/{n}.mp4</link></item>" for n in range(3))
    feed = (
        f'<?xml version="1.0"?><rss version="2.0"><channel><title>t</title>{items}</channel></rss>'
    )
    (folder / "feed.xml").write_text(feed)
    (folder / "0.mp4").write_bytes(b"\0" * 100)
    assert sources_of(f"playlist:{url}/feed.xml") == [f"{url}/{n}.mp4" for n in range(3)]
    with pytest.raises(ConfigError, match=r"Not a playlist, channel or search: .*0\.mp4"):
        sources_of(f"playlist:{url}/0.mp4")
    with pytest.raises(ConfigError, match=r"Cannot be listed: playlist:.*gone\.xml .*404"):
        sources_of(f"playlist:{url}/gone.xml")


class FakeYoutube:
    """What yt-dlp gives, unprocessed, for a channel of endless playlists and for a search."""

    pulled: list[str]

    def __init__(self, options):
        assert (options["extract_flat"], options["lazy_playlist"]) == ("in_playlist", True)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def extract_info(self, url, download, process, ie_key=None):
        assert (download, process) == (False, False)
        if url.endswith("@name"):
            return {"_type": "url", "url": "https://www.youtube.com/channel/UC1", "ie_key": "Tab"}
        if url.endswith("UC1"):
            tabs = [f"https://www.youtube.com/channel/UC1/{tab}" for tab in ("videos", "shorts")]
            return {"_type": "playlist", "entries": [{"_type": "url", "url": tab} for tab in tabs]}
        if "broken" in url:
            raise DownloadError("ERROR: [youtube] the playlist does not exist")
        return {"_type": "playlist", "entries": self._videos(url.rpartition("/")[2])}

    def _videos(self, name):
        for index in itertools.count():
            video = f"{name[:6]:_<6}{index:05d}"
            FakeYoutube.pulled.append(video)
            address = video if index % 2 else f"{WATCH}{video}&list=x"
            yield {"_type": "url", "ie_key": "Youtube", "id": video, "url": address}


@pytest.fixture
def youtube(monkeypatch):
    FakeYoutube.pulled = []
    monkeypatch.setattr(yt_dlp, "YoutubeDL", FakeYoutube)


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("https://www.youtube.com/@name", "videos00000"),
        ("https://www.youtube.com/channel/UC1", "videos00000"),
        ("https://m.youtube.com/playlist?list=PL1", "playli00000"),
        ("ytsearch500:red cars", "ytsear00000"),
        ("ytsearchdate7:red cars", "ytsear00000"),
        ("ytsearch:red cars", "ytsear00000"),
        ("playlist:https://other.example/show", "show__00000"),
    ],
)
def test_playlists_channels_and_searches_are_asked_for_no_more_than_the_limit(youtube, word, first):
    found = sources_of(word, limit=3)
    assert found == [WATCH + first[:-1] + str(n) for n in range(3)]
    assert len(FakeYoutube.pulled) == 3
    assert sources_of(word, "youtube:0123456789a", word, limit=1) == [WATCH + first]


def test_a_watch_page_in_a_playlist_is_one_video(youtube):
    assert sources_of(f"{WATCH}0123456789a&list=PL1") == [WATCH + "0123456789a"]
    assert FakeYoutube.pulled == []


def test_a_playlist_that_cannot_be_listed_is_named(youtube, tmp_path):
    (tmp_path / "l.txt").write_text("x.mp4\nhttps://www.youtube.com/playlist?list=broken\n")
    with pytest.raises(ConfigError, match=r"line 2: Cannot be listed: https.*broken .*not exist"):
        sources_of(tmp_path / "l.txt")


@pytest.mark.parametrize(
    ("entry", "is_refused"),
    [
        ("file:///etc/passwd", True),
        ("http://127.0.0.1:9/more.csv", True),
        ("playlist:http://127.0.0.1:9/page", True),
        ("http://127.0.0.1:9/a.mp4", False),  # the download stage judges its address
        ("/elsewhere/a.mp4", False),
    ],
)
def test_a_list_may_not_make_this_machine_ask_around(entry, is_refused, tmp_path):
    (tmp_path / "l.txt").write_text(f"{entry}\n")
    (tmp_path / "l.csv").write_text(f"url,start,end\n{entry},0,1\n")
    for name in ("l.txt", "l.csv"):
        (row,) = expand([str(tmp_path / name)])
        assert (row.reason == "refused_scheme") == is_refused


def test_a_list_from_afar_may_not_name_files_of_this_machine():
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/lists/l.txt", b"/etc/passwd\nfile:///etc/passwd\nmore.txt\na.mp4\n")
    rows = list(expand(["memory://lists/l.txt"]))
    assert [row.reason for row in rows] == ["refused_scheme"] * 3 + [None]
    assert rows[3].source == "memory://lists/a.mp4"
