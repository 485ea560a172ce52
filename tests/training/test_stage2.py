# SPDX-License-Identifier: Apache-2.0
"""InternVideo2's second stage: the published numbers and names, what each kind of step learns.

The golden numbers are the published modules', run on the weights and inputs that are drawn here.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks.config import InternVideo2Stage2Config
from dataengine.networks.internvideo2_stage2 import (
    InternVideo2Stage2,
    load_published_stage2,
    published_stage2,
)
from training.config import Stage2Objective, load_recipe
from training.data.batch import Inputs, Pairs
from training.models import stage2
from training.models.stage2 import Stage2Task
from training.objectives.matching import Negatives

VISION = {
    "image_size": 56, "num_frames": 4, "width": 48, "layers": 3, "heads": 4, "mlp_width": 96,
    "pool_heads": 4, "embed_dim": 40,
}  # fmt: skip
TEXT = {
    "vocab_size": 120, "width": 32, "layers": 4, "fusion_layer": 2, "heads": 4, "mlp_width": 48,
    "max_positions": 16, "mask_id": 4, "dropout": 0.0,
}  # fmt: skip
AUDIO = {
    "embed_dim": 24, "width": 32, "mlp_width": 48, "layers": 2, "heads": 4, "conv_pos": 16,
    "conv_pos_groups": 4, "num_buckets": 20, "max_distance": 40,
}  # fmt: skip
EVERYTHING = Stage2Objective(same_caption="negative", atc=1, atm=1, amlm=1, avc=1)
KINDS = ("video", "image", "audio", "audio_video")
LOSSES = {
    "video": ["vtc", "vtm", "mlm"],
    "image": ["vtc", "vtm", "mlm"],
    "audio": ["atc", "atm", "amlm"],
    "audio_video": [
        "vtc", "atc", "avtc", "avc", "vtm", "atm", "avtm", "mlm", "amlm", "avmlm"
    ],
}  # fmt: skip


def shape(hears=False, **changes):
    """As the 1B model is made, or as the 6B model, which hears and has no positions for images."""
    document = {
        "kind": "internvideo2_stage2",
        "vision": {**VISION, "image_positions": not hears},
        "text": TEXT,
        "audio": AUDIO if hears else None,
        "context_length": 12,
        "embed_dim": 28,
        "fusion_width": 36,
        "freeze_audio": False,
    }
    return InternVideo2Stage2Config.model_validate({**document, **changes})


def drawn_weights(config):
    """Weights that depend on a name alone; norms and scales around 1."""
    with torch.device("meta"):
        state = InternVideo2Stage2(config).state_dict()
    drawn = {}
    for name, value in state.items():
        noise = np.random.default_rng([0, *name.encode()]).standard_normal(value.shape)
        ones = name.endswith(("gamma", "scale", ".1.weight")) or (
            "norm" in name.lower() and name.endswith("weight")
        )
        drawn[name] = torch.from_numpy(np.asarray(noise * 0.1 + ones, np.float32))
    drawn["temp"] = torch.tensor(0.07)
    return drawn


def drawn_inputs(kind, rows=6):
    """Frames, sound, texts of several lengths, and the patches that are seen."""
    rng = np.random.default_rng(1)
    frames = rng.standard_normal((rows, 4, 3, 56, 56)).astype(np.float32)
    fbank = rng.standard_normal((rows, 998, 64)).astype(np.float32)
    tokens = rng.integers(5, 120, (rows, 12))
    tokens[:, 0] = 2
    for row, length in enumerate([12, 9, 5, 7, 3, 10][:rows]):
        tokens[row, length - 1], tokens[row, length:] = 3, 0
    frames = frames[:, :1] if kind == "image" else frames
    num_patches, ratio = frames.shape[1] * 16, 0.5 if kind == "image" else 0.8
    kept = num_patches - int(num_patches * ratio)
    visible = np.sort(rng.random((rows, num_patches)).argsort(axis=1)[:, :kept], axis=1)
    number = torch.arange(rows)
    inputs = Inputs(
        kind,
        None if kind == "audio" else torch.from_numpy(frames),
        torch.from_numpy(fbank) if "audio" in kind else None,
        torch.from_numpy(tokens),
        Pairs(torch.ones(rows, dtype=torch.bool), number, number),
    )
    return inputs, torch.from_numpy(visible)


def drawn_task(config, objective=EVERYTHING):
    task = Stage2Task(config, objective)
    task.network.load_state_dict(drawn_weights(config))
    return task


GOLDEN = {
    (False, "video"): {"vtc": 1.902994, "vtm": 0.663697, "mlm": 5.065374},
    (False, "image"): {"vtc": 2.372939, "vtm": 0.632579, "mlm": 5.155574},
    (True, "video"): {"vtc": 1.902994, "vtm": 0.641380, "mlm": 5.151639},
    (True, "image"): {"vtc": 2.232574, "vtm": 0.645540, "mlm": 5.204508},
    (True, "audio"): {"atc": 1.803213, "atm": 0.923705, "amlm": 5.163759},
    (True, "audio_video"): {
        "vtc": 1.902994, "vtm": 0.641380, "mlm": 5.248890, "avc": 1.935416, "atc": 1.803213,
        "avtc": 1.938497, "atm": 0.924776, "avtm": 0.640446, "amlm": 4.955149, "avmlm": 5.386182,
    },
}  # fmt: skip
"""(whether the model hears, kind of step) -> what the published modules give."""

GOLDEN_FEATURES = {
    (False, "video"): (
        [-0.137693, -0.088912, 0.007603, -0.085302, -0.212373, -0.153629],
        [0.479433, 0.484872, 0.411272, 0.450166, 0.493454, 0.464591],
    ),
    (False, "image"): (
        [-0.035040, -0.059677, -0.144403, -0.076438, -0.126757, -0.212908],
        [0.484609, 0.441354, 0.313402, 0.385876, 0.479934, 0.471478],
    ),
    (True, "video"): (
        [-0.137693, -0.088912, 0.007603, -0.085302, -0.212373, -0.153629],
        [0.404830, 0.441487, 0.386733, 0.374783, 0.407041, 0.362148],
    ),
    (True, "image"): (
        [-0.051615, -0.062395, -0.175349, -0.060464, -0.142182, -0.206395],
        [0.436810, 0.395580, 0.369663, 0.377848, 0.407771, 0.357099],
    ),
}
"""First numbers of the clips' features, and the probabilities that clips and texts fit."""
GOLDEN_TEXT = [-0.011767, -0.011990, -0.022483, -0.016054, -0.033159, -0.010073]


@pytest.mark.parametrize(("hears", "kind"), GOLDEN)
def test_losses_are_the_published_ones(hears, kind, monkeypatch):
    task = drawn_task(shape(hears))
    inputs, visible = drawn_inputs(kind)
    monkeypatch.setattr(task, "_visible", lambda inputs: visible)
    torch.manual_seed(11)  # of the negatives and of the masked words
    losses, numbers = task(inputs)
    assert sorted(losses) == sorted(LOSSES[kind])
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(GOLDEN[hears, kind][name], abs=3e-6), name
    matchings = {name for name in losses if name.endswith("tm")}
    assert numbers.keys() == {"temperature"} | {f"{name}_accuracy" for name in matchings}
    assert numbers["temperature"].item() == pytest.approx(0.07)
    assert not any(number.requires_grad for number in numbers.values())


@pytest.mark.parametrize(("hears", "kind"), GOLDEN_FEATURES)
def test_features_and_matches_are_the_published_ones(hears, kind):
    task = drawn_task(shape(hears)).eval()
    inputs, _ = drawn_inputs(kind)
    assert inputs.frames is not None
    with torch.no_grad():
        encoder, judge = task.dual_encoder(), task.matcher()
        video, text = encoder.encode_video(inputs.frames), encoder.encode_text(inputs.tokens)
        states = judge.text_states(inputs.tokens)
        fits = judge.match(judge.video_tokens(inputs.frames), states, inputs.tokens)
    assert video.norm(dim=1).tolist() == pytest.approx([1.0] * 6)
    assert text.norm(dim=1).tolist() == pytest.approx([1.0] * 6)
    assert video[:, 0].tolist() == pytest.approx(GOLDEN_FEATURES[hears, kind][0], abs=2e-6)
    assert text[:, 0].tolist() == pytest.approx(GOLDEN_TEXT, abs=2e-6)
    assert fits.tolist() == pytest.approx(GOLDEN_FEATURES[hears, kind][1], abs=2e-6)


# --- Published files


def large(name):
    model = load_recipe(name).model
    assert isinstance(model, InternVideo2Stage2Config)
    with torch.device("meta"):
        return published_stage2(InternVideo2Stage2(model).state_dict(), model)


def outside_encoders(state):
    towers = ("vision_encoder.", "text_encoder.", "audio_encoder.")
    return {name: tuple(v.shape) for name, v in state.items() if not name.startswith(towers)}


def linear(name, wide, narrow):
    return {f"{name}.weight": (narrow, wide), f"{name}.bias": (narrow,)}


def test_names_and_shapes_of_the_1b_model():
    state = large("internvideo2_s2_1b")
    assert outside_encoders(state) == {
        "temp": (),
        **linear("vision_proj", 768, 512),
        **linear("text_proj", 1024, 512),
        **linear("itm_head", 1024, 2),
    }
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["vision_encoder.pos_embed"] == (1, 1025, 1408)
    assert shapes["vision_encoder.img_pos_embed"] == (1, 257, 1408)
    key = "text_encoder.bert.encoder.layer.19.crossattention.self.key.weight"
    assert shapes[key] == (1024, 1408)
    assert shapes["text_encoder.cls.predictions.decoder.weight"] == (30522, 1024)
    assert not any(name.startswith(("audio", "av")) for name in shapes)


def test_names_and_shapes_of_the_6b_model():
    state = large("internvideo2_s2_6b")
    projection = {name: (768,) for name in ("1.weight", "1.bias")}
    assert outside_encoders(state) == {
        "temp": (),
        **linear("vision_proj", 768, 768),
        **linear("text_proj", 1024, 768),
        **linear("itm_head", 1024, 2),
        **linear("atm_head", 1024, 2),
        **linear("avtm_head", 1024, 2),
        **linear("audio_proj", 768, 768),
        **linear("av_fusion", 1536, 768),
        **linear("av_concat_vision_proj.0", 3200, 768),
        **linear("av_concat_audio_proj.0", 768, 768),
        **{f"av_concat_vision_proj.{name}": shape for name, shape in projection.items()},
        **{f"av_concat_audio_proj.{name}": shape for name, shape in projection.items()},
    }
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    key = "text_encoder.bert.encoder.layer.23.crossattention.self.value.weight"
    assert shapes[key] == (1024, 768)
    assert "vision_encoder.img_pos_embed" not in shapes
    assert shapes["audio_encoder.patch_embedding.weight"] == (512, 1, 16, 16)
    bias = "audio_encoder.encoder.layers.11.self_attn.relative_attention_bias.weight"
    assert shapes[bias] == (320, 12)


def published_file(config, **extra):
    """A file in the published format, with what distillation and BERT leave in one."""
    weights = published_stage2(drawn_weights(config), config)
    weights |= {
        "vision_encoder.clip_decoder.0.head.weight": torch.zeros(3, 48),
        "vision_encoder.final_clip_decoder.norm.bias": torch.zeros(3),
        "vision_encoder.clip_pos_embed": torch.zeros(1, 65, 48),
        "text_encoder.bert.embeddings.position_ids": torch.arange(16)[None],
    }
    return weights | extra


@pytest.mark.parametrize("hears", [False, True], ids=["visual", "audiovisual"])
@pytest.mark.parametrize("wrap", ["module", "model", ""])
def test_a_published_file_round_trips(hears, wrap, tmp_path):
    config, path = shape(hears), tmp_path / "stage2.pt"
    weights = {
        f"module.{k}" if wrap == "model" else k: v for k, v in published_file(config).items()
    }
    torch.save({wrap: weights, "epoch": 9} if wrap else weights, path)
    state = load_published_stage2(path, config, 4)
    network = InternVideo2Stage2(config)
    network.load_state_dict(state)
    expected = drawn_weights(config)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    again = published_stage2(network.state_dict(), config)
    original = {name.removeprefix("module."): value for name, value in weights.items()}
    for name in original.keys() - again.keys():
        assert "clip_" in name or "position_ids" in name
    assert all(torch.equal(again[name], original[name]) for name in again)


def test_halves_are_read_as_float32(tmp_path):
    half = {name: v.bfloat16() for name, v in published_file(shape()).items()}
    state = load_published_stage2({"module": half}, shape(), 4)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_positions_of_4_frames_are_stretched_to_8():
    eight = shape(vision={**VISION, "num_frames": 8, "image_positions": True})
    state = load_published_stage2(published_file(shape()), eight, 4)
    four = drawn_weights(shape())["vision_encoder.pos_embed"]
    assert state["vision_encoder.pos_embed"].shape == (1, 1 + 8 * 16, 48)
    expected = F.interpolate(four[0, 1:].view(4, 16 * 48).T[None], size=8, mode="linear")[0].T
    torch.testing.assert_close(state["vision_encoder.pos_embed"][0, 1:].reshape(8, -1), expected)
    assert torch.equal(state["vision_encoder.pos_embed"][:, 0], four[:, 0])
    InternVideo2Stage2(eight).load_state_dict(state)


def test_a_head_that_was_never_trained_starts_at_zero(caplog):
    weights = published_file(shape(True))
    del weights["atm_head.weight"], weights["atm_head.bias"]
    state = load_published_stage2(weights, shape(True), 4)
    assert not state["atm_head.weight"].any()
    assert "lacks atm_head.weight and atm_head.bias" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("avtm_head.weight", None, "avtm_head.weight is missing"),
        (
            "audio_encoder.encoder.layers.1.fc1.bias",
            None,
            "audio_encoder.blocks.1.fc1.bias is miss",
        ),
        ("vision_encoder.blocks.3.ls1.gamma", torch.ones(48), "blocks.3.ls1.gamma is not known"),
        ("text_proj.weight", torch.ones(28, 31), r"text_proj.weight is of shape \(28, 31\), not"),
        (
            "text_encoder.cls.predictions.decoder.bias",
            torch.ones(120),
            "differing copies cls.predictions.decoder.bias",
        ),
        (
            "audio_encoder.encoder.layers.1.self_attn.relative_attention_bias.weight",
            torch.ones(20, 4),
            "differing copies audio_encoder.encoder.layers.0.self_attn.relative_attention_bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(name, value, message):
    weights = published_file(shape(True))
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    with pytest.raises(DependencyError, match=message):
        load_published_stage2({"module": weights}, shape(True), 4)


def test_a_file_with_sound_does_not_fit_a_model_without():
    with pytest.raises(DependencyError, match=r"not known|is of shape"):
        load_published_stage2(published_file(shape(True)), shape(), 4)


# --- Steps


def total(output):
    return torch.stack(list(output.losses.values())).sum()


def with_gradient(task, kind):
    inputs, _ = drawn_inputs(kind)
    task.zero_grad()
    total(task(inputs)).backward()
    return {
        name.removeprefix("network.") for name, p in task.named_parameters() if p.grad is not None
    }


def parts(names):
    return {name.split(".")[0] for name in names}


HEARING = {
    "audio_encoder", "audio_proj", "av_concat_audio_proj", "av_fusion", "atm_head", "avtm_head"
}  # fmt: skip
SEEING = {"vision_encoder", "vision_proj", "av_concat_vision_proj", "itm_head"}


def test_which_parameters_a_step_leaves_unused():
    task = drawn_task(shape(True, vision={**VISION, "image_positions": True}))
    everything = {name.removeprefix("network.") for name, _ in task.named_parameters()}
    positions = {"vision_encoder.pos_embed", "vision_encoder.img_pos_embed"}
    unused = {kind: everything - with_gradient(task, kind) for kind in KINDS}
    assert parts(unused["video"]) - {"vision_encoder"} == HEARING
    assert unused["video"] & positions == {"vision_encoder.img_pos_embed"}
    assert unused["image"] & positions == {"vision_encoder.pos_embed"}
    assert parts(unused["audio"]) == SEEING | {"av_fusion", "avtm_head"}
    assert unused["audio_video"] == {"vision_encoder.img_pos_embed"}


def test_a_loss_of_weight_0_is_not_computed(monkeypatch):
    monkeypatch.setattr(stage2, "mask_words", None)
    monkeypatch.setattr(InternVideo2Stage2, "hear", None)
    objective = Stage2Objective(mlm=0, avtc=0, avtm=0, avmlm=0, vtc=0.5)
    task = drawn_task(shape(True), objective)
    inputs, _ = drawn_inputs("audio_video")
    torch.manual_seed(0)
    losses, _ = task(inputs)
    assert losses.keys() == {"vtc", "vtm"}
    task._objective = objective.model_copy(update={"vtc": 1.5})
    torch.manual_seed(0)
    assert task(inputs).losses["vtc"].item() == pytest.approx(3 * losses["vtc"].item(), rel=1e-5)


def test_video_against_sound_alone():
    nothing = dict.fromkeys(["vtc", "vtm", "mlm", "avtc", "avtm", "avmlm"], 0)
    document = {**nothing, "avc": 2, "same_caption": "negative"}
    task = drawn_task(shape(True), Stage2Objective.model_validate(document))
    assert parts(with_gradient(task, "audio_video")) == {
        "vision_encoder", "vision_proj", "audio_encoder", "audio_proj", "temp"
    }  # fmt: skip
    task.eval()
    inputs, _ = drawn_inputs("audio_video")
    assert inputs.frames is not None
    assert inputs.fbank is not None
    audio = F.normalize(task.network.hear(inputs.fbank).feature, dim=1)
    logits = audio @ task.network.encode_video(inputs.frames).T / 0.07
    own = torch.arange(6)
    expected = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    torch.testing.assert_close(task(inputs).losses["avc"], expected)


@pytest.mark.parametrize(
    ("hears", "objective", "kind", "message"),
    [
        (False, {}, "audio_video", "model.audio is empty"),
        (True, {"vtc": 0, "vtm": 0, "mlm": 0}, "video", "video steps learn nothing"),
        (True, {}, "audio", "audio steps learn nothing: atc, atm, amlm"),
    ],
)
def test_steps_that_teach_nothing_are_refused(hears, objective, kind, message):
    task = drawn_task(shape(hears), Stage2Objective.model_validate(objective))
    with pytest.raises(ConfigError, match=message):
        task(drawn_inputs(kind)[0])


@pytest.mark.parametrize("kind", ["audio", "audio_video"])
def test_rows_without_sound_take_no_part(kind):
    task = drawn_task(shape(True)).eval()
    inputs, _ = drawn_inputs(kind)
    assert inputs.fbank is not None
    valid = inputs.pairs.valid.clone()
    valid[2] = False
    torch.manual_seed(0)
    expected = task(inputs._replace(pairs=Pairs(valid, *(inputs.pairs.caption_id,) * 2))).losses
    silent = inputs.fbank.clone()
    silent[2] = 0
    torch.manual_seed(0)
    losses = task(inputs._replace(fbank=silent)).losses
    torch.manual_seed(0)
    whole = task(inputs).losses
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
        assert abs(loss.item() - whole[name].item()) > 1e-5, name
    # Where pictures alone are looked at, the row counts although nothing is heard.
    if kind == "audio_video":
        video = inputs._replace(kind="video", fbank=None)
        assert torch.isfinite(task(video).losses["vtc"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_could_not_be_read_changes_nothing_but_draws(kind):
    task = drawn_task(shape(True)).eval()
    inputs, _ = drawn_inputs(kind)
    valid = torch.tensor([True, True, True, True, True, False])
    number = torch.arange(6)
    garbage = []
    for seed in range(2):
        noise = torch.Generator().manual_seed(seed)
        media = []
        for tensor in (inputs.frames, inputs.fbank):
            if tensor is not None:
                tensor = tensor.clone()
                tensor[5] = torch.randn(tensor[5].shape, generator=noise)
            media.append(tensor)
        tokens = inputs.tokens.clone()
        tokens[5] = 0 if seed else 9
        torch.manual_seed(0)
        step = Inputs(kind, media[0], media[1], tokens, Pairs(valid, number, number))
        garbage.append(task(step))
    for name, loss in garbage[0].losses.items():
        torch.testing.assert_close(loss, garbage[1].losses[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "kept"), [("video", 13), ("image", 8)])
def test_masks_are_for_training(kind, kept, monkeypatch):
    task = drawn_task(shape())
    inputs, _ = drawn_inputs(kind)
    seen = []
    encoder = task.network.vision_encoder
    forward = type(encoder).forward

    def spy(self, frames, visible=None):
        tokens, pooled = forward(self, frames, visible)
        seen.append((visible, tokens.shape[1]))
        return tokens, pooled

    monkeypatch.setattr(type(encoder), "forward", spy)
    task(inputs)
    task(inputs)
    task.eval()(inputs)
    (first, length), (second, _), (none, whole) = seen
    assert first.shape == (6, kept)
    assert length == kept + 1  # the class token is always seen
    assert (first.diff(dim=1) > 0).all()
    assert first.max() < whole - 1
    assert len({tuple(row) for row in first.tolist()}) == 6  # another mask for each clip
    assert not torch.equal(first, second)
    assert none is None
    assert whole == (64 if kind == "video" else 16) + 1


def test_frozen_encoders_stay_as_they_are_and_see_everything():
    config = shape(True, freeze_vision=True, freeze_audio=True)
    config = config.model_copy(
        update={"vision": config.vision.model_copy(update={"drop_path": 0.9})}
    )
    task = drawn_task(config).train()
    for encoder in (task.network.vision_encoder, task.network.audio_encoder):
        assert not encoder.training
        assert not any(p.requires_grad for p in encoder.parameters())
    assert task.network.text_encoder.training
    inputs, _ = drawn_inputs("audio_video")
    assert task._visible(inputs) is None
    touched = with_gradient(task, "audio_video")
    assert not parts(touched) & {"vision_encoder", "audio_encoder"}
    assert {"vision_proj", "audio_proj", "av_concat_vision_proj", "av_fusion"} <= parts(touched)
    assert inputs.frames is not None
    video = task.network.encode_video(inputs.frames)
    assert torch.equal(video, task.eval().network.encode_video(inputs.frames))


@pytest.mark.parametrize(("value", "held"), [(0.9, 0.5), (1e-6, 0.001), (0.2, 0.2), (-1.0, 0.001)])
def test_the_temperature_is_tau_between_its_bounds(value, held):
    task = drawn_task(shape()).eval()
    with torch.no_grad():
        task.network.temp.fill_(value)
    inputs, _ = drawn_inputs("video")
    assert inputs.frames is not None
    losses, numbers = task(inputs)
    assert numbers["temperature"].item() == pytest.approx(held)
    similarity = task.encode_video(inputs.frames) @ task.encode_text(inputs.tokens).T / held
    own = torch.arange(6)
    expected = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    torch.testing.assert_close(losses["vtc"], expected, rtol=1e-5, atol=1e-5)
    losses["vtc"].backward()
    assert task.network.temp.grad is not None  # a bound does not stop it


def test_sound_comes_before_video_for_the_decoder():
    network = drawn_task(shape(True)).eval().network
    inputs, _ = drawn_inputs("audio_video")
    assert inputs.frames is not None
    assert inputs.fbank is not None
    seen, heard = network.see(inputs.frames), network.hear(inputs.fbank)
    both = network.together(heard, seen)
    assert heard.tokens.shape == (6, 248, 36)  # 62 moments of 160 ms, 4 bands
    assert torch.equal(both.tokens[:, :248], heard.tokens)
    assert torch.equal(both.tokens[:, 248:], seen.tokens)
    assert both.feature.shape == (6, 28)


def test_a_patch_of_sound_is_a_moment_and_a_band():
    network = drawn_task(shape(True)).eval().network
    fbank = torch.zeros(1, 998, 64)
    louder = fbank.clone()
    louder[0, 5 * 16 + 3, 2 * 16 + 7] = 1.0
    tokens = network.audio_encoder._patch_tokens(louder) - network.audio_encoder._patch_tokens(
        fbank
    )
    assert tokens.abs().amax(dim=2)[0].nonzero().flatten().tolist() == [5 * 4 + 2]


def test_what_decays_and_what_is_sharded():
    task = drawn_task(shape(True))
    assert len(task.blocks()) == 3 + 4 + 2
    free = {
        name
        for name, p in task.named_parameters()
        if p.ndim > 1 and any(part in name for part in task.no_decay())
    }
    assert free == {"network.vision_encoder.pos_embed", "network.vision_encoder.cls_token"}


def test_everything_is_drawn_from_the_seed():
    states = []
    for junk in (3.0, -7.0):
        _ = [
            torch.full((1000, size), junk) for size in range(1, 40)
        ]  # what uninitialised memory holds
        torch.manual_seed(5)
        states.append(Stage2Task(shape(True), EVERYTHING).state_dict())
    first, second = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.isfinite(value).all() for value in first.values())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_bfloat16(kind):
    task = drawn_task(shape(True))
    inputs, _ = drawn_inputs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        output = task(inputs)
    losses = output.losses
    total(output).backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


# --- Learning


def test_a_tiny_model_learns_eight_pairs_from_every_kind_of_step():
    torch.manual_seed(0)
    task = Stage2Task(
        shape(True),
        Stage2Objective(
            same_caption="negative", atc=1, atm=1, amlm=1, avc=1, video_mask_ratio=0.25,
            image_mask_ratio=0.0, mlm_probability=0.3,
        ),
    )  # fmt: skip
    steps = {}
    for kind in KINDS:
        frames = torch.randn(8, 1, 3, 56, 56).expand(-1, 1 if kind == "image" else 4, -1, -1, -1)
        number = torch.arange(8)
        # Each text is a sentence of one word, so that who finds the clip's number finds the word.
        tokens = torch.zeros(8, 12, dtype=torch.long)
        tokens[:, 0], tokens[:, 1:5], tokens[:, 5] = 2, 20 + number[:, None], 3
        pairs = Pairs(torch.ones(8, dtype=torch.bool), number, number)
        fbank = torch.randn(8, 1, 64).expand(-1, 80, -1)  # a short sound: 20 patches
        steps[kind] = Inputs(
            kind,
            None if kind == "audio" else frames,
            fbank if "audio" in kind else None,
            tokens,
            pairs,
        )
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    history = {kind: [] for kind in KINDS}
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 10)
        for kind, inputs in steps.items():
            output = task(inputs)
            losses = output.losses
            optimizer.zero_grad()
            total(output).backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 3.0)
            optimizer.step()
            history[kind].append({name: loss.item() for name, loss in losses.items()})
    for kind in KINDS:
        for name in LOSSES[kind]:
            first = np.mean([losses[name] for losses in history[kind][:3]])
            last = np.mean([losses[name] for losses in history[kind][-10:]])
            assert last < 0.7 * first, (kind, name, first, last)
    # And what was learnt is what evaluation asks: clips find their texts, and fit them.
    task.eval()
    video = steps["video"]
    assert video.frames is not None
    with torch.no_grad():
        cosine = task.encode_video(video.frames) @ task.encode_text(video.tokens).T
        clips, states = task.video_tokens(video.frames), task.text_states(video.tokens)
        fits = torch.stack(
            [task.match(clips, states.roll(n, 0), video.tokens.roll(n, 0)) for n in range(8)]
        )
    assert cosine.argmax(dim=1).tolist() == list(range(8))
    assert fits[0].min() > 0.6
    # Not all of the others: negatives so hard are always the same few.
    assert fits[1:].mean() < 0.4


# --- Two processes


def process_step(kind, rows, monkeypatch):
    """Losses and gradients of some rows with masks and negatives that depend on the row alone."""
    task = drawn_task(shape(True), EVERYTHING.model_copy(update={"hard_negatives": "global"}))
    task.eval()
    inputs, _ = drawn_inputs(kind)
    valid = torch.tensor([True, True, True, True, False, True])
    pairs = Pairs(valid, torch.arange(6), torch.arange(6))
    step = Inputs(
        kind,
        None if inputs.frames is None else inputs.frames[rows],
        None if inputs.fbank is None else inputs.fbank[rows],
        inputs.tokens[rows],
        Pairs(pairs.valid[rows], pairs.caption_id[rows], pairs.video_id[rows]),
    )

    def mask(tokens, probability, vocab_size, mask_id):
        # The second process gets fewer words to find.
        chosen = (tokens % 3 == 0) & (tokens > 3)
        return torch.where(chosen, mask_id, tokens), torch.where(chosen, tokens, -100)

    def draw(media, text, temperature, pairs, config, scope):
        own = pairs.caption_id
        other = {0: 3, 1: 5, 2: 0, 3: 1, 4: 4, 5: 2}
        chosen = torch.tensor([other[row] for row in own.tolist()])
        return Negatives(chosen, (5 - chosen), pairs.valid)

    monkeypatch.setattr(stage2, "mask_words", mask)
    monkeypatch.setattr(stage2, "draw_negatives", draw)
    output = task(step)
    losses, numbers = output
    total(output).backward()
    gradients = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in (losses | numbers).items()}, gradients


def gathered_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    results = {}
    for kind in KINDS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            numbers, gradients = process_step(kind, slice(rank * 3, rank * 3 + 3), monkeypatch)
        for value in [*numbers.values(), *gradients.values()]:  # what DDP does to gradients
            dist.all_reduce(value)
            value /= world_size
        results[kind] = numbers, gradients
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path, monkeypatch):
    # Forked: starting two interpreters would take longer than all of this file.
    multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        gathered_process, args=(2, tmp_path), nprocs=2, start_method="fork"
    )
    results = torch.load(tmp_path / "rank1.pt")
    for kind in KINDS:
        expected, gradients = process_step(kind, slice(0, 6), monkeypatch)
        numbers, averaged = results[kind]
        assert numbers.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(numbers[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert averaged.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                averaged[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-6
            )
