# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any

import numpy as np
import pytest

from dataengine.errors import DependencyError
from dataengine.models.clip import OpenClipConfig, build_clip_scorer, mean_cosines

CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}  # fmt: skip
RED = np.full((40, 60, 3), (220, 30, 30), np.uint8)
NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer model in open_clip's own folder format, half precision on disk."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def tolerance():
    """A GPU scores in bfloat16, whose steps are 0.004 around 1."""
    import torch

    return 0.02 if torch.cuda.is_available() else 1e-5


@pytest.fixture(scope="module")
def scorer(folder):
    return build_clip_scorer(OpenClipConfig(model=f"local-dir:{folder}"))


def test_mean_cosine_of_each_clip():
    image = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    text = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert mean_cosines(image, text, [2, 1]) == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="3 images"):
        mean_cosines(image, text, [1, 1])


def test_score_is_open_clips_own_cosine(folder, scorer, tolerance):
    import open_clip
    import torch
    from PIL import Image

    loaded: Any = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model, preprocess = loaded
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red wall"])
    with torch.no_grad():
        images = torch.stack([preprocess(Image.fromarray(frame)) for frame in (RED, NOISE)])
        cosines = (
            model.encode_image(images, normalize=True) @ model.encode_text(tokens, normalize=True).T
        )
    (score,) = scorer.score([[RED, NOISE]], ["a red wall"])
    assert score == pytest.approx(float(cosines.mean()), abs=tolerance)


def test_score_does_not_depend_on_the_rest_of_the_batch(scorer, tolerance):
    alone = scorer.score([[RED]], ["a red wall"])
    batch = scorer.score([[NOISE, RED], [RED], [NOISE]], ["noise", "a red wall", "x " * 200])
    assert batch[1] == pytest.approx(alone[0], abs=tolerance)
    assert scorer.score([], []) == []


def test_known_pair_is_checked_both_ways(scorer):
    texts = ["a red wall", "nothing of the kind"]
    right, wrong = scorer.score([[RED], [RED]], texts)
    matched, mismatched = texts if right > wrong else texts[::-1]
    scorer.check_known_pair(RED, matched, mismatched)
    with pytest.raises(DependencyError, match="known pair"):
        scorer.check_known_pair(RED, mismatched, matched)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_an_error_that_names_the_key(change, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    state = load_file(folder / "open_clip_model.safetensors")
    key = "ln_final.weight"
    if change == "missing":
        del state[key]
    else:
        key = "ln_extra.weight"
        state[key] = state["ln_final.weight"].clone()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(DependencyError, match=key.replace(".", r"\.")):
        build_clip_scorer(OpenClipConfig(model=f"local-dir:{tmp_path}"))


def test_folder_without_weights_or_config_is_an_error_with_a_hint(tmp_path):
    config = OpenClipConfig(model=f"local-dir:{tmp_path}")
    with pytest.raises(DependencyError, match=r"open_clip_config\.json"):
        build_clip_scorer(config)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(DependencyError, match="No weights"):
        build_clip_scorer(config)


def test_unknown_model_name_is_an_error():
    with pytest.raises(DependencyError, match="ViT-Z-99"):
        build_clip_scorer(OpenClipConfig(model="ViT-Z-99"))


def test_model_without_weights_is_never_scored_with():
    with pytest.raises(DependencyError, match="RN50"):
        build_clip_scorer(OpenClipConfig(model="RN50"))
