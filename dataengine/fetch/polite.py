# SPDX-License-Identifier: Apache-2.0
"""How often a host is asked: limits that hold for all processes of a node together.

A host sees addresses, not processes, so the limits live in the node's temporary folder: a lock
file for each video that may be fetched from a host at a time, and a file that says when the host
was last asked. Locks go with their process however it ends, so a crash blocks nobody.
"""

import fcntl
import json
import os
import random
import tempfile
import time
from pathlib import Path

from dataengine.fetch.faults import FetchError
from dataengine.records import digest

_POLL_S = 0.02
_LONGEST_PAUSE_S = 3600.0
"""A stamp further ahead is from a clock that was wrong."""


class HostLimits:
    """One process' view of the limits. It holds a place at one host at a time, never at two.

    Args:
        concurrency: Processes that may hold a place at one host.
        pause_s: Least and most seconds between two requests to one host; drawn evenly.
        folder: Where the node keeps its locks; by default a folder of the user in the temporary
            folder.
    """

    def __init__(
        self, concurrency: int, pause_s: tuple[float, float], folder: Path | None = None
    ) -> None:
        self._concurrency = concurrency
        self._pause_s = pause_s
        self._root = folder or Path(tempfile.gettempdir()) / f"dataengine-hosts-{os.getuid()}"
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._host: str | None = None
        self._place: int | None = None

    def take_turn(self, host: str, deadline: float) -> None:
        """Waits until the host may be asked: a place is free, and the pause is over.

        The place at any other host is given back first, so that nobody waits in a circle.

        Args:
            host: Name or address, without port; with the proxy's, if the host sees that.
            deadline: On `time.monotonic`.

        Raises:
            FetchError: ``timeout`` at the deadline; ``http_429`` if the host asked to be left alone
                until then.
        """
        folder = self._folder(host)
        if host != self._host:
            self.leave()
            self._place = self._free_place(folder, deadline)
            self._host = host
        with _Stamp(folder, deadline) as stamp:
            if stamp.not_before - time.time() > deadline - time.monotonic():
                raise FetchError("http_429", "the host asked for a longer pause than there is time")
            pause = random.uniform(*self._pause_s)
            _sleep(max(stamp.last + pause, stamp.not_before) - time.time(), deadline)
            stamp.last = time.time()

    def postpone(self, host: str, seconds: float, deadline: float) -> None:
        """Lets nobody on this node ask a host for some seconds: it said that it is asked too often."""
        with _Stamp(self._folder(host), deadline) as stamp:
            stamp.not_before = max(stamp.not_before, time.time() + seconds)

    def leave(self) -> None:
        """Gives the place back."""
        if self._place is not None:
            os.close(self._place)
        self._host = self._place = None

    def _folder(self, host: str) -> Path:
        folder = self._root / digest(host.lower())
        folder.mkdir(exist_ok=True)
        return folder

    def _free_place(self, folder: Path, deadline: float) -> int:
        while True:
            for index in range(self._concurrency):
                place = _try_lock(folder / f"place-{index}")
                if place is not None:
                    return place
            _sleep(_POLL_S * random.uniform(1, 3), deadline)


class _Stamp:
    """When a host was last asked, and until when it must not be; locked while in its block."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self._path = folder / "stamp"
        self._deadline = deadline
        self.last = self.not_before = 0.0

    def __enter__(self) -> "_Stamp":
        while (lock := _try_lock(self._path)) is None:
            _sleep(_POLL_S, self._deadline)
        self._lock = lock
        try:
            said = json.loads(os.pread(lock, 100, 0) or b"[0, 0]")
            latest = time.time() + _LONGEST_PAUSE_S
            self.last, self.not_before = (at if at < latest else 0.0 for at in map(float, said))
        except (ValueError, TypeError):
            pass  # written by a process that was killed in the middle
        return self

    def __exit__(self, *exc: object) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps([self.last, self.not_before]).encode(), 0)
        os.close(self._lock)


def _try_lock(path: Path) -> int | None:
    """Returns the descriptor of a file that is now locked, or None if another holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _sleep(seconds: float, deadline: float) -> None:
    """Sleeps, unless that would take longer than there is time.

    Raises:
        FetchError: ``timeout``.
    """
    if time.monotonic() + max(seconds, 0) > deadline:
        raise FetchError("timeout", "its turn at the host did not come in time")
    if seconds > 0:
        time.sleep(seconds)
