# SPDX-License-Identifier: Apache-2.0
"""Text that a language model wrote -> the same text, or what is wrong with it.

A model that is asked for a caption may refuse, talk about its task, repeat the question, answer in
another language or never stop; each of these looks like a caption to what comes after. A check
answers a `Failure`: its ``reason`` is for the provenance of a fallback (``template:<reason>``), its
``detail`` can be said to the model, since it never quotes what the model wrote. Typical use::

    checker = TextChecker(config.checks, prompt.sentences(), names=("caption_av",))

    def check(request: Request, answer: str) -> str | Failure:
        fields = parse_object(answer, MyAnswer)      # without a schema: the answer itself
        return fields if isinstance(fields, Failure) else checker.check(fields.caption_av)

    results = ask(llm, requests, check, lambda request, problem: replace(request, prompt=...))
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dataengine.models.answers import BAD_OUTPUT, Failure
from dataengine.models.lid import (
    FastTextConfig,
    LanguageIdentifierConfig,
    build_language_identifier,
)
from dataengine.models.llm import LanguageModel, Request
from dataengine.prompts import one_line
from dataengine.stage import Settings

NOT_JSON = "not_json"
WRONG_FIELDS = "wrong_fields"
TOO_SHORT = "too_short"
TOO_LONG = "too_long"
OTHER_LANGUAGE = "other_language"
REFUSAL = "refusal"
CHATTER = "chatter"
PROMPT_ECHO = "prompt_echo"
REPETITION = "repetition"
UNGROUNDED = "ungrounded"

_NO_ANSWER = Failure(BAD_OUTPUT, "It was empty, or too long and cut off: be brief.")
_MAX_ANSWER_CHARS = 100_000
_MAX_OBJECTS = 50


class Answer(BaseModel):
    """Base of what a model is asked for: subclasses name the fields, all of them required texts.

    ``Request.schema`` is ``MyAnswer.model_json_schema()``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


AnswerT = TypeVar("AnswerT", bound=Answer)
Checked = TypeVar("Checked")


class TextChecks(Settings):
    """What a text by a language model must be like."""

    min_words: int = Field(default=3, ge=1)
    """Shorter is no caption: "OK", "N/A"."""
    max_words: int = Field(default=150, ge=1)
    """Longer is no caption either, but the model going on."""
    language: str = "en"
    """ISO 639-1 code that it must be in; empty asks for none."""
    min_language_confidence: float = Field(default=0.8, ge=0, le=1)
    """Another language is believed above this: short texts are easily misjudged."""
    min_own_confidence: float = Field(default=0.1, ge=0, le=1)
    """... and where ``language`` itself is less likely than this: a text may be torn between languages,
    none of which it should be in."""
    min_language_words: int = Field(default=8, ge=1)
    """Shorter texts are not judged by language."""
    lid: LanguageIdentifierConfig = FastTextConfig()
    """Who tells the language."""

    @model_validator(mode="after")
    def _ordered(self) -> "TextChecks":
        if self.max_words < self.min_words:
            raise ValueError(f"max_words ({self.max_words}) < min_words ({self.min_words})")
        return self


# ------------------------------------------------------------------------------ asking, answers


def by_id(requests: Sequence[Request], answers: Mapping[str, str | Failure]) -> list[str | Failure]:
    """Returns the answer to each request, in order, looked up by its id.

    Raises:
        ValueError: If two requests have one id, an answer is missing, or one is to no request: an
            answer given to another clip would be wrong in silence, so the run stops.
    """
    asked = [request.id for request in requests]
    for problem, ids in (
        ("two requests have the id", {name for name, num in Counter(asked).items() if num > 1}),
        ("no answer came for", set(asked) - set(answers)),
        ("an answer came that nobody asked for", set(answers) - set(asked)),
    ):
        if ids:
            shown = ", ".join(repr(name) for name in sorted(ids)[:3])
            raise ValueError(f"Language model: {problem}: {shown} ({len(ids)} in all)")
    return [answers[name] for name in asked]


def ask(
    llm: LanguageModel,
    requests: Sequence[Request],
    check: Callable[[Request, str], Checked | Failure],
    again: Callable[[Request, Failure], Request],
) -> list[Checked | Failure]:
    """Asks, checks, and asks once more where the answer was not usable, empty or cut off.

    Args:
        llm: Whom to ask.
        requests: Each with an id of its own.
        check: Returns what an answer says, or what is wrong with it.
        again: Returns the second request of an answer with a problem, with the same id.

    Returns:
        For each request, in order, what its answer says, or why there is none: the model's own
        `Failure`, or what is wrong with its second answer.

    Raises:
        EngineError: If no request can be answered.
        ValueError: If the answers do not belong to the requests; see `by_id`.
    """
    if not requests:
        return []
    results: list[Checked | Failure] = []
    second: dict[int, Request] = {}
    for index, answer in enumerate(by_id(requests, llm.answer(requests))):
        result = answer if isinstance(answer, Failure) else check(requests[index], answer)
        if isinstance(answer, str) and isinstance(result, Failure):
            second[index] = again(requests[index], result)
        elif isinstance(answer, Failure) and answer.reason == BAD_OUTPUT:
            # Its own detail may quote what the model wrote.
            second[index] = again(requests[index], _NO_ANSWER)
        results.append(result)
    if second:
        late = by_id(list(second.values()), llm.answer(list(second.values())))
        for (index, request), answer in zip(second.items(), late, strict=True):
            results[index] = answer if isinstance(answer, Failure) else check(request, answer)
    return results


def parse_object(answer: str, cls: type[AnswerT]) -> AnswerT | Failure:
    """Returns the JSON object of a model's answer, or what is wrong with it.

    The object may stand in a code fence, or inside other text, such as thoughts before it: the last
    one that fits counts, and what a model thinks aloud in ``<think>`` tags never does.

    Args:
        answer: As the model gave it.
        cls: The fields, which must all be there, and no other.
    """
    if len(answer) > _MAX_ANSWER_CHARS:
        return Failure(TOO_LONG, "The answer was far too long.")
    text = answer.rpartition("</think>")[2]
    found = list(_objects(text))
    if not found:
        return Failure(NOT_JSON, "The answer was not a JSON object.")
    for value in reversed(found):
        try:
            return cls.model_validate(value)
        except ValidationError:
            continue
    fields = ", ".join(cls.model_fields)
    return Failure(WRONG_FIELDS, f"The JSON object must have exactly these text fields: {fields}.")


def _objects(text: str) -> Iterator[dict[str, object]]:
    """Yields the outermost JSON objects of a text, in order."""
    decoder = json.JSONDecoder(strict=False)  # models put line breaks into strings
    start = text.find("{")
    for _ in range(_MAX_OBJECTS):
        if start < 0:
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


# --------------------------------------------------------------------------------------- checks

_WORD = re.compile(r"[^\W_]+")
_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb", '\'\'"""""')
_QUOTED = re.compile(r"\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)")
"""What somebody in the clip says is not what the model says."""


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold().translate(_STRAIGHT).replace("'", ""))


_SENTENCE_START = (
    r"(?:^|[.!?:;]\s+|\n)(?:(?:hi|hello|unfortunately|however|but|and|as such)[,.!]?\s+)?"
)
_AI = r"(?:ai|artificial intelligence|(?:large )?language model)"
_REFUSALS = re.compile(
    _SENTENCE_START
    + r"(?:"
    + r"(?:i'?m|i am|we are|we're) (?:very |so |really )?(?:sorry|afraid|unable|not able)"
    + r"|(?:sorry|apologies|my apologies)\b"
    + r"|i (?:must )?apologi[sz]e"
    + r"|(?:i|we) (?:can ?not|can't|could not|couldn't|won't|will not|do not|don't|must decline|decline)\b"
    + r"|it is not possible for me\b"
    + r"|no (?:caption|captions|description|information|input|text|context|video|audio|transcript)\b"
    + r"[^.]{0,40}\b(?:provided|available|given|supplied)"
    + r")",
    re.IGNORECASE,
)
_SELF = re.compile(
    rf"\bas an? {_AI}\b(?: \w+){{0,2}},? (?:i|we)\b|\b(?:i'm|i am) an? {_AI}\b", re.IGNORECASE
)
_CHATTER_START = re.compile(
    r"^\W*(?:here(?:'s| is| are)\b[^.]{0,60}"
    r"\b(?:captions?|json|answer|translation|summary|descriptions?|output)\b"
    r"|(?:(?:combined|fused|final|english) )?(?:captions?|answer|output|translation|summary|json)\s*:)",
    re.IGNORECASE,
)
_CHATTER = re.compile(
    r"^\W*(?:sure|certainly|of course|absolutely|okay|ok|great)\b[,.!:]"
    r"|let me know if|i hope this helps|feel free to",
    re.IGNORECASE,
)

_MARKUP = re.compile(r"<\|?/?\w+\|?>|\[/?INST\]|```")
"""Tokens of chat templates, tags, fences."""

_FUNCTION_WORDS = set(
    words_of("""
        about after all also and another are around been but can does for from had has have her him his
        how into its just like many more most not now off one other our out over own said say she some
        such than that the their them then there these they this those through too two under until very
        was way were what when where which while who will with would you your
    """)
)

_MIN_ECHO_WORDS = 4
_MIN_LOOP_REPEATS, _MIN_LOOP_WORDS = 4, 8
_MIN_PHRASE_WORDS = 24
_MAX_REPEATED_RATIO = 0.4


def unquoted(text: str) -> str:
    """Returns a text without what stands in quotation marks; those left over are straight."""
    return _QUOTED.sub(" ", text.translate(_STRAIGHT))


def refusal_problem(text: str, *, speech: bool = False) -> Failure | None:
    """Returns what is wrong if the model speaks instead of describing: it refuses, or chats.

    Only a sentence's beginning counts, and nothing that is quoted: a clip may well hold
    ``A woman says "I'm sorry, I cannot come."``

    Args:
        text: By the model.
        speech: Whether it is what somebody says, such as a translation: people are sorry, too.
    """
    said = unquoted(text)
    if _SELF.search(said) or (not speech and _REFUSALS.search(said)):
        return Failure(REFUSAL, "It refused or spoke about itself instead of doing the task.")
    if _CHATTER_START.search(said) or (not speech and _CHATTER.search(said)):
        return Failure(CHATTER, "It spoke to the reader; only the text that was asked for counts.")
    return None


def echo_problem(text: str, sentences: Iterable[str], names: Iterable[str] = ()) -> Failure | None:
    """Returns what is wrong if a text repeats the question.

    Args:
        text: By the model.
        sentences: The prompt's own; those of fewer than four words do not count.
        names: Field names, markers and the like, which no caption holds.
    """
    spoken = f" {' '.join(words_of(text))} "
    lower = text.casefold()
    echoed = any(
        len(words) >= _MIN_ECHO_WORDS and f" {' '.join(words)} " in spoken
        for words in map(words_of, sentences)
    )
    if echoed or _MARKUP.search(text) or any(name.casefold() in lower for name in names):
        return Failure(PROMPT_ECHO, "It repeated the instructions or the format.")
    return None


def repetition_problem(text: str) -> Failure | None:
    """Returns what is wrong if a text goes round in circles.

    Either up to eight words come four times or more in a row (over at least eight words: "no, no, no"
    is a way of speaking), or, in texts of 24 words and more, over 40 % of all groups of four words
    were there before, or one character comes a dozen times in a row.
    """
    words = words_of(text)
    problem = Failure(REPETITION, "It repeated itself.")
    if re.search(r"([^\s\d])\1{11}", text):
        return problem
    for size in range(1, 9):
        run = 0  # words that equal the word `size` places before them
        for index in range(size, len(words)):
            run = run + 1 if words[index] == words[index - size] else 0
            if run + size >= max(_MIN_LOOP_WORDS, _MIN_LOOP_REPEATS * size):
                return problem
    if len(words) >= _MIN_PHRASE_WORDS:
        phrases = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        if 1 - len(set(phrases)) / len(phrases) > _MAX_REPEATED_RATIO:
            return problem
    return None


_TOP_DOMAINS = (
    "com|org|net|edu|gov|info|biz|io|co|ai|app|dev|shop|store|online|site|xyz|tv|ly|gg|top|club|live|link|"
    "uk|de|fr|ru|cn|jp|eu|br|pl|nl|ca|au|ch|es"
)
_CONTACTS = re.compile(
    r"(?:https?://|\bwww\.)[^\s\"'<>]+"
    r"|[\w.+-]{1,64}@[\w-]{1,64}(?:\.\w+)+"
    rf"|\b[a-z0-9][a-z0-9-]{{0,62}}(?:\.|\s?\(?dot\)?\s)(?:{_TOP_DOMAINS})(?![\w-])(?:/\S*)?"
    r"|(?<!\w)\+?\d(?:[\s().-]{0,2}\d){8,14}(?!\w)"
    r"|(?<![\w-])\d{3}[-.\s]\d{4}(?![\w-])",
    re.IGNORECASE,
)
"""Addresses of the web and of mail, spelled with a dot or as one says it, and numbers of telephones."""

_COVERING_RATIO = 0.4


def contact_problem(text: str, sources: Sequence[str]) -> Failure | None:
    """Returns what is wrong if a text names an address or a telephone number that its sources do not.

    Args:
        text: By the model.
        sources: What it was made of, as far as that may name some.
    """
    known = " ".join(sources).casefold()
    for found in _CONTACTS.finditer(text):
        if found.group().rstrip(".,;:!?)").casefold() not in known:
            return Failure(UNGROUNDED, "It held an address or a number that the captions do not.")
    return None


def grounding_problem(
    text: str, sources: Sequence[str], min_shared: int = 1, min_ratio: float = 0.0
) -> Failure | None:
    """Returns what is wrong if a text has nothing to do with what it was made of.

    Words of three letters and more count, by their first five letters and without a plural's s;
    those that are in every English text do not.

    Args:
        text: By the model.
        sources: What it was made of; without such words in them nothing is wrong.
        min_shared: Words that must be in both.
        min_ratio: Share of the text's words that must be in the sources, in [0, 1]. Fewer will do where
            they are 40 % of the sources' words: of a short source no text can hold many.
    """
    known = set().union(*map(_stems, sources))
    stems = _stems(text)
    wanted = min(min_ratio * len(stems), _COVERING_RATIO * len(known))
    if len(known & stems) < max(wanted, min(min_shared, len(known))):
        return Failure(UNGROUNDED, "It did not describe what the captions describe.")
    return None


def _stems(text: str) -> set[str]:
    words = set(words_of(text)) - _FUNCTION_WORDS
    return {word.removesuffix("s")[:5] for word in words if len(word) >= 3}


class TextChecker:
    """Cleans a text and checks all that can be checked of it alone.

    Args:
        checks: What it must be like.
        sentences: The prompt's own sentences, which it must not repeat (`Prompt.sentences`).
        names: Field names, markers and the like, which it must not hold.
        speech: Whether the texts are what somebody says, such as translations.

    Raises:
        DependencyError: If the language model of `TextChecks.lid` is missing.
    """

    def __init__(
        self,
        checks: TextChecks,
        sentences: Sequence[str] = (),
        names: Sequence[str] = (),
        *,
        speech: bool = False,
    ) -> None:
        self._speech = speech
        self._checks = checks
        self._sentences = tuple(sentences)
        self._names = tuple(names)
        self._lid = build_language_identifier(checks.lid) if checks.language else None

    def check(self, text: str) -> str | Failure:
        """Returns the text on one line, fit to be stored, or what is wrong with it."""
        text = one_line(text)
        num_words = len(text.split())
        checks = self._checks
        if num_words < checks.min_words:
            return Failure(
                TOO_SHORT, f"It had {num_words} words; at least {checks.min_words} are needed."
            )
        return (
            refusal_problem(text, speech=self._speech)
            or echo_problem(text, self._sentences, self._names)
            or repetition_problem(text)
            or self._length_problem(num_words)
            or self._language_problem(text)
            or text
        )

    def _length_problem(self, num_words: int) -> Failure | None:
        if num_words > self._checks.max_words:
            said = f"It had {num_words} words; at most {self._checks.max_words} are allowed."
            return Failure(TOO_LONG, said)
        return None

    def _language_problem(self, text: str) -> Failure | None:
        """Judges what is not quoted: a clip's speech may be in any language."""
        own = unquoted(text)
        if self._lid is None or len(own.split()) < self._checks.min_language_words:
            return None
        checks = self._checks
        language, confidence = self._lid.identify([own])[0]
        if language == checks.language:
            return None
        if (
            confidence >= checks.min_language_confidence
            or self._lid.probability(own, checks.language) < checks.min_own_confidence
        ):
            return Failure(OTHER_LANGUAGE, f"It was not in the language {self._checks.language}.")
        return None
