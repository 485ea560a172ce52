# SPDX-License-Identifier: Apache-2.0
"""Clips and text -> embeddings of InternVideo2's second stage: its video and its text encoder.

The part of UMT-SIM (InternVid, section 3.3) played by UMT's successor. Read from the published files,
such as ``InternVideo2-stage2_1b-224p-f4.pt``: the vision encoder, the first layers of a BERT, and the two
projections whose cosine the contrastive loss of stage 2 trains (InternVideo2, section 3.2).

B clips or texts, T frames, S side of the square input, D embedding width, L tokens.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.models.clip import file_revision
from dataengine.models.two_tower import TwoTowerScorer, bert_reader
from dataengine.needs import Need, Package, Weights
from dataengine.stage import Settings

if TYPE_CHECKING:
    from dataengine.networks.config import InternVideo2Stage2Config

_HEADS = {384: 6, 768: 12, 1024: 16, 1408: 16, 3200: 25}
"""Width of a released vision encoder -> its heads."""

_BERT_HEAD_WIDTH = 64

_NO_EMBEDDING = re.compile(
    r"text_encoder\.cls\."
    r"|(itm_head|avtm_head|atm_head|audio_encoder|audio_proj|av_concat_\w+|av_fusion)\.|temp$"
)
"""Weights of a stage-2 checkpoint that neither embedding uses: masked words, matching, sound."""

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


def load_internvideo2(config: InternVideo2ScorerConfig) -> TwoTowerScorer:
    """Returns the scorer of a published file: its encoders, without its decoder and its sound.

    Frames are normalised with ImageNet's statistics, as in the published evaluation.

    Raises:
        DependencyError: If a package or the weights are missing, or the weights do not fit.
    """
    from dataengine.networks.internvideo2 import published_state
    from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2, load_published_stage2

    file = Path(config.weights)
    if not file.is_file():
        raise DependencyError(
            f"No InternVideo2 weights at {file}", "name a downloaded stage-2 checkpoint"
        )
    state = published_state(file)
    try:
        shape = _shape(state, config)
        network = InternVideo2Stage2(shape)
        weights = load_published_stage2(_encoders(state, shape), shape, config.num_frames)
        network.load_state_dict(weights)
    except (ValueError, KeyError, DependencyError) as error:
        problem = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise DependencyError(
            f"Weights of {file} do not fit InternVideo2: {problem}",
            "name a stage-2 checkpoint of InternVideo2",
        ) from error
    return TwoTowerScorer(
        network,
        bert_reader(config.tokenizer, config.max_tokens, clean=False),
        num_frames=shape.vision.num_frames,
        image_size=shape.vision.image_size,
        pixel_mean=shape.pixel_mean,
        pixel_std=shape.pixel_std,
        model=f"internvideo2:{file.stem}",
        revision=file_revision(file, shape.vision.model_dump_json()),
        device=config.device,
        batch_size=config.batch_size,
    )


def _shape(
    state: Mapping[str, Any], config: InternVideo2ScorerConfig
) -> "InternVideo2Stage2Config":
    """Returns the shape of a checkpoint's encoders: a stage 2 whose BERT reads text alone.

    Raises:
        KeyError: If a weight is missing.
        ValueError: If the shapes make no sense together.
    """
    from dataengine.networks.config import BertConfig, InternVideo2Stage2Config

    layers = {int(found[1]) for name in state if (found := _TEXT_LAYER.match(name))}
    # The layers that attend to the video are known by their cross-attention.
    fusion = {int(found[1]) for name in state if (found := _TEXT_LAYER.match(name)) and "crossattention" in name}  # fmt: skip
    embeddings = "text_encoder.bert.embeddings"
    vocab_size, width = state[f"{embeddings}.word_embeddings.weight"].shape
    first = "text_encoder.bert.encoder.layer.0"
    text = BertConfig(
        vocab_size=vocab_size,
        width=width,
        layers=len(layers - fusion),
        fusion_layer=len(layers - fusion),
        heads=max(1, width // _BERT_HEAD_WIDTH),
        mlp_width=state[f"{first}.intermediate.dense.weight"].shape[0],
        max_positions=state[f"{embeddings}.position_embeddings.weight"].shape[0],
        num_token_types=state[f"{embeddings}.token_type_embeddings.weight"].shape[0],
        mask_id=0,  # no word is masked here
    )
    return InternVideo2Stage2Config(
        kind="internvideo2_stage2",
        vision=vision_shape(state, config),
        text=text,
        tokenizer=config.tokenizer,
        context_length=config.max_tokens,
        embed_dim=state["text_proj.weight"].shape[0],
    )


def _encoders(state: Mapping[str, Any], shape: "InternVideo2Stage2Config") -> dict[str, Any]:
    """Returns the weights of a checkpoint's encoders, with zeros for the heads that no embedding uses."""
    import torch

    from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2

    kept = {
        name: value
        for name, value in state.items()
        if not _NO_EMBEDDING.match(name)
        and not ((found := _TEXT_LAYER.match(name)) and int(found[1]) >= shape.text.layers)
    }
    with torch.device("meta"):
        own = InternVideo2Stage2(shape).state_dict()
    return kept | {k: torch.zeros(v.shape) for k, v in own.items() if _NO_EMBEDDING.match(k)}


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
