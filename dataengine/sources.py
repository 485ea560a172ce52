# SPDX-License-Identifier: Apache-2.0
"""What the user names with --sources: words -> rows, one by one, however many there are."""

import glob
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from dataengine import lists, records
from dataengine.errors import ConfigError

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
"""Files taken from a folder; a file named by itself is taken whatever its suffix."""

BAD_NAME, BAD_ID, NOT_A_FILE, UNREADABLE = "bad_name", "bad_id", "not_a_file", "unreadable"
REFUSED_SCHEME = "refused_scheme"
"""Why a listed source cannot be fetched: its file name is not UTF-8; it is no YouTube id, no URL
and no file; it is a pipe, socket or device; its folder cannot be listed."""

KNOWN_WORDS = (
    "expected a folder, a file, a glob, a URL, an object-store prefix such as s3://bucket/videos, "
    "youtube:ID, ytsearchN:WORDS, playlist:URL, or a .txt, .csv, .tsv, .jsonl or .parquet list"
)

_SEARCH = re.compile(r"ytsearch(date)?([1-9][0-9]*|all)?:.+", re.DOTALL)
_MOST_NESTED = 20
_SILENT = logging.Logger("playlists", logging.CRITICAL)  # what goes wrong is raised as well


class Listed(NamedTuple):
    """A source that a word stands for; of an annotation list, one row per span.

    Attributes:
        source: Absolute path or URL, written in one way however the user wrote it.
        source_version: Changes when a file's or object's content may have; empty if not known.
        file_bytes: Of a local file, or of an object that was listed by its store.
        video_id: Of a URL; a file's takes reading it.
        stem: Name without folder and suffix of a file, an object or a URL that ends like a video.
        start_ms: Of a given span; None for the whole video.
        end_ms: The same.
        caption: Given for the span.
        aesthetic_score: Given for the span.
        video_text_score: Given for the span.
        bad_span: Whether a span was given that cannot be.
        reason: Why the source must not be fetched.
        detail: More of that.
    """

    source: str
    source_version: str = ""
    file_bytes: int | None = None
    video_id: str | None = None
    stem: str | None = None
    start_ms: int | None = None
    end_ms: int | None = None
    caption: str | None = None
    aesthetic_score: float | None = None
    video_text_score: float | None = None
    bad_span: bool = False
    reason: str | None = None
    detail: str | None = None


LISTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("source_version", pa.string()),
        ("file_bytes", pa.int64()),
        ("video_id", pa.string()),
        ("stem", pa.string()),
        *records.SPAN_STRUCT,
        ("bad_span", pa.bool_()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""`Listed` as Parquet columns."""


def expand(
    words: Sequence[str],
    columns: lists.SourceColumns | None = None,
    limit: int | None = None,
) -> Iterator[Listed]:
    """Yields every source that the user's words stand for, in their order, repeats and all.

    A word is one of these:

    - A folder: all videos below it, by suffix, in order of name. Hidden files and folders are left
      out; links to folders are not followed.
    - A file, or a glob of files and folders.
    - An object-store file, prefix or glob, such as ``s3://bucket/videos``.
    - An http(s) URL of a video or of a page with one; ``youtube:ID``.
    - A YouTube playlist or channel, ``playlist:URL`` for any page that yt-dlp sees as one,
      ``ytsearchN:WORDS`` or ``ytsearchdateN:WORDS``. They are asked for ids alone, and no further
      than ``limit`` needs.
    - A list of such words, local or remote: ``.txt``, one a line, ``#`` starting a comment; or
      ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet`` with a column for the video and perhaps a span
      (`lists.SourceColumns`). Relative paths in a list are relative to the list; a bare YouTube id
      in it is one unless a file has that name.

    Args:
        words: What the user typed.
        columns: Which columns of a list say what; None finds them by name.
        limit: Gives the rows of the first so many distinct sources only.

    Raises:
        ConfigError: For a word that stands for nothing, or a list that cannot be read.
    """
    expander = _Expander(columns or lists.SourceColumns(), limit)
    for word in words:
        for row in expander.word(word, os.getcwd(), listed=False):
            if expander.admits(row.source):
                yield row


def describe(source: str, version: str = "") -> Listed:
    """Returns the row of a source that is written as `expand` does.

    Args:
        source: As in the ledger.
        version: What is known of a remote source's version; a file is asked.
    """
    row = _remote_video(source)
    return _file(source) if row is None else row._replace(source_version=version or "")


def _refused_in_list(word: str, base: str) -> Listed | None:
    """Returns the refusal of what a list must not make this machine do; None for all else.

    The user trusts what is typed. A list may come from elsewhere: it may name videos, but not files of
    this machine by URL or from afar, nor addresses that would be asked before the guard against
    private networks is up (further lists, playlists outside YouTube).
    """
    remote = not _is_local(base)
    if word.startswith("file:") or (remote and word.startswith("/")):
        return Listed(word, reason=REFUSED_SCHEME, detail="a list names a file by URL or from afar")
    if word.startswith("playlist:") and not is_playlist(word.removeprefix("playlist:")):
        return Listed(word, reason=REFUSED_SCHEME, detail="a playlist elsewhere: name it itself")
    if lists.is_list(word) and (records.is_url(word) or (remote and "://" not in word)):
        return Listed(word, reason=REFUSED_SCHEME, detail="a list inside a list: name it itself")
    return None


class _Expander:
    """Expands words; knows how many sources are still wanted and which lists are open."""

    def __init__(self, columns: lists.SourceColumns, limit: int | None) -> None:
        self._columns = columns
        self._limit = limit
        self._admitted: set[str] = set()
        self._open_lists: list[str] = []

    @property
    def _full(self) -> bool:
        return self._limit is not None and len(self._admitted) >= self._limit

    def admits(self, source: str) -> bool:
        """Returns whether a source is among the first ``limit`` distinct ones."""
        if self._limit is None or source in self._admitted:
            return True
        if self._full:
            return False
        self._admitted.add(source)
        return True

    def word(self, word: str, base: str, *, listed: bool) -> Iterator[Listed]:
        """Yields what a word stands for.

        Args:
            word: Not empty.
            base: Folder that relative paths are relative to; a URL's, in a remote list.
            listed: Whether the word stands in a list: what is missing then stays in, to end in
                the ledger by name.
        """
        if not word.strip():
            raise ConfigError("Empty source", KNOWN_WORDS)
        if listed and (refused := _refused_in_list(word, base)):
            yield refused
        elif _SEARCH.fullmatch(word) or word.startswith("playlist:") or is_playlist(word):
            yield from self._playlist(word)
        elif records.is_url(word) and lists.is_list(word):
            yield from self._list(records.canonical_url(word))
        elif records.is_object(word) and lists.is_list(word):
            yield from self._list(word)
        elif records.is_object(word) and not listed:
            yield from self._objects(word)
        elif (video := _remote_video(word)) is not None:
            if video.reason and not listed:
                raise ConfigError(f"No such source: {word} ({video.detail})", KNOWN_WORDS)
            yield video
        elif not _is_local(base) and not word.startswith(("/", "file://")):
            if records.YOUTUBE_ID.fullmatch(word):
                yield _youtube(word)
            else:
                yield from self.word(f"{base}/{word}", base, listed=True)
        else:
            yield from self._path(word, base, listed)

    def _path(self, word: str, base: str, listed: bool) -> Iterator[Listed]:
        """Yields what a path on this machine stands for."""
        path = _local_path(word, base)
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError):
            yield from self._missing(word, base, listed)
            return
        if stat.S_ISDIR(mode):
            yield from self._folder(path)
        elif stat.S_ISREG(mode) and lists.is_list(path):
            yield from self._list(path)
        elif stat.S_ISREG(mode) or listed:
            yield _file(path)
        else:
            raise ConfigError(f"Not a regular file: {word}", KNOWN_WORDS)

    def _missing(self, word: str, base: str, listed: bool) -> Iterator[Listed]:
        """Yields what a word that is no path stands for."""
        pattern = _local_path(word, glob.escape(base))
        if glob.has_magic(word) and (matches := sorted(glob.glob(pattern, recursive=True))):
            # A suffix that the pattern spells out is what the user wants, whatever it is.
            spelt = lists.suffix(word)
            for match in matches:
                if os.path.isdir(match):
                    yield from self._folder(match)
                elif lists.suffix(match) == spelt and spelt in lists.LIST_SUFFIXES:
                    yield from self._list(match)
                elif lists.suffix(match) in (spelt, *VIDEO_SUFFIXES):
                    yield _file(match)
        elif listed and records.YOUTUBE_ID.fullmatch(word):
            yield _youtube(word)
        elif listed:
            yield _file(_local_path(word, base))
        else:
            like_id = records.YOUTUBE_ID.fullmatch(word) and not os.path.dirname(word)
            hint = f"a YouTube id is written youtube:{word}" if like_id else KNOWN_WORDS
            raise ConfigError(f"No such source: {word}", hint)

    def _folder(self, folder: str) -> Iterator[Listed]:
        """Yields the videos below a folder; a folder that cannot be read is named, not passed over."""
        closed: list[Listed] = []

        def note(error: OSError) -> None:
            row = _file(str(error.filename))
            closed.append(row._replace(reason=UNREADABLE, detail=error.strerror))

        for parent, folders, files in os.walk(folder, onerror=note):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if self._full:
                    return
                if lists.suffix(name) in VIDEO_SUFFIXES and not name.startswith("."):
                    yield _file(os.path.join(parent, name))
        yield from closed

    def _objects(self, url: str) -> Iterator[Listed]:
        """Yields the videos at an object-store URL: a file, a prefix or a glob."""
        if self._full:
            return
        fs, path = lists.file_system(url)
        try:
            if "*" in path or "[" in path:
                literal = re.split(r"[*\[]", url)[0].rpartition("/")[0]
                root = re.split(r"[*\[]", path)[0].rpartition("/")[0]
                found: Any = fs.glob(path, detail=True)
                infos = iter([found[name] for name in sorted(found)])
            else:
                literal, root = url.rstrip("/"), path.rstrip("/")
                info = fs.info(path)
                if info["type"] == "file":
                    yield _object(url, info)
                    return
                infos = _walk_objects(fs, path)
            for info in infos:
                if self._full:
                    return
                if info["type"] == "file" and lists.suffix(info["name"]) in VIDEO_SUFFIXES:
                    # The user's own spelling: a file system may forget the account in it.
                    yield _object(literal + info["name"][len(root) :], info)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"Cannot be listed: {url} ({type(error).__name__}: {error})",
                "check the address, and that this machine may read it",
            ) from error

    def _list(self, name: str) -> Iterator[Listed]:
        """Yields what the rows of a list stand for."""
        key = os.path.realpath(name) if _is_local(name) else name
        if key in self._open_lists:
            chain = " -> ".join([*self._open_lists[self._open_lists.index(key) :], key])
            raise ConfigError(f"A list that names itself: {chain}")
        if len(self._open_lists) == _MOST_NESTED:
            raise ConfigError(f"Lists in lists, {_MOST_NESTED} deep: {name}")
        self._open_lists.append(key)
        base = lists.base_of(name)
        is_text = lists.suffix(name) == ".txt"
        for entry in lists.read_list(name, self._columns):
            if self._full:
                if is_text:
                    break
                # Further rows of a table may hold more spans of what was taken already.
                if entry.start_ms is None and not entry.bad_span:
                    continue
            try:
                yield from self._entry(entry, base, name)
            except ConfigError as error:
                where = f"{name}, line {entry.line}: "
                raise ConfigError(where + error.message, error.hint) from None
        self._open_lists.pop()

    def _entry(self, entry: lists.Entry, base: str, name: str) -> Iterator[Listed]:
        """Yields what one row of a list stands for."""
        word = entry.word
        if not word:
            detail = "the row names no video"
            yield Listed(f"{name}#{entry.line}", reason=BAD_ID, detail=detail)
            return
        if entry.is_id:
            row = _youtube(word)
        elif entry.start_ms is None and not entry.bad_span:
            yield from self.word(word, base, listed=True)
            return
        else:
            row = _refused_in_list(word, base) or _remote_video(word)
            if row is None and _is_local(base):
                path = _local_path(word, base)
                is_youtube = records.YOUTUBE_ID.fullmatch(word) and not os.path.exists(path)
                row = _youtube(word) if is_youtube else _file(path)
            elif row is None:
                is_youtube = records.YOUTUBE_ID.fullmatch(word)
                joined = None if is_youtube else _remote_video(f"{base}/{word}")
                row = joined or _youtube(word)
        yield Listed(*row[:5], *entry[3:9], row.reason, row.detail)

    def _playlist(self, word: str) -> Iterator[Listed]:
        """Yields the videos of a playlist, channel or search, asking for no more than is wanted."""
        if self._full:
            return
        import yt_dlp

        options: Any = {
            "extract_flat": "in_playlist",
            "lazy_playlist": True,
            "socket_timeout": 30,
            "quiet": True,
            "no_warnings": True,
            "noprogress": True,
            "color": "never",
            # Half a playlist is no playlist.
            "extractor_args": {"youtube": {"raise_incomplete_data": ["true"]}},
            "logger": _SILENT,
        }
        try:
            with yt_dlp.YoutubeDL(options) as client:
                for address in _playlist_entries(client, word.removeprefix("playlist:"), set()):
                    yield _remote_video(address) or Listed(
                        f"{word}#{address}", reason=BAD_ID, detail="no address is given for it"
                    )
                    if self._full:
                        return
        except ConfigError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()).removeprefix("ERROR: ")[:300]
            raise ConfigError(
                f"Cannot be listed: {word} ({reason or type(error).__name__})",
                "check the address and the connection; one video needs no playlist:",
            ) from error


# --------------------------------------------------------------------------------------- remote


def is_playlist(word: str) -> bool:
    """Returns whether a word is the URL of a YouTube playlist or channel."""
    if not records.is_url(word):
        return False
    url = urlsplit(word)
    if (url.hostname or "").lower() not in records.YOUTUBE_HOSTS:
        return False
    path = url.path.rstrip("/")
    return path == "/playlist" or path.startswith(("/@", "/channel/", "/c/", "/user/"))


def _playlist_entries(client: Any, word: str, opened: set[str]) -> Iterator[str]:
    """Yields the addresses of a playlist's videos as yt-dlp finds them, page by page.

    Unprocessed results are generators: nothing is asked of a video, nor of a page before its turn.
    """
    from yt_dlp.utils import unsmuggle_url

    opened.add(word)
    info = client.extract_info(word, download=False, process=False)
    for _ in range(_MOST_NESTED):
        if not info or info.get("_type") not in ("url", "url_transparent"):
            break
        info = client.extract_info(
            info["url"], download=False, process=False, ie_key=info.get("ie_key")
        )
    if not info or info.get("_type") not in ("playlist", "multi_video"):
        raise ConfigError(
            f"Not a playlist, channel or search: {word}", "one video needs no playlist:"
        )
    for number, entry in enumerate(info["entries"], 1):
        if not entry:
            continue
        addresses = [entry.get("webpage_url"), entry.get("original_url"), entry.get("url")]
        if entry.get("_type", "video") != "video":
            addresses.reverse()
        address = unsmuggle_url(next(filter(None, addresses), str(number)))[0]
        if is_playlist(address):
            if address not in opened:  # a channel's page is made of playlists
                yield from _playlist_entries(client, address, opened)
        elif records.YOUTUBE_ID.fullmatch(address):
            yield f"youtube:{address}"
        else:
            yield address


def _remote_video(word: str) -> Listed | None:
    """Returns the one video that a URL or id is, without asking anyone; None for a local path."""
    if word.startswith("youtube:"):
        return _youtube(word.removeprefix("youtube:"))
    if records.is_object(word):
        return Listed(word, stem=_stem(word))
    if not records.is_url(word):
        if word.startswith(("http:", "https:")):
            return Listed(word, reason=BAD_ID, detail="not a URL")
        # Addresses are often copied without their scheme.
        looks_so = word.startswith(("youtu.be/", "youtube.com/", "www.youtube.com/"))
        video = records.youtube_id(f"https://{word}") if looks_so else None
        return _youtube(video) if video else None
    if video := records.youtube_id(word):
        return _youtube(video)
    url = records.canonical_url(word)
    stem = _stem(unquote(urlsplit(url).path))
    return Listed(url, video_id=records.url_video_id(url), stem=stem)


def _youtube(video: str) -> Listed:
    """Returns the row of a YouTube id, or of a URL where an id should be."""
    if not records.YOUTUBE_ID.fullmatch(video):
        found = records.youtube_id(video) if records.is_url(video) else None
        if found is None:
            return Listed(video or "youtube:", reason=BAD_ID, detail="not a YouTube id")
        video = found
    return Listed(f"https://www.youtube.com/watch?v={video}", video_id=video)


def _walk_objects(fs: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Yields the files below a prefix, folder by folder in order of name, nothing hidden."""
    folders = []
    for info in sorted(fs.ls(folder, detail=True), key=lambda info: info["name"]):
        name = info["name"].rstrip("/")
        if name.rpartition("/")[2].startswith(".") or name == folder.rstrip("/"):
            continue
        if info["type"] == "directory":
            folders.append(name)
        else:
            yield info
    for name in folders:
        yield from _walk_objects(fs, name)


def _object(url: str, info: dict[str, Any]) -> Listed:
    """Returns the row of an object; its version is its size and what the store says of its change."""
    tags = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")
    tag = next((info[key] for key in (*tags, "updated", "created") if info.get(key)), "")
    version = f"{info.get('size')}-{str(tag).strip(chr(34))}"
    return Listed(url, version, info.get("size"), stem=_stem(url))


# ---------------------------------------------------------------------------------------- local


def _file(path: str) -> Listed:
    """Returns the row of a path; one that is missing has no version, and ends in the ledger."""
    source, reason, detail = os.path.abspath(path), None, None
    try:
        status = os.stat(source)
    except (OSError, ValueError):
        status = None  # the download stage will name the reason
    try:
        source.encode()
    except UnicodeEncodeError:
        source = os.fsencode(source).decode(errors="backslashreplace")
        reason, detail = BAD_NAME, "the file's name is not UTF-8"
    if "\0" in source:
        source, reason, detail = source.replace("\0", "\\x00"), BAD_NAME, "no file has such a name"
    if status is None:
        return Listed(source, stem=_stem(source), reason=reason, detail=detail)
    if not stat.S_ISREG(status.st_mode) and not reason:
        reason, detail = NOT_A_FILE, "a folder, pipe, socket or device"
    version = f"{status.st_size}-{status.st_mtime_ns}"
    return Listed(source, version, status.st_size, stem=_stem(source), reason=reason, detail=detail)


def _local_path(word: str, base: str) -> str:
    if word.startswith("file://"):
        return unquote(urlsplit(word).path)
    return os.path.join(base, os.path.expanduser(word))


@lru_cache(maxsize=64)
def _is_local(place: str) -> bool:
    return not records.is_url(place) and not records.is_object(place)


def _stem(path: str) -> str | None:
    """Returns a video's name without folder and suffix; a suffix that is no video's stays."""
    name = path.rpartition("/")[2]
    stem, _, last = name.rpartition(".")
    return (stem if f".{last.lower()}" in VIDEO_SUFFIXES else name) or None
