# SPDX-License-Identifier: Apache-2.0
"""Sound -> a caption of what is heard."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from dataengine.models.answers import Failure
from dataengine.stage import Settings


class AudioCaptioner(Protocol):
    """Describes sound."""

    model: str
    revision: str
    prompt_hash: str | None

    def caption(
        self, waveforms: Sequence[np.ndarray], clip_ids: Sequence[str]
    ) -> Sequence[str | Failure | None]:
        """Returns a caption per sound, None where nothing is heard, or why there is none; in order.

        Args:
            waveforms: float32 mono in [-1, 1] at 16 kHz, none of them empty.
            clip_ids: Whose they are.
        """
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
