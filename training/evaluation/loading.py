# SPDX-License-Identifier: Apache-2.0
"""What a user calls a model -> a task that can be evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dataengine.errors import ConfigError
from dataengine.networks.config import InternVideo2Config, InternVideo2Stage2Config
from training import checkpoint
from training.config import (
    InitConfig,
    InputSpec,
    ModelConfig,
    TrainConfig,
    config_from_dict,
    inputs_of,
)
from training.models.task import Task


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, on the CPU, in evaluation mode."""

    task: Task
    spec: InputSpec
    config: ModelConfig | InternVideo2Config
    recipe: TrainConfig | None
    """What it was trained with; None for a model folder."""
    path: Path
    """Where its weights were read."""

    @property
    def longest_text(self) -> int:
        """Returns how many tokens of a text the model can read."""
        if isinstance(self.config, InternVideo2Stage2Config):
            return self.config.text.max_positions
        # Towers of CLIP's kind have no place for more.
        return self.spec.context_length


def load_model(path: Path) -> Loaded:
    """Returns the model of a run, of one of its checkpoints, or of a model folder.

    A run's newest checkpoint is preferred to the ``model`` that was exported from it.

    Raises:
        EngineError: If there is none, or its weights do not fit.
    """
    # Imported late: it brings in networks that only some commands need.
    from dataengine.networks.folder import CONFIG, load_folder
    from training.models import build_task

    has_checkpoints = (path / "checkpoints").is_dir() or path.parent.name == "checkpoints"
    if not has_checkpoints and any((p / CONFIG).is_file() for p in (path, path / "model")):
        network, config = load_folder(path)
        if isinstance(config, InternVideo2Config):
            return Loaded(_VisionTask(network), _vision_spec(config), config, None, path)
        task = build_task(_recipe_of(config, path))
        task.network.load_state_dict(network.state_dict())
        return Loaded(task.eval(), inputs_of(config), config, None, path)
    folder = checkpoint.locate(path)
    recipe = checkpoint.read_config(folder)
    task = build_task(recipe)
    checkpoint.load_weights(folder, task.network)
    return Loaded(task.eval(), inputs_of(recipe.model), recipe.model, recipe, folder)


class _VisionTask(Task):
    """A video encoder alone: nothing of it reads text, so it can be probed only."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network


def _vision_spec(config: InternVideo2Config) -> InputSpec:
    from dataengine.networks.config import IMAGENET_MEAN, IMAGENET_STD

    return InputSpec(
        config.num_frames, config.image_size, "none", "", 0, IMAGENET_MEAN, IMAGENET_STD
    )


def recipe_of(loaded: Loaded) -> TrainConfig:
    """Returns a recipe to read a corpus with, for a model whose own recipe is not known.

    Raises:
        ConfigError: If the model reads no text.
    """
    if isinstance(loaded.config, InternVideo2Config):
        raise ConfigError(
            f"The model in {loaded.path} reads no text",
            "--probe linear measures a video encoder alone, on a classification benchmark",
        )
    return _recipe_of(loaded.config, loaded.path)


def _recipe_of(config: ModelConfig, path: Path) -> TrainConfig:
    """Returns a recipe that builds a model; it is never trained with."""
    return config_from_dict(
        {
            "model": config.model_dump(mode="json"),
            "data": {"held_out": 0.0, "batch_size": 1},
            "optim": {"lr": 1.0, "steps": 1},
            "run": {"seed": 0},
        },
        str(path),
    )


def initial_weights(loaded: Loaded, init: str) -> Mapping[str, torch.Tensor]:
    """Returns the weights that a model started from, under its own names.

    Args:
        loaded: The trained model.
        init: A run, checkpoint or model folder of the same shape, or what ``init.path`` of a recipe
            says of a CLIP: a folder, a file, or ``ARCHITECTURE@FILE_OR_TAG``.

    Raises:
        EngineError: If nothing can be read there, or it does not fit.
    """
    path = Path(init)
    if any((path / name).exists() for name in ("checkpoints", "meta.json", "config.json", "model")):
        return load_model(path).task.network.state_dict()
    if isinstance(loaded.config, InternVideo2Config):
        raise ConfigError("A video encoder alone did not start from a CLIP")
    return _clip_weights(loaded.config, init)


def _clip_weights(config: ModelConfig, init: str) -> Mapping[str, torch.Tensor]:
    from training.models import build_task
    from training.models.init import initialise

    recipe = _recipe_of(config, Path(init))
    start = InitConfig(kind="clip", path=init)
    task = build_task(recipe)
    initialise(task, recipe.model_copy(update={"init": (start,)}))
    return task.network.state_dict()
