# SPDX-License-Identifier: Apache-2.0
"""Frames -> a caption of the clip, by a vision-language model that sees them all at once."""

from collections.abc import Sequence
from dataclasses import replace

import cv2

from dataengine.media import jpeg_encode
from dataengine.models.answers import Failure
from dataengine.models.captioner import (
    VLM_VARIABLES,
    ClipFrames,
    VideoCaptions,
    VlmConfig,
    spread,
)
from dataengine.models.llm import Request, build_llm
from dataengine.models.validate import Answer, TextChecker, ask, parse_object
from dataengine.prompts import load_prompt


class ClipAnswer(Answer):
    """What is asked for with ``middle: true``."""

    middle: str
    clip: str


class VlmCaptioner:
    """Shows a vision-language model the frames as they are stored.

    An answer that is no caption is asked for once more; a second one leaves the clip without.

    Raises:
        DependencyError: If the model's package or weights are missing.
    """

    def __init__(self, config: VlmConfig) -> None:
        self._config = config
        self._llm = build_llm(config.llm)
        self._prompt = load_prompt(config.prompt, VLM_VARIABLES)
        self._checker = TextChecker(config.checks, self._prompt.sentences())
        self.model, self.revision = self._llm.model, self._llm.revision
        self.prompt_hash: str | None = self._prompt.sha256

    def caption(self, clips: Sequence[ClipFrames]) -> list[VideoCaptions | Failure]:
        """Returns the captions of each clip, or why there are none, in order."""
        return ask(self._llm, [self._request(clip) for clip in clips], self._read, self._again)

    def _request(self, clip: ClipFrames) -> Request:
        config = self._config
        chosen = spread(len(clip.frames), config.max_frames)
        return Request(
            clip.clip_id,
            clip.input_hash,
            self._prompt.render(
                "clip_and_middle" if config.middle else "clip",
                num_frames=str(len(chosen)),
                seconds=f"{(clip.frame_ms[chosen[-1]] - clip.frame_ms[chosen[0]]) / 1000:.1f}",
            ),
            self._prompt.render("system"),
            images=tuple(self._shown(clip, index) for index in chosen),
            schema=ClipAnswer.model_json_schema() if config.middle else None,
            max_tokens=config.max_tokens,
        )

    def _shown(self, clip: ClipFrames, index: int) -> bytes:
        """Returns a frame as it is stored, made smaller only where that was asked for."""
        frame, limit = clip.frames[index], self._config.max_side
        longest = max(frame.shape[:2])
        if limit is None or longest <= limit:
            return clip.jpegs[index] if clip.jpegs else jpeg_encode(frame)
        height, width = (max(1, round(side * limit / longest)) for side in frame.shape[:2])
        return jpeg_encode(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))

    def _read(self, request: Request, answer: str) -> VideoCaptions | Failure:
        """Returns what an answer says, or why it cannot be used."""
        if not self._config.middle:
            text = self._checker.check(answer.rpartition("</think>")[2])
            return text if isinstance(text, Failure) else VideoCaptions(None, (), text)
        fields = parse_object(answer, ClipAnswer)
        if isinstance(fields, Failure):
            return fields
        text, coarse = self._checker.check(fields.clip), self._checker.check(fields.middle)
        if isinstance(text, Failure):
            return text
        if isinstance(coarse, Failure):  # not worth the caption of the whole clip
            return VideoCaptions(None, (), text, notes={"caption_video_coarse": coarse.note})
        return VideoCaptions(coarse, (), text)

    def _again(self, request: Request, problem: Failure) -> Request:
        more = self._prompt.render("again", problem=problem.detail)
        return replace(request, prompt=f"{request.prompt}\n\n{more}")
