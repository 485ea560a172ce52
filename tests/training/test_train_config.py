# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from dataengine.errors import ConfigError
from training.__main__ import main
from training.config import RECIPES_DIR, load_recipe

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid(name):
    assert load_recipe(name).run.seed >= 0


def test_all_problems_are_told_together():
    overrides = ["optim.stepz=3", "data.batch_size=0", "model.video.image_size=65", "nonsense"]
    with pytest.raises(ConfigError) as caught:
        load_recipe("viclip_tiny", overrides)
    for problem in (
        "--set nonsense: expected section.field=value",
        "data.batch_size: Input should be greater than 0 (got 0)",
        "model.video: image_size 65 is not a multiple of patch_size 16",
        "optim.stepz: unknown field, did you mean steps?",
    ):
        assert problem in caught.value.message


def test_overrides_replace_and_are_typed():
    config = load_recipe("viclip_tiny", ["optim.lr=5e-4", "data.crop_scale=[0.2, 0.9]"])
    assert config.optim.lr == 5e-4
    assert config.data.crop_scale == (0.2, 0.9)


def test_setting_epochs_replaces_steps():
    config = load_recipe("viclip_tiny", ["optim.epochs=1.5"])
    assert (config.optim.epochs, config.optim.steps) == (1.5, None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: {a: 1}\nmodel: {a: 2}\n", "duplicate keys model"),
        ("- a list\n", "must hold a mapping"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_file_that_is_no_recipe(tmp_path, text, problem):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_recipe(str(path))


def test_misspelt_recipe_gets_a_hint():
    with pytest.raises(ConfigError) as caught:
        load_recipe("viclip_tinny")
    assert caught.value.hint == "did you mean viclip_tiny?"


def test_command_tells_a_mistake_without_a_traceback(repository, tmp_path):
    command = [sys.executable, "-m", "training", "viclip_tiny", "--data", str(tmp_path)]
    done = subprocess.run(
        [*command, "--set", "run.seed=-1"], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "run.seed: Input should be greater than or equal to 0 (got -1)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("recipe", "override", "problem"),
    [
        ("viclip_tiny", "data.caption=null", "a viclip model learns from captions"),
        ("viclip_tiny", "data.mix={video: {}, audio: {}}", "hears nothing"),
        ("internvideo2_clip_1b", "model.embed_dim=512", "must be embed_dim 512"),
    ],
)
def test_what_a_model_cannot_do_is_refused(recipe, override, problem):
    with pytest.raises(ConfigError, match=problem):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--num-workers", "4"], "--num-workers is of use with --ray alone"),
        (["--dry-run", "--num-gpus", "0"], "--num-gpus 0 is too small"),
        (["--dry-run", "--gpu-memory-gb", "-1"], "--gpu-memory-gb -1.0 is too small"),
        (["--json"], "--json is of use with --dry-run alone"),
    ],
)
def test_option_without_effect_or_sense_is_refused(arguments, problem, capsys):
    assert main(["viclip_tiny", "--data", "nowhere", *arguments]) == 2
    assert problem in capsys.readouterr().err
