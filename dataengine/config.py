# SPDX-License-Identifier: Apache-2.0
"""Pipeline files: YAML to frozen settings, with every problem reported at once."""

import difflib
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from dataengine.errors import ConfigError
from dataengine.lists import LIST_SUFFIXES, SourceSettings, is_list
from dataengine.prompts import prompt_files, prompt_sha256
from dataengine.stage import Settings, Stage
from dataengine.stages import STAGES

SettingsT = TypeVar("SettingsT", bound=Settings)

SOURCE_COLUMNS = ("_video", "_refusal", "_spans", "provenance")
"""What the source list gives to the first stage."""


class ShardSettings(Settings):
    """How clips are packed into shards."""

    shard_mb: int = Field(default=256, ge=1)
    """Media after which a shard is closed; whole videos are never split, so it may be exceeded."""
    row_group_mb: int = Field(default=32, ge=1)
    """Media after which a row group is closed: the unit of random access."""


class RuntimeSettings(Settings):
    """How the run behaves; none of this changes what a clip holds."""

    max_attempts: int = Field(default=3, ge=1)
    """Times an item may kill its worker before it is set aside as failed; and attempts after which
    a source that failed is left to ``dataengine retry``."""
    videos_per_wave: int = Field(default=20_000, ge=1)
    """Videos in one Ray Data graph; bounds what the driver has to remember."""
    no_progress_timeout_s: int = Field(default=7200, ge=-1)
    """Seconds without any output after which Ray gives up; -1 waits for ever."""


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline: what runs, in order, and its hash."""

    name: str
    description: str
    shards: ShardSettings
    runtime: RuntimeSettings
    stages: tuple[tuple[type[Stage], Stage.Config], ...]
    source: str
    sources: SourceSettings = field(default_factory=SourceSettings)

    @property
    def fingerprint(self) -> str:
        """Hash of all that changes what a clip holds: stages, their settings, their prompts."""
        content = {cls.name: _meaning(config) for cls, config in self.stages}
        text = json.dumps([content, self.prompt_hashes()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prompt_hashes(self) -> dict[str, str]:
        """Returns the SHA-256 of every prompt file that a stage's settings name."""
        files = {file for _, config in self.stages for file in prompt_files(config)}
        return {file: prompt_sha256(file) for file in sorted(files)}

    def resolved(self) -> str:
        """Returns the pipeline as YAML with every default written out."""
        content = {
            "name": self.name,
            "description": self.description,
            "sources": self.sources.model_dump(mode="json"),
            "shards": self.shards.model_dump(mode="json"),
            "runtime": self.runtime.model_dump(mode="json"),
            "stages": {cls.name: config.model_dump(mode="json") for cls, config in self.stages},
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Reads and checks a pipeline file.

    Args:
        path: A YAML file; see ``pipelines/README.md``.
        overrides: ``a.b.c=value`` settings, the value in YAML, applied in order.

    Raises:
        ConfigError: With every problem found, each on a line of its own.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Not UTF-8: {path} ({error.reason} at byte {error.start})", "save the file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"Pipeline file cannot be read: {path} ({error.strerror})",
            "the pipelines that come with the project are in pipelines/",
        ) from None
    return parse_pipeline(text, str(path), overrides)


def parse_pipeline(text: str, path: str, overrides: Sequence[str] = ()) -> Pipeline:
    """Checks a pipeline's text; see `load_pipeline`.

    Args:
        text: YAML.
        path: Where it comes from. Exclusion lists are looked for in the working directory, then
            beside it.
        overrides: ``a.b.c=value`` settings.

    Raises:
        ConfigError: With every problem found, each on a line of its own.
    """
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Not valid YAML: {path}\n  {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"Not a pipeline: {path}", "expected the keys name and stages")
    problems: list[str] = []
    for override in overrides:
        _apply(content, override, problems)
    pipeline = _build(content, path, problems)
    if problems or pipeline is None:
        raise ConfigError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in {path}:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return pipeline


def _build(content: dict[str, Any], source: str, problems: list[str]) -> Pipeline | None:
    """Checks every part and returns the pipeline, or None when there was a problem."""
    known = ("name", "description", "sources", "shards", "runtime", "stages")
    problems += [
        f"{key}: unknown key{_did_you_mean(key, known)}" for key in content if key not in known
    ]
    name = content.get("name")
    if not isinstance(name, str) or not name:
        problems.append("name: expected a text")
    sources = _settings(SourceSettings, content.get("sources"), "sources", problems)
    if sources is not None:
        sources = _found_lists(sources, Path(source).parent, problems)
    shards = _settings(ShardSettings, content.get("shards"), "shards", problems)
    runtime = _settings(RuntimeSettings, content.get("runtime"), "runtime", problems)
    entries = content.get("stages")
    if not isinstance(entries, dict) or not entries:
        problems.append("stages: expected a mapping of stage name to its settings")
        return None
    stages = []
    for stage_name, settings in entries.items():
        cls = STAGES.get(stage_name)
        if cls is None:
            problems.append(
                f"stages.{stage_name}: unknown stage{_did_you_mean(stage_name, STAGES)}"
            )
            continue
        config = _settings(cls.Config, settings, f"stages.{stage_name}", problems)
        if config is not None:
            stages.append((cls, config))
    if len(stages) == len(entries):
        problems += _column_problems([cls for cls, _ in stages])
        if stages[0][1].resources.colocate:
            problems.append(
                f"stages.{stages[0][0].name}: the first stage has none to colocate with"
            )
    if problems or sources is None or shards is None or runtime is None:
        return None
    return Pipeline(
        name=str(name),
        description=str(content.get("description", "")),
        shards=shards,
        runtime=runtime,
        stages=tuple(stages),
        source=source,
        sources=sources,
    )


def _found_lists(settings: SourceSettings, folder: Path, problems: list[str]) -> SourceSettings:
    """Returns the settings with absolute paths of exclusion lists, or adds a problem for each."""
    found = []
    for name in settings.exclude:
        places = (Path(name).expanduser(), folder / name)
        path = next((place for place in places if place.is_file()), None)
        if not is_list(name):
            suffixes = ", ".join(sorted(LIST_SUFFIXES))
            problems.append(f"sources.exclude: {name} is no list ({suffixes})")
        elif path is None and "://" not in name:
            problems.append(f"sources.exclude: no such file: {name}")
        found.append(str(path.absolute()) if path else name)
    return settings.model_copy(update={"exclude": tuple(found)})


def _column_problems(stages: Sequence[type[Stage]]) -> list[str]:
    """Returns a problem for every stage that reads what no stage before it writes."""
    available = set(SOURCE_COLUMNS)
    problems = []
    for cls in stages:
        missing = sorted(set(cls.inputs) - available)
        if missing:
            problems.append(f"stages.{cls.name}: no stage before it writes {', '.join(missing)}")
        available |= set(cls.outputs.names)
    return problems


def _settings(
    cls: type[SettingsT], content: object, where: str, problems: list[str]
) -> SettingsT | None:
    """Returns validated settings, or None after adding each problem with its place."""
    if content is not None and not isinstance(content, Mapping):
        problems.append(f"{where}: expected a mapping (got {content!r})")
        return None
    try:
        return cls.model_validate(content or {})
    except ValidationError as error:
        for problem in error.errors():
            value = problem["input"]
            shown = "" if isinstance(value, Mapping) else f" (got {value!r})"
            place = ".".join([where, *setting_place(problem["loc"], content)])
            problems.append(f"{place}: {problem_text(problem['msg'])}{shown}")
        return None


def setting_place(loc: Sequence[str | int], content: object) -> list[str]:
    """Returns the keys that lead to a setting in a user's file.

    Args:
        loc: Where pydantic says that it is: after the key of a union on ``kind`` with the name of its
            member, which is no key.
        content: What was checked, as plain values.
    """
    keys: list[str] = []
    node, is_entered = content, True
    for key in loc:
        if is_entered and isinstance(node, Mapping) and node.get("kind") == key:
            is_entered = False
            continue
        keys.append(str(key))
        is_entered = True
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            node = None
    return keys


def problem_text(message: str) -> str:
    """Returns what pydantic says is wrong, without its own name for the error."""
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _apply(content: dict[str, Any], override: str, problems: list[str]) -> None:
    """Sets one ``a.b.c=value`` in the content, in place."""
    key, equals, text = override.partition("=")
    if not equals:
        problems.append(f"--set {override}: expected KEY=VALUE")
        return
    *parents, last = key.strip().split(".")
    node: Any = content
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            problems.append(f"--set {override}: {parent} is a value, not a section")
            return
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        problems.append(f"--set {override}: the value is not valid YAML")


def _meaning(settings: Settings) -> dict[str, Any]:
    """Returns, as plain values, the settings that change what a clip holds, nested ones as well."""
    values = settings.model_dump(mode="json", exclude=set(settings.neutral))
    for name in values:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            values[name] = _meaning(value)
    return values


def _did_you_mean(name: object, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice: the second would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # the base class says so, with the place
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
