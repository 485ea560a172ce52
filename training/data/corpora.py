# SPDX-License-Identifier: Apache-2.0
"""Recipe -> the corpora it names, opened and split: clips to train on and clips held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataengine.corpus import Corpus
from dataengine.errors import ConfigError
from training.config import MediaKind, SourceConfig, TrainConfig, inputs_of
from training.data.batch import Batch
from training.data.index import ClipIndex, open_index, open_split
from training.data.loader import Feed, TrainLoader, coverage_loader


@dataclass(frozen=True)
class Corpora:
    """All clips of a run, for each kind of media."""

    config: TrainConfig
    train: dict[MediaKind, Feed]
    held_out: dict[MediaKind, Feed]
    is_remote: bool
    """Whether any corpus lies on an object store."""

    @property
    def train_index(self) -> ClipIndex:
        """Clips to train on of the first kind with pictures."""
        return self.train[_first_kind(self.config)].index

    @property
    def held_out_index(self) -> ClipIndex:
        """Clips held out, of the same kind."""
        return self.held_out[_first_kind(self.config)].index

    def train_loader(
        self, seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> TrainLoader:
        """Returns this process' endless stream of training batches.

        Args:
            seed: Of order and augmentation; the recipe's if not given.
            rank: This process.
            world_size: All processes.

        Raises:
            ConfigError: If the clips do not fill a batch, or the processes cannot share it.
        """
        return TrainLoader(
            self.train,
            self.config.data,
            inputs_of(self.config.model),
            seed=self.config.run.seed if seed is None else seed,
            rank=rank,
            world_size=world_size,
            is_remote=self.is_remote,
        )

    def held_out_loader(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch] | None:
        """Returns this process' share of one exact pass over the held-out clips.

        They are videos if the recipe trains on videos, else images: middle frames, whole, not
        augmented. None if nothing is held out, if clips have no text or no pictures.
        """
        kind: MediaKind = "video" if "video" in self.config.data.mix else "image"
        feed = self.held_out.get(kind)
        if feed is None or not len(feed.index) or feed.caption is None:
            return None
        return coverage_loader(
            kind,
            feed,
            self.config.data,
            inputs_of(self.config.model),
            rank=rank,
            world_size=world_size,
            is_remote=self.is_remote,
        )


def open_corpora(
    config: TrainConfig, cache: Path | None = None, *, hold_out_all: bool = False
) -> Corpora:
    """Opens the recipe's corpora.

    Args:
        config: The recipe; ``data.sources`` names the corpora.
        cache: A local folder that keeps the indexes, so that they open at once as long as the
            corpora stay the same.
        hold_out_all: Whether all clips are held out, to evaluate on corpora that were not trained on.

    Raises:
        ConfigError: If no source is named or a kind of media has none, or a caption is no column.
        CorpusError: If a corpus or subset cannot be opened or holds no clip to train on.
    """
    data = config.data
    if not data.sources:
        raise ConfigError(
            "The recipe names no corpus", "give one with --data CORPUS or in data.sources"
        )
    opened: dict[tuple[str, str | None, bool], tuple[ClipIndex, ClipIndex]] = {}

    def split(
        source: SourceConfig, caption: str | None, sound: bool
    ) -> tuple[ClipIndex, ClipIndex]:
        question = source.data, caption, sound
        if question not in opened:
            if hold_out_all:
                index = open_index(source.data, caption, sound=sound)
                opened[question] = index, index
            else:
                opened[question] = open_split(
                    source.data, caption, sound=sound, held_out=data.held_out, cache=cache
                )
        return opened[question]

    train: dict[MediaKind, Feed] = {}
    held_out: dict[MediaKind, Feed] = {}
    joined: dict[tuple[int, ...], ClipIndex] = {}
    for kind, mix in data.mix.items():
        sources = [source for source in data.sources if not source.kinds or kind in source.kinds]
        if not sources:
            raise ConfigError(
                f"data.mix trains on {kind}, which no source feeds",
                f"add {kind} to the kinds of one of data.sources",
            )
        caption = data.caption if mix.caption is None else mix.caption
        sound = kind in ("audio", "audio_video")
        parts = [split(source, caption, sound) for source in sources]
        for side, feeds in enumerate((train, held_out)):
            own = tuple(part[side] for part in parts)
            feeds[kind] = Feed(
                index=_joined(own, joined),
                caption=caption,
                batch_size=(mix.batch_size or data.batch_size, data.eval_batch_size)[side],
                num_groups=tuple(len(index.group_shard) for index in own),
                weights=tuple(source.weight * mix.weight for source in sources),
            )
    is_remote = any(not Corpus(source.data.partition("#")[0]).is_local for source in data.sources)
    return Corpora(config, train, held_out, is_remote)


def _joined(parts: tuple[ClipIndex, ...], joined: dict[tuple[int, ...], ClipIndex]) -> ClipIndex:
    """Returns the parts as one index, the same object for the same parts."""
    key = tuple(id(part) for part in parts)
    if key not in joined:
        joined[key] = ClipIndex.join(parts)
    return joined[key]


def _first_kind(config: TrainConfig) -> MediaKind:
    seen: list[MediaKind] = [kind for kind in config.data.mix if kind != "audio"]
    return seen[0] if seen else next(iter(config.data.mix))
