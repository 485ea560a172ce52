# SPDX-License-Identifier: Apache-2.0
"""What goes from readers to the trainer, and from the trainer to a model.

B clips, T frames, H W pixels, C channels (RGB), L tokens, F frames of a spectrogram, M mel bins.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.config import MediaKind
from training.distributed import gather


@dataclass(frozen=True)
class Pairs:
    """What is known of the rows beside their features, one entry a row."""

    valid: torch.Tensor
    """bool; rows that are not are left out of rows and columns."""
    caption_id: torch.Tensor
    """int64, equal for equal captions."""
    video_id: torch.Tensor
    """int64, equal for clips of one video."""

    def gathered(self) -> "Pairs":
        """Returns the rows of all processes."""
        return Pairs(gather(self.valid), gather(self.caption_id), gather(self.video_id))


class Batch(NamedTuple):
    """One process' clips of a step, on the CPU.

    A clip that could not be read keeps its place, zeroed and not valid.
    """

    kind: MediaKind
    frames: torch.Tensor | None
    """uint8 [B, T, H, W, 3], RGB; T is 1 for an image; None for sound alone."""
    crop: torch.Tensor | None
    """float32 [B, 5]: left, top, right, bottom in fractions of the frame, and 1 if mirrored. None if
    the frames are cropped already."""
    fbank: torch.Tensor | None
    """float32 [B, F, M], normalised; None without sound."""
    tokens: torch.Tensor
    """int64 [B, L], padded with 0; [B, 0] for a model without text."""
    valid: torch.Tensor
    """bool [B]; losses leave the others out."""
    caption_id: torch.Tensor
    """int64 [B], equal for equal cleaned captions."""
    video_id: torch.Tensor
    """int64 [B], equal for clips of one video."""
    position: torch.Tensor
    """int64 [B], the clip's place in the index, -1 where the batch has a hole."""
    skipped: list[tuple[str, str]]
    """(clip id, reason) of the clips that are not valid."""


class Inputs(NamedTuple):
    """A batch as a model sees it: on its device, cropped and normalised."""

    kind: MediaKind
    frames: torch.Tensor | None
    """float32 [B, T, C, H, W]."""
    fbank: torch.Tensor | None
    """float32 [B, F, M]."""
    tokens: torch.Tensor
    """int64 [B, L]."""
    pairs: Pairs
