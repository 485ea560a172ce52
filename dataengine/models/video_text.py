# SPDX-License-Identifier: Apache-2.0
"""Clips and text -> embeddings of a video-text model, whose cosine says how well they fit.

InternVid's UMT-SIM is such a score (section 3.3): a model that sees the frames together, and with them
what happens, where CLIP sees one picture at a time.

B clips or texts, T frames, S side of the model's square input, D embedding width.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.models.answers import Failure
from dataengine.models.clip import file_revision
from dataengine.models.internvideo2 import InternVideo2ScorerConfig, load_internvideo2
from dataengine.models.known_pairs import KNOWN_PAIRS, check_known_pairs
from dataengine.models.two_tower import TwoTowerScorer, bert_reader, clip_reader, llama_reader
from dataengine.needs import Need, Package, Weights
from dataengine.records import digest
from dataengine.stage import Settings


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


class TrainedScorerConfig(Settings):
    """Any video-text model of our trainer."""

    kind: Literal["trained"] = "trained"
    weights: str
    """A run's folder, whose ``model`` is meant, or one that ``python -m training.export`` wrote."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=16, ge=1)
    """Most clips in one call of the model."""
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    def needs(self) -> tuple[Need, ...]:
        """Returns open_clip, whose vocabulary most models read texts with, and the weights."""
        return (Package("open_clip"), _weights(self.weights))


class ViCLIPScorerConfig(Settings):
    """ViCLIP: as published, or of our trainer."""

    kind: Literal["viclip"] = "viclip"
    weights: str
    """A published file (``ViClip-InternVid-10M-FLT.pth``), or a folder as for ``trained``."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=16, ge=1)
    """Most clips in one call of the model."""
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    def needs(self) -> tuple[Need, ...]:
        """Returns open_clip, whose vocabulary the texts are read with, and the weights."""
        return (Package("open_clip"), _weights(self.weights))


VideoTextConfig = Annotated[
    ViCLIPScorerConfig | InternVideo2ScorerConfig | TrainedScorerConfig,
    Field(discriminator="kind"),
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


def check_video_text(scorer: VideoTextScorer) -> None:
    """Lets a scorer prove itself on known pairs, shown as clips in which nothing moves.

    Raises:
        DependencyError: If it prefers a wrong text more often than `check_known_pairs` allows.
    """
    clips = [np.stack([scorer.prepare(pair.draw())] * scorer.num_frames) for pair in KNOWN_PAIRS]
    texts = [pair.text for pair in KNOWN_PAIRS]
    check_known_pairs(scorer.model, scorer.embed_videos(clips), scorer.embed_texts(texts))


def build_video_text(
    config: ViCLIPScorerConfig | InternVideo2ScorerConfig | TrainedScorerConfig,
) -> VideoTextScorer:
    """Returns the scorer that a config names; `check_video_text` says whether it can be trusted.

    Raises:
        DependencyError: If its package or its weights are missing, or do not fit.
    """
    try:
        import open_clip  # noqa: F401  CLIP's vocabulary
        import torch  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"Missing package: {error.name} (score_video_text)", "uv sync --extra ingest"
        ) from error
    match config:
        case InternVideo2ScorerConfig():
            return load_internvideo2(config)
        case ViCLIPScorerConfig() if Path(config.weights).is_file():
            return _published_viclip(config, Path(config.weights))
        case _:
            return _trained(config, Path(config.weights))


def _published_viclip(config: ViCLIPScorerConfig, file: Path) -> TwoTowerScorer:
    """Returns the scorer of a published file.

    Captions lose case and punctuation, and what is longer than 32 tokens is cut off, as in the published
    evaluation.
    """
    from dataengine.networks.viclip import ViCLIP, load_whole, published_config

    state = _read_published(file)
    try:
        shape = published_config(state)
        network = ViCLIP(shape)
        load_whole(network, state)
    except (ValueError, RuntimeError) as error:
        raise DependencyError(
            f"Weights of {file} do not fit ViCLIP: {error}", "name weights of a ViCLIP"
        ) from error
    return TwoTowerScorer(
        network,
        clip_reader(shape.text.context_length, clean=True),
        num_frames=shape.video.num_frames,
        image_size=shape.video.image_size,
        pixel_mean=shape.pixel_mean,
        pixel_std=shape.pixel_std,
        model=f"viclip:{file.stem}",
        revision=file_revision(file, shape.model_dump_json()),
        device=config.device,
        batch_size=config.batch_size,
    )


def _trained(config: ViCLIPScorerConfig | TrainedScorerConfig, path: Path) -> TwoTowerScorer:
    """Returns the scorer of a model folder."""
    from dataengine.networks.config import (
        InternVideo2ClipConfig,
        InternVideo2Config,
        InternVideo2Stage2Config,
        LlamaTextConfig,
        ViCLIPConfig,
    )
    from dataengine.networks.folder import load_folder, read_folder

    if not path.is_dir():
        raise DependencyError(
            f"No {config.kind} weights at {path}",
            "name a run's folder, or one that python -m training.export wrote",
        )
    found = read_folder(path)
    if config.kind == "viclip" and found.kind != "viclip":
        raise DependencyError(
            f"{found.path} holds a {found.kind} model, not a ViCLIP", "write kind: trained"
        )
    clean = bool(found.about.get("clean_captions", True))
    # The folder's own files, where the export found them; else where training had its tokenizer from.
    own = str(found.path) if (found.path / "tokenizer_config.json").is_file() else ""
    match found.config:
        case ViCLIPConfig(video=vision, text=text) as shape:
            read_texts = clip_reader(text.context_length, clean=clean)
        case InternVideo2Stage2Config(vision=vision) as shape:
            read_texts = bert_reader(own or shape.tokenizer, shape.context_length, clean=clean)
        case InternVideo2ClipConfig(vision=vision, text=LlamaTextConfig() as text) as shape:
            read_texts = llama_reader(own or text.tokenizer, text.context_length, clean=clean)
        case InternVideo2ClipConfig(vision=vision, text=text) as shape:
            read_texts = clip_reader(text.context_length, clean=clean)
        case InternVideo2Config():
            raise DependencyError(
                f"{found.path} holds a vision encoder alone, which reads no text",
                "name a viclip, internvideo2_stage2 or internvideo2_clip model",
            )
    network, _ = load_folder(path)
    name = found.path.resolve()
    return TwoTowerScorer(
        network,
        read_texts,
        num_frames=vision.num_frames,
        image_size=vision.image_size,
        pixel_mean=shape.pixel_mean,
        pixel_std=shape.pixel_std,
        # A run's folder says more than the "model" in it.
        model=f"{found.kind}:{name.parent.name if name.name == 'model' else name.name}",
        revision=digest(
            shape.model_dump_json(), str(clean), *(file_revision(file) for file in found.files)
        ),
        device=config.device,
        batch_size=config.batch_size,
    )


def _weights(name: str) -> Weights:
    """Returns what `doctor` looks for: a file, or a folder with weights."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return Weights("file", name)
    is_run = (folder / "model" / "config.json").is_file()
    return Weights("hub", str(folder / "model") if is_run else name)


class _Settings:
    """Stands in for the class in which published files keep the settings of their training run.

    That is a dict with attributes. torch fills dicts of its own choice alone, no subclass of them.
    """

    def __new__(cls) -> OrderedDict[str, Any]:
        return OrderedDict()


def _read_published(file: Path) -> Mapping[str, Any]:
    """Returns a published checkpoint's weights without running any code that it may hold."""
    import torch

    from dataengine.networks.viclip import published_weights

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            payload: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([(_Settings, "utils.easydict.EasyDict")]):
                payload = torch.load(file, map_location="cpu", weights_only=True)
        return published_weights(payload)
    except Exception as error:  # torch and pickle raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"Cannot be read as weights alone: {file} ({problem})",
            "if you trust the file, store its entry 'model' by itself: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)",
        ) from error
