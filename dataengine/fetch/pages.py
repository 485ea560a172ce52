# SPDX-License-Identifier: Apache-2.0
"""URL of a page about a video -> file, subtitles and facts, in one extraction by yt-dlp.

The page is read once. What it says (on air, too long, for adults) is judged before any media is
fetched; then come the media in the chosen formats, and the chosen subtitles. All requests go
through `session.PoliteAdapter`, mounted in the session that yt-dlp itself makes.
"""

import io
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import requests
import yt_dlp
from yt_dlp.networking.exceptions import (
    HTTPError,
    IncompleteRead,
    NoSupportingHandlers,
    RequestError,
    TransportError,
)
from yt_dlp.utils import (
    ContentTooShortError,
    ExtractorError,
    GeoRestrictedError,
    UnsupportedError,
    YoutubeDLError,
)

from dataengine.fetch.content import refuse_text
from dataengine.fetch.faults import FetchError, classify_message, classify_os_error, classify_status
from dataengine.fetch.session import MAX_REDIRECTS, PoliteAdapter, Visit
from dataengine.fetch.settings import FetchSettings
from dataengine.records import digest
from dataengine.subtitles import parse_subtitles

ORIGINAL, ALL = "original", "all"
_MEDIA, _SUBTITLES = "video-", "subtitles-"
"""How names of files begin."""
_TEXT_FORMATS = ("vtt", "srt")
_NETWORK = (HTTPError, TransportError)
_SAID_BY_SITES = frozenset(
    ["bot_check", "age_limited", "private", "geo", "drm", "live", "unavailable"]
)


@dataclass(frozen=True)
class Page:
    """What a page gave.

    Attributes:
        path: The video's file.
        facts: What the page says of it: columns of VIDEO_SCHEMA.
        subtitles: SUBTITLE_STRUCT dicts, None if there are none.
    """

    path: Path
    facts: dict[str, Any]
    subtitles: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Track:
    """Subtitles that a page offers: language tag, ``manual`` or ``automatic``, yt-dlp's formats."""

    language: str
    origin: str
    formats: Sequence[Mapping[str, Any]] = field(compare=False, default=())


# ----------------------------------------------------------------------------- pure functions


def choose_subtitles(
    wanted: Sequence[str],
    spoken: str | None,
    manual: Mapping[str, Any],
    automatic: Mapping[str, Any],
) -> list[Track]:
    """Returns which subtitles to fetch: those people wrote, else what was heard in the original.

    Automatic subtitles in another language are a machine's translation of a machine's transcript,
    and are never taken where the spoken language is known.

    Args:
        wanted: Language tags; ``original`` is the spoken language, ``all`` every written one.
        spoken: Language of the video, if its page says so.
        manual: Language tag -> formats.
        automatic: The same; empty if these are not wanted. YouTube marks the original ``-orig``.

    Returns:
        One track per language, in the order wanted.
    """
    manual = {tag: formats for tag, formats in manual.items() if tag != "live_chat" and formats}
    marked = [tag.removesuffix("-orig") for tag in automatic if tag.endswith("-orig")]
    spoken = spoken or next(iter(marked), None)
    if spoken is None and len({_base(tag) for tag in manual}) == 1:
        spoken = next(iter(manual))
    tags: list[str] = []
    for word in wanted:
        if word == ALL:
            tags += manual
            continue
        language = spoken if word == ORIGINAL else word
        tag = _closest(language, manual)
        if tag is not None:
            tags.append(tag)
    tracks = [Track(tag, "manual", manual[tag]) for tag in dict.fromkeys(tags)]
    if any(spoken is None or _base(track.language) == _base(spoken) for track in tracks):
        return tracks
    languages = [spoken] if spoken else [word for word in wanted if word not in (ORIGINAL, ALL)]
    for language in languages:
        for tag in (f"{language}-orig", _closest(language, automatic)):
            if tag is not None and automatic.get(tag):
                heard = Track(tag.removesuffix("-orig"), "automatic", automatic[tag])
                return [*tracks, heard]
    return tracks


def _base(tag: str) -> str:
    return tag.split("-")[0].lower()


def _closest(language: str | None, tags: Mapping[str, Any]) -> str | None:
    """Returns the tag itself if it is there, else one of the same language."""
    if language is None or language in tags:
        return language
    return next((tag for tag in tags if _base(tag) == _base(language)), None)


def refuse(info: Mapping[str, Any], settings: FetchSettings) -> FetchError | None:
    """Returns why a video is not wanted, from what its page says of it; unknown passes."""
    if info.get("is_live") or info.get("live_status") in ("is_live", "is_upcoming"):
        return FetchError("live", str(info.get("live_status") or "is_live"))
    age = info.get("age_limit")
    if age and age > settings.age_limit:
        return FetchError("age_limited", f"for viewers of {age} years")
    seconds, most = info.get("duration"), settings.max_duration_s
    if seconds is not None and seconds < settings.min_duration_s:
        return FetchError("too_short", f"{seconds:g} s")
    if seconds is not None and most is not None and seconds > most:
        return FetchError("too_long", f"{seconds:g} s")
    heights = [f.get("height") for f in info.get("formats") or () if f.get("height")]
    if heights and max(heights) < settings.min_height:
        return FetchError("too_small", f"{max(heights)} pixels high")
    sizes = [f.get("filesize") or 0 for f in info.get("requested_formats") or [info]]
    if sum(sizes) > settings.max_bytes:
        return FetchError("too_large", f"{sum(sizes) >> 20} MiB")
    return None


def facts_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a page says, as columns of VIDEO_SCHEMA; null where it is not of their type."""
    texts = ("title", "description", "upload_date", "license", "language", "channel_id")
    facts: dict[str, Any] = {name: _text(info.get(name)) for name in texts}
    for name in ("tags", "categories"):
        words = info.get(name)
        words = words if isinstance(words, list | tuple) else ()
        facts[name] = [text for word in words if (text := _text(word))] or None
    age = info.get("age_limit")
    facts["age_limit"] = int(age) if isinstance(age, int | float) else None
    return facts


def _text(value: object) -> str | None:
    """Returns a text that can be stored: pages give halves of characters, numbers and worse."""
    if value is None or isinstance(value, list | tuple | dict):
        return None
    return str(value).encode("utf-8", "replace").decode()


def classify(error: BaseException) -> FetchError:
    """Returns the class of an error that yt-dlp has raised.

    An extractor's own words come first, then what its requests met with.
    """
    chain = list(_causes(error))

    def met(*types: type[BaseException]) -> Any:
        return next((cause for cause in chain if isinstance(cause, types)), None)

    if fault := met(FetchError):
        return fault
    said = met(ExtractorError)
    words = said.orig_msg if said else str(error).removeprefix("ERROR: ")
    if met(GeoRestrictedError):
        return FetchError("geo", words)
    if met(UnsupportedError):
        return FetchError("unsupported", words)
    if said and not isinstance(said.cause, RequestError) and not met(*_NETWORK):
        return FetchError(classify_message(words), words)
    if said and not said.cause and classify_message(words) in _SAID_BY_SITES:
        return FetchError(classify_message(words), words)
    if answer := met(HTTPError):
        if answer.redirect_loop:
            return FetchError("redirect_loop", f"more than {MAX_REDIRECTS} redirects")
        return FetchError(classify_status(answer.status), f"HTTP {answer.status}")
    if broken := met(IncompleteRead, ContentTooShortError):
        return FetchError("incomplete", str(broken))
    if scheme := met(requests.exceptions.InvalidSchema):
        return FetchError("refused_scheme", str(scheme))
    if late := met(requests.Timeout, TimeoutError):
        return FetchError("timeout", str(late))
    if lost := met(TransportError):
        return FetchError("timeout" if "timed out" in str(lost) else "connection_failed", str(lost))
    if local := met(OSError):
        return FetchError(classify_os_error(local), str(local))
    return FetchError(classify_message(words), words)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and all it stands for, outermost first."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        exc_info = getattr(current, "exc_info", None) or (None, None)
        queue += [getattr(current, "cause", None), exc_info[1]]
        queue += [current.__cause__, current.__context__]


# -------------------------------------------------------------------------------------- yt-dlp


def fetch_page(url: str, folder: Path, visit: Visit) -> Page:
    """Fetches a page's video, its subtitles and facts.

    Args:
        url: Of a page about one video, or of a file that only yt-dlp recognises.
        folder: Existing, of this video alone; what an earlier try left of the same formats is used.
        visit: Settings, deadline and turns of this video.

    Raises:
        FetchError: With the class of what went wrong.
    """
    try:
        with _downloader(visit) as downloader:
            info = _one_video(downloader, downloader.extract_info(url, download=False))
            refusal = refuse(info, visit.settings)
            if refusal:
                raise refusal
            facts = facts_of(info)
            tracks = choose_subtitles(
                visit.settings.subtitles,
                info.get("language"),
                info.get("subtitles") or {},
                (info.get("automatic_captions") or {})
                if visit.settings.automatic_subtitles
                else {},
            )
            headers = info.get("http_headers")
            path = _fetch_media(downloader, info, folder)
            cues = _fetch_subtitles(downloader, tracks, folder, headers)
            return Page(path, facts, cues or None)
    except (FetchError, MemoryError):
        raise
    except (YoutubeDLError, requests.RequestException, OSError) as error:
        raise classify(error) from None
    except Exception as error:  # noqa: BLE001 - remote content must not stop a run
        # An extractor that stumbles over what a page holds; the next video is another page.
        raise FetchError("download_failed", f"{type(error).__name__}: {error}") from None


def _downloader(visit: Visit) -> Any:
    settings = visit.settings
    height = settings.max_height

    def pause_s(n: int) -> float:
        return min(settings.backoff_s * 2**n, 60.0)

    def on_progress(status: Mapping[str, Any]) -> None:
        visit.check_time()
        if (status.get("downloaded_bytes") or 0) > settings.max_bytes:
            raise FetchError("too_large", f"over {settings.max_file_mb} MiB")
        total = status.get("total_bytes") or 0
        if total > settings.max_bytes:
            raise FetchError("too_large", f"{total >> 20} MiB")
        path = Path(status.get("filename") or "")
        if status.get("status") == "finished" and path.name.startswith(_MEDIA):
            refuse_text(path)  # before ffmpeg opens it

    cookies = None
    if settings.cookies_file:
        # yt-dlp writes its cookies back; many processes would spoil the user's file.
        cookies = io.StringIO(Path(settings.cookies_file).read_text(encoding="utf-8"))
    options: Any = {
        "format": f"bv*[height<=?{height}]+ba/b[height<=?{height}]/wv*+ba/w",
        "merge_output_format": "mp4/mkv",
        "ffmpeg_location": imageio_ffmpeg.get_ffmpeg_exe(),
        # One video of a list, and a page that is a list is told by its second entry.
        "noplaylist": True,
        "extract_flat": "in_playlist",
        "playlist_items": "1:2",
        "cookiefile": cookies,
        "proxy": visit.proxy,
        "geo_bypass": False,
        "socket_timeout": settings.timeout_s,
        "retries": settings.retries,
        "fragment_retries": settings.retries,
        "extractor_retries": settings.retries,
        "retry_sleep_functions": {"http": pause_s, "fragment": pause_s, "extractor": pause_s},
        "skip_unavailable_fragments": False,  # a video with a hole is not the video
        "ratelimit": settings.bytes_per_s,
        "external_downloader": {"default": "native"},
        "hls_prefer_native": True,
        "progress_hooks": [on_progress],
        "updatetime": False,
        "quiet": True,
        "noprogress": True,
        "color": "never",
        "logger": _Silent(),
    }
    return PoliteDownloader(visit, options)


class PoliteDownloader(yt_dlp.YoutubeDL):
    """YoutubeDL whose requests all go through the polite adapter."""

    def __init__(self, visit: Visit, options: Any) -> None:
        self._visit = visit
        super().__init__(options)

    def urlopen(self, req: Any) -> Any:
        """Sends a request; what our adapter refuses is not an error that an extractor may ignore."""
        try:
            return super().urlopen(req)
        except NoSupportingHandlers as error:
            for unexpected in error.unexpected_errors:
                raise unexpected from None
            raise

    def build_request_director(self, handlers: Any, preferences: Any = None) -> Any:
        """Leaves only HTTP by requests: what other handlers can do is not wanted here."""
        visit = self._visit

        # yt-dlp's own handler, with our adapter around the ones it mounts for each session.
        base = next(handler for handler in handlers if handler.RH_KEY == "Requests")

        class PoliteRH(base):  # type: ignore[misc, valid-type]
            def _create_instance(self, **options: Any) -> requests.Session:
                session = super()._create_instance(**options)
                session.max_redirects = MAX_REDIRECTS
                for prefix, adapter in list(session.adapters.items()):
                    session.mount(prefix, PoliteAdapter(adapter, visit))
                return session

        polite: Any = [PoliteRH]
        return super().build_request_director(polite, preferences)


class _Silent:
    """Takes yt-dlp's words; what matters of them comes as an exception."""

    def debug(self, message: str) -> None:
        logging.getLogger(__name__).debug("%s", message)

    info = warning = error = debug


def _one_video(downloader: Any, info: Any) -> dict[str, Any]:
    """Returns the only video of what a page gave.

    Raises:
        FetchError: ``playlist`` if there are more, ``unsupported`` if there is none.
    """
    if not info:
        raise FetchError("unsupported", "the page gave nothing")
    if info.get("_type", "video") not in ("playlist", "multi_video"):
        return info
    entries = list(info.get("entries") or ())
    if not entries:
        raise FetchError("unsupported", "a page without videos")
    if len(entries) > 1 or info["_type"] == "multi_video":
        raise FetchError("playlist", "a page with several videos")
    return _one_video(downloader, downloader.process_ie_result(entries[0], download=False))


def _fetch_media(downloader: Any, info: dict[str, Any], folder: Path) -> Path:
    """Downloads the chosen formats into one file.

    What an earlier try has left is continued only if it is of the same formats and sizes: names say
    so. A size that the page does not know cannot be compared, so such a file begins anew.
    """
    parts = info.get("requested_formats") or [info]
    identity = [f"{part.get('format_id')} {part.get('filesize')}" for part in parts]
    known = all(part.get("filesize") for part in parts)
    name = f"{_MEDIA}{digest(*identity)}"
    for left in folder.iterdir():
        if not (known and left.name.startswith(name)):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    downloader.params["outtmpl"]["default"] = str(folder / name).replace("%", "%%") + ".%(ext)s"
    downloader.process_info(info)
    path = Path(info.get("filepath") or "")
    if not path.is_file():
        raise FetchError("download_failed", "yt-dlp wrote no file")
    return path


def _fetch_subtitles(
    downloader: Any, tracks: Sequence[Track], folder: Path, headers: Any
) -> list[dict[str, Any]]:
    """Returns the cues of all tracks; one that cannot be had is passed over."""
    cues: list[dict[str, Any]] = []
    for index, track in enumerate(tracks):
        choice = next(
            (f for ext in _TEXT_FORMATS for f in track.formats if f.get("ext") == ext),
            track.formats[-1],
        )
        path = folder / f"{_SUBTITLES}{index}"
        try:
            if choice.get("data") is None:
                downloader.dl(str(path), {"http_headers": headers, **choice}, subtitle=True)
                text = path.read_text(encoding="utf-8-sig")
            else:
                text = choice["data"]
            cues += parse_subtitles(text, track.language, track.origin)
        except (FetchError, YoutubeDLError, OSError, ValueError) as error:
            logging.getLogger(__name__).warning("Subtitles passed over: %s", error)
    return cues
