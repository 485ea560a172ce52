# SPDX-License-Identifier: Apache-2.0
"""Real vLLM on the processor, with a tiny random model: in process, over HTTP, and killed.

Run by ``pytest -m slow tests/test_vllm.py``. The Python with vLLM is that of `DATAENGINE_VLLM_PYTHON`
or an environment that is built once; see tests/vllm_env.py.
"""

import json
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dataengine.config import Pipeline, RuntimeSettings, ShardSettings
from dataengine.corpus import Corpus
from dataengine.errors import EngineError
from dataengine.models.answers import BAD_OUTPUT, REFUSED, Failure
from dataengine.models.fusion import Captions, LLMFuserConfig
from dataengine.models.fusion_llm import LLMFuser
from dataengine.models.llm import HttpLLMConfig, LLMConfig, Request, VllmConfig
from dataengine.models.llm_http import HttpLLM
from dataengine.models.validate import TextChecks
from dataengine.query.verify import verify
from dataengine.stage import Kept
from dataengine.stages.fuse import FuseStage
from tests.fake_pipeline import LIGHT, make_sources, run_fake
from tests.llm_server import ServerProcess, vllm_server
from tests.test_fusion_server import SpokenSegment, notes
from tests.tiny_llm import save_tiny_llm
from tests.vllm_env import NoVllmError, vllm_python
from tests.vllm_in_process import ask_in_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

MAX_MODEL_LEN = 2560
"""In tokens, which are bytes here: enough for all prompts but that of one clip in six."""
SCHEMA = {
    "type": "object",
    "properties": {
        "caption": {"type": "string", "minLength": 3, "maxLength": 20},
        "colour": {"enum": ["amber", "coral"]},
        "moving": {"type": "boolean"},
    },
    "required": ["caption", "colour", "moving"],
    "additionalProperties": False,
}


def plain(num: int) -> list[Request]:
    return [Request(f"clip{i}", f"hash{i}", f"red{13 * i}", max_tokens=64) for i in range(num)]


def shaped(num: int) -> list[Request]:
    """Questions with a schema; the random model knows nothing of JSON."""
    return [
        Request(f"json{i}", f"hash{i}", f"blue{7 * i}", schema=SCHEMA, max_tokens=96)
        for i in range(num)
    ]


def unfit() -> list[Request]:
    """Requests that no server could do, each in a way of its own."""
    return [
        Request("too long", "h", "x" * 2 * MAX_MODEL_LEN),
        Request("no picture", "h", "x", images=(b"no",)),
        Request("no schema", "h", "x", schema={"type": "nope"}),
        Request("cut off", "h", "red0", max_tokens=1),
    ]


def check_answers(answers: dict[str, str | Failure]) -> None:
    """Of `plain`, `unfit` and `shaped` requests together."""
    for request in shaped(4):
        assert follows_schema(answers.pop(request.id))
    reasons = {request.id: getattr(answers.pop(request.id), "reason", None) for request in unfit()}
    assert reasons == {
        "too long": REFUSED, "no picture": REFUSED, "no schema": REFUSED, "cut off": BAD_OUTPUT,
    }  # fmt: skip
    assert all(isinstance(answer, str) for answer in answers.values())
    assert len(set(answers.values())) > len(answers) // 2  # other questions, other answers


def same(one: str | Failure, other: str | Failure) -> bool:
    """Returns whether two answers are the same; what vLLM says of a failure may hold the time."""
    if isinstance(one, Failure) and isinstance(other, Failure):
        return one.reason == other.reason
    return one == other


def follows_schema(answer: object) -> bool:
    try:
        value = json.loads(answer) if isinstance(answer, str) else None
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and set(value) == {"caption", "colour", "moving"}
        and isinstance(value["caption"], str)
        and 3 <= len(value["caption"]) <= 20
        and value["colour"] in ("amber", "coral")
        and isinstance(value["moving"], bool)
    )


def fuser_config(llm: LLMConfig) -> LLMFuserConfig:
    """Takes whatever a random model writes into a caption, and would refuse hardly any of it."""
    checks = TextChecks(min_words=1, language="")
    return LLMFuserConfig(llm=llm, max_tokens=256, checks=checks, min_shared_words=0)


def captions(video: int, second: int) -> Captions:
    """What is known of a clip; no two clips are told the same, and one of six is far too long."""
    told = f"An amber ball number{video}x{second} rolls away."
    return Captions(
        video=" ".join([told] * (200 if second == 5 else 1)),
        audio="A piano plays softly.",
        transcript=f"I can see ball number{video}x{second}.",
        language="en",
        clip_id=f"v{video}_{second}",
    )


@pytest.fixture(scope="session")
def python() -> Path:
    try:
        return vllm_python()
    except NoVllmError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("tiny") / "llm", max_positions=MAX_MODEL_LEN)


# ------------------------------------------------------------------------------------ in process


def test_in_process(python, model, tmp_path):
    """One engine answers all of it: starting it takes longest. It ends before a server starts."""
    config = VllmConfig(
        model=str(model),
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        engine={"enforce_eager": True},
    )
    together = [*plain(8), *unfit(), *shaped(4)]
    clips = [captions(video, second) for video in (2, 3) for second in range(6)]
    clips.append(Captions("A dog barks.", None, None, None, "nothing to ask"))
    result = ask_in_process(
        python, tmp_path, fuser_config(config),
        asked=[together, *([request] for request in together)],
        fused=[clips, *([clip] for clip in clips)],
    )  # fmt: skip
    answers = result.answers[0]
    assert list(answers) == [request.id for request in together]
    for request, alone in zip(together, result.answers[1:], strict=True):
        assert list(alone) == [request.id]
        assert same(answers[request.id], alone[request.id]), request.id
    check_answers(answers)

    fused = result.captions[0]
    assert [alone for (alone,) in result.captions[1:]] == fused
    by_model = Counter()
    for got in fused:
        note = got.notes.get("caption_av")
        by_model[note if "caption_av" in got.authors else "model"] += 1
        if note is not None:
            assert (got.audio_video or "").startswith("An amber ball")
    assert by_model["template:request_refused"] == 2  # the long ones
    assert by_model[None] == 1  # nothing to ask
    assert by_model["model"] >= 4
    assert (result.model, len(result.revision)) == ("llm", 16)


# ------------------------------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def server(python, model, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "serve.log"
    with vllm_server(python, model, log, max_model_len=MAX_MODEL_LEN) as server:
        yield server


def client(server: ServerProcess, **settings: Any) -> HttpLLMConfig:
    wanted = {"base_url": server.base_url, "model": "tiny", "concurrency": 8} | settings
    return HttpLLMConfig.model_validate(wanted)


def test_over_http(server):
    together = [*plain(8), *unfit(), *shaped(4)]
    answers = HttpLLM(client(server)).answer(together)
    assert list(answers) == [request.id for request in together]
    one_by_one = HttpLLM(client(server, concurrency=1))
    for request in together:
        alone = one_by_one.answer([request])
        assert same(answers[request.id], alone[request.id]), request.id
    check_answers(answers)


def test_a_schema_is_kept_because_the_server_enforces_it(server):
    asked = shaped(6)
    for structured in ("response_format", "structured_outputs"):
        answers = HttpLLM(client(server, structured=structured)).answer(asked)
        assert all(map(follows_schema, answers.values())), answers
    unforced = HttpLLM(client(server, structured="none")).answer(asked)
    assert not any(map(follows_schema, unforced.values()))


# --------------------------------------------------------------------------------- killed, on Ray


class TalkingSegment(SpokenSegment):
    """Clips of the files ``v0_6.mp4``, ``v1_6.mp4`` ..., with `captions` of their own."""

    def _one(self, video):
        outcome = super()._one(video)
        assert isinstance(outcome, Kept)
        number = int(Path(video["source"]).stem[1:].split("_")[0])
        told = [captions(number, clip["start_ms"] // 1000) for clip in outcome.rows]
        return Kept(
            tuple(
                {
                    **clip,
                    "caption_video": known.video,
                    "caption_audio": known.audio,
                    "transcript": known.transcript,
                }
                for clip, known in zip(outcome.rows, told, strict=True)
            )
        )


def fusing(llm: HttpLLMConfig) -> Pipeline:
    """Makes four clips a call, two videos a wave."""
    config = FuseStage.Config(model=fuser_config(llm), caption="caption_avs", resources=LIGHT)
    return Pipeline(
        name="fusing", description="", shards=ShardSettings(shard_mb=1),
        runtime=RuntimeSettings(max_attempts=2, videos_per_wave=2),
        stages=((TalkingSegment, TalkingSegment.Config()), (FuseStage, config)), source="tests",
    )  # fmt: skip


NUM_VIDEOS, NUM_CLIPS = 4, 24


@pytest.fixture(scope="module")
def expected(server):
    """What every clip is to hold, by its transcript, and how many answers of the server that takes."""
    clips = [captions(video, second) for video in range(NUM_VIDEOS) for second in range(6)]
    before = num_answered(server)
    fused = LLMFuser(fuser_config(client(server))).fuse(clips)
    num = num_answered(server) - before
    return {clip.transcript: got for clip, got in zip(clips, fused, strict=True)}, num


def metric(server: ServerProcess, name: str) -> int:
    """Returns a figure of a server's own account; 0 when it is away."""
    url = server.base_url.removesuffix("/v1") + "/metrics"
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        return 0
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")))


def num_answered(server: ServerProcess) -> int:
    return metric(server, "vllm:request_success_total")


class Killer(threading.Thread):
    """Kills a server as soon as it has given ``after`` answers and is at work on more.

    Attributes:
        num_answered: Answers up to then; None while it lives.
    """

    def __init__(self, server: ServerProcess, after: int, then_start: bool) -> None:
        super().__init__()
        self.num_answered: int | None = None
        self.error: Exception | None = None
        self._server, self._after, self._then_start = server, after, then_start
        self._over = threading.Event()
        self._before = num_answered(server)

    def run(self) -> None:
        try:
            while not self._over.wait(0.05):
                num = num_answered(self._server) - self._before
                if num >= self._after and metric(self._server, "vllm:num_requests_running"):
                    self._server.kill()
                    self.num_answered = num
                    if self._then_start:
                        time.sleep(1)
                        self._server.start()
                    return
        except (RuntimeError, OSError, ValueError) as error:
            self.error = error

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        if self.error is not None:
            raise self.error


def check_corpus(folder: Path, expected: dict) -> None:
    """Every clip is there once, with its own captions, or with the reason why it has none."""
    corpus = Corpus.open(str(folder))
    clips = corpus.catalog().to_pylist()
    assert len(clips) == len({clip["clip_id"] for clip in clips}) == NUM_CLIPS
    assert {clip["transcript"] for clip in clips} == set(expected)
    reasons = Counter()
    for clip in clips:
        wanted = expected[clip["transcript"]]
        assert clip["caption_av"] == wanted.audio_video
        assert clip["caption_avs"] == clip["caption"] == wanted.audio_video_speech
        note = notes(clip)["caption_av"]
        assert note == wanted.notes.get("caption_av")
        by = {entry["column"]: entry["model"] for entry in clip["provenance"]}["caption_av"]
        assert by == ("tiny" if note is None else "template")
        reasons[note] += 1
    assert reasons["template:request_refused"] == NUM_VIDEOS  # the long ones
    assert reasons[None] >= NUM_CLIPS // 4
    assert verify(corpus).problems == []


def test_an_ingest_outlives_a_killed_server(server, expected, tmp_path, two_core_ray):
    """The run waits for it, asks again what was under way, and nothing else."""
    captions_by_clip, num_asked = expected
    sources = make_sources(tmp_path / "in", [f"v{i}_6" for i in range(NUM_VIDEOS)])
    llm = client(server, concurrency=2, max_wait_s=300)
    with Killer(server, num_asked // 3, then_start=True) as killer:
        result = run_fake(sources, tmp_path / "corpus", fusing(llm))
    assert killer.num_answered is not None, "the run ended before the server died"
    assert killer.num_answered < num_asked
    assert result.funnel.kept_clips == NUM_CLIPS
    check_corpus(tmp_path / "corpus", captions_by_clip)
    # A started server counts from 0.
    assert 0 < num_answered(server) <= num_asked - killer.num_answered + 2 * llm.concurrency


def test_an_ingest_whose_server_stays_away_goes_on_later(server, expected, tmp_path, two_core_ray):
    """The run stops and says so; the same run, once more, makes the rest."""
    captions_by_clip, num_asked = expected
    sources = make_sources(tmp_path / "in", [f"v{i}_6" for i in range(NUM_VIDEOS)])
    pipeline = fusing(client(server, concurrency=2, max_wait_s=1))
    with (
        Killer(server, num_asked * 2 // 3, then_start=False) as killer,
        pytest.raises(EngineError) as stopped,
    ):
        run_fake(sources, tmp_path / "corpus", pipeline)
    assert killer.num_answered is not None
    assert stopped.value.message.startswith(f"No answer from tiny at {server.base_url} (max_wait_s")
    assert len(stopped.value.message.splitlines()) == 1
    assert "start the server and run the same command again" in stopped.value.hint
    kept = Corpus.open(str(tmp_path / "corpus")).catalog().num_rows
    assert 0 < kept < NUM_CLIPS
    server.start()
    run_fake(sources, tmp_path / "corpus", pipeline)
    check_corpus(tmp_path / "corpus", captions_by_clip)
    assert num_answered(server) < num_asked  # what was committed is not asked again
