# SPDX-License-Identifier: Apache-2.0
"""Frames and text -> how well they fit.

Legend: B clips, F frames of all clips, D embedding width.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from dataengine.errors import DependencyError
from dataengine.stage import Settings

LOCAL_SCHEMA = "local-dir:"
"""Prefix of a folder that holds ``open_clip_config.json`` and weights."""

BUNDLED_CLIP = Path(__file__).parent / "tiny_clip"
"""The small model that ships in this package."""


class ClipScorer(Protocol):
    """Measures how well images and text fit."""

    model: str
    revision: str

    def score(self, clips: Sequence[Sequence[np.ndarray]], texts: Sequence[str]) -> list[float]:
        """Returns a score per clip: the mean cosine, in [-1, 1], of its text and its frames.

        Args:
            clips: At least one frame each, uint8 RGB HWC of any size.
            texts: One per clip.
        """
        ...

    def check_known_pair(self, image: np.ndarray, matched: str, mismatched: str) -> None:
        """Raises DependencyError unless the matched text scores higher than the mismatched one."""
        ...


class OpenClipConfig(Settings):
    """Any model of open_clip."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = ""
    """``local-dir:FOLDER``, ``hf-hub:OWNER/NAME`` or a name open_clip knows; empty takes the small
    model of this package."""
    pretrained: str = ""
    """Weights for a plain model name: a tag (``openai``) or a file. With a schema, leave empty."""


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
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise DependencyError(
        f"No weights in open_clip model folder: {folder}",
        "put open_clip_model.safetensors beside open_clip_config.json",
    )


class OpenClipScorer:
    """A CLIP model in open_clip; float32 on a CPU, bfloat16 autocast on a GPU.

    open_clip's ``require_pretrained`` makes weights that lack a key, or have one too many, an
    error: a score from a model half at random looks like any other. A text longer than the model's context (77 tokens) is cut there by open_clip's tokenizer.

    Raises:
        DependencyError: If open_clip is missing, or the model cannot be loaded whole.
    """

    def __init__(self, config: OpenClipConfig) -> None:
        try:
            import open_clip
            import torch
        except ImportError as error:
            raise DependencyError(
                "Missing package: open_clip_torch (score)", "uv sync --extra ingest"
            ) from error
        name = config.model or f"{LOCAL_SCHEMA}{BUNDLED_CLIP}"
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = Path(name.removeprefix(LOCAL_SCHEMA)) if name.startswith(LOCAL_SCHEMA) else None
        weights = weights_file(folder) if folder else None
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
        model, self._preprocess = loaded
        self._model = model.eval().to(self._device)
        self.model = f"open_clip:{Path(name).name if folder else name}"
        self.revision = _revision(folder, weights) if folder and weights else config.pretrained

    def score(self, clips: Sequence[Sequence[np.ndarray]], texts: Sequence[str]) -> list[float]:
        """Returns the mean cosine of each text and its frames, in [-1, 1]."""
        import torch
        from PIL import Image

        if not clips:
            return []
        frames = [Image.fromarray(frame) for clip in clips for frame in clip]
        images = torch.stack([self._preprocess(frame) for frame in frames]).to(self._device)
        tokens = self._tokenizer(list(texts)).to(self._device)
        autocast = (
            torch.autocast("cuda", torch.bfloat16) if self._device == "cuda" else nullcontext()
        )
        with torch.inference_mode(), autocast:
            image_FD = self._model.encode_image(images, normalize=True).float().cpu().numpy()
            text_BD = self._model.encode_text(tokens, normalize=True).float().cpu().numpy()
        # Autocast leaves unit vectors of bfloat16; the cosine is taken of exact ones.
        image_FD = image_FD / np.linalg.norm(image_FD, axis=1, keepdims=True)
        text_BD = text_BD / np.linalg.norm(text_BD, axis=1, keepdims=True)
        return mean_cosines(image_FD, text_BD, [len(clip) for clip in clips])

    def check_known_pair(self, image: np.ndarray, matched: str, mismatched: str) -> None:
        """Raises DependencyError unless the matched text scores higher than the mismatched one."""
        right, wrong = self.score([[image], [image]], [matched, mismatched])
        if right <= wrong:
            raise DependencyError(
                f"{self.model} scores a known pair wrongly: {matched!r} {right:.3f}, "
                f"{mismatched!r} {wrong:.3f}",
                "the weights are damaged or not this model's: fetch them again",
            )


def _revision(folder: Path, weights: Path) -> str:
    """Returns a hash of a local model: its config and its weights' first megabyte and size."""
    from dataengine.records import digest

    config = json.loads((folder / "open_clip_config.json").read_text())
    with weights.open("rb") as file:
        head = file.read(1 << 20)
    return digest(json.dumps(config, sort_keys=True), head, str(weights.stat().st_size))


def build_clip_scorer(config: ClipScorerConfig) -> ClipScorer:
    """Returns the scorer that a config names."""
    builders = {"open_clip": OpenClipScorer}
    return builders[config.kind](config)
