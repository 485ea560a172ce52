# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself where there is no terminal."""

import io

import pytest
from rich.console import Console

from dataengine.progress import ProgressDisplay, Snapshot, StageCounts


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dataengine.progress.time.monotonic", lambda: now[0])
    return now


def lines_of(clock, shown, unit="shards"):
    """Returns what is said of (time, snapshot) pairs."""
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out), ["caption", "fuse"], 1, unit)
    for now, snapshot in shown:
        clock[0] = now
        display.show(snapshot)
    return out.getvalue().splitlines()


def test_stages_say_what_they_have_done_while_no_shard_ends(clock):
    loading = Snapshot({"caption": StageCounts(num_actors=1)})
    working = Snapshot({"caption": StageCounts(num_actors=1, num_in=1200)})
    lines = lines_of(clock, [(11, Snapshot({})), (22, loading), (33, working)])
    assert [line.split("of 1")[1].strip() for line in lines] == [
        "caption starting  fuse starting",
        "caption 0  fuse starting",
        "caption 1,200  fuse starting",
    ]


def test_what_does_not_change_is_not_said_every_ten_seconds(clock):
    done = {name: StageCounts(num_actors=1, num_in=5) for name in ("caption", "fuse")}
    ended = Snapshot(done, num_videos_done=1)
    more = Snapshot({name: StageCounts(num_actors=2, num_in=5) for name in done}, 1)
    shown = [(now, more if now > 50 else ended) for now in range(11, 100, 11)]
    lines = lines_of(clock, shown)
    assert len(lines) == 2
    assert all(line.endswith("caption 5  fuse 5  finishing") for line in lines)


def test_the_shards_are_no_total_of_the_clips():
    display = ProgressDisplay(Console(file=io.StringIO()), ["caption"], 3, "shards")
    display.show(Snapshot({"caption": StageCounts(num_in=7, num_out=7, num_actors=1)}))
    shards, caption = display._bars.tasks
    assert (shards.total, caption.total, caption.fields["known"]) == (3, None, "?")


def test_a_rate_too_small_to_be_said_is_left_out(clock):
    half = Snapshot({}, num_videos_done=1)
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out), ["fuse"], 2, "shards")
    clock[0] = 100
    display.show(half)
    assert out.getvalue().split("shards 1 of 2")[1].split() == [
        "1",
        "min",
        "40",
        "s",
        "left",
        "fuse",
        "starting",
    ]
