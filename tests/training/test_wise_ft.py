# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from dataengine.errors import ConfigError
from dataengine.networks.viclip import ViCLIP
from training.evaluation.wise_ft import interpolate

KEPT = "vision_encoder.temporal_positional_embedding"


@pytest.fixture
def weights(recipe):
    """Weights that were trained, and those they started from."""
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(ViCLIP(recipe().model).state_dict())
    states[0][KEPT] += 1
    return states


def test_the_ends_are_the_two_models(weights):
    tuned, initial = weights
    for alpha, expected in ((1.0, tuned), (0.0, initial)):
        mixed = interpolate(tuned, initial, alpha)
        assert mixed.keys() == tuned.keys()
        for name in tuned.keys() - {KEPT}:
            assert torch.equal(mixed[name], expected[name]), name


def test_half_way_lies_between(weights):
    tuned, initial = weights
    mixed = interpolate(tuned, initial, 0.5)
    name = "vision_encoder.proj"
    torch.testing.assert_close(mixed[name], (tuned[name] + initial[name]) / 2)
    quarter = interpolate(tuned, initial, 0.25)
    torch.testing.assert_close(quarter[name], 0.25 * tuned[name] + 0.75 * initial[name])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_what_a_model_knows_of_time_is_kept(weights, alpha):
    tuned, initial = weights
    assert torch.equal(interpolate(tuned, initial, alpha)[KEPT], tuned[KEPT])


def test_nothing_is_changed_in_place(weights):
    tuned, initial = weights
    before = {name: weight.clone() for name, weight in tuned.items()}
    for weight in interpolate(tuned, initial, 0.5).values():
        weight += 1
    assert all(torch.equal(before[name], weight) for name, weight in tuned.items())


def test_models_that_do_not_fit_are_refused(weights):
    tuned, initial = weights
    with pytest.raises(ConfigError, match=r"\[2\] in one and \[3\] in the other"):
        interpolate({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 0.5)
    fewer = {name: weight for name, weight in initial.items() if name != "temp"}
    with pytest.raises(ConfigError, match="only one has temp"):
        interpolate(tuned, fewer, 0.5)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        interpolate(tuned, initial, 1.5)
