"""Bi-ViT's DeiT, written again in PyTorch from its description alone; for tests."""

import torch
from Bi_Quant import ActBi, BiLinearBiReal
from Binary_plus import *  # noqa: F403
from timm.models.layers import Mlp
from timm.models.layers.weight_init import trunc_normal_
from torch import nn


class BinaryMlp(nn.Module):
    def __init__(self, width, expanded):
        super().__init__()
        self.fc1, self.fc2 = BiLinearBiReal(width, expanded), BiLinearBiReal(expanded, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)).clip(-10.0, 10.0))


class Attention(nn.Module):
    def __init__(self, width, heads, binary):
        super().__init__()
        self.heads, self.scale, self.binary = heads, (width // heads) ** -0.5, binary
        linear = BiLinearBiReal if binary else nn.Linear
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)
        if binary:
            self.norm_q, self.norm_k = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
            self.q_act, self.k_act, self.v_act, self.attn_act = (ActBi(heads) for _ in range(4))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.binary:
            q, k, v = self.q_act(self.norm_q(q)), self.k_act(self.norm_k(k)), self.v_act(v)
        probs = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        probs = self.attn_act(probs) if self.binary else probs
        return self.proj((probs @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads, norm, binary):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, binary)
        self.mlp = BinaryMlp(width, 4 * width) if binary else Mlp(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    binary = False

    def __init__(
        self, img_size, patch_size, embed_dim, depth, num_heads, num_classes, norm_layer, distilled=True
    ):
        super().__init__()
        self.patch_embed, width = nn.Module(), embed_dim
        self.patch_embed.proj = nn.Conv2d(3, width, patch_size, patch_size)
        tokens = (img_size // patch_size) ** 2 + 1 + distilled
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, width)) for n in (1, tokens))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if distilled else None
        blocks = [Block(width, num_heads, norm_layer, self.binary) for _ in range(depth)]
        self.blocks, self.norm = nn.Sequential(*blocks), norm_layer(width)
        self.head = nn.Linear(width, num_classes)
        self.head_dist = nn.Linear(width, num_classes) if distilled else None
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = [token for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], 1)
        x = self.norm(self.blocks(x + self.pos_embed))
        if self.head_dist is None:
            return self.head(x[:, 0])
        heads = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return heads if self.training else (heads[0] + heads[1]) / 2


class twobits_VisionTransformer(VisionTransformer):
    binary = True
