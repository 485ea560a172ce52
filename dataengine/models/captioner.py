# SPDX-License-Identifier: Apache-2.0
"""Frames -> captions of what is seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field

from dataengine.models.answers import Author, Failure
from dataengine.models.frame_captioner import BlipConfig, FrameCaptionerConfig
from dataengine.models.llm import LLMConfig
from dataengine.models.summariser import SummariserConfig
from dataengine.models.validate import TextChecks
from dataengine.prompts import PromptFile
from dataengine.records import digest
from dataengine.stage import Settings


@dataclass(frozen=True, slots=True)
class ClipFrames:
    """Frames of one clip."""

    frames: Sequence[np.ndarray]
    """At least one, uint8 RGB HWC, all of one size, in time order."""
    frame_ms: Sequence[int]
    """When each is shown; any origin."""
    clip_id: str = ""
    """Whose they are."""
    jpegs: Sequence[bytes] = ()
    """The same frames as they are stored; a server is sent these."""

    @property
    def input_hash(self) -> str:
        """Hash of the stored frames."""
        return digest(*self.jpegs)


@dataclass(frozen=True, slots=True)
class VideoCaptions:
    """The captions of one clip at InternVid's two scales (section 3.2), and the one of both."""

    coarse: str | None
    """The middle frame."""
    fine: tuple[str, ...]
    """Frame by frame, in time order."""
    caption: str | None
    """The whole clip."""
    authors: Mapping[str, Author] = field(default_factory=dict)
    """Column -> who wrote it, where that is not the captioner as a whole."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Column -> what was unusual about it; see `dataengine.stage.provenance`."""


def spread(num_items: int, num_wanted: int) -> list[int]:
    """Returns up to ``num_wanted`` indices spread evenly over ``num_items``, in order.

    Each is the middle of an equal part: 8 items, 4 wanted: 1, 3, 5, 7.
    """
    num = min(num_items, num_wanted)
    return [int((index + 0.5) * num_items / num) for index in range(num)]


def middle(num_items: int) -> int:
    """Returns the index of the middle item; of two, the later one."""
    return num_items // 2


class Captioner(Protocol):
    """Describes clips."""

    model: str
    revision: str
    prompt_hash: str | None

    def caption(self, clips: Sequence[ClipFrames]) -> Sequence[VideoCaptions | Failure]:
        """Returns the captions of each clip, or why there are none, in order."""
        ...


class SignalsVideoConfig(Settings):
    """Sentences made of what is measured: colour, light, texture, movement, frontal faces."""

    kind: Literal["signals"] = "signals"
    face_model: str = ""
    """A YuNet face detector (ONNX file, run by OpenCV), which sees small and turned faces too;
    empty takes the Haar cascade that OpenCV carries."""


MERGE_VARIABLES = {"system": set(), "ask": {"coarse", "fine"}, "again": {"problem"}}
"""Texts of a prompt that merges two scales, and their variables."""

VLM_VARIABLES = {
    "system": set(),
    "clip": {"num_frames", "seconds"},
    "clip_and_middle": {"num_frames", "seconds"},
    "again": {"problem"},
}
"""Texts of a prompt that asks about a clip's frames, and their variables."""


class MultiscaleConfig(Settings):
    """Frame captions, put together: InternVid's two scales (section 3.2).

    Fine: a light captioner describes frame after frame, a summariser makes one text of it. Coarse: the
    middle frame's caption. A language model merges both. Each part but the first may be left out.
    """

    kind: Literal["multiscale"] = "multiscale"
    frame: FrameCaptionerConfig = BlipConfig()
    """Who describes the frames (InternVid: Tag2Text)."""
    max_frames: int = Field(default=8, ge=1)
    """Most frames described, evenly spread over those of the clip: the low rate of the fine scale."""
    middle: FrameCaptionerConfig | None = None
    """Who describes the middle frame (InternVid: BLIP-2); null leaves it to ``frame``, in the same
    model."""
    summariser: SummariserConfig | None = None
    """Who makes one text of the frames' captions (InternVid: a T5); null takes the captions that differ,
    at most three."""
    merge: LLMConfig | None = None
    """Who merges the two scales; null puts one behind the other, unless they say the same."""
    merge_prompt: Annotated[str, PromptFile(MERGE_VARIABLES)] = Field(
        "prompts/merge_scales.v1.yaml", validate_default=True
    )
    """What ``merge`` is asked."""
    max_tokens: int = Field(default=128, ge=16)
    """Most tokens of a merged caption."""
    checks: TextChecks = TextChecks(max_words=80, language="")
    """What a merged caption must be like; else it is made by rule."""


class VlmConfig(Settings):
    """A vision-language model that is shown the clip's frames, e.g. Qwen3-VL."""

    kind: Literal["vlm"] = "vlm"
    llm: LLMConfig
    """Who looks: a server, vLLM, or transformers with ``modality: image``."""
    prompt: Annotated[str, PromptFile(VLM_VARIABLES)] = Field(
        "prompts/caption_clip.v1.yaml", validate_default=True
    )
    """What it is asked."""
    max_frames: int = Field(default=8, ge=1)
    """Most frames shown, evenly spread over those of the clip."""
    max_side: int | None = Field(default=None, ge=32)
    """Longer side in pixels of what is shown: larger frames are made smaller; null shows frames as they
    are stored."""
    middle: bool = False
    """Asks for the middle frame's caption too (``caption_video_coarse``), as JSON in the same answer."""
    max_tokens: int = Field(default=256, ge=16)
    """Most tokens of an answer."""
    checks: TextChecks = TextChecks()
    """What a caption must be like; it is asked for once more, then left empty."""


CaptionerConfig = Annotated[
    SignalsVideoConfig | MultiscaleConfig | VlmConfig, Field(discriminator="kind")
]
"""The families of captioners."""


def build_captioner(config: SignalsVideoConfig | MultiscaleConfig | VlmConfig) -> Captioner:
    """Returns the captioner that a config names.

    Raises:
        DependencyError: If its packages or its weights are missing.
    """
    match config:
        case SignalsVideoConfig():
            from dataengine.models.signals_video import SignalsVideoCaptioner

            return SignalsVideoCaptioner(config)
        case MultiscaleConfig():
            from dataengine.models.multiscale import MultiscaleCaptioner

            return MultiscaleCaptioner(config)
        case VlmConfig():
            from dataengine.models.vlm import VlmCaptioner

            return VlmCaptioner(config)
