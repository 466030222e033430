"""The table: one row per layer or op family. A new rule is a new row.

Models are tiny, but in each row a parameter before the layer under test moves it with a dense difference, the
layer's own parameters move it with a sparse one, and something nonlinear follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


def readout(out: Tensor, *_: Any) -> Tensor:
    """A smooth loss in which every output has a weight of its own."""
    flat = out.reshape(-1)
    weights = torch.cos(torch.arange(flat.numel(), dtype=out.dtype) * 1.7 + 1)
    return (flat * weights).mean() + flat.square().mean() / 2


def supervised(loss: Callable[..., Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """batch = (inputs, targets) -> loss(model(*inputs), *targets)"""

    def objective(model: nn.Module, batch: Any) -> Tensor:
        return loss(model(*batch[0]), *batch[1])

    return objective


@dataclass(frozen=True)
class Case:
    """id, module builder, input builder, objective.

    falls_back  ops without a rule that this row goes through on purpose: it runs without ``strict``, and warns
    why         the reason for anything unusual about the row
    """

    id: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    objective: Callable[[nn.Module, Any], Tensor]
    train: bool = True
    falls_back: tuple[str, ...] = ()
    why: str = ""


ROWS: list[Case] = []


def row(
    id: str,
    model: Callable[[], nn.Module],
    shape: tuple[int, ...] = (4, 6),
    *,
    inputs: Callable[[], tuple[Any, ...]] | None = None,
    targets: Callable[[], tuple[Any, ...]] = lambda: (),
    loss: Callable[..., Tensor] = readout,
    objective: Callable[[nn.Module, Any], Tensor] | None = None,
    train: bool = True,
    falls_back: tuple[str, ...] = (),
    why: str = "",
) -> None:
    assert all(case.id != id for case in ROWS), id
    made = inputs or (lambda: (torch.randn(shape),))
    ROWS.append(Case(id, model, lambda: (made(), targets()), objective or supervised(loss), train, falls_back, why))


class Fn(nn.Module):
    """fn(a(x), b(x)) with two linear layers, so that both operands of an op move, and a linear layer at the end."""

    def __init__(self, fn: Callable[..., Any], out: int | None = None, wide: int = 8) -> None:
        super().__init__()
        self.fn = fn
        self.a, self.b = nn.Linear(6, wide), nn.Linear(6, wide)
        self.c = nn.Linear(out, 5) if out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.fn(self.a(x), self.b(x)))


def fn(id: str, function: Callable[..., Any], shape: tuple[int, ...] = (4, 6), **kwargs: Any) -> None:
    """A row for fn(h, g), h and g [*shape[:-1], 8] both moving; ``h`` alone where g is not used."""
    row(id, lambda: Fn(function), shape, **kwargs)


def seq(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


# --- linear and convolution

row("linear", seq(lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 5)))
row("linear-no-bias", seq(lambda: nn.Linear(6, 8, bias=False), nn.Tanh, lambda: nn.Linear(8, 5, bias=False)))
row("linear-3d-input", seq(lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 5)), (3, 4, 6))
row("linear-vector-input", seq(lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 5)), (6,))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(6, 4), nn.Linear(6, 3), nn.Bilinear(4, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.a(x), self.b(x))


row("bilinear", Bilinear)

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SIZE = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def conv(id: str, nd: int, layer: Callable[[], nn.Module]) -> None:
    """A conv before it, the layer 4 -> 4 channels, a conv after it."""
    before, after = (lambda: _CONV[nd](2, 4, 3, padding=1)), (lambda: _CONV[nd](4, 2, 1))
    row(id, seq(before, nn.Tanh, layer, nn.Tanh, after), (2, 2, *_SIZE[nd]))


for _nd in (1, 2, 3):
    conv(f"conv{_nd}d", _nd, lambda n=_nd: _CONV[n](4, 4, 3, padding=1))
    conv(f"conv{_nd}d-strided", _nd, lambda n=_nd: _CONV[n](4, 4, 3, stride=2))
    conv(f"conv{_nd}d-dilated", _nd, lambda n=_nd: _CONV[n](4, 4, 2, dilation=2, padding=1))
    conv(f"conv{_nd}d-grouped", _nd, lambda n=_nd: _CONV[n](4, 4, 3, groups=2, padding=1))
    conv(f"conv{_nd}d-depthwise", _nd, lambda n=_nd: _CONV[n](4, 4, 3, groups=4, padding=1))
    conv(f"conv{_nd}d-transposed", _nd, lambda n=_nd: _UP[n](4, 4, 3, stride=2, padding=1, output_padding=1))
    conv(f"conv{_nd}d-transposed-grouped", _nd, lambda n=_nd: _UP[n](4, 4, 3, groups=2))
    conv(f"conv{_nd}d-circular", _nd, lambda n=_nd: _CONV[n](4, 4, 3, padding=1, padding_mode="circular"))
for _mode in ("reflect", "replicate"):
    conv(f"conv1d-{_mode}", 1, lambda m=_mode: nn.Conv1d(4, 4, 3, padding=2, padding_mode=m))
    conv(f"conv2d-{_mode}", 2, lambda m=_mode: nn.Conv2d(4, 4, 3, padding=2, padding_mode=m))
    conv(f"conv3d-{_mode}", 3, lambda m=_mode: nn.Conv3d(4, 4, 3, padding=1, padding_mode=m))
conv("conv2d-same", 2, lambda: nn.Conv2d(4, 4, (3, 2), dilation=(1, 2), padding="same"))
conv("conv1d-same-dilated", 1, lambda: nn.Conv1d(4, 4, 4, dilation=2, padding="same"))
conv("conv2d-transposed-depthwise", 2, lambda: nn.ConvTranspose2d(4, 4, 2, groups=4, stride=2))
conv("conv2d-uneven", 2, lambda: nn.Conv2d(4, 4, (1, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)))
row("conv2d-unbatched", seq(lambda: nn.Conv2d(2, 4, 3), nn.Tanh, lambda: nn.Conv2d(4, 3, 2)), (2, 6, 6))
row("conv2d-channel-multiplier", seq(lambda: nn.Conv2d(2, 3, 1), lambda: nn.Conv2d(3, 6, 3, groups=3)), (2, 2, 6, 6))
row(
    "resnet-block",
    lambda: Residual(),
    (4, 3, 6, 6),
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.c1, self.n1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c2, self.n2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.n1(self.c1(x)), inplace=True)
        y = self.n2(self.c2(y))
        y += x
        return self.head(F.relu(y).mean((2, 3)))


# --- normalisation


class PadChannels(nn.Module):
    """Option-A shortcut: new channels are zero, and batch norm sees them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 1, 1))


for _train in (True, False):
    _mode = "train" if _train else "eval"
    row(
        f"batchnorm1d-{_mode}",
        seq(lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), nn.Tanh, lambda: nn.Linear(8, 3)),
        (6, 6),
        train=_train,
    )
    for _affine in (True, False):
        row(
            f"batchnorm2d-{_mode}{'' if _affine else '-no-affine'}",
            seq(
                lambda: nn.Conv2d(2, 4, 3),
                lambda a=_affine: nn.BatchNorm2d(4, affine=a),
                nn.ReLU,
                lambda: nn.Conv2d(4, 2, 3),
            ),
            (4, 2, 6, 6),
            train=_train,
        )
row(
    "batchnorm2d-zero-channels",
    seq(lambda: nn.Conv2d(2, 3, 3), PadChannels, lambda: nn.BatchNorm2d(5), nn.ReLU, lambda: nn.Conv2d(5, 2, 3)),
    (4, 2, 6, 6),
)
row(
    "batchnorm2d-no-running-stats",
    seq(lambda: nn.Conv2d(2, 4, 3), lambda: nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU),
    (4, 2, 6, 6),
)
row("batchnorm3d-train", seq(lambda: nn.Conv3d(2, 3, 2), lambda: nn.BatchNorm3d(3), nn.Tanh), (3, 2, 4, 4, 4))
row("batchnorm1d-sequence", seq(lambda: nn.Conv1d(2, 3, 2), lambda: nn.BatchNorm1d(3), nn.Tanh), (3, 2, 6))
for _affine in (True, False):
    _tail = "" if _affine else "-no-affine"
    row(
        f"layernorm{_tail}",
        seq(
            lambda: nn.Linear(6, 8),
            lambda a=_affine: nn.LayerNorm(8, elementwise_affine=a),
            nn.GELU,
            lambda: nn.Linear(8, 3),
        ),
    )
    row(
        f"groupnorm{_tail}",
        seq(
            lambda: nn.Conv2d(2, 4, 3),
            lambda a=_affine: nn.GroupNorm(2, 4, affine=a),
            nn.ReLU,
            lambda: nn.Conv2d(4, 2, 2),
        ),
        (3, 2, 6, 6),
    )
    row(
        f"instancenorm2d{_tail}",
        seq(
            lambda: nn.Conv2d(2, 4, 3),
            lambda a=_affine: nn.InstanceNorm2d(4, affine=a),
            nn.Tanh,
            lambda: nn.Conv2d(4, 2, 2),
        ),
        (3, 2, 6, 6),
    )
    row(
        f"rmsnorm{_tail}",
        seq(
            lambda: nn.Linear(6, 8),
            lambda a=_affine: nn.RMSNorm(8, 1e-5, elementwise_affine=a),
            nn.SiLU,
            lambda: nn.Linear(8, 3),
        ),
    )
row("layernorm-two-dims", seq(lambda: nn.Linear(6, 8), lambda: nn.LayerNorm((3, 8)), nn.Tanh), (4, 3, 6))
row("groupnorm-vector", seq(lambda: nn.Linear(6, 8), lambda: nn.GroupNorm(2, 8), nn.Tanh))
row("instancenorm1d", seq(lambda: nn.Conv1d(2, 4, 3), lambda: nn.InstanceNorm1d(4, affine=True), nn.Tanh), (3, 2, 8))
row(
    "instancenorm2d-running-eval",
    seq(lambda: nn.Conv2d(2, 4, 3), lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh),
    (3, 2, 6, 6),
    train=False,
)
row("local-response-norm", seq(lambda: nn.Conv2d(2, 4, 3), lambda: nn.LocalResponseNorm(2)), (3, 2, 6, 6))

# --- pooling


def pool(id: str, nd: int, layer: Callable[[], nn.Module], size: tuple[int, ...] | None = None) -> None:
    row(
        id,
        seq(lambda: _CONV[nd](2, 3, 3, padding=1), nn.Tanh, layer, lambda: _CONV[nd](3, 2, 1)),
        (2, 2, *(size or _SIZE[nd])),
    )


_MAX = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVG = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_AMAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
_AAVG = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
for _nd in (1, 2, 3):
    pool(f"maxpool{_nd}d", _nd, lambda n=_nd: _MAX[n](2))
    pool(f"maxpool{_nd}d-padded-ceil", _nd, lambda n=_nd: _MAX[n](3, 2, padding=1, ceil_mode=True))
    pool(f"maxpool{_nd}d-dilated", _nd, lambda n=_nd: _MAX[n](2, 1, dilation=2))
    pool(f"avgpool{_nd}d", _nd, lambda n=_nd: _AVG[n](2))
    pool(
        f"avgpool{_nd}d-padded-ceil",
        _nd,
        lambda n=_nd: _AVG[n](3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    )
    pool(f"adaptive-avgpool{_nd}d", _nd, lambda n=_nd: _AAVG[n](3))
    pool(f"adaptive-maxpool{_nd}d", _nd, lambda n=_nd: _AMAX[n](3))
    pool(f"global-avgpool{_nd}d", _nd, lambda n=_nd: _AAVG[n](1))
    pool(f"global-maxpool{_nd}d", _nd, lambda n=_nd: _AMAX[n](1))
pool("adaptive-avgpool2d-even", 2, lambda: nn.AdaptiveAvgPool2d(3), (6, 6))
pool("lppool2d", 2, lambda: nn.LPPool2d(2, 2))


class Unpool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(*self.down(self.conv(x)))


row(
    "max-unpool2d",
    Unpool,
    (2, 2, 6, 6),
    falls_back=("aten.max_pool2d_with_indices.default", "aten.index_put.default"),
    why="the winners' positions move",
)

# --- activations

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": lambda: nn.LeakyReLU(0.1),
    "prelu": nn.PReLU,
    "prelu-channels": lambda: nn.PReLU(8),
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(1.3),
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softplus-beta": lambda: nn.Softplus(beta=2.5, threshold=1.0),
    "softsign": nn.Softsign,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
    "softshrink": lambda: nn.Softshrink(0.3),
    "hardshrink": lambda: nn.Hardshrink(0.3),
    "hardtanh": lambda: nn.Hardtanh(-0.4, 0.6),
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "glu": lambda: nn.GLU(-1),
    "threshold": lambda: nn.Threshold(0.1, -0.2),
    "softmax": lambda: nn.Softmax(-1),
    "logsoftmax": lambda: nn.LogSoftmax(-1),
    "softmin": lambda: nn.Softmin(-1),
}
for _name, _make in _ACTIVATIONS.items():
    _width = 4 if _name == "glu" else 8
    row(f"act-{_name}", seq(lambda: nn.Linear(6, 8), _make, lambda w=_width: nn.Linear(w, 5)))
row("act-rrelu-eval", seq(lambda: nn.Linear(6, 8), nn.RReLU, lambda: nn.Linear(8, 5)), train=False)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 6 * x


for _name in (
    "elu",
    "gelu",
    "gelu-tanh",
    "mish",
    "silu",
    "softplus",
    "hardswish",
    "hardsigmoid",
    "relu6",
    "logsigmoid",
):
    row(f"act-{_name}-large", seq(lambda: nn.Linear(6, 8), Scaled, _ACTIVATIONS[_name], lambda: nn.Linear(8, 5)))
row("act-softmax2d", seq(lambda: nn.Conv2d(2, 4, 2), nn.Softmax2d, lambda: nn.Conv2d(4, 2, 2)), (2, 2, 5, 5))
row("act-prelu-image", seq(lambda: nn.Conv2d(2, 4, 2), lambda: nn.PReLU(4), lambda: nn.Conv2d(4, 2, 2)), (2, 2, 5, 5))

# --- attention


class Attention(nn.Module):
    def __init__(self, *, causal: bool = False, padding: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inp = nn.Linear(6, 8)
        self.causal, self.padding = causal, padding

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        pad = None
        if self.padding:
            pad = torch.arange(x.shape[1])[None, :] >= torch.tensor([[x.shape[1]], [3], [2]])
            pad = torch.zeros(pad.shape, dtype=x.dtype).masked_fill(pad, -math.inf) if self.causal else pad
        return self.inner(h, h, h, attn_mask=mask, key_padding_mask=pad, need_weights=False)[0]


for _causal in (False, True):
    for _padding in (False, True):
        _tail = ("-causal" if _causal else "") + ("-padding" if _padding else "")
        row(f"mha{_tail}", lambda c=_causal, p=_padding: Attention(causal=c, padding=p), (3, 4, 6))


class SelfAttention(nn.Module):
    """Written out, with one layer for queries, keys and values or with three, before a norm or after it."""

    def __init__(self, *, packed: bool, causal: bool, first: bool) -> None:
        super().__init__()
        self.packed, self.causal, self.first = packed, causal, first
        self.inp, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        widths = [24] if packed else [8, 8, 8]  # no bias: that of the keys has no gradient
        self.inner = nn.ModuleList([nn.Linear(8, width, bias=False) for width in widths])

    def attend(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        if self.packed:
            heads = self.inner[0](x).view(n, tokens, 2, 3, 4).permute(3, 0, 2, 1, 4).unbind(0)
        else:
            heads = [layer(x).view(n, tokens, 2, 4).transpose(1, 2) for layer in self.inner]
        attended = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        return self.out(attended.transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for _ in range(2):  # a weight before the second round moves everything that comes into it
            x = x + self.attend(self.norm(x)) if self.first else self.norm(x + self.attend(x))
        return x


for _packed in (False, True):
    for _first in (False, True):
        row(
            f"self-attention{'-packed' if _packed else ''}{'-norm-first' if _first else ''}",
            lambda p=_packed, f=_first: SelfAttention(packed=p, causal=p != f, first=f),
            (3, 4, 6),
        )


class MaskedByContent(SelfAttention):
    """A mask that moves, made before the queries of what they are made of."""

    def __init__(self) -> None:
        super().__init__(packed=False, causal=False, first=True)
        self.mask = nn.Linear(8, 8)

    def attend(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        mask = self.mask(x).view(n, tokens, 2, tokens).transpose(1, 2)
        heads = [layer(x).view(n, tokens, 2, 4).transpose(1, 2) for layer in self.inner]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out(attended.transpose(1, 2).reshape(n, tokens, width))


row(
    "self-attention-moving-mask",
    lambda: MaskedByContent(),
    (3, 4, 6),
    falls_back=("aten.scaled_dot_product_attention.default",),
    why="a mask that moves has no rule",
)

row("linear-by-itself", seq(lambda: nn.Linear(6, 8), lambda: nn.LayerNorm(8), lambda: Itself()))
row("linear-gelu-by-itself", seq(lambda: nn.Linear(6, 8), nn.GELU, lambda: Itself()))


class Itself(nn.Module):
    """Rows times themselves, as in contrastive losses."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, x)


def _heads(h: Tensor, g: Tensor, **kwargs: Any) -> Tensor:
    q, k = h.unflatten(-1, (2, 4)).transpose(1, 2), g.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, q * k, **kwargs)


fn("sdpa", _heads, (2, 4, 6))
fn("sdpa-causal", lambda h, g: _heads(h, g, is_causal=True), (2, 4, 6))
fn("sdpa-mask", lambda h, g: _heads(h, g, attn_mask=torch.ones(4, 4, dtype=torch.bool).tril(1)), (2, 4, 6))
row("mha-weights", lambda: MhaWeights(), (2, 3, 8))


class MhaWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True, kdim=8, vdim=4, add_bias_kv=True)
        self.value = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.inner(x, x, self.value(x))
        return torch.cat([out.flatten(1), weights.flatten(1)], 1)


for _first in (False, True):
    row(
        f"transformer-encoder{'-norm-first' if _first else ''}",
        lambda n=_first: nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.1, batch_first=True, norm_first=n, activation="gelu"
        ),
        (3, 4, 8),
    )
row(
    "transformer-decoder",
    lambda: nn.TransformerDecoderLayer(8, 2, 12, dropout=0.1, batch_first=True),
    inputs=lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 8)),
)

# --- embedding


class Words(nn.Module):
    """Embedding + learned positions -> linear tied to the embedding, if wished."""

    def __init__(self, *, tied: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6, **kwargs)
        self.positions = nn.Parameter(torch.randn(5, 6) * 0.3)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.words(index) + self.positions)))


def _words() -> tuple[Tensor]:
    return (torch.tensor([[0, 1, 2, 1, 6], [3, 3, 0, 5, 4], [1, 6, 6, 2, 0]]),)


row("embedding", Words, inputs=_words)
row("embedding-padding", lambda: Words(padding_idx=0), inputs=_words)
row("embedding-tied", lambda: Words(tied=True), inputs=_words)
for _mode in ("sum", "mean", "max"):
    row(
        f"embedding-bag-{_mode}",
        seq(lambda m=_mode: nn.EmbeddingBag(7, 6, mode=m), nn.Tanh, lambda: nn.Linear(6, 3)),
        inputs=_words,
    )


class Bags(nn.Module):
    """Bags of any sizes, an empty one too, with padding or with a weight for each pick."""

    def __init__(self, *, weighted: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.bags, self.out, self.weighted = nn.EmbeddingBag(7, 6, **kwargs), nn.Linear(6, 3), weighted

    def forward(self, index: Tensor) -> Tensor:
        weights = (index + 1.0).flatten().to(self.out.weight.dtype) if self.weighted else None
        starts = torch.tensor([0, 1, 1, 9])
        return self.out(torch.tanh(self.bags(index.flatten(), starts, per_sample_weights=weights)))


row("embedding-bag-weighted", lambda: Bags(weighted=True, mode="sum"), inputs=_words)
for _mode in ("sum", "mean", "max"):
    row(f"embedding-bag-padded-{_mode}", lambda m=_mode: Bags(mode=m, padding_idx=1), inputs=_words)

# --- recurrent


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **kwargs: Any) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 3)
        self.inner = kind(3, 4, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inp(x))[0]


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    row(_kind.__name__.lower(), lambda k=_kind: Recurrent(k), (2, 3, 6))
row("lstm-two-layers-bidirectional", lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (2, 3, 6))
row("gru-two-layers-bidirectional", lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), (2, 3, 6))
row("rnn-relu", lambda: Recurrent(nn.RNN, nonlinearity="relu", num_layers=2), (2, 3, 6))
row("lstm-projection", lambda: Recurrent(nn.LSTM, proj_size=2), (2, 3, 6))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.lstm(x)
        h, c = self.lstm(x * 0.5, (h, c))
        return self.rnn(self.gru(h, c))


row("recurrent-cells", Cells)

# --- moving, picking and joining

_INDEX = [[0, 3, 3], [7, 1, 0], [2, 2, 5], [4, 6, 1]]
fn("add-residual", lambda h, g: h + torch.tanh(g + h))
fn("sub-rsub", lambda h, g: (1.5 - h) * (h - 2 * g) + torch.sub(h, g, alpha=0.3))
fn("cat", lambda h, g: torch.cat([h, g.tanh(), torch.ones_like(h)], 1).square())
fn("stack", lambda h, g: torch.stack([h, g], 1).square())
fn("split-chunk-unbind", lambda h, g: h.chunk(2, 1)[0] * g.split([3, 4, 1], 1)[1] * h.unbind(1)[2][:, None])
fn("gather", lambda h, g: h.gather(1, torch.tensor(_INDEX)) * g.gather(0, torch.tensor(_INDEX).clamp(max=3)))
fn("index-select", lambda h, g: h.index_select(1, torch.tensor([1, 1, 5])) * g.index_select(1, torch.tensor([0, 7, 2])))
fn("advanced-indexing", lambda h, g: h[torch.tensor([0, 2]), torch.tensor([1, 5])] * g[:, [3, 3, 0]][1:3, 1])
fn("bool-mask-constant", lambda h, g: h[:, torch.arange(8) % 2 == 0] * g[:, torch.tensor([0, 1, 2, 3])])
fn("slicing", lambda h, g: h[:, 1:7:2] * g[1:3, -3:].sum(0) + h[..., None, 2])
fn("index-put", lambda h, g: torch.index_put(h, (torch.tensor([0, 1]), torch.tensor([2, 3])), g[0, :2] * 2).square())
fn("in-place-slice", lambda h, g: _in_place(h, g))


def _assigned(h: Tensor, where: Any, value: Tensor) -> Tensor:
    out = h.clone()
    out[where] = value
    return out.square()


# torch.vmap fails where an end of a slice is negative or open
fn("slice-assign-between", lambda h, g: _assigned(h, (slice(None), slice(1, -1)), g[:, 2:] * 2))
fn("slice-assign-from", lambda h, g: _assigned(h, (slice(None), slice(5, None)), g[:, :3] * 2))
fn("slice-assign-rows", lambda h, g: _assigned(h, slice(-2, None), g[:2] * 2))
fn("select-assign", lambda h, g: _assigned(h, (slice(None), -1), g[:, 0] * 2))
fn("scatter-add", lambda h, g: h.scatter_add(1, torch.tensor(_INDEX), g[:, :3]).square())
fn("scatter-src", lambda h, g: h.scatter(1, torch.tensor([[0, 3], [7, 1], [2, 5], [4, 6]]), g[:, :2]).square())
fn("index-add", lambda h, g: h.index_add(1, torch.tensor([0, 0, 5]), g[:, :3]).square())
fn("flip-roll", lambda h, g: h.flip(1) * g.roll(2, 1))
fn("rot-transpose-permute", lambda h, g: (h.t() @ g).unflatten(0, (2, 4)).permute(2, 0, 1).square())
fn("expand-repeat", lambda h, g: h[:, None].expand(-1, 3, -1) * g.repeat(1, 3).view(4, 3, 8))
fn("repeat-interleave", lambda h, g: h.repeat_interleave(2, 1) * g.repeat(1, 2))
fn("tril-triu", lambda h, g: h.tril() * h + g.triu(1) * g)
fn("diagonal", lambda h, g: (h @ g.t()).diagonal().square())
fn("unfold", lambda h, g: h.unfold(1, 3, 2).square().sum(-1) * g[:, :3])
fn("masked-fill", lambda h, g: h.masked_fill(torch.arange(8) % 3 == 0, 0.5) * g)
fn("pad-constant", lambda h, g: F.pad(h, (1, 2), value=0.7) * F.pad(g, (2, 1)))
fn("pad-negative", lambda h, g: F.pad(h, (-1, -1)) * g[:, :6])
fn("as-strided-free-view", lambda h, g: h.reshape(2, 2, 2, 4).flatten(1, 2).square() * g.view(2, 4, 4))
fn("squeeze-unsqueeze", lambda h, g: (h.unsqueeze(1) * g.unsqueeze(2)).sum(1, keepdim=True).squeeze(1))
fn("movedim-swapaxes", lambda h, g: h.view(4, 2, 4).movedim(1, 0).swapaxes(1, 2) * g.view(2, 4, 4))
fn("meshgrid-outer", lambda h, g: torch.outer(h[0], g[1]).square() + h[2][:, None] * g[3])


def _in_place(h: Tensor, g: Tensor) -> Tensor:
    h = h.clone()
    h[:, 2:4] = g[:, :2] * 3
    h[1] += g[0]
    h[:, 5].mul_(2)
    return h.square()


_UPSAMPLE = {
    "nearest": {"scale_factor": 2},
    "bilinear": {"scale_factor": 2, "align_corners": False},
    "bicubic": {"scale_factor": 2},
    "area": {"size": (3, 3)},
}
for _mode, _options in _UPSAMPLE.items():
    row(
        f"upsample2d-{_mode}",
        seq(lambda: nn.Conv2d(2, 3, 2), nn.Tanh, lambda m=_mode, o=_options: Resize(m, o), lambda: nn.Conv2d(3, 2, 2)),
        (2, 2, 5, 5),
    )
row(
    "upsample2d-bilinear-aligned",
    seq(lambda: nn.Conv2d(2, 3, 2), lambda: nn.Upsample(size=(7, 6), mode="bilinear", align_corners=True), nn.Tanh),
    (2, 2, 5, 5),
)
row(
    "upsample1d-linear",
    seq(lambda: nn.Conv1d(2, 3, 2), lambda: nn.Upsample(scale_factor=2, mode="linear"), nn.Tanh),
    (2, 2, 6),
)
row("upsample1d-nearest", seq(lambda: nn.Conv1d(2, 3, 2), lambda: nn.Upsample(scale_factor=2), nn.Tanh), (2, 2, 6))
row(
    "upsample3d-nearest", seq(lambda: nn.Conv3d(2, 3, 2), lambda: nn.Upsample(scale_factor=2), nn.Tanh), (2, 2, 3, 3, 3)
)
row(
    "upsample3d-trilinear",
    seq(lambda: nn.Conv3d(2, 3, 2), lambda: nn.Upsample(scale_factor=2, mode="trilinear"), nn.Tanh),
    (2, 2, 3, 3, 3),
)


class Resize(nn.Module):
    def __init__(self, mode: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.mode, self.options = mode, options

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, mode=self.mode, **self.options)


row(
    "pixel-shuffle",
    seq(lambda: nn.Conv2d(2, 4, 2), lambda: nn.PixelShuffle(2), nn.Tanh, lambda: nn.PixelUnshuffle(2)),
    (2, 2, 5, 5),
)
row("channel-shuffle", seq(lambda: nn.Conv2d(2, 4, 2), lambda: nn.ChannelShuffle(2), nn.Tanh), (2, 2, 5, 5))
row(
    "unfold-fold",
    seq(lambda: nn.Conv2d(2, 3, 2), lambda: nn.Unfold(2), nn.Tanh, lambda: nn.Fold((4, 4), 2)),
    (2, 2, 5, 5),
)
row(
    "zero-pad",
    seq(lambda: nn.Conv2d(2, 3, 2), lambda: nn.ZeroPad2d((1, 0, 2, 1)), lambda: nn.Conv2d(3, 2, 2)),
    (2, 2, 5, 5),
)
row("flatten", seq(lambda: nn.Conv2d(2, 3, 2), nn.Tanh, nn.Flatten, lambda: nn.Linear(48, 3)), (3, 2, 5, 5))

# --- arithmetic and reductions

fn("mul-div", lambda h, g: h * g / (2 + g * g) + h / 3 + 2 / (g.abs() + 1))
fn(
    "addcmul-addcdiv-lerp",
    lambda h, g: torch.addcmul(h, h, g, value=0.5) + torch.addcdiv(g, h, 2 + g * g) + torch.lerp(h, g, 0.3),
)
fn("lerp-tensor", lambda h, g: torch.lerp(h, g, h.sigmoid()))
fn(
    "exp-log",
    lambda h, g: (
        (h.exp() + 1).log() + torch.expm1(g) * torch.log1p(g * g) + (h * h + 1).log2() + (g * g + 1).log10() + h.exp2()
    ),
)
fn("sqrt-rsqrt-reciprocal", lambda h, g: (h * h + 0.1).sqrt() * (g * g + 0.3).rsqrt() + (h * h + 1).reciprocal())
fn("pow", lambda h, g: h**3 + g**2 + (h * h + 0.2) ** 1.7 + (g * g + 1) ** -1.5 + (g * g + 0.5) ** -2 + h**0)
fn("pow-tensor", lambda h, g: (h * h + 0.5) ** g + 2.0**h)
fn("trigonometric", lambda h, g: h.sin() * g.cos() + torch.atan(h) + torch.sinh(g) * torch.cosh(h) + torch.tan(h * 0.3))
fn(
    "inverse-trigonometric",
    lambda h, g: (
        torch.asin(h.tanh() * 0.9)
        + torch.acos(g.tanh() * 0.9)
        + torch.asinh(h)
        + torch.acosh(1.5 + g * g)
        + torch.atanh(h.tanh() * 0.8)
    ),
)
fn("atan2-hypot", lambda h, g: torch.atan2(h, g) + torch.hypot(h, g))
fn("erf-erfc", lambda h, g: torch.erf(h) + torch.erfc(g))
fn("abs-neg-sign-free", lambda h, g: h.abs() - (-g).abs())
fn("maximum-minimum", lambda h, g: torch.maximum(h, g) * torch.minimum(h, g))
fn("clamp", lambda h, g: h.clamp(-0.3, 0.4) + g.clamp(min=0.1) + h.clamp(max=0.2))
fn("clamp-tensor", lambda h, g: torch.clamp(h, g - 0.3, g + 0.2))
fn("where", lambda h, g: torch.where(h > g, h * g, g.square()))
fn("where-constant-mask", lambda h, g: torch.where(torch.arange(8) % 2 == 0, h, g.square()))
fn("where-safe", lambda h, g: torch.where(h > 0.2, h.clamp(min=0.2).log(), torch.zeros_like(h)) * g)
fn("relu-squared", lambda h, g: F.relu(h).square() + g)
fn("cumsum", lambda h, g: h.cumsum(1) * g.cumsum(0))
fn("cumprod", lambda h, g: (1 + h).cumprod(1) * g)
fn("logcumsumexp", lambda h, g: h.logcumsumexp(1) * g)
fn("cummax", lambda h, g: h.cummax(1).values * g)
fn("amax-amin", lambda h, g: h.amax(1) * g.amin((0, 1)) + h.max() * g.min())
fn("max-dim", lambda h, g: h.max(1).values * g.min(1, keepdim=True).values)
fn("aminmax", lambda h, g: h.aminmax(dim=1).max * g.aminmax(dim=1).min)
fn("sort", lambda h, g: h.sort(1).values * g)
fn("topk", lambda h, g: h.topk(3, 1).values.square())
fn("median", lambda h, g: h.median(1).values.square() * g[:, 0])
fn("sum-mean", lambda h, g: h.sum(1) * g.mean(0, keepdim=True).sum() + h.mean() * g.sum((0, 1)) + h.square().sum())
fn("prod", lambda h, g: (1 + h).prod(1) * g.prod(1, keepdim=True) + (1 + h / 8).prod())
fn(
    "var-std",
    lambda h, g: h.var(1) * g.std(0).sum() + h.var(unbiased=False) + g.std((0, 1), correction=0, keepdim=True)[0],
)
fn("var-mean", lambda h, g: torch.var_mean(h, 1)[0] * torch.std_mean(g, 1)[1])
fn("logsumexp", lambda h, g: h.logsumexp(1) * g.logsumexp((0, 1)))
fn("norm-1", lambda h, g: h.norm(1, dim=1) * torch.linalg.vector_norm(g, 1))
fn("norm-2", lambda h, g: h.norm(dim=1) * torch.linalg.vector_norm(g) + torch.linalg.norm(h[0]))
fn("norm-inf", lambda h, g: torch.linalg.vector_norm(h, math.inf, dim=1) * torch.linalg.vector_norm(g, math.inf))
fn("norm-3", lambda h, g: h.norm(3, dim=1) * g.norm(1.5, dim=1))
fn("norm-fro-matrix", lambda h, g: torch.linalg.matrix_norm(h) * g.norm("fro"))
fn("normalize", lambda h, g: F.normalize(h, dim=1) * F.normalize(g, p=1, dim=0))
fn("cosine-similarity", lambda h, g: F.cosine_similarity(h, g, dim=1))
fn("pairwise-distance", lambda h, g: F.pairwise_distance(h, g))
fn("cdist", lambda h, g: torch.cdist(h, g))
fn("einsum", lambda h, g: torch.einsum("ni,nj->nij", h, g) + torch.einsum("ni,ni->n", h, g)[:, None, None])
fn("bmm", lambda h, g: torch.bmm(h.view(4, 2, 4), g.view(4, 4, 2)))
fn("matmul-mv-dot", lambda h, g: (h @ g[0])[:, None] * (h @ g.t()) + torch.dot(h[0], g[1]))
fn(
    "baddbmm-addmm",
    lambda h, g: torch.baddbmm(h.view(4, 2, 4)[..., :2], h.view(4, 2, 4), g.view(4, 4, 2), beta=0.5, alpha=2.0),
)
fn("addmm-scaled", lambda h, g: torch.addmm(h[:, :4], h, g.t(), beta=0.5, alpha=2.0))
fn("outer-product", lambda h, g: h[:, :, None] * g[:, None, :])
fn("remainder-fmod", lambda h, g: torch.remainder(h, 0.7) * g + torch.fmod(g, 0.9))
fn("logaddexp", lambda h, g: torch.logaddexp(h, g))
fn("xlogy", lambda h, g: torch.xlogy(h, g.square() + 0.1))
fn("nan-to-num", lambda h, g: torch.nan_to_num(h) * g)
fn("logit", lambda h, g: torch.logit(h.sigmoid() * 0.9 + 0.05) * g)
fn("sigmoid-product", lambda h, g: h * torch.sigmoid(1.702 * h) + torch.sigmoid(g).square())

# --- parameters of every kind

row("weight-norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)))
row(
    "weight-norm-conv",
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(2, 4, 2)), nn.Tanh()),
    (2, 2, 4, 4),
)
row(
    "spectral-norm-eval",
    lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
    train=False,
)
row("spectral-norm-train", lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh()))
row(
    "orthogonal",
    lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh()),
    falls_back=("aten.linalg_matrix_exp.default",),
    why="matrix factorisations have no rule",
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class TiedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


class TwiceUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(-0.2))
        self.temperature = nn.Parameter(torch.tensor([0.7]))
        self.lin = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.lin(x) + self.shift) / self.temperature.exp()


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8).t() * 0.4)
        self.kernel = nn.Parameter((torch.randn(3, 3, 1, 2) * 0.3).permute(3, 2, 0, 1))
        self.every_other = nn.Parameter((torch.randn(16) * 0.3)[::2])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.weight.t() + self.every_other)
        return F.conv2d(h.view(-1, 1, 2, 4).tanh(), self.kernel, padding=1)


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)
        self.two.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


row("tied-linear", Tied)
row("tied-transposed", TiedTransposed)
row("twice-used", TwiceUsed, (3, 2, 5, 5))
row("scalar-parameter", Scalar)
row("non-contiguous-parameter", Strided)
row("frozen-and-unused-parameters", PartlyFrozen)


class Extra(nn.Module):
    """A parameter that the model's forward does not read; the objective does."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.center = nn.Linear(6, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def _l2(model: nn.Module, batch: Any) -> Tensor:
    return readout(model(*batch[0])) + 0.1 * sum(p.square().sum() for p in model.parameters())


def _l1(model: nn.Module, batch: Any) -> Tensor:
    return readout(model(*batch[0])) + 0.1 * sum(p.abs().sum() for p in model.parameters())


def _center(model: Any, batch: Any) -> Tensor:
    return (model(*batch[0]) - model.center).square().sum(1).sqrt().mean()


row("l2-penalty", seq(lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 3)), objective=_l2)
row("l1-penalty", seq(lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 3)), objective=_l1)
row("parameter-in-loss-only", Extra, objective=_center)

# --- losses and dropout


def loss(id: str, function: Callable[..., Tensor], targets: Callable[[], tuple[Any, ...]], out: int = 5) -> None:
    row(f"loss-{id}", seq(lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, out)), targets=targets, loss=function)


def _labels() -> tuple[Tensor]:
    return (torch.tensor([0, 3, 4, 1]),)


def _numbers() -> tuple[Tensor]:
    return (torch.randn(4, 5),)


def _probabilities() -> tuple[Tensor]:
    return (torch.randn(4, 5).softmax(1),)


_W = [0.5, 1.0, 2.0, 0.25, 1.5]
loss("cross-entropy", F.cross_entropy, _labels)
loss("cross-entropy-smoothing", lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1), _labels)
loss("cross-entropy-ignore", lambda o, y: F.cross_entropy(o, y, ignore_index=3), _labels)
loss("cross-entropy-weights", lambda o, y: F.cross_entropy(o, y, weight=torch.tensor(_W, dtype=o.dtype)), _labels)
loss("cross-entropy-sum", lambda o, y: F.cross_entropy(o, y, reduction="sum"), _labels)
loss("cross-entropy-none", lambda o, y: F.cross_entropy(o, y, reduction="none").square().mean(), _labels)
loss("cross-entropy-probabilities", F.cross_entropy, _probabilities)
loss("mse", F.mse_loss, _numbers)
loss("l1", F.l1_loss, _numbers)
loss("huber", lambda o, y: F.huber_loss(o, y, delta=0.7), _numbers)
loss("smooth-l1", lambda o, y: F.smooth_l1_loss(o, y, beta=0.5), _numbers)
loss("bce", lambda o, y: F.binary_cross_entropy(o.sigmoid(), y), _probabilities)
loss("bce-logits", F.binary_cross_entropy_with_logits, _probabilities)
loss(
    "bce-logits-weights",
    lambda o, y: F.binary_cross_entropy_with_logits(o, y, pos_weight=torch.tensor(_W, dtype=o.dtype)),
    _probabilities,
)
loss("kldiv", lambda o, y: F.kl_div(F.log_softmax(o, 1), y, reduction="batchmean"), _probabilities)
loss(
    "kldiv-log-target",
    lambda o, y: F.kl_div(F.log_softmax(o, 1), y.log(), reduction="sum", log_target=True),
    _probabilities,
)
loss("nll", lambda o, y: F.nll_loss(F.log_softmax(o, 1), y), _labels)
loss("hinge", lambda o, y: F.multi_margin_loss(o, y), _labels)
loss("soft-margin", lambda o, y: F.soft_margin_loss(o, y.sign()), _numbers)
loss("hinge-embedding", lambda o, y: F.hinge_embedding_loss(o, y.sign()), _numbers)
loss("margin-ranking", lambda o, y: F.margin_ranking_loss(o[:, 0], o[:, 1], y[:, 0].sign(), margin=0.1), _numbers)
loss("triplet", lambda o, y: F.triplet_margin_loss(o, y, -y), _numbers)
loss("gaussian-nll", lambda o, y: ((o.square() + 0.1).log() + (o - y).square() / (o.square() + 0.1)).mean(), _numbers)
loss("poisson-nll", lambda o, y: F.poisson_nll_loss(o, y.exp()), _numbers)
loss(
    "cosine-embedding",
    lambda o, y: F.cosine_embedding_loss(o, y, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=o.dtype)),
    _numbers,
)
loss(
    "hand-written",
    lambda o, y: ((o - y).abs() + 1e-3).pow(1.5).mean() + (o.softmax(1) * o.log_softmax(1)).sum(),
    _numbers,
)
loss(
    "focal",
    lambda o, y: (
        (1 - torch.exp(-F.cross_entropy(o, y, reduction="none"))) ** 2 * F.cross_entropy(o, y, reduction="none")
    ).mean(),
    _labels,
)
row(
    "loss-cross-entropy-image",
    seq(lambda: nn.Conv2d(2, 4, 3, padding=1), nn.Tanh, lambda: nn.Conv2d(4, 3, 1)),
    (2, 2, 4, 4),
    targets=lambda: (ints(3, 2, 4, 4),),
    loss=F.cross_entropy,
)
for _p in (0.1, 0.5):
    row(f"dropout-{_p}", seq(lambda: nn.Linear(6, 8), lambda p=_p: nn.Dropout(p), nn.Tanh, lambda: nn.Linear(8, 5)))
row(
    "dropout2d",
    seq(lambda: nn.Conv2d(2, 4, 2), lambda: nn.Dropout2d(0.5), nn.Tanh, lambda: nn.Conv2d(4, 2, 2)),
    (2, 2, 5, 5),
)
row("dropout-eval", seq(lambda: nn.Linear(6, 8), nn.Dropout, nn.Tanh, lambda: nn.Linear(8, 5)), train=False)
row("alpha-dropout", seq(lambda: nn.Linear(6, 8), lambda: nn.AlphaDropout(0.2), nn.Tanh, lambda: nn.Linear(8, 5)))


class OwnDtypes(nn.Module):
    """A model with casts of its own: they must not make the base pass float32."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.dtype
        h = self.one(x).tanh()
        scale = torch.full((), 0.375, dtype=torch.float32)
        h = h.to(torch.float32 if wide is torch.float32 else wide) * scale.to(h.dtype)
        return self.two(h).float() if wide is torch.float32 else self.two(h)


row("own-casts", OwnDtypes)
