# SPDX-License-Identifier: Apache-2.0
"""A trained model in a folder: ``config.json`` and safetensors, taken whole or not at all.

``config.json`` holds ``format_version``, ``kind``, the kind's shape as ``model`` (one of
`dataengine.networks.config`), and in ``about`` what it was trained on.
Weights lie in ``model.safetensors``, or in several files with an index, under the published names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dataengine.errors import DependencyError
from dataengine.networks.config import (
    InternVideo2ClipConfig,
    InternVideo2Config,
    InternVideo2Stage2Config,
    NetworkConfig,
    ViCLIPConfig,
)
from dataengine.networks.viclip import ViCLIP

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

FolderConfig = ViCLIPConfig | InternVideo2Config | InternVideo2Stage2Config | InternVideo2ClipConfig

_CONFIGS: dict[str, type[NetworkConfig]] = {
    "viclip": ViCLIPConfig,
    "internvideo2": InternVideo2Config,
    "internvideo2_stage2": InternVideo2Stage2Config,
    "internvideo2_clip": InternVideo2ClipConfig,
}

_AGAIN = "copy or export it again: python -m training.export RUN FOLDER"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a folder says of its model.

    Attributes:
        path: The folder.
        kind: ``viclip``, ``internvideo2`` (a vision encoder), ``internvideo2_stage2`` or
            ``internvideo2_clip``.
        config: The model's shape.
        about: What it was trained on and how, as far as it is known.
        files: The files with its weights.
    """

    path: Path
    kind: str
    config: FolderConfig
    about: Mapping[str, Any]
    files: tuple[Path, ...]


def find_folder(path: Path) -> Path:
    """Returns the model folder that a user means: the folder itself, or ``model`` in a run's folder.

    Raises:
        DependencyError: If there is none; where a checkpoint of training is, with how to export it.
    """
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    for folder in (path, path / "model"):
        if (folder / "open_clip_config.json").is_file():
            raise DependencyError(
                f"{folder} holds an open_clip model, which looks at one picture at a time",
                f"the score stage takes it: stages.score.model.model=local-dir:{folder}",
            )
    if (path / "checkpoints").is_dir() or path.parent.name == "checkpoints":
        raise DependencyError(
            f"{path} holds checkpoints of training, not a model that is ready to be used",
            f"python -m training.export {path} FOLDER, and name FOLDER",
        )
    raise DependencyError(
        f"No model in {path} (no {CONFIG})",
        "name a run's folder, or one that python -m training.export wrote",
    )


def read_folder(path: Path) -> ModelFolder:
    """Returns what a model folder says of its model; reads no weights.

    Args:
        path: As for `find_folder`.

    Raises:
        DependencyError: If there is no such folder, or it is not whole, or its format is not known.
    """
    folder = find_folder(path)
    described = _read_json(folder / CONFIG)
    version, kind = described.get("format_version"), described.get("kind")
    if not isinstance(version, int) or not isinstance(kind, str):
        raise DependencyError(
            f"{folder / CONFIG} is of another library: it has no format_version and kind",
            "name a folder that python -m training.export wrote",
        )
    if version > FORMAT_VERSION:
        raise DependencyError(
            f"{folder} was written by a newer version: format {version}, {FORMAT_VERSION} is known",
            "update dataengine",
        )
    if kind not in _CONFIGS:
        raise DependencyError(
            f"{folder} holds a model of unknown kind {kind}", f"known are {', '.join(_CONFIGS)}"
        )
    try:
        config = _CONFIGS[kind].model_validate(described.get("model"))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(["model", *(str(part) for part in problem["loc"])])
        raise DependencyError(f"{folder / CONFIG}: {where}: {problem['msg']}", _AGAIN) from error
    about = described.get("about")
    return ModelFolder(
        folder,
        kind,
        config,  # pyright: ignore[reportArgumentType]  one of FolderConfig, by `_CONFIGS`
        about if isinstance(about, dict) else {},
        _weight_files(folder),
    )


def load_folder(path: Path) -> tuple[nn.Module, FolderConfig]:
    """Returns a trained network, in evaluation mode on the CPU in float32, and its shape.

    Args:
        path: A folder that ``python -m training.export`` wrote, or a run's folder, whose ``model`` is
            meant.

    Raises:
        DependencyError: If it is not whole, or a weight is missing, unknown, misshapen or no number.
    """
    found = read_folder(path)
    network = _blank(found.config)
    try:
        state = own_names(_read_weights(found.files), found.config)
        _load_strictly(network, state)
    except (ValueError, DependencyError) as error:
        raise DependencyError(
            f"Weights of {found.path} do not fit its {CONFIG}: {error}", _AGAIN
        ) from error
    return network.eval(), found.config


def published_names(
    state: Mapping[str, torch.Tensor], config: FolderConfig
) -> dict[str, torch.Tensor]:
    """Returns a network's weights as a folder holds them: under the names of published files."""
    if isinstance(config, InternVideo2Stage2Config):
        from dataengine.networks.internvideo2_stage2 import published_stage2

        return published_stage2(state, config)
    return dict(state)


def own_names(
    state: Mapping[str, torch.Tensor], config: FolderConfig
) -> Mapping[str, torch.Tensor]:
    """Returns a folder's weights as the network holds them; undoes `published_names`.

    Raises:
        DependencyError: If they are not those of a second stage, where the config is of one.
        ValueError: If a weight that is stored twice differs from its copy.
    """
    if isinstance(config, InternVideo2Stage2Config):
        from dataengine.networks.internvideo2_stage2 import load_published_stage2

        return load_published_stage2(state, config, config.vision.num_frames)
    return state


def build_network(config: FolderConfig) -> nn.Module:
    """Returns a network of a shape, freshly initialised."""
    match config:
        case ViCLIPConfig():
            return ViCLIP(config)
        case InternVideo2Config():
            from dataengine.networks.internvideo2 import InternVideo2

            return InternVideo2(config)
        case InternVideo2Stage2Config():
            from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2

            return InternVideo2Stage2(config)
        case InternVideo2ClipConfig():
            from dataengine.networks.internvideo2_clip import InternVideo2Clip

            return InternVideo2Clip(config)


def _blank(config: FolderConfig) -> nn.Module:
    """Returns a network whose weights are still to come, where possible without memory for them."""
    with torch.device("meta"):
        network = build_network(config)
    stored = network.state_dict()
    if all(name in stored for name, _ in network.named_buffers()):
        return network
    return build_network(config)  # it computes tables that no folder holds


def _load_strictly(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Gives a network its weights; every name and shape must agree.

    Raises:
        ValueError: Naming the weights that do not.
    """
    own = network.state_dict()
    problems = [f"missing {name}" for name in sorted(own.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - own.keys())]
    problems += [
        f"of another shape {name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(", ".join(problems[:5]) + more)
    network.load_state_dict(dict(state), assign=True)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Returns the files with a folder's weights, all of them there."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        raise DependencyError(f"No weights in {folder}: neither {WEIGHTS} nor {INDEX}", _AGAIN)
    places = _read_json(folder / INDEX).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    # A name with a folder in it would let an index name any file of the machine.
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise DependencyError(f"{folder / INDEX} names no files of weights", _AGAIN)
    for name in names:
        if not (folder / name).is_file():
            raise DependencyError(f"{folder / INDEX} names {name}, which is not there", _AGAIN)
    return tuple(folder / name for name in names)


def _read_weights(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    """Returns the weights of all files, those that are floats in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DependencyError(f"{file} is damaged or cut off ({error})", _AGAIN) from error
        for name, tensor in tensors.items():
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
            if not torch.isfinite(state[name]).all():
                raise DependencyError(f"{file}: {name} is not finite", "the model is broken")
    return state


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DependencyError(f"{file} cannot be read: {error}", _AGAIN) from error
    if not isinstance(document, dict):
        raise DependencyError(f"{file} holds no JSON object", _AGAIN)
    return document
