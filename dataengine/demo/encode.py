# SPDX-License-Identifier: Apache-2.0
"""Writes frames and samples to an H.264 + AAC MP4 with the timing a plan asks for."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from dataengine.demo.backgrounds import Picture
from dataengine.demo.scene import Plan
from dataengine.demo.sound import Wave

LATE_START_TICKS = 36
"""How long after time zero of the container a "late_start" video and its audio begin."""
LATE_VIDEO_TICKS = 12
"""How long after the audio the picture of a "late_video" begins. Whole milliseconds at any rate."""
_AUDIO_BIT_RATE = 64_000
_PRIMING_SAMPLES = 1024


def lead_ticks(plan: Plan) -> int:
    """Returns the distance from the container's start to the first frame."""
    return LATE_VIDEO_TICKS if plan.trait == "late_video" else 0


def write_video(path: Path, plan: Plan, frames: Iterable[Picture], audio: Wave | None) -> None:
    """Writes a video; equal input gives equal bytes.

    Args:
        path: File to write, whatever its suffix.
        plan: Size, rate, ticks and trait.
        frames: One RGB picture per entry of ``plan.ticks``.
        audio: Mono samples from the container's start, or None for no audio stream.
    """
    skipped = LATE_START_TICKS if plan.trait == "late_start" else 0
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=plan.rate, options=_x264_options(plan))
        video.width, video.height, video.pix_fmt = plan.width, plan.height, "yuv420p"
        video.codec_context.time_base = Fraction(1, plan.rate)
        video.codec_context.thread_count = 1  # the bytes must not depend on the machine's cores
        packets: list[tuple[float, av.Packet]] = []
        if audio is not None:
            sound = container.add_stream("aac", rate=plan.sample_rate, layout="mono")
            sound.bit_rate = _AUDIO_BIT_RATE
            packets = _audio_packets(sound, audio, plan.sample_rate, skipped, plan.rate)
        waiting = iter(packets)
        ahead = next(waiting, None)
        for tick, picture in zip(plan.ticks, frames, strict=True):
            # Sound goes in with the picture it belongs to, so the file can be streamed.
            now = (tick + skipped + lead_ticks(plan)) / plan.rate
            while ahead is not None and ahead[0] <= now:
                container.mux(ahead[1])
                ahead = next(waiting, None)
            # OpenCV converts four times faster than swscale does here.
            planes = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2YUV_I420), np.uint8)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = tick + skipped + lead_ticks(plan)
            frame.time_base = Fraction(1, plan.rate)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        while ahead is not None:
            container.mux(ahead[1])
            ahead = next(waiting, None)


def _x264_options(plan: Plan) -> dict[str, str]:
    options = {"crf": "23", "g": str(plan.keyframe_ticks), "preset": "ultrafast", "bf": "0"}
    if plan.trait == "b_frames":
        # Without mbtree: its sums depend on where in memory a picture lies, and so would the bytes.
        options |= {"preset": "veryfast", "bf": "2", "mbtree": "0"}
    return options


def _audio_packets(
    stream: av.AudioStream, audio: Wave, sample_rate: int, skipped: int, rate: int
) -> list[tuple[float, av.Packet]]:
    """Returns (seconds, packet) pairs of all the audio, in order."""
    packets: list[av.Packet] = []
    offset = skipped * sample_rate // rate
    # The encoder begins with priming samples, which MP4 hides only before time zero. Later they
    # would stand before the first sound and move the container's start: they take its place.
    begin = _PRIMING_SAMPLES if skipped else 0
    for start in range(begin, len(audio), sample_rate):
        samples = np.ascontiguousarray(audio[None, start : start + sample_rate])
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = sample_rate
        frame.pts = offset + start
        frame.time_base = Fraction(1, sample_rate)
        packets += stream.encode(frame)
    packets += stream.encode()
    return [((packet.pts or 0) / sample_rate, packet) for packet in packets]
