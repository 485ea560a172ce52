# SPDX-License-Identifier: Apache-2.0
"""AdamW's parameter groups, its state by name, and the learning rate of a step."""

import math
from collections.abc import Callable, Collection

import torch
from torch import nn

from training.config import OptimConfig

Depth = tuple[int, int] | None
"""(depth from 0, number of depths) of a parameter; None is the head."""


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    *,
    no_decay: Collection[str] = (),
    layer_of: Callable[[str], Depth] = lambda name: None,
) -> torch.optim.AdamW:
    """Returns AdamW over the parameters that train; each group has ``lr_scale`` beside ``lr``.

    Matrices decay; 1-D parameters and those of ``no_decay`` do not. Layer decay is BEiT's (Bao et al.
    2021, its released code): the head learns at the full rate, the layer below it at ``layer_decay`` of
    that, the lowest of n at ``layer_decay ** n``.

    Its state exists from the start: then a checkpoint can be read into it before the first step,
    and a parameter that no step has used yet has one too.

    Args:
        model: On its device, spread already.
        config: The recipe's section.
        no_decay: Parts of names.
        layer_of: Depth of a parameter by its name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or any(part in name for part in no_decay)
        depth = layer_of(name)
        scale = config.layer_decay ** (depth[1] - depth[0]) if depth else 1.0
        decay = 0.0 if plain else config.weight_decay
        groups.setdefault((decay, scale), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the optimizer's own tensors as ``<parameter>.<exp_avg, exp_avg_sq, step>``.

    They are named by parameter, so that another number of processes finds its part.
    """
    return {
        f"{name}.{part}": tensor
        for name, parameter in model.named_parameters()
        for part, tensor in optimizer.state.get(parameter, {}).items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group, scaled by its depth."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


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
