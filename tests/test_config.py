# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import yaml

from dataengine.config import load_pipeline
from dataengine.errors import ConfigError

PIPELINES = Path(__file__).parent.parent / "pipelines"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "p.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_pipeline_that_comes_with_the_project_is_valid(path):
    pipeline = load_pipeline(path)
    assert pipeline.name == path.stem
    again = yaml.safe_load(pipeline.resolved())
    assert list(again["stages"]) == [cls.name for cls, _ in pipeline.stages]


def test_all_problems_are_reported_together(write):
    path = write(
        """
name: x
shard: {}
shards: {shard_mb: 0}
stages:
  download: {retries: many}
  segmnet: {}
  clip: {}
  score: {resources: {min_actors: 3, max_actors: 1}}
"""
    )
    with pytest.raises(ConfigError) as error:
        load_pipeline(path)
    text = error.value.message
    assert error.value.exit_code == 2
    for said in (
        "shard: unknown key; did you mean shards?",
        "shards.shard_mb",
        "stages.download.retries",
        "(got 'many')",
        "stages.segmnet: unknown stage; did you mean segment?",
        "max_actors (1) < min_actors (3)",
    ):
        assert said in text
    assert len(text.splitlines()) == 6


def test_a_stage_that_reads_what_nobody_writes_is_an_error(write):
    with pytest.raises(ConfigError, match=r"stages\.clip: no stage before it writes .*_path"):
        load_pipeline(write("name: x\nstages: {clip: {}}"))


def test_a_key_written_twice_is_an_error(write):
    with pytest.raises(ConfigError, match="'name' is written twice"):
        load_pipeline(write("name: x\nname: y\nstages: {download: {}}"))


@pytest.mark.parametrize("text", ["", "- a", "name: [", "name: x"])
def test_what_is_no_pipeline_is_one_clear_error(write, text):
    with pytest.raises(ConfigError):
        load_pipeline(write(text))


def test_set_changes_a_setting_and_the_fingerprint(write):
    path = write("name: x\nstages:\n  download:\n    retries: 1\n  segment: {}\n")
    plain = load_pipeline(path)
    changed = load_pipeline(path, ["stages.segment.num_frames=5", "runtime.max_attempts=9"])
    assert changed.stages[1][1].model_dump()["num_frames"] == 5
    assert changed.runtime.max_attempts == 9
    assert changed.fingerprint != plain.fingerprint
    for harmless in (
        "runtime.max_attempts=9",
        "stages.download.resources.num_cpus=3",
        "stages.download.retries=9",
    ):
        assert load_pipeline(path, [harmless]).fingerprint == plain.fingerprint
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_pipeline(path, ["name=[1"])
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_pipeline(path, ["stages.download.retries"])
