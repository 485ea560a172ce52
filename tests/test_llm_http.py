# SPDX-License-Identifier: Apache-2.0
import base64
import json
import pickle
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from dataengine.errors import DependencyError, EngineError
from dataengine.models.answers import BAD_OUTPUT, REFUSED, TIMEOUT, Failure
from dataengine.models.llm import HttpLLMConfig, Request, build_llm, read_answer, schema_prompt
from dataengine.models.llm_http import HttpLLM
from dataengine.needs import Endpoint, Package
from tests.llm_server import FaultServer, Reply, free_port, transformers_server
from tests.tiny_llm import save_tiny_llm

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def requests(num: int, **fields) -> list[Request]:
    return [Request(f"clip{i}", f"hash{i}", f"prompt {i}", **fields) for i in range(num)]


def ask(server: FaultServer, asked, **settings):
    config = HttpLLMConfig(base_url=server.base_url, model="tiny", **settings)
    return HttpLLM(config).answer(asked)


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch):
    monkeypatch.setattr("dataengine.models.llm_http._FIRST_WAIT_S", 0.02)


def test_answers_come_back_under_their_ids_in_whatever_order_they_arrive():
    def script(prompt: str, n: int) -> Reply:
        return Reply(f"echo {prompt}", delay_s=0.1 if prompt.endswith(("0", "3")) else 0)

    with FaultServer(script) as server:
        answers = ask(server, requests(20), concurrency=4)
    assert answers == {f"clip{i}": f"echo prompt {i}" for i in range(20)}
    assert 2 <= server.most_at_once <= 4
    assert sorted(asked.tag for asked in server.asked) == sorted(
        f"clip{i}#hash{i}" for i in range(20)
    )


def test_no_requests_ask_nobody():
    config = HttpLLMConfig(base_url=f"http://127.0.0.1:{free_port()}/v1", model="tiny")
    assert HttpLLM(config).answer([]) == {}


def test_two_requests_of_one_id_are_a_programming_error():
    with FaultServer() as server, pytest.raises(ValueError, match="clip0"):
        ask(server, [*requests(1), *requests(1)])


def test_what_is_sent():
    request = Request(
        "clip/ü",
        "h",
        "What is this?",
        system="Be brief.",
        images=(b"jpeg1", b"jpeg2"),
        audio=b"wav",
        schema=SCHEMA,
        max_tokens=7,
    )
    with FaultServer() as server:
        ask(server, [request], extra_body={"top_k": 3})
        ask(
            server,
            [request],
            structured="structured_outputs",
            max_tokens_field="max_completion_tokens",
        )
        ask(server, [request], structured="none", temperature=None, seed=None)
    first, second, third = (asked.body for asked in server.asked)
    assert server.asked[0].tag == "clip/%C3%BC#h"
    assert "authorization" not in server.asked[0].headers
    system, user = first["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in user["content"]] == [
        "image_url",
        "image_url",
        "input_audio",
        "text",
    ]
    urls = [part["image_url"]["url"] for part in user["content"][:2]]
    assert [base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in urls] == [
        b"jpeg1",
        b"jpeg2",
    ]
    sound = user["content"][2]["input_audio"]
    assert (base64.b64decode(sound["data"]), sound["format"]) == (b"wav", "wav")
    assert user["content"][3]["text"] == "What is this?"
    assert first["response_format"]["json_schema"]["schema"] == SCHEMA
    assert (first["max_tokens"], first["temperature"], first["seed"], first["top_k"]) == (
        7,
        0,
        0,
        3,
    )
    assert second["structured_outputs"] == {"json": SCHEMA}
    assert "response_format" not in second
    assert second["max_completion_tokens"] == 7
    assert "max_tokens" not in second
    assert not {"response_format", "structured_outputs", "temperature", "seed"} & set(third)
    assert json.dumps(SCHEMA) in third["messages"][1]["content"][-1]["text"]
    assert not any(name.startswith("guided") for body in (first, second, third) for name in body)


def test_a_plain_question_is_sent_as_plain_text():
    with FaultServer() as server:
        ask(server, requests(1))
    assert server.asked[0].body["messages"] == [{"role": "user", "content": "prompt 0"}]


def test_the_key_is_read_from_the_environment_and_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not yours")
    monkeypatch.setenv("OPENAI_ORG_ID", "not yours")
    monkeypatch.setenv("MY_KEY", "secret")
    with FaultServer(key="secret") as server:
        assert ask(server, requests(1), api_key_env="MY_KEY") == {"clip0": "echo prompt 0"}
    with FaultServer() as server:
        ask(server, requests(1))
    assert "not yours" not in str(server.asked[0].headers)


def test_a_key_that_is_not_there_is_named(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with FaultServer() as server, pytest.raises(DependencyError, match="MY_KEY"):
        ask(server, requests(1), api_key_env="MY_KEY")


def test_a_wrong_key_stops_the_run_at_once(monkeypatch):
    monkeypatch.setenv("MY_KEY", "wrong")
    with (
        FaultServer(key="secret") as server,
        pytest.raises(EngineError, match="wrong key") as caught,
    ):
        ask(server, requests(3), api_key_env="MY_KEY")
    assert "MY_KEY" in caught.value.hint
    assert "secret" not in caught.value.hint


def test_a_model_that_is_not_served_stops_the_run_and_says_what_is():
    with FaultServer(models=("qwen", "llama")) as server, pytest.raises(EngineError) as caught:
        ask(server, requests(3))
    assert "tiny" in caught.value.message
    assert "qwen, llama" in caught.value.hint


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_costs_that_item_alone(status: int):
    def script(prompt: str, n: int) -> Reply:
        if prompt == "prompt 1":
            return Reply(status=status, message="the prompt is too long")
        return Reply(prompt)

    with FaultServer(script) as server:
        answers = ask(server, requests(3))
    assert answers["clip0"] == "prompt 0"
    assert answers["clip2"] == "prompt 2"
    assert answers["clip1"] == Failure(REFUSED, f"HTTP {status}: the prompt is too long")


def test_a_server_that_refuses_everything_stops_the_run():
    with FaultServer(lambda prompt, n: Reply(status=422, message="unknown field")) as server:
        assert ask(server, requests(31))["clip30"] == Failure(REFUSED, "HTTP 422: unknown field")
        with pytest.raises(EngineError, match="unknown field"):
            ask(server, requests(32))


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_trouble_that_passes_costs_nothing(status: int):
    def script(prompt: str, n: int) -> Reply:
        return Reply(prompt) if n else Reply(status=status, message="try later")

    with FaultServer(script) as server:
        answers = ask(server, requests(5))
    assert answers == {f"clip{i}": f"prompt {i}" for i in range(5)}
    assert len(server.asked) == 10


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str):
    def script(prompt: str, n: int) -> Reply:
        if n:
            return Reply(prompt)
        at = datetime.now(UTC) + timedelta(seconds=2)
        value = "1" if form == "seconds" else format_datetime(at, usegmt=True)
        return Reply(status=429, headers={"Retry-After": value})

    with FaultServer(script) as server:
        assert ask(server, requests(1)) == {"clip0": "prompt 0"}
    first, second = (asked.time_s for asked in server.asked)
    assert second - first >= 0.99


def test_a_server_that_asks_for_more_patience_than_there_is_stops_the_run():
    with (
        FaultServer(lambda prompt, n: Reply(status=429, headers={"Retry-After": "3600"})) as server,
        pytest.raises(EngineError, match="wait 3600 s"),
    ):
        ask(server, requests(1), max_wait_s=60)


def test_a_server_that_stays_away_stops_the_run_and_says_which():
    config = HttpLLMConfig(
        base_url=f"http://127.0.0.1:{free_port()}/v1", model="tiny", max_wait_s=0.3
    )
    with pytest.raises(EngineError, match=config.base_url) as caught:
        HttpLLM(config).answer(requests(50))
    assert "committed is safe" in caught.value.hint
    assert pickle.loads(pickle.dumps(caught.value)).hint == caught.value.hint


def test_a_server_that_fails_on_everything_stops_the_run_and_fails_no_item():
    with FaultServer(lambda prompt, n: Reply(status=500)) as server, pytest.raises(EngineError):
        ask(server, requests(3), max_wait_s=0.5)


def test_a_server_that_hangs_stops_the_run_and_fails_no_item():
    with (
        FaultServer(lambda prompt, n: Reply("late", delay_s=5)) as server,
        pytest.raises(EngineError, match="no answer within"),
    ):
        ask(server, requests(3), timeout_s=0.1, max_wait_s=0.3)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(status=500, message="cannot decode the picture"), REFUSED),
        (Reply(hang_up=True), REFUSED),
        (Reply(raw=b"{ not json"), BAD_OUTPUT),
        (Reply(raw=b'{"choices": []}'), BAD_OUTPUT),
        (Reply(raw=b"<html>", headers={"Content-Type": "text/html"}), BAD_OUTPUT),
        (Reply("x", headers={"X-Request-Id": "other#hash"}), BAD_OUTPUT),
        (Reply("late", delay_s=0.6), TIMEOUT),
    ],
)
def test_an_item_that_a_healthy_server_fails_on_every_time_is_to_blame(reply: Reply, reason: str):
    def script(prompt: str, n: int) -> Reply:
        return reply if prompt == "prompt 1" else Reply(prompt)

    with FaultServer(script) as server:
        answers = ask(server, requests(3), timeout_s=0.3)
    assert isinstance(answers["clip1"], Failure)
    assert answers["clip1"].reason == reason
    assert (answers["clip0"], answers["clip2"]) == ("prompt 0", "prompt 2")
    if reason == TIMEOUT:
        assert sum(asked.prompt == "prompt 1" for asked in server.asked) == 2


def test_an_answer_of_another_request_is_not_taken():
    def script(prompt: str, n: int) -> Reply:
        mixed_up = {"X-Request-Id": "clip1#hash1"} if prompt == "prompt 0" and not n else {}
        return Reply(f"{prompt} {n}", headers=mixed_up)

    with FaultServer(script) as server:
        assert ask(server, requests(2)) == {"clip0": "prompt 0 1", "clip1": "prompt 1 0"}


def test_a_server_with_request_ids_of_its_own_is_fine():
    with FaultServer(lambda prompt, n: Reply(prompt, headers={"X-Request-Id": "req_1"})) as server:
        assert ask(server, requests(1)) == {"clip0": "prompt 0"}


@pytest.mark.parametrize(
    "reply",
    [Reply(None), Reply("  \n"), Reply("half a sen", finish_reason="length"), Reply("<think>hm")],
)
def test_unusable_answers_are_failures(reply: Reply):
    with FaultServer(lambda prompt, n: reply) as server:
        answer = ask(server, requests(1))["clip0"]
    assert isinstance(answer, Failure)
    assert answer.reason == BAD_OUTPUT
    assert len(server.asked) == 1


def test_a_filtered_answer_is_refused():
    with FaultServer(lambda p, n: Reply("I", finish_reason="content_filter")) as server:
        assert ask(server, requests(1)) == {"clip0": Failure(REFUSED, "content filter")}


def test_thoughts_are_no_answer():
    assert read_answer("<think>a cat?</think>\n\nA cat.") == "A cat."
    assert read_answer("a cat?</think>A cat.") == "A cat."
    assert read_answer(" A cat. ") == "A cat."
    assert read_answer("<think>a</think> ") == Failure(BAD_OUTPUT, "thoughts without an answer")


def test_a_schema_in_words_is_appended_to_the_prompt():
    assert schema_prompt(Request("a", "h", "Why?")) == "Why?"
    assert schema_prompt(Request("a", "h", "Why?", schema=SCHEMA)).startswith("Why?\n")


def test_a_server_that_goes_and_comes_back_answers_everything_once():
    gone = threading.Event()

    def script(prompt: str, n: int) -> Reply:
        if prompt == "prompt 10" and not n:
            gone.set()
        return Reply(f"echo {prompt}", delay_s=0.01)

    with FaultServer(script) as server:

        def restart() -> None:
            gone.wait()
            server.stop()
            time.sleep(0.3)
            server.start()

        restarting = threading.Thread(target=restart)
        restarting.start()
        answers = ask(server, requests(60), concurrency=4)
        restarting.join()
    assert answers == {f"clip{i}": f"echo prompt {i}" for i in range(60)}


def test_it_can_be_asked_from_a_running_event_loop_and_from_many_threads():
    import asyncio

    with FaultServer() as server:
        model = HttpLLM(HttpLLMConfig(base_url=server.base_url, model="tiny", concurrency=2))

        async def inside() -> dict:
            return model.answer(requests(2))  # type: ignore[return-value]

        assert asyncio.run(inside()) == {"clip0": "echo prompt 0", "clip1": "echo prompt 1"}
        found: list[dict] = []
        threads = [
            threading.Thread(target=lambda: found.append(model.answer(requests(5))))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(len(answers) == 5 for answers in found)
    assert server.most_at_once <= 2


def test_what_a_config_needs_and_what_does_not_change_a_clip():
    config = HttpLLMConfig(base_url="http://a/v1", model="m", api_key_env="KEY")
    assert config.needs() == (Package("openai"), Endpoint("http://a/v1", "m", "KEY"))
    assert "model" not in config.neutral
    assert {"base_url", "concurrency", "timeout_s", "max_wait_s", "api_key_env"} == config.neutral
    with pytest.raises(ValueError, match="base_url"):
        HttpLLMConfig(base_url="localhost:8000/v1", model="m")


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.slow
def test_a_real_server_killed_and_restarted_in_mid_run(tiny_llm, tmp_path):
    words = ["red", "green", "blue", "cat", "dog", "sky", "sea", "sun", "car", "bus", "toy"] * 4
    asked = [
        Request(f"clip{i}", f"h{i}", f"{word * 3} {i}", max_tokens=64)
        for i, word in enumerate(words)
    ]
    log = tmp_path / "serve.log"
    with transformers_server(tiny_llm, log) as server:
        model = build_llm(
            HttpLLMConfig(base_url=server.base_url, model=str(tiny_llm), concurrency=4)
        )
        expected = model.answer(asked)
        assert list(expected) == [request.id for request in asked]
        assert len({answer for answer in expected.values() if isinstance(answer, str)}) > 10
        log.write_bytes(b"")

        def restart() -> None:
            while log.read_text().count("POST /v1/chat/completions") < 8 and not done.wait(0.01):
                pass
            server.kill()
            killed.append(not done.is_set())
            server.start()

        done, killed = threading.Event(), []
        restarting = threading.Thread(target=restart)
        restarting.start()
        answers = model.answer(asked)
        done.set()
        restarting.join()
    assert killed == [True]
    assert answers == expected
