# SPDX-License-Identifier: Apache-2.0
"""URL of an object (``s3://bucket/key``, ``gs://...``, any of fsspec's stores) -> file."""

import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from dataengine.errors import DependencyError
from dataengine.fetch.faults import FetchError, classify_os_error
from dataengine.fetch.session import Visit

SCHEMES = frozenset(["s3", "gs", "gcs", "abfs", "az", "hf", "memory"])
"""Stores that hold objects; others of fsspec's would read this machine, or fetch by themselves."""

_CHUNK_BYTES = 1 << 20


def fetch_object(url: str, folder: Path, suffix: str, visit: Visit) -> Path:
    """Fetches an object into a folder, and goes on where an earlier try has stopped.

    Args:
        url: Of the object; credentials are the store's own (environment, instance, files).
        folder: Existing, of this object alone.
        suffix: Of the file.
        visit: Settings and deadline.

    Returns:
        The file, called ``video`` with the suffix.

    Raises:
        FetchError: With the class of what went wrong.
        DependencyError: If the store's package is not installed.
    """
    part, note = folder / "video.part", folder / "part.txt"
    tries = 0
    while True:
        try:
            _copy(url, part, note, visit)
            break
        except FetchError as error:
            if not error.retryable or tries >= visit.settings.retries:
                raise
        visit.pause(tries)
        tries += 1
    target = folder / f"video{suffix}"
    os.replace(part, target)
    note.unlink(missing_ok=True)
    return target


def _copy(url: str, part: Path, note: Path, visit: Visit) -> None:
    try:
        store, path = fsspec.url_to_fs(url)
        facts = store.info(path)
        if facts["type"] != "file":
            raise FetchError("missing_file", "a folder of the store, not an object")
        size = int(facts["size"])
        if size > visit.settings.max_bytes:
            raise FetchError("too_large", f"{size >> 20} MiB")
        if size == 0:
            raise FetchError("empty_file", "the object has no bytes")
        # Whatever the store knows of a version: an object that was replaced starts anew.
        version = f"{size} {facts.get('ETag') or facts.get('etag') or facts.get('created', '')}"
        known = note.read_text() if note.exists() else None
        have = part.stat().st_size if known == version and part.exists() else 0
        note.write_text(version)
        begin, before = time.monotonic(), have
        with store.open(path, "rb") as source, open(part, "ab" if have else "wb") as file:
            source.seek(have)
            while chunk := source.read(_CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                visit.check_time()
                if rate := visit.settings.bytes_per_s:
                    ahead_s = (have - before) / rate - (time.monotonic() - begin)
                    time.sleep(max(0.0, min(ahead_s, visit.deadline - time.monotonic())))
    except FetchError:
        raise
    except (ImportError, ValueError) as error:
        scheme = urlsplit(url).scheme
        raise DependencyError(
            f"Sources on {scheme}:// cannot be read: {error}",
            "install the store's fsspec package (s3fs, gcsfs, adlfs)",
        ) from None
    except OSError as error:
        raise FetchError(classify_os_error(error), str(error)) from None
    except Exception as error:  # noqa: BLE001 - stores raise what their client libraries raise
        raise FetchError("download_failed", f"{type(error).__name__}: {error}") from None
    if have < size:
        raise FetchError("incomplete", f"{have} of {size} bytes")
