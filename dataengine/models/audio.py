# SPDX-License-Identifier: Apache-2.0
"""Sound -> a caption of what is heard."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from dataengine.models.answers import Failure
from dataengine.models.llm import LLMConfig, TransformersLLMConfig
from dataengine.models.validate import TextChecks
from dataengine.needs import Need, Package, Weights
from dataengine.prompts import PromptFile
from dataengine.stage import Settings

SOUND_PROMPT: dict[str, set[str]] = {"system": set(), "describe": set(), "again": {"problem"}}
"""Texts of a prompt file for sound, and their variables."""


TAG_PROMPT: dict[str, set[str]] = {"template": {"sound"}, "heard": {"sound"}, "tags": set()}
"""Texts of a tag file: how a sound is asked for, how it is named, and the sounds, one a line."""


class AudioCaptioner(Protocol):
    """Describes sound."""

    model: str
    revision: str
    prompt_hash: str | None
    rate: int
    """Samples per second that it wants to hear."""

    def caption(
        self, waveforms: Sequence[np.ndarray], clip_ids: Sequence[str]
    ) -> Sequence[str | Failure | None]:
        """Returns a caption per sound, None where nothing is heard, or why there is none; in order.

        Args:
            waveforms: float32 mono in [-1, 1] at ``rate``, none of them empty.
            clip_ids: Whose they are.
        """
        ...


class SignalsAudioConfig(Settings):
    """A sentence made of what is measured; no model."""

    kind: Literal["signals"] = "signals"


class BeatsCaptionerConfig(Settings):
    """InternVideo2's audio captioner: BEATs, a tuned Q-Former, a language model."""

    kind: Literal["beats"] = "beats"
    captioner: str
    """Folder that ``python -m training.audio_captioner`` wrote. It names its BEATs and its language
    model, whose hashes must be those of the training."""
    beats: str | None = None
    """Where the BEATs checkpoint lies, if not where it lay at training."""
    language_model: str | None = None
    """Local folder or hub id of the language model, if not as at training."""
    name: str = "beats-qformer"
    """What the provenance calls it."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=16, ge=1)
    """Most sounds in one call of the model."""
    checks: TextChecks = TextChecks(min_words=1)
    """What a caption must be like; "Silence." is one."""
    neutral: ClassVar[frozenset[str]] = frozenset(
        {"beats", "language_model", "device", "batch_size"}
    )

    def needs(self) -> tuple[Need, ...]:
        """Returns the library, the folder, and what the folder names once it is there."""
        needed: list[Need] = [
            Package("transformers"),
            *(
                Weights("file", str(Path(self.captioner) / name), mend=_train(self.captioner))
                for name in ("config.json", "model.safetensors")
            ),
        ]
        beats, language_model, revision = self.beats, self.language_model, ""
        named = _named_in(self.captioner)
        if beats is None:
            beats = named.get("beats")
        if language_model is None:
            language_model = named.get("language_model")
            revision = named.get("language_model_revision", "")
        if beats:
            needed.append(Weights("file", beats))
        if language_model:
            needed.append(Weights("hub", language_model, revision))
        return tuple(needed)


def _train(folder: str) -> str:
    """Returns the command that trains a captioner of sound into a folder."""
    return (
        "python -m training.audio_captioner training/audio_caption/wavcaps.yaml --data LIST.jsonl "
        f"--audio DIR --output {shlex.quote(folder)} --set beats=BEATs.pt"
    )


class ClapTagsConfig(Settings):
    """The light choice: CLAP says which of a list of sounds are heard; a sentence names them."""

    kind: Literal["clap"] = "clap"
    model: str = "laion/clap-htsat-unfused"
    """Hub id or local folder of a ClapModel (Wu et al. 2023, arXiv 2211.06687)."""
    revision: str = ""
    tags: Annotated[str, PromptFile(TAG_PROMPT)] = Field(
        default="prompts/sound_tags.v1.yaml", validate_default=True
    )
    """Sounds that may be named, and how CLAP is asked for them."""
    threshold: float = Field(default=0.3, ge=-1, le=1)
    """Least cosine similarity of a sound that is named. Not measured: set it on sounds of your own,
    anew for each checkpoint."""
    margin: float = Field(default=0.1, ge=0)
    """Sounds this much less similar than the most similar one are not named; not measured either."""
    max_tags: int = Field(default=3, ge=1)
    """Most sounds that are named."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""
    batch_size: int = Field(default=16, ge=1)
    """Most windows of ten seconds in one call of the model."""
    neutral: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})

    def needs(self) -> tuple[Need, ...]:
        """Returns the library and the weights."""
        return (Package("transformers"), Weights("hub", self.model, self.revision))


class AudioLLMConfig(Settings):
    """A language model that hears: Qwen2-Audio, Qwen2.5-Omni and their like."""

    kind: Literal["audio_llm"] = "audio_llm"
    llm: LLMConfig
    """Who answers: ``http`` (input_audio), ``vllm``, or ``transformers`` with ``modality: audio``."""
    prompt: Annotated[str, PromptFile(SOUND_PROMPT)] = Field(
        default="prompts/caption_sound.v1.yaml", validate_default=True
    )
    """Prompt file with ``system``, ``describe`` and ``again``."""
    max_tokens: int = Field(default=96, ge=8)
    """Most tokens of a caption."""
    max_s: float = Field(default=30.0, gt=0)
    """Of longer sounds, this much of the beginning is heard, in seconds (Qwen2-Audio hears 30 s)."""
    checks: TextChecks = TextChecks(max_words=80)
    """What a caption must be like."""

    @model_validator(mode="after")
    def _hears(self) -> "AudioLLMConfig":
        if isinstance(self.llm, TransformersLLMConfig) and self.llm.modality != "audio":
            raise ValueError("llm.modality must be audio: this model is shown sound")
        return self


AudioCaptionerConfig = Annotated[
    SignalsAudioConfig | BeatsCaptionerConfig | ClapTagsConfig | AudioLLMConfig,
    Field(discriminator="kind"),
]


def build_audio_captioner(
    config: SignalsAudioConfig | BeatsCaptionerConfig | ClapTagsConfig | AudioLLMConfig,
) -> AudioCaptioner:
    """Returns the captioner that a config names.

    Raises:
        DependencyError: If its package or its weights are missing or do not fit.
    """
    match config:
        case SignalsAudioConfig():
            from dataengine.models.signals_audio import SignalsAudioCaptioner

            return SignalsAudioCaptioner()
        case BeatsCaptionerConfig():
            from dataengine.models.beats_captioner import BeatsCaptioner

            return BeatsCaptioner(config)
        case ClapTagsConfig():
            from dataengine.models.clap import ClapTagger

            return ClapTagger(config)
        case AudioLLMConfig():
            from dataengine.models.audio_llm import AudioLLMCaptioner

            return AudioLLMCaptioner(config)


def _named_in(folder: str) -> dict[str, str]:
    """Returns what a trained folder says it needs; nothing if it is not there or not readable."""
    import json

    try:
        content = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
