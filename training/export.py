# SPDX-License-Identifier: Apache-2.0
"""``python -m training.export CHECKPOINT FOLDER``: a trained model as others load it.

A model folder (`dataengine.networks.folder`) for the kinds of `dataengine.networks`, an open_clip folder
for open_clip's; with ``--format huggingface`` a folder that is ready for the hub.
"""

import argparse
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dataengine.errors import ConfigError, DependencyError, EngineError
from dataengine.networks.config import NetworkConfig
from training.config import (
    DistilConfig,
    ModelConfig,
    OpenClipConfig,
    TrainConfig,
    inputs_of,
)
from training.console import run_command, say

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
"""Larger models are stored in several files."""

_STUDENT_EXTRAS = (
    *("clip_decoder.", "final_clip_decoder.", "mae_decoder."),
    *("clip_pos_embed", "clip_img_pos_embed", "mae_pos_embed"),
)
"""What answers the teachers in stage 1; of no use without them."""

_OWN_FILES = (
    *("config.json", "model*.safetensors", "model.safetensors.index.json", "README.md"),
    *("preprocessor_config.json", "open_clip_config.json", "open_clip_model.safetensors"),
    *("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json"),
)
"""Patterns of what an export writes: a folder of nothing else may be replaced by a new export."""


def export_folder(
    network_state: "Mapping[str, torch.Tensor]",
    config: ModelConfig,
    folder: Path,
    *,
    half: bool = False,
    about: Mapping[str, Any] | None = None,
) -> int:
    """Writes a model folder, or an open_clip folder for that kind; returns its bytes.

    Of an ``internvideo2_distil`` model the student's vision encoder is written, as kind
    ``internvideo2``. The folder appears complete or not at all, and takes the place of an older export.

    Args:
        network_state: Weights of the task's ``network`` under the published names, whole (no shards), on
            any device.
        config: The recipe's model.
        folder: Where it goes.
        half: Whether floats are stored as float16: half the size, three digits.
        about: What is known of its training, as plain values (`about_run`).

    Raises:
        ConfigError: If ``folder`` holds files that no export writes.
        EngineError: If a weight is not finite, or not within float16's range with ``half``.
    """

    def write(place: Path) -> None:
        weights = _weights(_exported_state(network_state, config), half)
        if isinstance(config, OpenClipConfig):
            _write_open_clip(weights, config, place, about or {})
            return
        _write_weights(weights, place)
        _write_json(place / "config.json", _described(config, about or {}))
        try:
            _write_tokenizer(config, place)
        except DependencyError as error:
            logger.warning("%s; the exported folder goes without it", error.message)

    return _write_atomically(folder, write)


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
        weights = _weights(_exported_state(network_state, config), half)
        if isinstance(config, OpenClipConfig):
            weights = _clip_weights(weights)
            described: dict[str, Any] = _clip_config(config)
            _write_clip_tokenizer(config, place)
        else:
            described = _described(config, about or {})
            kind = described["kind"]
            described |= {"model_type": kind, "architectures": [_ARCHITECTURES[kind]]}
            _write_tokenizer(config, place)
        _write_weights(weights, place)
        _write_json(place / "config.json", described | {"dtype": "float16" if half else "float32"})
        _write_json(place / "preprocessor_config.json", _preprocessor(config))
        num_parameters = sum(tensor.numel() for tensor in weights.values())
        card = _card(config, folder.name, num_parameters, about or {}, license_id)
        (place / "README.md").write_text(card, encoding="utf-8")

    return _write_atomically(folder, write)


def about_run(config: TrainConfig, step: int) -> dict[str, Any]:
    """Returns what an export says of its training: plain values for ``about``."""
    return {
        "trained_on": [source.data for source in config.data.sources],
        "caption": config.data.caption,
        "clean_captions": config.data.clean_captions,
        "steps": step,
        "batch_size": config.data.batch_size,
        "initialised_from": [entry.path for entry in config.init],
    }


# ------------------------------------------------------------------------------------ the weights


def _exported_state(
    state: "Mapping[str, torch.Tensor]", config: ModelConfig
) -> "dict[str, torch.Tensor]":
    """Returns the weights that are exported, under the names that the format wants."""
    match config:
        case OpenClipConfig():
            return {name.removeprefix("clip."): tensor for name, tensor in state.items()}
        case DistilConfig():
            return {n: t for n, t in state.items() if not n.startswith(_STUDENT_EXTRAS)}
        case _:
            from dataengine.networks.folder import published_names

            return published_names(state, config)


def _weights(state: "Mapping[str, torch.Tensor]", half: bool) -> "dict[str, torch.Tensor]":
    """Returns weights on the CPU as they are stored, each with a memory of its own.

    Raises:
        EngineError: If one is not finite.
    """
    import torch

    stored: dict[str, torch.Tensor] = {}
    memories: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu")
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float16 if half else torch.float32)
        if not torch.isfinite(tensor).all():
            raise EngineError(
                f"{name} is not finite" + (" in float16" if half else ""),
                "export an earlier checkpoint" + (", or without --half" if half else ""),
            )
        memory = tensor.untyped_storage().data_ptr()
        # Tied weights are stored under each of their names, as the published files have them.
        stored[name] = (tensor.clone() if memory in memories else tensor).contiguous()
        memories.add(memory)
    return stored


def _write_weights(weights: "Mapping[str, torch.Tensor]", folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(weights), folder, max_shard_size=MAX_SHARD_SIZE)


def _write_atomically(folder: Path, write: Callable[[Path], None]) -> int:
    """Lets ``write`` fill a folder beside the wanted one, then puts it there; returns its bytes."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() or not any(path.match(pattern) for pattern in _OWN_FILES):
                raise ConfigError(
                    f"{folder} holds {path.name}, which no export writes",
                    "name a folder that does not exist yet, or one that holds an export alone",
                )
    elif folder.exists():
        raise ConfigError(f"{folder} is a file", "name a folder")
    folder = folder.absolute()
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        num_bytes = 0
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes for its user alone; this is for others
            num_bytes += path.stat().st_size
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return num_bytes


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------- the descriptions


@dataclass(frozen=True, slots=True)
class _Shape:
    """What every format says of a model.

    Attributes:
        kind: As in `dataengine.networks.folder`, or ``open_clip``.
        config: Its shape.
        num_frames: Of a clip.
        image_size: Height and width, pixels.
        pixel_mean: Of red, green, blue in [0, 1].
        pixel_std: The same.
    """

    kind: str
    config: NetworkConfig
    num_frames: int
    image_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


def _shape(config: ModelConfig) -> _Shape:
    pixels = config.pixel_mean, config.pixel_std
    match config:
        case DistilConfig():
            # Training may read more frames, for a second teacher; the student sees these.
            student = config.student
            return _Shape("internvideo2", student, student.num_frames, student.image_size, *pixels)
        case _:
            wanted = inputs_of(config)
            return _Shape(config.kind, config, wanted.num_frames, wanted.image_size, *pixels)


def _described(config: ModelConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``config.json`` of a model folder."""
    from dataengine.networks.folder import FORMAT_VERSION

    shape = _shape(config)
    # A vision encoder's own shape does not say how its frames are normalised.
    pixels = {"pixel_mean": shape.pixel_mean, "pixel_std": shape.pixel_std}
    return {
        "format_version": FORMAT_VERSION,
        "kind": shape.kind,
        "model": shape.config.model_dump(mode="json"),
        "dataengine_version": version("dataengine"),
        "about": {**about, **(pixels if shape.kind == "internvideo2" else {})},
    }


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    """Returns ``preprocessor_config.json``: each frame squeezed into a square, and normalised."""
    shape = _shape(config)
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


def _write_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Puts the files of a BERT's or a LLaMA's tokenizer into a folder; CLIP's is in open_clip.

    Raises:
        DependencyError: If it cannot be loaded.
    """
    wanted = inputs_of(config)
    if wanted.tokenizer not in {"bert", "llama"}:
        return
    name = wanted.tokenizer_name
    try:
        from transformers import BertTokenizer, LlamaTokenizer

        kind = BertTokenizer if wanted.tokenizer == "bert" else LlamaTokenizer
        kind.from_pretrained(name).save_pretrained(folder)
    except Exception as error:  # transformers and the hub raise all kinds
        raise DependencyError(
            f"The tokenizer {name!r} cannot be loaded: {' '.join(str(error).split())[:300]}",
            "model.tokenizer of the recipe names it: put it there, or fetch it",
        ) from error


# -------------------------------------------------------------------------------------- open_clip


def _write_open_clip(
    weights: "Mapping[str, torch.Tensor]",
    config: OpenClipConfig,
    folder: Path,
    about: Mapping[str, Any],
) -> None:
    """Writes what open_clip loads as ``local-dir:FOLDER``, in float32 whatever is stored."""
    from safetensors.torch import save_file

    from training.models.open_clip_model import model_config

    described = model_config(config)
    described["vision_cfg"].pop("patch_dropout")  # a matter of training alone
    save_file(dict(weights), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    document = {
        "model_cfg": described,
        "preprocess_cfg": {
            "mean": list(config.pixel_mean),
            "std": list(config.pixel_std),
            "interpolation": "bicubic",
            # Training and evaluation squeeze the whole frame into the square.
            "resize_mode": "squash",
        },
    }
    _write_json(
        folder / "open_clip_config.json", document | ({"about": dict(about)} if about else {})
    )


# ----------------------------------------------------------------------------------- transformers

_ARCHITECTURES = {
    "viclip": "ViCLIP",
    "internvideo2": "InternVideo2",
    "internvideo2_stage2": "InternVideo2Stage2",
    "internvideo2_clip": "InternVideo2Clip",
}
"""Kind -> its class in `dataengine.networks`."""

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
    shape = _shape(config)
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


def _cell(value: Any) -> str:
    """Returns a value as it stands in a table of the card."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.replace("|", "\\|").split()) or "-"


# ------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Exports a checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description="Writes a trained model as others load it: a model folder for score_video_text, "
        "an open_clip folder, or a folder for the Hugging Face hub.",
    )
    parser.add_argument("checkpoint", type=Path, help="a run's --output folder, or a checkpoint")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument(
        "--half", action="store_true", help="store float16: half the size, three digits"
    )
    parser.add_argument(
        "--format",
        choices=("folder", "open_clip", "huggingface"),
        default="folder",
        help="folder is what this package loads; of an open_clip model it is open_clip's own",
    )
    parser.add_argument(
        "--license", default="other", metavar="ID", help="for the card of --format huggingface"
    )
    given = parser.parse_args(arguments)

    def export() -> None:
        from training import checkpoint

        source = checkpoint.locate(given.checkpoint)
        config = checkpoint.read_config(source)
        model = config.model
        if given.format == "open_clip" and not isinstance(model, OpenClipConfig):
            raise ConfigError(
                f"{source} holds a {model.kind} model, which open_clip cannot load",
                "leave --format out",
            )
        state = _read(source, model)
        about = about_run(config, checkpoint.read_meta(source)["step"])
        if given.format == "huggingface":
            num_bytes = export_huggingface(
                state, model, given.folder, half=given.half, about=about, license_id=given.license
            )
        else:
            num_bytes = export_folder(state, model, given.folder, half=given.half, about=about)
        say(f"{given.folder}: {num_bytes / 1e6:.2f} MB, {_next(model, given.format, given.folder)}")

    return run_command(export)


def _read(checkpoint_folder: Path, config: ModelConfig) -> "dict[str, torch.Tensor]":
    """Returns what a checkpoint holds of the network that is exported; teachers are not needed."""
    from dataengine.networks.folder import build_network
    from training import checkpoint

    unneeded: tuple[str, ...] = ()
    match config:
        case OpenClipConfig():
            from training.models.open_clip_model import OpenClipDualEncoder

            network: nn.Module = OpenClipDualEncoder(config)
        case DistilConfig():
            network, unneeded = build_network(config.student), _STUDENT_EXTRAS
        case _:
            network = build_network(config)
    checkpoint.load_weights(checkpoint_folder, network, unneeded=unneeded)
    return network.state_dict()


def _next(model: ModelConfig, form: str, folder: Path) -> str:
    """Returns what can be done with an export."""
    match model:
        case _ if form == "huggingface":
            return f"hf upload OWNER/NAME {folder}"
        case OpenClipConfig():
            return f"load it with local-dir:{folder}"
        case DistilConfig():
            return "dataengine.networks.folder.load_folder loads it"
        case _:
            return f"score_video_text takes it: model={{kind: trained, weights: {folder}}}"


if __name__ == "__main__":
    sys.exit(main())
