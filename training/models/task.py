# SPDX-License-Identifier: Apache-2.0
"""What the trainer asks of a model and its objective together.

B clips, T frames, C H W a frame, F M a spectrogram, L tokens, D width, E embedding.
"""

from typing import NamedTuple, Protocol

import torch
from torch import nn

from training.data.batch import Inputs


class StepOutput(NamedTuple):
    """What one forward pass of a training step gives."""

    losses: dict[str, torch.Tensor]
    """Scalars, weighted already: their sum is minimised. The mean over processes of each is the loss of
    the global batch, so that averaging gradients over processes gives the global gradient."""
    numbers: dict[str, torch.Tensor]
    """Detached scalars for the log, such as the temperature."""


class DualEncoder(Protocol):
    """Videos and texts -> one space, in evaluation mode."""

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]; T may be 1."""
        ...

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features, float32 [B, E]."""
        ...


class Matcher(Protocol):
    """Judges pairs by looking at both together; dearer and better than a cosine."""

    def video_tokens(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns what `match` reads of clips, [B, N, D]."""
        ...

    def text_states(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns what `match` reads of texts, [B, L, D]."""
        ...

    def match(
        self, video_BND: torch.Tensor, text_BLD: torch.Tensor, tokens_BL: torch.Tensor
    ) -> torch.Tensor:
        """Returns the probability that each pair belongs together, float32 [B]."""
        ...


class Task(nn.Module):
    """A network and its objective; ``forward`` is a training step's, run under DDP or FSDP.

    Subclasses register the network that is exported as ``network``, under the published names.
    Frozen teachers are no submodules: they are neither saved, sharded nor averaged. What evaluation
    calls (`DualEncoder`, `Matcher`) are methods of the task itself, where FSDP can gather weights.
    """

    network: nn.Module

    def forward(self, inputs: Inputs) -> StepOutput:
        """Returns the losses of this process' rows."""
        raise NotImplementedError

    def dual_encoder(self) -> DualEncoder | None:
        """Returns the task itself if it encodes video and text; None if nothing here reads text."""
        return None

    def matcher(self) -> Matcher | None:
        """Returns the task itself if it judges pairs; None if nothing here looks at them."""
        return None

    def blocks(self) -> list[nn.Module]:
        """Returns the transformer blocks, in the order of depth: what is sharded and recomputed."""
        return []

    def no_decay(self) -> set[str]:
        """Returns parts of parameter names that weight decay leaves alone, 1-D ones aside."""
        return set()

    def layer_of(self, name: str) -> tuple[int, int] | None:
        """Returns (depth from 0, number of depths) of a parameter for layer decay; None is the head."""
        return None
