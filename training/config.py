# SPDX-License-Identifier: Apache-2.0
"""Recipe YAML + ``--set`` overrides -> one frozen ``TrainConfig``; all problems reported at once."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from dataengine.errors import ConfigError
from dataengine.networks.config import (
    NetworkConfig,
    TextTowerConfig,
    ViCLIPConfig,
    VideoTowerConfig,
)

RECIPES_DIR = Path(__file__).parent / "recipes"


class OpenClipConfig(NetworkConfig):
    """An image-text model built by open_clip; a clip's feature is the mean over its frames'."""

    kind: Literal["open_clip"]
    embed_dim: int = Field(gt=0)
    video: VideoTowerConfig
    text: TextTowerConfig
    init_temperature: float = Field(default=0.07, ge=0.01, le=1.0)
    """CLIP starts at 0.07 and stops at 0.01."""
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _expressible(self) -> "OpenClipConfig":
        for tower, config in (("video", self.video), ("text", self.text)):
            if tower == "video" and (self.video.drop_path or self.video.checkpoint_activations):
                raise ValueError("open_clip's ViT has no drop_path and no checkpoint_activations")
            if config.width // config.heads * config.heads != config.width:
                raise ValueError(f"{tower}.width must be a multiple of {tower}.heads")
        return self


class DataConfig(NetworkConfig):
    """What is read from the corpus and in which order."""

    caption: str = "caption"
    """The text column to read."""
    media: Literal["frames", "video"] = "frames"
    """``frames`` reads the stored JPEGs (milliseconds), ``video`` decodes the MP4."""
    held_out: float = Field(ge=0.0, lt=1.0)
    """Share of the *videos* kept out of training and used for evaluation."""
    batch_size: int = Field(gt=0)
    """Clips per process and step; the contrastive batch is this times the processes."""
    eval_batch_size: int = Field(default=64, gt=0)
    shuffle_buffer: int = Field(default=2048, ge=1)
    """How far a clip may move from its row group's place in the epoch, in clips per lane."""
    num_workers: int = Field(default=0, ge=0)
    """Reader processes per training process; 0 reads in the training process itself. Changes
    nothing in the batches."""
    lanes: int = Field(default=4, ge=1)
    """Independent read positions per process. Reading is cheapest when ``num_workers`` divides
    it; changing it changes the batches."""
    cache_mb: int = Field(default=256, ge=1)
    """Row groups each reader keeps in memory, MiB."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Area of the random crop as a share of the frame's, least and most (ViCLIP: 0.5 to 1)."""
    flip: bool = True
    """Whether half of the clips are mirrored. Off where captions name left and right."""
    clean_captions: bool = True
    """Whether captions lose case and punctuation as ViCLIP's do."""

    @model_validator(mode="after")
    def _ordered(self) -> "DataConfig":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {low}, {high} must satisfy 0 < least <= most <= 1")
        return self


class ObjectiveConfig(NetworkConfig):
    """InfoNCE, and what to do with rows that are not true negatives of each other."""

    same_caption: Literal["negative", "positive", "ignore"] = "positive"
    """Rows whose cleaned captions are equal: ``positive`` shares the target between them,
    ``ignore`` takes the pair out of the softmax."""
    same_video: Literal["negative", "positive", "ignore"] = "negative"
    """Rows cut from one video. The InternVid paper blames such false negatives for its 200M
    subset losing to its 10M one."""


class OptimConfig(NetworkConfig):
    """AdamW with linear warm-up and cosine decay. Exactly one of ``steps`` and ``epochs``."""

    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.2, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from ``min_lr_ratio`` to 1."""
    min_lr_ratio: float = Field(default=0.01, ge=0, le=1)
    """Learning rate at the end as a share of the highest."""
    grad_clip: float = Field(default=0.0, ge=0)
    """Largest gradient norm; 0 never clips (ViCLIP does not)."""

    @model_validator(mode="after")
    def _one_length(self) -> "OptimConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class RunConfig(NetworkConfig):
    """How the run behaves; nothing here changes what is learnt, but seed and precision."""

    seed: int = Field(ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    log_every: int = Field(default=20, gt=0)
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the held-out clips; 0 evaluates before and after only."""
    checkpoint_every: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)


ModelConfig = Annotated[ViCLIPConfig | OpenClipConfig, Field(discriminator="kind")]


class TrainConfig(NetworkConfig):
    """A whole recipe."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig
    run: RunConfig


def load_recipe(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Returns the recipe of that name or path with ``a.b=c`` overrides applied.

    Raises:
        ConfigError: With every problem found, not only the first.
    """
    path = _recipe_path(name)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of sections", "see training/recipes")
    problems = [problem for text in overrides if (problem := _override(document, text))]
    return _validated(document, str(path), problems)


def config_from_dict(document: dict[str, Any], where: str) -> TrainConfig:
    """Returns the config a checkpoint or another program wrote with ``model_dump``."""
    return _validated(document, where, [])


def _validated(document: dict[str, Any], where: str, problems: list[str]) -> TrainConfig:
    try:
        config = TrainConfig.model_validate(document)
    except ValidationError as error:
        problems = problems + [_describe(item) for item in error.errors()]
        config = None
    if config is None or problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{where} cannot be trained as written:\n{lines}",
            "fields and their meanings are in training/config.py",
        )
    return config


def _recipe_path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"No recipe at {name}")
    path = RECIPES_DIR / f"{name}.yaml"
    if not path.is_file():
        known = sorted(recipe.stem for recipe in RECIPES_DIR.glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"Unknown recipe: {name}",
            f"did you mean {close[0]}?" if close else f"recipes: {', '.join(known)}",
        )
    return path


def _override(document: dict[str, Any], text: str) -> str | None:
    """Writes one ``a.b=c`` into the document; returns the problem if it cannot."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        return f"--set {text}: expected section.field=value"
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"--set {text}: the value is not valid YAML"
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            return f"--set {text}: {parent} is not a section"
        node = child
    # Steps and epochs exclude each other; who sets one means to replace the other.
    if parents == ["optim"] and last in {"steps", "epochs"}:
        node.pop("epochs" if last == "steps" else "steps", None)
    node[last] = parsed
    return None


def _describe(item: Any) -> str:
    """Returns one pydantic error as ``section.field: what is wrong (got value)``."""
    parts = [str(part) for part in item["loc"]]
    if len(parts) > 1 and parts[0] == "model":
        del parts[1]  # the discriminator's tag is no key of the file
    place = ".".join(parts) or "the recipe"
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], sorted(_field_names()), n=1)
        return f"{place}: unknown field" + (f", did you mean {close[0]}?" if close else "")
    if item["type"] == "missing":
        return f"{place}: missing"
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], dict):
        return f"{place}: {message}"
    return f"{place}: {message} (got {item['input']!r})"


def _field_names() -> set[str]:
    towers = [VideoTowerConfig, TextTowerConfig, ViCLIPConfig, OpenClipConfig]
    sections = [DataConfig, ObjectiveConfig, OptimConfig, RunConfig]
    models: list[type[NetworkConfig]] = [TrainConfig, *towers, *sections]
    return {name for model in models for name in model.model_fields}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"duplicate keys {', '.join(sorted(twice))}{node.start_mark}")
        return super().construct_mapping(node, deep)
