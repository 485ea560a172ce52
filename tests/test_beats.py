# SPDX-License-Identifier: Apache-2.0
"""BEATs against numbers of the published implementation, and its checkpoints key by key.

The golden numbers were computed once by torchaudio's ``compliance.kaldi.fbank`` and by the published
BEATs from the weights and sounds that ``tests/tiny_beats.py`` draws.
"""

import numpy as np
import pytest
import torch

from dataengine.errors import DependencyError
from dataengine.networks.beats import kaldi_fbank, load_beats, relative_buckets
from tests.tiny_beats import published_cfg, published_shapes, seeded_sound, write_checkpoint

# fmt: off
FBANK = [  # every 9th frame, every 16th bin of 0.3 s
    [15.5494, 16.6337, 16.9813, 18.6236, 17.2974, 20.1895, 22.2002, 21.9396],
    [13.0880, 17.4581, 17.4908, 18.0199, 19.2388, 21.3031, 21.0215, 22.4622],
    [12.1293, 15.0639, 17.0945, 19.3136, 19.2407, 19.7377, 20.8280, 22.8463],
    [12.4108, 12.1827, 22.5999, 18.3657, 19.0359, 20.6751, 21.4620, 22.8945],
]
FEATURES = {  # seconds -> shape, and the flattened features at even distances
    1.0: ((48, 32), [
        -1.10697353, -0.05094206, -1.21503890, -0.58164489, -1.06302369, -0.41433254,
        -1.06924188, -0.58606476, -1.07792401, -0.18554856, -1.11333036, -0.21946193]),
    2.37: ((112, 32), [
        -1.07515752, -0.61847109, 0.62305331, -0.63383275, 1.29061389, -1.31483579, 0.54990393,
        0.10250691, 0.09256773, -0.89450592, -0.00026002, -0.72619966, -0.08108805]),
}
CLASSES = {
    1.0: [0.45360178, 0.47188738, 0.52196711, 0.22438581, 0.62340349],
    2.37: [0.46505660, 0.46422362, 0.55922539, 0.23790902, 0.64948386],
}
# fmt: on
LABELS = [f"/m/{number}" for number in range(5)]


def encode(model, *waves):
    with torch.inference_mode():
        return model(waves)


def rewrite(path, change):
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_the_filter_bank_is_kaldis():
    fbank = kaldi_fbank(torch.from_numpy(seeded_sound(0.3))[None])[0]
    assert fbank.shape == (28, 128)
    np.testing.assert_allclose(fbank[::9, ::16], FBANK, atol=1e-3)


def test_silence_is_the_logarithm_of_the_smallest_step():
    fbank = kaldi_fbank(torch.zeros(1, 800))
    np.testing.assert_allclose(fbank, np.log(np.finfo(np.float32).eps), rtol=1e-6)


@pytest.mark.parametrize("seconds", FEATURES)
def test_features_are_those_of_the_published_code(tmp_path, seconds):
    features, there = encode(
        load_beats(write_checkpoint(tmp_path / "b.pt", seed=3)), seeded_sound(seconds)
    )
    shape, expected = FEATURES[seconds]
    assert features.shape == (1, *shape)
    assert there.all()
    flat = features.flatten()
    np.testing.assert_allclose(flat[:: flat.numel() // 12], expected, atol=1e-4)


@pytest.mark.parametrize("seconds", CLASSES)
def test_a_fine_tuned_checkpoint_gives_probabilities_by_label(tmp_path, seconds):
    model = load_beats(write_checkpoint(tmp_path / "b.pt", seed=3, labels=LABELS))
    assert model.labels == tuple(LABELS)
    with torch.inference_mode():
        probabilities = model.classify([seeded_sound(seconds)])[0]
    np.testing.assert_allclose(probabilities, CLASSES[seconds], atol=1e-5)


def test_a_batch_of_lengths_answers_as_each_alone(tmp_path):
    model = load_beats(write_checkpoint(tmp_path / "b.pt", labels=LABELS))
    sounds = [seeded_sound(seconds, seed=i) for i, seconds in enumerate((0.05, 1.3, 0.5))]
    features, there = encode(model, *sounds)
    with torch.inference_mode():
        together = model.classify(sounds)
    assert there.sum(dim=1).tolist() == [8, 64, 24]
    for number, sound in enumerate(sounds):
        alone, _ = encode(model, sound)
        np.testing.assert_allclose(
            features[number, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4
        )
        with torch.inference_mode():
            np.testing.assert_allclose(together[number], model.classify([sound])[0], atol=1e-5)


def test_near_distances_have_buckets_of_their_own_and_far_ones_share():
    buckets = relative_buckets(torch.tensor([-500, -40, -2, -1, 0, 1, 2, 4, 5, 500]), 20, 40)
    assert buckets.tolist() == [9, 9, 2, 1, 0, 11, 12, 14, 15, 19]


def test_the_published_shape_is_the_default():
    """Parameters of the published iter3 encoder, position bias counted once: about 90 M."""
    from dataengine.networks.beats import Beats
    from dataengine.networks.config import BeatsNetworkConfig

    with torch.device("meta"):
        model = Beats(BeatsNetworkConfig())
    counted = sum(parameter.numel() for parameter in model.parameters())
    cfg = published_cfg(
        embed_dim=512, encoder_layers=12, encoder_embed_dim=768, encoder_ffn_embed_dim=3072,
        encoder_attention_heads=12, conv_pos=128, conv_pos_groups=16, num_buckets=320,
    )  # fmt: skip
    shapes = published_shapes(cfg)
    bias = [key for key in shapes if "relative_attention_bias" in key]
    published = sum(int(np.prod(shape)) for shape in shapes.values())
    assert counted == published - 11 * int(np.prod(shapes[bias[0]]))
    assert round(counted / 1e6) == 90


def _without(key):
    return lambda checkpoint: checkpoint["model"].pop(key)


def _with(key, value):
    return lambda checkpoint: checkpoint["model"].update({key: value})


def _cfg(key, value):
    return lambda checkpoint: checkpoint["cfg"].update({key: value})


SHARED = "encoder.layers.1.self_attn.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without("encoder.layers.1.fc1.bias"), "missing encoder.layers.1.fc1.bias"),
        (_without(SHARED), f"missing {SHARED}"),
        (_with("decoder.weight", torch.zeros(1)), "unexpected decoder.weight"),
        (_with("predictor.weight", torch.zeros(527, 32)), "unexpected predictor.weight"),
        (_with("layer_norm.bias", torch.zeros(7)), "of another shape layer_norm.bias"),
        (_with(SHARED, torch.zeros(20, 4)), "differing copies encoder.layers.0"),
        (_cfg("finetuned_model", True), "missing predictor.bias"),
        (_cfg("layer_norm_first", True), "layer_norm_first = True"),
        (_cfg("encoder_attention_heads", 5), "not a multiple of heads"),
        (lambda checkpoint: checkpoint.pop("cfg"), "'cfg'"),
    ],
)
def test_a_weight_out_of_place_is_named(tmp_path, change, named):
    path = write_checkpoint(tmp_path / "b.pt")
    rewrite(path, change)
    with pytest.raises(DependencyError) as error:
        load_beats(path)
    assert named in error.value.message


def test_labels_must_be_as_many_as_classes(tmp_path):
    path = write_checkpoint(tmp_path / "b.pt", labels=LABELS)
    rewrite(path, lambda checkpoint: checkpoint["label_dict"].pop(0))
    with pytest.raises(DependencyError, match="4 labels for 5 classes"):
        load_beats(path)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_a_file_that_is_none_is_told(tmp_path, content):
    path = tmp_path / "b.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DependencyError, match="No BEATs checkpoint"):
        load_beats(path)
