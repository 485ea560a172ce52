# SPDX-License-Identifier: Apache-2.0
"""An open_clip image-text model under the trainer.

B clips, T frames, C H W a frame, L text tokens, E embedding.
"""

import math
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from dataengine.networks.text import VOCAB_SIZE
from training.config import OpenClipConfig

_MAX_LOGIT_SCALE = math.log(100.0)


class OpenClipDualEncoder(nn.Module):
    """Wraps ``open_clip.CLIP``; a clip's feature is the mean of its frames' features."""

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__()
        self.clip = open_clip.CLIP(
            **model_config(config), init_logit_scale=math.log(1 / config.init_temperature)
        )

    def forward(
        self, frames_BTCHW: torch.Tensor, tokens_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns unit-length video [B, E] and text [B, E] features and the scalar tau."""
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=_MAX_LOGIT_SCALE)
        temperature = (-self.clip.logit_scale).exp()
        return self.encode_video(frames_BTCHW), self.encode_text(tokens_BL), temperature

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        B, T = frames_BTCHW.shape[:2]
        frame_E = self.clip.encode_image(frames_BTCHW.flatten(0, 1), normalize=True)
        return F.normalize(frame_E.float().view(B, T, -1).mean(dim=1), dim=-1)

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        return self.clip.encode_text(tokens_BL, normalize=True).float()


def model_config(config: OpenClipConfig) -> dict[str, Any]:
    """Returns open_clip's own description of the model."""
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "vision_cfg": {
            "image_size": config.video.image_size,
            "layers": config.video.layers,
            "width": config.video.width,
            "head_width": config.video.width // config.video.heads,
            "patch_size": config.video.patch_size,
            "patch_dropout": config.video.mask_ratio,
        },
        "text_cfg": {
            "context_length": config.text.context_length,
            "vocab_size": VOCAB_SIZE,
            "width": config.text.width,
            "heads": config.text.heads,
            "layers": config.text.layers,
        },
    }
