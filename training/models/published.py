# SPDX-License-Identifier: Apache-2.0
"""Published files by family: which one a file is, and what it gives a network.

Families are told apart by the names in a file, in the order of `_FAMILIES`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dataengine.errors import ConfigError, EngineError
from dataengine.networks.viclip import ViCLIP, fit_positions, resize_context
from training.config import InitConfig
from training.models.filling import Filling, State, find, groups, parts_of, within


def _viclip(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    if not isinstance(network, ViCLIP):
        return None
    fitted = fit_positions({k: v.float() for k, v in state.items()}, network.config)
    return Filling("a ViCLIP", fitted, ("",))


def _vision(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    """Fills the vision encoder from any file that holds one, alone or behind ``vision_encoder.``."""
    from dataengine.networks.internvideo2 import InternVideo2

    place = find(network, InternVideo2)
    if place is None:
        return None
    prefix, module = place
    inside = any(name.startswith("vision_encoder.") for name in state)
    weights = vision_weights(state, module, entry)
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


def vision_weights(state: State, module: Any, entry: InitConfig) -> dict[str, torch.Tensor]:
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
        part = vision_weights(vision, network.vision_encoder, entry)
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
    parts += [part for part in ("vision_align", "temp") if any(within(k, part) for k in rest)]
    passed_over = tuple(sorted(state.keys() - weights.keys()))
    return Filling("an InternVideo2-CLIP", weights, tuple(parts), (), passed_over)


def _mobileclip(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    from dataengine.networks.mobileclip import MobileClipText

    if (place := find(network, MobileClipText)) is None:
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

    if (place := find(network, LlamaText)) is None:
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

    if (place := find(network, Bert)) is None:
        return None
    prefix, module = place
    path = Path(entry.path)
    source = path.parent if path.is_file() else entry.path
    fresh = {prefix + name for name in load_plain_bert(module, source)}
    weights = {
        prefix + name: tensor
        for name, tensor in module.state_dict().items()
        if prefix + name not in fresh
    }
    return Filling("a BERT", weights, (prefix.removesuffix("."),), tuple(sorted(fresh)))


def _beats(state: State, network: nn.Module, entry: InitConfig) -> Filling | None:
    from dataengine.networks.beats import Beats, load_beats

    if (place := find(network, Beats)) is None:
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
    _Family("a BERT", lambda s: not s or _has(s, "bert.embeddings.word_embeddings."), _bert),
    _Family("a CLIP", lambda s: _has(s, "visual."), _not_here),
)  # fmt: skip
"""What published files hold, the most particular first: the first that recognises a file loads it."""

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def is_hub_name(path: str) -> bool:
    """Returns whether a path is no file but a name on the Hugging Face hub: a BERT's."""
    is_name = re.fullmatch(r"[\w-]+/[\w.-]+", path) and not path.endswith(_SUFFIXES)
    return bool(is_name) and not Path(path).exists()


def published_filling(state: State, network: nn.Module, entry: InitConfig) -> Filling:
    """Returns what a file of known family gives a network.

    Args:
        state: What is in the file; nothing if `is_hub_name`.
        network: What is to be filled.
        entry: Where the file is.

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
                f"the model has {parts_of(network)}",
            )
        return filling
    known = ", ".join(family.name for family in _FAMILIES)
    raise ConfigError(
        f"init: {entry.path} is of no known family: it holds {groups(state)}",
        f"known are {known}; the model has {parts_of(network)}",
    )
