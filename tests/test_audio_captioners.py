# SPDX-License-Identifier: Apache-2.0
# Answers may be failures; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""Every captioner of sound through its stage: tiny checkpoints, real loading code, a shard at the end."""

import io
import json
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dataengine.corpus import Corpus
from dataengine.errors import DependencyError
from dataengine.models.answers import Failure
from dataengine.models.audio import (
    AudioLLMConfig,
    BeatsCaptionerConfig,
    ClapTagsConfig,
    build_audio_captioner,
)
from dataengine.models.audio_llm import AudioLLMCaptioner, wav_bytes
from dataengine.models.clap import choose, name_sounds
from dataengine.models.llm import HttpLLMConfig, TransformersLLMConfig
from dataengine.models.validate import TextChecks
from dataengine.needs import Weights
from dataengine.networks.audio_qformer import (
    AudioQFormer,
    CaptionerFile,
    SoundPrompt,
    file_sha256,
    hear,
    model_digest,
    save_qformer,
)
from dataengine.networks.beats import load_beats
from dataengine.networks.config import AudioQFormerConfig
from dataengine.records import digest
from dataengine.stage import Kept
from dataengine.stages.caption_audio import CaptionAudioStage, is_silent
from tests.helpers import clip_row, clips_table, ledger_row
from tests.tiny_beats import (
    SENTENCES,
    save_sentence_lm,
    seeded_sound,
    sound_of,
    write_checkpoint,
)

RATE = 16_000
QFORMER = AudioQFormerConfig(
    num_queries=4, width=16, mlp_width=32, layers=2, heads=2, window_s=0.5, max_windows=2
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sounding(*waves):
    """One clip per sound; its number is its second."""
    rows = []
    for number, sound in enumerate(waves):
        columns = {"has_audio": sound is not None}
        if sound is not None:
            columns["video"] = {"bytes": wav_bytes(sound), "path": None}
        rows.append(clip_row("v", 1000 * number, 1000 * number + 1000, **columns))
    return rows


def stage_of(config):
    stage = CaptionAudioStage(CaptionAudioStage.Config(model=config))
    stage.setup()
    return stage


def columns_of(outcomes):
    assert all(isinstance(outcome, Kept) and len(outcome.rows) == 1 for outcome in outcomes)
    return [outcome.rows[0] for outcome in outcomes]


def through_a_shard(folder, rows, outcomes):
    """Captions and their provenance as a corpus gives them back."""
    rows = [row | dict(columns) for row, columns in zip(rows, columns_of(outcomes), strict=True)]
    corpus = Corpus.create(str(folder))
    corpus.take_over("r-1")
    corpus.commit(clips_table(rows), [ledger_row("v", rows)], run_id="r-1", fingerprint="f")
    read = sorted(
        corpus.catalog(["clip_id", "caption_audio", "provenance"]).to_pylist(),
        key=lambda r: int(r["clip_id"].split("_")[1]),
    )
    assert [row["clip_id"] for row in read] == [row["clip_id"] for row in rows]
    return read


# ----------------------------------------------------------------------------------- the stage


class Listener:
    """Answers what it is told to, and remembers what it heard."""

    model, revision, prompt_hash = "listener", "7", "hash"

    def __init__(self, rate=RATE, answer=lambda name: f"About {name}."):
        self.rate, self.answer, self.heard = rate, answer, []

    def caption(self, waveforms, clip_ids):
        self.heard += zip(clip_ids, waveforms, strict=True)
        return [self.answer(name) for name in clip_ids]


def listening(monkeypatch, **options):
    listener = Listener(**options)
    monkeypatch.setattr(
        "dataengine.stages.caption_audio.build_audio_captioner", lambda config: listener
    )
    stage = CaptionAudioStage(CaptionAudioStage.Config())
    stage.setup()
    return stage, listener


def test_clips_without_sound_cost_no_call_and_say_so(monkeypatch):
    stage, listener = listening(monkeypatch)
    broken = clip_row("v", 9000, 9500, video={"bytes": b"no media", "path": None})
    rows = [*sounding(None, np.zeros(RATE), 3e-4 * seeded_sound(), seeded_sound()), broken]
    columns = columns_of(stage.process(rows))
    assert [row["caption_audio"] for row in columns] == [
        *(None, "Silence.", "Silence.", "About v_3000_4000.", None)
    ]
    notes = [[(e["model"], e["note"]) for e in row["provenance"]] for row in columns]
    nothing, silent = [("listener", "no_sound")], [("level", "silent")]
    assert notes == [nothing, silent, silent, [("listener", None)], nothing]
    assert [name for name, _ in listener.heard] == ["v_3000_4000"]


def test_no_call_at_all_without_sound(monkeypatch):
    stage, listener = listening(monkeypatch)
    stage._captioner.caption = None
    assert len(stage.process(sounding(None, np.zeros(100)))) == 2
    assert listener.heard == []


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_a_captioner_hears_at_the_rate_it_names(monkeypatch, rate):
    stage, listener = listening(monkeypatch, rate=rate)
    stage.process(sounding(np.sin(np.arange(RATE) * 2 * np.pi * 1000 / RATE).astype(np.float32)))
    ((_, heard),) = listener.heard
    assert abs(len(heard) - rate) < rate // 100
    spectrum = np.abs(np.fft.rfft(heard[: rate // 2]))
    assert abs(np.argmax(spectrum) * 2 - 1000) <= 2


def test_a_failure_is_a_note(monkeypatch):
    answers = {"v_0_1000": Failure("timeout"), "v_1000_2000": None, "v_2000_3000": "Rain."}
    stage, _ = listening(monkeypatch, answer=answers.get)
    columns = columns_of(stage.process(sounding(*[seeded_sound()] * 3)))
    assert [row["caption_audio"] for row in columns] == [None, None, "Rain."]
    assert [[e["note"] for e in row["provenance"]] for row in columns] == [
        *(["failed:timeout"], [], [None])
    ]


@pytest.mark.parametrize(
    ("sound", "silent"),
    [
        (np.zeros(5000), True),
        (np.full(5000, 0.9e-3), True),
        (np.full(5000, 1.1e-3), False),
        (np.r_[np.zeros(50_000), np.full(7, 1e-2)], False),
        (np.full(3, 0.1), False),
    ],
)
def test_silence_is_below_60_db_throughout(sound, silent):
    assert is_silent(sound.astype(np.float32), RATE) is silent


# --------------------------------------------------------------------------------------- BEATs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A captioner's folder with random weights, its BEATs and its language model."""
    folder = tmp_path_factory.mktemp("beats")
    beats = write_checkpoint(folder / "beats.pt")
    language_model = save_sentence_lm(folder / "lm")
    write_captioner(folder / "captioner", beats, language_model)
    return folder


def write_captioner(folder, beats, language_model, seed=0):
    torch.manual_seed(seed)
    qformer = AudioQFormer(QFORMER, 32, 32)
    with torch.no_grad():
        qformer.project.weight *= 30  # so that other sounds get other captions
    file = CaptionerFile(
        qformer=QFORMER,
        prompt=SoundPrompt(before="Sound", after="Caption"),
        beats=str(beats),
        beats_sha256=file_sha256(beats),
        sound_width=32,
        language_model=str(language_model),
        language_model_sha256=model_digest(str(language_model)),
        text_width=32,
        max_tokens=8,
    )
    save_qformer(folder, qformer, file)
    return folder


def beats_config(trained, **columns):
    return BeatsCaptionerConfig(captioner=str(trained / "captioner"), **columns)


def test_beats_captions_reach_the_shard(trained, tmp_path):
    kinds = [*SENTENCES] * 2
    rng = np.random.default_rng(5)
    rows = sounding(*[sound_of(kind, rng, rng.uniform(0.05, 1.4)) for kind in kinds], None)
    outcomes = stage_of(beats_config(trained, batch_size=3)).process(rows)
    read = through_a_shard(tmp_path / "corpus", rows, outcomes)
    captions = [row["caption_audio"] for row in read]
    assert captions[-1] is None
    assert all(captions[:-1])
    for row in read[:-1]:
        (entry,) = row["provenance"]
        assert (entry["column"], entry["model"]) == ("caption_audio", "beats-qformer")
        assert len(entry["revision"]) == 16
    # Every sound by itself gets what it got among others.
    alone = stage_of(beats_config(trained, batch_size=1)).process(rows)
    assert alone == outcomes


def test_what_is_heard_is_cut_into_windows(trained):
    beats = load_beats(trained / "beats.pt")
    waves = [seeded_sound(seconds) for seconds in (0.3, 3.0, 0.6)]
    with torch.inference_mode():
        sound, windows, there = hear(beats, waves, QFORMER)
        first = beats([waves[1][:8000]])[0][0]
        second = beats([waves[1][8000:16000]])[0][0]
    # Half a second is 48 frames of 10 ms, three patches of 8 bands; 0.1 s is too short for any.
    assert there.sum(dim=1).tolist() == [8, 48, 24]
    assert windows[1].tolist() == [0] * 24 + [1] * 24
    np.testing.assert_allclose(sound[1], torch.cat([first, second]), atol=1e-4)


def test_a_moved_captioner_is_told_where_its_parts_lie(trained, tmp_path):
    config = beats_config(trained)
    weights = [need.name for need in config.needs() if isinstance(need, Weights)]
    assert weights[2:] == [str(trained / "beats.pt"), str(trained / "lm")]
    written = json.loads((trained / "captioner" / "config.json").read_text())
    moved = tmp_path / "captioner"
    moved.mkdir()
    (moved / "model.safetensors").write_bytes(
        (trained / "captioner" / "model.safetensors").read_bytes()
    )
    written |= {"beats": "/nowhere/b.pt", "language_model": "nobody/nothing"}
    (moved / "config.json").write_text(json.dumps(written))
    with pytest.raises(DependencyError, match=r"/nowhere/b\.pt"):
        build_audio_captioner(BeatsCaptionerConfig(captioner=str(moved)))
    told = BeatsCaptionerConfig(
        captioner=str(moved), beats=str(trained / "beats.pt"), language_model=str(trained / "lm")
    )
    (caption,) = build_audio_captioner(told).caption([seeded_sound()], ["a"])
    (same,) = build_audio_captioner(config).caption([seeded_sound()], ["a"])
    assert caption == same


def test_parts_must_be_those_of_the_training(trained, tmp_path):
    other = write_checkpoint(tmp_path / "other.pt", seed=1)
    with pytest.raises(DependencyError, match=r"other\.pt is not what the audio captioner was"):
        build_audio_captioner(beats_config(trained, beats=str(other)))
    other = save_sentence_lm(tmp_path / "lm", seed=1)
    with pytest.raises(DependencyError, match="lm is not what the audio captioner was"):
        build_audio_captioner(beats_config(trained, language_model=str(other)))


def test_a_captioner_loads_whole_or_not_at_all(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_captioner(tmp_path / "c", trained / "beats.pt", trained / "lm")
    path = folder / "model.safetensors"
    weights = load_file(path)
    for change, named in (
        ({"project.bias": None}, "project.bias"),
        ({"more.weight": torch.zeros(1)}, "more.weight"),
        ({"queries": torch.zeros(1, 4, 17)}, "queries"),
    ):
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        save_file(changed, path)
        with pytest.raises(DependencyError, match=named):
            build_audio_captioner(BeatsCaptionerConfig(captioner=str(folder)))
    path.write_bytes(b"nothing")
    with pytest.raises(DependencyError, match="do not fit"):
        build_audio_captioner(BeatsCaptionerConfig(captioner=str(folder)))
    (folder / "config.json").write_text("{}")
    with pytest.raises(DependencyError, match="No audio captioner"):
        build_audio_captioner(BeatsCaptionerConfig(captioner=str(folder)))


# ---------------------------------------------------------------------------------------- CLAP

TAGS = "template: 'This is {sound}.'\nheard: 'One hears {sound}.'\ntags: |\n  rain\n  a dog\n  a bell\n"


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    """A random CLAP whose windows are of one second, and a list of three sounds."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor

    from tests.tiny_llm import byte_tokenizer

    folder = tmp_path_factory.mktemp("clap")
    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 400,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    audio = {
        "spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4],
        "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "window_size": 4,
        "num_attention_heads": [2, 2], "num_hidden_layers": 2, "num_classes": 4,
    }  # fmt: skip
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    torch.manual_seed(0)
    model = ClapModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder / "clap")
    extractor = ClapFeatureExtractor(
        feature_size=16, sampling_rate=48_000, hop_length=480, max_length_s=1,
        fft_window_size=1024, truncation="rand_trunc", padding="repeatpad",
    )  # fmt: skip
    ClapProcessor(extractor, tokenizer).save_pretrained(folder / "clap")
    (folder / "tags.yaml").write_text(TAGS)
    return folder


def clap_config(clap, **columns):
    base = {
        "model": str(clap / "clap"), "tags": str(clap / "tags.yaml"), "threshold": -1.0,
        "margin": 2.0, "max_tags": 3,
    }  # fmt: skip
    return ClapTagsConfig(**base | columns)


def test_clap_names_what_is_most_similar(clap, tmp_path):
    """The same similarities as the library's own model gives, through to the shard."""
    from transformers import ClapModel, ClapProcessor

    sounds = [0.3 * seeded_sound(1.0, seed) ** (1 + seed) for seed in range(3)]
    rows = sounding(*sounds, None)
    outcomes = stage_of(clap_config(clap, batch_size=2)).process(rows)
    read = through_a_shard(tmp_path / "corpus", rows, outcomes)
    assert read[-1]["caption_audio"] is None
    model = ClapModel.from_pretrained(clap / "clap").eval()
    processor = ClapProcessor.from_pretrained(clap / "clap")
    texts = [f"This is {tag}." for tag in ("rain", "a dog", "a bell")]
    for row, clip in zip(rows[:-1], read, strict=False):
        from dataengine.media import read_audio

        wave_48k = read_audio(row["video"]["bytes"], rate=48_000)[:48_000]
        inputs = processor(
            text=texts, audio=wave_48k, sampling_rate=48_000, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = model(**inputs).logits_per_audio[0]
        named = [("rain", "a dog", "a bell")[i] for i in logits.argsort(descending=True)]
        assert clip["caption_audio"] == f"One hears {named[0]}, {named[1]} and {named[2]}."
        (entry,) = clip["provenance"]
        assert entry["model"] == "clap"
        assert entry["prompt_hash"] == digest_of(clap / "tags.yaml")
        assert len(entry["revision"]) > 8


def digest_of(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_clap_hears_all_of_a_long_sound_and_the_same_in_any_batch(clap):
    tagger = build_audio_captioner(clap_config(clap, max_tags=1))
    tone, noise = (np.tile(seeded_sound(1.0, seed), 3) for seed in (1, 2))
    long = np.concatenate([tone[:48_000], noise[:48_000], tone[:1000]])
    sounds = [long, tone[:700], noise[:30_000]]
    together = tagger.caption(sounds, ["a", "b", "c"])
    assert together == [tagger.caption([sound], ["x"])[0] for sound in sounds]
    assert [len(part) for part in tagger._windows(long)] == [48_000, 48_000]


def test_a_clap_checkpoint_with_a_hole_is_refused(clap, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clap"
    shutil.copytree(clap / "clap", folder)
    weights = load_file(folder / "model.safetensors")
    del weights["audio_projection.linear1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DependencyError, match=r"missing audio_projection\.linear1\.weight"):
        build_audio_captioner(clap_config(clap, model=str(folder)))


@pytest.mark.parametrize(
    ("similar", "chosen"),
    [
        ([0.1, 0.5, 0.45], [1, 2]),
        ([0.1, 0.5, 0.35], [1]),
        ([0.29, 0.1, 0.2], []),
        ([0.5, 0.5, 0.5], [0, 1]),
    ],
)
def test_which_sounds_are_named(similar, chosen):
    assert choose(np.array(similar), threshold=0.3, margin=0.1, most=2) == chosen


def test_sounds_are_joined_as_english_does():
    assert [name_sounds(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_the_shipped_list_is_whole(clap):
    from dataengine.models.audio import TAG_PROMPT
    from dataengine.prompts import load_prompt

    prompt = load_prompt(ClapTagsConfig().tags, TAG_PROMPT)
    tags = [line.strip() for line in prompt.texts["tags"].splitlines()]
    assert 100 <= len(tags) == len(set(tags))
    assert prompt.render("heard", sound="rain and thunder") == (
        "The sound of rain and thunder is heard."
    )


# ----------------------------------------------------------------------------------- audio LLM


class Answering:
    """A language model that answers by id, from a list per clip, in reverse order."""

    model, revision = "omni", "3"

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def answer(self, requests):
        self.asked.append(list(requests))
        return {r.id: self.answers[r.id].pop(0) for r in reversed(requests)}


def audio_llm(**columns):
    return AudioLLMConfig(llm=HttpLLMConfig(base_url="http://x/v1", model="omni"), **columns)


def test_an_audio_llm_is_shown_each_sound_under_its_clips_id():
    llm = Answering(a=["Rain falls on a roof."], b=["A dog barks twice in the distance."])
    captioner = AudioLLMCaptioner(audio_llm(max_s=0.5), llm)
    sounds = [seeded_sound(0.3), seeded_sound(1.0, seed=1)]
    captions = captioner.caption(sounds, ["a", "b"])
    assert captions == ["Rain falls on a roof.", "A dog barks twice in the distance."]
    ((first, second),) = llm.asked
    assert (first.id, second.id) == ("a", "b")
    assert first.input_hash == digest(first.audio) != second.input_hash
    for request, sound in ((first, sounds[0]), (second, sounds[1][:8000])):
        with wave.open(io.BytesIO(request.audio)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
        np.testing.assert_allclose(samples, sound, atol=1e-4)
    assert (captioner.model, captioner.revision) == ("omni", "3")
    assert len(captioner.prompt_hash or "") == 64


def test_an_audio_llm_is_asked_once_more_and_then_fails():
    llm = Answering(
        a=["I'm sorry, I cannot hear audio.", "Wind blows hard."],
        b=["As an AI I have no ears.", "OK"],
        c=[Failure("timeout")],
        d=["Waves roll onto a beach."],
    )
    names = list("abcd")
    captions = AudioLLMCaptioner(audio_llm(), llm).caption([seeded_sound(0.2)] * 4, names)
    assert [c.reason if isinstance(c, Failure) else c for c in captions] == [
        *("Wind blows hard.", "too_short", "timeout", "Waves roll onto a beach.")
    ]
    first, again = llm.asked
    assert [r.id for r in again] == ["a", "b"]
    assert again[0].prompt != first[0].prompt
    assert again[0].audio == first[0].audio


def test_a_language_model_that_cannot_hear_is_refused():
    with pytest.raises(ValidationError, match="modality must be audio"):
        AudioLLMConfig(llm=TransformersLLMConfig(model="m"))
    assert AudioLLMConfig(llm=TransformersLLMConfig(model="m", modality="audio")).needs() == ()


def test_checks_can_be_set():
    llm = Answering(a=["Rain."])
    config = audio_llm(checks=TextChecks(min_words=1))
    assert AudioLLMCaptioner(config, llm).caption([seeded_sound(0.2)], ["a"]) == ["Rain."]


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """A random Qwen2-Audio that answers a few letters, other letters for other sounds."""
    from tests.tiny_llm import save_tiny_audio_llm

    return save_tiny_audio_llm(tmp_path_factory.mktemp("llm") / "tiny-audio")


def hearing_stage(folder, batch_size=4, **llm):
    config = AudioLLMConfig(
        llm=TransformersLLMConfig(
            model=str(folder), modality="audio", batch_size=batch_size, **llm
        ),
        max_tokens=16,
        checks=TextChecks(min_words=1, language=""),
    )
    return stage_of(config)


def test_audio_llm_captions_reach_the_shard(hearing, tmp_path):
    """Clips without sound, a silent one and a damaged one among good ones; each as if it were alone."""
    sounds = [seeded_sound(0.3 + 0.4 * n, seed=n) for n in range(4)]
    damaged = clip_row("v", 8000, 8500, video={"bytes": b"RIFF damaged", "path": None})
    rows = [*sounding(None, *sounds[:2], np.zeros(RATE), *sounds[2:], None), damaged]
    stage = hearing_stage(hearing)
    outcomes = stage.process(rows)
    read = through_a_shard(tmp_path / "corpus", rows, outcomes)
    heard = [1, 2, 4, 5]
    assert all(read[at]["caption_audio"] for at in heard)
    assert len({read[at]["caption_audio"] for at in heard}) > 1
    assert [read[at]["caption_audio"] for at in (0, 3, 6, 7)] == [None, "Silence.", None, None]
    notes = [[entry["note"] for entry in row["provenance"]] for row in read]
    nothing, silent, good = ["no_sound"], ["silent"], [None]
    assert notes == [nothing, good, good, silent, good, good, nothing, nothing]
    for at in heard:
        (entry,) = read[at]["provenance"]
        assert (entry["model"], len(entry["revision"])) == ("tiny-audio", 16)
        assert entry["prompt_hash"] == stage._captioner.prompt_hash
    assert [stage.process([row])[0] for row in rows] == outcomes


def test_audio_llm_is_not_asked_about_clips_without_sound(hearing, monkeypatch):
    stage = hearing_stage(hearing)
    rows = [*sounding(None, np.zeros(RATE), seeded_sound(0.3)), sounding(None)[0]]
    answer, asked = stage._captioner._llm.answer, []

    def counted(requests):
        asked.extend(request.id for request in requests)
        return answer(requests)

    monkeypatch.setattr(stage._captioner._llm, "answer", counted)
    assert len(stage.process(rows)) == 4
    assert set(asked) == {"v_2000_3000"}
    del asked[:]
    assert len(stage.process(rows[:2])) == 2
    assert asked == []


def test_audio_llm_that_refuses_one_sound_says_so_of_that_clip(hearing, monkeypatch):
    """What the model cannot take, though it is sound, costs one clip its caption."""
    rows = sounding(*[seeded_sound(0.3, seed=n) for n in range(3)])
    stage = hearing_stage(hearing)
    clean = columns_of(stage.process(rows))
    request = stage._captioner._request

    def damaged(waveform, clip_id):
        made = request(waveform, clip_id)
        return replace(made, audio=made.audio[:30]) if clip_id == "v_1000_2000" else made

    monkeypatch.setattr(stage._captioner, "_request", damaged)
    columns = columns_of(stage.process(rows))
    assert [columns[at] for at in (0, 2)] == [clean[at] for at in (0, 2)]
    assert columns[1]["caption_audio"] is None
    assert columns[1]["provenance"][0]["note"].startswith("failed:")


def test_audio_llm_with_a_hole_is_refused(hearing, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(hearing, tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    hole = next(name for name in sorted(weights) if name.endswith("layer_norm.weight"))
    del weights[hole]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DependencyError, match=r"missing .*layer_norm\.weight"):
        hearing_stage(folder)
