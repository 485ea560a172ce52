# SPDX-License-Identifier: Apache-2.0
"""A clip's MP4 bytes -> a few of its frames, by presentation time."""

import functools
import importlib.util
import io
from collections.abc import Iterable
from typing import Any, Literal

import av
from av.error import FFmpegError
from PIL import Image

from dataengine.errors import DependencyError


def decode_frames(
    mp4: bytes, shares: list[float], decoder: Literal["pyav", "torchcodec"] = "pyav"
) -> list[Image.Image]:
    """Returns the frames shown at these points of the clip, RGB, upright.

    Both decoders honour the edit list behind which a clip cut by stream copy hides its pre-roll, and show
    the same frames; their conversions to RGB may differ by a few of 255.

    Args:
        mp4: The file.
        shares: Rising points of the clip's duration, in [0, 1).
        decoder: torchcodec is faster where key frames are close, and is installed apart.

    Raises:
        ValueError: If there is no frame to decode.
        DependencyError: If torchcodec is asked for and not there.
    """
    return _by_torchcodec(mp4, shares) if decoder == "torchcodec" else _by_pyav(mp4, shares)


def _by_pyav(mp4: bytes, shares: list[float]) -> list[Image.Image]:
    try:
        with av.open(io.BytesIO(mp4), mode="r") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise ValueError("undecodable video: no pictures")
            # Readers run beside each other: more threads would only wait for each other.
            if stream.codec_context is None:
                raise ValueError("undecodable video: its codec is unknown")
            stream.codec_context.thread_count = 1
            if stream.duration and stream.time_base:
                duration_s = float(stream.duration * stream.time_base)
            else:
                duration_s = (container.duration or 0) / av.time_base
            frames = (frame for frame in container.decode(stream) if frame.time is not None)
            return _pick(frames, [share * duration_s for share in shares])
    except FFmpegError as error:
        # Its words alone: the whole has libav's number and the name of a file, which there is none of.
        raise ValueError(f"undecodable video: {error.strerror}") from error


def _by_torchcodec(mp4: bytes, shares: list[float]) -> list[Image.Image]:
    # Exact: the other mode trusts a constant rate and counts the frames that an edit list hides.
    try:
        decoder = _torchcodec()(
            mp4, seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=1
        )
        facts = decoder.metadata
        start_s, end_s = facts.begin_stream_seconds, facts.end_stream_seconds
        duration_s = facts.duration_seconds_from_header or end_s - start_s
        wanted_s = [start_s + share * duration_s for share in shares]
        frames = list(decoder.get_frames_played_at([at for at in wanted_s if at < end_s]).data)
        # The last frame may have no duration and then ends where it begins.
        frames += [decoder[-1]] * (len(shares) - len(frames))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"undecodable video: {str(error).splitlines()[0]}") from error
    return [Image.fromarray(frame.numpy()) for frame in frames]


def check_decoder(decoder: Literal["pyav", "torchcodec"]) -> None:
    """Says at once, and without loading it, that a decoder is not installed.

    Raises:
        DependencyError: If torchcodec is asked for and not there.
    """
    if decoder == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
        raise _not_installed()


def _not_installed() -> DependencyError:
    return DependencyError(
        "data.decoder is torchcodec, which is not installed",
        "pip install torchcodec, or --set data.decoder=pyav",
    )


@functools.cache
def _torchcodec() -> Any:
    """Returns torchcodec's decoder class."""
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _not_installed() from error
    except (RuntimeError, OSError) as error:  # it is there, but libav or CUDA's libraries are not
        raise DependencyError(
            f"torchcodec cannot be loaded: {str(error).splitlines()[0]}",
            "install FFmpeg 4 to 9 with its shared libraries and the torchcodec built for this "
            "torch, or --set data.decoder=pyav",
        ) from error
    return VideoDecoder


def _pick(frames: Iterable[av.VideoFrame], wanted_s: list[float]) -> list[Image.Image]:
    """Returns for each time after the first frame the last frame at or before it.

    Only one frame is held at a time: a clip's decoded frames can be gigabytes.
    """
    images: list[Image.Image] = []
    start_s, shown = 0.0, None
    for frame in frames:
        time_s = frame.time or 0.0
        if shown is None:
            start_s = time_s
        else:
            while len(images) < len(wanted_s) and start_s + wanted_s[len(images)] < time_s:
                images.append(_upright(shown))
        shown = frame
        if len(images) == len(wanted_s):
            break
    if shown is None:
        raise ValueError("no frame")
    last = [_upright(shown)] if len(images) < len(wanted_s) else []
    return images + last * (len(wanted_s) - len(images))


_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Returns the frame as a player shows it: telephones store theirs lying."""
    image = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)
