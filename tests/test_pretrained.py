# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any

import pytest
import transformers
from transformers.utils import logging

from dataengine.errors import DependencyError
from dataengine.models.frame_captioner import BlipConfig, build_frame_captioner
from dataengine.models.pretrained import load_model, load_processor
from tests.tiny_captioners import save_tiny_blip, save_tiny_t5


def test_no_bar_of_a_loading_model_breaks_into_the_progress_of_a_run(tmp_path, capfd):
    config = transformers.BertConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        intermediate_size=8,
        vocab_size=9,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    logging.enable_progress_bar()
    capfd.readouterr()
    load_model(transformers.BertModel, str(tmp_path), device="cpu")
    assert "Loading" not in capfd.readouterr().err
    logging.enable_progress_bar()
    transformers.BertModel.from_pretrained(tmp_path)
    assert "Loading" in capfd.readouterr().err  # what would be there


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path):
    folder = save_tiny_blip(tmp_path)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(DependencyError, match=r"tokenizer of .* does not fit") as info:
        build_frame_captioner(BlipConfig(model=str(folder), device="cpu"))
    assert "tokenizer's files" in info.value.hint


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save_tiny_t5(tmp_path)
    words = len(load_processor(transformers.AutoTokenizer, str(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": words + words // 2}))
    load_processor(transformers.AutoTokenizer, str(folder))  # embeddings are padded
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 3 * words}))
    with pytest.raises(DependencyError, match=f"{words} tokens, the model has {3 * words}"):
        load_processor(transformers.AutoTokenizer, str(folder))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, broken):
    folder = save_tiny_t5(tmp_path)
    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    model.encoder.block[0].layer[0].SelfAttention.q.weight.data[0, 0] = broken
    model.save_pretrained(folder)
    with pytest.raises(DependencyError, match=r"not finite: encoder\.block\.0.*q\.weight"):
        load_model(transformers.T5ForConditionalGeneration, str(folder), device="cpu")


@pytest.mark.parametrize("name", ["/no/such/blip", "./blip", "out/models/blip"])
def test_a_folder_that_is_not_there_is_called_one(name):
    with pytest.raises(DependencyError, match="no such folder") as info:
        load_model(transformers.T5ForConditionalGeneration, name, device="cpu")
    assert "prefetch" not in info.value.hint


def test_no_fetching_mends_a_damaged_folder(tmp_path):
    folder = save_tiny_t5(tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(DependencyError, match="cannot be loaded") as info:
        load_model(transformers.T5ForConditionalGeneration, str(folder), device="cpu")
    assert "prefetch" not in info.value.hint
