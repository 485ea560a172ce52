# SPDX-License-Identifier: Apache-2.0
"""Translation by a language model, checked.

A transcript is shown as data, between lines with a marker that cannot occur in it. An answer that is not a
translation (no English, a refusal, an echo, far too short or long) is asked for once more; after
that the clip has no English transcript, and its provenance says why.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from dataengine import records
from dataengine.models.answers import Author, Failure, Written
from dataengine.models.fusion import language_name
from dataengine.models.hallucination import letters
from dataengine.models.lid import FastTextConfig, build_language_identifier
from dataengine.models.llm import LanguageModel, Request, build_llm
from dataengine.models.translator import (
    PROMPT_VARIABLES,
    Foreign,
    LLMTranslatorConfig,
    split_text,
)
from dataengine.models.validate import (
    OTHER_LANGUAGE,
    REFUSAL,
    TOO_LONG,
    TOO_SHORT,
    Answer,
    ask,
    echo_problem,
    parse_object,
    repetition_problem,
    words_of,
)
from dataengine.prompts import as_data, data_block, data_marker, load_prompt, one_line

_KNOWN_SCORE = 0.5
"""Less sure than this the model is better told nothing of the language."""
_MOST_TIMES, _LEAST_SHARE, _SLACK_LETTERS = 3, 0.25, 30
"""A translation may be so much longer or shorter, and differ by so many letters in any case:
translations of texts of a sentence and more are within half and double."""
_MIN_COPIED_WORDS = 3
"""Shorter texts may be names, which stay as they are."""
_MIN_LANGUAGE_WORDS, _MIN_LANGUAGE_SCORE = 8, 0.8
"""Shorter texts are not judged by language, and another one is believed only above this
(as `dataengine.models.validate.TextChecks`)."""

# Speakers say "I'm sorry, I can't come": only a model that speaks of its task refuses.
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?:'m| am) an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\b(?:can ?not|can't|could not|couldn't|unable to|not able to|won't|will not)"
    r" (?:assist|help|translate|provide|fulfil|fulfill|comply)\b.{0,40}"
    r"\b(?:request|translat\w+|transcript|text|content)\b"
    r"|^\W*(?:can ?not|can't|unable to|not able to) translate\b"
    r"|\b(?:transcript|text) (?:provided|you provided|given|above)\b",
    re.IGNORECASE,
)


class TranslationAnswer(Answer):
    """What the model is asked for."""

    translation: str


class LLMTranslator:
    """Asks a language model, and checks what it says.

    Args:
        config: Whom to ask and how.
        llm: The language model, where it is not the one that the config names.

    Raises:
        DependencyError: If the language model, or the one that tells languages, is missing.
    """

    def __init__(self, config: LLMTranslatorConfig, llm: LanguageModel | None = None) -> None:
        self._config = config
        self._llm = llm or build_llm(config.llm)
        self._prompt = load_prompt(config.prompt, PROMPT_VARIABLES)
        self._sentences = self._prompt.sentences()
        self._lid = build_language_identifier(FastTextConfig())
        self.model = self._llm.model
        self.revision = self._llm.revision

    def translate(self, texts: Sequence[Foreign]) -> list[Written | Failure]:
        """Returns the English of each text, or why there is none.

        Raises:
            EngineError: If the language model cannot be asked at all.
        """
        shown: dict[str, tuple[str, str]] = {}  # id of a request -> piece, marker
        requests: list[Request] = []
        owners: list[int] = []
        for index, text in enumerate(texts):
            for piece in split_text(one_line(text.text), len, self._config.max_chars):
                data = as_data(piece, self._config.max_chars)
                marker = data_marker([data])
                request = self._request(f"{text.clip_id}#{len(requests)}", text, data, marker)
                shown[request.id] = data, marker
                requests.append(request)
                owners.append(index)
        answers = ask(
            self._llm,
            requests,
            lambda request, answer: self._checked(answer, *shown[request.id]),
            self._again,
        )
        return [
            self._joined([answers[at] for at, owner in enumerate(owners) if owner == index])
            for index in range(len(texts))
        ]

    def _request(self, name: str, text: Foreign, data: str, marker: str) -> Request:
        language = spoken_language(text)
        return Request(
            id=name,
            input_hash=records.digest(data, language),
            prompt=self._prompt.render(
                "ask", language=language, transcript=data_block("transcript", data, marker)
            ),
            system=self._prompt.texts["system"],
            schema=TranslationAnswer.model_json_schema(),
            max_tokens=self._config.max_tokens,
        )

    def _again(self, request: Request, problem: Failure) -> Request:
        retry = self._prompt.render("retry", problem=problem.detail)
        return replace(request, prompt=f"{request.prompt}\n\n{retry}")

    def _checked(self, answer: str, source: str, marker: str) -> str | Failure:
        """Returns a piece's translation, or what is wrong with it."""
        parsed = parse_object(answer, TranslationAnswer)
        if isinstance(parsed, Failure):
            return parsed
        english = one_line(parsed.translation)
        return (
            translation_problem(source, english)
            or echo_problem(english, self._sentences, (marker,))
            or self._language_problem(source, english)
            or english
        )

    def _language_problem(self, source: str, english: str) -> Failure | None:
        """Judges long texts, and short ones that are the transcript again."""
        num_words = len(english.split())
        again = num_words >= _MIN_COPIED_WORDS and words_of(english) == words_of(source)
        if num_words < _MIN_LANGUAGE_WORDS and not again:
            return None
        language, score = self._lid.identify([english])[0]
        if language != "en" and (again or score >= _MIN_LANGUAGE_SCORE):
            return Failure(OTHER_LANGUAGE, "It was not in English.")
        return None

    def _joined(self, answers: Sequence[str | Failure]) -> Written | Failure:
        """Returns the translation of a whole text, whose pieces must all be there."""
        for answer in answers:
            if isinstance(answer, Failure):
                return answer
        text = " ".join(answer for answer in answers if isinstance(answer, str))
        if not text:
            return Failure(TOO_SHORT, "nothing to translate")
        return Written(text, Author(self.model, self.revision, self._prompt.sha256))


def spoken_language(text: Foreign) -> str:
    """Returns what the model is told about a text's language."""
    if text.language is None or (text.language_score or 0) < _KNOWN_SCORE:
        return "an unknown language"
    name = language_name(text.language)
    return name if name[0].isupper() else f"the language with the ISO 639 code {text.language}"


def translation_problem(source: str, english: str) -> Failure | None:
    """Returns what shows, without knowing the language, that a text is no translation.

    Args:
        source: What was to be translated.
        english: What came.
    """
    before, after = letters(source), letters(english)
    if after == 0 or after < before * _LEAST_SHARE - _SLACK_LETTERS:
        return Failure(TOO_SHORT, "It was far shorter than the transcript.")
    if after > before * _MOST_TIMES + _SLACK_LETTERS:
        return Failure(TOO_LONG, "It was far longer than the transcript.")
    if _REFUSAL.search(english) and not _REFUSAL.search(source):
        return Failure(REFUSAL, "It spoke about the task instead of translating.")
    if repetition_problem(english) and not repetition_problem(source):
        return repetition_problem(english)
    return None
