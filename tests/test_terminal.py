# SPDX-License-Identifier: Apache-2.0
"""An ingest on a real terminal: nothing in it may wait for the keyboard."""

import contextlib
import os
import pty
import select
import signal
import sys
import time

import pytest

from dataengine.corpus import Corpus
from tests.media_factory import make_video


@pytest.mark.slow
def test_an_ingest_on_a_terminal_ends(tmp_path):
    """A child of a worker that reads from the terminal stops the worker, and with it the run."""
    make_video(tmp_path / "a.mp4", audio="aac")
    command = [sys.executable, "-m", "dataengine", "ingest", "pipelines/quickstart.yaml"]
    command += ["--sources", str(tmp_path / "a.mp4"), "--corpus", str(tmp_path / "c")]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, command)
    deadline, shown = time.monotonic() + 240, b""
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                try:
                    shown += os.read(terminal, 4096)
                except OSError:  # the terminal closes with the process
                    break
        else:
            pytest.fail(f"still running after 240 s: {shown[-500:]!r}")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown[-2000:].decode()
    finally:
        os.close(terminal)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert Corpus.open(str(tmp_path / "c")).catalog().num_rows == 3
