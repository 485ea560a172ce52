# SPDX-License-Identifier: Apache-2.0
"""First weights of a model: a CLIP, published files, or what another run has learnt.

Every tensor of a file is used, or is known not to be needed; every tensor of the part that a file
fills is filled, or is named as fresh. Files are read as weights alone: no code in them runs.

Families of published files are told apart by the names in them, in the order of `_FAMILIES`.
"""

import argparse
import json
import logging
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from dataengine.errors import ConfigError, DependencyError, EngineError
from dataengine.networks.viclip import (
    ViCLIP,
    fit_positions,
    resize_context,
    resize_space,
)
from training.config import InitConfig, OpenClipConfig, TrainConfig
from training.models.task import Task

logger = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]
M = TypeVar("M", bound=nn.Module)

_SHOWN = 5


class Filling(NamedTuple):
    """What a file gives a network."""

    what: str
    """What the file holds, for the log."""
    weights: dict[str, torch.Tensor]
    """By the network's own names."""
    parts: tuple[str, ...]
    """Parts of the network, by the start of their names, that these weights must fill; "" is all."""
    fresh: tuple[str, ...] = ()
    """Names, or starts of names, within the parts that the file has nothing for, as expected."""
    passed_over: tuple[str, ...] = ()
    """Names in the file that the network has no use for."""


def initialise(task: Task, config: TrainConfig) -> None:
    """Loads ``config.init`` in its order; the network is whole, on the CPU, and not yet wrapped.

    Logs a line for each: how many tensors filled which part, and what stayed fresh. Warns of frozen
    weights that nothing was loaded into, for they would stay random.

    Args:
        task: Its ``network`` is filled.
        config: The recipe.

    Raises:
        ConfigError: If a file cannot be read, is of no known family, or does not fit; the message
            names what it holds and what the model has.
        DependencyError: If weights do not fit a part, or a package is missing.
    """
    network = task.network
    filled: set[str] = set()
    for entry in config.init:
        match entry.kind:
            case "clip":
                filling = _clip(entry.path, network, config)
            case "weights":
                state = read_weights(Path(entry.path))
                filling = _published(state, network, entry)
            case "checkpoint":
                filling = _checkpoint(entry, network)
        fresh = fill(network, filling, entry.path)
        filled |= filling.weights.keys()
        logger.info(
            "%s: %s, %d tensors into %s%s%s",
            entry.path,
            filling.what,
            len(filling.weights),
            _groups(filling.weights),
            f"; fresh stay {', '.join(fresh)}" if fresh else "",
            f"; not needed: {_groups(filling.passed_over)}" if filling.passed_over else "",
        )
    random = [
        name
        for name, parameter in network.named_parameters()
        if not parameter.requires_grad and name not in filled
    ]
    if random:
        logger.warning("frozen and random, as nothing was loaded into it: %s", _groups(random))
    if config.init and (left := network.state_dict().keys() - filled):
        logger.info("fresh after all init: %s", _groups(sorted(left)))


def fill(network: nn.Module, filling: Filling, path: str) -> list[str]:
    """Copies weights into a network; all names and shapes must agree and all numbers be finite.

    Args:
        network: Whole and on one device.
        filling: What it is given.
        path: Where from, for the message.

    Returns:
        Names within the filled parts that stay fresh.

    Raises:
        ConfigError: Naming what is missing, unexpected, misshapen or no number.
    """
    own = network.state_dict()
    wanted = [name for name in own if any(_within(name, part) for part in filling.parts)]
    left = [name for name in wanted if name not in filling.weights]
    fresh = [name for name in left if any(_within(name, part) for part in filling.fresh)]
    problems = [f"missing {name}" for name in left if name not in fresh]
    for name, tensor in filling.weights.items():
        if name not in own:
            problems.append(f"unexpected {name}")
        elif tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)} instead of {list(own[name].shape)}"
            problems.append(f"of another shape {name} {shapes}")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems.append(f"not finite {name}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ConfigError(
            f"{path} holds {filling.what} that does not fit the model: "
            f"{', '.join(problems[:_SHOWN])}{more}",
            "make the model's shape in the recipe that of the file, or name another file",
        )
    with torch.no_grad():
        for name, tensor in filling.weights.items():
            own[name].copy_(tensor)
    return fresh


# --- Files


class _Settings:
    """Stands in for a class in which published files keep the settings of their training run.

    They are dicts with attributes. torch fills dicts of its own choice alone, no subclass of them.
    """

    def __new__(cls) -> OrderedDict[str, Any]:
        return OrderedDict()


_KNOWN_CLASSES: list[Any] = [(_Settings, "utils.easydict.EasyDict"), argparse.Namespace]
"""What lies beside the weights in ViCLIP's and in stage 1's files; holds values and runs nothing."""

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, or of a Hugging Face folder, under the names they have there.

    They may lie under ``module``, ``model`` or ``state_dict``; a leading ``module.`` is cut off.

    Raises:
        ConfigError: If there is no such file, or it cannot be read without running code in it.
    """
    file = path
    if path.is_dir():
        found = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise ConfigError(
                f"init: {path} holds neither {' nor '.join(_WEIGHT_FILES)}",
                "name a file of weights; runs and exported models are init.kind: checkpoint, "
                "open_clip's folders init.kind: clip",
            )
        file = found[0]
    if not file.is_file():
        raise ConfigError(f"init: no weights at {file}", "name a downloaded file")
    if _is_program(file):
        raise ConfigError(
            f"init: {file} is a program and not weights alone (TorchScript, as OpenAI's files are)",
            "if you trust it, store its weights by themselves: "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW_FILE)",
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            payload: Any = load_file(file)
        else:
            with torch.serialization.safe_globals(_KNOWN_CLASSES):
                payload = torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
    except Exception as error:  # torch, pickle and safetensors raise all kinds
        raise ConfigError(
            f"init: {file} cannot be read as weights alone ({' '.join(str(error).split())[:300]})",
            "if you trust the file, store its weights by themselves: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)",
        ) from error
    for key in ("module", "model", "state_dict"):
        if isinstance(payload, Mapping) and isinstance(payload.get(key), Mapping):
            payload = payload[key]
    items = payload.items() if isinstance(payload, Mapping) else ()
    state = {
        str(name).removeprefix("module."): tensor
        for name, tensor in items
        if isinstance(tensor, torch.Tensor)
    }
    if not state:
        raise ConfigError(f"init: {file} holds no tensors", "name a file of weights")
    return state


def _is_program(file: Path) -> bool:
    """Returns whether a file is TorchScript, which torch would read by running it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


# --- CLIP


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


def _clip(path: str, network: nn.Module, config: TrainConfig) -> Filling:
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
            f"init: {path} is no CLIP: it holds {_groups(state)}",
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
            f"init: a {model.kind} model has no part that a CLIP fills: it has {_parts(network)}",
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


# --- Published files


def _viclip(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    if not isinstance(network, ViCLIP):
        return None
    fitted = fit_positions({k: v.float() for k, v in state.items()}, network.config)
    return Filling("a ViCLIP", fitted, ("",))


def _vision(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    """Fills the vision encoder from any file that holds one, alone or behind ``vision_encoder.``."""
    from dataengine.networks.internvideo2 import InternVideo2

    place = _find(network, InternVideo2)
    if place is None:
        return None
    prefix, module = place
    inside = any(name.startswith("vision_encoder.") for name in state)
    weights = _vision_weights(state, module, entry)
    used = {f"vision_encoder.{name}" if inside else name for name in weights}
    passed_over = tuple(sorted(state.keys() - used))
    with torch.device("meta"):
        encoder = InternVideo2(module.config).state_dict().keys()
    # A student's decoders are its training's own.
    own = module.state_dict()
    fresh = tuple(prefix + name for name in own if name not in encoder)
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    parts = (prefix.removesuffix("."),)
    return Filling("an InternVideo2 vision encoder", weights, parts, fresh, passed_over)


def _vision_weights(state: State, module: Any, entry: InitConfig) -> dict[str, torch.Tensor]:
    """Returns an encoder's weights by its own names.

    The decoders of a student, which stand beside them in stage 1's files, come along if they are all
    there and of the student's shapes, which its teachers decide; else they stay fresh.
    """
    from dataengine.networks.internvideo2 import load_published_vision, stretch_positions

    config = module.config
    _check_frames(state, config, entry)
    weights = load_published_vision(state, config, entry.num_frames)
    own = module.state_dict()
    decoders = own.keys() - weights.keys()
    if decoders <= state.keys():
        found = {name: state[name].float() for name in decoders}
        found = stretch_positions(found, config, entry.num_frames)
        if all(found[name].shape == own[name].shape for name in decoders):
            weights |= found
    return weights


def _check_frames(state: State, config: Any, entry: InitConfig) -> None:
    """Refuses to guess the frames of a position table whose length could mean several things."""
    table = state.get("vision_encoder.pos_embed", state.get("pos_embed"))
    side = config.image_size // config.patch_size
    if entry.num_frames or table is None or (table.shape[1] - 1) % side**2:
        return
    guess = (table.shape[1] - 1) // side**2
    if guess not in {4, 8, config.num_frames}:
        raise ConfigError(
            f"init: {entry.path} has {table.shape[1] - 1} positions, which do not tell its frames",
            "say how many: init.num_frames, 8 after stage 1 and 4 after stage 2",
        )


def _stage2(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    """Fills a stage-2 model whole, or the vision encoder of another."""
    from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2, load_published_stage2

    if not isinstance(network, InternVideo2Stage2):
        return _vision(state, network, entry)
    _check_frames(state, network.config.vision, entry)
    weights = load_published_stage2(state, network.config, entry.num_frames)
    return Filling("a stage-2 InternVideo2", weights, ("",))


def _internvideo2_clip(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    """Fills an InternVideo2-CLIP, whole or by the few tensors that its training changes.

    The released 1B file has 47: the attention pooling, the temperature, and LLaMA's tables of rotary
    frequencies, which are computed and not learnt.
    """
    from dataengine.networks.internvideo2_clip import InternVideo2Clip, LlamaText

    whole = "vision_encoder.patch_embed.proj.weight" in state
    if not isinstance(network, InternVideo2Clip):
        return _vision(state, network, entry) if whole else None
    weights, parts = {}, []
    vision = {k: v for k, v in state.items() if k.startswith("vision_encoder.")}
    if whole:
        part = _vision_weights(vision, network.vision_encoder, entry)
        weights |= {f"vision_encoder.{name}": tensor for name, tensor in part.items()}
        parts.append("vision_encoder")
    elif vision:
        weights |= vision
        parts.append("vision_encoder.clip_projector")
    text = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
    if isinstance(network.text_encoder, LlamaText):
        text = plain_llama(text)
    if text:
        weights |= _cut_positions(text, network)
        parts.append("text_encoder")
    rest = {k: v for k, v in state.items() if k not in vision and not k.startswith("text_encoder.")}
    weights |= rest
    parts += [part for part in ("vision_align", "temp") if any(_within(k, part) for k in rest)]
    passed_over = tuple(sorted(state.keys() - weights.keys()))
    return Filling("an InternVideo2-CLIP", weights, tuple(parts), (), passed_over)


def _mobileclip(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    from dataengine.networks.mobileclip import MobileClipText

    if (place := _find(network, MobileClipText)) is None:
        return None
    weights = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
    weights |= {
        k: v
        for k, v in state.items()
        if k not in weights and not k.startswith("image_encoder.") and k != "logit_scale"
    }
    passed_over = tuple(sorted(state.keys() - weights.keys()))
    part = place[0].removesuffix(".")
    return Filling("a MobileCLIP", _cut_positions(weights, network), (part,), (), passed_over)


def _cut_positions(weights: State, network: nn.Module) -> dict[str, torch.Tensor]:
    """Returns weights with MobileCLIP's text positions brought to the model's context."""
    name = "text_encoder.positional_embedding.pos_embed.pos_embed"
    own = network.state_dict().get(name)
    if own is None or name not in weights or weights[name].ndim != 4:
        return dict(weights)
    cut_LD = resize_context(weights[name][0, 0], own.shape[2])
    return {**weights, name: cut_LD[None, None]}


def _internvl(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    """Fills LLaMA from InternVL-C's file, whose image encoder is passed over."""
    from dataengine.networks.internvideo2_clip import LlamaText

    if (place := _find(network, LlamaText)) is None:
        return None
    prefix, _ = place
    image = ("patch_embed.", "pos_embed", "cls_token", "blocks.", "clip_projector.", "logit_scale")
    text = {k: v for k, v in state.items() if not k.startswith(image)}
    weights = {prefix + name: tensor for name, tensor in plain_llama(text).items()}
    used = {name.removeprefix(prefix) for name in weights}
    passed_over = tuple(sorted(name for name in state if name not in used and name not in text))
    return Filling("an InternVL-C", weights, (prefix.removesuffix("."),), (), passed_over)


LORA_ALPHA = 32
"""Of the released runs, of rank 16: low-rank changes count twice."""


def plain_llama(state: State) -> dict[str, torch.Tensor]:
    """Returns a LLaMA's weights under its own names, whatever peft has made of them.

    peft calls a matrix that it adapts ``q_proj.base_layer.weight`` (since 0.7), and stores its low-rank
    change beside it, which is added here. Loaded by name alone, such matrices would stay random.
    Tables of rotary frequencies, which are computed, are left out.
    """
    plain = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and not name.endswith("rotary_emb.inv_freq")
    }
    for name, down_RD in state.items():
        stem, found, rest = name.partition(".lora_A.")
        up_name = f"{stem}.lora_B.{rest}"
        if found and up_name in state and f"{stem}.weight" in plain:
            scale = LORA_ALPHA / len(down_RD)
            change = state[up_name].float() @ down_RD.float() * scale
            plain[f"{stem}.weight"] = plain[f"{stem}.weight"].float() + change
        elif found:
            plain[name] = down_RD  # nothing that it could be added to: told as unexpected
    return plain


def _bert(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    from dataengine.networks.bert import Bert, load_plain_bert

    if (place := _find(network, Bert)) is None:
        return None
    prefix, module = place
    path = Path(entry.path)
    folder = path if path.is_dir() else path.parent
    fresh = {prefix + name for name in load_plain_bert(module, folder)}
    weights = {
        prefix + name: tensor
        for name, tensor in module.state_dict().items()
        if prefix + name not in fresh
    }
    return Filling("a BERT", weights, (prefix.removesuffix("."),), tuple(sorted(fresh)))


def _beats(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    from dataengine.networks.beats import Beats, load_beats

    if (place := _find(network, Beats)) is None:
        return None
    prefix, module = place
    loaded = load_beats(entry.path)
    theirs, ours = (beats.config.model_dump() for beats in (loaded, module))
    differing = [f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if theirs[key] != ours[key] and key != "num_classes"]  # fmt: skip
    if differing:
        raise ConfigError(
            f"init: {entry.path} is a BEATs of another shape: {', '.join(differing)}",
            "give model.audio the shape of the file",
        )
    own = module.state_dict()
    weights, passed_over = {}, []
    for name, tensor in loaded.state_dict().items():
        # The classifier of a fine-tuned BEATs; its features are what is used here.
        if name.startswith("head.") and name not in own:
            passed_over.append(name)
        else:
            weights[prefix + name] = tensor
    return Filling("a BEATs", weights, (prefix.removesuffix("."),), (), tuple(passed_over))


def _not_here(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    raise ConfigError(
        f"init: {entry.path} holds a CLIP",
        "load it with init.kind: clip, which inflates it in time",
    )


class _Family(NamedTuple):
    name: str
    recognise: Callable[[State], bool]
    load: Callable[[State, nn.Module, InitConfig], Filling | None]
    """Returns None if the network has no part for it."""


def _has(state: State, *starts: str) -> bool:
    """Returns whether for each of the starts there is a name."""
    return all(any(name.startswith(start) for name in state) for start in starts)


_FAMILIES = (
    _Family("a ViCLIP", lambda s: _has(s, "vision_encoder.conv1."), _viclip),
    # Its image encoder has the names of an InternVideo2, but kernels of a picture.
    _Family("an InternVL-C", lambda s: _has(s, "transformer.embed_tokens.", "text_projection"), _internvl),
    _Family(
        "a stage-2 InternVideo2",
        lambda s: _has(s, "vision_encoder.patch_embed.", "text_encoder.bert."),
        _stage2,
    ),
    _Family(
        "an InternVideo2-CLIP",
        lambda s: _has(s, "vision_encoder.clip_projector.", "temp"),
        _internvideo2_clip,
    ),
    _Family(
        "an InternVideo2 vision encoder",
        lambda s: any(
            name in s and s[name].ndim == 5
            for name in ("patch_embed.proj.weight", "vision_encoder.patch_embed.proj.weight")
        ),
        _vision,
    ),
    _Family("a MobileCLIP", lambda s: _has(s, "text_encoder.embedding_layer."), _mobileclip),
    _Family("a BEATs", lambda s: _has(s, "patch_embedding.", "encoder.pos_conv."), _beats),
    _Family("a BERT", lambda s: _has(s, "bert.embeddings.word_embeddings."), _bert),
    _Family("a CLIP", lambda s: _has(s, "visual."), _not_here),
)  # fmt: skip
"""What published files hold, the most particular first: the first that recognises a file loads it."""


def _published(state: State, network: nn.Module, entry: InitConfig) -> Filling:
    """Returns what a file of known family gives a network.

    Raises:
        ConfigError: If it is of none, or the network has no part for it.
    """
    for family in _FAMILIES:
        if not family.recognise(state):
            continue
        try:
            filling = family.load(state, network, entry)
        except EngineError as error:
            if entry.path in error.message:
                raise
            raise type(error)(f"init: {entry.path}: {error.message}", error.hint) from error
        except ValueError as error:
            raise ConfigError(f"init: {entry.path} does not fit: {error}") from error
        if filling is None:
            raise ConfigError(
                f"init: {entry.path} holds {family.name}, for which the model has no part",
                f"the model has {_parts(network)}",
            )
        return filling
    known = ", ".join(family.name for family in _FAMILIES)
    raise ConfigError(
        f"init: {entry.path} is of no known family: it holds {_groups(state)}",
        f"known are {known}; the model has {_parts(network)}",
    )


# --- Runs of this trainer


def _checkpoint(entry: InitConfig, network: nn.Module) -> Filling:
    """Returns what another run gives a network: all if they are alike, else the part they share."""
    state, num_frames = _read_run(Path(entry.path))
    own = network.state_dict()
    if state.keys() == own.keys() and all(state[name].shape == own[name].shape for name in own):
        return Filling("a model like this one", state, ("",))
    entry = entry.model_copy(update={"num_frames": entry.num_frames or num_frames})
    if state.keys() != own.keys():
        return _published(state, network, entry)
    fitted = _other_frames(state, network, entry)
    return Filling("a model like this one, of other positions", fitted, ("",))


def _other_frames(state: State, network: nn.Module, entry: InitConfig) -> dict[str, torch.Tensor]:
    """Returns the weights of a model of the same kind with positions for this one's frames and grid."""
    from dataengine.networks.internvideo2 import InternVideo2

    if isinstance(network, ViCLIP):
        return fit_positions(state, network.config)
    if (place := _find(network, InternVideo2)) is None:
        return dict(state)
    prefix, module = place
    vision = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    fitted = _vision_weights(vision, module, entry)
    return {**state, **{prefix + name: tensor for name, tensor in fitted.items()}}


def _read_run(path: Path) -> tuple[dict[str, torch.Tensor], int | None]:
    """Returns the weights of a run, a checkpoint or an exported model, and frames of its positions."""
    if not path.is_dir():
        raise ConfigError(
            f"init: no run and no model at {path}",
            "name a run's --output folder, one of its checkpoints, or an exported model; "
            "published files are init.kind: weights",
        )
    if (path / "open_clip_config.json").is_file():
        raise ConfigError(f"init: {path} holds an open_clip model", "load it with init.kind: clip")
    if (path / "meta.json").is_file() or (path / "checkpoints").is_dir():
        from training import checkpoint

        folder = checkpoint.locate(path)
        described = checkpoint.read_meta(folder)["config"]["model"]
        return _read_tensors(folder), _frames_of(described)
    from dataengine.networks.folder import load_folder

    network, config = load_folder(path)
    return dict(network.state_dict()), _frames_of(config.model_dump())


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the network's weights in a checkpoint; a running average stands for what it is of."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {
            name: torch.empty(about.size, dtype=about.properties.dtype)
            for name, about in stored.items()
            if isinstance(about, TensorStorageMetadata)
            and name.startswith(("model.network.", "ema.network."))
        }
        load(tensors, checkpoint_id=folder, no_dist=True)
    except Exception as error:  # pickle and torch raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(f"init: {folder} cannot be read: {problem}") from error
    state = {}
    for prefix in ("model.network.", "ema.network."):
        state |= {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return state


def _frames_of(described: Mapping[str, Any]) -> int | None:
    """Returns the frames of a model's InternVideo2 in its recipe; None if it has none."""
    for part in (described.get("vision"), described.get("student"), described):
        if isinstance(part, Mapping) and "num_frames" in part:
            return part["num_frames"]
    return None


# --- Names


def _find(network: nn.Module, kind: type[M]) -> tuple[str, M] | None:
    """Returns the first module of a class and the prefix of its names, "" for the network itself."""
    for name, module in network.named_modules():
        if isinstance(module, kind):
            return (f"{name}." if name else ""), module
    return None


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def _groups(names: Iterable[str]) -> str:
    """Returns the first parts of names with how many there are of each."""
    counts = Counter(name.split(".")[0] for name in names)
    shown = [f"{group} ({count})" for group, count in counts.most_common(8)]
    return ", ".join(shown) + (", ..." if len(counts) > 8 else "")


def _parts(network: nn.Module) -> str:
    return _groups(network.state_dict())
