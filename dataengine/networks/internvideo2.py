# SPDX-License-Identifier: Apache-2.0
"""InternVideo2's vision encoder: a ViT over all patches of all frames, pooled by attention.

State-dict keys and shapes are those of the published checkpoints, so that they load as they are.

B clips, T frames, P patches of a frame, N = 1 + T * P tokens, V visible patches of a clip, D width,
H heads, K width of a head, E embedding.

Source: InternVideo2 (Wang et al. 2024, arXiv:2403.15377), section 3, and the released code's shapes.
"""

import argparse
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dataengine.errors import DependencyError
from dataengine.networks.config import InternVideo2Config
from dataengine.networks.transformer import DropPath

SIZES = {
    "S": InternVideo2Config(width=384, layers=12, heads=6, mlp_width=1536),
    "B": InternVideo2Config(width=768, layers=12, heads=12, mlp_width=3072),
    "L": InternVideo2Config(width=1024, layers=24, heads=16, mlp_width=4096),
    "1B": InternVideo2Config(width=1408, layers=40, heads=16, mlp_width=6144),
    "6B": InternVideo2Config(width=3200, layers=48, heads=25, mlp_width=12800),
}
"""The published sizes, with 14-pixel patches, 224 pixels and 8 frames."""


class RMSNorm(nn.Module):
    """Root mean square norm with a weight, computed in float32 whatever comes in; eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tokens in their own dtype."""
        # The fused kernel wants one dtype, and computes in float32 inside.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


class LayerScale(nn.Module):
    """A learnt factor per channel, small at first (1e-5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the scaled tokens; the product is taken in float32, as published."""
        # A float32 gamma makes the product float32 without a copy of the tokens.
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised over all heads together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width)
        self.k_norm = RMSNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        B, N, D = x_BND.shape
        q_BND, k_BND, v_BND = self.qkv(x_BND).chunk(3, dim=-1)
        q_BHNK, k_BHNK, v_BHNK = (
            part.view(B, N, self.heads, D // self.heads).transpose(1, 2)
            for part in (self.q_norm(q_BND), self.k_norm(k_BND), v_BND)
        )
        mixed_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(mixed_BHNK.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers around a GELU.

    The published weights were trained with the tanh approximation (the fused kernel's default),
    although the plain code path of the release computes the exact one.
    """

    def __init__(self, width: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=gelu)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what came in, transformed token by token."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm, scaled, and added."""

    def __init__(self, config: InternVideo2Config, drop_path: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = LayerScale(config.width)
        self.norm2 = RMSNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_width, config.gelu)
        self.ls2 = LayerScale(config.width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        x_BND = x_BND + self.drop_path(self.ls1(self.attn(self.norm1(x_BND))))
        return x_BND + self.drop_path(self.ls2(self.mlp(self.norm2(x_BND))))


class CrossAttention(nn.Module):
    """Attention of a query to tokens; the biases of q, k and v are parameters of their own."""

    def __init__(self, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, embed_dim)

    def forward(
        self, q_B1D: torch.Tensor, k_BND: torch.Tensor, v_BND: torch.Tensor
    ) -> torch.Tensor:
        """Returns [B, 1, E]."""
        q_BH1K, k_BHNK, v_BHNK = self._projected(q_B1D, k_BND, v_BND)
        return self._merged(F.scaled_dot_product_attention(q_BH1K, k_BHNK, v_BHNK))

    def with_weights(
        self, q_B1D: torch.Tensor, k_BND: torch.Tensor, v_BND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns [B, 1, E], and the attention weights, a mean over heads, float32 [B, N]."""
        q_BH1K, k_BHNK, v_BHNK = self._projected(q_B1D, k_BND, v_BND)
        scores_BH1N = q_BH1K * q_BH1K.shape[-1] ** -0.5 @ k_BHNK.transpose(2, 3)
        weights_BH1N = scores_BH1N.float().softmax(dim=-1)
        mixed_BH1K = weights_BH1N.to(v_BHNK.dtype) @ v_BHNK
        return self._merged(mixed_BH1K), weights_BH1N.mean(dim=1)[:, 0]

    def _projected(
        self, q_B1D: torch.Tensor, k_BND: torch.Tensor, v_BND: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """Returns queries, keys and values by head, each [B, H, N, K]."""
        B, _, D = k_BND.shape
        return [
            F.linear(x, linear.weight, bias)
            .view(B, -1, self.heads, D // self.heads)
            .transpose(1, 2)
            for x, linear, bias in (
                (q_B1D, self.q, self.q_bias),
                (k_BND, self.k, self.k_bias),
                (v_BND, self.v, self.v_bias),
            )
        ]

    def _merged(self, mixed_BH1K: torch.Tensor) -> torch.Tensor:
        return self.proj(mixed_BH1K.transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """The mean of all tokens asks all tokens: one feature for the clip."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.norm1_q = nn.LayerNorm(config.width)
        self.norm1_k = nn.LayerNorm(config.width)
        self.norm1_v = nn.LayerNorm(config.width)
        self.cross_attn = CrossAttention(config.width, config.pool_heads, config.embed_dim)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, E]."""
        q_B1D = self.norm1_q(x_BND.mean(dim=1, keepdim=True))
        return self.cross_attn(q_B1D, self.norm1_k(x_BND), self.norm1_v(x_BND))[:, 0]

    def with_weights(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns [B, E] and how much each token was attended to, float32 [B, N], rows of sum 1."""
        q_B1D = self.norm1_q(x_BND.mean(dim=1, keepdim=True))
        pooled_B1E, weights_BN = self.cross_attn.with_weights(
            q_B1D, self.norm1_k(x_BND), self.norm1_v(x_BND)
        )
        return pooled_B1E[:, 0], weights_BN


class PatchEmbedding(nn.Module):
    """Frames -> patch tokens; a kernel of one frame, so that time enters by position alone."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        kernel = (1, patch_size, patch_size)
        self.proj = nn.Conv3d(3, width, kernel, kernel)

    def forward(
        self, frames_BTCHW: torch.Tensor, visible_BV: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns [B, T * P, D], frame after frame, or the visible ones alone, [B, V, D]."""
        B, T, C, H, W = frames_BTCHW.shape
        p = self.proj.kernel_size[-1]
        # Patches do not overlap: the convolution is a matrix product of those that are wanted.
        pixels = frames_BTCHW.view(B, T, C, H // p, p, W // p, p).permute(0, 1, 3, 5, 2, 4, 6)
        pixels_BNX = pixels.reshape(B, T * (H // p) * (W // p), C * p * p)
        if visible_BV is not None:
            pixels_BNX = take(pixels_BNX, visible_BV)
        return F.linear(pixels_BNX, self.proj.weight.flatten(1), self.proj.bias)


class Encoded(NamedTuple):
    """What `InternVideo2.encode` gives; nothing is normalised."""

    tokens: torch.Tensor
    """[B, N, D], the last block's output; 1 + V tokens if patches were hidden."""
    pooled: torch.Tensor
    """[B, E], the clip's feature."""
    middle: tuple[torch.Tensor, ...]
    """Outputs of the blocks that were asked for, each like ``tokens``, in the order of depth."""


class InternVideo2(nn.Module):
    """The vision encoder without the heads of its training stages."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.config = config
        width, num_patches = config.width, (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbedding(width, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        shape = 1, 1 + config.num_frames * num_patches, width
        self.pos_embed = nn.Parameter(torch.empty(shape))
        if config.image_positions:
            self.img_pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, width))
        rates = [config.drop_path * i / max(config.layers - 1, 1) for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.clip_projector = AttentionPooling(config)
        self._initialise()

    def forward(
        self, frames_BTCHW: torch.Tensor, visible_BV: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all tokens [B, N, D] and the clip's feature [B, E], neither normalised.

        Args:
            frames_BTCHW: As many frames as the config says, or one: an image.
            visible_BV: int64 numbers of the patches that are seen, counted frame after frame, the
                same number for each clip; None sees all. The class token is always seen.
        """
        encoded = self.encode(frames_BTCHW, visible_BV)
        return encoded.tokens, encoded.pooled

    def encode(
        self,
        frames_BTCHW: torch.Tensor,
        visible_BV: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """Returns what `forward` does and outputs of blocks.

        Args:
            frames_BTCHW: As many frames as the config says, or one: an image.
            visible_BV: As for `forward`.
            layers: Numbers of the blocks whose outputs, residual stream and all, are returned.
        """
        x_BND, middle = self.tokens(frames_BTCHW, visible_BV, layers)
        return Encoded(x_BND, self.clip_projector(x_BND), middle)

    def tokens(
        self,
        frames_BTCHW: torch.Tensor,
        visible_BV: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns what `encode` does without the pooled feature."""
        B, T = frames_BTCHW.shape[:2]
        x_BVD = self.patch_embed(frames_BTCHW, visible_BV)
        positions_1ND = self._positions(T)
        cls_11D = self.cls_token + positions_1ND[:, :1]
        if visible_BV is None:
            x_BVD = x_BVD + positions_1ND[:, 1:]
        else:
            x_BVD = x_BVD + positions_1ND[0, 1:][visible_BV]
        x_BND = torch.cat([cls_11D.expand(B, -1, -1).to(x_BVD.dtype), x_BVD], dim=1)
        middle: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            if self.config.checkpoint_activations and self.training:
                x_BND = checkpoint(block, x_BND, use_reentrant=False)
            else:
                x_BND = block(x_BND)
            if index in layers:
                middle.append(x_BND)  # pyright: ignore[reportArgumentType]  checkpoint returns what the block returns
        return x_BND, tuple(middle)  # pyright: ignore[reportReturnType]

    def _positions(self, num_frames: int) -> torch.Tensor:
        """Returns position embeddings, [1, N, D]; an image has its own, else the mean over time."""
        if num_frames == 1 and self.config.image_positions:
            return self.img_pos_embed
        cls_11D, patches_1LD = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches_1LD = positions_of(patches_1LD, num_frames, self.config.num_frames)
        return torch.cat([cls_11D, patches_1LD], dim=1)

    def _initialise(self) -> None:
        """Draws weights as published: normal of 0.02, deeper residual branches smaller."""
        draw_linears(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data.div_(math.sqrt(2 * (index + 1)))
        side = self.config.image_size // self.config.patch_size
        for name, num_frames in (("pos_embed", self.config.num_frames), ("img_pos_embed", 1)):
            if hasattr(self, name):
                table = sinusoids(self.config.width, side, num_frames)
                getattr(self, name).data.copy_(table)


class InternVideo2Classifier(InternVideo2):
    """The encoder with a norm and a linear layer over classes: what is fine-tuned and probed."""

    def __init__(self, config: InternVideo2Config, num_classes: int) -> None:
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, num_classes)
        # Almost 0 at first, as published: all classes are equally likely.
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.head.weight.data.mul_(0.001)
        nn.init.zeros_(self.head.bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  classes instead of features
        self, frames_BTCHW: torch.Tensor
    ) -> torch.Tensor:
        """Returns logits, [B, classes]."""
        return self.head(self.fc_norm(self.encode(frames_BTCHW).pooled))


def draw_linears(module: nn.Module) -> None:
    """Draws all linear layers inside as published: normal of 0.02, cut at 2; biases are 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def take(x_BND: torch.Tensor, visible_BV: torch.Tensor) -> torch.Tensor:
    """Returns some tokens of each clip, [B, V, D]."""
    return x_BND.gather(1, visible_BV[..., None].expand(-1, -1, x_BND.shape[2]))


def positions_of(patches_1LD: torch.Tensor, num_frames: int, expected: int) -> torch.Tensor:
    """Returns the positions of a clip's patches; those of an image are the mean over time.

    Args:
        patches_1LD: Of ``expected`` frames, without the class token's.
        num_frames: Frames at hand.
        expected: Frames of the table.

    Raises:
        ValueError: If there are neither as many frames as expected nor one.
    """
    if num_frames == expected:
        return patches_1LD
    if num_frames != 1:
        raise ValueError(f"{num_frames} frames given, {expected} expected")
    return patches_1LD.unflatten(1, (expected, -1)).mean(dim=1)


def sinusoids(width: int, side: int, num_frames: int) -> torch.Tensor:
    """Returns 3-D sine-cosine positions, float32 [1, 1 + T * P, D]; that of the class token is zero.

    A quarter of the channels tells the frame, three eighths each the column and the row.
    """
    time, space = width // 4, width // 4 * 3
    time_TD = _sinusoids_1d(time, torch.arange(num_frames))
    column_PD = _sinusoids_1d(space // 2, torch.arange(side).repeat(side))
    row_PD = _sinusoids_1d(space // 2, torch.arange(side).repeat_interleave(side))
    space_PD = torch.cat([column_PD, row_PD], dim=1)
    table_TPD = torch.cat(
        [
            time_TD[:, None].expand(-1, side * side, -1),
            space_PD[None].expand(num_frames, -1, -1),
        ],
        dim=2,
    )
    return F.pad(table_TPD.flatten(0, 1), (0, 0, 1, 0))[None]


def _sinusoids_1d(width: int, positions_N: torch.Tensor) -> torch.Tensor:
    """Returns [N, width]: sines, then cosines, of falling frequencies."""
    frequency_F = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle_NF = positions_N.double()[:, None] * frequency_F
    return torch.cat([angle_NF.sin(), angle_NF.cos()], dim=1).float()


def resize_positions(
    table: torch.Tensor, num_frames: int, old_num_frames: int, side: int
) -> torch.Tensor:
    """Returns a checkpoint's position embeddings for another number of frames and another grid.

    Linear in time, bicubic in space, the class token's kept: as published.

    Args:
        table: [1, 1 + old T * old P, D].
        num_frames: T wanted.
        old_num_frames: T of the table: 8 after stage 1, 4 after stage 2.
        side: Patches in a row wanted.

    Raises:
        ValueError: If the table does not hold so many frames of a square.
    """
    cls_11D, patches_1LD = table[:, :1], table[:, 1:]
    old_side = math.isqrt(patches_1LD.shape[1] // old_num_frames)
    if old_num_frames * old_side * old_side != patches_1LD.shape[1]:
        raise ValueError(f"{patches_1LD.shape[1]} positions are not {old_num_frames} square frames")
    D = table.shape[2]
    x_TPD = patches_1LD.reshape(old_num_frames, old_side * old_side, D)
    if num_frames != old_num_frames:
        x_PDT = F.interpolate(x_TPD.permute(1, 2, 0), size=num_frames, mode="linear")
        x_TPD = x_PDT.permute(2, 0, 1)
    if side != old_side:
        x_TDhw = x_TPD.transpose(1, 2).unflatten(2, (old_side, old_side))
        x_TDhw = F.interpolate(x_TDhw, size=(side, side), mode="bicubic", align_corners=False)
        x_TPD = x_TDhw.flatten(2).transpose(1, 2)
    return torch.cat([cls_11D, x_TPD.reshape(1, -1, D)], dim=1)


TRAINING_ONLY = re.compile(
    r"(clip_decoder|final_clip_decoder|mae_decoder|fc_norm|head)\.|(clip_|mae_|clip_img_)pos_embed$"
)
"""Weights of published vision encoders that belong to a stage's training or to a classifier."""

OTHER_PARTS = re.compile(
    r"(text_encoder|audio_encoder|vision_proj|text_proj|audio_proj|av_concat_vision_proj|av_concat_audio_proj"
    r"|av_fusion|itm_head|atm_head|avtm_head|vision_align|clip_teacher)\.|temp$"
)
"""Weights of a published stage-2 or CLIP file that are not its vision encoder's."""


def published_state(source: str | Path | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the weights inside a published checkpoint under their own names.

    Args:
        source: A ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, or what ``torch.load`` gives of
            one: weights may lie under ``module`` (DeepSpeed) or ``model``, their names start with
            ``module.``.

    Raises:
        DependencyError: If there is no such file, or it is not weights alone.
    """
    payload: Any = source
    if isinstance(source, str | Path):
        file = Path(source)
        if not file.is_file():
            raise DependencyError(f"No weights at {file}", "name a downloaded checkpoint")
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                payload = load_file(file)
            else:
                # Fine-tuned files hold their run's arguments beside the weights.
                with torch.serialization.safe_globals([argparse.Namespace]):
                    payload = torch.load(
                        file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                    )
        except Exception as error:  # torch and pickle raise all kinds
            problem = " ".join(str(error).split())[:300]
            raise DependencyError(
                f"Cannot be read as weights alone: {file} ({problem})",
                "if you trust the file, store its weights by themselves: "
                "torch.save(torch.load(FILE, weights_only=False)['module'], NEW_FILE)",
            ) from error
    for key in ("module", "model"):
        if isinstance(payload, Mapping) and isinstance(payload.get(key), Mapping):
            payload = payload[key]
    if not isinstance(payload, Mapping):
        raise DependencyError("The checkpoint holds no weights", "name a published checkpoint")
    state = {
        str(name).removeprefix("module."): value
        for name, value in payload.items()
        if isinstance(value, torch.Tensor)
    }
    if not state:
        raise DependencyError("The checkpoint holds no weights", "name a published checkpoint")
    return state


def load_published_vision(
    source: str | Path | Mapping[str, Any],
    config: InternVideo2Config,
    num_frames: int | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the weights of `InternVideo2` out of any published file that holds such an encoder.

    Stage 1's and the distilled S, B and L (``pretrain.pth``, ``pytorch_model.bin``), stage 2's and
    InternVideo2-CLIP's (names start with ``vision_encoder.``), and fine-tuned classifiers. Positions are
    stretched to the config's frames and grid. Where the config has positions for images and the file
    has none, they are the sinusoids that stage 2 starts from.

    Args:
        source: As for `published_state`.
        config: Shape of the encoder to load into.
        num_frames: Frames of the file's positions: 8 after stage 1, 4 after stage 2. None: as many as
            its number of positions holds of the config's grid.

    Raises:
        DependencyError: Naming weights that are missing, of another shape or not known.
    """
    state = published_state(source)
    prefix = "vision_encoder."
    if any(name.startswith(prefix) for name in state):
        spare = [name for name in state if not name.startswith(prefix)]
        unknown = [name for name in spare if not OTHER_PARTS.match(name)]
        if unknown:
            raise _unfit([f"{name} is not known" for name in unknown])
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    with torch.device("meta"):
        wanted = InternVideo2(config).state_dict()
    side = config.image_size // config.patch_size
    if config.image_positions and "img_pos_embed" not in state:
        state["img_pos_embed"] = sinusoids(config.width, side, 1)
    known = TRAINING_ONLY
    if not config.image_positions:
        known = re.compile(f"{TRAINING_ONLY.pattern}|img_pos_embed$")
    return fit_published(stretch_positions(state, config, num_frames), wanted, known)


def fit_published(
    state: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    unneeded: re.Pattern[str],
) -> dict[str, torch.Tensor]:
    """Returns the float32 state that ``load_state_dict`` takes: every weight, and no other.

    Args:
        state: Published weights, without prefixes.
        wanted: The network's own state, for names and shapes (it may be on the meta device).
        unneeded: Names that may be left out.

    Raises:
        DependencyError: Naming weights that are missing, of another shape or not known.
    """
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [
        f"{name} is not known" for name in state if name not in wanted and not unneeded.match(name)
    ]
    problems += [
        f"{name} is of shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise _unfit(problems)
    return {name: state[name].float() for name in wanted}


def stretch_positions(
    state: Mapping[str, torch.Tensor], config: InternVideo2Config, num_frames: int | None
) -> dict[str, torch.Tensor]:
    """Returns the weights with every position embedding stretched to a config's frames and grid.

    Args:
        state: Published weights, without prefixes.
        config: Frames and grid that are wanted.
        num_frames: Frames of the file's positions; None: as many as their number holds of the grid.

    Raises:
        DependencyError: If positions are not so many frames of a square, or do not tell how many.
    """
    return {
        name: _stretched(name, value, config, num_frames) if name.endswith("pos_embed") else value
        for name, value in state.items()
    }


def _stretched(
    name: str, table: torch.Tensor, config: InternVideo2Config, old_num_frames: int | None
) -> torch.Tensor:
    """Returns positions of a file, [1, N, D], for another number of frames and another grid."""
    side, num_frames = config.image_size // config.patch_size, config.num_frames
    if name.endswith("img_pos_embed"):
        num_frames, old_num_frames = 1, 1
    has_cls = name != "mae_pos_embed"
    padded = table.float() if has_cls else F.pad(table.float(), (0, 0, 1, 0))
    num_patches = padded.shape[1] - 1
    if old_num_frames is None and num_patches % side**2:
        raise DependencyError(
            f"{num_patches} positions in {name} do not tell their number of frames",
            "say it: num_frames is 8 after stage 1 and 4 after stage 2",
        )
    try:
        stretched = resize_positions(
            padded, num_frames, old_num_frames or num_patches // side**2, side
        )
    except ValueError as error:
        raise DependencyError(f"{name} does not fit: {error}", "check num_frames") from error
    return stretched if has_cls else stretched[:, 1:]


def _unfit(problems: list[str]) -> DependencyError:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return DependencyError(
        f"Weights do not fit the model: {'; '.join(problems[:5])}{more}",
        "check the file and the model's shape in the recipe",
    )
