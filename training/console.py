# SPDX-License-Identifier: Apache-2.0
"""What the commands of this package share: logging to stderr, errors as a message and a hint."""

import logging
import os
import sys
from collections.abc import Callable

from dataengine.errors import EngineError


def say(line: str = "") -> None:
    """Writes a line of the answer to stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def is_main_process() -> bool:
    """Returns whether this is torchrun's first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def set_up_logging() -> None:
    """Sends log lines to stderr: progress from the first process, warnings from all."""
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        level=logging.INFO if is_main_process() else logging.WARNING,
    )
    # open_clip announces each step of loading through the root logger, huggingface_hub each file.
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: record.name != "root" or record.levelno > logging.INFO)


def run_command(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code; a user's mistake is told without a traceback."""
    # Must stand before torch is imported. By default OpenMP's threads spin while they wait for
    # each other; beside other work on the same cores a step then took 3 s instead of 0.4 s
    # (measured: clip_tiny, two cores), and alone on them sleeping costs nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    set_up_logging()
    try:
        return command() or 0
    except EngineError as error:
        if os.environ.get("DATAENGINE_DEBUG"):
            raise
        # A mistake in the recipe is every process' own; one voice is enough.
        if is_main_process() or not (error.exit_code == 2 or error.is_shared):
            sys.stderr.write(error.message + "\n")
            if error.hint:
                sys.stderr.write(f"\nhint: {error.hint}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last checkpoint\n")
        return 130
