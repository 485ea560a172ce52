# SPDX-License-Identifier: Apache-2.0
"""InfoNCE over the batches of all processes.

b rows of this process, B rows of all, E embedding.

``contrastive_loss`` and ``global_contrastive_loss`` are the same number: the second sees the
whole batch in one process and is the reference, the first sees its own rows and gathers. The
mean over processes of the first is the second, and so is the mean of their gradients, which is
what DDP makes of them. The published training code instead drops the gradient that other
processes ask of a row, which scales the encoders' gradient by 1 / processes and leaves the
temperature's whole.
"""

import torch

from training.config import ContrastiveObjective
from training.data.batch import Pairs
from training.distributed import gather, gather_local, rank, world_size


def contrastive_loss(
    video_bE: torch.Tensor,
    text_bE: torch.Tensor,
    temperature: torch.Tensor,
    pairs: Pairs,
    config: ContrastiveObjective,
) -> torch.Tensor:
    """Returns this process' share of the loss; its mean over processes is the global loss.

    Args:
        video_bE: Unit-length features.
        text_bE: Unit-length features of the captions, same order.
        temperature: Scalar tau by which similarities are divided.
        pairs: This process' rows.
        config: Which rows are no negatives of each other.
    """
    everyone = pairs.gathered()
    # Similarities of unit vectors divided by 0.01 do not fit bfloat16's three digits.
    with torch.autocast(video_bE.device.type, enabled=False):
        if config.gradient == "local":
            parts = gather_local(video_bE), gather_local(text_bE)
            return global_contrastive_loss(*parts, temperature, everyone, config)
        video_BE, text_BE = gather(video_bE), gather(text_bE)
        start = rank() * len(video_bE)
        rows = torch.arange(start, start + len(video_bE), device=video_bE.device)
        targets_bB, allowed_bB = targets(everyone, rows, config)
        scale = 1 / temperature
        summed = _cross_entropy(scale * video_bE @ text_BE.T, targets_bB, allowed_bB)
        summed = summed + _cross_entropy(scale * text_bE @ video_BE.T, targets_bB, allowed_bB)
        return summed * world_size() / (2 * everyone.valid.sum().clamp(min=1))


def global_contrastive_loss(
    video_BE: torch.Tensor,
    text_BE: torch.Tensor,
    temperature: torch.Tensor,
    pairs: Pairs,
    config: ContrastiveObjective,
) -> torch.Tensor:
    """Returns the loss of the whole batch in one process: the reference."""
    rows = torch.arange(len(video_BE), device=video_BE.device)
    targets_BB, allowed_BB = targets(pairs, rows, config)
    logits_BB = video_BE @ text_BE.T / temperature
    summed = _cross_entropy(logits_BB, targets_BB, allowed_BB)
    summed = summed + _cross_entropy(logits_BB.T, targets_BB, allowed_BB)
    return summed / (2 * pairs.valid.sum().clamp(min=1))


def targets(
    pairs: Pairs, rows_b: torch.Tensor, config: ContrastiveObjective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the target distribution and the pairs that take part, for some rows.

    Both relations are symmetric, so the same rows serve video-to-text and text-to-video.

    Args:
        pairs: All B rows.
        rows_b: The b of them that are asked about.
        config: ``positive`` pairs share a row's target equally with its own pair, ``ignore``
            pairs leave the softmax. Positive wins where two rules differ.

    Returns:
        float32 [b, B], rows summing to 1 or, for a row that is not valid, to 0; bool [b, B].
    """
    own_bB = rows_b[:, None] == torch.arange(len(pairs.valid), device=rows_b.device)
    positive_bB, ignored_bB = own_bB.clone(), torch.zeros_like(own_bB)
    for rule, ids in (
        (config.same_caption, pairs.caption_id),
        (config.same_video, pairs.video_id),
    ):
        same_bB = ids[rows_b][:, None] == ids
        if rule == "positive":
            positive_bB |= same_bB
        elif rule == "ignore":
            ignored_bB |= same_bB
    allowed_bB = pairs.valid & (positive_bB | ~ignored_bB)
    # A row needs one allowed column, else its softmax is NaN; its target is zero all the same.
    weight_bB = (positive_bB & allowed_bB & pairs.valid[rows_b][:, None]).float()
    targets_bB = weight_bB / weight_bB.sum(dim=1, keepdim=True).clamp(min=1)
    return targets_bB, allowed_bB | own_bB


def _cross_entropy(
    logits_bB: torch.Tensor, targets_bB: torch.Tensor, allowed_bB: torch.Tensor
) -> torch.Tensor:
    """Returns the sum over rows of the cross entropy over the allowed columns, float32."""
    logits_bB = logits_bB.float().masked_fill(~allowed_bB, float("-inf"))
    # 0 * -inf is NaN: columns that are not allowed have target 0 and must not be multiplied.
    log_bB = logits_bB.log_softmax(dim=1).masked_fill(~allowed_bB, 0.0)
    return -(targets_bB * log_bB).sum()
