# SPDX-License-Identifier: Apache-2.0
"""HDR and wide-gamut colours to BT.709: one mapping for sampled frames and for encoded clips.

Without it the frames of an HDR video come out grey and flat, since their codes mean other light. Copied
clips keep their bits and are not touched.

Light is counted in units of SDR white, which is 203 cd/m2 of an HDR picture (ITU-R BT.2408-7, table 1). Up
to `KNEE` it stays as it is; what is brighter is bent so that `PEAK_NITS` becomes white. The curve acts on
the largest of red, green and blue and scales the other two with it, which keeps the hue.
"""

from typing import Literal

import numpy as np

Transfer = Literal["", "pq", "hlg"]

WHITE_NITS = 203.0
PEAK_NITS = 1000.0
"""Brightest light that is told apart from brighter: what HDR is mostly mastered at, and HLG's nominal peak."""
KNEE = 0.5
"""Light below which nothing changes, in units of white."""
DISPLAY_GAMMA = 2.4
"""ITU-R BT.1886."""
CUBE_SIZE = 33
"""Steps along each side of the table for ffmpeg: common for tables of video."""

# ITU-R BT.2087-0, 2.2.
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)


def pq_to_nits(code: np.ndarray) -> np.ndarray:
    """Returns the light of PQ codes in [0, 1], in cd/m2. Source: ITU-R BT.2100-2, table 4."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = np.power(code, 1 / m2)
    return 10_000 * np.power(np.maximum(root - c1, 0) / (c2 - c3 * root), 1 / m1)


def hlg_to_nits(code: np.ndarray) -> np.ndarray:
    """Returns the light of HLG codes [..., 3] in [0, 1], in cd/m2 on a screen of `PEAK_NITS`.

    Source: ITU-R BT.2100-2, table 5.
    """
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(code <= 0.5, code * code / 3, (np.exp((code - c) / a) + b) / 12)
    luma = scene @ _BT2020_LUMA
    return PEAK_NITS * scene * np.power(np.maximum(luma, 1e-6), 0.2)[..., None]


def tone_curve(light: np.ndarray) -> np.ndarray:
    """Returns light in units of SDR white, bent so that the peak becomes 1.

    Above the knee it is the hyperbola that continues the straight line smoothly and reaches 1 at the peak.
    """
    peak = (PEAK_NITS / WHITE_NITS - KNEE) / (1 - KNEE)
    above = np.maximum((light - KNEE) / (1 - KNEE), 0)
    return np.minimum(light, KNEE) + (1 - KNEE) * np.minimum(
        above / (1 + above * (1 - 1 / peak)), 1
    )


def to_bt709(rgb: np.ndarray, transfer: Transfer, wide_gamut: bool) -> np.ndarray:
    """Returns colours as an ordinary BT.709 screen shows them.

    Args:
        rgb: Codes as decoded, float32 [..., 3], R, G, B; clipped to [0, 1].
        transfer: Curve of an HDR picture; empty where the codes are ordinary ones.
        wide_gamut: Whether the primaries are BT.2020's.

    Returns:
        uint8 [..., 3].
    """
    code = np.clip(rgb, 0, 1)
    match transfer:
        case "pq":
            light = pq_to_nits(code) / WHITE_NITS
        case "hlg":
            light = hlg_to_nits(code) / WHITE_NITS
        case "":
            light = np.power(code, DISPLAY_GAMMA)
    if wide_gamut:
        light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    if transfer:
        brightest = light.max(axis=-1, keepdims=True)
        light = light * (tone_curve(brightest) / np.maximum(brightest, 1e-6))
    return np.rint(np.clip(light, 0, 1) ** (1 / DISPLAY_GAMMA) * 255).astype(np.uint8)


def cube(transfer: Transfer, wide_gamut: bool) -> str:
    """Returns the mapping as a ``.cube`` table, for ffmpeg's ``lut3d`` filter."""
    steps = np.linspace(0, 1, CUBE_SIZE, dtype=np.float32)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")  # red changes fastest
    table = to_bt709(np.stack((red, green, blue), -1).reshape(-1, 3), transfer, wide_gamut) / 255
    lines = [f"LUT_3D_SIZE {CUBE_SIZE}", *(f"{r:.5f} {g:.5f} {b:.5f}" for r, g, b in table)]
    return "\n".join(lines) + "\n"
