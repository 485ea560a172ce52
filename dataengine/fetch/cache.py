# SPDX-License-Identifier: Apache-2.0
"""Where fetched files lie until their clips are committed: a folder of bounded size.

    CACHE/<video id>/             an entry: the file, and entry.json with all that is known of it
    CACHE/<video id>-<key>/       the same, where the id (a hash of the bytes) is known only afterwards
    CACHE/.<key>.partial/         what is being fetched, or is left of a fetch that broke off

An entry appears by one rename, complete or not at all. A process that uses entries holds a lock as
long as it lives, and each entry says who uses it, so that room is made only from what nobody does.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataengine.fetch.faults import FetchError

_KEY = re.compile(r"[0-9a-f]{16}")
_FOREIGN_S = 24 * 3600.0
"""Whether a process of another node lives cannot be seen: it is given a day."""


@dataclass(frozen=True)
class Entry:
    """A fetched video.

    Attributes:
        path: Its file.
        video_id: Its id.
        facts: What its source says of it: columns of VIDEO_SCHEMA.
        subtitles: SUBTITLE_STRUCT dicts, or None.
    """

    path: Path
    video_id: str
    facts: dict[str, Any]
    subtitles: list[dict[str, Any]] | None


class CacheUser:
    """A process that uses entries: lives as long as its lock, which goes with the process."""

    def __init__(self) -> None:
        self.name = f"{socket.gethostname()}:{uuid.uuid4().hex}"
        path = _user_file(self.name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self._lock = open(path, "w")  # noqa: SIM115 - held until the process ends
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Gives all entries free."""
        self._lock.close()
        _user_file(self.name).unlink(missing_ok=True)


class Cache:
    """A cache folder.

    Args:
        folder: Made if missing; may be shared by nodes.
        limit_mb: MiB above which leftovers are removed.
        user: Name of the `CacheUser` that entries are found and made for.
    """

    def __init__(self, folder: str | Path, limit_mb: int, user: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._limit = limit_mb << 20
        self._user = user

    def find(self, key: str, recipe: str) -> Entry | None:
        """Returns the entry of a key, fetched with the settings that ``recipe`` names, if there is one."""
        with _locked(self._folder):
            for folder in [self._folder / key, *self._folder.glob(f"*-{key}")]:
                entry = _read_entry(folder, recipe)
                if entry is not None:
                    (folder / "user").write_text(self._user)
                    os.utime(folder)
                    return entry
        return None

    @contextlib.contextmanager
    def partial(self, key: str, deadline: float) -> Iterator[Path]:
        """Gives a folder to fetch into, to one process at a time; what an earlier try left is in it.

        Raises:
            FetchError: ``timeout`` if another process holds it past the deadline.
        """
        folder = self._folder / f".{key}.partial"
        while True:
            folder.mkdir(exist_ok=True)
            lock = _open_lock(folder)
            if lock is not None:
                break
            if time.monotonic() > deadline:
                raise FetchError("timeout", "another process is fetching it")
            time.sleep(0.1)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing is left in it
            os.close(lock)

    def publish(
        self,
        key: str,
        video_id: str,
        recipe: str,
        path: Path,
        facts: dict[str, Any],
        subtitles: list[dict[str, Any]] | None,
    ) -> Entry:
        """Makes an entry of a file, which is moved; replaces an older one."""
        name = video_id if video_id == key else f"{video_id}-{key}"
        made = self._folder / f".{key}.partial" / "entry"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        os.replace(path, made / path.name)
        note = {
            "recipe": recipe,
            "file": path.name,
            "video_id": video_id,
            "facts": facts,
            "subtitles": subtitles,
        }
        (made / "entry.json").write_text(json.dumps(note))
        (made / "user").write_text(self._user)
        target = self._folder / name
        with _locked(self._folder):
            for old in [target, *self._folder.glob(f"*-{key}")]:
                shutil.rmtree(old, ignore_errors=True)
            os.replace(made, target)
        for left in (self._folder / f".{key}.partial").iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return Entry(target / path.name, video_id, facts, subtitles)

    def make_room(self) -> None:
        """Removes leftovers, the least recently used first, until the cache is within its limit.

        What a live process uses or is fetching stays, even if the limit is then exceeded.
        """
        with _locked(self._folder):
            sizes = {
                folder: _size(folder)
                for folder in sorted(self._folder.iterdir(), key=_last_used)
                if folder.is_dir() and _is_ours(folder.name)
            }
            total = sum(sizes.values())
            for folder, size in sizes.items():
                if total <= self._limit:
                    break
                if _remove_unused(folder):
                    total -= size
                    logging.getLogger(__name__).info("Made room: %s (%d bytes)", folder.name, size)


def forget(cache_dir: str | Path, video_id: str) -> None:
    """Removes what was fetched for a video, if it was."""
    folder = Path(cache_dir)
    names = [video_id, f".{video_id}.partial"]
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            begin, _, key = name.rpartition("-")
            if name in names or (begin == video_id and _KEY.fullmatch(key)):
                shutil.rmtree(folder / name, ignore_errors=True)


def _is_ours(name: str) -> bool:
    """Returns whether a folder looks like one that this module has made."""
    return name.endswith(".partial") if name.startswith(".") else len(name) >= 11


def _read_entry(folder: Path, recipe: str) -> Entry | None:
    try:
        note = json.loads((folder / "entry.json").read_text())
        path = folder / note["file"]
        if note["recipe"] != recipe or not path.is_file():
            return None
        return Entry(path, note["video_id"], note["facts"], note["subtitles"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    size = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def _remove_unused(folder: Path) -> bool:
    """Removes an entry or a partial that no live process uses; returns whether it did."""
    if folder.name.startswith("."):
        lock = _open_lock(folder)
        if lock is None:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        return True
    if not (folder / "entry.json").is_file() or _is_used(folder):
        return False  # not an entry: somebody else's folder stays
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _is_used(folder: Path) -> bool:
    try:
        name = (folder / "user").read_text()
    except OSError:
        return False
    host, _, _ = name.rpartition(":")
    if host != socket.gethostname():
        return time.time() - _last_used(folder) < _FOREIGN_S
    path = _user_file(name)
    if not path.exists():
        return False
    lock = _open_lock(path)
    if lock is None:
        return True
    path.unlink(missing_ok=True)
    os.close(lock)
    return False


def _user_file(name: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"dataengine-users-{os.getuid()}"
    return folder / name.rpartition(":")[2]


def _open_lock(path: Path) -> int | None:
    """Returns a descriptor that holds the lock of a file or folder; None if another has it."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(lock).st_ino:
        os.close(lock)  # removed, and perhaps made anew, in between
        return None
    return lock


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a cache folder for a moment: finding, making and removing entries exclude each other."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
