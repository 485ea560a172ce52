# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import av
import numpy as np
import pytest

from dataengine import media
from dataengine.errors import MediaError
from tests.media_factory import (
    COLOURS,
    HEIGHT,
    WIDTH,
    frame_number,
    make_audio,
    make_video,
    truncate,
)

VFR = [n / 25 + (n % 3) * 0.009 + (0.5 if n > 70 else 0) for n in range(150)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_video(tmp_path_factory.mktemp("media") / "plain.mp4", audio="aac")


def read_all(path: Path) -> tuple[media.MediaInfo, list[int], list[np.ndarray]]:
    with media.VideoReader(str(path)) as reader:
        frames = list(reader)
        pictures = [media.upright_rgb(frame.picture, reader.info, 10_000) for frame in frames]
        return reader.info, [frame.time_us for frame in frames], pictures


# ------------------------------------------------------------------------------------------- facts


def test_probe_tells_what_the_file_holds(plain):
    info = media.probe(str(plain))
    assert (info.width, info.height, info.rotation) == (WIDTH, HEIGHT, 0)
    assert (info.video_codec, info.audio_codec) == ("h264", "aac")
    assert (info.video_stream, info.audio_stream) == (0, 1)
    assert info.fps == 25.0
    assert info.duration_ms == pytest.approx(6000, abs=25)
    assert info.file_bytes == plain.stat().st_size


def test_pixels_that_are_not_square_widen_the_picture():
    assert media._displayed(340, 256, 64 / 51, 0) == (427, 256)
    assert media._displayed(340, 256, 64 / 51, 90) == (256, 427)
    assert media._displayed(426, 320, 640 / 639, 0) == (426, 320)


def test_cover_picture_is_not_the_video(tmp_path):
    path = make_video(tmp_path / "cover.mp4", cover=True, shot_frames=(10,))
    info, times, _ = read_all(path)
    assert (info.width, info.height, len(times)) == (WIDTH, HEIGHT, 10)


def test_first_of_two_video_streams_is_taken(tmp_path):
    path = make_video(tmp_path / "two.mp4", second_video=True, shot_frames=(10,))
    info, _, pictures = read_all(path)
    assert info.video_stream == 0
    assert [frame_number(picture) for picture in pictures] == list(range(10))


def _bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    match kind:
        case "zero_bytes":
            path.touch()
        case "html":
            path.write_text("<!doctype html><html><body>Not found</body></html>" * 40)
        case "playlist":
            path.write_text("#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n")
        case "concat":
            make_video(folder / "other.mp4", shot_frames=(5,))
            path.write_text("ffconcat version 1.0\nfile other.mp4\n")
        case "jpeg":
            path.write_bytes(media.jpeg_encode(np.zeros((64, 64, 3), np.uint8)))
        case "no_index":  # an MP4 cut off before its index
            truncate(make_video(folder / "whole.mp4", shot_frames=(20,)), path, 0.5)
        case "sound":
            make_audio(path)
        case "sound_and_cover":
            make_audio(path, cover=True)
        case "scrambled":
            whole = bytearray(make_video(folder / "whole.mp4", shot_frames=(20,)).read_bytes())
            start = whole.index(b"mdat") + 4
            end = whole.index(b"moov") - 4
            whole[start:end] = bytes(end - start)
            path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("zero_bytes", "empty_file"),
        ("html", "not_a_video"),
        ("playlist", "not_a_video"),
        ("concat", "not_a_video"),
        ("jpeg", "not_a_video"),
        ("no_index", "not_a_video"),
        ("sound", "no_video_stream"),
        ("sound_and_cover", "no_video_stream"),
        ("scrambled", "undecodable"),
        ("missing", "unreadable_file"),
    ],
)
def test_what_is_no_video_is_refused_by_name(kind, reason, tmp_path):
    with pytest.raises(MediaError) as caught:
        media.probe(str(_bad_file(kind, tmp_path)))
    assert caught.value.reason == reason


def test_a_playlist_really_would_have_been_opened(tmp_path):
    # Guards the test above: without the whitelist libav follows the reference.
    with av.open(str(_bad_file("concat", tmp_path))) as container:
        assert container.format.name == "concat"


# -------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("name", "arguments", "times_s"),
    [
        ("cfr.mp4", {}, [n / 25 for n in range(150)]),
        ("ntsc.mp4", {"fps": 30000 / 1001}, [n * 1001 / 30000 for n in range(150)]),
        ("vfr.mp4", {"times_s": VFR}, VFR),
        ("late.mp4", {"start_s": 0.85, "audio": "aac"}, [0.85 + n / 25 for n in range(150)]),
        ("all_late.mkv", {"start_s": 0.85}, [n / 25 for n in range(150)]),
        ("vp8.webm", {"codec": "libvpx"}, [n / 25 for n in range(150)]),
        ("mpeg4.avi", {"codec": "mpeg4"}, [n / 25 for n in range(150)]),
        ("ten_bits.mkv", {"pix_fmt": "yuv420p10le"}, [n / 25 for n in range(150)]),
    ],
)
def test_every_frame_comes_once_at_its_time(name, arguments, times_s, tmp_path):
    _, times, pictures = read_all(make_video(tmp_path / name, **arguments))
    assert [frame_number(picture) for picture in pictures] == list(range(150))
    assert times == pytest.approx([t * 1e6 for t in times_s], abs=600)


def test_avi_with_b_frames_keeps_all_frames_in_order(tmp_path):
    info, times, pictures = read_all(make_video(tmp_path / "b.avi"))
    assert [frame_number(picture) for picture in pictures] == list(range(150))
    assert np.diff(times).tolist() == [40_000] * 149
    assert not info.has_times


def test_more_threads_give_the_same_frames(plain):
    _, times, pictures = read_all(plain)
    with media.VideoReader(str(plain), threads=2) as reader:
        frames = list(reader)
        assert [frame.time_us for frame in frames] == times
        again = [media.upright_rgb(frame.picture, reader.info, 10_000) for frame in frames]
    assert np.array_equal(np.stack(again), np.stack(pictures))


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".avi"])
def test_what_decodes_of_a_broken_off_file_is_kept(suffix, tmp_path):
    whole = make_video(tmp_path / f"whole{suffix}", index_first=suffix == ".mp4")
    _, times, pictures = read_all(truncate(whole, tmp_path / f"half{suffix}", 0.5))
    assert 40 < len(times) < 110
    numbers = [frame_number(picture) for picture in pictures]
    assert numbers[:40] == list(range(40))


def test_a_read_error_ends_the_video(plain, monkeypatch):
    with media.VideoReader(str(plain)) as reader:
        packets = reader._container.demux(reader._stream)

        def broken(stream):
            for _ in range(60):
                yield next(packets)
            raise OSError("disk on fire")

        container = reader._container
        monkeypatch.setattr(reader, "_container", _Broken(container, broken))
        reader.seek(0)
        frames = list(reader)
        assert reader.truncated
        reader._container = container
    assert len(frames) == 60


class _Broken:
    """A container whose packets end in an error."""

    def __init__(self, container, demux):
        self.format, self.seek, self.demux = container.format, container.seek, demux


def test_frames_are_found_by_seeking(plain):
    wanted = [0, 1_000_000, 1_050_000, 4_000_000, 5_960_000]
    frames = media.read_frames(str(plain), wanted)
    info = media.probe(str(plain))
    numbers = [frame_number(media.upright_rgb(f.picture, info, 10_000)) for f in frames]
    assert numbers == [0, 25, 26, 100, 149]


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_pictures_come_out_upright(rotation, tmp_path):
    path = make_video(tmp_path / "turned.mp4", shot_frames=(3,), rotation=rotation)
    with media.VideoReader(str(path)) as reader:
        frame = next(iter(reader))
        info = reader.info
        stored = frame.picture.to_ndarray(format="rgb24")
        upright = media.upright_rgb(frame.picture, info, 10_000)
        small = media.small_bgr(frame.picture, info.rotation)[..., ::-1]
    assert info.rotation == rotation
    assert (info.height, info.width) == upright.shape[:2]
    # Edges of colour differ a little, by how chroma is spread over the pixels.
    assert np.abs(upright.astype(int) - np.rot90(stored, rotation // 90)).mean() < 1
    assert (small.shape[0] > small.shape[1]) == (rotation != 180)
    rows = np.linspace(0, info.height - 1, small.shape[0]).round().astype(int)
    columns = np.linspace(0, info.width - 1, small.shape[1]).round().astype(int)
    difference = np.abs(upright[rows][:, columns].astype(int) - small)
    assert difference.mean() < 12


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le"])
def test_small_pictures_have_the_colours_of_converted_ones(pix_fmt, tmp_path):
    path = make_video(tmp_path / "x.mkv", shot_frames=(2, 2, 2, 2, 2), pix_fmt=pix_fmt)
    with media.VideoReader(str(path)) as reader:
        for n, frame in enumerate(reader):
            small = media.small_bgr(frame.picture)
            assert max(small.shape[:2]) <= media.GRID_PX
            assert small.dtype == np.uint8
            # The lower left corner is plain colour: nothing else is drawn there.
            corner = small[-4:, :4, ::-1].reshape(-1, 3).mean(axis=0)
            assert corner == pytest.approx(COLOURS[n // 2], abs=8)
            assert frame_number(small) == n
            # The grey block is where it was drawn: the whole picture is there, not a part of it.
            height, width = small.shape[:2]
            block = small[height * 90 // HEIGHT, width * (172 - 2 * n) // WIDTH].astype(int)
            assert block == pytest.approx([128, 128, 128], abs=20)


def test_other_pixel_layouts_are_converted(tmp_path):
    path = make_video(tmp_path / "rgb.mkv", codec="ffv1", pix_fmt="bgr0", shot_frames=(2,))
    with media.VideoReader(str(path)) as reader:
        small = media.small_bgr(next(iter(reader)).picture)
    assert small[-1, 0, ::-1].astype(int) == pytest.approx(COLOURS[0], abs=2)
    assert max(small.shape[:2]) <= media.GRID_PX


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((1920, 1080), 320, (569, 320)),
        ((1080, 1920), 320, (320, 569)),
        ((200, 100), 320, (200, 100)),
        ((5000, 3), 2, (3333, 2)),
    ],
)
def test_pictures_are_shrunk_but_never_grown(size, short_side, expected):
    assert media.scaled_size(size[0], size[1], short_side) == expected


def test_jpeg_keeps_the_picture_and_the_order_of_colours():
    picture = np.empty((40, 60, 3), np.uint8)
    picture[:] = (200, 40, 90)
    back = media.jpeg_decode(media.jpeg_encode(picture, 90))
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture).max() < 8


def test_bytes_that_are_no_picture_are_a_value_error():
    with pytest.raises(ValueError, match="7 bytes"):
        media.jpeg_decode(b"nothing")


# ------------------------------------------------------------------------------------------- sound


def clicks(sound: np.ndarray, rate: int) -> list[float]:
    loud = np.flatnonzero(np.abs(sound) > 0.2)
    starts = loud[np.flatnonzero(np.diff(loud, prepend=-rate) > rate // 10)]
    return (starts / rate).tolist()


@pytest.mark.parametrize(
    ("name", "codec", "arguments", "expected"),
    [
        ("a.mp4", "aac", {}, [0.0, 2.0, 3.6]),
        ("a.mov", "pcm_s16le", {}, [0.0, 2.0, 3.6]),
        ("a.webm", "libopus", {"codec": "libvpx"}, [0.0, 2.0, 3.6]),
        ("late_picture.mp4", "aac", {"start_s": 0.85}, [0.85, 2.85, 4.45]),
        ("late_sound.mp4", "aac", {"audio_start_s": 1.5}, [2.0, 3.6]),
    ],
)
def test_sound_lies_on_the_clock_of_the_pictures(name, codec, arguments, expected, tmp_path):
    path = make_video(tmp_path / name, audio=codec, **arguments)
    sound = media.read_audio(str(path))
    assert sound.dtype == np.float32
    assert sound.ndim == 1
    assert np.abs(sound).max() <= 1.0
    assert clicks(sound, 16_000) == pytest.approx(expected, abs=0.004)


def test_sound_can_be_read_from_bytes_at_any_rate(plain):
    sound = media.read_audio(plain.read_bytes(), rate=8000)
    assert clicks(sound, 8000) == pytest.approx([0.0, 2.0, 3.6], abs=0.004)


def test_no_sound_is_an_empty_array(tmp_path):
    sound = media.read_audio(str(make_video(tmp_path / "mute.mp4", shot_frames=(3,))))
    assert sound.shape == (0,)
