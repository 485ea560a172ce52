# SPDX-License-Identifier: Apache-2.0
"""Frames and text -> CLIP embeddings, whose cosine says how well they fit.

Legend: F frames of all clips, B clips or texts, C channels, S side of the model's square input,
D embedding width.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from dataengine.errors import DependencyError
from dataengine.models.answers import Batcher, Failure
from dataengine.models.known_pairs import KNOWN_PAIRS, check_known_pairs
from dataengine.models.pretrained import torch_device
from dataengine.needs import Need, Package, Weights
from dataengine.stage import Settings

LOCAL_SCHEMA = "local-dir:"
"""Prefix of a folder that holds ``open_clip_config.json`` and weights."""

HUB_SCHEMA = "hf-hub:"
"""Prefix of a model on the Hugging Face hub."""

BUNDLED_CLIP = Path(__file__).parent / "tiny_clip"
"""The small model that ships in this package."""

OPENAI = "openai"
"""open_clip's name for the weights OpenAI released."""

_QUICKGELU = "-quickgelu"

_HUB_OPENAI = {
    "timm/vit_base_patch32_clip_224.openai": "ViT-B-32",
    "timm/vit_base_patch16_clip_224.openai": "ViT-B-16",
    "timm/vit_large_patch14_clip_224.openai": "ViT-L-14",
    "timm/vit_large_patch14_clip_336.openai": "ViT-L-14-336",
}
"""Where open_clip fetches OpenAI's weights from."""

_PACKAGE = Package("open_clip", "uv sync --extra ingest")


class ClipScorer(Protocol):
    """Embeds pictures and texts in one space.

    A picture is prepared by itself, in any thread, and embedded with others.
    """

    model: str
    revision: str
    origin: str
    """Whose weights these are, e.g. ``openai/ViT-L-14``, where that is known; else empty."""
    width: int
    """D."""

    @property
    def batch_size(self) -> int:
        """Most pictures or texts in one call of the model."""
        ...

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """Returns what the model sees of a uint8 RGB HWC frame of any size, uint8 [3, S, S]."""
        ...

    def embed_images(self, prepared: Sequence[np.ndarray]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per prepared picture."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per text."""
        ...


class OpenClipConfig(Settings):
    """Any model of open_clip."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = ""
    """``local-dir:FOLDER``, ``hf-hub:OWNER/NAME`` or a name open_clip knows; empty takes the small
    model of this package."""
    pretrained: str = ""
    """Weights for a plain model name: a tag (``openai``) or a file. With a schema, leave empty."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=64, ge=1)
    """Most pictures in one call of the model."""
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    @model_validator(mode="after")
    def _fits(self) -> "OpenClipConfig":
        if self.pretrained and (
            not self.model or self.model.startswith((LOCAL_SCHEMA, HUB_SCHEMA))
        ):
            raise ValueError(
                f"pretrained ({self.pretrained}) belongs to a plain model name; leave it empty"
            )
        if self.pretrained == OPENAI and not self.model.endswith(_QUICKGELU):
            raise ValueError(
                f"OpenAI's weights were trained with QuickGELU: write model: {self.model}{_QUICKGELU}"
            )
        return self

    def needs(self) -> tuple[Need, ...]:
        """Returns open_clip, and the weights unless they ship with this package."""
        if not self.model:
            return (_PACKAGE,)
        return (_PACKAGE, Weights("open_clip", self.model, self.pretrained))


ClipScorerConfig = OpenClipConfig
"""The families of scorers; a second kind makes this a union on ``kind``."""


def mean_cosines(
    image_FD: np.ndarray, text_BD: np.ndarray, frames_per_clip: Sequence[int]
) -> list[float]:
    """Returns each clip's mean cosine of its text and its frames, in [-1, 1].

    Args:
        image_FD: Unit embeddings of all frames, clip after clip.
        text_BD: Unit embeddings of the texts.
        frames_per_clip: How many rows of ``image_FD`` belong to each text; at least 1 each.
    """
    if sum(frames_per_clip) != len(image_FD) or len(frames_per_clip) != len(text_BD):
        raise ValueError(
            f"{len(image_FD)} images and {len(text_BD)} texts for {list(frames_per_clip)} frames"
        )
    clip_of_frame = np.repeat(np.arange(len(text_BD)), frames_per_clip)
    cosines = np.einsum("fd,fd->f", image_FD, text_BD[clip_of_frame])
    means = np.bincount(clip_of_frame, cosines, len(text_BD)) / np.asarray(frames_per_clip)
    return [float(value) for value in np.clip(means, -1.0, 1.0)]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns float32 vectors [..., D] of length 1 in the same direction."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def weights_file(folder: Path) -> Path:
    """Returns the weights in a model folder under the name open_clip looks for first.

    Raises:
        DependencyError: If the folder is not a model.
    """
    if not (folder / "open_clip_config.json").is_file():
        raise DependencyError(
            f"Not an open_clip model folder: {folder} (no open_clip_config.json)",
            "name another model for the score stage in the pipeline",
        )
    for name in (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "open_clip_pytorch_model.pth",
    ):
        if (folder / name).is_file():
            return folder / name
    raise DependencyError(
        f"No weights in open_clip model folder: {folder}",
        "put open_clip_model.safetensors beside open_clip_config.json",
    )


class OpenClipScorer:
    """A CLIP model in open_clip; float32 on a CPU, bfloat16 autocast on a GPU.

    Weights that lack a key, or have one too many, are an error that names it: a score from a model half
    at random looks like any other. A text longer than the model's context (77 tokens) is cut there by
    open_clip's tokenizer.

    Raises:
        DependencyError: If open_clip is missing, or the model cannot be loaded whole.
    """

    def __init__(self, config: OpenClipConfig) -> None:
        try:
            import open_clip
            import torch
            from torchvision.transforms import Compose
        except ImportError as error:
            raise DependencyError(
                "Missing package: open_clip_torch (score)", _PACKAGE.install
            ) from error
        name = config.model or f"{LOCAL_SCHEMA}{BUNDLED_CLIP}"
        self._device = torch_device(config.device)
        folder = Path(name.removeprefix(LOCAL_SCHEMA)) if name.startswith(LOCAL_SCHEMA) else None
        weights = weights_file(folder) if folder else None
        _check_activation(name, config.pretrained)
        try:
            loaded: Any = open_clip.create_model_from_pretrained(
                name, pretrained=config.pretrained or None
            )
            self._tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, torch and the hub raise all kinds while loading
            problem = " ".join(str(error).split())[:300]
            raise DependencyError(
                f"open_clip model cannot be loaded: {name} ({problem})",
                "name a model of open_clip.list_pretrained(), or local-dir:FOLDER",
            ) from error
        model, preprocess = loaded
        self._model = model.eval().to(self._device)
        # The last two steps, to floats and their normalisation, are the device's work.
        *resize, _, normalise = preprocess.transforms
        self._resize = Compose(resize)
        self._mean = torch.tensor(normalise.mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(normalise.std, device=self._device).view(1, 3, 1, 1)
        self._batcher = Batcher(config.batch_size)
        self.model = scorer_name(config)
        self.revision = _revision(name, config.pretrained, weights)
        self.origin = _origin(name, config.pretrained)
        self.width = len(_answers(self.embed_texts([""]))[0])

    @property
    def batch_size(self) -> int:
        """Most pictures or texts in one call of the model; halved when memory runs out."""
        return self._batcher.size

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """Returns the resized frame, uint8 [3, S, S]."""
        from PIL import Image

        return np.asarray(self._resize(Image.fromarray(frame))).transpose(2, 0, 1)

    def embed_images(self, prepared: Sequence[np.ndarray]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per prepared picture."""
        return self._batcher.run(prepared, self._encode_images)

    def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per text."""
        return self._batcher.run(texts, self._encode_texts)

    def _encode_images(self, prepared: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        import torch

        pixels = torch.from_numpy(np.stack(prepared)).to(self._device)
        with torch.inference_mode(), self._autocast():
            images = (pixels.float() / 255 - self._mean) / self._std
            return self._exact(self._model.encode_image(images, normalize=True))

    def _encode_texts(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        import torch

        tokens = self._tokenizer(list(texts)).to(self._device)
        with torch.inference_mode(), self._autocast():
            return self._exact(self._model.encode_text(tokens, normalize=True))

    def _autocast(self) -> Any:
        import torch

        if not self._device.startswith("cuda"):
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)

    def _exact(self, features: Any) -> Sequence[np.ndarray]:
        # Autocast leaves unit vectors of bfloat16; the cosine is taken of exact ones.
        return list(unit(features.float().cpu().numpy()))


def check_clip(scorer: ClipScorer) -> None:
    """Lets a scorer prove itself on known pairs.

    Raises:
        DependencyError: If it prefers a wrong text more often than `check_known_pairs` allows.
    """
    pictures = [scorer.prepare(pair.draw()) for pair in KNOWN_PAIRS]
    texts = [pair.text for pair in KNOWN_PAIRS]
    check_known_pairs(scorer.model, scorer.embed_images(pictures), scorer.embed_texts(texts))


def scorer_name(config: ClipScorerConfig) -> str:
    """Returns what a scorer calls itself in the provenance, without loading it."""
    name = config.model or f"{LOCAL_SCHEMA}{BUNDLED_CLIP}"
    if name.startswith(LOCAL_SCHEMA):
        name = Path(name.removeprefix(LOCAL_SCHEMA)).name
    return f"{config.kind}:{name}"


def build_clip_scorer(config: ClipScorerConfig) -> ClipScorer:
    """Returns the scorer that a config names; `check_clip` says whether it can be trusted.

    Raises:
        DependencyError: If its package or its weights are missing, or do not fit.
    """
    builders = {"open_clip": OpenClipScorer}
    return builders[config.kind](config)


def _answers(results: Sequence[np.ndarray | Failure]) -> list[np.ndarray]:
    """Returns the results if none failed."""
    for result in results:
        if isinstance(result, Failure):
            raise DependencyError(f"The model cannot be run: {result.reason} {result.detail}")
    return [result for result in results if not isinstance(result, Failure)]


def _check_activation(name: str, pretrained: str) -> None:
    """Raises DependencyError if weights were trained with another activation than the model has.

    open_clip only warns of it; every cosine would be a little off.
    """
    import open_clip

    config = open_clip.get_model_config(name) if ":" not in name else None
    tag = open_clip.get_pretrained_cfg(name, pretrained) if config and pretrained else None
    if not config or not tag:
        return
    trained, built = bool(tag.get("quick_gelu")), bool(config.get("quick_gelu"))
    if trained != built:
        fitting = f"{name}{_QUICKGELU}" if trained else name.removesuffix(_QUICKGELU)
        raise DependencyError(
            f"{name} does not compute what its weights {pretrained} were trained with "
            f"(QuickGELU: {'yes' if trained else 'no'})",
            f"write model: {fitting}",
        )


def _origin(name: str, pretrained: str) -> str:
    """Returns whose weights these are, where the name says it."""
    if pretrained == OPENAI:
        return f"{OPENAI}/{name.removesuffix(_QUICKGELU)}"
    known = _HUB_OPENAI.get(name.removeprefix(HUB_SCHEMA)) if name.startswith(HUB_SCHEMA) else None
    return f"{OPENAI}/{known}" if known else ""


def _revision(name: str, pretrained: str, weights: Path | None) -> str:
    """Returns a hash of local weights (and config), a hub model's commit, or the tag."""
    if name.startswith(HUB_SCHEMA):
        return _hub_commit(name.removeprefix(HUB_SCHEMA))
    config = ""
    if weights is not None:
        described = json.loads((weights.parent / "open_clip_config.json").read_text())
        described.pop("about", None)  # what it was trained on, which changes no score
        config = json.dumps(described, sort_keys=True)
    elif Path(pretrained).is_file():
        weights = Path(pretrained)
    return file_revision(weights, config) if weights is not None else pretrained


def file_revision(weights: Path, described: str = "") -> str:
    """Returns a hash of a weights file, every byte of it, and of what describes it.

    Models that share a frozen part begin alike, so that a file's beginning would not tell them apart.
    """
    import hashlib

    from dataengine.records import digest

    with weights.open("rb") as file:
        return digest(described, hashlib.file_digest(file, "blake2b").digest())


def _hub_commit(name: str) -> str:
    """Returns the commit of the cached files of a hub model, empty if the cache does not say."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "open_clip_config.json")
    return Path(found).parent.name if isinstance(found, str) else ""
