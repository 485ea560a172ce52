# SPDX-License-Identifier: Apache-2.0
"""Caption -> token ids, with CLIP's byte-pair vocabulary as open_clip ships it (offline)."""

import functools
import re

import torch

VOCAB_SIZE = 49408
END_OF_TEXT = 49407
"""CLIP's last id: the text feature is read where it stands, the highest id of the row."""

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
