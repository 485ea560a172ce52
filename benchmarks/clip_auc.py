# SPDX-License-Identifier: Apache-2.0
"""How well a CLIP scorer tells a clip's own caption from another clip's.

``python benchmarks/clip_auc.py CORPUS [--model local-dir:FOLDER]`` scores every clip with its own
caption and with captions of other videos, and prints the area under the ROC curve (0.5 is chance)
and how often the own caption wins against one other.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dataengine.corpus import Corpus
from dataengine.errors import EngineError
from dataengine.media import jpeg_decode
from dataengine.models.answers import Failure
from dataengine.models.clip import ClipScorer, OpenClipConfig, build_clip_scorer, check_clip
from dataengine.stages.score import spread

NUM_FRAMES = 4


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the share of (positive, negative) pairs in the right order, ties counted half."""
    order = np.sort(negative)
    below = np.searchsorted(order, positive, side="left")
    up_to = np.searchsorted(order, positive, side="right")
    return float(((below + up_to) / 2).mean() / len(negative))


def score_pairs(
    corpus: Corpus,
    scorer: ClipScorer,
    rows: Sequence[Mapping[str, Any]],
    column: str,
    rounds: int,
) -> dict[str, float]:
    """Returns how clips score with their own caption and with captions of other videos.

    Args:
        corpus: Where the clips' frames are.
        scorer: Embeds frames and captions.
        rows: Of the catalog; those without a caption are left out.
        column: The caption.
        rounds: Other captions per clip.

    Returns:
        ``clips``, mean score with the ``own`` and an ``other`` caption, ``auc``, and the share
        ``wins`` of pairs in which the own caption scores higher.
    """
    rows = [row for row in rows if row[column]]
    pictures, clip_of_picture = [], []
    for number, row in enumerate(rows):
        jpegs = corpus.read_clip(dict(row), ["frames"])["frames"]
        for index in spread(len(jpegs), NUM_FRAMES):
            pictures.append(scorer.prepare(jpeg_decode(jpegs[index])))
            clip_of_picture.append(number)
    captions = np.array([row[column] for row in rows])
    videos = np.array([row["video_id"] for row in rows])
    cosines = (
        _vectors(scorer.embed_images(pictures)) @ _vectors(scorer.embed_texts(captions.tolist())).T
    )
    of_clip = np.bincount(clip_of_picture)
    # [clip, caption]: the mean over the clip's frames.
    means = np.stack([np.bincount(clip_of_picture, cosine) for cosine in cosines.T], 1)
    means /= of_clip[:, None]

    matched = np.diag(means)
    rng = np.random.default_rng(0)
    shuffled, wins = [], []
    for _ in range(rounds):
        others = [
            rng.choice(np.flatnonzero((videos != videos[i]) & (captions != captions[i])))
            for i in range(len(rows))
        ]
        scores = means[np.arange(len(rows)), others]
        shuffled.append(scores)
        wins.append((matched > scores).mean() + (matched == scores).mean() / 2)
    return {
        "clips": len(rows),
        "own": float(matched.mean()),
        "other": float(np.mean(shuffled)),
        "auc": area_under_curve(matched, np.concatenate(shuffled)),
        "wins": float(np.mean(wins)),
    }


def _vectors(answers: Sequence[np.ndarray | Failure]) -> np.ndarray:
    """Returns the embeddings [N, D]; a picture or text that failed is none to compare."""
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    if failed:
        raise EngineError(f"{len(failed)} of {len(answers)} could not be embedded: {failed[0]}")
    return np.stack([answer for answer in answers if not isinstance(answer, Failure)])


def main() -> None:
    """Scores and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("--model", help="default: the model that ships with the package")
    parser.add_argument("--pretrained", default="", help="weights for a plain model name")
    parser.add_argument("--column", default="caption_video")
    parser.add_argument("--rounds", type=int, default=10, help="other captions per clip")
    arguments = parser.parse_args()

    corpus = Corpus.open(arguments.corpus)
    config = OpenClipConfig(model=arguments.model or "", pretrained=arguments.pretrained)
    scorer = build_clip_scorer(config)
    check_clip(scorer)
    rows = corpus.catalog().to_pylist()
    scores = score_pairs(corpus, scorer, rows, arguments.column, arguments.rounds)
    print(
        f"{scores['clips']} clips: own caption {scores['own']:.3f}, another's "
        f"{scores['other']:.3f}; AUC {scores['auc']:.3f}, own caption wins {scores['wins']:.1%}"
    )
    print(json.dumps({name: round(scores[name], 4) for name in ("auc", "wins")}))


if __name__ == "__main__":
    main()
