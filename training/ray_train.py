# SPDX-License-Identifier: Apache-2.0
"""The same training in workers of a Ray cluster, restarted by Ray Train when one is lost.

Each worker runs what torchrun's processes run. Checkpoints are the trainer's own, in ``--output``, which
all nodes must share; a restart goes on from the newest whole one.
"""

import os
from pathlib import Path
from typing import Any

from dataengine.errors import DependencyError, EngineError
from training.config import TrainConfig, config_from_dict
from training.console import say


def train_over_ray(
    config: TrainConfig,
    output: Path,
    *,
    address: str,
    num_workers: int,
    gpus_per_worker: float | None,
    max_failures: int,
    resume: bool,
    accept_changes: bool,
) -> int:
    """Trains in Ray workers and returns the exit code.

    Args:
        config: The recipe.
        output: The run's folder; every worker sees it under this path.
        address: Of a cluster, ``auto`` for the one this machine belongs to, ``local`` for a new one here.
        num_workers: Training processes.
        gpus_per_worker: 0 trains on CPUs; None takes one where the cluster has any.
        max_failures: Restarts before the run is given up.
        resume: Whether to go on from what lies in ``output``.
        accept_changes: Whether to go on with another recipe.

    Raises:
        DependencyError: If Ray is missing.
        EngineError: If there is no such cluster, or the run failed for good.
    """
    # Ray's hook would rebuild the environment of `uv run` in every worker, and hang.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise DependencyError("--ray needs Ray Train", "uv sync --extra cluster") from error
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    try:
        ray.init(address=address, **_room(address, num_workers))
    except ConnectionError as error:
        raise EngineError(f"No Ray cluster at {address}: {error}") from error
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    if not resume:
        # Once, here: a restarted worker must not set aside what it is to go on from.
        _set_aside(output)
    recipe = {
        "config": config.model_dump(mode="json"),
        "output": str(output),
        "accept_changes": accept_changes,
    }
    trainer = TorchTrainer(
        _train,
        train_loop_config=recipe,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker=(
                {"GPU": gpus_per_worker, "CPU": 1} if gpus_per_worker else {"CPU": 1}
            ),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(output),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray dresses what a worker raised in errors of many kinds
        own = _own_error(error)
        problem = own.message if own else " ".join(str(error).split())[:500]
        raise EngineError(
            f"Training over Ray failed: {problem}", own.hint if own else ""
        ) from error
    finally:
        ray.shutdown()
    say(f"model in {output / 'model'}")
    return 0


def _train(recipe: dict[str, Any]) -> None:
    """Runs in each worker, whose process group Ray Train has set up."""
    import ray.train

    from training.__main__ import train
    from training.console import set_up_logging

    context = ray.train.get_context()
    os.environ["RANK"] = str(context.get_world_rank())
    set_up_logging()
    config = config_from_dict(recipe["config"], "the recipe")
    train(config, Path(recipe["output"]), resume=True, accept_changes=recipe["accept_changes"])


def _room(address: str, num_workers: int) -> dict[str, Any]:
    """Returns options of a new cluster: Ray Train's own actors need CPUs beside the workers'."""
    return {"num_cpus": max(os.cpu_count() or 1, num_workers + 2)} if address == "local" else {}


def _set_aside(output: Path) -> None:
    from training import checkpoint
    from training.metrics import FILE

    aside = checkpoint.set_aside(output)
    if aside and (output / FILE).is_file():
        (output / FILE).rename(aside / FILE)


def _own_error(error: BaseException | None) -> EngineError | None:
    """Returns what one of our workers raised, from within Ray's error."""
    if error is None or isinstance(error, EngineError):
        return error
    for inner in getattr(error, "worker_failures", {}).values():
        if found := _own_error(inner):
            return found
    return _own_error(error.__cause__ or getattr(error, "cause", None))
