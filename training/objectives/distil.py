# SPDX-License-Identifier: Apache-2.0
"""Distance of a student's features to its teachers', over the batches of all processes.

b rows of this process, V tokens, D width.

Source: InternVideo2 (arXiv:2403.15377), section 3.1, and its released training code: the mean of
2 - 2 cos over layers, clips and visible tokens, which is the squared distance of unit vectors.
"""

from collections.abc import Sequence

import torch

from training.distributed import gather, world_size


def distance(
    answers: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], valid_b: torch.Tensor
) -> torch.Tensor:
    """Returns this process' share of the mean distance; its mean over processes is the global one.

    Rows that are not valid are left out, and so the processes' means do not weigh the same: each
    sums its rows and divides by the number of all processes' valid ones.

    Args:
        answers: The student's unit-length features, [b, V, D] or [b, D] each; one for each layer.
        targets: The teacher's, of the same shapes.
        valid_b: bool.
    """
    per_row_b = torch.stack(
        [
            (2 - 2 * (answer.float() * target.float()).sum(dim=-1)).flatten(1).mean(dim=1)
            if answer.ndim > 2
            else 2 - 2 * (answer.float() * target.float()).sum(dim=-1)
            for answer, target in zip(answers, targets, strict=True)
        ]
    ).mean(dim=0)
    summed = torch.where(valid_b, per_row_b, 0.0).sum()
    return summed * world_size() / gather(valid_b).sum().clamp(min=1)
