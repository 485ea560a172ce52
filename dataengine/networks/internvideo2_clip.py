# SPDX-License-Identifier: Apache-2.0
"""InternVideo2-CLIP: InternVideo2's pooled feature beside the feature of a text encoder.

State-dict keys and shapes are those of the published checkpoints: ``vision_encoder.*``,
``vision_align.*`` (S, B and L), ``text_encoder.*``, ``temp``.

B clips or texts, T frames, C H W a frame, L tokens, D width, E embedding.

Source: InternVideo2 (Wang et al. 2024, arXiv:2403.15377), section 4.1.2, and the released code.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks.config import (
    InternVideo2ClipConfig,
    LlamaTextConfig,
    MobileClipTextConfig,
)
from dataengine.networks.internvideo2 import InternVideo2
from dataengine.networks.mobileclip import MobileClipText

if TYPE_CHECKING:
    from transformers import LlamaModel

MIN_TEMPERATURE = 0.01
"""As ViCLIP's: similarities are scaled by no more than 100."""


class InternVideo2Clip(nn.Module):
    """Two encoders and a learnt temperature; knows no loss and no distribution.

    Raises:
        ConfigError: If the widths do not fit.
        DependencyError: If there is a LLaMA to be and transformers is not installed.
    """

    def __init__(self, config: InternVideo2ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.temp = nn.Parameter(torch.tensor(config.init_temperature))
        self.vision_encoder = InternVideo2(config.vision)
        match config.text:
            case MobileClipTextConfig():
                self.vision_align = nn.Sequential(
                    nn.LayerNorm(config.vision.embed_dim),
                    nn.Linear(config.vision.embed_dim, config.embed_dim),
                )
                self.text_encoder = MobileClipText(config.text, config.embed_dim)
            case LlamaTextConfig():
                if config.vision.embed_dim != config.embed_dim:
                    raise ConfigError(
                        f"model.vision.embed_dim {config.vision.embed_dim} is not "
                        f"model.embed_dim {config.embed_dim}",
                        "beside LLaMA the pooled feature is taken as it is: make them equal",
                    )
                self.vision_align = nn.Identity()
                self.text_encoder = LlamaText(config.text, config.embed_dim)
        if not config.train_text:
            self.text_encoder.requires_grad_(False)
        if config.train == "projector":
            self.vision_encoder.requires_grad_(False)
            self.vision_encoder.clip_projector.requires_grad_(True)

    def forward(
        self, frames_BTCHW: torch.Tensor, tokens_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns unit-length video [B, E] and text [B, E] features and the scalar tau."""
        with torch.no_grad():
            # The parameter itself, as published: a clamp in the graph would stop its gradient.
            self.temp.clamp_(min=MIN_TEMPERATURE)
        return self.encode_video(frames_BTCHW), self.encode_text(tokens_BL), self.temp

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]; a frame alone is an image."""
        # Where the encoder is frozen, autograd keeps nothing of it: no input of it has a gradient.
        _, pooled_BD = self.vision_encoder(frames_BTCHW)
        return F.normalize(self.vision_align(pooled_BD).float(), dim=-1)

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]; without gradient if the encoder is frozen.

        Args:
            tokens_BL: int64, padded with 0 at the end.
        """
        with nullcontext() if self.config.train_text else torch.no_grad():
            return F.normalize(self.text_encoder(tokens_BL).float(), dim=-1)


class LlamaText(nn.Module):
    """InternVL-C's text encoder: a LLaMA, of which the last token's state is projected.

    Args:
        config: Its shape.
        embed_dim: Width of the feature.

    Raises:
        DependencyError: If transformers is not installed.
    """

    def __init__(self, config: LlamaTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.transformer = _llama(config)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        nn.init.normal_(self.text_projection, std=config.width**-0.5)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns [B, E], not normalised.

        Args:
            tokens_BL: int64; ids of 0 are padding, as published, wherever they stand.
        """
        L = tokens_BL.shape[1]
        there_BL = tokens_BL > 0
        last_B = there_BL.sum(dim=1) - 1
        # Captions are far shorter than what they are padded to, and no token sees one behind it: what
        # is padding in all of them is left out. Few lengths are good for caches of kernels.
        longest = int((there_BL.any(dim=0) * torch.arange(1, L + 1, device=there_BL.device)).max())
        longest = min(L, -(-max(longest, 1) // 8) * 8)
        attended_BL = there_BL.clone()
        # The place of a clip that could not be read has no token at all, and must not become NaN.
        attended_BL[:, 0] = True
        x_BLD = self.transformer(
            input_ids=tokens_BL[:, :longest],
            attention_mask=attended_BL[:, :longest],
            use_cache=False,
        ).last_hidden_state
        rows_B = torch.arange(len(x_BLD), device=x_BLD.device)
        return x_BLD[rows_B, last_B.clamp_min(0)] @ self.text_projection


def _llama(config: LlamaTextConfig) -> "LlamaModel":
    try:
        from transformers import LlamaConfig, LlamaModel
    except ImportError as error:
        raise DependencyError(
            "Missing package: transformers (the LLaMA of InternVideo2-CLIP)",
            "uv sync --extra train",
        ) from error
    return LlamaModel(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=max(2048, config.context_length),
            rms_norm_eps=config.rms_norm_eps,
        )
    )
