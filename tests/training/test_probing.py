# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from torch import nn

from dataengine.errors import ConfigError
from dataengine.networks.config import (
    BertConfig,
    InternVideo2ClipConfig,
    InternVideo2Config,
    InternVideo2Stage2Config,
    MobileClipTextConfig,
)
from dataengine.networks.internvideo2 import InternVideo2
from dataengine.networks.internvideo2_clip import InternVideo2Clip
from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2
from dataengine.networks.viclip import ViCLIP
from training.evaluation.probing import (
    DEFAULTS,
    AttentiveProbe,
    ProbeConfig,
    build_probe,
    cached_batches,
    frozen_features,
    measure_probe,
    train_probe,
)
from training.models.distil import Student
from training.models.open_clip_model import OpenClipDualEncoder

CPU = torch.device("cpu")
VISION = InternVideo2Config(
    image_size=28, patch_size=14, num_frames=2, width=16, layers=2, heads=2, mlp_width=32,
    pool_heads=2, embed_dim=12,
)  # fmt: skip


def frames(image_size, num_frames=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, num_frames, 3, image_size, image_size, generator=generator)


def viclip(recipe):
    return ViCLIP(recipe().model)


def open_clip_model(recipe):
    return OpenClipDualEncoder(recipe(model__kind="open_clip").model)


def internvideo2(_recipe):
    return InternVideo2(VISION)


def stage2(_recipe):
    text = BertConfig(
        vocab_size=40,
        mask_id=4,
        width=16,
        layers=2,
        fusion_layer=1,
        heads=2,
        mlp_width=32,
        max_positions=16,
    )
    shape = InternVideo2Stage2Config(
        kind="internvideo2_stage2", vision=VISION, text=text, embed_dim=8, context_length=8
    )
    return InternVideo2Stage2(shape)


def internvideo2_clip(_recipe):
    text = MobileClipTextConfig(width=16, layers=1, heads=2, mlp_width=32, context_length=8)
    shape = InternVideo2ClipConfig(kind="internvideo2_clip", vision=VISION, text=text, embed_dim=8)
    return InternVideo2Clip(shape)


@pytest.mark.parametrize(
    ("build", "size", "num_tokens", "width", "pooled_width"),
    [
        (viclip, 32, 1 + 2 * 4, 32, 16),
        (open_clip_model, 32, 2 * 4, 32, 16),
        (internvideo2, 28, 1 + 2 * 4, 16, 12),
        (stage2, 28, 1 + 2 * 4, 16, 12),
        (internvideo2_clip, 28, 1 + 2 * 4, 16, 12),
    ],
)
def test_features_of_every_family(recipe, build, size, num_tokens, width, pooled_width):
    torch.manual_seed(0)
    network = build(recipe).eval()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with torch.no_grad():
        pooled = frozen_features(network, "linear")(frames(size))
        tokens = frozen_features(network, "attentive")(frames(size))
    assert pooled.shape == (3, pooled_width)
    assert tokens.shape == (3, num_tokens, width)
    assert pooled.dtype == tokens.dtype == torch.float32
    # Another clip has other features; weights stay.
    assert (pooled[0] - pooled[1]).abs().max() > 1e-6
    assert all(torch.equal(before[name], w) for name, w in network.state_dict().items())


def test_pooled_features_are_what_the_model_compares(recipe):
    torch.manual_seed(0)
    for network, size in ((viclip(recipe), 32), (open_clip_model(recipe), 32)):
        network.eval()
        with torch.no_grad():
            pooled = frozen_features(network, "linear")(frames(size))
            compared = network.encode_video(frames(size))
        if isinstance(network, ViCLIP):  # open_clip's frames are normalised one by one
            torch.testing.assert_close(nn.functional.normalize(pooled, dim=-1), compared)


def test_viclip_tokens_give_its_feature(recipe):
    torch.manual_seed(0)
    network = viclip(recipe).eval()
    with torch.no_grad():
        tokens = frozen_features(network, "attentive")(frames(32))
        pooled = frozen_features(network, "linear")(frames(32))
    torch.testing.assert_close(tokens[:, 0] @ network.vision_encoder.proj, pooled)


def test_open_clip_tokens_are_the_patches_behind_the_last_norm(recipe):
    torch.manual_seed(0)
    network = open_clip_model(recipe).eval()
    visual: Any = network.clip.visual
    with torch.no_grad():
        tokens = frozen_features(network, "attentive")(frames(32))
        visual.output_tokens = True
        _, expected = visual(frames(32).flatten(0, 1))
    torch.testing.assert_close(tokens, expected.reshape(3, 2 * 4, 32))


def test_internvideo2_tokens_pool_to_its_feature():
    torch.manual_seed(0)
    network = InternVideo2(VISION).eval()
    with torch.no_grad():
        tokens = frozen_features(network, "attentive")(frames(28))
        pooled = frozen_features(network, "linear")(frames(28))
        torch.testing.assert_close(network.clip_projector(tokens), pooled)


def test_a_student_sees_all_patches_of_its_own_frames():
    torch.manual_seed(0)
    student = Student(
        VISION, decoder="linear", clip_width=6, clip_embed_dim=5, num_clip_layers=1
    ).eval()
    plain = InternVideo2(VISION).eval()
    plain.load_state_dict(student.state_dict(), strict=False)
    clip = frames(28, num_frames=4)
    with torch.no_grad():
        # Its clips have the second teacher's frames, twice as many as its own.
        pooled = frozen_features(student, "linear")(clip)
        tokens = frozen_features(student, "attentive")(clip)
        expected_tokens, expected = plain(clip[:, ::2])
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(tokens, expected_tokens)


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="Linear"):
        frozen_features(nn.Linear(2, 2), "linear")


def test_published_settings():
    linear, attentive = DEFAULTS["linear"], DEFAULTS["attentive"]
    assert (linear.epochs, linear.lr, linear.weight_decay, linear.warmup_epochs) == (15, 1e-3, 0, 3)
    assert (attentive.epochs, attentive.lr, attentive.min_lr) == (25, 2e-4, 0)


def clusters(num_clips, seed=1):
    """Features of four classes that a line can tell apart."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(4, 10, generator=generator)
    generator.manual_seed(seed)
    label = torch.randint(4, (num_clips,), generator=generator)
    return centre[label] + 0.2 * torch.randn(num_clips, 10, generator=generator), label


def test_a_linear_probe_finds_what_is_there():
    features, label = clusters(400)
    torch.manual_seed(0)
    probe = build_probe("linear", 10, 4)
    config = ProbeConfig(batch_size=50, lr=0.05)
    before = measure_probe(probe, [(features[:, None], label)], CPU)
    loss = train_probe(probe, cached_batches(features, label, 50, 0), 400, config, CPU)
    test, test_label = clusters(200, seed=2)
    after = measure_probe(probe, [(test[:, None], test_label)], CPU)
    assert before.top1 < 0.6
    assert after.top1 > 0.98
    assert loss < 0.5


def test_an_attentive_probe_finds_what_the_mean_hides():
    # One token tells the class; a marked one, in a place that differs. The rest is noise that drowns it.
    def clips(num_clips, seed):
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(2, (num_clips,), generator=generator)
        tokens = torch.randn(num_clips, 16, 8, generator=generator)
        tokens[..., :2] = 0
        place = torch.randint(16, (num_clips,), generator=generator)
        tokens[torch.arange(num_clips), place, 0] = 8
        tokens[:, :, 1] = torch.randn(num_clips, 16, generator=generator).sign() * 4
        tokens[torch.arange(num_clips), place, 1] = (2 * label - 1) * 4.0
        return tokens, label

    torch.manual_seed(0)
    train, label = clips(800, 1)
    probe = AttentiveProbe(8, 2, embed_dim=16)
    config = ProbeConfig("attentive", epochs=25, warmup_epochs=1, lr=0.02, batch_size=100)
    train_probe(probe, cached_batches(train, label, 100, 0), 800, config, CPU)
    test, test_label = clips(300, 2)
    attentive = measure_probe(probe, [(test[:, None], test_label)], CPU).top1
    linear = build_probe("linear", 8, 2)
    train_probe(linear, cached_batches(train.mean(dim=1), label, 100, 0), 800, config, CPU)
    mean = measure_probe(linear, [(test.mean(dim=1)[:, None], test_label)], CPU).top1
    assert attentive > 0.95
    assert mean < 0.8


def test_probabilities_of_the_views_of_a_clip_are_averaged():
    class Given(nn.Module):
        def forward(self, features):
            return features

    # One view is sure of class 0, two lean to class 1: the mean of scores and of probabilities differ.
    views = torch.tensor([[[2.0, 0.0], [0.0, 8.0], [4.0, 0.0]], [[9.0, 0.0], [0.0, 2], [0, 2]]])
    found = measure_probe(Given(), [(views, torch.tensor([0, 1]))], CPU)
    assert found.hits.tolist() == [1, 1]


def test_epochs_differ_in_order_alone_and_are_repeatable():
    features, label = torch.arange(10.0)[:, None], torch.arange(10)
    batches = cached_batches(features, label, 4, seed=3)
    orders = [torch.cat([labels for _, labels in batches(epoch)]).tolist() for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(10))
    for part, labels in batches(0):
        assert torch.equal(part[:, 0].long(), labels)
    assert [len(labels) for _, labels in batches(0)] == [4, 4, 2]
