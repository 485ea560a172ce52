# SPDX-License-Identifier: Apache-2.0
import io
import json
import shutil
import sys
import wave
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataengine.errors import DependencyError, EngineError
from dataengine.models.answers import BAD_OUTPUT, OUT_OF_MEMORY, REFUSED, Failure
from dataengine.models.llm import (
    Request,
    TransformersLLMConfig,
    VllmConfig,
    build_llm,
    read_answer,
    schema_prompt,
)
from dataengine.models.llm_transformers import TransformersLLM
from dataengine.needs import Package, Weights
from tests.tiny_llm import byte_tokenizer, save_tiny_audio_llm, save_tiny_llm, save_tiny_vlm

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def jpeg(seed: int, width: int = 64, height: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def wav(pitch_hz: float, num_samples: int = 16_000, rate: int = 16_000) -> bytes:
    samples = 8000 * np.sin(2 * np.pi * pitch_hz * np.arange(num_samples) / rate)
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setparams((1, 2, rate, 0, "NONE", ""))
        opened.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def load(folder, **settings) -> TransformersLLM:
    model = build_llm(TransformersLLMConfig(model=str(folder), device="cpu", **settings))
    assert isinstance(model, TransformersLLM)
    return model


def one_by_one(model: TransformersLLM, requests: list[Request]) -> dict[str, str | Failure]:
    return {request.id: model.answer([request])[request.id] for request in requests}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        text=save_tiny_llm(root / "text"),
        image=save_tiny_vlm(root / "image"),
        audio=save_tiny_audio_llm(root / "audio"),
    )


def questions(num: int) -> list[Request]:
    words = ["cat", "dog and sun", "a red bus " * 4, "sea", "x" * 100]
    return [Request(f"clip{i}", "h", f"{words[i % 5]} {i}", max_tokens=48) for i in range(num)]


def test_text_answers_are_the_models_own_and_padding_does_not_change_them(folders):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [*questions(12), Request("s", "h", "cat 0", system="Be brief.", max_tokens=48)]
    answers = load(folders.text, batch_size=5).answer(asked)
    tokenizer = AutoTokenizer.from_pretrained(folders.text)
    model: Any = AutoModelForCausalLM.from_pretrained(folders.text, dtype=torch.float32)
    expected = {}
    for request in asked:
        system = f"<|im_start|>system\n{request.system}<|im_end|>\n" if request.system else ""
        text = f"{system}<|im_start|>user\n{request.prompt}<|im_end|>\n<|im_start|>assistant\n"
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(tokens, max_new_tokens=48, do_sample=False)[0, tokens.shape[1] :]
        expected[request.id] = read_answer(tokenizer.decode(out, skip_special_tokens=True))
    assert answers == expected
    assert len(set(expected.values())) > 8
    assert answers["s"] != answers["clip0"]


def test_each_answer_keeps_to_its_own_limit(folders):
    model = load(folders.text)
    alone = one_by_one(model, questions(12))
    lengths = {key: len(answer) for key, answer in alone.items() if isinstance(answer, str)}
    long = next(asked for asked in questions(12) if lengths.get(asked.id, 0) > 4)
    short = Request("short", "h", long.prompt, max_tokens=2)
    answers = model.answer([short, long])
    assert answers == one_by_one(model, [short, long])
    assert isinstance(answers[long.id], str)
    assert isinstance(cut := answers["short"], Failure)
    assert cut.reason == BAD_OUTPUT


def test_what_does_not_fit_the_model_fails_alone(folders):
    model = load(folders.text)
    asked = [*questions(3), Request("long", "h", "x" * 600), *questions(5)[3:]]
    answers = model.answer(asked)
    assert list(answers) == [request.id for request in asked]
    assert isinstance(failure := answers.pop("long"), Failure)
    assert failure.reason == REFUSED
    assert "512" in failure.detail
    assert answers == one_by_one(model, questions(5))


def test_pictures_and_sound_need_a_model_for_them(folders):
    asked = [Request("p", "h", "?", images=(jpeg(0),)), Request("s", "h", "?", audio=wav(100))]
    for answer in load(folders.text).answer(asked).values():
        assert isinstance(answer, Failure)
        assert answer.reason == REFUSED


def test_a_schema_goes_into_the_prompt(folders):
    model = load(folders.text)
    with_schema = Request("a", "h", "cat?", schema=SCHEMA, max_tokens=64)
    in_words = Request("a", "h", schema_prompt(with_schema), max_tokens=64)
    assert json.dumps(SCHEMA) in in_words.prompt
    assert model.answer([with_schema]) == model.answer([in_words])
    assert model.answer([with_schema]) != model.answer([Request("a", "h", "cat?", max_tokens=64)])


def test_sampling_and_penalties_of_a_checkpoint_are_not_taken_over(folders, tmp_path):
    from transformers import GenerationConfig

    other = shutil.copytree(folders.text, tmp_path / "other")
    plain = GenerationConfig.from_pretrained(other).to_dict()
    penalty = {"repetition_penalty": 1.5, "do_sample": True, "temperature": 5.0}
    GenerationConfig(**(plain | penalty)).save_pretrained(other)
    asked = questions(6)
    assert load(other).answer(asked) == load(folders.text).answer(asked)


def test_out_of_memory_halves_batches_and_costs_one_item_at_most(folders, monkeypatch):
    import torch

    model = load(folders.text, batch_size=8)
    expected = model.answer(questions(9))
    generate = model._model.generate
    sizes = []

    def short_of_memory(**inputs):
        rows, length = inputs["input_ids"].shape
        sizes.append(rows)
        if rows > 2 or length > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model._model, "generate", short_of_memory)
    answers = model.answer([*questions(9), Request("big", "h", "y" * 320, max_tokens=8)])
    assert isinstance(failure := answers.pop("big"), Failure)
    assert failure.reason == OUT_OF_MEMORY
    assert answers == expected
    assert sizes[0] == 8


def test_pictures_are_seen_and_company_does_not_change_what_is_said(folders):
    model = load(folders.image, modality="image", batch_size=4)
    asked = [
        Request(f"clip{i}", "h", "What is it?" + "!" * i, images=images, max_tokens=32)
        for i, images in enumerate(
            [(jpeg(0),), (jpeg(1), jpeg(2)), (jpeg(3, 200, 40), jpeg(4), jpeg(5)), (jpeg(6),)]
        )
    ]
    asked.insert(2, Request("text", "h", "What is it?", max_tokens=32))
    answers = model.answer(asked)
    assert list(answers) == [request.id for request in asked]
    assert answers == one_by_one(model, asked)
    shown = [Request(str(i), "h", "Well?", images=(jpeg(i),), max_tokens=32) for i in range(6)]
    assert len({str(answer) for answer in model.answer(shown).values()}) > 3
    swapped = [
        Request("ab", "h", "Well?", images=(jpeg(0), jpeg(1)), max_tokens=32),
        Request("ba", "h", "Well?", images=(jpeg(1), jpeg(0)), max_tokens=32),
    ]
    assert len(set(model.answer(swapped).values())) == 2


def test_a_bad_picture_fails_alone(folders):
    model = load(folders.image, modality="image")
    good = Request("good", "h", "Well?", images=(jpeg(0),), max_tokens=32)
    broken = Request("broken", "h", "Well?", images=(jpeg(0)[:200], jpeg(1)))
    narrow = Request("narrow", "h", "Well?", images=(jpeg(0, 4000, 8),))
    answers = model.answer([broken, good, narrow])
    assert answers["broken"] == Failure(REFUSED, "cannot be shown: a picture does not decode")
    assert isinstance(failure := answers["narrow"], Failure)
    assert failure.reason == REFUSED
    assert answers["good"] == model.answer([good])["good"]


def test_sound_is_heard_and_company_does_not_change_what_is_said(folders):
    model = load(folders.audio, modality="audio", batch_size=4)
    asked = [
        Request(
            f"clip{i}", "h", "What is it?", audio=wav(100 + 300 * i, 6000 * (i + 1)), max_tokens=32
        )
        for i in range(5)
    ]
    asked.insert(1, Request("text", "h", "What is it?", max_tokens=32))
    answers = model.answer(asked)
    assert list(answers) == [request.id for request in asked]
    assert answers == one_by_one(model, asked)
    assert len({str(answer) for answer in answers.values()}) > 3


@pytest.mark.parametrize("audio", [b"", b"RIFF", wav(100, rate=8000), wav(100, num_samples=0)])
def test_bad_sound_fails_alone(folders, audio: bytes):
    model = load(folders.audio, modality="audio")
    good = Request("good", "h", "Well?", audio=wav(500), max_tokens=32)
    answers = model.answer([Request("bad", "h", "Well?", audio=audio), good])
    assert isinstance(failure := answers["bad"], Failure)
    assert failure.reason == REFUSED
    assert answers["good"] == model.answer([good])["good"]


def test_models_say_what_they_are(folders):
    model = load(folders.text)
    assert model.model == "text"
    assert len(model.revision) == 16


def test_a_checkpoint_with_a_weight_missing_is_not_loaded(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(folders.text, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DependencyError, match=r"model\.norm\.weight"):
        load(other)


def test_models_that_do_not_fit_are_named(folders, tmp_path):
    with pytest.raises(DependencyError, match="nowhere"):
        load(tmp_path / "nowhere")
    base = shutil.copytree(folders.text, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(DependencyError, match="no chat template"):
        load(base)
    with pytest.raises(DependencyError, match="takes no image"):
        load(folders.text, modality="image")


def test_the_tiny_tokenizer_loses_nothing():
    tokenizer = byte_tokenizer()
    text = "Grüße, 世界!\n\t x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_configs_need_and_what_does_not_change_a_clip():
    config = TransformersLLMConfig(model="Qwen/Qwen3-4B", revision="abc")
    assert config.needs() == (Package("transformers"), Weights("hub", "Qwen/Qwen3-4B", "abc"))
    assert config.neutral == {"device", "batch_size"}
    vllm = VllmConfig(model="Qwen/Qwen3-4B", revision="abc")
    package, weights = vllm.needs()
    assert isinstance(package, Package)
    assert package.module == "vllm"
    assert weights == Weights("hub", "Qwen/Qwen3-4B", "abc")
    assert vllm.neutral == {"tensor_parallel_size", "gpu_memory_utilization"}


def test_vllm_that_is_not_there_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DependencyError, match="vLLM is missing") as caught:
        build_llm(VllmConfig(model="m"))
    assert caught.value.hint == "uv sync --extra ingest --extra vllm"


class FakeVllm:
    """The part of vLLM that `VllmLLM` calls, as vLLM 0.32 was seen to behave."""

    def __init__(self, **arguments) -> None:
        self.arguments = arguments
        config = SimpleNamespace(hf_config=SimpleNamespace(_commit_hash="c0ffee"))
        self.llm_engine = SimpleNamespace(model_config=config)
        self.batches: list[int] = []
        self.first = 0
        self.swap = self.dead = False

    def chat(self, conversations, sampling, use_tqdm, chat_template_kwargs):
        self.batches.append(len(conversations))
        if self.dead:
            raise RuntimeError("CUDA error")
        prompts = [turns[-1]["content"] for turns in conversations]
        if any(len(prompt) > 100 for prompt in prompts):
            raise ValueError("This model's maximum context length is 100 tokens")
        answers = [
            SimpleNamespace(
                request_id=str(self.first + i),
                prompt=f"user: {prompt}",
                finished=True,
                outputs=[SimpleNamespace(text=f"echo {prompt}", finish_reason="stop")],
            )
            for i, prompt in enumerate(prompts)
        ]
        self.first += len(prompts)
        if self.swap:
            for one, two in zip(answers[::2], answers[1::2], strict=False):
                one.prompt, two.prompt = two.prompt, one.prompt
        return answers


@pytest.fixture
def fake_vllm(monkeypatch):
    module = SimpleNamespace(
        LLM=FakeVllm,
        SamplingParams=SimpleNamespace,
        sampling_params=SimpleNamespace(StructuredOutputsParams=SimpleNamespace),
    )
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module.sampling_params)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "")
    config = VllmConfig(
        model="org/m", revision="main", tensor_parallel_size=2, engine={"enforce_eager": True}
    )
    return build_llm(config)


def test_vllm_gets_its_arguments(fake_vllm):
    arguments = fake_vllm._llm.arguments
    assert arguments["distributed_executor_backend"] == "mp"
    assert (arguments["tensor_parallel_size"], arguments["enforce_eager"]) == (2, True)
    assert (arguments["revision"], arguments["tokenizer_revision"]) == ("main", "main")
    assert fake_vllm.revision == "c0ffee"


def test_a_request_that_vllm_refuses_fails_alone(fake_vllm):
    asked = [*questions(20), Request("long", "h", "x" * 101)]
    asked = [request for request in asked if len(request.prompt) <= 100 or request.id == "long"]
    answers = fake_vllm.answer(asked)
    failure = answers.pop("long")
    assert failure.reason == REFUSED
    assert "maximum context length" in failure.detail
    assert answers == {request.id: f"echo {request.prompt}" for request in asked[:-1]}
    assert len(fake_vllm._llm.batches) < 12  # halves, not one by one


def test_outputs_of_vllm_that_are_mixed_up_are_not_taken(fake_vllm):
    fake_vllm._llm.swap = True
    with pytest.raises(EngineError, match="do not belong"):
        fake_vllm.answer(questions(4))


def test_a_vllm_that_broke_down_is_no_fault_of_an_item(fake_vllm):
    fake_vllm._llm.dead = True
    with pytest.raises(EngineError, match="CUDA error"):
        fake_vllm.answer(questions(4))


def test_a_vllm_that_refuses_everything_stops_the_run(fake_vllm):
    with pytest.raises(EngineError, match="maximum context length"):
        fake_vllm.answer([Request(str(i), "h", "x" * 101) for i in range(32)])
