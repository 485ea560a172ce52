# SPDX-License-Identifier: Apache-2.0
"""Audio captions by a language model that hears, such as Qwen2-Audio or Qwen2.5-Omni."""

import io
import wave
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dataengine.models.answers import Failure
from dataengine.models.audio import SOUND_PROMPT, AudioLLMConfig
from dataengine.models.llm import LanguageModel, Request, build_llm
from dataengine.models.validate import TextChecker, ask
from dataengine.prompts import load_prompt
from dataengine.records import digest

_RATE = 16_000


def wav_bytes(waveform: np.ndarray, rate: int = _RATE) -> bytes:
    """Returns a WAV file of 16-bit mono.

    Args:
        waveform: float32 in [-1, 1]; louder is clipped.
        rate: Samples per second.
    """
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


class AudioLLMCaptioner:
    """Asks for a description, checks it, and asks once more where it was none.

    Args:
        config: Its prompt file and checks.
        llm: Who answers; None builds the one that the config names.

    Raises:
        DependencyError: If the model's package, weights or server is missing.
    """

    rate = _RATE

    def __init__(self, config: AudioLLMConfig, llm: LanguageModel | None = None) -> None:
        self._config = config
        self._prompt = load_prompt(config.prompt, SOUND_PROMPT)
        self._checker = TextChecker(config.checks, self._prompt.sentences())
        self._llm = llm or build_llm(config.llm)
        self.model = self._llm.model
        self.revision = self._llm.revision
        self.prompt_hash: str | None = self._prompt.sha256

    def caption(
        self, waveforms: Sequence[np.ndarray], clip_ids: Sequence[str]
    ) -> list[str | Failure | None]:
        """Returns a description per sound, or why there is none, each found by its clip's id.

        Args:
            waveforms: float32 mono in [-1, 1] at 16 kHz.
            clip_ids: All different.

        Raises:
            EngineError: If no question can be answered, e.g. because a server stays away.
        """
        requests = [
            self._request(wave, name) for wave, name in zip(waveforms, clip_ids, strict=True)
        ]
        return [*ask(self._llm, requests, lambda _, text: self._checker.check(text), self._again)]

    def _request(self, waveform: np.ndarray, clip_id: str) -> Request:
        heard = waveform[: int(self._config.max_s * _RATE)]
        sound = wav_bytes(heard)
        return Request(
            id=clip_id,
            input_hash=digest(sound),
            prompt=self._prompt.render("describe"),
            system=self._prompt.render("system"),
            audio=sound,
            max_tokens=self._config.max_tokens,
        )

    def _again(self, request: Request, problem: Failure) -> Request:
        return replace(request, prompt=self._prompt.render("again", problem=problem.detail))
