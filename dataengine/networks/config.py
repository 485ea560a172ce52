# SPDX-License-Identifier: Apache-2.0
"""Shapes of the networks that annotation and training share; cheap to import."""

from typing import Annotated, Literal

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


class BeatsNetworkConfig(NetworkConfig):
    """BEATs' audio encoder (Chen et al. 2023, arXiv 2212.09058); the defaults are the published shape.

    Dropouts and whatever else a published ``cfg`` holds for training alone has no place here.
    """

    patch_size: int = Field(default=16, gt=0)
    """Edge of a patch: frames of 10 ms, and mel bins."""
    embed_dim: int = Field(default=512, gt=0)
    """Width of a patch before it is projected to ``width``."""
    conv_bias: bool = False
    width: int = Field(default=768, gt=0)
    mlp_width: int = Field(default=3072, gt=0)
    layers: int = Field(default=12, gt=0)
    heads: int = Field(default=12, gt=0)
    deep_norm: bool = True
    """Whether residuals are scaled by (2 x layers) ** 1/4 (DeepNet, Wang et al. 2022)."""
    conv_pos: int = Field(default=128, gt=0)
    """Kernel of the convolution that says where a patch is, in patches."""
    conv_pos_groups: int = Field(default=16, gt=0)
    num_buckets: int = Field(default=320, ge=4)
    """Distances that the relative position bias tells apart, both directions together."""
    max_distance: int = Field(default=800, gt=0)
    """Distance in patches from which on all share the last bucket."""
    num_classes: int = Field(default=0, ge=0)
    """Outputs of the classifier of a fine-tuned model, 527 for AudioSet; 0 has none."""

    @model_validator(mode="after")
    def _fits(self) -> "BeatsNetworkConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % self.conv_pos_groups:
            raise ValueError(
                f"width {self.width} is not a multiple of {self.conv_pos_groups} groups"
            )
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(f"max_distance {self.max_distance} is within the exact buckets")
        return self


class AudioQFormerConfig(NetworkConfig):
    """The Q-Former between BEATs and a language model; the defaults are BLIP-2's and VideoChat's."""

    num_queries: int = Field(default=32, gt=0)
    """Learned queries, and so soft tokens that the language model hears."""
    width: int = Field(default=768, gt=0)
    mlp_width: int = Field(default=3072, gt=0)
    layers: int = Field(default=12, gt=0)
    heads: int = Field(default=12, gt=0)
    cross_attention_frequency: int = Field(default=2, gt=0)
    """Every so many layers look at the sound."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    window_s: float = Field(default=10.0, gt=0)
    """BEATs hears at most this much at once: AudioSet's clips, on which it was trained, are of 10 s."""
    max_windows: int = Field(default=3, gt=0)
    """Windows that are heard; what comes later in a sound is not."""

    @model_validator(mode="after")
    def _fits(self) -> "AudioQFormerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class InternVideo2Config(NetworkConfig):
    """InternVideo2's vision encoder; see `dataengine.networks.internvideo2`."""

    image_size: int = Field(default=224, gt=0)
    """Height and width of a frame, pixels."""
    patch_size: int = Field(default=14, gt=0)
    """Height and width of a patch, pixels."""
    num_frames: int = Field(default=8, gt=0)
    """Frames of a clip: 8 in stage 1, 4 in stage 2."""
    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_width: int = Field(gt=0)
    """Hidden width of the MLPs."""
    pool_heads: int = Field(default=16, gt=0)
    """Heads of the attention pooling."""
    embed_dim: int = Field(default=768, gt=0)
    """Width of the pooled feature."""
    image_positions: bool = False
    """Whether images have position embeddings of their own (stage 2 of the 1B model)."""
    gelu: Literal["tanh", "none"] = "tanh"
    """torch's name of the approximation; the released weights were trained with ``tanh``."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    checkpoint_activations: bool = False
    """Whether blocks are recomputed in the backward pass to save memory."""

    @model_validator(mode="after")
    def _fits(self) -> "InternVideo2Config":
        for heads in (self.heads, self.pool_heads):
            if self.width % heads:
                raise ValueError(f"width {self.width} is not a multiple of {heads} heads")
        if self.image_size % self.patch_size or self.width % 8:
            raise ValueError("image_size must be a multiple of patch_size, and width of 8")
        return self


class BertConfig(NetworkConfig):
    """BERT split in two: the first layers read text, the others also attend to video or sound.

    The defaults are bert-large-uncased as InternVideo2's stage 2 splits it (19 + 5).
    """

    vocab_size: int = Field(default=30522, gt=0)
    width: int = Field(default=1024, gt=0)
    layers: int = Field(default=24, gt=0)
    fusion_layer: int = Field(default=19, gt=0)
    """Layers that read text alone; those behind them have cross-attention."""
    heads: int = Field(default=16, gt=0)
    mlp_width: int = Field(default=4096, gt=0)
    max_positions: int = Field(default=512, gt=0)
    num_token_types: int = Field(default=2, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    mask_id: int = Field(default=103, ge=0)
    """The tokenizer's id of ``[MASK]``; 103 in all of Google's vocabularies. ``[PAD]`` is 0, and
    ``[CLS]`` is the first token of a text, whatever its id."""

    @model_validator(mode="after")
    def _fits(self) -> "BertConfig":
        if self.mask_id >= self.vocab_size:
            raise ValueError(f"mask_id {self.mask_id} is no word of {self.vocab_size}: set it")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.fusion_layer > self.layers:
            raise ValueError(f"fusion_layer {self.fusion_layer} is behind the last layer")
        return self


class InternVideo2Stage2Config(NetworkConfig):
    """InternVideo2's second stage: vision encoder, split BERT, and sound if asked for."""

    kind: Literal["internvideo2_stage2"]
    vision: InternVideo2Config
    text: BertConfig = BertConfig()
    tokenizer: str = "google-bert/bert-large-uncased"
    """Hub id or local folder of the text encoder's tokenizer; ``tiny_bert`` is the one beside the
    recipes."""
    context_length: int = Field(default=32, gt=2)
    """Tokens of a caption with start and end: 32 for the 1B model, 40 for the 6B."""
    embed_dim: int = Field(default=512, gt=0)
    """Width of the shared space: 512 for the 1B model, 768 for the 6B."""
    audio: BeatsNetworkConfig | None = None
    """BEATs; None trains on pictures alone (the 1B model)."""
    fusion_width: int = Field(default=768, gt=0)
    """Width to which video and audio tokens are brought for the decoder; used with ``audio`` only."""
    freeze_vision: bool = False
    """Whether the vision encoder keeps its weights (the paper's second phase)."""
    freeze_audio: bool = True
    """Whether BEATs keeps its weights (it does in the released runs)."""
    init_temperature: float = Field(default=0.07, ge=0.001, le=0.5)
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD

    @model_validator(mode="after")
    def _fits(self) -> "InternVideo2Stage2Config":
        if self.context_length > self.text.max_positions:
            raise ValueError(
                f"context_length {self.context_length} is more than max_positions "
                f"{self.text.max_positions} of the text encoder"
            )
        return self


class MobileClipTextConfig(NetworkConfig):
    """MobileCLIP-B's text transformer; the defaults are the published shape."""

    kind: Literal["mobileclip"] = "mobileclip"
    vocab_size: int = Field(default=49408, gt=0)
    context_length: int = Field(default=77, gt=2)
    width: int = Field(default=512, gt=0)
    layers: int = Field(default=12, gt=0)
    heads: int = Field(default=8, gt=0)
    mlp_width: int = Field(default=2048, gt=0)


class LlamaTextConfig(NetworkConfig):
    """InternVL-C's LLaMA as a text encoder; the defaults are the published shape (7B)."""

    kind: Literal["llama"] = "llama"
    tokenizer: str = ""
    """Hub id or local folder of its tokenizer (``chinese_alpaca_lora_7b``)."""
    vocab_size: int = Field(default=49954, gt=0)
    context_length: int = Field(default=80, gt=2)
    width: int = Field(default=4096, gt=0)
    layers: int = Field(default=32, gt=0)
    heads: int = Field(default=32, gt=0)
    mlp_width: int = Field(default=11008, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)


class InternVideo2ClipConfig(NetworkConfig):
    """InternVideo2-CLIP: the vision encoder's pooled feature beside a text encoder's.

    With MobileCLIP's text tower (S, B, L) the vision feature passes a norm and a linear layer; with
    LLaMA (1B, 6B) it is taken as it is.
    """

    kind: Literal["internvideo2_clip"]
    vision: InternVideo2Config
    text: Annotated[MobileClipTextConfig | LlamaTextConfig, Field(discriminator="kind")]
    embed_dim: int = Field(gt=0)
    """Width of the shared space: 512 for S, B and L, 768 for 1B and 6B."""
    train: Literal["projector", "all"] = "projector"
    """``projector`` trains the attention pooling, what follows it and the temperature, as published;
    ``all`` trains the vision encoder too. The text encoder keeps its weights either way, unless
    ``train_text``."""
    train_text: bool = False
    """Whether the text encoder trains too; needed where nothing was loaded into it."""
    init_temperature: float = Field(default=0.01, ge=0.01, le=1.0)
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
