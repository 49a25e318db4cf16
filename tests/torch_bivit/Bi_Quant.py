"""Bi-ViT's quantisers, written again in PyTorch from their description alone; for tests.

What does not work in the code is so here too: a function is not imported, scales start undefined, and sums of
signs are rounded.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def sign_pass(x):
    return x.sign().detach() - x.detach() + x


def first_scale(x):
    return 2 * x.detach().abs().mean()


class BiLinearBiReal(nn.Linear):
    """A binary linear layer, which never adds its bias."""

    def forward(self, x):
        scale = self.weight.abs().mean(1, keepdim=True).detach()
        clipped = self.weight.clamp(-1, 1)
        weight = (scale * self.weight.sign()).detach() - clipped.detach() + clipped
        bounded = x.clamp(-1, 1)
        smooth = bounded * (2 - bounded.abs())
        return F.linear(x.sign().detach() - smooth.detach() + smooth, weight)


class ActBi(nn.Module):
    """Quantises along the second axis of four, or the last."""

    def __init__(self, in_features):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((in_features,), torch.nan))
        self.zero_point = nn.Parameter(torch.zeros(in_features))
        self.register_buffer("init_state", torch.zeros(1))
        self.register_buffer("signed", torch.zeros(1))

    def forward(self, x):
        if self.training and not self.init_state:
            self.signed.fill_(float(x.min() < -1e-5))
            self.alpha.data.fill_(first_scale(x))
            self.zero_point.data = 0.9 * self.zero_point.data + 0.1 * (x.detach().min() + self.alpha.data)
            self.init_state.fill_(1)
        shape = (-1, 1, 1) if x.ndim == 4 else (-1,)
        scale = 1 / math.sqrt(x.numel())
        rounded = self.zero_point.round().detach() - self.zero_point.detach() + self.zero_point
        alpha = grad_scale(self.alpha, scale).reshape(shape)  # noqa: F821
        zero_point = grad_scale(rounded, scale).reshape(shape)  # noqa: F821
        return (sign_pass((x / alpha + zero_point).clamp(-1, 1)) - zero_point) * alpha


class LinearBi(nn.Linear):
    """A linear layer with a learned scale for each output."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)
        self.alpha = nn.Parameter(torch.full((fan_out,), torch.nan))
        self.register_buffer("init_state", torch.zeros(1))
        self.act = ActBi(fan_in)

    def forward(self, x):
        if self.training and not self.init_state:
            self.alpha.data.fill_(first_scale(self.weight))
            self.init_state.fill_(1)
        alpha = grad_scale(self.alpha, 1 / math.sqrt(self.weight.numel()))[:, None]  # noqa: F821
        weight = sign_pass((self.weight / alpha).clamp(-1, 1)) * alpha
        return F.linear(self.act(x), weight, self.bias)
