# SPDX-License-Identifier: Apache-2.0
"""Frames -> captions at two scales and one of both (InternVid, arXiv 2307.06942, section 3.2).

Fine scale: a light captioner describes frame after frame, a summariser makes one text of that.
Coarse scale: the middle frame's caption. A language model merges the two. Where a part fails on a
clip, or is not there, its work is done by rule: the sentences that differ, one behind the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dataengine.models.answers import Author, Failure
from dataengine.models.captioner import (
    MERGE_VARIABLES,
    ClipFrames,
    MultiscaleConfig,
    VideoCaptions,
    middle,
    spread,
)
from dataengine.models.frame_captioner import FrameCaptioner, build_frame_captioner
from dataengine.models.fusion import join_sentences
from dataengine.models.llm import LanguageModel, Request, build_llm
from dataengine.models.summariser import Summariser, build_summariser, distinct
from dataengine.models.validate import TextChecker, ask, grounding_problem
from dataengine.prompts import as_data, data_block, data_marker, load_prompt
from dataengine.records import digest

RULE = Author("rule", "1")
"""Who writes what no model writes."""

_MAX_SCALE_CHARS = 1000
"""Longest text of one scale in a prompt."""


@dataclass(slots=True)
class _Scales:
    """What is known of one clip so far."""

    fine: list[str]
    fine_problem: Failure | None
    """The first, where some frame has no caption."""
    coarse: str | Failure
    summary: str = ""
    writer: Author = RULE
    """Of the summary."""
    note: str | None = None


class MultiscaleCaptioner:
    """Frame captions, put together.

    Raises:
        DependencyError: If a part's package or weights are missing, or do not fit.
    """

    def __init__(self, config: MultiscaleConfig) -> None:
        self._max_frames = config.max_frames
        self._frame = build_frame_captioner(config.frame)
        same = config.middle in (None, config.frame)
        self._middle = (
            self._frame if config.middle is None or same else build_frame_captioner(config.middle)
        )
        self._summariser = build_summariser(config.summariser) if config.summariser else None
        self._merger = _Merger(config) if config.merge else None
        self.prompt_hash: str | None = self._merger.author.prompt_hash if self._merger else None
        authors = [_author(self._frame)]
        authors += [_author(self._summariser)] if self._summariser else []
        authors += [self._merger.author] if self._merger else [RULE]
        whole = _joined(authors)
        self.model, self.revision = whole.model, whole.revision

    def caption(self, clips: Sequence[ClipFrames]) -> list[VideoCaptions | Failure]:
        """Returns the captions of each clip, or why there are none, in order.

        A clip without a caption of any frame is a `Failure`; one with some is captioned from those.
        """
        fine_at = [spread(len(clip.frames), self._max_frames) for clip in clips]
        middle_at = [[middle(len(clip.frames))] for clip in clips]
        if self._middle is self._frame:
            both = [[*at, *mid] for at, mid in zip(fine_at, middle_at, strict=True)]
            answers = describe(self._frame, clips, both)
            fine, coarse = [a[:-1] for a in answers], [a[-1] for a in answers]
        else:
            fine = describe(self._frame, clips, fine_at)
            coarse = [answer[0] for answer in describe(self._middle, clips, middle_at)]
        scales = [
            _Scales(
                [text for text in texts if isinstance(text, str)],
                next((text for text in texts if isinstance(text, Failure)), None),
                middle_text,
            )
            for texts, middle_text in zip(fine, coarse, strict=True)
        ]
        self._summarise(scales)
        merged = self._merge(clips, scales)
        return [self._captions(*pair) for pair in zip(scales, merged, strict=True)]

    def _summarise(self, scales: Sequence[_Scales]) -> None:
        """Fills in the fine scale's text."""
        for clip in scales:
            # What stays of a dozen captions that all say the same needs no model.
            clip.summary = join_sentences(*distinct(clip.fine)) or ""
        if self._summariser is None:
            return
        told = [clip for clip in scales if len(set(clip.fine)) > 1]
        answers = self._summariser.summarise([list(dict.fromkeys(clip.fine)) for clip in told])
        for clip, answer in zip(told, answers, strict=True):
            if isinstance(answer, Failure):
                clip.note = f"rule:{answer.reason}"
            else:
                clip.summary = join_sentences(answer) or ""
                clip.writer = _author(self._summariser)

    def _merge(
        self, clips: Sequence[ClipFrames], scales: Sequence[_Scales]
    ) -> list[str | Failure | None]:
        """Returns what the language model makes of both scales; None where it is not asked."""
        merged: list[str | Failure | None] = [None] * len(scales)
        if self._merger is None:
            return merged
        asked = [
            at for at, clip in enumerate(scales) if clip.summary and isinstance(clip.coarse, str)
        ]
        answers = self._merger.merge(
            [(clips[at].clip_id, str(scales[at].coarse), scales[at].summary) for at in asked]
        )
        for at, answer in zip(asked, answers, strict=True):
            merged[at] = answer
        return merged

    def _captions(self, clip: _Scales, merged: str | Failure | None) -> VideoCaptions | Failure:
        coarse = clip.coarse if isinstance(clip.coarse, str) else None
        if not clip.fine and isinstance(clip.coarse, Failure):
            return clip.coarse
        authors = {
            "caption_video_fine": _author(self._frame),
            "caption_video_coarse": _author(self._middle),
        }
        notes = {}
        if clip.fine_problem:
            some = "partial:" if clip.fine else "failed:"
            notes["caption_video_fine"] = some + clip.fine_problem.reason
        if isinstance(clip.coarse, Failure):
            notes["caption_video_coarse"] = clip.coarse.note
        told = [] if clip.writer is RULE else [clip.writer]
        if isinstance(merged, str) and self._merger:
            caption, author, note = merged, _joined([*told, self._merger.author]), clip.note
        else:
            caption = join_sentences(*distinct([t for t in (coarse, clip.summary) if t]))
            author = _joined([*told, RULE])
            note = f"rule:{merged.reason}" if isinstance(merged, Failure) else clip.note
        if note:
            notes["caption_video"] = note
        authors["caption_video"] = author
        return VideoCaptions(coarse, tuple(clip.fine), caption, authors, notes)


class _Merger:
    """Asks a language model to make one caption of two."""

    def __init__(self, config: MultiscaleConfig) -> None:
        if config.merge is None:
            raise ValueError("nobody to merge")
        self._llm: LanguageModel = build_llm(config.merge)
        self._prompt = load_prompt(config.merge_prompt, MERGE_VARIABLES)
        self._max_tokens = config.max_tokens
        self._checker = TextChecker(config.checks, self._prompt.sentences())
        self.author = Author(self._llm.model, self._llm.revision, self._prompt.sha256)

    def merge(self, scales: Sequence[tuple[str, str, str]]) -> list[str | Failure]:
        """Returns a caption, or why there is none, of each (clip id, coarse text, fine text)."""
        sources = {clip_id: (coarse, fine) for clip_id, coarse, fine in scales}

        def check(request: Request, answer: str) -> str | Failure:
            text = self._checker.check(answer.rpartition("</think>")[2])
            if isinstance(text, Failure):
                return text
            return grounding_problem(text, sources[request.id]) or text

        def again(request: Request, problem: Failure) -> Request:
            more = self._prompt.render("again", problem=problem.detail)
            return replace(request, prompt=f"{request.prompt}\n\n{more}")

        return ask(self._llm, [self._request(*scale) for scale in scales], check, again)

    def _request(self, clip_id: str, coarse: str, fine: str) -> Request:
        texts = [as_data(text, _MAX_SCALE_CHARS) for text in (coarse, fine)]
        marker = data_marker(texts)
        return Request(
            clip_id,
            digest(coarse, fine),
            self._prompt.render(
                "ask",
                coarse=data_block("middle frame", texts[0], marker),
                fine=data_block("frame after frame", texts[1], marker),
            ),
            self._prompt.render("system"),
            max_tokens=self._max_tokens,
        )


def describe(
    captioner: FrameCaptioner, clips: Sequence[ClipFrames], chosen: Sequence[Sequence[int]]
) -> list[list[str | Failure]]:
    """Returns the captions of chosen frames of each clip, all in one call.

    Equal frames, of one clip or of several, are described once.

    Args:
        captioner: Describes them.
        clips: Whose frames.
        chosen: Of each clip, indices of frames.
    """
    pictures: dict[bytes, np.ndarray] = {}
    keys: list[list[bytes]] = []
    for clip, at in zip(clips, chosen, strict=True):
        own = [
            clip.jpegs[i]
            if clip.jpegs
            else repr(clip.frames[i].shape).encode() + clip.frames[i].tobytes()
            for i in at
        ]
        keys.append(own)
        for key, i in zip(own, at, strict=True):
            pictures.setdefault(key, clip.frames[i])
    texts = dict(zip(pictures, captioner.caption(list(pictures.values())), strict=True))
    return [[texts[key] for key in own] for own in keys]


def _author(model: FrameCaptioner | Summariser | None) -> Author:
    return Author(model.model, model.revision) if model else RULE


def _joined(authors: Sequence[Author]) -> Author:
    """Returns who wrote a text that several had a hand in, in the order of their work."""
    return Author(
        "+".join(author.model for author in authors),
        "+".join(author.revision for author in authors),
        next((author.prompt_hash for author in authors if author.prompt_hash), None),
    )
