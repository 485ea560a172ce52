# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dataengine.errors import EngineError
from training.ray_train import _own_error


def test_own_error_is_found_inside_rays():
    inner = EngineError("no such corpus", "give another")
    outer = RuntimeError("Ray says")
    outer.worker_failures = {0: RuntimeError("a worker"), 1: inner}  # pyright: ignore[reportAttributeAccessIssue]
    assert _own_error(outer) is inner
    assert _own_error(RuntimeError("something else")) is None


def losses(output):
    path = output / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_lost_worker_is_replaced_and_nothing_changes(shapes_corpus, recipe, repository, tmp_path):
    # Long enough for a worker to be lost on the way.
    config = recipe(optim__steps=400, run__log_every=1, run__checkpoint_every=20)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "training", str(path), "--data", shapes_corpus, "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    common = {"cwd": repository, "env": environment}
    subprocess.run([*command, str(tmp_path / "alone")], check=True, capture_output=True, **common)

    over_ray = [*command, str(tmp_path / "ray"), "--ray", "local", "--num-workers", "2"]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(over_ray, stdout=log, stderr=log, **common) as process:
        while len(losses(tmp_path / "ray")) < 60:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        worker = next(pid for pid in descendants(process.pid) if "RayTrainWorker" in title(pid))
        os.kill(worker, signal.SIGKILL)
        assert process.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    assert "resumed from" in (tmp_path / "log").read_text()
    assert losses(tmp_path / "ray") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert (tmp_path / "ray" / "model" / "model.safetensors").is_file()


def descendants(pid):
    psutil = pytest.importorskip("psutil")
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def title(pid):
    try:
        return open(f"/proc/{pid}/cmdline").read()
    except OSError:
        return ""
