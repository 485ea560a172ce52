# SPDX-License-Identifier: Apache-2.0
import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from dataengine import cut as cut_module
from dataengine import media
from dataengine.cut import Cut, cut, read_timeline, starts_clean
from dataengine.errors import MediaError
from dataengine.stage import Drop, Kept
from dataengine.stages.clip import ClipConfig, ClipStage
from tests.media_factory import (
    INTRA_REFRESH,
    OPEN_GOP,
    break_sound,
    decode_all,
    frame_number,
    make_video,
)
from tests.test_media import clicks

VFR = [n / 25 + (n % 3) * 0.009 + (0.5 if n > 70 else 0) for n in range(150)]
HEVC = {"x265-params": "keyint=12:open-gop=1:log-level=none"}
FAST_VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "12"}
FAST_AV1 = {"preset": "12", "svtav1-params": "keyint=24:pred-struct=1"}
SPANS = [(0, 50), (50, 90), (90, 150), (13, 14), (24, 36), (0, 150)]
"""From the start, inside, to the end, one frame, from key frame to key frame, everything."""


def source(path: Path) -> tuple[media.MediaInfo, list[int], list[np.ndarray]]:
    """Returns a video's facts, its frame times with the end behind, and its raw pictures."""
    with media.VideoReader(str(path)) as reader:
        frames = list(reader)
        times = [frame.time_us for frame in frames]
        times.append(frames[-1].time_us + frames[-1].duration_us)
        return reader.info, times, [frame.picture.to_ndarray() for frame in frames]


def frame_numbers(clip: Cut) -> list[int]:
    with media.VideoReader(clip.data) as reader:
        return [
            frame_number(media.upright_rgb(frame.picture, reader.info, 10_000)) for frame in reader
        ]


def assert_times(clip: Cut, wanted_us: list[int]) -> None:
    shown_us = [float(time_s) * 1e6 for time_s, _ in decode_all(clip.data)]
    assert shown_us == pytest.approx([t - wanted_us[0] for t in wanted_us], abs=600)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cfr.mp4", {"audio": "aac"}),
        ("vfr.mp4", {"times_s": VFR}),
        ("late.mp4", {"start_s": 0.85, "audio": "aac"}),
        ("rotated.mp4", {"rotation": 90}),
        ("open_gop.mp4", {"options": OPEN_GOP}),
        ("open_gop.mkv", {"options": OPEN_GOP, "audio": "libmp3lame"}),
        ("hevc.mp4", {"codec": "libx265", "options": HEVC}),
        ("sound.mov", {"audio": "pcm_s16le"}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("two.mp4", {"second_video": True}),
        ("ntsc.mp4", {"fps": 30000 / 1001}),
        ("ten_bits.mp4", {"pix_fmt": "yuv420p10le"}),
        ("pq.mp4", {"pix_fmt": "yuv420p10le", "transfer": 16, "wide_gamut": True}),
        ("odd.mp4", {"pix_fmt": "yuv444p", "size": (191, 127)}),
        ("oblong.mp4", {"aspect": Fraction(4, 3)}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": FAST_VP9, "audio": "libopus"}),
        ("av1.mp4", {"codec": "libsvtav1", "options": FAST_AV1, "audio": "aac"}),
        ("stream.ts", {"start_s": 5.0, "audio": "aac"}),
        ("cover.mp4", {"cover": True, "audio": "aac"}),
    ],
)
def test_copied_clips_show_the_sources_own_frames(name, arguments, tmp_path):
    path = make_video(tmp_path / name, **arguments)
    info, times, pictures = source(path)
    for first, after in SPANS:
        clip = cut(str(path), info, times[first : after + 1])
        assert (clip.mode, clip.why) == ("copy", "")
        shown = decode_all(clip.data)
        assert len(shown) == after - first, (first, after)
        for (_, ours), theirs in zip(shown, pictures[first:after], strict=True):
            assert np.array_equal(ours, theirs), (first, after)
        assert_times(clip, times[first:after])


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("vp8.webm", {"codec": "libvpx", "audio": "libopus"}, "vp8 does not fit into MP4"),
        ("b_frames.avi", {}, "AVI does not say when B-frames are shown"),
        ("large.mp4", {"size": (960, 736)}, "960x736 is larger than 720p"),
        ("vfr.webm", {"codec": "libvpx", "times_s": VFR}, "vp8 does not fit into MP4"),
    ],
)
def test_what_cannot_be_copied_is_encoded_to_the_frame(name, arguments, why, tmp_path):
    path = make_video(tmp_path / name, shot_frames=(30, 30), **arguments)
    info, times, _ = source(path)
    for first, after in [(0, 30), (30, 60), (13, 14)]:
        clip = cut(str(path), info, times[first : after + 1])
        assert (clip.mode, clip.why) == ("encode", why)
        assert frame_numbers(clip) == list(range(first, after))
        assert_times(clip, times[first:after])
        assert media.probe(clip.data).video_codec == "h264"


def test_frames_before_time_zero_are_not_in_the_clips(tmp_path):
    path = make_video(tmp_path / "early.mp4", start_s=-0.5, audio="aac")
    info, times, pictures = source(path)
    assert len(pictures) < 150  # the container hides the first half second
    for first, after in [(0, 40), (40, 100)]:
        clip = cut(str(path), info, times[first : after + 1])
        assert clip.mode == "copy"
        shown = [picture for _, picture in decode_all(clip.data)]
        assert np.array_equal(np.stack(shown), np.stack(pictures[first:after]))


def test_odd_sizes_can_be_copied(tmp_path):
    path = make_video(tmp_path / "odd.webm", codec="libvpx-vp9", options=FAST_VP9, size=(191, 127))
    with media.VideoReader(str(path)) as reader:
        frames = list(reader)
        clip = cut(str(path), reader.info, [frame.time_us for frame in frames[50:91]])
    with media.VideoReader(clip.data) as reader:
        shown = list(reader)
    assert (clip.mode, clip.width, clip.height, len(shown)) == ("copy", 191, 127, 40)
    for ours, theirs in zip(shown, frames[50:90], strict=True):
        assert media.same_picture(ours.picture, theirs.picture)
    assert not media.same_picture(shown[0].picture, shown[-1].picture)


def test_encoded_clips_are_shrunk_to_even_sizes(tmp_path):
    path = make_video(tmp_path / "a.mp4", shot_frames=(20,), size=(500, 300), rotation=90)
    info, times, _ = source(path)
    clip = cut(str(path), info, times, max_short_side=155)
    shown = media.probe(clip.data)
    assert (clip.width, clip.height) == (154, 258)
    assert (shown.width, shown.height, shown.rotation) == (154, 258, 0)


def test_rotation_survives_a_copy(tmp_path):
    path = make_video(tmp_path / "a.mp4", rotation=90)
    info, times, _ = source(path)
    clip = cut(str(path), info, times[50:91])
    shown = media.probe(clip.data)
    assert (shown.rotation, shown.width, shown.height) == (90, info.width, info.height)


def test_key_frames_that_lean_on_earlier_ones_are_not_copied(tmp_path):
    path = make_video(tmp_path / "refresh.mp4", options=INTRA_REFRESH)
    info, times, pictures = source(path)
    clip = cut(str(path), info, times[50:91])
    assert clip.mode == "encode"
    assert "stand on its own" in clip.why
    assert frame_numbers(clip) == list(range(50, 90))
    # Not half refreshed either: as good as an encoded picture can be, from the first one on.
    for (_, ours), theirs in zip(decode_all(clip.data), pictures[50:90], strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 3


@pytest.mark.parametrize(
    ("codec", "unit", "clean"),
    [
        ("h264", bytes([0x65]), True),
        ("h264", bytes([0x41]), False),
        ("hevc", bytes([19 << 1, 1]), True),
        ("hevc", bytes([21 << 1, 1]), False),
        ("vp9", b"\x00", True),
    ],
    ids=["idr", "recovery_point", "hevc_idr", "hevc_cra", "other"],
)
def test_key_frames_are_told_apart(codec, unit, clean):
    settings = struct.pack(">I", 6) + b"\x06" + bytes(5)  # some other unit in front
    packet = settings + struct.pack(">I", len(unit)) + unit
    assert starts_clean(codec, packet, b"\x01" + bytes([0xFF] * 30)) is clean


# ------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.mp4", {"audio": "aac"}),
        ("a.mov", {"audio": "pcm_s16le"}),
        ("a.mkv", {"audio": "libmp3lame"}),
        ("a.webm", {"audio": "libopus", "codec": "libvpx"}),
        ("late.mp4", {"audio": "aac", "start_s": 0.85}),
    ],
)
def test_sound_stays_with_its_picture(name, arguments, tmp_path):
    path = make_video(tmp_path / name, **arguments)
    info, times, _ = source(path)
    clip = cut(str(path), info, times[40:121])  # shots begin 10 and 50 frames into the clip
    assert clip.has_audio
    sound = media.read_audio(clip.data)
    assert clicks(sound, 16_000) == pytest.approx([0.4, 2.0], abs=0.002)
    assert len(sound) / 16_000 == pytest.approx(3.2, abs=0.03)


def test_a_clip_before_the_sound_begins_has_none(tmp_path):
    path = make_video(tmp_path / "a.mov", audio="pcm_s16le", audio_start_s=3.0)
    info, times, _ = source(path)
    early = cut(str(path), info, times[0:51])
    assert (early.has_audio, early.sound, early.sound_why) == (False, "none", "")
    late = cut(str(path), info, times[50:91])
    assert late.has_audio
    # The next click is at 1.6 s, where the clip ends; the last packet of sound reaches beyond it.
    assert clicks(media.read_audio(late.data)[: 16 * 1590], 16_000) == []


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [
        ("a.mp4", "aac", "copy"),
        ("a.mp4", "ac3", "copy"),
        ("a.mkv", "flac", "aac"),
        ("a.mkv", "vorbis", "aac"),
        ("a.mkv", "alac", "aac"),
        ("a.mov", "pcm_s16le", "aac"),
        ("a.ts", "mp2", "aac"),
    ],
)
def test_sound_that_mp4_does_not_carry_becomes_aac(name, codec, sound, tmp_path):
    path = make_video(tmp_path / name, audio=codec)
    info, times, _ = source(path)
    clip = cut(str(path), info, times[0:101])
    assert (clip.mode, clip.has_audio, clip.sound) == ("copy", True, sound)
    assert clip.sound_why == (f"{info.audio_codec} does not fit into MP4" if sound == "aac" else "")
    assert media.probe(clip.data).audio_codec == ("aac" if sound == "aac" else info.audio_codec)
    # 2.0 s after the first; where the first is, is another test's matter.
    assert np.diff(clicks(media.read_audio(clip.data), 16_000))[0] == pytest.approx(2.0, abs=0.002)
    assert clip.data == cut(str(path), info, times[0:101]).data


def test_broken_sound_does_not_cost_the_clip(tmp_path):
    path = break_sound(make_video(tmp_path / "a.mkv", audio="vorbis"))
    info, times, pictures = source(path)
    assert info.audio_codec == "vorbis"
    clip = cut(str(path), info, times[50:91])
    assert (clip.mode, clip.has_audio, clip.sound) == ("copy", False, "none")
    assert clip.sound_why
    assert np.array_equal(decode_all(clip.data)[0][1], pictures[50])
    (outcome,) = ClipStage(ClipConfig()).process([_row(path, times[50:91])])
    assert isinstance(outcome, Kept)
    origins = {p["column"]: p for p in outcome.rows[0]["provenance"]}
    assert origins["has_audio"]["model"] == "ffmpeg/none"
    assert origins["has_audio"]["revision"] == clip.sound_why


def test_sound_that_cannot_be_copied_is_encoded(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", audio="aac")
    info, times, _ = source(path)

    def refuse_copies(real):
        def refuse(*arguments):
            if arguments[-1] == "copy":
                raise cut_module._ToolError("no sample rate")
            return real(*arguments)

        return refuse

    for name in ("_remux", "_run_ffmpeg"):
        monkeypatch.setattr(cut_module, name, refuse_copies(getattr(cut_module, name)))
    clip = cut(str(path), info, times[40:121])
    assert (clip.mode, clip.sound, clip.sound_why) == ("copy", "aac", "no sample rate")
    assert clicks(media.read_audio(clip.data), 16_000) == pytest.approx([0.4, 2.0], abs=0.002)


# ------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize("transfer", [16, 18])
def test_encoded_hdr_clips_look_like_their_sampled_frames(transfer, tmp_path):
    path = make_video(
        tmp_path / "a.mkv",
        shot_frames=(10, 10, 10),
        codec="ffv1",
        pix_fmt="yuv420p10le",
        transfer=transfer,
        wide_gamut=True,
    )
    with media.VideoReader(str(path)) as reader:
        info, frames = reader.info, list(reader)
        sampled = [media.upright_rgb(frame.picture, info, 720) for frame in frames]
    clip = cut(str(path), info, [f.time_us for f in frames[5:26]])
    assert clip.mode == "encode"
    with media.VideoReader(clip.data) as reader:
        shown = list(reader)
        assert (reader.info.transfer, reader.info.wide_gamut) == ("", False)
        assert {f.picture.format.name for f in shown} == {"yuv420p"}
        assert {f.picture.colorspace for f in shown} == {1}
        ours = [media.upright_rgb(f.picture, reader.info, 720) for f in shown]
    assert len(ours) == 20
    for one, other in zip(ours, sampled[5:25], strict=True):
        assert np.abs(one.astype(int) - other)[40:].mean() < 4


# -------------------------------------------------------------------------------------------- file


def test_nothing_personal_is_copied_and_the_bytes_repeat(tmp_path):
    tags = {"title": "SECRET", "comment": "SECRET", "location": "+48.1+011.5/"}
    path = make_video(tmp_path / "a.mp4", metadata=tags)
    info, times, _ = source(path)
    assert b"SECRET" in path.read_bytes()
    clip = cut(str(path), info, times[50:91])
    assert b"SECRET" not in clip.data
    assert b"Lavf" not in clip.data  # nor which version wrote it
    assert clip.data == cut(str(path), info, times[50:91]).data


def test_the_bytes_of_encoded_clips_repeat(tmp_path):
    path = make_video(tmp_path / "a.webm", shot_frames=(40,), codec="libvpx", audio="vorbis")
    info, times, _ = source(path)
    clip = cut(str(path), info, times[10:31])
    assert (clip.mode, clip.sound) == ("encode", "aac")
    assert clip.data == cut(str(path), info, times[10:31]).data


def test_encoded_clips_of_full_range_sources_keep_their_colours(tmp_path):
    path = make_video(tmp_path / "a.avi", (20,), codec="mjpeg", pix_fmt="yuvj420p")
    info, times, _ = source(path)
    clip = cut(str(path), info, times)
    with media.VideoReader(str(path)) as reader:
        theirs = media.upright_rgb(next(iter(reader)).picture, reader.info, 720)
    with media.VideoReader(clip.data) as reader:
        shown = next(iter(reader)).picture
        ours = media.upright_rgb(shown, reader.info, 720)
    assert (clip.mode, shown.format.name) == ("encode", "yuv420p")
    assert np.abs(ours.astype(int) - theirs).mean() < 3


def test_encoded_clips_are_easy_to_seek_in(tmp_path):
    path = make_video(tmp_path / "a.webm", codec="libvpx", size=(191, 127))
    with media.VideoReader(str(path)) as reader:
        info, times = reader.info, [frame.time_us for frame in reader]
    clip = cut(str(path), info, times)
    with av.open(io.BytesIO(clip.data)) as container:
        reader: Any = container
        packets = list(reader.demux(container.streams.video[0]))
        assert max(np.diff([i for i, p in enumerate(packets) if p.is_keyframe])) <= 48
    with media.VideoReader(clip.data) as reader:
        assert {frame.picture.format.name for frame in reader} == {"yuv420p"}
        assert (reader.info.video_codec, reader.info.width, reader.info.height) == (
            "h264",
            190,
            126,
        )


def test_ffmpeg_is_stopped_at_its_limits(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.webm", codec="libvpx")
    info, times, _ = source(path)
    monkeypatch.setattr(cut_module, "CHILD_BYTES", 64 * 2**20)
    with pytest.raises(MediaError) as caught:
        cut(str(path), info, times)
    assert caught.value.reason == "cut_failed"


def test_the_index_comes_before_the_media(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    info, times, _ = source(path)
    data = cut(str(path), info, times[50:91]).data
    assert data.index(b"moov") < data.index(b"mdat")


def test_a_clip_lasts_as_long_as_its_frames(tmp_path):
    path = make_video(tmp_path / "a.mp4", audio="aac")
    info, times, _ = source(path)
    clip = cut(str(path), info, times[50:91])
    with av.open(io.BytesIO(clip.data)) as container:
        assert container.duration == 1_600_000  # pyright: ignore[reportAttributeAccessIssue]
        for stream in container.streams:
            assert stream.duration is not None
            assert stream.time_base is not None
            assert Fraction(1, 1) * stream.duration * stream.time_base == pytest.approx(1.6)


def test_the_header_says_how_long_the_clip_is(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    info, times, _ = source(path)
    data = cut(str(path), info, times[50:91]).data
    scale, duration = struct.unpack_from(">II", data, data.index(b"mvhd") + 16)
    assert duration / scale == 1.6


def test_sound_that_ends_early_is_not_made_longer(tmp_path):
    path = make_video(tmp_path / "a.mp4", audio="aac", audio_end_s=2.8)
    info, times, _ = source(path)
    data = cut(str(path), info, times[50:91]).data
    (video_ticks, _, _), (sound_ticks, _, _) = (
        struct.unpack_from(">Iii", data, at + 12) for at in _find_all(data, b"elst")
    )
    assert video_ticks / cut_module.MOVIE_TIMESCALE == 1.6
    assert sound_ticks / cut_module.MOVIE_TIMESCALE == pytest.approx(0.8, abs=0.03)


def test_frames_at_other_times_are_refused(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    info, times, _ = source(path)
    wrong = times[50:91]
    wrong[20] += 19_000
    with pytest.raises(MediaError, match=r"a frame is off by 19\.0 ms") as caught:
        cut(str(path), info, wrong)
    assert caught.value.reason == "cut_failed"


def test_a_clip_can_be_cut_again(tmp_path):
    path = make_video(tmp_path / "a.mp4", audio="aac")
    info, times, pictures = source(path)
    once = tmp_path / "once.mp4"
    once.write_bytes(cut(str(path), info, times[50:131]).data)
    info, times, _ = source(once)
    twice = cut(str(once), info, times[7:32])
    shown = decode_all(twice.data)
    assert len(shown) == 24
    assert all(
        np.array_equal(ours, theirs)
        for (_, ours), theirs in zip(shown, pictures[57:81], strict=True)
    )


def test_an_inexact_copy_is_encoded_instead(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4")
    info, times, _ = source(path)
    real = cut_module.set_edits

    def one_frame_short(data, length):
        calls.append(length)
        # Both ways of copying, not the encoding after them.
        return real(data, length - Fraction(1, 25) * (len(calls) <= 2))

    calls = []
    monkeypatch.setattr(cut_module, "set_edits", one_frame_short)
    clip = cut(str(path), info, times[50:91])
    assert (clip.mode, clip.why) == ("encode", "39 frames instead of 40")
    assert frame_numbers(clip) == list(range(50, 90))


# ------------------------------------------------------------------------------------------- stage


def _row(path: Path, times: list[int]) -> dict:
    return {"clip_id": "v_0_1", "_path": str(path), "_frame_us": times}


def test_stage_writes_the_clip_and_how_it_was_made(tmp_path):
    path = make_video(tmp_path / "a.mp4", audio="aac")
    _, times, _ = source(path)
    stage = ClipStage(ClipStage.Config())
    stage.setup()
    (outcome,) = stage.process([_row(path, times[50:91])])
    assert isinstance(outcome, Kept)
    (row,) = outcome.rows
    assert row["video"]["path"] == "v_0_1.mp4"
    assert len(decode_all(row["video"]["bytes"])) == 40
    assert (row["width"], row["height"], row["has_audio"]) == (192, 128, True)
    assert [(p["column"], p["model"]) for p in row["provenance"]] == [("video", "ffmpeg/copy")]
    assert set(row) <= {*ClipStage.outputs.names, "provenance"}


def test_one_clip_that_cannot_be_cut_does_not_stop_the_others(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    _, times, _ = source(path)
    beyond = [t + 60_000_000 for t in times[:11]]
    bad, gone, good = ClipStage(ClipStage.Config()).process(
        [_row(path, beyond), _row(tmp_path / "gone.mp4", times[:11]), _row(path, times[:11])]
    )
    assert isinstance(bad, Drop)
    assert bad.reason == "cut_failed"
    assert isinstance(gone, Drop)
    assert gone.reason == "cut_failed"
    assert isinstance(good, Kept)


def test_a_cut_that_takes_too_long_may_be_tried_again(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    _, times, _ = source(path)
    stage = ClipStage(ClipConfig(timeout_s=1e-4))
    (outcome,) = stage.process([_row(path, times)])
    assert outcome == Drop("cut_timeout", "over 0.0001 s", retryable=True)


def test_a_damaged_clip_is_a_media_error():
    with pytest.raises(MediaError):
        read_timeline(b"no file at all")


def test_units_behind_start_codes_are_told_apart():
    packet = b"\x00\x00\x00\x01\x09\xf0" + b"\x00\x00\x01\x65\x88"
    assert starts_clean("h264", packet, b"")
    assert not starts_clean("h264", packet[:-2] + b"\x41\x88", b"")


def _find_all(data: bytes, name: bytes) -> list[int]:
    return [at for at in range(len(data)) if data.startswith(name, at)]
