# SPDX-License-Identifier: Apache-2.0
"""What a step costs in multiplications, counted by torch, and what devices can do."""

from typing import NamedTuple

import torch

from training.config import MediaKind, TrainConfig

_PEAK = (
    ("A100", 312),
    ("A10G", 70),
    ("A10", 125),
    ("A40", 150),
    ("A6000", 155),
    ("B200", 2250),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200", 989),
    ("H800", 989),
    ("GH200", 989),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)
"""Part of a device's name -> dense bfloat16 TFLOPS by NVIDIA's data sheets; the first that fits."""


class Flops(NamedTuple):
    """Floating point operations a clip, a multiplication with its addition being two."""

    forward: float
    training: float
    """Forward and backward, without what checkpointed activations compute again."""


def peak_flops(device: torch.device) -> float | None:
    """Returns a GPU's dense bfloat16 FLOPs a second; None for a CPU and a GPU that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for part, tera in _PEAK if part in name), None)


def step_flops(config: TrainConfig, kind: MediaKind) -> Flops | None:
    """Returns what a clip of a kind costs; None if it cannot be counted."""
    return None
