# SPDX-License-Identifier: Apache-2.0
"""A clip's MP4 bytes -> a few of its frames, by presentation time."""

import io
from collections.abc import Iterable

import av
from av.error import FFmpegError
from PIL import Image


def decode_frames(mp4: bytes, shares: list[float]) -> list[Image.Image]:
    """Returns the frames shown at these points of the clip, RGB.

    PyAV honours the edit list behind which a clip cut by stream copy hides its pre-roll.

    Args:
        mp4: The file.
        shares: Rising points of the clip's duration, in [0, 1).

    Raises:
        ValueError: If there is no frame to decode.
    """
    try:
        with av.open(io.BytesIO(mp4), mode="r") as container:
            stream = container.streams.video[0]
            if stream.duration and stream.time_base:
                duration_s = float(stream.duration * stream.time_base)
            else:
                duration_s = (container.duration or 0) / av.time_base
            frames = (frame for frame in container.decode(stream) if frame.time is not None)
            return _pick(frames, [share * duration_s for share in shares])
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"undecodable video: {error}") from error


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
                images.append(shown.to_image())
        shown = frame
        if len(images) == len(wanted_s):
            break
    if shown is None:
        raise ValueError("no frame")
    last = [shown.to_image()] if len(images) < len(wanted_s) else []
    return images + last * (len(wanted_s) - len(images))
