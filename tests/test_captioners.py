# SPDX-License-Identifier: Apache-2.0
# Answers may be failures, and modules are faked; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportIndexIssue=false, reportOperatorIssue=false
"""Real captioners, on tiny random checkpoints in the models' own formats."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dataengine import records
from dataengine.corpus import Corpus
from dataengine.errors import DependencyError
from dataengine.flow import apply_stage
from dataengine.media import jpeg_decode, jpeg_encode
from dataengine.models import multiscale
from dataengine.models.answers import BAD_OUTPUT, OUT_OF_MEMORY, Failure
from dataengine.models.captioner import ClipFrames, MultiscaleConfig, build_captioner
from dataengine.models.frame_captioner import (
    Blip2Config,
    BlipConfig,
    Florence2Config,
    Tag2TextConfig,
    build_frame_captioner,
    usable,
)
from dataengine.models.multiscale import MultiscaleCaptioner, describe
from dataengine.models.summariser import (
    T5SummariserConfig,
    alike,
    build_summariser,
    distinct,
)
from dataengine.needs import Package, Weights
from dataengine.stages.caption_video import CaptionVideoStage
from tests.helpers import clip_row, clips_table, ledger_row
from tests.tiny_captioners import (
    save_tiny_blip,
    save_tiny_blip2,
    save_tiny_florence2,
    save_tiny_t5,
)

SHORT = {"num_beams": 1, "max_new_tokens": 6}
"""A random model's answer of eight words and more is mostly one word, which is no caption."""


def picture(seed: int, height: int = 48, width: int = 64) -> bytes:
    """A JPEG of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return jpeg_encode(np.kron(blocks, np.ones((height // 3, width // 4, 1), np.uint8)))


def clip(clip_id: str, *seeds: int) -> ClipFrames:
    jpegs = [picture(seed) for seed in seeds]
    return ClipFrames([jpeg_decode(j) for j in jpegs], range(len(jpegs)), clip_id, jpegs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny checkpoints by name."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "blip": save_tiny_blip(folder / "blip"),
        "blip2": save_tiny_blip2(folder / "blip2"),
        "blip2_t5": save_tiny_blip2(folder / "blip2_t5", "t5", seed=1),
        "florence2": save_tiny_florence2(folder / "florence2"),
        "t5": save_tiny_t5(folder / "t5"),
    }


def frame_config(models, name):
    cls = {"blip": BlipConfig, "florence2": Florence2Config}.get(name, Blip2Config)
    return cls(model=str(models[name]), **SHORT)


def bare_caption(models, name, jpeg):
    """What the library itself says of one picture, alone."""
    from transformers import (
        AutoProcessor,
        Blip2ForConditionalGeneration,
        BlipForConditionalGeneration,
        Florence2ForConditionalGeneration,
    )

    cls: Any = {
        "blip": BlipForConditionalGeneration,
        "florence2": Florence2ForConditionalGeneration,
    }.get(name, Blip2ForConditionalGeneration)
    model, processor = (
        cls.from_pretrained(models[name]).eval(),
        AutoProcessor.from_pretrained(models[name]),
    )
    text = "<CAPTION>" if name == "florence2" else None
    inputs = processor(images=jpeg_decode(jpeg), text=text, return_tensors="pt")
    tokens = model.generate(**inputs, **SHORT, do_sample=False)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def captioned(corpus_dir, config, clips):
    """Runs the stage from setup to a committed shard; returns the catalog's rows."""
    stage = CaptionVideoStage(CaptionVideoStage.Config.model_validate({"model": config}))
    stage.setup()
    rows = [
        clip_row(
            "v", 1000 * at, 1000 * at + 1000,
            frames=jpegs, frame_ms=[1000 * at + i for i in range(len(jpegs))], provenance=[],
        )
        for at, jpegs in enumerate(clips)
    ]  # fmt: skip
    table = clips_table(rows).append_column("_drop", pa.nulls(len(rows), records.DROP_STRUCT))
    table = apply_stage(stage, table, stage.process)
    assert table["_drop"].null_count == len(rows)
    corpus = Corpus.create(str(corpus_dir))
    corpus.take_over("r-1")
    corpus.commit(
        table.select(records.CLIP_SCHEMA.names),
        [ledger_row("v", rows)],
        run_id="r-1",
        fingerprint="f",
    )
    return sorted(Corpus.open(str(corpus_dir)).catalog().to_pylist(), key=lambda r: r["start_ms"])


def wrote(row):
    return {entry["column"]: entry for entry in row["provenance"]}


@pytest.mark.parametrize("name", ["blip", "blip2", "blip2_t5", "florence2"])
def test_captions_reach_the_shard_as_the_bare_model_writes_them_one_by_one(models, tmp_path, name):
    pictures = [[picture(1), picture(2), picture(3)], [picture(4)]]
    rows = captioned(
        tmp_path / "corpus", MultiscaleConfig(frame=frame_config(models, name)), pictures
    )
    for row, jpegs in zip(rows, pictures, strict=True):
        alone = [bare_caption(models, name, jpeg) for jpeg in jpegs]
        assert all(alone), "the random model has nothing to say: take another seed"
        assert row["caption_video_fine"] == alone
        assert row["caption_video_coarse"] == alone[len(alone) // 2]
        assert row["caption_video"]
        authors = {column: entry["model"] for column, entry in wrote(row).items()}
        assert authors == {
            "caption_video_fine": name, "caption_video_coarse": name, "caption_video": "rule"
        }  # fmt: skip
        shown = records.digest(*jpegs)
        assert {entry["input_hash"] for entry in row["provenance"]} == {shown}
        assert len(wrote(row)["caption_video_fine"]["revision"]) == 16
    first = rows[0]["caption_video_fine"]
    assert len(set(first)) > 1, "the random model does not look: take another seed"


class FakeLLM:
    """Says what it is told to, and remembers what it was asked."""

    model, revision = "fake-llm", "7"

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def answer(self, requests):
        self.requests += requests
        return {request.id: self.answers.pop(0) for request in requests}


@pytest.fixture
def full(models, monkeypatch):
    """Makes the whole of InternVid's chain, the language model being a fake."""

    def make(*answers, **settings):
        llm = FakeLLM(*answers)
        monkeypatch.setattr(multiscale, "build_llm", lambda config: llm)
        config = MultiscaleConfig.model_validate(
            {
                "frame": frame_config(models, "blip"),
                "middle": frame_config(models, "blip2"),
                "summariser": {"kind": "t5", "model": str(models["t5"]), "max_new_tokens": 6},
                "merge": {"kind": "http", "base_url": "http://x/v1", "model": "m"},
            }
            | settings
        )
        return llm, config

    return make


def test_two_scales_are_merged_and_every_column_has_its_author(models, full, tmp_path):
    jpegs = [picture(seed) for seed in (1, 2, 3, 4)]
    fine = [bare_caption(models, "blip", jpeg) for jpeg in jpegs]
    coarse = bare_caption(models, "blip2", jpegs[2])
    answer = f"A clip that shows {coarse}."
    llm, config = full(answer)
    (row,) = captioned(tmp_path / "corpus", config, [jpegs])
    assert row["caption_video_fine"] == fine
    assert row["caption_video_coarse"] == coarse
    assert row["caption_video"] == answer
    (summary,) = build_summariser(config.summariser).summarise([list(dict.fromkeys(fine))])
    (request,) = llm.requests
    assert coarse in request.prompt
    assert summary[1:] in request.prompt
    entries = wrote(row)
    assert {column: entry["model"] for column, entry in entries.items()} == {
        "caption_video_fine": "blip",
        "caption_video_coarse": "blip2",
        "caption_video": "t5+fake-llm",
    }
    assert len(entries["caption_video"]["prompt_hash"]) == 64
    assert {entry["note"] for entry in entries.values()} == {None}


@pytest.mark.parametrize(
    ("answers", "note"),
    [
        ((Failure("timeout"),), "rule:timeout"),
        (("I'm sorry, I cannot describe this.",) * 2, "rule:refusal"),
        (("Nothing of the kind happens anywhere.",) * 2, "rule:ungrounded"),
    ],
)
def test_where_the_language_model_fails_the_scales_are_joined_by_rule(
    full, tmp_path, answers, note
):
    _, config = full(*answers)
    (row,) = captioned(tmp_path / "corpus", config, [[picture(1), picture(2)]])
    entry = wrote(row)["caption_video"]
    assert (entry["model"], entry["note"]) == ("t5+rule", note)
    assert row["caption_video_coarse"] in row["caption_video"].lower()


def test_a_second_answer_that_is_good_counts(full, tmp_path):
    llm, config = full("OK", "x")
    (coarse,) = describe(build_frame_captioner(config.middle), [clip("c", 1, 2)], [[1]])[0]
    llm.answers[1] = f"There is {coarse}."
    (row,) = captioned(tmp_path / "corpus", config, [[picture(1), picture(2)]])
    assert row["caption_video"] == f"There is {coarse}."
    assert "It had 1 words" in llm.requests[1].prompt
    assert wrote(row)["caption_video"]["note"] is None


def test_where_the_summariser_fails_the_captions_that_differ_stand_for_it(full, monkeypatch):
    _, config = full(merge=None)
    captioner = MultiscaleCaptioner(config)
    monkeypatch.setattr(
        captioner._summariser, "summarise", lambda groups: [Failure(BAD_OUTPUT) for _ in groups]
    )
    (captions,) = captioner.caption([clip("c", 1, 2)])
    assert captions.caption
    assert captions.authors["caption_video"].model == "rule"
    assert captions.notes == {"caption_video": "rule:bad_output"}


def test_frames_are_described_once_in_one_call(models):
    class Counter:
        model = revision = ""

        def caption(self, pictures):
            self.num = len(pictures)
            return [str(picture.mean()) for picture in pictures]

    counter = Counter()
    clips = [clip("a", 1, 2, 1, 1), clip("b", 2, 3)]
    answers = describe(counter, clips, [[0, 1, 2, 3], [0, 1]])
    assert counter.num == 3
    assert [len(set(texts)) for texts in answers] == [2, 2]
    assert answers[0][1] == answers[1][0]


def test_the_fine_scale_has_a_low_rate(models):
    config = MultiscaleConfig(frame=frame_config(models, "blip"), max_frames=2)
    captioner = build_captioner(config)
    frames = clip("c", 1, 2, 3, 4, 5, 6, 7, 8)
    (captions,) = captioner.caption([frames])
    each = describe(captioner._frame, [frames], [range(8)])[0]
    assert captions.fine == (each[2], each[6])
    assert captions.coarse == each[4]


def test_the_middle_frame_by_the_same_model_needs_no_second_one(models):
    frame = frame_config(models, "blip")
    for middle in (None, frame):
        captioner = MultiscaleCaptioner(MultiscaleConfig(frame=frame, middle=middle))
        assert captioner._middle is captioner._frame


def test_what_a_caption_begins_with_is_left_out(models):
    pictures = [jpeg_decode(picture(seed)) for seed in (1, 2)]
    for name in ("blip", "blip2"):
        config = frame_config(models, name).model_copy(update={"prompt": "a picture of"})
        texts = build_frame_captioner(config).caption(pictures)
        assert not any("picture of" in text for text in texts)
        assert texts != build_frame_captioner(frame_config(models, name)).caption(pictures)


def test_pictures_of_odd_sizes_are_described(models):
    rng = np.random.default_rng(0)
    sizes = [(3, 50), (1, 1), (50, 3), (64, 48)]
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    captioner = build_frame_captioner(frame_config(models, "blip"))
    alone = [captioner.caption([picture])[0] for picture in pictures]
    assert captioner.caption(pictures) == alone


@pytest.mark.parametrize("name", ["blip", "blip2", "florence2"])
def test_models_run_in_bfloat16_as_on_a_gpu(models, monkeypatch, name):
    from dataengine.models import pretrained

    monkeypatch.setattr(pretrained, "compute_dtype", lambda device: torch.bfloat16)
    captioner = build_frame_captioner(frame_config(models, name))
    assert captioner._model.dtype == torch.bfloat16
    (text,) = captioner.caption([jpeg_decode(picture(1))])
    assert isinstance(text, str)


# ----------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("blip", "vision_model.embeddings.position_embedding"),
        ("blip2", "language_projection.weight"),
        ("florence2", "model.multi_modal_projector.image_projection.weight"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.q.weight"),
    ],
)
def test_a_checkpoint_with_a_missing_weight_is_refused_by_name(models, tmp_path, name, key):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / name
    folder.mkdir()
    for file in models[name].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build: Any = build_summariser if name == "t5" else build_frame_captioner
    config = T5SummariserConfig(model=str(folder))
    if name != "t5":
        config = frame_config({name: folder}, name)
    with pytest.raises(DependencyError, match=f"missing {key}"):
        build(config)


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(DependencyError, match="cannot be loaded"):
        build_frame_captioner(BlipConfig(model=str(tmp_path)))


def greedy(model, limit, poison=None):
    """Makes a model run out of memory above a batch size, and on one picture in any batch."""
    generate = model.generate

    def limited(pixel_values, **options):
        hit = poison is not None and any(bool((x == poison).all()) for x in pixel_values)
        if len(pixel_values) > limit or hit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")
        return generate(pixel_values=pixel_values, **options)

    model.generate = limited


def test_a_gpu_out_of_memory_halves_the_batch_and_goes_on(models):
    captioner = build_captioner(MultiscaleConfig(frame=frame_config(models, "blip")))
    clips = [clip("a", 1, 2, 3), clip("b", 4, 5, 6)]
    calm = captioner.caption(clips)
    greedy(captioner._frame._model, limit=2)
    assert captioner.caption(clips) == calm
    assert captioner._frame._batcher.size == 1  # 32, then 3, then 1


def test_a_picture_that_alone_is_too_much_is_noted_and_the_others_are_captioned(models):
    captioner = build_captioner(MultiscaleConfig(frame=frame_config(models, "blip")))
    clips = [clip("a", 1, 2, 3), clip("b", 4), clip("c", 5)]
    calm = captioner.caption(clips)
    inputs = captioner._frame._processor(images=list(clips[0].frames[:1]), return_tensors="pt")
    greedy(captioner._frame._model, limit=2, poison=inputs["pixel_values"][0])
    first, *others = captioner.caption(clips)
    assert others == calm[1:]
    assert first.fine == calm[0].fine[1:]
    assert first.coarse == calm[0].coarse
    assert first.notes == {"caption_video_fine": f"partial:{OUT_OF_MEMORY}"}

    (only,) = captioner.caption([clip("d", 1)])
    assert isinstance(only, Failure)
    assert only.reason == OUT_OF_MEMORY


def test_a_clip_without_captions_keeps_its_place_and_says_why(models):
    config = MultiscaleConfig(frame=frame_config(models, "blip"))
    stage = CaptionVideoStage(CaptionVideoStage.Config(model=config))
    stage.setup()
    greedy(stage._captioner._frame._model, limit=0)
    rows = [{"clip_id": "a", "frames": [picture(1)], "frame_ms": [0]}]
    ((columns,),) = [outcome.rows for outcome in stage.process(rows)]
    assert columns["caption_video"] is None
    assert wrote(columns)["caption_video"]["note"] == f"failed:{OUT_OF_MEMORY}"


@pytest.mark.parametrize(
    ("middle_fails", "notes"),
    [
        (True, {"caption_video_coarse": "failed:out_of_memory"}),
        (False, {"caption_video_fine": "failed:out_of_memory"}),
    ],
)
def test_one_scale_is_enough(models, middle_fails, notes):
    config = MultiscaleConfig(
        frame=frame_config(models, "blip"), middle=frame_config(models, "blip2")
    )
    captioner = MultiscaleCaptioner(config)
    greedy((captioner._middle if middle_fails else captioner._frame)._model, limit=0)
    (captions,) = captioner.caption([clip("a", 1, 2)])
    assert captions.caption
    assert bool(captions.coarse) != middle_fails
    assert bool(captions.fine) == middle_fails
    assert captions.notes == notes


def test_captions_that_are_empty_or_go_round_in_circles_are_none():
    assert usable(" a dog\n runs ") == "a dog runs"
    assert usable("  ").reason == BAD_OUTPUT
    assert usable("a dog on a " + "dog " * 12).reason == "repetition"


# ------------------------------------------------------------------------------------- Tag2Text


@pytest.fixture
def ram(monkeypatch, tmp_path):
    """The package of Tag2Text, with its shapes of calls; returns the path of weights for it."""
    calls = []

    class Tag2TextModel(torch.nn.Module):
        def __init__(self, threshold):
            super().__init__()
            self.threshold = threshold
            self.visual_encoder = torch.nn.Linear(3, 2)
            self.tag_encoder = torch.nn.Linear(2, 2)
            self.tagging_head = self.tag_encoder  # shared, as in the real one

        def generate(
            self, image, sample=False, num_beams=3, max_length=30, min_length=10, top_p=0.9,
            repetition_penalty=1.0, tag_input=None, return_tag_predict=False,
        ):  # fmt: skip
            assert image.shape[1:] == (3, 384, 384)
            assert tag_input is None
            calls.append({"batch": len(image), "max_length": max_length, "num_beams": num_beams})
            reddest = ["red" if float(x[0].mean()) > 0 else "dark" for x in image]
            captions = [f"a {word} picture" for word in reddest]
            return (captions, reddest) if return_tag_predict else captions

    def tag2text(pretrained="", *, vit, image_size, threshold=0.68):
        assert (vit, image_size) == ("swin_b", 384)
        model = Tag2TextModel(threshold)
        model.load_state_dict(torch.load(pretrained)["model"], strict=False)
        return model

    def get_transform(image_size=384):
        from torchvision.transforms import Compose, Normalize, Resize, ToTensor

        return Compose([
            lambda image: image.convert("RGB"),
            Resize((image_size, image_size)),
            ToTensor(),
            Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ])  # fmt: skip

    package, submodule = ModuleType("ram"), ModuleType("ram.models")
    package.get_transform, submodule.tag2text = get_transform, tag2text
    monkeypatch.setitem(sys.modules, "ram", package)
    monkeypatch.setitem(sys.modules, "ram.models", submodule)
    state = Tag2TextModel(0.68).state_dict()
    held = {key: state[key] for key in state if not key.startswith("tag_encoder")}
    torch.save({"model": held}, tmp_path / "tag2text.pth")
    return tmp_path / "tag2text.pth", calls


def test_tag2text_describes_frames_through_its_own_package(ram, tmp_path):
    weights, calls = ram
    red, black = (jpeg_encode(np.full((48, 64, 3), c, np.uint8)) for c in ([250, 0, 0], [0, 0, 0]))
    config = MultiscaleConfig(frame=Tag2TextConfig(weights=str(weights), batch_size=2))
    (row,) = captioned(tmp_path / "corpus", config, [[red, black, red]])
    assert row["caption_video_fine"] == ["a red picture", "a dark picture", "a red picture"]
    assert row["caption_video_coarse"] == "a dark picture"
    assert wrote(row)["caption_video_fine"]["model"] == "tag2text"
    assert calls == [{"batch": 2, "max_length": 50, "num_beams": 3}]


def test_tag2text_weights_that_lack_some_are_refused_by_name(ram):
    weights, _ = ram
    held = torch.load(weights)["model"]
    del held["visual_encoder.weight"]
    torch.save({"model": held}, weights)
    with pytest.raises(DependencyError, match=r"missing visual_encoder\.weight \(1 in all\)"):
        build_frame_captioner(Tag2TextConfig(weights=str(weights)))


def test_tag2text_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ram", None)
    with pytest.raises(DependencyError) as error:
        build_frame_captioner(Tag2TextConfig(weights=str(tmp_path / "no.pth")))
    assert "pip install git+" in (error.value.hint or "")


# ---------------------------------------------------------------------------- rules and settings


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a man walks down a street", "a man walking down the street", True),
        ("a man walks", "a man walks down the street", True),
        ("a man walks down a street", "two dogs play in the snow", False),
        ("the", "a", False),
        ("the", "The.", True),
    ],
)
def test_captions_in_about_the_same_words_are_alike(one, other, same):
    assert alike(one, other) is same


def test_what_differs_is_said_once_in_order():
    street, walking = "a man walks down a street", "a man walking down the street"
    dogs, car, cat = "two dogs in the snow", "a red car is parked", "a cat sleeps on a bed"
    assert distinct([street, walking, walking, dogs]) == [walking, dogs]
    assert distinct([cat, street, street, dogs, dogs, car, car]) == [street, dogs, car]
    assert distinct([]) == []


def test_a_batch_of_summaries_is_what_each_is_alone(models):
    summariser = build_summariser(
        T5SummariserConfig(model=str(models["t5"]), max_new_tokens=6, batch_size=4)
    )
    groups = [["a man runs", "the dog"], ["a cat plays music in the street", "the red car", "a"]]
    groups += [["sea"], groups[0]]
    alone = [summariser.summarise([group])[0] for group in groups]
    assert len(set(alone)) == 3
    assert summariser.summarise(groups) == alone


def test_settings_say_what_is_needed_and_which_prompt_does_not_fit(tmp_path):
    config = MultiscaleConfig.model_validate(
        {
            "frame": {"kind": "tag2text", "weights": "t.pth"},
            "middle": {"kind": "blip2", "revision": "abc"},
            "summariser": {},
        }
    )
    assert Package("ram", config.frame.needs()[0].install) in config.frame.needs()
    assert Weights("file", "t.pth") in config.frame.needs()
    assert Weights("hub", "Salesforce/blip2-opt-2.7b", "abc") in config.middle.needs()
    assert Weights("hub", "google-t5/t5-base") in config.summariser.needs()
    prompt = tmp_path / "p.yaml"
    prompt.write_text("system: Be brief.\nask: Merge {coarse} and {fin}.\nagain: '{problem}'\n")
    with pytest.raises(ValueError, match=r"unknown variable \{fin\}"):
        MultiscaleConfig(merge_prompt=str(prompt))
