# SPDX-License-Identifier: Apache-2.0
"""Features of videos and of class names -> how often the right class is named.

N clips, K classes, S sentences a class, E embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from training.evaluation.retrieval import rank_scores

_TEMPLATES = Path(__file__).parent / "templates.yaml"


@dataclass(frozen=True)
class Classification:
    """Shares in [0, 1]; where classes tie, the expectation over a random order."""

    top1: float
    top5: float
    chance: float
    """Top-1 of a random guess."""
    num_clips: int
    num_classes: int
    hits: NDArray[np.float64]
    """Each clip's top-1, for `training.evaluation.retrieval.bootstrap`."""

    @property
    def mean(self) -> float:
        """Returns (top-1 + top-5) / 2, which the InternVid paper reports as AVG."""
        return (self.top1 + self.top5) / 2

    def values(self) -> dict[str, float]:
        """Returns all numbers under flat names."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean": self.mean,
            "chance": self.chance,
            "clips": self.num_clips,
            "classes": self.num_classes,
        }

    def headline(self) -> str:
        """Returns the one number to look at: ``top-1 60.1 % (chance 0.2 %, 240.4x)``."""
        times = self.top1 / self.chance
        return f"top-1 {100 * self.top1:.1f} % (chance {100 * self.chance:.1f} %, {times:.1f}x)"


def read_templates(name: str = "action") -> tuple[str, ...]:
    """Returns sentences with a place for a class name, from ``templates.yaml`` beside this file."""
    return tuple(yaml.safe_load(_TEMPLATES.read_text(encoding="utf-8"))[name])


def class_features(
    encode_texts: Callable[[list[str]], torch.Tensor],
    classes: Sequence[str],
    templates: Sequence[str],
) -> torch.Tensor:
    """Returns for each class the mean of its sentences' features, float32 [K, E].

    The mean is not normalised: a cosine with it times its length is the mean of the cosines.

    Source: released evaluation code of ViCLIP and InternVideo2 (mean over the prompts of the scores).

    Args:
        encode_texts: Sentences -> unit-length features, float32 [N, E].
        classes: Names.
        templates: Sentences with ``{}``.
    """
    sentences = [template.replace("{}", name) for name in classes for template in templates]
    features = encode_texts(sentences)
    return features.view(len(classes), len(templates), -1).mean(dim=1)


def classify(
    video_NE: torch.Tensor, class_KE: torch.Tensor, label_N: torch.Tensor
) -> Classification:
    """Returns how often the right class has the highest score, or is among the five highest.

    Args:
        video_NE: Features of clips.
        class_KE: From `class_features`.
        label_N: int64, the right class.
    """
    return score_classes(video_NE.float() @ class_KE.float().T, label_N)


def score_classes(scores_NK: torch.Tensor, label_N: torch.Tensor) -> Classification:
    """Returns the same for scores of any origin; higher is likelier."""
    num_clips, num_classes = scores_NK.shape
    pairs = np.stack([np.arange(num_clips), label_N.cpu().numpy()], axis=1)

    def scores(start: int, stop: int) -> torch.Tensor:
        return scores_NK[start:stop]

    ranking = rank_scores(scores, pairs, num_clips, num_classes)
    return Classification(
        ranking.recall[1],
        ranking.recall[5],
        ranking.chance[1],
        num_clips,
        num_classes,
        ranking.hits[1],
    )
