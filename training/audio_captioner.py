# SPDX-License-Identifier: Apache-2.0
"""``python -m training.audio_captioner CONFIG.yaml --data LIST --audio DIR --output DIR``."""

import argparse
import sys
from pathlib import Path

import yaml

from training.audio_caption.config import load_audio_recipe
from training.console import run_command, say


def main(arguments: list[str] | None = None) -> int:
    """Trains an audio captioner and writes its folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.audio_captioner",
        description="Tunes a Q-Former between BEATs and a language model on sounds with captions.",
    )
    parser.add_argument("config", help="a YAML file, such as training/audio_caption/wavcaps.yaml")
    parser.add_argument(
        "--data", type=Path, required=True, help="WavCaps' JSON, or JSON lines of id and caption"
    )
    parser.add_argument("--audio", type=Path, required=True, help="folder of the sounds")
    parser.add_argument("--output", type=Path, required=True, help="where the captioner goes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="overrides",
        help="replace a field of the recipe, e.g. --set optim.lr=1e-4; may be repeated",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the newest checkpoint in --output (default), or set it aside",
    )
    given = parser.parse_args(arguments)

    def train() -> None:
        config = load_audio_recipe(given.config, given.overrides)
        # Imported late: a mistake in the recipe is told at once, not after torch's seconds.
        from training.audio_caption.trainer import AudioCaptionTrainer

        trainer = AudioCaptionTrainer(
            config, given.data, given.audio, given.output, resume=given.resume
        )
        given.output.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (given.output / "config.resolved.yaml").write_text(resolved)
        losses = trainer.run()
        if losses:
            say(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at the end")
        held_out = trainer.held_out_loss()
        if held_out is not None:
            say(f"loss {held_out:.4f} on sounds held out")
        say(f"{trainer.step} steps done, captioner in {given.output}")

    return run_command(train)


if __name__ == "__main__":
    sys.exit(main())
