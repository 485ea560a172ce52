# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest

from training.data import plan


def every_rank(num_clips, *, world_size, batch_size, lanes, shuffle_buffer, epoch=0, seed=7):
    groups = np.arange(num_clips) // 5
    return [
        plan.epoch_batches(
            groups,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            lanes=lanes,
            shuffle_buffer=shuffle_buffer,
        )
        for rank in range(world_size)
    ]


GRID = list(
    itertools.product((1, 7, 48, 101), (1, 2, 3), (1, 4, 8), (1, 3, 4), (1, 10, 1000), (0, 5))
)


def test_every_clip_once_per_epoch_over_the_grid():
    for num_clips, world_size, batch_size, lanes, buffer, epoch in GRID:
        ranks = every_rank(
            num_clips,
            world_size=world_size,
            batch_size=batch_size,
            lanes=lanes,
            shuffle_buffer=buffer,
            epoch=epoch,
        )
        steps = num_clips // (batch_size * world_size)
        assert [batches.shape for batches in ranks] == [(steps, batch_size)] * world_size
        out = plan.sitting_out(
            num_clips, seed=7, epoch=epoch, batch_size=batch_size, world_size=world_size
        )
        assert len(out) == num_clips - steps * batch_size * world_size
        seen = np.concatenate([*(batches.ravel() for batches in ranks), out])
        assert sorted(seen) == list(range(num_clips)), (num_clips, world_size, batch_size, lanes)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_reader_processes_in_turn_take_every_step_once(num_workers):
    batches = every_rank(100, world_size=1, batch_size=4, lanes=4, shuffle_buffer=8)[0]
    taken = [batches[worker::num_workers] for worker in range(num_workers)]
    assert sorted(np.concatenate(taken).ravel()) == sorted(batches.ravel())


def test_one_lane_per_reader_keeps_readers_out_of_each_others_row_groups():
    groups = np.arange(400) // 20
    batches = plan.epoch_batches(
        groups, seed=0, epoch=0, rank=0, world_size=1, batch_size=5, lanes=4, shuffle_buffer=10
    )
    read = [set(groups[batches[worker::2]].ravel()) for worker in range(2)]
    # Only a row group on a cut between lanes is read by two.
    assert len(read[0] & read[1]) <= 3


def test_left_over_clips_take_turns():
    # 10 clips, batches of 4: two sit out an epoch, so in five epochs each sits out once.
    out = [
        plan.sitting_out(10, seed=3, epoch=epoch, batch_size=4, world_size=1) for epoch in range(5)
    ]
    assert sorted(np.concatenate(out)) == list(range(10))


def test_order_depends_on_seed_and_epoch_alone():
    # Without a buffer: the order of row groups must differ by itself.
    shape = {"world_size": 2, "batch_size": 4, "lanes": 2, "shuffle_buffer": 1}
    first = every_rank(64, **shape)
    np.testing.assert_array_equal(first, every_rank(64, **shape))
    for other in (every_rank(64, epoch=1, **shape), every_rank(64, seed=8, **shape)):
        assert (np.array(first) == np.array(other)).mean() < 0.2


def test_no_clip_moves_further_than_the_buffer():
    groups = np.arange(1000) // 10
    place = {"seed": 0, "epoch": 0, "rank": 0, "world_size": 1, "batch_size": 10, "lanes": 1}
    shuffled = plan.epoch_batches(groups, shuffle_buffer=50, **place).ravel()
    plain = plan.epoch_batches(groups, shuffle_buffer=1, **place).ravel()
    moved = np.argsort(shuffled) - np.argsort(plain)
    assert np.abs(moved).max() <= 50
    assert np.abs(moved).mean() > 10
    # Without a buffer a row group's clips stay together.
    assert len(np.flatnonzero(np.diff(groups[plain]))) == 99


@pytest.mark.parametrize("num_clips", [0, 1, 5, 48, 101])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_coverage_takes_every_clip_once_in_order(num_clips, world_size, batch_size):
    batches = [
        batch
        for rank in range(world_size)
        for batch in plan.coverage_batches(
            num_clips, rank=rank, world_size=world_size, batch_size=batch_size
        )
    ]
    assert [clip for batch in batches for clip in batch] == list(range(num_clips))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
