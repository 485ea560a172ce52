# SPDX-License-Identifier: Apache-2.0
"""BERT in two parts: layers that read text, and layers that also look at video or sound.

Devlin et al. 2019 (arXiv 1810.04805), split as ALBEF (Li et al. 2021, section 3.1) and InternVideo2's
second stage do. Names and shapes of the weights are those of the published checkpoints, but that a
tensor which they store twice, the output matrix and its bias, is one here: see `plain_bert`.

B texts, L tokens, V words, D width, H heads, K width of a head, N tokens of what is looked at,
E their width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import DependencyError
from dataengine.networks.config import BertConfig

PAD = 0
"""Id of padding in all published vocabularies."""

_EPS = 1e-12


class Projections(nn.Module):
    """Queries, keys and values of one attention, and the attention itself."""

    def __init__(self, config: BertConfig, seen_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(seen_width, config.width)
        self.value = nn.Linear(seen_width, config.width)

    def forward(
        self, x_BLD: torch.Tensor, seen_BNE: torch.Tensor, there_B11N: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns what each token takes from those that are ``there``, [B, L, D]."""
        q_BHLK, k_BHNK, v_BHNK = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(x_BLD), self.key(seen_BNE), self.value(seen_BNE))
        )
        mixed_BHLK = F.scaled_dot_product_attention(
            q_BHLK,
            k_BHNK,
            v_BHNK,
            attn_mask=there_B11N,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return mixed_BHLK.transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """A linear layer whose output is added to what was there, and a norm behind both."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, branch_BLX: torch.Tensor, x_BLD: torch.Tensor) -> torch.Tensor:
        """Returns [B, L, D]."""
        return self.LayerNorm(self.dropout(self.dense(branch_BLX)) + x_BLD)


class Attention(nn.Module):
    """Attention to the text itself, or to what is looked at, with its residual."""

    def __init__(self, config: BertConfig, seen_width: int) -> None:
        super().__init__()
        self.self = Projections(config, seen_width)
        self.output = Residual(config, config.width)

    def forward(
        self, x_BLD: torch.Tensor, seen_BNE: torch.Tensor, there_B11N: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns [B, L, D]."""
        return self.output(self.self(x_BLD, seen_BNE, there_B11N), x_BLD)


class Intermediate(nn.Module):
    """The wide half of the MLP; its GELU is the exact one."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Returns [B, L, mlp_width]."""
        return F.gelu(self.dense(x_BLD))


class Layer(nn.Module):
    """Attention to the text, to what is looked at if ``seen_width`` is given, and an MLP."""

    def __init__(self, config: BertConfig, seen_width: int | None) -> None:
        super().__init__()
        self.attention = Attention(config, config.width)
        self.crossattention = Attention(config, seen_width) if seen_width else None
        self.intermediate = Intermediate(config)
        self.output = Residual(config, config.mlp_width)

    def forward(
        self,
        x_BLD: torch.Tensor,
        there_B11L: torch.Tensor,
        seen_BNE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns [B, L, D]."""
        x_BLD = self.attention(x_BLD, x_BLD, there_B11L)
        if self.crossattention is not None:
            assert seen_BNE is not None
            x_BLD = self.crossattention(x_BLD, seen_BNE, None)
        return self.output(self.intermediate(x_BLD), x_BLD)


class Embeddings(nn.Module):
    """Word, place and kind of each token, added and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.num_token_types, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns [B, L, D]; all tokens are of the first kind."""
        place_LD = self.position_embeddings.weight[: tokens_BL.shape[1]]
        kind_D = self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(self.word_embeddings(tokens_BL) + kind_D + place_LD))


class Encoder(nn.Module):
    """The layers of both parts."""

    def __init__(self, config: BertConfig, seen_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, seen_width if number >= config.fusion_layer else None)
            for number in range(config.layers)
        )


class Body(nn.Module):
    """Embeddings and layers."""

    def __init__(self, config: BertConfig, seen_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, seen_width)


class Transform(nn.Module):
    """What a state passes before it is compared with the words."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the same shape."""
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """State -> a score for every word. The matrix is that of the word embeddings."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class Head(nn.Module):
    """The head for masked words."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)


class Bert(nn.Module):
    """The split encoder with its head for masked words.

    Args:
        config: Its shape.
        seen_width: Width of the tokens that the last layers look at.
    """

    def __init__(self, config: BertConfig, seen_width: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Body(config, seen_width)
        self.cls = Head(config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def read(self, tokens_BL: torch.Tensor, padded_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the states of texts behind the layers that read text alone, [B, L, D].

        Args:
            tokens_BL: int64, padded with 0.
            padded_BL: The texts that say where there is padding, if it is not these: words that were
                replaced by others may have become padding's id.
        """
        x_BLD = self.bert.embeddings(tokens_BL)
        there_B11L = _there(tokens_BL if padded_BL is None else padded_BL)
        for layer in self.bert.encoder.layer[: self.config.fusion_layer]:
            x_BLD = layer(x_BLD, there_B11L)
        return x_BLD

    def fuse(
        self, states_BLD: torch.Tensor, tokens_BL: torch.Tensor, seen_BNE: torch.Tensor
    ) -> torch.Tensor:
        """Returns the states of texts that have looked at video or sound, [B, L, D].

        Args:
            states_BLD: Of `read`.
            tokens_BL: The same texts, for where there is padding.
            seen_BNE: What row by row is looked at, all of it.
        """
        there_B11L = _there(tokens_BL)
        for layer in self.bert.encoder.layer[self.config.fusion_layer :]:
            states_BLD = layer(states_BLD, there_B11L, seen_BNE)
        return states_BLD

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the score of every word [..., V] for states [..., D]."""
        head = self.cls.predictions
        words_VD = self.bert.embeddings.word_embeddings.weight
        return F.linear(head.transform(states), words_VD, head.bias)


def _there(tokens_BL: torch.Tensor) -> torch.Tensor:
    """Returns bool [B, 1, 1, L]: where there is no padding.

    The first token always counts: a row of padding alone, as where a clip could not be read, would
    otherwise have a softmax over nothing, which in some kernels is NaN and spreads in the backward pass.
    """
    there_BL = tokens_BL != PAD
    there_BL[:, :1] = True
    return there_BL[:, None, None]


_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
"""Stored twice in published checkpoints -> the one that is read."""

_NOT_NEEDED = ("bert.embeddings.position_ids", "bert.pooler.", "cls.seq_relationship.")
"""Numbers 0 to 511, and the head that tells whether two sentences follow each other."""

_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""As checkpoints that were converted from TensorFlow call them."""


def plain_bert(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights of a published BERT, in float32 under the names of `Bert`.

    Args:
        weights: ``bert.*`` and ``cls.*``, with or without the layers' cross-attention.

    Raises:
        ValueError: If a weight that is stored twice differs from its copy.
    """
    state = {}
    for name, tensor in weights.items():
        for old, new in _OLD_NAMES.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if not name.startswith(_NOT_NEEDED):
            state[name] = tensor.float()
    for copy, name in _TIED.items():
        if copy in state and not torch.equal(state.pop(copy), state.get(name, torch.empty(0))):
            raise ValueError(f"differing copies {copy} and {name}")
    return state


def published_bert(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights of a `Bert` as published checkpoints hold them, copies and all."""
    return {**state, **{copy: state[name].clone() for copy, name in _TIED.items()}}


def load_plain_bert(model: Bert, source: str | Path) -> list[str]:
    """Gives a split BERT the weights of a BERT that reads text alone.

    Args:
        model: Keeps its cross-attention as it is; all else is replaced.
        source: A Hugging Face folder with ``model.safetensors`` or ``pytorch_model.bin``, or the id of
            one on the hub, such as ``google-bert/bert-large-uncased``.

    Returns:
        Names of the weights that stay fresh: those of the cross-attention.

    Raises:
        DependencyError: If there is no such folder, or a weight is missing, unexpected or of another
            shape; the message names it.
    """
    own = model.state_dict()
    fresh = sorted(name for name in own if ".crossattention." in name)
    try:
        state = plain_bert(_read(source))
        problems = [f"missing {name}" for name in own if name not in state and name not in fresh]
        problems += [f"unexpected {name}" for name in state if name not in own or name in fresh]
        problems += [
            f"of another shape {name}: {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            for name, tensor in state.items()
            if name in own and tensor.shape != own[name].shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(", ".join(problems[:5]) + more)
    except ValueError as error:
        raise DependencyError(
            f"Weights of {source} do not fit this BERT: {error}",
            "name a plain BERT of the shape that model.text gives, such as "
            "google-bert/bert-large-uncased",
        ) from error
    model.load_state_dict(state, strict=False)  # what is missing and unexpected was looked at above
    return fresh


_FILES = ("model.safetensors", "pytorch_model.bin")


def _read(source: str | Path) -> Mapping[str, Any]:
    """Returns the weights of a folder, or of a model on the hub, without running code in them."""
    folder = Path(source)
    if folder.is_dir():
        files = [folder / name for name in _FILES if (folder / name).is_file()]
        problem = f"it holds neither {' nor '.join(_FILES)}"
    else:
        files, problem = _download(str(source))
    if not files:
        raise DependencyError(
            f"No BERT at {source}: {problem}", "name a Hugging Face folder, or an id on the hub"
        )
    try:
        if files[0].suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(files[0])
        return torch.load(files[0], map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise all kinds
        reason = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"{files[0]} is damaged or no BERT ({reason})", "download it again"
        ) from error


def _download(name: str) -> tuple[list[Path], str]:
    """Returns the file of a model on the hub, from its cache where it is there, or why there is none."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return [], "it is no folder, and huggingface_hub is not installed"
    problem = ""
    for file in _FILES:
        try:
            return [Path(hf_hub_download(name, file))], ""
        except (OSError, ValueError, HfHubHTTPError) as error:  # no network, no name, no such file
            problem = problem or " ".join(str(error).split())[:300]
    return [], problem
