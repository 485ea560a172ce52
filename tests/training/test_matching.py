# SPDX-License-Identifier: Apache-2.0
"""Negatives are hard and true; pairs are judged in their order; many processes are as one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from training.config import Stage2Objective
from training.data.batch import Pairs
from training.objectives.matching import Negatives, draw_negatives, fetch_rows, matching_loss

TAU = torch.tensor(0.1)
WARM = torch.tensor(1.0)
"""Draws everything now and then."""

STRICT = Stage2Objective(same_caption="positive", same_video="ignore")
IDENTITY = Stage2Objective(same_caption="negative", same_video="negative")


def pairs_of(captions, videos, valid=None):
    valid = [True] * len(captions) if valid is None else valid
    return Pairs(torch.tensor(valid), torch.tensor(captions), torch.tensor(videos))


def unit(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, rows, 4, generator=generator), dim=-1).unbind(0)


def draws(features, pairs, objective, times=200):
    torch.manual_seed(0)
    media, text = features
    drawn = [draw_negatives(media, text, WARM, pairs, objective, "local") for _ in range(times)]
    seen = []
    for side in ("media", "text"):
        rows = torch.stack([getattr(negatives, side) for negatives in drawn])
        seen.append([set(column.tolist()) for column in rows.T])
    return seen, drawn[0].valid.tolist()


def test_only_true_negatives_are_drawn():
    # Rows 0 and 1 share a caption, rows 2 and 3 a video; row 4 could not be read.
    pairs = pairs_of([7, 7, 8, 9, 10, 11], [0, 1, 2, 2, 4, 5], [True] * 4 + [False, True])
    for seen in (sides := draws(unit(6), pairs, STRICT))[0]:
        assert seen == [{2, 3, 5}, {2, 3, 5}, {0, 1, 5}, {0, 1, 5}, {4}, {0, 1, 2, 3}]
    assert sides[1] == [True, True, True, True, False, True]
    for seen in draws(unit(6), pairs, IDENTITY, times=400)[0]:
        assert seen[:4] == [{1, 2, 3, 5}, {0, 2, 3, 5}, {0, 1, 3, 5}, {0, 1, 2, 5}]


def test_what_looks_alike_is_drawn_more():
    media, text = torch.eye(3), F.normalize(torch.tensor([[1.0, 0.2, 0.0], [0, 1, 0], [0, 0, 1]]), dim=1)  # fmt: skip
    pairs = pairs_of([0, 1, 2], [0, 1, 2])
    torch.manual_seed(0)
    drawn = [draw_negatives(media, text, TAU, pairs, IDENTITY, "local") for _ in range(1500)]
    similarity = text[0] @ media.T / TAU
    expected = similarity[1:].softmax(dim=0)[0].item()
    share = torch.stack([d.media[0] for d in drawn]).eq(1).float().mean().item()
    assert expected == pytest.approx(0.877, abs=0.001)
    assert share == pytest.approx(expected, abs=0.03)
    # The text is drawn by the other direction's similarities: no text looks like the first clip.
    share = torch.stack([d.text[0] for d in drawn]).eq(1).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.04)


def test_draws_are_those_of_a_softmax_that_is_masked_afterwards():
    media, text = unit(8)
    pairs = pairs_of(range(8), range(8))
    torch.manual_seed(5)
    negatives = draw_negatives(media, text, TAU, pairs, IDENTITY, "local")
    torch.manual_seed(5)
    own = torch.eye(8, dtype=torch.bool)
    logits = text @ media.T / TAU
    weights = logits.softmax(dim=1).masked_fill(own, 0), logits.T.softmax(dim=1).masked_fill(own, 0)
    expected = [torch.multinomial(weight, 1)[:, 0].tolist() for weight in weights]
    assert [negatives.media.tolist(), negatives.text.tolist()] == expected


def test_a_candidate_that_underflows_is_still_drawn():
    # exp(-2000) is 0: masked afterwards, nothing would be left to draw.
    media = text = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    pairs = pairs_of([0, 1], [0, 1])
    drawn = draw_negatives(media, text, torch.tensor(0.001), pairs, IDENTITY, "local")
    assert drawn.media.tolist() == drawn.text.tolist() == [1, 0]


class Recorder:
    """Judges by whether media and text carry the same number; remembers what it saw."""

    def __init__(self, scale=20.0):
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def __call__(self, media, states, tokens):
        self.seen = media[:, 0, 0].tolist(), states[:, 0, 0].tolist(), tokens[:, 0].tolist()
        fits = (media[:, 0, 0] == states[:, 0, 0]).float()
        return torch.stack([torch.zeros_like(fits), self.scale * (fits - 0.5)], dim=1)


def numbered(rows, start=0):
    number = torch.arange(start, start + rows)
    return number.float()[:, None, None].expand(-1, 3, 2), number.float()[:, None, None], number[:, None]  # fmt: skip


def negatives_of(media, text, valid=None):
    return Negatives(
        torch.tensor(media), torch.tensor(text), torch.tensor(valid or [True] * len(media))
    )


def test_own_pairs_come_first_and_belong_together():
    judge = Recorder()
    loss, right = matching_loss(judge, *numbered(3), negatives_of([1, 2, 0], [2, 0, 1]), "local")
    media, states, tokens = judge.seen
    assert media == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert states == tokens == [0, 1, 2, 0, 1, 2, 2, 0, 1]
    assert right.item() == 1.0
    assert loss.item() == pytest.approx(torch.tensor(10.0).neg().exp().log1p().item(), rel=1e-3)
    loss, right = matching_loss(
        Recorder(-20.0), *numbered(3), negatives_of([1, 2, 0], [2, 0, 1]), "local"
    )
    assert (right.item(), round(loss.item(), 3)) == (0.0, 10.0)


def test_rows_without_negatives_are_left_out():
    media, states, tokens = numbered(3)
    negatives = negatives_of([1, 0, 2], [1, 0, 2], [True, True, False])
    loss, right = matching_loss(Recorder(2.0), media, states, tokens, negatives, "local")
    two = negatives_of([1, 0], [1, 0])
    expected, _ = matching_loss(Recorder(2.0), media[:2], states[:2], tokens[:2], two, "local")
    torch.testing.assert_close(loss, expected)
    assert right.item() == 1.0


@pytest.mark.parametrize(
    "pairs",
    [
        pairs_of([0], [0]),
        pairs_of([4, 4, 4], [0, 1, 2]),
        pairs_of([0, 1, 2], [0, 1, 2], [False, False, False]),
    ],
    ids=["one row", "one caption", "nothing read"],
)
def test_no_negatives_at_all_is_no_loss_and_no_crash(pairs):
    rows = len(pairs.valid)
    media, text = unit(rows)
    negatives = draw_negatives(media, text, TAU, pairs, STRICT, "local")
    assert negatives.media.tolist() == negatives.text.tolist() == list(range(rows))
    judge = Recorder()
    loss, right = matching_loss(judge, *numbered(rows), negatives, "local")
    loss.backward()
    assert (loss.item(), right.item()) == (0.0, 0.0)
    assert judge.scale.grad is not None
    assert judge.scale.grad.item() == 0.0


def test_matching_trains_nothing_through_the_draw():
    media, text = (feature.requires_grad_() for feature in unit(4))
    tau = torch.tensor(0.1, requires_grad=True)
    negatives = draw_negatives(media, text, tau, pairs_of(range(4), range(4)), IDENTITY, "local")
    assert not any(part.requires_grad for part in negatives)


# --- Two processes


def toy(rows):
    """A batch, an encoder whose gradient is looked at, and a judge with weights."""
    generator = torch.Generator().manual_seed(3)
    media = torch.randn(rows, 3, 5, generator=generator, dtype=torch.float64)
    states = torch.randn(rows, 2, 4, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 9, (rows, 2), generator=generator)
    weights = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((5, 4), (4, 4), (8, 2))
    ]
    return media, states, tokens, weights


def toy_loss(media, states, tokens, weights, negatives, scope):
    see, read, decide = weights

    def judge(media, states, tokens):
        both = torch.cat([media.mean(dim=1), (states * tokens[..., None]).mean(dim=1)], dim=1)
        return both.tanh() @ decide

    return matching_loss(judge, media @ see, states @ read, tokens, negatives, scope)


ACROSS = Negatives(
    torch.tensor([7, 2, 5, 0, 1, 6, 3, 4]),
    torch.tensor([1, 3, 0, 7, 6, 2, 4, 5]),
    torch.tensor([True, True, False, True, True, True, True, True]),
)
WITHIN = Negatives(
    torch.tensor([1, 0, 3, 2, 1, 0, 3, 2]),
    torch.tensor([3, 2, 1, 0, 2, 3, 0, 1]),
    torch.tensor([True, True, True, True, False, True, False, False]),
)


def gathered_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    own = slice(rank * 4, rank * 4 + 4)
    results = {}
    for scope, negatives in (("global", ACROSS), ("local", WITHIN)):
        media, states, tokens, weights = toy(8)
        part = Negatives(*(column[own] for column in negatives))
        loss, right = toy_loss(media[own], states[own], tokens[own], weights, part, scope)
        loss.backward()
        values = [loss.detach(), right.double(), *(weight.grad for weight in weights)]
        for value in values:  # what DDP does to gradients
            dist.all_reduce(value)
            value /= world_size
        results[scope] = values
    rows = torch.arange(4.0)[:, None] + 10 * rank
    rows.requires_grad_()
    wanted = torch.tensor([[6, 1, 6], [0, 6, 2]][rank])
    fetched = fetch_rows(rows, wanted)
    (fetched * torch.tensor([[1.0], [2.0], [3.0]]) * (rank + 1)).sum().backward()
    results["fetched"] = fetched.detach()[:, 0].tolist()
    assert rows.grad is not None
    results["asked"] = rows.grad[:, 0].tolist()
    features, pairs = unit(8), pairs_of([0, 1, 2, 3, 0, 1, 2, 3], range(8))
    mine = Pairs(pairs.valid[own], pairs.caption_id[own], pairs.video_id[own])
    torch.manual_seed(rank)
    drawn = [
        draw_negatives(features[0][own], features[1][own], WARM, mine, STRICT, "global")
        for _ in range(300)
    ]
    results["drawn"] = [set(row.tolist()) for row in torch.stack([d.media for d in drawn]).T]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # Forked: starting two interpreters would take longer than all of this file.
    multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        gathered_process, args=(2, folder), nprocs=2, start_method="fork"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_two_processes_equal_one(both, scope):
    media, states, tokens, weights = toy(8)
    if scope == "global":
        negatives = ACROSS
    else:  # rows are counted within a process: those of the second start at 4
        shift = torch.tensor([0, 0, 0, 0, 4, 4, 4, 4])
        negatives = Negatives(WITHIN.media + shift, WITHIN.text + shift, WITHIN.valid)
    loss, right = toy_loss(media, states, tokens, weights, negatives, "local")
    loss.backward()
    expected = [loss.detach(), right.double(), *(weight.grad for weight in weights)]
    for result in both:
        for value, reference in zip(result[scope], expected, strict=True):
            assert reference is not None
            torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-7)


def test_rows_travel_and_their_gradients_return(both):
    assert [result["fetched"] for result in both] == [[12, 1, 12], [0, 12, 2]]
    # Row 6 was asked for three times: with 1 and 3 by the first process, with 2 * 2 by the second.
    assert both[0]["asked"] == [2, 2, 6, 0]
    assert both[1]["asked"] == [0, 0, 8, 0]


def test_global_negatives_come_from_all_processes(both):
    for rank, result in enumerate(both):
        for row, seen in enumerate(result["drawn"]):
            number = rank * 4 + row
            assert seen == set(range(8)) - {number, (number + 4) % 8}
