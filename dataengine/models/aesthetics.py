# SPDX-License-Identifier: Apache-2.0
"""CLIP image embeddings -> how people would rate the picture, about 1 (bad) to 10 (good).

LAION's predictors (Schuhmann et al. 2022, LAION-5B, section on LAION-Aesthetics; InternVid section 3.3
scores its clips with them): version 1 is one linear layer, version 2 ("improved") five of them, with
or without ReLU between. All read unit-length embeddings of one of OpenAI's CLIPs, and mean nothing on any
other's.

N pictures, D embedding width.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.clip import ClipScorer, ClipScorerConfig
from dataengine.needs import Need, Weights
from dataengine.stage import Settings

HEADS = Path(__file__).parent / "aesthetics_heads"
BUNDLED_HEAD = HEADS / "sa_0_4_vit_l_14_linear.pth"
"""Version 1 for ViT-L/14; ships in this package, see the NOTICE beside it."""

_PLAIN_LAYERS = (0, 2, 4, 6, 7)
_RELU_LAYERS = (0, 3, 6, 9, 11)

_TRAINED_ON = {
    "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba": "openai/ViT-L-14",
    "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0": "openai/ViT-B-16",
    "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f": "openai/ViT-B-32",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0": "openai/ViT-L-14",
    "390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff": "openai/ViT-L-14",
    "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4": "openai/ViT-L-14",
}
"""SHA-256 of the published files -> CLIP they were trained on. In order: ``sa_0_4_vit_l_14_linear``,
``sa_0_4_vit_b_16_linear``, ``sa_0_4_vit_b_32_linear``, ``sac+logos+ava1-l14-linearMSE``,
``ava+logos-l14-linearMSE``, ``ava+logos-l14-reluMSE``."""


class AestheticsConfig(Settings):
    """LAION's aesthetic predictors."""

    head: str = ""
    """Weights of the predictor, a file; empty takes version 1 for ViT-L/14, which ships."""
    model: ClipScorerConfig | None = None
    """CLIP whose embeddings are judged; None takes those of the scorer."""
    any_clip: bool = False
    """Judges embeddings although they are not known to be of the CLIP the head was trained on."""

    def needs(self) -> tuple[Need, ...]:
        """Returns the head, if it does not ship; its CLIP speaks for itself."""
        return (Weights("file", self.head),) if self.head else ()


@dataclass(frozen=True)
class AestheticHead:
    """A predictor: affine layers, with ReLU between them or not.

    Attributes:
        name: File name without its ending.
        sha256: Of the file.
        layers: Weight [out, in] and bias [out] of each, float32; the last has one output.
        relu: Whether what is below zero is cut off between the layers.
    """

    name: str
    sha256: str
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    relu: bool

    @property
    def width(self) -> int:
        """D that is read."""
        return self.layers[0][0].shape[1]

    @property
    def trained_on(self) -> str:
        """CLIP whose embeddings it reads, empty if the file is not a published one."""
        return _TRAINED_ON.get(self.sha256, "")

    def score(self, image_ND: np.ndarray) -> np.ndarray:
        """Returns the score of each unit embedding, float32 [N]."""
        x = np.asarray(image_ND, np.float32)
        for number, (weight, bias) in enumerate(self.layers):
            x = x @ weight.T + bias
            if self.relu and number < len(self.layers) - 1:
                x = np.maximum(x, 0)
        return x[:, 0]

    def check_fits(self, scorer: ClipScorer, any_clip: bool) -> None:
        """Raises DependencyError unless a scorer's embeddings are what this head was trained on."""
        wanted = self.trained_on or f"a CLIP of width {self.width}"
        problem = f"Aesthetic head {self.name} reads embeddings of {wanted}, {scorer.model} "
        if scorer.width != self.width:
            raise DependencyError(
                f"{problem}gives {scorer.width} numbers instead of {self.width}",
                _hint(self.trained_on),
            )
        if self.trained_on and scorer.origin != self.trained_on and not any_clip:
            raise DependencyError(
                f"{problem}is {scorer.origin or 'not known to be that'}",
                f"{_hint(self.trained_on)}, or any_clip: true if these are its weights",
            )


def load_head(config: AestheticsConfig) -> AestheticHead:
    """Reads a head whole: every key must be known and every shape must fit the next.

    Raises:
        DependencyError: If the file is missing or is not one of the predictors.
    """
    import torch

    path = Path(config.head) if config.head else BUNDLED_HEAD
    try:
        data = path.read_bytes()
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # torch raises all kinds for files that are no weights
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"Aesthetic head cannot be read: {path} ({problem})",
            "name a .pth file of LAION's aesthetic predictors",
        ) from error
    pairs, relu = _layers_of(arrays, path)
    layers = tuple((arrays[weight], arrays[bias]) for weight, bias in pairs)
    shapes = [(weight.shape, bias.shape) for weight, bias in layers]
    chained = all(after[0][1:] == before[0][:1] for before, after in pairwise(shapes))
    flat = all(len(weight) == 2 and bias == weight[:1] for weight, bias in shapes)
    if not (flat and chained and shapes[-1][1] == (1,)):
        raise DependencyError(
            f"Aesthetic head {path} has layers of shapes that do not fit: {shapes}",
            "the file is damaged: fetch it again",
        )
    return AestheticHead(path.stem, hashlib.sha256(data).hexdigest(), layers, relu)


def _layers_of(arrays: dict[str, np.ndarray], path: Path) -> tuple[list[tuple[str, str]], bool]:
    """Returns the names of each layer's weight and bias, and whether ReLU is between the layers.

    Which predictor a file holds shows in its keys alone: layers between which there was a ReLU and a
    dropout are three apart.
    """
    if "layers.0.weight" in arrays:
        relu = "layers.3.weight" in arrays or "layers.9.weight" in arrays
        numbers = _RELU_LAYERS if relu else _PLAIN_LAYERS
        pairs = [(f"layers.{number}.weight", f"layers.{number}.bias") for number in numbers]
    else:
        pairs, relu = [("weight", "bias")], False
    wanted = {name for pair in pairs for name in pair}
    problems = [f"missing {name}" for name in sorted(wanted - set(arrays))]
    problems += [f"unexpected {name}" for name in sorted(set(arrays) - wanted)]
    if problems:
        raise DependencyError(
            f"Weights of {path} do not fit an aesthetic head: {', '.join(problems[:6])}",
            "name a .pth file of LAION's aesthetic predictors",
        )
    return pairs, relu


def _hint(trained_on: str) -> str:
    if not trained_on:
        return "name the CLIP it was trained on in aesthetics.model"
    name = trained_on.partition("/")[2]
    return f"write aesthetics: {{model: {{model: {name}-quickgelu, pretrained: openai}}}}"
