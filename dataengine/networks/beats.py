# SPDX-License-Identifier: Apache-2.0
"""BEATs, an audio transformer over patches of a mel spectrogram, in plain torch.

Chen et al. 2023, "BEATs: Audio Pre-Training with Acoustic Tokenizers" (arXiv 2212.09058). The
numbers are those of the published checkpoints, whose format, ``{"cfg": ..., "model": ...}``, is
read with every weight accounted for. The filter bank is Kaldi's, which the weights were trained on.

B batch, S samples, T frames of 10 ms, M mel bins, N patches, D width, H heads, K width of a head.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import DependencyError
from dataengine.networks.config import BeatsNetworkConfig

RATE = 16_000
MEL_BINS = 128
FRAME, SHIFT, FFT = 400, 160, 512
"""25 ms every 10 ms, in a transform of the next power of two."""
FBANK_MEAN, FBANK_STD = 15.41663, 6.55582
"""Statistics of AudioSet's filter banks that the published weights expect."""

_SHOWN_KEYS = 5


@functools.cache
def _mel_filters(num_bins: int) -> torch.Tensor:
    """Returns float32 [FFT / 2 + 1, num_bins]: triangles that are even on Kaldi's mel scale.

    mel(f) = 1127 ln(1 + f / 700), from 20 Hz to 8 kHz. The bin of 8 kHz itself counts in none.
    """

    def mel(hz: Any) -> Any:
        return 1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0)

    corners = np.linspace(mel(20.0), mel(RATE / 2), num_bins + 2)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    bins = mel(np.arange(FFT // 2) * RATE / FFT)[:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    return torch.from_numpy(np.pad(filters, ((0, 1), (0, 0)))).float()


@functools.cache
def _window() -> torch.Tensor:
    """Returns float32 [FRAME]: Kaldi's "povey" window, a Hann window to the power of 0.85."""
    return torch.hann_window(FRAME, periodic=False, dtype=torch.float64).pow(0.85).float()


def kaldi_fbank(waves_BS: torch.Tensor, num_bins: int = MEL_BINS) -> torch.Tensor:
    """Returns float32 [B, T, num_bins] of natural logarithms, T = 1 + (S - FRAME) // SHIFT.

    Kaldi's ``compute-fbank-feats`` with its defaults, but more bins and no dither: frames that do
    not fit are left out, the mean of each is taken off, then pre-emphasis of 0.97.

    Args:
        waves_BS: float32 in [-1, 1] at 16 kHz, at least FRAME samples. Kaldi reads 16-bit numbers,
            so they are multiplied by 2^15.
        num_bins: Mel bins: 128 in BEATs' own code, 64 in InternVideo2's second stage.
    """
    frames = (waves_BS.float() * 2**15).unfold(1, FRAME, SHIFT)
    frames = frames - frames.mean(dim=2, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
    frames = (frames - 0.97 * before) * _window().to(frames.device)
    power = torch.fft.rfft(frames, n=FFT).abs().square()
    mels = power @ _mel_filters(num_bins).to(frames.device)
    return mels.clamp_min(torch.finfo(torch.float32).eps).log()


class ConvPosition(nn.Module):
    """What a wide grouped convolution sees around a patch; weights are normalised per tap."""

    def __init__(self, config: BeatsNetworkConfig) -> None:
        super().__init__()
        self.groups, taps = config.conv_pos_groups, config.conv_pos
        self.scale = nn.Parameter(torch.ones(1, 1, taps))
        self.direction = nn.Parameter(torch.empty(config.width, config.width // self.groups, taps))
        self.bias = nn.Parameter(torch.zeros(config.width))
        nn.init.normal_(self.direction, std=math.sqrt(4.0 / (taps * config.width)))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        taps = self.direction.shape[2]
        norm = self.direction.norm(dim=(0, 1), keepdim=True)
        x = F.conv1d(
            x_BND.transpose(1, 2),
            self.direction * (self.scale / norm),
            self.bias,
            padding=taps // 2,
            groups=self.groups,
        )
        # An even kernel gives one patch too many.
        return F.gelu(x[..., : x_BND.shape[1]]).transpose(1, 2)


class GatedAttention(nn.Module):
    """Self-attention whose position bias is scaled by gates that the query opens.

    Chi et al. 2022, "XLM-E", section 3.3 (gated relative position bias), as WavLM and BEATs use it.
    """

    def __init__(self, config: BeatsNetworkConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.gate = nn.Linear(config.width // config.heads, 8)
        self.gate_scale = nn.Parameter(torch.ones(1, config.heads, 1, 1))

    def forward(
        self, x_BND: torch.Tensor, bias_HNN: torch.Tensor, padding_B11N: torch.Tensor
    ) -> torch.Tensor:
        """Returns [B, N, D]; ``padding_B11N`` is 0 where there is sound and -inf elsewhere."""
        B, N, D = x_BND.shape
        q, k, v = (
            part(x_BND).view(B, N, self.heads, D // self.heads).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        halves = self.gate(q).view(B, self.heads, N, 2, 4).sum(dim=-1).sigmoid()
        update, reset = halves[..., :1], halves[..., 1:]
        gate_BHN1 = update * (reset * self.gate_scale - 1.0) + 2.0
        mask = gate_BHN1 * bias_HNN + padding_B11N
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(B, N, D))


class BeatsBlock(nn.Module):
    """Attention and MLP, each with its residual scaled up and a layer norm behind it (DeepNet)."""

    def __init__(self, config: BeatsNetworkConfig) -> None:
        super().__init__()
        self.attention = GatedAttention(config)
        self.attention_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.alpha = (2 * config.layers) ** 0.25 if config.deep_norm else 1.0

    def forward(
        self, x_BND: torch.Tensor, bias_HNN: torch.Tensor, padding_B11N: torch.Tensor
    ) -> torch.Tensor:
        """Returns [B, N, D]."""
        x = self.attention_norm(x_BND * self.alpha + self.attention(x_BND, bias_HNN, padding_B11N))
        return self.norm(x * self.alpha + self.fc2(F.gelu(self.fc1(x))))


class Beats(nn.Module):
    """The encoder, with the classifier of a fine-tuned checkpoint where there is one.

    Args:
        config: Its shape.
        labels: Name of each class, e.g. AudioSet's ``/m/09x0r``; empty without a classifier.
    """

    def __init__(self, config: BeatsNetworkConfig, labels: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.labels = tuple(labels)
        edge = config.patch_size
        self.patches = nn.Conv2d(1, config.embed_dim, edge, stride=edge, bias=config.conv_bias)
        self.patch_norm = nn.LayerNorm(config.embed_dim)
        self.project = (
            nn.Linear(config.embed_dim, config.width)
            if config.embed_dim != config.width
            else nn.Identity()
        )
        self.position = ConvPosition(config)
        self.position_bias = nn.Embedding(config.num_buckets, config.heads)
        self.norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(BeatsBlock(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.num_classes) if config.num_classes else None

    @property
    def min_samples(self) -> int:
        """Samples of the shortest sound with a patch; a shorter one is padded with silence."""
        return FRAME + (self.config.patch_size - 1) * SHIFT

    def forward(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes sounds of any lengths; the answer to one does not depend on the others.

        As in the published code, frames at the end that fill no whole patch are not heard.

        Args:
            waves: float32 mono [S] in [-1, 1] at 16 kHz.

        Returns:
            Features [B, N, D] in time order, 8 frequency bands per 160 ms, and bool [B, N]: where
            there is sound. Features elsewhere mean nothing.
        """
        device, dtype = self.norm.weight.device, self.norm.weight.dtype
        longest = max(self.min_samples, *(len(wave) for wave in waves))
        padded = np.zeros((len(waves), longest), np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = wave
        fbank_BTM = kaldi_fbank(torch.from_numpy(padded).to(device))
        fbank_BTM = (fbank_BTM - FBANK_MEAN) / (2 * FBANK_STD)
        edge = self.config.patch_size
        lengths = [max(len(wave), self.min_samples) for wave in waves]
        columns = [(1 + (length - FRAME) // SHIFT) // edge for length in lengths]
        heard = torch.tensor([count * (MEL_BINS // edge) for count in columns], device=device)
        x_BND = self._patch_tokens(fbank_BTM.to(dtype))
        there_BN = torch.arange(x_BND.shape[1], device=device) < heard[:, None]
        return self._transform(x_BND, there_BN), there_BN

    def hear(self, fbank_BTM: torch.Tensor) -> torch.Tensor:
        """Encodes spectrograms as they are: every patch counts, silence that was added included.

        As InternVideo2's second stage does with 998 frames of 64 bins, 62 x 4 patches.

        Args:
            fbank_BTM: Filter banks on which `FBANK_MEAN` and `FBANK_STD` were used already; frames and
                bins that fill no whole patch are not heard.

        Returns:
            Features [B, N, D] in time order, all bands of a moment together.
        """
        x_BND = self._patch_tokens(fbank_BTM)
        return self._transform(x_BND, torch.ones_like(x_BND[..., 0], dtype=torch.bool))

    def _patch_tokens(self, fbank_BTM: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        maps_BDTM = self.patches(fbank_BTM.unsqueeze(1))
        return self.project(self.patch_norm(maps_BDTM.flatten(2).transpose(1, 2)))

    def _transform(self, x_BND: torch.Tensor, there_BN: torch.Tensor) -> torch.Tensor:
        x_BND = x_BND * there_BN[..., None]
        x_BND = self.norm(x_BND + self.position(x_BND))
        padding = torch.zeros(there_BN.shape, dtype=x_BND.dtype, device=x_BND.device)
        padding_B11N = padding.masked_fill(~there_BN, -torch.inf)[:, None, None]
        places = torch.arange(x_BND.shape[1], device=x_BND.device)
        buckets = relative_buckets(
            places[None, :] - places[:, None], self.config.num_buckets, self.config.max_distance
        )
        bias_HNN = self.position_bias(buckets).permute(2, 0, 1)
        for block in self.blocks:
            x_BND = block(x_BND, bias_HNN, padding_B11N)
        return x_BND

    def classify(self, waves: Sequence[np.ndarray]) -> torch.Tensor:
        """Returns the probability of every class [B, num_classes], each for itself.

        Raises:
            ValueError: If this is not a fine-tuned model.
        """
        if self.head is None:
            raise ValueError("this BEATs has no classifier")
        features_BND, there_BN = self(waves)
        logits_BNC = self.head(features_BND) * there_BN[..., None]
        return (logits_BNC.sum(dim=1) / there_BN.sum(dim=1, keepdim=True)).sigmoid()


def relative_buckets(distance: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """Returns the bucket of each distance, as T5's bidirectional position bias counts them.

    Half of the buckets are for each direction; in each, half are exact, the others logarithmic.
    """
    half = num_buckets // 2
    exact = half // 2
    away = distance.abs()
    beyond = torch.log(away.clamp_min(exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (beyond * (half - exact)).long()).clamp_max(half - 1)
    return (distance > 0).long() * half + torch.where(away < exact, away, far)


_OUTSIDE = {
    "patches": "patch_embedding",
    "patch_norm": "layer_norm",
    "project": "post_extract_proj",
    "position": "encoder.pos_conv.0",
    "norm": "encoder.layer_norm",
    "head": "predictor",
}
_POSITION = {"scale": "weight_g", "direction": "weight_v", "bias": "bias"}
_BLOCK = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "attention.gate": "self_attn.grep_linear",
    "attention.gate_scale": "self_attn.grep_a",
    "attention_norm": "self_attn_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
    "norm": "final_layer_norm",
}


def published_keys(name: str, layers: int) -> list[str]:
    """Returns what a parameter of `Beats` is called in a published checkpoint.

    The position bias, one for all layers, is stored once for each.
    """
    first, _, rest = name.partition(".")
    if first == "position_bias":
        return [
            f"encoder.layers.{i}.self_attn.relative_attention_bias.{rest}" for i in range(layers)
        ]
    if first == "blocks":
        layer, _, inner = rest.partition(".")
        part, _, leaf = inner.rpartition(".")
        if inner in _BLOCK:
            return [f"encoder.layers.{layer}.{_BLOCK[inner]}"]
        return [f"encoder.layers.{layer}.{_BLOCK[part]}.{leaf}"]
    if first == "position":
        return [f"{_OUTSIDE[first]}.{_POSITION[rest]}"]
    return [f"{_OUTSIDE[first]}.{rest}"]


_FIELDS = {
    "input_patch_size": "patch_size",
    "embed_dim": "embed_dim",
    "conv_bias": "conv_bias",
    "encoder_embed_dim": "width",
    "encoder_ffn_embed_dim": "mlp_width",
    "encoder_layers": "layers",
    "encoder_attention_heads": "heads",
    "deep_norm": "deep_norm",
    "conv_pos": "conv_pos",
    "conv_pos_groups": "conv_pos_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
}
_REQUIRED = {
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
"""What all published encoders have in common, and this code takes for granted."""


def read_config(cfg: dict[str, Any]) -> BeatsNetworkConfig:
    """Returns the shape that a checkpoint's ``cfg`` describes; what only training needs is passed over.

    Raises:
        ValueError: If it describes a network that this one cannot be.
    """
    other = [
        f"{key} = {cfg.get(key)!r}" for key, value in _REQUIRED.items() if cfg.get(key) != value
    ]
    if other:
        raise ValueError(f"a BEATs of another build: {', '.join(other)}")
    known = {ours: cfg[theirs] for theirs, ours in _FIELDS.items() if theirs in cfg}
    classes = cfg.get("predictor_class", 527) if cfg.get("finetuned_model") else 0
    return BeatsNetworkConfig(**known, num_classes=classes)


def load_beats(path: str | Path) -> Beats:
    """Loads a published checkpoint (``BEATs_iter3_plus_AS2M.pt`` and its like), pre-trained or fine-tuned.

    Returns:
        The encoder in float32 on the CPU, for inference.

    Raises:
        DependencyError: If the file is not there or no BEATs, or a weight is missing, unexpected or
            of another shape; the message names it.
    """
    hint = "a checkpoint of microsoft/unilm's beats, such as BEATs_iter3_plus_AS2M.pt, is needed"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        cfg, weights = checkpoint["cfg"], checkpoint["model"]
        config = read_config(cfg)
    except Exception as error:  # torch raises all kinds for a file it cannot read
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(f"No BEATs checkpoint: {path} ({problem})", hint) from error
    labels = checkpoint.get("label_dict") or {}
    names = [str(labels[key]) for key in sorted(labels, key=int)] if config.num_classes else []
    model = Beats(config, names)
    state, problems = {}, []
    left = dict(weights)
    for name, ours in model.state_dict().items():
        keys = published_keys(name, config.layers)
        found = [left.pop(key) for key in keys if key in left]
        problems += [f"missing {key}" for key in keys if key not in weights]
        problems += [
            f"of another shape {key}: {tuple(weights[key].shape)}, not {tuple(ours.shape)}"
            for key in keys
            if key in weights and weights[key].shape != ours.shape
        ]
        if any(not torch.equal(found[0], copy) for copy in found[1:]):
            problems.append(f"differing copies {keys[0]}")
        if found:
            state[name] = found[0].float()
    problems += [f"unexpected {key}" for key in sorted(left)]
    if names and len(names) != config.num_classes:
        problems.append(f"label_dict with {len(names)} labels for {config.num_classes} classes")
    if problems:
        shown = ", ".join(problems[:_SHOWN_KEYS])
        more = f" and {len(problems) - _SHOWN_KEYS} more" if len(problems) > _SHOWN_KEYS else ""
        raise DependencyError(f"Weights in {path} do not fit BEATs: {shown}{more}", hint)
    model.load_state_dict(state)
    return model.eval()
