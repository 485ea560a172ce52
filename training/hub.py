# SPDX-License-Identifier: Apache-2.0
"""A trained model as a folder for the Hugging Face hub, with its card."""

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from training.config import DistilConfig, ModelConfig, OpenClipConfig, inputs_of
from training.export import (
    STUDENT_EXTRAS,
    describe,
    exported_state,
    shape_of,
    stored_weights,
    write_atomically,
    write_json,
    write_tokenizer,
    write_weights,
)

if TYPE_CHECKING:
    import torch

_ARCHITECTURES = {
    "viclip": "ViCLIP",
    "internvideo2": "InternVideo2",
    "internvideo2_stage2": "InternVideo2Stage2",
    "internvideo2_clip": "InternVideo2Clip",
}
"""Kind -> its class in `dataengine.networks`."""


def export_huggingface(
    network_state: "Mapping[str, torch.Tensor]",
    config: ModelConfig,
    folder: Path,
    *,
    half: bool = False,
    about: Mapping[str, Any] | None = None,
    license_id: str = "other",
) -> int:
    """Writes a folder for the Hugging Face hub; returns its bytes.

    An open_clip model becomes a ``CLIPModel`` of the transformers library; the others are model folders
    besides, which this package loads. Frames are prepared as transformers' ``CLIPImageProcessor`` reads it.

    Args:
        network_state: As for `export_folder`.
        config: The recipe's model.
        folder: Where it goes.
        half: As for `export_folder`.
        about: As for `export_folder`.
        license_id: The hub's name of a licence, for the card.

    Raises:
        ConfigError: As for `export_folder`.
        EngineError: As for `export_folder`.
        DependencyError: If the model's tokenizer cannot be loaded.
    """

    def write(place: Path) -> None:
        weights = stored_weights(exported_state(network_state, config), half)
        if isinstance(config, OpenClipConfig):
            weights = _clip_weights(weights)
            described: dict[str, Any] = _clip_config(config)
            _write_clip_tokenizer(config, place)
        else:
            described = describe(config, about or {})
            kind = described["kind"]
            described |= {"model_type": kind, "architectures": [_ARCHITECTURES[kind]]}
            write_tokenizer(config, place)
        write_weights(weights, place)
        write_json(place / "config.json", described | {"dtype": "float16" if half else "float32"})
        write_json(place / "preprocessor_config.json", _preprocessor(config))
        # Not of what is stored, where some weights lie twice.
        num_parameters = sum(
            tensor.numel()
            for name, tensor in network_state.items()
            if not name.startswith(STUDENT_EXTRAS)
        )
        card = _card(config, folder.name, num_parameters, about or {}, license_id)
        (place / "README.md").write_text(card, encoding="utf-8")

    return write_atomically(folder, write)


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    """Returns ``preprocessor_config.json``: each frame squeezed into a square, and normalised."""
    shape = shape_of(config)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": shape.image_size, "width": shape.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(shape.pixel_mean),
        "image_std": list(shape.pixel_std),
        "num_frames": shape.num_frames,
    }


# ----------------------------------------------------------------------- a CLIP of transformers

_CLIP_NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)
"""Beginning of a name in open_clip -> in transformers."""

_CLIP_BLOCK_NAMES = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.", ".self_attn."),
)


def _clip_weights(state: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Returns an open_clip model's weights under the names of transformers' ``CLIPModel``."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        begin, after = next(pair for pair in _CLIP_NAMES if name.startswith(pair[0]))
        new = after + name.removeprefix(begin)
        for own, theirs in _CLIP_BLOCK_NAMES:
            new = new.replace(own, theirs)
        if ".in_proj_" in new:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[new.replace("in_proj_", f"{part}_proj.")] = third.clone()
        elif name in {"visual.proj", "text_projection"}:
            renamed[new] = tensor.T.contiguous()  # a linear layer's weight is [out, in]
        else:
            renamed[new] = tensor
    return renamed


def _clip_config(config: OpenClipConfig) -> dict[str, Any]:
    """Returns the ``config.json`` of transformers' ``CLIPModel`` for an open_clip model."""
    from dataengine.networks.text import END_OF_TEXT, VOCAB_SIZE

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": config.embed_dim,
        }

    video, text = config.video, config.text
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": math.log(1 / config.init_temperature),
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower(video.width, video.layers, video.heads),
            "image_size": video.image_size,
            "patch_size": video.patch_size,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **tower(text.width, text.layers, text.heads),
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": text.context_length,
            "bos_token_id": END_OF_TEXT - 1,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
        },
    }


def _write_clip_tokenizer(config: OpenClipConfig, folder: Path) -> None:
    """Writes CLIP's vocabulary, as open_clip ships it, as a tokenizer of transformers."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {names.get(token, token): number for token, number in own.encoder.items()}
    merges = sorted(own.bpe_ranks, key=lambda pair: own.bpe_ranks[pair])
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # pyright: ignore[reportArgumentType]  pairs, as the library below wants them
        model_max_length=config.text.context_length,
    )
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------------------- the card

_LOAD_CLIP = """\
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
# The feature of a clip is the mean of its frames' unit features, made a unit vector again."""

_LOAD_FOLDER = """\
from pathlib import Path

from huggingface_hub import snapshot_download
from dataengine.networks.folder import load_folder

network, config = load_folder(Path(snapshot_download("{name}")))
{use}"""

_USE = {
    "viclip": "video = network.encode_video(frames)  # float32 [B, T, 3, H, W], normalised",
    "internvideo2_stage2": "video = network.encode_video(frames)  # float32 [B, T, 3, H, W], normalised",
    "internvideo2_clip": "video = network.encode_video(frames)  # float32 [B, T, 3, H, W], normalised",
    "internvideo2": "tokens, pooled = network(frames)  # float32 [B, T, 3, H, W], normalised",
}

_TITLES = {
    "open_clip": "An image-text model (CLIP)",
    "viclip": "ViCLIP, a video-text dual encoder ([InternVid](https://arxiv.org/abs/2307.06942))",
    "internvideo2": "A vision encoder of [InternVideo2](https://arxiv.org/abs/2403.15377), distilled",
    "internvideo2_stage2": "A second-stage model of [InternVideo2](https://arxiv.org/abs/2403.15377)",
    "internvideo2_clip": "InternVideo2-CLIP ([InternVideo2](https://arxiv.org/abs/2403.15377))",
}


def _card(
    config: ModelConfig, name: str, num_parameters: int, about: Mapping[str, Any], license_id: str
) -> str:
    """Returns the model card, with the hub's front matter."""
    shape = shape_of(config)
    is_clip = isinstance(config, OpenClipConfig)
    front = {
        "license": license_id,
        "library_name": "transformers" if is_clip else "dataengine",
        "pipeline_tag": "zero-shot-image-classification" if is_clip else "feature-extraction",
        "tags": ["clip"] if is_clip else [shape.kind, "video", "safetensors"],
    }
    if is_clip:
        loading = _LOAD_CLIP.format(name=name)
    else:
        loading = _LOAD_FOLDER.format(name=name, use=_USE[shape.kind])
    facts = {
        "Parameters": f"{num_parameters / 1e6:.2f} M",
        "Input": f"{shape.num_frames} frames of {shape.image_size} x {shape.image_size} pixels, "
        "each the whole frame squeezed into the square (bicubic)",
        "Mean, std": f"{list(shape.pixel_mean)}, {list(shape.pixel_std)}",
        "Text": _text(config),
        **{key.replace("_", " ").capitalize(): value for key, value in about.items()},
    }
    if not is_clip:
        scored = ", or by `score_video_text` with `model: {kind: trained, weights: FOLDER}`"
        by = "`dataengine.networks`" + ("" if shape.kind == "internvideo2" else scored)
        loader = f"transformers does not know this architecture; it is loaded by {by}."
    else:
        loader = "transformers loads it as a `CLIPModel`."
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n"
        f"{_TITLES[shape.kind]}, trained with dataengine {version('dataengine')}.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"## Use\n\n{loader}\n\n```python\n{loading}\n```\n"
    )


def _text(config: ModelConfig) -> str:
    """Returns how texts are read."""
    if isinstance(config, DistilConfig):
        return "none"
    wanted = inputs_of(config)
    families = {
        "clip": "CLIP's byte pairs",
        "bert": "BERT's word pieces",
        "llama": "LLaMA's pieces",
    }
    return f"{families[wanted.tokenizer]}, {wanted.context_length} tokens"


def _cell(value: Any) -> str:
    """Returns a value as it stands in a table of the card."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.replace("|", "\\|").split()) or "-"
