# SPDX-License-Identifier: Apache-2.0
"""Which part of a shot becomes a clip: pure rules on the times of its frames."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise


def split_shot(times_us: Sequence[int], end_us: int, max_us: int | None) -> list[tuple[int, int]]:
    """Cuts a shot into the fewest equal pieces that are not longer than ``max_us``.

    Args:
        times_us: Times of the shot's frames, ascending.
        end_us: When the last frame has been shown.
        max_us: Longest piece, None for no limit.

    Returns:
        ``[first, last + 1)`` frame indices of each piece. Pieces start at frames, so a piece may be
        one frame longer than ``max_us``.
    """
    length_us = end_us - times_us[0]
    if max_us is None or length_us <= max_us:
        return [(0, len(times_us))]
    num = -(-length_us // max_us)
    starts = [bisect_left(times_us, times_us[0] + i * length_us // num) for i in range(num)]
    return list(pairwise([*sorted({s for s in starts if s < len(times_us)}), len(times_us)]))


def random_window(
    times_us: Sequence[int], end_us: int, max_us: int, seed: str
) -> tuple[int, int, int]:
    """Chooses one window of a shot that is longer than ``max_us``, the same one for the same seed.

    Args:
        times_us: Times of the shot's frames, ascending.
        end_us: When the last frame has been shown.
        max_us: Length of the window.
        seed: The shot's id.

    Returns:
        Index of the first frame, index after the last one, and the window's end. It starts and ends
        at frames, so it may be shorter than ``max_us`` by less than a frame.

    Source: InternVideo2 (arXiv 2403.15377), appendix B.2, "randomly choose a 30-second segment".
    """
    latest = bisect_left(times_us, end_us - max_us)  # the first start too late for a whole window
    first = random.Random(seed).randrange(max(latest, 1))
    bounds = [*times_us, end_us]
    after = max(bisect_right(bounds, times_us[first] + max_us) - 1, first + 1)
    return first, after, bounds[after]


def snap_span(
    times_us: Sequence[int], end_us: int, span_us: tuple[int, int]
) -> tuple[int, int] | None:
    """Returns the frames that a published span stands for.

    Published times are rounded: the frames nearest to the start and to the end are meant.

    Args:
        times_us: Times of the frames around the span, ascending.
        end_us: When the last of them has been shown.
        span_us: Start and end as published.

    Returns:
        ``[first, last + 1)`` indices, at least one frame; None if more than half of the span lies
        outside the frames: what it was said of is not there.
    """
    start_us, stop_us = span_us
    if not times_us or start_us >= end_us or stop_us <= times_us[0]:
        return None
    if 2 * (min(stop_us, end_us) - max(start_us, times_us[0])) < stop_us - start_us:
        return None
    bounds = [*times_us, end_us]
    first = min(_nearest(bounds, start_us), len(times_us) - 1)
    return first, max(_nearest(bounds, stop_us), first + 1)


def group_spans(
    spans_us: Sequence[tuple[int, int]], gap_us: int
) -> list[tuple[int, int, list[int]]]:
    """Groups spans between which it is cheaper to go on decoding than to seek.

    Args:
        spans_us: Half-open spans, in any order; they may overlap.
        gap_us: Longest gap inside a group.

    Returns:
        Start, end and the indices of the spans of each group, in order of time.
    """
    groups: list[tuple[int, int, list[int]]] = []
    for index in sorted(range(len(spans_us)), key=lambda i: spans_us[i]):
        start_us, end_us = spans_us[index]
        if groups and start_us - groups[-1][1] <= gap_us:
            begun, until, members = groups[-1]
            groups[-1] = (begun, max(until, end_us), [*members, index])
        else:
            groups.append((start_us, end_us, [index]))
    return groups


def _nearest(values: Sequence[int], wanted: int) -> int:
    right = bisect_left(values, wanted)
    candidates = [i for i in (right - 1, right) if 0 <= i < len(values)]
    return min(candidates, key=lambda i: (abs(values[i] - wanted), i))
