# SPDX-License-Identifier: Apache-2.0
"""Sound -> words: who writes down what is said.

Licences: PocketSphinx BSD-2-Clause, whisper (code and weights) MIT, faster-whisper MIT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.models.answers import Failure
from dataengine.models.hallucination import GuardsConfig
from dataengine.models.speech_pieces import PiecesConfig
from dataengine.needs import Need, Package, Weights
from dataengine.stage import Settings

_VAD = Package("pocketsphinx")
"""Carries the voice detector that finds the speech in a sound."""
SAMPLE_RATE = 16000
"""Rate of every waveform here, in Hz."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of speech; times count from the start of the waveform."""

    start_ms: int
    end_ms: int
    text: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is said in a sound.

    Attributes:
        segments: In time order; empty where nothing is said.
        note: What was unusual, for the provenance: ``guard:<reason>,...`` where segments were left
            out because nobody seems to have said them (`dataengine.models.hallucination`).
    """

    segments: tuple[Segment, ...] = ()
    note: str | None = None


class Transcriber(Protocol):
    """Writes down speech."""

    model: str
    revision: str

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> Sequence[Transcript | Failure]:
        """Returns what is said in each sound, or why nobody can tell; all sounds are heard together.

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

    def needs(self) -> tuple[Need, ...]:
        """Returns the package, which carries its model."""
        return (Package("pocketsphinx"),)


class WhisperConfig(Settings):
    """openai-whisper in batches, as in InternVideo2 App. B.2 (large-v2)."""

    kind: Literal["whisper"] = "whisper"
    model: str
    """A name whisper knows (``large-v2``) or the path of a checkpoint file."""
    language: str | None = None
    """ISO 639-1 code of the speech; None lets the model detect it clip by clip."""
    batch_size: int = Field(default=16, ge=1)
    """Most windows of 30 s in one call of the model."""
    temperatures: tuple[float, ...] = Field(default=(0.0,), min_length=1)
    """The first decodes everything; the next ones, in turn, what came out repetitive or unlikely.
    0 is greedy and the only one whose result is the same every time; whisper's own fallback is
    ``[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]``."""
    words: bool = False
    """Whether segments begin and end with their first and last word, timed by whisper's attention,
    instead of where its timestamp tokens say; costs another pass of the model over each window."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens per window; None is whisper's own limit."""
    pieces: PiecesConfig | None = PiecesConfig()
    """Which part of a sound is listened to; None listens to all of it, voice or not."""
    guards: GuardsConfig = GuardsConfig()
    """What is left out because nobody seems to have said it."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""

    neutral: ClassVar[frozenset[str]] = frozenset({"batch_size", "device"})

    def needs(self) -> tuple[Need, ...]:
        """Returns the packages and the checkpoint."""
        vad = (_VAD,) if self.pieces is not None else ()
        return (Package("whisper"), *vad, Weights("whisper", self.model))


class FasterWhisperConfig(Settings):
    """Whisper by CTranslate2: the same models, converted, faster and with less memory."""

    kind: Literal["faster_whisper"] = "faster_whisper"
    model: str
    """Folder of a converted model, its hub id, or a size that faster-whisper knows (``large-v2``)."""
    revision: str = ""
    """Commit, tag or branch on the hub; empty takes the newest."""
    language: str | None = None
    """ISO 639-1 code of the speech; None lets the model detect it window by window."""
    batch_size: int = Field(default=16, ge=1)
    """Most windows of 30 s in one call of the model."""
    beam_size: int = Field(default=1, ge=1)
    """1 is greedy."""
    compute_type: str = "default"
    """Arithmetic as CTranslate2 names it: ``float16``, ``int8_float16``, ``int8``, ``float32``."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens per window; None is whisper's own limit."""
    pieces: PiecesConfig | None = PiecesConfig()
    """As in `WhisperConfig`."""
    guards: GuardsConfig = GuardsConfig()
    """As in `WhisperConfig`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; ``auto`` takes CUDA where there is one."""

    neutral: ClassVar[frozenset[str]] = frozenset({"batch_size", "device"})

    def needs(self) -> tuple[Need, ...]:
        """Returns the packages and the model."""
        vad = (_VAD,) if self.pieces is not None else ()
        known = "/" in self.model or Path(self.model).is_dir()
        name = self.model if known else f"Systran/faster-whisper-{self.model}"
        package = Package("faster_whisper", "uv sync --extra ingest --extra faster-whisper")
        return (package, *vad, Weights("hub", name, self.revision))


TranscriberConfig = Annotated[
    PocketsphinxConfig | WhisperConfig | FasterWhisperConfig, Field(discriminator="kind")
]


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

    def transcribe(self, waveforms: Sequence[np.ndarray]) -> list[Transcript | Failure]:
        """Returns lower-case English segments without punctuation."""
        return [Transcript(tuple(self._transcribe(waveform))) for waveform in waveforms]

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


def build_transcriber(
    config: PocketsphinxConfig | WhisperConfig | FasterWhisperConfig,
) -> Transcriber:
    """Returns the transcriber that a config names.

    Raises:
        DependencyError: If its package or its weights are missing or unfit.
    """
    match config:
        case PocketsphinxConfig():
            return PocketsphinxTranscriber(config)
        case WhisperConfig():
            from dataengine.models.whisper import WhisperTranscriber

            return WhisperTranscriber(config)
        case FasterWhisperConfig():
            from dataengine.models.faster_whisper import FasterWhisperTranscriber

            return FasterWhisperTranscriber(config)
