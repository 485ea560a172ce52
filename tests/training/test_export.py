# SPDX-License-Identifier: Apache-2.0
"""Exports: what goes out comes back bit by bit, in this package and in others."""

import json
import shutil
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dataengine.errors import ConfigError, DependencyError, EngineError
from dataengine.models.video_text import TrainedScorerConfig, build_video_text
from dataengine.networks.config import (
    InternVideo2ClipConfig,
    InternVideo2Config,
    InternVideo2Stage2Config,
    LlamaTextConfig,
    MobileClipTextConfig,
)
from dataengine.networks.folder import build_network, load_folder, read_folder
from dataengine.networks.internvideo2 import InternVideo2
from dataengine.networks.text import clean_caption, tokenise
from training import checkpoint, export
from training.config import (
    RECIPES_DIR,
    OpenClipConfig,
    config_from_dict,
    inputs_of,
    load_recipe,
)
from training.data.text import build_tokenizer
from training.data.transforms import WHOLE, normalise, square_images
from training.distributed import World
from training.hub import export_huggingface
from training.models import build_task
from training.models.open_clip_model import OpenClipDualEncoder
from training.trainer import Trainer

VISION = InternVideo2Config(
    image_size=28, num_frames=2, width=32, layers=2, heads=2, mlp_width=64, pool_heads=2,
    embed_dim=16,
)  # fmt: skip
CLIP_TEXT = MobileClipTextConfig(context_length=16, width=16, layers=1, heads=2, mlp_width=32)
LLAMA = LlamaTextConfig(vocab_size=60, context_length=16, width=32, layers=1, heads=2, mlp_width=64)


def shapes() -> dict[str, Any]:
    """Tiny models by the kinds of folders, in training's own configs."""
    stage2 = load_recipe("internvideo2_s2_tiny").model
    assert isinstance(stage2, InternVideo2Stage2Config)
    silent = stage2.model_copy(update={"audio": None, "vision": VISION})
    clip = InternVideo2ClipConfig(
        kind="internvideo2_clip", vision=VISION, text=CLIP_TEXT, embed_dim=16
    )
    return {
        "viclip": load_recipe("viclip_tiny").model,
        "internvideo2_stage2": silent,
        "internvideo2_stage2 that hears": stage2,
        "internvideo2_clip": clip,
        "internvideo2_clip with LLaMA": clip.model_copy(update={"text": LLAMA}),
    }


SHAPES = shapes()


def load(folder) -> tuple[Any, Any]:
    return load_folder(folder)


def network_of(config) -> Any:
    torch.manual_seed(0)
    return build_network(config).eval()


def encoded(network, config) -> tuple[torch.Tensor, ...]:
    """Features of one clip and one text, and the temperature."""
    vision = getattr(config, "video", None) or config.vision
    torch.manual_seed(1)
    frames = torch.randn(2, vision.num_frames, 3, vision.image_size, vision.image_size)
    tokens = torch.randint(5, 50, (2, 12))
    with torch.no_grad():
        heard = ()
        if getattr(config, "audio", None):
            heard = network.hear(torch.randn(2, 64, 64))
        return network.encode_video(frames), network.encode_text(tokens), network.temp, *heard


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def viclip(tmp_path):
    """A network, its shape, and a folder that holds it."""
    config = SHAPES["viclip"]
    network = network_of(config)
    folder = tmp_path / "viclip"
    export.export_folder(network.state_dict(), config, folder, about={"steps": 7})
    return network, config, folder


# ------------------------------------------------------------------------------------ model folders


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_comes_back_bit_by_bit(kind, tmp_path):
    config = SHAPES[kind]
    network = network_of(config)
    about = {"steps": 7, "trained_on": ["corpus"]}
    num_bytes = export.export_folder(network.state_dict(), config, tmp_path / "m", about=about)
    assert num_bytes == sum(len(content) for content in files_of(tmp_path / "m").values())

    loaded, shape = load(tmp_path / "m")
    assert shape == config
    assert not loaded.training
    for own, theirs in zip(encoded(network, config), encoded(loaded, config), strict=True):
        assert torch.equal(own, theirs)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    found = read_folder(tmp_path / "m")
    assert (found.kind, found.about) == (kind.split()[0], about)


def test_names_in_a_folder_are_the_published_ones(tmp_path):
    """Published code reads a second stage's file, which holds the word matrix twice."""
    config = SHAPES["internvideo2_stage2"]
    network = network_of(config)
    export.export_folder(network.state_dict(), config, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    words = network.state_dict()["text_encoder.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(stored["text_encoder.cls.predictions.decoder.weight"], words)


def test_of_a_distilled_model_the_vision_encoder_is_exported(tmp_path):
    recipe = load_recipe("internvideo2_s1_tiny")
    student: Any = build_task(recipe).network.eval()
    export.export_folder(student.state_dict(), recipe.model, tmp_path / "m")
    loaded, config = load(tmp_path / "m")
    assert type(loaded) is InternVideo2
    assert config == student.config
    assert not any("decoder" in name for name in loaded.state_dict())
    frames = torch.randn(1, config.num_frames, 3, config.image_size, config.image_size)
    with torch.no_grad():
        for own, theirs in zip(InternVideo2.forward(student, frames), loaded(frames), strict=True):
            assert torch.equal(own, theirs)
    assert tuple(read_folder(tmp_path / "m").about["pixel_mean"]) == recipe.model.pixel_mean


def test_large_models_are_stored_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "200KB")
    config = SHAPES["internvideo2_stage2 that hears"]
    network = network_of(config)
    export.export_folder(network.state_dict(), config, tmp_path / "m")
    names = set(files_of(tmp_path / "m"))
    assert "model.safetensors.index.json" in names
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    loaded, _ = load(tmp_path / "m")
    for own, theirs in zip(encoded(network, config), encoded(loaded, config), strict=True):
        assert torch.equal(own, theirs)
    lost = next(name for name in sorted(names) if name.endswith(".safetensors"))
    (tmp_path / "m" / lost).unlink()
    with pytest.raises(DependencyError, match=f"names {lost}, which is not there"):
        load(tmp_path / "m")


def test_half_keeps_three_digits(tmp_path):
    config = SHAPES["viclip"]
    network = network_of(config)
    whole = export.export_folder(network.state_dict(), config, tmp_path / "whole")
    half = export.export_folder(network.state_dict(), config, tmp_path / "half", half=True)
    assert half < 0.51 * whole
    loaded, _ = load(tmp_path / "half")
    for name, weight in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())


def test_weights_that_are_no_numbers_are_not_exported(tmp_path):
    config = SHAPES["viclip"]
    state = network_of(config).state_dict()
    state["vision_encoder.ln_pre.bias"][0] = 1e6
    export.export_folder(state, config, tmp_path / "whole")
    with pytest.raises(EngineError, match=r"vision_encoder\.ln_pre\.bias is not finite in float16"):
        export.export_folder(state, config, tmp_path / "half", half=True)
    state["vision_encoder.ln_pre.bias"][0] = float("nan")
    with pytest.raises(EngineError, match=r"vision_encoder\.ln_pre\.bias is not finite"):
        export.export_folder(state, config, tmp_path / "nan")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_an_export_replaces_an_older_one_whole(viclip, tmp_path, monkeypatch):
    network, config, folder = viclip
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "1MB")
    export.export_folder(network.state_dict(), config, folder)
    before = files_of(folder)
    assert "model.safetensors" not in before
    network.state_dict()["temp"].fill_(float("nan"))
    with pytest.raises(EngineError):
        export.export_folder(network.state_dict(), config, folder)
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints", "model.safetensors.old"])
def test_what_no_export_wrote_is_never_replaced(foreign, viclip):
    network, config, folder = viclip
    (folder / foreign).mkdir() if foreign == "checkpoints" else (folder / foreign).write_text("x")
    with pytest.raises(ConfigError, match=f"holds {foreign}, which no export writes"):
        export.export_folder(network.state_dict(), config, folder)
    assert (folder / foreign).exists()


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_weights(**changes):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        changed = {**state, **{k.replace("__", "."): v for k, v in changes.items()}}
        kept = {name: value for name, value in changed.items() if value is not None}
        save_file(kept, folder / "model.safetensors")

    return change


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def name_a_file_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"temp": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"model\.safetensors is damaged or cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), "No weights in"),
        (name_a_file_elsewhere, r"index\.json names no files of weights"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "No model in"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'), "of another library"),
        (change_config(format_version=99), "newer version: format 99, 1 is known"),
        (change_config(kind="vivit"), "a model of unknown kind vivit"),
        (change_config(model={"kind": "viclip"}), r"config\.json: model\.embed_dim: Field required"),
        (change_config(kind="internvideo2"), r"config\.json: model\."),
        (change_weights(temp=None), "do not fit its config.json: missing temp"),
        (change_weights(spare=torch.ones(2)), "do not fit its config.json: unexpected spare"),
        (change_weights(temp=torch.ones(2)), r"of another shape temp \[2\] instead of \[\]"),
        (change_weights(temp=torch.tensor(float("inf"))), "temp is not finite"),
    ],
)  # fmt: skip
def test_folders_that_are_not_whole_are_refused_by_name(damage, said, viclip):
    damage(viclip[2])
    with pytest.raises(DependencyError, match=said) as caught:
        load(viclip[2])
    assert caught.value.hint


def test_second_stages_that_are_not_whole_are_refused_by_name(tmp_path):
    config = SHAPES["internvideo2_stage2 that hears"]
    export.export_folder(network_of(config).state_dict(), config, tmp_path / "m")
    change_weights(text_proj__bias=None)(tmp_path / "m")
    with pytest.raises(DependencyError, match=r"text_proj\.bias is missing"):
        load(tmp_path / "m")
    change_weights(text_proj__bias=torch.zeros(128), spare=torch.zeros(1))(tmp_path / "m")
    with pytest.raises(DependencyError, match="spare is not known"):
        load(tmp_path / "m")


def test_a_run_s_folder_stands_for_its_model(viclip, tmp_path):
    network, _, folder = viclip
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(DependencyError, match="checkpoints of training") as caught:
        load(tmp_path / "run")
    assert f"python -m training.export {tmp_path / 'run'} FOLDER" in caught.value.hint
    folder.rename(tmp_path / "run" / "model")
    assert torch.equal(load(tmp_path / "run")[0].temp, network.temp)


# ----------------------------------------------------------------------------- what reads the texts


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("kind", ["viclip", "internvideo2_stage2", "internvideo2_clip with LLaMA"])
def test_annotation_reads_texts_as_training_did(kind, clean, llama, tmp_path):
    config = SHAPES[kind]
    if kind.endswith("LLaMA"):
        text = LLAMA.model_copy(update={"tokenizer": llama})
        config = config.model_copy(update={"text": text})
    folder = tmp_path / "m"
    about = {"clean_captions": clean}
    export.export_folder(network_of(config).state_dict(), config, folder, about=about)
    scorer: Any = build_video_text(TrainedScorerConfig(weights=str(folder)))
    captions = ["A red Square, moving!", "a", "", "red squares " * 40]
    theirs = scorer._read_texts(captions)
    own = build_tokenizer(inputs_of(config))(
        [clean_caption(caption) if clean else caption for caption in captions]
    )
    assert theirs.dtype == torch.int64
    assert torch.equal(theirs, own)


def test_a_run_ends_with_a_model_that_scores(recipe, shapes_corpus, tmp_path):
    config = recipe(data__sources=[{"data": shapes_corpus}], optim__steps=2, optim__lr=0.01)
    trainer = Trainer(config, tmp_path / "run", World(0, 1, torch.device("cpu")))
    trainer.run()
    scorer = build_video_text(TrainedScorerConfig(weights=str(tmp_path / "run"), device="cpu"))
    assert scorer.model == "viclip:run"
    captions = ["A red square on grey ground."]
    (text,) = scorer.embed_texts(captions)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    (video,) = scorer.embed_videos([pixels])
    spec = inputs_of(config.model)
    frames = normalise(torch.from_numpy(pixels[None]), spec.pixel_mean, spec.pixel_std)
    task: Any = trainer.task.eval()
    with torch.no_grad():
        own_text = task.encode_text(build_tokenizer(spec)([clean_caption(captions[0])]))
        own_video = task.encode_video(frames)
    assert text == pytest.approx(own_text[0].numpy(), abs=1e-6)
    assert video == pytest.approx(own_video[0].numpy(), abs=1e-6)
    about = read_folder(tmp_path / "run").about
    assert (about["steps"], about["trained_on"]) == (2, ["shapes"])


@pytest.fixture
def llama(tmp_path):
    """A byte-pair tokenizer with LLaMA's special tokens."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"suma rized:", "▁r", "ed", "▁red"]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "r"), ("e", "d"), ("▁r", "ed")]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace("▁")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    (tmp_path / "llama").mkdir()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    return str(tmp_path / "llama")


# ---------------------------------------------------------------------------------------- open_clip


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def clip(request):
    config = load_recipe("clip_tiny").model
    assert isinstance(config, OpenClipConfig)
    config = config.model_copy(update={"quick_gelu": request.param, "pixel_std": (0.2, 0.3, 0.4)})
    torch.manual_seed(0)
    model: Any = OpenClipDualEncoder(config).eval()
    with torch.no_grad():  # far enough from its first weights for the activation to matter
        for block in model.clip.visual.transformer.resblocks:
            block.mlp.c_fc.weight *= 20
    return model, config


CAPTIONS = ["a red circle", "A dog's ball, 3 times!", "été über 日本", "x" * 60, "word " * 80]


def test_open_clip_loads_the_export_and_computes_the_same(clip, tmp_path):
    model, config = clip
    folder = tmp_path / "m"
    num_bytes = export.export_folder(model.state_dict(), config, folder, half=True)
    assert num_bytes < 8_000_000  # small enough to ship
    export.export_folder(model.state_dict(), config, folder)
    created: Any = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    loaded, preprocess = created
    image = Image.effect_noise((160, 90), 80).convert("RGB")
    frame = torch.from_numpy(square_images([image], config.video.image_size, WHOLE))
    own_input = normalise(frame[None], config.pixel_mean, config.pixel_std)
    torch.testing.assert_close(preprocess(image), own_input[0, 0], rtol=0, atol=0.03)

    tokens = tokenise(CAPTIONS, config.text.context_length)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS), tokens)
    with torch.no_grad():
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, model.clip.state_dict()[name]), name
        image_feature = loaded.encode_image(own_input[0], normalize=True)
        own_feature = model.clip.encode_image(own_input[0], normalize=True)
        torch.testing.assert_close(image_feature, own_feature, rtol=0, atol=1e-6)
        text_features = loaded.encode_text(tokens, normalize=True)
        torch.testing.assert_close(text_features, model.encode_text(tokens), rtol=0, atol=1e-6)


def test_the_score_stage_takes_the_export(clip, tmp_path):
    from dataengine.models.clip import OpenClipConfig as ScorerConfig
    from dataengine.models.clip import OpenClipScorer

    model, config = clip
    export.export_folder(model.state_dict(), config, tmp_path / "m", half=True)
    scorer = OpenClipScorer(ScorerConfig(model=f"local-dir:{tmp_path / 'm'}"))
    (text,) = scorer.embed_texts(["a red circle"])
    with torch.no_grad():
        (own,) = model.encode_text(tokenise(["a red circle"], config.text.context_length))
    assert text == pytest.approx(own.numpy(), abs=5e-3)
    # The stage of whole clips says who takes it.
    with pytest.raises(DependencyError, match="an open_clip model") as caught:
        load(tmp_path / "m")
    assert f"local-dir:{tmp_path / 'm'}" in caught.value.hint


def test_transformers_loads_the_hub_s_folder_and_computes_the_same(clip, tmp_path):
    from transformers import AutoModel, AutoProcessor

    model, config = clip
    folder = tmp_path / "m"
    export_huggingface(model.state_dict(), config, folder)
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(folder)

    image = Image.effect_noise((160, 90), 80).convert("RGB")
    frame = torch.from_numpy(square_images([image], config.video.image_size, WHOLE))
    own_input = normalise(frame[None], config.pixel_mean, config.pixel_std)[0]
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, own_input, rtol=0, atol=0.03)

    words = processor(text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    tokens = tokenise(CAPTIONS, config.text.context_length)
    for theirs, own in zip(words["input_ids"], tokens, strict=True):
        end = int(own.argmax())
        assert theirs[: end + 1].tolist() == own[: end + 1].tolist()
    with torch.no_grad():
        theirs = loaded(pixel_values=own_input, **words)
        own_image = model.clip.encode_image(own_input, normalize=True)
        torch.testing.assert_close(theirs.image_embeds, own_image, rtol=0, atol=1e-5)
        own_text = model.encode_text(tokens)
        torch.testing.assert_close(theirs.text_embeds, own_text, rtol=0, atol=1e-5)
        scale = model.clip.logit_scale.exp()
        torch.testing.assert_close(theirs.logits_per_image, scale * own_image @ own_text.T)


# ------------------------------------------------------------------------------- the hub's folders


def front_matter(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("kind", ["viclip", "internvideo2_stage2"])
def test_a_folder_for_the_hub_says_how_it_is_loaded(kind, tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer

    config = SHAPES[kind]
    network = network_of(config)
    folder = tmp_path / "my-model"
    about = {"trained_on": ["corpus", "a|b"], "clean_captions": True, "steps": 5}
    export_huggingface(
        network.state_dict(), config, folder, half=True, about=about, license_id="mit"
    )
    front, text = front_matter(folder)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert f"| Parameters | {millions:.2f} M |" in text
    assert front["license"] == "mit"
    assert {"pipeline_tag", "tags", "library_name"} <= front.keys()
    assert kind in front["tags"]
    assert "load_folder" in text
    assert "corpus, a\\|b" in text
    described = json.loads((folder / "config.json").read_text())
    assert (described["model_type"], described["dtype"]) == (kind, "float16")
    assert described["architectures"] == [type(network).__name__]

    loaded, shape = load(folder)
    assert shape == config
    assert torch.equal(loaded.temp, network.temp.half().float())
    vision = getattr(config, "video", None) or config.vision
    processor = AutoImageProcessor.from_pretrained(folder)
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    frame = torch.from_numpy(square_images([image], vision.image_size, WHOLE))
    own_input = normalise(frame[None], config.pixel_mean, config.pixel_std)[0]
    torch.testing.assert_close(pixels, own_input, rtol=0, atol=0.03)
    if kind == "internvideo2_stage2":
        own = AutoTokenizer.from_pretrained(RECIPES_DIR / "tiny_bert")
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs("a red circle")["input_ids"] == own("a red circle")["input_ids"]


def test_without_its_tokenizer_a_model_does_not_go_to_the_hub(tmp_path, caplog):
    config = SHAPES["internvideo2_stage2"].model_copy(update={"tokenizer": str(tmp_path / "no")})
    state = network_of(config).state_dict()
    with pytest.raises(DependencyError, match=r"tokenizer .* cannot be loaded"):
        export_huggingface(state, config, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    export.export_folder(state, config, tmp_path / "m")
    assert "the exported folder goes without it" in caplog.text
    load(tmp_path / "m")


# --------------------------------------------------------------------------------------- the command


def write_checkpoint(output, config, state, **more):
    writer = checkpoint.Writer(output, keep=1)
    tensors = {f"model.network.{name}": value for name, value in state.items()}
    writer.save(3, tensors | more, {"config": config.model_dump(mode="json")})
    writer.close()


def test_command_exports_a_run_and_a_checkpoint(recipe, tmp_path, capsys):
    config = recipe(data__clean_captions=False, data__sources=[{"data": "/mine/corpus#flt"}])
    network = network_of(config.model)
    write_checkpoint(tmp_path / "run", config, network.state_dict())
    step = tmp_path / "run" / "checkpoints" / "step_00000003"
    for source, name in ((tmp_path / "run", "a"), (step, "b")):
        assert export.main([str(source), str(tmp_path / name)]) == 0
        assert "score_video_text takes it" in capsys.readouterr().out
        loaded, _ = load(tmp_path / name)
        for key, weight in network.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[key])
    about = read_folder(tmp_path / "a").about
    assert (about["clean_captions"], about["steps"]) == (False, 3)
    assert about["trained_on"] == ["corpus#flt"]
    arguments = [str(step), str(tmp_path / "hub"), "--format", "huggingface", "--license", "mit"]
    assert export.main(arguments) == 0
    assert front_matter(tmp_path / "hub")[0]["license"] == "mit"


def test_command_exports_the_average_where_there_is_one(recipe, tmp_path):
    config = recipe()
    network = network_of(config.model)
    average = {"ema.network.temp": torch.tensor(0.25)}
    write_checkpoint(tmp_path / "run", config, network.state_dict(), **average)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "m")]) == 0
    assert torch.equal(load(tmp_path / "m")[0].state_dict()["temp"], torch.tensor(0.25))


def test_command_exports_a_student_without_its_teachers(tmp_path):
    """Their weights may be on another machine."""
    recipe = load_recipe("internvideo2_s1_tiny")
    student = build_task(recipe).network
    document = recipe.model_dump(mode="json")
    document["model"]["clip_teacher"]["weights"] = "/gone"
    config = config_from_dict(document, "a test")
    write_checkpoint(tmp_path / "run", config, student.state_dict())
    assert export.main([str(tmp_path / "run"), str(tmp_path / "m")]) == 0
    loaded, _ = load(tmp_path / "m")
    assert torch.equal(loaded.state_dict()["pos_embed"], student.state_dict()["pos_embed"])


def test_command_exports_an_open_clip_model(clip, tmp_path, capsys):
    model, shape = clip
    config = load_recipe("clip_tiny").model_copy(update={"model": shape})
    write_checkpoint(tmp_path / "run", config, model.state_dict())
    for form in ("folder", "open_clip"):
        out = tmp_path / form
        assert export.main([str(tmp_path / "run"), str(out), "--half", "--format", form]) == 0
        assert f"local-dir:{out}" in capsys.readouterr().out
        stored = load_file(out / "open_clip_model.safetensors")
        for name, weight in model.clip.state_dict().items():
            assert torch.equal(stored[name], weight.half())
        described = json.loads((out / "open_clip_config.json").read_text())
        assert described["preprocess_cfg"]["std"] == [0.2, 0.3, 0.4]


def test_command_refuses_what_cannot_be(recipe, tmp_path, capsys):
    config = recipe()
    write_checkpoint(tmp_path / "run", config, network_of(config.model).state_dict())
    run, out = str(tmp_path / "run"), str(tmp_path / "m")
    assert export.main([run, out, "--format", "open_clip"]) == 2
    assert "holds a viclip model, which open_clip cannot load" in capsys.readouterr().err
    assert export.main([str(tmp_path / "nowhere"), out]) == 1
    assert "No checkpoint in" in capsys.readouterr().err
    (tmp_path / "m").write_text("a file")
    assert export.main([run, out]) == 2
    assert "is a file" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert export.main([run, str(tmp_path / "n")]) == 1
    assert not (tmp_path / "n").exists()
