# SPDX-License-Identifier: Apache-2.0
"""Recipe -> a trained model: set-up, one step, the loop around it."""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dataengine.errors import ConfigError, EngineError
from training import checkpoint
from training.config import MediaKind, TrainConfig, inputs_of
from training.data.augment import to_inputs
from training.data.batch import Batch
from training.data.corpora import open_corpora
from training.distributed import (
    World,
    any_rank,
    barrier,
    gather_objects,
    main_first,
    mean_over_ranks,
    on_main,
)
from training.ema import Average
from training.evaluation.encode import evaluate
from training.evaluation.retrieval import Retrieval
from training.flops import peak_flops, training_flops
from training.metrics import FILE as METRICS
from training.metrics import Progress
from training.models import build_task
from training.models.init import initialise
from training.models.task import Task
from training.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate
from training.parallel import (
    average_scalar_gradients,
    clip_gradients,
    gathered,
    is_finite,
    spread,
    whole_state,
)
from training.trackers import open_trackers

logger = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}

_LOWER_RATE = (
    "lower the rate with --set optim.lr=..., or clip with --set optim.grad_clip=1; the newest "
    "checkpoint is from before"
)


@dataclass(frozen=True)
class Result:
    """What a run ends with; the retrievals are None without held-out clips."""

    step: int
    before: Retrieval | None
    after: Retrieval | None
    stopped_by: int | None = None
    """The signal that ended the run early."""


class Trainer:
    """Holds a run's parts; every process has one.

    Args:
        config: The recipe; ``data.sources`` names the corpora.
        output: Folder for checkpoints, the trained model and the metrics; all processes share it.
        world: This process among all.
        resume: Whether to go on from the newest checkpoint in ``output``; otherwise what lies
            there is set aside, not deleted.
        accept_changes: Whether to go on although the recipe would learn something else than the
            checkpoint's.

    Raises:
        EngineError: If another run writes to ``output``, what lies there does not fit, or a corpus,
            a file or a setting is wrong.
    """

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        world: World,
        *,
        resume: bool = True,
        accept_changes: bool = False,
    ) -> None:
        self.config, self.output, self.world = config, output, world
        self.spec = inputs_of(config.model)
        self._lock: IO[str] | None = None
        self._prepare_output(resume)
        # The first process reads the catalogs and keeps their index, the others take it.
        self.corpora = main_first(lambda: open_corpora(config, output / "cache"))
        self.loader = self.corpora.train_loader(
            seed=config.run.seed, rank=world.rank, world_size=world.size
        )
        self.total_steps = config.optim.steps or math.ceil(
            (config.optim.epochs or 0) * self.loader.steps_per_epoch
        )
        found = self._newest_sound(on_main(lambda: checkpoint.complete(output)))
        if found is not None:
            self._check_recipe(found, accept_changes)

        torch.manual_seed(config.run.seed)
        self.task: Task = build_task(config)
        if found is None:
            initialise(self.task, config)
        self.step_task = spread(self.task, config, world)
        self.optimizer = build_optimizer(
            self.task,
            config.optim,
            no_decay=self.task.no_decay(),
            layer_of=self.task.layer_of,
        )
        self.average: Average | None = None
        if config.optim.ema_decay:
            self.average = Average(self.task, config.optim.ema_decay)
        self.step = 0
        self.resumed = found is not None
        self.skipped_in_row = self.skipped_steps = 0
        self._seed_random()
        self.writer = checkpoint.Writer(output, config.run.keep_checkpoints)
        if found is not None:
            self._resume(found)
        self._peak_flops = peak_flops(world.device)
        self._flops: dict[MediaKind, float] = {}
        self._stop_signal: int | None = None

    def run(self, stop_at: int | None = None) -> Result:
        """Trains to the end, evaluates before and after, and writes the model at the end.

        Args:
            stop_at: Stop after this step, with a checkpoint but without evaluation and model.

        Raises:
            EngineError: If too many steps in a row are not finite; their weights are not kept.
        """
        self._announce()
        progress = self._open_progress()
        try:
            # Before is before the first step only; a resumed run would measure something else.
            before = None if self.resumed else self._measure("before", progress)
            with self._stoppable():
                stopped = self._train(stop_at, progress)
            self.writer.wait()
            barrier()
            finished = self.step == self.total_steps
            after = self._measure("after", progress) if finished else None
            if finished:
                self.export()
            return Result(self.step, before, after, stopped)
        finally:
            self.writer.close()
            if progress:
                progress.close()

    def _train(self, stop_at: int | None, progress: Progress | None) -> int | None:
        """Does the steps that are left; returns the signal that stopped them."""
        run = self.config.run
        last = min(self.total_steps, stop_at or self.total_steps)
        self.step_task.train()
        batches = iter(self.loader)
        while self.step < last:
            started = time.monotonic()
            batch = next(batches)
            waited_s = time.monotonic() - started
            values, stop = self.train_step(batch)
            if progress:
                clips = len(batch.valid) * self.world.size
                flops = len(batch.valid) * self._flops_per_clip(batch.kind)
                progress.count(clips, flops, waited_s)
            ends = stop or self.step == last
            if self.step % run.log_every == 0 or ends:
                numbers = self._numbers(values)
                if progress:
                    kind = batch.kind if len(self.config.data.mix) > 1 else ""
                    progress.log(self.step, numbers, self._peak_flops, kind)
            started = time.monotonic()
            if run.eval_every and self.step % run.eval_every == 0 and not ends:
                self._measure("", progress)
            if ends or self.step % run.checkpoint_every == 0:
                self.save()
            if progress:
                progress.pause(time.monotonic() - started)
            if stop:
                return self._stop_signal or signal.SIGTERM
        if self.loader.skipped:
            logger.warning("%d clips could not be read", len(self.loader.skipped))
        return None

    def train_step(self, batch: Batch) -> tuple[dict[str, torch.Tensor], bool]:
        """Does one optimizer step, or leaves it out on all processes if it is not finite on any.

        Returns:
            This process' losses and numbers, still on the device; whether any process was asked to
            stop.
        """
        config, device = self.config, self.world.device
        rate = learning_rate(self.step, self.total_steps, config.optim)
        set_learning_rate(self.optimizer, rate)
        inputs = to_inputs(batch, self.spec, device)
        with self._autocast():
            output = self.step_task(inputs)
        loss = torch.stack([value.float() for value in output.losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_scalar_gradients(self.task)
        grad_norm = clip_gradients(self.task, config.optim.grad_clip)

        fine = torch.isfinite(loss.detach()) & torch.isfinite(grad_norm)
        asked = torch.full_like(loss.detach(), float(self._stop_signal is not None))
        skip, stop = any_rank(torch.stack([(~fine).float(), asked]))
        if skip:
            self._skip()
        else:
            self.optimizer.step()
            if self.average:
                self.average.update()
            self.skipped_in_row = 0
        self.step += 1
        return {"loss": loss, **output.losses, "grad_norm": grad_norm, **output.numbers}, stop

    def evaluate(self) -> Retrieval | None:
        """Returns retrieval on the held-out clips, by the running average if there is one."""
        batches = self.corpora.held_out_loader(rank=self.world.rank, world_size=self.world.size)
        if batches is None or self.task.dual_encoder() is None:
            return None
        averaged = self.average.applied() if self.average else nullcontext()
        with averaged, gathered(self.task), self._autocast():
            return evaluate(self.task, batches, self.spec, self.world)

    def save(self) -> None:
        """Begins to write a checkpoint; every process must call it.

        Raises:
            EngineError: If a weight is not finite; such weights are never written.
        """
        if not is_finite(self.task, self.average.tensors.values() if self.average else ()):
            raise EngineError(f"Weights are not finite after step {self.step}", _LOWER_RATE)
        about = {
            "config": self.config.model_dump(mode="json"),
            "world_size": self.world.size,
            "loader": self.loader.state_dict(),
            "skipped_steps": [self.skipped_in_row, self.skipped_steps],
        }
        self.writer.save(self.step, self._state() | self._random_state(), about)

    def export(self) -> None:
        """Writes the model's own folder, ``output/model``; every process must call it."""
        from training.export import about_run, export_folder

        state = {f"network.{n}": t for n, t in self.task.network.state_dict().items()}
        if self.average:
            averaged = self.average.tensors.items()
            state |= {name: tensor for name, tensor in averaged if name in state}
        state = whole_state(state, self.world)
        if self.world.is_main:
            network = {name.removeprefix("network."): tensor for name, tensor in state.items()}
            about = about_run(self.config, self.step)
            export_folder(network, self.config.model, self.output / "model", about=about)
        barrier()

    def _prepare_output(self, resume: bool) -> None:
        def prepare() -> None:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                self._lock = checkpoint.lock(self.output)
                if not resume and (aside := checkpoint.set_aside(self.output)):
                    if (self.output / METRICS).is_file():
                        (self.output / METRICS).rename(aside / METRICS)
                    logger.info("starting over; the old checkpoints are now in %s", aside)
            except OSError as error:
                raise ConfigError(
                    f"Cannot write to {self.output}: {error.strerror or error}",
                    "--output names another folder",
                ) from error

        on_main(prepare)

    def _newest_sound(self, folders: Sequence[Path]) -> Path | None:
        """Returns the first of some checkpoints whose bytes are as written; all processes read."""
        for folder in folders:
            damages = gather_objects(checkpoint.damage(folder, self.world.rank, self.world.size))
            damage = next(filter(None, damages), "")
            if not damage:
                return folder
            if self.world.is_main:
                logger.warning("%s; it is passed over", damage)
        if folders:
            raise checkpoint.no_whole_one(self.output)
        return None

    def _check_recipe(self, folder: Path, accept_changes: bool) -> None:
        """Raises ConfigError if a run would go on with, or claim, what it was not trained with."""
        changed = _changed_fields(checkpoint.read_config(folder), self.config)
        if changed and not accept_changes:
            raise ConfigError(
                f"{self.output} holds a run of another recipe; different are {', '.join(changed)}",
                "--output names another folder, --no-resume starts over, --accept-changes goes on",
            )
        if changed and self.world.is_main:
            logger.warning("the recipe differs from the checkpoint's in %s", ", ".join(changed))
        step = checkpoint.read_meta(folder)["step"]
        if step > self.total_steps:
            raise ConfigError(
                f"The run in {self.output} has done {step} steps, more than the {self.total_steps} asked for",
                "--no-resume starts over, or --output names another folder",
            )

    def _resume(self, folder: Path) -> None:
        meta = checkpoint.read_meta(folder)
        self.step = meta["step"]
        self.skipped_in_row, self.skipped_steps = meta["skipped_steps"]
        self.loader.load_state_dict(meta["loader"])
        names = checkpoint.read_names(folder)
        state = self._state()
        random = self._random_state()
        # Random numbers go on where they were only if the processes are the same.
        same = meta["world_size"] == self.world.size and random.keys() <= names
        has_average = any(name.startswith("ema.") for name in names)
        left_out = () if self.average else ("ema.",)
        if not has_average:
            state = {name: t for name, t in state.items() if not name.startswith("ema.")}
        checkpoint.load(folder, state | (random if same else {}), left_out)
        if same:
            _set_random_state(random, self.world)
        else:
            self._seed_random()
            if self.world.is_main:
                logger.warning(
                    "%d process(es) then, %d now: random numbers start anew, from the step",
                    meta["world_size"],
                    self.world.size,
                )
        if self.average and not has_average:
            self.average = Average(self.task, self.config.optim.ema_decay)
            logger.warning("the checkpoint has no running average: it starts at its weights")
        if self.world.is_main:
            logger.info("resumed from %s", folder)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.config.run.precision]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def _state(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of the run by their names in a checkpoint; memory is shared."""
        averaged = self.average.tensors if self.average else {}
        parts = {
            "model": self.task.state_dict(),
            "ema": averaged,
            "optim": optimizer_state(self.optimizer, self.task),
        }
        return {f"{part}.{n}": t for part, tensors in parts.items() for n, t in tensors.items()}

    def _random_state(self) -> dict[str, torch.Tensor]:
        place = f"random.{self.world.rank}"
        state = {f"{place}.cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            state[f"{place}.cuda"] = torch.cuda.get_rng_state(self.world.device)
        return state

    def _seed_random(self) -> None:
        """Seeds this process' generator: masks must differ between processes, weights must not."""
        seed, step, rank = self.config.run.seed, self.step, self.world.rank
        torch.manual_seed(seed + 1 + rank + 1_000_003 * step)

    def _skip(self) -> None:
        """Counts a step that is left out.

        Raises:
            EngineError: If there were too many in a row.
        """
        self.skipped_in_row += 1
        self.skipped_steps += 1
        if self.world.is_main:
            logger.warning("step %d is left out: its loss or gradient is not finite", self.step + 1)
        if self.skipped_in_row > self.config.optim.max_skipped_steps:
            raise EngineError(
                f"{self.skipped_in_row} steps in a row have no finite loss or gradient, "
                f"up to step {self.step + 1}",
                _LOWER_RATE,
            )

    def _numbers(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Returns the step's numbers, means over all processes; every process must call it."""
        numbers = mean_over_ranks(values)
        rate = learning_rate(self.step - 1, self.total_steps, self.config.optim)
        return numbers | {"lr": rate, "skipped_steps": float(self.skipped_steps)}

    def _measure(self, when: str, progress: Progress | None) -> Retrieval | None:
        retrieval = self.evaluate()
        if retrieval and progress:
            progress.write(self.step, retrieval.values())
            for line in retrieval.lines():
                logger.info("%s", f"{when}  {line}" if when else line)
        return retrieval

    def _flops_per_clip(self, kind: MediaKind) -> float:
        if self._peak_flops is None:
            return 0.0
        if kind not in self._flops:
            self._flops[kind] = training_flops(self.config, kind)
        return self._flops[kind]

    def _open_progress(self) -> Progress | None:
        if not self.world.is_main:
            return None
        described = self.config.model_dump(mode="json")
        trackers = open_trackers(self.config.run.trackers, self.output, described)
        return Progress(self.total_steps, self.step, self.output / METRICS, trackers)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Inside, the first Ctrl-C or SIGTERM asks for a checkpoint and an end; a second kills."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may listen to signals; Ray Train runs us in another
            return

        def ask(number: int, frame: Any) -> None:
            self._stop_signal = number
            logger.warning("stopping after this step, with a checkpoint")
            for each in old:
                signal.signal(each, signal.SIG_DFL)

        numbers = (signal.SIGINT, signal.SIGTERM)
        old = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _announce(self) -> None:
        if not self.world.is_main:
            return
        trained = sum(p.numel() for p in self.task.parameters() if p.requires_grad)
        logger.info(
            "%s, %.1f M parameters to train, %d process(es) on %s, %s%s",
            self.config.model.kind,
            trained / 1e6,
            self.world.size,
            self.world.device,
            self.config.run.precision,
            f", {self.config.run.parallel}" if self.world.size > 1 else "",
        )
        train, held_out = self.corpora.train_index, self.corpora.held_out_index
        logger.info(
            "training on %d clips of %d videos, %d clips of %d other videos held out",
            len(train),
            train.num_videos,
            len(held_out),
            held_out.num_videos,
        )
        if self.config.data.held_out and not len(held_out):
            logger.warning("no video fell into the held-out share: nothing to evaluate on")


_HARMLESS = {
    *("run.log_every", "run.eval_every", "run.checkpoint_every", "run.keep_checkpoints"),
    *("run.trackers", "run.compile", "run.parallel", "optim.max_skipped_steps"),
    *("data.num_workers", "data.cache_mb", "data.read_ahead", "data.eval_batch_size"),
    *("data.decoder", "data.sources"),  # of other clips the loader knows by itself
}
"""Fields that change nothing in what is learnt."""


def _changed_fields(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Returns the fields that differ and matter, with both values where they are short."""
    before, after = old.model_dump(), new.model_dump()
    changed = [] if before.pop("init") == after.pop("init") else ["init"]
    for section in before:
        for field in sorted(before[section].keys() | after[section].keys()):
            values = before[section].get(field), after[section].get(field)
            name = f"{section}.{field}"
            if values[0] != values[1] and name not in _HARMLESS:
                then, now = (str(value) for value in values)
                short = len(then) + len(now) < 40
                changed.append(f"{name} ({then} then, {now} now)" if short else name)
    return changed


def _set_random_state(state: dict[str, torch.Tensor], world: World) -> None:
    place = f"random.{world.rank}"
    torch.set_rng_state(state[f"{place}.cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(state[f"{place}.cuda"], world.device)
