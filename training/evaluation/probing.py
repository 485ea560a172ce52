# SPDX-License-Identifier: Apache-2.0
"""A frozen video encoder and a small classifier on top: what is in the features already.

``linear`` reads the pooled feature, ``attentive`` pools the tokens anew.

N clips, V views, B clips of a step, T frames, L tokens, D width, E embedding, K classes.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import ConfigError
from dataengine.networks.config import InternVideo2Config
from dataengine.networks.internvideo2 import AttentionPooling
from training.evaluation.classification import Classification, score_classes

if TYPE_CHECKING:
    from dataengine.networks.internvideo2 import InternVideo2
    from dataengine.networks.viclip import VideoTower

logger = logging.getLogger(__name__)

ProbeKind = Literal["linear", "attentive"]


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is trained; the defaults are the published linear probe's.

    Source: released scripts of InternVideo2 (AdamW, betas 0.9 and 0.999, no weight decay, cosine).
    """

    kind: ProbeKind = "linear"
    epochs: int = 15
    warmup_epochs: float = 3
    lr: float = 1e-3
    """Per 256 clips of a step: twice the batch has twice the rate."""
    min_lr: float = 1e-6
    """At the end, per 256 clips too."""
    batch_size: int = 256
    weight_decay: float = 0.0
    seed: int = 0


DEFAULTS = {
    "linear": ProbeConfig(),
    "attentive": ProbeConfig(kind="attentive", epochs=25, warmup_epochs=5, lr=2e-4, min_lr=0.0),
}

Features = Callable[[torch.Tensor], torch.Tensor]
"""Frames [B, T, C, H, W] -> what the probe reads: [B, E] or [B, L, D], float32."""

TrainBatches = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]
"""Epoch -> batches of features and labels, int64 [B], in an order of its own."""


def frozen_features(network: nn.Module, kind: ProbeKind) -> Features:
    """Returns how features are read off a network, which is left untouched.

    Args:
        network: One of `dataengine.networks`, or the trainer's open_clip model.
        kind: ``linear`` gives the pooled feature, as it is before any normalisation, ``attentive`` all
            tokens of all frames behind the last block.

    Raises:
        ConfigError: If it is none of them.
    """
    # Imported late: each needs only its own family.
    from dataengine.networks.internvideo2 import InternVideo2
    from dataengine.networks.viclip import ViCLIP

    match network:
        case InternVideo2():
            return lambda frames: _internvideo2_features(network, frames, kind)
        case ViCLIP() if kind == "linear":
            return lambda frames: network.vision_encoder(frames).float()
        case ViCLIP():
            return lambda frames: _viclip_tokens(network.vision_encoder, frames)
        case nn.Module(vision_encoder=InternVideo2()):
            # Stage 2 and InternVideo2-CLIP: their encoder, without what projects it.
            return frozen_features(cast(nn.Module, network.vision_encoder), kind)
        case nn.Module(clip=nn.Module(visual=nn.Module())):
            return _open_clip_features(network, kind)
    raise ConfigError(f"A {type(network).__name__} has no features that can be probed")


def _internvideo2_features(
    network: "InternVideo2", frames_BTCHW: torch.Tensor, kind: ProbeKind
) -> torch.Tensor:
    """Returns features of a vision encoder; of a student in its first stage, too."""
    # Stage 1's clips have the frames of the second teacher, of which the student sees each other one.
    stride = max(1, frames_BTCHW.shape[1] // network.config.num_frames)
    encoded = network.encode(frames_BTCHW[:, ::stride])
    return (encoded.pooled if kind == "linear" else encoded.tokens).float()


def _viclip_tokens(tower: "VideoTower", frames_BTCHW: torch.Tensor) -> torch.Tensor:
    """Returns all tokens, normed like the one that is projected, [B, L, D]; the class token is first."""
    caught: list[torch.Tensor] = []
    hook = tower.transformer.register_forward_hook(lambda *call: caught.append(call[2]))
    try:
        tower(frames_BTCHW)
    finally:
        hook.remove()
    return tower.ln_post(caught[0]).float()


def _open_clip_features(network: nn.Module, kind: ProbeKind) -> Features:
    """Returns features of every frame: their mean, or all their patches' tokens."""
    visual: Any = network.clip.visual  # pyright: ignore[reportAttributeAccessIssue]  open_clip's

    def pooled(frames_BTCHW: torch.Tensor) -> torch.Tensor:
        features_E = visual(frames_BTCHW.flatten(0, 1)).float()
        return features_E.unflatten(0, frames_BTCHW.shape[:2]).mean(dim=1)

    def tokens(frames_BTCHW: torch.Tensor) -> torch.Tensor:
        found = visual.forward_intermediates(
            frames_BTCHW.flatten(0, 1),
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        patches_FPD = found["image_intermediates"][-1].float()
        return patches_FPD.unflatten(0, frames_BTCHW.shape[:2]).flatten(1, 2)

    return pooled if kind == "linear" else tokens


class LinearProbe(nn.Module):
    """A norm and a linear layer, which starts near zero."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.head.weight.data.mul_(0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, pooled_BE: torch.Tensor) -> torch.Tensor:
        """Returns scores [B, K]."""
        return self.head(self.fc_norm(pooled_BE))


class AttentiveProbe(nn.Module):
    """InternVideo2's attention pooling, an MLP beside it that starts as nothing, and a linear probe.

    Source: ``internvideo2_ap`` of the released code.
    """

    def __init__(self, width: int, num_classes: int, embed_dim: int = 768) -> None:
        super().__init__()
        heads = max(heads for heads in range(1, 17) if width % heads == 0)
        shape = InternVideo2Config(
            width=width, layers=1, heads=heads, mlp_width=width, pool_heads=heads,
            embed_dim=embed_dim,
        )  # fmt: skip
        self.pool = AttentionPooling(shape)
        for module in self.pool.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        self.probe = LinearProbe(embed_dim, num_classes)

    def forward(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """Returns scores [B, K]."""
        pooled_BE = self.pool(tokens_BLD)
        return self.probe(pooled_BE + self.fc2(F.gelu(self.fc1(self.mlp_norm(pooled_BE)))))


def build_probe(kind: ProbeKind, width: int, num_classes: int) -> nn.Module:
    """Returns a fresh probe; torch's default generator draws its weights."""
    if kind == "linear":
        return LinearProbe(width, num_classes)
    return AttentiveProbe(width, num_classes)


def cached_batches(
    features_N: torch.Tensor, label_N: torch.Tensor, batch_size: int, seed: int
) -> TrainBatches:
    """Returns batches of features in memory, in another order each epoch."""

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for part in torch.randperm(len(label_N), generator=generator).split(batch_size):
            yield features_N[part], label_N[part]

    return batches


def train_probe(
    probe: nn.Module,
    batches: TrainBatches,
    num_clips: int,
    config: ProbeConfig,
    device: torch.device,
) -> float:
    """Trains a probe; returns the mean loss of the last epoch.

    Args:
        probe: Trained in place, on the device.
        batches: What is read in an epoch.
        num_clips: Clips of an epoch.
        config: How long and how fast.
        device: Where the probe is.
    """
    steps_per_epoch = math.ceil(num_clips / config.batch_size)
    scale = min(config.batch_size, num_clips) / 256
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=config.lr * scale, weight_decay=config.weight_decay
    )
    step, losses = 0, [math.nan]
    for epoch in range(config.epochs):
        losses = []
        for features, label_B in batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = scale * _rate(step / steps_per_epoch, config)
            scores_BK = probe(features.to(device))
            loss = F.cross_entropy(scores_BK, label_B.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        logger.info("probe  epoch %d of %d  loss %.3f", epoch + 1, config.epochs, _mean(losses))
    return _mean(losses)


def _rate(epoch: float, config: ProbeConfig) -> float:
    """Returns the learning rate at a point of training, before it is scaled by the batch."""
    if epoch < config.warmup_epochs:
        return config.lr * (epoch + 1e-3) / config.warmup_epochs
    share = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


@torch.inference_mode()
def measure_probe(
    probe: nn.Module,
    parts: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
) -> Classification:
    """Returns how often the probe is right, by the mean of its probabilities over a clip's views.

    Args:
        probe: On the device.
        parts: Features [B, V, ...] and labels, int64 [B].
        device: Where the probe is.
    """
    scores, labels = [], []
    for features_BV, label_B in parts:
        B, V = features_BV.shape[:2]
        scores_BK = probe(features_BV.flatten(0, 1).to(device)).softmax(dim=-1)
        scores.append(scores_BK.view(B, V, -1).mean(dim=1).cpu())
        labels.append(label_B)
    return score_classes(torch.cat(scores), torch.cat(labels))
