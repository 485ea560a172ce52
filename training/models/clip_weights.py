# SPDX-License-Identifier: Apache-2.0
"""A CLIP's weights for a ViCLIP or an open_clip model; its activation and its heads are looked at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks.viclip import ViCLIP, resize_context, resize_space
from training.config import OpenClipConfig, TrainConfig
from training.models.filling import Filling, State, groups, parts_of, read_weights


class _Clip(NamedTuple):
    state: State
    quick_gelu: bool | None
    """Whether it was trained with the sigmoid GELU; None if nothing tells."""
    heads: tuple[int, int]
    """Of its image and its text tower; 0 is not known."""


_CLIP_UNNEEDED = {
    "logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size"
}  # fmt: skip
_HEAD_WIDTH = 64
"""Of every CLIP that does not say otherwise."""


def clip_filling(path: str, network: nn.Module, config: TrainConfig) -> Filling:
    """Returns a CLIP's weights for a ViCLIP or for an open_clip model.

    As in ViCLIP's released code: the patch kernel becomes one of a single frame, image positions are
    resized bicubically, text positions are cut (or padded with zeros), and the temporal embedding stays
    at zero, so that a clip is at first what its frames are.

    A CLIP that was trained with another GELU than the model computes is refused. The released code
    would load it, but a frozen text tower, the published recipe, would then never give the features it
    was trained to give.
    """
    clip = _open_clip_source(path)
    # The text tower of open_clip's other class of models stands behind "text.".
    state = {
        name.removeprefix("text."): tensor.float()
        for name, tensor in clip.state.items()
        if tensor.is_floating_point() or name not in _CLIP_UNNEEDED
    }
    if not any(name.startswith("visual.") for name in state):
        raise ConfigError(
            f"init: {path} is no CLIP: it holds {groups(state)}",
            "published files of other models are init.kind: weights",
        )
    model = config.model
    if isinstance(network, ViCLIP):
        assert model.kind == "viclip"
        quick_gelu, heads = True, (model.video.heads, model.text.heads)
    elif isinstance(model, OpenClipConfig):
        quick_gelu, heads = model.quick_gelu, (model.video.heads, model.text.heads)
    else:
        raise ConfigError(
            f"init: a {model.kind} model has no part that a CLIP fills: it has {parts_of(network)}",
            "init.kind: clip is for viclip and open_clip models",
        )
    _same_activation(path, clip.quick_gelu, quick_gelu, isinstance(model, OpenClipConfig))
    for tower, theirs, ours in zip(("video", "text"), clip.heads, heads, strict=True):
        if theirs and theirs != ours:
            raise ConfigError(
                f"init: {path} has {theirs} heads where the model has {ours}",
                f"--set model.{tower}.heads={theirs}: weights of another number mean nothing",
            )
    side = model.video.image_size // model.video.patch_size
    length = model.text.context_length
    try:
        if "visual.positional_embedding" in state:
            table = state["visual.positional_embedding"]
            state["visual.positional_embedding"] = resize_space(table, side)
    except ValueError as error:
        raise ConfigError(f"init: {path} does not fit: {error}") from error
    if "positional_embedding" in state:
        state["positional_embedding"] = resize_context(state["positional_embedding"], length)
    if isinstance(model, OpenClipConfig):
        own = network.state_dict()
        weights = {
            f"clip.{name}": tensor
            for name, tensor in state.items()
            if name not in _CLIP_UNNEEDED or f"clip.{name}" in own
        }
        passed_over = tuple(sorted(state.keys() - {n.removeprefix("clip.") for n in weights}))
        return Filling("a CLIP", weights, ("",), (), passed_over)
    weights = {}
    for name, tensor in state.items():
        if name == "visual.conv1.weight":
            weights["vision_encoder.conv1.weight"] = tensor.unsqueeze(2)
        elif name.startswith("visual."):
            weights[f"vision_encoder.{name.removeprefix('visual.')}"] = tensor
        elif name not in _CLIP_UNNEEDED:
            weights[f"text_encoder.{name}"] = tensor
    fresh = ("vision_encoder.temporal_positional_embedding", "temp")
    passed_over = tuple(sorted(state.keys() & _CLIP_UNNEEDED))
    return Filling("a CLIP", weights, ("",), fresh, passed_over)


def _same_activation(path: str, theirs: bool | None, ours: bool, can_choose: bool) -> None:
    """Refuses a CLIP of another GELU, or of an unknown one.

    Raises:
        ConfigError: If the model would compute something else than the CLIP was trained with.
    """
    if theirs is None:
        raise ConfigError(
            f"init: {path} does not tell which GELU it was trained with",
            "name its architecture in open_clip too: ViT-B-16-quickgelu@FILE for OpenAI's weights "
            "and others of the sigmoid GELU, ViT-B-16@FILE for those of the exact one",
        )
    if theirs != ours:
        names = {True: "the sigmoid GELU (QuickGELU)", False: "the exact GELU"}
        raise ConfigError(
            f"init: {path} was trained with {names[theirs]}, and the model computes {names[ours]}",
            f"--set model.quick_gelu={str(theirs).lower()}"
            if can_choose
            else "take a CLIP of that GELU, such as OpenAI's: ViT-B-16-quickgelu@openai",
        )


def _open_clip_source(path: str) -> _Clip:
    """Returns a CLIP from a folder, a file, or ``ARCHITECTURE@FILE_OR_TAG``."""
    architecture, separator, source = path.partition("@")
    if Path(path).exists() or not separator:
        folder = Path(path.removeprefix("local-dir:"))
        if folder.is_dir():
            return _open_clip_folder(folder)
        state = read_weights(folder)
        return _Clip(state, True if _is_openai(state) else None, _clip_heads(state, {}))
    import open_clip

    described = open_clip.get_model_config(architecture)
    if described is None:
        raise ConfigError(
            f"init: open_clip knows no architecture {architecture}",
            'python -c "import open_clip; print(open_clip.list_models())"',
        )
    quick_gelu = bool(described.get("quick_gelu", False))
    if Path(source).exists():
        state = read_weights(Path(source))
        return _Clip(state, quick_gelu or _is_openai(state), _clip_heads(state, described))
    tag = open_clip.get_pretrained_cfg(architecture, source)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ConfigError(
            f"init: {source} is neither a file nor a tag of {architecture} in open_clip",
            f"its tags: {tags}",
        )
    try:
        model = open_clip.create_model(architecture, pretrained=source)
    except Exception as error:  # the hub and the network raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"init: {path} could not be downloaded ({problem})",
            "download the file elsewhere and name it: ARCHITECTURE@FILE",
        ) from error
    state = model.state_dict()
    gelu = quick_gelu or bool(tag.get("quick_gelu", False))
    return _Clip(state, gelu, _clip_heads(state, described))


def _open_clip_folder(folder: Path) -> _Clip:
    """Returns a CLIP from what open_clip loads as ``local-dir:<folder>``."""
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    files = [folder / name for name in names if (folder / name).is_file()]
    try:
        described = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        quick_gelu = bool(described.get("quick_gelu", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"init: {folder} is no folder of open_clip: open_clip_config.json cannot be read",
            f"it needs that file and {' or '.join(names)}",
        ) from error
    if not files:
        raise ConfigError(
            f"init: {folder} holds neither {' nor '.join(names)}",
            "download the folder's weights too",
        )
    state = read_weights(files[0])
    return _Clip(state, quick_gelu, _clip_heads(state, described))


def _is_openai(state: State) -> bool:
    """Returns whether these are OpenAI's weights, which alone hold their sizes as tensors."""
    return {"input_resolution", "context_length", "vocab_size"} <= state.keys()


def _clip_heads(state: State, described: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the heads of the image and the text tower, 0 where the architecture does not tell."""
    vision, text = described.get("vision_cfg", {}), described.get("text_cfg", {})
    width = state["visual.class_embedding"].shape[0] if "visual.class_embedding" in state else 0
    image_heads = width // vision.get("head_width", _HEAD_WIDTH)
    if described:
        return image_heads, text.get("heads", 8) if "width" in text else 0
    return (image_heads, width_of_text(state) // _HEAD_WIDTH) if _is_openai(state) else (0, 0)


def width_of_text(state: State) -> int:
    """Returns the width of a CLIP's text tower, 0 if it has none."""
    table = state.get("token_embedding.weight", state.get("text.token_embedding.weight"))
    return 0 if table is None else table.shape[1]
