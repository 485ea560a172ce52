# SPDX-License-Identifier: Apache-2.0
"""Cutting a clip out of a video, exact to the frame, without encoding it again where possible.

A stream copy has to begin at a key frame. Everything before the wanted frame is kept in the file but
hidden by an MP4 edit list; the same list hides the frames after the end that B-frames depend on or
that ffmpeg copied too many of. PyAV, OpenCV, ffmpeg and torchcodec's exact mode honour it.

ffmpeg copies the packets; its edit lists are then replaced, because they begin a few milliseconds
early, say nothing about the end, and are rounded to milliseconds. What is visible afterwards is
compared with the times of the frames that were asked for. A clip that cannot be copied, or does not
come out exactly, is encoded.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import ffmpeg
import imageio_ffmpeg

from dataengine import media
from dataengine.errors import MediaError
from dataengine.mp4 import set_edits

COPIED_VIDEO = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})
"""Codecs that MP4 carries, and that players find there."""
COPIED_AUDIO = frozenset({"aac", "mp3", "ac3", "eac3", "opus"})
MOVIE_TIMESCALE = 90_000
"""Ticks per second of edit lists: fine enough to fall between any two frames."""
EARLY_US = 4_000
"""How long before the first frame ffmpeg is told to start, so that rounding cannot lose it."""
REFRESH_US = 10_000_000
"""Time after which a picture that is refreshed bit by bit is whole again, whatever came before."""
TOLERANCE_US = 1_000
"""A container that counts in milliseconds moves frames by up to half of one."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A clip as a file.

    ``mode`` is ``copy`` or ``encode``; ``why`` says why it was encoded. The sizes are as displayed.
    """

    data: bytes
    mode: Literal["copy", "encode"]
    why: str
    width: int
    height: int
    has_audio: bool


class InexactCutError(Exception):
    """The clip does not show the frames it should."""


def cut(
    path: str,
    info: media.MediaInfo,
    frame_us: Sequence[int],
    max_short_side: int = 720,
    timeout_s: float = 600.0,
) -> Cut:
    """Returns the clip that shows exactly the given frames, and the sound beside them.

    Args:
        path: A local file.
        info: What `media.probe` says of it.
        frame_us: Times of all frames of the clip, ascending, then the time at which it ends.
        max_short_side: Pictures with a longer short side are shrunk to it.
        timeout_s: Limit for each run of ffmpeg.

    Raises:
        MediaError: ``cut_failed`` if not even encoding gives the frames; ``cut_timeout``.
    """
    why = _needs_encoding(info, max_short_side)
    if not why:
        try:
            return _attempt(path, info, frame_us, None, timeout_s)
        except InexactCutError as error:
            why = str(error)
    width, height = media.scaled_size(info.width, info.height, max_short_side)
    size = max(width // 2 * 2, 2), max(height // 2 * 2, 2)  # yuv420p needs even sides
    problems: list[str] = []
    # Some containers cannot be sought exactly, some not at all.
    for lead_us in (_safe_lead_us(path, frame_us[0]), None):
        try:
            clip = _attempt(path, info, frame_us, size, timeout_s, lead_us)
            return replace(clip, mode="encode", why=why)
        except InexactCutError as error:
            problems.append(str(error))
    raise MediaError("cut_failed", "; ".join(problems))


def _needs_encoding(info: media.MediaInfo, max_short_side: int) -> str:
    """Returns why a video cannot be copied; empty if it can."""
    if info.video_codec not in COPIED_VIDEO:
        return f"{info.video_codec} does not fit into MP4"
    if not info.has_times:
        return "AVI does not say when B-frames are shown"
    if min(info.width, info.height) > max_short_side:
        return f"{info.width}x{info.height} is larger than {max_short_side}p"
    return ""


def _attempt(
    path: str,
    info: media.MediaInfo,
    frame_us: Sequence[int],
    size: tuple[int, int] | None,
    timeout_s: float,
    lead_us: int | None = 0,
) -> Cut:
    """Returns the clip, copied or encoded at ``size``, if it comes out exactly.

    Args:
        path: As in `cut`.
        info: As in `cut`.
        frame_us: As in `cut`.
        size: Width and height to encode at; None copies.
        timeout_s: As in `cut`.
        lead_us: How long before the clip decoding begins at the latest; None at the file's start.

    Raises:
        InexactCutError: If ffmpeg fails, or other frames are visible than asked for.
    """
    data = bytearray(_run_ffmpeg(path, info, frame_us, size, timeout_s, lead_us))
    length = Fraction(frame_us[-1] - frame_us[0], 1_000_000)
    try:
        packets = read_timeline(bytes(data), edited=False)
        first = set_edits(data, packets.video_s, length)
        shown = read_timeline(bytes(data))
    except (MediaError, ValueError) as error:
        raise InexactCutError(f"no frame came out ({error})") from error
    if len(shown.video_s) != len(frame_us) - 1:
        raise InexactCutError(f"{len(shown.video_s)} frames instead of {len(frame_us) - 1}")
    worst_us = max(
        abs(time_s * 1_000_000 - (time_us - frame_us[0]))
        for time_s, time_us in zip(shown.video_s, frame_us, strict=False)
    )
    if worst_us > TOLERANCE_US:
        raise InexactCutError(f"a frame is off by {float(worst_us) / 1000:.1f} ms")
    if size is None and not starts_clean(packets.codec, packets.key_packet, packets.extradata):
        key_us = frame_us[0] + round((packets.key_s - first) * 1_000_000)
        _compare_first(path, bytes(data), frame_us[0], key_us)
    has_audio = shown.audio_s is not None and shown.audio_s < length
    width, height = size or (info.width, info.height)
    return Cut(bytes(data), "copy", "", width, height, has_audio)


def _run_ffmpeg(
    path: str,
    info: media.MediaInfo,
    frame_us: Sequence[int],
    size: tuple[int, int] | None,
    timeout_s: float,
    lead_us: int | None,
) -> bytes:
    """Returns an MP4 that holds at least the wanted frames; its edit list is still ffmpeg's."""
    gap_us = min(b - a for a, b in pairwise(frame_us))
    early_us = min(EARLY_US, gap_us // 2)
    # Frames too many do not matter in a copy; the edit list hides them.
    start_us, end_us = frame_us[0] - early_us, frame_us[-1] - (early_us if size else 0)
    # Options before the input seek in it, those before the output leave out what was decoded.
    seek_us = 0 if lead_us is None else max(start_us - lead_us, 0)
    options: dict[str, object] = {"threads": 1, **media.OPEN_OPTIONS}
    if seek_us:
        options["ss"] = f"{seek_us}us"
    trim: dict[str, object] = {}
    if lead_us == 0:
        options["to"] = f"{end_us}us"
    else:
        trim = {"ss": f"{max(start_us - seek_us, 0)}us", "to": f"{end_us - seek_us}us"}
    source = ffmpeg.input(f"file:{path}", **options)
    streams = [source[str(info.video_stream)]]
    if info.audio_stream is not None:
        streams.append(source[str(info.audio_stream)])
    audio = "copy" if info.audio_codec in COPIED_AUDIO else "aac"
    target: dict[str, object] = {
        "f": "mp4",
        "c:a": audio,
        "movflags": "+faststart",
        "movie_timescale": MOVIE_TIMESCALE,
        # Nothing personal (place, device, names), and the same bytes every time.
        "map_metadata": -1,
        "map_chapters": -1,
        "fflags": "+bitexact",
        "flags:v": "+bitexact",
        "flags:a": "+bitexact",
        "threads": 1,
        **trim,
    }
    if size is None:
        target["c:v"] = "copy"
        if info.video_codec == "hevc":
            target["tag:v"] = "hvc1"  # what Apple's players look for
    else:
        target |= {
            "c:v": "libx264",
            "crf": 20,
            "preset": "veryfast",
            "pix_fmt": "yuv420p",
            "g": 48,
            "vf": f"scale={size[0]}:{size[1]},setsar=1",
            "fps_mode": "passthrough",
            "enc_time_base": "demux",
        }
    with tempfile.TemporaryDirectory(prefix="dataengine-") as folder:
        out = os.path.join(folder, "clip.mp4")
        command = ffmpeg.compile(
            ffmpeg.output(*streams, out, **target).global_args("-nostdin", "-v", "error"),
            cmd=imageio_ffmpeg.get_ffmpeg_exe(),
            overwrite_output=True,
        )
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise MediaError("cut_timeout", f"over {timeout_s:g} s") from error
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise InexactCutError(lines[-1] if lines else f"ffmpeg ended with {done.returncode}")
        with open(out, "rb") as file:
            return file.read()


# ------------------------------------------------------------------------------------- key frames


def _safe_lead_us(path: str, time_us: int) -> int:
    """Returns how long before a time decoding has to begin for whole pictures at that time."""
    return 0 if starts_clean(*read_key_packet(path, time_us)) else REFRESH_US


def starts_clean(codec: str, packet: bytes, extradata: bytes) -> bool:
    """Returns whether no picture after a key frame can depend on one before it.

    In H.264 and HEVC, recovery points and open groups of pictures count as key frames too.

    Args:
        codec: libav's name of the codec.
        packet: The key frame, with lengths in front of its units (MP4) or start codes (the rest).
        extradata: The codec's configuration record (``avcC`` or ``hvcC``), else no matter what.

    Source: ITU-T H.264 table 7-1, H.265 table 7-1, ISO/IEC 14496-15.
    """
    if codec not in {"h264", "hevc"}:
        return True
    for header in _unit_headers(packet, extradata, 4 if codec == "h264" else 21):
        if codec == "h264" and header & 31 == 5:  # a slice of an IDR picture
            return True
        if codec == "hevc" and 16 <= header >> 1 & 63 <= 20:  # BLA or IDR
            return True
    return False


def _unit_headers(packet: bytes, extradata: bytes, length_at: int) -> Iterator[int]:
    """Yields the first byte of each NAL unit; ``length_at`` is where the record tells their form."""
    if extradata[:1] == b"\x01" and len(extradata) > length_at:
        prefix = (extradata[length_at] & 3) + 1
        position = 0
        while position + prefix < len(packet):
            yield packet[position + prefix]
            position += prefix + int.from_bytes(packet[position : position + prefix], "big")
    else:
        for unit in packet.split(b"\x00\x00\x01")[1:]:
            yield from unit[:1]


def _compare_first(path: str, clip: bytes, first_us: int, key_us: int) -> None:
    """Checks a clip's first frame against the source's, decoded from one key frame earlier.

    Raises:
        InexactCutError: If they differ.
    """
    try:
        with media.VideoReader(clip) as reader:
            ours = next(iter(reader))
    except MediaError as error:
        raise InexactCutError("the clip does not decode") from error
    with media.VideoReader(path) as reader:
        reader.seek(key_us - 1)
        theirs = next((frame for frame in reader if frame.time_us >= first_us), None)
    if (
        theirs is None
        or theirs.time_us != first_us
        or not media.same_picture(ours.picture, theirs.picture)
    ):
        raise InexactCutError("the key frame before the clip does not stand on its own")


# ---------------------------------------------------------------------------------------- packets


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a clip shows, read from its packets without decoding.

    Attributes:
        video_s: Ascending presentation times of the visible frames, in exact seconds.
        audio_s: When the first visible sound begins; None without sound.
        key_packet: The first video packet.
        key_s: Its presentation time.
        codec: Name of the video codec.
        extradata: The codec's configuration record.
    """

    video_s: list[Fraction]
    audio_s: Fraction | None
    key_packet: bytes
    key_s: Fraction
    codec: str
    extradata: bytes


def read_timeline(data: bytes, edited: bool = True) -> Timeline:
    """Returns what an MP4 shows.

    Args:
        data: The file.
        edited: Whether to apply its edit lists; else everything in it counts as visible, on each
            track's own clock.

    Raises:
        MediaError: See `probe`.
    """
    video_s: list[Fraction] = []
    audio_s: Fraction | None = None
    key: tuple[bytes, Fraction] = b"", Fraction(0)
    with media.open_container(data, {} if edited else {"ignore_editlist": "1"}) as container:
        stream = media.video_stream(container)
        for packet in container.demux():
            if packet.pts is None:
                continue
            base = packet.time_base
            time_s = Fraction(packet.pts * base.numerator, base.denominator)
            if packet.stream_index == stream.index:
                if not key[0]:
                    key = bytes(packet), time_s
                if not packet.is_discard:
                    video_s.append(time_s)
            elif packet.stream.type == "audio" and audio_s is None and not packet.is_discard:
                audio_s = time_s
        extradata = bytes(stream.codec_context.extradata or b"")
        codec = stream.codec_context.codec.canonical_name
    return Timeline(sorted(video_s), audio_s, *key, codec, extradata)


def read_key_packet(path: str, time_us: int) -> tuple[str, bytes, bytes]:
    """Returns the packet at which decoding begins for a frame at the given time.

    Returns:
        Name of the codec, the packet, the codec's configuration record.

    Raises:
        MediaError: See `probe`.
    """
    with media.open_container(path) as container:
        stream = media.video_stream(container)
        container.seek(max(time_us, 0) + (container.start_time or 0), backward=True)
        packet = next(container.demux(stream), None)
        extradata = bytes(stream.codec_context.extradata or b"")
        name = stream.codec_context.codec.canonical_name
        return name, bytes(packet) if packet is not None else b"", extradata
