# SPDX-License-Identifier: Apache-2.0
"""One URL -> one cache entry: picks who fetches it, keeps what is fetched, clears what is of no use."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dataengine import records
from dataengine.fetch.cache import Cache, Entry
from dataengine.fetch.content import refuse_text
from dataengine.fetch.faults import FetchError, classify_os_error
from dataengine.fetch.http import fetch_file
from dataengine.fetch.objects import SCHEMES, fetch_object
from dataengine.fetch.session import Visit
from dataengine.fetch.settings import NEUTRAL, FetchSettings
from dataengine.stage import Settings


class Job(Settings):
    """What is asked of a process that fetches; travels to it as JSON."""

    source: str
    """URL as listed."""
    suffix: str = ""
    """Of a video file, where the URL ends like one; empty for a page."""
    number: int = 0
    """Of the attempt; moves on to the next proxy."""
    user: str
    """Name of the `CacheUser` that will read the file."""
    fetch: FetchSettings


@dataclass(frozen=True)
class Source:
    """What a URL says about itself.

    Attributes:
        key: Its name in the cache; the video's id, unless that is a hash of the bytes.
        is_object: Whether an object store has it.
    """

    key: str
    is_object: bool


def inspect_source(source: str) -> Source:
    """Returns how a URL is fetched.

    Raises:
        FetchError: ``refused_scheme`` for anything but HTTP and object stores.
    """
    try:
        scheme = urlsplit(source).scheme.lower()
    except ValueError as error:  # such as an unclosed bracket
        raise FetchError("refused_scheme", f"no URL: {error}") from None
    if scheme in ("http", "https"):
        return Source(records.url_video_id(source), is_object=False)
    if scheme in SCHEMES:
        return Source(records.digest(source), is_object=True)
    raise FetchError("refused_scheme", f"{scheme}: is not fetched")


def suffix_of(url: str) -> str:
    """Returns the suffix of a URL's path in lower case, empty if there is none."""
    return Path(unquote(urlsplit(url).path)).suffix.lower()


def recipe_of(settings: FetchSettings) -> str:
    """Returns a hash of the settings that decide which file is fetched, and what with it."""
    return records.digest(settings.model_dump_json(exclude=set(NEUTRAL) | {"resources"}))


def fetch(job: Job) -> Entry:
    """Fetches a video into the cache.

    Raises:
        FetchError: With the class of what went wrong.
        DependencyError: If the source's store needs a package that is missing.
    """
    settings = job.fetch
    source = inspect_source(job.source)
    cache = Cache(settings.cache_dir, settings.cache_mb, job.user)
    recipe = recipe_of(settings)
    if source.is_object:
        # A store's end point and credentials are the user's own, often in a private network.
        settings = settings.model_copy(update={"allow_private": True})
    number = int(records.digest(source.key), 16) + job.number
    try:
        with (
            Visit(settings, number) as visit,
            cache.partial(source.key, visit.deadline) as folder,
        ):
            entry = cache.find(source.key, recipe)  # another process may have been quicker
            if entry is not None:
                return entry
            cache.make_room()
            try:
                return _fetch_into(folder, job, source, visit, cache, recipe)
            except FetchError as error:
                _clear(folder, keep_parts=error.retryable)
                raise
            except BaseException:
                _clear(folder, keep_parts=True)
                raise
    except OSError as error:
        raise FetchError(classify_os_error(error), str(error)) from None


def _fetch_into(
    folder: Path, job: Job, source: Source, visit: Visit, cache: Cache, recipe: str
) -> Entry:
    facts: dict[str, Any] = {}
    subtitles = None
    if source.is_object:
        path = fetch_object(job.source, folder, job.suffix, visit)
    elif job.suffix:
        path = fetch_file(job.source, folder, job.suffix, visit)
    else:
        # yt-dlp takes a second to import, which plain files need not wait for.
        from dataengine.fetch.pages import fetch_page

        page = fetch_page(job.source, folder, visit)
        path, facts, subtitles = page.path, page.facts, page.subtitles
    _check_file(path, visit.settings)
    video_id = records.file_video_id(str(path)) if source.is_object else source.key
    return cache.publish(source.key, video_id, recipe, path, facts, subtitles)


def _check_file(path: Path, settings: FetchSettings) -> None:
    """Refuses what is no video for certain; whether the rest is one, decoding will say."""
    size = path.stat().st_size
    if not size:
        raise FetchError("empty_file", "no bytes")
    if size > settings.max_bytes:
        raise FetchError("too_large", f"{size >> 20} MiB")
    refuse_text(path)


def _clear(folder: Path, keep_parts: bool) -> None:
    """Empties the folder of a fetch that failed; parts stay where a later try can go on."""
    left = list(folder.iterdir())
    if keep_parts and any(path.name.endswith(".part") for path in left):
        return
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def entry_json(entry: Entry) -> str:
    """Returns an entry as JSON, to travel between processes; see `entry_of`."""
    return json.dumps([str(entry.path), entry.video_id, entry.facts, entry.subtitles])


def entry_of(text: str) -> Entry:
    """Returns the entry that a JSON text of `entry_json` stands for."""
    path, video_id, facts, subtitles = json.loads(text)
    return Entry(Path(path), video_id, facts, subtitles)
