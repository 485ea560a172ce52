# SPDX-License-Identifier: Apache-2.0
"""openai-whisper in batches: windows of many sounds share every call of the model.

``whisper.transcribe`` reads one sound, window after window. Here the windows of all sounds
(`dataengine.models.speech_pieces`) are encoded together, their languages are detected together, and
whisper's own `DecodingTask` writes them together; only what it writes of a window is read the way
``whisper.transcribe`` reads it. No window is shown an earlier one's text, which makes whisper repeat
itself over music and silence.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.answers import Batcher, Failure
from dataengine.models.asr import Segment, Transcript, WhisperConfig
from dataengine.models.hallucination import (
    GuardsConfig,
    Utterance,
    compression_ratio,
    judge,
    note,
)
from dataengine.models.pretrained import torch_device
from dataengine.models.speech_pieces import Window, speech_windows_of

logger = logging.getLogger(__name__)

TICK_MS = 20
"""Whisper's timestamp tokens count in steps of this length."""
_LEAST_REST_MS = 1000
"""What whisper left of a window is read on if it, and what was read, are at least this long."""


@dataclass(frozen=True, slots=True)
class Said:
    """One timed piece of text of a window: whisper's tokens between two timestamps."""

    start_ms: int
    end_ms: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """What was written of one window.

    Attributes:
        window: Which.
        said: Its pieces, on the window's clock: (start_ms, end_ms, text).
        no_speech_prob: In [0, 1].
        avg_logprob: Per token.
    """

    window: Window
    said: tuple[tuple[int, int, str], ...]
    no_speech_prob: float
    avg_logprob: float


def read_tokens(
    tokens: Sequence[int], end_of_text: int, first_timestamp: int, duration_ms: int
) -> tuple[list[Said], int | None]:
    """Returns the timed pieces of a decoded window, and from where it must be read again.

    Whisper writes ``<0.00> words <2.40><2.40> words <5.00>``. If the last piece is not closed, or one is
    opened and left empty, what follows it did not fit: like ``whisper.transcribe`` we read on from
    there, unless that would not lead on.

    Args:
        tokens: As decoded: text below ``end_of_text``, timestamps from ``first_timestamp``.
        end_of_text: Id of the first special token.
        first_timestamp: Id of ``<|0.00|>``.
        duration_ms: Length of the window; nothing is said after it.
    """
    pieces: list[Said] = []
    start_ms, text, opened = 0, [], False
    for token in tokens:
        if token < end_of_text:
            text.append(token)
        elif token >= first_timestamp:
            time_ms = min((token - first_timestamp) * TICK_MS, duration_ms)
            if text:
                pieces.append(Said(start_ms, time_ms, tuple(text)))
                text, opened = [], False
            else:
                opened = True
            start_ms = time_ms
    leads_on = _LEAST_REST_MS <= start_ms <= duration_ms - _LEAST_REST_MS
    if text and not leads_on:
        return [*pieces, Said(start_ms, duration_ms, tuple(text))], None
    goes_on = bool(text) or (opened and bool(pieces))
    return pieces, start_ms if goes_on and leads_on else None


def assemble(
    num_sounds: int, heard: Sequence[Heard | Failure], clips: Sequence[int], guards: GuardsConfig
) -> list[Transcript | Failure]:
    """Returns the transcript of each sound on its own clock, without what the guards leave out.

    Args:
        num_sounds: How many there are.
        heard: What was written of each window.
        clips: Index of the sound each window is of.
        guards: What is left out.
    """
    results: list[Transcript | Failure] = []
    for clip in range(num_sounds):
        windows = [answer for answer, of in zip(heard, clips, strict=True) if of == clip]
        failure = next((answer for answer in windows if isinstance(answer, Failure)), None)
        if failure:  # half a transcript looks like a whole one
            results.append(failure)
            continue
        segments, utterances = [], []
        for answer in windows:
            if isinstance(answer, Failure):
                continue
            window_text = "".join(text for _, _, text in answer.said).strip()
            for start_ms, end_ms, raw in answer.said:
                text = raw.strip()
                if not text:
                    continue
                first = answer.window.to_clip(start_ms)
                last = max(first, answer.window.to_clip(end_ms, is_end=True))
                segments.append(Segment(first, last, text))
                measured = answer.no_speech_prob, answer.avg_logprob, window_text
                utterances.append(Utterance(start_ms, end_ms, text, *measured))
        order = sorted(range(len(segments)), key=lambda i: (segments[i].start_ms, i))
        reasons = judge([utterances[i] for i in order], guards)
        kept = [segments[i] for i, reason in zip(order, reasons, strict=True) if not reason]
        results.append(Transcript(tuple(kept), note(reasons)))
    return results


class WhisperTranscriber:
    """openai-whisper, greedy unless fallback temperatures are set.

    Raises:
        DependencyError: If whisper is not installed, the checkpoint cannot be loaded, or the language
            is none of whisper's.
    """

    def __init__(self, config: WhisperConfig) -> None:
        try:
            import whisper
            from whisper.tokenizer import LANGUAGES, get_tokenizer
        except ImportError as error:
            raise DependencyError(
                "Missing package: openai-whisper (speech recognition)", "uv sync --extra ingest"
            ) from error
        device = torch_device(config.device)
        try:
            model = whisper.load_model(config.model, device=device)
        except Exception as error:  # torch, pickle and urllib raise all kinds
            problem = " ".join(str(error).split())[:300]
            raise DependencyError(
                f"Whisper model cannot be loaded: {config.model} ({problem})",
                f"name one of {', '.join(whisper.available_models())}, or a checkpoint file",
            ) from error
        language = config.language if model.is_multilingual else "en"
        if language is not None and language not in LANGUAGES:
            raise DependencyError(
                f"Whisper knows no language {language!r}",
                "language: an ISO 639-1 code such as en, or null to detect it",
            )
        self._config = config
        self._language = language
        self._half = device.startswith("cuda")
        self._model = halved(model) if self._half else model
        self._tokenizer = get_tokenizer(
            model.is_multilingual, num_languages=model.num_languages, language=language or "en"
        )
        self._encoding, self._decoding = Batcher(config.batch_size), Batcher(config.batch_size)
        path = Path(config.model)
        self.model = f"whisper:{path.name if path.is_file() else config.model}"
        self.revision = checkpoint_revision(path) if path.is_file() else whisper.__version__

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
        languages: dict[int, str] = {}
        heard: list[Heard | Failure] = []
        clips: list[int] = []
        while windows:  # what is read on is shorter by a second at least
            answers, windows_on = self._read(windows, waveforms, languages)
            heard += answers
            clips += [window.clip for window in windows]
            windows = windows_on
        return assemble(len(waveforms), heard, clips, self._config.guards)

    def _read(
        self,
        windows: Sequence[Window],
        waveforms: Sequence[np.ndarray],
        languages: dict[int, str],
    ) -> tuple[list[Heard | Failure], list[Window]]:
        """Returns what each window says, and the windows that must be read on.

        The language of every sound that is not in ``languages`` is added there.
        """
        encoded = self._encoding.run(
            [window.cut(waveforms[window.clip]) for window in windows], self._encode
        )
        if self._language is None:
            new = [
                (window, answer[1])
                for window, answer in zip(windows, encoded, strict=True)
                if not isinstance(answer, Failure) and window.clip not in languages
            ]
            languages |= joint_languages(new)
        ready = [
            (index, answer[0], self._language or languages[windows[index].clip])
            for index, answer in enumerate(encoded)
            if not isinstance(answer, Failure)
        ]
        results = self._decode([(features, language) for _, features, language in ready])
        decoded = {index: result for (index, _, _), result in zip(ready, results, strict=True)}
        answers: list[Heard | Failure] = []
        on: list[Window] = []
        for index, (window, encoding) in enumerate(zip(windows, encoded, strict=True)):
            if isinstance(encoding, Failure):
                answers.append(encoding)
                continue
            result = decoded[index]
            if isinstance(result, Failure):
                answers.append(result)
                continue
            pieces, rest_ms = read_tokens(
                result.tokens,
                self._tokenizer.eot,
                self._tokenizer.timestamp_begin,
                window.duration_ms,
            )
            if rest_ms is not None and not self._is_repetitive(result):
                on.append(window.rest(rest_ms))
            if self._config.words and pieces:
                pieces = self._timed_by_words(pieces, window, waveforms[window.clip])
            said = tuple(
                (piece.start_ms, piece.end_ms, self._tokenizer.decode(list(piece.tokens)))
                for piece in pieces
            )
            measured = float(result.no_speech_prob), float(result.avg_logprob)
            answers.append(Heard(window, said, *measured))
        return answers, on

    def _encode(self, sounds: Sequence[np.ndarray]) -> list[tuple[Any, dict[str, float]]]:
        """Returns, for each window's sound, its features (on the host) and language probabilities."""
        import torch

        with torch.inference_mode():
            features = self._model.encoder(torch.stack([self._mel(sound) for sound in sounds]))
            probabilities: list[dict[str, float]] = [{}] * len(sounds)
            if self._language is None:
                _, probabilities = self._model.detect_language(features)
        # A window is 4 MB for the largest model: on the host they may be many.
        return list(zip(features.cpu(), probabilities, strict=True))

    def _mel(self, sound: np.ndarray) -> Any:
        """Returns a window's spectrum [mels, 3000], silence after its end."""
        import torch
        import whisper

        padded = torch.from_numpy(whisper.pad_or_trim(np.ascontiguousarray(sound)))
        mel = whisper.log_mel_spectrogram(
            padded, self._model.dims.n_mels, device=self._model.device
        )
        return mel.half() if self._half else mel

    def _decode(self, items: Sequence[tuple[Any, str]]) -> list[Any]:
        """Returns whisper's decoding result, or a Failure, for each (features, language).

        What comes out repetitive or unlikely is decoded again at the next temperature.
        """
        results: list[Any] = [None] * len(items)
        todo = list(range(len(items)))
        for temperature in self._config.temperatures:
            answers = self._decoding.run(
                [items[index] for index in todo],
                lambda part, temperature=temperature: self._decode_batch(part, temperature),
            )
            for index, answer in zip(todo, answers, strict=True):
                results[index] = answer
            todo = [
                index
                for index in todo
                if not isinstance(results[index], Failure) and self._is_poor(results[index])
            ]
            if not todo:
                break
        return results

    def _decode_batch(self, items: Sequence[tuple[Any, str]], temperature: float) -> list[Any]:
        import torch
        from whisper.decoding import DecodingOptions

        options = DecodingOptions(
            temperature=temperature,
            sample_len=self._config.max_tokens,
            # None would be detected again; every window brings its own.
            language=self._language or "en",
            fp16=self._half,
        )
        features = torch.stack([features for features, _ in items]).to(self._model.device)
        codes = [language for _, language in items]
        with torch.inference_mode():
            return decoding_task(self._model, options, codes).run(features)

    def _is_poor(self, result: Any) -> bool:
        """Returns whether whisper's own fallback would decode a window again."""
        guards = self._config.guards
        if self._is_repetitive(result):
            return True
        silent = guards.no_speech is not None and result.no_speech_prob > guards.no_speech
        return result.avg_logprob < guards.min_logprob and not silent

    def _is_repetitive(self, result: Any) -> bool:
        limit = self._config.guards.max_compression
        return limit is not None and compression_ratio(result.text) > limit

    def _timed_by_words(
        self, pieces: Sequence[Said], window: Window, waveform: np.ndarray
    ) -> list[Said]:
        """Returns pieces that begin and end with their words, as the cross-attention places them."""
        import torch
        from whisper.audio import HOP_LENGTH
        from whisper.timing import add_word_timestamps

        sound = window.cut(waveform)
        entries: list[dict[str, Any]] = [
            {
                "start": p.start_ms / 1000,
                "end": p.end_ms / 1000,
                "tokens": list(p.tokens),
                "seek": 0,
            }
            for p in pieces
        ]
        with torch.inference_mode():
            add_word_timestamps(
                segments=entries,
                model=self._model,
                tokenizer=self._tokenizer,
                mel=self._mel(sound),
                num_frames=min(len(sound) // HOP_LENGTH, 3000),
                last_speech_timestamp=0.0,
            )
        timed = []
        for piece, entry in zip(pieces, entries, strict=True):
            start_ms, end_ms = (
                round(float(entry["start"]) * 1000),
                round(float(entry["end"]) * 1000),
            )
            right = 0 <= start_ms < end_ms <= window.duration_ms
            timed.append(Said(start_ms, end_ms, piece.tokens) if right else piece)
        return timed


def joint_languages(windows: Sequence[tuple[Window, Mapping[str, float]]]) -> dict[int, str]:
    """Returns the likeliest language of each sound over all of its windows.

    Args:
        windows: With the probability of every language; long ones count for more.
    """
    totals: dict[int, dict[str, float]] = {}
    for window, probabilities in windows:
        total = totals.setdefault(window.clip, {})
        for code, probability in probabilities.items():
            total[code] = total.get(code, 0.0) + probability * window.duration_ms
    return {clip: max(total, key=lambda code: total[code]) for clip, total in totals.items()}


def decoding_task(model: Any, options: Any, languages: Sequence[str]) -> Any:
    """Returns whisper's `DecodingTask` for windows of several languages in one batch.

    Whisper's own takes one language for all, or detects each window's by itself, which may
    split a sound between two languages.
    """
    import torch
    from whisper.decoding import DecodingTask

    class Task(DecodingTask):
        def _detect_language(self, audio_features: Any, tokens: Any) -> tuple[list[str], None]:
            if self.model.is_multilingual:
                codes = [self.tokenizer.to_language_token(code) for code in languages]
                tokens[:, self.sot_index + 1] = torch.tensor(codes)
            return list(languages), None

    return Task(model, options)


def halved(model: Any) -> Any:
    """Returns a model with the weights it multiplies by in float16, in place.

    Whisper keeps float32 weights and converts them in every layer at every token; converted once, a
    token reads a third of the memory. Its norms compute in float32 and stay.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            module.half()
    return model


def checkpoint_revision(path: Path) -> str:
    """Returns a hash of a checkpoint file's size and first megabyte."""
    from dataengine.records import digest

    with path.open("rb") as opened:
        return digest(str(path.stat().st_size), opened.read(1 << 20))
