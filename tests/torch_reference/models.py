"""The reference's models, written again in PyTorch from their description alone.

This directory stands in for a checkout of the reference in tests: ``models.get_model``, the config
directories and the names in state dicts are those of the reference, its code is not. The golden files
show that it computes the same (``tests/parity/test_parity_dump.py``).
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F


class ViTConfig:
    """Reads a config directory."""

    @staticmethod
    def from_pretrained(directory):
        return SimpleNamespace(**json.loads((Path(directory) / "config.json").read_text()))


def get_model(args, model_config, model_type, weight_bits, input_bits):
    """Returns the model that the reference's arguments describe."""
    if model_type not in ("deit", "extra-res", "extra-res-pyramid"):
        raise NotImplementedError(model_type)
    config = ViTConfig.from_pretrained(model_config)
    vars(config).update({**vars(args), "weight_bits": weight_bits, "input_bits": input_bits})
    config.model_type = model_type
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        if model_type != "extra-res-pyramid":
            setattr(config, name, [getattr(config, name)])
    if model_type != "extra-res-pyramid":
        config.depths, config.reduction_ratio = [config.num_hidden_layers], [1]
    if model_type == "deit":
        config.enable_cls_token, config.replace_ln_bn = True, False
    return Classifier(config)


# --- quantisers --------------------------------------------------------------------------------


class Sign(torch.autograd.Function):
    """The sign, with a gradient that falls linearly to zero at -1 and 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (2 - 2 * x.abs()).clamp(min=0)


class BinaryProbabilities(torch.autograd.Function):
    """``clip(round(p / scale), 0, 1) * scale``."""

    @staticmethod
    def forward(ctx, probs, scale):
        ctx.save_for_backward(probs, scale)
        return (probs / scale).round().clamp(0, 1) * scale

    @staticmethod
    def backward(ctx, gradient):
        probs, scale = ctx.saved_tensors
        ratio = probs / scale
        above = (ratio > 1).to(gradient)
        inside = (ratio >= 0).to(gradient) - above
        to_scale = gradient * (inside * (ratio.round() - ratio) + above)
        return gradient * inside, to_scale.sum()


class QuantizedProduct:
    """What the linear layer and the convolution with binary operands share."""

    centred = False

    def quantize(self, x):
        weight = self.weight
        if self.weight_bits == 1:
            axes = tuple(range(1, weight.ndim))
            latent = weight - weight.mean(axes, keepdim=True) if self.centred else weight
            binary = weight.abs().mean(axes, keepdim=True) * latent.sign()
            latent = latent.clamp(-1, 1)
            weight = latent + (binary - latent).detach()
        return (Sign.apply(x) if self.input_bits == 1 else x), weight


class QuantizedLinear(QuantizedProduct, nn.Linear):
    centred = True

    def __init__(self, fan_in, fan_out, config):
        super().__init__(fan_in, fan_out, bias=False)
        self.weight_bits, self.input_bits = config.weight_bits, config.input_bits

    def forward(self, x):
        return F.linear(*self.quantize(x))


class QuantizedConv(QuantizedProduct, nn.Conv2d):
    def __init__(self, fan_in, fan_out, config):
        super().__init__(fan_in, fan_out, 2, 2, bias=False)
        self.weight_bits, self.input_bits = config.weight_bits, config.input_bits

    def forward(self, x):
        return F.conv2d(*self.quantize(x), stride=self.stride)


# --- layers ------------------------------------------------------------------------------------


def zeros(*shape):
    return nn.Parameter(torch.zeros(*shape))


def positions(tokens, width):
    return nn.Parameter(0.02 * torch.randn(1, tokens, width))


def to_grid(x):
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(x):
    return x.flatten(2).transpose(1, 2)


class TokenBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def norm(width, config):
    return (TokenBatchNorm if config.replace_ln_bn else nn.LayerNorm)(width, eps=1e-5)


class RPReLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.move1, self.move2, self.prelu = zeros(width), zeros(width), nn.PReLU(width)

    def forward(self, x):
        return self.prelu((x - self.move1).transpose(1, 2)).transpose(1, 2) + self.move2


class LayerScale(nn.Module):
    def __init__(self, width, alpha):
        super().__init__()
        self.alpha, self.move = nn.Parameter(torch.full((width,), alpha)), zeros(width)

    def forward(self, x):
        return x * self.alpha + self.move


class Unit(nn.Module):
    """``RPReLU(norm(dense(x + move)) + shortcut)``, perhaps with a LayerScale after it."""

    def __init__(self, fan_in, fan_out, config, scaled=False):
        super().__init__()
        self.move, self.dense = zeros(fan_in), QuantizedLinear(fan_in, fan_out, config)
        self.norm, self.rprelu = norm(fan_out, config), RPReLU(fan_out)
        self.layerscale = (
            LayerScale(fan_out, 0.1) if scaled and not config.disable_layerscale else nn.Identity()
        )

    def forward(self, x, shortcut):
        return self.layerscale(self.rprelu(self.norm(self.dense(x + self.move)) + shortcut))


# --- blocks ------------------------------------------------------------------------------------


class BinaryAttention(nn.Module):
    def __init__(self, config, stage):
        super().__init__()
        width, self.heads = config.hidden_size[stage], config.num_attention_heads[stage]
        self.ratio = config.reduction_ratio[stage]
        units = {"q": "query", "k": "key", "v": "value"}
        for unit, dense in (units | ({"r": "reduction"} if self.ratio > 1 else {})).items():
            setattr(self, dense, QuantizedLinear(width, width, config))
            setattr(self, f"move{unit}", zeros(width))
            setattr(self, "norm_r" if unit == "r" else f"norm{unit}", norm(width, config))
            setattr(self, f"rprelu{unit}", RPReLU(width))
        for unit in units:
            setattr(self, f"move{unit}2", zeros(width))
        self.act_quantizer = Sign if config.input_bits == 1 else None
        if self.act_quantizer:
            self.att_prob_clip = nn.Parameter(torch.tensor(0.005))
        self.norm_context, self.rprelu_context = norm(width, config), RPReLU(width)

    def forward(self, x):
        q = self.rpreluq(self.normq(self.query(x + self.moveq)) + x)
        if self.ratio > 1:
            x = to_tokens(F.avg_pool2d(to_grid(x), self.ratio))
            x = self.rprelur(self.norm_r(self.reduction(x + self.mover)) + x)
        k = self.rpreluk(self.normk(self.key(x + self.movek)) + x)
        v = self.rpreluv(self.normv(self.value(x + self.movev)) + x)
        context, probs = self.attend(q + self.moveq2, k + self.movek2, v + self.movev2)
        if self.ratio > 1:
            k, v = (to_tokens(F.interpolate(to_grid(a), scale_factor=float(self.ratio))) for a in (k, v))
        return self.rprelu_context(self.norm_context(context) + q + k + v), probs

    def attend(self, *shifted):
        if self.act_quantizer:
            shifted = [self.act_quantizer.apply(a) for a in shifted]
        q, k, v = (a.unflatten(2, (self.heads, -1)).transpose(1, 2) for a in shifted)
        probs = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        if self.act_quantizer:
            probs = BinaryProbabilities.apply(probs, self.att_prob_clip)
        return (probs @ v).transpose(1, 2).flatten(2), probs


class BinaryBlock(nn.Module):
    def __init__(self, config, stage):
        super().__init__()
        width, expanded = config.hidden_size[stage], config.intermediate_size[stage]
        self.attention = nn.Module()
        self.attention.attention = BinaryAttention(config, stage)
        self.attention.output = Unit(width, width, config, scaled=True)
        self.intermediate = Unit(width, expanded, config)
        self.output = Unit(expanded, width, config, scaled=True)
        self.layernorm_before, self.layernorm_after = norm(width, config), norm(width, config)
        self.expansion = expanded // width
        self.kernels = {
            f"layerscale_{direction}{size}": (size, 1) if direction == "h" else (1, size)
            for size in (3, 5)
            if getattr(config, f"avg_res{size}")
            for direction in "hw"
        }
        for name in self.kernels:
            setattr(self, name, LayerScale(width, 0.0))

    def forward(self, x):
        context, probs = self.attention.attention(self.layernorm_before(x))
        x = x + self.attention.output(context, context)
        normed = self.layernorm_after(x)
        wide = self.intermediate(normed, normed.repeat(1, 1, self.expansion))
        x = x + self.output(wide, F.avg_pool1d(wide, self.expansion))
        for name, kernel in self.kernels.items():
            padding = (kernel[0] // 2, kernel[1] // 2)
            pooled = F.avg_pool2d(to_grid(normed), kernel, stride=1, padding=padding)
            x = x + getattr(self, name)(to_tokens(pooled))
        return x, probs


class RealBlock(nn.Module):
    """A block of DeiT."""

    def __init__(self, config, stage):
        super().__init__()
        width, expanded = config.hidden_size[stage], config.intermediate_size[stage]
        self.heads = config.num_attention_heads[stage]
        self.attention, self.intermediate, self.output = nn.Module(), nn.Module(), nn.Module()
        self.attention.attention, self.attention.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.attention.attention, name, nn.Linear(width, width))
        self.attention.output.dense = nn.Linear(width, width)
        self.intermediate.dense, self.output.dense = nn.Linear(width, expanded), nn.Linear(expanded, width)
        self.layernorm_before, self.layernorm_after = norm(width, config), norm(width, config)

    def forward(self, x):
        normed, units = self.layernorm_before(x), self.attention.attention
        q, k, v = (
            unit(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for unit in (units.query, units.key, units.value)
        )
        probs = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.attention.output.dense((probs @ v).transpose(1, 2).flatten(2))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x)))), probs


# --- the network -------------------------------------------------------------------------------


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        pyramid = config.model_type == "extra-res-pyramid"
        width, size = config.hidden_size[0], 4 if pyramid else config.patch_size
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(3, width, size, size)
        self.norm = norm(width, config) if pyramid else nn.Identity()
        tokens = (config.image_size // size) ** 2
        if with_token := config.enable_cls_token and not pyramid:
            self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.position_embeddings = positions(tokens + with_token, width)

    def forward(self, images):
        x = self.norm(to_tokens(self.patch_embeddings.projection(images)))
        if hasattr(self, "cls_token"):
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.position_embeddings


class PatchEmbed(nn.Module):
    """Between two stages."""

    def __init__(self, config, stage, side):
        super().__init__()
        narrow, wide = config.hidden_size[stage : stage + 2]
        self.norm0, self.norm = norm(narrow, config), norm(wide, config)
        self.position_embeddings = positions((side // 2) ** 2, wide)
        self.real, self.repeats = config.some_fp, wide // narrow
        if self.real:
            self.proj = nn.Conv2d(narrow, wide, 2, 2, bias=False)
        else:
            self.proj, self.move = QuantizedConv(narrow, wide, config), zeros(1, narrow, 1, 1)
            self.rprelu = RPReLU(wide)

    def forward(self, x):
        grid = to_grid(self.norm0(x))
        if self.real:
            return self.norm(to_tokens(self.proj(grid))) + self.position_embeddings
        shortcut = to_tokens(F.avg_pool2d(grid, 2)).repeat(1, 1, self.repeats)
        x = self.norm(to_tokens(self.proj(grid + self.move)))
        return self.rprelu(x + shortcut) + self.position_embeddings


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        block = RealBlock if config.model_type == "deit" else BinaryBlock
        stages = [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]
        self.layer = nn.ModuleList([block(config, stage) for stage in stages])
        self.between = {}  # by the block before
        for stage in range(1, len(config.depths)):
            side = config.image_size // 4 // 2 ** (stage - 1)
            name = f"patch_embed{stage}"
            setattr(self, name, PatchEmbed(config, stage - 1, side))
            self.between[sum(config.depths[:stage]) - 1] = name

    def forward(self, x):
        hidden, attentions = [], []
        for i, block in enumerate(self.layer):
            hidden.append(x)
            x, probs = block(x)
            attentions.append(probs)
            if i in self.between:
                x = getattr(self, self.between[i])(x)
        return x, (*hidden, x), tuple(attentions)


class Classifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vit = nn.Module()
        self.vit.embeddings, self.vit.encoder = Embeddings(config), Encoder(config)
        self.vit.layernorm = norm(config.hidden_size[-1], config)
        self.classifier = nn.Linear(config.hidden_size[-1], config.nb_classes)

    def forward(self, images, output_attentions=False, output_hidden_states=False):
        x, hidden, attentions = self.vit.encoder(self.vit.embeddings(images))
        x = self.vit.layernorm(x)
        pooled = x[:, 0] if hasattr(self.vit.embeddings, "cls_token") else x.mean(dim=1)
        return SimpleNamespace(
            logits=self.classifier(pooled),
            hidden_states=hidden if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
