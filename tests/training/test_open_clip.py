# SPDX-License-Identifier: Apache-2.0
import open_clip
import pytest
import torch

from training.config import OpenClipConfig, load_recipe
from training.models import build_task
from training.models.open_clip_model import OpenClipDualEncoder, model_config


@pytest.fixture(scope="module")
def config() -> OpenClipConfig:
    config = load_recipe("clip_tiny").model
    assert isinstance(config, OpenClipConfig)
    return config


def test_feature_of_a_clip_is_the_mean_of_its_frames(config):
    torch.manual_seed(0)
    model = OpenClipDualEncoder(config).eval()
    frames = torch.randn(1, 3, 3, config.video.image_size, config.video.image_size)
    with torch.no_grad():
        each = torch.cat([model.encode_video(frames[:, i : i + 1]) for i in range(3)])
        mean = torch.nn.functional.normalize(each.mean(dim=0, keepdim=True), dim=-1)
        torch.testing.assert_close(model.encode_video(frames), mean)


def test_layers_have_depths_in_their_own_tower(recipe):
    model = recipe(model__video__layers=3).model.model_dump() | {"kind": "open_clip"}
    del model["freeze_text"]
    task = build_task(recipe(model=model))
    assert task.layer_of("network.clip.visual.conv1.weight") == (0, 4)
    assert task.layer_of("network.clip.visual.positional_embedding") == (0, 4)
    assert task.layer_of("network.clip.visual.transformer.resblocks.2.ln_1.weight") == (3, 4)
    assert task.layer_of("network.clip.token_embedding.weight") == (0, 2)
    assert task.layer_of("network.clip.positional_embedding") == (0, 2)
    assert task.layer_of("network.clip.transformer.resblocks.0.ln_1.weight") == (1, 2)
    for name in ("visual.ln_post.weight", "visual.proj", "ln_final.weight", "logit_scale"):
        assert task.layer_of(f"network.clip.{name}") is None


def test_the_gelu_is_the_recipes(config):
    torch.manual_seed(0)
    quick = config.model_copy(update={"quick_gelu": True})
    models = [OpenClipDualEncoder(shape).eval() for shape in (config, quick)]
    models[1].load_state_dict(models[0].state_dict())
    described = open_clip.CLIP(**model_config(quick)).eval()
    described.load_state_dict(models[0].clip.state_dict())
    frame = torch.randn(1, 1, 3, config.video.image_size, config.video.image_size)
    with torch.no_grad():
        exact, sigmoid = (model.encode_video(frame) for model in models)
        expected = described.encode_image(frame[:, 0], normalize=True)
    assert (exact - sigmoid).abs().max() > 1e-4
    torch.testing.assert_close(sigmoid, expected)
    kinds = {type(module).__name__ for module in described.modules()}
    assert "QuickGELU" in kinds
    assert "GELU" not in kinds
