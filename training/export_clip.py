# SPDX-License-Identifier: Apache-2.0
"""``python -m training.export_clip CHECKPOINT FOLDER``: an open_clip model others can load."""

import argparse
import sys
from pathlib import Path

from training.console import run_command, say


def main(arguments: list[str] | None = None) -> int:
    """Writes an open_clip ``local-dir`` folder from a checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export_clip",
        description="Writes a folder for open_clip.create_model_from_pretrained('local-dir:...').",
    )
    parser.add_argument("checkpoint", type=Path, help="a run's --output folder, or a checkpoint")
    parser.add_argument("folder", type=Path, help="where the model goes")
    given = parser.parse_args(arguments)

    def export() -> None:
        from dataengine.errors import ConfigError
        from training import checkpoint
        from training.config import OpenClipConfig

        checkpoint_folder = checkpoint.locate(given.checkpoint)
        config = checkpoint.read_config(checkpoint_folder).model
        if not isinstance(config, OpenClipConfig):
            raise ConfigError(
                f"{checkpoint_folder} holds a {config.kind} model, which open_clip cannot load",
                "train a recipe of kind open_clip, such as clip_tiny",
            )
        from training.models.open_clip_model import OpenClipDualEncoder, export_open_clip

        model = OpenClipDualEncoder(config)
        checkpoint.load_weights(checkpoint_folder, model)
        num_bytes = export_open_clip(model, config, given.folder)
        say(f"{given.folder}: {num_bytes / 1e6:.2f} MB, load with local-dir:{given.folder}")

    return run_command(export)


if __name__ == "__main__":
    sys.exit(main())
