# SPDX-License-Identifier: Apache-2.0
"""Clip -> clip + caption_audio: what is heard, apart from what is said."""

import logging
from collections.abc import Mapping, Sequence

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

NO_SOUND = "no_sound"
"""Note of a clip that has no audio track, or none that can be read."""

SILENT = "silent"
"""Note of a clip whose track is silent: no model is asked."""

_SILENT_DBFS = -60.0
"""Broadcasts are set to -23 (EBU R 128); the dither of 16 bits leaves about -93."""
_SILENCE = "Silence."
_LEVEL = "level", "1", None
"""Who says so: this stage's own measurement."""


def clip_waveform(row: Row, rate: int = 16_000) -> np.ndarray | None:
    """Returns a clip's sound as float32 mono; None without an audio track.

    A track that cannot be decoded counts as none: the clip's pictures are still good.

    Args:
        row: With ``video`` and ``has_audio``.
        rate: Samples per second.
    """
    data = (row.get("video") or {}).get("bytes")
    if not row.get("has_audio") or not data:
        return None
    try:
        waveform = read_audio(data, rate=rate)
    except MediaError as error:
        logger.warning("Sound of clip %s is not readable: %s", row.get("clip_id"), error)
        return None
    return waveform if waveform is not None and len(waveform) else None


def is_silent(waveform: np.ndarray, rate: int) -> bool:
    """Returns whether every 50 ms of a float32 waveform stay below -60 dBFS (RMS)."""
    frame = max(1, rate // 20)
    padded = np.pad(waveform, (0, -len(waveform) % frame)).reshape(-1, frame)
    # The last frame may hold only a few samples: its mean is taken over those.
    lengths = np.full(len(padded), frame)
    lengths[-1] = frame - (-len(waveform) % frame)
    power = np.square(padded, dtype=np.float64).sum(axis=1) / lengths
    return bool(power.max(initial=0.0) < 10 ** (_SILENT_DBFS / 10))


class CaptionAudioStage(Stage):
    """Writes ``caption_audio``; null for a clip without sound, whose provenance says so.

    A silent track is captioned "Silence.", with a note, and no model is asked about it.
    """

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
        rate = self._captioner.rate
        sounds: dict[int, np.ndarray] = {}
        silent: set[int] = set()
        for index, row in enumerate(batch):
            waveform = clip_waveform(row, rate)
            if waveform is None:
                continue
            if is_silent(waveform, rate):
                silent.add(index)
            else:
                sounds[index] = waveform
        names = [batch[index].get("clip_id") or "" for index in sounds]
        answers = self._captioner.caption(list(sounds.values()), names) if sounds else []
        captions = dict(zip(sounds, answers, strict=True))
        return [
            Kept((self._silent() if index in silent else self._columns(row, captions, index),))
            for index, row in enumerate(batch)
        ]

    def _silent(self) -> Row:
        entry = provenance("caption_audio", *_LEVEL, note=SILENT)
        return {"caption_audio": _SILENCE, "provenance": [entry]}

    def _columns(self, row: Row, captions: Mapping[int, str | Failure | None], index: int) -> Row:
        text, note = captions.get(index), None if index in captions else NO_SOUND
        if isinstance(text, Failure):
            logger.warning("No audio caption of %s: %s", row.get("clip_id"), text)
            text, note = None, text.note
        author = self._captioner.model, self._captioner.revision, self._captioner.prompt_hash
        wrote = [provenance("caption_audio", *author, note=note)] if text or note else []
        return {"caption_audio": text, "provenance": wrote}
