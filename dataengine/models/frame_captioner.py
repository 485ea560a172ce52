# SPDX-License-Identifier: Apache-2.0
"""Pictures -> one sentence each: BLIP, BLIP-2, Florence-2, Tag2Text.

Light models that see a single frame. InternVid (section 3.2) runs Tag2Text over frames at a low
rate and BLIP-2 over the middle one; `dataengine.models.multiscale` puts such captions together.

Legend: B pictures of a batch, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from dataengine.errors import DependencyError
from dataengine.models.answers import BAD_OUTPUT, Batcher, Failure
from dataengine.models.pretrained import (
    load_model,
    load_processor,
    model_id,
    model_revision,
    torch_device,
)
from dataengine.models.validate import repetition_problem
from dataengine.needs import Need, Package, Weights
from dataengine.prompts import one_line
from dataengine.records import digest
from dataengine.stage import Settings

RAM_INSTALL = (
    "pip install git+https://github.com/xinyu1205/recognize-anything (it pins an old timm and transformers: "
    "give the stage an environment of its own)"
)
"""How to get the package of Tag2Text, which is not on PyPI."""


class FrameCaptioner(Protocol):
    """Describes pictures one by one."""

    model: str
    revision: str

    def caption(self, pictures: Sequence[np.ndarray]) -> list[str | Failure]:
        """Returns a caption of each picture, or why there is none, in order.

        Args:
            pictures: uint8 RGB HWC, of any size, also of different ones.
        """
        ...


class _ImageToTextConfig(Settings):
    """What all captioners of the transformers library share."""

    revision: str = ""
    """Commit, tag or branch on the hub; empty takes the newest."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of the search; 1 is greedy."""
    max_new_tokens: int = Field(default=30, ge=1)
    """Most tokens of a caption."""
    batch_size: int = Field(default=32, ge=1)
    """Most pictures in one call of the model, of all clips of a batch together."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""

    neutral: ClassVar[frozenset[str]] = frozenset({"batch_size", "device"})


class BlipConfig(_ImageToTextConfig):
    """BLIP (Li et al., arXiv 2201.12086): 0.2 B parameters, runs on a laptop."""

    kind: Literal["blip"] = "blip"
    model: str = "Salesforce/blip-image-captioning-base"
    """Hub id or local folder of a ``BlipForConditionalGeneration``."""
    prompt: str = ""
    """How every caption begins, e.g. ``a picture of``; left out of the caption."""

    def needs(self) -> tuple[Need, ...]:
        """Returns the library and the weights."""
        return (Package("transformers"), Weights("hub", self.model, self.revision))


class Blip2Config(_ImageToTextConfig):
    """BLIP-2 (Li et al., arXiv 2301.12597), with OPT or Flan-T5 behind it: 4 B parameters and more."""

    kind: Literal["blip2"] = "blip2"
    model: str = "Salesforce/blip2-opt-2.7b"
    """Hub id or local folder of a ``Blip2ForConditionalGeneration``."""
    prompt: str = ""
    """Text that the caption goes on from, or a question; left out of the caption."""
    num_beams: int = Field(default=5, ge=1)
    """Beams of the search, as its authors caption; 1 is greedy."""

    def needs(self) -> tuple[Need, ...]:
        """Returns the library and the weights."""
        return (Package("transformers"), Weights("hub", self.model, self.revision))


class Florence2Config(_ImageToTextConfig):
    """Florence-2 (Xiao et al., arXiv 2311.06242): 0.2 B and 0.8 B parameters."""

    kind: Literal["florence2"] = "florence2"
    model: str = "florence-community/Florence-2-base"
    """Hub id or local folder of a ``Florence2ForConditionalGeneration``, in the library's own format."""
    task: Literal["<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"] = "<CAPTION>"
    """How much it says; the detailed ones need more of ``max_new_tokens``."""
    num_beams: int = Field(default=3, ge=1)
    """Beams of the search, as its authors caption; 1 is greedy."""

    def needs(self) -> tuple[Need, ...]:
        """Returns the library and the weights."""
        return (Package("transformers"), Weights("hub", self.model, self.revision))


class Tag2TextConfig(Settings):
    """Tag2Text (Huang et al., arXiv 2303.05657), InternVid's own choice, by its authors' package ``ram``.

    The package is not on PyPI: ``pip install git+https://github.com/xinyu1205/recognize-anything``. It
    wants a timm and a transformers older than this project's, so it needs an environment of its own.
    """

    kind: Literal["tag2text"] = "tag2text"
    weights: str
    """``tag2text_swin_14m.pth``, which that project's page links to."""
    image_size: Literal[224, 384] = 384
    """Side in pixels that the weights were made for."""
    threshold: float = Field(default=0.68, gt=0, lt=1)
    """Probability above which a tag is believed (its authors' value)."""
    max_length: int = Field(default=50, ge=1)
    """Most tokens of a caption (its authors' value)."""
    num_beams: int = Field(default=3, ge=1)
    """Beams of the search (its authors' value)."""
    batch_size: int = Field(default=32, ge=1)
    """Most pictures in one call of the model."""
    device: str | None = None
    """torch device; None takes CUDA where there is one."""

    neutral: ClassVar[frozenset[str]] = frozenset({"batch_size", "device"})

    def needs(self) -> tuple[Need, ...]:
        """Returns the package, the weights, and the tokenizer that the package asks the hub for."""
        return (
            Package("ram", RAM_INSTALL),
            Weights("file", self.weights),
            Weights("tokenizer", "bert-base-uncased"),
        )


FrameCaptionerConfig = Annotated[
    BlipConfig | Blip2Config | Florence2Config | Tag2TextConfig, Field(discriminator="kind")
]


def usable(text: str) -> str | Failure:
    """Returns a caption on one line, or what is wrong with it: nothing said, or round in circles."""
    text = one_line(text)
    return (
        repetition_problem(text) or text if text else Failure(BAD_OUTPUT, "The caption was empty.")
    )


class ImageToText:
    """A captioner of the transformers library: bfloat16 on a GPU, float32 on a CPU.

    Args:
        cls: The model's class.
        config: Names it.
        prompt: What it is told with every picture; empty tells it nothing.

    Raises:
        DependencyError: If the model cannot be loaded whole.
    """

    def __init__(
        self, cls: Any, config: BlipConfig | Blip2Config | Florence2Config, prompt: str
    ) -> None:
        from transformers import AutoProcessor

        self._model = load_model(cls, config.model, config.revision, device=config.device)
        self._processor = load_processor(AutoProcessor, config.model, config.revision)
        self.model = model_id(config.model)
        self.revision = model_revision(config.model, self._model) or config.revision
        self._prompt = prompt
        self._batcher = Batcher(config.batch_size)
        self._search = {
            "num_beams": config.num_beams,
            "max_new_tokens": config.max_new_tokens,
            "do_sample": False,  # whatever the checkpoint's own settings say
        }

    def caption(self, pictures: Sequence[np.ndarray]) -> list[str | Failure]:
        """Returns a caption of each picture, or why there is none, in order."""
        return self._batcher.run(pictures, self._caption)

    def _caption(self, pictures: Sequence[np.ndarray]) -> list[str | Failure]:
        import torch

        model = self._model
        inputs = self._processor(
            images=list(pictures),
            text=[self._prompt] * len(pictures) if self._prompt else None,
            return_tensors="pt",
            # Else a picture three pixels high would be taken for one with channels first.
            input_data_format="channels_last",
            device=model.device,
        ).to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, **self._search)
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [usable(self._without_prompt(text)) for text in texts]

    def _without_prompt(self, text: str) -> str:
        """Returns what was written after the prompt: decoders give both, encoder-decoders do not."""
        text = text.strip()
        begins = text[: len(self._prompt)].casefold() == self._prompt.casefold()
        return text[len(self._prompt) :] if begins else text


class Tag2Text:
    """Tag2Text through the package ``ram``.

    Raises:
        DependencyError: If the package is not installed, or the weights are missing or do not fit.
    """

    def __init__(self, config: Tag2TextConfig) -> None:
        try:
            from ram import get_transform  # pyright: ignore[reportMissingImports]
            from ram.models import tag2text  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise DependencyError(
                f"Missing package: ram (Tag2Text; {error})", RAM_INSTALL
            ) from error
        if not Path(config.weights).is_file():
            raise DependencyError(
                f"Weights are missing: {config.weights}",
                "the page of recognize-anything links to tag2text_swin_14m.pth",
            )
        self._device = torch_device(config.device)
        try:
            # The threshold must be given here: the model makes a table of it when it is built.
            model = tag2text(
                pretrained=config.weights,
                image_size=config.image_size,
                vit="swin_b",
                threshold=config.threshold,
            )
        except Exception as error:  # torch, the hub and the package raise all kinds
            raise DependencyError(
                f"Tag2Text cannot be loaded: {' '.join(str(error).split())[:300]}", RAM_INSTALL
            ) from error
        _check_tag2text_weights(model, config.weights)
        self._model = model.eval().to(self._device)
        self._transform = get_transform(image_size=config.image_size)
        self._options = {"num_beams": config.num_beams, "max_length": config.max_length}
        self._batcher = Batcher(config.batch_size)
        self.model = "tag2text"
        with open(config.weights, "rb") as opened:
            size = str(Path(config.weights).stat().st_size)
            self.revision = digest(size, opened.read(1 << 20))

    def caption(self, pictures: Sequence[np.ndarray]) -> list[str | Failure]:
        """Returns a caption of each picture, or why there is none, in order."""
        return self._batcher.run(pictures, self._caption)

    def _caption(self, pictures: Sequence[np.ndarray]) -> list[str | Failure]:
        import torch
        from PIL import Image

        image_BCHW = torch.stack([self._transform(Image.fromarray(p)) for p in pictures])
        with torch.inference_mode():
            texts, _tags = self._model.generate(
                image_BCHW.to(self._device),
                tag_input=None,
                return_tag_predict=True,
                **self._options,
            )
        return [usable(text) for text in texts]


def _check_tag2text_weights(model: Any, weights: str) -> None:
    """Raises DependencyError unless every parameter has its weights in the file.

    The package loads what fits and leaves the rest as it was drawn at random.
    """
    import torch

    held = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)["model"]
    # An older name of the same part, which the package knows too.
    shapes = {key.replace("vision_multi", "tagging_head"): held[key].shape for key in held}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)  # shared ones have several names
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [
        aliases[0]
        for aliases in names.values()
        # Position biases are interpolated by the package, so only their name is compared.
        if not any(
            alias in shapes
            and (alias.endswith("bias_table") or shapes[alias] == parameters[alias].shape)
            for alias in aliases
        )
    ]
    if missing:
        shown = ", ".join(missing[:5])
        raise DependencyError(
            f"Weights {weights} do not fit Tag2Text: missing {shown} ({len(missing)} in all)",
            "use tag2text_swin_14m.pth of recognize-anything",
        )


def build_frame_captioner(
    config: BlipConfig | Blip2Config | Florence2Config | Tag2TextConfig,
) -> FrameCaptioner:
    """Returns the captioner of pictures that a config names.

    Raises:
        DependencyError: If its package or its weights are missing, or do not fit.
    """
    if isinstance(config, Tag2TextConfig):
        return Tag2Text(config)
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            "Missing package: transformers (caption_video)", "uv sync --extra ingest"
        ) from error
    match config:
        case BlipConfig():
            return ImageToText(transformers.BlipForConditionalGeneration, config, config.prompt)
        case Blip2Config():
            return ImageToText(transformers.Blip2ForConditionalGeneration, config, config.prompt)
        case Florence2Config():
            return ImageToText(transformers.Florence2ForConditionalGeneration, config, config.task)
