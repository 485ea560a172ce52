# SPDX-License-Identifier: Apache-2.0
"""A vision-language model as captioner: a tiny one that was taught three colours, and fakes."""

import json

import numpy as np
import pytest

from dataengine.media import jpeg_decode, jpeg_encode
from dataengine.models import vlm
from dataengine.models.answers import Failure
from dataengine.models.captioner import ClipFrames, VlmConfig
from tests.test_captioners import captioned, wrote
from tests.tiny_vlm import save_tiny_vlm

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
PAIRS = [(one, other) for one in COLOURS for other in COLOURS]
PROMPT = """
system: a
clip: "{num_frames} {seconds} picture"
clip_and_middle: "{num_frames} {seconds} image"
again: "{problem} again"
"""
SERVER = {"kind": "http", "base_url": "http://x/v1", "model": "m"}
ANY_LANGUAGE = {"language": ""}


def stills(*colours, size=(48, 64)):
    return [jpeg_encode(np.full((*size, 3), COLOURS[colour], np.uint8)) for colour in colours]


def clip(clip_id, *colours, size=(48, 64)):
    jpegs = stills(*colours, size=size)
    times = [1000 * i for i in range(len(jpegs))]
    return ClipFrames([jpeg_decode(jpeg) for jpeg in jpegs], times, clip_id, jpegs)


class FakeLLM:
    """Says what it is told to, and remembers what it was asked."""

    model, revision = "fake-vlm", "7"

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def answer(self, requests):
        self.requests += requests
        return {request.id: self.answers.pop(0) for request in requests}


@pytest.fixture
def fake(monkeypatch):
    def make(*answers, **settings):
        llm = FakeLLM(*answers)
        monkeypatch.setattr(vlm, "build_llm", lambda config: llm)
        config = VlmConfig.model_validate({"llm": SERVER, "checks": ANY_LANGUAGE} | settings)
        return llm, vlm.VlmCaptioner(config)

    return make


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "short.yaml"
    path.write_text(PROMPT)
    return str(path)


def answer_of(one, other):
    return f"the {one} ball and the {other} car"


def test_a_real_model_sees_the_frames_in_order_from_setup_to_the_shard(
    monkeypatch, prompt, tmp_path
):
    llm = FakeLLM()
    with monkeypatch.context() as patch:
        patch.setattr(vlm, "build_llm", lambda config: llm)
        config = VlmConfig.model_validate({"llm": SERVER, "prompt": prompt, "checks": ANY_LANGUAGE})
        asking = vlm.VlmCaptioner(config)
    lessons = [(asking._request(clip("c", *pair)), answer_of(*pair)) for pair in PAIRS]
    folder = save_tiny_vlm(tmp_path / "tiny-vlm", lessons=lessons, steps=40)
    settings = {
        "llm": {"kind": "transformers", "model": str(folder), "modality": "image"},
        "prompt": prompt,
        "checks": ANY_LANGUAGE,
    }
    rows = captioned(
        tmp_path / "corpus", VlmConfig.model_validate(settings), [stills(*p) for p in PAIRS]
    )
    assert [row["caption_video"] for row in rows] == [answer_of(*pair) for pair in PAIRS]
    for row in rows:
        (entry,) = row["provenance"]
        assert (entry["column"], entry["model"]) == ("caption_video", "tiny-vlm")
        assert entry["prompt_hash"] == asking.prompt_hash
        assert row["caption_video_fine"] is None
        assert row["caption_video_coarse"] is None


def test_frames_are_shown_as_they_are_stored_with_the_clips_id_and_hash(fake):
    llm, captioner = fake("A red scene turns green.", max_frames=2)
    one = clip("one", "red", "green", "blue", "red")
    (captions,) = captioner.caption([one])
    assert captions.caption == "A red scene turns green."
    (request,) = llm.requests
    assert (request.id, request.input_hash) == ("one", one.input_hash)
    assert request.images == (one.jpegs[1], one.jpegs[3])
    assert "2 frames" in request.prompt
    assert "2.0" in request.prompt
    assert request.schema is None


def test_larger_frames_are_made_smaller_only_where_asked(fake):
    llm, captioner = fake("A red scene is seen.", "A red scene is seen.", max_side=32)
    small = clip("small", "red", size=(24, 32))
    captioner.caption([clip("large", "red"), small])
    assert jpeg_decode(llm.requests[0].images[0]).shape == (24, 32, 3)
    assert llm.requests[1].images == tuple(small.jpegs)


def test_answers_belong_to_clips_by_id(fake, monkeypatch):
    llm, captioner = fake()
    backwards = {"b": "A blue scene is seen.", "a": "A red scene is seen."}
    monkeypatch.setattr(llm, "answer", lambda requests: backwards)
    captions = captioner.caption([clip("a", "red"), clip("b", "blue")])
    assert [c.caption for c in captions] == [backwards["a"], backwards["b"]]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("I'm sorry, I cannot see any frames.", "refusal"),
        ("no", "too_short"),
        ("a car " * 20, "repetition"),
        ("Answer with the description alone.", "prompt_echo"),
    ],
)
def test_a_bad_answer_is_asked_for_once_more_then_given_up(fake, bad, reason):
    llm, captioner = fake(bad, "A red scene is seen.")
    (captions,) = captioner.caption([clip("a", "red")])
    assert captions.caption == "A red scene is seen."
    assert "could not be used" in llm.requests[1].prompt

    llm, captioner = fake(bad, bad)
    (failure,) = captioner.caption([clip("a", "red")])
    assert isinstance(failure, Failure)
    assert failure.reason == reason
    assert len(llm.requests) == 2


def test_a_clip_the_model_fails_on_is_stored_without_a_caption_and_says_why(
    fake, monkeypatch, tmp_path
):
    llm, _ = fake(Failure("timeout"))
    monkeypatch.setattr(vlm, "build_llm", lambda config: llm)
    config = VlmConfig.model_validate({"llm": SERVER, "checks": ANY_LANGUAGE})
    (row,) = captioned(tmp_path / "corpus", config, [stills("red")])
    assert row["caption_video"] is None
    assert wrote(row)["caption_video"]["note"] == "failed:timeout"


def test_the_middle_frame_may_be_described_in_the_same_answer(fake):
    good = {"middle": "A green scene is seen.", "clip": "A red scene turns green."}
    llm, captioner = fake(json.dumps(good), middle=True)
    (captions,) = captioner.caption([clip("a", "red", "green", "green")])
    assert (captions.coarse, captions.caption) == (good["middle"], good["clip"])
    assert set(llm.requests[0].schema["properties"]) == {"middle", "clip"}

    _, captioner = fake(json.dumps(good | {"middle": "no"}), middle=True)
    (captions,) = captioner.caption([clip("a", "red")])
    assert (captions.coarse, captions.caption) == (None, good["clip"])
    assert captions.notes == {"caption_video_coarse": "failed:too_short"}


def test_a_prompt_that_does_not_fit_is_an_error_before_the_run(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(PROMPT.replace("{seconds} picture", "{second} picture"))
    with pytest.raises(ValueError, match=r"unknown variable \{second\}"):
        VlmConfig.model_validate({"llm": SERVER, "prompt": str(path)})
