# SPDX-License-Identifier: Apache-2.0
"""Features -> how often the right clip or caption is among the first k.

Scores are looked at in blocks of queries, so that 100 000 clips against as many captions need no
matrix of 40 GB. A query may have several right candidates: the best placed of them counts.

Where candidates tie, the order is taken to be random and what is reported is the expectation, so
a model that gives everything the same score gets exactly the chance that stands beside it.

Q queries, C candidates, E embedding, B queries of a block, P pairs of a query and an answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

CUTOFFS = (1, 5, 10)
BLOCK_SCORES = 1 << 26
"""Scores held at once: 256 MiB of float32."""
NOT_CANDIDATE = -100.0
"""Score of what a matcher was not asked about, as published."""

Scores = Callable[[int, int], torch.Tensor]
"""First and last query (exclusive) -> their scores of all candidates, float [B, C]; higher is
closer."""


@dataclass(frozen=True)
class Ranking:
    """One direction of retrieval; shares in [0, 1]."""

    recall: dict[int, float]
    """Share of queries with a right candidate among the first k."""
    chance: dict[int, float]
    """The same for a random order of the same candidates."""
    median_rank: float
    """Of the best right candidate, 1 is first."""
    mean_rank: float
    num_queries: int
    num_candidates: int
    hits: dict[int, NDArray[np.float64]] = field(repr=False, compare=False)
    """For each k, each query's probability of a right candidate among the first k: 0 or 1 but for
    ties. What `bootstrap` takes."""
    group: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    """Equal for queries that have an answer in common: they are no independent evidence."""

    def describe(self) -> str:
        """Returns one line: recalls with chance beside them, and the median and mean rank."""
        parts = [
            f"R@{k} {100 * self.recall[k]:.1f} % (chance {100 * self.chance[k]:.1f} %, "
            f"{self.recall[k] / self.chance[k]:.1f}x)"
            for k in CUTOFFS
        ]
        ranks = f"median rank {self.median_rank:g}, mean {self.mean_rank:.1f}"
        return f"{'  '.join(parts)}  {ranks} of {self.num_candidates}"

    def interval(self, k: int = 1) -> tuple[float, float]:
        """Returns the 95 % confidence interval of R@k."""
        return bootstrap(self.hits[k], self.group)

    def values(self) -> dict[str, float]:
        """Returns all numbers under flat names: ``r1``, ``r1_low``, ``median_rank``..."""
        low, high = self.interval()
        return {
            **{f"r{k}": share for k, share in self.recall.items()},
            **{f"chance_r{k}": share for k, share in self.chance.items()},
            "r1_low": low,
            "r1_high": high,
            "median_rank": self.median_rank,
            "mean_rank": self.mean_rank,
            "queries": self.num_queries,
            "candidates": self.num_candidates,
        }


@dataclass(frozen=True)
class Retrieval:
    """Both directions over the same clips."""

    text_to_video: Ranking
    video_to_text: Ranking

    def lines(self) -> list[str]:
        """Returns one line a direction."""
        return [
            f"text->video  {self.text_to_video.describe()}",
            f"video->text  {self.video_to_text.describe()}",
        ]

    def headline(self) -> str:
        """Returns the one number to look at: ``text->video R@1 12.5 % (chance 2.1 %, 6.0x)``."""
        ranking = self.text_to_video
        recall, chance = ranking.recall[1], ranking.chance[1]
        return (
            f"text->video R@1 {100 * recall:.1f} % "
            f"(chance {100 * chance:.1f} %, {recall / chance:.1f}x)"
        )

    def values(self) -> dict[str, float]:
        """Returns flat numbers for a log."""
        named = {"t2v": self.text_to_video, "v2t": self.video_to_text}
        flat = {f"{n}_r{k}": r.recall[k] for n, r in named.items() for k in CUTOFFS}
        flat |= {f"{n}_median_rank": r.median_rank for n, r in named.items()}
        return flat | {f"{n}_mean_rank": r.mean_rank for n, r in named.items()}


def retrieval(video_E: torch.Tensor, text_E: torch.Tensor, caption_id: torch.Tensor) -> Retrieval:
    """Returns both directions for clips and their captions, one row of each a clip.

    Captions that read the same are one caption: text-to-video asks each distinct caption once and
    counts the best placed of its clips, video-to-text ranks the distinct captions.

    Args:
        video_E: Unit-length features [clips, E].
        text_E: Unit-length features of the captions [clips, E].
        caption_id: int64 [clips], equal for captions that read the same.
    """
    first_of_text, pairs = distinct_texts(caption_id)
    return rank_both(cosine_scores(video_E, text_E[first_of_text.to(text_E.device)]), pairs)


def distinct_texts(caption_id: torch.Tensor) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Returns for clips with a caption each which clips' captions are distinct, and who answers whom.

    Args:
        caption_id: int64 [clips], equal for captions that read the same.

    Returns:
        int64 [texts], a clip that carries the text; and the pairs (text, clip), [clips, 2].
    """
    _, first, text_of_clip = np.unique(
        caption_id.cpu().numpy(), return_index=True, return_inverse=True
    )
    pairs = np.stack([text_of_clip, np.arange(len(text_of_clip))], axis=1)
    return torch.from_numpy(first), pairs


@dataclass(frozen=True)
class BothScores:
    """Scores of texts and videos in both directions."""

    text_to_video: Scores
    video_to_text: Scores
    num_texts: int
    num_videos: int


def cosine_scores(video_VE: torch.Tensor, text_TE: torch.Tensor) -> BothScores:
    """Returns the cosines of unit-length features, multiplied block by block where they lie."""
    video_VE, text_TE = video_VE.float(), text_TE.float()

    def text_to_video(start: int, stop: int) -> torch.Tensor:
        return text_TE[start:stop] @ video_VE.T

    def video_to_text(start: int, stop: int) -> torch.Tensor:
        return video_VE[start:stop] @ text_TE.T

    return BothScores(text_to_video, video_to_text, len(text_TE), len(video_VE))


def dual_softmax(scores: BothScores, temperature: float = 1.0) -> BothScores:
    """Returns scores that a candidate shares among the queries: S * softmax(S / temperature).

    The softmax runs over the queries, in each direction of its own. It looks at all queries at
    once, so it is no retrieval of one query; published numbers with it (DSL) use temperature 1 on
    cosines.

    Source: CAMoE (Cheng et al. 2021, arXiv:2109.04290); the released evaluation code.
    """
    return BothScores(
        _shared(scores.text_to_video, scores.num_texts, scores.num_videos, temperature),
        _shared(scores.video_to_text, scores.num_videos, scores.num_texts, temperature),
        scores.num_texts,
        scores.num_videos,
    )


def _shared(scores: Scores, num_queries: int, num_candidates: int, temperature: float) -> Scores:
    parts = [
        torch.logsumexp(scores(start, stop) / temperature, dim=0).double()
        for start, stop in blocks(num_queries, num_candidates)
    ]
    total_C = torch.logsumexp(torch.stack(parts), dim=0).float()

    def shared(start: int, stop: int) -> torch.Tensor:
        block_BC = scores(start, stop)
        return block_BC * (block_BC / temperature - total_C).exp()

    return shared


def rank_both(scores: BothScores, pairs: NDArray[np.int64]) -> Retrieval:
    """Returns both directions.

    Args:
        scores: Of all texts and videos.
        pairs: int64 [P, 2], each text with each video that it belongs to; every text and every video
            at least once.

    Raises:
        ValueError: If a score is not finite or something has no partner.
    """
    return Retrieval(
        rank_scores(scores.text_to_video, pairs, scores.num_texts, scores.num_videos),
        rank_scores(scores.video_to_text, pairs[:, ::-1], scores.num_videos, scores.num_texts),
    )


def rank_scores(
    scores: Scores, pairs: NDArray[np.int64], num_queries: int, num_candidates: int
) -> Ranking:
    """Returns one direction.

    Args:
        scores: Of a block of queries.
        pairs: int64 [P, 2], query and right candidate; at least one each query.
        num_queries: Q.
        num_candidates: C.

    Raises:
        ValueError: If a score is not finite or a query has no answer.
    """
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    counted: list[NDArray[np.int64]] = []
    for start, stop in blocks(num_queries, num_candidates):
        block_BC = scores(start, stop)
        low, high = np.searchsorted(pairs[:, 0], [start, stop])
        row_P, column_P = torch.from_numpy(pairs[low:high].copy()).to(block_BC.device).T
        counted.append(_count(block_BC, row_P - start, column_P))
    if not counted:
        raise ValueError("there is no query")
    first_Q = np.searchsorted(pairs[:, 0], np.arange(num_queries))
    return _ranking(np.concatenate(counted, axis=1), num_candidates, pairs[first_Q, 1])


def blocks(num_queries: int, num_candidates: int) -> list[tuple[int, int]]:
    """Returns where blocks of queries start and stop, so that one's scores fit `BLOCK_SCORES`."""
    size = max(1, BLOCK_SCORES // max(num_candidates, 1))
    return [(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]


def _count(
    similarity_BC: torch.Tensor, row_P: torch.Tensor, column_P: torch.Tensor
) -> NDArray[np.int64]:
    """Returns per query: better ones, wrong and right ones that tie with the best right, all right.

    int64 [4, B]. What is right is looked at by itself, so that the block is read three times only.
    """
    # A sum is finite only if all are.
    if not torch.isfinite(similarity_BC.sum(dim=1)).all():
        raise ValueError("similarities must be finite")
    num_right_B = torch.bincount(row_P, minlength=len(similarity_BC))
    if (num_right_B == 0).any():
        raise ValueError("every query needs a right candidate")
    right_P = similarity_BC[row_P, column_P]
    lowest_B = torch.full_like(similarity_BC[:, 0], -torch.inf)
    best_B = lowest_B.scatter_reduce(0, row_P, right_P, "amax")
    tied_right_B = torch.bincount(row_P[right_P == best_B[row_P]], minlength=len(best_B))
    before_B = torch.count_nonzero(similarity_BC > best_B[:, None], dim=1)
    tied_B = torch.count_nonzero(similarity_BC >= best_B[:, None], dim=1) - before_B
    counted = before_B, tied_B - tied_right_B, tied_right_B, num_right_B
    return torch.stack(counted).cpu().numpy()


def _ranking(
    counted_4Q: NDArray[np.int64], num_candidates: int, group_Q: NDArray[np.int64]
) -> Ranking:
    before_Q, tied_wrong_Q, tied_right_Q, num_right_Q = counted_4Q
    # The first of r right ones among w wrong ones in random order stands behind w / (r + 1).
    rank_Q = 1 + before_Q + tied_wrong_Q / (tied_right_Q + 1)
    nothing_Q = np.zeros_like(before_Q)
    hits = {k: _hit_chance(k, before_Q, tied_wrong_Q, tied_right_Q) for k in CUTOFFS}
    num_wrong_Q = num_candidates - num_right_Q
    return Ranking(
        recall={k: float(hit_Q.mean()) for k, hit_Q in hits.items()},
        chance={
            k: float(_hit_chance(k, nothing_Q, num_wrong_Q, num_right_Q).mean()) for k in CUTOFFS
        },
        median_rank=float(np.median(rank_Q)),
        mean_rank=float(rank_Q.mean()),
        num_queries=len(rank_Q),
        num_candidates=num_candidates,
        hits=hits,
        group=group_Q,
    )


def _hit_chance(
    k: int,
    before_Q: NDArray[np.int64],
    wrong_Q: NDArray[np.int64],
    right_Q: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Returns each query's probability that one of the first k places is a right candidate.

    ``before`` wrong candidates come first, then ``wrong`` and ``right`` ones in random order.
    """
    miss_Q = np.ones(len(before_Q))
    for place in range(k):
        # Places already taken from the shuffled part; negative while `before` fills them.
        drawn_Q = place - before_Q
        left_Q = wrong_Q - drawn_Q
        share_Q = np.maximum(left_Q, 0) / np.maximum(left_Q + right_Q, 1)
        miss_Q = np.where(drawn_Q >= 0, miss_Q * share_Q, miss_Q)
    return 1 - miss_Q


def bootstrap(
    hits_Q: NDArray[np.floating],
    groups_Q: NDArray[np.integer] | None = None,
    *,
    samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns a confidence interval of the mean, by drawing queries anew (percentile bootstrap).

    Args:
        hits_Q: One number a query, such as ``Ranking.hits[1]``.
        groups_Q: Queries with the same number are drawn together, as they are not independent: the
            captions of one video. None draws each query by itself.
        samples: Draws.
        level: Share of the draws inside the interval.
        seed: Equal seeds give equal intervals.

    Raises:
        ValueError: If there is no query.
    """
    hits_Q = np.asarray(hits_Q, dtype=np.float64)
    if not len(hits_Q):
        raise ValueError("there is no query")
    if groups_Q is None:
        groups_Q = np.arange(len(hits_Q))
    _, group_Q = np.unique(groups_Q, return_inverse=True)
    sums_G, sizes_G = np.bincount(group_Q, weights=hits_Q), np.bincount(group_Q)
    # Groups that are alike need not be told apart: how often each likeness is drawn is multinomial,
    # which costs the same for a hundred queries and for a hundred thousand.
    alike, counts = np.unique(np.stack([sums_G, sizes_G], axis=1), axis=0, return_counts=True)
    share = counts / counts.sum()
    drawn = np.random.default_rng(seed).multinomial(len(sums_G), share, size=samples)
    means = (drawn @ alike[:, 0]) / (drawn @ alike[:, 1])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
