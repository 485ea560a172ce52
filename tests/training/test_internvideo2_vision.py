# SPDX-License-Identifier: Apache-2.0
# Blocks of a ModuleList have no type of their own; a wrong guess fails the test.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
"""InternVideo2's vision encoder: the published numbers, its traps, and files taken whole.

Golden numbers are the published modules', run on weights and frames that are drawn here.
"""

import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dataengine.errors import DependencyError
from dataengine.networks.config import InternVideo2Config
from dataengine.networks.internvideo2 import (
    SIZES,
    InternVideo2,
    InternVideo2Classifier,
    load_published_vision,
    resize_positions,
    sinusoids,
)

SHAPE = InternVideo2Config(
    image_size=56, num_frames=4, width=64, layers=3, heads=4, mlp_width=176, pool_heads=4,
    embed_dim=48,
)  # fmt: skip


def known_weights(module):
    """Gives a module weights that depend on their names alone; norms and scales are around 1."""
    drawn = {}
    for name, value in module.state_dict().items():
        noise = np.random.default_rng([0, *name.encode()]).standard_normal(value.shape)
        ones = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        drawn[name] = torch.from_numpy(np.asarray(noise.astype(np.float32) * 0.05 + ones))
    module.load_state_dict(drawn)
    return module


def known_frames(*shape, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def encoder():
    return known_weights(InternVideo2(SHAPE)).eval()


@pytest.fixture(scope="module")
def frames():
    return known_frames(2, 4, 3, 56, 56)


@pytest.mark.parametrize(
    ("size", "millions", "num_tensors"),
    [("S", 23.35, 178), ("B", 89.75, 178), ("L", 309.24, 334), ("1B", 1021.02, 542), ("6B", 5942.04, 646)],
)  # fmt: skip
def test_sizes_are_the_published_ones(size, millions, num_tensors):
    with torch.device("meta"):
        state = InternVideo2Classifier(SIZES[size], 400).state_dict()
    assert len(state) == num_tensors
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, rel=3e-4)


@pytest.mark.parametrize(
    ("gelu", "expected"),
    [
        ("tanh", [-0.256425, -0.183353, -0.049917, 0.299733, -0.53321]),
        ("none", [-0.25642, -0.183355, -0.049908, 0.299727, -0.533203]),
    ],
)
def test_logits_are_those_of_the_published_classifier(frames, gelu, expected):
    shape = SHAPE.model_copy(update={"gelu": gelu})
    classifier = known_weights(InternVideo2Classifier(shape, 5)).eval()
    with torch.no_grad():
        assert classifier(frames)[0].tolist() == pytest.approx(expected, abs=2e-6)


def test_a_new_classifier_finds_all_classes_equally_likely(frames):
    torch.manual_seed(0)
    with torch.no_grad():
        logits = InternVideo2Classifier(SHAPE, 5)(frames)
    assert logits.abs().max() < 1e-2
    assert logits.std() > 0


def test_fresh_weights_are_drawn_as_published():
    torch.manual_seed(0)
    encoder = InternVideo2(SIZES["S"].model_copy(update={"layers": 4, "num_frames": 1}))
    assert encoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
    # The third block's branches are smaller by the root of 2 * 3.
    for linear in (encoder.blocks[2].attn.proj, encoder.blocks[2].mlp.fc2):
        assert linear.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.03)
    assert encoder.clip_projector.cross_attn.q.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_tokens_run_frame_after_frame(encoder, frames):
    changed = frames.clone()
    changed[:, 2, :, 14:28, 28:42] += 1  # frame 2, row 1, column 2 of 4 x 4 patches
    with torch.no_grad():
        before, after = encoder.patch_embed(frames), encoder.patch_embed(changed)
    moved = (before - after).abs().amax(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [2 * 16 + 1 * 4 + 2]


def test_patches_are_those_of_the_convolution(encoder, frames):
    with torch.no_grad():
        expected = encoder.patch_embed.proj(frames.transpose(1, 2)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder.patch_embed(frames), expected, rtol=1e-5, atol=1e-5)


def test_queries_and_keys_are_normalised_over_all_heads_together(encoder):
    attention = encoder.blocks[1].attn
    x = known_frames(2, 5, 64)

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    with torch.no_grad():
        q, k, v = F.linear(x, attention.qkv.weight).chunk(3, dim=-1)
        q, k = rms(q, attention.q_norm.weight), rms(k, attention.k_norm.weight)
        q, k, v = (part.view(2, 5, 4, 16).transpose(1, 2) for part in (q, k, v))
        mixed = ((q @ k.transpose(2, 3)) / 4).softmax(dim=-1) @ v
        expected = attention.proj(mixed.transpose(1, 2).reshape(2, 5, 64))
        torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def visible(seed=3, num=10):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.choice(64, num, replace=False) for _ in range(2)]))


def test_hidden_patches_are_not_seen(encoder, frames):
    some = visible()
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter_(1, some, False)
    pixels = hidden.view(2, 4, 1, 4, 1, 4, 1).expand(2, 4, 3, 4, 14, 4, 14).reshape(2, 4, 3, 56, 56)
    with torch.no_grad():
        tokens, pooled = encoder(frames, some)
        assert tokens.shape == (2, 11, 64)
        same_tokens, same_pooled = encoder(torch.where(pixels, 9.0, frames), some)
        assert torch.equal(tokens, same_tokens)
        assert torch.equal(pooled, same_pooled)
        assert not torch.allclose(encoder(torch.where(pixels, frames, 9.0), some)[1], pooled)


def test_positions_go_with_their_patches(encoder, frames):
    everything = torch.arange(64).expand(2, -1)
    with torch.no_grad():
        tokens, pooled = encoder(frames)
        seen_tokens, seen_pooled = encoder(frames, everything)
        torch.testing.assert_close(seen_tokens, tokens)
        torch.testing.assert_close(seen_pooled, pooled)
        # Attention knows no order: turned around, the tokens are the same ones.
        turned_tokens, turned_pooled = encoder(frames, everything.flip(1))
        torch.testing.assert_close(
            turned_tokens[:, 1:].flip(1), tokens[:, 1:], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(turned_pooled, pooled, rtol=1e-4, atol=1e-5)


def test_outputs_of_blocks_are_the_residual_stream_in_order_of_depth(encoder, frames):
    with torch.no_grad():
        encoded = encoder.encode(frames, visible(), (0, 2))
        first, last = encoded.middle
        assert torch.equal(last, encoded.tokens)
        torch.testing.assert_close(encoder.blocks[2](encoder.blocks[1](first)), last)


def test_an_image_takes_the_mean_of_positions_over_time(frames):
    encoder = known_weights(InternVideo2(SHAPE)).eval()
    one = InternVideo2(SHAPE.model_copy(update={"num_frames": 1})).eval()
    state = encoder.state_dict()
    cls, patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    mean = patches.reshape(1, 4, 16, 64).mean(dim=1)
    one.load_state_dict(state | {"pos_embed": torch.cat([cls, mean], dim=1)})
    with torch.no_grad():
        for some in (None, torch.tensor([[3, 7], [0, 15]])):
            torch.testing.assert_close(encoder(frames[:, :1], some), one(frames[:, :1], some))


def test_recomputed_blocks_give_the_same_gradients(frames):
    gradients = []
    for again in (False, True):
        shape = SHAPE.model_copy(update={"checkpoint_activations": again})
        encoder = known_weights(InternVideo2(shape)).train()
        encoder(frames, visible())[1].square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_pooling_tells_what_it_looks_at(encoder, frames):
    with torch.no_grad():
        tokens, pooled = encoder(frames)
        same, weights = encoder.clip_projector.with_weights(tokens)
        torch.testing.assert_close(same, pooled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
        # A token that the pooling's keys point at draws its look.
        attention = encoder.clip_projector.cross_attn
        query = attention.q(encoder.clip_projector.norm1_q(tokens.mean(1))) + attention.q_bias
        bright = tokens.clone()
        bright[:, 5] = 50 * (query @ attention.k.weight)
        assert (encoder.clip_projector.with_weights(bright)[1][:, 5] > weights[:, 5]).all()


def test_bfloat16_follows_float32(encoder, frames):
    with torch.no_grad():
        exact = encoder(frames)[1]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(frames)[1].float()
    assert F.cosine_similarity(exact, rounded).min() > 0.999


def stage1_file(state):
    extras = {
        "clip_pos_embed": torch.zeros(1, 65, 64),
        "mae_pos_embed": torch.zeros(1, 64, 64),
        "clip_decoder.0.head.weight": torch.zeros(8, 64),
        "final_clip_decoder.norm.bias": torch.zeros(8),
        "mae_decoder.1.head.2.weight": torch.zeros(8, 64),
    }
    return {"module": {**state, **extras}}


def stage2_file(state):
    extras = {
        "vision_encoder.clip_decoder.0.norm.weight": torch.zeros(8),
        "vision_encoder.clip_img_pos_embed": torch.zeros(1, 17, 64),
        "vision_encoder.img_pos_embed": torch.zeros(1, 17, 64),
        "text_encoder.bert.embeddings.word_embeddings.weight": torch.zeros(2, 2),
        "vision_proj.weight": torch.zeros(8, 48),
        "itm_head.bias": torch.zeros(2),
        "temp": torch.ones(()),
    }
    return {"module": {f"vision_encoder.{k}": v for k, v in state.items()} | extras}


def classifier_file(state):
    head = {"fc_norm.weight": torch.ones(48), "head.weight": torch.zeros(5, 48)}
    weights = {f"module.{k}": v.half() for k, v in (state | head).items()}
    return {"model": weights, "epoch": 3, "args": argparse.Namespace(nb_classes=5)}


@pytest.mark.parametrize("make", [stage1_file, stage2_file, classifier_file])
def test_every_published_file_gives_its_encoder(encoder, make, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(make(encoder.state_dict()), path)
    loaded = load_published_vision(path, SHAPE)
    assert loaded.keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-3)
        assert loaded[name].dtype == torch.float32


def test_safetensors_and_weights_at_hand(encoder, tmp_path):
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    old = tmp_path / "old.bin"
    torch.save(encoder.state_dict(), old, _use_new_zipfile_serialization=False)
    for source in (tmp_path / "model.safetensors", old, encoder.state_dict()):
        InternVideo2(SHAPE).load_state_dict(load_published_vision(source, SHAPE))


@pytest.mark.parametrize("told", [4, None])
def test_positions_are_stretched_to_the_frames_and_the_grid(encoder, told):
    longer = SHAPE.model_copy(update={"num_frames": 8})
    loaded = load_published_vision(encoder.state_dict(), longer, told)
    table = encoder.state_dict()["pos_embed"]
    assert torch.equal(loaded["pos_embed"], resize_positions(table, 8, 4, 4))
    larger = SHAPE.model_copy(update={"image_size": 84, "num_frames": 8})
    loaded = load_published_vision(encoder.state_dict(), larger, 4)
    assert torch.equal(loaded["pos_embed"], resize_positions(table, 8, 4, 6))
    with pytest.raises(DependencyError, match="do not tell their number of frames"):
        load_published_vision(encoder.state_dict(), larger)
    with pytest.raises(DependencyError, match="not 3 square frames"):
        load_published_vision(encoder.state_dict(), longer, 3)


def test_positions_of_images_start_as_sinusoids(encoder):
    shape = SHAPE.model_copy(update={"image_positions": True})
    loaded = load_published_vision(encoder.state_dict(), shape)
    assert torch.equal(loaded["img_pos_embed"], sinusoids(64, 4, 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.1.attn.proj.bias": None}, r"blocks\.1\.attn\.proj\.bias is missing"),
        ({"spare.weight": torch.zeros(1)}, r"spare\.weight is not known"),
        ({"cls_token": torch.zeros(1, 1, 3)}, r"cls_token is of shape \(1, 1, 3\), not"),
        ({"img_pos_embed": None, "vision_encoder.spare": torch.zeros(1)}, "cls_token is not known"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(encoder, change, said):
    changed = {k: v for k, v in {**encoder.state_dict(), **change}.items() if v is not None}
    with pytest.raises(DependencyError, match=said):
        load_published_vision(changed, SHAPE)


def test_files_without_weights_are_refused(tmp_path):
    with pytest.raises(DependencyError, match="No weights at"):
        load_published_vision(tmp_path / "none.pt", SHAPE)
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(DependencyError, match="Cannot be read as weights alone"):
        load_published_vision(tmp_path / "broken.pt", SHAPE)
    with pytest.raises(DependencyError, match="holds no weights"):
        load_published_vision({"model": {"epoch": 3}}, SHAPE)
