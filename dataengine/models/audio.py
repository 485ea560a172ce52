# SPDX-License-Identifier: Apache-2.0
"""Sound -> a caption of what is heard."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from dataengine.stage import Settings


class AudioCaptioner(Protocol):
    """Describes sound."""

    model: str
    revision: str
    prompt_hash: str | None

    def caption(self, waveforms: Sequence[np.ndarray]) -> list[str | None]:
        """Returns a caption per float32 mono waveform in [-1, 1] at 16 kHz, in order."""
        ...


class SignalsAudioConfig(Settings):
    """A sentence made of what is measured; no model."""

    kind: Literal["signals"] = "signals"


AudioCaptionerConfig = SignalsAudioConfig
"""The families of audio captioners; a second kind makes this a union on ``kind``."""


def build_audio_captioner(config: AudioCaptionerConfig) -> AudioCaptioner:
    """Returns the captioner that a config names."""
    from dataengine.models.signals_audio import SignalsAudioCaptioner

    builders = {"signals": SignalsAudioCaptioner}
    return builders[config.kind]()
