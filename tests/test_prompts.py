# SPDX-License-Identifier: Apache-2.0
import pytest

from dataengine.config import load_pipeline
from dataengine.errors import ConfigError
from dataengine.prompts import load_prompt


def test_a_prompt_is_checked_against_its_variables(tmp_path):
    path = tmp_path / "p.v1.yaml"
    path.write_text("hello: 'Hi {name}'\nspare: x\nbye: 'Bye {who} {name}'\n")
    with pytest.raises(ConfigError) as error:
        load_prompt(str(path), {"hello": {"name", "age"}, "bye": {"name"}, "lost": set()})
    for said in (
        "{age} is not used",
        "unknown variable {who}",
        "lost: text is missing",
        "spare: unknown",
    ):
        assert said in error.value.message


def test_values_are_data(tmp_path):
    path = tmp_path / "p.v1.yaml"
    path.write_text("hello: 'Hi {name}'\n")
    prompt = load_prompt(str(path), {"hello": {"name"}})
    assert prompt.render("hello", name="{0} {name}") == "Hi {0} {name}"


def test_a_changed_prompt_changes_the_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    from pathlib import Path

    project = Path(__file__).parent.parent
    text = (project / "prompts" / "fuse_template.v1.yaml").read_text()
    (tmp_path / "prompts" / "fuse_template.v1.yaml").write_text(text)
    pipeline = project / "pipelines" / "quickstart.yaml"
    before = load_pipeline(pipeline)
    fingerprint = before.fingerprint
    assert len(before.prompt_hashes()["prompts/fuse_template.v1.yaml"]) == 64
    (tmp_path / "prompts" / "fuse_template.v1.yaml").write_text(text.replace("says", "said"))
    assert load_pipeline(pipeline).fingerprint != fingerprint
