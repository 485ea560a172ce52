# SPDX-License-Identifier: Apache-2.0
"""What an export is: the settings that stand in its ``export.json`` and that a refresh reads back."""

import re
from collections.abc import Mapping
from typing import Literal, cast, get_args

from pydantic import Field

from dataengine.errors import ConfigError
from dataengine.stage import Settings

FormatName = Literal["internvid", "webdataset", "huggingface", "interleaved", "generation"]
FormName = Literal["sequence", "transcript", "pair"]

FORMATS: tuple[str, ...] = get_args(FormatName)
FORMS: tuple[str, ...] = get_args(FormName)

_COMMON = frozenset({"corpus", "subset", "format", "where"})
_OPTIONS: Mapping[str, frozenset[str]] = {
    "internvid": frozenset({"caption", "umt_score"}),
    "webdataset": frozenset({"caption", "reencode", "max_bytes"}),
    "huggingface": frozenset({"max_bytes", "card_only"}),
    "interleaved": frozenset(
        {"caption", "transcript", "forms", "seed", "min_clips", "drop_video", "jsonl"}
    ),
    "generation": frozenset({"caption", "reencode", "min_aesthetic", "min_seconds"}),
}
"""Which settings mean something to which format, besides those that all have."""

_SELECTING = frozenset({"corpus", "subset", "where", "min_aesthetic", "min_seconds"})
"""Settings that say which clips, not what is written of each."""


class ExportSettings(Settings):
    """One export."""

    corpus: str
    """Folder or URL."""
    subset: str = ""
    """Name of a subset; empty takes all clips."""
    format: FormatName
    """What is written."""
    where: str = ""
    """SQL condition on clips; p70 is a percentile."""
    caption: str = "caption"
    """Column that is written as the clip's text."""
    umt_score: str = "video_text_score"
    """Column that is written as ``UMT_Score``."""
    reencode: bool = False
    """Writes videos without anything hidden behind an edit list."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    """Media bytes of one tar or Parquet file."""
    card_only: bool = False
    """Writes the dataset card into the corpus itself, whose shards are the dataset's files."""
    transcript: str = "transcript"
    """Column that is interleaved as speech."""
    forms: tuple[FormName, ...] = ("sequence", "transcript", "pair")
    """Forms of documents; see `dataengine.export.interleaved`."""
    seed: int = 0
    """Of what is drawn: which videos are left out, which make pairs."""
    min_clips: int = Field(default=2, ge=1)
    """Videos with fewer captioned clips give no document."""
    drop_video: float = Field(default=0.3, ge=0, lt=1)
    """Probability with which a clip's video is left out of a document, its text staying (InternVid,
    appendix D)."""
    jsonl: bool = False
    """Writes JSON lines beside the Parquet file."""
    min_aesthetic: float = 4.0
    """Lowest aesthetic score, as of InternVid-Aes (section 5.2); 0 takes clips without a score too."""
    min_seconds: float = Field(default=2.0, ge=0)
    """Shortest clip: trainers take windows of a fixed number of frames."""

    @property
    def content(self) -> dict[str, object]:
        """What decides what is written of a clip: files of another content cannot be kept."""
        known = _OPTIONS[self.format] - _SELECTING | {"format"}
        whole = self.format == "huggingface" and not self.subset and not self.where
        return {"whole": whole, **{name: getattr(self, name) for name in sorted(known)}}

    @property
    def stated(self) -> dict[str, object]:
        """The settings that mean something to the format, as they stand in ``export.json``."""
        known = _COMMON | _OPTIONS[self.format]
        return {name: value for name, value in self.model_dump().items() if name in known}


def settings_of(format_name: str, options: Mapping[str, object]) -> ExportSettings:
    """Returns the settings of a command line.

    Args:
        format_name: One of FORMATS.
        options: Settings that were given, by name; None for those that were not.

    Raises:
        ConfigError: For an unknown format, or an option that means nothing to it.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"Unknown format: {format_name}", f"formats: {', '.join(FORMATS)}")
    given = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(given.keys() - _COMMON - _OPTIONS[format_name])
    if foreign:
        flags = ", ".join("--" + name.replace("_", "-") for name in foreign)
        raise ConfigError(
            f"{flags} means nothing to {format_name}",
            "options of it: "
            + ", ".join("--" + name.replace("_", "-") for name in sorted(_OPTIONS[format_name])),
        )
    try:
        return ExportSettings.model_validate({"format": format_name, **given})
    except ValueError as error:
        raise ConfigError(f"Not an export: {_first_line(error)}") from None


def forms_of(text: str) -> tuple[FormName, ...]:
    """Returns the forms of ``sequence,pair``, in the order of FORMS.

    Raises:
        ConfigError: For an unknown form, or none.
    """
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    if not wanted or wanted - set(FORMS):
        raise ConfigError(f"Unknown form: {text}", f"forms: {', '.join(FORMS)}")
    return tuple(cast(FormName, form) for form in FORMS if form in wanted)


def bytes_of(text: str) -> int:
    """Returns the bytes of ``500MB`` or ``1GiB``.

    Raises:
        ConfigError: If it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"Not a size: {text}", "such as 500MB or 1GiB")
    base = 1024 if match[3] else 1000
    return round(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def _first_line(error: ValueError) -> str:
    """Returns the first problem of a pydantic error, in words."""
    problems = getattr(error, "errors", list)()
    if not problems:
        return str(error).splitlines()[0]
    where = ".".join(str(part) for part in problems[0]["loc"])
    return f"{where}: {problems[0]['msg']}"
