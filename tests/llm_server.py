# SPDX-License-Identifier: Apache-2.0
"""Language model servers for tests: a real one, and one that misbehaves as told."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A server in a process of its own; killed at the end of the ``with`` block.

    Subclasses and callers give the command; ``start`` waits until ``/health`` answers.
    """

    def __init__(
        self,
        command: Callable[[int], list[str]],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        start_s: float = 120.0,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self._command = command(self.port)
        self._log = log
        self._env = {**os.environ, **(env or {})}
        self._start_s = start_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._env, start_new_session=True
            )
        end = time.monotonic() + self._start_s
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"server did not start:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Ends it as a power cut would, children and all."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


def transformers_server(model: Path, log: Path) -> ServerProcess:
    """``transformers serve`` of a local model, served under the name of its folder."""

    def command(port: int) -> list[str]:
        start = "from transformers.cli.transformers import main; main()"
        return [
            *(sys.executable, "-c", start, "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu"),
        ]

    return ServerProcess(command, log, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


def vllm_server(python: Path, model: Path, log: Path, *, max_model_len: int) -> ServerProcess:
    """``vllm serve`` of a local model on the processor, served as ``tiny``.

    Args:
        python: One that has vLLM: `tests.vllm_env.vllm_python`.
        model: Folder.
        log: File that its output is appended to.
        max_model_len: Longest prompt and answer together, in tokens.
    """

    def command(port: int) -> list[str]:
        return [
            *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(max_model_len)),
            "--structured-outputs-config",
            '{"backend": "xgrammar", "disable_any_whitespace": true}',
        ]

    return ServerProcess(command, log, env=VLLM_ENV, start_s=300)


VLLM_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Of a small vLLM: one GiB of cache, and nobody is told of it."""


@dataclass(frozen=True)
class Reply:
    """What a `FaultServer` does with one request."""

    text: str | None = None
    """The answer; None says nothing."""
    status: int = 200
    message: str = ""
    """Of the error, with a status of 400 and more."""
    finish_reason: str = "stop"
    headers: Mapping[str, str] = field(default_factory=dict)
    """May replace the echoed ``X-Request-Id``."""
    delay_s: float = 0.0
    raw: bytes | None = None
    """The whole body, instead of a completion."""
    hang_up: bool = False
    """Closes the connection without a word."""


@dataclass(frozen=True)
class Asked:
    """A request that reached a `FaultServer`."""

    prompt: str
    body: dict[str, Any]
    headers: dict[str, str]
    time_s: float

    @property
    def tag(self) -> str:
        return self.headers.get("x-request-id", "")


class FaultServer:
    """Answers as OpenAI's API does, with what ``script(prompt, n)`` says.

    ``n`` counts the requests with this prompt, from 0. Without a script it echoes. It can be stopped
    and started again on its port: in between connections are refused.
    """

    def __init__(
        self,
        script: Callable[[str, int], Reply] | None = None,
        models: tuple[str, ...] = ("tiny",),
        key: str = "",
    ) -> None:
        self.script = script or (lambda prompt, n: Reply(f"echo {prompt}"))
        self.models = models
        self.key = key
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._at_once = 0
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> Self:
        self._server = _Listener(("127.0.0.1", self.port), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _reply(self, asked: Asked) -> Reply:
        if self.key and asked.headers.get("authorization") != f"Bearer {self.key}":
            return Reply(status=401, message="wrong key")
        if asked.body["model"] not in self.models:
            return Reply(status=404, message=f"The model {asked.body['model']} does not exist.")
        with self._lock:
            self.asked.append(asked)
            n = self._counts.get(asked.prompt, 0)
            self._counts[asked.prompt] = n + 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.script(asked.prompt, n)
            time.sleep(reply.delay_s)
        finally:
            with self._lock:
                self._at_once -= 1
        return reply

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            # One request per connection: a stopped server then answers nobody.
            protocol_version = "HTTP/1.0"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # the client has given up

            def do_GET(self) -> None:
                models = {"object": "list", "data": [{"id": name} for name in server.models]}
                self.send(200, json.dumps(models).encode(), {"Content-Type": "application/json"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(_prompt(body), body, headers, time.monotonic())
                reply = server._reply(asked)
                if reply.hang_up:
                    self.close_connection = True
                    return
                sent = {"Content-Type": "application/json", "X-Request-Id": asked.tag}
                sent |= reply.headers
                data = reply.raw if reply.raw is not None else _completion(asked, reply)
                self.send(reply.status, data, sent)

        return Handler


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def _prompt(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _completion(asked: Asked, reply: Reply) -> bytes:
    if reply.status >= 400:
        return json.dumps({"error": {"message": reply.message, "type": "error"}}).encode()
    message = {"role": "assistant", "content": reply.text}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    completion = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": asked.body["model"],
        "choices": [choice],
    }
    return json.dumps(completion).encode()
