# SPDX-License-Identifier: Apache-2.0
"""Pixels -> colour names, as people use them.

The names are the eleven basic colour terms of English (Berlin and Kay 1969) and cyan. A
pixel gets the name of the nearest of some 140 reference colours in CIELAB: the colours of
CSS Color Module Level 4 whose name says which term they belong to, and dull ones beside them,
since natural light dulls everything: what is left for grey has a chroma below about 7.
"""

from functools import cache

import cv2
import numpy as np

NAMES = (
    "black", "grey", "white", "red", "orange", "brown",
    "yellow", "green", "cyan", "blue", "purple", "pink",
)  # fmt: skip
"""What a colour index stands for."""

ACHROMATIC = frozenset({"black", "grey", "white"})

_REFERENCES = {
    "black": "000000 0a0a0a 141414 1c1c1c 10141c 1a1410 0e1a10 1c1018",
    "grey": "2e2e2e 3c3c3c 4c4c4c 5e5e5e 707070 808080 909090 a0a0a0 b4b4b4 5e6064 949088 8a8c8e",
    "white": "ffffff f5f5f5 e8e8e8 f0f4fa faf5ec d8d8d8 ebe6dc dce4ea cacaca",
    "red": "ff0000 dc143c b22222 c81e1e 8b0000 e63030 a01818 d04040 6e1010 d42424",
    "orange": "ffa500 ff8c00 ff7f50 ff6400 e67820 f08c3c d2691e f6821e d8901e",
    "brown": "8b4513 a0522d 654321 5a3a1e 96693c 7a5230 3e2814 b08050 6b4f3a 8a6c50 4a3424 784822"
    " 8c7a66 5c4e40 b09c84 2c2018",
    "yellow": "ffff00 ffd700 f0e040 e6c832 fff08c d8c020 c8b000 fadc30",
    "green": "008000 00ff00 32cd32 006400 228b22 6b8e23 556b2f 9acd32 90ee90 2e8b57 4c8c4c 203c20"
    " 7a9a5a 486038 103010 30c060 788c70 586854 98ac90",
    "cyan": "00ffff 40e0d0 00ced1 20b2aa 008b8b 48d1cc 006464 80e0e0 5aa0a0 b0e8e8 2cced6",
    "blue": "0000ff 00008b 4169e1 1e90ff 4682b4 6495ed 87ceeb 000080 2040a0 3c64a0 101e50 6a8cbe"
    " a0c4ec 0064c8 2d5f7d 4b7d9b 7da0b9 1e4664 6c7c94 8ea4bc 464e62 b8c8dc",
    "purple": "800080 8a2be2 4b0082 9370db ba55d3 6a3a8c b080d0 301040 9040c0 786c8c 9c90ac",
    "pink": "ffc0cb ff69b4 ff1493 ff00ff db7093 e6a0b4 f078c8 e040a0 ffa0d0 f692bc d0a8b0 e8c4cc",
}


def _lab(rgb: np.ndarray) -> np.ndarray:
    """Returns CIELAB (L 0..100) of RGB values in [0, 1], [..., 3] to [N, 3]."""
    return cv2.cvtColor(rgb.reshape(1, -1, 3).astype(np.float32), cv2.COLOR_RGB2LAB)[0]


@cache
def _table() -> np.ndarray:
    """Returns uint8 [32768]: 5 bits each of R, G and B -> index into NAMES."""
    words = [(name, word) for name, text in _REFERENCES.items() for word in text.split()]
    references = np.array([list(bytes.fromhex(word)) for _, word in words]) / 255
    owner = np.array([NAMES.index(name) for name, _ in words], np.uint8)
    levels = (np.arange(32) * 8 + 4) / 255
    cells = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    # Lightness counts less than hue: a shaded red is still red.
    scale = np.array([0.6, 1.0, 1.0], np.float32)
    cells_lab, references_lab = _lab(cells) * scale, _lab(references) * scale
    distance = (
        (cells_lab**2).sum(axis=1)[:, None]
        - 2 * cells_lab @ references_lab.T
        + (references_lab**2).sum(axis=1)
    )
    return owner[distance.argmin(axis=1)]


def name_pixels(rgb: np.ndarray) -> np.ndarray:
    """Returns uint8 [...]: the index into NAMES of each pixel of a uint8 RGB array [..., 3]."""
    coarse = rgb.astype(np.uint16) >> 3
    return _table()[(coarse[..., 0] << 10) | (coarse[..., 1] << 5) | coarse[..., 2]]


def colour_shares(indices: np.ndarray) -> dict[str, float]:
    """Returns the share of each colour in an array of indices, largest first, zeros left out."""
    counts = np.bincount(indices.ravel(), minlength=len(NAMES)) / max(1, indices.size)
    order = np.argsort(-counts, kind="stable")
    return {NAMES[index]: float(counts[index]) for index in order if counts[index] > 0}
