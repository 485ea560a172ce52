# SPDX-License-Identifier: Apache-2.0
"""Source -> local file. Finds a file or fetches a URL, with the subtitles and facts around it.

Files are used where they lie. URLs that end like a video file are fetched by plain HTTP with the
status and content type checked; every other URL goes through yt-dlp. What is fetched lands in the
cache under the video's id, never under a name that the remote side chose, and appears there only
when complete.
"""

import glob
import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import Field

from dataengine import records
from dataengine.sources import VIDEO_SUFFIXES
from dataengine.stage import Drop, Kept, Outcome, Row, Stage

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
_SUBTITLE_SUFFIXES = (".srt", ".vtt")
_CHUNK_BYTES = 1 << 20

# What the messages of yt-dlp mean, first match wins: (pattern, reason, a retry may help).
_YT_DLP_REASONS: tuple[tuple[str, str, bool], ...] = (
    (r"confirm you.re not a bot|captcha", "bot_check", True),
    (r"HTTP Error 429|Too Many Requests|rate.limit", "http_429", True),
    (r"private video|login required|members.only|sign in", "private", False),
    (r"available in your (country|location)|geo.?restrict|blocked it in your", "geo", False),
    (r"age.restricted|confirm your age", "age_limited", False),
    (r"HTTP Error 4\d\d", "http_4xx", False),
    (r"HTTP Error 5\d\d", "http_5xx", True),
    (r"timed? ?out", "timeout", True),
    (r"unsupported url|no suitable extractor", "unsupported", False),
    (r"unavailable|removed|does not exist|terminated", "unavailable", False),
    (r"resolve|connection|unreachable|refused", "connection_failed", True),
)


class FetchError(Exception):
    """A source that could not be fetched; becomes a Drop."""

    def __init__(self, reason: str, detail: str, retryable: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.drop = Drop(reason, detail, retryable)


# ----------------------------------------------------------------------------- pure functions


def classify_yt_dlp(message: str) -> tuple[str, bool]:
    """Returns the drop reason that a message of yt-dlp stands for, and whether to retry it."""
    for pattern, reason, retryable in _YT_DLP_REASONS:
        if re.search(pattern, message, re.IGNORECASE):
            return reason, retryable
    return "download_failed", True


def classify_status(status: int) -> tuple[str, bool]:
    """Returns the drop reason of an HTTP status that is not a success, and whether to retry it."""
    if status == 429:
        return "http_429", True
    return ("http_5xx", True) if status >= 500 else ("http_4xx", False)


def is_direct(url: str) -> bool:
    """Returns whether a URL names a video file rather than a page about one."""
    return Path(unquote(urlsplit(url).path)).suffix.lower() in VIDEO_SUFFIXES


def subtitle_language(video_stem: str, subtitle_name: str) -> str | None:
    """Returns the language of a sidecar ``<stem>.<language>.srt``, or None if it is not one.

    ``<stem>.srt`` without a language gives ``und`` (ISO 639-2: undetermined).
    """
    base, suffix = os.path.splitext(subtitle_name)
    if suffix.lower() not in _SUBTITLE_SUFFIXES or not base.startswith(video_stem):
        return None
    rest = base[len(video_stem) :]
    if rest == "":
        return "und"
    language = rest.removeprefix(".")
    return language if rest[0] == "." and _LANGUAGE.fullmatch(language) else None


def parse_subtitles(text: str, language: str) -> list[dict[str, Any]]:
    """Returns the cues of an SRT or WebVTT text as SUBTITLE_STRUCT dicts, mark-up removed.

    Raises:
        ValueError: If the text is in neither format.
    """
    from pysubs2 import SSAFile
    from pysubs2.exceptions import Pysubs2Error

    try:
        cues = SSAFile.from_string(text)
    except Pysubs2Error as error:
        raise ValueError(str(error)) from None
    return [
        {"language": language, "start_ms": cue.start, "end_ms": cue.end, "text": line}
        for cue in cues
        if (line := " ".join(cue.plaintext.split())) and cue.end > cue.start
    ]


# --------------------------------------------------------------------------------------- stage


class DownloadStage(Stage):
    """Source row -> the same row with a local file, or a Drop that says why there is none."""

    name = "download"
    inputs = ("_video", "_refusal")
    outputs = pa.schema(
        [
            ("_video", pa.struct(list(records.VIDEO_SCHEMA))),
            ("_path", pa.string()),
            ("_subtitles", pa.list_(records.SUBTITLE_STRUCT)),
            ("video_id", pa.string()),
            ("source_url", pa.string()),
            ("title", pa.string()),
            ("description", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("categories", pa.list_(pa.string())),
        ]
    )

    class Config(Stage.Config):
        """Settings of the download stage."""

        neutral: ClassVar[frozenset[str]] = frozenset(
            {"resources", "cache_dir", "keep", "timeout_s", "retries"}
        )

        cache_dir: str = ""
        """Folder for fetched files. Empty: ``cache`` in a local corpus, else a temporary folder of
        the node, which suits pipelines whose segment stage is colocated."""
        keep: bool = False
        """Whether fetched files stay in the cache when their clips are committed."""
        max_file_mb: int = Field(default=4096, ge=1)
        """Larger files are dropped as too_large."""
        timeout_s: float = Field(default=30, gt=0)
        """Seconds without a byte after which a connection is given up."""
        retries: int = Field(default=3, ge=0)
        """Further tries of one request on a fault that may pass, with growing pauses."""
        max_height: int = Field(default=720, ge=1)
        """Pages offer several sizes: the largest up to this height is taken (InternVid: 720p)."""
        subtitles: tuple[str, ...] = ("en", "en-orig")
        """Languages of a page's subtitles to fetch, as yt-dlp patterns; ``all`` is possible."""

    config: Config

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Locates or fetches each source."""
        return [self._locate(row["_video"], row["_refusal"]) for row in batch]

    def _locate(self, video: Row, refusal: Row | None) -> Outcome:
        source = video["source"]
        if refusal:
            return Drop(refusal["reason"], refusal["detail"])
        try:
            located = self._fetch(source) if records.is_url(source) else _local(source)
            size = os.path.getsize(located["_path"])
        except FetchError as error:
            return error.drop
        except OSError as error:
            return Drop("unreadable", f"{error.strerror}: {source}")
        if size > self.config.max_file_mb << 20:
            return Drop("too_large", f"{size >> 20} MiB, limit {self.config.max_file_mb} MiB")
        facts = located.pop("facts", {})
        row = {
            "source_url": source if records.is_url(source) else Path(source).as_uri(),
            **{k: facts.get(k) for k in ("title", "description", "tags", "categories")},
            **located,
        }
        known = {name: value for name, value in facts.items() if value is not None}
        row["_video"] = {**video, **known, "video_id": row["video_id"], "file_bytes": size}
        return Kept((row,))

    def _fetch(self, url: str) -> dict[str, Any]:
        """Returns path, id, subtitles and facts of a URL's video, fetching it when not cached."""
        video_id = records.url_video_id(url)
        cache = Path(self.config.cache_dir)
        cache.mkdir(parents=True, exist_ok=True)
        if is_direct(url):
            path = cache / (video_id + Path(unquote(urlsplit(url).path)).suffix.lower())
            if not path.exists():
                self._get(url, path)
            return {"video_id": video_id, "_path": str(path)}
        return {"video_id": video_id, **self._yt_dlp(url, video_id, cache)}

    def _get(self, url: str, path: Path) -> None:
        """Downloads a file by plain HTTP."""
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        retry = Retry(
            total=self.config.retries,
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            raise_on_status=False,
        )
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        limit = self.config.max_file_mb << 20
        try:
            with requests.Session() as session:
                for scheme in ("http://", "https://"):
                    session.mount(scheme, HTTPAdapter(max_retries=retry))
                with session.get(url, stream=True, timeout=self.config.timeout_s) as answer:
                    if not answer.ok:
                        reason, retryable = classify_status(answer.status_code)
                        raise FetchError(reason, f"HTTP {answer.status_code}", retryable)
                    kind = answer.headers.get("Content-Type", "")
                    if kind.startswith("text/"):
                        raise FetchError("not_a_video", f"the server sent {kind}")
                    received = 0
                    with open(temporary, "wb") as file:
                        for chunk in answer.iter_content(_CHUNK_BYTES):
                            received += len(chunk)
                            if received > limit:
                                raise FetchError("too_large", f"over {self.config.max_file_mb} MiB")
                            file.write(chunk)
            promised = answer.headers.get("Content-Length")
            if promised and "Content-Encoding" not in answer.headers and received < int(promised):
                raise FetchError("incomplete", f"{received} of {promised} bytes", True)
            os.replace(temporary, path)
        except (requests.Timeout, TimeoutError) as error:
            raise FetchError("timeout", str(error), True) from None
        except requests.exceptions.ChunkedEncodingError as error:
            raise FetchError("incomplete", str(error), True) from None
        except requests.RequestException as error:
            reason = "timeout" if "timed out" in str(error) else "connection_failed"
            raise FetchError(reason, str(error), True) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _yt_dlp(self, url: str, video_id: str, cache: Path) -> dict[str, Any]:
        """Downloads a page's video, its subtitles and facts in one extraction."""
        import imageio_ffmpeg
        import yt_dlp
        from yt_dlp.utils import DownloadError, match_filter_func

        folder = cache / video_id
        folder.mkdir(exist_ok=True)
        height = self.config.max_height
        options: Any = {
            "format": f"bv*[height<={height}]+ba/b[height<={height}]/bv*+ba/b",
            "merge_output_format": "mp4/mkv",
            "outtmpl": {"default": str(folder / "video.%(ext)s")},
            "ffmpeg_location": imageio_ffmpeg.get_ffmpeg_exe(),
            "noplaylist": True,
            "match_filter": match_filter_func("!is_live"),
            "max_filesize": self.config.max_file_mb << 20,
            "socket_timeout": self.config.timeout_s,
            "retries": self.config.retries,
            "fragment_retries": self.config.retries,
            "writesubtitles": True,
            "writeautomaticsub": False,
            "subtitleslangs": list(self.config.subtitles),
            "subtitlesformat": "vtt/srt/best",
            "quiet": True,
            "no_warnings": True,
            "noprogress": True,
            "logger": logging.getLogger(__name__),
        }
        try:
            with yt_dlp.YoutubeDL(options) as downloader:
                info: Any = downloader.extract_info(url, download=True)
        except DownloadError as error:
            reason, retryable = classify_yt_dlp(str(error))
            raise FetchError(reason, _one_line(str(error)), retryable) from None
        downloads = (info or {}).get("requested_downloads")
        if not downloads:
            raise FetchError("filtered", "live, or larger than the limit")
        return {
            "_path": downloads[0]["filepath"],
            "_subtitles": sidecars(downloads[0]["filepath"]),
            "facts": {
                "title": info.get("title"),
                "description": info.get("description"),
                "tags": info.get("tags"),
                "categories": info.get("categories"),
                "upload_date": info.get("upload_date"),
                "license": info.get("license"),
            },
        }


def forget(cache_dir: str, video_id: str) -> None:
    """Removes what was fetched for a video."""
    for path in Path(cache_dir).glob(f"{glob.escape(video_id)}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.stem == video_id:
            path.unlink(missing_ok=True)


def _local(source: str) -> dict[str, Any]:
    """Returns path, id and subtitles of a local file."""
    if not os.path.exists(source):
        raise FetchError("missing_file", f"no such file: {source}")
    return {
        "_path": source,
        "video_id": records.file_video_id(source),
        "_subtitles": sidecars(source),
    }


def sidecars(path: str) -> list[dict[str, Any]] | None:
    """Returns the cues of all subtitle files that lie beside a video, by language; None if none.

    A subtitle file that cannot be read is passed over: the video is worth more than its subtitles.
    """
    video = Path(path)
    cues: list[dict[str, Any]] = []
    found = sorted(
        (language, entry)
        for entry in _subtitle_files(str(video.parent), os.stat(video.parent).st_mtime_ns)
        if (language := subtitle_language(video.stem, entry)) is not None
    )
    for language, name in found:
        try:
            text = (video.parent / name).read_text(encoding="utf-8-sig")
            cues += parse_subtitles(text, language)
        except (OSError, ValueError) as error:
            logging.getLogger(__name__).warning("Subtitles %s passed over: %s", name, error)
    return cues or None


@lru_cache(maxsize=16)
def _subtitle_files(folder: str, mtime_ns: int) -> tuple[str, ...]:
    """Returns the subtitle files of a folder; listed once, not once for each of its videos."""
    return tuple(name for name in os.listdir(folder) if name.lower().endswith(_SUBTITLE_SUFFIXES))


def _one_line(message: str) -> str:
    """Returns a message without colour codes and line breaks, short enough for a ledger."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split())[:300]
