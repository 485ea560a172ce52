# SPDX-License-Identifier: Apache-2.0
import itertools
import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dataengine.errors import DependencyError
from dataengine.models.answers import OUT_OF_MEMORY, Failure
from dataengine.models.clip import (
    OpenClipConfig,
    OpenClipScorer,
    build_clip_scorer,
    check_clip,
    mean_cosines,
)
from dataengine.models.known_pairs import KNOWN_PAIRS, MAX_LOST, check_known_pairs
from dataengine.needs import Package, Weights
from tests.tiny_scorers import CLIP_CONFIG, write_clip

RED = np.full((40, 60, 3), (220, 30, 30), np.uint8)
NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that knows the known pairs."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tolerance():
    """A GPU scores in bfloat16, whose steps are 0.004 around 1."""
    import torch

    return 0.02 if torch.cuda.is_available() else 1e-5


@pytest.fixture
def scorer(folder):
    return OpenClipScorer(OpenClipConfig(model=f"local-dir:{folder}", batch_size=3))


def images_of(scorer, *frames):
    return np.stack(scorer.embed_images([scorer.prepare(frame) for frame in frames]))


def test_mean_cosine_of_each_clip():
    image = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    text = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert mean_cosines(image, text, [2, 1]) == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="3 images"):
        mean_cosines(image, text, [1, 1])


def test_embeddings_are_open_clips_own(folder, scorer, tolerance):
    import open_clip
    import torch
    from PIL import Image

    loaded: Any = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model, preprocess = loaded
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red wall"])
    with torch.no_grad():
        images = torch.stack([preprocess(Image.fromarray(frame)) for frame in (RED, NOISE)])
        expected_images = model.encode_image(images, normalize=True).numpy()
        expected_text = model.encode_text(tokens, normalize=True).numpy()
    assert images_of(scorer, RED, NOISE) == pytest.approx(expected_images, abs=tolerance)
    (text,) = scorer.embed_texts(["a red wall"])
    assert text == pytest.approx(expected_text[0], abs=tolerance)
    assert (scorer.width, text.dtype, np.linalg.norm(text)) == (32, np.float32, pytest.approx(1))


def test_embeddings_do_not_depend_on_the_rest_of_the_batch(scorer, tolerance):
    alone = images_of(scorer, RED)
    assert images_of(scorer, NOISE, RED, NOISE, NOISE)[1] == pytest.approx(alone[0], abs=tolerance)
    texts = scorer.embed_texts(["noise", "a red wall", "x " * 200, "y"])
    assert texts[1] == pytest.approx(scorer.embed_texts(["a red wall"])[0], abs=tolerance)
    assert scorer.embed_images([]) == []


def test_batches_halve_when_cuda_runs_out_of_memory(scorer, monkeypatch, tolerance):
    import torch

    whole = images_of(scorer, RED, NOISE, RED, NOISE)
    asked = []
    encode = scorer._encode_images

    def little_memory(prepared):
        asked.append(len(prepared))
        if len(prepared) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(prepared)

    monkeypatch.setattr(scorer, "_encode_images", little_memory)
    assert images_of(scorer, RED, NOISE, RED, NOISE) == pytest.approx(whole, abs=tolerance)
    assert asked == [3, 1, 1, 1, 1]
    assert scorer.batch_size == 1

    def no_memory(prepared):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorer, "_encode_images", no_memory)
    answer = scorer.embed_images([scorer.prepare(RED)])[0]
    assert isinstance(answer, Failure)
    assert answer.reason == OUT_OF_MEMORY


# --------------------------------------------------------------------------------- known pairs


def test_known_pairs_are_pictures_that_differ():
    pictures = [pair.draw() for pair in KNOWN_PAIRS]
    assert {picture.shape for picture in pictures} == {(240, 320, 3)}
    assert len({picture.tobytes() for picture in pictures}) == len(KNOWN_PAIRS)
    assert len({pair.text for pair in KNOWN_PAIRS}) == len(KNOWN_PAIRS)


def judged(cosines):
    """Judges a model with these cosines, a picture per row and a text per column."""
    check_known_pairs(
        "m", list(np.asarray(cosines, np.float32)), list(np.eye(len(cosines), dtype=np.float32))
    )


def test_one_of_thirty_comparisons_may_be_lost():
    num = len(KNOWN_PAIRS)
    right = np.eye(num) * 0.3
    judged(right)
    for picture, pair in enumerate(KNOWN_PAIRS):
        others = [(picture + step) % num for step in range(1, num)]
        second = right
        for text in others:
            second = right.copy()
            second[picture, text] = 0.4
            judged(second)
        third, twice = second.copy(), second.copy()
        third[picture, others[0]] = 0.4
        twice[others[0], others[1]] = 0.4
        for cosines, said in ((third, pair.text), (twice, "wrongly")):
            with pytest.raises(DependencyError, match=said) as caught:
                judged(cosines)
            assert "loses 2 of 30 such comparisons" in str(caught.value)


def test_nothing_that_is_no_proof_passes():
    num = len(KNOWN_PAIRS)
    for cosines in (
        np.full((num, num), np.nan),
        np.full((num, num), 0.3),  # all texts alike
        np.tile(np.linspace(0.1, 0.6, num), (num, 1)),  # the same text for each picture
    ):
        with pytest.raises(DependencyError, match="wrongly"):
            judged(cosines)
    ids = np.eye(num, dtype=np.float32)
    with pytest.raises(DependencyError, match="out_of_memory"):
        check_known_pairs("m", [Failure(OUT_OF_MEMORY), *ids[1:]], list(ids))


def test_texts_of_other_pictures_never_pass():
    """All 719 ways to shuffle the texts of a model that knows every pair."""
    num = len(KNOWN_PAIRS)
    shuffles = itertools.permutations(range(num))
    assert next(shuffles) == tuple(range(num))
    for order in shuffles:
        with pytest.raises(DependencyError, match="wrongly"):
            judged(np.eye(num)[list(order)])


def test_chance_passes_about_once_in_6665_times():
    """`check_known_pairs` says which cosines pass; how often, is counted over 200,000 draws."""
    rng = np.random.default_rng(0)
    cosines = rng.standard_normal((200_000, 6, 6))
    lost = (cosines >= np.diagonal(cosines, axis1=1, axis2=2)[:, :, None]).sum(axis=(1, 2)) - 6
    passing = np.flatnonzero(lost <= MAX_LOST)
    assert 15 <= len(passing) <= 45  # 30 are expected
    for number in (*passing, *range(300)):
        if number in passing:
            judged(cosines[number])
        else:
            with pytest.raises(DependencyError, match="wrongly"):
                judged(cosines[number])


def test_shipped_and_fitted_models_prove_themselves(scorer):
    check_clip(scorer)
    check_clip(build_clip_scorer(OpenClipConfig()))


@pytest.mark.parametrize("seed", range(3))
def test_random_model_is_refused(seed, tmp_path):
    folder = write_clip(tmp_path, fitted=False, seed=seed)
    with pytest.raises(DependencyError, match="scores a known pair wrongly"):
        check_clip(build_clip_scorer(OpenClipConfig(model=f"local-dir:{folder}")))


@pytest.mark.parametrize("tower", ["visual.", "transformer."])
def test_model_half_at_random_is_refused(tower, folder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    state = load_file(folder / "open_clip_model.safetensors")
    for name, tensor in state.items():
        if name.startswith(tower):
            state[name] = torch.randn_like(tensor) * tensor.float().std().half()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(DependencyError, match="scores a known pair wrongly"):
        check_clip(build_clip_scorer(OpenClipConfig(model=f"local-dir:{tmp_path}")))


# ------------------------------------------------------------------------------------- loading


def change_key(folder, change):
    """Returns a model's weights with a key too few or too many, and that key."""
    from safetensors.torch import load_file

    state = load_file(folder / "open_clip_model.safetensors")
    if change == "missing":
        del state["ln_final.weight"]
        return state, "ln_final.weight"
    state["ln_extra.weight"] = state["ln_final.weight"].clone()
    return state, "ln_extra.weight"


@pytest.fixture
def known_name(tmp_path):
    """A name that open_clip knows, for the tiny model."""
    import open_clip

    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(CLIP_CONFIG["model_cfg"]))
    open_clip.add_model_config(tmp_path / "tiny-for-tests.json")
    return "tiny-for-tests"


@pytest.mark.parametrize("change", ["missing", "unexpected"])
@pytest.mark.parametrize("way", ["folder", "file", "hub"])
def test_weights_that_do_not_fit_are_an_error_that_names_the_key(
    way, change, folder, known_name, tmp_path, monkeypatch
):
    from open_clip import factory
    from safetensors.torch import save_file

    state, key = change_key(folder, change)
    weights = tmp_path / "open_clip_model.safetensors"
    save_file(state, weights)
    match way:
        case "folder":
            (tmp_path / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
            config = OpenClipConfig(model=f"local-dir:{tmp_path}")
        case "file":
            config = OpenClipConfig(model=known_name, pretrained=str(weights))
        case _:
            monkeypatch.setattr(factory, "_get_hf_config", lambda *_, **__: CLIP_CONFIG)
            monkeypatch.setattr(
                factory, "download_pretrained_from_hf", lambda *_, **__: str(weights)
            )
            config = OpenClipConfig(model="hf-hub:nobody/tiny")
    with pytest.raises(DependencyError, match=key.replace(".", r"\.")):
        build_clip_scorer(config)


def test_plain_name_with_a_weights_file_loads_the_same_model(folder, scorer, known_name, tolerance):
    weights = str(folder / "open_clip_model.safetensors")
    named = build_clip_scorer(OpenClipConfig(model=known_name, pretrained=weights))
    assert named.model == f"open_clip:{known_name}"
    assert len(named.revision) == 16
    texts = [scorer.embed_texts(["a red wall"])[0], named.embed_texts(["a red wall"])[0]]
    assert texts[0] == pytest.approx(texts[1], abs=tolerance)


def test_hub_model_without_weights_is_an_error(monkeypatch):
    from open_clip import factory

    def nothing(*_, **__):
        raise FileNotFoundError("no such file")

    monkeypatch.setattr(factory, "_get_hf_config", lambda *_, **__: CLIP_CONFIG)
    monkeypatch.setattr(factory, "download_pretrained_from_hf", nothing)
    with pytest.raises(DependencyError, match="nobody/tiny"):
        build_clip_scorer(OpenClipConfig(model="hf-hub:nobody/tiny"))


def test_folder_without_weights_or_config_is_an_error_with_a_hint(tmp_path):
    config = OpenClipConfig(model=f"local-dir:{tmp_path}")
    with pytest.raises(DependencyError, match=r"open_clip_config\.json"):
        build_clip_scorer(config)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
    with pytest.raises(DependencyError, match="No weights"):
        build_clip_scorer(config)


def test_revision_tells_models_apart_that_begin_alike(folder, scorer, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))
    data = bytearray((folder / "open_clip_model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "open_clip_model.safetensors").write_bytes(data)
    other = build_clip_scorer(OpenClipConfig(model=f"local-dir:{tmp_path}"))
    assert other.revision != scorer.revision


def test_unknown_model_name_is_an_error():
    with pytest.raises(DependencyError, match="ViT-Z-99"):
        build_clip_scorer(OpenClipConfig(model="ViT-Z-99"))


def test_model_without_weights_is_never_scored_with():
    with pytest.raises(DependencyError, match="RN50"):
        build_clip_scorer(OpenClipConfig(model="RN50"))


# ------------------------------------------------------------------------------------ settings


def test_openai_weights_need_quickgelu():
    with pytest.raises(ValidationError, match="model: ViT-L-14-quickgelu"):
        OpenClipConfig(model="ViT-L-14", pretrained="openai")
    OpenClipConfig(model="ViT-L-14-quickgelu", pretrained="openai")


def test_weights_of_another_activation_are_refused_before_they_are_fetched():
    with pytest.raises(DependencyError, match="QuickGELU") as caught:
        build_clip_scorer(OpenClipConfig(model="ViT-B-32", pretrained="metaclip_400m"))
    assert caught.value.hint == "write model: ViT-B-32-quickgelu"


@pytest.mark.parametrize("model", ["", "local-dir:/m", "hf-hub:a/b"])
def test_pretrained_belongs_to_a_plain_name(model):
    with pytest.raises(ValidationError, match="plain model name"):
        OpenClipConfig(model=model, pretrained="laion2b_s34b_b79k")


def test_needs_name_the_weights_unless_they_ship():
    assert [type(need) for need in OpenClipConfig().needs()] == [Package]
    named = OpenClipConfig(model="ViT-L-14-quickgelu", pretrained="openai").needs()
    assert named[1] == Weights("open_clip", "ViT-L-14-quickgelu", "openai")
