# SPDX-License-Identifier: Apache-2.0
"""Index + recipe -> batches, exactly once per epoch, resumable between any two steps."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataengine import records
from dataengine.errors import ConfigError, EngineError
from dataengine.networks.text import clean_caption, tokenise
from training.config import DataConfig
from training.data import plan
from training.data.index import ClipIndex
from training.data.shards import ShardReader
from training.data.transforms import (
    WHOLE,
    Frames,
    choose_frames,
    decode_jpegs,
    random_crop,
    square_images,
)

logger = logging.getLogger(__name__)

STATE_VERSION = 1


class Batch(NamedTuple):
    """Clips of one step. A clip that could not be read keeps its place, zeroed and not valid."""

    frames: torch.Tensor
    """uint8 [B, T, H, W, 3], RGB."""
    tokens: torch.Tensor
    """int64 [B, L]."""
    valid: torch.Tensor
    """bool [B]; the loss leaves the others out."""
    caption_id: torch.Tensor
    """int64 [B], equal for equal cleaned captions."""
    video_id: torch.Tensor
    """int64 [B], equal for clips of one video."""
    position: torch.Tensor
    """int64 [B], the clip's place in the index."""
    skipped: list[tuple[str, str]]
    """(clip id, reason) of the clips that are not valid."""


class _Request(NamedTuple):
    """What a reader is asked for. ``epoch`` is None in evaluation: no augmentation."""

    epoch: int | None
    positions: np.ndarray


class ClipReader(Dataset[Any]):
    """Turns positions of the index into a batch; runs in the reader processes.

    Returns an ``EngineError`` instead of raising it: a DataLoader would dress it in a traceback.
    """

    def __init__(
        self,
        index: ClipIndex,
        config: DataConfig,
        *,
        num_frames: int,
        image_size: int,
        context_length: int,
        seed: int,
    ) -> None:
        self._index = index
        self._config = config
        self._num_frames = num_frames
        self._image_size = image_size
        self._context_length = context_length
        self._seed = seed
        self._reader: ShardReader | None = None

    def __getitem__(self, request: _Request) -> Batch | EngineError:
        try:
            return self._batch(request)
        except EngineError as error:
            return error

    def _batch(self, request: _Request) -> Batch:
        size = len(request.positions)
        shape = (size, self._num_frames, self._image_size, self._image_size, 3)
        frames_BTHWC = np.zeros(shape, dtype=np.uint8)
        captions = [""] * size
        valid_B = np.zeros(size, dtype=bool)
        skipped: list[tuple[str, str]] = []
        for place, position in enumerate(request.positions):
            row = self._row(position)
            rng = None
            if request.epoch is not None:
                rng = np.random.default_rng([self._seed, request.epoch, 3, int(position)])
            caption = row[self._config.caption] or ""
            text = clean_caption(caption) if self._config.clean_captions else caption.strip()
            try:
                if not text:
                    raise ValueError("no caption")
                frames_BTHWC[place] = self._frames(row, rng)
            # What Pillow and PyAV raise for broken bytes; a programming error is none of these.
            except (OSError, ValueError, SyntaxError) as error:
                skipped.append((row["clip_id"], str(error)))
                continue
            captions[place] = text
            valid_B[place] = True
        caption_ids = [int(records.digest("caption", text), 16) for text in captions]
        return Batch(
            torch.from_numpy(frames_BTHWC),
            tokenise(captions, self._context_length),
            torch.from_numpy(valid_B),
            torch.from_numpy(np.array(caption_ids, dtype=np.uint64).view(np.int64)),
            torch.from_numpy(self._index.video_hash[request.positions]),
            torch.from_numpy(request.positions.astype(np.int64)),
            skipped,
        )

    def _row(self, position: int) -> dict[str, Any]:
        if self._reader is None:
            columns = ("clip_id", self._config.caption, self._config.media)
            self._reader = ShardReader(self._index.url, columns, self._config.cache_mb)
        index = self._index
        return self._reader.row(
            index.shards[index.shard_number[position]],
            int(index.row_group[position]),
            int(index.row[position]),
        )

    def _frames(self, row: dict[str, Any], rng: np.random.Generator | None) -> Frames:
        config, size, wanted = self._config, self._image_size, self._num_frames
        if config.media == "video":
            # Imported late: a recipe that reads frames runs without PyAV.
            from training.data.video import decode_frames

            shares = (np.arange(wanted) + (0.5 if rng is None else rng.random(wanted))) / wanted
            images = decode_frames((row["video"] or {}).get("bytes") or b"", shares.tolist())
            return square_images(images, size, self._crop(*images[0].size, rng))
        jpegs = row["frames"] or []
        if not jpegs:
            raise ValueError("no frames")
        chosen = [jpegs[i] for i in choose_frames(len(jpegs), wanted, rng)]
        # Crops are drawn on a square: the frame's own size is not known before it is decoded,
        # and the aspect ratio is not kept anyway.
        return decode_jpegs(chosen, size, self._crop(1, 1, rng))

    def _crop(self, width: int, height: int, rng: np.random.Generator | None):  # noqa: ANN202
        if rng is None:
            return WHOLE
        return random_crop(width, height, self._config.crop_scale, self._config.flip, rng)


class TrainLoader:
    """An endless stream of training batches of one rank, epoch after epoch.

    Batches depend on the index, the recipe, the seed, the epoch, the rank and the number of
    ranks; not on ``num_workers``. The state counts what the caller has taken, not what readers
    have prepared.

    Args:
        reader: Reads the clips of ``index``.
        index: Training clips.
        config: The recipe's data section.
        seed: The run's seed.
        rank: This process.
        world_size: All processes.
        is_remote: Whether the corpus lies on an object store, whose clients do not survive a fork.

    Raises:
        ConfigError: If the clips do not fill one global batch.
    """

    def __init__(
        self,
        reader: ClipReader,
        index: ClipIndex,
        config: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        is_remote: bool = False,
    ) -> None:
        self.steps_per_epoch = plan.num_steps(len(index), config.batch_size, world_size)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{len(index)} training clips do not fill one batch of "
                f"{config.batch_size} x {world_size} processes",
                f"--set data.batch_size={max(len(index) // world_size, 1)} or fewer",
            )
        self._reader, self._index, self._config = reader, index, config
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._is_remote = is_remote
        self.epoch = 0
        self.step = 0
        """Batches of this epoch already taken."""
        self.skipped: dict[str, str] = {}
        """Clips that could not be read, and why; each is logged once."""

    def __iter__(self) -> Iterator[Batch]:
        workers = self._config.num_workers
        loader = DataLoader(
            self._reader,
            batch_size=None,
            sampler=_Requests(self._requests, self.epoch, self.step),
            num_workers=workers,
            collate_fn=_identity,
            multiprocessing_context="spawn" if workers and self._is_remote else None,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # else it draws from the run's own, and resume differs
        )
        for batch in loader:
            if isinstance(batch, EngineError):
                raise batch
            for clip, reason in batch.skipped:
                if clip not in self.skipped:
                    self.skipped[clip] = reason
                    logger.warning("clip %s is skipped: %s", clip, reason)
            self.step += 1
            if self.step == self.steps_per_epoch:
                self.epoch, self.step = self.epoch + 1, 0
            yield batch

    def _requests(self, epoch: int) -> np.ndarray:
        return plan.epoch_batches(
            self._index.group,
            seed=self._seed,
            epoch=epoch,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self._config.batch_size,
            lanes=self._config.lanes,
            shuffle_buffer=self._config.shuffle_buffer,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and what it depends on, as plain values, equal on every rank."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "step": self.step,
            "clips": self._index.fingerprint,
            "num_clips": len(self._index),
            "seed": self._seed,
            "world_size": self._world_size,
            "batch_size": self._config.batch_size,
            "lanes": self._config.lanes,
            "shuffle_buffer": self._config.shuffle_buffer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position; the next ``iter()`` starts there.

        Raises:
            ConfigError: If the position means other clips here than where it was saved.
        """
        own = self.state_dict()
        differing = [
            f"{name}: {state.get(name)} then, {own[name]} now"
            for name in own
            if name not in {"epoch", "step"} and state.get(name) != own[name]
        ]
        if differing:
            raise ConfigError(
                "The checkpoint was written in the middle of other data:\n  "
                + "\n  ".join(differing),
                "run with the same corpus, recipe and number of processes, or start over in "
                "another --output",
            )
        self.epoch, self.step = state["epoch"], state["step"]


def coverage_loader(
    reader: ClipReader,
    num_clips: int,
    config: DataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    is_remote: bool = False,
) -> Iterator[Batch]:
    """Yields one rank's share of every clip exactly once, in index order, not augmented."""
    requests = [
        _Request(None, positions)
        for positions in plan.coverage_batches(
            num_clips, rank=rank, world_size=world_size, batch_size=config.eval_batch_size
        )
    ]
    workers = min(config.num_workers, len(requests))
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_identity,
        multiprocessing_context="spawn" if workers and is_remote else None,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, EngineError):
            raise batch
        for clip, reason in batch.skipped:
            logger.warning("held-out clip %s is skipped: %s", clip, reason)
        yield batch


class _Requests:
    """The endless list of what to read, from a position on."""

    def __init__(self, requests_of: Any, epoch: int, step: int) -> None:
        self._requests_of, self._epoch, self._step = requests_of, epoch, step

    def __iter__(self) -> Iterator[_Request]:
        epoch, step = self._epoch, self._step
        while True:
            for positions in self._requests_of(epoch)[step:]:
                yield _Request(epoch, positions)
            epoch, step = epoch + 1, 0


def _identity(batch: Any) -> Any:
    return batch
