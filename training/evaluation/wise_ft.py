# SPDX-License-Identifier: Apache-2.0
"""Weights between those a model started from and those it learnt."""

from collections.abc import Mapping

import torch

from dataengine.errors import ConfigError

KEPT = "temporal_positional_embedding"
"""Starts as zeros and is all a model knows of time: halved, it would mean something else."""


def interpolate(
    tuned: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Returns ``alpha * tuned + (1 - alpha) * initial`` for every weight but the temporal embedding.

    Alpha 1 is the trained model, 0 the one that it started from. ViCLIP's reported zero-shot numbers are
    of alpha 0.5 between the trained weights and CLIP's.

    Source: WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903); released evaluation settings of ViCLIP.

    Raises:
        ConfigError: If the models differ in a weight's name or shape, or alpha lies outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"WiSE-FT's alpha {alpha} must lie between 0 and 1")
    problems = [f"only one has {name}" for name in sorted(tuned.keys() ^ initial.keys())]
    problems += [
        f"{name} is {list(tuned[name].shape)} in one and {list(initial[name].shape)} in the other"
        for name in sorted(tuned.keys() & initial.keys())
        if tuned[name].shape != initial[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"The two models do not fit: {'; '.join(problems[:3])}{more}",
            "WiSE-FT needs the model that training started from, of the same shape",
        )
    mixed = {}
    for name, weight in tuned.items():
        if name.endswith(KEPT) or not weight.is_floating_point():
            mixed[name] = weight.clone()
        else:
            other = initial[name].to(weight.device, weight.dtype)
            mixed[name] = alpha * weight + (1 - alpha) * other
    return mixed
