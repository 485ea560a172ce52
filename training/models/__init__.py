# SPDX-License-Identifier: Apache-2.0
"""Models by the ``kind`` of a recipe. Imported lazily: a recipe needs only its own family."""

from typing import Protocol

import torch

from training.config import ModelConfig, OpenClipConfig, ViCLIPConfig


class DualEncoder(Protocol):
    """What the trainer asks of a two-tower model; it is an ``nn.Module`` besides.

    B clips, T frames, C H W a frame, L tokens, D embedding.
    """

    def __call__(
        self, frames_BTCHW: torch.Tensor, tokens_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns unit-length video [B, D] and text [B, D] features and the scalar tau."""
        ...

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features [B, D]."""
        ...

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features [B, D]."""
        ...


def build_model(config: ModelConfig) -> torch.nn.Module:
    """Returns a freshly initialised ``DualEncoder``; torch's default generator draws its weights."""
    match config:
        case ViCLIPConfig():
            from dataengine.networks.viclip import ViCLIP

            return ViCLIP(config)
        case OpenClipConfig():
            from training.models.open_clip_model import OpenClipDualEncoder

            return OpenClipDualEncoder(config)
