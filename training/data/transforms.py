# SPDX-License-Identifier: Apache-2.0
"""JPEGs or an MP4 -> the few small frames a model sees.

T frames, H W pixels, C channels (RGB).
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Frames = NDArray[np.uint8]
"""uint8 [T, H, W, 3], RGB."""


@dataclass(frozen=True)
class Crop:
    """A box in fractions of the frame, the same for all frames of a clip, and a mirror."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    flip: bool = False


WHOLE = Crop()
"""Evaluation squeezes the whole frame into the square, as ViCLIP's does."""


def choose_frames(
    num_available: int, num_wanted: int, rng: np.random.Generator | None
) -> list[int]:
    """Returns ``num_wanted`` rising frame numbers, one from each of as many equal intervals.

    Args:
        num_available: Frames at hand, at least 1. With fewer than wanted, frames repeat.
        num_wanted: Frames to return.
        rng: Chooses inside each interval in training; without it the middle is taken.
    """
    edges = np.linspace(0, num_available, num_wanted + 1)
    share = rng.random(num_wanted) if rng is not None else np.full(num_wanted, 0.5)
    places = edges[:-1] + share * np.diff(edges)
    return np.minimum(places.astype(np.int64), num_available - 1).tolist()


def random_crop(
    width: int, height: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> Crop:
    """Returns a box of random area and aspect ratio, as torchvision's RandomResizedCrop draws it.

    The area is uniform in ``scale`` and the ratio log-uniform in [3/4, 4/3] of a square; a box
    that does not fit is drawn anew, and after ten times the largest centred square is taken.
    """
    mirrored = flip and bool(rng.random() < 0.5)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            left = rng.uniform(0, width - box_width)
            top = rng.uniform(0, height - box_height)
            break
    else:
        box_width = box_height = min(width, height)
        left, top = (width - box_width) / 2, (height - box_height) / 2
    return Crop(
        left / width,
        top / height,
        (left + box_width) / width,
        (top + box_height) / height,
        mirrored,
    )


def decode_jpegs(jpegs: list[bytes], size: int, crop: Crop) -> Frames:
    """Returns the cropped frames as squares of ``size`` pixels, aspect not kept.

    Raises:
        OSError: If a JPEG is broken.
    """
    return np.stack([_square(_open_draft(jpeg, size, crop), size, crop) for jpeg in jpegs])


def square_images(images: list[Image.Image], size: int, crop: Crop) -> Frames:
    """Returns decoded images cropped and squeezed in the same way."""
    return np.stack([_square(image, size, crop) for image in images])


def normalise(
    frames_BTHWC: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Returns float32 [B, T, C, H, W] from uint8 [B, T, H, W, C], on the same device."""
    dtype, device = torch.float32, frames_BTHWC.device
    mean_C = torch.tensor(mean, dtype=dtype, device=device)
    std_C = torch.tensor(std, dtype=dtype, device=device)
    return ((frames_BTHWC.to(dtype) / 255 - mean_C) / std_C).permute(0, 1, 4, 2, 3).contiguous()


def _open_draft(jpeg: bytes, size: int, crop: Crop) -> Image.Image:
    """Opens a JPEG at the smallest of its 1, 1/2, 1/4, 1/8 scales that still covers ``size``."""
    image = Image.open(io.BytesIO(jpeg))
    needed_width = math.ceil(size / (crop.right - crop.left))
    needed_height = math.ceil(size / (crop.bottom - crop.top))
    image.draft("RGB", (needed_width, needed_height))
    return image if image.mode == "RGB" else image.convert("RGB")


def _square(image: Image.Image, size: int, crop: Crop) -> NDArray[np.uint8]:
    box = (
        crop.left * image.width,
        crop.top * image.height,
        crop.right * image.width,
        crop.bottom * image.height,
    )
    small = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if crop.flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(small)
