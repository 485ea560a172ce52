# SPDX-License-Identifier: Apache-2.0
"""The process that fetches: one child of each actor, which can be stopped and bounded as a whole.

Remote pages, a large library and ffmpeg work on each other here. In a process of their own, a
fetch that hangs is killed with all its children at the end of its time, one that eats memory ends
alone, and the rules about private addresses (`guard`) bind nothing else.

Jobs and answers are lines of JSON: ``fetched``, ``fault`` (reason, detail), ``missing`` (a package)
or ``bug`` (a traceback).
"""

import contextlib
import json
import logging
import os
import queue
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback

from dataengine.errors import DependencyError
from dataengine.fetch.cache import Entry
from dataengine.fetch.faults import FetchError
from dataengine.fetch.fetcher import Job, entry_json, entry_of, fetch

_GRACE_S = 10.0
"""Time after a fetch's own deadline to end by itself."""


class FetchProcess:
    """A child process that fetches one video at a time; started when first needed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def fetch(self, job: Job) -> Entry:
        """Lets the child fetch a video.

        Raises:
            FetchError: With the class of what went wrong.
            DependencyError: If a package is missing.
            RuntimeError: With a traceback, for a fault in this program.
        """
        if self._child is None or self._child.poll() is not None:
            self._child = _start()
        try:
            line = self._ask(self._child, _to_json(job), job.fetch.fetch_timeout_s + _GRACE_S)
        except BaseException:
            self.close()
            raise
        kind, said = json.loads(line)
        match kind:
            case "fetched":
                return entry_of(said)
            case "fault":
                raise FetchError(*said)
            case "missing":
                raise DependencyError(*said)
            case _:
                raise RuntimeError(said)

    def _ask(self, child: "subprocess.Popen[bytes]", job: str, timeout_s: float) -> bytes:
        assert child.stdin is not None
        assert child.stdout is not None
        deadline = time.monotonic() + timeout_s
        answer = b""
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            try:
                child.stdin.write(job.encode() + b"\n")
                child.stdin.flush()
            except BrokenPipeError:
                raise FetchError("fetch_crashed", _how_it_ended(child)) from None
            while not answer.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise FetchError("timeout", "hung past its time, and was stopped")
                piece = os.read(child.stdout.fileno(), 1 << 16)
                if not piece:
                    raise FetchError("fetch_crashed", _how_it_ended(child))
                answer += piece
        return answer

    def close(self) -> None:
        """Ends the child and its children."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()

    def __del__(self) -> None:
        self.close()


def _start() -> "subprocess.Popen[bytes]":
    quiet = None if os.environ.get("DATAENGINE_DEBUG") else subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-m", "dataengine.fetch.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=quiet,
        start_new_session=True,  # so that it can be ended with its children
        bufsize=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def _how_it_ended(child: "subprocess.Popen[bytes]") -> str:
    try:
        code = child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _to_json(job: Job) -> str:
    """Returns a job as JSON with its proxies' passwords, which pydantic hides otherwise."""
    fields = job.model_dump(mode="json")
    fields["fetch"]["proxies"] = [secret.get_secret_value() for secret in job.fetch.proxies]
    return json.dumps(fields)


# ------------------------------------------------------------------------------- in the child


def answer_to(job: Job) -> tuple[str, object]:
    """Returns the answer to a job: its kind and what it says."""
    try:
        return "fetched", entry_json(fetch(job))
    except FetchError as error:
        return "fault", (error.reason, error.detail)
    except DependencyError as error:
        return "missing", (error.message, error.hint)
    except MemoryError:
        return "fault", ("out_of_memory", f"over {job.fetch.memory_mb} MiB")
    except Exception:  # noqa: BLE001 - a fault in the program, raised again by the parent
        return "bug", traceback.format_exc()


def main() -> None:
    """Answers jobs from stdin until it is closed, which also happens when the parent dies."""
    logging.basicConfig(level=logging.WARNING)
    jobs_fd, answers_fd = os.dup(0), os.dup(1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # ffmpeg reads keys from its stdin
    os.dup2(2, 1)  # and whatever prints must not answer
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        with open(jobs_fd, "rb") as jobs:
            for line in jobs:
                lines.put(line)
        os.killpg(0, signal.SIGKILL)  # nobody waits for the answer, nor for what ffmpeg makes

    threading.Thread(target=read, daemon=True).start()
    while True:
        job = Job.model_validate_json(lines.get())
        _bound_memory(job.fetch.memory_mb)
        os.write(answers_fd, json.dumps(answer_to(job)).encode() + b"\n")


def _bound_memory(limit_mb: int) -> None:
    """Limits what this process may allocate; only Linux counts it in a way that can be bounded."""
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit_mb << 20 if hard == resource.RLIM_INFINITY else min(limit_mb << 20, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    main()
