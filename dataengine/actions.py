# SPDX-License-Identifier: Apache-2.0
"""A text corpus -> action phrases, by a language model that is not believed (InternVid section 3.1).

InternVid has a language model extract actions and their targets from text corpora, and people check
them. Here every phrase must be made of words of the piece of text it comes from; what is not is
counted by reason. A piece that the model fails on is counted and passed over.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dataengine.errors import ConfigError, EngineError
from dataengine.models.answers import BAD_OUTPUT, Failure
from dataengine.models.llm import COMMITTED, LanguageModel, Request
from dataengine.models.validate import Answer, parse_object
from dataengine.phrases import FUNCTION_WORDS, phrase_stems, plain_phrase, word_stem
from dataengine.prompts import (
    Prompt,
    PromptFile,
    as_data,
    data_block,
    data_marker,
    load_prompt,
    one_line,
)
from dataengine.queries import Label
from dataengine.records import digest
from dataengine.stage import Settings

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".jsonl")
NUM_WORDS, NOT_IN_TEXT, REFUSAL, TOO_MANY = "num_words", "not_in_text", "refusal", "too_many"
"""Why an extracted phrase is no query: too few or many words; words that the text does not have; the
model talks about itself; more phrases than were asked for."""

_REFUSAL = re.compile(
    r"\b(sorry|apologi[sz]e|cannot|can't|unable to|as an ai|language model|i'm|no actions?|none)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]\s*")


PROMPT_VARIABLES = {"system": set(), "user": {"text", "most"}}
"""Texts of the prompt file and their variables."""


class ActionsAnswer(Answer):
    """What the model is asked for."""

    actions: list[str]


class ExtractSettings(Settings):
    """How phrases are extracted."""

    prompt: Annotated[str, PromptFile(PROMPT_VARIABLES)] = Field(
        default="prompts/extract_actions.v1.yaml", validate_default=True
    )
    max_chars: int = Field(default=2000, ge=100)
    """Longest piece of text in one question, in characters."""
    max_phrases: int = Field(default=20, ge=1)
    """Most phrases taken from one piece."""
    min_words: int = Field(default=2, ge=1)
    max_words: int = Field(default=6, ge=1)
    """Length of a phrase, articles not counted: a verb and its target."""
    max_tokens: int = Field(default=512, ge=16)
    """Longest answer."""
    questions_per_call: int = Field(default=256, ge=1)
    """Pieces that are handed to the model at a time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a corpus: one long document's part, or several short ones.

    Attributes:
        input: File.
        line: First line.
        text: At most `ExtractSettings.max_chars` long.
    """

    input: str
    line: int
    text: str


# ----------------------------------------------------------------------------------------- reading


def read_texts(path: Path, field: str = "text") -> Iterator[tuple[int, str]]:
    """Yields line and document of a ``.txt`` (one a line) or ``.jsonl`` file.

    Args:
        path: The file.
        field: Where a line of JSON has its document.

    Raises:
        ConfigError: If it cannot be read as what it says it is.
    """
    if path.suffix.lower() not in TEXT_SUFFIXES:
        raise ConfigError(f"Not a text corpus: {path}", f"known: {', '.join(TEXT_SUFFIXES)}")
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _document(path, number, line, field)
    except UnicodeDecodeError as error:
        where = f"{path}, after line {number}"
        raise ConfigError(f"Not UTF-8: {where} ({error.reason})", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"Cannot be read: {path} ({error.strerror})") from None


def _document(path: Path, number: int, line: str, field: str) -> str:
    if path.suffix.lower() == ".txt":
        return line.strip()
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ConfigError(f"{path}, line {number}: no text in {field}", "name it by --text-field")
    # JSON can spell halves of characters, which no file can hold.
    return row[field].encode("utf-8", "replace").decode().strip()


def pieces(name: str, documents: Iterable[tuple[int, str]], max_chars: int) -> Iterator[Piece]:
    """Yields documents in pieces of at most ``max_chars``: short ones together, long ones in parts."""
    first, held = 0, ""
    for line, document in documents:
        for part in split_text(document, max_chars):
            if held and len(held) + 1 + len(part) > max_chars:
                yield Piece(name, first, held)
                held = ""
            first = first if held else line
            held = f"{held}\n{part}" if held else part
    if held:
        yield Piece(name, first, held)


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Yields parts of at most ``max_chars``, cut after a sentence, else a word, else anywhere."""
    while len(text) > max_chars:
        head = text[:max_chars]
        ends = [match.end() for match in _SENTENCE_END.finditer(head)]
        at = ends[-1] if ends and ends[-1] > max_chars // 2 else head.rfind(" ")
        at = at if at > 0 else max_chars
        yield text[:at].strip()
        text = text[at:].strip()
    if text:
        yield text


# -------------------------------------------------------------------------------------- extracting


def answer_schema(most: int) -> dict[str, Any]:
    """Returns the JSON schema of an answer with at most so many phrases."""
    schema = ActionsAnswer.model_json_schema()
    schema["properties"]["actions"]["maxItems"] = most
    return schema


def question(number: int, piece: Piece, prompt: Prompt, settings: ExtractSettings) -> Request:
    """Returns what a model is asked about a piece: its text is data, one document a line."""
    lines = [as_data(line, settings.max_chars) for line in piece.text.split("\n")]
    text = "\n".join(lines)
    return Request(
        id=f"piece-{number}",
        input_hash=digest(text),
        prompt=prompt.render(
            "user",
            text=data_block("text", text, data_marker(lines)),
            most=str(settings.max_phrases),
        ),
        system=prompt.texts["system"],
        schema=answer_schema(settings.max_phrases),
        max_tokens=settings.max_tokens,
    )


def check_phrase(phrase: str, text_stems: frozenset[str], settings: ExtractSettings) -> str:
    """Returns why a phrase is no action of a text, empty if it is one.

    Args:
        phrase: As the model wrote it.
        text_stems: Stems of the text's words.
        settings: Bounds of its length.
    """
    if _REFUSAL.search(phrase):
        return REFUSAL
    plain = plain_phrase(phrase)
    stems = phrase_stems(plain)
    if not settings.min_words <= len(stems) <= settings.max_words:
        return NUM_WORDS
    content = [word for word in plain.split() if word not in FUNCTION_WORDS]
    grounded = all(word_stem(word.removesuffix("'s")) in text_stems for word in content)
    return "" if content and grounded else NOT_IN_TEXT


def phrases_of(
    answer: str | Failure, piece: Piece, settings: ExtractSettings
) -> list[Label] | Failure:
    """Returns the phrases of one answer, those that are no queries with the reason.

    Or why there are none: the model's own `Failure`, or an answer that is not what was asked for.
    """
    found = answer if isinstance(answer, Failure) else parse_object(answer, ActionsAnswer)
    if isinstance(found, Failure):
        return found
    words = plain_phrase(piece.text).split() + re.findall(r"[^\W_]+", piece.text.lower())
    stems = frozenset(word_stem(word.removesuffix("'s")) for word in words)
    return [
        Label(
            piece.input,
            piece.line,
            one_line(phrase),
            TOO_MANY if number >= settings.max_phrases else check_phrase(phrase, stems, settings),
        )
        for number, phrase in enumerate(found.actions)
    ]


def kept_answers(path: Path) -> dict[str, str]:
    """Returns the answers that an earlier run has kept: key -> answer; a damaged line is none."""
    found: dict[str, str] = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                found[str(row["key"])] = str(row["answer"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # asked again
    return found


def _keep_answers(path: Path, answers: Mapping[str, str]) -> None:
    """Adds answers for good; a line that was half written before is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else ["\n", *lines]
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _with_journal(error: EngineError, answers_file: Path | None, num_kept: int) -> EngineError:
    """Returns an error whose hint says what is kept here: there is no corpus."""
    safe = f"{num_kept:,} answers are kept in {answers_file}" if answers_file else "nothing is kept"
    return type(error)(error.message, error.hint.replace(COMMITTED, safe))


def extract_actions(
    parts: Sequence[Piece],
    model: LanguageModel,
    settings: ExtractSettings,
    answers_file: Path | None = None,
) -> tuple[list[Label], dict[str, Any]]:
    """Returns the phrases that a model finds in pieces of text, in order, and what is noted of it.

    The notes count the pieces that failed, by reason: they gave no phrases.

    Args:
        parts: Pieces of the corpus.
        model: Who is asked.
        settings: How.
        answers_file: Keeps usable answers, so that a run that was stopped goes on; they count for the
            same question to the same model. None keeps none.

    Raises:
        EngineError: If no piece can be answered, because the model is away.
    """
    prompt = load_prompt(settings.prompt, PROMPT_VARIABLES)
    labels: list[Label] = []
    failed: Counter[str] = Counter()
    kept = kept_answers(answers_file) if answers_file is not None else {}
    num_kept = len(kept)
    for start in range(0, len(parts), settings.questions_per_call):
        group = parts[start : start + settings.questions_per_call]
        requests = [
            question(start + number, piece, prompt, settings) for number, piece in enumerate(group)
        ]
        keys = [
            digest(model.model, model.revision, request.system, request.prompt)
            for request in requests
        ]
        missing = [request for request, key in zip(requests, keys, strict=True) if key not in kept]
        try:
            answers = model.answer(missing) if missing else {}
        except EngineError as error:
            raise _with_journal(error, answers_file, num_kept) from error
        new: dict[str, str] = {}
        for request, key, piece in zip(requests, keys, group, strict=True):
            answer = kept.get(key) or answers.get(request.id, Failure(BAD_OUTPUT, "no answer"))
            found = phrases_of(answer, piece, settings)
            if isinstance(found, Failure):
                failed[found.reason] += 1
                why = f"{found.reason} ({found.detail})" if found.detail else found.reason
                logger.warning("%s, line %d: %s", piece.input, piece.line, why)
            else:
                labels += found
                if isinstance(answer, str) and key not in kept:
                    new[key] = answer
        if new and answers_file is not None:
            _keep_answers(answers_file, new)
            num_kept += len(new)
        logger.info("%d of %d pieces of text", start + len(group), len(parts))
    notes = {
        "model": model.model,
        "revision": model.revision,
        "prompt": settings.prompt,
        "prompt_sha256": prompt.sha256,
        "num_pieces": len(parts),
        "failed_pieces": dict(sorted(failed.items())),
    }
    return labels, notes
