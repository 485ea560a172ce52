# SPDX-License-Identifier: Apache-2.0
"""``python -m training RECIPE --data CORPUS``, in one process, under torchrun, or over Ray."""

import argparse
import re
import sys
from pathlib import Path

import yaml

from dataengine.errors import ConfigError
from training.config import InitConfig, SourceConfig, TrainConfig, load_recipe
from training.console import run_command, say


def main(arguments: list[str] | None = None) -> int:
    """Trains a recipe on corpora and prints retrieval before and after; returns the exit code."""
    given = _parser().parse_args(arguments)
    return run_command(lambda: _run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Trains a model on the Parquet shards of one corpus or more.",
        epilog="Several processes: torchrun --nproc-per-node 8 -m training RECIPE --data CORPUS",
    )
    parser.add_argument("recipe", help="a name in training/recipes, or the path of a YAML file")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="CORPUS[#SUBSET][=WEIGHT]",
        help="a corpus folder or fsspec URL, all of it or a subset, and how often an epoch sees each "
        "of its clips (default 1); may be repeated; replaces data.sources",
    )
    parser.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="KIND:PATH",
        help="where first weights come from: clip:, weights: or checkpoint: and a path; may be "
        "repeated; replaces init",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="overrides",
        help="replace a field of the recipe, e.g. --set optim.steps=100; may be repeated",
    )
    parser.add_argument(
        "--output", type=Path, help="where checkpoints go (default: out/train/RECIPE)"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the newest checkpoint in --output (default), or set it aside",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on from a checkpoint although the recipe now says something else",
    )
    dry = parser.add_argument_group("without training")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs, memory per GPU and the batch that fits; reads no data",
    )
    dry.add_argument("--num-gpus", type=int, help="GPUs to plan for (default: 8)")
    dry.add_argument("--gpu-memory-gb", type=float, help="memory of each, GB (default: 80)")
    dry.add_argument("--json", action="store_true", help="print the plan as JSON")
    ray = parser.add_argument_group("over Ray Train")
    ray.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster, or auto; local starts one")
    ray.add_argument("--num-workers", type=int, help="training processes (default: 1)")
    ray.add_argument(
        "--gpus-per-worker", type=float, help="default: 1 if the cluster has GPUs; 0 trains on CPUs"
    )
    ray.add_argument("--max-failures", type=int, help="restarts after a lost worker (default: 3)")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Raises ConfigError for an option that would be without effect, or of a wrong value."""
    for mode, options in (
        ("ray", ("num_workers", "gpus_per_worker", "max_failures")),
        ("dry_run", ("num_gpus", "gpu_memory_gb")),
    ):
        for option in options:
            name, value = f"--{option.replace('_', '-')}", getattr(given, option)
            if value is not None and not getattr(given, mode):
                raise ConfigError(
                    f"{name} is of use with --{mode.replace('_', '-')} alone",
                    "torchrun --nproc-per-node N -m training ... trains in N processes, --set "
                    "data.num_workers=N reads in N"
                    if option == "num_workers"
                    else "",
                )
            least = 0 if option in ("gpus_per_worker", "max_failures") else 1e-9
            if value is not None and value < least:
                raise ConfigError(f"{name} {value} is too small")
    if given.json and not given.dry_run:
        raise ConfigError("--json is of use with --dry-run alone")


def _run(given: argparse.Namespace) -> int:
    _check(given)
    config = load_recipe(given.recipe, given.overrides)
    if given.init:
        config = config.model_copy(update={"init": tuple(map(parse_init, given.init))})
    if given.data:
        sources = tuple(map(parse_source, given.data))
        data = config.data.model_copy(update={"sources": sources})
        config = config.model_copy(update={"data": data})
    if given.dry_run:
        from training.dry_run import print_plan

        num_gpus, memory_gb = given.num_gpus or 8, given.gpu_memory_gb or 80.0
        print_plan(config, num_gpus, memory_gb, as_json=given.json)
        return 0
    if not config.data.sources:
        raise ConfigError("No corpus to train on", "--data CORPUS, or data.sources in the recipe")
    output = given.output or Path("out", "train", Path(given.recipe).stem)
    if given.ray:
        from training.ray_train import train_over_ray

        return train_over_ray(
            config,
            output,
            address=given.ray,
            num_workers=given.num_workers or 1,
            gpus_per_worker=given.gpus_per_worker,
            max_failures=3 if given.max_failures is None else given.max_failures,
            resume=given.resume,
            accept_changes=given.accept_changes,
        )
    return train(config, output, resume=given.resume, accept_changes=given.accept_changes)


def train(config: TrainConfig, output: Path, *, resume: bool, accept_changes: bool = False) -> int:
    """Trains in this process, one of torchrun's or Ray's or alone; returns the exit code."""
    # Imported late: a mistake in the recipe is told at once, not after torch's seconds.
    from training.distributed import start
    from training.trainer import Trainer

    with start() as world:
        trainer = Trainer(config, output, world, resume=resume, accept_changes=accept_changes)
        if world.is_main:
            resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            (output / "config.resolved.yaml").write_text(resolved)
        result = trainer.run()
        is_main = world.is_main
    if result.stopped_by is not None:
        if is_main:
            say(f"stopped after step {result.step}; the same command goes on from there")
        return 128 + result.stopped_by
    if is_main:
        say(f"{result.step} steps done, model in {output / 'model'}")
        for name, retrieval in (("before", result.before), ("after", result.after)):
            for line in retrieval.lines() if retrieval else ():
                say(f"{name:6}  {line}")
        if result.after:
            say(result.after.headline())
    return 0


def parse_source(text: str) -> SourceConfig:
    """Returns the source that ``CORPUS[#SUBSET][=WEIGHT]`` names.

    Raises:
        ConfigError: If the weight is not positive.
    """
    found = re.fullmatch(r"(.+?)(?:=([0-9.eE+-]+))?", text, re.DOTALL)
    data, weight = (found[1], found[2]) if found else (text, None)
    try:
        number = 1.0 if weight is None else float(weight)
    except ValueError:  # a path that ends like =1.2.3
        data, number = text, 1.0
    if not number > 0:
        raise ConfigError(f"--data {text}: the weight must be above 0")
    return SourceConfig(data=data, weight=number)


def parse_init(text: str) -> InitConfig:
    """Returns what ``KIND:PATH`` names.

    Raises:
        ConfigError: If the kind is unknown or there is no path.
    """
    kind, _, path = text.partition(":")
    kinds = ("clip", "weights", "checkpoint")
    if kind not in kinds or not path:
        raise ConfigError(f"--init {text}: expected KIND:PATH", f"kinds: {', '.join(kinds)}")
    return InitConfig.model_validate({"kind": kind, "path": path})


if __name__ == "__main__":
    sys.exit(main())
