# SPDX-License-Identifier: Apache-2.0
"""Scores of a question's options -> accuracy, or mean average precision where several are right.

N questions, O options.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Accuracy:
    """Share of questions whose best-scored option is right, in [0, 1]; ties are halved fairly."""

    accuracy: float
    chance: float
    num_questions: int
    hits: NDArray[np.float64]
    """Each question's probability to be answered right, for `training.evaluation.retrieval.bootstrap`."""

    def values(self) -> dict[str, float]:
        """Returns all numbers under flat names."""
        return {
            "accuracy": self.accuracy,
            "chance": self.chance,
            "questions": self.num_questions,
        }

    def headline(self) -> str:
        """Returns the one number to look at: ``accuracy 90.0 % (chance 20.0 %, 4.5x)``."""
        share, chance = 100 * self.accuracy, 100 * self.chance
        return f"accuracy {share:.1f} % (chance {chance:.1f} %, {share / chance:.1f}x)"


@dataclass(frozen=True)
class MeanPrecision:
    """Mean over options of the average precision with which its videos are found, in [0, 1]."""

    mean_average_precision: float
    chance: float
    """Of a random order, about: the mean share of right videos."""
    num_questions: int
    num_options: int
    """Options that are right for a video at least; the others have no precision."""

    def values(self) -> dict[str, float]:
        """Returns all numbers under flat names."""
        return {
            "map": self.mean_average_precision,
            "chance": self.chance,
            "questions": self.num_questions,
            "options": self.num_options,
        }

    def headline(self) -> str:
        """Returns the one number to look at: ``mAP 20.0 % (chance 4.3 %, 4.7x)``."""
        share, chance = 100 * self.mean_average_precision, 100 * self.chance
        return f"mAP {share:.1f} % (chance {chance:.1f} %, {share / chance:.1f}x)"


def accuracy(scores: Sequence[NDArray[np.floating]], answers: Sequence[frozenset[int]]) -> Accuracy:
    """Returns how often the option with the highest score is right.

    Args:
        scores: One array a question, of as many options as it has.
        answers: The right options of each, at least one.
    """
    hits, chances = [], []
    for score_O, right in zip(scores, answers, strict=True):
        best = np.flatnonzero(score_O == score_O.max())
        hits.append(np.mean([option in right for option in best]))
        chances.append(len(right) / len(score_O))
    return Accuracy(float(np.mean(hits)), float(np.mean(chances)), len(hits), np.array(hits))


def mean_average_precision(
    scores_NO: NDArray[np.floating], answers: Sequence[frozenset[int]]
) -> MeanPrecision:
    """Returns the mean over options of how well the option's score finds its videos.

    Average precision is the mean, over the videos of an option, of the share of right ones among all
    videos scored at least as high. Questions without a right option count as wrong videos for all.

    Args:
        scores_NO: All questions have the same options.
        answers: The right options of each.
    """
    right_NO = np.zeros(scores_NO.shape, dtype=bool)
    for row, right in enumerate(answers):
        right_NO[row, list(right)] = True
    precisions, shares = [], []
    for score_N, right_N in zip(scores_NO.T, right_NO.T, strict=True):
        if not right_N.any():
            continue
        order = np.argsort(-score_N, kind="stable")
        ordered, found = score_N[order], np.cumsum(right_N[order])
        # All videos of one score stand at the last place of them: their order is not known.
        place = np.searchsorted(-ordered, -ordered, side="right")
        precision = found[place - 1] / place
        precisions.append(precision[right_N[order]].mean())
        shares.append(right_N.mean())
    return MeanPrecision(
        float(np.mean(precisions)), float(np.mean(shares)), len(scores_NO), len(precisions)
    )
