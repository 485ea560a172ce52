# SPDX-License-Identifier: Apache-2.0
"""A run's whole state in a folder that appears complete or not at all.

``checkpoints/step_<step>/``: ``model.safetensors`` (weights alone, readable by anything),
``state.pt`` (optimizer, loader, random generators; loaded without pickle's code execution) and
``meta.json`` (step, recipe, versions, and the files' sizes by which a damaged one is known).
"""

import json
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dataengine.errors import EngineError
from training.config import TrainConfig, config_from_dict

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_META, _MODEL, _STATE = "meta.json", "model.safetensors", "state.pt"


class CheckpointError(EngineError):
    """A checkpoint that is missing, damaged or of another model."""


def save(
    output: Path,
    *,
    step: int,
    model: nn.Module,
    state: dict[str, Any],
    config: TrainConfig,
    keep: int,
) -> Path:
    """Writes ``output/checkpoints/step_<step>`` and removes all but the newest ``keep``.

    Args:
        output: The run's folder.
        step: Steps done.
        model: Not wrapped.
        state: Tensors and plain values only.
        config: The resolved recipe.
        keep: Checkpoints to keep, this one included.
    """
    root = output / "checkpoints"
    target = root / f"step_{step:08d}"
    temporary = root / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, temporary / _MODEL, metadata={"format": "pt"})
    torch.save(state, temporary / _STATE)
    meta = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "config": config.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("torch", "dataengine")},
        "bytes": {name: (temporary / name).stat().st_size for name in (_MODEL, _STATE)},
    }
    (temporary / _META).write_text(json.dumps(meta, indent=2) + "\n")
    for name in (_MODEL, _STATE, _META):
        _flush(temporary / name)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    _flush(root)
    for old in _folders(root)[keep:]:
        shutil.rmtree(old)
    return target


def newest(output: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, passing over damaged ones aloud."""
    for folder in _folders(output / "checkpoints"):
        try:
            read_meta(folder)
        except CheckpointError as error:
            logger.warning("%s; an older checkpoint is tried", error.message)
            continue
        return folder
    return None


def locate(path: Path) -> Path:
    """Returns the checkpoint a user means: a checkpoint folder, or a run's newest.

    Raises:
        CheckpointError: If there is none.
    """
    folder = path if (path / _META).is_file() else newest(path)
    if folder is None:
        raise CheckpointError(
            f"No checkpoint in {path}", "give a run's --output folder or one of its checkpoints"
        )
    return folder


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns ``meta.json`` after checking that the other files are whole.

    Raises:
        CheckpointError: If a file is missing or cut off, or the format is newer than this code.
    """
    try:
        meta = json.loads((folder / _META).read_text())
        sizes = {name: (folder / name).stat().st_size for name in meta["bytes"]}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"Checkpoint {folder} is not complete: {error}") from error
    if meta["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"Checkpoint {folder} was written by a newer version")
    if sizes != meta["bytes"]:
        raise CheckpointError(f"Checkpoint {folder} is damaged: sizes {sizes} != {meta['bytes']}")
    return meta


def read_config(folder: Path) -> TrainConfig:
    """Returns the recipe a checkpoint was trained with."""
    return config_from_dict(read_meta(folder)["config"], str(folder / _META))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads the weights; every name and shape must agree.

    Raises:
        CheckpointError: If they do not, or the file cannot be read.
    """
    try:
        model.load_state_dict(load_file(folder / _MODEL))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Checkpoint {folder} does not fit the model: {error}",
            "train with the recipe it was written with, or into another --output",
        ) from error


def load_state(folder: Path) -> dict[str, Any]:
    """Returns what ``save`` was given as ``state``, tensors on the CPU."""
    return torch.load(folder / _STATE, map_location="cpu", weights_only=True)


def set_aside(output: Path) -> Path | None:
    """Renames a run's checkpoints out of the way; returns where to, None if there were none."""
    root = output / "checkpoints"
    if not root.exists():
        return None
    number = 1
    while (aside := output / f"checkpoints.old-{number}").exists():
        number += 1
    return root.rename(aside)


def _folders(root: Path) -> list[Path]:
    """Returns checkpoint folders, newest first."""
    return sorted(root.glob("step_*"), reverse=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
