# SPDX-License-Identifier: Apache-2.0
"""Fusion over HTTP: a real server with a random model, one that misbehaves, and one that dies."""

import json
import re
import threading
from collections import Counter

import pyarrow as pa
import pytest

from dataengine import records
from dataengine.config import Pipeline, RuntimeSettings, ShardSettings
from dataengine.corpus import Corpus
from dataengine.flow import VIDEO_STRUCT
from dataengine.models.fusion import LLMFuserConfig
from dataengine.models.llm import HttpLLMConfig
from dataengine.query.verify import verify
from dataengine.stage import Kept
from dataengine.stages.fuse import FuseStage
from tests.fake_pipeline import LIGHT, FakeSegment, make_sources, run_fake
from tests.llm_server import FaultServer, Reply, transformers_server
from tests.tiny_llm import save_tiny_llm

COLOURS = ("amber", "black", "coral", "green", "olive", "pearl", "white", "yellow")


def row(index, **columns):
    return {
        "clip_id": f"v_{index}000_{index + 1}000",
        "caption_video": f"An {COLOURS[index % len(COLOURS)]} ball number{index} rolls away.",
        "caption_audio": "A piano plays softly.",
        "transcript": f"I can see ball number{index}.",
        "transcript_en": None, "language": "en", "caption": None, "provenance": [],
    } | columns  # fmt: skip


def fuse(server, rows, *, model="tiny", **settings):
    llm = HttpLLMConfig(base_url=server.base_url, model=model, max_wait_s=60, **settings)
    config = FuseStage.Config(model=LLMFuserConfig(llm=llm, max_tokens=48), caption="caption_avs")
    stage = FuseStage(config)
    stage.setup()
    outcomes = stage.process(rows)
    assert len(outcomes) == len(rows)
    return [outcome.rows[0] for outcome in outcomes if isinstance(outcome, Kept)]


def notes(columns):
    return {entry["column"]: entry["note"] for entry in columns["provenance"]}


def number(prompt):
    (found,) = re.findall(r"ball (number\d+) rolls", prompt)
    return found


def good(prompt):
    """The answer of a model that does as it is asked, for the clip of this prompt."""
    fields = re.findall(r'"(caption_\w+)": "', prompt)
    return json.dumps({name: f"A ball, {number(prompt)}, rolls to a piano." for name in fields})


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch):
    monkeypatch.setattr("dataengine.models.llm_http._FIRST_WAIT_S", 0.02)


def test_a_real_server_with_a_random_model_costs_no_clip(tmp_path):
    folder = save_tiny_llm(tmp_path / "tiny", max_positions=8192)
    rows = [row(i) for i in range(6)] + [row(6, transcript=None), row(7, caption_audio=None)]
    rows.append(row(8, caption_audio=None, transcript=None))  # nothing to ask
    with transformers_server(folder, tmp_path / "serve.log") as server:
        fused = fuse(server, rows, model=str(folder), structured="none", concurrency=2)
    for given, got in zip(rows, fused, strict=True):
        video = given["caption_video"]
        assert got["caption_av"].startswith(video)
        assert got["caption_avs"].startswith(video)
        assert {entry["model"] for entry in got["provenance"]} == {"template"}
    fell_back = [
        {column for column, note in notes(got).items() if (note or "").startswith("template:")}
        for got in fused
    ]
    both = {"caption_av", "caption_avs", "caption"}
    assert fell_back == [both] * 7 + [both - {"caption_av"}, set()]


def test_each_clip_gets_its_own_answer_or_the_template():
    """One of seven misbehaves in each way, for good or only at first."""
    kinds = ["good", "refusal", "echo", "wrong_id", "prose", "late", "refused"]

    def script(prompt, n):
        if "ball" not in prompt:
            return Reply("yes")  # the client wants to know whether the server is there at all
        match kinds[int(number(prompt).removeprefix("number")) % len(kinds)]:
            case "refusal":
                said = json.loads(good(prompt))
                return Reply(json.dumps(dict.fromkeys(said, "I'm sorry, but I cannot do that.")))
            case "echo":
                return Reply(prompt)
            case "wrong_id":
                return Reply(good(prompt), headers={"X-Request-Id": "v_0_1000#0"})
            case "prose":
                return Reply("The clip shows a ball and has a piano in it.")
            case "late":
                again = "could not be used" in prompt
                return Reply(f"Sure!\n```json\n{good(prompt)}\n```" if again else "Hm?")
            case "refused":
                return Reply(status=400, message="too long")
        return Reply(good(prompt), delay_s=0.02)

    rows = [row(i) for i in range(28)]
    with FaultServer(script) as server:
        fused = fuse(server, rows, concurrency=5)
    seen = Counter()
    for index, (given, got) in enumerate(zip(rows, fused, strict=True)):
        kind = kinds[index % len(kinds)]
        note = notes(got)["caption_avs"]
        seen[kind, note] += 1
        assert f"number{index}" in got["caption_av"]
        if note is None:
            assert got["caption_avs"] == f"A ball, number{index}, rolls to a piano."
        else:
            assert got["caption_avs"].startswith(given["caption_video"])
    assert seen == {
        ("good", None): 4,
        ("late", None): 4,
        ("refusal", "template:refusal"): 4,
        ("echo", "template:prompt_echo"): 4,
        ("prose", "template:not_json"): 4,
        ("wrong_id", "template:bad_output"): 4,
        ("refused", "template:request_refused"): 4,
    }


# -------------------------------------------------------------------------------------- on Ray


class SpokenSegment(FakeSegment):
    """Clips with captions of three modalities, each with a number of its own."""

    outputs = pa.schema(
        [field for field in records.CLIP_SCHEMA if field.name not in ("provenance", "clip_score")]
        + [pa.field("_video", VIDEO_STRUCT)]
    )

    def _one(self, video):
        outcome = super()._one(video)
        if not isinstance(outcome, Kept):
            return outcome
        told = ("caption_video", "caption_audio", "transcript")
        return Kept(
            tuple(
                {**clip, **{name: row(clip["start_ms"] // 1000)[name] for name in told}}
                for clip in outcome.rows
            )
        )


@pytest.mark.slow
def test_an_ingest_outlives_its_server(tmp_path, two_core_ray):
    """The server hangs up, is gone for a while and comes back: every clip is there once, fused."""
    dying, back = threading.Event(), threading.Event()
    num_lost = Counter()

    def script(prompt, n):
        if dying.is_set() and not back.is_set():
            num_lost["hung_up"] += 1
            return Reply(hang_up=True)
        return Reply(good(prompt) if "ball" in prompt else "yes", delay_s=0.1)

    def restart():
        while len(server.asked) < 6 and not over.wait(0.01):
            pass
        dying.set()
        while not num_lost and not over.wait(0.01):
            pass
        server.stop()
        over.wait(2)
        back.set()
        server.start()

    over = threading.Event()
    sources = make_sources(tmp_path / "in", [f"v{i}_6" for i in range(4)])
    with FaultServer(script) as server:
        llm = HttpLLMConfig(base_url=server.base_url, model="tiny", concurrency=2, max_wait_s=120)
        fusing = FuseStage.Config(
            model=LLMFuserConfig(llm=llm), caption="caption_av", resources=LIGHT
        )
        pipeline = Pipeline(
            name="fusing", description="", shards=ShardSettings(shard_mb=1),
            runtime=RuntimeSettings(max_attempts=2),
            stages=((SpokenSegment, SpokenSegment.Config()), (FuseStage, fusing)), source="tests",
        )  # fmt: skip
        restarting = threading.Thread(target=restart)
        restarting.start()
        result = run_fake(sources, tmp_path / "corpus", pipeline)
        still_up = back.is_set()
        over.set()
        restarting.join()
    assert still_up, "the run ended before the server died"
    assert num_lost["hung_up"] > 0
    assert result.funnel.kept_clips == 24
    corpus = Corpus.open(str(tmp_path / "corpus"))
    clips = corpus.catalog().to_pylist()
    assert len({clip["clip_id"] for clip in clips}) == len(clips) == 24
    for clip in clips:
        text = f"A ball, number{clip['start_ms'] // 1000}, rolls to a piano."
        assert (clip["caption_av"], clip["caption_avs"], clip["caption"]) == (text, text, text)
        assert notes(clip)["caption_av"] is None
    assert verify(corpus).problems == []
