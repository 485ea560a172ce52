# SPDX-License-Identifier: Apache-2.0
"""Source -> local file. Finds a file or fetches a URL, with the subtitles and facts around it.

Files are used where they lie. URLs that end like a video file are fetched by plain HTTP, objects by
their store's client, every other URL by yt-dlp; `dataengine.fetch` does it, in a process of its own.
What is fetched lands in the cache under the video's id, never under a name that the remote side
chose, and appears there only when complete. docs/fetching.md lists how a fetch may end.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa

from dataengine import media, records
from dataengine.errors import ConfigError, MediaError
from dataengine.fetch.cache import Cache, CacheUser
from dataengine.fetch.faults import FetchError, classify_os_error
from dataengine.fetch.fetcher import Job, inspect_source, recipe_of, suffix_of
from dataengine.fetch.process import FetchProcess
from dataengine.fetch.session import read_cookies
from dataengine.fetch.settings import NEUTRAL, FetchSettings
from dataengine.sources import VIDEO_SUFFIXES
from dataengine.stage import Drop, Kept, Outcome, Row, Stage
from dataengine.subtitles import sidecars

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


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

    class Config(FetchSettings, Stage.Config):
        """Settings of the download stage: those of fetching (see `FetchSettings`)."""

        neutral: ClassVar[frozenset[str]] = NEUTRAL | {"resources"}

    config: Config

    def setup(self) -> None:
        """Takes part in the cache; the process that fetches starts with the first URL.

        Raises:
            ConfigError: If the file of cookies or the cache folder cannot be used.
        """
        folder = self.config.cache_dir or os.path.join(tempfile.gettempdir(), "dataengine-cache")
        self._settings = FetchSettings.model_validate(
            {name: getattr(self.config, name) for name in FetchSettings.model_fields}
            | {"cache_dir": folder}
        )
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"No cache can be kept in {folder}: {error.strerror}",
                "set stages.download.cache_dir to a folder with room",
            ) from None
        if self._settings.cookies_file:
            try:
                read_cookies(self._settings.cookies_file)
            except OSError as error:
                raise ConfigError(
                    f"Cookies cannot be read: {error}",
                    "stages.download.cookies_file is a file in Netscape format, on every node",
                ) from None
        self._recipe = recipe_of(self._settings)
        self._user = CacheUser()
        self._process = FetchProcess()

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Locates or fetches each source."""
        return [self._locate(row["_video"], row["_refusal"]) for row in batch]

    def _locate(self, video: Row, refusal: Row | None) -> Outcome:
        source = video["source"]
        if refusal:
            return Drop(refusal["reason"], refusal["detail"])
        is_remote = _SCHEME.match(source) is not None
        try:
            row = self._fetch(source, video) if is_remote else _local(source)
            size = os.path.getsize(row["_path"])
            if size > self.config.max_bytes:
                raise FetchError("too_large", f"{size >> 20} MiB")
            self._check_picture(row["_path"])
        except FetchError as error:
            return Drop(error.reason, error.detail, error.retryable)
        except OSError as error:
            fault = FetchError(classify_os_error(error), f"{error.strerror}: {source}")
            return Drop(fault.reason, fault.detail, fault.retryable)
        facts = row.pop("facts", {})
        known = {name: value for name, value in facts.items() if value is not None}
        return Kept(
            (
                {
                    "source_url": _without_user(source) if is_remote else Path(source).as_uri(),
                    **{k: facts.get(k) for k in ("title", "description", "tags", "categories")},
                    **row,
                    "_video": {**video, **known, "video_id": row["video_id"], "file_bytes": size},
                },
            )
        )

    def _fetch(self, source: str, video: Row) -> dict[str, Any]:
        """Returns path, id, subtitles and facts of a URL's video, fetching it when not cached."""
        key = inspect_source(source).key
        cache = Cache(self._settings.cache_dir, self._settings.cache_mb, self._user.name)
        entry = cache.find(key, self._recipe)
        if entry is None:
            suffix = suffix_of(source)
            job = Job(
                source=source,
                suffix=suffix if suffix in VIDEO_SUFFIXES else "",
                number=video.get("attempts") or 0,
                user=self._user.name,
                fetch=self._settings,
            )
            entry = self._process.fetch(job)
        return {
            "_path": str(entry.path),
            "video_id": entry.video_id,
            "_subtitles": entry.subtitles,
            "facts": entry.facts,
        }

    def _check_picture(self, path: str) -> None:
        """Refuses a file by its header, where a limit is set that no page has checked.

        A file that cannot be opened passes: the stage that decodes it will name the reason.

        Raises:
            FetchError: ``too_small``, ``too_short`` or ``too_long``.
        """
        least, most = self.config.min_duration_s, self.config.max_duration_s
        if not (self.config.min_height or least or most is not None):
            return
        try:
            with media.VideoReader(path) as reader:
                info = reader.info
        except MediaError:
            return
        seconds = info.duration_ms / 1000
        if min(info.width, info.height) < self.config.min_height:
            raise FetchError("too_small", f"{info.width}x{info.height}")
        if seconds < least:
            raise FetchError("too_short", f"{seconds:g} s")
        if most is not None and seconds > most:
            raise FetchError("too_long", f"{seconds:g} s")


def _without_user(url: str) -> str:
    """Returns a URL without name and password: shards are made to be handed on."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _local(source: str) -> dict[str, Any]:
    """Returns path, id and subtitles of a local file."""
    if not os.path.exists(source):
        raise FetchError("missing_file", f"no such file: {source}")
    return {
        "_path": source,
        "video_id": records.file_video_id(source),
        "_subtitles": sidecars(source),
    }
