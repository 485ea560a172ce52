# SPDX-License-Identifier: Apache-2.0
"""What a file gives a network, and giving it: all of it is used, and nothing stays random unsaid.

Files are read as weights alone: no code in them runs.
"""

import argparse
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from dataengine.errors import ConfigError

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
    wanted = [name for name in own if any(within(name, part) for part in filling.parts)]
    left = [name for name in wanted if name not in filling.weights]
    fresh = [name for name in left if any(within(name, part) for part in filling.fresh)]
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
        ConfigError: If there is no such file, it is none of weights, or it cannot be read without
            running code in it.
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
    if not _may_hold_weights(file):
        raise ConfigError(
            f"init: {file} is no file of weights",
            "name one that torch.save or safetensors wrote",
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


def _may_hold_weights(file: Path) -> bool:
    """Returns whether a file begins as safetensors' or torch's own do, now or before zip archives."""
    try:
        with file.open("rb") as opened:
            start = opened.read(9)
    except OSError as error:
        raise ConfigError(f"init: {file} cannot be read ({error.strerror})") from error
    if file.suffix == ".safetensors":
        return start[8:] == b"{"  # behind eight bytes for the header's length
    return start.startswith((b"PK", b"\x80"))


def _is_program(file: Path) -> bool:
    """Returns whether a file is TorchScript, which torch would read by running it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def find(network: nn.Module, kind: type[M]) -> tuple[str, M] | None:
    """Returns the first module of a class and the prefix of its names, "" for the network itself."""
    for name, module in network.named_modules():
        if isinstance(module, kind):
            return (f"{name}." if name else ""), module
    return None


def within(name: str, part: str) -> bool:
    """Returns whether a name is that of a part or lies in it; "" is the whole network."""
    return not part or name == part or name.startswith(f"{part}.")


def groups(names: Iterable[str]) -> str:
    """Returns the first parts of names with how many there are of each."""
    counts = Counter(name.split(".")[0] for name in names)
    shown = [f"{group} ({count})" for group, count in counts.most_common(8)]
    return ", ".join(shown) + (", ..." if len(counts) > 8 else "")


def parts_of(network: nn.Module) -> str:
    """Returns the parts of a network with how many tensors there are in each."""
    return groups(network.state_dict())
