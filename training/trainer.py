# SPDX-License-Identifier: Apache-2.0
"""Recipe + corpus -> a trained dual encoder: set-up, one step, the loop around it."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataengine.corpus import Corpus
from dataengine.errors import EngineError
from training import checkpoint
from training.config import TrainConfig
from training.data.index import ClipIndex, open_index, split_by_video
from training.data.loader import Batch, ClipReader, TrainLoader, coverage_loader
from training.data.transforms import normalise
from training.distributed import World, barrier, gather, gather_objects, wrap
from training.evaluation.encode import evaluate
from training.evaluation.retrieval import Retrieval
from training.metrics import Progress
from training.models import build_model
from training.objectives.contrastive import Pairs, contrastive_loss
from training.optim import build_optimizer, learning_rate

logger = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """What a run ends with; the retrievals are None without held-out clips."""

    step: int
    before: Retrieval | None
    after: Retrieval | None


class Trainer:
    """Holds a run's parts; every process has one.

    Args:
        config: The recipe.
        data: ``CORPUS`` or ``CORPUS#subset``.
        output: Folder for checkpoints, the resolved recipe and the metrics.
        world: This process among all.
        resume: Whether to go on from the newest checkpoint in ``output``; otherwise what lies
            there is set aside, not deleted.
    """

    def __init__(
        self, config: TrainConfig, data: str, output: Path, world: World, *, resume: bool = True
    ) -> None:
        self.config, self.output, self.world = config, output, world
        index = open_index(data, config.data.caption)
        train_positions, held_out_positions = split_by_video(index, config.data.held_out)
        self.is_remote = not Corpus(index.url).is_local
        self.train_index = index.take(train_positions)
        self.held_out_index = index.take(held_out_positions)
        self.loader = TrainLoader(
            reader(self.train_index, config),
            self.train_index,
            config.data,
            seed=config.run.seed,
            rank=world.rank,
            world_size=world.size,
            is_remote=self.is_remote,
        )
        self.total_steps = config.optim.steps or math.ceil(
            (config.optim.epochs or 0) * self.loader.steps_per_epoch
        )

        torch.manual_seed(config.run.seed)
        self.model = build_model(config.model).to(world.device)
        # Masks and stochastic depth must differ between processes, weights must not.
        torch.manual_seed(config.run.seed + 1 + world.rank)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.step = 0
        self.resumed = False
        self._prepare_output(resume)
        if config.run.compile:
            self.model.compile()
        self.step_model = wrap(self.model, world)

    def run(self, stop_at: int | None = None) -> Result:
        """Trains to the end and evaluates before and after.

        Args:
            stop_at: Stop after this step, with a checkpoint but without the evaluation.
        """
        config = self.config.run
        self._announce()
        # Before is before the first step only; a resumed run would measure something else.
        before = None if self.resumed else self.evaluate()
        if before and self.world.is_main:
            for line in before.lines():
                logger.info("before  %s", line)
        last = min(self.total_steps, stop_at or self.total_steps)
        progress = Progress(
            self.total_steps,
            self.step,
            self.config.data.batch_size * self.world.size,
            self.output / "metrics.jsonl" if self.world.is_main else None,
        )
        self.step_model.train()
        batches = iter(self.loader)
        while self.step < last:
            values = self.train_step(next(batches))
            saves = self.step % config.checkpoint_every == 0 or self.step == last
            if self.step % config.log_every == 0 or saves:
                numbers = self._numbers(values)
                if self.world.is_main:
                    progress.log(self.step, numbers)
            started = time.monotonic()
            if saves:
                self.save()
            if config.eval_every and self.step % config.eval_every == 0 and self.step < last:
                retrieval = self.evaluate()
                if retrieval and self.world.is_main:
                    progress.write(self.step, retrieval.values())
                    for line in retrieval.lines():
                        logger.info("%s", line)
            progress.pause(time.monotonic() - started)
        if self.loader.skipped:
            logger.warning("%d clips could not be read", len(self.loader.skipped))
        after = self.evaluate() if self.step == self.total_steps else None
        if after and self.world.is_main:
            progress.write(self.step, after.values())
        return Result(self.step, before, after)

    def train_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Does one optimizer step; returns this process' numbers, still on the device."""
        config, device = self.config, self.world.device
        rate = learning_rate(self.step, self.total_steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        frames_BTCHW = normalise(
            batch.frames.to(device, non_blocking=True),
            config.model.pixel_mean,
            config.model.pixel_std,
        )
        tokens_BL = batch.tokens.to(device, non_blocking=True)
        pairs = Pairs(
            batch.valid.to(device), batch.caption_id.to(device), batch.video_id.to(device)
        )
        dtype = AUTOCAST[config.run.precision]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            video_BE, text_BE, temperature = self.step_model(frames_BTCHW, tokens_BL)
        loss = contrastive_loss(video_BE, text_BE, temperature, pairs, config.objective)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = config.optim.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.detach(), "grad_norm": grad_norm, "temperature": temperature.detach()}

    def evaluate(self) -> Retrieval | None:
        """Returns retrieval on the held-out clips, None if there are none."""
        if not len(self.held_out_index):
            return None
        batches = held_out_batches(self.held_out_index, self.config, self.world, self.is_remote)
        return evaluate(self.model, batches, self.config.model, self.world)

    def save(self) -> None:
        """Writes a checkpoint; every process must call it."""
        generators = gather_objects(_random_state(self.world.device))
        if self.world.is_main:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "loader": self.loader.state_dict(),
                "random": generators,
            }
            checkpoint.save(
                self.output,
                step=self.step,
                model=self.model,
                state=state,
                config=self.config,
                keep=self.config.run.keep_checkpoints,
            )
        barrier()

    def _prepare_output(self, resume: bool) -> None:
        if self.world.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            if not resume and (aside := checkpoint.set_aside(self.output)):
                logger.info("starting over; the old checkpoints are now in %s", aside)
        barrier()
        folder = checkpoint.newest(self.output)
        if folder is None:
            return
        changed = _changed_fields(checkpoint.read_config(folder), self.config)
        if changed and self.world.is_main:
            logger.warning("the recipe differs from the checkpoint's in %s", ", ".join(changed))
        checkpoint.load_weights(folder, self.model)
        state = checkpoint.load_state(folder)
        self.loader.load_state_dict(state["loader"])
        self.optimizer.load_state_dict(state["optimizer"])
        _set_random_state(state["random"][self.world.rank], self.world.device)
        self.step = checkpoint.read_meta(folder)["step"]
        self.resumed = True
        if self.world.is_main:
            logger.info("resumed from %s", folder)

    def _numbers(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Returns the step's numbers over all processes as floats.

        Raises:
            EngineError: If the loss is not finite, before it can reach a checkpoint.
        """
        loss = gather(values["loss"].reshape(1)).mean().item()
        if not math.isfinite(loss):
            raise EngineError(
                f"The loss is {loss} at step {self.step}",
                "lower it with --set optim.lr=..., or clip with --set optim.grad_clip=1; "
                "the last checkpoint is from before",
            )
        return {
            "loss": loss,
            "grad_norm": values["grad_norm"].item(),
            "temperature": values["temperature"].item(),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _announce(self) -> None:
        if not self.world.is_main:
            return
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        logger.info(
            "%s, %.1f M parameters to train, %d process(es) on %s, %s",
            self.config.model.kind,
            trained / 1e6,
            self.world.size,
            self.world.device,
            self.config.run.precision,
        )
        logger.info(
            "training on %d clips of %d videos, %d clips of %d other videos held out",
            len(self.train_index),
            self.train_index.num_videos,
            len(self.held_out_index),
            self.held_out_index.num_videos,
        )
        if self.config.data.held_out and not len(self.held_out_index):
            logger.warning("no video fell into the held-out share: nothing to evaluate on")


def reader(index: ClipIndex, config: TrainConfig) -> ClipReader:
    """Returns the reader that makes the model's inputs of an index' clips."""
    return ClipReader(
        index,
        config.data,
        num_frames=config.model.video.num_frames,
        image_size=config.model.video.image_size,
        context_length=config.model.text.context_length,
        seed=config.run.seed,
    )


def held_out_batches(index: ClipIndex, config: TrainConfig, world: World, is_remote: bool) -> Any:
    """Returns this process' share of an exact pass over the clips."""
    return coverage_loader(
        reader(index, config),
        len(index),
        config.data,
        rank=world.rank,
        world_size=world.size,
        is_remote=is_remote,
    )


def _changed_fields(old: TrainConfig, new: TrainConfig) -> list[str]:
    before, after = old.model_dump(), new.model_dump()
    return [
        f"{section}.{field}"
        for section in before
        for field in before[section]
        if before[section][field] != after[section].get(field)
    ]


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
