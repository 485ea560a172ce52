# SPDX-License-Identifier: Apache-2.0
"""Captions of a clip's frames -> a short description of the clip.

InternVid (section 3.2) has a T5 summarise the frames' captions. By rule it is the sentences that
differ.
"""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.models.answers import Batcher, Failure
from dataengine.models.frame_captioner import usable
from dataengine.models.pretrained import load_model, load_processor, model_id, model_revision
from dataengine.models.validate import words_of
from dataengine.needs import Need, Package, Weights
from dataengine.stage import Settings

_ALIKE = 0.5
"""Jaccard index of two captions' words, small ones aside, from which they say the same: "a man walks
down a street" and "a man walking down the street" have 0.6."""
_SMALL_WORDS = frozenset(
    ("a", "an", "the", "of", "in", "on", "at", "and", "with", "to", "is", "are", "by", "there")
)


class Summariser(Protocol):
    """Makes one description of several."""

    model: str
    revision: str

    def summarise(self, captions: Sequence[Sequence[str]]) -> list[str | Failure]:
        """Returns a summary of each list of captions, or why there is none, in order."""
        ...


class T5SummariserConfig(Settings):
    """A T5 or Flan-T5 (Raffel et al., arXiv 1910.10683) that was taught to summarise."""

    kind: Literal["t5"] = "t5"
    model: str = "google-t5/t5-base"
    """Hub id or local folder of a ``T5ForConditionalGeneration``."""
    revision: str = ""
    """Commit, tag or branch on the hub; empty takes the newest."""
    prefix: str = "summarize: "
    """What the captions are put behind: T5's own words for the task."""
    num_beams: int = Field(default=4, ge=1)
    """Beams of the search (T5's summaries); 1 is greedy."""
    max_input_tokens: int = Field(default=512, ge=16)
    """Captions beyond are cut off: what T5 was trained on."""
    max_new_tokens: int = Field(default=60, ge=1)
    """Most tokens of a summary."""
    batch_size: int = Field(default=32, ge=1)
    """Most clips in one call of the model."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""

    neutral: ClassVar[frozenset[str]] = frozenset({"batch_size", "device"})

    def needs(self) -> tuple[Need, ...]:
        """Returns the library and the weights."""
        return (Package("transformers"), Weights("hub", self.model, self.revision))


SummariserConfig = T5SummariserConfig
"""The families of summarisers; a second kind makes this a union on ``kind``."""


def alike(one: str, other: str) -> bool:
    """Returns whether two captions say the same, in about the same words."""
    words, others = (set(words_of(text)) - _SMALL_WORDS for text in (one, other))
    if not words or not others:
        return words_of(one) == words_of(other)
    return words <= others or len(words & others) / len(words | others) >= _ALIKE


def distinct(captions: Sequence[str], max_captions: int = 3) -> list[str]:
    """Returns what captions of one clip say, each thing once, in the order of the first time.

    Args:
        captions: In time order. Of those that say the same, the wording that comes most often stands
            for all.
        max_captions: Of more different ones, those that most captions agree with are taken.
    """
    groups: list[list[str]] = []
    for caption in captions:
        group = next((group for group in groups if alike(caption, group[0])), None)
        if group is None:
            groups.append([caption])
        else:
            group.append(caption)
    kept = sorted(range(len(groups)), key=lambda at: (-len(groups[at]), at))[:max_captions]
    return [Counter(groups[at]).most_common(1)[0][0] for at in sorted(kept)]


class T5Summariser:
    """A T5 in the transformers library: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        DependencyError: If the model cannot be loaded whole.
    """

    def __init__(self, config: T5SummariserConfig) -> None:
        try:
            from transformers import AutoTokenizer, T5ForConditionalGeneration
        except ImportError as error:
            raise DependencyError(
                "Missing package: transformers (caption_video)", "uv sync --extra ingest"
            ) from error
        self._config = config
        self._model = load_model(
            T5ForConditionalGeneration, config.model, config.revision, device=config.device
        )
        self._tokenizer = load_processor(AutoTokenizer, config.model, config.revision)
        self.model = model_id(config.model)
        self.revision = model_revision(config.model, self._model) or config.revision
        self._batcher = Batcher(config.batch_size)

    def summarise(self, captions: Sequence[Sequence[str]]) -> list[str | Failure]:
        """Returns a summary of each list of captions, or why there is none, in order.

        The same list is summarised once.
        """
        texts = [self._config.prefix + ". ".join(group) + "." for group in captions]
        # Texts of about one length share a batch, so that little of it is padding.
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        answers = dict(zip(unique, self._batcher.run(unique, self._summarise), strict=True))
        return [answers[text] for text in texts]

    def _summarise(self, texts: Sequence[str]) -> list[str | Failure]:
        import torch

        config, model = self._config, self._model
        inputs = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=config.max_input_tokens,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                num_beams=config.num_beams,
                max_new_tokens=config.max_new_tokens,
                no_repeat_ngram_size=3,  # as T5's own summaries are searched for
                do_sample=False,
            )
        return [
            usable(text) for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ]


def build_summariser(config: SummariserConfig) -> Summariser:
    """Returns the summariser that a config names.

    Raises:
        DependencyError: If its package or its weights are missing, or do not fit.
    """
    builders = {"t5": T5Summariser}
    return builders[config.kind](config)
