# SPDX-License-Identifier: Apache-2.0
"""What a step costs in multiplications, counted by torch, and what devices can do."""

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


def peak_flops(device: torch.device) -> float | None:
    """Returns a GPU's dense bfloat16 FLOPs a second; None for a CPU and a GPU that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for part, tera in _PEAK if part in name), None)


def training_flops(config: TrainConfig, kind: MediaKind) -> float:
    """Returns what the model computes for a clip, forward and backward.

    What checkpointed activations compute again is not counted: it is no work of the model's.
    """
    # Imported late: only a GPU whose peak is known asks for it.
    from training.rehearsal import Rehearsal

    return Rehearsal(config, checkpoint_activations=False).flops(kind)
