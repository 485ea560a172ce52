# SPDX-License-Identifier: Apache-2.0
# Blocks of a ModuleList have no type of their own; a wrong guess fails the test.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false, reportOptionalCall=false, reportIndexIssue=false
"""InternVideo2's first stage: what the student answers, what it sees, and how far off it is."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from dataengine.errors import ConfigError
from dataengine.networks.config import InternVideo2Config
from dataengine.networks.internvideo2 import resize_positions, sinusoids
from tests.training.test_internvideo2_vision import known_frames, known_weights
from tests.training.test_teachers import INTERNVIT, STUDENT, VIDEOMAE, config_of
from training.config import DistilObjective, InitConfig, load_recipe
from training.data.batch import Inputs, Pairs
from training.models import build_task
from training.models.distil import (
    DistilTask,
    Student,
    visible_patches,
)
from training.models.filling import read_weights
from training.models.published import vision_weights
from training.objectives.distil import distance

SHAPE = InternVideo2Config(
    image_size=56, num_frames=4, width=64, layers=5, heads=4, mlp_width=176, pool_heads=4,
    embed_dim=48,
)  # fmt: skip
OBJECTIVE = DistilObjective()


def student(decoder, shape=SHAPE):
    mae = {"mae_width": 32, "num_mae_layers": 2} if decoder == "linear" else {}
    widths = {"clip_width": 40, "clip_embed_dim": 24, "num_clip_layers": 3}
    return Student(shape, decoder=decoder, **widths, **mae)


def inputs(frames, valid=None, kind="video"):
    rows = len(frames)
    valid = torch.ones(rows, dtype=torch.bool) if valid is None else valid
    pairs = Pairs(valid, torch.arange(rows), torch.arange(rows))
    return Inputs(kind, frames, None, torch.zeros(rows, 0, dtype=torch.int64), pairs)


@pytest.mark.parametrize(
    ("decoder", "middle", "final", "mae", "loss"),
    [
        (
            "linear",
            [0.098546, -0.119702, 0.063886, -0.065265, 0.147488, -0.174941],
            [-0.058284, -0.070244, -0.184205],
            [0.018525, 0.075291, -0.116794, 0.015992],
            5.91123,
        ),
        (
            "mlp",
            [-0.184405, -0.070809, -0.204804, -0.014258, -0.109799, -0.199623],
            [-0.225279, -0.088232, -0.048305],
            [],
            3.831275,
        ),
    ],
    ids=["stage 1", "S, B and L"],
)
def test_answers_and_loss_are_those_of_the_published_modules(decoder, middle, final, mae, loss):
    rng = np.random.default_rng(5)
    visible = np.stack([np.sort(rng.choice(64, 12, replace=False)) for _ in range(2)])
    network = known_weights(student(decoder)).eval()
    with torch.no_grad():
        answers = network(known_frames(2, 4, 3, 56, 56), torch.from_numpy(visible))
    assert [v for layer in answers.middle for v in layer[0, 1, :2].tolist()] == pytest.approx(
        middle, abs=2e-6
    )
    assert answers.final[1, :3].tolist() == pytest.approx(final, abs=2e-6)
    assert [v for layer in answers.mae for v in layer[1, 0, :2].tolist()] == pytest.approx(
        mae, abs=2e-6
    )
    valid = torch.ones(2, dtype=torch.bool)
    shapes = [(3, 2, 13, 40), (2, 24), (2, 2, 12, 32)]
    targets = [
        F.normalize(known_frames(*shape, seed=seed), dim=-1)
        for shape, seed in zip(shapes, (6, 7, 8), strict=True)
    ]
    total = distance(answers.middle, targets[0], valid)
    total = total + distance([answers.final], [targets[1]], valid)
    if mae:
        total = total + distance(answers.mae, targets[2], valid)
    assert total.item() == pytest.approx(loss, abs=1e-5)


def test_names_are_the_published_ones():
    names = set(student("linear").state_dict())
    assert {"clip_pos_embed", "mae_pos_embed", "clip_decoder.2.head.weight"} <= names
    assert {"final_clip_decoder.head.bias", "final_clip_decoder.norm.weight"} <= names
    assert {"mae_decoder.1.head.0.weight", "mae_decoder.1.head.2.bias"} <= names
    mlp = set(student("mlp").state_dict())
    assert {"clip_decoder.0.head.0.weight", "final_clip_decoder.head.2.weight"} <= mlp
    assert not any(name.startswith("mae") for name in mlp)


def test_fresh_decoders_are_drawn_as_published():
    torch.manual_seed(0)
    network = student("linear", SHAPE.model_copy(update={"width": 256}))
    for linear in (network.clip_decoder[0].head, network.mae_decoder[0].head[0]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    table = sinusoids(256, 4, 4)
    assert torch.equal(network.clip_pos_embed, table)
    assert torch.equal(network.mae_pos_embed, table[:, 1:])


def test_the_first_decoder_answers_the_shallowest_layer():
    network = known_weights(student("linear")).eval()
    frames, visible = known_frames(1, 4, 3, 56, 56), torch.tensor([[3, 20, 63]])
    heard = {}
    for name in ("clip_decoder", "mae_decoder"):
        for number, decoder in enumerate(getattr(network, name)):
            key = name, number
            decoder.register_forward_hook(lambda _, x, __, key=key: heard.update({key: x[0]}))
    with torch.no_grad():
        network(frames, visible)
        layers = network.encode(frames, visible, range(5)).middle
        clip_places = network.clip_pos_embed[:, [0, 4, 21, 64]]
        mae_places = network.mae_pos_embed[:, [3, 20, 63]]
        for number in range(3):
            expected = layers[2 + number] + clip_places
            torch.testing.assert_close(heard["clip_decoder", number], expected)
        for number in range(2):
            expected = layers[3 + number][:, 1:] + mae_places
            torch.testing.assert_close(heard["mae_decoder", number], expected)


@pytest.mark.parametrize(
    ("mask", "expected"), [("attention", 8 * 52), ("attention_joint", 410), ("random", 410)]
)
def test_number_of_visible_patches(mask, expected):
    torch.manual_seed(0)
    # 256 - int(204.8) of each frame, and 2048 - int(1638.4) of the clip.
    visible = visible_patches(torch.rand(3, 8, 256), 0.8, mask)
    assert visible.shape == (3, expected)
    assert (visible.diff(dim=1) > 0).all()  # each once
    assert visible.min() >= 0
    assert visible.max() < 2048
    if mask == "attention":
        for row in visible.tolist():
            assert Counter(patch // 256 for patch in row) == dict.fromkeys(range(8), 52)


def test_patches_that_are_looked_at_are_seen_more_often():
    torch.manual_seed(0)
    attention = torch.full((400, 2, 16), 0.02)
    attention[:, 0, 3] = attention[:, 1, 7] = 0.4
    shares = {
        mask: F.one_hot(visible_patches(attention, 0.75, mask), 32).sum(dim=(0, 1)) / 400
        for mask in ("attention", "attention_joint", "random")
    }
    for mask in ("attention", "attention_joint"):
        bright = shares[mask][[3, 16 + 7]]
        assert bright.min() > 0.75
        assert shares[mask].sum() - bright.sum() < 6.5
    assert shares["random"].min() > 0.15
    assert shares["random"].max() < 0.35


def test_a_draw_without_replacement_follows_the_weights():
    torch.manual_seed(0)
    attention = torch.tensor([2.0, 1.0, 1.0]).expand(20000, 1, 3)
    drawn = visible_patches(attention, 0.4, "attention")
    pairs = Counter(map(tuple, drawn.tolist()))
    # First 0 then 1: 1/2 * 1/2; first 1 then 0: 1/4 * 2/3.
    assert pairs[0, 1] / 20000 == pytest.approx(1 / 4 + 1 / 6, abs=0.015)
    assert pairs[1, 2] / 20000 == pytest.approx(2 * 1 / 4 * 1 / 3, abs=0.015)


def test_a_frame_without_attention_still_has_a_mask():
    assert visible_patches(torch.zeros(1, 2, 16), 0.5, "attention").shape == (1, 16)


def test_masks_come_from_torchs_generator():
    attention = torch.rand(2, 4, 16)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(visible_patches(attention, 0.8, "attention"))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_distance_by_hand():
    answers = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    targets = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [0.6, 0.8]]])
    # 2 - 2 cos: 0 and 2 in the first row, 4 and 0.8 in the second.
    both = torch.tensor([True, True])
    assert distance([answers], [targets], both).item() == pytest.approx((1 + 2.4) / 2)
    assert distance([answers], [targets], torch.tensor([False, True])).item() == pytest.approx(2.4)
    assert distance([answers, answers], [targets, answers], both).item() == pytest.approx(0.85)
    assert distance([answers], [targets], torch.tensor([False, False])).item() == 0


@pytest.fixture
def task():
    torch.manual_seed(0)
    return DistilTask(config_of(INTERNVIT, mae_teacher=VIDEOMAE), OBJECTIVE)


def test_teachers_are_no_part_of_the_task(task):
    names = [*task.state_dict(), *(name for name, _ in task.named_parameters())]
    assert all(name.startswith("network.") for name in names)
    assert set(task.network.state_dict()) == {n.removeprefix("network.") for n in task.state_dict()}
    assert not any(isinstance(module, type(task._clip_teacher)) for module in task.modules())
    assert len(list(task.buffers())) == 0
    # A running average of the weights holds no second teacher.
    assert copy.deepcopy(task)._clip_teacher is task._clip_teacher


def test_every_parameter_learns(task):
    output = task(inputs(known_frames(2, 8, 3, 56, 56)))
    assert set(output.losses) == {"clip_middle", "clip_final", "mae"}
    sum(output.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
    assert all(not p.requires_grad for p in task._clip_teacher._network.parameters())
    images = task(inputs(known_frames(2, 1, 3, 56, 56), kind="image")).losses
    assert all(0 < value < 4 for value in images.values())


def test_weights_of_the_distances(task):
    frames = inputs(known_frames(2, 8, 3, 56, 56))
    weighted = copy.deepcopy(task)
    weighted._objective = DistilObjective(middle=2.0, final=0.5, mae=0.0)
    torch.manual_seed(1)
    plain = task(frames).losses
    torch.manual_seed(1)
    heavy = weighted(frames).losses
    for name, weight in (("clip_middle", 2.0), ("clip_final", 0.5), ("mae", 0.0)):
        assert heavy[name].item() == pytest.approx(weight * plain[name].item())


def test_answers_are_held_against_what_was_seen(task):
    frames = known_frames(2, 8, 3, 56, 56)
    torch.manual_seed(1)
    losses = task(inputs(frames)).losses
    torch.manual_seed(1)
    targets = task._clip_teacher(frames[:, ::2])
    visible = visible_patches(targets.attention, 0.8, "attention")
    answers = task.network(frames[:, ::2], visible)
    rows = torch.arange(2)[:, None]
    middle, mae = [], []
    for answer, layer in zip(answers.middle, targets.middle, strict=True):
        seen = torch.cat([layer[:, :1], layer[:, 1:][rows, visible]], dim=1)
        middle.append((2 - 2 * F.cosine_similarity(answer, seen, dim=-1)).mean())
    for answer, layer in zip(answers.mae, task._mae_teacher(frames), strict=True):
        mae.append((2 - 2 * F.cosine_similarity(answer, layer[rows, visible], dim=-1)).mean())
    final = 2 - 2 * F.cosine_similarity(answers.final, targets.final, dim=-1)
    torch.testing.assert_close(losses["clip_middle"], torch.stack(middle).mean())
    torch.testing.assert_close(losses["mae"], torch.stack(mae).mean())
    torch.testing.assert_close(losses["clip_final"], final.mean())


def test_the_second_teacher_alone_sees_every_frame(task):
    frames = known_frames(2, 8, 3, 56, 56)
    changed = frames.clone()
    changed[:, 1::2] = known_frames(2, 4, 3, 56, 56, seed=9)
    losses = []
    for clips in (frames, changed):
        torch.manual_seed(1)
        losses.append(task(inputs(clips)).losses)
    for name in ("clip_middle", "clip_final"):
        assert losses[0][name].item() == losses[1][name].item()
    assert losses[0]["mae"].item() != losses[1]["mae"].item()
    assert torch.equal(task.encode_video(frames), task.encode_video(changed))


def test_rows_that_are_not_valid_change_nothing():
    torch.manual_seed(0)
    task = DistilTask(config_of(INTERNVIT, mask_ratio=0.0), OBJECTIVE)
    frames = known_frames(3, 4, 3, 56, 56)
    frames[1] = 0
    some = task(inputs(frames, torch.tensor([True, False, True]))).losses
    kept = task(inputs(frames[[0, 2]])).losses
    for name, value in kept.items():
        torch.testing.assert_close(some[name], value)


def test_layers_and_weight_decay(task):
    depths = {name: task.layer_of(name) for name, _ in task.named_parameters()}
    assert depths["network.patch_embed.proj.weight"] == (0, 4)
    assert depths["network.pos_embed"] == depths["network.cls_token"] == (0, 4)
    assert depths["network.blocks.2.mlp.fc1.weight"] == (3, 4)
    for name in ("clip_projector.cross_attn.q.weight", "clip_decoder.0.head.weight"):
        assert depths[f"network.{name}"] is None
    assert depths["network.clip_pos_embed"] is None
    free = {name for name in depths if any(part in name for part in task.no_decay())}
    names = {"cls_token", "pos_embed", "clip_pos_embed", "mae_pos_embed"}
    assert free == {f"network.{name}" for name in names}
    assert task.blocks() == list(task.network.blocks)


def test_retrieval_is_measured_where_the_teacher_reads(task):
    assert task.dual_encoder() is None
    torch.manual_seed(0)
    reader = build_task(load_recipe("internvideo2_s1_tiny")).eval()
    assert reader.dual_encoder() is reader
    frames = torch.randn(3, 8, 3, 64, 64)
    with torch.no_grad():
        video = reader.encode_video(frames)
        text = reader.encode_text(torch.randint(1, 9, (3, 48)))
        assert video.shape == text.shape == (3, 64)
        for features in (video, text):
            torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        # Nothing is hidden, and so nothing is drawn.
        assert torch.equal(reader.encode_video(frames), video)
        pooled = reader.network.encode(frames[:, ::2]).pooled
        torch.testing.assert_close(reader.network.final_clip_decoder(pooled), video)
        assert reader.encode_video(frames[:, :1]).shape == (3, 64)


def two_process_inputs():
    frames = known_frames(4, 4, 3, 56, 56, seed=11)
    return frames, torch.tensor([True, True, True, False])


def two_process_task():
    torch.manual_seed(0)
    # All patches are seen: a mask would be another one in each process.
    return DistilTask(config_of(INTERNVIT, mask_ratio=0.0), OBJECTIVE)


def distil_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    task = two_process_task()
    frames, valid = two_process_inputs()
    rows = slice(rank * 2, rank * 2 + 2)
    losses = task(inputs(frames[rows], valid[rows])).losses
    sum(losses.values()).backward()
    values = [value.detach() for value in losses.values()] + [p.grad for p in task.parameters()]
    for value in values:  # what DDP does to gradients
        dist.all_reduce(value)
        value /= world_size
    torch.save(values, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    # Forked: starting two interpreters would take longer than all of this file.
    multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        distil_process, args=(2, tmp_path), nprocs=2, start_method="fork"
    )
    task = two_process_task()
    losses = task(inputs(*two_process_inputs())).losses
    sum(losses.values()).backward()
    expected = [value.detach() for value in losses.values()] + [p.grad for p in task.parameters()]
    for value, reference in zip(torch.load(tmp_path / "rank1.pt"), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6)


def squares(num_clips, num_frames=8):
    """Clips of a square of any colour at any place."""
    frames = torch.zeros(num_clips, num_frames, 3, 56, 56)
    for clip in frames:
        x, y = torch.randint(0, 36, (2,)).tolist()
        clip[:, :, y : y + 20, x : x + 20] = 2 * torch.randn(3, 1, 1)
    return frames


def test_a_student_learns_what_its_teachers_see():
    torch.manual_seed(0)
    settings = {"mae_teacher": VIDEOMAE | {"layers": 2}, "mask_ratio": 0.5}
    task = DistilTask(config_of(INTERNVIT, **settings), OBJECTIVE)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    totals = []
    for _ in range(50):
        total = sum(task(inputs(squares(8))).losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[0] > 5
    assert np.mean(totals[-5:]) < 1
    # Clips it never saw are told apart as the teacher does, from all patches or with half hidden.
    task.eval()
    clips = squares(32)
    with torch.no_grad():
        taught = task._clip_teacher(clips[:, ::2]).final
        told = task.encode_video(clips)
    nearest = (F.normalize(told - told.mean(0), dim=-1) @ F.normalize(taught - taught.mean(0), dim=-1).T).argmax(1)  # fmt: skip
    assert (nearest == torch.arange(32)).float().mean() > 0.3


def test_published_first_stage_goes_on(tmp_path):
    released = known_weights(student("linear"))
    path = tmp_path / "pretrain.pth"
    torch.save({"module": released.state_dict(), "epoch": 300}, path)
    state, entry = read_weights(path), InitConfig(kind="weights", path=str(path), num_frames=4)
    same = student("linear")
    same.load_state_dict(vision_weights(state, same, entry))
    for name, value in released.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
    longer = student("linear", SHAPE.model_copy(update={"num_frames": 8, "image_size": 84}))
    stretched = vision_weights(state, longer, entry)
    longer.load_state_dict(stretched)
    table = released.clip_pos_embed.detach()
    assert torch.equal(stretched["clip_pos_embed"], resize_positions(table, 8, 4, 6))
    # The second teacher's table has no class token, and is stretched all the same.
    padded = F.pad(released.mae_pos_embed.detach(), (0, 0, 1, 0))
    assert torch.equal(stretched["mae_pos_embed"], resize_positions(padded, 8, 4, 6)[:, 1:])


def test_students_that_cannot_answer_are_refused():
    with pytest.raises(ConfigError, match="The student has 1 layers, and 2 of a teacher"):
        DistilTask(config_of(INTERNVIT, student=STUDENT | {"layers": 1}), OBJECTIVE)
    with pytest.raises(ConfigError, match="no positions of images"):
        DistilTask(config_of(INTERNVIT, student=STUDENT | {"image_positions": True}), OBJECTIVE)
