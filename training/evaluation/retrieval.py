# SPDX-License-Identifier: Apache-2.0
"""Features -> how often the right clip or caption is among the first k.

Captions that read the same are one caption: text-to-video asks each distinct caption once and
counts the best placed of its clips, video-to-text ranks the distinct captions.

Where candidates tie, the order is taken to be random and what is reported is the expectation, so
a model that gives everything the same score gets exactly the chance that stands beside it.

Q queries, C candidates, E embedding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class Ranking:
    """One direction of retrieval; shares in [0, 1]."""

    recall: dict[int, float]
    """Share of queries with a right candidate among the first k."""
    chance: dict[int, float]
    """The same for a random order of the same candidates."""
    median_rank: float
    """Of the best right candidate, 1 is first."""
    num_queries: int
    num_candidates: int

    def describe(self) -> str:
        """Returns one line: recalls with chance beside them, and the median rank."""
        parts = [
            f"R@{k} {100 * self.recall[k]:.1f} % (chance {100 * self.chance[k]:.1f} %, "
            f"{self.recall[k] / self.chance[k]:.1f}x)"
            for k in CUTOFFS
        ]
        return f"{'  '.join(parts)}  median rank {self.median_rank:g} of {self.num_candidates}"


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
        return flat | {f"{n}_median_rank": r.median_rank for n, r in named.items()}


def retrieval(video_E: torch.Tensor, text_E: torch.Tensor, caption_id: torch.Tensor) -> Retrieval:
    """Returns both directions for clips and their captions, one row of each a clip.

    Args:
        video_E: Unit-length features [clips, E].
        text_E: Unit-length features of the captions [clips, E].
        caption_id: int64 [clips], equal for captions that read the same.
    """
    ids, text_of_clip = np.unique(caption_id.cpu().numpy(), return_inverse=True)
    first_of_text = np.array([np.flatnonzero(text_of_clip == i)[0] for i in range(len(ids))])
    texts_E = text_E[torch.from_numpy(first_of_text).to(text_E.device)]
    similarity = (texts_E.float() @ video_E.float().T).cpu().numpy()
    right = np.arange(len(ids))[:, None] == text_of_clip
    return Retrieval(rank_candidates(similarity, right), rank_candidates(similarity.T, right.T))


def rank_candidates(similarity_QC: NDArray[np.floating], right_QC: NDArray[np.bool_]) -> Ranking:
    """Returns the recalls of a matrix of similarities.

    Args:
        similarity_QC: Higher is closer.
        right_QC: Which candidates answer a query; at least one each.

    Raises:
        ValueError: If a similarity is not finite or a query has no answer.
    """
    if not np.isfinite(similarity_QC).all():
        raise ValueError("similarities must be finite")
    num_right_Q = right_QC.sum(axis=1)
    if not len(similarity_QC) or (num_right_Q == 0).any():
        raise ValueError("every query needs a right candidate")
    num_candidates = similarity_QC.shape[1]
    best_Q = np.where(right_QC, similarity_QC, -np.inf).max(axis=1, keepdims=True)
    tied_QC = similarity_QC == best_Q
    before_Q = (similarity_QC > best_Q).sum(axis=1)
    tied_wrong_Q = (tied_QC & ~right_QC).sum(axis=1)
    tied_right_Q = (tied_QC & right_QC).sum(axis=1)
    # The first of r right ones among w wrong ones in random order stands behind w / (r + 1).
    rank_Q = 1 + before_Q + tied_wrong_Q / (tied_right_Q + 1)
    nothing_Q = np.zeros_like(before_Q)
    return Ranking(
        recall={k: _hit_share(k, before_Q, tied_wrong_Q, tied_right_Q) for k in CUTOFFS},
        chance={
            k: _hit_share(k, nothing_Q, num_candidates - num_right_Q, num_right_Q) for k in CUTOFFS
        },
        median_rank=float(np.median(rank_Q)),
        num_queries=len(similarity_QC),
        num_candidates=num_candidates,
    )


def _hit_share(
    k: int,
    before_Q: NDArray[np.int64],
    wrong_Q: NDArray[np.int64],
    right_Q: NDArray[np.int64],
) -> float:
    """Returns the mean probability that one of the first k places is a right candidate.

    ``before`` wrong candidates come first, then ``wrong`` and ``right`` ones in random order.
    """
    miss_Q = np.ones(len(before_Q))
    for place in range(k):
        # Places already taken from the shuffled part; negative while `before` fills them.
        drawn_Q = place - before_Q
        left_Q = wrong_Q - drawn_Q
        share_Q = np.maximum(left_Q, 0) / np.maximum(left_Q + right_Q, 1)
        miss_Q = np.where(drawn_Q >= 0, miss_Q * share_Q, miss_Q)
    return float(1 - miss_Q.mean())
