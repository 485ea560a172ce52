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


def test_a_file_that_is_not_utf8_is_one_clear_error(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"Not UTF-8: .*p\.yaml \(.* at byte 9\)"):
        load_pipeline(tmp_path / "p.yaml")


@pytest.mark.parametrize("value", ["[]", "0", "''", "false", "[a]", "text"])
@pytest.mark.parametrize(
    "place", ["stages: {{download: {}}}", "stages: {{download: {{}}}}\nshards: {}"]
)
def test_a_section_that_is_no_mapping_is_an_error(write, place, value):
    where = "shards" if "shards" in place else r"stages\.download"
    with pytest.raises(ConfigError, match=f"1 problem .*\n  {where}: expected a mapping"):
        load_pipeline(write("name: x\n" + place.format(value)))
    load_pipeline(write("name: x\n" + place.format("")))


def test_a_key_that_is_no_text_is_an_error(write):
    with pytest.raises(ConfigError, match="Not valid YAML"):
        load_pipeline(write("? [a]\n: b\n"))


def test_known_keys_are_named_in_the_order_of_a_file(write):
    with pytest.raises(ConfigError) as error:
        load_pipeline(write("name: x\nqqq: 1\nstages: {download: {}}"))
    known = "name, description, sources, shards, runtime, stages"
    assert f"qqq: unknown key; known: {known}" in error.value.message


def test_exclusion_lists_are_found_here_and_beside_the_pipeline(write, tmp_path, monkeypatch):
    (tmp_path / "x.txt").touch()
    text = "name: x\nstages: {download: {}}\nsources: {exclude: [x.txt, 's3://b/y.csv']}"
    found = (str(tmp_path / "x.txt"), "s3://b/y.csv")
    pipeline = load_pipeline(write(text))
    assert pipeline.sources.exclude == found
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "x.txt").touch()
    assert load_pipeline(tmp_path / "p.yaml").sources.exclude[0] == str(tmp_path / "here" / "x.txt")
    with pytest.raises(ConfigError) as error:
        load_pipeline(tmp_path / "p.yaml", ["sources.exclude=[gone.txt, a.mp4]"])
    assert "no such file: gone.txt" in error.value.message
    assert "a.mp4 is no list (.csv, .jsonl, .parquet, .tsv, .txt)" in error.value.message


def test_where_sources_come_from_does_not_change_the_fingerprint(write):
    path = write("name: x\nstages: {download: {}}\n")
    columns = "sources.columns={source: where, start: t0, end: t1}"
    assert load_pipeline(path, [columns]).fingerprint == load_pipeline(path).fingerprint
    with pytest.raises(ConfigError, match=r"sources\.columns\.where"):
        load_pipeline(path, ["sources.columns={where: source}"])


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_resolved_pipeline_is_a_pipeline_and_the_same(path, write):
    pipeline = load_pipeline(path)
    again = load_pipeline(write(pipeline.resolved()))
    assert again.resolved() == pipeline.resolved()
    assert again.fingerprint == pipeline.fingerprint


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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stages.fuse.model={kind: llm, llm: {kind: http}}",
            "stages.fuse.model.llm.base_url: Field",
        ),
        ("stages.fuse.model={kind: template, template: 3}", "stages.fuse.model.template: Input"),
        ("stages.fuse.model.kind=magic", "stages.fuse.model: Input tag 'magic'"),
        ("stages.fuse.model.prompt=bad.yaml", "stages.fuse.model.prompt: "),
    ],
)
def test_a_setting_inside_a_kind_is_called_by_its_place_in_the_file(write, override, said):
    model = "{kind: llm, llm: {kind: http, base_url: 'http://h/v1', model: m}}"
    path = write(f"name: x\nstages: {{fuse: {{model: {model}}}}}")
    with pytest.raises(ConfigError) as error:
        load_pipeline(path, [override])
    assert f"\n  {said}" in error.value.message
    assert "Value error" not in error.value.message
