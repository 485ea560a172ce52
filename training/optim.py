# SPDX-License-Identifier: Apache-2.0
"""AdamW's parameter groups and the learning rate of a step."""

import math

import torch
from torch import nn

from training.config import OptimConfig

_NO_DECAY = ("temp", "logit_scale", "class_embedding", "positional_embedding", "token_embedding")
"""Parts of a name. ViCLIP decays neither 1-D parameters nor embeddings of place; the token table
joins them here because decay would shrink the words a small corpus never shows."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Returns AdamW over the parameters that train; matrices decay, the rest does not."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or any(part in name for part in _NO_DECAY)
            (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Returns the learning rate of a step counted from 0: linear warm-up, then half a cosine.

    It depends on nothing else, so there is no scheduler whose state could be lost.
    """
    warmup = round(total_steps * config.warmup_ratio)
    if step < warmup:
        return config.lr * max(config.min_lr_ratio, (step + 1) / warmup)
    done = (step - warmup) / max(total_steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
