# SPDX-License-Identifier: Apache-2.0
"""ViCLIP: a ViT with joint space-time attention and CLIP's text transformer.

State-dict keys and shapes are those of the published checkpoints (``vision_encoder.*``,
``text_encoder.*``, ``temp``), so that they load as they are.

B clips, T frames, C channels, H W pixels, h w patches of a frame, P = h * w, N tokens,
L text tokens, D width of a tower, E embedding.

Source: InternVid (Wang et al. 2023, arXiv:2307.06942), section 4.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.networks.config import TextTowerConfig, ViCLIPConfig, VideoTowerConfig
from dataengine.networks.text import VOCAB_SIZE
from dataengine.networks.transformer import LayerNorm, Transformer

EXPORTED_CONFIG = "viclip_config.json"
"""Shape of an exported model, beside its weights."""

WEIGHTS = "model.safetensors"
"""Weights of an exported model, or of a checkpoint."""

MIN_TEMPERATURE = 0.01
"""CLIP and ViCLIP let similarities be scaled by no more than 100."""


class ViCLIP(nn.Module):
    """Two towers and a learnt temperature; knows no loss and no distribution."""

    def __init__(self, config: ViCLIPConfig) -> None:
        super().__init__()
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
        """Returns unit-length features, float32 [B, E]."""
        return F.normalize(self.text_encoder(tokens_BL).float(), dim=-1)


class VideoTower(nn.Module):
    """Frames -> one feature: every patch of every frame attends to every other."""

    def __init__(self, config: VideoTowerConfig, embed_dim: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        num_patches = (config.image_size // patch) ** 2
        scale = width**-0.5
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
        x_BND = self.ln_pre(self._tokens(frames_BTCHW))
        x_BND = self.ln_post(self.transformer(x_BND))
        return x_BND[:, 0] @ self.proj

    def _tokens(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns the class token and the patch tokens, [B, 1 + N, D]."""
        B, T = frames_BTCHW.shape[:2]
        x_BDThw = self.conv1(frames_BTCHW.transpose(1, 2))
        # Spatial-major, time fastest: the order of the published model, which masking and any
        # comparison of tokens depend on.
        x_BPTD = x_BDThw.flatten(3).permute(0, 3, 2, 1)
        x_BPTD = x_BPTD + self.positional_embedding[1:, None] + self._temporal(T)
        x_BND = x_BPTD.flatten(1, 2)
        if self.training and self.mask_ratio > 0:
            x_BND = keep_random(x_BND, self.mask_ratio)
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


def keep_random(x_BND: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Returns a random share of each sample's tokens in their own order.

    ``int(mask_ratio * N)`` tokens are left out, drawn over all of space and time, anew for each
    sample.
    """
    B, N, D = x_BND.shape
    num_kept = N - int(mask_ratio * N)
    shuffled_BN = torch.rand(B, N, device=x_BND.device).argsort(dim=1)
    kept_BK = shuffled_BN[:, :num_kept].sort(dim=1).values
    return x_BND.gather(1, kept_BK[..., None].expand(-1, -1, D))


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
