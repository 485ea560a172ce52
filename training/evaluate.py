# SPDX-License-Identifier: Apache-2.0
"""``python -m training.evaluate CHECKPOINT --data CORPUS``: retrieval on the held-out clips."""

import argparse
import sys
from pathlib import Path

from training.console import is_main_process, run_command, say


def main(arguments: list[str] | None = None) -> int:
    """Prints retrieval of a checkpoint on a corpus; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Prints text-video retrieval of a trained checkpoint.",
    )
    parser.add_argument("checkpoint", type=Path, help="a run's --output folder, or a checkpoint")
    parser.add_argument("--data", required=True, metavar="CORPUS[#SUBSET]")
    parser.add_argument(
        "--all",
        action="store_true",
        help="use every clip, for a corpus the model was not trained on",
    )
    given = parser.parse_args(arguments)

    def print_retrieval() -> None:
        from dataengine.corpus import Corpus
        from dataengine.errors import ConfigError
        from training import checkpoint
        from training.data.index import open_index, split_by_video
        from training.distributed import start
        from training.evaluation.encode import evaluate
        from training.models import build_model
        from training.trainer import held_out_batches

        folder = checkpoint.locate(given.checkpoint)
        config = checkpoint.read_config(folder)
        index = open_index(given.data, config.data.caption)
        if not given.all:
            index = index.take(split_by_video(index, config.data.held_out)[1])
        if not len(index):
            raise ConfigError(
                f"No held-out clip in {given.data} at data.held_out={config.data.held_out}",
                "--all evaluates on every clip",
            )
        with start() as world:
            model = build_model(config.model).to(world.device)
            checkpoint.load_weights(folder, model)
            is_remote = not Corpus(index.url).is_local
            batches = held_out_batches(index, config, world, is_remote)
            retrieval = evaluate(model, batches, config.model, world)
        if is_main_process() and retrieval:
            say(f"{folder} on {len(index)} clips of {index.num_videos} videos")
            for line in retrieval.lines():
                say(line)
            say(retrieval.headline())

    return run_command(print_retrieval)


if __name__ == "__main__":
    sys.exit(main())
