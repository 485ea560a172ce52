# SPDX-License-Identifier: Apache-2.0
"""ViCLIP: a ViT with joint space-time attention and CLIP's text transformer.

State-dict keys and shapes are those of the published checkpoints (``vision_encoder.*``,
``text_encoder.*``, ``temp``), so that they load as they are.

B clips, T frames, C channels, H W pixels, h w patches of a frame, p q pixels of a patch,
N = h * w * T patches of a clip, K kept ones, L text tokens, D width of a tower, E embedding.

Source: InternVid (Wang et al. 2023, arXiv:2307.06942), section 4.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.networks.config import TextTowerConfig, ViCLIPConfig, VideoTowerConfig
from dataengine.networks.text import VOCAB_SIZE
from dataengine.networks.transformer import LayerNorm, Transformer

MIN_TEMPERATURE = 0.01
"""CLIP and ViCLIP let similarities be scaled by no more than 100."""


def _published(
    patch_size: int, width: int, layers: int, heads: int, text_width: int, embed_dim: int
) -> ViCLIPConfig:
    return ViCLIPConfig(
        kind="viclip",
        embed_dim=embed_dim,
        video=VideoTowerConfig(
            image_size=224, patch_size=patch_size, num_frames=8,
            width=width, layers=layers, heads=heads,
        ),
        text=TextTowerConfig(width=text_width, layers=12, heads=text_width // 64),
    )  # fmt: skip


PUBLISHED: Mapping[str, ViCLIPConfig] = {
    "B": _published(16, width=768, layers=12, heads=12, text_width=512, embed_dim=512),
    "L": _published(14, width=1024, layers=24, heads=16, text_width=768, embed_dim=768),
}
"""Shapes of the released models: 149.60 M and 427.59 M parameters in 303 and 447 tensors."""


class ViCLIP(nn.Module):
    """Two towers and a learnt temperature; knows no loss and no distribution."""

    def __init__(self, config: ViCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.temp = nn.Parameter(torch.tensor(config.init_temperature))
        self.vision_encoder = VideoTower(config.video, config.embed_dim)
        self.text_encoder = TextTower(config.text, config.embed_dim)
        if config.freeze_text:
            self.text_encoder.requires_grad_(False)

    def forward(
        self, frames_BTCHW: torch.Tensor, tokens_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns unit-length video [B, E] and text [B, E] features and the scalar tau."""
        with torch.no_grad():
            # The parameter itself, as published: a clamp in the graph would stop its gradient.
            self.temp.clamp_(min=MIN_TEMPERATURE)
        return self.encode_video(frames_BTCHW), self.encode_text(tokens_BL), self.temp

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        return F.normalize(self.vision_encoder(frames_BTCHW).float(), dim=-1)

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]; without gradient if the tower is frozen."""
        with torch.no_grad() if self.config.freeze_text else nullcontext():
            return F.normalize(self.text_encoder(tokens_BL).float(), dim=-1)


class VideoTower(nn.Module):
    """Frames -> one feature: every patch of every frame attends to every other."""

    def __init__(self, config: VideoTowerConfig, embed_dim: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        num_patches = (config.image_size // patch) ** 2
        scale = width**-0.5
        self.patch_size = patch
        self.mask_ratio = config.mask_ratio
        # A kernel of one frame: time enters through the temporal embedding alone.
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_patches + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            drop_path=config.drop_path,
            checkpoint_activations=config.checkpoint_activations,
        )
        self.ln_post = LayerNorm(width)
        # The published code leaves it uninitialised and relies on loading CLIP's; ours is CLIP's.
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns [B, E], not normalised."""
        x_BND = self.transformer(self.ln_pre(self._tokens(frames_BTCHW)))
        # The norm is a token's own business: that of the class token is enough.
        return self.ln_post(x_BND[:, 0]) @ self.proj

    def _tokens(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns the class token and the patch tokens, [B, 1 + N, D], or [B, 1 + K, D] if masked.

        What is masked is left out before it is projected, which changes no number and saves, with
        nine tenths masked, as much of the work.
        """
        B, T = frames_BTCHW.shape[:2]
        places_ND = (self.positional_embedding[1:, None] + self._temporal(T)).flatten(0, 1)
        kept_BK = None
        if self.training and self.mask_ratio > 0:
            kept_BK = random_kept(B, len(places_ND), self.mask_ratio, frames_BTCHW.device)
            places_ND = F.embedding(kept_BK, places_ND)
        patches_BNF = patches_of(frames_BTCHW, self.patch_size, kept_BK)
        x_BND = F.linear(patches_BNF, self.conv1.weight.flatten(1)) + places_ND
        class_token_D = self.class_embedding + self.positional_embedding[0]
        return torch.cat([class_token_D.to(x_BND.dtype).expand(B, 1, -1), x_BND], dim=1)

    def _temporal(self, num_frames: int) -> torch.Tensor:
        """Returns the temporal embedding, [1, T, D]; a single image takes its mean over time."""
        embedding_1TD = self.temporal_positional_embedding
        if num_frames == 1:
            return embedding_1TD.mean(dim=1, keepdim=True)
        if num_frames != embedding_1TD.shape[1]:
            raise ValueError(f"{num_frames} frames given, {embedding_1TD.shape[1]} expected")
        return embedding_1TD


class TextTower(nn.Module):
    """Token ids -> the feature at the end-of-text token of a causal transformer."""

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(width, config.layers, config.heads, causal=True)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns [B, E], not normalised."""
        x_BLD = self.token_embedding(tokens_BL)
        x_BLD = x_BLD + self.positional_embedding[: tokens_BL.shape[1]]
        x_BLD = self.ln_final(self.transformer(x_BLD))
        # The end-of-text id is the highest of the vocabulary.
        end_B = tokens_BL.argmax(dim=-1)
        return x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), end_B] @ self.text_projection


def patches_of(
    frames_BTCHW: torch.Tensor, patch_size: int, kept_BK: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the pixels of patches, [B, N, C * p * q], or [B, K, C * p * q] of the kept ones.

    Patch after patch, and the frames of each: the order of the published model, which masking and any
    comparison of tokens depend on.

    Args:
        frames_BTCHW: H and W are multiples of ``patch_size``.
        patch_size: Pixels.
        kept_BK: Numbers of the patches to be returned, int64.
    """
    T = frames_BTCHW.shape[1]
    x_BTChpwq = frames_BTCHW.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    x_BhwTCpq = x_BTChpwq.permute(0, 3, 5, 1, 2, 4, 6)
    if kept_BK is None:
        return x_BhwTCpq.flatten(1, 3).flatten(2)
    w = x_BhwTCpq.shape[2]
    patch_BK, frame_BK = kept_BK // T, kept_BK % T
    row_B1 = torch.arange(len(kept_BK), device=kept_BK.device)[:, None]
    return x_BhwTCpq[row_B1, patch_BK // w, patch_BK % w, frame_BK].flatten(2)


def random_kept(
    batch_size: int, num_tokens: int, mask_ratio: float, device: torch.device
) -> torch.Tensor:
    """Returns the numbers of a random share of each sample's tokens, rising, int64 [B, K].

    ``int(mask_ratio * N)`` tokens are left out, drawn over all of space and time, anew for each
    sample, by the device's default generator.
    """
    num_kept = num_tokens - int(mask_ratio * num_tokens)
    shuffled_BN = torch.rand(batch_size, num_tokens, device=device).argsort(dim=1)
    return shuffled_BN[:, :num_kept].sort(dim=1).values


def fit_positions(
    state: Mapping[str, torch.Tensor], config: ViCLIPConfig
) -> dict[str, torch.Tensor]:
    """Returns the weights of a ViCLIP with its position embeddings brought to another shape.

    Frames: the first ones if fewer are wanted, linear interpolation if more. Space: bicubic. Text: the
    first ones, or zeros behind them. All as published.

    Raises:
        ValueError: If the spatial positions are not those of a square.
    """
    fitted = dict(state)
    video = config.video
    name = "vision_encoder.temporal_positional_embedding"
    if name in state:
        fitted[name] = resize_time(state[name], video.num_frames)
    name = "vision_encoder.positional_embedding"
    if name in state:
        fitted[name] = resize_space(state[name], video.image_size // video.patch_size)
    name = "text_encoder.positional_embedding"
    if name in state:
        fitted[name] = resize_context(state[name], config.text.context_length)
    return fitted


def resize_time(table_1TD: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Returns [1, num_frames, D]: the first ones, or interpolated linearly if more are wanted."""
    if num_frames <= table_1TD.shape[1]:
        return table_1TD[:, :num_frames]
    return F.interpolate(table_1TD.transpose(1, 2), size=num_frames, mode="linear").transpose(1, 2)


def resize_space(table_PD: torch.Tensor, side: int) -> torch.Tensor:
    """Returns [1 + side ** 2, D], interpolated bicubically; the class token's, the first, is kept.

    Raises:
        ValueError: If the others are not those of a square.
    """
    old_side = math.isqrt(len(table_PD) - 1)
    if old_side**2 != len(table_PD) - 1:
        raise ValueError(f"{len(table_PD) - 1} positions are not those of a square")
    if old_side == side:
        return table_PD
    table_1Dhw = table_PD[1:].T.unflatten(1, (old_side, old_side))[None]
    resized = F.interpolate(table_1Dhw, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table_PD[:1], resized[0].flatten(1).T])


def resize_context(table_LD: torch.Tensor, context_length: int) -> torch.Tensor:
    """Returns [context_length, D]: the first ones, with zeros behind them if more are wanted."""
    cut_LD = table_LD[:context_length]
    return F.pad(cut_LD, (0, 0, 0, context_length - len(cut_LD)))


_HEAD_WIDTH = 64
"""Of every published model: 8 to 16 heads, by the tower's width."""


def published_weights(payload: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the weights inside a published checkpoint, in float32 under the names of `ViCLIP`.

    Args:
        payload: What ``torch.load`` gives: the weights, or a dict that holds them as ``model`` beside the
            state of the training run. Names may start with ``module.``, as DeepSpeed leaves them.

    Raises:
        ValueError: If there are no weights in it.
    """
    inner = payload.get("model", payload)
    if not isinstance(inner, Mapping):
        raise ValueError("its entry 'model' holds no weights")
    state = {
        str(name).removeprefix("module."): tensor.float()
        for name, tensor in inner.items()
        if isinstance(tensor, torch.Tensor)
    }
    if not state:
        raise ValueError("it holds no weights")
    return state


def published_config(state: Mapping[str, torch.Tensor]) -> ViCLIPConfig:
    """Returns the shape of a published model, read off its weights.

    Raises:
        ValueError: If a weight that tells is missing or has a shape of another model.
    """
    try:
        conv_DCTHW = state["vision_encoder.conv1.weight"].shape
        num_tokens, _ = state["vision_encoder.positional_embedding"].shape
        _, num_frames, width = state["vision_encoder.temporal_positional_embedding"].shape
        _, embed_dim = state["vision_encoder.proj"].shape
        context_length, text_width = state["text_encoder.positional_embedding"].shape
        patch_size = conv_DCTHW[-1]
    except KeyError as error:
        raise ValueError(f"missing {error.args[0]}") from error
    return ViCLIPConfig.model_validate(
        {
            "kind": "viclip",
            "embed_dim": embed_dim,
            "video": {
                "image_size": round((num_tokens - 1) ** 0.5) * patch_size,
                "patch_size": patch_size,
                "num_frames": num_frames,
                "width": width,
                "layers": _num_layers(state, "vision_encoder"),
                "heads": max(1, width // _HEAD_WIDTH),
            },
            "text": {
                "context_length": context_length,
                "width": text_width,
                "layers": _num_layers(state, "text_encoder"),
                "heads": max(1, text_width // _HEAD_WIDTH),
            },
        }
    )


def _num_layers(state: Mapping[str, torch.Tensor], tower: str) -> int:
    prefix = f"{tower}.transformer.resblocks."
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    )


def load_whole(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Loads weights; every name and shape must agree.

    Raises:
        ValueError: Naming the weights that do not.
    """
    own = model.state_dict()
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
    model.load_state_dict(dict(state))
