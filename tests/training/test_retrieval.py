# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.evaluation.retrieval import rank_candidates, retrieval


def diagonal(size):
    return np.eye(size, dtype=bool)


def test_perfect_model():
    ranking = rank_candidates(np.eye(20), diagonal(20))
    assert ranking.recall == {1: 1.0, 5: 1.0, 10: 1.0}
    assert ranking.median_rank == 1
    assert ranking.chance == pytest.approx({1: 0.05, 5: 0.25, 10: 0.5})


def test_worst_model():
    ranking = rank_candidates(-np.eye(20), diagonal(20))
    assert ranking.recall == {1: 0.0, 5: 0.0, 10: 0.0}
    assert ranking.median_rank == 20


def test_known_ranks():
    # The right one stands 1st, 2nd, 3rd.
    similarity = np.array([[9, 1, 0], [5, 4, 0], [5, 4, 3]])
    ranking = rank_candidates(similarity, diagonal(3))
    assert ranking.recall[1] == pytest.approx(1 / 3)
    assert ranking.recall[5] == 1
    assert ranking.median_rank == 2


@pytest.mark.parametrize("right_per_query", [1, 3])
def test_constant_model_scores_chance(right_per_query):
    right = np.tile(np.arange(30) < right_per_query, (12, 1))
    ranking = rank_candidates(np.zeros((12, 30)), right)
    assert ranking.recall == pytest.approx(ranking.chance)
    assert ranking.chance[1] == pytest.approx(right_per_query / 30)
    # The first of r among n stands at (n + 1) / (r + 1) on average.
    assert ranking.median_rank == pytest.approx(31 / (right_per_query + 1))


def test_ties_are_worth_what_random_order_gives_them():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 4, (6, 15)).astype(float)
    right = rng.random((6, 15)) < 0.15
    right[:, 3] = True
    ranking = rank_candidates(similarity, right)
    trials = [
        rank_candidates(similarity + 1e-3 * rng.random(similarity.shape), right).recall
        for _ in range(4000)
    ]
    for k in (1, 5, 10):
        mean = np.mean([trial[k] for trial in trials])
        assert ranking.recall[k] == pytest.approx(mean, abs=0.02)


def test_chance_is_what_random_scores_get():
    rng = np.random.default_rng(1)
    right = np.zeros((8, 40), dtype=bool)
    for query in range(8):
        right[query, : query + 1] = True
    rankings = [rank_candidates(rng.random((8, 40)), right) for _ in range(2000)]
    for k in (1, 5, 10):
        mean = np.mean([ranking.recall[k] for ranking in rankings])
        assert rankings[0].chance[k] == pytest.approx(mean, abs=0.02)


def test_best_of_several_right_ones_counts():
    similarity = np.array([[3.0, 2.0, 1.0]])
    ranking = rank_candidates(similarity, np.array([[False, True, True]]))
    assert ranking.median_rank == 2
    assert ranking.recall[1] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_similarities_that_are_not_finite_are_refused(bad):
    similarity = np.eye(3)
    similarity[1, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        rank_candidates(similarity, diagonal(3))


def test_captions_that_read_the_same_are_one():
    # Clips 0 and 1 have one caption; each text lies exactly on clip 1, 2 or 3.
    features = F.normalize(torch.eye(4), dim=-1)
    text = features[[1, 1, 2, 3]]
    result = retrieval(features, text, torch.tensor([5, 5, -9, 7]))
    assert (result.text_to_video.num_queries, result.text_to_video.num_candidates) == (3, 4)
    assert result.text_to_video.recall[1] == 1
    # Two right clips among four for one caption, one for the others.
    assert result.text_to_video.chance[1] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert (result.video_to_text.num_queries, result.video_to_text.num_candidates) == (4, 3)
    # Clip 0 is as far from every caption: a third of a hit.
    assert result.video_to_text.recall[1] == pytest.approx((3 + 1 / 3) / 4)


def test_headline():
    result = retrieval(torch.eye(8), torch.eye(8), torch.arange(8))
    assert result.headline() == "text->video R@1 100.0 % (chance 12.5 %, 8.0x)"
