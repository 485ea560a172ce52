# SPDX-License-Identifier: Apache-2.0
"""The split BERT against the library's plain one, and what it loads."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dataengine.errors import DependencyError
from dataengine.networks.bert import Bert, load_plain_bert, plain_bert, published_bert
from dataengine.networks.config import BertConfig, InternVideo2Stage2Config

SHAPE = {
    "vocab_size": 60, "width": 32, "layers": 4, "heads": 4, "mlp_width": 48,
    "max_positions": 16, "mask_id": 4, "dropout": 0.0,
}  # fmt: skip
SEEN = 20


@pytest.fixture
def config():
    return BertConfig.model_validate({**SHAPE, "fusion_layer": 2})


def random_bert(config):
    """Weights all over, norms and biases included."""
    torch.manual_seed(0)
    model = Bert(config, SEEN).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def texts():
    tokens = torch.randint(5, 60, (3, 10), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 2
    for row, length in enumerate((10, 7, 4)):
        tokens[row, length - 1] = 3
        tokens[row, length:] = 0
    return tokens


def hugging_face(layers=4):
    from transformers import BertConfig as TheirConfig
    from transformers import BertForPreTraining

    torch.manual_seed(3)
    model = BertForPreTraining(
        TheirConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=16,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    hugging_face().save_pretrained(path)
    return path


def test_without_fusion_it_is_a_plain_bert(folder):
    theirs = hugging_face()
    tokens = texts()
    model = Bert(BertConfig.model_validate({**SHAPE, "fusion_layer": 4}), SEEN).eval()
    assert load_plain_bert(model, folder) == []
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(tokens != 0).long(), output_hidden_states=True)
        states = model.read(tokens)
    real = tokens != 0
    torch.testing.assert_close(states[real], expected.hidden_states[-1][real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.predict(states)[real], expected.prediction_logits[real], rtol=1e-5, atol=2e-5
    )


def test_a_plain_bert_leaves_only_the_cross_attention_fresh(config, folder):
    model = random_bert(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = load_plain_bert(model, folder)
    parts = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    assert fresh == sorted(
        f"bert.encoder.layer.{layer}.crossattention.{part}.{leaf}"
        for layer in (2, 3)
        for part in parts
        for leaf in ("weight", "bias")
    )
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == before.keys() - set(fresh)
    with torch.no_grad():
        expected = hugging_face().bert(texts()[:1], output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(model.read(texts()[:1]), expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(config):
    model, tokens = random_bert(config), texts()
    seen = torch.randn(3, 6, SEEN)
    with torch.no_grad():
        states = model.read(tokens)
        fused = model.fuse(states, tokens, seen)
        for row, length in enumerate((10, 7, 4)):
            alone = tokens[row : row + 1, :length]
            states_alone = model.read(alone)
            torch.testing.assert_close(states[row : row + 1, :length], states_alone)
            torch.testing.assert_close(
                fused[row : row + 1, :length], model.fuse(states_alone, alone, seen[row : row + 1])
            )


def test_each_text_looks_at_its_own_row(config):
    model, tokens = random_bert(config), texts()
    seen = torch.randn(3, 6, SEEN)
    states = model.read(tokens)
    before = model.fuse(states, tokens, seen)
    seen[0] += 1
    after = model.fuse(states, tokens, seen)
    moved = (after - before).abs().amax(dim=(1, 2)) > 1e-4
    assert moved.tolist() == [True, False, False]
    # All that is looked at counts, in any order: it has no positions of its own here.
    torch.testing.assert_close(model.fuse(states, tokens, seen.flip(1)), after)


def test_a_row_of_padding_alone_is_no_nan(config):
    model, tokens = random_bert(config).train(), texts()
    tokens[1] = 0
    states = model.read(tokens)
    fused = model.fuse(states, tokens, torch.randn(3, 6, SEEN))
    fused.square().sum().backward()
    assert torch.isfinite(fused).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        # Whatever a kernel makes of a softmax over nothing: the first token counts.
        model.bert.embeddings.word_embeddings.weight[9] = (
            model.bert.embeddings.word_embeddings.weight[0]
        )
        torch.testing.assert_close(states[1, :1], model.read(torch.tensor([[9]]))[0])


def test_a_word_that_became_the_id_of_padding_is_still_a_word(config):
    model, tokens = random_bert(config), texts()
    hidden = tokens.clone()
    hidden[0, 3] = 0
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0].normal_()
        seen = model.read(hidden, tokens)
        unseen = model.read(hidden)
        model.bert.embeddings.word_embeddings.weight[0].normal_()
        assert (model.read(hidden, tokens) - seen).abs()[0, 5].max() > 1e-3
        torch.testing.assert_close(model.read(hidden)[0, 5], unseen[0, 5])


def test_the_gelu_is_exact(config):
    wide = random_bert(config).get_submodule("bert.encoder.layer.0.intermediate")
    x = torch.linspace(-3, 3, 32)[None, None]
    inner = wide.get_submodule("dense")(x)
    torch.testing.assert_close(wide(x), inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
    assert not torch.allclose(wide(x), F.gelu(inner, approximate="tanh"), atol=1e-6)


def test_dropout_is_for_training(config):
    config = config.model_copy(update={"dropout": 0.5})
    model, tokens = random_bert(config), texts()
    assert torch.equal(model.read(tokens), model.read(tokens))
    model.train()
    assert not torch.equal(model.read(tokens), model.read(tokens))


def test_weights_are_drawn_from_the_seed(config):
    first, second = (random_bert(config).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    fresh = Bert(config, SEEN)
    key = "bert.encoder.layer.3.crossattention.self.key"
    assert fresh.get_parameter(f"{key}.weight").std().item() == pytest.approx(0.02, rel=0.1)
    assert not fresh.get_parameter(f"{key}.bias").any()


def test_published_names_and_shapes():
    config = InternVideo2Stage2Config.model_fields["text"].default
    with torch.device("meta"):
        own = Bert(config, 1408).state_dict()
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in published_bert({k: torch.empty(v.shape) for k, v in own.items() if "cls" in k or "word" in k}).items()
    }  # fmt: skip
    assert shapes == {
        "bert.embeddings.word_embeddings.weight": (30522, 1024),
        "cls.predictions.bias": (30522,),
        "cls.predictions.transform.dense.weight": (1024, 1024),
        "cls.predictions.transform.dense.bias": (1024,),
        "cls.predictions.transform.LayerNorm.weight": (1024,),
        "cls.predictions.transform.LayerNorm.bias": (1024,),
        "cls.predictions.decoder.weight": (30522, 1024),
        "cls.predictions.decoder.bias": (30522,),
    }
    expected = {
        f"bert.embeddings.{name}": (length, 1024)
        for name, length in {
            "word_embeddings.weight": 30522,
            "position_embeddings.weight": 512,
            "token_type_embeddings.weight": 2,
        }.items()
    }
    norm = {"LayerNorm.weight": (1024,), "LayerNorm.bias": (1024,)}
    expected |= {f"bert.embeddings.{name}": shape for name, shape in norm.items()}
    for layer in range(24):
        block = f"bert.encoder.layer.{layer}"
        attentions = ["attention", "crossattention"] if layer >= 19 else ["attention"]
        for attention in attentions:
            width = 1408 if attention == "crossattention" else 1024
            for part, wide in {"query": 1024, "key": width, "value": width}.items():
                expected[f"{block}.{attention}.self.{part}.weight"] = (1024, wide)
                expected[f"{block}.{attention}.self.{part}.bias"] = (1024,)
            expected[f"{block}.{attention}.output.dense.weight"] = (1024, 1024)
            expected[f"{block}.{attention}.output.dense.bias"] = (1024,)
            expected |= {f"{block}.{attention}.output.{k}": shape for k, shape in norm.items()}
        expected |= {
            f"{block}.intermediate.dense.weight": (4096, 1024),
            f"{block}.intermediate.dense.bias": (4096,),
            f"{block}.output.dense.weight": (1024, 4096),
            f"{block}.output.dense.bias": (1024,),
        }
        expected |= {f"{block}.output.{name}": shape for name, shape in norm.items()}
    body = {k: tuple(v.shape) for k, v in own.items() if k.startswith("bert.")}
    assert body == expected


def test_a_published_state_round_trips(config):
    state = random_bert(config).state_dict()
    published = published_bert(state)
    published["bert.embeddings.position_ids"] = torch.arange(16)[None]
    assert len(published) == len(state) + 3
    again = plain_bert(published)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_old_names_of_norms_are_known(config, folder, tmp_path):
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in weights
    torch.save(weights, tmp_path / "pytorch_model.bin")
    old, new = random_bert(config), random_bert(config)
    load_plain_bert(old, tmp_path)
    load_plain_bert(new, folder)
    assert all(torch.equal(old.state_dict()[k], v) for k, v in new.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("bert.encoder.layer.1.output.dense.bias"),
            "missing bert.encoder.layer.1.output.dense.bias",
        ),
        (
            lambda w: w.update({"bert.encoder.layer.7.output.dense.bias": torch.zeros(32)}),
            "unexpected bert.encoder.layer.7.output.dense.bias",
        ),
        (
            lambda w: w.update({"bert.encoder.layer.3.crossattention.self.key.bias": torch.ones(32)}),
            "unexpected bert.encoder.layer.3.crossattention",
        ),
        (
            lambda w: w.update({"cls.predictions.bias": torch.zeros(61)}),
            r"of another shape cls.predictions.bias: \(61,\), not \(60,\)",
        ),
        (
            lambda w: w.update({"cls.predictions.decoder.weight": torch.zeros(60, 32)}),
            "differing copies cls.predictions.decoder.weight",
        ),
    ],
    ids=["missing", "unexpected", "no plain bert", "shape", "copies"],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(config, folder, tmp_path, change, message):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    model = random_bert(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DependencyError, match=message):
        load_plain_bert(model, tmp_path)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())


def test_a_folder_without_a_bert(config, tmp_path, monkeypatch, caplog):
    model = random_bert(config)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(DependencyError, match=r"holds neither model\.safetensors"):
        load_plain_bert(model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(DependencyError, match=r"pytorch_model.bin is damaged"):
        load_plain_bert(model, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.CRITICAL), pytest.raises(DependencyError, match="No BERT at"):
        load_plain_bert(model, "nobody/has-this-bert")


def test_ids_must_be_words():
    with pytest.raises(ValidationError, match="mask_id 103 is no word of 60"):
        BertConfig.model_validate({**SHAPE, "mask_id": 103, "fusion_layer": 2})
