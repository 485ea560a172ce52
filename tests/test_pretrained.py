# SPDX-License-Identifier: Apache-2.0
import transformers
from transformers.utils import logging

from dataengine.models.pretrained import load_model


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
