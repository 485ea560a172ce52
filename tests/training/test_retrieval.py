# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.evaluation import retrieval as module
from training.evaluation.matching import match_pairs, rerank
from training.evaluation.retrieval import (
    bootstrap,
    cosine_scores,
    dual_softmax,
    rank_both,
    rank_scores,
    retrieval,
)


def diagonal(size):
    return np.eye(size, dtype=bool)


def rank_candidates(similarity, right):
    """The recalls of a whole matrix: similarities and which candidates are right, [Q, C] each."""
    scores = torch.from_numpy(np.asarray(similarity, dtype=np.float64))
    return rank_scores(lambda start, stop: scores[start:stop], np.argwhere(right), *right.shape)


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


# Several texts a video, in blocks


def features(seed, videos, texts_per_video, width=8):
    """Noisy texts of videos, and the pairs (text, video)."""
    generator = torch.Generator().manual_seed(seed)
    video = F.normalize(torch.randn(videos, width, generator=generator), dim=-1)
    owner = torch.arange(videos).repeat_interleave(texts_per_video)
    text = video[owner] + 0.6 * torch.randn(len(owner), width, generator=generator)
    pairs = np.stack([np.arange(len(owner)), owner.numpy()], axis=1)
    return video, F.normalize(text, dim=-1), pairs


def ranks_by_hand(similarity, pairs):
    """The place of each query's best right candidate, by sorting one query at a time."""
    ranks = []
    for query, row in enumerate(similarity):
        order = np.argsort(-row)
        right = {candidate for asked, candidate in pairs if asked == query}
        ranks.append(1 + min(place for place, found in enumerate(order) if found in right))
    return np.array(ranks)


def check(ranking, ranks):
    for k in (1, 5, 10):
        assert ranking.recall[k] == pytest.approx(np.mean(ranks <= k))
        assert np.array_equal(ranking.hits[k], ranks <= k)
    assert ranking.median_rank == np.median(ranks)
    assert ranking.mean_rank == pytest.approx(ranks.mean())


def test_both_directions_against_sorting_by_hand():
    video, text, pairs = features(0, videos=23, texts_per_video=3)
    result = rank_both(cosine_scores(video, text), pairs)
    similarity = (text @ video.T).numpy()
    check(result.text_to_video, ranks_by_hand(similarity, pairs))
    check(result.video_to_text, ranks_by_hand(similarity.T, pairs[:, ::-1]))
    assert (result.text_to_video.num_queries, result.video_to_text.num_queries) == (69, 23)
    # Three of 69 texts are right for a video.
    assert result.video_to_text.chance[1] == pytest.approx(3 / 69)


def test_pairs_may_come_in_any_order():
    video, text, pairs = features(1, videos=9, texts_per_video=2)
    shuffled = pairs[np.random.default_rng(0).permutation(len(pairs))]
    scores = cosine_scores(video, text)
    assert rank_both(scores, shuffled) == rank_both(scores, pairs)


@pytest.mark.parametrize("limit", [1, 100, 700])
def test_blocks_change_nothing(monkeypatch, limit):
    video, text, pairs = features(2, videos=40, texts_per_video=2)
    scores = cosine_scores(video, text)
    whole = rank_both(scores, pairs), rank_both(dual_softmax(scores), pairs)
    monkeypatch.setattr(module, "BLOCK_SCORES", limit)
    blocked = rank_both(scores, pairs), rank_both(dual_softmax(scores), pairs)
    for one, other in zip(whole, blocked, strict=True):
        assert one == other
        assert np.array_equal(one.video_to_text.hits[1], other.video_to_text.hits[1])


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_dual_softmax_is_its_formula(temperature):
    video, text, _ = features(3, videos=11, texts_per_video=2)
    scores = dual_softmax(cosine_scores(video, text), temperature)
    t2v = text @ video.T
    expected = t2v * (t2v / temperature).softmax(dim=0)
    torch.testing.assert_close(scores.text_to_video(0, 22), expected)
    v2t = t2v.T
    expected = v2t * (v2t / temperature).softmax(dim=0)
    torch.testing.assert_close(scores.video_to_text(3, 7), expected[3:7])


def test_dual_softmax_takes_a_hub_out_of_the_way():
    # Text 0 lies near everything: every video prefers it, but its own video most.
    similarity = torch.tensor([[0.9, 0.8, 0.8], [0.1, 0.7, 0.1], [0.1, 0.1, 0.7]])
    plain = module.BothScores(
        lambda i, j: similarity[i:j], lambda i, j: similarity.T[i:j], num_texts=3, num_videos=3
    )
    pairs = np.stack([np.arange(3)] * 2, axis=1)
    assert rank_both(plain, pairs).video_to_text.recall[1] == pytest.approx(1 / 3)
    assert rank_both(dual_softmax(plain, 0.05), pairs).video_to_text.recall[1] == 1


def test_a_video_without_a_text_is_refused():
    video, text, pairs = features(4, videos=3, texts_per_video=1)
    with pytest.raises(ValueError, match="right candidate"):
        rank_both(cosine_scores(video, text), pairs[:2])


# Re-ranking


class Oracle:
    """Knows the truth: frames hold their video's number, tokens their video's and their own."""

    def __init__(self, wrong=()):
        self.wrong = wrong
        self.judged = []

    def video_tokens(self, frames_BTCHW):
        return frames_BTCHW.view(-1, 1, 1)

    def text_states(self, tokens_BL):
        return tokens_BL[:, :1, None].float()

    def match(self, video_BND, text_BLD, tokens_BL):
        video_B = video_BND.flatten()
        self.judged += zip(tokens_BL[:, 1].tolist(), video_B.tolist(), strict=True)
        right = video_B == text_BLD.flatten()
        return torch.where(right, 0.9, 0.1)


def oracle_inputs(videos, pairs):
    tokens = torch.from_numpy(np.stack([pairs[:, 1], pairs[:, 0]], axis=1).copy())

    def batches():
        for numbers in torch.randperm(videos).split(4):
            yield numbers, numbers.float()

    return batches, tokens


def test_a_matcher_that_knows_lifts_recall_to_what_is_among_the_candidates():
    video, text, pairs = features(5, videos=30, texts_per_video=2, width=3)
    scores = cosine_scores(video, text)
    plain = rank_both(scores, pairs)
    assert plain.text_to_video.recall[1] < 0.5
    batches, tokens = oracle_inputs(30, pairs)
    for k in (5, 10):
        judged = rank_both(rerank(scores, Oracle(), batches, tokens, k), pairs)
        assert judged.text_to_video.recall[1] == plain.text_to_video.recall[k]
        assert judged.video_to_text.recall[1] == plain.video_to_text.recall[k]
    everything = rank_both(rerank(scores, Oracle(), batches, tokens, 1000), pairs)
    assert everything.text_to_video.recall[1] == everything.video_to_text.recall[1] == 1


def test_only_candidates_are_judged_and_each_pair_once(monkeypatch):
    monkeypatch.setattr("training.evaluation.matching.PAIRS_AT_ONCE", 7)
    video, text, pairs = features(6, videos=12, texts_per_video=2)
    similarity = text @ video.T
    batches, tokens = oracle_inputs(12, pairs)
    oracle = Oracle()
    scores = rerank(cosine_scores(video, text), oracle, batches, tokens, 3)
    wanted = {(t, v) for t, row in enumerate(similarity.topk(3).indices.tolist()) for v in row}
    wanted |= {(t, v) for v, row in enumerate(similarity.T.topk(3).indices.tolist()) for t in row}
    assert len(oracle.judged) == len(wanted)
    assert set(oracle.judged) == wanted
    block = scores.text_to_video(0, 24)
    assert (block == -100).sum() == 24 * 9
    assert torch.equal(
        (block > -100).nonzero()[:, 1].view(24, 3), similarity.topk(3).indices.sort()[0]
    )


def test_pairs_of_a_video_that_nobody_reads_are_an_error():
    with pytest.raises(ValueError, match="pairs"):
        match_pairs(Oracle(), lambda: [], torch.zeros(1, 2, dtype=torch.int64), np.array([[0, 0]]))


# Confidence


def test_the_interval_is_that_of_the_binomial():
    hits = np.repeat([1.0, 0.0], [300, 700])
    low, high = bootstrap(hits)
    error = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.003)
    assert bootstrap(hits) == (low, high)
    wider = bootstrap(hits, level=0.99)
    assert wider[0] < low < high < wider[1]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap((rng.random(400) < 0.4) * 1.0, samples=400)
        inside += low <= 0.4 <= high
    assert 0.9 <= inside / 200 <= 0.99


def test_queries_of_one_video_are_no_independent_evidence():
    videos = np.repeat([1.0, 0.0], [30, 70])
    alone = bootstrap(videos)
    repeated, group = np.repeat(videos, 10), np.repeat(np.arange(100), 10)
    narrow, grouped = bootstrap(repeated), bootstrap(repeated, group)
    assert grouped == pytest.approx(alone, abs=0.01)
    assert narrow[1] - narrow[0] < 0.5 * (grouped[1] - grouped[0])


def test_captions_of_one_video_make_no_interval_narrower():
    # Forty captions that read alike are one piece of evidence.
    video, texts, pairs = features(7, videos=30, texts_per_video=1, width=4)
    one = rank_both(cosine_scores(video, texts), pairs)
    owner = np.arange(30).repeat(40)
    pairs = np.stack([np.arange(1200), owner], axis=1)
    forty = rank_both(cosine_scores(video, texts[owner]), pairs)
    assert 0 < one.text_to_video.recall[1] < 1
    assert forty.text_to_video.recall[1] == pytest.approx(one.text_to_video.recall[1])
    assert forty.text_to_video.interval() == pytest.approx(one.text_to_video.interval())
    assert bootstrap(forty.text_to_video.hits[1]) != pytest.approx(
        one.text_to_video.interval(), abs=0.05
    )


def test_rankings_compare_without_their_queries():
    ranking = rank_candidates(np.eye(4), diagonal(4))
    assert ranking == dataclasses.replace(ranking, hits={})
    assert ranking.interval() == (1.0, 1.0)
    assert "hits" not in repr(ranking)
