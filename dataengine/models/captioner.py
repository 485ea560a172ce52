# SPDX-License-Identifier: Apache-2.0
"""Frames -> captions of what is seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from dataengine.models.answers import Author, Failure
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


CaptionerConfig = SignalsVideoConfig
"""The families of captioners; a second kind makes this a union on ``kind``."""


def build_captioner(config: CaptionerConfig) -> Captioner:
    """Returns the captioner that a config names."""
    from dataengine.models.signals_video import SignalsVideoCaptioner

    builders = {"signals": SignalsVideoCaptioner}
    return builders[config.kind](config)
