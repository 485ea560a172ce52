# SPDX-License-Identifier: Apache-2.0
"""Captions -> the token ids of a model's text encoder. B captions, L tokens."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks.text import bert_tokens, llama_tokens, tokenise
from training.config import InputSpec

Tokenizer = Callable[[list[str]], torch.Tensor]
"""Captions to int64 [B, L], padded with 0; an id is 0 nowhere but where there is no word."""


def build_tokenizer(spec: InputSpec) -> Tokenizer:
    """Returns the tokenizer of a model's text encoder; loaded once per process.

    - ``clip``: CLIP's byte pairs; long captions keep their end token.
    - ``bert``: ``[CLS] words [SEP]``; the attention mask is ``tokens != 0``.
    - ``llama``: InternVL-C's, as InternVideo2-CLIP uses it: start, ``summarize:`` and the words, end;
      the mask is ``tokens > 0``, as published (the unknown token is 0 too).
    - ``none``: [B, 0].

    Raises:
        DependencyError: If the tokenizer's files are not there.
        ConfigError: If they hold another kind of tokenizer, or one whose [MASK] is not the model's.
    """
    length = spec.context_length
    match spec.tokenizer:
        case "clip":
            return functools.partial(tokenise, context_length=length)
        case "bert":
            bert = _loaded("BertTokenizerFast", spec.tokenizer_name)
            if spec.mask_id not in (None, bert.mask_token_id):
                raise ConfigError(
                    f"[MASK] is {bert.mask_token_id} to the tokenizer {spec.tokenizer_name} and "
                    f"{spec.mask_id} to the model",
                    f"--set model.text.mask_id={bert.mask_token_id}",
                )
            return lambda captions: bert_tokens(bert, captions, length)
        case "llama":
            llama = _loaded("LlamaTokenizer", spec.tokenizer_name)
            return lambda captions: llama_tokens(llama, captions, length)
        case "none":
            return _nothing


def _nothing(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 0, dtype=torch.int64)


@functools.cache
def _loaded(kind: str, name: str) -> Any:
    """Returns a tokenizer of transformers by the name of its class; the network is asked last."""
    if not name:
        raise ConfigError(
            "The text encoder's tokenizer is not named",
            "--set model.text.tokenizer=FOLDER_OR_HUB_ID",
        )
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            "transformers is not installed", "pip install 'dataengine[train]'"
        ) from error
    problem = ""
    for local_only in (True,) if Path(name).exists() else (True, False):
        try:
            tokenizer = getattr(transformers, kind).from_pretrained(
                name, local_files_only=local_only
            )
        except Exception as error:  # noqa: BLE001  transformers, tokenizers and the hub raise all kinds
            problem = " ".join(str(error).split())[:300]
            continue
        # transformers makes up an empty tokenizer where it finds no file.
        if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            if tokenizer.convert_ids_to_tokens(0) not in tokenizer.all_special_tokens:
                raise DependencyError(
                    f"The tokenizer {name} has a word with the id 0, which is padding here",
                    "name the tokenizer that the text encoder was trained with",
                )
            return tokenizer
        problem = "it has no words"
    raise DependencyError(
        f"No tokenizer at {name}: {problem}",
        "give a local folder with its files, or a hub id and a network",
    )
