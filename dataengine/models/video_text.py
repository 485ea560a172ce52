# SPDX-License-Identifier: Apache-2.0
"""Clips and text -> embeddings of a video-text model, whose cosine says how well they fit.

InternVid's UMT-SIM is such a score (section 3.3): a model that sees the frames together, and with them
what happens, where CLIP sees one picture at a time.

B clips or texts, T frames, S side of the model's square input, D embedding width.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field, ValidationError

from dataengine.errors import DependencyError
from dataengine.models.answers import Batcher, Failure
from dataengine.models.clip import file_revision, unit
from dataengine.models.internvideo2 import InternVideo2Scorer, InternVideo2ScorerConfig
from dataengine.models.known_pairs import KNOWN_PAIRS, check_known_pairs
from dataengine.models.pretrained import torch_device
from dataengine.needs import Need, Package, Weights
from dataengine.stage import Settings

CHECKPOINT_META = "meta.json"
"""What the trainer writes beside the weights: its recipe is under ``config``."""


class VideoTextScorer(Protocol):
    """Embeds clips and texts in one space.

    A clip's frames are prepared by themselves, in any thread, and embedded with others.
    """

    model: str
    revision: str
    num_frames: int
    """T."""

    @property
    def batch_size(self) -> int:
        """Most clips or texts in one call of the model."""
        ...

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """Returns what the model sees of a uint8 RGB HWC frame of any size, uint8 [S, S, 3]."""
        ...

    def embed_videos(self, prepared: Sequence[np.ndarray]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per clip, given as uint8 [T, S, S, 3]."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per text."""
        ...


class ViCLIPScorerConfig(Settings):
    """ViCLIP: of our trainer, or as published."""

    kind: Literal["viclip"] = "viclip"
    weights: str
    """A checkpoint folder of the trainer (``.../checkpoints/step_...``), a folder that
    ``python -m training.export_viclip`` wrote, or a published file (``ViClip-InternVid-10M-FLT.pth``)."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=16, ge=1)
    """Most clips in one call of the model."""
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    def needs(self) -> tuple[Need, ...]:
        """Returns open_clip, whose vocabulary the texts are read with, and the weights."""
        return (Package("open_clip"), Weights("file", self.weights))


VideoTextConfig = Annotated[
    ViCLIPScorerConfig | InternVideo2ScorerConfig, Field(discriminator="kind")
]
"""The families of video-text models."""


def middle_frames(num_available: int, num_wanted: int) -> list[int]:
    """Returns ``num_wanted`` rising frame numbers: the middle of each of as many equal intervals.

    With fewer frames than wanted all are taken, and the last one again and again.

    Source: ViCLIP's published evaluation: interval edges are cut down to whole numbers, and
    the middle is that of the first and the last frame, cut down too (8 of 16: 0, 2, 4, ...).
    """
    num = min(num_available, num_wanted)
    edges = np.linspace(0, num_available, num + 1).astype(int).tolist()
    chosen = [(first + after - 1) // 2 for first, after in pairwise(edges)]
    return chosen + chosen[-1:] * (num_wanted - num)


class ViCLIPScorer:
    """ViCLIP; float32 on a CPU, bfloat16 autocast on a GPU.

    Frames are squeezed into a square (bicubic) and normalised with ImageNet's statistics, captions lose
    case and punctuation, and what is longer than 32 tokens is cut off, as in the published evaluation.

    Raises:
        DependencyError: If a package or the weights are missing, or the weights do not fit.
    """

    def __init__(self, config: ViCLIPScorerConfig) -> None:
        try:
            import open_clip  # noqa: F401  the tokenizer's vocabulary
            import torch

            from dataengine.networks.viclip import ViCLIP, load_whole
        except ImportError as error:
            raise DependencyError(
                f"Missing package: {error.name} (score_video_text)", "uv sync --extra ingest"
            ) from error
        path = Path(config.weights)
        file, shape, state = _read(path)
        try:
            model = ViCLIP(shape)
            load_whole(model, state)
        except (ValueError, RuntimeError) as error:
            raise DependencyError(
                f"Weights of {path} do not fit ViCLIP: {error}", "name weights of a ViCLIP"
            ) from error
        self._device = torch_device(config.device)
        self._model = model.eval().to(self._device)
        self._mean = torch.tensor(shape.pixel_mean, device=self._device)
        self._std = torch.tensor(shape.pixel_std, device=self._device)
        self._size = shape.video.image_size
        self._context_length = shape.text.context_length
        self._batcher = Batcher(config.batch_size)
        self.num_frames = shape.video.num_frames
        self.model = f"viclip:{path.stem if path.is_file() else path.resolve().name}"
        self.revision = file_revision(file, shape.model_dump_json())

    @property
    def batch_size(self) -> int:
        """Most clips or texts in one call of the model; halved when memory runs out."""
        return self._batcher.size

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """Returns the squeezed frame, uint8 [S, S, 3]."""
        from PIL import Image

        size = (self._size, self._size)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))

    def embed_videos(self, prepared: Sequence[np.ndarray]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per clip, given as uint8 [T, S, S, 3]."""
        return self._batcher.run(prepared, self._encode_videos)

    def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per text."""
        return self._batcher.run(texts, self._encode_texts)

    def _encode_videos(self, prepared: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        import torch

        pixels_BTHWC = torch.from_numpy(np.stack(prepared)).to(self._device)
        with torch.inference_mode(), self._autocast():
            frames = (pixels_BTHWC.float() / 255 - self._mean) / self._std
            return _exact(self._model.encode_video(frames.permute(0, 1, 4, 2, 3)))

    def _encode_texts(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        import torch

        from dataengine.networks.text import clean_caption, tokenise

        tokens = tokenise([clean_caption(text) for text in texts], self._context_length)
        with torch.inference_mode(), self._autocast():
            return _exact(self._model.encode_text(tokens.to(self._device)))

    def _autocast(self) -> Any:
        import torch

        if not self._device.startswith("cuda"):
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)


def check_video_text(scorer: VideoTextScorer) -> None:
    """Lets a scorer prove itself on known pairs, shown as clips in which nothing moves.

    Raises:
        DependencyError: If it prefers a wrong text more often than `check_known_pairs` allows.
    """
    clips = [np.stack([scorer.prepare(pair.draw())] * scorer.num_frames) for pair in KNOWN_PAIRS]
    texts = [pair.text for pair in KNOWN_PAIRS]
    check_known_pairs(scorer.model, scorer.embed_videos(clips), scorer.embed_texts(texts))


def build_video_text(config: ViCLIPScorerConfig | InternVideo2ScorerConfig) -> VideoTextScorer:
    """Returns the scorer that a config names; `check_video_text` says whether it can be trusted.

    Raises:
        DependencyError: If its package or its weights are missing, or do not fit.
    """
    match config:
        case ViCLIPScorerConfig():
            return ViCLIPScorer(config)
        case InternVideo2ScorerConfig():
            return InternVideo2Scorer(config)


def _exact(features: Any) -> Sequence[np.ndarray]:
    return list(unit(features.float().cpu().numpy()))


def _read(path: Path) -> tuple[Path, Any, Mapping[str, Any]]:
    """Returns the file with the weights, the model's shape and its weights."""
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_published(path)
    raise DependencyError(
        f"No ViCLIP weights at {path}",
        "name a checkpoint folder of the trainer, or a downloaded ViClip-InternVid-10M-FLT.pth",
    )


def _read_folder(folder: Path) -> tuple[Path, Any, Mapping[str, Any]]:
    """Reads a checkpoint of the trainer, or an exported model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from dataengine.networks.config import ViCLIPConfig
    from dataengine.networks.viclip import EXPORTED_CONFIG, WEIGHTS

    file = folder / WEIGHTS
    try:
        if (folder / EXPORTED_CONFIG).is_file():
            described = json.loads((folder / EXPORTED_CONFIG).read_text())
        elif (folder / CHECKPOINT_META).is_file():
            meta = json.loads((folder / CHECKPOINT_META).read_text())
            described = meta["config"]["model"]
            if file.stat().st_size != meta["bytes"][WEIGHTS]:
                raise ValueError(f"{WEIGHTS} was cut off")
        else:
            checkpoints = sorted(folder.glob("checkpoints/step_*"))
            hint = f"name {checkpoints[-1]}" if checkpoints else "name a checkpoint folder"
            raise DependencyError(
                f"{folder} holds neither {CHECKPOINT_META} nor {EXPORTED_CONFIG}", hint
            )
        if described.get("kind") != "viclip":
            raise DependencyError(
                f"{folder} holds a {described.get('kind')} model, not a ViCLIP",
                "train a recipe of kind viclip, such as viclip_b",
            )
        shape = ViCLIPConfig.model_validate(described)
        state = {name: tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise DependencyError(
            f"Cannot be read: {folder} ({' '.join(str(error).split())[:300]})",
            "write the checkpoint, or the export, again",
        ) from error
    return file, shape, state


class _Settings:
    """Stands in for the class in which published files keep the settings of their training run.

    That is a dict with attributes. torch fills dicts of its own choice alone, no subclass of them.
    """

    def __new__(cls) -> OrderedDict[str, Any]:
        return OrderedDict()


def _read_published(file: Path) -> tuple[Path, Any, Mapping[str, Any]]:
    """Reads a published checkpoint without running any code that it may hold."""
    import torch

    from dataengine.networks.viclip import published_config, published_weights

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            payload: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([(_Settings, "utils.easydict.EasyDict")]):
                payload = torch.load(file, map_location="cpu", weights_only=True)
        state = published_weights(payload)
    except Exception as error:  # torch and pickle raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"Cannot be read as weights alone: {file} ({problem})",
            "if you trust the file, store its entry 'model' by itself: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)",
        ) from error
    try:
        return file, published_config(state), state
    except (ValueError, ValidationError) as error:
        raise DependencyError(
            f"Weights of {file} do not fit ViCLIP: {error}", "name weights of a ViCLIP"
        ) from error
