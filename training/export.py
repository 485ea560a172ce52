# SPDX-License-Identifier: Apache-2.0
"""``python -m training.export CHECKPOINT FOLDER``: a trained model as others load it.

A model folder (`dataengine.networks.folder`) for the kinds of `dataengine.networks`, an open_clip folder
for open_clip's; with ``--format huggingface`` what `training.hub` makes.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataengine.errors import ConfigError, DependencyError, EngineError
from dataengine.networks.config import NetworkConfig
from training.config import (
    DistilConfig,
    ModelConfig,
    OpenClipConfig,
    TrainConfig,
    inputs_of,
)
from training.console import run_command, say

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
"""Larger models are stored in several files."""

STUDENT_EXTRAS = (
    *("clip_decoder.", "final_clip_decoder.", "mae_decoder."),
    *("clip_pos_embed", "clip_img_pos_embed", "mae_pos_embed"),
)
"""What answers the teachers in stage 1; of no use without them."""

_OWN_FILES = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json", "README.md"),
    *("preprocessor_config.json", "open_clip_config.json", "open_clip_model.safetensors"),
    *("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json"),
)
"""Patterns of what an export writes: a folder of nothing else may be replaced by a new export."""


def export_folder(
    network_state: "Mapping[str, torch.Tensor]",
    config: ModelConfig,
    folder: Path,
    *,
    half: bool = False,
    about: Mapping[str, Any] | None = None,
) -> int:
    """Writes a model folder, or an open_clip folder for that kind; returns its bytes.

    Of an ``internvideo2_distil`` model the student's vision encoder is written, as kind
    ``internvideo2``. The folder appears complete or not at all, and takes the place of an older export.

    Args:
        network_state: Weights of the task's ``network`` under the published names, whole (no shards), on
            any device.
        config: The recipe's model.
        folder: Where it goes.
        half: Whether floats are stored as float16: half the size, three digits.
        about: What is known of its training, as plain values (`about_run`). Scorers read
            ``clean_captions`` of it, which is true where it is not said.

    Raises:
        ConfigError: If ``folder`` holds files that no export writes.
        EngineError: If a weight is not finite, or not within float16's range with ``half``.
    """

    def write(place: Path) -> None:
        weights = stored_weights(exported_state(network_state, config), half)
        if isinstance(config, OpenClipConfig):
            _write_open_clip(weights, config, place, about or {})
            return
        write_weights(weights, place)
        write_json(place / "config.json", describe(config, about or {}))
        try:
            write_tokenizer(config, place)
        except DependencyError as error:
            logger.warning("%s; the exported folder goes without it", error.message)

    return write_atomically(folder, write)


def about_run(config: TrainConfig, step: int) -> dict[str, Any]:
    """Returns what an export says of its training: plain values for ``about``."""
    return {
        # Names alone: where they lie is nobody's business but the trainer's.
        "trained_on": [_name(source.data) for source in config.data.sources],
        "caption": config.data.caption,
        "clean_captions": config.data.clean_captions,
        "steps": step,
        "batch_size": config.data.batch_size,
        "initialised_from": [_name(entry.path) for entry in config.init],
    }


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


# ------------------------------------------------------------------------------------ the weights


def exported_state(
    state: "Mapping[str, torch.Tensor]", config: ModelConfig
) -> "dict[str, torch.Tensor]":
    """Returns the weights that are exported, under the names that the format wants."""
    match config:
        case OpenClipConfig():
            return {name.removeprefix("clip."): tensor for name, tensor in state.items()}
        case DistilConfig():
            return {n: t for n, t in state.items() if not n.startswith(STUDENT_EXTRAS)}
        case _:
            from dataengine.networks.folder import published_names

            return published_names(state, config)


def stored_weights(state: "Mapping[str, torch.Tensor]", half: bool) -> "dict[str, torch.Tensor]":
    """Returns weights on the CPU as they are stored, each with a memory of its own.

    Raises:
        EngineError: If one is not finite.
    """
    import torch

    stored: dict[str, torch.Tensor] = {}
    memories: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu")
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float16 if half else torch.float32)
        if not torch.isfinite(tensor).all():
            raise EngineError(
                f"{name} is not finite" + (" in float16" if half else ""),
                "export an earlier checkpoint" + (", or without --half" if half else ""),
            )
        memory = tensor.untyped_storage().data_ptr()
        # Tied weights are stored under each of their names, as the published files have them.
        stored[name] = (tensor.clone() if memory in memories else tensor).contiguous()
        memories.add(memory)
    return stored


def write_weights(weights: "Mapping[str, torch.Tensor]", folder: Path) -> None:
    """Writes ``model.safetensors``, or several files and their index, as the hub wants them."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(dict(weights), max_shard_size=MAX_SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_atomically(folder: Path, write: Callable[[Path], None]) -> int:
    """Lets ``write`` fill a folder beside the wanted one, then puts it there; returns its bytes."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() or not any(path.match(pattern) for pattern in _OWN_FILES):
                raise ConfigError(
                    f"{folder} holds {path.name}, which no export writes",
                    "name a folder that does not exist yet, or one that holds an export alone",
                )
    elif folder.exists():
        raise ConfigError(f"{folder} is a file", "name a folder")
    folder = folder.absolute()
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # a kill came between the two renames below
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        num_bytes = 0
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes for its user alone; this is for others
            num_bytes += path.stat().st_size
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return num_bytes


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document as people read it."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------- the descriptions


@dataclass(frozen=True, slots=True)
class Shape:
    """What every format says of a model.

    Attributes:
        kind: As in `dataengine.networks.folder`, or ``open_clip``.
        config: Its shape.
        num_frames: Of a clip.
        image_size: Height and width, pixels.
        pixel_mean: Of red, green, blue in [0, 1].
        pixel_std: The same.
    """

    kind: str
    config: NetworkConfig
    num_frames: int
    image_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


def shape_of(config: ModelConfig) -> Shape:
    """Returns what every format says of a model."""
    pixels = config.pixel_mean, config.pixel_std
    match config:
        case DistilConfig():
            # Training may read more frames, for a second teacher; the student sees these.
            student = config.student
            return Shape("internvideo2", student, student.num_frames, student.image_size, *pixels)
        case _:
            wanted = inputs_of(config)
            return Shape(config.kind, config, wanted.num_frames, wanted.image_size, *pixels)


def describe(config: ModelConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``config.json`` of a model folder."""
    from dataengine.networks.folder import FORMAT_VERSION

    shape = shape_of(config)
    # A vision encoder's own shape does not say how its frames are normalised.
    pixels = {"pixel_mean": shape.pixel_mean, "pixel_std": shape.pixel_std}
    return {
        "format_version": FORMAT_VERSION,
        "kind": shape.kind,
        "model": shape.config.model_dump(mode="json"),
        "dataengine_version": version("dataengine"),
        "about": {**about, **(pixels if shape.kind == "internvideo2" else {})},
    }


def write_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Puts the files of a BERT's or a LLaMA's tokenizer into a folder; CLIP's is in open_clip.

    Raises:
        DependencyError: If it cannot be loaded.
    """
    wanted = inputs_of(config)
    if wanted.tokenizer not in {"bert", "llama"}:
        return
    name = wanted.tokenizer_name
    try:
        from transformers import BertTokenizer, LlamaTokenizer

        kind = BertTokenizer if wanted.tokenizer == "bert" else LlamaTokenizer
        kind.from_pretrained(name).save_pretrained(folder)
    except Exception as error:  # transformers and the hub raise all kinds
        raise DependencyError(
            f"The tokenizer {name!r} cannot be loaded: {' '.join(str(error).split())[:300]}",
            "model.tokenizer of the recipe names it: put it there, or fetch it",
        ) from error


# -------------------------------------------------------------------------------------- open_clip


def _write_open_clip(
    weights: "Mapping[str, torch.Tensor]",
    config: OpenClipConfig,
    folder: Path,
    about: Mapping[str, Any],
) -> None:
    """Writes what open_clip loads as ``local-dir:FOLDER``, in float32 whatever is stored."""
    from safetensors.torch import save_file

    from training.models.open_clip_model import model_config

    described = model_config(config)
    described["vision_cfg"].pop("patch_dropout")  # a matter of training alone
    save_file(dict(weights), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    document = {
        "model_cfg": described,
        "preprocess_cfg": {
            "mean": list(config.pixel_mean),
            "std": list(config.pixel_std),
            "interpolation": "bicubic",
            # Training and evaluation squeeze the whole frame into the square.
            "resize_mode": "squash",
        },
    }
    write_json(
        folder / "open_clip_config.json", document | ({"about": dict(about)} if about else {})
    )


# ------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Exports a checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description="Writes a trained model as others load it: a model folder for score_video_text, "
        "an open_clip folder, or a folder for the Hugging Face hub.",
    )
    parser.add_argument("checkpoint", type=Path, help="a run's --output folder, or a checkpoint")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument(
        "--half", action="store_true", help="store float16: half the size, three digits"
    )
    parser.add_argument(
        "--format",
        choices=("folder", "open_clip", "huggingface"),
        default="folder",
        help="folder is what this package loads; of an open_clip model it is open_clip's own",
    )
    parser.add_argument(
        "--license", default="other", metavar="ID", help="for the card of --format huggingface"
    )
    given = parser.parse_args(arguments)

    def export() -> None:
        from training import checkpoint

        source = checkpoint.locate(given.checkpoint)
        config = checkpoint.read_config(source)
        model = config.model
        if given.format == "open_clip" and not isinstance(model, OpenClipConfig):
            raise ConfigError(
                f"{source} holds a {model.kind} model, which open_clip cannot load",
                "leave --format out",
            )
        state = _read(source, model)
        about = about_run(config, checkpoint.read_meta(source)["step"])
        if given.format == "huggingface":
            from training.hub import export_huggingface

            num_bytes = export_huggingface(
                state, model, given.folder, half=given.half, about=about, license_id=given.license
            )
        else:
            num_bytes = export_folder(state, model, given.folder, half=given.half, about=about)
        say(f"{given.folder}: {num_bytes / 1e6:.2f} MB, {_next(model, given.format, given.folder)}")

    return run_command(export)


def _read(checkpoint_folder: Path, config: ModelConfig) -> "dict[str, torch.Tensor]":
    """Returns what a checkpoint holds of the network that is exported; teachers are not needed."""
    from dataengine.networks.folder import build_network
    from training import checkpoint

    unneeded: tuple[str, ...] = ()
    match config:
        case OpenClipConfig():
            from training.models.open_clip_model import OpenClipDualEncoder

            network: nn.Module = OpenClipDualEncoder(config)
        case DistilConfig():
            network, unneeded = build_network(config.student), STUDENT_EXTRAS
        case _:
            network = build_network(config)
    checkpoint.load_weights(checkpoint_folder, network, unneeded=unneeded)
    return network.state_dict()


def _next(model: ModelConfig, form: str, folder: Path) -> str:
    """Returns what can be done with an export."""
    match model:
        case _ if form == "huggingface":
            return f"hf upload OWNER/NAME {folder}"
        case OpenClipConfig():
            return f"load it with local-dir:{folder}"
        case DistilConfig():
            return "dataengine.networks.folder.load_folder loads it"
        case _:
            return f"score_video_text takes it: model={{kind: trained, weights: {folder}}}"


if __name__ == "__main__":
    sys.exit(main())
