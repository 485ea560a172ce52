# SPDX-License-Identifier: Apache-2.0
"""A run's whole state in a folder that appears complete or not at all.

``checkpoints/step_<step>/`` is what torch.distributed.checkpoint writes, a file or more a process, and
``meta.json``: step, recipe, place in the data, versions, and the files' sizes and checksums by which a
damaged one is known. It is written last, in a folder whose name is not yet a checkpoint's; then that is renamed.

Tensors are named ``model.<parameter>``, ``ema.<parameter>``, ``optim.<parameter>.<part>`` and
``random.<process>.<device>``; they can be read by another number of processes, sharded or not.
"""

import fcntl
import json
import logging
import os
import shutil
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as read_into
from torch.distributed.checkpoint.state_dict_saver import async_save

from dataengine.errors import EngineError
from training.config import TrainConfig, config_from_dict

logger = logging.getLogger(__name__)

# A single process is what is meant.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

FORMAT_VERSION = 2
_META = "meta.json"
_STATE = ("model.", "ema.", "optim.")
_OTHER_RECIPE = "train with the recipe it was written with, or into another --output"


class CheckpointError(EngineError):
    """A checkpoint that is missing, damaged or of another model."""


class Writer:
    """Writes checkpoints of a run while it goes on; at most one at a time.

    Args:
        output: The run's folder, on storage that all processes share.
        keep: Checkpoints to keep.
    """

    def __init__(self, output: Path, keep: int) -> None:
        self._root, self._keep = output / "checkpoints", keep
        self._many = dist.is_initialized() and dist.get_world_size() > 1
        self._rank = dist.get_rank() if self._many else 0
        self._is_main = self._rank == 0
        # Of its own: its messages must not mingle with those of the steps that go on meanwhile.
        self._group: Any = dist.new_group(backend="gloo") if self._many else None
        # Copies even what is in main memory, which the next step would overwrite.
        options = StagingOptions(torch.cuda.is_available(), False, False, False)
        self._stager = DefaultStager(options)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None
        if self._is_main and self._root.is_dir():
            for left_over in self._root.glob(".step_*.tmp"):
                shutil.rmtree(left_over)

    def save(self, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """Copies a state and begins to write it; every process must call it.

        Waits for the save before this one.

        Args:
            step: Steps done.
            tensors: Whole or sharded; a tensor that is in no other process is fine.
            about: What else ``meta.json`` says, ``config`` among it; plain values.

        Raises:
            CheckpointError: If the save before this one failed.
        """
        self.wait()
        target = self._root / f"step_{step:08d}"
        temporary = self._root / f".{target.name}.tmp"
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        if self._group:
            dist.barrier(group=self._group)
        written = async_save(
            dict(tensors),
            storage_writer=FileSystemWriter(temporary),
            process_group=self._group,
            async_stager=self._stager,
            no_dist=not self._many,
        )
        assert isinstance(written, Future)
        self._running = self._thread.submit(self._finish, written, temporary, target, step, about)

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            CheckpointError: If writing failed.
        """
        running, self._running = self._running, None
        if running is None:
            return
        try:
            running.result()
        except CheckpointException as error:  # no Exception to torch
            failures = [failure[0] for failure in error.failures.values()]
            problem = "; ".join(" ".join(str(failure).split())[:200] for failure in failures)
            raise CheckpointError(f"A checkpoint could not be written: {problem}") from error
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"A checkpoint could not be written: {error}") from error

    def close(self) -> None:
        """Waits, and gives back what copies took; a failure is told, not raised."""
        try:
            self.wait()
        except CheckpointError as error:
            logger.warning("%s", error.message)
        self._thread.shutdown()
        self._stager.close()

    def _gathered(self, own: dict[str, int]) -> dict[str, int]:
        """Returns all processes' entries, in the main process."""
        if not self._many:
            return own
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(own, everyones if self._is_main else None, group=self._group)
        return {name: value for part in everyones if part for name, value in part.items()}

    def _finish(
        self, written: Future[Any], temporary: Path, target: Path, step: int, about: dict[str, Any]
    ) -> None:
        """Waits until all processes have written, then makes it a checkpoint."""
        written.result()
        own = {path.name: _checksum(path) for path in temporary.glob(f"__{self._rank}_*")}
        checksums = self._gathered(own)
        if not self._is_main:
            return
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        meta = {
            "format_version": FORMAT_VERSION,
            "step": step,
            **about,
            "versions": {name: version(name) for name in ("torch", "dataengine")},
            "bytes": sizes,
            "crc32": checksums,
        }
        (temporary / _META).write_text(json.dumps(meta, indent=2) + "\n")
        _flush(temporary / _META)
        _flush(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(self._root)
        # Damaged ones do not count: they must not cost a good one its place.
        whole = [folder for folder in _folders(self._root) if _is_whole(folder)]
        for old in whole[self._keep :]:
            shutil.rmtree(old)


def complete(output: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, newest first, passing over damaged ones aloud.

    Raises:
        CheckpointError: If there are checkpoints and none of them is complete.
    """
    folders, found = _folders(output / "checkpoints"), []
    for folder in folders:
        try:
            read_meta(folder)
        except CheckpointError as error:
            logger.warning("%s; it is passed over", error.message)
        else:
            found.append(folder)
    if folders and not found:
        raise no_whole_one(output)
    return found


def newest(output: Path) -> Path | None:
    """Returns the newest of `complete`, None if there is no checkpoint.

    Raises:
        CheckpointError: As `complete`.
    """
    return next(iter(complete(output)), None)


def no_whole_one(output: Path) -> CheckpointError:
    """Returns what is wrong where there are checkpoints and all of them are damaged."""
    return CheckpointError(
        f"None of the checkpoints in {output / 'checkpoints'} is whole",
        "--no-resume sets them aside and starts over",
    )


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> str:
    """Returns what is wrong with the bytes of a complete checkpoint, nothing if they are as written.

    Args:
        folder: The checkpoint.
        rank: Of this process: it reads its share of the files.
        world_size: All processes.
    """
    checksums = sorted(read_meta(folder)["crc32"].items())
    for name, checksum in checksums[rank::world_size]:
        if _checksum(folder / name) != checksum:
            return f"Checkpoint {folder} is damaged: {name} is not what was written"
    return ""


def locate(path: Path) -> Path:
    """Returns the checkpoint a user means: a checkpoint folder, or a run's newest.

    Raises:
        CheckpointError: If there is none.
    """
    folder = path if (path / _META).is_file() else newest(path)
    if folder is None:
        raise CheckpointError(
            f"No checkpoint in {path}", "give a run's --output folder or one of its checkpoints"
        )
    return folder


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns ``meta.json`` after checking that the other files are whole.

    Raises:
        CheckpointError: If a file is missing or cut off, or the format is not this code's.
    """
    try:
        meta = json.loads((folder / _META).read_text())
        sizes = {name: (folder / name).stat().st_size for name in meta["bytes"]}
        written = meta["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"Checkpoint {folder} is not complete: {error}") from error
    if written != FORMAT_VERSION:
        age = "a newer" if written > FORMAT_VERSION else "an older"
        raise CheckpointError(f"Checkpoint {folder} was written by {age} version")
    if sizes != meta["bytes"]:
        raise CheckpointError(f"Checkpoint {folder} is damaged: sizes {sizes} != {meta['bytes']}")
    return meta


def read_config(folder: Path) -> TrainConfig:
    """Returns the recipe a checkpoint was trained with."""
    return config_from_dict(read_meta(folder)["config"], str(folder / _META))


def read_names(folder: Path) -> set[str]:
    """Returns the names of all tensors in a checkpoint."""
    return set(_metadata(folder))


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint, whole, on the CPU. Needs no process group."""
    entries = _entries(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    read_into(dict(tensors), checkpoint_id=folder, no_dist=True)
    return tensors


def lock(output: Path) -> IO[str]:
    """Holds a run's folder for this process until it ends or closes the file.

    Raises:
        CheckpointError: If another process holds it.
    """
    file = (output / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"Another process trains in {output}", "wait for it, or --output names another folder"
        ) from error
    return file


def load(folder: Path, tensors: dict[str, torch.Tensor], left_out: tuple[str, ...] = ()) -> None:
    """Reads a state into the tensors of a run, in place; every process must call it.

    Args:
        folder: The checkpoint.
        tensors: By their names in it.
        left_out: How names begin that the checkpoint may have and the run not.

    Raises:
        CheckpointError: If a name or shape differs; only ``random`` may be left over.
    """
    stored = _metadata(folder)
    _check(folder, stored, tensors, tuple(s for s in _STATE if s not in left_out))
    with torch.no_grad():
        read_into(dict(tensors), checkpoint_id=folder)


def load_weights(
    folder: Path, module: nn.Module, prefix: str = "network.", unneeded: tuple[str, ...] = ()
) -> None:
    """Reads a checkpoint's weights into a module; every name and shape must agree.

    A running average takes the place of the weights it is of. Needs no process group.

    Args:
        folder: The checkpoint.
        module: The task's ``network``, whole.
        prefix: Of the module's names in the task.
        unneeded: How names begin, after the prefix, that the checkpoint may have and the module not.

    Raises:
        CheckpointError: If they do not agree, or a file cannot be read.
    """
    stored = _metadata(folder)
    wanted: dict[str, torch.Tensor] = {}
    replaced: set[str] = set()
    for name, tensor in module.state_dict().items():
        own, average = f"model.{prefix}{name}", f"ema.{prefix}{name}"
        wanted[average if average in stored else own] = tensor
        if average in stored:
            replaced.add(own)
    left_out = tuple(f"model.{prefix}{begin}" for begin in unneeded)
    relevant = {
        name: shape
        for name, shape in stored.items()
        if name in wanted
        or (
            name.startswith(f"model.{prefix}")
            and name not in replaced
            and not name.startswith(left_out)
        )
    }
    _check(folder, relevant, wanted, _STATE)
    try:
        with torch.no_grad():
            read_into(wanted, checkpoint_id=folder, no_dist=True)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"Checkpoint {folder} cannot be read: {error}") from error


def set_aside(output: Path) -> Path | None:
    """Renames a run's checkpoints out of the way; returns where to, None if there were none."""
    root = output / "checkpoints"
    if not root.exists():
        return None
    number = 1
    while (aside := output / f"checkpoints.old-{number}").exists():
        number += 1
    return root.rename(aside)


def _metadata(folder: Path) -> dict[str, torch.Size]:
    """Returns the shape of every tensor in a checkpoint."""
    return {name: entry.size for name, entry in _entries(folder).items()}


def _entries(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise CheckpointError(f"Checkpoint {folder} cannot be read: {error}") from error
    return {
        name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
    }


def _check(
    folder: Path,
    stored: dict[str, torch.Size],
    wanted: dict[str, torch.Tensor],
    sections: tuple[str, ...],
) -> None:
    problems = [f"missing {name}" for name in sorted(wanted.keys() - stored.keys())]
    problems += [
        f"left over {name}"
        for name in sorted(stored.keys() - wanted.keys())
        if name.startswith(sections)
    ]
    problems += [
        f"of another shape {name} {list(stored[name])} instead of {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & stored.keys())
        if stored[name] != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"Checkpoint {folder} does not fit the model: {', '.join(problems[:5])}{more}",
            _OTHER_RECIPE,
        )


def _checksum(path: Path) -> int:
    """Returns the CRC-32 of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _is_whole(folder: Path) -> bool:
    try:
        read_meta(folder)
    except CheckpointError:
        return False
    return True


def _folders(root: Path) -> list[Path]:
    """Returns checkpoint folders, newest first."""
    return sorted(root.glob("step_*"), reverse=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
