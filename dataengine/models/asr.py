# SPDX-License-Identifier: Apache-2.0
"""Sound -> words: who writes down what is said."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.models.answers import Failure
from dataengine.stage import Settings

SAMPLE_RATE = 16000
"""Rate of every waveform here, in Hz."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of speech; times count from the start of the waveform."""

    start_ms: int
    end_ms: int
    text: str


class Transcriber(Protocol):
    """Writes down speech."""

    model: str
    revision: str

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> Sequence[list[Segment] | Failure]:
        """Returns the segments of each sound in time order, or why there are none.

        Args:
            waveforms: float32 mono in [-1, 1] at 16 kHz, one per clip.
        """
        ...


class PocketsphinxConfig(Settings):
    """CMU PocketSphinx with the English model inside its package.

    Good for clean, near speech only: a backend for demos and tests, not for a corpus.
    """

    kind: Literal["pocketsphinx"] = "pocketsphinx"
    pause_ms: int = Field(default=500, ge=0)
    """A silence this long between two words starts a new segment."""


class WhisperConfig(Settings):
    """openai-whisper, as in InternVideo2 App. B.2 (large-v2)."""

    kind: Literal["whisper"] = "whisper"
    model: str
    """A name whisper knows (``large-v2``) or the path of a checkpoint file."""
    language: str | None = None
    """ISO 639-1 code of the speech; None lets the model detect it clip by clip."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens per 30 s window; None is whisper's own limit."""


TranscriberConfig = Annotated[PocketsphinxConfig | WhisperConfig, Field(discriminator="kind")]


def group_words(words: Sequence[Segment], pause_ms: int) -> list[Segment]:
    """Joins words into segments, with a cut at every pause of at least ``pause_ms``."""
    groups: list[list[Segment]] = []
    for word in words:
        if groups and word.start_ms - groups[-1][-1].end_ms < pause_ms:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [
        Segment(group[0].start_ms, group[-1].end_ms, " ".join(word.text for word in group))
        for group in groups
    ]


def spoken_word(token: str) -> str | None:
    """Returns a dictionary token as a word, or None for a filler such as ``<sil>`` or ``[NOISE]``.

    PocketSphinx writes the second pronunciation of a word as ``word(2)``.
    """
    if token.startswith(("<", "[", "+")):
        return None
    return token.split("(")[0] or None


# Word error rate in % (WER) and CPU seconds per second of sound (RTF), all measured in one run on
# two busy cores, so that only their ratios count. Clean: 60 synthetic sentences, 3 voices. Noisy:
# 30 of them in pink noise, 15 dB under the voice. Broadcast: 11 s of a speech of 1961, 22 words.
# Footage: 20 s of two videos, not transcribed.
#
#                                       clean        noisy      broadcast   footage
#                                      WER   RTF    WER   RTF    WER   RTF    RTF
#   defaults                          12.3  0.115  70.3  0.358  22.7  0.303  0.274
#   maxhmmpf 3000, narrow flat pass   12.8  0.090  72.6  0.179  31.8  0.135  0.151  <- taken
#   maxhmmpf 4000, no flat pass       13.9  0.109  70.9  0.224  40.9  0.170  0.138
#   maxhmmpf 3000, no flat pass       14.5  0.080  74.3  0.150  72.7  0.117  0.113
#
# In other runs tighter beams had a WER of 22 clean, topn 2 of 14, and maxhmmpf 3000 with ds 2 of 82
# in the broadcast; pl_window and maxwpf beside maxhmmpf gained nothing.
_SEARCH = {
    "maxhmmpf": 3000,  # HMMs alive per frame, of which hard sound keeps 30000 by default
    "fwdflatefwid": 2,  # frames a word must last to be in the second, flat pass; default 4
    "fwdflatsfwin": 12,  # frames around its start in which that pass tries it; default 25
}


class PocketsphinxTranscriber:
    """PocketSphinx, whole utterance at a time, with a narrowed search.

    Raises:
        DependencyError: If pocketsphinx is not installed.
    """

    model = "pocketsphinx:en-us"

    def __init__(self, config: PocketsphinxConfig) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise DependencyError(
                "Missing package: pocketsphinx (speech recognition)", "uv sync --extra ingest"
            ) from error
        from importlib.metadata import version

        self.revision = version("pocketsphinx")
        self._pause_ms = config.pause_ms
        self._decoder = pocketsphinx.Decoder(
            samprate=float(SAMPLE_RATE), loglevel="FATAL", **_SEARCH
        )

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[list[Segment]]:
        """Returns lower-case English segments without punctuation."""
        return [self._transcribe(waveform) for waveform in waveforms]

    def _transcribe(self, waveform: np.ndarray) -> list[Segment]:
        samples = (np.clip(waveform, -1.0, 1.0) * 32767).astype("<i2")
        # Its features depend a little on the sound before, and the words in hard sound on them.
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        # In one piece, so that the mean it subtracts is this clip's own and not the last one's.
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        if self._decoder.hyp() is None:
            return []
        words = []
        for entry in self._decoder.seg():
            word = spoken_word(entry.word)
            if word is not None:  # 10 ms frames, the last one included
                words.append(Segment(entry.start_frame * 10, (entry.end_frame + 1) * 10, word))
        return group_words(words, self._pause_ms)


class WhisperTranscriber:
    """openai-whisper, greedy and without the previous window's text.

    Conditioning on earlier text makes whisper repeat itself over music and silence; temperature
    0 makes it deterministic and forgoes the fallback loop.

    Raises:
        DependencyError: If whisper is not installed or the checkpoint cannot be loaded.
    """

    def __init__(self, config: WhisperConfig) -> None:
        try:
            import torch
            import whisper
        except ImportError as error:
            raise DependencyError(
                "Missing package: openai-whisper (speech recognition)", "uv sync --extra ingest"
            ) from error
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model = whisper.load_model(config.model, device=device)
        except (OSError, RuntimeError, KeyError) as error:
            raise DependencyError(
                f"Whisper model cannot be loaded: {config.model} ({error})",
                f"name one of {', '.join(whisper.available_models())}, or a checkpoint file",
            ) from error
        self._options = {"language": config.language, "sample_len": config.max_tokens}
        self._half = device != "cpu"
        self.model = f"whisper:{config.model}"
        self.revision = whisper.__version__

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[list[Segment]]:
        """Returns whisper's segments; those it left empty are skipped."""
        return [self._transcribe(waveform) for waveform in waveforms]

    def _transcribe(self, waveform: np.ndarray) -> list[Segment]:
        import torch

        with torch.inference_mode():
            result = self._model.transcribe(
                waveform.astype(np.float32),
                condition_on_previous_text=False,
                temperature=0.0,
                fp16=self._half,
                verbose=None,
                **self._options,
            )
        segments = []
        entry: Any
        for entry in result["segments"]:
            text = str(entry["text"]).strip()
            if text:
                start_ms, end_ms = round(entry["start"] * 1000), round(entry["end"] * 1000)
                segments.append(Segment(start_ms, max(end_ms, start_ms), text))
        return segments


def build_transcriber(config: PocketsphinxConfig | WhisperConfig) -> Transcriber:
    """Returns the transcriber that a config names."""
    if isinstance(config, WhisperConfig):
        return WhisperTranscriber(config)
    return PocketsphinxTranscriber(config)
