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
from functools import lru_cache
from typing import Any, Literal

import av
import cv2
import numpy as np
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.error import EOFError as EndOfStream
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition

from dataengine import hdr, mp4
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

MAX_PIXELS = 8192 * 4320
"""Larger pictures are not decoded: their frames take 50 MB each, and a header may claim any size."""

Hardware = Literal["auto", "cuda", "vaapi", "qsv", "videotoolbox", "d3d11va", "vulkan"]
"""What may decode instead of the processor, by libav's names; ``auto`` is the first that works."""
_HARDWARE = ("cuda", "videotoolbox", "vaapi", "qsv", "d3d11va")


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
    transfer: hdr.Transfer = ""
    """Transfer curve of an HDR picture (ITU-R BT.2100); empty for ordinary ones."""
    wide_gamut: bool = False
    """Whether the colours are BT.2020's instead of BT.709's."""


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
    and a file that breaks off ends early (``truncated``): what decodes is kept. Pictures whose size
    changes in mid-stream are scaled to the first one's, as players do. ``info`` is known from the
    start, since opening decodes the first frame. ``hwaccel`` says which device decodes, if one does.

    Args:
        source: A local file, or the bytes of one.
        threads: Decoder threads. One is the cheapest in CPU seconds (measured on 48 videos: 13.7 s,
            against 15.8 s with two frame threads and 17.7 s with libav's automatic choice); many
            actors make better use of the cores than threads do.
        hwaccel: Decodes on a device where that works, and in software where there is no such device,
            driver or codec. None, the default, is software: bits and costs are then the same
            everywhere. Pictures come back to the processor's memory.
        max_pixels: Videos with larger pictures are refused before one is decoded, and pictures that
            become larger in mid-stream are left out.

    Raises:
        MediaError: See `probe`; also ``too_large``.
    """

    def __init__(
        self,
        source: str | bytes,
        threads: int = 1,
        hwaccel: Hardware | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        size = os.stat(source).st_size if isinstance(source, str) and os.path.exists(source) else 0
        self._file_bytes = size if isinstance(source, str) else len(source)
        self._max_pixels = max_pixels
        devices = _devices(hwaccel)
        for device in devices:
            try:
                self._open(source, threads, device)
                return
            except MediaError as error:
                if error.reason == "too_large":
                    raise
            except (FFmpegError, OSError, RuntimeError, ValueError, NotImplementedError):
                pass  # no driver, or a codec that the device does not know
        self._open(source, threads, None)

    def _open(self, source: str | bytes, threads: int, device: str | None) -> None:
        """Opens the file and decodes the first frame."""
        self.num_errors = 0
        self.truncated = False
        self.hwaccel = device
        self._size: tuple[int, int] | None = None
        self._error = ""
        self._container = open_container(source, device=device)
        try:
            self._stream = video_stream(self._container)
            context = self._stream.codec_context
            check_pixels(context.width, context.height, self._max_pixels)
            context.thread_count = threads
            context.thread_type = "FRAME" if threads > 1 else "NONE"
            context.options = {"max_pixels": str(self._max_pixels)}
            self._start_us = self._container.start_time or 0
            self._frames = self._decode()
            self._first = next(self._frames, None)
            if self._first is None:
                raise MediaError("undecodable", self._error or "no frame decodes")
            self._size = self._first.picture.width, self._first.picture.height
            self.info = _describe(
                self._container, self._stream, self._first.picture, self._file_bytes
            )
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
        """Moves to the last key frame at or before a time, for the next iteration.

        Raises:
            MediaError: ``undecodable`` if the container cannot be sought.
        """
        target = max(time_us, 0) + self._start_us
        try:
            self._container.seek(target, backward=True)
        except (FFmpegError, OSError) as error:
            raise MediaError("undecodable", f"cannot be sought: {error}") from error
        self._first, self._frames = None, self._decode()

    def _decode(self) -> Iterator[Frame]:
        rate = float(self._stream.average_rate or 0) or 25.0
        default_us = round(1e6 / rate)
        base = self._stream.time_base  # PyAV makes a new Fraction at every access
        # AVI stores the order of decoding only; what libav calls pts there is out of order.
        trust_pts = self._container.format.name != "avi"
        last_us = None
        size: tuple[int, int] | None = None
        for picture in self._pictures():
            stamp = picture.pts if trust_pts and picture.pts is not None else picture.dts
            if stamp is not None:
                time_us = _rescale_us(stamp, base) - self._start_us
            else:
                time_us = 0 if last_us is None else last_us + default_us
            if last_us is not None and time_us <= last_us:
                continue  # a broken clock: no player would show this frame either
            last_us = time_us
            size = size or self._size or (picture.width, picture.height)
            if (picture.width, picture.height) != size:
                picture = picture.reformat(*size, interpolation="AREA", threads=1)
            duration_us = _rescale_us(picture.duration, base)
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


def check_pixels(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses a picture size.

    Raises:
        MediaError: ``too_large``.
    """
    if width * height > max_pixels:
        raise MediaError("too_large", f"{width}x{height}")


def _devices(hwaccel: Hardware | None) -> list[str]:
    """Returns the devices worth trying, in order."""
    if hwaccel is None:
        return []
    known = hwdevices_available()
    return [name for name in (_HARDWARE if hwaccel == "auto" else (hwaccel,)) if name in known]


def open_container(
    source: str | bytes, options: Mapping[str, str] | None = None, device: str | None = None
) -> Any:
    """Opens a container with the whitelists in force.

    Args:
        source: A local file, or the bytes of one.
        options: More options for libav's demuxer.
        device: Kind of hardware that is to decode; it must be there.

    Raises:
        MediaError: ``empty_file``, ``not_a_video``, ``undecodable`` or ``unreadable_file``.
    """
    if isinstance(source, str):
        try:
            size = os.stat(source).st_size
        except OSError as error:
            raise MediaError("unreadable_file", error.strerror or str(error)) from error
    else:
        size = len(source)
    if size == 0:
        raise MediaError("empty_file", "0 bytes")
    if isinstance(source, str):
        try:
            mp4.check_tables(source)
        except ValueError as error:
            raise MediaError("undecodable", str(error)) from error
        except OSError as error:
            raise MediaError("unreadable_file", error.strerror or str(error)) from error
    # The prefix keeps a file called "concat:a|b" a file.
    file = f"file:{source}" if isinstance(source, str) else io.BytesIO(source)
    hardware = HWAccel(device, allow_software_fallback=False) if device else None
    try:
        return av.open(
            file,
            options=OPEN_OPTIONS | dict(options or {}),
            metadata_errors="ignore",
            hwaccel=hardware,
        )
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
    transfer: hdr.Transfer = ""
    match first.color_trc:
        case 16:  # SMPTE ST 2084
            transfer = "pq"
        case 18:  # ARIB STD-B67
            transfer = "hlg"
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
        transfer=transfer,
        wide_gamut=first.color_primaries == 9,
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
    layout = _layout(picture.format.name, picture.width, picture.height, grid_px)
    planes = _strided_planes(picture, layout) if layout else None
    if planes is None:
        scale = min(1.0, grid_px / max(picture.width, picture.height))
        width, height = round(picture.width * scale), round(picture.height * scale)
        small = picture.reformat(max(width, 1), max(height, 1), "bgr24", threads=1)
        bgr = small.to_ndarray()
    else:
        full_range = picture.color_range == 2 or picture.format.name.startswith("yuvj")
        bgr = cv2.transform(cv2.merge(planes), _FULL_RANGE if full_range else _VIDEO_RANGE)
    return np.rot90(bgr, rotation // 90).copy() if rotation else bgr


@lru_cache(maxsize=32)
def _bgr_matrix(red: float, blue: float, low: int, luma: int, chroma: int) -> np.ndarray:
    """Returns the float32 [3, 4] matrix that takes 8-bit (Y, Cb, Cr, 1) to full-range (B, G, R).

    Args:
        red: Share of red in luma.
        blue: Share of blue in luma.
        low: Code of black.
        luma: Codes from black to white.
        chroma: Codes from the least to the most of a colour difference.

    Source: ITU-R BT.601-7, 2.5.
    """
    green = 1 - red - blue
    y, c = 255 / luma, 255 / chroma
    b, r = 2 * (1 - blue) * c, 2 * (1 - red) * c
    mix = np.array([[y, b, 0], [y, -b * blue / green, -r * red / green], [y, 0, r]])
    offset = mix @ [-low, -128, -128]
    return np.concatenate([mix, offset[:, None]], 1).astype(np.float32)


_FULL_RANGE = _bgr_matrix(0.299, 0.114, 0, 255, 255)
_VIDEO_RANGE = _bgr_matrix(0.299, 0.114, 16, 219, 224)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which samples of three planes make a small picture."""

    shift: int
    """Bits to drop of each sample."""
    interleaved: bool
    """Whether the second plane holds both colour differences in turn."""
    rows: tuple[int, int]
    """Step down the luma plane, and down the others."""
    columns: tuple[int, int]
    chroma_width: int


@lru_cache(maxsize=64)
def _layout(form: str, width: int, height: int, grid_px: int) -> _Layout | None:
    """Returns how to read a pixel format by strides; None where it has to be converted."""
    fmt = av.VideoFormat(form, width, height)
    parts = fmt.components
    if not fmt.is_planar or fmt.is_rgb or len(parts) < 3 or fmt.is_big_endian:
        return None
    if form not in ("nv12", "nv21") and [part.plane for part in parts[:3]] != [0, 1, 2]:
        return None
    bits = parts[0].bits
    if bits > 16 or form == "nv21":
        return None
    chroma_width, chroma_height = parts[1].width, parts[1].height
    step = -(-max(chroma_width, chroma_height) // grid_px)
    down, across = round(height / chroma_height), round(width / chroma_width)
    rows, columns = (step * down, step), (step * across, step)
    return _Layout(bits - 8, form == "nv12", rows, columns, chroma_width)


def _strided_planes(picture: av.VideoFrame, layout: _Layout) -> list[np.ndarray] | None:
    """Returns Y, Cb and Cr as uint8 of one size; None where a plane lies upside down."""
    samples: list[np.ndarray] = []
    for index, plane in enumerate(picture.planes[:3]):
        if plane.line_size <= 0:
            return None
        values = np.frombuffer(memoryview(plane), np.uint8 if not layout.shift else "<u2")
        values = values.reshape(plane.height, -1)
        kind = min(index, 1)
        rows, columns = layout.rows[kind], layout.columns[kind]
        if kind and layout.interleaved:
            pairs = values[::rows, : 2 * layout.chroma_width]
            samples += [pairs[:, :: 2 * columns], pairs[:, 1 :: 2 * columns]]
        else:
            width = layout.chroma_width if kind else plane.width
            samples.append(values[::rows, :width:columns])
    height = min(plane.shape[0] for plane in samples)
    width = min(plane.shape[1] for plane in samples)
    samples = [plane[:height, :width] for plane in samples]
    if layout.shift:
        samples = [(plane >> layout.shift).astype(np.uint8) for plane in samples]
    return samples


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
    return picture.reformat(width, height, interpolation="AREA", threads=1)


def upright_rgb(picture: av.VideoFrame, info: MediaInfo, short_side: int) -> np.ndarray:
    """Returns what a viewer of an ordinary screen sees, shrunk to ``short_side``.

    Args:
        picture: A decoded frame, or what `scale_picture` made of one.
        info: Of the video. HDR and BT.2020 pictures are brought to BT.709: see `dataengine.hdr`.
        short_side: Pixels of the shorter side at most.

    Returns:
        uint8 RGB [height, width, 3].
    """
    width, height = scaled_size(info.width, info.height, short_side)
    if info.rotation in (90, 270):
        width, height = height, width
    form = picture.format
    shares = _LUMA_SHARES.get(picture.colorspace)
    if form.is_rgb or len(form.components) < 3 or form.name == "pal8" or shares is None:
        made = picture.reformat(width, height, "rgb24", interpolation="AREA", threads=1)
        rgb = made.to_ndarray()
    elif info.transfer or info.wide_gamut:
        made = picture.reformat(width, height, "yuv444p16le", interpolation="AREA", threads=1)
        black, luma, chroma = (0, 255, 255) if picture.color_range == 2 else (16, 219, 224)
        deep = _merged(made).astype(np.float32) / 256
        matrix = _bgr_matrix(*shares, black, luma, chroma)[::-1]
        rgb = hdr.to_bt709(cv2.transform(deep, matrix) / 255, info.transfer, info.wide_gamut)
    else:
        # Only sizes are left to libswscale: its way to RGB costs twice as much as all of this.
        made = picture.reformat(width, height, "yuvj444p", interpolation="AREA", threads=1)
        rgb = cv2.transform(_merged(made), _bgr_matrix(*shares, 0, 255, 255)[::-1])
    return np.ascontiguousarray(np.rot90(rgb, info.rotation // 90))


# Red's and blue's share of luma by libav's number of the matrix: ITU-T H.273, table 4.
_LUMA_SHARES = {
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),  # nothing is said: BT.601, like ffmpeg and OpenCV
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}


def _merged(picture: av.VideoFrame) -> np.ndarray:
    """Returns the three planes of a 4:4:4 picture as one array [height, width, 3]."""
    dtype = np.dtype("<u2") if picture.format.components[0].bits > 8 else np.dtype(np.uint8)
    return cv2.merge(
        [
            np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)[:, : plane.width]
            for plane in picture.planes
        ]
    )


def same_picture(one: av.VideoFrame, other: av.VideoFrame) -> bool:
    """Returns whether two decoded frames are the same, bit by bit."""
    if (one.format.name, one.width, one.height) != (other.format.name, other.width, other.height):
        return False
    return all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(_raw_planes(one), _raw_planes(other), strict=True)
    )


def _raw_planes(picture: av.VideoFrame) -> list[np.ndarray]:
    """Returns a planar picture's planes as bytes, without the padding at the ends of their lines."""
    form = picture.format
    planes: list[np.ndarray] = []
    for index, plane in enumerate(picture.planes):
        bytes_each = [-(-part.bits // 8) for part in form.components if part.plane == index]
        used = plane.width * sum(bytes_each)
        values = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)
        planes.append(values[:, :used])
    return planes


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
        # Two channels are averaged here: libav's own mix to mono adds them, 3 dB too loud, and what is
        # loud would be cut off.
        layout = "stereo" if stream.codec_context.channels > 2 else None
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
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
                pieces.append(piece.to_ndarray().mean(axis=0))
                length += len(pieces[-1])
        if pieces:
            pieces += [piece.to_ndarray().mean(axis=0) for piece in resampler.resample(None)]
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
