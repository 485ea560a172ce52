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
import struct
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
        packets = media.read_timeline(bytes(data), edited=False)
        first = set_edits(data, packets.video_s, length)
        shown = media.read_timeline(bytes(data))
    except MediaError as error:
        raise InexactCutError("no frame came out") from error
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
    return 0 if starts_clean(*media.read_key_packet(path, time_us)) else REFRESH_US


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


# -------------------------------------------------------------------------------- MP4 edit lists


def set_edits(data: bytearray, video_s: Sequence[Fraction], length: Fraction) -> Fraction:
    """Rewrites an MP4's edit lists, in place, so that they begin with a frame and end on time.

    The first frame that was visible comes to time 0, and everything else keeps its distance to it.

    Args:
        data: An MP4 whose ``moov`` is not compressed; sizes and offsets stay as they are.
        video_s: Ascending presentation times of all frames in the video track, edits ignored.
        length: New duration in seconds; sound that ends earlier stays shorter.

    Returns:
        The item of ``video_s`` that is shown first.

    Raises:
        InexactCutError: If no frame was visible, or the file is not what ffmpeg should have made.

    Source: ISO/IEC 14496-12, 8.6.5 and 8.6.6. (libav's demuxer moves the first visible frame to the
    beginning of its edit, so it cannot be asked where sound and picture stood before.)
    """
    moov = _box(data, (0, len(data)), "moov")
    mvhd = _box(data, moov, "mvhd")
    movie_scale = _timescale(data, mvhd)
    tracks = [
        _read_track(data, (a, b), movie_scale)
        for kind, a, b in _boxes(data, moov)
        if kind == "trak"
    ]
    video = next((track for track in tracks if track.kind == b"vide"), None)
    # Half a tick: ffmpeg's own edit was rounded.
    visible = [t for t in video_s if video and t >= video.begin_s - Fraction(1, 2 * video.scale)]
    if not video or not visible:
        raise InexactCutError("no frame came out")
    zero = video.delay + visible[0] - video.begin_s
    longest = 0
    for track in tracks:
        begin, delay = track.begin_s, track.delay - zero
        if delay < 0:  # the track begins before the clip does
            begin, delay = begin - delay, Fraction(0)
        rest = length - delay
        if track.kind != b"vide":
            # Sound may end before the picture. (The media length of video says nothing about it:
            # it leaves out the delay that B-frames bring.)
            rest = min(rest, track.length_s - begin)
        edits = [(round(max(rest, Fraction(0)) * movie_scale), round(begin * track.scale))]
        if round(delay * movie_scale):
            edits.insert(0, (round(delay * movie_scale), -1))
        _write_edits(data, track.elst, edits)
        total = sum(duration for duration, _ in edits)
        _write_duration(data, track.tkhd, total, 20)
        longest = max(longest, total)
    _write_duration(data, mvhd, longest, 16)
    return visible[0]


_Span = tuple[int, int]
"""Start and end of a box's content in the file."""


@dataclass(frozen=True, slots=True)
class _Track:
    """A track as its edit list leaves it: after ``delay`` it is shown from ``begin_s`` on."""

    kind: bytes
    scale: int
    length_s: Fraction
    delay: Fraction
    begin_s: Fraction
    elst: _Span
    tkhd: _Span


def _read_track(data: bytearray, trak: _Span, movie_scale: int) -> _Track:
    mdia = _box(data, trak, "mdia")
    mdhd, hdlr = _box(data, mdia, "mdhd"), _box(data, mdia, "hdlr")
    elst = _box(data, _box(data, trak, "edts"), "elst")
    scale = _timescale(data, mdhd)
    delay, begin = _read_edits(data, elst, movie_scale)
    return _Track(
        kind=bytes(data[hdlr[0] + 8 : hdlr[0] + 12]),
        scale=scale,
        length_s=Fraction(_duration(data, mdhd), scale),
        delay=delay,
        begin_s=Fraction(begin, scale),
        elst=elst,
        tkhd=_box(data, trak, "tkhd"),
    )


def _boxes(data: bytearray, span: _Span) -> Iterator[tuple[str, int, int]]:
    """Yields (type, start, end) of the boxes in a span; start is behind the box's header."""
    position, stop = span
    while position + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, position + 8)
            header = 16
        elif size == 0:
            size = stop - position
        yield kind.decode("latin-1"), position + header, position + size
        position += max(size, header)


def _box(data: bytearray, span: _Span, name: str) -> _Span:
    """Returns the content of the first box of a type.

    Raises:
        InexactCutError: If there is none: a file that ffmpeg should not have written.
    """
    for kind, start, end in _boxes(data, span):
        if kind == name:
            return start, end
    raise InexactCutError(f"no {name} box")


def _timescale(data: bytearray, span: _Span) -> int:
    """Returns the timescale of an mvhd or mdhd box."""
    return struct.unpack_from(">I", data, span[0] + (20 if data[span[0]] else 12))[0]


def _duration(data: bytearray, span: _Span) -> int:
    """Returns the duration of an mdhd box."""
    wide = data[span[0]]
    return struct.unpack_from(">Q" if wide else ">I", data, span[0] + (24 if wide else 16))[0]


def _write_duration(data: bytearray, span: _Span, value: int, offset: int) -> None:
    """Writes the duration of a tkhd or mvhd box.

    Args:
        data: The file.
        span: The box's content.
        value: In ticks of the movie.
        offset: Where the duration stands in version 0; version 1 has two 64-bit times before it.
    """
    if data[span[0]]:
        struct.pack_into(">Q", data, span[0] + offset + 8, value)
    else:
        struct.pack_into(">I", data, span[0] + offset, value)


def _read_edits(data: bytearray, span: _Span, movie_scale: int) -> tuple[Fraction, int]:
    """Returns a track's delay in seconds and the media time that is shown first."""
    form, size = (">Qqhh", 20) if data[span[0]] else (">Iihh", 12)
    (count,) = struct.unpack_from(">I", data, span[0] + 4)
    delay = Fraction(0)
    for i in range(count):
        duration, media_time, _, _ = struct.unpack_from(form, data, span[0] + 8 + i * size)
        if media_time >= 0:
            return delay, media_time
        delay += Fraction(duration, movie_scale)
    return delay, 0


def _write_edits(data: bytearray, span: _Span, edits: Sequence[tuple[int, int]]) -> None:
    """Writes a track's edit list over the old one; what is left over becomes a ``free`` box."""
    start, end = span
    form, size = (">Qqhh", 20) if data[start] else (">Iihh", 12)
    used = start + 8 + len(edits) * size
    if used > end:
        raise InexactCutError("no room for the edit list")
    struct.pack_into(">I", data, start + 4, len(edits))
    for i, (duration, media_time) in enumerate(edits):
        struct.pack_into(form, data, start + 8 + i * size, duration, media_time, 1, 0)
    if used < end:
        struct.pack_into(">I", data, start - 8, used - (start - 8))
        data[used:end] = struct.pack(">I4s", end - used, b"free") + bytes(end - used - 8)
