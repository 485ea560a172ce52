# SPDX-License-Identifier: Apache-2.0
"""Crops cut on the device against crops cut by the readers."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import InputSpec
from training.data.augment import cropped, to_inputs
from training.data.batch import Batch
from training.data.transforms import WHOLE, Crop, normalise, random_crop, square_images

SIZE, MEAN, STD = 64, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SPEC = InputSpec(2, SIZE, "clip", "", 8, MEAN, STD)
CPU = torch.device("cpu")


def smooth_image(width, height, phase):
    """Waves that are several times longer than a pixel of the square, another in each channel."""
    x, y = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    waves = [np.sin(2 * np.pi * (a * x + b * y) + phase) for a, b in ((2, 1), (-1, 2.5), (1.5, -2))]
    return Image.fromarray((127.5 + 100 * np.stack(waves, 2)).round().astype(np.uint8))


def batch_of(frames_BTHWC, crops):
    B = len(frames_BTHWC)
    crop_B5 = None
    if crops is not None:
        rows = [[c.left, c.top, c.right, c.bottom, c.flip] for c in crops]
        crop_B5 = torch.tensor(rows, dtype=torch.float32)
    ids = torch.arange(B)
    return Batch(
        "video",
        torch.from_numpy(np.stack(frames_BTHWC)),
        crop_B5,
        torch.randn(B, 998, 64),
        torch.ones(B, 8, dtype=torch.int64),
        torch.ones(B, dtype=torch.bool),
        ids + 10,
        ids + 20,
        ids,
        [],
    )


def test_without_crops_frames_are_only_normalised():
    frames = np.random.default_rng(0).integers(0, 256, (3, 2, SIZE, SIZE, 3), dtype=np.uint8)
    batch = batch_of(frames, None)
    inputs = to_inputs(batch, SPEC, CPU)
    assert inputs.frames is not None
    assert inputs.fbank is not None
    assert torch.equal(inputs.frames, normalise(torch.from_numpy(frames), MEAN, STD))
    assert batch.fbank is not None
    assert torch.equal(inputs.fbank, batch.fbank)
    assert torch.equal(inputs.tokens, batch.tokens)
    assert inputs.pairs.caption_id.tolist() == [10, 11, 12]
    assert inputs.pairs.video_id.tolist() == [20, 21, 22]
    assert inputs.kind == "video"


def test_sound_alone_has_no_frames():
    batch = batch_of(np.zeros((1, 2, 4, 4, 3), np.uint8), None)._replace(frames=None, kind="audio")
    assert to_inputs(batch, SPEC, CPU).frames is None


def test_the_whole_box_changes_nothing_and_a_mirror_only_swaps():
    frames = torch.randn(2, 2, 3, SIZE, SIZE)
    crops = torch.tensor([[0.0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    out = cropped(frames, crops, SIZE)
    torch.testing.assert_close(out[0], frames[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(out[1], frames[1].flip(-1), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(160, 90), (90, 160), (64, 64)])
@pytest.mark.parametrize("canvas", [SIZE, 74])
def test_device_crops_are_the_readers_crops(canvas, width, height):
    """One frame at full size is cut by the reader; squeezed into the square it is cut here."""
    rng = np.random.default_rng(0)
    crops = [random_crop(1, 1, (0.5, 1.0), True, rng) for _ in range(6)]
    images = [[smooth_image(width, height, clip + t) for t in range(2)] for clip in range(6)]
    # Fractions of the pixel grid, so that no box is rounded.
    crops = [snapped(crop, width, height) for crop in crops]
    reader = [square_images(pair, SIZE, crop) for pair, crop in zip(images, crops, strict=True)]
    wholes = [square_images(pair, canvas, WHOLE) for pair in images]
    ours = to_inputs(batch_of(wholes, crops), SPEC, CPU).frames
    theirs = to_inputs(batch_of(reader, None), SPEC, CPU).frames
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape
    std = torch.tensor(STD).view(3, 1, 1)
    difference = (ours - theirs).mul(std * 255).abs()

    assert difference.mean() < 0.8  # of 255
    assert difference[..., 2:-2, 2:-2].max() < 4
    # At a box's edge the reader sees no pixel outside, the device does.
    assert difference.max() < 8


def snapped(crop, width, height):
    box = round(crop.left * width), round(crop.top * height)
    end = round(crop.right * width), round(crop.bottom * height)
    return Crop(box[0] / width, box[1] / height, end[0] / width, end[1] / height, crop.flip)
