# SPDX-License-Identifier: Apache-2.0
"""Shapes of the networks that annotation and training share; cheap to import."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""ViCLIP normalises with ImageNet's statistics, not with CLIP's."""


class NetworkConfig(BaseModel):
    """Base of every shape: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class VideoTowerConfig(NetworkConfig):
    """A ViT over all patches of all frames."""

    image_size: int = Field(gt=0)
    """Height and width of a frame, pixels."""
    patch_size: int = Field(gt=0)
    """Height and width of a patch, pixels; must divide ``image_size``."""
    num_frames: int = Field(gt=0)
    """Frames of a clip, one from each of as many equal intervals."""
    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    mask_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the patch tokens left out at random in training; never in evaluation."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    checkpoint_activations: bool = False
    """Whether blocks are recomputed in the backward pass to save memory."""

    @model_validator(mode="after")
    def _fits(self) -> "VideoTowerConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class TextTowerConfig(NetworkConfig):
    """CLIP's causal text transformer over its BPE vocabulary."""

    context_length: int = Field(default=32, gt=2)
    """Tokens of a caption with start and end; ViCLIP reads 32, CLIP 77."""
    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "TextTowerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ViCLIPConfig(NetworkConfig):
    """The InternVid paper's video-text dual encoder."""

    kind: Literal["viclip"]
    embed_dim: int = Field(gt=0)
    video: VideoTowerConfig
    text: TextTowerConfig
    freeze_text: bool = False
    """Whether the text tower keeps its weights; only sensible with weights loaded into it."""
    init_temperature: float = Field(default=0.01, ge=0.01, le=1.0)
    """Start of the learnt temperature tau; similarities are divided by it. Never below 1/100."""
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
