# SPDX-License-Identifier: Apache-2.0
import pytest

from dataengine.networks.viclip import ViCLIP
from training.config import OptimConfig
from training.optim import build_optimizer, learning_rate


def test_learning_rate_rises_and_falls():
    config = OptimConfig(lr=2.0, steps=100, warmup_ratio=0.1, min_lr_ratio=0.01)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))
    assert rates[100] == pytest.approx(0.02)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_no_warm_up_starts_at_the_top():
    config = OptimConfig(lr=1.0, steps=10, warmup_ratio=0.0)
    assert learning_rate(0, 10, config) == 1.0


def test_only_matrices_decay(recipe):
    config = recipe()
    model = ViCLIP(config.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config.optim).param_groups
    decayed, free = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decayed | free == set(names.values())
    ends = {name.removeprefix("vision_encoder.").removeprefix("text_encoder.") for name in decayed}
    in_block = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight"}
    in_block |= {"mlp.c_proj.weight"}
    blocks = {f"transformer.resblocks.{i}.{name}" for i in range(2) for name in in_block}
    assert ends == blocks | {"conv1.weight", "proj", "text_projection"}
    assert groups[1]["weight_decay"] == 0.0


def test_frozen_text_tower_is_not_trained(recipe):
    config = recipe(model__freeze_text=True)
    model = ViCLIP(config.model)
    trained = {
        id(p)
        for group in build_optimizer(model, config.optim).param_groups
        for p in group["params"]
    }
    frozen = {id(p) for p in model.text_encoder.parameters()}
    assert len(frozen) == 17
    assert not trained & frozen
