# SPDX-License-Identifier: Apache-2.0
"""Clips and text -> embeddings of InternVideo2's second stage: its video and its text encoder.

The part of UMT-SIM (InternVid, section 3.3) played by UMT's successor. Read from the published files,
such as ``InternVideo2-stage2_1b-224p-f4.pt``: the vision encoder, the first layers of a BERT, and the two
projections whose cosine the contrastive loss of stage 2 trains (InternVideo2, section 3.2).

B clips or texts, T frames, S side of the square input, D embedding width, L tokens.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationError

from dataengine.errors import DependencyError
from dataengine.models.answers import Batcher, Failure
from dataengine.models.clip import file_revision, unit
from dataengine.models.pretrained import load_processor, torch_device
from dataengine.needs import Need, Package, Weights
from dataengine.stage import Settings

_HEADS = {384: 6, 768: 12, 1024: 16, 1408: 16, 3200: 25}
"""Width of a released vision encoder -> its heads."""

_BERT_HEAD_WIDTH = 64

_TRAINING_ONLY = re.compile(
    r"vision_encoder\.(clip_decoder|final_clip_decoder|clip_pos_embed|clip_img_pos_embed)\b"
    r"|text_encoder\.(cls\.|bert\.embeddings\.position_ids)|clip_teacher\."
    r"|(itm_head|avtm_head|atm_head|audio_encoder|audio_proj|av_concat_\w+|av_fusion)\.|temp$"
)
"""Weights of a stage-2 checkpoint that neither embedding uses: distillation, matching, sound."""

_TEXT_LAYER = re.compile(r"text_encoder\.bert\.encoder\.layer\.(\d+)\.")


class InternVideo2ScorerConfig(Settings):
    """InternVideo2's stage 2, as published."""

    kind: Literal["internvideo2"] = "internvideo2"
    weights: str
    """A downloaded file such as ``InternVideo2-stage2_1b-224p-f4.pt``."""
    tokenizer: str = "google-bert/bert-large-uncased"
    """Hub id or local folder of the text encoder's tokenizer."""
    num_frames: int = Field(default=4, ge=1)
    """Frames the weights were trained with (their position embeddings tell no more than a product)."""
    max_tokens: int = Field(default=40, ge=3)
    """Longest text, with start and end; 32 for the 1B model, 40 for the 6B."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads of the vision encoder; None knows them of the released sizes."""
    pool_heads: int = Field(default=16, ge=1)
    """Heads of its attention pooling."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=16, ge=1)
    """Most clips in one call of the model."""
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    def needs(self) -> tuple[Need, ...]:
        """Returns transformers, the weights and the tokenizer."""
        tokenizer = Weights("tokenizer", self.tokenizer)
        return (Package("transformers"), Weights("file", self.weights), tokenizer)


class InternVideo2Scorer:
    """The two encoders of stage 2; float32 on a CPU, bfloat16 autocast on a GPU.

    Frames are squeezed into a square (bicubic) and normalised with ImageNet's statistics, as in the
    published evaluation.

    Raises:
        DependencyError: If a package or the weights are missing, or the weights do not fit.
    """

    def __init__(self, config: InternVideo2ScorerConfig) -> None:
        try:
            import torch
            from transformers import AutoTokenizer

            from dataengine.networks.config import IMAGENET_MEAN, IMAGENET_STD
            from dataengine.networks.internvideo2 import InternVideo2
        except ImportError as error:
            raise DependencyError(
                f"Missing package: {error.name} (score_video_text)", "uv sync --extra ingest"
            ) from error
        file = Path(config.weights)
        state = _read(file)
        try:
            shape = vision_shape(state, config)
            text_config, num_text_layers = _text_shape(state)
            vision, text = InternVideo2(shape), _bert(text_config)
            width = state["text_proj.weight"].shape
            parts = {
                "vision_encoder": vision,
                "text_encoder.bert": text,
                "vision_proj": torch.nn.Linear(shape.embed_dim, width[0]),
                "text_proj": torch.nn.Linear(width[1], width[0]),
            }
            _load_whole(parts, state, num_text_layers)
        except (ValueError, KeyError, RuntimeError, ValidationError) as error:
            problem = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise DependencyError(
                f"Weights of {file} do not fit InternVideo2: {problem}",
                "name a stage-2 checkpoint of InternVideo2",
            ) from error
        self._device = torch_device(config.device)
        self._parts = {name: part.eval().to(self._device) for name, part in parts.items()}
        self._tokenizer = load_processor(AutoTokenizer, config.tokenizer)
        self._mean = torch.tensor(IMAGENET_MEAN, device=self._device)
        self._std = torch.tensor(IMAGENET_STD, device=self._device)
        self._size = shape.image_size
        self._max_tokens = config.max_tokens
        self._batcher = Batcher(config.batch_size)
        self.num_frames = shape.num_frames
        self.model = f"internvideo2:{file.stem}"
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
            _, pooled_BE = self._parts["vision_encoder"](frames.permute(0, 1, 4, 2, 3))
            return _exact(self._parts["vision_proj"](pooled_BE))

    def _encode_texts(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        import torch

        tokens = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode(), self._autocast():
            hidden_BLD = self._parts["text_encoder.bert"](
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).last_hidden_state
            return _exact(self._parts["text_proj"](hidden_BLD[:, 0]))

    def _autocast(self) -> Any:
        import torch

        if not self._device.startswith("cuda"):
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)


def vision_shape(state: Mapping[str, Any], config: InternVideo2ScorerConfig) -> Any:
    """Returns the `InternVideo2Config` of a checkpoint's vision encoder.

    Raises:
        KeyError: If a weight is missing.
        ValueError: If the shapes make no sense together.
    """
    from dataengine.networks.config import InternVideo2Config

    prefix = "vision_encoder."
    width = state[f"{prefix}cls_token"].shape[-1]
    heads = config.heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(f"heads of a vision encoder of width {width} are not known: set `heads`")
    num_positions = state[f"{prefix}pos_embed"].shape[1] - 1
    patch_size = state[f"{prefix}patch_embed.proj.weight"].shape[-1]
    side = round((num_positions / config.num_frames) ** 0.5)
    if side * side * config.num_frames != num_positions:
        raise ValueError(f"{num_positions} positions are not {config.num_frames} square frames")
    layers = {name.split(".")[2] for name in state if name.startswith(f"{prefix}blocks.")}
    return InternVideo2Config(
        image_size=side * patch_size,
        patch_size=patch_size,
        num_frames=config.num_frames,
        width=width,
        layers=len(layers),
        heads=heads,
        mlp_width=state[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0],
        pool_heads=config.pool_heads,
        embed_dim=state[f"{prefix}clip_projector.cross_attn.proj.weight"].shape[0],
        image_positions=f"{prefix}img_pos_embed" in state,
    )


def _text_shape(state: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns what a BERT is built with, and how many of its layers read text alone.

    The layers behind them attend to the video, and are known by their cross-attention.
    """
    layers = {int(found[1]) for name in state if (found := _TEXT_LAYER.match(name))}
    fusion = {int(found[1]) for name in state if (found := _TEXT_LAYER.match(name)) and "crossattention" in name}  # fmt: skip
    embeddings = "text_encoder.bert.embeddings"
    vocab_size, width = state[f"{embeddings}.word_embeddings.weight"].shape
    num_text_layers = len(layers - fusion)
    first = "text_encoder.bert.encoder.layer.0"
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": num_text_layers,
        "num_attention_heads": max(1, width // _BERT_HEAD_WIDTH),
        "intermediate_size": state[f"{first}.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state[f"{embeddings}.position_embeddings.weight"].shape[0],
        "type_vocab_size": state[f"{embeddings}.token_type_embeddings.weight"].shape[0],
    }, num_text_layers


def _bert(shape: Mapping[str, Any]) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**shape), add_pooling_layer=False)


def _load_whole(parts: Mapping[str, Any], state: Mapping[str, Any], num_text_layers: int) -> None:
    """Gives every part its weights.

    Raises:
        ValueError: If a weight is missing, of another shape, or of no part.
    """
    wanted: dict[str, Any] = {}
    for prefix, part in parts.items():
        wanted |= {f"{prefix}.{name}": value for name, value in part.state_dict().items()}
    spare = [
        name
        for name in state
        if name not in wanted
        and not _TRAINING_ONLY.match(name)
        and not ((found := _TEXT_LAYER.match(name)) and int(found[1]) >= num_text_layers)
    ]
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is not known" for name in spare]
    problems += [
        f"{name} is of shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise ValueError("; ".join(problems[:5]) + (" ..." if len(problems) > 5 else ""))
    for prefix, part in parts.items():
        own = {name: state[f"{prefix}.{name}"].float() for name in part.state_dict()}
        part.load_state_dict(own)


def _exact(features: Any) -> Sequence[np.ndarray]:
    return list(unit(features.float().cpu().numpy()))


def _read(file: Path) -> Mapping[str, Any]:
    """Returns the weights of a published checkpoint without running any code that it may hold."""
    import torch

    if not file.is_file():
        raise DependencyError(
            f"No InternVideo2 weights at {file}", "name a downloaded stage-2 checkpoint"
        )
    try:
        payload = torch.load(file, map_location="cpu", weights_only=True)
        for key in ("module", "model"):
            payload = payload.get(key, payload)
        return {name.removeprefix("module."): value for name, value in payload.items()}
    except Exception as error:  # torch and pickle raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"Cannot be read as weights alone: {file} ({problem})",
            "if you trust the file, store its weights by themselves: "
            "torch.save(torch.load(FILE, weights_only=False)['module'], NEW_FILE)",
        ) from error
