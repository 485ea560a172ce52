# SPDX-License-Identifier: Apache-2.0
"""Who may import whom; docs/architecture.md says why."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "dataengine/records.py": ("dataengine.", "ray", "torch", "av"),
    "dataengine/errors.py": ("dataengine.", "ray", "torch", "av"),
    "dataengine/corpus.py": ("ray", "torch", "av", "duckdb", "dataengine.stage"),
    "dataengine/media.py": ("ray", "dataengine.stages", "dataengine.models", "dataengine.runner"),
    "dataengine/models/*.py": ("ray", "dataengine.stages", "dataengine.runner"),
    "dataengine/fetch/*.py": (
        *("ray", "av", "dataengine.stages", "dataengine.models", "dataengine.runner"),
        "dataengine.corpus",
    ),
    "dataengine/stages/*.py": ("ray", "av", "dataengine.runner", "dataengine.corpus"),
    "dataengine/**/*.py": ("training",),
    "training/**/*.py": ("ray", "dataengine.stages", "dataengine.models", "dataengine.runner"),
}
ONLY_RAY = {"dataengine/runner.py"}
ONLY_RAY_TRAIN = "training/ray_train.py"
ONLY_AV = {"dataengine/media.py", "dataengine/cut.py"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reaches(name: str, forbidden: str) -> bool:
    return (
        name.startswith(forbidden)
        if forbidden.endswith(".")
        else (name == forbidden or name.startswith(forbidden + "."))
    )


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_imports_go_one_way(pattern):
    paths = sorted(ROOT.glob(pattern))
    assert paths
    for path in paths:
        if path == ROOT / ONLY_RAY_TRAIN:
            continue  # inside a function: the trainer runs without Ray
        bad = [n for n in imports_of(path) for f in FORBIDDEN[pattern] if reaches(n, f)]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


@pytest.mark.parametrize(("module", "allowed"), [("ray", ONLY_RAY), ("av", ONLY_AV)])
def test_one_module_alone_knows_a_library(module, allowed):
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("dataengine/**/*.py")
        if any(reaches(name, module) for name in imports_of(path))
    }
    # The demo writes videos; it never reads them.
    assert {u for u in users if not u.startswith("dataengine/demo/")} <= allowed


def test_training_takes_only_the_shard_format():
    for path in ROOT.glob("training/**/*.py"):
        taken = {n for n in imports_of(path) if n.startswith("dataengine.")}
        assert {n.split(".")[1] for n in taken} <= {"records", "corpus", "errors", "networks"}, path


LIGHT = {
    "dataengine.cli": {"av", "cv2", "duckdb"},
    "dataengine.config": set(),
    "training.config": {"av"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_starting_up_is_cheap(module):
    """What the command line loads before it knows what to do must not load a model library."""
    code = f"import {module}, sys; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    heavy = {"ray", "torch", "transformers", "whisper", "open_clip", "yt_dlp", *LIGHT[module]}
    assert not heavy & set(loaded)
