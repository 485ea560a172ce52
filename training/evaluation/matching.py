# SPDX-License-Identifier: Apache-2.0
"""The best candidates of a cheap score, judged again by a model that looks at pairs.

T texts, V videos, P pairs, K candidates a query, N video tokens, L text tokens, D width.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from training.distributed import gather_objects
from training.evaluation.retrieval import NOT_CANDIDATE, BothScores, Scores, blocks
from training.models.task import Matcher

PUBLISHED_CANDIDATES = 128
PAIRS_AT_ONCE = 128
TEXTS_AT_ONCE = 256

VideoBatches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]
"""Starts a pass over this process' videos: numbers int64 [B], and frames [B, T, C, H, W] as a model sees
them, on its device."""


def rerank(
    scores: BothScores,
    matcher: Matcher,
    videos: VideoBatches,
    tokens_TL: torch.Tensor,
    candidates: int = PUBLISHED_CANDIDATES,
) -> BothScores:
    """Returns the matcher's probability for each query's best candidates, and -100 for all others.

    A pair that is a candidate in both directions is judged once. Every process must call it with its
    share of the videos; all get all scores.

    Source: InternVideo2's second stage (its ``_match`` rows, 128 candidates), after ALBEF.

    Args:
        scores: What chooses the candidates; of all texts and all videos.
        matcher: Judges pairs.
        videos: The frames once more: tokens of all videos at once would not fit.
        tokens_TL: int64, the texts.
        candidates: K, at most as many as there are.
    """
    videos_TK = _best(scores.text_to_video, scores.num_texts, scores.num_videos, candidates)
    texts_VK = _best(scores.video_to_text, scores.num_videos, scores.num_texts, candidates)
    by_text = np.arange(scores.num_texts)[:, None] * scores.num_videos + videos_TK
    by_video = np.arange(scores.num_videos)[:, None] + texts_VK * scores.num_videos
    keys_P = np.unique(np.concatenate([by_text.ravel(), by_video.ravel()]))
    pairs = np.stack([keys_P // scores.num_videos, keys_P % scores.num_videos], axis=1)
    judged_P = match_pairs(matcher, videos, tokens_TL, pairs)
    return BothScores(
        _only(videos_TK, judged_P[np.searchsorted(keys_P, by_text)], scores.num_videos),
        _only(texts_VK, judged_P[np.searchsorted(keys_P, by_video)], scores.num_texts),
        scores.num_texts,
        scores.num_videos,
    )


@torch.inference_mode()
def match_pairs(
    matcher: Matcher, videos: VideoBatches, tokens_TL: torch.Tensor, pairs: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns the matcher's probability of each pair, float32 [P].

    Args:
        matcher: Judges pairs.
        videos: This process' videos; all processes' together hold every video of a pair.
        tokens_TL: int64, the texts.
        pairs: int64 [P, 2], text and video.

    Raises:
        ValueError: If the video of a pair is given by no process.
    """
    order = np.argsort(pairs[:, 1], kind="stable")
    text_P, video_P = pairs[order].T
    judged_P = np.full(len(pairs), np.nan, dtype=np.float32)
    states_TLD: torch.Tensor | None = None
    for numbers_B, frames in videos():
        if states_TLD is None:
            states_TLD = _text_states(matcher, tokens_TL, frames.device)
        video_BND = matcher.video_tokens(frames)
        low, high = (
            np.searchsorted(video_P, numbers_B.numpy(), side) for side in ("left", "right")
        )
        places = [np.arange(start, stop) for start, stop in zip(low, high, strict=True)]
        rows = np.concatenate([np.full(len(part), row) for row, part in enumerate(places)])
        wanted = np.concatenate(places)
        for start in range(0, len(wanted), PAIRS_AT_ONCE):
            some = wanted[start : start + PAIRS_AT_ONCE]
            row = torch.from_numpy(rows[start : start + PAIRS_AT_ONCE]).to(frames.device)
            text = torch.from_numpy(text_P[some])
            judged = matcher.match(
                video_BND[row],
                states_TLD[text].to(frames.device),
                tokens_TL[text].to(frames.device),
            )
            judged_P[order[some]] = judged.float().cpu().numpy()
    for others_P in gather_objects(judged_P):
        judged_P = np.where(np.isnan(judged_P), others_P, judged_P)
    if np.isnan(judged_P).any():
        raise ValueError(f"{int(np.isnan(judged_P).sum())} pairs have no video or no probability")
    return judged_P


def _text_states(matcher: Matcher, tokens_TL: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns what the matcher reads of all texts, in main memory, [T, L, D]."""
    parts = [part.to(device) for part in tokens_TL.split(TEXTS_AT_ONCE)]
    return torch.cat([matcher.text_states(part).cpu() for part in parts])


def _best(scores: Scores, num_queries: int, num_candidates: int, k: int) -> NDArray[np.int64]:
    """Returns the best candidates of each query, int64 [Q, K]."""
    k = min(k, num_candidates)
    found = [
        scores(start, stop).topk(k, dim=1).indices.cpu()
        for start, stop in blocks(num_queries, num_candidates)
    ]
    return torch.cat(found).numpy()


def _only(
    candidates_QK: NDArray[np.int64], judged_QK: NDArray[np.float32], num_candidates: int
) -> Scores:
    """Returns scores that know the candidates alone."""
    places_QK, values_QK = torch.from_numpy(candidates_QK), torch.from_numpy(judged_QK)

    def scores(start: int, stop: int) -> torch.Tensor:
        block = torch.full((stop - start, num_candidates), NOT_CANDIDATE)
        return block.scatter_(1, places_QK[start:stop], values_QK[start:stop])

    return scores
