# SPDX-License-Identifier: Apache-2.0
"""A video tower and a text tower over one space, as a scorer of clips and captions.

B clips or texts, T frames, S side of the model's square input, D embedding width, L tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dataengine.models.answers import Batcher, Failure
from dataengine.models.clip import unit
from dataengine.models.pretrained import load_processor, torch_device

if TYPE_CHECKING:
    import torch


TextReader = Callable[[Sequence[str]], "torch.Tensor"]
"""Texts -> int64 tokens [B, L], padded with 0."""


class TwoTowers(Protocol):
    """The network; it is an ``nn.Module`` besides."""

    def encode_video(self, frames_BTCHW: "torch.Tensor") -> "torch.Tensor":
        """Returns features [B, D]."""
        ...

    def encode_text(self, tokens_BL: "torch.Tensor") -> "torch.Tensor":
        """Returns features [B, D]."""
        ...


class TwoTowerScorer:
    """Any two towers; float32 on a CPU, bfloat16 autocast on a GPU.

    Frames are squeezed into a square (bicubic), as the published evaluations do.

    Args:
        network: `TwoTowers`, with its weights.
        read_texts: Its tokenizer.
        num_frames: T.
        image_size: S.
        pixel_mean: Of red, green, blue in [0, 1].
        pixel_std: The same.
        model: What it is called in the provenance.
        revision: Which weights these are.
        device: torch device; None takes CUDA where there is one.
        batch_size: Most clips or texts in one call of the network.
    """

    def __init__(
        self,
        network: Any,
        read_texts: TextReader,
        *,
        num_frames: int,
        image_size: int,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        model: str,
        revision: str,
        device: str | None,
        batch_size: int,
    ) -> None:
        import torch

        self._device = torch_device(device)
        self._network: TwoTowers = network.eval().to(self._device)
        self._read_texts = read_texts
        self._mean = torch.tensor(pixel_mean, device=self._device)
        self._std = torch.tensor(pixel_std, device=self._device)
        self._size = image_size
        self._batcher = Batcher(batch_size)
        self.num_frames, self.model, self.revision = num_frames, model, revision

    @property
    def batch_size(self) -> int:
        """Most clips or texts in one call of the model; halved when memory runs out."""
        return self._batcher.size

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """Returns the squeezed frame, uint8 [S, S, 3]."""
        from PIL import Image

        size = (self._size, self._size)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))

    def embed_videos(self, prepared: Sequence[np.ndarray]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per clip, given as uint8 [T, S, S, 3]."""
        return self._batcher.run(prepared, self._encode_videos)

    def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray | Failure]:
        """Returns a float32 unit vector [D] per text."""
        return self._batcher.run(texts, self._encode_texts)

    def _encode_videos(self, prepared: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        import torch

        pixels_BTHWC = torch.from_numpy(np.stack(prepared)).to(self._device)
        with torch.inference_mode(), self._autocast():
            frames = (pixels_BTHWC.float() / 255 - self._mean) / self._std
            return _exact(self._network.encode_video(frames.permute(0, 1, 4, 2, 3)))

    def _encode_texts(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        import torch

        tokens_BL = self._read_texts(texts).to(self._device)
        with torch.inference_mode(), self._autocast():
            return _exact(self._network.encode_text(tokens_BL))

    def _autocast(self) -> Any:
        import torch

        if not self._device.startswith("cuda"):
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)


def clip_reader(context_length: int, *, clean: bool) -> TextReader:
    """Returns CLIP's tokenizer; a text that is too long loses its end.

    Args:
        context_length: L, with start and end.
        clean: Whether texts lose case and punctuation first.
    """
    from dataengine.networks.text import clean_caption, tokenise

    def read(texts: Sequence[str]) -> "torch.Tensor":
        return tokenise([clean_caption(t) if clean else t for t in texts], context_length)

    return read


def bert_reader(tokenizer: str, context_length: int, *, clean: bool) -> TextReader:
    """Returns a BERT's tokenizer.

    Args:
        tokenizer: Hub id or local folder.
        context_length: L, with start and end.
        clean: Whether texts lose case and punctuation first.

    Raises:
        DependencyError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from dataengine.networks.text import bert_tokens, clean_caption

    loaded = load_processor(AutoTokenizer, tokenizer)

    def read(texts: Sequence[str]) -> "torch.Tensor":
        cleaned = [clean_caption(text) if clean else text for text in texts]
        return bert_tokens(loaded, cleaned, context_length)

    return read


def llama_reader(tokenizer: str, context_length: int, *, clean: bool) -> TextReader:
    """Returns the tokenizer of InternVL-C's LLaMA, which is asked to summarise.

    Args:
        tokenizer: Hub id or local folder.
        context_length: L, with start and end.
        clean: Whether texts lose case and punctuation first.

    Raises:
        DependencyError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from dataengine.networks.text import clean_caption, llama_tokens

    loaded = load_processor(AutoTokenizer, tokenizer)

    def read(texts: Sequence[str]) -> "torch.Tensor":
        cleaned = [clean_caption(text) if clean else text for text in texts]
        return llama_tokens(loaded, cleaned, context_length)

    return read


def _exact(features: Any) -> Sequence[np.ndarray]:
    # Autocast leaves unit vectors of bfloat16; the cosine is taken of exact ones.
    return list(unit(features.float().cpu().numpy()))
