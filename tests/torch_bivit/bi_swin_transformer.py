"""Bi-ViT's Swin, written again in PyTorch from its description alone; for tests."""

import torch
from Bi_Quant import ActBi, BiLinearBiReal, LinearBi
from bi_vision_transformer import BinaryMlp
from Binary_plus import *  # noqa: F403
from timm.models.layers import Mlp, PatchEmbed
from torch import nn


def split(x, size):
    """Returns (batch, side, side, width) as windows (batch * windows, size * size, width)."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def join(x, size, side):
    x = x.unflatten(1, (size, size)).unflatten(0, (-1, side // size, side // size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    def __init__(self, width, size, heads, binary):
        super().__init__()
        self.heads, self.scale, self.binary = heads, (width // heads) ** -0.5, binary
        linear = BiLinearBiReal if binary else nn.Linear
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)
        if binary:
            self.q_act, self.k_act, self.v_act, self.attn_act = (ActBi(heads) for _ in range(4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        rows, columns = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
        rows, columns = (a[:, None] - a[None, :] + size - 1 for a in (rows, columns))
        self.register_buffer("relative_position_index", rows * (2 * size - 1) + columns)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.binary:
            q, k, v = self.q_act(q), self.k_act(k), self.v_act(v)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        probs = scores.softmax(-1)
        probs = self.attn_act(probs) if self.binary else probs
        return self.proj((probs @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, side, heads, size, shift, binary):
        super().__init__()
        self.side, self.size = side, min(size, side)
        self.shift = shift if side > size else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, self.size, heads, binary)
        self.mlp = BinaryMlp(width, 4 * width) if binary else Mlp(width, 4 * width)
        self.register_buffer("attn_mask", self.mask() if self.shift else None)

    def mask(self):
        zone = torch.zeros(self.side)
        zone[-self.size :], zone[-self.shift :] = 1, 2
        zones = split((3 * zone[:, None] + zone)[None, :, :, None], self.size)[..., 0]
        return -100.0 * (zones[:, :, None] != zones[:, None, :])

    def forward(self, x):
        grid = self.norm1(x).unflatten(1, (self.side, self.side))
        windows = split(grid.roll((-self.shift, -self.shift), (1, 2)), self.size)
        grid = join(self.attn(windows, self.attn_mask), self.size, self.side)
        x = x + grid.roll((self.shift, self.shift), (1, 2)).flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, width, side, binary):
        super().__init__()
        self.side, self.norm = side, nn.LayerNorm(4 * width)
        self.reduction = LinearBi(4 * width, 2 * width) if binary else nn.Linear(4 * width, 2 * width, False)

    def forward(self, x):
        x = x.unflatten(1, (self.side // 2, 2, self.side // 2, 2))
        corners = [x[:, :, i, :, j] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1).flatten(1, 2)))


class Stage(nn.Module):
    def __init__(self, width, side, depth, heads, size, last, binary):
        super().__init__()
        shifts = [0 if i % 2 == 0 else size // 2 for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(width, side, heads, size, shift, binary) for shift in shifts))
        self.downsample = None if last else PatchMerging(width, side, binary)

    def forward(self, x):
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    binary = False

    def __init__(
        self,
        img_size,
        patch_size,
        embed_dim,
        depths,
        num_heads,
        window_size,
        num_classes,
        drop_path_rate,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim, nn.LayerNorm)
        side, last = self.patch_embed.grid_size[0], len(depths) - 1
        stages = enumerate(zip(depths, num_heads, strict=True))
        self.layers = nn.Sequential(
            *(
                Stage(embed_dim << i, side >> i, depth, heads, window_size, i == last, self.binary)
                for i, (depth, heads) in stages
            )
        )
        self.norm = nn.LayerNorm(embed_dim << last)
        self.head = nn.Linear(embed_dim << last, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.patch_embed(x))).mean(1))


class Bi_SwinTransformer(SwinTransformer):
    binary = True
