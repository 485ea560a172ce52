# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from dataengine.models import transnet
from dataengine.models.shots import (
    AutoShotSettings,
    ShotSettings,
    TransNetSettings,
    agreement,
    build_shot_detector,
    match_boundaries,
)
from tests.shot_recipe import recipe_weights

FRAME_US = 40_000


def scene(seed):
    """A picture of soft blobs that moves a little: frames [height, width, 3] by number."""
    rng = np.random.default_rng(seed)
    blobs = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((20, 20, 1)))
    return lambda n: np.roll(blobs, n // 2, axis=1).astype(np.uint8)[:90, :120]


def detect(detector, frames, zero_us=7_000):
    """Numbers of the frames at which shots begin; each may be late, but no later than said."""
    found = []
    for number, frame in enumerate(frames):
        for boundary_us in detector.push(zero_us + number * FRAME_US, frame):
            assert zero_us + number * FRAME_US - boundary_us <= detector.lag_us(FRAME_US)
            found.append((boundary_us - zero_us) / FRAME_US)
    found += [(boundary_us - zero_us) / FRAME_US for boundary_us in detector.flush()]
    return found


# ----------------------------------------------------------------------------------------- networks


def test_transnetv2_begins_shots_with_their_first_frames():
    cuts, num = [23, 74, 75 + 40, 160], 180
    scenes = [scene(seed) for seed in range(5)]
    frames = [scenes[np.searchsorted(cuts, n, side="right")](n) for n in range(num)]
    detector = build_shot_detector(TransNetSettings())
    assert detect(detector, frames) == cuts
    assert detector.name == "transnetv2"
    assert "threshold 0.5" in detector.revision


def test_transnetv2_sees_a_dissolve_once():
    before, after = scene(1), scene(2)
    weights = np.clip((np.arange(90) - 40) / 12, 0, 1)
    frames = [
        (before(n) * (1 - weight) + after(n) * weight).astype(np.uint8)
        for n, weight in enumerate(weights)
    ]
    (boundary,) = detect(build_shot_detector(TransNetSettings()), frames)
    assert 40 <= boundary <= 52


@pytest.mark.parametrize("shape", [(9, 16, 3), (1, 1, 3), (200, 90, 3)])
def test_pictures_of_any_shape_are_taken(shape):
    detector = build_shot_detector(TransNetSettings())
    assert detect(detector, [np.zeros(shape, np.uint8)] * 3) == []


def test_a_video_without_frames_has_no_boundary():
    assert build_shot_detector(TransNetSettings()).flush() == []


class ScriptedNetwork:
    """Says what it is told: the probability is the red value of a frame, in percent."""

    revision = "scripted"

    def probabilities(self, frames_BTHWC):
        red = frames_BTHWC[:, 25:75, 0, 0, 0] / 100
        return np.stack((red, np.zeros_like(red)), 2)


@pytest.mark.parametrize(
    ("run", "boundaries"),
    [
        ([10], [11]),  # a hard cut: the last frame of the old shot alone
        ([49], [50]),  # the last of a window's middle
        (range(45, 56), [56]),  # a long run, over the end of a window
        ([0], [1]),
        ([*range(20, 23), 24], [23, 25]),
        (range(115, 120), []),  # up to the end of the video
        (range(120), []),
    ],
)
@pytest.mark.parametrize("batch_windows", [1, 2])
def test_a_shot_begins_after_the_run_above_the_threshold(
    run, boundaries, batch_windows, monkeypatch
):
    monkeypatch.setattr(transnet, "load_network", lambda *_: ScriptedNetwork())
    frames = np.zeros((120, 27, 48, 3), np.uint8)
    frames[..., 2] = 50  # not above 0.5, and red comes last in BGR
    frames[list(run), ..., 2] = 51
    detector = build_shot_detector(TransNetSettings(batch_windows=batch_windows))
    assert detect(detector, frames) == boundaries


def test_autoshot_runs_from_a_checkpoint(tmp_path):
    weights = recipe_weights(transnet.ARCHITECTURES["autoshot"].shapes())
    path = tmp_path / "ckpt_0_200_0.pth"
    torch.save({"net": {key: torch.from_numpy(values) for key, values in weights.items()}}, path)
    settings = AutoShotSettings(weights_path=str(path), threshold=0.999)
    detector = build_shot_detector(settings)
    assert detect(detector, [scene(0)(n) for n in range(20)]) == []
    assert detector.name == "autoshot"
    assert "threshold 0.999" in detector.revision


def test_autoshot_without_weights_says_where_they_are():
    with pytest.raises(ValidationError, match=r"weights_path to ckpt_0_200_0\.pth"):
        TypeAdapter(ShotSettings).validate_python({"kind": "autoshot"})


# ----------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("boundaries", "expected"),
    [
        ({"a": [100, 200]}, [(), ()]),
        ({"a": [], "b": [5]}, []),
        ({"a": [100, 200], "b": [110], "c": [89, 195]}, [("b",), ("c",)]),
        ({"a": [100, 105], "b": [104]}, [(), ("b",)]),  # one boundary cannot confirm two
        ({"a": [100, 105], "b": [96, 104]}, [("b",), ("b",)]),
        ({"a": [100], "b": [90], "c": [110]}, [("b", "c")]),
    ],
)
def test_agreement_names_who_found_the_same_boundary(boundaries, expected):
    assert agreement(boundaries, 10) == expected


def test_a_transition_is_found_anywhere_in_its_span():
    spans = [(10, 10), (50, 80), (200, 230)]
    assert match_boundaries([8, 11, 48, 64, 82, 199], spans, 2) == {0: 1, 1: 3, 2: 5}
    assert match_boundaries([7, 83, 197], spans, 2) == {}
