# SPDX-License-Identifier: Apache-2.0
"""Recipe YAML + ``--set`` overrides -> one frozen ``AudioCaptionConfig``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from dataengine.errors import ConfigError
from dataengine.networks.config import AudioQFormerConfig, NetworkConfig
from training.config import OptimConfig


class PromptConfig(NetworkConfig):
    """What the language model reads around the sound; goes into the trained folder."""

    before: str = ""
    after: str = ""


class AudioDataConfig(NetworkConfig):
    """How sounds and captions are read."""

    batch_size: int = Field(gt=0)
    """Sounds per step."""
    max_tokens: int = Field(default=64, gt=1)
    """Longer captions lose their end; also the longest caption that is ever written."""
    held_out: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the sounds, by a hash of their id, that only measure the loss."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode sound; changes nothing in the batches."""


class AudioRunConfig(NetworkConfig):
    """How the run behaves; nothing here changes what is learnt, but seed and precision."""

    seed: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` computes in bfloat16 on a GPU; the Q-Former's weights stay in float32."""
    log_every: int = Field(default=20, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)


class AudioCaptionConfig(NetworkConfig):
    """A whole recipe."""

    beats: str
    """Path of a published BEATs checkpoint."""
    language_model: str
    """Hub id or local folder of a causal language model."""
    language_model_revision: str = ""
    """Commit, tag or branch on the hub; empty takes the newest."""
    prompt: PromptConfig = PromptConfig()
    qformer: AudioQFormerConfig = AudioQFormerConfig()
    data: AudioDataConfig
    optim: OptimConfig
    run: AudioRunConfig = AudioRunConfig()


def load_audio_recipe(path: str, overrides: Sequence[str] = ()) -> AudioCaptionConfig:
    """Returns a recipe with ``a.b=c`` overrides applied.

    Raises:
        ConfigError: With every problem found, not only the first.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    problems = [problem for text in overrides if (problem := _override(document, text))]
    config = None
    try:
        config = AudioCaptionConfig.model_validate(document)
    except ValidationError as error:
        for item in error.errors():
            place = ".".join(map(str, item["loc"])) or "the recipe"
            problems.append(f"{place}: {item['msg'].removeprefix('Value error, ')}")
    if config is None or problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{path} cannot be trained as written:\n{lines}",
            "fields and their meanings are in training/audio_caption/config.py",
        )
    return config


def _override(document: dict[str, Any], text: str) -> str | None:
    """Writes one ``a.b=c`` into the document; returns the problem if it cannot."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        return f"--set {text}: expected field=value or section.field=value"
    *parents, last = key.split(".")
    node = document
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return f"--set {text}: {parent} is not a section"
    # Steps and epochs exclude each other; who sets one means to replace the other.
    if parents == ["optim"] and last in {"steps", "epochs"}:
        node.pop("epochs" if last == "steps" else "steps", None)
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"--set {text}: the value is not valid YAML"
    return None
