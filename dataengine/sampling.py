# SPDX-License-Identifier: Apache-2.0
"""Choosing evenly spread frames of a shot whose end is not known yet, in bounded memory."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def even_times(start_us: int, end_us: int, num: int) -> list[int]:
    """Returns the middles of ``num`` equal parts of ``[start_us, end_us)``."""
    return [start_us + (2 * i + 1) * (end_us - start_us) // (2 * num) for i in range(num)]


def pick_nearest(times_us: Sequence[int], wanted_us: Sequence[int]) -> list[int]:
    """Returns the index of a time near each wanted one: distinct and ascending.

    Args:
        times_us: Ascending candidates.
        wanted_us: Ascending targets. With fewer candidates than targets, all candidates are taken.
    """
    num = len(wanted_us)
    if len(times_us) <= num:
        return list(range(len(times_us)))
    picked: list[int] = []
    for i, wanted in enumerate(wanted_us):
        right = bisect_left(times_us, wanted)
        nearest = min(
            (j for j in (right - 1, right) if 0 <= j < len(times_us)),
            key=lambda j: (abs(times_us[j] - wanted), j),
        )
        low = picked[-1] + 1 if picked else 0
        high = len(times_us) - (num - i)  # leave one for each target still to come
        picked.append(min(max(nearest, low), high))
    return picked


@dataclass(slots=True)
class _Candidate:
    time_us: int
    picture: Any
    jpeg: bytes | None = None


class FrameSampler:
    """Holds on to decoded frames so that any shot can be sampled once its end is known.

    Frames newer than the detector's lag may still turn out to belong to the next shot: they are
    held at a spacing of their own (``recent``). Older ones lie on a grid whose spacing doubles
    whenever it holds too many, so it always has between two and four times as many as are wanted.
    A shot that outgrows ``max_span_us`` will be cut into pieces: then the spacing stops growing, and
    old frames are set aside: ``max_aside`` of them as they are, the others as JPEG. Three of four are
    never asked for, so every one that need not be encoded saves time.

    Args:
        num_frames: Frames wanted of each span.
        lag_us: How long after a frame its shot is certain.
        max_span_us: Longest span that will be asked for, None without limit.
        encode: Makes a JPEG of a frame; called for the chosen ones, and for what memory cannot hold.
        max_aside: Decoded frames of a long shot that may be held besides the others.
    """

    def __init__(
        self,
        num_frames: int,
        lag_us: int,
        max_span_us: int | None,
        encode: Callable[[Any], bytes],
        max_aside: int = 0,
    ) -> None:
        self._num_frames = num_frames
        self._lag_us = lag_us
        self._encode = encode
        self._max_aside = max_aside
        self._finest_us = max(lag_us // (3 * num_frames), 1)
        self._coarsest_us = max_span_us // (4 * num_frames) if max_span_us else None
        self._recent: deque[_Candidate] = deque()
        self._grid: list[_Candidate] = []
        self._stored: list[_Candidate] = []
        self._num_encoded = 0  # the first so many of them are JPEGs
        self._spacing_us = self._finest_us

    @property
    def num_held(self) -> int:
        """Decoded frames held at the moment."""
        return len(self._recent) + len(self._grid) + len(self._stored) - self._num_encoded

    def push(self, time_us: int, hold: Callable[[], Any]) -> None:
        """Takes the next frame; ``hold`` gives the picture to keep, and is called only if kept."""
        newest = self._recent[-1] if self._recent else None
        if newest is None or time_us // self._finest_us != newest.time_us // self._finest_us:
            self._recent.append(_Candidate(time_us, hold()))
        while self._recent and self._recent[0].time_us < time_us - self._lag_us:
            oldest = self._recent.popleft()
            if not self._grid or self._bin(oldest) != self._bin(self._grid[-1]):
                self._grid.append(oldest)
        while len(self._grid) > 4 * self._num_frames:
            self._thin()

    def take(self, spans_us: Sequence[tuple[int, int]]) -> list[list[tuple[int, bytes]]]:
        """Returns (time, JPEG) of each span's frames and forgets what lies before the last end.

        Args:
            spans_us: Ascending half-open spans, the pieces of one shot.
        """
        candidates = [*self._stored, *self._grid, *self._recent]
        times = [candidate.time_us for candidate in candidates]
        taken = []
        for start_us, end_us in spans_us:
            inside = candidates[bisect_left(times, start_us) : bisect_left(times, end_us)]
            wanted = even_times(start_us, end_us, self._num_frames)
            chosen = [inside[i] for i in pick_nearest([c.time_us for c in inside], wanted)]
            taken.append([(c.time_us, c.jpeg or self._encode(c.picture)) for c in chosen])
        self._recent = deque(c for c in candidates if c.time_us >= spans_us[-1][1])
        self._grid, self._stored, self._spacing_us = [], [], self._finest_us
        self._num_encoded = 0
        return taken

    def _bin(self, candidate: _Candidate) -> int:
        return candidate.time_us // self._spacing_us

    def _thin(self) -> None:
        if self._coarsest_us is not None and 2 * self._spacing_us > self._coarsest_us:
            half = len(self._grid) // 2
            self._stored += self._grid[:half]
            self._grid = self._grid[half:]
            while len(self._stored) - self._num_encoded > self._max_aside:
                oldest = self._stored[self._num_encoded]
                oldest.jpeg, oldest.picture = self._encode(oldest.picture), None
                self._num_encoded += 1
            return
        self._spacing_us *= 2
        thinned: list[_Candidate] = []
        for candidate in self._grid:
            if not thinned or self._bin(candidate) != self._bin(thinned[-1]):
                thinned.append(candidate)
        self._grid = thinned
