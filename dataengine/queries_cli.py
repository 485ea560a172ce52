# SPDX-License-Identifier: Apache-2.0
"""Commands about what to look for: ``dataengine queries build`` and ``dataengine discover``."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import yaml
from pydantic import TypeAdapter, ValidationError
from rich.progress import Progress

from dataengine.errors import ConfigError
from dataengine.stage import Settings
from dataengine.terminal import LIVE, say

if TYPE_CHECKING:
    from dataengine.models.llm import LanguageModel

queries_app = typer.Typer(
    name="queries", help="Search words for videos.", no_args_is_help=True, rich_markup_mode=None
)

SettingsT = TypeVar("SettingsT", bound=Settings)


LLMOption = Annotated[
    Path | None,
    typer.Option(
        "--llm", help="YAML file of a language model: kind: http, base_url: ..., model: ..."
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the language model: model=NAME, kind=http."),
]


@queries_app.callback()
def queries() -> None:
    """Search words for videos."""


@queries_app.command()
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="One query a line.")],
    labels: Annotated[
        list[Path] | None,
        typer.Option("--labels", help="Labels of a dataset: .txt, .csv or .tsv; may be repeated."),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--texts", help="Texts to extract actions from: .txt or .jsonl; may be repeated."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Where a line of JSON has its text.")] = "text",
    llm: LLMOption = None,
    overrides: OverrideOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Where every line went, as JSON lines.")
    ] = None,
    max_words: Annotated[int, typer.Option(min=1, help="Longer labels are left out.")] = 12,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt file, instead of prompts/extract_actions.v1.yaml.")
    ] = None,
) -> None:
    """Merge labels of datasets and actions found in texts into one list of queries.

    Run it again to go on: answers of the language model are kept beside the list.
    """
    from dataengine import actions
    from dataengine import queries as q

    if not labels and not texts:
        raise ConfigError("No labels and no texts", "name some by --labels or --texts")
    if texts and not (llm or overrides):
        raise ConfigError("Texts need a language model", "name one by --llm FILE.yaml")
    read_only = {path.resolve() for path in (*(labels or ()), *(texts or ()))}
    beside = [output.with_name(f"{output.name}.{end}") for end in ("json", "answers.jsonl")]
    written = [output, *beside, *([report] if report else [])]
    for path in written:
        if path.resolve() in read_only or written.count(path) > 1:
            raise ConfigError(f"{path} would be written over", "name another --output or --report")
    settings = q.MergeSettings(max_words=max_words)
    found: list[q.Label] = []
    inputs: list[dict[str, Any]] = []
    for path in labels or ():
        read = list(q.read_labels(path))
        found += read
        inputs.append(q.file_record(path, len(read)) | {"kind": "labels"})
    about: dict[str, Any] = {"settings": settings.model_dump(), "inputs": inputs}
    if texts:
        extract = _checked(actions.ExtractSettings, "--prompt", **_given(prompt=prompt))
        parts = []
        for path in texts:
            new = list(
                actions.pieces(str(path), actions.read_texts(path, text_field), extract.max_chars)
            )
            parts += new
            inputs.append(q.file_record(path, len(new)) | {"kind": "texts"})
        extracted, notes = actions.extract_actions(
            parts,
            load_llm(llm, overrides or []),
            extract,
            output.with_name(f"{output.name}.answers.jsonl"),
        )
        found += extracted
        about["extraction"] = notes | {"settings": extract.model_dump()}
    merged, ended = q.merge(found, settings)
    record = q.write_queries(output, merged, ended, about, report)
    say(f"{len(merged):,} queries in {output} from {len(found):,} labels")
    for outcome, number in record["outcomes"].items():
        say(f"  {outcome.replace('_', ' ')}: {number:,}")
    for reason, number in about.get("extraction", {}).get("failed_pieces", {}).items():
        say(f"  pieces of text without an answer, {reason}: {number:,}")


def discover(
    queries_file: Annotated[
        Path, typer.Argument(metavar="QUERIES", help="One query a line, as queries build writes.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="List of videos, .jsonl.")],
    languages: Annotated[str, typer.Option(help="With commas: en,zh,es.")] = "en",
    per_query: Annotated[int, typer.Option(min=1, help="Results per query and language.")] = 20,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="List or corpus whose videos stay out; may be repeated."),
    ] = None,
    llm: LLMOption = None,
    overrides: OverrideOption = None,
    min_duration_s: Annotated[float, typer.Option(min=0)] = 10,
    max_duration_s: Annotated[float, typer.Option(min=0)] = 1800,
    sleep_s: Annotated[float, typer.Option(min=0, help="Least pause between requests.")] = 2,
    cookies: Annotated[Path | None, typer.Option(help="Cookies in Netscape format.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt file, instead of prompts/translate_query.v1.yaml.")
    ] = None,
) -> None:
    """Search for videos; run it again to go on. The list is for ingest --sources."""
    from dataengine.discover import DiscoverSettings
    from dataengine.discover import discover as run_discover
    from dataengine.fetch.settings import FetchSettings
    from dataengine.queries import read_queries

    wanted = tuple(dict.fromkeys(word.strip() for word in languages.split(",") if word.strip()))
    if not wanted or max_duration_s < min_duration_s:
        raise ConfigError("No languages, or max-duration-s < min-duration-s")
    if cookies is not None and not cookies.is_file():
        raise ConfigError(f"No such file: {cookies}", "export cookies in Netscape format")
    fetch = FetchSettings(
        sleep_interval_s=sleep_s,
        max_sleep_interval_s=2.5 * sleep_s,
        fetch_timeout_s=600.0,
        cookies_file=str(cookies) if cookies else None,
    )
    settings = _checked(
        DiscoverSettings, "the options", languages=wanted, per_query=per_query,
        min_duration_s=min_duration_s, max_duration_s=max_duration_s, fetch=fetch,
        **_given(prompt=prompt),
    )  # fmt: skip
    words = read_queries(queries_file)
    translator = load_llm(llm, overrides or []) if llm or overrides else None
    with Progress(console=LIVE, transient=True, disable=not LIVE.is_terminal) as bars:
        task = bars.add_task("searching", total=len(words) * len(wanted))
        record = run_discover(
            words,
            output,
            settings,
            exclude=exclude or (),
            translator=translator,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    out = ", ".join(f"{number:,} {reason}" for reason, number in record["left_out"].items())
    say(
        f"{record['num_videos']:,} videos in {output} from {record['num_searches']:,} searches"
        + (f"; left out: {out}" if out else "")
    )
    sets = " ".join(f"--set {override}" for override in record["ingest_set"])
    say(
        f"Next:    dataengine ingest pipelines/quickstart.yaml --sources {shlex.quote(str(output))} "
        f"--corpus CORPUS {sets}"
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _checked(cls: type[SettingsT], what: str, **values: Any) -> SettingsT:
    """Returns settings.

    Raises:
        ConfigError: With every problem found; a prompt file that does not fit is one.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise ConfigError(f"Not valid: {what}\n{_problems(error)}") from None


def _problems(error: ValidationError, content: object = None) -> str:
    from dataengine.config import problem_text, setting_place

    return "\n".join(
        f"  {'.'.join(setting_place(problem['loc'], content)) or 'llm'}: "
        f"{problem_text(problem['msg'])}"
        for problem in error.errors()
    )


def load_llm(file: Path | None, overrides: Sequence[str]) -> "LanguageModel":
    """Returns the language model that a YAML file of its settings names.

    Args:
        file: A mapping, as under ``model`` in a pipeline; None starts from nothing.
        overrides: ``name=value`` settings, the value in YAML.

    Raises:
        ConfigError: With every problem found.
        DependencyError: If its package or its weights are missing.
    """
    from dataengine.models.llm import LLMConfig, build_llm

    content: Any = {}
    try:
        if file is not None:
            content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ConfigError(f"Not the settings of a language model: {file}", "kind: http ...")
        for override in overrides:
            name, equals, value = override.partition("=")
            if not equals:
                raise ConfigError(f"--set {override}: expected NAME=VALUE")
            content[name.strip()] = yaml.safe_load(value)
        return build_llm(TypeAdapter(LLMConfig).validate_python(content))
    except OSError as error:
        raise ConfigError(f"Cannot be read: {file} ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Not valid YAML: {file or '--set'}\n  {error}") from None
    except ValidationError as error:
        raise ConfigError(
            f"Not the settings of a language model: {file or '--set'}\n{_problems(error, content)}"
        ) from None
