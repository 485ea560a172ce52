# SPDX-License-Identifier: Apache-2.0
import hashlib
import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from dataengine import actions, discover
from dataengine.config import load_pipeline, parse_pipeline
from dataengine.errors import ConfigError
from dataengine.models import translator
from dataengine.models.audio import SOUND_PROMPT, TAG_PROMPT
from dataengine.models.captioner import MERGE_VARIABLES, VLM_VARIABLES
from dataengine.models.fusion import LLM_VARIABLES, TEMPLATE_VARIABLES
from dataengine.prompts import (
    PromptFile,
    as_data,
    data_marker,
    load_prompt,
    one_line,
    prompt_files,
)
from dataengine.stage import Settings

PROJECT = Path(__file__).parent.parent


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
    text = (PROJECT / "prompts" / "fuse_template.v1.yaml").read_text()
    (tmp_path / "prompts" / "fuse_template.v1.yaml").write_text(text)
    pipeline = PROJECT / "pipelines" / "quickstart.yaml"
    before = load_pipeline(pipeline)
    fingerprint = before.fingerprint
    assert len(before.prompt_hashes()["prompts/fuse_template.v1.yaml"]) == 64
    (tmp_path / "prompts" / "fuse_template.v1.yaml").write_text(text.replace("says", "said"))
    assert load_pipeline(pipeline).fingerprint != fingerprint


def test_a_users_own_prompt_is_hashed_wherever_it_lies(tmp_path):
    mine = tmp_path / "my words.yaml"
    text = (PROJECT / "prompts" / "fuse_template.v1.yaml").read_text()
    mine.write_text(text)
    overrides = [f"stages.fuse.model={{kind: template, template: '{mine}'}}"]
    pipeline = PROJECT / "pipelines" / "quickstart.yaml"
    before = load_pipeline(pipeline, overrides)
    fingerprint, hashes = before.fingerprint, before.prompt_hashes()
    assert hashes[str(mine)] == hashlib.sha256(mine.read_bytes()).hexdigest()
    mine.write_text(text.replace("says", "said"))
    after = load_pipeline(pipeline, overrides)
    assert after.prompt_hashes()[str(mine)] != hashes[str(mine)]
    assert after.fingerprint != fingerprint


def test_a_prompt_deep_inside_settings_is_found(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("hello: 'Hi {name}'\n")

    class Inner(Settings):
        prompt: Annotated[str, PromptFile({"hello": {"name"}})]
        title: str = "prompts/only a text"

    class Outer(Settings):
        one: Inner
        some: tuple[Inner, ...] = ()
        named: dict[str, Inner] = Field(default_factory=dict)

    (tmp_path / "other.yaml").write_text("hello: 'Ho {name}'\n")
    inner, other = {"prompt": str(mine)}, {"prompt": str(tmp_path / "other.yaml")}
    assert prompt_files(Outer.model_validate({"one": inner, "some": [other]})) == [
        str(mine), other["prompt"],
    ]  # fmt: skip
    assert prompt_files(Outer.model_validate({"one": inner, "named": {"x": other}})) == [
        str(mine), other["prompt"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "pipelines").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_prompt_of_the_pipelines_is_found(path):
    pipeline = load_pipeline(path)
    assert set(pipeline.prompt_hashes()) == set(re.findall(r"prompts/[\w.]+", pipeline.resolved()))


def test_braces_are_text_unless_they_hold_a_name(tmp_path):
    path = tmp_path / "p.v1.yaml"
    path.write_text("""ask: 'Answer {"a": "{what}", "b": {}, "c": {{what}}} {0} { what }'\n""")
    prompt = load_prompt(str(path), {"ask": {"what"}})
    assert prompt.render("ask", what="x") == 'Answer {"a": "x", "b": {}, "c": {x}} {0} { what }'
    with pytest.raises(KeyError):
        prompt.render("ask")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"ask: 'a\n b: c: d", "not YAML"),
        (b"ask: \xff\xfe", "not YAML"),
        (b"- ask", "ask: text is missing"),
        (b"ask: '  '", "ask: text is missing"),
        (b"ask: 7", "ask: text is missing"),
        (b"", "ask: text is missing"),
    ],
)
def test_a_file_that_is_no_prompt_is_an_error_that_says_so(tmp_path, data, said):
    path = tmp_path / "p.v1.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        load_prompt(str(path), {"ask": set()})


def test_a_prompt_that_does_not_fit_is_reported_with_the_pipelines_other_problems(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("system: x\nask_av: 'no {place}'\n")
    text = (PROJECT / "pipelines" / "quickstart.yaml").read_text()
    settings = {
        "kind": "llm", "prompt": "mine.yaml", "max_tokens": 0,
        "llm": {"kind": "http", "base_url": "http://127.0.0.1:9/v1", "model": "m"},
        "template": {"template": "nowhere.yaml"},
    }  # fmt: skip
    overrides = [f"stages.fuse.model={settings}", "stages.segment.num_frames=none"]
    with pytest.raises(ConfigError) as error:
        parse_pipeline(text, "p.yaml", overrides)
    for said in (
        "stages.fuse.model.prompt",
        "ask_av: variable {sources} is not used",
        "ask_av: unknown variable {place}",
        "retry: text is missing",
        "max_tokens",
        "Prompt file is missing: nowhere.yaml",
        "num_frames",
    ):
        assert said in error.value.message
    assert "Traceback" not in error.value.message


def test_a_default_prompt_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "fuse_template.v1.yaml").write_text("speech: 'no variable'\n")
    with pytest.raises(ConfigError, match=r"\{quote\} is not used"):
        load_pipeline(PROJECT / "pipelines" / "quickstart.yaml")


USERS = {
    "caption_clip": VLM_VARIABLES,
    "caption_sound": SOUND_PROMPT,
    "extract_actions": actions.PROMPT_VARIABLES,
    "fuse_llm": LLM_VARIABLES,
    "fuse_template": TEMPLATE_VARIABLES,
    "merge_scales": MERGE_VARIABLES,
    "sound_tags": TAG_PROMPT,
    "translate": translator.PROMPT_VARIABLES,
    "translate_query": discover.PROMPT_VARIABLES,
}


def test_every_prompt_file_is_listed_and_fits_its_user():
    rows = {
        line.split("|")[1].strip(): line
        for line in (PROJECT / "prompts" / "README.md").read_text().splitlines()
        if line.startswith("| `")
    }
    files = sorted((PROJECT / "prompts").glob("*.yaml"))
    assert set(rows) == {f"`{file.name}`" for file in files}
    assert set(USERS) == {file.name.split(".")[0] for file in files}
    for file in files:
        variables = USERS[file.name.split(".")[0]]
        load_prompt(f"prompts/{file.name}", variables)
        for word in {*variables}.union(*variables.values()):
            assert f"`{word}`" in rows[f"`{file.name}`"], (file.name, word)


def test_prompts_have_natural_paragraphs():
    """No line break inside a sentence, and JSON as a model is to write it."""
    for name, variables in USERS.items():
        texts = load_prompt(f"prompts/{name}.v1.yaml", variables).texts
        for key in set(texts) - {"tags"}:
            lines = [line for line in texts[key].splitlines() if line]
            assert all(re.search(r"[.:,}\"]$", line) for line in lines), (name, key)
            assert not any(line != line.strip() for line in lines), (name, key)
            assert "{{" not in texts[key], (name, key)


# ------------------------------------------------------------------------------- texts of clips


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\x00b\tc\r\nd\u2028e", "a b c d e"),
        ("\u202eright\u202c to \u200fleft\ufeff", "right to left"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("half \ud800 of a pair", "half of a pair"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("", ""),
    ],
)  # fmt: skip
def test_one_line_can_be_stored_and_seen(text, line):
    assert one_line(text) == line
    one_line(text).encode()


def test_data_is_cut_at_a_word_and_holds_no_markup():
    assert as_data("<|im_end|> [INST] five six", 100) == "(|im_end|) (INST) five six"
    assert as_data("one two, three", 9) == "one two..."
    assert as_data("one two three", 13) == "one two three"
    assert as_data("\u4e00" * 50, 10) == "\u4e00" * 10 + "..."


def test_a_marker_is_in_no_text_and_the_same_every_time():
    first = data_marker(["a", "b"])
    assert first == data_marker(["a", "b"]) != data_marker(["ab"])
    assert data_marker([first.upper(), "a", "b"]) != first


def test_a_marker_that_is_in_a_text_is_not_taken(monkeypatch):
    real, made = hashlib.sha256, []

    def first_is_known(data):
        made.append(data)
        return real(b"known" if len(made) == 1 else data)

    monkeypatch.setattr("dataengine.prompts.hashlib.sha256", first_is_known)
    known = real(b"known").hexdigest()[:12]
    assert data_marker([f"see {known} here"]) != known
    assert len(made) == 2
