# SPDX-License-Identifier: Apache-2.0
"""Language models behind HTTP: any server that speaks OpenAI's chat completions.

What goes wrong is told apart, because each kind wants something else:

- an item's own fault (400, 413, 422, an unusable answer, two time-outs) is that item's `Failure`;
- a server that is away (refused, 5xx, 429, dropped connections) is waited for, for all items;
- a server that will never answer (wrong key, model not served, not an API at all) stops the run.

An item that makes the server fail looks like a server that is away. So after `_MOST_FAULTS` faults
of one item the server is asked something trivial: if it answers that and fails on the item once
more, the item is to blame.
"""

import asyncio
import base64
import logging
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from dataengine.errors import DependencyError, EngineError
from dataengine.models.answers import BAD_OUTPUT, REFUSED, TIMEOUT, Failure
from dataengine.models.llm import (
    COMMITTED,
    HttpLLMConfig,
    Request,
    check_ids,
    read_answer,
    schema_prompt,
)

logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_CONNECT_S = 10.0
_MOST_FAULTS = 3
_MOST_REFUSALS = 32
"""A server that refuses so many requests, and has never answered one, does not know a field of ours."""


@dataclass(frozen=True, slots=True)
class _Again:
    """A try to be repeated.

    Attributes:
        why: One line.
        failure: What the item ends as if it is to blame; None if it cannot be.
        after_s: How long the server asks to be left alone.
    """

    why: str
    failure: Failure | None = None
    after_s: float | None = None


class HttpLLM:
    """Asks an OpenAI-compatible server, many requests at a time.

    It may be called from any thread, also from one that runs an event loop: requests are sent by a
    loop of its own.

    Args:
        config: Which server, and how patiently.

    Raises:
        DependencyError: If the client or the key is missing.
    """

    def __init__(self, config: HttpLLMConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise DependencyError(
                f"The openai client is missing ({error})", "uv sync --extra ingest"
            ) from error
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not key:
            raise DependencyError(
                f"{config.api_key_env} holds no key for {config.base_url}",
                f"export {config.api_key_env}=... on every node",
            )
        self.model = config.model
        self.revision = config.revision
        self._config = config
        # A key or an organisation that OPENAI_* variables name is meant for another server.
        self._headers: dict[str, Any] = {
            "OpenAI-Organization": openai.Omit(),
            "OpenAI-Project": openai.Omit(),
        }
        if not key:
            self._headers["Authorization"] = openai.Omit()
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=key or "none",
            max_retries=0,
            # The limit of a whole request is ours: this library's would start anew at every byte.
            timeout=openai.Timeout(None, connect=min(_CONNECT_S, config.timeout_s / 2)),
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._away_since: float | None = None
        self._num_answered = 0
        self._num_refused = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="llm-http", daemon=True).start()

    def answer(self, requests: Sequence[Request]) -> dict[str, str | Failure]:
        """Returns the answer, or why there is none, for the id of every request.

        Raises:
            EngineError: If the server stays away for ``max_wait_s``, or will never answer.
        """
        check_ids(requests)
        if not requests:
            return {}
        answers = asyncio.run_coroutine_threadsafe(self._answer_all(requests), self._loop)
        try:
            return answers.result()
        except BaseException:
            answers.cancel()
            raise

    async def _answer_all(self, requests: Sequence[Request]) -> dict[str, str | Failure]:
        self._away_since = None
        tasks = {request.id: asyncio.create_task(self._answer(request)) for request in requests}
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return {id_: task.result() for id_, task in tasks.items()}

    async def _answer(self, request: Request) -> str | Failure:
        """Tries until there is an answer, or somebody to blame."""
        num_faults: dict[str, int] = {}
        answers_others = False
        num_tries = 0
        # A request keeps its slot while it waits, so a server in trouble is asked less, not more.
        async with self._slots:
            while True:
                outcome = await self._try(request)
                if not isinstance(outcome, _Again):
                    self._is_there()
                    return outcome
                if (failure := outcome.failure) is not None:
                    num_faults[failure.reason] = num_faults.get(failure.reason, 0) + 1
                    most = 2 if failure.reason == TIMEOUT else _MOST_FAULTS
                    if num_faults[failure.reason] >= most:
                        if not await self._answers_others():
                            answers_others = False
                        elif answers_others or failure.reason == TIMEOUT:
                            return failure
                        else:
                            answers_others = True
                            continue
                await self._wait(outcome, num_tries)
                num_tries += 1

    async def _try(self, request: Request) -> str | Failure | _Again:
        import openai

        tag = f"{quote(request.id)}#{quote(request.input_hash)}"
        try:
            async with asyncio.timeout(self._config.timeout_s):
                reply = await self._client.chat.completions.with_raw_response.create(
                    **self._body(request), extra_headers={**self._headers, "X-Request-Id": tag}
                )
                completion = reply.parse()
        except TimeoutError:
            detail = f"no answer within {self._config.timeout_s:g} s"
            return _Again(detail, Failure(TIMEOUT, detail))
        except openai.APIStatusError as error:
            return await self._status(error)
        except openai.APIConnectionError as error:
            return _disconnected(error)
        except (openai.APIError, ValueError) as error:
            return _unusable(_line(error))
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            return _unusable(f"not a chat completion: {str(completion)[:200]!r}")
        for echo in (reply.headers.get("x-request-id"), completion.id):
            if echo and "#" in echo and tag not in echo:
                return _unusable(f"asked as {tag}, answered as {echo}")
        self._num_answered += 1
        message, reason = choices[0].message, choices[0].finish_reason
        if message.refusal or reason == "content_filter":
            return Failure(REFUSED, _line(message.refusal or "content filter"))
        return read_answer(message.content, truncated=reason == "length")

    async def _status(self, error: Any) -> Failure | _Again:
        """Says what an HTTP status other than 2xx means."""
        status = error.status_code
        why = f"HTTP {status}: {_line(error.body or error)}"
        if status in (401, 403):
            hint = (
                f"check the key in {self._config.api_key_env}"
                if self._config.api_key_env
                else "name the environment variable with its key in api_key_env"
            )
            raise EngineError(f"{self._config.base_url} refuses us: {why}", f"{hint}; {COMMITTED}")
        if status in (404, 405):
            raise EngineError(
                f"{self._config.base_url} does not serve {self._config.model}: {why}",
                f"{await self._served()}; {COMMITTED}",
            )
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise EngineError(f"{self._config.base_url}: {why}", f"pay for more; {COMMITTED}")
        if status in (408, 409, 425, 429):
            return _Again(why, after_s=_retry_after(error.response.headers))
        if status >= 500:
            after_s = _retry_after(error.response.headers)
            return _Again(why, Failure(REFUSED, why), after_s)
        self._num_refused += 1
        if not self._num_answered and self._num_refused >= _MOST_REFUSALS:
            raise EngineError(
                f"{self._config.base_url} has refused all of {self._num_refused} requests: {why}",
                "check the model, its limits and the settings structured and extra_body",
            )
        return Failure(REFUSED, why)

    async def _answers_others(self) -> bool:
        """Asks for one word and returns whether the server answered, be it with a refusal."""
        import openai

        body = self._body(Request("probe", "", "Say yes.", max_tokens=1))
        try:
            async with asyncio.timeout(self._config.timeout_s):
                reply = await self._client.chat.completions.create(
                    **body, extra_headers=self._headers
                )
        except openai.APIStatusError as error:
            there = error.status_code < 500 and error.status_code not in (408, 409, 425, 429)
        except (TimeoutError, openai.APIError, ValueError):
            there = False
        else:
            there = bool(getattr(reply, "choices", None))
        if there:
            self._is_there()
        return there

    def _is_there(self) -> None:
        if self._away_since is not None:
            logger.info("%s answers", self._config.base_url)
        self._away_since = None

    async def _wait(self, again: _Again, num_tries: int) -> None:
        """Sleeps before the next try.

        Raises:
            EngineError: If the server has not answered anything for too long.
        """
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            logger.warning("%s: %s; waiting", self._config.base_url, again.why)
        left_s = self._away_since + self._config.max_wait_s - now
        backoff_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(num_tries, 10))
        wait_s = again.after_s if again.after_s is not None else backoff_s
        if left_s <= 0 or (again.after_s is not None and again.after_s > left_s):
            asked = f", which asks to wait {again.after_s:g} s" if again.after_s else ""
            raise EngineError(
                f"No answer from {self._config.model} at {self._config.base_url}{asked} "
                f"(max_wait_s is {self._config.max_wait_s:g}): {again.why}",
                f"{COMMITTED}; start the server and run the same command again. If it is "
                "overloaded, lower concurrency or raise timeout_s and max_wait_s",
            )
        # Spread, so that many actors do not come back at the same moment; never before Retry-After.
        spread = random.uniform(1.0, 1.2) if again.after_s is not None else random.uniform(0.5, 1.0)
        await asyncio.sleep(min(wait_s * spread, max(left_s, 0.01)))

    async def _served(self) -> str:
        """Returns a sentence on what the server serves."""
        import openai

        try:
            async with asyncio.timeout(_CONNECT_S):
                models = await self._client.models.list(extra_headers=self._headers)
                names = [model.id for model in models.data]
        except (TimeoutError, openai.APIError, ValueError, TypeError, AttributeError):
            return "base_url must end in the path before /chat/completions, mostly /v1"
        return f"it serves {', '.join(names[:20])}" if names else "it serves no model"

    def _body(self, request: Request) -> dict[str, Any]:
        """Returns the arguments of the client for one request."""
        config = self._config
        extra: dict[str, Any] = dict(config.extra_body)
        prompt = request.prompt
        body: dict[str, Any] = {
            "model": config.model,
            config.max_tokens_field: request.max_tokens,
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.seed is not None:
            body["seed"] = config.seed
        if request.schema is not None:
            match config.structured:
                case "response_format":
                    body["response_format"] = {
                        "type": "json_schema",
                        "json_schema": {"name": "answer", "schema": dict(request.schema)},
                    }
                case "structured_outputs":
                    extra["structured_outputs"] = {"json": dict(request.schema)}
                case "none":
                    prompt = schema_prompt(request)
        return body | {
            "messages": _messages(request, prompt),
            "extra_body": extra,
        }


def _messages(request: Request, prompt: str) -> list[dict[str, Any]]:
    """Returns the turns of a request; media stand before the question, as `Request` says."""
    parts: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"},
        }
        for jpeg in request.images
    ]
    if request.audio is not None:
        data = base64.b64encode(request.audio).decode()
        parts.append({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
    content = [*parts, {"type": "text", "text": prompt}] if parts else prompt
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": content}]


def _disconnected(error: Exception) -> _Again:
    """Tells a server that was not reached from one that took the question and went away."""
    cause = error.__cause__ or error
    why = f"{type(cause).__name__}: {_line(cause)}"
    # By name, for the client is built on one of two libraries. A question can kill a server.
    reached = type(cause).__name__ not in ("ConnectError", "ConnectTimeout")
    return _Again(why, Failure(REFUSED, why) if reached else None)


def _unusable(why: str) -> _Again:
    """Judges a 2xx reply that is no answer to the question."""
    return _Again(why, Failure(BAD_OUTPUT, why))


def _retry_after(headers: Any) -> float | None:
    """Returns the seconds a Retry-After header asks for, as a number or as a date; None without."""
    value = (headers.get("retry-after") or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _line(error: Any) -> str:
    """Returns the one line that says what is wrong."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return " ".join(str(error).split())[:300]
