# SPDX-License-Identifier: Apache-2.0
"""Caption -> token ids: CLIP's byte pairs as open_clip ships them (offline), BERT's and LLaMA's words.

All are int64 [B, context_length], padded with 0.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

VOCAB_SIZE = 49408
END_OF_TEXT = 49407
"""CLIP's last id: the text feature is read where it stands, the highest id of the row."""

LLAMA_PROMPT = "summarize:"
"""What InternVL-C's text encoder was trained to read before a caption."""

_MAX_CACHED_WORDS = 200_000
"""open_clip remembers every word it met, some 40 MB by then; typing errors have no end."""

_DROPPED = re.compile(r"[.,'!?\"()*#:;~]")
_SPACED = re.compile(r"[-/]")


def clean_caption(caption: str) -> str:
    """Returns the caption in lower case without punctuation, as ViCLIP reads it.

    Source: ``pre_text`` of the published training code; ``<person>`` becomes ``person``.
    """
    text = _SPACED.sub(" ", _DROPPED.sub("", caption.lower()))
    return " ".join(text.replace("<person>", "person").split())


def tokenise(captions: list[str], context_length: int) -> torch.Tensor:
    """Returns int64 [B, context_length]: start, words, end, zeros. Long captions keep their end."""
    tokenizer = _tokenizer()
    if len(tokenizer.cache) > _MAX_CACHED_WORDS:
        _tokenizer.cache_clear()
    return tokenizer(captions, context_length)


@functools.cache
def _tokenizer():  # noqa: ANN202  open_clip's class would be imported with its 3 s
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def bert_tokens(tokenizer: Any, captions: Sequence[str], context_length: int) -> torch.Tensor:
    """Returns ``[CLS] words [SEP]``; long captions keep their end. The mask is ``tokens != 0``."""
    rows = tokenizer(list(captions), max_length=context_length, truncation=True)["input_ids"]
    return _padded(rows, context_length)


def llama_tokens(tokenizer: Any, captions: Sequence[str], context_length: int) -> torch.Tensor:
    """Returns start, ``summarize:`` and the words, end, as InternVideo2-CLIP reads captions.

    The mask is ``tokens > 0``, as published, where the unknown token is 0 too.
    """
    prompts = [LLAMA_PROMPT + caption for caption in captions]
    rows = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return _padded([[start, *row[: context_length - 2], end] for row in rows], context_length)


def _padded(rows: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]).view(-1, length)
