# SPDX-License-Identifier: Apache-2.0
"""``python -m training RECIPE --data CORPUS``, in one process or under torchrun."""

import argparse
import sys
from pathlib import Path

import yaml

from training.config import load_recipe
from training.console import is_main_process, run_command, say


def main(arguments: list[str] | None = None) -> int:
    """Trains a recipe on a corpus and prints retrieval before and after; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Trains a model on a corpus' Parquet shards.",
        epilog="Several processes: torchrun --nproc-per-node 2 -m training RECIPE --data CORPUS",
    )
    parser.add_argument("recipe", help="a name in training/recipes, or the path of a YAML file")
    parser.add_argument(
        "--data",
        required=True,
        metavar="CORPUS[#SUBSET]",
        help="a corpus folder or fsspec URL; all of it, or CORPUS/subsets/SUBSET.parquet",
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
    given = parser.parse_args(arguments)

    def train() -> None:
        config = load_recipe(given.recipe, given.overrides)
        # Imported late: a mistake in the recipe is told at once, not after torch's seconds.
        from training.distributed import start
        from training.trainer import Trainer

        output = given.output or Path("out", "train", Path(given.recipe).stem)
        with start() as world:
            trainer = Trainer(config, given.data, output, world, resume=given.resume)
            if world.is_main:
                resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
                (output / "config.resolved.yaml").write_text(resolved)
            result = trainer.run()
        if not is_main_process():
            return
        say(f"{result.step} steps done, checkpoints in {output / 'checkpoints'}")
        for name, retrieval in (("before", result.before), ("after", result.after)):
            for line in retrieval.lines() if retrieval else ():
                say(f"{name:6}  {line}")
        if result.after:
            say(result.after.headline())

    return run_command(train)


if __name__ == "__main__":
    sys.exit(main())
