# SPDX-License-Identifier: Apache-2.0
"""How much happens in a clip, from the small frames of the decoding pass: motion, stills, jumps."""

from bisect import bisect_left

import cv2
import numpy as np

STILL_STEP_US = 200_000
"""Pictures at least this far apart are compared to tell whether anything moves: neighbouring frames
of slow scenes, and of sources with repeated frames, hardly differ even where something does."""
STILL_LEVEL = 10
"""Difference in one colour, of 255, that counts as a change: above what coding and grain do to a still."""
STILL_SHARE = 0.002
"""Share of the picture that must change for a step not to be still."""
JUMP_DIFFERENCE = 0.1
"""Mean difference of luma between two frames, in [0, 1], without which there is no jump."""
JUMP_HISTOGRAM = 0.2
"""Share of the pixels that must change their level of luma, too: a fast pan over a rough texture
changes every pixel, but not what levels there are."""


class ActivityMeter:
    """Measures a video frame by frame and answers for any span of its frames.

    Times and measures are kept for every frame (tens of bytes each), pictures are not.
    """

    def __init__(self) -> None:
        self.times_us: list[int] = []
        self._changed: list[float] = []
        self._jump_frames: list[int] = []
        self._luma: np.ndarray | None = None
        self._step: tuple[int, int, np.ndarray] | None = None  # time, frame, picture
        self._steps: list[tuple[int, int, bool]] = []  # start, end, whether it was still
        self._step_starts: list[int] = []

    def push(self, time_us: int, small_bgr: np.ndarray) -> None:
        """Takes the next frame.

        Args:
            time_us: Larger than that of the frame before.
            small_bgr: uint8 [height, width, 3], of one size; kept for a while, so it must not be
                changed.
        """
        luma = cv2.cvtColor(small_bgr, cv2.COLOR_BGR2GRAY)
        changed = 0.0
        if self._luma is not None:
            changed = cv2.norm(luma, self._luma, cv2.NORM_L1) / luma.size / 255
            if changed > JUMP_DIFFERENCE and levels_changed(luma, self._luma) > JUMP_HISTOGRAM:
                self._jump_frames.append(len(self.times_us))
        self._luma = luma
        self.times_us.append(time_us)
        self._changed.append(changed)
        if self._step is None:
            self._step = time_us, len(self.times_us), small_bgr
        elif time_us - self._step[0] >= STILL_STEP_US:
            begun_us, after_first, picture = self._step
            flashed = max(self._changed[after_first:]) > JUMP_DIFFERENCE
            self._steps.append((begun_us, time_us, not flashed and is_still(small_bgr, picture)))
            self._step_starts.append(begun_us)
            self._step = time_us, len(self.times_us), small_bgr

    def motion_score(self, first: int, after: int) -> float:
        """Returns the mean luma difference of frames ``[first, after)`` to the frame before each.

        The first frame's difference is to another clip, and is left out.
        """
        changed = self._changed[first + 1 : after]
        return float(np.mean(changed)) if changed else 0.0

    def jump_score(self, first: int, after: int, end_us: int) -> float:
        """Returns how often per second the whole picture changes inside a span of frames."""
        jumps = bisect_left(self._jump_frames, after) - bisect_left(self._jump_frames, first + 1)
        return jumps * 1e6 / max(end_us - self.times_us[first], 1)

    def still_score(self, first: int, after: int) -> float:
        """Returns the share of a span's time in which nothing moves, in [0, 1].

        A span too short to hold a step is still when no two neighbouring frames differ.
        """
        start_us, last_us = self.times_us[first], self.times_us[after - 1]
        still, seen = 0, 0
        for i in range(bisect_left(self._step_starts, start_us), len(self._steps)):
            begun, ended, was_still = self._steps[i]
            if ended > last_us:
                break
            seen += ended - begun
            still += (ended - begun) * was_still
        if not seen:
            return float(self.motion_score(first, after) == 0.0)
        return still / seen


def is_still(one_bgr: np.ndarray, other_bgr: np.ndarray) -> bool:
    """Returns whether next to nothing differs between two small pictures, in any colour."""
    difference = cv2.absdiff(one_bgr, other_bgr)
    num_pixels = difference.shape[0] * difference.shape[1]
    # OpenCV takes 7 us for this, NumPy's maximum over colours 126 us.
    unmoved = cv2.inRange(difference, (0, 0, 0), (STILL_LEVEL, STILL_LEVEL, STILL_LEVEL))
    return num_pixels - cv2.countNonZero(unmoved) < STILL_SHARE * num_pixels


def levels_changed(one_luma: np.ndarray, other_luma: np.ndarray) -> float:
    """Returns the share of pixels by which the histograms (16 levels) of two pictures differ."""
    one, other = (
        cv2.calcHist([luma], [0], None, [16], [0, 256]) for luma in (one_luma, other_luma)
    )
    return float(np.abs(one - other).sum()) / 2 / one_luma.size
