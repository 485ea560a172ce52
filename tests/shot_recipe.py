# SPDX-License-Identifier: Apache-2.0
"""Weights and frames for the shot networks that anyone can make again, to compare numbers.

`tests/data/autoshot.json` holds what the published network (wentaozhu/AutoShot, commit 77c82ff)
gives for them in its own windows: `recipe_weights` of its state dict without ``fc1.*`` and
``*.num_batches_tracked``, which it does not use, over `recipe_frames`.
"""

import cv2
import numpy as np


def recipe_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns float32 weights, drawn from one generator in the order of the sorted names."""
    rng = np.random.default_rng(2023)
    weights = {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            values = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            values = 0.1 * rng.standard_normal(shape)
        else:
            values = 1.25 * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        weights[key] = values.astype(np.float32)
    return weights


def recipe_frames(num: int) -> np.ndarray:
    """Returns uint8 [num, 27, 48, 3]: shots of 8 to 39 frames, of blurred blocks that drift."""
    rng = np.random.default_rng(48)
    frames: list[np.ndarray] = []
    while len(frames) < num:
        blocks = rng.integers(0, 256, (5, 8, 3), np.uint8)
        scene = cv2.resize(blocks, (64, 40), interpolation=cv2.INTER_NEAREST).astype(np.int64)
        for i in range(int(rng.integers(8, 40))):
            seen = scene[i % 13 : i % 13 + 27, i % 16 : i % 16 + 48]
            noisy = seen + rng.integers(-6, 7, seen.shape)
            frames.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return np.stack(frames[:num])
