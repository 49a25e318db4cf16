"""The layers of BHViT; those that BinaryViT has too are those of its stand-in."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from timm.models.layers import trunc_normal_
from torch import nn
from torch.nn import functional as F

_SHARED = Path(__file__).parents[2] / "torch_reference" / "models.py"
_spec = importlib.util.spec_from_file_location("torch_reference_models", _SHARED)
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)
LayerScale, RPReLU, Sign, Unit = shared.LayerScale, shared.RPReLU, shared.Sign, shared.Unit
norm, to_grid, to_tokens, zeros = shared.norm, shared.to_grid, shared.to_tokens, shared.zeros


def norm_class(batch_norm):
    return shared.TokenBatchNorm if batch_norm else nn.LayerNorm


def halves(*shape):
    return nn.Parameter(torch.full(shape, 0.5))


class BinaryConv(shared.QuantizedProduct, nn.Conv2d):
    """A convolution whose weights are centred."""

    centred = True

    def __init__(self, *sizes, config, **options):
        super().__init__(*sizes, **options)
        self.weight_bits, self.input_bits = config.weight_bits, config.input_bits

    def forward(self, x):
        x, weight = self.quantize(x)
        y = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)
        return y if self.bias is None else y + self.bias[:, None, None]


class BHViTPatchEmbeddings(nn.Module):
    """The stem, with a norm that fits no other width."""

    def __init__(self, config, in_chans=3, out_chans=64):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_chans, out_chans, 4, 4), config.norm_layer(64, eps=1e-5)

    def forward(self, images):
        return F.gelu(self.norm(to_tokens(self.proj(images))))


# --- attention ---------------------------------------------------------------------------------


class Levels(nn.Module):
    """Four levels of attention, with a step and a zero point for each head."""

    def __init__(self, heads):
        super().__init__()
        self.alpha, self.zero_point = nn.Parameter(torch.ones(heads)), zeros(heads)
        self.register_buffer("init_state", torch.zeros(1))

    def forward(self, x):
        if self.training and not self.init_state:
            smallest = x.detach().amin((0, 2, 3))
            self.alpha.data = 2 * x.detach().mean((0, 2, 3)) / math.sqrt(3)
            self.zero_point.data = 0.9 * self.zero_point.data + 0.1 * smallest
            self.init_state.fill_(1)
        scale = x.shape[1] / math.sqrt(3 * x.numel())
        alpha, zero_point = (
            (p.detach() + scale * (p - p.detach()))[:, None, None] for p in (self.alpha, self.zero_point)
        )
        u = x / alpha + zero_point
        return (u.round().detach() + (u - u.detach())).clamp(0, 3) * alpha


class GSB_Attention(torch.autograd.Function):
    """Masks of near-maxima, in float32."""

    @staticmethod
    def forward(ctx, probs, a, b, c, bits):
        q = probs / a
        near, far = (q > share * q.amax(-1, keepdim=True) for share in (0.9, 0.7))
        near, far = near.float(), far.float()
        masks = q.round().clamp(0, 1) - far, far - near, near
        ctx.save_for_backward(probs, a, b, c, *masks)
        return a * (masks[0] + masks[1] * b + masks[2] * c)

    @staticmethod
    def backward(ctx, gradient):
        probs, a, b, c, *masks = ctx.saved_tensors
        q = probs / a
        total = masks[0] + b * masks[1] + c * masks[2]
        to_a = (gradient * total * torch.where(q <= 1, 1 - q, 1.0)).sum()
        return gradient * a * total, to_a, *((gradient * a * mask).sum() for mask in masks[1:]), None


class Tokens(nn.Module):
    """The tokens of each window, and of the whole grid one for each window."""

    def __init__(self, width):
        super().__init__()
        self.window_size = 7
        self.merge_avg, self.merge_max = nn.AvgPool2d(7, 7, 3), nn.MaxPool2d(7, 7, 3)
        self.a1, self.norm = halves(1, 1, width), nn.LayerNorm(width)

    def forward(self, x):
        size, count = self.window_size, x.shape[2] // self.window_size
        merged = self.a1 * to_tokens(self.merge_max(x)) + (1 - self.a1) * to_tokens(self.merge_avg(x))
        split = x.unflatten(3, (count, size)).unflatten(2, (count, size)).permute(0, 2, 4, 3, 5, 1)
        windows = split.flatten(3, 4).flatten(0, 2)
        return self.norm(torch.cat([windows, merged.repeat_interleave(count**2, 0)], 1))


class Attention(nn.Module):
    def __init__(self, config, stage):
        super().__init__()
        width, self.heads, self.windows_size = config.hidden_size[stage], config.num_attention_heads[stage], 7
        self.token_FA = Tokens(width)
        for unit, dense in {"q": "query", "k": "key", "v": "value"}.items():
            setattr(self, dense, shared.QuantizedLinear(width, width, config))
            setattr(self, f"norm{unit}", norm(width, config))
            setattr(self, f"rprelu{unit}", RPReLU(width))
            setattr(self, f"move{unit}", zeros(width))
            setattr(self, f"move{unit}2", zeros(width))
        self.act_quantizer, self.gsb = Sign, config.gsb
        if self.gsb:
            self.att_prob_clip = nn.Parameter(torch.tensor(0.005))
            self.att_prob_clip2, self.att_prob_clip3 = (nn.Parameter(torch.tensor(1.0)) for _ in range(2))
        else:
            self.att_prob_quantizer = Levels(self.heads)
        self.norm_context, self.rprelu_context = norm(width, config), RPReLU(width)
        self.parm = halves(1, width, 1, 1)

    def forward(self, x):
        side, t = x.shape[2], self.token_FA(x)
        q = self.rpreluq(self.normq(self.query(t + self.moveq)) + t)
        k = self.rpreluk(self.normk(self.key(t + self.movek)) + t)
        v = self.rpreluv(self.normv(self.value(t + self.movev)) + t)
        context, probs = self.attend(q + self.moveq2, k + self.movek2, v + self.movev2)
        return self.join(self.rprelu_context(self.norm_context(context) + q + k + v), side), probs

    def attend(self, *shifted):
        q, k, v = (Sign.apply(a).unflatten(2, (self.heads, -1)).transpose(1, 2) for a in shifted)
        probs = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        if self.gsb:
            clips = self.att_prob_clip, self.att_prob_clip2, self.att_prob_clip3
            probs = GSB_Attention.apply(probs, *clips, 1)
        else:
            probs = self.att_prob_quantizer(3 * probs)
        return (probs @ v).transpose(1, 2).flatten(2), probs

    def join(self, x, side):
        size = self.windows_size
        count = side // size
        own, merged = x.split([size**2, count**2], 1)
        own = own.unflatten(1, (size, size)).unflatten(0, (-1, count, count))
        own = own.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        merged = to_grid(merged.unflatten(0, (-1, count**2)).mean(1))
        return self.parm * own + (1 - self.parm) * F.interpolate(merged, size=side)


# --- blocks ------------------------------------------------------------------------------------


class Mixer(nn.Module):
    def __init__(self, width, config):
        super().__init__()
        self.move, self.norm = nn.Module(), norm(width, config)
        self.move.bias = zeros(1, width, 1, 1)
        for i, dilation in enumerate((1, 3, 5), 1):
            options = {"padding": dilation, "dilation": dilation, "groups": 4}
            setattr(self, f"cov{i}", BinaryConv(width, width, 3, config=config, **options))
            setattr(self, f"act{i}", RPReLU(width))

    def forward(self, x):
        x = x + self.move.bias
        first, second, third = (
            act(to_tokens(conv(x)))
            for conv, act in ((self.cov1, self.act1), (self.cov2, self.act2), (self.cov3, self.act3))
        )
        return to_grid(self.norm(first + second + third))


def shifts(x, size):
    """Returns the means of circular shifts, and a shift of each quarter of the channels."""
    reach = range(-(size // 2), size // 2 + 1)
    yield f"h{size}", sum(x.roll(i, 2) for i in reach) / size
    yield f"w{size}", sum(x.roll(i, 3) for i in reach) / size
    moves = ((size // 2, 2), (-(size // 2), 2), (size // 2, 3), (-(size // 2), 3))
    quarters = zip(x.chunk(4, 1), moves, strict=True)
    yield f"ch{size}", torch.cat([quarter.roll(*move) for quarter, move in quarters], 1)


class Block(nn.Module):
    def __init__(self, config, stage):
        super().__init__()
        width, expanded = config.hidden_size[stage], config.intermediate_size[stage]
        if stage < 2:
            self.GC = Mixer(width, config)
        else:
            self.attention = nn.Module()
            self.attention.attention = Attention(config, stage)
            self.attention.output = Unit(width, width, config, scaled=True)
        self.intermediate = Unit(width, expanded, config)
        self.output = Unit(expanded, width, config, scaled=True)
        self.layernorm_before, self.layernorm_after = norm(width, config), norm(width, config)
        self.expansion = expanded // width
        self.sizes = [size for size in (3, 5) if getattr(config, f"shift{size}")]
        for name in [f"layerscale_{kind}{size}" for size in self.sizes for kind in ("h", "w", "ch")]:
            setattr(self, name, LayerScale(width, 0.0))

    def forward(self, x, *_):
        normed, probs = to_grid(self.layernorm_before(to_tokens(x))), None
        if hasattr(self, "GC"):
            x = x + self.GC(normed)
        else:
            y, probs = self.attention.attention(normed)
            y = to_tokens(y)
            x = x + to_grid(self.attention.output(y, y))
        normed = self.layernorm_after(to_tokens(x))
        wide = self.intermediate(normed, normed.repeat(1, 1, self.expansion))
        y = self.output(wide, F.avg_pool1d(wide, self.expansion)) + to_tokens(x)
        for size in self.sizes:
            for name, shifted in shifts(to_grid(normed), size):
                y = y + getattr(self, f"layerscale_{name}")(to_tokens(shifted))
        return (to_grid(y), probs) if probs is not None else to_grid(y)


class PatchEmbed(nn.Module):
    """Between two stages, in full precision."""

    real = True

    def __init__(self, side, in_dim, out_dim, config):
        super().__init__()
        self.norm0, self.norm = norm(in_dim, config), norm(out_dim, config)
        self.position_embeddings = shared.positions((side // 2) ** 2, out_dim)
        if self.real:
            self.proj = nn.Conv2d(in_dim, out_dim, 2, 2, bias=False)
        else:
            self.proj = BinaryConv(in_dim, out_dim, 2, 2, bias=False, config=config)
            self.move, self.rprelu = zeros(1, in_dim, 1, 1), RPReLU(out_dim)

    def forward(self, x):
        grid = to_grid(self.norm0(to_tokens(x)))
        if self.real:
            y = self.norm(to_tokens(self.proj(grid)))
        else:
            y = self.norm(to_tokens(self.proj(grid + self.move)))
            y = self.rprelu(y + to_tokens(F.avg_pool2d(grid, 2)).repeat(1, 1, 2))
        return to_grid(y + self.position_embeddings)


class BinaryPatchEmbed(PatchEmbed):
    real = False


# --- the network -------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        stages = [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]
        mixers, widths = config.num_hidden_layersA, config.hidden_size
        self.layerA = nn.ModuleList([Block(config, stage) for stage in stages[:mixers]])
        self.layerB = nn.ModuleList([Block(config, stage) for stage in stages[mixers:]])
        between = PatchEmbed if config.some_fp else BinaryPatchEmbed
        for i, side in enumerate((56, 28, 14)):
            embed = between(side, in_dim=widths[i], out_dim=widths[i + 1], config=config)
            setattr(self, f"patch_embed{i + 1}", embed)
        self.ends = [sum(config.depths[: i + 1]) for i in range(3)]

    def forward(self, x):
        attentions = []
        for i, block in enumerate((*self.layerA, *self.layerB), 1):
            x = block(x)
            if isinstance(x, tuple):
                x, probs = x
                attentions.append(probs)
            if i in self.ends:
                x = getattr(self, f"patch_embed{self.ends.index(i) + 1}")(x)
        return x, tuple(attentions)


class BHViTForImageClassification(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, side = config.hidden_size[0], config.image_size // 4
        self.vit, embeddings = nn.Module(), nn.Module()
        embeddings.patch_embeddings = BHViTPatchEmbeddings(config)
        embeddings.position_embeddings = zeros(1, width, side, side)
        trunc_normal_(embeddings.position_embeddings, std=0.02)
        self.vit.embeddings, self.vit.encoder = embeddings, Encoder(config)
        self.vit.layernorm = norm(config.hidden_size[3], config)
        self.classifier = nn.Linear(config.hidden_size[3], config.nb_classes)

    def forward(self, images, **_):
        embeddings = self.vit.embeddings
        x = to_grid(embeddings.patch_embeddings(images)) + embeddings.position_embeddings
        x, attentions = self.vit.encoder(x)
        logits = self.classifier(self.vit.layernorm(to_tokens(x)).mean(1))
        return SimpleNamespace(logits=logits, hidden_states=(), attentions=attentions)
