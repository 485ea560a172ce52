# SPDX-License-Identifier: Apache-2.0
"""Frames of an MP4 by time, from videos whose every frame says its number."""

import io
import sys
import wave
from typing import Any

import av
import numpy as np
import pytest

from dataengine import media
from dataengine.cut import cut
from dataengine.errors import DependencyError
from tests.media_factory import frame_number, make_video
from training.data import video
from training.data.audio import clip_fbank
from training.data.video import decode_frames


def has_torchcodec():
    try:
        video._torchcodec()
    except DependencyError:
        return False
    return True


TORCHCODEC = pytest.mark.skipif(not has_torchcodec(), reason="torchcodec cannot be imported")
DECODERS = ["pyav", pytest.param("torchcodec", marks=TORCHCODEC)]


def numbers(mp4, shares, decoder: Any):
    return [frame_number(np.asarray(image)) for image in decode_frames(mp4, shares, decoder)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """90 frames at 25 Hz, groups of 12 with B-frames."""
    return make_video(tmp_path_factory.mktemp("video") / "a.mp4", shot_frames=(50, 40)).read_bytes()


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_found_by_time(clip, decoder):
    shares = [0.0, 0.1001, 0.334, 0.5, 0.77, 0.999]
    assert numbers(clip, shares, decoder) == [0, 9, 30, 45, 69, 89]


@pytest.mark.parametrize("decoder", DECODERS)
def test_variable_rate_counts_time_and_not_frames(tmp_path, decoder):
    """Ten frames in the first second, then one a second."""
    times = [i / 10 for i in range(10)] + [1.0, 2.0, 3.0, 4.0]
    path = make_video(tmp_path / "a.mp4", shot_frames=(14,), times_s=times)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        duration_s = float((stream.duration or 0) * (stream.time_base or 0))
    wanted_s = [0.05, 0.55, 1.5, 2.01]
    assert duration_s > 2.01
    shares = [at / duration_s for at in wanted_s]
    assert numbers(path.read_bytes(), shares, decoder) == [0, 5, 10, 11]


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_an_edit_list_hides_is_not_counted(tmp_path, decoder):
    """A clip cut by copy starts at the key frame before; its list begins at the clip's first frame."""
    path = make_video(tmp_path / "a.mp4", shot_frames=(60,))
    info = media.probe(str(path))
    clip = cut(str(path), info, [number * 40_000 for number in range(17, 48)])
    assert clip.mode == "copy"  # else nothing is hidden
    assert numbers(clip.data, [0.0, 0.5, 0.99], decoder) == [17, 32, 46]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("rotation", "turned"), [(0, 0), (90, 1), (180, 2), (270, 3)])
def test_lying_frames_are_turned_upright(tmp_path, decoder, rotation, turned):
    path = make_video(tmp_path / "a.mp4", shot_frames=(3,), rotation=rotation)
    image = np.asarray(decode_frames(path.read_bytes(), [0.4], decoder)[0])
    assert image.shape[:2] == ((192, 128) if turned % 2 else (128, 192))
    assert frame_number(np.ascontiguousarray(np.rot90(image, -turned))) == 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_broken_bytes_are_a_value_error(clip, decoder):
    for data in (b"", b"junk" * 99, clip[: len(clip) // 3]):
        with pytest.raises(ValueError, match="undecodable video"):
            decode_frames(data, [0.5], decoder)


def test_reasons_of_broken_videos_are_sentences(clip):
    def reason(data):
        with pytest.raises(ValueError, match="undecodable video") as caught:
            decode_frames(data, [0.5])
        return str(caught.value)

    invalid = "undecodable video: Invalid data found when processing input"
    assert {reason(data) for data in (b"", b"junk" * 99, clip[: len(clip) // 3])} == {invalid}
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(32000))
    assert reason(sound.getvalue()) == "undecodable video: no pictures"
    with pytest.raises(ValueError, match="undecodable sound: Invalid data found") as caught:
        clip_fbank(b"", None)
    assert "Errno" not in str(caught.value)


@TORCHCODEC
def test_both_decoders_show_the_same(clip):
    shares = ((np.arange(8) + 0.5) / 8).tolist()
    for one, other in zip(
        decode_frames(clip, shares), decode_frames(clip, shares, "torchcodec"), strict=True
    ):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 4


def test_missing_torchcodec_says_what_to_install(clip, monkeypatch):
    video._torchcodec.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(DependencyError) as caught:
        decode_frames(clip, [0.5], "torchcodec")
    assert "pip install torchcodec" in caught.value.hint
    video._torchcodec.cache_clear()
