# SPDX-License-Identifier: Apache-2.0
"""Models of the transformers library: loaded whole or not at all, with a revision to cite.

transformers draws missing weights at random and says so in a log line; a caption by such a model
looks like any other. Here a missing, unexpected, misshapen or non-finite weight is an error that names
it. For a tokenizer whose files are missing it invents one that knows next to no words; that is an
error, too.
"""

import os
from pathlib import Path
from typing import Any

from dataengine.errors import DependencyError

_SHOWN_KEYS = 5
_LEAST_VOCABULARY = 0.5
"""Share of a model's vocabulary that its tokenizer has at least: embeddings are padded by a few per cent
(T5: 32,128 for 32,100 tokens), while a tokenizer that was made up has a handful of tokens."""


def torch_device(device: str | None = None) -> str:
    """Returns the torch device to use: the one asked for, else CUDA where there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: str) -> Any:
    """Returns bfloat16 on a GPU, float32 on a CPU."""
    import torch

    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def load_model(
    cls: Any,
    name: str,
    revision: str = "",
    *,
    device: str | None = None,
    dtype: Any = None,
    unused: tuple[str, ...] = (),
) -> Any:
    """Loads a transformers model for inference, with every weight where it belongs.

    Args:
        cls: A transformers model class, with ``from_pretrained``.
        name: Hub id, or a local folder in the library's own format.
        revision: Commit, tag or branch on the hub; empty takes the newest that is known here.
        device: torch device; None takes CUDA where there is one.
        dtype: torch dtype; None takes bfloat16 on a GPU and float32 on a CPU.
        unused: Prefixes of weights that a checkpoint may have although this class does not use them,
            such as the other half of a model.

    Raises:
        DependencyError: If the model is not there or does not fit its class.
    """
    import torch
    from transformers.utils import logging

    place = torch_device(device)
    # A bar for every actor that loads would break into the display of the run.
    logging.disable_progress_bar()
    options = {"revision": revision} if revision and not Path(name).is_dir() else {}
    try:
        model, info = cls.from_pretrained(
            name,
            dtype=dtype or compute_dtype(place),
            output_loading_info=True,
            local_files_only=_offline(),
            # Shapes that do not fit are reported in `info` with their names.
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:  # transformers, safetensors and the hub raise all kinds
        raise _unloadable(name, error) from error
    problems = [f"missing {key}" for key in sorted(info["missing_keys"])]
    problems += [
        f"unexpected {key}"
        for key in sorted(info["unexpected_keys"])
        if not key.startswith(unused or ("\0",))
    ]
    problems += [f"of another shape {entry[0]}" for entry in sorted(info["mismatched_keys"])]
    if problems:
        shown = ", ".join(problems[:_SHOWN_KEYS])
        more = f" and {len(problems) - _SHOWN_KEYS} more" if len(problems) > _SHOWN_KEYS else ""
        raise DependencyError(
            f"Weights of {name} do not fit {cls.__name__}: {shown}{more}",
            "name a checkpoint of this family of models",
        )
    model = model.eval().to(place)
    broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise DependencyError(
            f"Weights of {name} are not finite: {broken[0]}{more}",
            "the checkpoint is broken: fetch or train it again, or name another",
        )
    return model


def load_processor(cls: Any, name: str, revision: str = "") -> Any:
    """Loads a processor, tokenizer or feature extractor of the transformers library.

    Raises:
        DependencyError: If it is not there, or its tokenizer does not know the model's words.
    """
    options: dict[str, Any] = {"local_files_only": _offline()}
    if revision and not Path(name).is_dir():
        options["revision"] = revision
    try:
        loaded = cls.from_pretrained(name, **options)
    except Exception as error:  # as above
        raise _unloadable(name, error) from error
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if hasattr(tokenizer, "get_vocab"):
        _check_vocabulary(name, tokenizer, options)
    return loaded


def _check_vocabulary(name: str, tokenizer: Any, options: dict[str, Any]) -> None:
    """Raises DependencyError for a tokenizer that transformers made up, or that is of another model."""
    from transformers import AutoConfig

    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise _no_tokenizer(name, "what was found has no words")
    try:
        text_config = AutoConfig.from_pretrained(name, **options).get_text_config()
    except Exception:  # noqa: BLE001 - a tokenizer may lie alone, and configs nest in their own ways
        return
    expected = getattr(text_config, "vocab_size", None) or 0
    if len(tokenizer) < _LEAST_VOCABULARY * expected:
        raise _no_tokenizer(name, f"{len(tokenizer):,} tokens, the model has {expected:,}")


def _no_tokenizer(name: str, why: str) -> DependencyError:
    mend = "fetch or copy it again, with its tokenizer's files (tokenizer.json, vocab.txt, ...)"
    return DependencyError(f"The tokenizer of {name} is missing or does not fit: {why}", mend)


def model_revision(name: str, model: Any) -> str:
    """Returns the commit a hub model came from, or a hash of a local folder's files.

    The hash is taken of every file's name, size and first megabyte.
    """
    folder = Path(name)
    if not folder.is_dir():
        return getattr(model.config, "_commit_hash", None) or ""
    from dataengine.records import digest

    parts: list[str | bytes] = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as opened:
            parts += [file.name, str(file.stat().st_size), opened.read(1 << 20)]
    return digest(*parts)


def model_id(name: str) -> str:
    """Returns what a model is called in provenance: its hub id, or a local folder's name."""
    return Path(name).name if Path(name).is_dir() else name


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _unloadable(name: str, error: Exception) -> DependencyError:
    hint = (
        "dataengine doctor PIPELINE says what is missing, dataengine prefetch PIPELINE fetches it"
    )
    problem = " ".join(str(error).split())[:300]
    if Path(name).is_dir():
        hint = "the folder is not a whole model of this kind: fetch, copy or train it again"
    elif is_folder_name(name):
        problem, hint = "no such folder", "change the setting, or put the model there"
    elif "/" in name and Path(name).parent.is_dir():
        hint = f"there is no folder {name}; if it is meant as a hub id: {hint}"
    return DependencyError(f"Model cannot be loaded: {name} ({problem})", hint)


def is_folder_name(name: str) -> bool:
    """Returns whether a model's name can be that of a folder only, never a hub id."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
