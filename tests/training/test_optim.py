# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from training.config import OptimConfig
from training.models import build_task
from training.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate


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
    task = build_task(config)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    groups = build_optimizer(task, config.optim, no_decay=task.no_decay()).param_groups
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    decayed, free = by_decay[0.2], by_decay[0.0]
    assert decayed | free == set(names.values())
    ends = {name.split("_encoder.")[1] for name in decayed}
    in_block = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight"}
    in_block |= {"mlp.c_proj.weight"}
    blocks = {f"transformer.resblocks.{i}.{name}" for i in range(2) for name in in_block}
    assert ends == blocks | {"conv1.weight", "proj", "text_projection"}


def test_frozen_text_tower_is_not_trained(recipe):
    config = recipe(model__freeze_text=True)
    task = build_task(config)
    optimizer = build_optimizer(task, config.optim)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = {
        id(p) for name, p in task.named_parameters() if name.startswith("network.text_encoder.")
    }
    assert len(frozen) == 17
    assert not trained & frozen
    assert not any(".text_encoder." in name for name in optimizer_state(optimizer, task))


def test_lower_layers_learn_more_slowly():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("stem", "top", "head")})
    config = OptimConfig(lr=1.0, steps=1, layer_decay=0.5)
    depths = {"stem.weight": (0, 2), "top.weight": (1, 2)}
    optimizer = build_optimizer(model, config, layer_of=depths.get)
    set_learning_rate(optimizer, 0.8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(g["params"][0])]: g["lr"] for g in optimizer.param_groups}
    assert rates == pytest.approx({"head.weight": 0.8, "top.weight": 0.4, "stem.weight": 0.2})


def test_state_is_named_and_there_before_the_first_step():
    model = nn.Linear(2, 1)
    config = OptimConfig(lr=0.1, steps=1, betas=(0.9, 0.98), weight_decay=0.0)
    ours, theirs = build_optimizer(model, config), None
    state = optimizer_state(ours, model)
    parts = ("step", "exp_avg", "exp_avg_sq")
    assert state.keys() == {f"{name}.{part}" for name in ("weight", "bias") for part in parts}
    # Ready-made state gives the steps of torch's own.
    other = nn.Linear(2, 1)
    other.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(other.parameters(), 0.1, (0.9, 0.98), 1e-8, 0.0)
    for _ in range(3):
        for module, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            module(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight)
    assert state["weight.step"] == 3
