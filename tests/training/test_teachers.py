# SPDX-License-Identifier: Apache-2.0
# Blocks of a ModuleList and open_clip's models have no type of their own; a wrong guess fails the test.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportOptionalCall=false, reportIndexIssue=false
"""Teachers: the published numbers, their files taken whole, and targets on the student's grid."""

import importlib.resources
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks.config import IMAGENET_MEAN, IMAGENET_STD
from dataengine.networks.internvideo2 import InternVideo2, resize_positions
from dataengine.networks.text import tokenise
from tests.training.test_internvideo2_vision import known_frames, known_weights
from training.config import DistilConfig, InternVideo2TeacherConfig, VideoMAETeacherConfig
from training.models.teachers import (
    VideoMAEEncoder,
    build_clip_teacher,
    build_mae_teacher,
)

STUDENT = {
    "image_size": 56, "num_frames": 4, "width": 32, "layers": 3, "heads": 2, "mlp_width": 64,
    "pool_heads": 2, "embed_dim": 16,
}  # fmt: skip
INTERNVIT = {
    "kind": "internvit", "image_size": 56, "width": 64, "layers": 3, "heads": 4, "mlp_width": 256,
    "pool_heads": 4, "embed_dim": 24,
}  # fmt: skip
INTERNVIDEO2 = {
    "kind": "internvideo2",
    "vision": {
        "image_size": 56, "num_frames": 4, "width": 64, "layers": 3, "heads": 4, "mlp_width": 256,
        "pool_heads": 4, "embed_dim": 24,
    },
}  # fmt: skip
VIDEOMAE = {
    "kind": "videomae", "image_size": 56, "num_frames": 8, "width": 32, "layers": 3, "heads": 2,
    "mlp_width": 64,
}  # fmt: skip


def config_of(clip_teacher, **settings):
    document = {"kind": "internvideo2_distil", "student": STUDENT, "clip_teacher": clip_teacher}
    settings = {"num_clip_layers": 2, "num_mae_layers": 2, **settings}
    return DistilConfig.model_validate(document | settings)


@pytest.fixture(scope="module")
def frames():
    return known_frames(2, 4, 3, 56, 56)


def test_internvit_gives_the_published_numbers(frames):
    teacher = build_clip_teacher(config_of(INTERNVIT))
    known_weights(teacher._encoder)
    middle, final, attention = teacher(frames)
    assert [tuple(layer.shape) for layer in middle] == [(2, 1 + 4 * 16, 64)] * 2
    told = torch.stack(middle)[:, 1, [0, 20], :2].flatten().tolist()
    expected = [0.008289, -0.037543, -0.070489, 0.153379, 0.007599, -0.058449, -0.053969, 0.16026]
    assert told == pytest.approx(expected, abs=2e-6)
    assert final[1, :3].tolist() == pytest.approx([-0.262696, -0.130671, -0.142248], abs=2e-6)
    # The sixth picture is frame 1 of clip 1.
    assert attention[1, 1, :3].tolist() == pytest.approx([0.055005, 0.056774, 0.058411], abs=2e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            {"image_size": 32, "patch_size": 16, "num_frames": 8},
            [0.297354, -0.012681, -0.020955, -0.202698, 0.244979, -0.107992, -0.01482, -0.201778],
        ),
        pytest.param(
            {"image_size": 224, "patch_size": 14, "num_frames": 16, "width": 16, "mlp_width": 32},
            [0.184105, -0.075773, -0.359156, 0.273986, 0.158385, -0.109718, -0.323587, 0.286703],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["stretched positions", "positions as trained"],
)
def test_videomae_gives_the_published_numbers(shape, expected):
    student = STUDENT | {"num_frames": shape["num_frames"] // 2}
    student |= {name: shape[name] for name in ("image_size", "patch_size")}
    config = config_of(INTERNVIT, mae_teacher=VIDEOMAE | shape, student=student)
    teacher = build_mae_teacher(config)
    known_weights(teacher._encoder)
    size = shape["image_size"]
    middle = teacher(known_frames(2, shape["num_frames"], 3, size, size))
    told = torch.stack(middle)[:, 1, [0, -1], :2].flatten().tolist()
    assert told == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("clip_teacher", [INTERNVIT, INTERNVIDEO2, {"kind": "open_clip"}])
def test_targets_are_of_unit_length_on_the_students_grid(clip_teacher, frames):
    teacher = build_clip_teacher(config_of(clip_teacher))
    middle, final, attention = teacher(frames.clone().requires_grad_())
    assert len(middle) == 2
    for layer in middle:
        assert layer.shape == (2, 65, teacher.width)
        torch.testing.assert_close(layer.norm(dim=-1), torch.ones(2, 65))
    assert final.shape == (2, teacher.embed_dim)
    torch.testing.assert_close(final.norm(dim=-1), torch.ones(2))
    assert attention.shape == (2, 4, 16)
    assert attention.min() > 0
    assert not any(value.requires_grad for value in (*middle, final, attention))
    assert not torch.allclose(middle[0], middle[1], atol=1e-2)


def test_an_image_is_a_clip_of_one_frame(frames):
    for clip_teacher in (INTERNVIT, INTERNVIDEO2, {"kind": "open_clip"}):
        middle, _, attention = build_clip_teacher(config_of(clip_teacher))(frames[:, :1])
        assert middle[0].shape[1] == 17
        assert attention.shape == (2, 1, 16)
    teacher = build_mae_teacher(config_of(INTERNVIT, mae_teacher=VIDEOMAE))
    assert teacher(frames[:, :1])[0].shape == (2, 16, 32)


def test_layers_rise_and_may_be_chosen(frames):
    last_two = build_clip_teacher(config_of(INTERNVIDEO2))
    chosen = build_clip_teacher(config_of(INTERNVIDEO2, clip_layers=[0, 2]))
    assert last_two.layers == (1, 2)
    assert chosen.layers == (0, 2)
    encoded = last_two._encoder.encode(frames, layers=(0, 1, 2)).middle
    normed = [F.normalize(layer, dim=-1) for layer in encoded]
    for teacher, layers in ((last_two, (1, 2)), (chosen, (0, 2))):
        for told, layer in zip(teacher(frames).middle, layers, strict=True):
            torch.testing.assert_close(told, normed[layer])


def test_the_same_seed_draws_the_same_teacher_and_leaves_the_generator_alone(frames):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    teachers = [build_clip_teacher(config_of(INTERNVIT | {"seed": seed})) for seed in (1, 1, 2)]
    build_clip_teacher(config_of({"kind": "open_clip"}))
    build_mae_teacher(config_of(INTERNVIT, mae_teacher=VIDEOMAE))
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (teacher(frames).final for teacher in teachers)
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)


def test_frames_come_in_the_students_normalisation(frames):
    config = config_of(INTERNVIT)
    other = config_of(INTERNVIT, pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.2, 0.3, 0.4))
    mean, std, other_mean, other_std = (
        torch.tensor(values)[:, None, None]
        for values in (IMAGENET_MEAN, IMAGENET_STD, other.pixel_mean, other.pixel_std)
    )
    renormalised = (frames * std + mean - other_mean) / other_std
    expected = build_clip_teacher(config)(frames)
    told = build_clip_teacher(other)(renormalised)
    torch.testing.assert_close(told.final, expected.final, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_clip():
    folder = importlib.resources.files("dataengine") / "models" / "tiny_clip"
    return open_clip.create_model(f"local-dir:{folder}").eval()


def test_open_clip_teacher_is_the_shipped_model(tiny_clip):
    student = STUDENT | {"image_size": 64, "patch_size": 16}
    config = config_of({"kind": "open_clip"}, student=student)
    teacher = build_clip_teacher(config)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = torch.rand(2, 4, 3, 64, 64)
    own = tiny_clip.visual.preprocess_cfg
    own_mean, own_std = (torch.tensor(own[name])[:, None, None] for name in ("mean", "std"))
    captions = tokenise(["a red circle", "two dogs"], 48)
    with torch.no_grad():
        each = tiny_clip.encode_image(((pixels - own_mean) / own_std).flatten(0, 1), normalize=True)
        final = F.normalize(each.view(2, 4, -1).mean(dim=1), dim=-1)
        told = teacher((pixels - mean) / std)
        torch.testing.assert_close(told.final, final, rtol=1e-4, atol=1e-5)
        text = tiny_clip.encode_text(captions, normalize=True)
        torch.testing.assert_close(teacher.encode_text(captions), text)
    # What the class token looks at in the last block, by hand.
    with torch.no_grad():
        seen = tiny_clip.visual.forward_intermediates(
            ((pixels - own_mean) / own_std).flatten(0, 1),
            [2],
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens = torch.cat(
            [seen["image_intermediates_prefix"][0], seen["image_intermediates"][0]], dim=1
        )
        last = tiny_clip.visual.transformer.resblocks[-1]
        weight, bias = last.attn.in_proj_weight, last.attn.in_proj_bias
        q, k, _ = F.linear(last.ln_1(tokens), weight, bias).view(8, 17, 3, 4, 32).unbind(2)
        scores = torch.einsum("bhk,bnhk->bhn", q[:, 0], k) / math.sqrt(32)
        attention = scores.softmax(dim=-1).mean(dim=1)[:, 1:].view(2, 4, 16)
    torch.testing.assert_close(told.attention, attention, rtol=1e-4, atol=1e-6)


def test_another_grid_is_interpolated():
    # What lies on the left of the teacher's 4 x 4 patches lies on the left of the student's 2 x 2.
    student = STUDENT | {"image_size": 64, "patch_size": 32}
    pixels = torch.zeros(1, 4, 3, 64, 64)
    pixels[..., 32:] = 2 * torch.rand(1, 1, 3, 64, 32)
    fine = build_clip_teacher(
        config_of({"kind": "open_clip"}, student=student | {"patch_size": 16})
    )(pixels)
    coarse = build_clip_teacher(config_of({"kind": "open_clip"}, student=student))(pixels)
    maps = fine.attention.view(1, 4, 4, 4)
    quarters = F.avg_pool2d(maps, 2).flatten(2)  # what halving bilinearly is
    torch.testing.assert_close(coarse.attention, quarters, rtol=1e-4, atol=1e-6)
    assert coarse.middle[0].shape == (1, 1 + 4 * 4, 128)
    patches = fine.middle[1][0, 1:17].view(4, 4, -1)[:2, :2].mean(dim=(0, 1))
    assert F.cosine_similarity(patches, coarse.middle[1][0, 1], dim=0) > 0.98


def internvl_file(state):
    found = {k: v.half() for k, v in state.items()}
    found["patch_embed.proj.weight"] = found["patch_embed.proj.weight"][:, :, 0]
    text = {"transformer.layers.0.mlp.weight": torch.zeros(2), "logit_scale": torch.ones(())}
    return {"module": found | text | {"text_projection": torch.zeros(2, 24)}}


def test_internvl_file(frames, tmp_path):
    expected = build_clip_teacher(config_of(INTERNVIT))
    torch.save(internvl_file(expected._encoder.state_dict()), tmp_path / "internvl.pth")
    config = INTERNVIT | {"weights": str(tmp_path / "internvl.pth")}
    told = build_clip_teacher(config_of(config))(frames).final
    torch.testing.assert_close(told, expected(frames).final, rtol=1e-2, atol=1e-3)
    broken = internvl_file(expected._encoder.state_dict())
    del broken["module"]["blocks.2.ls1.gamma"]
    torch.save(broken, tmp_path / "internvl.pth")
    with pytest.raises(DependencyError, match=r"blocks\.2\.ls1\.gamma is missing"):
        build_clip_teacher(config_of(config))


def test_internvl_positions_are_stretched_to_the_picture(tmp_path):
    small = build_clip_teacher(config_of(INTERNVIT))
    torch.save(internvl_file(small._encoder.state_dict()), tmp_path / "internvl.pth")
    config = INTERNVIT | {"weights": str(tmp_path / "internvl.pth"), "image_size": 84}
    large = build_clip_teacher(config_of(config, student=STUDENT | {"image_size": 84}))
    table = small._encoder.pos_embed.half().float()
    assert torch.equal(large._encoder.pos_embed, resize_positions(table, 1, 1, 6))


def test_videomae_file(tmp_path):
    expected = build_mae_teacher(config_of(INTERNVIT, mae_teacher=VIDEOMAE))
    state = {f"encoder.{k}": v for k, v in expected._encoder.state_dict().items()}
    state |= {
        "decoder.head.weight": torch.zeros(2),
        "mask_token": torch.zeros(2),
        "encoder_to_decoder.weight": torch.zeros(2),
    }
    path = tmp_path / "vit_g_hybrid_1200e_pre.pth"
    torch.save({"model": state}, path)
    config = config_of(INTERNVIT, mae_teacher=VIDEOMAE | {"weights": str(path), "seed": 5})
    clips = known_frames(1, 8, 3, 56, 56)
    for told, layer in zip(build_mae_teacher(config)(clips), expected(clips), strict=True):
        torch.testing.assert_close(told, layer)
    torch.save({"model": state | {"spare": torch.zeros(1)}}, path)
    with pytest.raises(DependencyError, match="spare is not known"):
        build_mae_teacher(config)


def test_stage_2_file_of_fewer_frames(frames, tmp_path):
    shape = InternVideo2TeacherConfig.model_validate(INTERNVIDEO2).vision
    # Positions of 2 frames of 4 x 4 patches, for 4 of 6 x 6: their number alone does not tell.
    encoder = InternVideo2(shape.model_copy(update={"num_frames": 2, "image_positions": True}))
    state = {f"vision_encoder.{k}": v for k, v in encoder.state_dict().items()}
    torch.save({"module": state | {"temp": torch.ones(())}}, tmp_path / "stage2.pt")
    config = {
        "kind": "internvideo2",
        "weights": str(tmp_path / "stage2.pt"),
        "weights_num_frames": 2,
        "vision": INTERNVIDEO2["vision"] | {"image_size": 84},
    }
    teacher = build_clip_teacher(config_of(config, student=STUDENT | {"image_size": 84}))
    positions = resize_positions(encoder.state_dict()["pos_embed"], 4, 2, 6)
    assert torch.equal(teacher._encoder.pos_embed, positions)
    # Frames of another size than the teacher's are resized to it.
    assert teacher(frames).middle[0].shape == (2, 1 + 4 * 36, 64)


def test_videomaes_gelu_is_exact():
    config = VideoMAETeacherConfig.model_validate(VIDEOMAE)
    mlp = known_weights(VideoMAEEncoder(config)).blocks[0].mlp
    x = 20 * known_frames(1, 6, 32)
    with torch.no_grad():
        hidden = mlp.fc1(x)
        expected = mlp.fc2(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


def test_videomae_attends_to_tokens_not_to_heads():
    config = VideoMAETeacherConfig.model_validate(VIDEOMAE)
    attention = known_weights(VideoMAEEncoder(config)).blocks[0].attn
    x = known_frames(1, 6, 32)
    with torch.no_grad():
        bias = torch.cat([attention.q_bias, torch.zeros(32), attention.v_bias])
        q, k, v = F.linear(x, attention.qkv.weight, bias)[0].view(6, 3, 2, 16).permute(1, 2, 0, 3)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(16)).softmax(dim=-1) @ v
        expected = attention.proj(mixed.transpose(0, 1).reshape(1, 6, 32))
        torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_teacher", [INTERNVIT, INTERNVIDEO2, {"kind": "open_clip"}])
def test_teachers_follow_autocast(clip_teacher, frames):
    teacher = build_clip_teacher(config_of(clip_teacher))
    exact = teacher(frames)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher(frames)
    assert any(p.dtype == torch.bfloat16 for p in teacher._network.parameters())
    for one, other in zip(exact.middle, rounded.middle, strict=True):
        assert other.dtype == torch.float32
        assert F.cosine_similarity(one, other, dim=-1).min() > 0.99
    torch.testing.assert_close(rounded.attention, exact.attention, rtol=0.1, atol=2e-3)
    # What was cast stays so, whoever asks.
    torch.testing.assert_close(teacher(frames).final, rounded.final)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_clip_layers": 4}, "num_clip_layers is 4, and the teacher has 3 layers"),
        ({"clip_layers": [1, 3]}, "must rise from 0 at least to 2 at most"),
        ({"clip_layers": [2, 1]}, "must rise"),
        (
            {"clip_teacher": INTERNVIDEO2, "student": STUDENT | {"num_frames": 8}},
            "The teacher sees 4 frames and the student 8",
        ),
        (
            {"clip_teacher": {"kind": "open_clip", "context_length": 77}},
            "reads 48 tokens, not 77",
        ),
    ],
)
def test_first_teachers_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        build_clip_teacher(config_of(settings.pop("clip_teacher", INTERNVIT), **settings))


def test_second_teachers_that_do_not_fit_are_refused():
    for change in ({"num_frames": 4}, {"patch_size": 28}):
        with pytest.raises(ConfigError, match="must be 8 of 4 x 4"):
            build_mae_teacher(config_of(INTERNVIT, mae_teacher=VIDEOMAE | change))
    with pytest.raises(ConfigError, match="num_mae_layers is 4"):
        build_mae_teacher(config_of(INTERNVIT, mae_teacher=VIDEOMAE, num_mae_layers=4))
    assert build_mae_teacher(config_of(INTERNVIT)) is None


def test_a_folder_that_is_no_open_clip_model_is_refused(tmp_path):
    with pytest.raises(DependencyError, match="The teacher cannot be loaded"):
        build_clip_teacher(config_of({"kind": "open_clip", "weights": str(tmp_path)}))
