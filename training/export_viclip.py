# SPDX-License-Identifier: Apache-2.0
"""``python -m training.export_viclip CHECKPOINT FOLDER``: a ViCLIP that scores clips.

The ``score_video_text`` stage loads the folder, and the checkpoint itself as well: an export is what is
worth keeping or giving away, without optimizer and recipe.
"""

import argparse
import sys
from pathlib import Path

from training.console import run_command, say


def main(arguments: list[str] | None = None) -> int:
    """Writes ``viclip_config.json`` and ``model.safetensors``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export_viclip",
        description="Writes a folder for stages.score_video_text.model.weights of a pipeline.",
    )
    parser.add_argument("checkpoint", type=Path, help="a run's --output folder, or a checkpoint")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument(
        "--half", action="store_true", help="store float16: half the size, three digits"
    )
    given = parser.parse_args(arguments)

    def export() -> None:
        import torch
        from safetensors.torch import save_file

        from dataengine.errors import ConfigError
        from dataengine.networks.config import ViCLIPConfig
        from dataengine.networks.viclip import EXPORTED_CONFIG, WEIGHTS, ViCLIP
        from training import checkpoint

        source = checkpoint.locate(given.checkpoint)
        config = checkpoint.read_config(source).model
        if not isinstance(config, ViCLIPConfig):
            raise ConfigError(
                f"{source} holds a {config.kind} model, not a ViCLIP",
                "python -m training.export_clip exports it",
            )
        model = ViCLIP(config)
        checkpoint.load_weights(source, model)
        dtype = torch.float16 if given.half else torch.float32
        weights = {
            name: tensor.detach().to(dtype).contiguous()
            for name, tensor in model.state_dict().items()
        }
        given.folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, given.folder / WEIGHTS, metadata={"format": "pt"})
        (given.folder / WEIGHTS).chmod(0o644)  # safetensors writes for its user alone
        (given.folder / EXPORTED_CONFIG).write_text(config.model_dump_json(indent=2) + "\n")
        num_bytes = (given.folder / WEIGHTS).stat().st_size
        say(f"{given.folder}: {num_bytes / 1e6:.2f} MB, score_video_text.model.weights names it")

    return run_command(export)


if __name__ == "__main__":
    sys.exit(main())
