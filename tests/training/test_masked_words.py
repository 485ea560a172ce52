# SPDX-License-Identifier: Apache-2.0
"""Which words are hidden, what becomes of them, and a loss that no split changes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from training.objectives.masked_words import IGNORED, mask_words, masked_word_loss

VOCABULARY, MASK, SEP = 5000, 4, 3


def long_texts():
    tokens = torch.randint(100, VOCABULARY, (400, 50), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, 39], tokens[:, 40:] = 2, SEP, 0
    return tokens


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_shares_of_hidden_words(probability):
    tokens = long_texts()
    torch.manual_seed(1)
    hidden, labels = mask_words(tokens, probability, VOCABULARY, MASK)
    chosen = labels != IGNORED
    words = tokens[:, 1:40]
    assert chosen[:, 1:40].float().mean().item() == pytest.approx(probability, abs=0.01)
    assert not chosen[:, 0].any()
    assert not chosen[:, 40:].any()
    assert torch.equal(hidden[~chosen], tokens[~chosen])
    assert torch.equal(labels[chosen], tokens[chosen])
    masked = (hidden == MASK)[chosen].float().mean().item()
    kept = (hidden == tokens)[chosen].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    others = hidden[chosen & (hidden != MASK) & (hidden != tokens)]
    # Random words are of the whole vocabulary, its first ones included.
    assert others.min() < 100
    assert others.max() > VOCABULARY - 100
    assert len(words)


def test_the_end_of_a_text_may_be_hidden():
    torch.manual_seed(1)
    _, labels = mask_words(long_texts(), 0.5, VOCABULARY, MASK)
    assert (labels[:, 39] == SEP).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_the_texts_themselves_stay_whole():
    tokens = long_texts()
    before = tokens.clone()
    mask_words(tokens, 0.5, VOCABULARY, MASK)
    assert torch.equal(tokens, before)


def test_masks_come_from_the_default_generator():
    torch.manual_seed(7)
    first = mask_words(long_texts(), 0.5, VOCABULARY, MASK)
    second = mask_words(long_texts(), 0.5, VOCABULARY, MASK)
    torch.manual_seed(7)
    again = mask_words(long_texts(), 0.5, VOCABULARY, MASK)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], second[1])


def test_the_loss_is_a_mean_over_masked_words():
    logits, labels = torch.randn(6, 9), torch.tensor([0, 8, 3, 3, 1, 2])
    torch.testing.assert_close(masked_word_loss(logits, labels), F.cross_entropy(logits, labels))


def test_no_masked_word_is_no_loss():
    logits = torch.zeros(0, 9, requires_grad=True)
    loss = masked_word_loss(logits * 1, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


COUNTS = (5, 0), (1, 6)
"""Masked words of each of two processes."""


def case(number):
    generator = torch.Generator().manual_seed(number)
    states = torch.randn(sum(COUNTS[number]), 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (len(states),), generator=generator)
    head = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    return states, labels, head.requires_grad_()


def gathered_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    results = []
    for number, counts in enumerate(COUNTS):
        states, labels, head = case(number)
        own = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
        loss = masked_word_loss(states[own] @ head, labels[own])
        loss.backward()
        values = [loss.detach(), head.grad]
        for value in values:  # what DDP does to gradients
            assert value is not None
            dist.all_reduce(value)
            value /= world_size
        results.append(values)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_however_words_fall(tmp_path):
    # Forked: starting two interpreters would take longer than all of this file.
    multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        gathered_process, args=(2, tmp_path), nprocs=2, start_method="fork"
    )
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        for number, (loss, gradient) in enumerate(results):
            states, labels, head = case(number)
            expected = F.cross_entropy(states @ head, labels)
            expected.backward()
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(gradient, head.grad, rtol=1e-6, atol=1e-7)
