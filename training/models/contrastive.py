# SPDX-License-Identifier: Apache-2.0
"""Two towers and InfoNCE: ViCLIP, open_clip's models, InternVideo2-CLIP."""

from typing import Protocol, cast

import torch
from torch import nn

from training.config import ContrastiveObjective
from training.data.batch import Inputs
from training.models.task import DualEncoder, StepOutput, Task
from training.objectives.contrastive import contrastive_loss


class TwoTowers(Protocol):
    """A network of two towers; it is an ``nn.Module`` besides."""

    def __call__(
        self, frames_BTCHW: torch.Tensor, tokens_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns unit-length video [B, E] and text [B, E] features and the scalar tau."""
        ...

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        ...

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        ...


class ContrastiveTask(Task):
    """Pulls a clip and its caption together and the rest of the batch apart.

    Args:
        network: `TwoTowers`.
        objective: Which rows are no negatives of each other, and which gradient is taken.
    """

    def __init__(self, network: nn.Module, objective: ContrastiveObjective) -> None:
        super().__init__()
        self.network = network
        self._objective = objective

    def forward(self, inputs: Inputs) -> StepOutput:
        """Returns this process' share of InfoNCE."""
        assert inputs.frames is not None
        towers = cast(TwoTowers, self.network)
        video_BE, text_BE, temperature = towers(inputs.frames, inputs.tokens)
        loss = contrastive_loss(video_BE, text_BE, temperature, inputs.pairs, self._objective)
        return StepOutput({"vtc": loss}, {"temperature": temperature.detach()})

    def dual_encoder(self) -> DualEncoder:
        """Returns itself."""
        return self

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        return cast(TwoTowers, self.network).encode_video(frames_BTCHW)

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        return cast(TwoTowers, self.network).encode_text(tokens_BL)

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of both towers, the video tower's first."""
        return [
            block
            for module in self.network.modules()
            if isinstance(module, nn.ModuleList)
            for block in module
        ]

    def no_decay(self) -> set[str]:
        """Returns temperatures, embeddings of place and class, and the token table.

        ViCLIP decays neither 1-D parameters nor embeddings of place; the token table joins them
        because decay would shrink the words a small corpus never shows.
        """
        return {
            "temp", "logit_scale", "class_embedding", "cls_token", "positional_embedding",
            "pos_embed", "token_embedding", "embedding_layer",
        }  # fmt: skip
