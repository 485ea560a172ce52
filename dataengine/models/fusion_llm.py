# SPDX-License-Identifier: Apache-2.0
"""Fusion by a language model: InternVideo2's AV and AVS captions (App. B.2), checked.

One request per clip asks for both. What is known of the clip is shown as data, between lines with a
marker that cannot occur in it. An answer that fails a check is asked for once more, with what was
wrong; after that the clip is fused by the template, and its provenance says why.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dataengine import records
from dataengine.models.answers import Author, Failure
from dataengine.models.fusion import (
    LLM_VARIABLES,
    Captions,
    FusedCaptions,
    LLMFuserConfig,
    TemplateFuser,
    language_name,
)
from dataengine.models.llm import LanguageModel, Request, build_llm
from dataengine.models.validate import (
    Answer,
    TextChecker,
    ask,
    contact_problem,
    echo_problem,
    grounding_problem,
    parse_object,
)
from dataengine.prompts import as_data, data_block, data_marker, load_prompt

logger = logging.getLogger(__name__)

SPEECH, AV, AVS = "caption_speech", "caption_av", "caption_avs"


class AskAV(Answer):
    """Sight and sound: nothing is said."""

    caption_av: str


class AskAVS(Answer):
    """Speech with either sight or sound: AV is the one there is."""

    caption_avs: str


class AskBoth(Answer):
    """All three modalities."""

    caption_av: str
    caption_avs: str


_FORMS: dict[type[Answer], str] = {AskAV: "ask_av", AskAVS: "ask_avs", AskBoth: "ask_av_avs"}
"""What is asked for -> the prompt's text that asks for it."""

_NEVER_IN_CAPTIONS = (AV, "video caption", "audio caption")


@dataclass(frozen=True, slots=True)
class _Question:
    """What one clip is asked, and what its answer is checked against."""

    request: Request
    form: type[Answer]
    seen_and_heard: tuple[str, ...]
    marker: str


class LLMFuser:
    """Asks a language model, checks what it says, falls back to the template.

    Args:
        config: Whom to ask and how.
        llm: The language model, where it is not the one that the config names.

    Raises:
        DependencyError: If the language model, or the one that tells languages, is missing.
    """

    def __init__(self, config: LLMFuserConfig, llm: LanguageModel | None = None) -> None:
        self._config = config
        self._llm = llm or build_llm(config.llm)
        self._template = TemplateFuser(config.template)
        self._prompt = load_prompt(config.prompt, LLM_VARIABLES)
        self._checker = TextChecker(config.checks, self._prompt.sentences(), _NEVER_IN_CAPTIONS)
        self.model = self._llm.model
        self.revision = self._llm.revision
        self.prompt_hash: str | None = self._prompt.sha256

    def fuse(self, captions: Sequence[Captions]) -> list[FusedCaptions]:
        """Returns the fused captions of each clip, in order.

        Raises:
            EngineError: If the language model cannot be asked at all.
            ValueError: If two clips have one id, or answers do not belong to the clips asked about.
        """
        questions = {}
        for index, clip in enumerate(captions):
            question = self._question(clip)
            if question is not None:
                questions[index] = question
        by_clip = {question.request.id: question for question in questions.values()}
        answers = ask(
            self._llm,
            [question.request for question in questions.values()],
            lambda request, answer: self._checked(by_clip[request.id], answer),
            self._again,
        )
        said = dict(zip(questions, answers, strict=True))
        fused = self._template.fuse(captions)
        return [
            self._joined(template, said[index], questions[index])
            if index in said
            else replace(template, authors=dict.fromkeys((SPEECH, AV, AVS), self._template_author))
            for index, template in enumerate(fused)
        ]

    @property
    def _template_author(self) -> Author:
        template = self._template
        return Author(template.model, template.revision, template.prompt_hash)

    def _question(self, clip: Captions) -> _Question | None:
        """Returns what to ask about a clip; None if at most one modality says something."""
        longest = self._config.max_caption_chars
        video = as_data(clip.video or "", longest)
        audio = as_data(clip.audio or "", longest)
        transcript = as_data(clip.transcript or "", self._config.max_transcript_chars)
        if video and audio:
            form = AskBoth if transcript else AskAV
        elif transcript and (video or audio):
            form = AskAVS
        else:
            return None
        foreign = f" in {language_name(clip.language)}" if clip.language not in (None, "en") else ""
        sources = {
            "video caption": video,
            "audio caption": audio,
            f"transcript{foreign}": transcript,
        }
        shown = {name: text for name, text in sources.items() if text}
        marker = data_marker(list(shown.values()))
        request = Request(
            id=clip.clip_id,
            input_hash=records.digest(video, audio, transcript, clip.language or ""),
            prompt=self._prompt.render(
                _FORMS[form],
                sources="\n".join(data_block(name, text, marker) for name, text in shown.items()),
            ),
            system=self._prompt.texts["system"],
            schema=form.model_json_schema(),
            max_tokens=self._config.max_tokens,
        )
        return _Question(request, form, (video, audio), marker)

    def _checked(self, question: _Question, answer: str) -> dict[str, str] | Failure:
        """Returns the captions of an answer, or what is wrong with one of them."""
        parsed = parse_object(answer, question.form)
        if isinstance(parsed, Failure):
            return parsed
        captions = {}
        for name, text in parsed.model_dump().items():
            checked = self._checker.check(text)
            problem = (
                checked
                if isinstance(checked, Failure)
                else echo_problem(checked, (), (question.marker,))
                or contact_problem(checked, question.seen_and_heard)
                or grounding_problem(
                    checked,
                    question.seen_and_heard,
                    self._config.min_shared_words,
                    self._config.min_shared_ratio,
                )
            )
            if problem is not None:
                return problem
            captions[name] = checked
        return captions

    def _again(self, request: Request, problem: Failure) -> Request:
        retry = self._prompt.render("retry", problem=problem.detail)
        return replace(request, prompt=f"{request.prompt}\n\n{retry}")

    def _joined(
        self, template: FusedCaptions, answer: dict[str, str] | Failure, question: _Question
    ) -> FusedCaptions:
        """Returns the captions of a clip that the language model was asked about.

        Args:
            template: What the template makes of the clip.
            answer: What the language model says, or why it does not.
            question: What was asked.
        """
        by_template = self._template_author
        if isinstance(answer, Failure):
            logger.warning("Fused by template: %s: %s", question.request.id, answer)
            missed = (AVS,) if question.form is AskAVS else (AV, AVS)
            return replace(
                template,
                authors=dict.fromkeys((SPEECH, AV, AVS), by_template),
                notes=dict.fromkeys(missed, f"template:{answer.reason}"),
            )
        audio_video = answer.get(AV, template.audio_video)
        return FusedCaptions(
            speech=template.speech,
            audio_video=audio_video,
            # Where nothing is said, all modalities together are the two that are there.
            audio_video_speech=answer.get(AVS, audio_video),
            authors={SPEECH: by_template} | ({} if AV in answer else {AV: by_template}),
        )
