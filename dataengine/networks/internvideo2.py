# SPDX-License-Identifier: Apache-2.0
"""InternVideo2's vision encoder: a ViT over all patches of all frames, pooled by attention.

State-dict keys and shapes are those of the published checkpoints, so that they load as they are.

B clips, T frames, P patches of a frame, N = 1 + T * P tokens, D width, H heads, K width of a head,
E embedding.

Source: InternVideo2 (Wang et al. 2024, arXiv:2403.15377), section 3, and the released code's shapes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dataengine.networks.config import InternVideo2Config
from dataengine.networks.transformer import DropPath


class RMSNorm(nn.Module):
    """Root mean square norm with a weight, computed in float32 whatever comes in; eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tokens in their own dtype."""
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(x.dtype)


class LayerScale(nn.Module):
    """A learnt factor per channel, small at first (1e-5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the scaled tokens; the product is taken in float32, as published."""
        return (x.float() * self.gamma.float()).to(x.dtype)


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
        B, _, D = k_BND.shape
        q_BH1K, k_BHNK, v_BHNK = (
            F.linear(x, linear.weight, bias)
            .view(B, -1, self.heads, D // self.heads)
            .transpose(1, 2)
            for x, linear, bias in (
                (q_B1D, self.q, self.q_bias),
                (k_BND, self.k, self.k_bias),
                (v_BND, self.v, self.v_bias),
            )
        )
        mixed_BH1K = F.scaled_dot_product_attention(q_BH1K, k_BHNK, v_BHNK)
        return self.proj(mixed_BH1K.transpose(1, 2).reshape(B, 1, D))


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


class PatchEmbedding(nn.Module):
    """Frames -> patch tokens; a kernel of one frame, so that time enters by position alone."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        kernel = (1, patch_size, patch_size)
        self.proj = nn.Conv3d(3, width, kernel, kernel)

    def forward(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        """Returns [B, T * P, D], frame after frame."""
        x_BDThw = self.proj(frames_BTCHW.transpose(1, 2))
        return x_BDThw.flatten(2).transpose(1, 2)


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
        rates = torch.linspace(0, config.drop_path, config.layers).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.clip_projector = AttentionPooling(config)
        self._initialise()

    def forward(self, frames_BTCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all tokens [B, N, D] and the clip's feature [B, E], neither normalised.

        Args:
            frames_BTCHW: As many frames as the config says, or one: an image.
        """
        B, T = frames_BTCHW.shape[:2]
        x_BND = self.patch_embed(frames_BTCHW)
        x_BND = torch.cat([self.cls_token.expand(B, -1, -1), x_BND], dim=1) + self._positions(T)
        for block in self.blocks:
            if self.config.checkpoint_activations and self.training:
                x_BND = checkpoint(block, x_BND, use_reentrant=False)  # pyright: ignore[reportAssignmentType]  returns what the block returns
            else:
                x_BND = block(x_BND)
        return x_BND, self.clip_projector(x_BND)

    def _positions(self, num_frames: int) -> torch.Tensor:
        """Returns position embeddings, [1, N, D]; an image has its own, else the mean over time."""
        config = self.config
        if num_frames == config.num_frames and not (num_frames == 1 and config.image_positions):
            return self.pos_embed
        if num_frames != 1:
            raise ValueError(f"{num_frames} frames given, {config.num_frames} expected")
        if config.image_positions:
            return self.img_pos_embed
        cls_11D, patches_1LD = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        mean_1PD = patches_1LD.unflatten(1, (config.num_frames, -1)).mean(dim=1)
        return torch.cat([cls_11D, mean_1PD], dim=1)

    def _initialise(self) -> None:
        """Draws weights as published: normal of 0.02, deeper residual branches smaller."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
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
