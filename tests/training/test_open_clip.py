# SPDX-License-Identifier: Apache-2.0
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

from dataengine.networks.text import tokenise
from training.config import OpenClipConfig, load_recipe
from training.data.transforms import WHOLE, normalise, square_images
from training.distributed import World
from training.export_clip import main
from training.models.open_clip_model import OpenClipDualEncoder, export_open_clip
from training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> OpenClipConfig:
    config = load_recipe("clip_tiny").model
    assert isinstance(config, OpenClipConfig)
    return config


@pytest.fixture(scope="module")
def exported(config, tmp_path_factory):
    torch.manual_seed(0)
    model = OpenClipDualEncoder(config).eval()
    folder = tmp_path_factory.mktemp("export")
    return model, folder, export_open_clip(model, config, folder)


def load(folder) -> tuple[Any, Any]:
    return open_clip.create_model_from_pretrained(f"local-dir:{folder}")  # pyright: ignore[reportReturnType]  its return type is a union over its options


def test_export_is_small_enough_to_ship(exported):
    _, folder, num_bytes = exported
    assert num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert num_bytes < 8_000_000


def test_open_clip_loads_the_export_and_computes_the_same(exported, config):
    model, folder, _ = exported
    loaded, preprocess = load(folder)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image = Image.effect_noise((160, 90), 80).convert("RGB")
    size = config.video.image_size
    frame = torch.from_numpy(square_images([image], size, WHOLE))
    own_input = normalise(frame[None], config.pixel_mean, config.pixel_std)
    torch.testing.assert_close(preprocess(image), own_input[0, 0], rtol=0, atol=0.02)

    captions = ["a red circle", "a blue square moves left"]
    tokens = tokenise(captions, config.text.context_length)
    assert torch.equal(tokenizer(captions), tokens)
    with torch.no_grad():
        image_feature = loaded.encode_image(preprocess(image)[None], normalize=True)
        text_features = loaded.encode_text(tokens, normalize=True)
        # float16 weights: three digits.
        torch.testing.assert_close(image_feature, model.encode_video(own_input), rtol=0, atol=5e-3)
        torch.testing.assert_close(text_features, model.encode_text(tokens), rtol=0, atol=5e-3)


def test_feature_of_a_clip_is_the_mean_of_its_frames(exported, config):
    model, _, _ = exported
    frames = torch.randn(1, 3, 3, config.video.image_size, config.video.image_size)
    with torch.no_grad():
        each = torch.cat([model.encode_video(frames[:, i : i + 1]) for i in range(3)])
        mean = torch.nn.functional.normalize(each.mean(dim=0, keepdim=True), dim=-1)
        torch.testing.assert_close(model.encode_video(frames), mean)


def test_command_exports_a_trained_checkpoint(shapes_corpus, recipe, tmp_path, capsys):
    model = recipe().model.model_dump() | {"kind": "open_clip", "pixel_std": (0.2, 0.3, 0.4)}
    del model["freeze_text"]
    trained = Trainer(
        recipe(model=model, optim__steps=2), shapes_corpus, tmp_path / "run", World(0, 1, CPU)
    )
    trained.run()
    assert main([str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    assert "MB" in capsys.readouterr().out
    loaded, preprocess = load(tmp_path / "export")
    assert list(preprocess.transforms[-1].std) == [0.2, 0.3, 0.4]
    own = trained.model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, own[f"clip.{name}"].half().float()), name


def test_command_refuses_a_model_open_clip_cannot_load(shapes_corpus, recipe, tmp_path, capsys):
    Trainer(recipe(optim__steps=1), shapes_corpus, tmp_path, World(0, 1, CPU)).run()
    assert main([str(tmp_path), str(tmp_path / "export")]) == 2
    assert "holds a viclip model" in capsys.readouterr().err
