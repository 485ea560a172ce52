# SPDX-License-Identifier: Apache-2.0
"""(clips, seed, epoch) -> which clips make which global batch. Pure, no I/O.

An epoch is planned in full before it starts and does not depend on the number of processes, so a
position in it is one number and resuming is exact, with any number of processes and readers.

1. Each source has a fixed order: its row groups permuted. An epoch takes the next ``num_items``
   clips of that order, which goes round: so a source of weight 2 gives every clip twice, one of
   weight 1/4 another quarter each epoch, and what cannot fill a last batch takes turns. Whole row
   groups are taken, so that a quarter of the clips is a quarter of the reading.
2. The row groups of all sources are permuted, and the list is cut into slots, parts of a batch, and
   each slot into lanes, used by steps in turn.
3. Inside a lane every clip moves to a random place in its row group, and up to ``shuffle_buffer``
   further: what a shuffle buffer does, without state.
4. Step k takes the next part of a lane of every slot: with one kind of media that of number
   ``k mod lanes``. Batches go to reader processes in turn, so when their number divides ``lanes`` no
   row group is read by two; and a process takes whole slots when their number divides ``slots``.

An item is a clip and which of its copies, in one number: ``copy * num_clips + position``.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.signedinteger]
"""Items, or -1 for a hole."""

_LANE_ROUNDS, _ALL_ROUNDS = 12, 24
"""Attempts at swapping a clip within its lane, then with any clip of the epoch."""


@dataclass(frozen=True)
class Source:
    """Clips of one corpus, neighbours in the index."""

    group_start: NDArray[np.int64]
    """Position of the first clip of each row group, and the one behind the last clip, [G + 1]."""
    num_items: int
    """Clips an epoch takes, copies counted."""

    @property
    def num_clips(self) -> int:
        """Clips there are."""
        return int(self.group_start[-1] - self.group_start[0])


@dataclass(frozen=True)
class Layout:
    """How global batches are cut; all of it changes which clips meet in a batch."""

    batch_size: int
    slots: int
    lane_of_step: NDArray[np.int64]
    """Which lane each step takes its clips from, [steps]."""
    shuffle_buffer: int
    """How far a clip may move beyond its row group's places in a lane."""

    @property
    def slot_cuts(self) -> NDArray[np.int64]:
        """Columns of a batch at which slots begin, and the batch size."""
        return np.linspace(0, self.batch_size, min(self.slots, self.batch_size) + 1).astype(
            np.int64
        )


def quotas(
    num_clips: Sequence[int], weights: Sequence[float], batch_size: int
) -> tuple[int, list[int]]:
    """Returns the steps of an epoch, and how many clips of each source fill them, copies counted.

    A source is asked for ``clips x weight``; what does not fill a batch is cut off in proportion.
    """
    wanted = [max(round(n * w), 1) if n else 0 for n, w in zip(num_clips, weights, strict=True)]
    steps = sum(wanted) // batch_size
    total = steps * batch_size
    if not total:
        return 0, [0] * len(wanted)
    given = [w * total // sum(wanted) for w in wanted]
    # The largest remainders get what rounding down has left, the first of equal ones first.
    most = sorted(range(len(wanted)), key=lambda i: -(wanted[i] * total % sum(wanted)))
    for i in most[: total - sum(given)]:
        given[i] += 1
    return steps, given


def epoch_batches(
    sources: Sequence[Source],
    layout: Layout,
    *,
    seed: int,
    epoch: int,
    stream: int = 0,
    columns: tuple[int, int] | None = None,
    video_hash: NDArray[np.int64] | None = None,
) -> Items:
    """Returns the global batches of an epoch, or some columns of them: items [steps, columns].

    Args:
        sources: Their ``num_items`` must fill the steps.
        layout: How batches are cut.
        seed: The run's seed.
        epoch: From 0.
        stream: Kinds of media that share clips and seed take them in different orders by it.
        columns: First column and the one behind the last; None for all.
        video_hash: A number for the video of each position: no batch holds two clips of a video, and
            what cannot be placed leaves a hole. None lets them meet.
    """
    num_clips = sum(source.num_clips for source in sources)
    largest = max((s.num_items // max(s.num_clips, 1) + 1 for s in sources), default=1) * num_clips
    steps = len(layout.lane_of_step)
    low, high = columns or (0, layout.batch_size)
    # Planning is bound by memory: half of it suffices below two thousand million.
    dtype = np.int32 if largest < 2**31 else np.int64
    cuts = layout.slot_cuts
    # Swaps reach over all columns.
    first, last = (low, high) if video_hash is None else (0, layout.batch_size)
    batches = np.empty((steps, last - first), dtype=dtype)
    if not steps:
        return batches
    key = (seed, stream, epoch)
    runs = _Runs.of_epoch(sources, num_clips, key)
    num_lanes = int(layout.lane_of_step.max()) + 1
    steps_of_lane = [np.flatnonzero(layout.lane_of_step == lane) for lane in range(num_lanes)]
    for slot, (left, right) in enumerate(itertools.pairwise(cuts.tolist())):
        start, part = steps * left, right - left
        for lane, own_steps in enumerate(steps_of_lane):
            stop = start + len(own_steps) * part
            if left < last and right > first and len(own_steps):
                rng = np.random.default_rng([*key, 2, slot, lane])
                items = runs.shuffled(start, stop, layout.shuffle_buffer, rng)
                if video_hash is None:
                    rows = items.reshape(len(own_steps), part)
                else:
                    video_N = video_hash[items % num_clips]
                    rows = _dealt(items, video_N, part, layout.shuffle_buffer, rng)
                inside = slice(max(first - left, 0), min(last, right) - left)
                batches[own_steps, max(left, first) - first : min(right, last) - first] = rows[
                    :, inside
                ]
            start = stop
    if video_hash is None:
        return batches
    rng = np.random.default_rng([*key, 3])
    _part_videos(batches, video_hash, num_clips, layout, rng)
    return batches[:, low:high]


def coverage_batches(
    num_clips: int, *, rank: int, world_size: int, batch_size: int
) -> list[NDArray[np.int64]]:
    """Returns one rank's share of an exact pass in index order: no clip twice, none left out.

    The last batch of a rank may be short and ranks may differ by a batch, so nothing that every
    rank must call together may stand in a loop over them.
    """
    cuts = np.linspace(0, num_clips, world_size + 1).astype(np.int64)
    mine = np.arange(cuts[rank], cuts[rank + 1], dtype=np.int64)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def kinds_in_turn(num_steps: Sequence[int], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns which kind each step of an epoch is of, each as often as it has steps, shuffled."""
    kinds = np.repeat(np.arange(len(num_steps)), num_steps)
    return (
        kinds if len(num_steps) == 1 else np.random.default_rng([seed, epoch, 4]).permutation(kinds)
    )


@dataclass(frozen=True)
class _Runs:
    """An epoch's items in the order of reading, as runs of neighbours."""

    item: NDArray[np.int64]
    """First item of each run."""
    length: NDArray[np.int64]
    end: NDArray[np.int64]
    """Items up to the end of each run."""

    @classmethod
    def of_epoch(
        cls, sources: Sequence[Source], num_clips: int, key: tuple[int, int, int]
    ) -> "_Runs":
        seed, stream, epoch = key
        items, lengths = [], []
        for number, source in enumerate(sources):
            order = np.random.default_rng([seed, stream, number]).permutation(
                len(source.group_start) - 1
            )
            start_G = source.group_start[:-1][order]
            end_G = np.cumsum(np.diff(source.group_start)[order])
            size = source.num_clips
            for copy, taken in enumerate(range(0, source.num_items, max(size, 1))):
                length = min(size, source.num_items - taken)
                first = epoch * source.num_items % size
                # The order goes round.
                for low, high in (
                    (first, min(first + length, size)),
                    (0, max(first + length - size, 0)),
                ):
                    if low == high:
                        continue
                    groups = slice(
                        int(np.searchsorted(end_G, low, side="right")),
                        int(np.searchsorted(end_G, high, side="left")) + 1,
                    )
                    ends = np.minimum(end_G[groups], high)
                    begins = np.concatenate([[low], ends[:-1]])
                    item = start_G[groups] + copy * num_clips
                    item[0] += low - (int(end_G[groups.start - 1]) if groups.start else 0)
                    items.append(item)
                    lengths.append(ends - begins)
        if not items:
            return cls(*(np.zeros(0, dtype=np.int64),) * 3)
        order = np.random.default_rng([*key, 1]).permutation(sum(map(len, items)))
        item, length = np.concatenate(items)[order], np.concatenate(lengths)[order]
        return cls(item, length, np.cumsum(length))

    def shuffled(
        self, start: int, stop: int, shuffle_buffer: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Returns the items of ``[start, stop)``, each moved forward by a random amount."""
        first = int(np.searchsorted(self.end, start, side="right"))
        last = int(np.searchsorted(self.end, stop, side="left")) + 1
        item, length = self.item[first:last].copy(), self.length[first:last].copy()
        skipped = start - int(self.end[first] - length[0])
        item[0] += skipped
        length[0] -= skipped
        length[-1] -= int(self.end[last - 1]) - stop
        begin = np.cumsum(length) - length
        number = stop - start
        items = np.repeat(item - begin, length) + np.arange(number)
        place = np.repeat(begin.astype(np.float64), length)
        place += rng.random(number) * np.repeat(length, length)
        place += rng.random(number) * (shuffle_buffer - 1)
        # Distinct keys: the result is the same whatever sorts them, on any processor.
        return items[_order((place * 256).astype(np.uint64), number)]


def _order(key_N: NDArray[np.uint64], number: int) -> NDArray[np.int64]:
    """Returns the order that sorts keys below 2^63 / number, equal ones as they stand."""
    bits = np.uint64(max(number - 1, 1).bit_length())
    tagged = key_N << bits
    tagged |= np.arange(number, dtype=np.uint64)
    tagged.sort()
    tagged &= (np.uint64(1) << bits) - np.uint64(1)
    return tagged.astype(np.int64)


def _dealt(
    items: NDArray[np.int64],
    video_N: NDArray[np.int64],
    part: int,
    shuffle_buffer: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Returns a lane's items [steps, part] with the clips of a video in different steps.

    Windows of steps are filled as cards are dealt: clips sorted by video, one a step in turn. They are
    as long as the buffer, or as what nearly all videos have clips in the lane.
    """
    steps = len(items) // part
    ordered = np.sort(video_N)
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    counts = np.sort(np.diff(edges))
    usual = int(counts[np.searchsorted(np.cumsum(counts), 0.99 * len(items))])
    windows = max(1, steps // max(shuffle_buffer // part, usual, 1))
    cuts = np.linspace(0, steps, windows + 1).astype(np.int64)
    window_N = np.repeat(np.arange(windows), np.diff(cuts) * part)
    # Videos in another order each time: as many bits of a hash as the window's number leaves.
    bits = min(62 - len(items).bit_length() - windows.bit_length(), 32)
    factor = np.uint64(rng.integers(2**62, dtype=np.uint64) * 2 + 1)
    scrambled_N = (video_N.view(np.uint64) * factor) >> np.uint64(64 - bits)
    order = _order(window_N.astype(np.uint64) << np.uint64(bits) | scrambled_N, len(items))
    size_N = np.diff(cuts)[window_N]
    turn_N = np.arange(len(items)) - cuts[window_N] * part
    dealt = np.empty((steps, part), dtype=items.dtype)
    dealt[cuts[window_N] + turn_N % size_N, turn_N // size_N] = items[order]
    return dealt


def _part_videos(
    batches: NDArray[np.signedinteger],
    video_hash: NDArray[np.int64],
    num_clips: int,
    layout: Layout,
    rng: np.random.Generator,
) -> None:
    """Swaps clips, in place, until no batch holds two of a video; what is left becomes -1.

    A pair of batch and video is one 64-bit number here; two pairs that share it by accident cost a
    swap that was not needed.
    """
    steps, batch_size = batches.shape
    salt_S = rng.integers(0, 2**64, steps, dtype=np.uint64)
    pairs = np.empty((steps, batch_size), dtype=np.uint64)
    # Some batches at a time: 64-bit positions of all at once would double the memory.
    chunk = max((1 << 20) // batch_size, 1)
    for start in range(0, steps, chunk):
        rows = slice(start, start + chunk)
        pairs[rows] = video_hash[batches[rows] % num_clips].view(np.uint64) + salt_S[rows, None]
    known = np.sort(pairs, axis=None)
    twice = np.unique(known[1:][known[1:] == known[:-1]])
    if not len(twice):
        return
    parts: list[NDArray[np.int64]] = []
    for start in range(0, steps, chunk):
        some = pairs[start : start + chunk].ravel()
        found = np.minimum(np.searchsorted(twice, some), len(twice) - 1)
        parts.append(np.flatnonzero(twice[found] == some) + start * batch_size)
    involved = np.concatenate(parts)
    flat_pairs, flat = pairs.ravel(), batches.reshape(-1)
    waiting = involved[~_first(flat_pairs[involved])]

    cuts = layout.slot_cuts
    slot_of_column = np.searchsorted(cuts, np.arange(batch_size), side="right") - 1
    by_lane = np.argsort(layout.lane_of_step, kind="stable")
    place_of_step = np.argsort(by_lane, kind="stable")
    lane_size = np.bincount(layout.lane_of_step)
    lane_start = np.cumsum(lane_size) - lane_size
    # Pairs of the clips that are in place: all, and what has changed since.
    added, removed = np.zeros(0, dtype=np.uint64), np.sort(flat_pairs[waiting])

    def free(pair: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Returns which pairs no clip in place makes, the first of equal ones."""
        number = np.zeros(len(pair), dtype=np.int64)
        for ordered, sign in ((known, 1), (added, 1), (removed, -1)):
            number += sign * np.searchsorted(ordered, pair, side="right")
            number -= sign * np.searchsorted(ordered, pair, side="left")
        is_free = number == 0
        is_free[is_free] = _first(pair[is_free])
        return is_free

    for attempt in range(_LANE_ROUNDS + _ALL_ROUNDS):
        if attempt >= _LANE_ROUNDS and attempt % 2:
            # Those that wait change places.
            mixed = rng.permutation(waiting)
            change = salt_S[waiting // batch_size] - salt_S[mixed // batch_size]
            flat_pairs[waiting] = flat_pairs[mixed] + change
            flat[waiting] = flat[mixed]
        # In place: the batch's other clip of the video has gone, or the clip came from elsewhere.
        settled = free(flat_pairs[waiting])
        added = np.sort(np.concatenate([added, flat_pairs[waiting[settled]]]))
        waiting = waiting[~settled]
        if not len(waiting):
            break
        step, column = np.divmod(waiting, batch_size)
        if attempt < _LANE_ROUNDS:
            # A step nearby, further away each time, in the same lane: it is read at about that time.
            size = lane_size[layout.lane_of_step[step]]
            reach = np.minimum(8 << attempt, size - 1)
            start = lane_start[layout.lane_of_step[step]]
            place = place_of_step[step] - start + rng.integers(-reach, reach + 1)
            left = cuts[slot_of_column[column]]
            other = by_lane[start + np.clip(place, 0, size - 1)] * batch_size
            other += rng.integers(left, cuts[slot_of_column[column] + 1])
        else:
            other = rng.integers(0, len(flat), len(waiting))
        change = salt_S[other // batch_size] - salt_S[step]
        goes, comes = flat_pairs[waiting] + change, flat_pairs[other] - change
        # At once: neither the same partner twice nor the same video twice into a batch.
        good = (other // batch_size != step) & ~np.isin(other, waiting)
        good[good] = _first(other[good])
        for pair in (goes, comes):
            good[good] = free(pair[good])
        distinct = _first(np.concatenate([goes[good], comes[good]])).reshape(2, -1).all(axis=0)
        good[good] = distinct
        mine, theirs = waiting[good], other[good]
        removed = np.sort(np.concatenate([removed, flat_pairs[theirs]]))
        added = np.sort(np.concatenate([added, goes[good], comes[good]]))
        flat_pairs[mine], flat_pairs[theirs] = comes[good], goes[good]
        flat[mine], flat[theirs] = flat[theirs], flat[mine]
        waiting = waiting[~good]
    flat[waiting] = -1


def _first(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Returns which values have not stood before."""
    is_first = np.zeros(len(values), dtype=bool)
    is_first[np.unique(values, return_index=True)[1]] = True
    return is_first
