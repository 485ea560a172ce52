# SPDX-License-Identifier: Apache-2.0
"""Reading media: probe a file, decode it once, shrink and encode frames, read its sound.

This module and `dataengine.cut` are the only ones that touch PyAV or ffmpeg.

Time inside these two modules is integer microseconds of presentation time since the container's
start: libav's own rounding of every timestamp, minus ``container.start_time``. It is never a frame
count, so variable rates, late starts and dropped frames need no special case. Records hold
milliseconds, the *floor* of it (`floor_ms`). Because the floor is monotone, the frames with
``start_ms <= floor_ms(t) < end_ms`` are exactly those of a clip that starts at the frame
``start_ms`` and ends before the frame ``end_ms`` was floored from. Rounding to nearest would
exclude the first frame of every clip whose time was rounded up.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
from av.error import EOFError as EndOfStream
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition

from dataengine.errors import MediaError

# What may be inside a file that came from the network. Playlists (HLS, DASH, concat) are missing
# on purpose: they name other files and URLs. So are the text and still-image demuxers, which
# "play" an HTML error page or a thumbnail that was saved as .mp4.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,mxf,nut,rm,m4v,y4m,yuv4mpegpipe,"
    "wav,mp3,aac,flac,w64,aiff,amr,caf,ac3"
)
OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}

Picture = av.VideoFrame
"""A decoded frame in the decoder's own layout."""

GRID_PX = 120
"""Longer side of a small frame at most. Measured on 48 videos: 120 finds the same shots as 360 and as
PySceneDetect's own readers, and its motion scores are within 3 % of those at 240."""


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a file says about itself and which streams are taken from it.

    ``width`` and ``height`` are as displayed: after rotation and with square pixels.
    ``duration_ms`` is 0 where the container does not say.
    """

    duration_ms: int
    fps: float
    width: int
    height: int
    video_codec: str
    audio_codec: str | None
    video_stream: int
    audio_stream: int | None
    rotation: int
    """Degrees counter-clockwise that a player turns the picture: 0, 90, 180 or 270."""
    file_bytes: int
    has_times: bool
    """Whether the container stores when pictures are shown; AVI with B-frames does not."""
    container_start_us: int
    """First timestamp in the container, of whichever stream: the zero of all times."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame and its time; holding ``picture`` holds the decoder's buffer alive."""

    time_us: int
    duration_us: int
    picture: av.VideoFrame


def floor_ms(time_us: int) -> int:
    """Returns the millisecond of a frame on the records' clock. See the module's docstring."""
    return time_us // 1000


# ------------------------------------------------------------------------------------- opening


def probe(source: str | bytes) -> MediaInfo:
    """Returns what is in a file, after checking that at least one frame decodes.

    Raises:
        MediaError: ``empty_file``, ``not_a_video``, ``no_video_stream``, ``undecodable`` or
            ``unreadable_file``.
    """
    with VideoReader(source) as reader:
        return reader.info


class VideoReader:
    """One decoding pass over a file's video stream, in presentation order.

    Iterating yields every frame once. Damaged packets are skipped and counted in ``num_errors``,
    and a file that breaks off ends early (``truncated``): what decodes is kept. ``info`` is known
    from the start, since opening decodes the first frame.

    Args:
        source: A local file, or the bytes of one.
        threads: Decoder threads. One is the cheapest in CPU seconds (measured on 48 videos: 13.7 s,
            against 15.8 s with two frame threads and 17.7 s with libav's automatic choice); many
            actors make better use of the cores than threads do.

    Raises:
        MediaError: See `probe`.
    """

    def __init__(self, source: str | bytes, threads: int = 1) -> None:
        self.num_errors = 0
        self.truncated = False
        self._error = ""
        self._container = open_container(source)
        try:
            self._stream = video_stream(self._container)
            self._stream.codec_context.thread_count = threads
            self._stream.codec_context.thread_type = "FRAME" if threads > 1 else "NONE"
            self._start_us = self._container.start_time or 0
            self._frames = self._decode()
            self._first = next(self._frames, None)
            if self._first is None:
                raise MediaError("undecodable", self._error or "no frame decodes")
            size = os.stat(source).st_size if isinstance(source, str) else len(source)
            self.info = _describe(self._container, self._stream, self._first.picture, size)
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        yield from self._frames

    def seek(self, time_us: int) -> None:
        """Moves to the last key frame at or before a time, for the next iteration."""
        target = max(time_us, 0) + self._start_us
        self._container.seek(target, backward=True)
        self._first, self._frames = None, self._decode()

    def _decode(self) -> Iterator[Frame]:
        rate = float(self._stream.average_rate or 0) or 25.0
        default_us = round(1e6 / rate)
        # AVI stores the order of decoding only; what libav calls pts there is out of order.
        trust_pts = self._container.format.name != "avi"
        last_us = None
        for picture in self._pictures():
            stamp = picture.pts if trust_pts and picture.pts is not None else picture.dts
            if stamp is not None:
                time_us = _rescale_us(stamp, self._stream.time_base) - self._start_us
            else:
                time_us = 0 if last_us is None else last_us + default_us
            if last_us is not None and time_us <= last_us:
                continue  # a broken clock: no player would show this frame either
            last_us = time_us
            duration_us = _rescale_us(picture.duration, self._stream.time_base)
            yield Frame(time_us, duration_us or default_us, picture)

    def _pictures(self) -> Iterator[av.VideoFrame]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except (FFmpegError, OSError) as error:
                self.truncated, self._error = True, str(error)
                packet = None
            try:
                # None at the end: the decoder gives out what it still holds.
                pictures = self._stream.codec_context.decode(packet)
            except EndOfStream:
                return  # flushed already, by demux's own last packet
            except FFmpegError as error:
                self.num_errors, self._error = self.num_errors + 1, str(error)
                pictures = []
            yield from pictures
            if packet is None:
                return


def read_frames(path: str, times_us: Sequence[int]) -> list[Frame]:
    """Returns the frames shown at the given times by seeking; for the few that a pass missed.

    Args:
        path: A local file.
        times_us: Ascending times. A time before the first frame gets the first frame.

    Raises:
        MediaError: See `probe`.
    """
    frames: list[Frame] = []
    with VideoReader(path) as reader:
        for time_us in times_us:
            reader.seek(time_us)
            shown = None
            for frame in reader:
                if shown is not None and frame.time_us > time_us:
                    break
                shown = frame
            if shown is not None:
                frames.append(shown)
    return frames


def open_container(source: str | bytes, options: Mapping[str, str] | None = None) -> Any:
    """Opens a container with the whitelists in force."""
    if isinstance(source, str):
        try:
            size = os.stat(source).st_size
        except OSError as error:
            raise MediaError("unreadable_file", error.strerror or str(error)) from error
    else:
        size = len(source)
    if size == 0:
        raise MediaError("empty_file", "0 bytes")
    # The prefix keeps a file called "concat:a|b" a file.
    file = f"file:{source}" if isinstance(source, str) else io.BytesIO(source)
    try:
        return av.open(file, options=OPEN_OPTIONS | dict(options or {}), metadata_errors="ignore")
    except PermissionError as error:
        raise MediaError("unreadable_file", str(error)) from error
    except (FFmpegError, OSError) as error:
        raise MediaError("not_a_video", error.strerror or str(error)) from error


def video_stream(container: Any) -> Any:
    """Returns the first video stream that is no cover picture."""
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & covers]
    if not container.streams:
        raise MediaError("not_a_video", "holds no stream; its index may be cut off")
    if not streams:
        held = ", ".join(s.type for s in container.streams)
        raise MediaError("no_video_stream", f"holds {held}")
    if streams[0].codec_context is None:
        raise MediaError("undecodable", "a codec that libav does not know")
    return streams[0]


def _describe(container: Any, stream: Any, first: av.VideoFrame, file_bytes: int) -> MediaInfo:
    """Returns a container's facts; only a decoded frame tells the rotation."""
    audio = next((s for s in container.streams.audio if s.codec_context is not None), None)
    rotation = first.rotation % 360
    aspect = stream.sample_aspect_ratio
    width, height = _displayed(first.width, first.height, aspect, rotation)
    duration_us = container.duration or 0
    if not duration_us and stream.duration:
        duration_us = _rescale_us(stream.duration, stream.time_base)
    return MediaInfo(
        duration_ms=floor_ms(duration_us),
        fps=float(stream.average_rate or stream.guessed_rate or 0),
        width=width,
        height=height,
        video_codec=stream.codec_context.codec.canonical_name,
        audio_codec=audio.codec_context.codec.canonical_name if audio else None,
        video_stream=stream.index,
        audio_stream=audio.index if audio else None,
        rotation=rotation,
        file_bytes=file_bytes,
        has_times=container.format.name != "avi" or not stream.codec_context.has_b_frames,
        container_start_us=container.start_time or 0,
    )


def _displayed(width: int, height: int, aspect: Any, rotation: int) -> tuple[int, int]:
    """Returns the size with square pixels, the right way up."""
    # Scalers leave aspects like 640/639 behind; players show those pixels as they are.
    if aspect and aspect > 0 and abs(float(aspect) - 1) > 0.01:
        width = round(width * float(aspect))
    return (height, width) if rotation in (90, 270) else (width, height)


def _rescale_us(value: int, time_base: Any) -> int:
    """Returns a timestamp in microseconds, rounded half up as libav rounds."""
    numerator, denominator = value * time_base.numerator * 1_000_000, time_base.denominator
    return (2 * numerator + denominator) // (2 * denominator)


# -------------------------------------------------------------------------------- small pictures


def small_bgr(picture: av.VideoFrame, rotation: int = 0, grid_px: int = GRID_PX) -> np.ndarray:
    """Returns a picture at most ``grid_px`` wide and high, for detectors, without swscale.

    Reads every k-th sample of the decoded planes (the stride at which chroma and luma coincide),
    which costs a tenth of a scaled frame. Colours are full range BT.601, as OpenCV's own readers
    give them.

    Args:
        picture: A decoded frame.
        rotation: `MediaInfo.rotation`.
        grid_px: Upper bound of the longer side.

    Returns:
        uint8 [height, width, 3], BGR, the right way up.
    """
    planes_YUV = _strided_planes(picture, grid_px)
    if planes_YUV is None:
        scale = min(1.0, grid_px / max(picture.width, picture.height))
        width, height = round(picture.width * scale), round(picture.height * scale)
        bgr = picture.reformat(max(width, 1), max(height, 1), "bgr24").to_ndarray()
    else:
        y, u, v = planes_YUV
        full_range = picture.color_range == 2 or picture.format.name.startswith("yuvj")
        table = _FULL_RANGE if full_range else _VIDEO_RANGE
        bgr = cv2.cvtColor(cv2.LUT(cv2.merge((y, v, u)), table), cv2.COLOR_YCrCb2BGR)
    return np.rot90(bgr, rotation // 90).copy() if rotation else bgr


def _range_table(low: int, luma: int, chroma: int) -> np.ndarray:
    """Returns the table [1, 256, 3] that stretches Y, Cr, Cb to 0..255."""
    codes = np.arange(256)
    y = (codes - low) * 255 / luma
    c = (codes - 128) * 255 / chroma + 128
    return np.clip(np.rint(np.stack((y, c, c), -1)), 0, 255).astype(np.uint8)[None]


_FULL_RANGE = _range_table(0, 255, 255)
_VIDEO_RANGE = _range_table(16, 219, 224)  # ITU-R BT.601: luma 16..235, chroma 16..240


def _strided_planes(picture: av.VideoFrame, grid_px: int) -> list[np.ndarray] | None:
    """Returns three uint8 planes of one size, or None for a layout that has to be converted."""
    form = picture.format
    if not form.is_planar or form.is_rgb or len(form.components) < 3 or form.is_big_endian:
        return None
    bits = form.components[0].bits
    planes = picture.planes[:3]
    if bits > 16 or any(plane.line_size <= 0 for plane in planes):
        return None
    chroma = planes[1]
    step = -(-max(chroma.width, chroma.height) // grid_px)
    samples = []
    for index, plane in enumerate(planes):
        rows, columns = step, step
        if index == 0:
            rows *= round(picture.height / chroma.height)
            columns *= round(picture.width / chroma.width)
        dtype = np.uint8 if bits == 8 else np.dtype("<u2")
        values = np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)
        values = values[::rows, : plane.width : columns]
        samples.append(values if bits == 8 else (values >> (bits - 8)).astype(np.uint8))
    height = min(plane.shape[0] for plane in samples)
    width = min(plane.shape[1] for plane in samples)
    return [plane[:height, :width] for plane in samples]


# ---------------------------------------------------------------------------------------- pictures


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Returns width and height with the shorter one at most ``short_side``; never larger."""
    scale = min(1.0, short_side / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def scale_picture(picture: av.VideoFrame, info: MediaInfo, short_side: int) -> av.VideoFrame:
    """Returns a frame at the displayed size, shrunk, but not yet turned upright."""
    width, height = scaled_size(info.width, info.height, short_side)
    if info.rotation in (90, 270):
        width, height = height, width
    return picture.reformat(width, height, interpolation="AREA")


def upright_rgb(picture: av.VideoFrame, info: MediaInfo, short_side: int) -> np.ndarray:
    """Returns what a viewer sees, uint8 RGB [height, width, 3], shrunk to ``short_side``."""
    rgb = scale_picture(picture, info, short_side).to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(rgb, info.rotation // 90))


def same_picture(one: av.VideoFrame, other: av.VideoFrame) -> bool:
    """Returns whether two decoded frames are the same, bit by bit."""
    if (one.format.name, one.width, one.height) != (other.format.name, other.width, other.height):
        return False
    return bool(np.array_equal(one.to_ndarray(), other.to_ndarray()))


def jpeg_encode(rgb: np.ndarray, quality: int = 90) -> bytes:
    """Returns a JPEG of a uint8 RGB picture [height, width, 3]."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"a picture of shape {rgb.shape} cannot be a JPEG")
    return data.tobytes()


def jpeg_decode(data: bytes) -> np.ndarray:
    """Returns a JPEG's pixels, uint8 RGB [height, width, 3].

    Raises:
        ValueError: If the bytes are no picture.
    """
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ValueError(f"{len(data)} bytes that are no picture")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


# ------------------------------------------------------------------------------------------- sound


def read_audio(source: str | bytes, rate: int = 16_000) -> np.ndarray:
    """Returns the first sound track as mono float32 in [-1, 1].

    Sample 0 is the container's start, so that sound and picture share one clock: a track that
    starts late, or has a hole, is padded with silence.

    Args:
        source: A local file, or the bytes of one.
        rate: Samples per second.

    Returns:
        Shape [samples]; empty where there is no sound track.

    Raises:
        MediaError: ``empty_file``, ``not_a_video`` or ``unreadable_file``.
    """
    with open_container(source) as container:
        stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
        if stream is None:
            return np.zeros(0, np.float32)
        stream.codec_context.thread_count = 1
        start_us = container.start_time or 0
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        pieces: list[np.ndarray] = []
        length = 0
        for sound in _sounds(container, stream):
            if sound.pts is not None:
                at = _rescale_us(sound.pts, sound.time_base) - start_us
                hole = at * rate // 1_000_000 - length
                # Resamplers hold back a few ms; only real holes are filled.
                if hole > (rate // 20 if pieces else 0):
                    pieces.append(np.zeros(hole, np.float32))
                    length += hole
            sound.pts = None
            for piece in resampler.resample(sound):
                pieces.append(piece.to_ndarray().reshape(-1))
                length += len(pieces[-1])
        if pieces:
            pieces += [piece.to_ndarray().reshape(-1) for piece in resampler.resample(None)]
        # libav decodes the last packet whole, also where an MP4's edit list ends inside it.
        length = None
        if "mp4" in container.format.name and stream.duration:
            end = _rescale_us((stream.start_time or 0) + stream.duration, stream.time_base)
            length = (end - start_us) * rate // 1_000_000
    if not pieces:
        return np.zeros(0, np.float32)
    return np.clip(np.concatenate(pieces)[:length], -1.0, 1.0)


def _sounds(container: Any, stream: Any) -> Iterator[av.AudioFrame]:
    """Yields decoded sound; what cannot be decoded is left out."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            yield from packet.decode()
        except InvalidDataError:
            continue
        except (FFmpegError, OSError):
            return
