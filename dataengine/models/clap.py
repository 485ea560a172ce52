# SPDX-License-Identifier: Apache-2.0
"""Audio captions by zero-shot tags: which of a list of sounds CLAP hears.

Wu et al. 2023, "Large-Scale Contrastive Language-Audio Pretraining" (arXiv 2211.06687).

N sounds of the list, D width of the shared space.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataengine.models.answers import Batcher, Failure
from dataengine.models.audio import TAG_PROMPT, ClapTagsConfig
from dataengine.models.pretrained import load_model, load_processor, model_id, model_revision
from dataengine.prompts import load_prompt

_TEXTS = 32


def name_sounds(tags: Sequence[str]) -> str:
    """Returns "a", "a and b", "a, b and c"."""
    *first, last = tags
    return f"{', '.join(first)} and {last}" if first else last


def choose(similarities_N: np.ndarray, threshold: float, margin: float, most: int) -> list[int]:
    """Returns the sounds that are named, the most similar first.

    Args:
        similarities_N: Cosine similarity of each.
        threshold: Least similarity of any.
        margin: Most that one may be less similar than the first.
        most: Most of them.
    """
    order = np.argsort(-similarities_N, kind="stable")[:most]
    least = max(threshold, float(similarities_N[order[0]]) - margin)
    return [int(index) for index in order if similarities_N[index] >= least]


class ClapTagger:
    """Names the sounds of a list that are heard.

    Args:
        config: The model, the list, and when a sound counts as heard.

    Raises:
        DependencyError: If the model is missing or does not fit.
        ConfigError: If the list cannot be used.
    """

    def __init__(self, config: ClapTagsConfig) -> None:
        from transformers import ClapModel, ClapProcessor

        self._config = config
        self._prompt = load_prompt(config.tags, TAG_PROMPT)
        lines = (line.strip() for line in self._prompt.texts["tags"].splitlines())
        self.tags = [*dict.fromkeys(line for line in lines if line)]
        self._model: Any = load_model(
            ClapModel, config.model, config.revision, device=config.device, unused=_BUFFERS
        )
        self._processor: Any = load_processor(ClapProcessor, config.model, config.revision)
        extractor = self._processor.feature_extractor
        self.rate: int = extractor.sampling_rate
        self._window: int = extractor.nb_max_samples
        self._batcher = Batcher(config.batch_size)
        self._texts_ND = self._embed_tags()
        self.model = model_id(config.model)
        self.revision = model_revision(config.model, self._model)
        self.prompt_hash: str | None = self._prompt.sha256

    def caption(
        self, waveforms: Sequence[np.ndarray], clip_ids: Sequence[str]
    ) -> list[str | Failure | None]:
        """Returns a sentence per sound, None where nothing of the list is heard.

        Args:
            waveforms: float32 mono in [-1, 1] at ``rate``.
            clip_ids: Whose they are.
        """
        windows = [self._windows(wave) for wave in waveforms]
        heard = iter(self._batcher.run([w for part in windows for w in part], self._similarities))
        return [self._sentence([next(heard) for _ in part]) for part in windows]

    def _windows(self, wave: np.ndarray) -> list[np.ndarray]:
        """Returns a sound in windows of the model's length, of which it hears one at a time.

        Given more, its feature extractor would cut at random. A rest of less than a second is left out.
        """
        starts = range(0, len(wave), self._window)
        parts = [wave[start : start + self._window] for start in starts]
        return parts[:1] + [part for part in parts[1:] if len(part) >= self.rate]

    def _sentence(self, windows: Sequence[np.ndarray | Failure]) -> str | Failure | None:
        for window in windows:
            if isinstance(window, Failure):
                return window
        best = np.max([window for window in windows if isinstance(window, np.ndarray)], axis=0)
        config = self._config
        chosen = choose(best, config.threshold, config.margin, config.max_tags)
        if not chosen:
            return None
        return self._prompt.render("heard", sound=name_sounds([self.tags[i] for i in chosen]))

    def _similarities(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        inputs = self._processor.feature_extractor(
            list(windows), sampling_rate=self.rate, return_tensors="pt"
        )
        # A model with fusion would else treat one sound, drawn at random, as a longer one.
        inputs["is_longer"] = torch.zeros(len(windows), 1, dtype=torch.bool)
        with torch.inference_mode():
            features = self._model.get_audio_features(
                input_features=inputs["input_features"].to(self._model.device, self._model.dtype),
                is_longer=inputs["is_longer"].to(self._model.device),
            ).pooler_output
        return list(_normalised(features) @ self._texts_ND.T)

    def _embed_tags(self) -> np.ndarray:
        """Returns the sounds of the list as float32 [N, D] of length 1."""
        import torch

        texts = [self._prompt.render("template", sound=tag) for tag in self.tags]
        parts = []
        for start in range(0, len(texts), _TEXTS):
            inputs = self._processor.tokenizer(
                texts[start : start + _TEXTS], padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                features = self._model.get_text_features(**inputs.to(self._model.device))
            parts.append(_normalised(features.pooler_output))
        return np.concatenate(parts)


def _normalised(features: Any) -> np.ndarray:
    vectors = features.float().cpu().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


_BUFFERS = ("text_model.embeddings.position_ids",)
"""Counted numbers that older checkpoints stored with their weights."""
