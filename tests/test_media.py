# SPDX-License-Identifier: Apache-2.0
import struct
import wave
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from dataengine import hdr, media, mp4
from dataengine.errors import MediaError
from tests.media_factory import (
    COLOURS,
    HEIGHT,
    WIDTH,
    frame_number,
    join_streams,
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


def test_pictures_larger_than_allowed_are_not_decoded(plain, monkeypatch):
    with pytest.raises(MediaError) as caught:
        media.VideoReader(str(plain), max_pixels=WIDTH * HEIGHT - 1)
    assert (caught.value.reason, caught.value.detail) == ("too_large", f"{WIDTH}x{HEIGHT}")
    with media.VideoReader(str(plain), max_pixels=WIDTH * HEIGHT) as reader:
        assert len(list(reader)) == 150


def test_a_header_that_claims_an_absurd_size_is_refused(tmp_path):
    path = make_video(tmp_path / "a.avi", codec="mjpeg", pix_fmt="yuvj420p", shot_frames=(3,))
    data = path.read_bytes()
    frame = data.index(b"\xff\xc0") + 5
    path.write_bytes(data.replace(data[frame : frame + 4], struct.pack(">HH", 30_000, 30_000)))
    with pytest.raises(MediaError):
        media.probe(str(path))


def _with_count(path: Path, box: bytes, offset: int, count: int) -> None:
    """Writes a count into the first box of a kind."""
    data = bytearray(path.read_bytes())
    struct.pack_into(">I", data, data.index(box) + offset, count)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("box", "offset", "count", "detail"),
    [
        (b"elst", 8, 100_000, "100000 edits of a track"),
        (b"stsz", 12, 200_000_000, "200000000 frames in a track"),
    ],
)
def test_tables_that_would_take_for_ever_are_refused(box, offset, count, detail, tmp_path):
    path = make_video(tmp_path / "a.mp4", shot_frames=(3,))
    media.probe(str(path))
    _with_count(path, box, offset, count)
    with pytest.raises(MediaError) as caught:
        media.probe(str(path))
    assert (caught.value.reason, caught.value.detail) == ("undecodable", detail)


def test_boxes_without_end_are_refused(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(struct.pack(">I4s", 8, b"free") * (mp4.MAX_BOXES + 1))
    with pytest.raises(ValueError, match="boxes before its index ends"):
        mp4.check_tables(str(path))
    nested = struct.pack(">I4s", 0, b"moov") * 2000
    path.write_bytes(nested)
    mp4.check_tables(str(path))  # ends, and takes no stack


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


def test_without_the_hardware_software_decodes(plain, monkeypatch):
    _, times, pictures = read_all(plain)
    opened = []
    real = media.open_container

    def no_driver(source, options=None, device=None):
        opened.append(device)
        if device:
            raise RuntimeError(f"no {device} here")
        return real(source, options)

    monkeypatch.setattr(media, "open_container", no_driver)
    monkeypatch.setattr(media, "hwdevices_available", lambda: ["vaapi", "cuda", "drm"])
    for wanted, tried in [
        (None, [None]),
        ("cuda", ["cuda", None]),
        ("auto", ["cuda", "vaapi", None]),
        ("qsv", [None]),
    ]:
        opened.clear()
        with media.VideoReader(str(plain), hwaccel=wanted) as reader:
            assert reader.hwaccel is None
            frames = list(reader)
            first = media.upright_rgb(frames[0].picture, reader.info, 10_000)
        assert opened == tried
        assert [frame.time_us for frame in frames] == times
        assert np.array_equal(first, pictures[0])


@pytest.mark.parametrize("hwaccel", ["auto", "cuda"])
def test_hardware_is_optional(hwaccel, plain):
    # Whatever this machine has: the frames are there.
    with media.VideoReader(str(plain), hwaccel=hwaccel) as reader:
        assert len(list(reader)) == 150


def test_pictures_keep_the_first_ones_size(tmp_path):
    small = make_video(tmp_path / "small.ts", shot_frames=(30,))
    large = make_video(
        tmp_path / "large.ts", shot_frames=(30,), size=(2 * WIDTH, 2 * HEIGHT), start_s=2.0
    )
    info, times, pictures = read_all(join_streams(small, large, tmp_path / "both.ts"))
    assert (info.width, info.height) == (WIDTH, HEIGHT)
    assert {picture.shape for picture in pictures} == {(HEIGHT, WIDTH, 3)}
    numbers = [frame_number(picture) for picture in pictures]
    assert numbers[:30] == list(range(30))
    # Decoders may lose a picture or two where the stream changes.
    assert len(numbers) >= 57
    assert numbers[30:] == sorted(set(numbers[30:]))
    assert times == sorted(times)


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


@pytest.mark.parametrize(
    ("form", "full"), [("nv12", False), ("nv12", True), ("yuv420p", True), ("p010le", False)]
)
def test_small_pictures_know_other_layouts_and_ranges(form, full):
    picture = np.empty((256, 384, 3), np.uint8)
    picture[:, :192], picture[:, 192:] = COLOURS[0], COLOURS[2]
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    stored = VideoReformatter().reformat(
        frame, format=form, dst_color_range=2 if full else 1, dst_colorspace=5
    )
    stored.color_range = 2 if full else 1
    small = media.small_bgr(stored)[..., ::-1].astype(int)
    assert max(small.shape[:2]) <= media.GRID_PX
    assert small[5, 5] == pytest.approx(COLOURS[0], abs=4)
    assert small[-5, -5] == pytest.approx(COLOURS[2], abs=4)


def test_other_pixel_layouts_are_converted(tmp_path):
    path = make_video(tmp_path / "rgb.mkv", codec="ffv1", pix_fmt="bgr0", shot_frames=(2,))
    with media.VideoReader(str(path)) as reader:
        small = media.small_bgr(next(iter(reader)).picture)
    assert small[-1, 0, ::-1].astype(int) == pytest.approx(COLOURS[0], abs=2)
    assert max(small.shape[:2]) <= media.GRID_PX


@pytest.mark.parametrize("colorspace", [1, 2, 5, 9])
@pytest.mark.parametrize("form", ["yuv420p", "yuvj420p", "yuv420p10le", "yuv444p", "nv12", "gbrp"])
def test_colours_come_out_as_they_went_in(form, colorspace):
    draw = np.random.default_rng(5)
    # Smooth, so that chroma is the same however it is spread over the pixels.
    coarse = draw.integers(30, 225, (4, 6, 3)).astype(np.uint8)
    rgb = np.asarray(cv2.resize(coarse, (192, 128), interpolation=cv2.INTER_CUBIC), np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
        format=form, dst_colorspace=colorspace if colorspace != 2 else 5
    )
    frame.colorspace = colorspace
    ours = media.upright_rgb(frame, _info(192, 128), 10_000).astype(int)
    assert np.abs(ours - rgb).mean() < 2.2


def _info(width: int, height: int, **arguments) -> media.MediaInfo:
    return media.MediaInfo(
        0, 25.0, width, height, "h264", None, 0, None, 0, 0, True, 0, **arguments
    )


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


# --------------------------------------------------------------------------------------------- hdr


def test_pq_and_hlg_are_the_curves_of_the_standard():
    # BT.2408-7, table 1: HDR reference white, 203 cd/m2, is 58 % PQ and 75 % HLG.
    assert hdr.pq_to_nits(np.array([0.0, 0.5806, 1.0])) == pytest.approx([0, 203, 10_000], abs=2)
    grey = np.array([[0.0] * 3, [0.75] * 3, [1.0] * 3])
    assert hdr.hlg_to_nits(grey)[:, 0] == pytest.approx([0, 203, 1000], abs=3)


def test_the_tone_curve_keeps_the_dark_and_reaches_white_at_the_peak():
    light = np.linspace(0, hdr.PEAK_NITS / hdr.WHITE_NITS, 500)
    shown = hdr.tone_curve(light)
    assert np.all(np.diff(shown) > 0)
    assert shown[light <= hdr.KNEE] == pytest.approx(light[light <= hdr.KNEE])
    assert (shown[-1], hdr.tone_curve(np.array(50.0))) == pytest.approx((1.0, 1.0))
    assert np.abs(np.diff(shown, 2)).max() < 1e-3  # no corner at the knee


def test_wide_colours_come_to_where_bt709_has_them():
    grey = np.full((1, 3), 0.5, np.float32)
    assert hdr.to_bt709(grey, "", True)[0] == pytest.approx([128] * 3, abs=1)
    # BT.709's red in BT.2020's codes: the first column of BT.2087's matrix.
    red = np.array([[0.6274, 0.0691, 0.0164]], np.float32) ** (1 / 2.4)
    assert hdr.to_bt709(red, "", True)[0] == pytest.approx([255, 0, 0], abs=6)


@pytest.mark.parametrize(("transfer", "number"), [("pq", 16), ("hlg", 18)])
def test_sampled_frames_of_hdr_videos_are_tone_mapped(transfer, number, tmp_path):
    path = make_video(
        tmp_path / "hdr.mkv",
        shot_frames=(2,),
        codec="ffv1",
        pix_fmt="yuv420p10le",
        transfer=number,
        wide_gamut=True,
    )
    with media.VideoReader(str(path)) as reader:
        info, picture = reader.info, next(iter(reader)).picture
        assert (info.transfer, info.wide_gamut) == (transfer, True)
        shown = media.upright_rgb(picture, info, 10_000)
    # What was drawn with codes of (200, 40, 40) and 128: as one code after the other says.
    codes = picture.to_ndarray(format="rgb24")[[-3, 90], [3, 172]].astype(np.float32) / 255
    wanted = hdr.to_bt709(codes, transfer, True).astype(int)
    # Near black a code of difference in the source is ten on the screen.
    assert shown[-3, 3].astype(int) == pytest.approx(wanted[0], abs=12)
    assert shown[90, 172].astype(int) == pytest.approx(wanted[1], abs=6)
    assert np.abs(wanted - codes * 255).max() > 25  # which is not what the codes say


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


def test_two_channels_are_averaged(tmp_path):
    path = tmp_path / "stereo.wav"
    time_S = np.arange(16_000) / 16_000
    wave_S = 0.9 * np.sin(2 * np.pi * 440 * time_S)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16_000)
        both = np.stack([wave_S, wave_S], axis=1)
        file.writeframes((both * 32767).astype("<i2").tobytes())
    sound = media.read_audio(str(path))
    np.testing.assert_allclose(sound[:16_000], wave_S, atol=1e-3)
