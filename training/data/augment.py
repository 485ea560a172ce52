# SPDX-License-Identifier: Apache-2.0
"""A batch as readers make it -> what a model sees: on its device, cropped, mirrored, normalised.

B clips, T frames, C channels, H W S pixels.
"""

import torch
import torch.nn.functional as F

from training.config import InputSpec
from training.data.batch import Batch, Inputs, Pairs
from training.data.transforms import normalise


def to_inputs(batch: Batch, spec: InputSpec, device: torch.device) -> Inputs:
    """Moves a batch to a device, cuts its crops if the readers did not, and normalises its frames.

    From pinned memory the copies run beside the device's work.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    frames = None
    if batch.frames is not None:
        frames = normalise(moved(batch.frames), spec.pixel_mean, spec.pixel_std)
        if batch.crop is not None:
            frames = cropped(frames, moved(batch.crop), spec.image_size)
    return Inputs(
        batch.kind,
        frames,
        None if batch.fbank is None else moved(batch.fbank),
        moved(batch.tokens),
        Pairs(moved(batch.valid), moved(batch.caption_id), moved(batch.video_id)),
    )


def cropped(frames_BTCHW: torch.Tensor, crop_B5: torch.Tensor, size: int) -> torch.Tensor:
    """Returns each clip's box as [B, T, C, size, size], bicubic, and mirrored where asked.

    The readers' squares are hardly larger than ``size``, so nothing is averaged. On the byte scale the
    result is within 1 on average, and 4 inside the box, of what readers cut from a smooth picture. The
    whole box of frames of that size gives the frames as they are.

    Args:
        frames_BTCHW: float32.
        crop_B5: float32: left, top, right, bottom in fractions of the frame, 1 if mirrored.
        size: Height and width of the result, pixels.
    """
    B, T, C, H, W = frames_BTCHW.shape
    left, top, right, bottom, flip = crop_B5.unbind(1)
    # grid_sample's axes run from -1 at the first pixel's outer edge to 1 at the last one's; the box's
    # centre and half size on them. A negative width mirrors.
    zero = torch.zeros_like(left)
    across = torch.stack([(right - left) * (1 - 2 * flip), zero, left + right - 1], 1)
    down = torch.stack([zero, bottom - top, top + bottom - 1], 1)
    theta_B23 = torch.stack([across, down], 1)
    # One grid a clip: its frames are more channels of one picture.
    grid_BSS2 = F.affine_grid(theta_B23, [B, T * C, size, size], align_corners=False)
    sampled = F.grid_sample(
        frames_BTCHW.reshape(B, T * C, H, W),
        grid_BSS2,
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    return sampled.view(B, T, C, size, size)
