# SPDX-License-Identifier: Apache-2.0
"""A model and clips -> features, and retrieval over them; every process encodes its share.

N clips, V views, B clips of a batch, T frames, C H W a frame, L tokens, E embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from training.config import InputSpec
from training.data.batch import Batch
from training.distributed import World, gather, gather_objects
from training.evaluation.clips import Clip, ClipFrames, Views, read_clips
from training.evaluation.retrieval import Retrieval, retrieval
from training.models.task import Task


def evaluate(
    task: Task, batches: Iterable[Batch] | None, spec: InputSpec, world: World
) -> Retrieval | None:
    """Returns retrieval over all clips of all processes.

    Every process must call it, and every process gets the answer. The task is left in the mode it
    came in. None if the task reads no text, nothing is held out, or no clip could be read.
    """
    pairs = encode_pairs(task, batches, spec, world)
    if pairs is None:
        return None
    return retrieval(pairs.video, pairs.text, pairs.caption_id)


class EncodedPairs(NamedTuple):
    """Clips of a corpus and their captions, on the CPU, by rising position."""

    position: torch.Tensor
    """int64 [N], the clip's place in the index."""
    video: torch.Tensor
    """float32 [N, E], of unit length."""
    text: torch.Tensor
    """float32 [N, E], of unit length."""
    tokens: torch.Tensor
    """int64 [N, L]."""
    caption_id: torch.Tensor
    """int64 [N], equal for equal captions."""
    failures: dict[str, str]
    """Id of a clip that could not be read -> reason."""


@torch.inference_mode()
def encode_pairs(
    task: Task, batches: Iterable[Batch] | None, spec: InputSpec, world: World
) -> EncodedPairs | None:
    """Returns the features of all clips and captions; as `evaluate`, without the comparison."""
    encoder = task.dual_encoder()
    if encoder is None or batches is None:
        return None
    from training.data.augment import to_inputs

    was_training = task.training
    task.eval()
    parts: list[tuple[torch.Tensor, ...]] = []
    failures: dict[str, str] = {}
    try:
        for batch, counts in in_step(batches, spec, world):
            inputs = to_inputs(batch, spec, world.device)
            assert inputs.frames is not None
            video_BE = encoder.encode_video(inputs.frames).cpu()
            text_BE = encoder.encode_text(inputs.tokens).cpu()
            if not counts:
                continue
            failures.update(batch.skipped)
            # Rows that could not be read are encoded too and left out here, so that all batches of
            # all processes have the same shape.
            columns = batch.position, video_BE, text_BE, batch.tokens, batch.caption_id
            parts.append(tuple(column[batch.valid] for column in columns))
    finally:
        task.train(was_training)
    everyones = gather_objects((parts, failures))
    rows = [part for rank_parts, _ in everyones for part in rank_parts]
    failures = {name: reason for _, some in everyones for name, reason in some.items()}
    if not sum(len(part[0]) for part in rows):
        return None
    position, video, text, tokens, caption_id = (
        torch.cat(column) for column in zip(*rows, strict=True)
    )
    order = position.argsort()
    return EncodedPairs(
        position[order], video[order], text[order], tokens[order], caption_id[order], failures
    )


def in_step(
    batches: Iterable[Batch], spec: InputSpec, world: World
) -> Iterator[tuple[Batch, bool]]:
    """Yields this process' batches with True, then others with False until every process is through.

    Processes may have unequally many batches. Where weights are sharded each forward pass is a
    collective, so a process that has run out goes on with a batch whose result nobody looks at.
    Batches without pictures (sound alone) are passed over.
    """
    own = iter(batch for batch in batches if batch.frames is not None)
    spare = _empty_batch(spec)
    while True:
        batch = next(own, None)
        if batch is not None:
            spare = batch
        # Whether anyone still has a batch must be known to all before any of them leaves.
        mine = torch.tensor([batch is not None], dtype=torch.uint8, device=world.device)
        if not (gather(mine) if world.size > 1 else mine).any():
            return
        yield spare, batch is not None


def _empty_batch(spec: InputSpec) -> Batch:
    """Returns one clip of black frames, for a process that has none of its own."""
    shape = 1, spec.num_frames, spec.image_size, spec.image_size, 3
    tokens_BL = torch.ones(1, spec.context_length, dtype=torch.int64)
    return _plain_batch(torch.zeros(shape, dtype=torch.uint8), tokens_BL)


def _plain_batch(frames_BTHWC: torch.Tensor, tokens_BL: torch.Tensor) -> Batch:
    """Returns frames and tokens as readers would give them, but of no corpus: nothing is valid."""
    size = len(frames_BTHWC)
    return Batch(
        kind="video",
        frames=frames_BTHWC,
        crop=None,
        fbank=None,
        tokens=tokens_BL,
        valid=torch.zeros(size, dtype=torch.bool),
        caption_id=torch.zeros(size, dtype=torch.int64),
        video_id=torch.zeros(size, dtype=torch.int64),
        position=torch.full((size,), -1),
        skipped=[],
    )


@dataclass(frozen=True)
class Reading:
    """How loose files are read and looked at."""

    spec: InputSpec
    world: World
    views: Views = field(default_factory=Views)
    batch_size: int = 16
    """Clips at once."""
    num_workers: int = 0
    """Processes that decode."""
    bf16: bool = False
    """Whether the model computes in bfloat16 where that is safe."""

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context in which the model is called."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def on_device(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        """Returns frames as the model sees them, float32 [B, T, C, H, W] on its device."""
        from training.data.augment import to_inputs

        tokens_BL = torch.zeros(len(frames_BTHWC), 0, dtype=torch.int64)
        inputs = to_inputs(_plain_batch(frames_BTHWC, tokens_BL), self.spec, self.world.device)
        assert inputs.frames is not None
        return inputs.frames


@dataclass(frozen=True)
class Encoded:
    """Features of the clips that could be read, on the CPU."""

    features: torch.Tensor
    """float32 [N, V, ...]."""
    positions: torch.Tensor
    """int64 [N], rising: places in the list of clips."""
    failures: dict[str, str]
    """Name of a clip that could not be read -> reason."""


@torch.no_grad()
def read_features(
    encode: Callable[[torch.Tensor], torch.Tensor],
    clips: Sequence[Clip],
    reading: Reading,
    failures: dict[str, str],
    *,
    order: Sequence[int] | None = None,
    augment: tuple[int, int] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields positions, int64 [B], and features, float32 [B, V, ...] on the CPU.

    Args:
        encode: Frames [B, T, C, H, W] -> features [B, ...].
        clips: What is read from.
        reading: How.
        failures: Clips that cannot be read are added to it, with the reason.
        order: Which clips, as places in the list; None is all.
        augment: Seed and epoch of random crops and mirroring, of one view; None takes the frames as
            they are.
    """
    spec = reading.spec
    for read in read_clips(
        ClipFrames(clips, spec.num_frames, spec.image_size, reading.views, augment),
        range(len(clips)) if order is None else order,
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
    ):
        failures.update(read.failures)
        if not len(read.positions):
            continue
        with reading.autocast():
            found = encode(reading.on_device(read.frames.flatten(0, 1)))
        yield read.positions, found.float().cpu().unflatten(0, read.frames.shape[:2])


def encode_clips(
    encode: Callable[[torch.Tensor], torch.Tensor], clips: Sequence[Clip], reading: Reading
) -> Encoded:
    """Returns the features of clips; every process encodes its share and gets all.

    Args:
        encode: Frames [B, T, C, H, W] -> features [B, ...].
        clips: What is read.
        reading: How.
    """
    failures: dict[str, str] = {}
    own = range(reading.world.rank, len(clips), reading.world.size)
    parts = list(read_features(encode, clips, reading, failures, order=own))
    everyones = gather_objects((parts, failures))
    all_failures = {name: reason for _, some in everyones for name, reason in some.items()}
    all_parts = [part for rank_parts, _ in everyones for part in rank_parts]
    if not all_parts:
        return Encoded(torch.zeros(0), torch.zeros(0, dtype=torch.int64), all_failures)
    positions = torch.cat([places for places, _ in all_parts])
    order = positions.argsort()
    features = torch.cat([features for _, features in all_parts])
    return Encoded(features[order], positions[order], all_failures)


def tokens_of(texts: Sequence[str], spec: InputSpec, context_length: int) -> torch.Tensor:
    """Returns cleaned texts as token ids, int64 [N, L], L at most ``context_length``."""
    from dataengine.networks.text import clean_caption
    from training.data.text import build_tokenizer

    tokenizer = build_tokenizer(replace(spec, context_length=context_length))
    return tokenizer([clean_caption(text) for text in texts])


@torch.no_grad()
def encode_texts(
    encode: Callable[[torch.Tensor], torch.Tensor], tokens_NL: torch.Tensor, reading: Reading
) -> torch.Tensor:
    """Returns the features of texts, float32 [N, E] on the CPU; every process encodes all.

    Args:
        encode: Tokens [B, L] -> features [B, E].
        tokens_NL: int64.
        reading: Where and how.
    """
    parts = []
    for tokens_BL in tokens_NL.split(256):
        with reading.autocast():
            parts.append(encode(tokens_BL.to(reading.world.device)).float().cpu())
    return torch.cat(parts)
