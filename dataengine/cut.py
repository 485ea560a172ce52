# SPDX-License-Identifier: Apache-2.0
"""Cutting a clip out of a video, exact to the frame, without encoding it again where possible.

A stream copy has to begin at a key frame. Everything before the wanted frame is kept in the file but
hidden by an MP4 edit list; the same list hides the frames after the end that B-frames depend on or
that ffmpeg copied too many of. PyAV, OpenCV, ffmpeg and torchcodec's exact mode honour it.

The packets are copied in this process; ffmpeg copies what libav does not accept that way, and encodes
pictures. The edit lists are then replaced, because the muxer's begin at a key frame,
say nothing about the end, and are rounded to milliseconds. What is visible afterwards is compared with
the times of the frames that were asked for. A clip that cannot be copied, or does not come out exactly,
is encoded. Sound that MP4 does not carry becomes AAC, and sound that breaks the cut is left out: it
never costs the clip.
"""

import contextlib
import math
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any, Literal

import av
import ffmpeg
import imageio_ffmpeg
import numpy as np
from av.error import FFmpegError, InvalidDataError

from dataengine import hdr, media
from dataengine.errors import MediaError
from dataengine.mp4 import set_edits

COPIED_VIDEO = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})
"""Codecs that MP4 carries, and that players find there."""
COPIED_AUDIO = frozenset({"aac", "mp3", "ac3", "eac3", "opus"})
_NO_DECODING = {"skip_frame": "all"}
"""Saves two thirds of what opening a file costs, where its packets are all that is wanted."""
MOVIE_TIMESCALE = 90_000
"""Ticks per second of edit lists: fine enough to fall between any two frames."""
EARLY_US = 4_000
"""How long before the first frame ffmpeg is told to start, so that rounding cannot lose it."""
REFRESH_US = 10_000_000
"""Time after which a picture that is refreshed bit by bit is whole again, whatever came before."""
TOLERANCE_US = 1_000
"""A container that counts in milliseconds moves frames by up to half of one."""
SOUND_BEFORE_US = 100_000
"""Sound copied from before the clip, hidden: what decoders of Opus, MP3 and AAC need to come in clean."""
BEHIND_US = 2_000_000
"""How far behind the picture sound may lie in the file; what comes later is not looked for."""
CHILD_BYTES = 4 * 2**30
"""Address space of an ffmpeg process: several times what encoding 8K takes."""

Sound = Literal["none", "copy", "aac"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A clip as a file.

    ``mode`` is ``copy`` or ``encode``; ``why`` says why it was encoded. ``sound`` is how the sound came
    into it, ``sound_why`` why it was not copied. The sizes are as displayed.
    """

    data: bytes
    mode: Literal["copy", "encode"]
    why: str
    width: int
    height: int
    has_audio: bool
    sound: Sound = "none"
    sound_why: str = ""


class InexactCutError(Exception):
    """The clip does not show the frames it should."""


class _ToolError(InexactCutError):
    """There is no clip, because libav or ffmpeg refused: the sound may be at fault."""


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
            return _with_sound(path, info, frame_us, None, timeout_s, 0)
        except InexactCutError as error:
            why = str(error)
    width, height = media.scaled_size(info.width, info.height, max_short_side)
    size = max(width // 2 * 2, 2), max(height // 2 * 2, 2)  # yuv420p needs even sides
    problems: list[str] = []
    # Some containers cannot be sought exactly, some not at all.
    for lead_us in (_safe_lead_us(path, frame_us[0]), None):
        try:
            clip = _with_sound(path, info, frame_us, size, timeout_s, lead_us)
            return replace(clip, mode="encode", why=why)
        except InexactCutError as error:
            problems.append(str(error))
    raise MediaError("cut_failed", "; ".join(problems))


def _with_sound(
    path: str,
    info: media.MediaInfo,
    frame_us: Sequence[int],
    size: tuple[int, int] | None,
    timeout_s: float,
    lead_us: int | None,
) -> Cut:
    """Returns the clip with the best sound that does not get into its way; see `_attempt`."""
    ways: list[Sound] = ["none"]
    sound_why = ""
    if info.audio_codec in COPIED_AUDIO:
        ways = ["copy", "aac", "none"]
    elif info.audio_codec:
        ways = ["aac", "none"]
        sound_why = f"{info.audio_codec} does not fit into MP4"
    for sound in ways:
        try:
            clip = _attempt(path, info, frame_us, size, timeout_s, lead_us, sound)
        except _ToolError as error:
            if sound == ways[-1]:
                raise
            sound_why = str(error)
            continue
        if sound != "none" and not clip.has_audio:
            return clip  # the sound begins later, or ended before
        return replace(clip, sound=sound, sound_why=sound_why)
    raise AssertionError("the last way returns or raises")


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
    lead_us: int | None,
    sound: Sound,
) -> Cut:
    """Returns the clip, copied or encoded at ``size``, if it comes out exactly.

    Args:
        path: As in `cut`.
        info: As in `cut`.
        frame_us: As in `cut`.
        size: Width and height to encode at; None copies.
        timeout_s: As in `cut`.
        lead_us: How long before the clip decoding begins at the latest; None at the file's start.
        sound: What becomes of the sound track.

    Raises:
        InexactCutError: If ffmpeg fails, or other frames are visible than asked for.
    """
    with tempfile.TemporaryDirectory(prefix="dataengine-") as folder:
        if size is None:
            try:
                _remux(path, info, frame_us, timeout_s, folder, sound)
                return _checked(path, info, frame_us, None, folder)
            except InexactCutError:
                pass  # ffmpeg mends time stamps and bitstreams that libav's muxer refuses
        _run_ffmpeg(path, info, frame_us, size, timeout_s, lead_us, folder, sound)
        return _checked(path, info, frame_us, size, folder)


def _clip_path(folder: str) -> str:
    return os.path.join(folder, "clip.mp4")


def _checked(
    path: str,
    info: media.MediaInfo,
    frame_us: Sequence[int],
    size: tuple[int, int] | None,
    folder: str,
) -> Cut:
    """Returns the clip in a folder with exact edit lists, if it shows what it should.

    The clip stays on disk up to the end: one of half an hour is as large as its source.

    Raises:
        InexactCutError: If other frames are visible than asked for.
    """
    clip = _clip_path(folder)
    length = Fraction(frame_us[-1] - frame_us[0], 1_000_000)
    try:
        with open(clip, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
            set_edits(data, length)
        shown = read_timeline(clip)
    except (MediaError, OSError, ValueError) as error:
        raise InexactCutError(f"no frame came out ({error})") from error
    if len(shown.video_us) != len(frame_us) - 1:
        raise InexactCutError(f"{len(shown.video_us)} frames instead of {len(frame_us) - 1}")
    worst_us = np.abs(shown.video_us - (np.array(frame_us[:-1]) - frame_us[0])).max()
    if worst_us > TOLERANCE_US:
        raise InexactCutError(f"a frame is off by {worst_us / 1000:.1f} ms")
    if size is None and not starts_clean(shown.codec, shown.key_packet, shown.extradata):
        key_us = frame_us[0] + round(shown.key_us)
        _compare_first(path, clip, frame_us[0], key_us)
    has_audio = shown.audio_us is not None and shown.audio_us < length * 1_000_000
    width, height = size or (info.width, info.height)
    with open(clip, "rb") as file:
        return Cut(file.read(), "copy", "", width, height, has_audio)


def _remux(
    path: str,
    info: media.MediaInfo,
    frame_us: Sequence[int],
    timeout_s: float,
    folder: str,
    sound: Sound,
) -> None:
    """Writes an MP4 that holds at least the wanted frames, copied packet by packet.

    Starting ffmpeg and letting it probe the file would take three times as long.

    Raises:
        _ToolError: If libav's muxer does not take the streams.
        InexactCutError: If no key frame lies before the clip.
        MediaError: ``cut_timeout``.
    """
    deadline = time.monotonic() + timeout_s
    options = {"movflags": "faststart", "movie_timescale": str(MOVIE_TIMESCALE)}
    try:
        with media.open_container(path, _NO_DECODING) as source:
            target: Any
            with av.open(_clip_path(folder), "w", format="mp4", options=options) as target:
                target.flags |= _BITEXACT
                for _ in _copy_packets(source, target, info, frame_us, sound):
                    if time.monotonic() > deadline:
                        raise MediaError("cut_timeout", f"over {timeout_s:g} s")
    except (FFmpegError, OSError, ValueError) as error:
        raise _ToolError(getattr(error, "strerror", None) or str(error)) from error


_BITEXACT = 0x0400  # AVFMT_FLAG_BITEXACT: no version of libav in the file


def _copy_packets(
    source: Any, target: Any, info: media.MediaInfo, frame_us: Sequence[int], sound: Sound
) -> Iterator[None]:
    """Copies what belongs to a clip from one container to another; yields at every packet read."""
    first_us, end_us = frame_us[0], frame_us[-1]
    zero_us = info.container_start_us
    video = source.streams[info.video_stream]
    audio = source.streams[info.audio_stream] if sound != "none" else None
    copies = {video.index: target.add_stream_from_template(video, opaque=True)}
    if info.video_codec == "hevc":
        copies[video.index].codec_context.codec_tag = "hvc1"  # what Apple's players look for
    encoder = None
    if audio is not None and sound == "copy":
        copies[audio.index] = target.add_stream_from_template(audio, opaque=True)
    elif audio is not None:
        encoder = _AacEncoder(target, audio, zero_us + first_us - _early_us(frame_us))
    # The muxer's edit list hides what comes before 0; see _early_us.
    shift_us = zero_us + first_us - _early_us(frame_us)
    clocks = {}  # whole numbers, and made once: there are thousands of packets
    for stream in (video,) if audio is None else (video, audio):
        tick = Fraction(1_000_000) * stream.time_base
        edges_us = first_us - SOUND_BEFORE_US, end_us, end_us + BEHIND_US
        begin, end, late = (math.ceil((zero_us + us) / tick) for us in edges_us)
        clocks[stream.index] = begin, end, late, round(shift_us / tick)
    for packet in _packets_from_key_frame(source, video, audio, zero_us + first_us):
        yield
        pts, dts = packet.pts, packet.dts
        stamp = pts if dts is None else dts
        if stamp is None:
            continue
        begin, end, late, shift = clocks[packet.stream_index]
        if packet.stream_index == video.index:
            if stamp >= late or (stamp >= end and audio is None):
                break
            if stamp >= end:
                continue  # frames are decoded before they are shown, never after
        elif stamp >= end or stamp + (packet.duration or 0) < begin:
            continue
        if encoder is not None and packet.stream_index != video.index:
            encoder.push(packet)
            continue
        packet.pts = (stamp if pts is None else pts) - shift  # AVI says when to decode, no more
        if dts is not None:
            packet.dts = dts - shift
        packet.stream = copies[packet.stream_index]
        target.mux_one(packet)
    if encoder is not None:
        encoder.finish()


class _AacEncoder:
    """Decodes packets of sound and writes them as AAC, on the clip's clock."""

    def __init__(self, target: Any, audio: Any, shift_us: int) -> None:
        self._target, self._shift_us = target, shift_us
        self._num_decoded, self._error = 0, ""
        rate = audio.codec_context.sample_rate
        if rate not in _AAC_RATES:
            rate = 48_000
        layout = "mono" if audio.codec_context.layout.nb_channels == 1 else "stereo"
        self._stream = target.add_stream("aac", rate=rate, layout=layout)
        self._stream.codec_context.flags |= _BITEXACT_CODEC
        self._stream.bit_rate = 128_000
        self._resampler = av.AudioResampler("fltp", layout, rate, frame_size=1024)

    def push(self, packet: Any) -> None:
        """Takes a packet; one that does not decode is left out."""
        try:
            sounds = packet.decode()
        except InvalidDataError as error:
            self._error = str(error)
            return
        for sound in sounds:
            if sound.pts is not None:
                sound.pts -= round(Fraction(self._shift_us, 1_000_000) / sound.time_base)
            self._num_decoded += 1
            self._write(sound)

    def finish(self) -> None:
        """Writes what is left.

        Raises:
            _ToolError: If nothing was decoded, although there was something.
        """
        if self._num_decoded:
            self._write(None)
            self._target.mux(self._stream.encode(None))
        elif self._error:
            raise _ToolError(self._error)

    def _write(self, sound: Any) -> None:
        for piece in self._resampler.resample(sound):
            self._target.mux(self._stream.encode(piece))


_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_BITEXACT_CODEC = 1 << 23  # AV_CODEC_FLAG_BITEXACT


def _packets_from_key_frame(source: Any, video: Any, audio: Any, time_us: int) -> Iterator[Any]:
    """Yields packets from the last key frame that is shown at or before a time of the container.

    Raises:
        InexactCutError: If there is none.
    """
    streams = [video] if audio is None else [video, audio]
    for back_us in (0, 1_000_000, 20_000_000):
        source.seek(time_us - back_us, backward=True)
        sounds: list[Any] = []
        packets = source.demux(streams)
        for packet in packets:
            if packet.stream_index != video.index:
                sounds.append(packet)
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or not packet.is_keyframe:
                continue  # the seek landed behind the key frame; try further back
            # A tick of slack: stored times are rounded.
            base = packet.time_base
            if (stamp - 1) * base.numerator * 1_000_000 >= time_us * base.denominator:
                break
            return chain(sounds, [packet], packets)
    raise InexactCutError("no key frame before the clip")


def _early_us(frame_us: Sequence[int]) -> int:
    """Returns how long before its first frame a clip is told to start; see `EARLY_US`."""
    return min(EARLY_US, min(b - a for a, b in pairwise(frame_us)) // 2)


def _run_ffmpeg(
    path: str,
    info: media.MediaInfo,
    frame_us: Sequence[int],
    size: tuple[int, int] | None,
    timeout_s: float,
    lead_us: int | None,
    folder: str,
    sound: Sound,
) -> None:
    """Writes an MP4 that holds at least the wanted frames; its edit list is still ffmpeg's."""
    early_us = _early_us(frame_us)
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
    source = ffmpeg.input(f"file:{os.path.abspath(path)}", **options)
    streams = [source[str(info.video_stream)]]
    if sound != "none":
        streams.append(source[str(info.audio_stream)])
    target: dict[str, object] = {
        "f": "mp4",
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
    if sound != "none":
        target["c:a"] = sound
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
            "vf": _filters(info, size),
            "fps_mode": "passthrough",
            "enc_time_base": "demux",
        }
    if size is not None and (info.transfer or info.wide_gamut):
        with open(os.path.join(folder, "to_bt709.cube"), "w") as file:
            file.write(hdr.cube(info.transfer, info.wide_gamut))
    command = ffmpeg.compile(
        ffmpeg.output(*streams, _clip_path(folder), **target).global_args(
            "-nostdin", "-v", "error"
        ),
        cmd=imageio_ffmpeg.get_ffmpeg_exe(),
        overwrite_output=True,
    )
    _run_limited(command, folder, timeout_s)


def _filters(info: media.MediaInfo, size: tuple[int, int]) -> str:
    """Returns ffmpeg's filters for an encoded clip: its size, square pixels, BT.709 if it was HDR."""
    scale = f"scale={size[0]}:{size[1]}:flags=area"
    if not (info.transfer or info.wide_gamut):
        return f"{scale}:out_range=limited,setsar=1"
    tags = "color_primaries=bt709:color_trc=bt709"
    return (
        f"{scale},format=gbrp16le,lut3d=file=to_bt709.cube,setparams={tags}:colorspace=gbr,"
        f"scale=out_color_matrix=bt709:out_range=limited,format=yuv420p,"
        f"setparams={tags}:colorspace=bt709:range=limited,setsar=1"
    )


def _run_limited(command: Sequence[str], folder: str, timeout_s: float) -> None:
    """Runs ffmpeg within limits of time and memory.

    Raises:
        MediaError: ``cut_timeout``.
        _ToolError: If it fails; the message is the last line it wrote.
    """
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as child:
        if sys.platform == "linux":
            # From outside: code between fork and exec is not safe in a process with threads.
            seconds = int(timeout_s) + 1
            for limit, value in ((resource.RLIMIT_AS, CHILD_BYTES), (resource.RLIMIT_CPU, seconds)):
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(child.pid, limit, (value, value))
        try:
            _, words = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            child.kill()
            raise MediaError("cut_timeout", f"over {timeout_s:g} s") from error
    if child.returncode != 0:
        lines = words.decode(errors="replace").strip().splitlines()
        raise _ToolError(lines[-1] if lines else f"ffmpeg ended with {child.returncode}")


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


def _compare_first(path: str, clip: str, first_us: int, key_us: int) -> None:
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
        video_us: Ascending presentation times of the visible frames, float64 [frames], microseconds.
        audio_us: When the first visible sound begins; None without sound.
        key_packet: The first video packet, hidden or not.
        key_us: Its presentation time; negative if it is hidden.
        codec: Name of the video codec.
        extradata: The codec's configuration record.
    """

    video_us: np.ndarray
    audio_us: float | None
    key_packet: bytes
    key_us: float
    codec: str
    extradata: bytes


def read_timeline(source: str | bytes) -> Timeline:
    """Returns what an MP4 shows, as libav understands its edit lists.

    Raises:
        MediaError: See `probe`.
    """
    ticks: list[int] = []
    audio_us: float | None = None
    key: tuple[bytes, int] = b"", 0
    with media.open_container(source, _NO_DECODING) as container:
        stream = media.video_stream(container)
        for packet in container.demux():
            stamp = packet.pts
            if stamp is None:
                continue
            if packet.stream_index == stream.index:
                if not key[0]:
                    key = bytes(packet), stamp
                if not packet.is_discard:
                    ticks.append(stamp)
            elif audio_us is None and packet.stream.type == "audio" and not packet.is_discard:
                audio_us = float(stamp * packet.time_base * 1_000_000)
        tick_us = float(stream.time_base * 1_000_000)
        extradata = bytes(stream.codec_context.extradata or b"")
        codec = stream.codec_context.codec.canonical_name
    video_us = np.sort(np.array(ticks, np.int64)) * tick_us
    return Timeline(video_us, audio_us, key[0], key[1] * tick_us, codec, extradata)


def read_key_packet(path: str, time_us: int) -> tuple[str, bytes, bytes]:
    """Returns the packet at which decoding begins for a frame at the given time.

    Returns:
        Name of the codec, the packet, the codec's configuration record.

    Raises:
        MediaError: See `probe`.
    """
    with media.open_container(path) as container:
        stream = media.video_stream(container)
        try:
            container.seek(max(time_us, 0) + (container.start_time or 0), backward=True)
            packet = next(container.demux(stream), None)
        except (FFmpegError, OSError) as error:
            raise MediaError("undecodable", f"cannot be sought: {error}") from error
        extradata = bytes(stream.codec_context.extradata or b"")
        name = stream.codec_context.codec.canonical_name
        return name, bytes(packet) if packet is not None else b"", extradata
