# SPDX-License-Identifier: Apache-2.0
"""Audio captions as InternVideo2 makes them: BEATs, a tuned Q-Former, a language model.

Wang et al. 2024 (arXiv 2403.15377), appendix B.2. ``python -m training.audio_captioner`` trains the
folder that is loaded here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.answers import Batcher, Failure
from dataengine.models.audio import BeatsCaptionerConfig
from dataengine.models.pretrained import load_model, load_processor, torch_device
from dataengine.models.validate import TextChecker


class BeatsCaptioner:
    """Says what a language model makes of what BEATs hears; greedy.

    Args:
        config: Where the trained captioner lies.

    Raises:
        DependencyError: If the captioner, its BEATs or its language model is missing, does not fit,
            or is another than the one it was trained with.
    """

    rate = 16_000

    def __init__(self, config: BeatsCaptionerConfig) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from dataengine.networks.audio_qformer import (
            SoundToText,
            captioner_revision,
            file_sha256,
            load_qformer,
            model_digest,
        )
        from dataengine.networks.beats import load_beats

        device = torch_device(config.device)
        qformer, file = load_qformer(config.captioner)
        self._file = file
        path = config.beats or file.beats
        beats = load_beats(path)
        _same(path, file_sha256(path), file.beats_sha256)
        name = config.language_model or file.language_model
        revision = "" if config.language_model else file.language_model_revision
        language_model: Any = load_model(AutoModelForCausalLM, name, revision, device=device)
        tokenizer = load_processor(AutoTokenizer, name, revision)
        _same(name, model_digest(name, revision), file.language_model_sha256)
        if beats.config.width != file.sound_width:
            raise DependencyError(f"{path} is not as wide as the captioner's BEATs")
        self._model = SoundToText(
            beats.to(device), qformer.to(device), language_model, tokenizer, file.prompt
        )
        self._checker = TextChecker(config.checks)
        self._batcher = Batcher(config.batch_size)
        self.model = config.name
        self.revision = captioner_revision(config.captioner)
        # The prompt is part of the trained folder, and so of the revision.
        self.prompt_hash: str | None = None

    def caption(
        self, waveforms: Sequence[np.ndarray], clip_ids: Sequence[str]
    ) -> list[str | Failure | None]:
        """Returns a caption per sound, or what is wrong with it.

        Args:
            waveforms: float32 mono in [-1, 1] at 16 kHz. Of long sounds, the captioner hears the first
                ``window_s x max_windows`` seconds.
            clip_ids: Whose they are.
        """
        texts = self._batcher.run(
            waveforms, lambda part: self._model.captions(part, self._file.max_tokens)
        )
        return [text if isinstance(text, Failure) else self._checker.check(text) for text in texts]


def _same(name: str, found: str, trained: str) -> None:
    if found != trained:
        raise DependencyError(
            f"{name} is not what the audio captioner was trained with "
            f"(SHA-256 {found[:12]}..., not {trained[:12]}...)",
            "name the same weights, or train the captioner with these",
        )
