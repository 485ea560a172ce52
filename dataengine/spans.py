# SPDX-License-Identifier: Apache-2.0
"""Sampling frames of spans that are known beforehand; they may overlap."""

from collections.abc import Callable, Sequence
from typing import Any

from dataengine.sampling import even_times


class SpanSampler:
    """Takes the frame nearest to each wanted time as the frames go by; holds one frame at most.

    Args:
        spans_us: Half-open spans, in any order.
        num_frames: Frames wanted of each.
        encode: Makes a JPEG of a picture.
    """

    def __init__(
        self,
        spans_us: Sequence[tuple[int, int]],
        num_frames: int,
        encode: Callable[[Any], bytes],
    ) -> None:
        self._encode = encode
        self._wanted = sorted(
            (time_us, index)
            for index, (start_us, end_us) in enumerate(spans_us)
            for time_us in even_times(start_us, end_us, num_frames)
        )
        self._next = 0
        self._taken: list[dict[int, bytes]] = [{} for _ in spans_us]
        self._last: tuple[int, Any] | None = None
        self._jpeg: tuple[int, bytes] | None = None

    def push(self, time_us: int, picture: Any) -> None:
        """Takes the next frame; times ascend."""
        while self._next < len(self._wanted) and self._wanted[self._next][0] <= time_us:
            wanted_us, index = self._wanted[self._next]
            before = self._last
            if before is not None and wanted_us - before[0] <= time_us - wanted_us:
                self._take(index, *before)
            else:
                self._take(index, time_us, picture)
            self._next += 1
        self._last = time_us, picture

    def finish(self) -> list[list[tuple[int, bytes]]]:
        """Returns (time, JPEG) of each span's frames, ascending and distinct, once all have gone by."""
        for _, index in self._wanted[self._next :]:
            if self._last is not None:
                self._take(index, *self._last)
        self._next = len(self._wanted)
        return [sorted(taken.items()) for taken in self._taken]

    def _take(self, index: int, time_us: int, picture: Any) -> None:
        if self._jpeg is None or self._jpeg[0] != time_us:
            self._jpeg = time_us, self._encode(picture)
        self._taken[index][time_us] = self._jpeg[1]
