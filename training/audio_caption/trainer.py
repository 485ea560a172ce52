# SPDX-License-Identifier: Apache-2.0
"""Tunes the Q-Former; BEATs and the language model stay as they are."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dataengine.errors import ConfigError, DependencyError, EngineError
from dataengine.networks.audio_qformer import (
    AudioQFormer,
    CaptionerFile,
    SoundPrompt,
    SoundToText,
    file_sha256,
    model_digest,
    save_qformer,
)
from dataengine.networks.beats import load_beats
from training import checkpoint
from training.audio_caption.config import AudioCaptionConfig
from training.audio_caption.data import (
    Order,
    SoundDataset,
    collate,
    read_sounds,
    split_sounds,
    steps_per_epoch,
)
from training.optim import build_optimizer, learning_rate, optimizer_state

logger = logging.getLogger(__name__)


def load_language_model(
    name: str, revision: str, device: str, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Returns a causal language model with all its weights, and its tokenizer.

    Raises:
        DependencyError: If it is not there, or weights are missing or left over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"revision": revision} if revision and not Path(name).is_dir() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, safetensors and the hub raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(f"Language model cannot be loaded: {name} ({problem})") from error
    model, info = loaded
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise DependencyError(
            f"Weights of {name} are missing or left over: {', '.join(map(str, wrong[:5]))}",
            "name a causal language model of the transformers library",
        )
    if tokenizer.eos_token_id is None:
        raise DependencyError(f"The tokenizer of {name} has no token that ends a text")
    return model.to(device), tokenizer


class AudioCaptionTrainer:
    """One run; goes on from the newest checkpoint in its folder.

    Args:
        config: The recipe.
        data: The list of sounds; see `training.audio_caption.data`.
        audio: Their folder.
        output: Where checkpoints and the trained captioner go.
        resume: Whether to go on from a checkpoint; else they are set aside.
    """

    def __init__(
        self, config: AudioCaptionConfig, data: Path, audio: Path, output: Path, *, resume: bool = True
    ) -> None:  # fmt: skip
        self._config, self._output = config, output
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._bf16 = config.run.precision == "bf16"
        self._sounds, self._held_out = split_sounds(read_sounds(data, audio), config.data.held_out)
        if not self._sounds:
            raise ConfigError("No sound is left to train on", "lower data.held_out")
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        language_model, tokenizer = load_language_model(
            config.language_model, config.language_model_revision, self._device, dtype
        )
        beats = load_beats(config.beats).to(self._device)
        revision = getattr(language_model.config, "_commit_hash", None)
        revision = revision or config.language_model_revision
        self._file = CaptionerFile(
            qformer=config.qformer,
            prompt=SoundPrompt(**config.prompt.model_dump()),
            beats=str(Path(config.beats).resolve()),
            beats_sha256=file_sha256(config.beats),
            sound_width=beats.config.width,
            language_model=_place(config.language_model),
            language_model_revision=revision,
            language_model_sha256=model_digest(config.language_model, revision),
            text_width=language_model.get_input_embeddings().weight.shape[1],
            max_tokens=config.data.max_tokens,
        )
        torch.manual_seed(config.run.seed)
        self._qformer = AudioQFormer(config.qformer, beats.config.width, self._file.text_width)
        self._qformer.to(self._device)
        self._model = SoundToText(
            beats, self._qformer, language_model, tokenizer, self._file.prompt
        )
        self._optimizer = build_optimizer(self._qformer, config.optim)
        per_epoch = steps_per_epoch(len(self._sounds), config.data.batch_size)
        self.total_steps = config.optim.steps or max(
            1, round((config.optim.epochs or 0) * per_epoch)
        )
        self.step = 0
        if not resume:
            checkpoint.set_aside(output)
        elif folder := checkpoint.newest(output):
            self._resume(folder)

    def _resume(self, folder: Path) -> None:
        meta = checkpoint.read_meta(folder)
        written = meta["config"].get("captioner") or {}
        # Files may have moved since; their hashes say whether they are the same.
        moved = {"beats", "language_model"}
        own = self._file.model_dump(mode="json", exclude=moved)
        if {key: value for key, value in written.items() if key not in moved} != own:
            raise checkpoint.CheckpointError(
                f"{folder} belongs to another captioner",
                "train with the recipe it was written with, or into another --output, "
                "or set it aside with --no-resume",
            )
        recipe = self._config.model_dump(mode="json")
        before = meta["config"].get("recipe") or {}
        changed = [name for name in recipe if before.get(name) != recipe[name]]
        if set(changed) - {"run", *moved}:
            logger.warning("the recipe differs from the checkpoint's in %s", ", ".join(changed))
        tensors = self._tensors()
        checkpoint.load(folder, tensors)
        torch.set_rng_state(tensors["random.0.cpu"])
        if "random.0.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.0.cuda"])
        self.step = meta["step"]
        logger.info("going on from step %d", self.step)

    def run(self) -> list[float]:
        """Trains to the end and writes the captioner; returns the loss of each step of this call."""
        config = self._config
        order = Order(
            len(self._sounds), config.data.batch_size, config.run.seed, self.step, self.total_steps
        )
        losses: list[float] = []
        begun = self.step
        self._qformer.train()
        for waves, captions in self._batches(self._sounds, order):
            rate = learning_rate(self.step, self.total_steps, config.optim)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            if waves:
                losses.append(self._train_on(waves, captions))
            self.step += 1
            if self.step % config.run.log_every == 0 or self.step == self.total_steps:
                recent = losses[-config.run.log_every :]
                mean = sum(recent) / max(1, len(recent))
                logger.info(
                    "step %d of %d  loss %.4f  lr %.2e", self.step, self.total_steps, mean, rate
                )
            if self.step % config.run.checkpoint_every == 0 or self.step == self.total_steps:
                # What was written stands for something learnt, for a run that goes on from it too.
                if not losses and not begun:
                    raise ConfigError("No sound could be decoded", "warnings above say why")
                self._save()
        self._qformer.eval()
        save_qformer(self._output, self._qformer, self._file)
        return losses

    def held_out_loss(self) -> float | None:
        """Returns the mean loss per sound held out; None if there are none."""
        if not self._held_out:
            return None
        size = self._config.data.batch_size
        steps = steps_per_epoch(len(self._held_out), size)
        indices = range(len(self._held_out))
        batches = [[(i, 0.0) for i in indices[at * size : (at + 1) * size]] for at in range(steps)]
        total = count = 0
        self._qformer.eval()
        with torch.inference_mode():
            for waves, captions in self._batches(self._held_out, batches):
                if waves:
                    total += float(self._loss(waves, captions)) * len(waves)
                    count += len(waves)
        return total / count if count else None

    def _batches(self, sounds: Any, order: Any) -> Any:
        shape, data = self._config.qformer, self._config.data
        return DataLoader(
            SoundDataset(sounds, shape.window_s * shape.max_windows),
            batch_sampler=order,
            num_workers=data.num_workers,
            collate_fn=collate,
            # It draws a seed for its workers whenever it begins: from the generator of dropout, a run
            # that goes on would have drawn once more than one that was never stopped.
            generator=torch.Generator(),
        )

    def _loss(self, waves: Any, captions: Any) -> torch.Tensor:
        half = torch.autocast(self._device, torch.bfloat16) if self._bf16 else nullcontext()
        with half:
            return self._model.loss(waves, captions, self._config.data.max_tokens)

    def _train_on(self, waves: Any, captions: Any) -> float:
        loss = self._loss(waves, captions)
        if not torch.isfinite(loss):
            raise EngineError(
                f"The loss is {float(loss.detach())} at step {self.step}",
                "lower it with --set optim.lr=..., or clip with --set optim.grad_clip=1; "
                "the last checkpoint is from before",
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self._config.optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(self._qformer.parameters(), self._config.optim.grad_clip)
        self._optimizer.step()
        return float(loss.detach())

    def _save(self) -> None:
        file = self._file.model_dump(mode="json")
        config = {"recipe": self._config.model_dump(mode="json"), "captioner": file}
        writer = checkpoint.Writer(self._output, self._config.run.keep_checkpoints)
        try:
            writer.save(self.step, self._tensors(), {"config": config})
            writer.wait()
        finally:
            writer.close()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Returns weights, optimizer state, and the states of the generators of dropout."""
        tensors = {f"model.network.{n}": t for n, t in self._qformer.state_dict().items()}
        state = optimizer_state(self._optimizer, self._qformer)
        tensors |= {f"optim.network.{name}": tensor for name, tensor in state.items()}
        tensors["random.0.cpu"] = torch.get_rng_state()
        if self._device == "cuda":
            tensors["random.0.cuda"] = torch.cuda.get_rng_state()
        return tensors


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name
