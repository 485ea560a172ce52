# SPDX-License-Identifier: Apache-2.0
"""Renders tiny videos whose every frame is known: its number stands in it as a row of bits.

A frame is one colour per shot, a grey block that goes to and fro at 2 px a frame, and 12 squares along the top
that spell the frame's number in black and white. `frame_number` reads it back, after any codec.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import OutputContainer
from av.stream import Disposition

COLOURS = [(200, 40, 40), (40, 160, 60), (50, 60, 200), (220, 200, 60), (150, 60, 170)]
WIDTH, HEIGHT, BITS = 192, 128, 12
BIT_PX = WIDTH // BITS
AUDIO_RATE = 48_000
CLICK_S = 0.02
"""Length of the tone bursts in the sound track."""

GOP12 = {"g": "12", "keyint_min": "12", "sc_threshold": "0", "bf": "3", "crf": "18"}
"""Fixed groups of 12 pictures with B-frames: most cuts fall between key frames."""
OPEN_GOP = {
    "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0",
    "crf": "18",
}
INTRA_REFRESH = {"x264-params": "intra-refresh=1:keyint=12:scenecut=0:bframes=0", "crf": "18"}


def draw(number: int, colour: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Returns frame ``number``, uint8 RGB."""
    picture = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    picture[:] = colour
    left = abs((number * 2) % (2 * (WIDTH - 40)) - (WIDTH - 40))
    picture[70:110, left : left + 40] = 128
    for bit in range(BITS):
        value = 255 if number >> bit & 1 else 0
        picture[:BIT_PX, bit * BIT_PX : (bit + 1) * BIT_PX] = value
    if size != (WIDTH, HEIGHT):
        rows = np.arange(size[1]) * HEIGHT // size[1]
        columns = np.arange(size[0]) * WIDTH // size[0]
        picture = picture[rows][:, columns]
    return np.ascontiguousarray(picture)


def frame_number(rgb: np.ndarray) -> int:
    """Returns the number drawn in a frame of any size."""
    height, width = rgb.shape[:2]
    row = height * BIT_PX // HEIGHT // 2
    number = 0
    for bit in range(BITS):
        column = round((bit + 0.5) * width / BITS)
        number |= int(rgb[row, column].mean() > 128) << bit
    return number


def make_video(
    path: Path,
    shot_frames: Sequence[int] = (50, 40, 60),
    fps: float = 25,
    times_s: Sequence[float] | None = None,
    start_s: float = 0.0,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    audio: str | None = None,
    audio_start_s: float = 0.0,
    audio_end_s: float | None = None,
    rotation: int = 0,
    second_video: bool = False,
    cover: bool = False,
    metadata: dict[str, str] | None = None,
    index_first: bool = False,
    transfer: int = 0,
    wide_gamut: bool = False,
    aspect: Fraction | None = None,
) -> Path:
    """Writes a video; the suffix decides the container.

    Args:
        path: Where to.
        shot_frames: Frames of each shot; shot ``i`` has colour ``i``.
        fps: Rate, where ``times_s`` gives no times of its own.
        times_s: Time of every frame, for a variable rate.
        start_s: When the picture begins.
        codec: Video encoder.
        options: Of the encoder; groups of 12 pictures by default.
        pix_fmt: Pixel format.
        size: Width and height.
        audio: Audio encoder. The sound is 1 kHz for 20 ms at the start of every shot, else silence.
        audio_start_s: When the sound track begins.
        audio_end_s: When it ends; with the picture by default.
        rotation: Display rotation, counter-clockwise.
        second_video: Adds a second, larger video stream.
        cover: Adds a cover picture, before the video.
        metadata: Container tags.
        index_first: Writes an MP4's index before its media, so that a broken off file opens.
        transfer: libav's number of the transfer curve that the codes are said to have: 16 is PQ, 18 HLG.
        wide_gamut: Says that the colours are BT.2020's. (What is drawn stays the same.)
        aspect: Shape of a pixel.
    """
    numbers = range(sum(shot_frames))
    times = [start_s + (times_s[n] if times_s else n / fps) for n in numbers]
    shots = [shot for shot, count in enumerate(shot_frames) for _ in range(count)]
    time_base = Fraction(1, 1000) if path.suffix in {".mkv", ".webm"} or times_s else None
    options_container = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", options=options_container) as container:
        container.metadata.update(metadata or {})
        art = _add_cover(container) if cover else None
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.options = (
            GOP12 if options is None and codec == "libx264" else options or {}
        )
        stream.codec_context.time_base = time_base or Fraction(1, 90_000)
        if path.suffix == ".avi":
            stream.codec_context.time_base = 1 / Fraction(fps)
        stream.codec_context.thread_count = 1
        context = stream.codec_context
        if transfer:
            context.color_trc = transfer
        if wide_gamut:
            context.color_primaries = context.colorspace = 9
        if aspect:
            context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        other: Any = None
        if second_video:
            other = container.add_stream("libx264", rate=25)
            other.width, other.height, other.pix_fmt = size[0] * 2, size[1] * 2, "yuv420p"
        sound: Any = None
        if audio:
            sound = container.add_stream(
                audio, rate=AUDIO_RATE, layout="stereo" if audio == "vorbis" else "mono"
            )
            sound.codec_context.options = {"strict": "experimental"}
        if art is not None:
            container.mux(art)
        for number, (time_s, shot) in enumerate(zip(times, shots, strict=True)):
            picture = draw(number, COLOURS[shot % len(COLOURS)], size)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.time_base = stream.codec_context.time_base
            if transfer:
                frame.color_trc = transfer
            if wide_gamut:
                frame.color_primaries = frame.colorspace = 9
            frame.pts = round(time_s / frame.time_base)
            container.mux(stream.encode(frame))
            if other is not None:
                plain = np.full((size[1] * 2, size[0] * 2, 3), 90, np.uint8)
                container.mux(other.encode(av.VideoFrame.from_ndarray(plain, format="rgb24")))
        container.mux(stream.encode(None))
        if other is not None:
            container.mux(other.encode(None))
        if sound is not None:
            starts = [t for t, a, b in zip(times, shots, [-1, *shots], strict=False) if a != b]
            end_s = audio_end_s or times[-1] + 1 / fps
            _encode_sound(container, sound, starts, audio_start_s, end_s)
    return path


def make_audio(path: Path, seconds: float = 1.0, cover: bool = False) -> Path:
    """Writes a file that holds sound only, or sound and a cover picture."""
    with av.open(str(path), "w") as container:
        art = _add_cover(container) if cover else None
        sound: Any = container.add_stream("aac", rate=AUDIO_RATE, layout="mono")
        if art is not None:
            container.mux(art)
        _encode_sound(container, sound, [0.0], 0.0, seconds)
    return path


def truncate(source: Path, target: Path, fraction: float) -> Path:
    """Writes the first part of a file."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


def _add_cover(container: OutputContainer) -> av.Packet:
    """Adds a JPEG as an attached picture and returns its packet."""
    stream: Any = container.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
    stream.disposition = Disposition.attached_pic
    picture = np.full((64, 64, 3), 77, np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p")
    frame.pts = 0
    (packet,) = [*stream.encode(frame), *stream.encode(None)]
    return packet


def _encode_sound(
    container: OutputContainer,
    stream: Any,
    clicks_s: Sequence[float],
    start_s: float,
    end_s: float,
) -> None:
    time_s = start_s + np.arange(round((end_s - start_s) * AUDIO_RATE)) / AUDIO_RATE
    wave = np.zeros(len(time_s), np.float32)
    for click_s in clicks_s:
        on = (time_s >= click_s) & (time_s < click_s + CLICK_S)
        wave[on] = 0.8 * np.sin(2 * np.pi * 1000 * time_s[on])
    context = stream.codec_context
    resampler = av.AudioResampler(context.format.name, context.layout.name, AUDIO_RATE)
    for at in range(0, len(wave), 1024):
        piece = av.AudioFrame.from_ndarray(wave[None, at : at + 1024], format="flt", layout="mono")
        piece.sample_rate, piece.pts = AUDIO_RATE, round(start_s * AUDIO_RATE) + at
        piece.time_base = Fraction(1, AUDIO_RATE)
        for ready in resampler.resample(piece):
            container.mux(stream.encode(ready))
    container.mux(stream.encode(None))


def decode_all(source: str | bytes) -> list[tuple[Fraction, np.ndarray]]:
    """Returns (time in seconds, raw picture) of every frame that PyAV shows by default."""
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    container: Any
    with av.open(file) as container:
        stream: Any = container.streams.video[0]
        zero = Fraction(container.start_time or 0, 1_000_000)
        frames: Any = container.decode(stream)
        base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
        return [(frame.pts * base - zero, frame.to_ndarray()) for frame in frames]


def join_streams(first: Path, second: Path, target: Path) -> Path:
    """Writes two MPEG transport streams behind each other; the second must start later."""
    target.write_bytes(first.read_bytes() + second.read_bytes())
    return target


def break_sound(path: Path) -> Path:
    """Destroys the set-up of a Matroska file's Vorbis track: its sound cannot be decoded any more."""
    data = bytearray(path.read_bytes())
    start = data.index(b"\x01vorbis")
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)
    return path
