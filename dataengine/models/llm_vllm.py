# SPDX-License-Identifier: Apache-2.0
"""Language models in the stage's own actor, by vLLM.

The actor needs ``resources.num_gpus`` equal to ``tensor_parallel_size``: Ray then shows it so many
GPUs, and vLLM's own worker processes (executor ``mp``) share them. More than one node is a server's
job: run ``vllm serve`` and use ``kind: http``.
"""

import base64
import logging
import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from dataengine.errors import DependencyError, EngineError
from dataengine.models.answers import REFUSED, Failure
from dataengine.models.llm import Request, VllmConfig, check_ids, decode_picture, read_answer
from dataengine.models.pretrained import model_id, model_revision

logger = logging.getLogger(__name__)

_ENV = {
    # The engine runs in the actor itself, so that it ends with it: a process of its own outlives an
    # actor that is killed, and keeps the GPU. Scheduling is reproducible only this way, too.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # An actor has threads, and may have touched CUDA: its children cannot be forks.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Set before vLLM is imported, unless the user has set them."""
_MOST_REFUSALS = 32
"""A model that refuses so many requests, and has never answered one, is the wrong one for them."""


class VllmLLM:
    """Answers many requests at once; vLLM batches them itself.

    Args:
        config: Which model, and how much of the GPU.

    Raises:
        DependencyError: If vLLM, its GPUs or the weights are missing.
    """

    def __init__(self, config: VllmConfig) -> None:
        for name, value in _ENV.items():
            os.environ.setdefault(name, value)
        try:
            import torch
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise DependencyError(
                f"vLLM is missing ({error})", "uv sync --extra ingest --extra vllm"
            ) from error
        if 0 < torch.cuda.device_count() < config.tensor_parallel_size:
            raise DependencyError(
                f"{config.model} wants {config.tensor_parallel_size} GPUs, "
                f"the stage's actor sees {torch.cuda.device_count()}",
                f"set resources.num_gpus: {config.tensor_parallel_size} of its stage",
            )
        try:
            self._llm = vllm.LLM(**_arguments(config))
        except Exception as error:  # vLLM, transformers, CUDA and the hub raise all kinds
            raise DependencyError(
                f"vLLM cannot run {config.model}: {_line(error)}",
                "lower max_model_len or gpu_memory_utilization if memory is short",
            ) from error
        self._config = config
        self._lock = threading.Lock()
        self._has_answered = False
        self._num_refused = 0
        self.model = model_id(config.model)
        loaded = SimpleNamespace(config=self._llm.llm_engine.model_config.hf_config)
        self.revision = model_revision(config.model, loaded) or config.revision

    def answer(self, requests: Sequence[Request]) -> dict[str, str | Failure]:
        """Returns the answer, or why there is none, for the id of every request.

        Raises:
            EngineError: If vLLM broke down, or refuses everything.
        """
        check_ids(requests)
        answers: dict[str, str | Failure] = {}
        turns: list[tuple[Request, list[dict[str, Any]]]] = []
        for request in requests:
            try:
                turns.append((request, self._messages(request)))
            except ValueError as error:
                answers[request.id] = Failure(REFUSED, _line(error))
        with self._lock:
            answers |= self._chat(turns)
        for answer in answers.values():
            refused = isinstance(answer, Failure) and answer.reason == REFUSED
            self._num_refused += refused
            self._has_answered |= not refused
        if self._num_refused >= _MOST_REFUSALS and not self._has_answered:
            why = next(answer for answer in answers.values() if isinstance(answer, Failure))
            raise EngineError(
                f"{self.model} has refused all of {self._num_refused} requests: {why.detail}",
                "is it a model for pictures or sound, and max_model_len long enough?",
            )
        return {request.id: answers[request.id] for request in requests}

    def _chat(
        self, turns: Sequence[tuple[Request, list[dict[str, Any]]]]
    ) -> dict[str, str | Failure]:
        """Asks all at once; if vLLM refuses, in halves, until who is to blame is alone."""
        if not turns:
            return {}
        requests = [request for request, _ in turns]
        try:
            outputs = self._llm.chat(
                [messages for _, messages in turns],
                [self._sampling(request) for request in requests],
                use_tqdm=False,
                chat_template_kwargs=dict(self._config.chat_template_kwargs) or None,
            )
        except Exception as error:
            if not _is_refusal(error):
                raise EngineError(
                    f"vLLM broke down with {self.model}: {type(error).__name__}: {_line(error)}",
                    "what was committed is safe; run the same command again, with a lower "
                    "max_model_len or gpu_memory_utilization if memory was short",
                ) from error
            if len(turns) == 1:
                return {requests[0].id: Failure(REFUSED, _line(error))}
            half = len(turns) // 2
            return self._chat(turns[:half]) | self._chat(turns[half:])
        _check_pairs(requests, outputs)
        return {
            request.id: read_answer(
                output.outputs[0].text, truncated=output.outputs[0].finish_reason == "length"
            )
            for request, output in zip(requests, outputs, strict=True)
        }

    def _sampling(self, request: Request) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

        structured = None
        if request.schema is not None:
            structured = StructuredOutputsParams(json=dict(request.schema))
        return SamplingParams(
            temperature=self._config.temperature,
            seed=self._config.seed,
            max_tokens=request.max_tokens,
            structured_outputs=structured,
        )

    def _messages(self, request: Request) -> list[dict[str, Any]]:
        """Returns the turns of a request; media stand before the question.

        Raises:
            ValueError: If there are too many pictures, or one does not decode.
        """
        if len(request.images) > self._config.max_images:
            raise ValueError(
                f"{len(request.images)} pictures, max_images is {self._config.max_images}"
            )
        parts: list[dict[str, Any]] = []
        for jpeg in request.images:
            parts.append({"type": "image_pil", "image_pil": decode_picture(jpeg)})
        if request.audio is not None:
            data = base64.b64encode(request.audio).decode()
            parts.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
        content = [*parts, {"type": "text", "text": request.prompt}] if parts else request.prompt
        system = [{"role": "system", "content": request.system}] if request.system else []
        return [*system, {"role": "user", "content": content}]


def _arguments(config: VllmConfig) -> dict[str, Any]:
    """Returns the arguments of ``vllm.LLM``; those of ``config.engine`` have the last word."""
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "seed": config.seed,
        # Memory is set aside for the most that a request may hold; videos come as pictures.
        "limit_mm_per_prompt": {"image": config.max_images, "audio": 1, "video": 0},
        # A model may spend all its tokens on white space between the fields otherwise. vLLM forbids it
        # only with a backend that is named: "xgrammar" is what "auto" takes for schemas like ours.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if config.revision:
        arguments |= {"revision": config.revision, "tokenizer_revision": config.revision}
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if config.tensor_parallel_size > 1:
        # Inside an actor vLLM might choose Ray, which would ask for GPUs that the actor holds.
        arguments["distributed_executor_backend"] = "mp"
    return arguments | config.engine


def _check_pairs(requests: Sequence[Request], outputs: Sequence[Any]) -> None:
    """Makes sure that the n-th output belongs to the n-th request.

    vLLM numbers requests as they come in and sorts its outputs by number. Should that ever change,
    the prompts tell.

    Raises:
        EngineError: If outputs are missing, unfinished, unsorted, or show another's prompt.
    """
    numbers = [int(output.request_id) for output in outputs]
    prompts = [" ".join((output.prompt or "").split()) for output in outputs]
    right = len(outputs) == len(requests) and all(output.finished for output in outputs)
    right = right and all(one < two for one, two in pairwise(numbers))
    for i, request in enumerate(requests if right else ()):
        question = " ".join(request.prompt.split())
        # A template that rewrites the question proves nothing; another's output that shows it does.
        if question not in prompts[i] and any(question in prompt for prompt in prompts):
            right = False
    if not right:
        raise EngineError("vLLM's outputs do not belong to our requests", "try another version")


def _is_refusal(error: Exception) -> bool:
    """Tells a request that vLLM does not take (too long, no pictures, bad schema) from a breakdown."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"ValueError", "VLLMClientError", "VLLMValidationError", "TemplateError"})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
