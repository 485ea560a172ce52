# SPDX-License-Identifier: Apache-2.0
"""Chat models of the transformers library, in the stage's own actor: text, pictures or sound.

Answers are greedy. Prompts of one batch are padded on the left and masked, and nothing that looks at
padding (such as a repetition penalty) is left on: who else is in the batch does not change an answer.
"""

import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np

from dataengine.errors import DependencyError
from dataengine.models.answers import REFUSED, Batcher, Failure
from dataengine.models.llm import (
    Request,
    TransformersLLMConfig,
    check_ids,
    decode_picture,
    read_answer,
    schema_prompt,
)
from dataengine.models.pretrained import load_model, load_processor, model_id, model_revision


class TransformersLLM:
    """Answers batch after batch; batches are halved when a GPU runs out of memory.

    A JSON schema is put into the prompt: the caller checks the answer.

    Args:
        config: Which model, and what it is shown.

    Raises:
        DependencyError: If transformers or the weights are missing, or have no chat template.
    """

    def __init__(self, config: TransformersLLMConfig) -> None:
        try:
            import transformers
        except ImportError as error:
            raise DependencyError(
                f"transformers is missing ({error})", "uv sync --extra ingest"
            ) from error
        processors = {
            "text": transformers.AutoTokenizer,
            "image": transformers.AutoProcessor,
            "audio": transformers.AutoProcessor,
        }
        classes = {
            "text": transformers.AutoModelForCausalLM,
            "image": transformers.AutoModelForImageTextToText,
            "audio": transformers.AutoModelForMultimodalLM,
        }
        self._modality = config.modality
        self._processor = load_processor(processors[config.modality], config.model, config.revision)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        if not getattr(self._processor, "chat_template", None):
            raise DependencyError(
                f"{config.model} has no chat template", "name an instruction-tuned model"
            )
        if config.modality != "text" and self._processor is self._tokenizer:
            raise DependencyError(
                f"{config.model} takes no {config.modality}",
                "name a model that does, or set modality: text",
            )
        model = load_model(
            classes[config.modality], config.model, config.revision, device=config.device
        )
        self.model = model_id(config.model)
        self.revision = model_revision(config.model, model)
        # Models of the Omni kind speak, too; their answers in text come from this part.
        self._model = getattr(model, "thinker", model)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._ends = _end_tokens(self._model, self._tokenizer)
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            eos_token_id=sorted(self._ends),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        text_config = self._model.config.get_text_config()
        self._max_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self._template = dict(config.chat_template_kwargs)
        self._batcher = Batcher(config.batch_size)

    def answer(self, requests: Sequence[Request]) -> dict[str, str | Failure]:
        """Returns the answer, or why there is none, for the id of every request."""
        check_ids(requests)
        answers: dict[str, str | Failure] = {}
        # A processor takes a batch of which all show something, or none does.
        batches: dict[bool, list[tuple[Request, Sequence[Any]]]] = {True: [], False: []}
        for request in requests:
            try:
                media = self._media(request)
            except (ValueError, wave.Error, EOFError) as error:
                answers[request.id] = Failure(REFUSED, f"cannot be shown: {_line(error)}")
            else:
                batches[bool(media)].append((request, media))
        for batch in batches.values():
            found = self._batcher.run(batch, self._generate)
            answers |= {request.id: text for (request, _), text in zip(batch, found, strict=True)}
        return {request.id: answers[request.id] for request in requests}

    def _media(self, request: Request) -> Sequence[Any]:
        """Returns the pictures or the sound of a request, decoded.

        Raises:
            ValueError, wave.Error, EOFError: If the model takes no such thing, or it does not decode.
        """
        shown = {"image": bool(request.images), "audio": request.audio is not None}
        for modality, is_shown in shown.items():
            if is_shown and modality != self._modality:
                raise ValueError(f"{modality} for a model with modality: {self._modality}")
        if request.images:
            return [decode_picture(jpeg) for jpeg in request.images]
        if request.audio is not None:
            return [_sound(request.audio, self._processor.feature_extractor.sampling_rate)]
        return []

    def _generate(self, batch: Sequence[tuple[Request, Sequence[Any]]]) -> list[str | Failure]:
        """Returns one answer per request, in order."""
        import torch

        requests = [request for request, _ in batch]
        try:
            inputs = self._encode(batch)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            # A processor that refuses one item, e.g. a picture a hundred times as wide as high.
            if len(batch) == 1:
                return [Failure(REFUSED, _line(error))]
            return [self._generate([item])[0] for item in batch]
        max_new = max(request.max_tokens for request in requests)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        refused = [
            self._refusal(length, request)
            for length, request in zip(lengths, requests, strict=True)
        ]
        if any(refused):
            fitting = [item for item, refusal in zip(batch, refused, strict=True) if not refusal]
            rest = iter(self._generate(fitting) if fitting else ())
            return [refusal or next(rest) for refusal in refused]
        inputs = inputs.to(self._model.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        with torch.inference_mode():
            generated = self._model.generate(**inputs, max_new_tokens=max_new)
        rows = generated[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._read(row, request) for row, request in zip(rows, requests, strict=True)]

    def _encode(self, batch: Sequence[tuple[Request, Sequence[Any]]]) -> Any:
        """Returns the model's inputs: left-padded tokens, their mask, pixels or spectra."""
        texts = [
            self._processor.apply_chat_template(
                self._messages(request, media),
                tokenize=False,
                add_generation_prompt=True,
                **self._template,
            )
            for request, media in batch
        ]
        # Special tokens are the template's business: a second BOS would change answers.
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        media = [shown for _, shown in batch if shown]
        if not media or self._modality == "text":
            return self._tokenizer(texts, **options)
        if self._modality == "image":
            return self._processor(text=texts, images=media, **options)
        rate = self._processor.feature_extractor.sampling_rate
        sounds = [sound for (sound,) in media]
        return self._processor(text=texts, audio=sounds, sampling_rate=rate, **options)

    def _messages(self, request: Request, media: Sequence[Any]) -> list[dict[str, Any]]:
        """Returns the turns of a request; media stand before the question."""
        prompt = schema_prompt(request)
        if self._modality == "text":
            system = [{"role": "system", "content": request.system}] if request.system else []
            return [*system, {"role": "user", "content": prompt}]
        parts = [{"type": self._modality} for _ in media]
        if self._modality == "audio":
            # Templates of audio models look for the key, not for the type.
            parts = [{"type": "audio", "audio_url": ""} for _ in media]
        system = (
            [{"role": "system", "content": [{"type": "text", "text": request.system}]}]
            if request.system
            else []
        )
        return [*system, {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]

    def _refusal(self, num_tokens: int, request: Request) -> Failure | None:
        """Returns why a prompt cannot be answered by this model, None if it can."""
        if self._max_positions is None or num_tokens + request.max_tokens <= self._max_positions:
            return None
        return Failure(
            REFUSED,
            f"{num_tokens} tokens of prompt and {request.max_tokens} of answer are more than "
            f"{self._max_positions}",
        )

    def _read(self, row: Sequence[int], request: Request) -> str | Failure:
        """Returns the answer in generated tokens, which go on with padding after its end."""
        own = row[: request.max_tokens]
        length = next((i for i, token in enumerate(own) if token in self._ends), None)
        text = self._tokenizer.decode(own[:length], skip_special_tokens=True)
        return read_answer(text, truncated=length is None)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Returns the tokens that end an answer: the model's own, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _sound(wav: bytes, sampling_rate: int) -> np.ndarray:
    """Returns the samples of a mono 16-bit WAV, float32 in -1 to 1, shape (samples,).

    Raises:
        ValueError: If it is of another kind, or empty.
        wave.Error, EOFError: If it is no WAV.
    """
    with wave.open(io.BytesIO(wav)) as opened:
        kind = (opened.getnchannels(), opened.getsampwidth(), opened.getframerate())
        if kind != (1, 2, sampling_rate):
            raise ValueError(f"{kind} instead of mono, 16 bit, {sampling_rate} Hz")
        samples = np.frombuffer(opened.readframes(opened.getnframes()), "<i2")
    if not len(samples):
        raise ValueError("a WAV without samples")
    return samples.astype(np.float32) / 32768


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
