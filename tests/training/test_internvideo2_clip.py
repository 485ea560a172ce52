# SPDX-License-Identifier: Apache-2.0
# Which text encoder a network has is known here; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false
"""InternVideo2-CLIP: published names and numbers of its text encoders, and what trains.

Golden numbers are the published modules' (LLaMA through transformers 4.49), run on weights and tokens
that are drawn here.
"""

import numpy as np
import pytest
import torch

from dataengine.errors import ConfigError
from dataengine.networks.config import (
    InternVideo2ClipConfig,
    LlamaTextConfig,
    MobileClipTextConfig,
)
from dataengine.networks.internvideo2_clip import InternVideo2Clip, LlamaText
from dataengine.networks.mobileclip import MobileClipText
from training.models import build_task

VISION = {
    "image_size": 28, "patch_size": 14, "num_frames": 2, "width": 32, "layers": 2, "heads": 2,
    "mlp_width": 64, "pool_heads": 2, "embed_dim": 16,
}  # fmt: skip
SMALL = {
    "vocab_size": 64,
    "context_length": 12,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_width": 32,
}
MOBILE = {"kind": "mobileclip", **SMALL}
LLAMA = {"kind": "llama", **SMALL}


def network(text, **changes):
    torch.manual_seed(0)
    embed_dim = 8 if text is MOBILE else 16
    shape = {"kind": "internvideo2_clip", "vision": VISION, "text": text, "embed_dim": embed_dim}
    return InternVideo2Clip(InternVideo2ClipConfig.model_validate(shape | changes))


def known_weights(module):
    """Gives a module weights that depend on their names alone; norms are around 1."""
    drawn = {}
    for name, value in module.state_dict().items():
        noise = np.random.default_rng([0, *name.encode()]).standard_normal(value.shape)
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1
        is_norm = value.ndim == 1 and name.endswith("weight")
        drawn[name] = torch.from_numpy(np.asarray(noise.astype(np.float32) * scale + is_norm))
    module.load_state_dict(drawn)
    return module


def known_tokens():
    tokens = torch.zeros(2, 12, dtype=torch.long)
    for row, length in enumerate((4, 9)):
        tokens[row, :length] = torch.arange(length) * 5 + 3 * (row + 1)
        tokens[row, length - 1] = 63
    return tokens


def gradient(module, feature):
    """Returns the sum of the norms of all gradients."""
    feature.square().mean().sqrt().backward()
    return sum(parameter.grad.norm().item() for parameter in module.parameters())


def test_mobileclips_numbers_and_gradients():
    text = known_weights(MobileClipText(MobileClipTextConfig(**SMALL), 8))
    feature = text(known_tokens())
    assert feature[0, :4].tolist() == pytest.approx(
        [-0.386823, -2.622268, 0.695247, 0.135534], abs=3e-6
    )
    assert feature[1, :4].tolist() == pytest.approx(
        [-0.085952, 1.064645, 0.306515, -0.158813], abs=3e-6
    )
    assert gradient(text, feature) == pytest.approx(17.72539, rel=2e-5)


def test_llamas_numbers_and_gradients():
    text = known_weights(LlamaText(LlamaTextConfig(**SMALL), 16))
    tokens = known_tokens()
    # An unknown word has the id of padding: it is not attended to, and not counted, as published.
    tokens[1, 3] = 0
    feature = text(tokens)
    assert feature[0, :4].tolist() == pytest.approx(
        [0.472402, -0.932112, -0.65118, 0.131171], abs=3e-6
    )
    assert feature[1, :4].tolist() == pytest.approx(
        [1.055296, -1.544512, 0.026261, 0.432948], abs=3e-6
    )
    assert gradient(text, feature) == pytest.approx(16.55064, rel=2e-5)


def test_mobileclip_b_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = MobileClipText(MobileClipTextConfig(), 512).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {
        "embedding_layer.weight": (49408, 512),
        "positional_embedding.pos_embed.pos_embed": (1, 1, 77, 512),
        "final_layer_norm.weight": (512,),
        "final_layer_norm.bias": (512,),
        "projection_layer": (512, 512),
    }
    for layer in range(12):
        for name, shape in {
            "pre_norm_mha.0": (512,), "pre_norm_mha.1.qkv_proj": (1536, 512),
            "pre_norm_mha.1.out_proj": (512, 512), "pre_norm_ffn.0": (512,),
            "pre_norm_ffn.1": (2048, 512), "pre_norm_ffn.4": (512, 2048),
        }.items():  # fmt: skip
            expected[f"transformer.{layer}.{name}.weight"] = shape
            expected[f"transformer.{layer}.{name}.bias"] = shape[:1]
    assert shapes == expected


def test_internvl_cs_llama_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = LlamaText(LlamaTextConfig(), 768).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {
        "text_projection": (4096, 768),
        "transformer.embed_tokens.weight": (49954, 4096),
        "transformer.norm.weight": (4096,),
    }
    for layer in range(32):
        for name, shape in {
            "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096),
            "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
            "mlp.down_proj": (4096, 11008), "input_layernorm": (4096,),
            "post_attention_layernorm": (4096,),
        }.items():  # fmt: skip
            expected[f"transformer.layers.{layer}.{name}.weight"] = shape
    assert shapes == expected


@pytest.mark.parametrize("text", [MOBILE, LLAMA])
def test_features_are_of_unit_length_and_images_are_seen(text):
    model = network(text).eval()
    video, words, temperature = model(torch.randn(2, 2, 3, 28, 28), known_tokens())
    assert video.shape == words.shape == (2, 8 if text is MOBILE else 16)
    for feature in (video, words, model.encode_video(torch.randn(2, 1, 3, 28, 28))):
        torch.testing.assert_close(feature.norm(dim=-1), torch.ones(2))
    assert temperature.item() == pytest.approx(0.01)


def test_small_models_align_the_pooled_feature_and_large_ones_take_it_as_it_is():
    frames = torch.randn(1, 2, 3, 28, 28)
    large, small = network(LLAMA).eval(), network(MOBILE).eval()
    unit = torch.nn.functional.normalize
    pooled = large.vision_encoder(frames)[1]
    torch.testing.assert_close(large.encode_video(frames), unit(pooled, dim=-1))
    assert not any(name.startswith("vision_align") for name in large.state_dict())
    pooled = small.vision_encoder(frames)[1]
    normed = torch.nn.functional.layer_norm(pooled, (16,))
    aligned = torch.nn.functional.linear(normed, *small.vision_align[1].parameters())
    torch.testing.assert_close(small.encode_video(frames), unit(aligned, dim=-1))


@pytest.mark.parametrize("text", [MOBILE, LLAMA])
def test_text_feature_is_the_ends_whatever_is_behind_it(text):
    model = network(text).eval()
    tokens = known_tokens()
    alone = torch.cat([model.encode_text(row[None]) for row in tokens])
    torch.testing.assert_close(model.encode_text(tokens), alone)
    shorter = model.encode_text(tokens[:1, :4])
    torch.testing.assert_close(model.encode_text(tokens[:1]), shorter)
    changed = tokens[:1].clone()
    changed[0, 1] = 7
    assert (model.encode_text(changed) - shorter).abs().max() > 1e-4


def test_llama_reads_no_further_than_the_longest_caption():
    text = LlamaText(LlamaTextConfig(**{**SMALL, "context_length": 40}), 16)
    lengths = []
    text.transformer.layers[0].register_forward_pre_hook(
        lambda *a: lengths.append(a[1][0].shape[1])
    )
    tokens = torch.nn.functional.pad(known_tokens(), (0, 28))
    whole = text(tokens)
    assert lengths == [16]
    torch.testing.assert_close(text(tokens[:, :9]), whole)


@pytest.mark.parametrize("text", [MOBILE, LLAMA])
def test_the_place_of_a_clip_that_could_not_be_read_is_a_number(text):
    model = network(text, train_text=True, train="all")
    tokens = known_tokens()
    tokens[1] = 0
    video, words, temperature = model(torch.randn(2, 2, 3, 28, 28), tokens)
    (video @ words.T / temperature).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


_PROJECTOR = ("vision_encoder.clip_projector.", "vision_align.", "temp")


@pytest.mark.parametrize("text", [MOBILE, LLAMA])
@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, _PROJECTOR),
        ({"train": "all"}, (*_PROJECTOR, "vision_encoder.")),
        ({"train": "all", "train_text": True}, (*_PROJECTOR, "vision_encoder.", "text_encoder.")),
    ],
)
def test_what_trains(text, changes, trained):
    model = network(text, **changes).train()
    video, words, temperature = model(torch.randn(2, 2, 3, 28, 28), known_tokens())
    (video @ words.T / temperature).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(trained), name
        assert (parameter.grad is not None) == name.startswith(trained), name


def test_the_published_training_changes_15_tensors():
    model = network(LLAMA)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 15


def test_temperature_never_falls_below_one_hundredth():
    model = network(MOBILE)
    with torch.no_grad():
        model.temp.fill_(0.002)
    _, _, temperature = model(torch.randn(1, 2, 3, 28, 28), known_tokens()[:1])
    assert temperature.item() == pytest.approx(0.01)


def test_widths_that_do_not_fit_beside_llama_are_told():
    with pytest.raises(ConfigError, match=r"embed_dim 16 is not model.embed_dim 8"):
        network(LLAMA, embed_dim=8)


def test_layers_have_depths_and_embeddings_none_below(recipe):
    model = {"kind": "internvideo2_clip", "vision": VISION, "text": MOBILE, "embed_dim": 8}
    task = build_task(recipe(model=model))
    depths = {name: task.layer_of(name) for name, _ in task.named_parameters()}
    assert depths["network.vision_encoder.patch_embed.proj.weight"] == (0, 3)
    assert depths["network.vision_encoder.blocks.0.attn.qkv.weight"] == (1, 3)
    assert depths["network.vision_encoder.blocks.1.attn.qkv.weight"] == (2, 3)
    assert depths["network.text_encoder.transformer.1.pre_norm_ffn.4.weight"] == (2, 3)
    assert depths["network.text_encoder.embedding_layer.weight"] == (0, 3)
    for name in (
        "temp",
        "vision_align.1.weight",
        "vision_encoder.clip_projector.cross_attn.q_bias",
    ):
        assert depths[f"network.{name}"] is None
