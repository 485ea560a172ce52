# SPDX-License-Identifier: Apache-2.0
# Answers may be failures; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""InternVideo2's video and text encoders: the published numbers, whole weights or none.

The golden numbers are the published module's, run on weights and frames that `draw` makes here.
"""

import numpy as np
import pytest
import torch

from dataengine.errors import DependencyError
from dataengine.models.internvideo2 import InternVideo2ScorerConfig, load_internvideo2
from dataengine.models.video_text import check_video_text
from dataengine.networks.config import InternVideo2Config
from dataengine.networks.internvideo2 import InternVideo2, resize_positions, sinusoids

SHAPE = InternVideo2Config(
    image_size=56, num_frames=4, width=64, layers=3, heads=4, mlp_width=176, pool_heads=4,
    embed_dim=48, image_positions=True,
)  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "##ning", "red"]
SETTINGS = {"heads": 4, "pool_heads": 4, "max_tokens": 8}


def draw(state):
    """Weights that depend on a name alone; norms and scales around 1."""
    drawn = {}
    for name, value in state.items():
        noise = np.random.default_rng([0, *name.encode()]).standard_normal(value.shape)
        ones = name.endswith(("norm1.weight", "norm2.weight", "_norm.weight", "gamma")) or (
            "norm1_" in name and name.endswith("weight")
        )
        drawn[name] = torch.from_numpy(np.asarray(noise.astype(np.float32) * 0.05 + ones))
    return drawn


@pytest.fixture(scope="module")
def vision():
    model = InternVideo2(SHAPE)
    model.load_state_dict(draw(model.state_dict()))
    return model.eval()


@pytest.mark.parametrize(
    ("num_frames", "pooled", "power"),
    [
        (4, [-0.044125, -0.041157, 0.001256, -0.054462, -0.038319, -0.044766], 1.543928),
        (1, [-0.087445, -0.101606, 0.031707, -0.025183, -0.014325, 0.003749], 1.473535),
    ],
    ids=["clip", "image"],
)
def test_features_are_those_of_the_published_module(vision, num_frames, pooled, power):
    frames = np.random.default_rng(1).standard_normal((2, 4, 3, 56, 56)).astype(np.float32)
    with torch.no_grad():
        tokens, features = vision(torch.from_numpy(frames[:, :num_frames]))
    assert features[:, :3].flatten().tolist() == pytest.approx(pooled, abs=2e-6)
    assert float(tokens.double().square().mean()) == pytest.approx(power, abs=5e-6)


def test_positions_are_stretched_as_published():
    table = np.random.default_rng(2).standard_normal((1, 1 + 4 * 16, 8)).astype(np.float32)
    stretched = resize_positions(torch.from_numpy(table), 8, 4, 5)
    assert stretched.shape == (1, 1 + 8 * 25, 8)
    assert stretched[0, [1, 40, 200], 0].tolist() == pytest.approx(
        [0.258711, 0.091765, -1.355335], abs=2e-6
    )
    assert torch.equal(resize_positions(torch.from_numpy(table), 4, 4, 4), torch.from_numpy(table))
    with pytest.raises(ValueError, match="64 positions are not 5 square frames"):
        resize_positions(torch.from_numpy(table), 8, 5, 5)


def test_an_image_is_a_clip_of_one_frame(vision):
    with pytest.raises(ValueError, match="2 frames given, 4 expected"):
        vision(torch.zeros(1, 2, 3, 56, 56))


def test_positions_tell_time_from_place():
    table = sinusoids(32, 3, 2)[0]
    assert not table[0].any()
    frames = table[1:].reshape(2, 9, 32)
    assert torch.equal(frames[0, :, 8:], frames[1, :, 8:])  # the place does not move with time
    assert torch.equal(frames[:, 0, :8], frames[:, 8, :8])  # nor the time with the place
    assert len({tuple(row.tolist()) for row in frames.reshape(18, 32)}) == 18


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def state(vision):
    """A whole stage-2 checkpoint: three BERT layers, of which the last attends to the video."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    text = BertModel(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=3, num_attention_heads=1,
            intermediate_size=96, max_position_embeddings=16,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    found = {f"vision_encoder.{name}": value for name, value in vision.state_dict().items()}
    found |= {f"text_encoder.bert.{name}": value for name, value in text.state_dict().items()}
    found["text_encoder.bert.encoder.layer.2.crossattention.self.query.weight"] = torch.zeros(2)
    found |= {"vision_encoder.clip_decoder.0.head.weight": torch.zeros(2), "temp": torch.ones(())}
    found |= {
        "itm_head.weight": torch.zeros(2, 64),
        "text_encoder.cls.predictions.bias": torch.ones(1),
    }
    for name, (wide, narrow) in {"vision_proj": (48, 24), "text_proj": (64, 24)}.items():
        found |= {f"{name}.{k}": v for k, v in torch.nn.Linear(wide, narrow).state_dict().items()}
    return found


def build(tmp_path, tokenizer, state, **settings):
    path = tmp_path / "stage2.pt"
    torch.save({"module": state}, path)
    config = InternVideo2ScorerConfig(
        weights=str(path), tokenizer=tokenizer, **{**SETTINGS, **settings}
    )
    return load_internvideo2(config)


def test_embeddings_of_a_published_file(tmp_path, tokenizer, state, vision):
    scorer = build(tmp_path, tokenizer, state)
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 255, (4, 56, 56, 3), np.uint8) for _ in range(3)]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pooled = vision((pixels - mean[:, None, None]) / std[:, None, None])[1]
    expected = pooled @ state["vision_proj.weight"].T + state["vision_proj.bias"]
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    assert np.stack(scorer.embed_videos(clips)) == pytest.approx(expected, abs=1e-5)
    texts = ["a dog runs", "a red dog", "running " * 30]
    together = np.stack(scorer.embed_texts(texts))
    alone = np.concatenate([scorer.embed_texts([text]) for text in texts])
    assert together == pytest.approx(alone, abs=1e-5)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1)
    assert scorer.prepare(np.zeros((90, 120, 3), np.uint8)).shape == (56, 56, 3)


def test_text_is_read_by_the_layers_before_fusion_alone(tmp_path, tokenizer, state):
    before = build(tmp_path, tokenizer, state).embed_texts(["a dog"])[0]
    changed = dict(state)
    for name in state:
        if name.startswith("text_encoder.bert.encoder.layer.2."):
            changed[name] = state[name] + 1
    assert np.array_equal(build(tmp_path, tokenizer, changed).embed_texts(["a dog"])[0], before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_encoder.blocks.1.attn.proj.bias": None}, r"blocks\.1\.attn\.proj\.bias is missing"),
        ({"vision_encoder.spare": torch.zeros(1)}, r"vision_encoder\.spare is not known"),
        ({"text_proj.bias": torch.zeros(3)}, r"text_proj\.bias is of shape \(3,\), not \(24,\)"),
        ({"vision_proj.weight": None}, r"vision_proj\.weight is missing"),
        ({"vision_encoder.cls_token": None}, r"cls_token is missing"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, tokenizer, state, change, said):
    changed = {k: v for k, v in {**state, **change}.items() if v is not None}
    with pytest.raises(DependencyError, match=said):
        build(tmp_path, tokenizer, changed)


def test_settings_that_do_not_fit_are_refused(tmp_path, tokenizer, state):
    with pytest.raises(DependencyError, match="not 3 square frames"):
        build(tmp_path, tokenizer, state, num_frames=3)
    with pytest.raises(DependencyError, match="width 64 are not known"):
        build(tmp_path, tokenizer, state, heads=None)
    with pytest.raises(DependencyError, match="No InternVideo2 weights"):
        load_internvideo2(InternVideo2ScorerConfig(weights=str(tmp_path / "none.pt")))


def test_a_model_that_was_never_trained_is_refused(tmp_path, tokenizer, state):
    with pytest.raises(DependencyError, match="known pair"):
        check_video_text(build(tmp_path, tokenizer, state))
