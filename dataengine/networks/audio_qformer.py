# SPDX-License-Identifier: Apache-2.0
"""Sound -> text by a frozen BEATs, a Q-Former and a frozen language model.

InternVideo2's audio captioner (Wang et al. 2024, arXiv 2403.15377, appendix B.2): learned queries
look at BEATs' features, a linear layer takes them into the embedding space of a language model, and
only this Q-Former is trained (on WavCaps). The Q-Former is BLIP-2's (Li et al. 2023, arXiv
2301.12597, section 3.1) as the transformers library has it.

B batch, N patches, D width, Q queries, P prompt tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dataengine.errors import DependencyError
from dataengine.networks.beats import RATE, Beats
from dataengine.networks.config import AudioQFormerConfig, NetworkConfig

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class SoundPrompt(NetworkConfig):
    """What the language model reads around the sound: part of what the Q-Former was trained for."""

    before: str = ""
    """Text before the sound, with whatever marks the user's turn in the model's chat format."""
    after: str = ""
    """Text between the sound and the caption."""


class CaptionerFile(NetworkConfig):
    """``config.json`` of a trained captioner: what its weights belong to."""

    format_version: int = FORMAT_VERSION
    kind: str = "audio_qformer"
    qformer: AudioQFormerConfig
    prompt: SoundPrompt
    beats: str
    """Path of the BEATs checkpoint at training."""
    beats_sha256: str
    sound_width: int = Field(gt=0)
    language_model: str
    """Hub id, or path of a local folder at training."""
    language_model_revision: str = ""
    language_model_sha256: str
    """`model_digest` of its files."""
    text_width: int = Field(gt=0)
    max_tokens: int = Field(gt=0)
    """Longest caption of the training, in tokens."""


class AudioQFormer(nn.Module):
    """Learned queries that turn the features of a sound into tokens of a language model.

    Args:
        config: Its shape.
        sound_width: Of BEATs' features.
        text_width: Of the language model's embeddings.
    """

    def __init__(self, config: AudioQFormerConfig, sound_width: int, text_width: int) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        self.config = config
        self.queries = nn.Parameter(0.02 * torch.randn(1, config.num_queries, config.width))
        # BEATs starts to count anew in every window.
        self.windows = nn.Embedding(config.max_windows, sound_width)
        nn.init.zeros_(self.windows.weight)
        self.sound_norm = nn.LayerNorm(sound_width)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.mlp_width,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=sound_width,
            )
        )
        self.project = nn.Linear(config.width, text_width)

    def forward(
        self, sound_BND: torch.Tensor, windows_BN: torch.Tensor, there_BN: torch.Tensor
    ) -> torch.Tensor:
        """Returns float32 [B, Q, text_width]; see `hear` for the arguments."""
        sound_BND = self.sound_norm(sound_BND) + self.windows(windows_BN)
        answer = self.qformer(
            query_embeds=self.queries.expand(len(sound_BND), -1, -1),
            encoder_hidden_states=sound_BND,
            encoder_attention_mask=there_BN.long(),
        )
        return self.project(answer.last_hidden_state)


def hear(
    beats: Beats, waves: Sequence[np.ndarray], config: AudioQFormerConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what BEATs hears in windows of ``window_s`` seconds, joined in time.

    Args:
        beats: The encoder.
        waves: float32 mono in [-1, 1] at 16 kHz, none of them empty.
        config: How long a window is, and how many are heard.

    Returns:
        Features [B, N, D], the window of each (int64 [B, N]), and where there is sound (bool [B, N]).
    """
    length = int(config.window_s * RATE)
    pieces: list[np.ndarray] = []
    owners: list[tuple[int, int]] = []
    for sound, wave in enumerate(waves):
        starts = range(0, min(len(wave), length * config.max_windows), length)
        # A rest of less than one patch says nothing.
        for window, start in enumerate(starts):
            piece = wave[start : start + length]
            if window == 0 or len(piece) >= beats.min_samples:
                pieces.append(piece)
                owners.append((sound, window))
    features, there = beats(pieces)
    counts = [0] * len(waves)
    lengths = there.sum(dim=1).tolist()
    for (sound, _), count in zip(owners, lengths, strict=True):
        counts[sound] += count
    shape = len(waves), max(counts)
    sound_BND = features.new_zeros(*shape, features.shape[2])
    windows_BN = torch.zeros(shape, dtype=torch.long, device=features.device)
    there_BN = torch.zeros(shape, dtype=torch.bool, device=features.device)
    filled = [0] * len(waves)
    for number, ((sound, window), count) in enumerate(zip(owners, lengths, strict=True)):
        place = slice(filled[sound], filled[sound] + count)
        sound_BND[sound, place] = features[number, :count]
        windows_BN[sound, place] = window
        there_BN[sound, place] = True
        filled[sound] += count
    return sound_BND, windows_BN, there_BN


class SoundToText:
    """The three networks together: a loss for training, captions for annotation.

    Args:
        beats: Frozen here, in float32.
        qformer: Trained or to be trained, in float32.
        language_model: A causal model of the transformers library; frozen here.
        tokenizer: Its.
        prompt: What it reads around the sound.
    """

    def __init__(
        self, beats: Beats, qformer: AudioQFormer, language_model: Any, tokenizer: Any,
        prompt: SoundPrompt,
    ) -> None:  # fmt: skip
        self.beats = beats.eval().requires_grad_(False)
        self.qformer = qformer
        self.language_model = language_model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._embed = language_model.get_input_embeddings()
        start = tokenizer("a").input_ids[:1]
        begins = start if start and start[0] == tokenizer.bos_token_id else []
        self._before = begins + self._ids(prompt.before)
        self._after = self._ids(prompt.after)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _tokens(self, ids: Sequence[int], batch: int) -> torch.Tensor:
        device = self._embed.weight.device
        embedded = self._embed(torch.tensor(ids, dtype=torch.long, device=device))
        return embedded[None].expand(batch, -1, -1)

    def prompt_embeddings(self, waves: Sequence[np.ndarray]) -> torch.Tensor:
        """Returns [B, P, text_width]: text before, sound, text after; all rows are of one length."""
        with torch.no_grad():
            heard = hear(self.beats, waves, self.qformer.config)
        soft = self.qformer(*heard).to(self._embed.weight.dtype)
        before, after = (self._tokens(ids, len(waves)) for ids in (self._before, self._after))
        return torch.cat([before, soft, after], dim=1)

    def loss(
        self, waves: Sequence[np.ndarray], captions: Sequence[str], max_tokens: int
    ) -> torch.Tensor:
        """Returns the mean cross-entropy of the captions' tokens, the end's included.

        Args:
            waves: As in `hear`.
            captions: One per sound.
            max_tokens: Longer captions lose their end.
        """
        prompt = self.prompt_embeddings(waves)
        end = self.tokenizer.eos_token_id
        texts = [[*self._ids(caption), end][:max_tokens] for caption in captions]
        longest = max(map(len, texts))
        device = prompt.device
        ids = torch.full((len(texts), longest), end, dtype=torch.long, device=device)
        labels = torch.full((len(texts), prompt.shape[1] + longest), -100, device=device)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text, device=device)
            labels[row, prompt.shape[1] : prompt.shape[1] + len(text)] = ids[row, : len(text)]
        embedded = torch.cat([prompt, self._embed(ids)], dim=1)
        # Padding stands behind everything that counts, where a causal model cannot see it.
        return self.language_model(inputs_embeds=embedded, labels=labels, use_cache=False).loss

    @torch.inference_mode()
    def captions(self, waves: Sequence[np.ndarray], max_tokens: int) -> list[str]:
        """Returns the greedy caption of each sound, without special tokens."""
        prompt = self.prompt_embeddings(waves)
        ends = self.language_model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        end = self.tokenizer.eos_token_id
        made = self.language_model.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(ends | {end}),
            pad_token_id=end
            if self.tokenizer.pad_token_id is None
            else self.tokenizer.pad_token_id,
        )
        return [
            text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True)
        ]


# ---------------------------------------------------------------------------------------- files


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(name: str, revision: str = "") -> str:
    """Returns a hash by which a language model is known again, wherever it lies.

    Of each weight file and ``tokenizer.json``: name, size and first MiB.

    Args:
        name: A local folder, or a hub id whose files were fetched already.
        revision: On the hub.
    """
    folder = Path(name)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        options = {"revision": revision} if revision else {}
        folder = Path(
            str(cached_file(name, "config.json", local_files_only=True, **options))
        ).parent
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    hashed = hashlib.sha256()
    for path in [*files, folder / "tokenizer.json"]:
        if path.is_file():
            with path.open("rb") as file:
                hashed.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                hashed.update(file.read(1 << 20))
    return hashed.hexdigest()


def save_qformer(folder: Path, qformer: AudioQFormer, file: CaptionerFile) -> None:
    """Writes ``config.json`` and ``model.safetensors``; the config last, so that it stands for both."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).unlink(missing_ok=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in qformer.state_dict().items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(file.model_dump(mode="json"), indent=2) + "\n")


def read_captioner_file(folder: str | Path) -> CaptionerFile:
    """Returns what a captioner's weights belong to.

    Raises:
        DependencyError: If the folder holds no captioner of this format.
    """
    try:
        return CaptionerFile.model_validate_json((Path(folder) / _CONFIG).read_text())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"No audio captioner in {folder} ({problem})",
            "python -m training.audio_captioner trains one",
        ) from error


def load_qformer(folder: str | Path) -> tuple[AudioQFormer, CaptionerFile]:
    """Loads a trained Q-Former, every weight of it, and what it belongs to.

    Raises:
        DependencyError: If it is not there, or a weight is missing, unexpected or of another shape.
    """
    file = read_captioner_file(folder)
    if file.format_version > FORMAT_VERSION:
        raise DependencyError(f"The audio captioner in {folder} was written by a newer version")
    qformer = AudioQFormer(file.qformer, file.sound_width, file.text_width)
    try:
        qformer.load_state_dict(load_file(Path(folder) / _WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:500]
        raise DependencyError(
            f"Weights of the audio captioner in {folder} do not fit: {problem}",
            "python -m training.audio_captioner trains one",
        ) from error
    return qformer.eval(), file


def captioner_revision(folder: str | Path) -> str:
    """Returns 16 hex digits of the hash of a captioner's config and weights."""
    hashed = [file_sha256(Path(folder) / name) for name in (_CONFIG, _WEIGHTS)]
    return hashlib.sha256("".join(hashed).encode()).hexdigest()[:16]
