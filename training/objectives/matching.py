# SPDX-License-Identifier: Apache-2.0
"""Does this text belong to this clip? Each pair against two negatives that are hard to tell from it.

Section 3.2 of the InternVideo2 paper, after ALBEF (Li et al. 2021, section 3.2): negatives are drawn by
how similar they look to the contrastive loss. The released code draws among a process' own rows,
weights rows by a softmax that is masked afterwards, so that a row may be left with no candidate of
positive weight, and fails there and on a single row. Here the softmax is over candidates alone, which
gives the same odds, and a row without any is left out.

b rows of this process, B rows that negatives are drawn from, N tokens of a clip, S their width, L
tokens of a text, D its width, E shared space.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from training.config import ContrastiveObjective
from training.data.batch import Pairs
from training.distributed import gather, rank, world_size
from training.objectives.contrastive import targets

Scope = Literal["local", "global"]
"""Whether negatives come from the rows of this process, as published, or of all."""

Judge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Media [n, N, S], text states [n, L, D], tokens [n, L] -> logits [n, 2]: does not belong, belongs."""


class Negatives(NamedTuple):
    """What each row of this process is confronted with."""

    media: torch.Tensor
    """int64 [b]: row whose clip does not go with this row's text."""
    text: torch.Tensor
    """int64 [b]: row whose text does not go with this row's clip."""
    valid: torch.Tensor
    """bool [b]: rows that have negatives; the others take no part, and point at themselves."""


@torch.no_grad()
def draw_negatives(
    media_bE: torch.Tensor,
    text_bE: torch.Tensor,
    temperature: torch.Tensor,
    pairs: Pairs,
    config: ContrastiveObjective,
    scope: Scope,
) -> Negatives:
    """Returns hard negatives; torch's default generator draws.

    A candidate is drawn as often as the softmax of its similarity over tau says. Only true negatives
    are candidates: valid rows of another caption, and of another video, as far as ``config`` takes such
    rows out of the contrastive loss' negatives.

    Args:
        media_bE: Unit-length features of this process' clips, sounds or both.
        text_bE: Unit-length features of their captions.
        temperature: Scalar tau.
        pairs: This process' rows.
        config: Which rows are negatives of each other.
        scope: ``local`` numbers rows within this process, ``global`` in rank order over all.
    """
    with torch.autocast(media_bE.device.type, enabled=False):
        media_bE, text_bE, start = media_bE.float(), text_bE.float(), 0
        media_BE, text_BE = media_bE, text_bE
        if scope == "global":
            media_BE, text_BE, pairs = gather(media_bE), gather(text_bE), pairs.gathered()
            start = rank() * len(media_bE)
        own_b = torch.arange(start, start + len(media_bE), device=media_bE.device)
        targets_bB, allowed_bB = targets(pairs, own_b, config)
        negative_bB = allowed_bB & (targets_bB == 0) & pairs.valid[own_b][:, None]
        has_b = negative_bB.any(dim=1)
        # A row without negatives draws itself: multinomial wants something to draw.
        own_bB = own_b[:, None] == torch.arange(len(media_BE), device=media_bE.device)
        candidates_bB = negative_bB | (own_bB & ~has_b[:, None])

        def draw(similarity_bB: torch.Tensor) -> torch.Tensor:
            logits_bB = (similarity_bB / temperature).masked_fill(~candidates_bB, -torch.inf)
            return torch.multinomial(logits_bB.softmax(dim=1), 1)[:, 0]

        return Negatives(draw(text_bE @ media_BE.T), draw(media_bE @ text_BE.T), has_b)


def matching_loss(
    judge: Judge,
    media_bNS: torch.Tensor,
    states_bLD: torch.Tensor,
    tokens_bL: torch.Tensor,
    negatives: Negatives,
    scope: Scope,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns this process' share of the loss, and of the share of pairs that were judged rightly.

    Three pairs a row are judged: its own, another clip with its text, its clip with another text. The
    mean over processes is the mean over the rows of all that have negatives, in loss and gradient;
    given the same negatives, one process and many agree. Drawn ones depend on how rows are dealt out
    with ``local``, and with ``global`` on the draws alone, which each process makes for its own rows.

    Args:
        judge: What tells whether they belong together.
        media_bNS: Tokens of this process' clips.
        states_bLD: States of their captions.
        tokens_bL: The captions.
        negatives: Of this process' rows, drawn with the same ``scope``.
        scope: How ``negatives`` number rows.
    """
    if scope == "global":
        other_media = fetch_rows(media_bNS, negatives.media)
        other_states = fetch_rows(states_bLD, negatives.text)
        other_tokens = fetch_rows(tokens_bL, negatives.text)
    else:
        other_media = media_bNS[negatives.media]
        other_states, other_tokens = states_bLD[negatives.text], tokens_bL[negatives.text]
    logits = judge(
        torch.cat([media_bNS, other_media, media_bNS]),
        torch.cat([states_bLD, states_bLD, other_states]),
        torch.cat([tokens_bL, tokens_bL, other_tokens]),
    ).float()
    belongs = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    belongs[: len(media_bNS)] = 1
    weight = negatives.valid.float().repeat(3)
    share = world_size() / gather(weight.sum().reshape(1)).sum().clamp(min=1)
    summed = (F.cross_entropy(logits, belongs, reduction="none") * weight).sum()
    right = ((logits.argmax(dim=1) == belongs) * weight).sum()
    return summed * share, right.detach() * share


def fetch_rows(local_bX: torch.Tensor, index_n: torch.Tensor) -> torch.Tensor:
    """Returns rows of all processes; differentiable, and only those that are wanted travel.

    Args:
        local_bX: This process' rows, as many in every process.
        index_n: int64 numbers of the wanted rows, counted in rank order; as many in every process.
    """
    if world_size() == 1:
        return local_bX[index_n]
    return _Fetch.apply(local_bX, index_n)  # pyright: ignore[reportReturnType]  apply is untyped


class _Fetch(torch.autograd.Function):
    """Rows travel to who wants them, and their gradients back to who owns them."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        size, own, rows = world_size(), rank(), len(local)
        wanted_Rn = gather(index).view(size, -1).cpu()
        owner_Rn = wanted_Rn // rows
        # What each rank wants of this one, and where what this one gets has its place.
        asked = [wanted_Rn[other][owner_Rn[other] == own] - own * rows for other in range(size)]
        order = owner_Rn[own].argsort(stable=True).to(local.device)
        given = torch.cat(asked).to(local.device)
        ctx.sent = [len(part) for part in asked]
        ctx.received = torch.bincount(owner_Rn[own], minlength=size).tolist()
        ctx.save_for_backward(given, order)
        ctx.rows = rows
        arrived = _exchange(local[given], ctx.sent, ctx.received)
        return torch.empty_like(arrived).index_copy_(0, order, arrived)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        given, order = ctx.saved_tensors
        returned = _exchange(grads[0][order], ctx.received, ctx.sent)
        local = returned.new_zeros(ctx.rows, *returned.shape[1:])
        return local.index_add_(0, given, returned), None


def _exchange(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """Returns what the others send: ``received[r]`` rows of rank r, for ``sent[r]`` rows to it."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
    return arrived
