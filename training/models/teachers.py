# SPDX-License-Identifier: Apache-2.0
"""Frozen teachers of InternVideo2's first stage, behind two protocols.

A teacher is no module: it is neither saved, sharded nor averaged with what trains, and goes to the
device of the frames it is first given. Everything it gives is without gradient and of unit length.

B clips, T frames, C H W a frame, P patches of a frame of the student, N tokens, L tokens of a text,
K layers of the first teacher, M of the second, D width of a teacher, E of its pooled feature.

Sources: InternVideo2 (arXiv:2403.15377), section 3.1 and its released teachers; InternVL
(arXiv:2312.14238); VideoMAE V2 (arXiv:2303.16727).
"""

import importlib.resources
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataengine.errors import ConfigError, DependencyError
from dataengine.networks.config import IMAGENET_MEAN, IMAGENET_STD, InternVideo2Config
from dataengine.networks.internvideo2 import (
    InternVideo2,
    LayerScale,
    Mlp,
    draw_linears,
    fit_published,
    load_published_vision,
    positions_of,
    published_state,
    resize_positions,
    stretch_positions,
)
from training.config import (
    DistilConfig,
    InternVideo2TeacherConfig,
    InternViTTeacherConfig,
    OpenClipTeacherConfig,
    VideoMAETeacherConfig,
)

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation by which a model's frames are normalised."""

IMAGENET: Pixels = (IMAGENET_MEAN, IMAGENET_STD)


class ClipTargets(NamedTuple):
    """What the first teacher sees in clips; float32, unit length, on the student's grid."""

    middle: tuple[torch.Tensor, ...]
    """K layers in the order of depth, [B, 1 + T * P, D] each, the class token's first."""
    final: torch.Tensor
    """[B, E]."""
    attention: torch.Tensor
    """[B, T, P], how much the teacher looks at each patch; positive, of any sum."""


class ClipTeacher(Protocol):
    """A model whose features are near language's."""

    width: int
    """D."""
    embed_dim: int
    """E."""
    layers: tuple[int, ...]
    """Numbers of the K layers that it gives, from 0, rising."""
    reads: bool
    """Whether it has a text tower."""

    def __call__(self, frames_BTCHW: torch.Tensor) -> ClipTargets:
        """Returns targets of clips whose frames are normalised as the student's."""
        ...

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features of texts, float32 [B, E]; only if it ``reads``."""
        ...


class MaeTeacher(Protocol):
    """A model that has learnt to fill in hidden parts of videos."""

    width: int
    """D."""
    layers: tuple[int, ...]
    """Numbers of the M layers that it gives, from 0, rising."""

    def __call__(self, frames_BTCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns M layers in the order of depth, unit length, float32 [B, N, D] each.

        N is the student's number of patches: each tubelet of frames is one of its frames.
        """
        ...


def build_clip_teacher(config: DistilConfig) -> ClipTeacher:
    """Returns the first teacher with its weights, on the CPU.

    Raises:
        ConfigError: If it lacks the layers that are asked for.
        DependencyError: If its weights are missing or do not fit.
    """
    match config.clip_teacher:
        case OpenClipTeacherConfig() as teacher:
            return OpenClipTeacher(teacher, config)
        case InternViTTeacherConfig() as teacher:
            return InternViTTeacher(teacher, config)
        case InternVideo2TeacherConfig() as teacher:
            return InternVideo2Teacher(teacher, config)


def build_mae_teacher(config: DistilConfig) -> MaeTeacher | None:
    """Returns the second teacher with its weights, on the CPU; None if the recipe names none.

    Raises:
        ConfigError: If its tokens are not the student's, or it lacks layers.
        DependencyError: If its weights are missing or do not fit.
    """
    return VideoMAETeacher(config.mae_teacher, config) if config.mae_teacher else None


class _Frozen:
    """A network in evaluation mode that follows the frames it is given."""

    def __init__(self, network: nn.Module, taught_on: Pixels, config: DistilConfig) -> None:
        self._network = network.eval().requires_grad_(False)
        self._dtype: torch.dtype | None = None
        self._side = config.student.image_size // config.student.patch_size
        given_mean, given_std = given = config.pixel_mean, config.pixel_std
        mean, std = taught_on
        # One scale and shift turns the student's normalisation into the teacher's.
        self._scale = tuple(g / s for g, s in zip(given_std, std, strict=True))
        self._shift = tuple((g - m) / s for g, m, s in zip(given_mean, mean, std, strict=True))
        self._same_pixels = taught_on == given

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Frozen":
        # It never changes: copies of a task, such as a running average, share it.
        return self

    def _follow(self, device: torch.device) -> None:
        """Moves the network to a device, and its matrices to what autocast computes with."""
        if next(self._network.parameters()).device != device:
            self._network.to(device)
        if self._dtype is None and torch.is_autocast_enabled(device.type):
            # What autocast would make of them in every call, at half the memory.
            self._dtype = torch.get_autocast_dtype(device.type)
            for module in self._network.modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                    module.to(self._dtype)

    @contextmanager
    def _running(self, device: torch.device) -> Iterator[None]:
        self._follow(device)
        enabled = self._dtype is not None
        with torch.no_grad(), torch.autocast(device.type, self._dtype, enabled=enabled):
            yield

    def _prepared(self, frames_BTCHW: torch.Tensor, image_size: int) -> torch.Tensor:
        """Returns frames of the teacher's size, normalised as the teacher's."""
        if not self._same_pixels:
            scale_C11, shift_C11 = (
                frames_BTCHW.new_tensor(values)[:, None, None]
                for values in (self._scale, self._shift)
            )
            frames_BTCHW = frames_BTCHW * scale_C11 + shift_C11
        if frames_BTCHW.shape[-1] == image_size:
            return frames_BTCHW
        resized = F.interpolate(
            frames_BTCHW.flatten(0, 1),
            size=(image_size, image_size),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )
        return resized.unflatten(0, frames_BTCHW.shape[:2])


class InternViTTeacher(_Frozen):
    """InternVL-C's image encoder, frame by frame; a clip's class token is the mean over frames.

    It is InternVideo2's encoder for one frame, as InternVideo2's release runs it: with tanh GELU.
    The attention is that of its pooling.
    """

    reads = False

    def __init__(self, config: InternViTTeacherConfig, distil: DistilConfig) -> None:
        shape = InternVideo2Config(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_frames=1,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_width=config.mlp_width,
            pool_heads=config.pool_heads,
            embed_dim=config.embed_dim,
        )
        if config.weights is None:
            encoder = _random_encoder(shape, config.seed)
        else:
            with torch.device("meta"):
                encoder = InternVideo2(shape)
            encoder.load_state_dict(internvit_state(config.weights, encoder), assign=True)
        super().__init__(encoder, IMAGENET, distil)
        self._encoder, self._size = encoder, config.image_size
        self.width, self.embed_dim = config.width, config.embed_dim
        self.layers = _clip_layers(distil, config.layers)

    def __call__(self, frames_BTCHW: torch.Tensor) -> ClipTargets:
        """Returns targets of clips whose frames are normalised as the student's."""
        B, T = frames_BTCHW.shape[:2]
        with self._running(frames_BTCHW.device):
            frames = self._prepared(frames_BTCHW, self._size).flatten(0, 1)[:, None]
            x_XND, middle = self._encoder.tokens(frames, layers=self.layers)
            pooled_XE, attention_XN = self._encoder.clip_projector.with_weights(x_XND)
            return _targets(
                _frames_to_clips(list(middle), B, T),
                pooled_XE.float().unflatten(0, (B, T)).mean(dim=1),
                attention_XN[:, 1:].reshape(B, T, -1),
                self._side,
            )

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Its text tower is not run."""
        raise NotImplementedError


class InternVideo2Teacher(_Frozen):
    """A stage-2 vision encoder: what the S, B and L models learn from."""

    reads = False

    def __init__(self, config: InternVideo2TeacherConfig, distil: DistilConfig) -> None:
        # Its own positions of images are left in the file, as in the release.
        shape = config.vision.model_copy(update={"image_positions": False})
        if shape.num_frames != distil.student.num_frames:
            raise ConfigError(
                f"The teacher sees {shape.num_frames} frames and the student "
                f"{distil.student.num_frames}",
                f"set model.clip_teacher.vision.num_frames={distil.student.num_frames}: the "
                "positions in its file are stretched",
            )
        if config.weights is None:
            encoder = _random_encoder(shape, config.seed)
        else:
            with torch.device("meta"):
                encoder = InternVideo2(shape)
            state = load_published_vision(config.weights, shape, config.weights_num_frames)
            encoder.load_state_dict(state, assign=True)
        super().__init__(encoder, IMAGENET, distil)
        self._encoder, self._size = encoder, shape.image_size
        self.width, self.embed_dim = shape.width, shape.embed_dim
        self.layers = _clip_layers(distil, shape.layers)

    def __call__(self, frames_BTCHW: torch.Tensor) -> ClipTargets:
        """Returns targets of clips whose frames are normalised as the student's."""
        T = frames_BTCHW.shape[1]
        with self._running(frames_BTCHW.device):
            frames = self._prepared(frames_BTCHW, self._size)
            x_BND, middle = self._encoder.tokens(frames, layers=self.layers)
            pooled_BE, attention_BN = self._encoder.clip_projector.with_weights(x_BND)
            attention_BTP = attention_BN[:, 1:].unflatten(1, (T, -1))
            return _targets(list(middle), pooled_BE, attention_BTP, self._side)

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Its text tower is not run."""
        raise NotImplementedError


class OpenClipTeacher(_Frozen):
    """An open_clip ViT, frame by frame, with its text tower.

    The attention is that of the class token in the last block, a mean over heads, as UMT takes it of
    CLIP (arXiv:2303.16058, section 3.2). A clip's feature is the mean of its frames' unit vectors.
    """

    reads = True

    def __init__(self, config: OpenClipTeacherConfig, distil: DistilConfig) -> None:
        clip = _open_clip(config.weights)
        visual = clip.visual
        if not hasattr(visual, "forward_intermediates") or not hasattr(visual, "conv1"):
            raise ConfigError(
                "The image tower of model.clip_teacher.weights is not a plain ViT of open_clip",
                "name a ViT",
            )
        if clip.context_length != config.context_length:
            raise ConfigError(
                f"The teacher's text tower reads {clip.context_length} tokens, not "
                f"{config.context_length}",
                f"set model.clip_teacher.context_length={clip.context_length}",
            )
        pixels = visual.preprocess_cfg
        super().__init__(clip, (tuple(pixels["mean"]), tuple(pixels["std"])), distil)
        self._clip, self._last = clip, visual.transformer.resblocks[-1]
        self._size = visual.image_size[0]
        self.width = visual.conv1.out_channels
        self.embed_dim = clip.text_projection.shape[1]
        self.layers = _clip_layers(distil, len(visual.transformer.resblocks))

    def __call__(self, frames_BTCHW: torch.Tensor) -> ClipTargets:
        """Returns targets of clips whose frames are normalised as the student's."""
        B, T = frames_BTCHW.shape[:2]
        normed: list[torch.Tensor] = []
        with self._running(frames_BTCHW.device):
            frames_XCHW = self._prepared(frames_BTCHW, self._size).flatten(0, 1)
            # What the last block's attention is given, of which open_clip returns no weights.
            hook = self._last.ln_1.register_forward_hook(lambda _, __, out: normed.append(out))
            seen = self._clip.visual.forward_intermediates(
                frames_XCHW, list(self.layers), output_fmt="NLC", output_extra_tokens=True
            )
            hook.remove()
            x_XND = normed[0]
            _, attention_X1N = self._last.attn(x_XND[:, :1], x_XND, x_XND, need_weights=True)
            middle = [
                torch.cat([cls_X1D, patches_XPD], dim=1)
                for cls_X1D, patches_XPD in zip(
                    seen["image_intermediates_prefix"], seen["image_intermediates"], strict=True
                )
            ]
            frame_XE = F.normalize(seen["image_features"].float(), dim=-1)
            return _targets(
                _frames_to_clips(middle, B, T),
                frame_XE.unflatten(0, (B, T)).mean(dim=1),
                attention_X1N[:, 0, 1:].reshape(B, T, -1),
                self._side,
            )

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns unit-length features of texts, float32 [B, E]."""
        with self._running(tokens_BL.device):
            return F.normalize(self._clip.encode_text(tokens_BL).float(), dim=-1)


class VideoMAETeacher(_Frozen):
    """VideoMAE V2's encoder without a mask; its final norm is taken of the last layer alone."""

    def __init__(self, config: VideoMAETeacherConfig, distil: DistilConfig) -> None:
        student, side = distil.student, config.image_size // config.patch_size
        wanted = student.num_frames * config.tubelet_size
        grid = student.image_size // student.patch_size
        if (config.num_frames, side) != (wanted, grid):
            raise ConfigError(
                f"The second teacher sees {config.num_frames} frames of {side} x {side} patches; for "
                f"the student's tokens it must be {wanted} of {grid} x {grid}",
                f"set model.mae_teacher.num_frames={wanted} and its sizes accordingly",
            )
        if config.weights is None:
            with _seeded(config.seed):
                encoder = VideoMAEEncoder(config)
        else:
            with torch.device("meta"):
                encoder = VideoMAEEncoder(config)
            encoder.load_state_dict(videomae_state(config.weights, encoder), assign=True)
        super().__init__(encoder, IMAGENET, distil)
        self._encoder, self._config = encoder, config
        self.width = config.width
        self.layers = _last(distil.num_mae_layers, config.layers, "num_mae_layers")

    def __call__(self, frames_BTCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns M layers, unit length, float32 [B, N, D] each; an image is a still tubelet."""
        if frames_BTCHW.shape[1] == 1:
            frames_BTCHW = frames_BTCHW.expand(-1, self._config.tubelet_size, -1, -1, -1)
        with self._running(frames_BTCHW.device):
            frames = self._prepared(frames_BTCHW, self._config.image_size)
            middle = self._encoder(frames, self.layers)
            return tuple(_unit_(layer_BND) for layer_BND in middle)


class VideoMAEEncoder(nn.Module):
    """A ViT over tubelets of frames, with fixed positions; parameters named as published.

    Attention is over tokens, as the weights were trained. (InternVideo2's released teacher hands its
    attention kernel heads in the place of tokens.)
    """

    def __init__(self, config: VideoMAETeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _Tubelets(config)
        self.blocks = nn.ModuleList(_MaeBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.positions: torch.Tensor
        self.register_buffer("positions", _mae_positions(config), persistent=False)
        draw_linears(self)

    def forward(
        self, frames_BTCHW: torch.Tensor, layers: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        """Returns outputs of some blocks, [B, N, D] each; tokens run tubelet after tubelet.

        Args:
            frames_BTCHW: As many frames as the config says, or one tubelet.
            layers: Numbers of the blocks; the last one's is normalised.
        """
        x_BDThw = self.patch_embed(frames_BTCHW)
        num_tubelets = self.config.num_frames // self.config.tubelet_size
        positions_1ND = positions_of(self.positions, x_BDThw.shape[2], num_tubelets)
        x_BND = x_BDThw.flatten(2).transpose(1, 2) + positions_1ND
        middle: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            x_BND = block(x_BND)
            if index in layers:
                last = index == len(self.blocks) - 1
                middle.append(self.norm(x_BND) if last else x_BND)
        return tuple(middle)


class _Tubelets(nn.Module):
    """Frames -> one vector for each patch of each tubelet."""

    def __init__(self, config: VideoMAETeacherConfig) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, kernel, kernel)

    def forward(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns [B, D, T, h, w]."""
        return self.proj(frames_BTCHW.transpose(1, 2))


class _MaeBlock(nn.Module):
    """Attention and MLP, each behind a layer norm and a residual."""

    def __init__(self, config: VideoMAETeacherConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = _MaeAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_width, gelu="none")

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class _MaeAttention(nn.Module):
    """Self-attention whose queries and values have a bias and whose keys have none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        B, N, D = x_BND.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BND, self.qkv.weight, bias).view(B, N, 3, self.heads, D // self.heads)
        q_BHNK, k_BHNK, v_BHNK = qkv.permute(2, 0, 3, 1, 4)
        mixed_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(mixed_BHNK.transpose(1, 2).reshape(B, N, D))


_INTERNVL_REST = re.compile(r"transformer\.|text_projection$|logit_scale$")
"""InternVL-C's text side, which lies in the same file."""

_NOTHING = re.compile(r"(?!)")

_VIDEOMAE_REST = re.compile(r"decoder\.|encoder_to_decoder\.|mask_token$")
"""What VideoMAE fills hidden parts in with."""


def internvit_state(weights: str | Path, network: InternVideo2) -> dict[str, torch.Tensor]:
    """Returns the image encoder of ``internvl_c_13b_224px.pth`` for InternVideo2's encoder.

    Raises:
        DependencyError: Naming what is missing, of another shape or not known.
    """
    state = published_state(weights)
    name = "patch_embed.proj.weight"
    if name in state and state[name].ndim == 4:
        state[name] = state[name][:, :, None]  # a kernel of one frame
    state = stretch_positions(state, network.config, 1)
    return fit_published(state, network.state_dict(), _INTERNVL_REST)


def videomae_state(weights: str | Path, network: VideoMAEEncoder) -> dict[str, torch.Tensor]:
    """Returns the encoder of a VideoMAE V2 pre-training checkpoint.

    Raises:
        DependencyError: Naming what is missing, of another shape or not known.
    """
    name, prefix = "patch_embed.proj.weight", "encoder."
    state = {k.removeprefix(prefix): v for k, v in published_state(weights).items() if k.startswith(prefix) or not _VIDEOMAE_REST.match(k)}  # fmt: skip
    if name in state and network.config.tubelet_size == 1:
        state[name] = state[name].mean(dim=2, keepdim=True)  # as released
    return fit_published(state, network.state_dict(), _NOTHING)


def _clip_layers(config: DistilConfig, depth: int) -> tuple[int, ...]:
    """Returns the first teacher's layers that are learnt.

    Raises:
        ConfigError: If it has no such layers.
    """
    layers = config.clip_layers
    if not layers:
        return _last(config.num_clip_layers, depth, "num_clip_layers")
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise ConfigError(
            f"model.clip_layers {list(layers)} must rise from 0 at least to {depth - 1} at most",
            f"the first teacher has {depth} layers",
        )
    return layers


def _last(wanted: int, depth: int, field: str) -> tuple[int, ...]:
    if wanted > depth:
        raise ConfigError(
            f"model.{field} is {wanted}, and the teacher has {depth} layers", "lower it"
        )
    return tuple(range(depth - wanted, depth))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws weights from a seed, and leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _random_encoder(shape: InternVideo2Config, seed: int) -> InternVideo2:
    """Returns an encoder of random weights whose layers differ; InternViT's scales start at 0.1."""
    with _seeded(seed):
        encoder = InternVideo2(shape)
    for module in encoder.modules():
        if isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, 0.1)
    return encoder


def _open_clip(weights: str) -> Any:
    """Returns an open_clip model from a folder; nothing names the shipped one.

    Raises:
        DependencyError: If it cannot be loaded.
    """
    import open_clip

    folder = weights or str(importlib.resources.files("dataengine") / "models" / "tiny_clip")
    try:
        # It draws weights before it loads them.
        with torch.random.fork_rng(devices=[]):
            return open_clip.create_model(
                f"local-dir:{folder.removeprefix('local-dir:')}", require_pretrained=True
            )
    except Exception as error:  # open_clip, torch and safetensors raise all kinds
        problem = " ".join(str(error).split())[:300]
        raise DependencyError(
            f"The teacher cannot be loaded: {folder} ({problem})",
            "name a folder with open_clip_config.json and its weights",
        ) from error


def _mae_positions(config: VideoMAETeacherConfig) -> torch.Tensor:
    """Returns VideoMAE's fixed positions, float32 [1, N, D].

    Sines and cosines of a patch's number, in turns, for 8 tubelets of 224 x 224 pixels, and for other
    clips stretched from these, as in the released teacher.
    """
    side, num_tubelets = 224 // config.patch_size, 8
    number_N = np.arange(num_tubelets * side * side, dtype=np.float64)
    frequency_D = 10000.0 ** (-2 * (np.arange(config.width) // 2) / config.width)
    table_ND = number_N[:, None] * frequency_D
    table_ND[:, 0::2], table_ND[:, 1::2] = np.sin(table_ND[:, 0::2]), np.cos(table_ND[:, 1::2])
    table_1ND = F.pad(torch.from_numpy(table_ND.astype(np.float32)), (0, 0, 1, 0))[None]
    return resize_positions(
        table_1ND,
        config.num_frames // config.tubelet_size,
        num_tubelets,
        config.image_size // config.patch_size,
    )[:, 1:]


def _frames_to_clips(
    middle: list[torch.Tensor], num_clips: int, num_frames: int
) -> list[torch.Tensor]:
    """Returns the tokens of frames as those of clips; class tokens are averaged.

    Layers of a large teacher are gigabytes: each is let go of as soon as the next form of it is there.

    Args:
        middle: Layers, [B * T, 1 + P, D] each; the list is changed.
        num_clips: B.
        num_frames: T.

    Returns:
        The list, of [B, 1 + T * P, D] each.
    """
    for index, layer_XND in enumerate(middle):
        layer_BTND = layer_XND.unflatten(0, (num_clips, num_frames))
        cls_B1D = layer_BTND[:, :, 0].mean(dim=1, keepdim=True)
        middle[index] = torch.cat([cls_B1D, layer_BTND[:, :, 1:].flatten(1, 2)], dim=1)
    return middle


def _targets(
    middle: list[torch.Tensor],
    final_BE: torch.Tensor,
    attention_BTP: torch.Tensor,
    side: int,
) -> ClipTargets:
    """Returns features of unit length, and all on the student's grid of ``side`` x ``side``.

    Layers in the list are changed in place.
    """
    T, P = attention_BTP.shape[1:]
    if side * side != P:
        for index, layer_BND in enumerate(middle):
            middle[index] = _regridded(layer_BND, T, math.isqrt(P), side)
        grid_BThw = attention_BTP.float().unflatten(2, (math.isqrt(P), -1))
        resized = F.interpolate(grid_BThw, (side, side), mode="bilinear", align_corners=False)
        attention_BTP = resized.flatten(2)
    return ClipTargets(
        tuple(_unit_(layer_BND) for layer_BND in middle),
        F.normalize(final_BE.float(), dim=-1),
        attention_BTP.float(),
    )


def _unit_(x_BND: torch.Tensor) -> torch.Tensor:
    """Returns float32 unit vectors; float32 ones are changed in place, for there are gigabytes of them."""
    x_BND = x_BND.float()
    return x_BND.div_(x_BND.norm(dim=-1, keepdim=True).clamp_(min=1e-12))


def _regridded(x_BND: torch.Tensor, num_frames: int, old_side: int, side: int) -> torch.Tensor:
    """Returns tokens whose patches are interpolated to another grid, [B, 1 + T * P, D]."""
    patches_BTPD = x_BND[:, 1:].float().unflatten(1, (num_frames, -1))
    maps_XDhw = patches_BTPD.flatten(0, 1).transpose(1, 2).unflatten(2, (old_side, old_side))
    maps_XDhw = F.interpolate(maps_XDhw, (side, side), mode="bilinear", align_corners=False)
    patches_BND = maps_XDhw.flatten(2).transpose(1, 2).reshape(len(x_BND), -1, x_BND.shape[2])
    return torch.cat([x_BND[:, :1].float(), patches_BND], dim=1)
