# SPDX-License-Identifier: Apache-2.0
"""Two towers and InfoNCE: ViCLIP, open_clip's models, InternVideo2-CLIP."""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import nn

from training.config import ContrastiveObjective
from training.data.batch import Inputs
from training.models.task import DualEncoder, StepOutput, Task
from training.objectives.contrastive import contrastive_loss

_BELOW = {
    "conv1", "class_embedding", "positional_embedding", "temporal_positional_embedding", "ln_pre",
    "patch_embed", "cls_token", "pos_embed", "img_pos_embed", "token_embedding", "embedding_layer",
    "embed_tokens",
}  # fmt: skip
"""Parts of the names of what lies below a tower's first block; what lies above the last is its head."""


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
        self._stacks = {
            tuple(name.split(".")): len(module)
            for name, module in self.named_modules()
            if isinstance(module, nn.ModuleList)
        }

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

    def layer_of(self, name: str) -> tuple[int, int] | None:
        """Returns 0 for embeddings and i + 1 for block i, each in its own tower; heads have no depth."""
        parts = name.split(".")
        for stack, layers in self._stacks.items():
            if tuple(parts[: len(stack)]) == stack:
                return int(parts[len(stack)]) + 1, layers + 1
        if not self._stacks or not _BELOW.intersection(parts):
            return None
        # An embedding belongs to the tower with which it shares most of its name; open_clip's text
        # tower stands above its image tower, which the shorter name tells.
        tower = min(self._stacks, key=lambda stack: (-_shared(stack, parts), len(stack)))
        return 0, self._stacks[tower] + 1


def _shared(stack: Sequence[str], parts: Sequence[str]) -> int:
    """Returns how many parts two names have in common from the start."""
    pairs = zip(stack, parts, strict=False)
    return next(
        (i for i, (one, other) in enumerate(pairs) if one != other), min(len(stack), len(parts))
    )
