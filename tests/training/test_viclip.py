# SPDX-License-Identifier: Apache-2.0
"""ViCLIP: published shapes, names and numbers; tokens, masks and positions.

Golden numbers are the published modules', run on weights and frames that are drawn here.
"""

import numpy as np
import pytest
import torch
from torch import nn

from dataengine.networks import viclip
from dataengine.networks.text import END_OF_TEXT, clean_caption, tokenise
from dataengine.networks.transformer import Attention
from dataengine.networks.viclip import (
    PUBLISHED,
    ViCLIP,
    fit_positions,
    patches_of,
    random_kept,
    resize_space,
)
from training.config import ViCLIPConfig, load_recipe


@pytest.mark.parametrize(("size", "tensors", "millions"), [("B", 303, 149.60), ("L", 447, 427.59)])
def test_published_sizes(size, tensors, millions):
    with torch.device("meta"):
        state = ViCLIP(PUBLISHED[size]).state_dict()
    assert len(state) == tensors
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6, 2) == millions


def test_published_names_and_shapes():
    with torch.device("meta"):
        state = ViCLIP(PUBLISHED["B"]).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {
        "temp": (),
        "vision_encoder.class_embedding": (768,),
        "vision_encoder.positional_embedding": (197, 768),
        "vision_encoder.temporal_positional_embedding": (1, 8, 768),
        "vision_encoder.proj": (768, 512),
        "vision_encoder.conv1.weight": (768, 3, 1, 16, 16),
        "text_encoder.positional_embedding": (32, 512),
        "text_encoder.text_projection": (512, 512),
        "text_encoder.token_embedding.weight": (49408, 512),
    }
    for norm in ("vision_encoder.ln_pre", "vision_encoder.ln_post"):
        expected |= {f"{norm}.weight": (768,), f"{norm}.bias": (768,)}
    expected |= {"text_encoder.ln_final.weight": (512,), "text_encoder.ln_final.bias": (512,)}
    for tower, width in (("vision_encoder", 768), ("text_encoder", 512)):
        for layer in range(12):
            block = f"{tower}.transformer.resblocks.{layer}"
            expected |= {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
                f"{block}.attn.out_proj.weight": (width, width),
                f"{block}.attn.out_proj.bias": (width,),
                f"{block}.mlp.c_fc.weight": (4 * width, width),
                f"{block}.mlp.c_fc.bias": (4 * width,),
                f"{block}.mlp.c_proj.weight": (width, 4 * width),
                f"{block}.mlp.c_proj.bias": (width,),
            }
            for norm in ("ln_1", "ln_2"):
                expected |= {f"{block}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    assert shapes == expected


def test_viclip_b_recipe_is_the_published_size():
    config = load_recipe("viclip_b").model
    assert isinstance(config, ViCLIPConfig)
    own, theirs = config.model_dump(), PUBLISHED["B"].model_dump()
    for tower in ("video", "text"):
        for field in ("width", "layers", "heads"):
            assert own[tower][field] == theirs[tower][field]
    assert own["embed_dim"] == theirs["embed_dim"]


def known_weights(module):
    """Gives a module weights that depend on their names alone; norms are around 1."""
    drawn = {}
    for name, value in module.state_dict().items():
        noise = np.random.default_rng([0, *name.encode()]).standard_normal(value.shape)
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1
        is_norm = value.ndim == 1 and name.endswith("weight")
        drawn[name] = torch.from_numpy(
            np.asarray(noise.astype(np.float32) * scale + is_norm)
        ).float()
    drawn["temp"] = torch.tensor(0.05)
    module.load_state_dict(drawn)
    return module


_WHOLE = {
    "video": [-0.056849, -0.052206, -0.065198, 0.337888], "loss": 4.178292, "temp": 78.576767,
    "vision_encoder.conv1.weight": 8.321501,
    "vision_encoder.temporal_positional_embedding": 0.19382,
    "vision_encoder.transformer.resblocks.0.mlp.c_fc.weight": 6.293728,
    "text_encoder.transformer.resblocks.0.attn.in_proj_weight": 8.747292,
    "text_encoder.text_projection": 8.721158,
}  # fmt: skip
_MASKED = {
    "video": [0.01497, -0.210878, -0.216791, 0.462401], "loss": 5.524821, "temp": 105.695381,
    "vision_encoder.conv1.weight": 8.111441,
    "vision_encoder.temporal_positional_embedding": 0.185243,
    "vision_encoder.transformer.resblocks.0.mlp.c_fc.weight": 6.709171,
    "text_encoder.transformer.resblocks.0.attn.in_proj_weight": 12.230998,
    "text_encoder.text_projection": 9.939699,
}  # fmt: skip


@pytest.mark.parametrize(("mask_ratio", "golden"), [(0.0, _WHOLE), (0.625, _MASKED)])
def test_published_numbers_and_gradients(recipe, monkeypatch, mask_ratio, golden):
    kept = torch.tensor([[0, 3, 5], [1, 2, 7], [4, 5, 6]])
    monkeypatch.setattr(viclip, "random_kept", lambda *_: kept)
    model = known_weights(ViCLIP(recipe(model__video__mask_ratio=mask_ratio).model)).train()
    drawn = np.random.default_rng(1).standard_normal((3, 2, 3, 32, 32)).astype(np.float32)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    for row, length in enumerate((4, 9, 16)):
        tokens[row, :length] = torch.arange(length) * 37 + 11 * (row + 1)
        tokens[row, length - 1] = END_OF_TEXT
    video, text, temperature = model(torch.from_numpy(drawn), tokens)
    logits, targets = video @ text.T / temperature, torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    loss.backward()
    assert video[0, :4].tolist() == pytest.approx(golden["video"], abs=2e-6)
    assert text[0, :4].tolist() == pytest.approx([0.271896, 0.265506, 0.194562, 0.035538], abs=2e-6)
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in golden:
            assert parameter.grad is not None
            assert parameter.grad.norm().item() == pytest.approx(golden[name], rel=2e-5), name


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_multihead_attention(causal):
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(24, 3, batch_first=True)
    nn.init.normal_(reference.in_proj_bias)
    nn.init.normal_(reference.out_proj.bias)
    own = Attention(24, 3)
    own.load_state_dict(reference.state_dict())
    x = torch.randn(2, 7, 24)
    mask = torch.full((7, 7), float("-inf")).triu(1) if causal else None
    expected, _ = reference(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(own(x, causal), expected)


@pytest.fixture
def model(recipe):
    torch.manual_seed(0)
    return ViCLIP(recipe().model).eval()


def test_tokens_are_spatial_major_with_time_fastest(model):
    tower = model.vision_encoder
    blank = torch.zeros(1, 2, 3, 32, 32)
    for frame, patch in [(0, 0), (1, 0), (0, 3), (1, 2)]:
        lit = blank.clone()
        row, column = divmod(patch, 2)
        lit[0, frame, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 1
        changed = (tower._tokens(lit) != tower._tokens(blank)).any(dim=-1)[0]
        # The class token is first.
        assert changed.nonzero().flatten().tolist() == [1 + patch * 2 + frame]


def test_order_of_frames_matters_only_through_the_temporal_embedding(model):
    frames = torch.randn(1, 2, 3, 32, 32)
    turned = frames.flip(1)
    torch.testing.assert_close(model.encode_video(frames), model.encode_video(turned))
    with torch.no_grad():
        model.vision_encoder.temporal_positional_embedding.normal_()
    assert (model.encode_video(frames) - model.encode_video(turned)).abs().max() > 1e-3


def test_single_image_takes_the_mean_temporal_embedding(model):
    temporal = model.vision_encoder.temporal_positional_embedding
    with torch.no_grad():
        temporal.normal_()
    torch.testing.assert_close(model.vision_encoder._temporal(1), temporal.mean(1, keepdim=True))
    assert model.encode_video(torch.randn(1, 1, 3, 32, 32)).shape == (1, 16)


def test_masking_keeps_a_random_share_in_order():
    torch.manual_seed(0)
    kept = random_kept(3, 40, 0.9, torch.device("cpu"))
    assert kept.shape == (3, 4)
    assert (kept.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in kept.tolist()}) == 3
    # Every token is kept as often as any other.
    counts = random_kept(4000, 10, 0.7, torch.device("cpu")).flatten().bincount(minlength=10)
    assert counts.min() > 1100
    assert counts.max() < 1300


def test_masked_clips_have_the_tokens_that_were_kept(model):
    tower = model.vision_encoder
    with torch.no_grad():
        tower.temporal_positional_embedding.normal_()
    frames = torch.randn(3, 2, 3, 32, 32)
    whole = tower._tokens(frames)
    tower.mask_ratio = 0.5
    tower.train()
    torch.manual_seed(3)
    masked = tower._tokens(frames)
    torch.manual_seed(3)
    kept = random_kept(3, 8, 0.5, frames.device)
    expected = whole[:, 1:].gather(1, kept[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(masked[:, 1:], expected)
    torch.testing.assert_close(masked[:, 0], whole[:, 0])


def test_patches_projected_are_the_published_convolution(model):
    tower = model.vision_encoder
    frames = torch.randn(2, 2, 3, 32, 32)
    maps_BDThw = tower.conv1(frames.transpose(1, 2))
    projected = torch.nn.functional.linear(patches_of(frames, 16), tower.conv1.weight.flatten(1))
    torch.testing.assert_close(projected, maps_BDThw.flatten(3).permute(0, 3, 2, 1).flatten(1, 2))


def test_frozen_text_tower_does_no_gradient_work(recipe):
    model = ViCLIP(recipe(model__freeze_text=True).model).train()
    tokens = tokenise(["a red square"], 16)
    assert not any(parameter.requires_grad for parameter in model.text_encoder.parameters())
    assert not model.encode_text(tokens).requires_grad
    model.text_encoder.requires_grad_(True)
    assert not model.encode_text(tokens).requires_grad
    video, text, temperature = model(torch.randn(1, 2, 3, 32, 32), tokens)
    (video @ text.T / temperature).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if "text_encoder" in name}


def test_positions_of_another_shape(recipe):
    config = recipe().model
    video = config.video.model_copy(update={"num_frames": 3, "image_size": 64})
    text = config.text.model_copy(update={"context_length": 4})
    other = config.model_copy(update={"video": video, "text": text})
    time, space = (
        "vision_encoder.temporal_positional_embedding",
        "vision_encoder.positional_embedding",
    )
    words = "text_encoder.positional_embedding"
    state = {
        time: torch.tensor([0.0, 6.0])[None, :, None],
        space: torch.tensor([9.0, 0.0, 1.0, 0.0, 1.0])[:, None],
        words: torch.arange(6.0)[:, None],
        "temp": torch.tensor(0.01),
    }
    fitted = fit_positions(state, other)
    assert fitted[time].flatten().tolist() == pytest.approx([0.0, 3.0, 6.0])
    # Rows are equal, columns rise, the class token stays.
    assert fitted[space].shape == (17, 1)
    assert fitted[space][0].item() == 9
    grid = fitted[space][1:, 0].view(4, 4)
    torch.testing.assert_close(grid[0], grid[3])
    assert (grid[0].diff() > 0).all()
    assert fitted[words].flatten().tolist() == [0, 1, 2, 3]
    back = fit_positions(fitted, config)
    assert back[time].flatten().tolist() == pytest.approx([0.0, 3.0])
    assert back[words].flatten().tolist() == [0, 1, 2, 3] + 12 * [0]
    assert back["temp"] is state["temp"]
    with pytest.raises(ValueError, match="5 positions"):
        resize_space(torch.zeros(6, 1), 2)


def test_masking_is_off_in_evaluation(recipe):
    model = ViCLIP(recipe(model__video__mask_ratio=0.5).model)
    frames = torch.randn(2, 2, 3, 32, 32)
    lengths = []
    model.vision_encoder.ln_pre.register_forward_hook(lambda *a: lengths.append(a[2].shape[1]))
    model.train().encode_video(frames)
    model.eval().encode_video(frames)
    assert lengths == [1 + 4, 1 + 8]


def test_text_feature_sees_nothing_behind_the_end(model):
    tokens = tokenise(["a red square"], 16)
    end = tokens.argmax(dim=1).item()
    longer = tokens.clone()
    longer[0, end + 1 :] = 320
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(longer))


def test_temperature_never_falls_below_one_hundredth(model):
    with torch.no_grad():
        model.temp.fill_(0.002)
    _, _, temperature = model(torch.randn(1, 2, 3, 32, 32), tokenise(["x"], 16))
    assert temperature.item() == pytest.approx(0.01)


def test_long_captions_end_with_the_end():
    tokens = tokenise(["word " * 50, "word"], 8)
    assert tokens.shape == (2, 8)
    assert tokens[0, -1] == END_OF_TEXT
    assert tokens[1].tolist()[2:] == [END_OF_TEXT, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Red-Blue ball, (left/right)!", "a red blue ball left right"),
        ('  <person> runs;  twice: "fast" ', "person runs twice fast"),
        ("...", ""),
    ],
)
def test_captions_lose_case_and_punctuation(raw, clean):
    assert clean_caption(raw) == clean
