# SPDX-License-Identifier: Apache-2.0
"""(clips, seed, epoch, ranks) -> who reads which clip in which step. Pure, no I/O.

An epoch is planned in full before it starts, so a position in it is one number, whatever the
number of reader processes, and resuming is exact.

1. With N clips and a global batch of G, D = N mod G clips cannot fill a batch and sit the epoch
   out. They are a window of D over a fixed permutation that moves on by D each epoch, so over
   epochs every clip sits out equally often (to within one epoch).
2. Row groups are permuted, clips are permuted inside each, and the list is cut into lanes:
   ``lanes`` independent read positions per rank.
3. Inside a lane every clip's place is moved forward by a random amount below
   ``shuffle_buffer`` and the clips are sorted by it: what a shuffle buffer does, without state.
4. Step k of a rank takes the next batch of its lane ``k mod lanes``. Batches go to reader
   processes in turn, so when their number divides ``lanes`` no row group is read twice.
"""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
"""Positions in the index of clips."""


def num_steps(num_clips: int, batch_size: int, world_size: int) -> int:
    """Returns the steps of a training epoch, the same on every rank."""
    return num_clips // (batch_size * world_size)


def epoch_batches(
    group_N: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
    batch_size: int,
    lanes: int,
    shuffle_buffer: int,
) -> NDArray[np.int64]:
    """Returns one rank's epoch: positions in ``group_N``, int64 [steps, batch_size].

    Over all ranks every position appears exactly once, save ``sitting_out``'s.

    Args:
        group_N: For each clip the number of the row group it lies in; any integers.
        seed: The run's seed.
        epoch: From 0.
        rank: This process.
        world_size: All processes.
        batch_size: Clips per process and step.
        lanes: Read positions per process.
        shuffle_buffer: Bound on how far a clip moves within its lane, in clips.
    """
    steps = num_steps(len(group_N), batch_size, world_size)
    order = _shuffled_by_group(group_N, seed, epoch)
    out = sitting_out(
        len(group_N), seed=seed, epoch=epoch, batch_size=batch_size, world_size=world_size
    )
    present = np.ones(len(group_N), dtype=bool)
    present[out] = False
    order = order[present[order]]

    lane_steps = [len(range(lane, steps, lanes)) for lane in range(lanes)]
    start = rank * steps * batch_size
    batches = np.empty((steps, batch_size), dtype=np.int64)
    for lane, count in enumerate(lane_steps):
        clips = order[start : start + count * batch_size]
        start += count * batch_size
        rng = np.random.default_rng([seed, epoch, 2, rank, lane])
        place = np.arange(len(clips)) + rng.uniform(0, shuffle_buffer, len(clips))
        batches[lane::lanes] = clips[np.argsort(place, kind="stable")].reshape(count, batch_size)
    return batches


def sitting_out(num_clips: int, *, seed: int, epoch: int, batch_size: int, world_size: int) -> Rows:
    """Returns the clips left out of an epoch so that all its batches are full."""
    left_over = num_clips % (batch_size * world_size)
    turns = np.random.default_rng([seed, 0]).permutation(num_clips)
    window = (epoch * left_over + np.arange(left_over)) % max(num_clips, 1)
    return turns[window]


def coverage_batches(num_clips: int, *, rank: int, world_size: int, batch_size: int) -> list[Rows]:
    """Returns one rank's share of an exact pass in index order: no clip twice, none left out.

    The last batch of a rank may be short and ranks may differ by a batch, so nothing that every
    rank must call together may stand in a loop over them.
    """
    cuts = np.linspace(0, num_clips, world_size + 1).astype(np.int64)
    mine = np.arange(cuts[rank], cuts[rank + 1], dtype=np.int64)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def _shuffled_by_group(group_N: NDArray[np.int64], seed: int, epoch: int) -> Rows:
    """Returns all positions, groups in random order, positions in random order inside each."""
    rng = np.random.default_rng([seed, epoch, 1])
    groups, group_of_N = np.unique(group_N, return_inverse=True)
    place_of_group = rng.permutation(len(groups))
    within = rng.permutation(len(group_N))
    return np.lexsort((within, place_of_group[group_of_N]))
