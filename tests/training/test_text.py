# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the three text encoders, each made here from a few words."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks.text import END_OF_TEXT, tokenise
from training.config import InputSpec
from training.data.text import build_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "##s"]
PIECES = ["<unk>", "<s>", "</s>", "▁", "s", "u", "m", "a", "r", "i", "z", "e", ":", "d", "▁r", "ed"]
PIECES += ["▁red"]


def spec(kind, name="", length=8):
    half = (0.5, 0.5, 0.5)
    return InputSpec(2, 32, kind, str(name), length, half, half)


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path


@pytest.fixture
def llama(tmp_path):
    """A byte-pair tokenizer with LLaMA's special tokens, in the format that transformers saves."""
    ids = {piece: number for number, piece in enumerate(PIECES)}
    merges = [("▁", "r"), ("e", "d"), ("▁r", "ed")]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace("▁")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_clip_is_open_clips_byte_pairs():
    captions = ["a red square", "word " * 30]
    tokens = build_tokenizer(spec("clip"))(captions)
    assert torch.equal(tokens, tokenise(captions, 8))
    assert tokens[1, -1] == END_OF_TEXT


def test_bert_pads_with_zero_and_long_captions_keep_their_end(bert):
    tokens = build_tokenizer(spec("bert", bert, 6))(["A red squares", "red " * 9, "", "zebra"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [2, 5, 6, 7, 8, 3],
        [2, 6, 6, 6, 6, 3],
        [2, 3, 0, 0, 0, 0],
        [2, 1, 3, 0, 0, 0],
    ]


def test_llama_reads_its_prompt_and_ends(llama):
    tokens = build_tokenizer(spec("llama", llama, 16))(["a red", "a red a red"])
    pieces = [[PIECES[i] for i in row] for row in tokens.tolist()]
    prompt = ["<s>", "▁", *"summarize:", "a"]
    assert pieces[0] == [*prompt, "▁red", "</s>", "<unk>"]
    # Cut before the end token, which stays: the feature is read there.
    assert pieces[1] == [*prompt, "▁red", "▁", "</s>"]
    assert tokens[0].gt(0).sum() == 15


def test_no_text_is_no_token():
    assert build_tokenizer(spec("none", length=0))(["a", "b"]).shape == (2, 0)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_empty_folder_is_named_and_not_made_up(kind, tmp_path):
    with pytest.raises(DependencyError, match="No tokenizer at"):
        build_tokenizer(spec(kind, tmp_path))


def test_unnamed_tokenizer_says_what_to_set():
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(spec("llama"))
    assert "model.text.tokenizer" in caught.value.hint


def test_word_with_the_id_of_padding_is_refused(bert):
    (bert / "vocab.txt").write_text("\n".join([*WORDS[::-1]]))
    with pytest.raises(DependencyError, match="id 0"):
        build_tokenizer(spec("bert", bert))


def test_tokenizer_whose_mask_is_not_the_models_is_refused(bert):
    agreeing = replace(spec("bert", bert), mask_id=4)
    assert build_tokenizer(agreeing)(["a"]).shape == (1, 8)
    with pytest.raises(ConfigError, match=r"\[MASK\] is 4 .* and 103 to the model"):
        build_tokenizer(replace(agreeing, mask_id=103))
