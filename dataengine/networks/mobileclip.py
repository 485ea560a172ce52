# SPDX-License-Identifier: Apache-2.0
"""MobileCLIP-B's text encoder: a pre-norm causal transformer over CLIP's vocabulary.

State-dict keys and shapes are those of the published checkpoint (``mobileclip_blt.pt`` holds them
behind ``text_encoder.``).

B texts, L tokens, D width, H heads, K width of a head, E embedding.

Source: MobileCLIP (Vasu et al. 2024, arXiv:2311.17049) and its released code.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dataengine.networks.config import MobileClipTextConfig
from dataengine.networks.transformer import LayerNorm


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Returns [B, L, D]."""
        B, L, D = x_BLD.shape
        q_BHLK, k_BHLK, v_BHLK = (
            part.view(B, L, self.heads, D // self.heads).transpose(1, 2)
            for part in self.qkv_proj(x_BLD).chunk(3, dim=-1)
        )
        mixed_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True)
        return self.out_proj(mixed_BHLK.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Attention and an MLP with the exact GELU, each behind a layer norm and a residual.

    The published code keeps its dropouts (rate 0) at positions 2 and 3 of the sequences, which is why
    the MLP's second layer is number 4.
    """

    def __init__(self, config: MobileClipTextConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width
        self.pre_norm_mha = nn.Sequential(LayerNorm(width), Attention(width, config.heads))
        self.pre_norm_ffn = nn.Sequential(
            LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Identity(),
            nn.Linear(hidden, width),
        )

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Returns [B, L, D]."""
        x_BLD = x_BLD + self.pre_norm_mha(x_BLD)
        return x_BLD + self.pre_norm_ffn(x_BLD)


class PositionTable(nn.Module):
    """Learnt positions, under the two names that the published code nests."""

    def __init__(self, config: MobileClipTextConfig) -> None:
        super().__init__()
        self.pos_embed = nn.Module()
        self.pos_embed.pos_embed = nn.Parameter(
            torch.empty(1, 1, config.context_length, config.width)
        )

    def forward(self, length: int) -> torch.Tensor:
        """Returns the first ``length`` positions, [L, D].

        The published code would stretch the whole table over another length; it never meets one, for
        its tokenizer always gives 77 tokens.
        """
        table = self.pos_embed.pos_embed
        assert isinstance(table, torch.Tensor)
        return table[0, 0, :length]


class MobileClipText(nn.Module):
    """Token ids -> the feature at the end-of-text token.

    Args:
        config: Its shape.
        embed_dim: Width of the feature.
    """

    def __init__(self, config: MobileClipTextConfig, embed_dim: int) -> None:
        super().__init__()
        self.embedding_layer = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = PositionTable(config)
        self.transformer = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer_norm = LayerNorm(config.width)
        self.projection_layer = nn.Parameter(torch.empty(config.width, embed_dim))
        self._initialise(config)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Returns [B, E], not normalised."""
        x_BLD = self.embedding_layer(tokens_BL) + self.positional_embedding(tokens_BL.shape[1])
        for block in self.transformer:
            x_BLD = block(x_BLD)
        # The end-of-text id is the highest of the vocabulary; a norm is a token's own business.
        end_B = tokens_BL.argmax(dim=-1)
        x_BD = x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), end_B]
        return self.final_layer_norm(x_BD) @ self.projection_layer

    def _initialise(self, config: MobileClipTextConfig) -> None:
        """Draws weights as CLIP does; the released code has no recipe for training it."""
        width = config.width
        branch_std = width**-0.5 * (2 * config.layers) ** -0.5
        nn.init.normal_(self.embedding_layer.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("pos_embed"):
                nn.init.normal_(parameter, std=0.01)
            elif name.endswith(("qkv_proj.weight", "projection_layer")):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith(("out_proj.weight", "pre_norm_ffn.4.weight")):
                nn.init.normal_(parameter, std=branch_std)
            elif name.endswith("pre_norm_ffn.1.weight"):
                nn.init.normal_(parameter, std=(2 * width) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
