# SPDX-License-Identifier: Apache-2.0
"""CLIP's pre-norm transformer with the parameter names of the published checkpoints.

Names under ``resblocks.<i>``: ``ln_1``, ``attn.in_proj_weight``, ``attn.in_proj_bias``,
``attn.out_proj``, ``ln_2``, ``mlp.c_fc``, ``mlp.c_proj``.

B batch, N tokens, D width, H heads, K width of a head.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever comes in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tokens in their own dtype."""
        # Sharded training gathers weights in bfloat16, which a CPU would not mix with float32.
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(input.dtype)


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that CLIP's weights were trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x * sigmoid(1.702 x)."""
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Self-attention by SDPA; parameters are named and shaped as nn.MultiheadAttention's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BND: torch.Tensor, causal: bool) -> torch.Tensor:
        """Returns [B, N, D]."""
        B, N, D = x_BND.shape
        qkv = F.linear(x_BND, self.in_proj_weight, self.in_proj_bias)
        q_BHNK, k_BHNK, v_BHNK = (
            part.view(B, N, self.heads, D // self.heads).transpose(1, 2)
            for part in qkv.chunk(3, dim=-1)
        )
        mixed_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, is_causal=causal)
        return self.out_proj(mixed_BHNK.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers, four times wider between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, width * 4)
        self.gelu = QuickGELU()
        self.c_proj = nn.Linear(width * 4, width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        return self.c_proj(self.gelu(self.c_fc(x_BND)))


class DropPath(nn.Module):
    """Leaves a residual branch out for random samples in training, and scales the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        if not self.training or self.rate == 0.0:
            return x_BND
        keep = 1.0 - self.rate
        mask_B11 = torch.empty(len(x_BND), 1, 1, device=x_BND.device, dtype=x_BND.dtype)
        return x_BND * mask_B11.bernoulli_(keep) / keep


class Block(nn.Module):
    """Attention and a four times wider MLP, each behind a layer norm and a residual."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_2 = LayerNorm(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BND: torch.Tensor, causal: bool) -> torch.Tensor:
        """Returns [B, N, D]."""
        x_BND = x_BND + self.drop_path(self.attn(self.ln_1(x_BND), causal))
        return x_BND + self.drop_path(self.mlp(self.ln_2(x_BND)))


class Transformer(nn.Module):
    """A stack of blocks with CLIP's initialisation.

    Args:
        width: Of a token.
        layers: Number of blocks.
        heads: Of each block.
        causal: Whether a token sees only itself and those before it.
        drop_path: Rate of the last block; rises linearly from 0 at the first.
        checkpoint_activations: Whether blocks are recomputed in the backward pass.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        causal: bool = False,
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        rates = [drop_path * layer / max(layers - 1, 1) for layer in range(layers)]
        self.resblocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.causal = causal
        self.checkpoint_activations = checkpoint_activations
        self._initialise(width, layers)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        for block in self.resblocks:
            if self.checkpoint_activations and self.training:
                x_BND = checkpoint(block, x_BND, self.causal, use_reentrant=False)  # pyright: ignore[reportAssignmentType]  returns what the block returns
            else:
                x_BND = block(x_BND, self.causal)
        return x_BND

    def _initialise(self, width: int, layers: int) -> None:
        """Draws weights as CLIP does (Radford et al. 2021, section 2.5 and its released code).

        Residual branches start smaller the deeper the stack. Biases start at zero.
        """
        branch_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=branch_std)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)
