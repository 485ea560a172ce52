# SPDX-License-Identifier: Apache-2.0
"""First weights of a model: a CLIP, published files, or what another run has learnt."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataengine.errors import ConfigError
from dataengine.networks.viclip import ViCLIP, fit_positions
from training.config import InitConfig, TrainConfig
from training.models.clip_weights import clip_filling
from training.models.filling import Filling, State, fill, find, groups, read_weights
from training.models.published import is_hub_name, published_filling, vision_weights
from training.models.task import Task

logger = logging.getLogger(__name__)


def initialise(task: Task, config: TrainConfig) -> None:
    """Loads ``config.init`` in its order; the network is whole, on the CPU, and not yet wrapped.

    Logs a line for each: how many tensors filled which part, and what stayed fresh. Warns of frozen
    weights that nothing was loaded into, for they would stay random.

    Args:
        task: Its ``network`` is filled.
        config: The recipe.

    Raises:
        ConfigError: If a file cannot be read, is of no known family, or does not fit; the message
            names what it holds and what the model has.
        DependencyError: If weights do not fit a part, or a package is missing.
    """
    network = task.network
    filled: set[str] = set()
    for entry in config.init:
        match entry.kind:
            case "clip":
                filling = clip_filling(entry.path, network, config)
            case "weights":
                state = {} if is_hub_name(entry.path) else read_weights(Path(entry.path))
                filling = published_filling(state, network, entry)
            case "checkpoint":
                filling = run_filling(entry, network)
        fresh = fill(network, filling, entry.path)
        filled |= filling.weights.keys()
        logger.info(
            "%s: %s, %d tensors into %s%s%s",
            entry.path,
            filling.what,
            len(filling.weights),
            groups(filling.weights),
            f"; fresh stay {', '.join(fresh)}" if fresh else "",
            f"; not needed: {groups(filling.passed_over)}" if filling.passed_over else "",
        )
    random = [
        name
        for name, parameter in network.named_parameters()
        if not parameter.requires_grad and name not in filled
    ]
    if random:
        logger.warning("frozen and random, as nothing was loaded into it: %s", groups(random))
    if config.init and (left := network.state_dict().keys() - filled):
        logger.info("fresh after all init: %s", groups(sorted(left)))


def run_filling(entry: InitConfig, network: nn.Module) -> Filling:
    """Returns what another run gives a network: all if they are alike, else the part they share."""
    state, num_frames = _read_run(Path(entry.path))
    own = network.state_dict()
    if state.keys() == own.keys() and all(state[name].shape == own[name].shape for name in own):
        return Filling("a model like this one", state, ("",))
    entry = entry.model_copy(update={"num_frames": entry.num_frames or num_frames})
    if state.keys() != own.keys():
        return published_filling(state, network, entry)
    fitted = _other_frames(state, network, entry)
    return Filling("a model like this one, of other positions", fitted, ("",))


def _other_frames(state: State, network: nn.Module, entry: InitConfig) -> dict[str, torch.Tensor]:
    """Returns the weights of a model of the same kind with positions for this one's frames and grid."""
    from dataengine.networks.internvideo2 import InternVideo2

    if isinstance(network, ViCLIP):
        return fit_positions(state, network.config)
    if (place := find(network, InternVideo2)) is None:
        return dict(state)
    prefix, module = place
    vision = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    fitted = vision_weights(vision, module, entry)
    return {**state, **{prefix + name: tensor for name, tensor in fitted.items()}}


def _read_run(path: Path) -> tuple[dict[str, torch.Tensor], int | None]:
    """Returns the weights of a run, a checkpoint or an exported model, and frames of its positions."""
    if not path.is_dir():
        raise ConfigError(
            f"init: no run and no model at {path}",
            "name a run's --output folder, one of its checkpoints, or an exported model; "
            "published files are init.kind: weights",
        )
    if (path / "open_clip_config.json").is_file():
        raise ConfigError(f"init: {path} holds an open_clip model", "load it with init.kind: clip")
    if (path / "meta.json").is_file() or (path / "checkpoints").is_dir():
        from training import checkpoint

        folder = checkpoint.locate(path)
        described = checkpoint.read_meta(folder)["config"]["model"]
        return _read_tensors(folder), _frames_of(described)
    from dataengine.networks.folder import load_folder

    network, config = load_folder(path)
    return dict(network.state_dict()), _frames_of(config.model_dump())


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the network's weights in a checkpoint; a running average stands for what it is of."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {
            name: torch.empty(about.size, dtype=about.properties.dtype)
            for name, about in stored.items()
            if isinstance(about, TensorStorageMetadata)
            and name.startswith(("model.network.", "ema.network."))
        }
        load(tensors, checkpoint_id=folder, no_dist=True)
    except Exception as error:  # pickle and torch raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(f"init: {folder} cannot be read: {problem}") from error
    state = {}
    for prefix in ("model.network.", "ema.network."):
        state |= {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return state


def _frames_of(described: Mapping[str, Any]) -> int | None:
    """Returns the frames of a model's InternVideo2 in its recipe; None if it has none."""
    for part in (described.get("vision"), described.get("student"), described):
        if isinstance(part, Mapping) and "num_frames" in part:
            return part["num_frames"]
    return None
