# SPDX-License-Identifier: Apache-2.0
"""How well a CLIP scorer tells a clip's own caption from another clip's.

``python benchmarks/clip_auc.py CORPUS [--model local-dir:FOLDER]`` scores every clip with its own
caption and with captions of other videos, and prints the area under the ROC curve (0.5 is chance)
and how often the own caption wins against one other.
"""

import argparse
import json

import numpy as np

from dataengine.corpus import Corpus
from dataengine.media import jpeg_decode
from dataengine.models.clip import OpenClipConfig, build_clip_scorer
from dataengine.stages.score import spread

NUM_FRAMES = 4


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the share of (positive, negative) pairs in the right order, ties counted half."""
    order = np.sort(negative)
    below = np.searchsorted(order, positive, side="left")
    up_to = np.searchsorted(order, positive, side="right")
    return float(((below + up_to) / 2).mean() / len(negative))


def main() -> None:
    """Scores and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("--model", help="default: the model that ships with the package")
    parser.add_argument("--column", default="caption_video")
    parser.add_argument("--rounds", type=int, default=10, help="other captions per clip")
    arguments = parser.parse_args()

    corpus = Corpus.open(arguments.corpus)
    rows = [row for row in corpus.catalog().to_pylist() if row[arguments.column]]
    config = OpenClipConfig(model=arguments.model) if arguments.model else OpenClipConfig()
    scorer = build_clip_scorer(config)
    clips = []
    for row in rows:
        jpegs = corpus.read_clip(row, ["frames"])["frames"]
        clips.append([jpeg_decode(jpegs[i]) for i in spread(len(jpegs), NUM_FRAMES)])
    captions = np.array([row[arguments.column] for row in rows])
    videos = np.array([row["video_id"] for row in rows])

    matched = np.array(scorer.score(clips, captions.tolist()))
    rng = np.random.default_rng(0)
    shuffled, wins = [], []
    for _ in range(arguments.rounds):
        others = np.array(
            [
                rng.choice(np.flatnonzero((videos != videos[i]) & (captions != captions[i])))
                for i in range(len(rows))
            ]
        )
        scores = np.array(scorer.score(clips, captions[others].tolist()))
        shuffled.append(scores)
        wins.append((matched > scores).mean() + (matched == scores).mean() / 2)
    auc = area_under_curve(matched, np.concatenate(shuffled))
    print(
        f"{len(rows)} clips of {len(set(videos))} videos: own caption {matched.mean():.3f}, "
        f"another's {np.mean(shuffled):.3f}; AUC {auc:.3f}, own caption wins {np.mean(wins):.1%}"
    )
    print(json.dumps({"auc": round(auc, 4), "wins": round(float(np.mean(wins)), 4)}))


if __name__ == "__main__":
    main()
