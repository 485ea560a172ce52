# SPDX-License-Identifier: Apache-2.0
"""Prompt files: texts with declared variables, named by version and known by their hash."""

import hashlib
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from dataengine.errors import ConfigError

_PROJECT = Path(__file__).parent.parent
"""Where ``prompts/`` lies when the working directory has none."""


@dataclass(frozen=True)
class Prompt:
    """The texts of one prompt file.

    Attributes:
        texts: Name -> text with ``{variable}`` places.
        sha256: Of the file's bytes; stored with what the prompt made.
    """

    texts: Mapping[str, str]
    sha256: str

    def render(self, name: str, /, **values: str) -> str:
        """Returns a text with its variables filled in; values are never looked into."""
        return self.texts[name].format_map(values)


def load_prompt(file: str, variables: Mapping[str, set[str]]) -> Prompt:
    """Reads a prompt file and checks it against the variables its user will fill in.

    Args:
        file: A YAML mapping of name to text, relative to the working directory or the project.
        variables: Name -> the variables that text must use, all of them and no other.

    Raises:
        ConfigError: If a text is missing, or a variable is missing or unknown.
    """
    path = _find(file)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    texts = content if isinstance(content, dict) else {}
    problems = []
    for name, expected in variables.items():
        if not isinstance(texts.get(name), str):
            problems.append(f"{name}: text is missing")
            continue
        used = {field for _, field, _, _ in string.Formatter().parse(texts[name]) if field}
        problems += [f"{name}: variable {{{v}}} is not used" for v in sorted(expected - used)]
        problems += [f"{name}: unknown variable {{{v}}}" for v in sorted(used - expected)]
    problems += [f"{name}: unknown text" for name in texts if name not in variables]
    if problems:
        raise ConfigError(f"Prompt file {file} cannot be used:\n  " + "\n  ".join(problems))
    return Prompt({name: texts[name].strip() for name in variables}, prompt_sha256(file))


def prompt_sha256(file: str) -> str:
    """Returns the SHA-256 of a prompt file's bytes."""
    return hashlib.sha256(_find(file).read_bytes()).hexdigest()


def _find(file: str) -> Path:
    for path in (Path(file), _PROJECT / file):
        if path.is_file():
            return path
    raise ConfigError(f"Prompt file is missing: {file}")
