# SPDX-License-Identifier: Apache-2.0
"""JPEGs or an MP4 -> the few small frames a model sees.

T frames, H W pixels, C channels (RGB).
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

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

    Frames at least twice as large as needed are decoded at a half, a quarter or an eighth of their size.

    Raises:
        OSError: If a JPEG is broken; the message is the same for the same bytes.
    """
    needed = (
        math.ceil(size / (crop.right - crop.left)),
        math.ceil(size / (crop.bottom - crop.top)),
    )
    # Opening reads the header alone. A clip's frames are of one size; another is decoded all the same.
    with _opened(jpegs[0]) as first:
        is_large = first.width >= 2 * needed[0] and first.height >= 2 * needed[1]
    if is_large:
        return _squares([_drafted(jpeg, needed) for jpeg in jpegs], size, crop)
    return _squares([_decoded(jpeg) for jpeg in jpegs], size, crop)


def square_images(images: list[Image.Image], size: int, crop: Crop) -> Frames:
    """Returns decoded images cropped and squeezed in the same way."""
    return _squares([_pixels(image) for image in images], size, crop)


def normalise(
    frames_BTHWC: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Returns float32 [B, T, C, H, W] from uint8 [B, T, H, W, C], on the same device."""
    dtype, device = torch.float32, frames_BTHWC.device
    mean_C = torch.tensor(mean, dtype=dtype, device=device)
    std_C = torch.tensor(std, dtype=dtype, device=device)
    return ((frames_BTHWC.to(dtype) / 255 - mean_C) / std_C).permute(0, 1, 4, 2, 3).contiguous()


def _decoded(jpeg: bytes) -> torch.Tensor:
    """Returns uint8 [H, W, 3]; a third faster than Pillow, but at full scale only."""
    # Imported late: it takes a second, and the MP4s are read without it.
    from torchvision.io import ImageReadMode, decode_jpeg

    if not jpeg:
        raise OSError("empty image")
    try:
        data = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
        frame_CHW: Any = decode_jpeg(data, ImageReadMode.RGB)
    except RuntimeError as error:
        # The message starts with a place in torchvision's source.
        raise OSError(f"broken image: {str(error).split(', ')[-1]}") from error
    return frame_CHW.permute(1, 2, 0)


def _drafted(jpeg: bytes, needed: tuple[int, int]) -> torch.Tensor:
    """Returns uint8 [H, W, 3] at the smallest scale that still has as many pixels as needed."""
    with _opened(jpeg) as image:
        image.draft("RGB", needed)
        return _pixels(image)


def _opened(jpeg: bytes) -> Image.Image:
    """Returns an image of which only the header is read."""
    if not jpeg:
        raise OSError("empty image")
    try:
        return Image.open(io.BytesIO(jpeg))
    except UnidentifiedImageError as error:
        # Pillow names the place in memory that it read from.
        raise OSError("broken image: no image that Pillow knows") from error
    except OSError as error:
        raise OSError(f"broken image: {error}") from error


def _pixels(image: Image.Image) -> torch.Tensor:
    """Returns uint8 [H, W, 3]."""
    try:
        return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise OSError(f"broken image: {str(error).partition(' (')[0]}") from error


def _squares(images_HWC: list[torch.Tensor], size: int, crop: Crop) -> Frames:
    """Cuts the box, rounded to whole pixels, and resizes it: bicubic, averaging what it shrinks."""
    boxes = [_cut(image, crop) for image in images_HWC]
    if len({box.shape for box in boxes}) > 1:
        return np.concatenate([_resized([box], size, crop.flip) for box in boxes])
    return _resized(boxes, size, crop.flip)


def _resized(boxes_HWC: list[torch.Tensor], size: int, flip: bool) -> Frames:
    # Channels stay last in memory: for that layout torch has a vectorised resize of bytes.
    boxes_TCHW = torch.stack(boxes_HWC).permute(0, 3, 1, 2)
    small = F.interpolate(boxes_TCHW, (size, size), mode="bicubic", antialias=True)
    return (small.flip(3) if flip else small).permute(0, 2, 3, 1).contiguous().numpy()


def _cut(image_HWC: torch.Tensor, crop: Crop) -> torch.Tensor:
    height, width = image_HWC.shape[:2]
    left, right = _span(crop.left, crop.right, width)
    top, bottom = _span(crop.top, crop.bottom, height)
    return image_HWC[top:bottom, left:right]


def _span(start: float, end: float, length: int) -> tuple[int, int]:
    """Returns the first pixel and the one behind the last; never empty."""
    first = min(round(start * length), length - 1)
    return first, max(round(end * length), first + 1)
