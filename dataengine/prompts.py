# SPDX-License-Identifier: Apache-2.0
"""Prompt files: texts with declared variables, named by version and known by their hash.

``{name}`` in a text is the place of a variable; every other brace is text, so that a prompt may
show JSON.

A config names its prompt file in a field whose type carries `PromptFile`, so that loading a
pipeline reports a file that does not fit, before the run::

    VARIABLES = {"system": set(), "ask": {"sources"}}

    class MyConfig(Settings):
        prompt: Annotated[str, PromptFile(VARIABLES)] = Field(
            default="prompts/my.v1.yaml", validate_default=True
        )

and its user reads it with ``load_prompt(config.prompt, VARIABLES)``. What comes from a clip
(transcripts, titles, captions) is data and goes through `as_data` and `data_block`.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from dataengine.errors import ConfigError

_PROJECT = Path(__file__).parent.parent
"""Where ``prompts/`` lies when the working directory has none."""

_VARIABLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")

Variables = Mapping[str, set[str]]
"""Name of a text -> the variables that it must use, all of them and no other."""


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
        return _VARIABLE.sub(lambda place: values[place[1]], self.texts[name])

    def sentences(self) -> tuple[str, ...]:
        """Returns the prompt's own sentences, without what variables put into them."""
        parts = [part for text in self.texts.values() for part in _VARIABLE.split(text)[::2]]
        return tuple(
            sentence.strip()
            for part in parts
            for sentence in re.split(r"[.!?:]\s+|\n", part)
            if sentence.strip()
        )


@dataclass(frozen=True)
class PromptFile:
    """Type annotation of a setting that names a prompt file: it must fit these variables."""

    variables: Variables

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, file: str) -> str:
        try:
            load_prompt(file, self.variables)
        except ConfigError as error:
            raise ValueError(error.message) from None
        return file


def load_prompt(file: str, variables: Variables) -> Prompt:
    """Reads a prompt file and checks it against the variables its user will fill in.

    Args:
        file: A YAML mapping of name to text, relative to the working directory or the project.
        variables: Name -> the variables that text must use, all of them and no other.

    Raises:
        ConfigError: If a text is missing, or a variable is missing or unknown.
    """
    data = _find(file).read_bytes()
    try:
        content = yaml.safe_load(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Prompt file {file} is not YAML in UTF-8: {reason}") from None
    texts = content if isinstance(content, dict) else {}
    problems = []
    for name, expected in variables.items():
        text = texts.get(name)
        if not isinstance(text, str) or not text.strip():
            problems.append(f"{name}: text is missing")
            continue
        used = set(_VARIABLE.findall(text))
        problems += [f"{name}: variable {{{v}}} is not used" for v in sorted(expected - used)]
        problems += [f"{name}: unknown variable {{{v}}}" for v in sorted(used - expected)]
    problems += [f"{name}: unknown text" for name in texts if name not in variables]
    if problems:
        raise ConfigError(f"Prompt file {file} cannot be used:\n  " + "\n  ".join(problems))
    return Prompt(
        {name: texts[name].strip() for name in variables}, hashlib.sha256(data).hexdigest()
    )


def prompt_files(settings: BaseModel) -> list[str]:
    """Returns the prompt files that settings name, wherever they lie, nested settings' as well.

    They are known by the `PromptFile` of their field, not by how they are called.
    """
    files: list[str] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if any(isinstance(mark, PromptFile) for mark in field.metadata) and value is not None:
            files.append(value)
        else:
            files += _nested_files(value)
    return list(dict.fromkeys(files))


def _nested_files(value: object) -> list[str]:
    if isinstance(value, BaseModel):
        return prompt_files(value)
    items = value.values() if isinstance(value, Mapping) else value
    if isinstance(items, str) or not isinstance(items, Iterable):
        return []
    return [file for item in items for file in _nested_files(item)]


def prompt_sha256(file: str) -> str:
    """Returns the SHA-256 of a prompt file's bytes."""
    return hashlib.sha256(_find(file).read_bytes()).hexdigest()


def _find(file: str) -> Path:
    for path in (Path(file), _PROJECT / file):
        if path.is_file():
            return path
    raise ConfigError(f"Prompt file is missing: {file}")


# ------------------------------------------------------------------------------- texts of clips

_JOINERS = "\u200c\u200d"
"""Invisible, but part of how Persian, Indic scripts and emoji are spelt."""

_UNSEEN = {"Cc": " ", "Cf": "", "Cs": "", "Co": ""}
"""Unicode category -> what takes its place: control, format, surrogate and private characters."""

# Chat templates mark turns by tokens such as <|im_start|>, <end_of_turn> or [INST], and servers read
# them in a user's text as well.
_BRACKETS = str.maketrans("<>[]", "()()")


def one_line(text: str) -> str:
    """Returns text on one line, in NFC, without control characters and direction marks.

    What cannot be stored goes too: lone surrogates, which JSON can spell and UTF-8 cannot.
    """
    return " ".join(unicodedata.normalize("NFC", "".join(map(_storable, text))).split())


def _storable(char: str) -> str:
    return char if char in _JOINERS else _UNSEEN.get(unicodedata.category(char), char)


def cut_at_word(line: str, max_chars: int) -> str:
    """Returns line if it is short enough, else its beginning up to a word, and ``...``.

    In languages written without spaces it ends at the last character that fits.
    """
    if len(line) <= max_chars:
        return line
    head = line[: max_chars + 1]
    head = head.rsplit(" ", 1)[0] if " " in head else head[:max_chars]
    return head[:max_chars].rstrip(" .,;:") + "..."


def as_data(text: str, max_chars: int) -> str:
    """Returns a text of a clip as it may stand in a prompt: one line, cut short, without markup.

    Angle and square brackets become round ones, so that no chat template's token, tag or
    fence of ours can occur in it.
    """
    return cut_at_word(one_line(text).translate(_BRACKETS), max_chars)


def data_marker(texts: Sequence[str]) -> str:
    """Returns 12 hex digits that occur in none of the texts: a fence that they cannot close.

    It depends on the texts alone, so that the same clip gives the same prompt in every run; no text
    can contain a hash of itself, and it is looked for nevertheless.
    """
    salt = 0
    while True:
        content = "\0".join([str(salt), *texts]).encode("utf-8", "replace")
        marker = hashlib.sha256(content).hexdigest()[:12]
        if not any(marker in text.casefold() for text in texts):
            return marker
        salt += 1


def data_block(name: str, text: str, marker: str) -> str:
    """Returns a text of a clip, from `as_data`, between two lines that carry the marker.

    Args:
        name: What it is, e.g. ``video caption``.
        text: On one line.
        marker: From `data_marker` of all texts of the prompt.
    """
    return f"[{name} {marker}]\n{text}\n[end of {name} {marker}]"
