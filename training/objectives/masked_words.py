# SPDX-License-Identifier: Apache-2.0
"""Words are hidden, and found again by looking at video or sound.

BERT's masking (Devlin et al. 2019, section 3.1) with the share of the released code of InternVideo2's
second stage, half of the words instead of 15 %.

B texts, L tokens, W masked words of all texts, V words of the vocabulary.
"""

import torch
import torch.nn.functional as F

from dataengine.networks.bert import PAD
from training.distributed import gather, world_size

IGNORED = -100
"""The label of a token that is not asked about."""

_MASKED, _REPLACED = 0.8, 0.5
"""Of the chosen words, four fifths become ``[MASK]``, half of the others any word at all."""


def mask_words(
    tokens_BL: torch.Tensor, probability: float, vocab_size: int, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns texts with hidden words, and what they were; torch's default generator draws.

    Every token is chosen by itself, but for padding and the first of a text, ``[CLS]``. The last one,
    ``[SEP]``, may be chosen, as published.

    Args:
        tokens_BL: int64, padded with 0.
        probability: Of a token to be chosen. Of those, 80 % become ``mask_id``, 10 % a random one of
            all ``vocab_size`` words, and 10 % stay as they are.
        vocab_size: Number of words.
        mask_id: The id of ``[MASK]``.

    Returns:
        int64 [B, L], and int64 [B, L] that is `IGNORED` where nothing is asked.
    """
    chosen_BL = torch.bernoulli(torch.full(tokens_BL.shape, probability)).bool()
    masked_BL = torch.bernoulli(torch.full(tokens_BL.shape, _MASKED)).bool()
    replaced_BL = torch.bernoulli(torch.full(tokens_BL.shape, _REPLACED)).bool()
    random_BL = torch.randint(vocab_size, tokens_BL.shape)
    # Drawn on the CPU, whose generator is the same on all machines.
    chosen_BL, masked_BL, replaced_BL, random_BL = (
        drawn.to(tokens_BL.device, non_blocking=True)
        for drawn in (chosen_BL, masked_BL, replaced_BL, random_BL)
    )
    chosen_BL &= tokens_BL != PAD
    chosen_BL[:, 0] = False
    hidden_BL = torch.where(chosen_BL & replaced_BL, random_BL, tokens_BL)
    hidden_BL = torch.where(chosen_BL & masked_BL, mask_id, hidden_BL)
    return hidden_BL, torch.where(chosen_BL, tokens_BL, IGNORED)


def masked_word_loss(logits_WV: torch.Tensor, labels_W: torch.Tensor) -> torch.Tensor:
    """Returns this process' share of the mean cross entropy over the masked words of all processes.

    The mean over processes is the loss of the whole batch, and so is the mean of gradients, however
    many masked words each process has; given the same masks, one process and many agree.

    Args:
        logits_WV: Scores of the words, for masked ones alone; W may be 0.
        labels_W: What they were.
    """
    summed = F.cross_entropy(logits_WV.float(), labels_W, reduction="sum")
    count = torch.tensor([len(labels_W)], dtype=torch.float32, device=logits_WV.device)
    return summed * world_size() / gather(count).sum().clamp(min=1)
