# SPDX-License-Identifier: Apache-2.0
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.transforms import (
    WHOLE,
    Crop,
    choose_frames,
    decode_jpegs,
    normalise,
    random_crop,
    square_images,
)


@pytest.mark.parametrize(
    ("available", "wanted", "middle"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, [1, 3, 5, 7]),
        (8, 1, [4]),
        (2, 4, [0, 0, 1, 1]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_middle_frames(available, wanted, middle):
    assert choose_frames(available, wanted, None) == middle


def test_random_frames_come_one_from_each_interval():
    rng = np.random.default_rng(0)
    drawn = np.array([choose_frames(12, 3, rng) for _ in range(200)])
    assert [set(column) for column in drawn.T] == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}]


def test_random_crops_keep_their_area_and_stay_inside():
    rng = np.random.default_rng(0)
    crops = [random_crop(160, 90, (0.3, 0.6), True, rng) for _ in range(500)]
    areas = np.array([(c.right - c.left) * (c.bottom - c.top) for c in crops])
    assert areas.min() >= 0.3 - 1e-9
    assert areas.max() <= 0.6 + 1e-9
    assert all(0 <= c.left < c.right <= 1 and 0 <= c.top < c.bottom <= 1 for c in crops)
    assert 0.4 < np.mean([c.flip for c in crops]) < 0.6
    assert not any(random_crop(9, 9, (0.5, 1), False, rng).flip for _ in range(20))


def test_crop_that_never_fits_is_the_centre_square():
    crop = random_crop(1000, 10, (1.0, 1.0), False, np.random.default_rng(0))
    assert crop == Crop(0.495, 0.0, 0.505, 1.0)


def picture():
    """Left half red, right half blue, a white band along the top quarter."""
    pixels = np.zeros((240, 320, 3), dtype=np.uint8)
    pixels[:, :160, 0] = pixels[:, 160:, 2] = 255
    pixels[:60] = 255
    return Image.fromarray(pixels)


def jpeg_bytes(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


@pytest.mark.parametrize("crop", [WHOLE, Crop(0.25, 0.5, 0.9, 1.0), Crop(0.1, 0, 0.7, 0.8, True)])
@pytest.mark.parametrize("size", [16, 64, 200])
def test_small_scale_decoding_shows_the_same_as_full_decoding(crop, size):
    fast = decode_jpegs([jpeg_bytes(picture())], size, crop).astype(int)
    full = square_images([picture()], size, crop).astype(int)
    assert fast.shape == (1, size, size, 3)
    # Edges differ by the smaller scale's filter, areas do not.
    assert np.abs(fast - full).mean() < 4


def noise_jpeg(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return jpeg_bytes(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def test_frames_are_as_pillow_makes_them():
    jpeg = noise_jpeg(320, 180)
    with Image.open(io.BytesIO(jpeg)) as image:
        resized = image.resize((160, 160), Image.Resampling.BICUBIC)
    difference = np.abs(decode_jpegs([jpeg], 160, WHOLE)[0].astype(int) - np.asarray(resized))
    assert difference.max() <= 3
    assert difference.mean() < 0.05


def test_boxes_are_cut_to_the_nearest_pixel():
    jpeg = noise_jpeg(160, 80)
    with Image.open(io.BytesIO(jpeg)) as image:
        cut = image.crop((40, 20, 120, 80))
    crop = Crop(40.3 / 160, 19.8 / 80, 119.6 / 160, 1.0)
    np.testing.assert_array_equal(decode_jpegs([jpeg], 64, crop), square_images([cut], 64, WHOLE))
    # A box thinner than a pixel is one pixel.
    assert decode_jpegs([jpeg], 4, Crop(0.5, 0.5, 0.501, 0.501)).std(axis=(1, 2)).max() == 0


def test_frames_of_one_clip_may_differ_in_size():
    jpegs = [noise_jpeg(160, 80), noise_jpeg(64, 64)]
    frames = decode_jpegs(jpegs, 32, WHOLE)
    for frame, jpeg in zip(frames, jpegs, strict=True):
        np.testing.assert_array_equal(frame, decode_jpegs([jpeg], 32, WHOLE)[0])


@pytest.mark.parametrize("size", [16, 200])  # below and above the scale that Pillow decodes
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_broken_jpegs_are_an_os_error(size, share):
    jpeg = noise_jpeg(320, 240)
    with pytest.raises(OSError, match=r"(?i)image|truncated"):
        decode_jpegs([jpeg, jpeg[: int(share * len(jpeg))]], size, WHOLE)


@pytest.mark.parametrize("size", [16, 200])
@pytest.mark.parametrize(
    "broken", [b"", b"no jpeg", noise_jpeg(320, 240)[:200], noise_jpeg(320, 240)[:9000]]
)
@pytest.mark.parametrize("place", [0, 1])
def test_reasons_of_broken_jpegs_are_short_and_name_no_address(size, broken, place):
    jpegs = [noise_jpeg(320, 240)]
    jpegs.insert(place, broken)
    with pytest.raises(OSError, match=r"^(empty|broken) image") as caught:
        decode_jpegs(jpegs, size, WHOLE)
    assert len(str(caught.value)) < 70
    assert not re.search("0x[0-9a-f]{6}|object|bytes", str(caught.value))


def test_mirroring_swaps_left_and_right():
    plain = square_images([picture()], 8, WHOLE)[0]
    mirrored = square_images([picture()], 8, Crop(flip=True))[0]
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    assert plain[7, 0].tolist() == [255, 0, 0]


def test_grey_jpegs_become_rgb():
    frames = decode_jpegs([jpeg_bytes(Image.new("L", (32, 32), 90))], 8, WHOLE)
    assert frames.shape == (1, 8, 8, 3)
    assert np.abs(frames.astype(int) - 90).max() <= 2


def test_normalised_values():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    out = normalise(frames, (0.5, 0.1, 0.0), (0.25, 0.1, 2.0))
    assert out.shape == (1, 1, 3, 1, 1)
    assert out.flatten().tolist() == pytest.approx([-2.0, 1.0, 0.5])
