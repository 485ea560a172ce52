# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + caption_audio: what is heard, apart from what is said."""

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dataengine.errors import MediaError
from dataengine.media import read_audio
from dataengine.models.answers import Failure
from dataengine.models.audio import (
    AudioCaptionerConfig,
    SignalsAudioConfig,
    build_audio_captioner,
)
from dataengine.stage import Kept, Outcome, Row, Stage, provenance

logger = logging.getLogger(__name__)

_SAMPLE_RATE = 16000

NO_SOUND = "no_sound"
"""Note of a clip that has no audio track, or none that can be read."""


def clip_waveform(row: Row) -> np.ndarray | None:
    """Returns a clip's sound as float32 mono at 16 kHz; None without an audio track.

    A track that cannot be decoded counts as none: the clip's pictures are still good.
    """
    data = (row.get("video") or {}).get("bytes")
    if not row.get("has_audio") or not data:
        return None
    try:
        waveform = read_audio(data, rate=_SAMPLE_RATE)
    except MediaError as error:
        logger.warning("Sound of clip %s is not readable: %s", row.get("clip_id"), error)
        return None
    return waveform if waveform is not None and len(waveform) else None


class CaptionAudioStage(Stage):
    """Writes ``caption_audio``; null for a clip without sound, whose provenance says so."""

    name = "caption_audio"
    inputs = ("clip_id", "video", "has_audio")
    outputs = pa.schema([("caption_audio", pa.string())])

    class Config(Stage.Config):
        """Settings of audio captions."""

        model: AudioCaptionerConfig = SignalsAudioConfig()
        """Who describes the sound."""

    config: Config

    def setup(self) -> None:
        """Loads the captioner."""
        self._captioner = build_audio_captioner(self.config.model)

    def process(self, batch: Sequence[Row]) -> list[Outcome]:
        """Returns one Kept per row."""
        sounds = {
            index: waveform
            for index, row in enumerate(batch)
            if (waveform := clip_waveform(row)) is not None
        }
        names = [batch[index].get("clip_id") or "" for index in sounds]
        answers = self._captioner.caption(list(sounds.values()), names) if sounds else []
        captions = dict(zip(sounds, answers, strict=True))
        author = self._captioner.model, self._captioner.revision, self._captioner.prompt_hash
        outcomes: list[Outcome] = []
        for index, row in enumerate(batch):
            text, note = captions.get(index), None if index in captions else NO_SOUND
            if isinstance(text, Failure):
                logger.warning("No audio caption of %s: %s", row.get("clip_id"), text)
                text, note = None, text.note
            wrote = [provenance("caption_audio", *author, note=note)] if text or note else []
            outcomes.append(Kept(({"caption_audio": text, "provenance": wrote},)))
        return outcomes
