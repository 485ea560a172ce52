# SPDX-License-Identifier: Apache-2.0
"""Whisper by CTranslate2 (faster-whisper): windows of many sounds share every call of the model.

Its batched pipeline takes one sound and the spans in it that shall be read together. So the windows of all
sounds are laid one after another, 30 s apart, and given to it as the spans of one long sound; its own voice
detector stays off. The language is then detected window by window, and a window whose speech
runs out of tokens is not read on.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.answers import OUT_OF_MEMORY, Failure
from dataengine.models.asr import SAMPLE_RATE, FasterWhisperConfig, Transcript
from dataengine.models.pretrained import model_id
from dataengine.models.speech_pieces import WINDOW_MS, Window, speech_windows_of
from dataengine.models.whisper import Heard, assemble

logger = logging.getLogger(__name__)

_WINDOW_SAMPLES = WINDOW_MS * SAMPLE_RATE // 1000
_FRAMES_PER_WINDOW = WINDOW_MS // 10


class FasterWhisperTranscriber:
    """faster-whisper's batched pipeline.

    Raises:
        DependencyError: If the package is not installed, the model cannot be loaded, or the language is
            none that it knows.
    """

    def __init__(self, config: FasterWhisperConfig) -> None:
        try:
            import faster_whisper
        except ImportError as error:
            raise DependencyError(
                "Missing package: faster-whisper (speech recognition)",
                "uv sync --extra ingest --extra faster-whisper",
            ) from error
        try:
            model = faster_whisper.WhisperModel(
                config.model,
                device=config.device,
                compute_type=config.compute_type,
                revision=config.revision or None,
            )
        except Exception as error:  # CTranslate2, tokenizers and the hub raise all kinds
            problem = " ".join(str(error).split())[:300]
            raise DependencyError(
                f"faster-whisper model cannot be loaded: {config.model} ({problem})",
                "name a size such as large-v2, a hub id, or a folder written by "
                "ct2-transformers-converter with tokenizer.json and preprocessor_config.json",
            ) from error
        if config.language is not None and config.language not in model.supported_languages:
            raise DependencyError(
                f"{config.model} knows no language {config.language!r}",
                "language: an ISO 639-1 code such as en, or null to detect it",
            )
        self._config = config
        self._size = config.batch_size
        self._pipeline = faster_whisper.BatchedInferencePipeline(model)
        self._multilingual = model.model.is_multilingual
        self.model = f"faster-whisper:{model_id(config.model)}"
        self.revision = folder_revision(config.model) or config.revision

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[Transcript | Failure]:
        """Returns what is said in each sound, all windows of all sounds in shared batches.

        Args:
            waveforms: float32 mono in [-1, 1] at 16 kHz.
        """
        windows = [
            window
            for clip, waveform in enumerate(waveforms)
            for window in speech_windows_of(clip, waveform, self._config.pieces)
        ]
        heard: list[Heard | Failure] = []
        while len(heard) < len(windows):
            part = windows[len(heard) : len(heard) + self._size]
            try:
                heard += self._read(part, waveforms)
            except RuntimeError as error:  # CTranslate2 has no class of its own for it
                if "out of memory" not in str(error).lower():
                    raise
                if len(part) == 1:
                    heard.append(Failure(OUT_OF_MEMORY, str(error).partition("\n")[0]))
                    continue
                self._size = len(part) // 2
                logger.warning("CUDA is out of memory: batches of %d from here on", self._size)
        return assemble(
            len(waveforms), heard, [window.clip for window in windows], self._config.guards
        )

    def _read(self, windows: Sequence[Window], waveforms: Sequence[np.ndarray]) -> list[Heard]:
        """Returns what each window says; all go through the model in one batch."""
        sound = np.zeros(len(windows) * _WINDOW_SAMPLES, np.float32)
        spans = []
        for index, window in enumerate(windows):
            part = window.cut(waveforms[window.clip])
            start = index * _WINDOW_SAMPLES
            sound[start : start + len(part)] = part
            spans.append({"start": start / SAMPLE_RATE, "end": (start + len(part)) / SAMPLE_RATE})
        entries, _ = self._pipeline.transcribe(
            sound,
            # With none it would detect one language for all; `multilingual` overrules it.
            language=self._config.language or "en",
            multilingual=self._config.language is None and self._multilingual,
            clip_timestamps=spans,
            vad_filter=False,
            without_timestamps=False,
            word_timestamps=False,
            temperature=[0.0],
            beam_size=self._config.beam_size,
            max_new_tokens=self._config.max_tokens,
            batch_size=len(windows),
        )
        said: list[list[tuple[int, int, str]]] = [[] for _ in windows]
        measured = [(0.0, 0.0)] * len(windows)
        for entry in entries:
            index = entry.seek // _FRAMES_PER_WINDOW
            start_ms, end_ms = (
                min(max(0, round(time * 1000) - index * WINDOW_MS), windows[index].duration_ms)
                for time in (entry.start, entry.end)
            )
            said[index].append((start_ms, max(start_ms, end_ms), entry.text))
            measured[index] = float(entry.no_speech_prob), float(entry.avg_logprob)
        return [
            Heard(window, tuple(pieces), *values)
            for window, pieces, values in zip(windows, said, measured, strict=True)
        ]


def folder_revision(name: str) -> str:
    """Returns a hash of a local model folder's files, empty for what is no folder.

    The hash is taken of every file's name, size and first megabyte.
    """
    from dataengine.records import digest

    folder = Path(name)
    if not folder.is_dir():
        return ""
    parts: list[str | bytes] = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as opened:
            parts += [file.name, str(file.stat().st_size), opened.read(1 << 20)]
    return digest(*parts)
