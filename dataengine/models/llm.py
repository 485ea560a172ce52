# SPDX-License-Identifier: Apache-2.0
"""Prompt (with pictures or sound) -> text: language models in this process or behind HTTP.

Three ways to the same contract: ``http`` (vLLM, any OpenAI-compatible server), ``vllm`` (in the
stage's own actor) and ``transformers`` (a small model on any machine).

Every request carries the id of what it is about and a hash of what it shows; answers come back by
id, never by order.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from dataengine.models.answers import BAD_OUTPUT, Failure
from dataengine.needs import Endpoint, Need, Package, Weights
from dataengine.stage import Settings


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    Attributes:
        id: What it is about, e.g. a clip id; unique among the requests of a call.
        input_hash: `records.digest` of what the question shows: frames, sound or texts.
        prompt: The user's turn.
        system: The system's turn; empty sends none.
        images: JPEG bytes, in time order, shown before the prompt.
        audio: WAV bytes (mono 16 kHz), heard before the prompt.
        schema: JSON schema that the answer must follow; None takes free text.
        max_tokens: Most tokens of the answer.
    """

    id: str
    input_hash: str
    prompt: str
    system: str = ""
    images: tuple[bytes, ...] = ()
    audio: bytes | None = None
    schema: Mapping[str, Any] | None = None
    max_tokens: int = 256


COMMITTED = "what was committed is safe"
"""What a run over a corpus can say when a server goes away; in hints."""


def schema_prompt(request: Request) -> str:
    """Returns the prompt of a request, with its JSON schema in words where it has one.

    For models that nothing but their prompt can hold to a schema.
    """
    if request.schema is None:
        return request.prompt
    schema = json.dumps(request.schema, ensure_ascii=False)
    return (
        f"{request.prompt}\n\nAnswer with JSON that follows this schema, and nothing else: {schema}"
    )


def read_answer(text: str | None, *, truncated: bool = False) -> str | Failure:
    """Returns what a model answered, without the thoughts that come before it, or what is wrong.

    Args:
        text: All that was generated. Thoughts stand between ``<think>`` and ``</think>``; the chat
            templates of some models write the opening tag themselves, so it may be missing.
        truncated: Whether the limit of tokens ended it.
    """
    thought, ended, answer = (text or "").rpartition("</think>")
    if truncated:
        return Failure(BAD_OUTPUT, f"cut off at max_tokens: {answer.strip()[-60:]!r}")
    if not ended and answer.lstrip().startswith("<think>"):
        return Failure(BAD_OUTPUT, "thoughts without an answer")
    if not answer.strip():
        return Failure(BAD_OUTPUT, "thoughts without an answer" if thought else "empty answer")
    return answer.strip()


def check_ids(requests: Sequence[Request]) -> None:
    """Raises ValueError if two requests of a call have the same id."""
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise ValueError(f"two requests with the id {request.id}")
        seen.add(request.id)


def decode_picture(jpeg: bytes) -> Any:
    """Returns a picture of a request as PIL image, RGB.

    Raises:
        ValueError: If it does not decode.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(jpeg)) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # PIL's own error, truncated files, broken headers
        raise ValueError("a picture does not decode") from error


class LanguageModel(Protocol):
    """Answers questions."""

    model: str
    revision: str

    def answer(self, requests: Sequence[Request]) -> dict[str, str | Failure]:
        """Returns the answer, or why there is none, for the id of every request.

        Raises:
            EngineError: If no request can be answered, e.g. because a server stays away: an outage
                is not an item's fault, and must not fill a corpus with failures.
        """
        ...


class HttpLLMConfig(Settings):
    """Any OpenAI-compatible server: ``vllm serve``, ``transformers serve``, a hosted one."""

    kind: Literal["http"] = "http"
    base_url: str = Field(pattern=r"^https?://")
    """With ``/v1``, e.g. ``http://localhost:8000/v1``."""
    model: str
    """Name that the server serves."""
    revision: str = ""
    """What is noted in the provenance: a server does not say which revision it serves."""
    api_key_env: str = ""
    """Environment variable with the key; empty sends none. Keys never stand in a pipeline file."""
    concurrency: int = Field(default=32, ge=1)
    """Most requests under way at a time, per actor."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Limit for one request; one that takes longer twice is a `Failure`."""
    max_wait_s: float = Field(default=900.0, ge=0)
    """How long a server may be away (refused, 5xx, 429) without one answer in between, before the
    run stops."""
    structured: Literal["response_format", "structured_outputs", "none"] = "response_format"
    """How a JSON schema is sent: OpenAI's field, vLLM's own, or in the prompt alone."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of an answer; OpenAI's newer models know the latter only."""
    temperature: float | None = Field(default=0.0, ge=0)
    """0 is greedy; None sends none."""
    seed: int | None = 0
    """Sent with every request; None sends none."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, as the server names them, e.g.
    ``chat_template_kwargs: {enable_thinking: false}`` for Qwen3 on vLLM."""

    neutral: ClassVar[frozenset[str]] = frozenset(
        {"base_url", "api_key_env", "concurrency", "timeout_s", "max_wait_s"}
    )

    def needs(self) -> tuple[Need, ...]:
        """Returns the client and the server."""
        return (Package("openai"), Endpoint(self.base_url, self.model, self.api_key_env))


class VllmConfig(Settings):
    """vLLM in the stage's own actor; its ``resources.num_gpus`` is ``tensor_parallel_size``."""

    kind: Literal["vllm"] = "vllm"
    model: str
    """Hub id or local folder."""
    revision: str = ""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int | None = Field(default=None, ge=16)
    """Longest prompt and answer together, in tokens; None takes the model's own."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    max_images: int = Field(default=16, ge=1)
    """Most pictures per request."""
    neutral: ClassVar[frozenset[str]] = frozenset(
        {"tensor_parallel_size", "gpu_memory_utilization"}
    )
    temperature: float = Field(default=0.0, ge=0)
    seed: int = 0
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """For the chat template, e.g. ``{enable_thinking: false}`` for Qwen3."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``vllm.LLM``, as it names them."""

    def needs(self) -> tuple[Need, ...]:
        """Returns vLLM and the weights."""
        return (
            Package("vllm", "uv sync --extra ingest --extra vllm"),
            Weights("hub", self.model, self.revision),
        )


class TransformersLLMConfig(Settings):
    """A chat model of the transformers library, in the stage's own actor: any machine, slowly."""

    kind: Literal["transformers"] = "transformers"
    model: str
    """Hub id or local folder of a causal (or, with pictures or sound, a multimodal) chat model."""
    revision: str = ""
    modality: Literal["text", "image", "audio"] = "text"
    """What it is shown besides text."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=8, ge=1)
    """Most requests in one call of the model."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """For the chat template, e.g. ``{enable_thinking: false}`` for Qwen3."""
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    def needs(self) -> tuple[Need, ...]:
        """Returns the library and the weights."""
        return (Package("transformers"), Weights("hub", self.model, self.revision))


LLMConfig = Annotated[
    HttpLLMConfig | VllmConfig | TransformersLLMConfig, Field(discriminator="kind")
]


def build_llm(config: HttpLLMConfig | VllmConfig | TransformersLLMConfig) -> LanguageModel:
    """Returns the language model that a config names.

    Raises:
        DependencyError: If its package or its weights are missing.
    """
    match config:
        case HttpLLMConfig():
            from dataengine.models.llm_http import HttpLLM

            return HttpLLM(config)
        case VllmConfig():
            from dataengine.models.llm_vllm import VllmLLM

            return VllmLLM(config)
        case TransformersLLMConfig():
            from dataengine.models.llm_transformers import TransformersLLM

            return TransformersLLM(config)
