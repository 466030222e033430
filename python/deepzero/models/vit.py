"""A small vision transformer with pre-norm blocks and plain attention (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); tokens [n, T, width] in and out."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.project(attended.transpose(1, 2).reshape(n, tokens, width))
        return cast("Tensor", x + self.down(F.gelu(self.up(self.norm2(x)))))


class ViT(nn.Module):
    """Patch embedding, learned positions, ``blocks`` blocks, norm, mean over tokens, linear classifier."""

    def __init__(
        self, image_size: int, patch: int, in_channels: int, num_classes: int, blocks: int, width: int, heads: int
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads:
            raise ValueError(
                f"vit: image_size must be a multiple of patch and width of heads, got image_size={image_size}, "
                f"patch={patch}, width={width}, heads={heads}"
            )
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return cast("Tensor", self.head(self.norm(self.blocks(tokens)).mean(1)))


def vit(
    image_size: int = 32,
    patch: int = 4,
    in_channels: int = 3,
    num_classes: int = 10,
    blocks: int = 6,
    width: int = 96,
    heads: int = 3,
) -> ViT:
    """Small ViT: 64 tokens of width 96 at 32x32 with patch 4.

    Input [n, in_channels, image_size, image_size]; output logits [n, num_classes].
    """
    return ViT(image_size, patch, in_channels, num_classes, blocks, width, heads)
