# SPDX-License-Identifier: Apache-2.0
"""Loose video files -> the frames a model sees, decoded in reader processes.

V views, T frames, H W pixels, C channels (RGB).
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from training.data.transforms import WHOLE, Crop, Frames, random_crop, square_images

logger = logging.getLogger(__name__)


class Clip(NamedTuple):
    """A video file, or a part of one."""

    name: str
    """As its annotation calls it."""
    path: Path | None
    """None where no such file was found."""
    start_s: float = 0.0
    end_s: float | None = None
    """None is the video's end."""


class Views(NamedTuple):
    """How many times a clip is looked at; features of the views are averaged."""

    segments: int = 1
    """Sets of frames, one behind the other inside each interval."""
    crops: int = 1
    """1 squeezes the whole frame into the square; 3 takes a square as high as the frame at the left, in
    the middle and at the right (for a tall frame: top, middle, bottom)."""


class ReadClips(NamedTuple):
    """Clips of a batch that could be read, and those that could not."""

    positions: torch.Tensor
    """int64 [B], places in the list of clips."""
    frames: torch.Tensor
    """uint8 [B, V, T, H, W, 3], RGB."""
    failures: list[tuple[str, str]]
    """(name, reason)."""


def middle_frames(num_available: int, num_wanted: int, segment: int, segments: int) -> list[int]:
    """Returns frame numbers: of each of equal intervals the frame in its middle.

    With fewer frames than wanted there are as many intervals as frames, and the last frame repeats.
    Of several segments each takes another frame of every interval.

    Source: ViCLIP's released ``get_frame_indices`` with ``middle``.

    Args:
        num_available: Frames at hand, at least 1.
        num_wanted: Frames to return.
        segment: Which of the segments, from 0.
        segments: How many segments there are.
    """
    edges = np.linspace(0, num_available, min(num_wanted, num_available) + 1).astype(int)
    first, last = edges[:-1], edges[1:] - 1
    chosen = (first + (last - first) * (segment + 1) // (segments + 1)).tolist()
    return chosen + chosen[-1:] * (num_wanted - len(chosen))


def decode(clip: Clip, num_frames: int, segments: int = 1) -> list[list[Image.Image]]:
    """Returns the frames of each segment of a clip, RGB, in the video's own size.

    Args:
        clip: Frames whose presentation time lies in ``[start_s, end_s)`` are meant, counted from the
            first frame of the file.
        num_frames: T.
        segments: Sets of frames.

    Raises:
        ValueError: If the file is missing or does not decode, or nothing lies in the span.
    """
    # Imported late: training on stored frames runs without PyAV.
    from av.error import FFmpegError

    if clip.path is None:
        raise ValueError("no such file")
    try:
        timeline = _read_timeline(clip.path)
        times = timeline.time_s
        start_s = float(times[0]) if len(times) else 0.0
        stop_s = np.inf if clip.end_s is None else start_s + clip.end_s
        inside = np.flatnonzero((times >= start_s + clip.start_s) & (times < stop_s))
        if not len(inside):
            raise ValueError("no frame in its span" if len(times) else "no frame")
        wanted = [
            [int(inside[i]) for i in middle_frames(len(inside), num_frames, segment, segments)]
            for segment in range(segments)
        ]
        images = _pick(clip.path, timeline, {number for numbers in wanted for number in numbers})
    except (FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"undecodable video: {error}") from error
    lost = [number for numbers in wanted for number in numbers if number not in images]
    if lost:
        raise ValueError(f"undecodable video: it ends before frame {lost[0]} of {len(times)}")
    return [[images[number] for number in numbers] for numbers in wanted]


class _Timeline(NamedTuple):
    """Frames of a file in order of presentation."""

    time_s: np.ndarray
    """float64 [frames]."""
    tick: np.ndarray | None
    """int64 [frames], the same in the stream's own unit; None where packets do not carry it (AVI)."""
    key_tick: np.ndarray
    """int64, rising: where decoding can start."""


def _read_timeline(path: Path) -> _Timeline:
    """Reads times off the packets, which decodes nothing; decodes where they do not carry them."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        base = float(stream.time_base)
        packets = [packet for packet in container.demux(stream) if packet.size]
        keys = [p.pts for p in packets if p.is_keyframe and p.pts is not None]
        # Packets that an edit list hides decode to nothing.
        ticks = [packet.pts for packet in packets if not packet.is_discard]
    key_tick = np.sort(np.array(keys, dtype=np.int64))
    if ticks and all(tick is not None for tick in ticks):
        tick = np.sort(np.array(ticks, dtype=np.int64))
        return _Timeline(tick * base, tick, key_tick)
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    # A container without times: frames are told apart by their number alone.
    if any(time is None for time in times):
        times = list(range(len(times)))
    return _Timeline(np.array(times, dtype=np.float64), None, key_tick)


def _pick(path: Path, timeline: _Timeline, numbers: set[int]) -> dict[int, Image.Image]:
    """Returns the frames of these numbers, as far as they are found."""
    import av

    if timeline.tick is not None:
        images = _pick_by_tick(path, timeline.tick, timeline.key_tick, numbers)
        if len(images) == len(numbers):
            return images
    # Some containers do not seek as they say: what is counted is always right.
    images = {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                images[number] = frame.to_image()
                if len(images) == len(numbers):
                    break
    return images


def _pick_by_tick(
    path: Path, tick: np.ndarray, key_tick: np.ndarray, numbers: set[int]
) -> dict[int, Image.Image]:
    """Returns frames by their time; what lies between is passed over from key frame to key frame."""
    import av

    images: dict[int, Image.Image] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames, shown = container.decode(stream), None
        for number in sorted(numbers):
            wanted = int(tick[number])
            key = int(key_tick[max(np.searchsorted(key_tick, wanted, side="right") - 1, 0)])
            if shown is None or key > shown:
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                shown = frame.pts
                if shown is None or shown > wanted:
                    break
                if shown == wanted:
                    images[number] = frame.to_image()
                    break
    return images


def squares(images: Sequence[Image.Image], size: int, crops: int) -> list[Frames]:
    """Returns the frames of a segment as squares, uint8 [T, H, W, 3] for each crop.

    Args:
        images: Of one size.
        size: Height and width of the square, pixels.
        crops: As in `Views`.
    """
    boxes = [WHOLE] if crops == 1 else _three_boxes(*images[0].size)
    return [square_images(list(images), size, box) for box in boxes]


def _three_boxes(width: int, height: int) -> list[Crop]:
    """Returns three squares along the longer side, in fractions of the frame."""
    share = min(width, height) / max(width, height)
    starts = [0.0, (1 - share) / 2, 1 - share]
    if width >= height:
        return [Crop(left=start, right=min(start + share, 1.0)) for start in starts]
    return [Crop(top=start, bottom=min(start + share, 1.0)) for start in starts]


class ClipFrames(Dataset[Any]):
    """Position -> the clip's frames, or why there are none; runs in the reader processes.

    Args:
        clips: What is read.
        num_frames: T.
        image_size: Height and width, pixels.
        views: How often a clip is looked at.
        augment: Seed and epoch of random crops and mirroring; None for evaluation.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        num_frames: int,
        image_size: int,
        views: Views,
        augment: tuple[int, int] | None = None,
    ) -> None:
        self.clips = clips
        self._num_frames = num_frames
        self._image_size = image_size
        self._views = views
        self._augment = augment

    def __getitem__(self, position: int) -> tuple[int, Frames | str]:
        try:
            return position, self._frames(position)
        # What Pillow and PyAV raise for broken bytes.
        except (OSError, ValueError, SyntaxError) as error:
            return position, str(error)

    def _frames(self, position: int) -> Frames:
        clip, size = self.clips[position], self._image_size
        if self._augment is None:
            segments = decode(clip, self._num_frames, self._views.segments)
            return np.stack([v for s in segments for v in squares(s, size, self._views.crops)])
        rng = np.random.default_rng([*self._augment, position])
        images = decode(clip, self._num_frames)[0]
        crop = random_crop(*images[0].size, (0.5, 1.0), True, rng)
        return square_images(images, size, crop)[None]


def read_clips(
    frames: ClipFrames, positions: Sequence[int], *, batch_size: int, num_workers: int
) -> Iterator[ReadClips]:
    """Yields clips in the order of the positions, those that cannot be read left out and named."""
    loader = DataLoader(
        frames,
        batch_size=batch_size,
        sampler=positions,  # pyright: ignore[reportArgumentType]  any iterable of positions
        num_workers=min(num_workers, max(len(positions), 1)),
        collate_fn=list,
        generator=torch.Generator(),
    )
    for items in loader:
        good = [(position, read) for position, read in items if not isinstance(read, str)]
        failures = [
            (frames.clips[position].name, read) for position, read in items if isinstance(read, str)
        ]
        for name, reason in failures:
            logger.warning("%s is left out: %s", name, reason)
        arrays = [torch.from_numpy(read) for _, read in good]
        yield ReadClips(
            torch.tensor([position for position, _ in good], dtype=torch.int64),
            torch.stack(arrays) if arrays else torch.zeros(0, dtype=torch.uint8),
            failures,
        )
