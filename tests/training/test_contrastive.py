# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from training.config import ContrastiveObjective
from training.data.batch import Pairs
from training.objectives.contrastive import contrastive_loss, global_contrastive_loss, targets

IDENTITY = ContrastiveObjective(same_caption="negative", same_video="negative")
RULES = [
    IDENTITY,
    ContrastiveObjective(same_caption="positive", same_video="ignore"),
    ContrastiveObjective(same_caption="ignore", same_video="positive"),
]

LOCAL = IDENTITY.model_copy(update={"gradient": "local"})


def batch(rows, seed=0):
    """Features of two towers, with captions and videos that repeat and one row not valid."""
    generator = torch.Generator().manual_seed(seed)
    video, text = torch.randn(2, rows, 5, generator=generator, dtype=torch.float64).unbind(0)
    valid = torch.arange(rows) != 2
    pairs = Pairs(valid, torch.arange(rows) % (rows - 1), torch.arange(rows) // 2)
    return video, text, pairs


def test_plain_infonce_by_hand():
    video = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    pairs = Pairs(torch.ones(2, dtype=torch.bool), torch.arange(2), torch.arange(2))
    loss = global_contrastive_loss(video, text, torch.tensor(0.5), pairs, IDENTITY)
    # Similarities over tau: rows are videos, [[2, 1.2], [0, 1.6]].
    v2t = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2
    t2v = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-0.4))) / 2
    assert loss.item() == pytest.approx((v2t + t2v) / 2, rel=1e-6)


def test_identity_is_torch_cross_entropy():
    video, text, _ = batch(6)
    pairs = Pairs(torch.ones(6, dtype=torch.bool), torch.zeros(6), torch.zeros(6))
    logits = (video @ text.T / 0.1).float()
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2  # fmt: skip
    loss = global_contrastive_loss(video, text, torch.tensor(0.1), pairs, IDENTITY)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("same_caption", "same_video", "expected_targets", "expected_allowed"),
    [
        # Rows 0 and 1 share a caption, rows 1 and 2 a video.
        ("negative", "negative", [1, 0, 0], [1, 1, 1]),
        ("positive", "negative", [0.5, 0.5, 0], [1, 1, 1]),
        ("ignore", "negative", [1, 0, 0], [1, 0, 1]),
        ("ignore", "positive", [1, 0, 0], [1, 0, 1]),
    ],
)
def test_targets_of_the_first_row(same_caption, same_video, expected_targets, expected_allowed):
    pairs = Pairs(torch.ones(3, dtype=torch.bool), torch.tensor([7, 7, 8]), torch.tensor([1, 2, 2]))
    config = ContrastiveObjective(same_caption=same_caption, same_video=same_video)
    weights, allowed = targets(pairs, torch.tensor([0]), config)
    assert weights[0].tolist() == expected_targets
    assert allowed[0].int().tolist() == expected_allowed


@pytest.mark.parametrize("config", RULES, ids=["identity", "caption", "video"])
def test_rows_that_are_not_valid_change_nothing(config):
    video, text, pairs = batch(6)
    kept = pairs.valid
    whole = global_contrastive_loss(video, text, torch.tensor(0.1), pairs, config)
    without = Pairs(kept[kept], pairs.caption_id[kept], pairs.video_id[kept])
    expected = global_contrastive_loss(video[kept], text[kept], torch.tensor(0.1), without, config)
    torch.testing.assert_close(whole, expected)


def test_batch_without_a_valid_row_has_no_loss_and_no_gradient():
    video, text, pairs = batch(4)
    video.requires_grad_()
    none = Pairs(torch.zeros(4, dtype=torch.bool), pairs.caption_id, pairs.video_id)
    loss = global_contrastive_loss(video, text, torch.tensor(0.1), none, IDENTITY)
    loss.backward()
    assert loss.item() == 0
    assert video.grad is not None
    assert video.grad.abs().max() == 0


def towers():
    torch.manual_seed(1)
    weights = [torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64)) for _ in range(2)]
    return [*weights, torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))]


def loss_of(function, parameters, video, text, pairs, config):
    features = [F.normalize(x @ w, dim=-1) for x, w in zip((video, text), parameters, strict=False)]
    return function(*features, parameters[2], pairs, config)


def gathered_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    results = {}
    for number, config in enumerate([*RULES, LOCAL]):
        video, text, pairs = batch(8)
        rows = slice(rank * 4, rank * 4 + 4)
        own = Pairs(pairs.valid[rows], pairs.caption_id[rows], pairs.video_id[rows])
        parameters = towers()
        loss = loss_of(contrastive_loss, parameters, video[rows], text[rows], own, config)
        loss.backward()
        values = [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]
        for value in values:  # what DDP does to gradients
            dist.all_reduce(value)
            value /= world_size
        results[number] = values
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    # Forked: starting two interpreters would take longer than all of this file.
    multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        gathered_process, args=(2, tmp_path), nprocs=2, start_method="fork"
    )
    results = torch.load(tmp_path / "rank1.pt")
    for number, config in enumerate(RULES):
        parameters = towers()
        loss = loss_of(global_contrastive_loss, parameters, *batch(8), config)
        loss.backward()
        expected = [loss.detach(), *(p.grad for p in parameters)]
        assert len(results[number]) == 4
        for value, reference in zip(results[number], expected, strict=True):
            assert reference is not None
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)

    parameters = towers()
    loss = loss_of(global_contrastive_loss, parameters, *batch(8), IDENTITY)
    loss.backward()
    video, text, temperature = (parameter.grad for parameter in parameters)
    local = results[len(RULES)]
    torch.testing.assert_close(local[0], loss.detach(), rtol=1e-5, atol=1e-6)
    # As published: half of the encoders' gradient in two processes, all of the temperature's.
    for value, reference, share in zip(
        local[1:], (video, text, temperature), (2, 2, 1), strict=True
    ):
        assert reference is not None
        torch.testing.assert_close(value, reference / share, rtol=1e-5, atol=1e-6)
