# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from training.config import OpenClipConfig, load_recipe
from training.models.open_clip_model import OpenClipDualEncoder


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
