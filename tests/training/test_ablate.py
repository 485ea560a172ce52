# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from training.ablate import Hits, _names, compare_hits


def answers(hits_Q, videos_Q):
    hits_Q, videos_Q = np.asarray(hits_Q, float), np.asarray(videos_Q)
    return Hits({1: hits_Q}, {1: hits_Q}, videos_Q, videos_Q)


def random_hits(share, num_queries, seed):
    return np.random.default_rng(seed).random(num_queries) < share


def test_sets_that_answer_alike_do_not_differ():
    models = [answers(random_hits(0.3, 200, seed), range(200)) for seed in (1, 2)]
    table = compare_hits({"a": models, "b": models}, seed=0)
    difference = table["b"]["t2v_r1_difference"]
    assert difference.mean == 0
    assert difference.low < 0 < difference.high
    assert "t2v_r1_difference" not in table["a"]


def test_a_clear_difference_is_shown_and_a_mean_lies_in_its_interval():
    worse = [answers(random_hits(0.2, 400, seed), range(400)) for seed in (1, 2, 3)]
    better = [answers(random_hits(0.5, 400, seed), range(400)) for seed in (4, 5, 6)]
    table = compare_hits({"random": worse, "flt": better}, seed=0)
    for row in table.values():
        assert row["t2v_r1"].low < row["t2v_r1"].mean < row["t2v_r1"].high
    difference = table["flt"]["v2t_r1_difference"]
    assert difference.low > 0.2
    assert difference.high < 0.4


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(100):
        table = compare_hits({"a": [answers(random_hits(0.3, 150, seed), range(150))]}, seed=seed)
        covered += table["a"]["t2v_r1"].low <= 0.3 <= table["a"]["t2v_r1"].high
    assert 88 <= covered <= 100


def test_queries_of_one_video_are_no_independent_draws():
    hits = np.repeat(random_hits(0.3, 50, 0), 10)
    alone = compare_hits({"a": [answers(hits, range(500))]}, seed=0)["a"]["t2v_r1"]
    together = compare_hits({"a": [answers(hits, np.repeat(range(50), 10))]}, seed=0)["a"]["t2v_r1"]
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.2)


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (["c#flt", "c#random"], ["flt", "random"]),
        (["one/corpus", "two/corpus"], ["one_corpus", "two_corpus"]),
        (["a#flt", "b#flt"], ["a-flt", "b-flt"]),
    ],
)
def test_names_tell_sets_apart(data, names):
    assert _names(data) == names
