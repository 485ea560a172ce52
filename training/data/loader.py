# SPDX-License-Identifier: Apache-2.0
"""Index + recipe -> batches, exactly once per epoch, resumable between any two steps."""

import atexit
import itertools
import logging
import math
import multiprocessing
import signal
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import ForkContext, ForkProcess, SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataengine import records
from dataengine.errors import ConfigError, CorpusError, EngineError
from dataengine.networks.text import clean_caption
from training.config import DataConfig, InputSpec, MediaKind
from training.data import plan
from training.data.batch import Batch
from training.data.index import ClipIndex
from training.data.shards import DamagedError, Place, RowGroup, ShardReader
from training.data.transforms import (
    WHOLE,
    Crop,
    Frames,
    choose_frames,
    decode_jpegs,
    random_crop,
    square_images,
)

logger = logging.getLogger(__name__)

STATE_VERSION = 2

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow, PyAV and the sound's decoder raise for broken bytes; a programming error is none."""


@dataclass(frozen=True)
class Feed:
    """The clips that steps of one kind of media read."""

    index: ClipIndex
    caption: str | None
    """The text column; None reads no text."""
    batch_size: int
    """Clips per step over all processes; per process in evaluation."""
    num_groups: tuple[int, ...]
    """Row groups of each source, which follow each other in the index."""
    weights: tuple[float, ...]
    """How often an epoch sees each clip of a source."""

    def sources(self) -> tuple[int, list[plan.Source]]:
        """Returns the steps of an epoch and what each source gives to them."""
        cuts = np.cumsum([0, *self.num_groups])
        starts = [self.index.group_start[a : b + 1] for a, b in itertools.pairwise(cuts)]
        num_clips = [int(start[-1] - start[0]) for start in starts]
        steps, given = plan.quotas(num_clips, self.weights, self.batch_size)
        return steps, [plan.Source(s, n) for s, n in zip(starts, given, strict=True)]


class _Request(NamedTuple):
    """What a reader is asked for."""

    kind: MediaKind
    epoch: int | None
    """None in evaluation: no augmentation."""
    items: NDArray[np.signedinteger]
    """Places in the index, the copy's number times the clips added; -1 for a hole."""


class _Job(NamedTuple):
    """A request, and the next one of the same reader where it is of use to know it."""

    request: _Request
    following: _Request | None


class ClipReader(Dataset[Any]):
    """Turns requests into batches; runs in the reader processes.

    Returns an ``EngineError`` instead of raising it: a DataLoader would dress it in a traceback.

    Raises:
        DependencyError: If the decoder of videos is not installed.
    """

    def __init__(
        self, feeds: Mapping[MediaKind, Feed], config: DataConfig, spec: InputSpec, seed: int
    ) -> None:
        if config.media == "video" and any(kind != "audio" for kind in feeds):
            # Imported late: a recipe that reads frames runs without PyAV.
            from training.data.video import check_decoder

            check_decoder(config.decoder)
        self._feeds, self._config, self._spec, self._seed = feeds, config, spec, seed
        self._shards: ShardReader | None = None
        self._tokenise: Callable[[list[str]], torch.Tensor] | None = None

    def __getitem__(self, job: _Job) -> Batch | EngineError:
        try:
            return self._batch(job)
        except EngineError as error:
            return error

    def _batch(self, job: _Job) -> Batch:
        kind, epoch, items = job.request
        feed, config = self._feeds[kind], self._config
        size, num_clips = len(items), len(feed.index)
        item_B = items.astype(np.int64)
        is_hole_B = item_B < 0
        position_B = np.where(is_hole_B, -1, item_B % num_clips)
        pixels = self._spec.image_size
        on_device = config.crop_on == "device" and epoch is not None
        if on_device:
            # The usual margin of 256 for crops of 224.
            pixels = math.ceil(pixels * 8 / 7)
        num_frames = 1 if kind == "image" else self._spec.num_frames
        room = frames_BTHWC = crop_B5 = fbank_BFM = None
        if kind != "audio":
            room = _room((size, num_frames, pixels, pixels, 3))
            frames_BTHWC = room.numpy()
            if on_device:
                crop_B5 = np.tile(np.array(_box(WHOLE), dtype=np.float32), (size, 1))
        if kind in _HEARD:
            from training.data.audio import NUM_BINS, NUM_FRAMES  # late, as in _sound

            fbank_BFM = np.zeros((size, NUM_FRAMES, NUM_BINS), dtype=np.float32)
        captions = [""] * size
        valid_B = np.zeros(size, dtype=bool)
        skipped: dict[int, tuple[str, str]] = {}

        order = np.flatnonzero(~is_hole_B)
        group_B = feed.index.group_of(position_B)
        # By row group: however small the cache, none is read twice for a batch.
        order = order[np.argsort(group_B[order], kind="stable")]
        shards = self._open_shards()
        if job.following is not None:
            shards.expect([*self._places(job.request), *self._places(job.following)])
        for place in order.tolist():
            position = int(position_B[place])
            where = self._place(kind, int(group_B[place]))
            row = int(feed.index.row[position])
            rng = None
            if epoch is not None:
                copy = int(item_B[place]) // num_clips
                rng = np.random.default_rng([self._seed, epoch, 3, position, copy])
            try:
                group = shards.group(where)
            except DamagedError as error:
                skipped[place] = (f"{where.shard.name}/{where.row_group}/{row}", str(error))
                continue
            if row >= group.num_rows:
                raise CorpusError(
                    f"shards/{where.shard.name}.parquet, row group {where.row_group} has no row {row}",
                    "the catalog and the shard do not belong together: ingest the videos again",
                )
            try:
                if feed.caption is not None:
                    captions[place] = self._caption(group, feed.caption, row)
                if frames_BTHWC is not None:
                    frames, crop = self._frames(group, row, num_frames, pixels, rng)
                    frames_BTHWC[place] = frames
                    if crop_B5 is not None:
                        crop_B5[place] = _box(crop)
                if fbank_BFM is not None:
                    fbank_BFM[place] = _sound(group, row, rng)
            except _BROKEN as error:
                captions[place] = ""
                skipped[place] = (group.columns["clip_id"][row].as_py(), str(error))
                continue
            valid_B[place] = True
        for array in (frames_BTHWC, fbank_BFM):
            if array is not None and not valid_B.all():
                array[~valid_B] = 0
        return Batch(
            kind,
            room,
            None if crop_B5 is None else torch.from_numpy(crop_B5),
            None if fbank_BFM is None else torch.from_numpy(fbank_BFM),
            self._tokens(captions, feed.caption),
            torch.from_numpy(valid_B),
            torch.from_numpy(position_B if feed.caption is None else _caption_ids(captions)),
            torch.from_numpy(np.where(is_hole_B, 0, feed.index.video_hash[position_B])),
            torch.from_numpy(position_B),
            [skipped[place] for place in sorted(skipped)],
        )

    def _open_shards(self) -> ShardReader:
        # Here and not earlier: neither threads nor connections survive a fork.
        if self._shards is None:
            self._shards = ShardReader(self._config.cache_mb, self._config.read_ahead)
        return self._shards

    def _places(self, request: _Request) -> list[Place]:
        """Returns the row groups of a request in the order in which they are read."""
        index = self._feeds[request.kind].index
        items = request.items[request.items >= 0].astype(np.int64)
        groups = np.unique(index.group_of(items % len(index)))
        return [self._place(request.kind, group) for group in groups.tolist()]

    def _place(self, kind: MediaKind, group: int) -> Place:
        feed = self._feeds[kind]
        index = feed.index
        shard = index.shards[int(index.group_shard[group])]
        return Place(shard, int(index.group_number[group]), self._columns(kind))

    def _columns(self, kind: MediaKind) -> tuple[str, ...]:
        caption, media = self._feeds[kind].caption, self._config.media
        columns = ["clip_id"] + ([caption] if caption is not None else [])
        if kind != "audio" and media == "frames":
            columns.append("frames")
        if kind in _HEARD or media == "video":
            columns.append("video.bytes")
        return tuple(columns)

    def _caption(self, group: RowGroup, name: str, row: int) -> str:
        caption = group.columns[name][row].as_py() or ""
        text = clean_caption(caption) if self._config.clean_captions else caption.strip()
        if not text:
            raise ValueError("no caption")
        return text

    def _frames(
        self, group: RowGroup, row: int, wanted: int, size: int, rng: np.random.Generator | None
    ) -> tuple[Frames, Crop]:
        """Returns squares and, where they are whole frames yet, what is to be cut from them."""
        config = self._config
        if config.media == "video":
            # Imported late: a recipe that reads frames runs without PyAV.
            from training.data.video import decode_frames

            shares = (np.arange(wanted) + (0.5 if rng is None else rng.random(wanted))) / wanted
            images = decode_frames(_mp4(group, row), shares.tolist(), decoder=config.decoder)
            crop = self._crop(*images[0].size, rng)
            if config.crop_on == "device":
                return square_images(images, size, WHOLE), crop
            return square_images(images, size, crop), WHOLE
        jpegs = group.columns["frames"][row].values
        if jpegs is None or not len(jpegs):
            raise ValueError("no frames")
        chosen = [jpegs[i].as_py() or b"" for i in choose_frames(len(jpegs), wanted, rng)]
        # Crops are drawn on a square: the frame's own size is not known before it is decoded,
        # and the aspect ratio is not kept anyway.
        crop = self._crop(1, 1, rng)
        if config.crop_on == "device":
            return decode_jpegs(chosen, size, WHOLE), crop
        return decode_jpegs(chosen, size, crop), WHOLE

    def _crop(self, width: int, height: int, rng: np.random.Generator | None) -> Crop:
        if rng is None:
            return WHOLE
        return random_crop(width, height, self._config.crop_scale, self._config.flip, rng)

    def _tokens(self, captions: list[str], column: str | None) -> torch.Tensor:
        if column is None:
            return torch.zeros(len(captions), 0, dtype=torch.int64)
        if self._tokenise is None:
            # Imported late: some tokenisers take seconds.
            from training.data.text import build_tokenizer

            self._tokenise = build_tokenizer(self._spec)
        return self._tokenise(captions)


def _room(shape: tuple[int, ...]) -> torch.Tensor:
    """Returns uint8 room for frames, with anything in it.

    In a reader process it is memory that the training process sees: nothing is copied to get there.
    """
    if get_worker_info() is None:
        # numpy's, not torch's, comes in huge pages: most of the time goes into first touching them.
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    size = math.prod(shape)
    # As torch's own collate function makes it.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,)).view(shape)


_HEARD = ("audio", "audio_video")
"""Kinds of media that need sound."""


def _mp4(group: RowGroup, row: int) -> bytes:
    return group.columns["video"].field("bytes")[row].as_py() or b""


def _sound(group: RowGroup, row: int, rng: np.random.Generator | None) -> NDArray[np.float32]:
    # Imported late: a recipe without sound runs without what decodes it.
    from training.data.audio import clip_fbank

    return clip_fbank(_mp4(group, row), rng)


def _box(crop: Crop) -> tuple[float, ...]:
    return crop.left, crop.top, crop.right, crop.bottom, float(crop.flip)


def _caption_ids(captions: list[str]) -> NDArray[np.int64]:
    ids = [int(records.digest("caption", text), 16) for text in captions]
    return np.array(ids, dtype=np.uint64).view(np.int64)


class TrainLoader:
    """An endless stream of one process' training batches, epoch after epoch.

    The global batches depend on the clips, the recipe's data section, the seed and the epoch; neither
    on the number of processes, of which each takes a part of every batch, nor on ``num_workers``. The
    state counts what the caller has taken, not what readers have prepared.

    Args:
        feeds: Training clips of each kind of media.
        config: The recipe's data section.
        spec: What the model reads.
        seed: The run's seed.
        rank: This process.
        world_size: All processes.
        is_remote: Whether a corpus lies on an object store, whose clients do not survive a fork.

    Raises:
        ConfigError: If the clips do not fill one global batch, the processes cannot share it, or it is to
            hold more clips than there are videos, of no two the same.
        DependencyError: If the decoder of videos is not installed.
    """

    def __init__(
        self,
        feeds: Mapping[MediaKind, Feed],
        config: DataConfig,
        spec: InputSpec,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        is_remote: bool = False,
    ) -> None:
        # In an order of their own, not the recipe's.
        self._kinds = [kind for kind in get_args(MediaKind) if kind in feeds]
        self._feeds = {kind: feeds[kind] for kind in self._kinds}
        self._sources: dict[MediaKind, list[plan.Source]] = {}
        self._steps: dict[MediaKind, int] = {}
        for kind, feed in self._feeds.items():
            field = "data.batch_size" if len(feeds) == 1 else f"data.mix.{kind}.batch_size"
            if feed.batch_size % world_size:
                fitting = max(round(feed.batch_size / world_size), 1) * world_size
                raise ConfigError(
                    f"{field} {feed.batch_size} cannot be shared evenly by {world_size} processes",
                    f"--set {field}={fitting}",
                )
            self._steps[kind], self._sources[kind] = feed.sources()
            if not self._steps[kind]:
                raise ConfigError(
                    f"{len(feed.index)} training clips do not fill one batch of {feed.batch_size}",
                    f"--set {field}={max(len(feed.index) // world_size, 1) * world_size} or fewer",
                )
            if config.unique_videos:
                num_videos = len(np.unique(feed.index.video_hash))
                if feed.batch_size > num_videos:
                    fitting = max(num_videos // world_size, 1) * world_size
                    raise ConfigError(
                        f"No two clips of a video may meet (data.unique_videos), and a batch of "
                        f"{feed.batch_size} {kind} clips can never be full of {num_videos} videos",
                        f"--set {field}={fitting} or fewer, or --set data.unique_videos=false",
                    )
        self.steps_per_epoch = sum(self._steps.values())
        self._reader = ClipReader(self._feeds, config, spec, seed)
        self._config, self._seed, self._is_remote = config, seed, is_remote
        self._rank, self._world_size = rank, world_size
        self.epoch = 0
        self.step = 0
        """Batches of this epoch already taken."""
        self.skipped: dict[str, str] = {}
        """Clips that could not be read, and why; each is logged once."""

    def __iter__(self) -> Iterator[Batch]:
        requests = _Requests(self._requests, self._config, self._is_remote)
        for batch in _read(self._reader, requests, self._config, self._is_remote):
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

    def _requests(self) -> Iterator[_Request]:
        """Yields what to read from the position on, without end."""
        epoch, step = self.epoch, self.step
        while True:
            kind_of_step = plan.kinds_in_turn(
                list(self._steps.values()), seed=self._seed, epoch=epoch
            )
            batches = {
                kind: iter(self._epoch(kind, epoch, np.flatnonzero(kind_of_step == number), step))
                for number, kind in enumerate(self._kinds)
            }
            for number in kind_of_step[step:].tolist():
                kind = self._kinds[number]
                yield _Request(kind, epoch, next(batches[kind]))
            del batches
            epoch, step = epoch + 1, 0

    def _epoch(
        self, kind: MediaKind, epoch: int, own_steps: NDArray[np.int64], first_step: int
    ) -> NDArray[np.signedinteger]:
        """Returns this process' share of the kind's batches from a step of the epoch on."""
        feed, config = self._feeds[kind], self._config
        layout = plan.Layout(
            feed.batch_size, config.slots, own_steps % config.lanes, config.shuffle_buffer
        )
        share = feed.batch_size // self._world_size
        items = plan.epoch_batches(
            self._sources[kind],
            layout,
            seed=self._seed,
            epoch=epoch,
            stream=get_args(MediaKind).index(kind),
            columns=(self._rank * share, (self._rank + 1) * share),
            video_hash=feed.index.video_hash if config.unique_videos else None,
        )
        if config.unique_videos and (num_holes := int(np.count_nonzero(items < 0))):
            logger.warning(
                "%d clips sit epoch %d out: their videos have more clips than could be parted",
                num_holes,
                epoch,
            )
        return items[np.searchsorted(own_steps, first_step) :]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and what it depends on, as plain values, equal on every rank."""
        config = self._config
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "step": self.step,
            "seed": self._seed,
            "slots": config.slots,
            "lanes": config.lanes,
            "shuffle_buffer": config.shuffle_buffer,
            "unique_videos": config.unique_videos,
            "mix": {
                kind: {
                    "clips": feed.index.fingerprint,
                    "num_clips": len(feed.index),
                    "batch_size": feed.batch_size,
                    "weights": list(feed.weights),
                }
                for kind, feed in self._feeds.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position; the next ``iter()`` starts there. Any number of processes may do so.

        Raises:
            ConfigError: If the position means other clips here than where it was saved.
        """
        then, now = _flat(state), _flat(self.state_dict())
        differing = [
            f"{name}: {then.get(name)} then, {now.get(name)} now"
            for name in dict.fromkeys([*now, *then])
            if name not in {"epoch", "step"} and then.get(name) != now.get(name)
        ]
        if differing:
            raise ConfigError(
                "The checkpoint was written in the middle of other data:\n  "
                + "\n  ".join(differing),
                "run with the same corpus and recipe, or start over in another --output",
            )
        self.epoch, self.step = state["epoch"], state["step"]


def coverage_loader(
    kind: MediaKind,
    feed: Feed,
    config: DataConfig,
    spec: InputSpec,
    *,
    rank: int = 0,
    world_size: int = 1,
    is_remote: bool = False,
) -> Iterator[Batch]:
    """Yields one rank's share of every clip exactly once, in index order, not augmented."""
    shares = plan.coverage_batches(
        len(feed.index), rank=rank, world_size=world_size, batch_size=feed.batch_size
    )
    config = config.model_copy(update={"num_workers": min(config.num_workers, len(shares))})
    requests = _Requests(
        lambda: (_Request(kind, None, share) for share in shares), config, is_remote
    )
    reader = ClipReader({kind: feed}, config, spec, seed=0)
    for batch in _read(reader, requests, config, is_remote):
        if isinstance(batch, EngineError):
            raise batch
        for clip, reason in batch.skipped:
            logger.warning("held-out clip %s is skipped: %s", clip, reason)
        yield batch


class _Requests:
    """Jobs in the order in which reader processes take them in turn."""

    def __init__(
        self, requests: Callable[[], Iterator[_Request]], config: DataConfig, is_remote: bool
    ) -> None:
        self._requests = requests
        # The next request of the same reader process is as many places on as there are of them.
        self._lag = max(config.num_workers, 1) if is_remote and config.read_ahead else 0

    def __iter__(self) -> Iterator[_Job]:
        waiting: deque[_Request] = deque()
        for request in self._requests():
            waiting.append(request)
            if len(waiting) > self._lag:
                yield _Job(waiting.popleft(), request if self._lag else None)
        for request in waiting:
            yield _Job(request, None)


class _Reader(BaseProcess):
    """A reader process; it ignores SIGTERM, so nothing less than SIGKILL ends it from outside."""

    def terminate(self) -> None:
        """Ends it at once; torch asks for that when it has not ended by itself in 5 s."""
        self.kill()


class _ForkedReader(_Reader, ForkProcess):
    pass


class _SpawnedReader(_Reader, SpawnProcess):
    pass


class _Forks(ForkContext):
    Process = _ForkedReader


class _Spawns(SpawnContext):
    Process = _SpawnedReader


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _ignore_stop_signals(number: int) -> None:
    """Leaves the end to the training process, which still wants batches for its last step.

    Ctrl-C, ``timeout``, systemd and batch schedulers signal every process of a run. Readers end when
    they are told to, or when their parent is gone: torch's own watchdog sees to that.
    """
    for each in _STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # They were held back since before the process began.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


@atexit.register
def _kill_readers() -> None:
    """Ends readers whose iterator outlives the program, as in the traceback of an exception.

    multiprocessing's own exit, which comes later, would send them SIGTERM and wait for ever.
    """
    readers = [each for each in multiprocessing.active_children() if isinstance(each, _Reader)]
    if readers:
        # torch listens for readers that die, and would tell of these in a traceback.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in readers:
        process.kill()


def _read(
    reader: ClipReader, requests: _Requests, config: DataConfig, is_remote: bool
) -> Iterator[Any]:
    """Starts the readers and returns what they read."""
    workers = config.num_workers
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_identity,
        multiprocessing_context=(_Spawns() if is_remote else _Forks()) if workers else None,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else it draws from the run's own, and resume differs
    )
    if not workers:
        return iter(loader)
    if is_remote:
        # Else it is started on the way, and lets the signals through again.
        resource_tracker.ensure_running()
    # Processes inherit what is blocked: no signal finds one that does not ignore it yet.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _identity(batch: Any) -> Any:
    return batch


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
