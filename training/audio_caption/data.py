# SPDX-License-Identifier: Apache-2.0
"""Sounds with captions, in the formats of WavCaps (Mei et al. 2023, arXiv 2303.17395).

Accepted are WavCaps' own JSON, ``{"data": [{"id", "caption", ...}]}``, and JSON lines of
``{"id", "caption"}`` with the sound's path under ``audio`` or ``path`` where the id is not its name.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError

from dataengine.errors import ConfigError

logger = logging.getLogger(__name__)

RATE = 16_000
_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".webm")


@dataclass(frozen=True, slots=True)
class Sound:
    """One caption of one sound."""

    id: str
    caption: str
    path: str


def read_sounds(data: Path, audio: Path) -> list[Sound]:
    """Returns the sounds of a list whose files are there.

    Args:
        data: JSON lines, or WavCaps' JSON.
        audio: Folder of the sounds; a file is found by an entry's path, or by its id with the suffix
            of any sound format (WavCaps' ids of AudioSet end in ``.wav``, its files in ``.flac``).

    Raises:
        ConfigError: If the list cannot be read, an entry is not of the format, or no file is there.
    """
    try:
        names = {entry.name: entry.path for entry in os.scandir(audio) if entry.is_file()}
    except OSError as error:
        raise ConfigError(f"{audio} cannot be read: {error.strerror}") from error
    sounds, missing = [], 0
    for number, entry in enumerate(_entries(data), 1):
        problem = _problem(entry)
        if problem:
            raise ConfigError(f"{data}: entry {number}: {problem}")
        path = _find(entry, audio, names)
        if path is None:
            missing += 1
            continue
        sounds.append(Sound(str(entry["id"]), " ".join(entry["caption"].split()), path))
    if missing:
        logger.warning(
            "%d of %d sounds of %s are not in %s", missing, missing + len(sounds), data, audio
        )
    if not sounds:
        raise ConfigError(
            f"No sound of {data} is in {audio}", "files are named by id, as in WavCaps"
        )
    return sounds


def _entries(data: Path) -> list[Any]:
    try:
        text = data.read_text(encoding="utf-8-sig")
        try:
            whole = json.loads(text)
        except ValueError:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{data} is neither JSON nor JSON lines: {error}") from error
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return whole["data"]
    return whole if isinstance(whole, list) else [whole]


def _problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "not an object"
    if not isinstance(entry.get("id"), str | int) or not str(entry["id"]):
        return "id is missing"
    if not isinstance(entry.get("caption"), str) or not entry["caption"].strip():
        return "caption is missing"
    return ""


def _find(entry: dict[str, Any], audio: Path, names: dict[str, str]) -> str | None:
    given = entry.get("audio") or entry.get("path")
    if given:
        path = audio / str(given)
        return str(path) if path.is_file() else None
    name = str(entry["id"])
    stem = Path(name).stem if name.endswith(_SUFFIXES) else name
    candidates = (name, *(stem + suffix for suffix in _SUFFIXES))
    return next((names[candidate] for candidate in candidates if candidate in names), None)


def split_sounds(sounds: list[Sound], held_out: float) -> tuple[list[Sound], list[Sound]]:
    """Returns sounds to train on and sounds held out, by a hash of the id.

    So a sound with several captions is on one side, and stays there when the list grows.
    """
    parts: tuple[list[Sound], list[Sound]] = ([], [])
    for sound in sounds:
        draw = int.from_bytes(hashlib.sha256(sound.id.encode()).digest()[:4]) / 2**32
        parts[draw < held_out].append(sound)
    return parts


def decode_sound(path: str, max_s: float, start_share: float = 0.0) -> np.ndarray:
    """Returns at most ``max_s`` seconds of a file's sound, float32 mono in [-1, 1] at 16 kHz.

    Args:
        path: Anything libav decodes.
        max_s: Longer sounds are cut.
        start_share: Where the cut begins, as a share in [0, 1] of where it can.

    Raises:
        ValueError: If there is no sound to decode.
    """
    wanted = int(max_s * RATE)
    pieces: list[np.ndarray] = []
    length, end = 0, None
    try:
        with av.open(f"file:{path}", mode="r", metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            stream.codec_context.thread_count = 1
            if container.duration:
                samples = container.duration * RATE // av.time_base
                end = wanted + int(max(0, samples - wanted) * start_share)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
            for frame in container.decode(stream):
                frame.pts = None
                for piece in resampler.resample(frame):
                    pieces.append(piece.to_ndarray().reshape(-1))
                    length += len(pieces[-1])
                if end is not None and length >= end:
                    break
            else:
                pieces += [piece.to_ndarray().reshape(-1) for piece in resampler.resample(None)]
    except (FFmpegError, IndexError, OSError) as error:
        # A file that ends too soon still has what came before.
        if not pieces:
            raise ValueError(f"undecodable sound: {error}") from error
    if not sum(map(len, pieces)):
        raise ValueError("no sound")
    wave = np.concatenate(pieces)[: end or wanted]
    return np.clip(wave[-wanted:], -1.0, 1.0)


Batch = tuple[list[np.ndarray], list[str]]
"""Waves and their captions."""


class SoundDataset(torch.utils.data.Dataset[tuple[np.ndarray, str] | None]):
    """Decodes sounds; an item is asked for by its index and where in it the cut begins.

    Args:
        sounds: What to read.
        max_s: Longest piece of a sound.
    """

    def __init__(self, sounds: list[Sound], max_s: float) -> None:
        self._sounds = sounds
        self._max_s = max_s

    def __len__(self) -> int:
        return len(self._sounds)

    def __getitem__(self, item: tuple[int, float]) -> tuple[np.ndarray, str] | None:
        """Returns a wave and its caption; None for a file that cannot be decoded."""
        index, start_share = item
        sound = self._sounds[index]
        try:
            return decode_sound(sound.path, self._max_s, start_share), sound.caption
        except ValueError as error:
            logger.warning("%s is left out: %s", sound.path, error)
            return None


def collate(items: list[tuple[np.ndarray, str] | None]) -> Batch:
    """Returns the readable items of a batch."""
    good = [item for item in items if item is not None]
    return [wave for wave, _ in good], [caption for _, caption in good]


class Order(torch.utils.data.Sampler[list[tuple[int, float]]]):
    """Batches of (index, start): every epoch a permutation, a function of seed and step alone.

    So a run that goes on from a step needs no state of the reader.

    Args:
        num_sounds: At least one.
        batch_size: The last batch of an epoch is smaller.
        seed: Of the permutations and cuts.
        first_step: Where to begin.
        steps: Where to end.
    """

    def __init__(
        self, num_sounds: int, batch_size: int, seed: int, first_step: int, steps: int
    ) -> None:
        self._num_sounds, self._batch_size, self._seed = num_sounds, batch_size, seed
        self._first_step, self._steps = first_step, steps

    def __len__(self) -> int:
        return self._steps - self._first_step

    def __iter__(self) -> Any:
        per_epoch = steps_per_epoch(self._num_sounds, self._batch_size)
        epoch, order, starts = -1, np.zeros(0, int), np.zeros(0)
        for step in range(self._first_step, self._steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                rng = np.random.default_rng((self._seed, epoch))
                order, starts = rng.permutation(self._num_sounds), rng.random(self._num_sounds)
            at = (step % per_epoch) * self._batch_size
            chosen = order[at : at + self._batch_size]
            yield [(int(index), float(starts[index])) for index in chosen]


def steps_per_epoch(num_sounds: int, batch_size: int) -> int:
    """Returns how many batches see every sound once."""
    return -(-num_sounds // batch_size)
