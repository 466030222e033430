"""Stretches of the graph that one fused kernel takes whole, found by pattern for any module.

A pattern looks only at ops, never at names. Where the carriers at run time are not the kernel's, or a parameter inside
the stretch moves, the generic rules run its nodes one by one: fusing changes speed, never meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

import dzkernels
from dzkernels import backends
from dzkernels._norm import window_gap

from .base_pass import Layouts
from .carriers import Carrier, Dense, OneChannel, OneEntry, Zero, dense, select
from .rules.attention import attention_base, attention_scale
from .rules.linear import Geometry
from .rules.loss import plain_labels
from .rules.norm import UPDATING, centred, layer_base

if TYPE_CHECKING:
    from .block import Block

aten = torch.ops.aten

Apply = Callable[["Block"], "Carrier | None"]
"""Runs the kernel on a block; None when it does not fit, and the generic rules take over."""


@dataclass(frozen=True)
class Step:
    """One entry of a schedule.

    nodes   in graph order; the difference of the last one is what later steps see
    kernel  name of the fused kernel, or "" for the generic rule of a single node
    apply   runs it
    frees   values that nothing reads after this step
    parts   the same nodes in shorter stretches, for when the kernel does not fit; without any, the generic rules run
    narrow  the kernel takes what one entry or one channel moves, and nothing more
    """

    nodes: tuple[fx.Node, ...]
    kernel: str
    apply: Apply | None
    frees: tuple[fx.Node, ...]
    parts: tuple[Step, ...] = ()
    narrow: bool = False


def schedule(suffix: Sequence[fx.Node], loss: fx.Node, *, first: Sequence[Pattern] = ()) -> tuple[Step, ...]:
    """The suffix as steps: fused where a pattern matches, otherwise node by node.

    ``first``: patterns that are tried before the others, which then make shorter stretches of the same nodes; see
    :func:`around_convolutions`.
    """
    inside = set(suffix)
    taken: set[fx.Node] = set()
    groups: dict[fx.Node, tuple[tuple[fx.Node, ...], str, Apply | None]] = {}
    parts: dict[fx.Node, tuple[Step, ...]] = {}
    narrow: set[fx.Node] = set()
    for node in suffix:
        if node in taken:
            continue
        for match in (*first, *PATTERNS):
            found = match(node, inside)
            if found is None or node not in found[0] or not _closed(found[0]):
                continue
            if not any(part in taken or part in groups for part in found[0]):
                taken.update(found[0])
                groups[found[0][-1]] = found
                if match in first:
                    shorter = schedule(found[0], loss)
                    own = tuple(replace(s, frees=tuple(n for n in s.frees if n in found[0])) for s in shorter)
                    parts[found[0][-1]] = own
                    if match in NORM_AFTER:
                        narrow.add(found[0][-1])
                break
        else:
            groups[node] = ((node,), "", None)
    ordered = [groups[node] for node in suffix if node in groups]
    last: dict[fx.Node, int] = {}
    for i, (nodes, _, _) in enumerate(ordered):
        for node in nodes:
            for source in node.all_input_nodes:
                last[source] = i
    return tuple(
        Step(
            nodes,
            name,
            apply,
            tuple(s for s, k in last.items() if k == i and s is not loss),
            parts.get(nodes[-1], ()),
            nodes[-1] in narrow,
        )
        for i, (nodes, name, apply) in enumerate(ordered)
    )


_DATA: dict[Any, int] = {aten.add.Tensor: 2, aten.scaled_dot_product_attention.default: 3}
"""How many of an op's first arguments a stretch may hand on inside; one where nothing is said."""


def _closed(nodes: Sequence[fx.Node]) -> bool:
    """Whether no value inside the stretch is a weight, bias or mask there too: kernels take those to stand still."""
    read: list[fx.Node] = []
    for node in nodes:
        fx.map_arg((node.args[_DATA.get(node.target, 1) :], node.kwargs), read.append)
    return set(nodes[:-1]).isdisjoint(read)


def _only_user(node: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    users = [u for u in node.users if u in inside]
    return users[0] if len(users) == 1 else None


# --- batch norm (+ residual) (+ ReLU) (+ max pool)

_RUNNING = (aten._native_batch_norm_legit_no_training.default,)


@dataclass(frozen=True)
class _Norm:
    """What a stretch norm (+ add) (+ relu) (+ pool) is made of; None where a part is missing."""

    norm: fx.Node
    residual: fx.Node | None
    before_relu: fx.Node
    relu: fx.Node | None
    pool: int
    out: fx.Node


def _norm_stretch(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    found = _norm_parts(node, inside)
    if found is None:
        return None
    nodes, parts = found
    return nodes, _norm_name(parts), lambda block: _run_norm(block, parts)


def _norm_name(parts: _Norm) -> str:
    after = {"+residual": parts.residual is not None, "+relu": parts.relu is not None, "+pool": parts.pool > 1}
    return "batch_norm" + "".join(name for name, there in after.items() if there)


def _norm_parts(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], _Norm] | None:
    """The nodes of the stretch that begins with this norm, and its parts."""
    if node.target not in (*UPDATING, *_RUNNING) or node.args[0].meta["val"].dim() != 4:  # type: ignore[union-attr]
        return None
    result = _only_user(node, inside)
    if result is None or result.target is not operator.getitem or result.args[1] != 0:
        return None
    nodes, at = [node, result], result
    residual, relu, pool = None, None, 1
    user = _only_user(at, inside)
    if user is not None and user.target is aten.add.Tensor and not user.kwargs:
        a, b = user.args
        other = b if a is at else a
        if isinstance(other, fx.Node) and other is not at and _same_shape(other, at):
            residual, at = other, user
            nodes.append(user)
            user = _only_user(at, inside)
    before = at
    if user is not None and user.target is aten.relu.default:
        relu = at = user
        nodes.append(user)
        user = _only_user(at, inside)
    if relu is not None and user is not None and (k := _square_pool(user)) > 1:
        picked = _only_user(user, inside)
        if picked is not None and picked.target is operator.getitem and picked.args[1] == 0:
            nodes += [user, picked]
            pool, at = k, picked
    return tuple(nodes), _Norm(node, residual, before, relu, pool, at)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape


def _square_pool(node: Any) -> int:
    """k for a k x k max pool with stride k and nothing else; 0 for any other node."""
    if node.target is not aten.max_pool2d_with_indices.default:
        return 0
    _, kernel, *rest = node.args
    stride, padding, dilation, ceil = [*rest, *([None] * 4)][:4]
    plain = set(padding or [0]) <= {0} and set(dilation or [1]) <= {1} and not ceil
    square = len(set(kernel)) == 1 and list(stride or kernel) == list(kernel)
    return int(kernel[0]) if square and plain else 0


def _run_norm(block: Block, parts: _Norm) -> Carrier | None:
    x, gamma, beta = parts.norm.args[:3]
    training, eps, mean, var = _statistics(parts.norm)
    if block.dtype is not torch.float32 or block.raw(mean) is not Zero or block.raw(var) is not Zero:
        return None
    d, extra = block.raw(x), block.raw(parts.residual)
    affine = [c for c in (block.raw(gamma), block.raw(beta)) if c is not Zero]
    zc, v, y, gap = _saved(block, parts)
    after: dict[str, Any] = {"relu": parts.relu is not None, "pool": parts.pool}
    if isinstance(d, Dense) and not affine:
        if isinstance(extra, OneChannel) and extra.dim != 1:
            return None
        return Dense(
            dzkernels.dense_batch_norm(
                **_dense_norm(block, parts, d, extra), gap=gap.images if gap is not None else None, pool=parts.pool,
                out_dtype=block.operands,
            )
        )  # fmt: skip
    if isinstance(d, Dense) and all(isinstance(c, Dense) for c in (*affine, *([] if extra is Zero else [extra]))):
        return _run_moving_affine(block, parts, (zc, v, y, gap), training, eps)
    if extra is not Zero:
        return None
    after |= {"y": y.planes if y is not None else None, "gap": gap.planes if gap is not None else None}
    nothing = torch.zeros_like(v)
    if isinstance(d, OneChannel) and d.dim == 1 and not affine:
        channel, weight = d.channel, None if gamma is None else block.exact(gamma)
        out = dzkernels.channel_batch_norm(
            d.values, channel, zc.planes, nothing, v, weight, eps=eps, training=training, **after
        )
    elif d is Zero and len(affine) == 1 and isinstance(entry := affine[0], OneEntry):
        # a coordinate of the affine part moves the norm's output by step, or step times the normalised input
        channel, n = entry.index[:, 0], len(entry.step)
        step = entry.step.reshape(n, 1, 1, 1)
        if block.raw(gamma) is Zero:
            moved = step.expand(n, *[k for i, k in enumerate(block.exact(x).shape) if i != 1])
        else:
            scale = (1 / (v + eps).sqrt())[channel].to(block.dtype).reshape(n, 1, 1, 1)
            moved = select(zc.planes, 1, channel) * (step * scale)
        out = dzkernels.channel_batch_norm(
            moved, channel, zc.planes, nothing, nothing + 1, eps=0.0, training=False, **after
        )
    else:
        return None
    return OneChannel(tuple(block.exact(parts.out).shape), 1, channel, out)


def _dense_norm(block: Block, parts: _Norm, d: Dense, extra: Any) -> dict[str, Any]:
    """What dense_batch_norm and batch_norm_conv2d take alike, where neither weight nor bias of the norm moves."""
    training, eps, _, _ = _statistics(parts.norm)
    x, gamma = parts.norm.args[:2]
    zc, var, y, _ = _saved(block, parts)
    return {
        "delta": d.values,
        "zc": zc.images,
        "var": var,
        "gamma": None if gamma is None else block.exact(gamma),
        "eps": eps,
        "training": training,
        "residual": None if extra is Zero else extra.values,
        "residual_channel": extra.channel if isinstance(extra, OneChannel) else None,
        "y": y.images if y is not None else None,
        "relu": parts.relu is not None,
        "moments": block.moments.get(x) if training else None,  # type: ignore[arg-type]
    }


def _run_moving_affine(
    block: Block,
    parts: _Norm,
    saved: tuple[Layouts, Tensor, Layouts | None, Layouts | None],
    training: bool,
    eps: float,
) -> Carrier:
    """Everything moves, as with random directions: (gamma + dgamma) d(hat) + dgamma hat + dbeta, one p at a time.

    The kernel takes a weight for all perturbations; the last two terms are a residual difference to it.
    """
    x, gamma, beta = parts.norm.args[:3]
    zc, v, y, gap = saved
    d, extra = block.raw(x), block.raw(parts.residual)
    dgamma, dbeta = block.raw(gamma), block.raw(beta)
    hat = block.saved(
        parts.norm, "hat", lambda: zc.images * (1 / (v + eps).sqrt()).to(block.dtype).reshape(1, -1, 1, 1)
    )
    out = []
    for p in range(block.count):
        weight, shift = block.exact(gamma), torch.zeros((), dtype=block.dtype, device=hat.device)
        if dgamma is not Zero:
            weight = weight + dgamma.values[p]
            shift = hat * dgamma.values[p].reshape(-1, 1, 1)
        if dbeta is not Zero:
            shift = shift + dbeta.values[p].reshape(-1, 1, 1)
        if extra is not Zero:
            shift = shift + extra.values[p]
        moved = dzkernels.dense_batch_norm(
            d.values[p : p + 1], zc.images, v, weight, eps=eps, training=training, out_dtype=block.operands,
            residual=shift.expand(hat.shape).unsqueeze(0), y=y.images if y is not None else None,
            gap=gap.images if gap is not None else None, relu=parts.relu is not None, pool=parts.pool,
        )  # fmt: skip
        out.append(moved.movedim(2, -1))
    return Dense(torch.cat(out).movedim(-1, 2))


def _statistics(norm: fx.Node) -> tuple[bool, float, Any, Any]:
    """(training, eps, running mean, running variance) of a batch-norm node."""
    rest = norm.args[3:]
    if norm.target in _RUNNING:
        return False, float(rest[3]), rest[0], rest[1]  # type: ignore[arg-type]
    return bool(rest[2]), float(rest[4]), rest[0], rest[1]  # type: ignore[arg-type]


def _saved(block: Block, parts: _Norm) -> tuple[Layouts, Tensor, Layouts | None, Layouts | None]:
    training, _, mean, var = _statistics(parts.norm)
    return block.saved(parts.norm, "fused", lambda: _saves(block, parts, training, mean, var))  # type: ignore[no-any-return]


def _saves(
    block: Block, parts: _Norm, training: bool, mean: Any, var: Any
) -> tuple[Layouts, Tensor, Layouts | None, Layouts | None]:
    """Centred input and variance of the norm, value before the ReLU, and distance from the winner of each window."""
    z = block.exact(parts.norm.args[0])
    if training:
        zc, v = centred(z, [0, 2, 3])
        v = v.reshape(-1)
    else:
        v = block.exact(var).double()
        zc = z - block.exact(mean).reshape(1, -1, 1, 1)
    y = block.exact(parts.before_relu)
    gap = window_gap(y, block.exact(parts.out), parts.pool) if parts.pool > 1 else None
    relu = parts.relu is not None
    return (
        Layouts(zc, block.dtype),
        v,
        Layouts(y, block.dtype) if relu else None,
        Layouts(gap, block.dtype) if gap is not None else None,
    )


# --- (batch norm (+ residual) (+ ReLU) +) convolution (+ moments of the next norm), where the backend fuses them

STRIP = 64
"""Output channels of one program of Triton's convolutions: the input is read once for each strip of them."""


@dataclass(frozen=True)
class _Convolution:
    """A convolution, the stretch before it that nothing else reads, and the norm in training that alone reads it."""

    before: _Norm | None
    conv: fx.Node
    after: _Norm | None


def _norm_and_convolution(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    found = _norm_parts(node, inside)
    if found is None or node.args[0] not in inside:
        return None
    nodes, before = found
    # An activation that others read too (the residual of a block) has to be written all the same. The stretch would
    # save one reading of it, a seventh of a residual block's traffic, and apply norm and sum again for every weight
    # that reads it, so the norm keeps it: in one pass, with the moments that the convolution before left.
    user = _only_user(before.out, inside)
    parts = None if user is None or before.pool > 1 or user.args[0] is not before.out else _around(user, inside, before)
    if parts is None:
        return None
    return (
        (*nodes, parts.conv),
        f"{_norm_name(before)}+{_conv_name(parts)}",
        lambda block: _run_convolution(block, parts),
    )


def _convolution_and_moments(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    parts = _around(node, inside, None)
    if parts is None or parts.after is None or node.args[0] not in inside:
        return None
    return (node,), _conv_name(parts), lambda block: _run_convolution(block, parts)


def _conv_name(parts: _Convolution) -> str:
    return "conv2d" + ("+moments" if parts.after is not None else "")


def _around(conv: fx.Node, inside: set[fx.Node], before: _Norm | None) -> _Convolution | None:
    """The convolution and its norms; None for another node, for what the kernels do not do, and where nothing is saved.

    Counted in values of a difference through memory. With the norm before it, its input is read once for each strip,
    where the norm reads it and writes what the convolution reads; moments save the next norm one reading.
    """
    if conv.target is not aten.convolution.default or conv.meta["val"].dim() != 4:
        return None
    geometry = Geometry(conv)
    if geometry.transposed or geometry.groups > 1:  # a program would read the channels of other groups too
        return None
    user = _only_user(conv, inside)
    found = None if user is None or user.args[0] is not conv else _norm_parts(user, inside)
    after = found[1] if found is not None and _statistics(found[1].norm)[0] else None
    taken, given = conv.args[0].meta["val"][0].numel(), conv.meta["val"][0].numel()  # type: ignore[union-attr]
    strips = -(-conv.meta["val"].shape[1] // STRIP)
    alone = taken * (3 if before is not None else 1) + given * (after is not None)
    return _Convolution(before, conv, after) if taken * strips < alone else None


def _run_convolution(block: Block, parts: _Convolution) -> Carrier | None:
    conv, before, after = parts.conv, parts.before, parts.after
    still = [*conv.args[1:3], *(before.norm.args[1:5] if before is not None else ())]
    d, extra = block.raw((before.norm if before is not None else conv).args[0]), block.raw(before and before.residual)
    if block.dtype is not torch.float32 or not isinstance(d, Dense) or any(block.raw(n) is not Zero for n in still):
        return None
    if not (extra is Zero or isinstance(extra, Dense) or (isinstance(extra, OneChannel) and extra.dim == 1)):
        return None
    weight, spacing = block.low(conv.args[1]).to(block.operands), Geometry(conv).spacing
    next_zc = _saved(block, after)[0].images if after is not None else None
    result: Tensor | tuple[Tensor, Tensor]
    if before is None:
        result = dzkernels.dense_conv2d(d.values.to(block.operands), weight, **spacing, next_zc=next_zc)
    else:
        del spacing["groups"]
        moved = _dense_norm(block, before, d, extra)
        result = dzkernels.batch_norm_conv2d(weight=weight, **moved, **spacing, next_zc=next_zc)
    out, left = result if isinstance(result, tuple) else (result, None)
    if left is not None:
        block.moments[conv] = left
    return Dense(out)


# --- convolution + batch norm (+ ReLU) (+ max pool) (+ mean), for one weight or one input channel that moves


def _convolution_and_norm(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    if node.target is not aten.convolution.default or node.meta["val"].dim() != 4 or Geometry(node).transposed:
        return None
    user = _only_user(node, inside)
    found = None if user is None or user.args[0] is not node else _norm_parts(user, inside)
    if found is None or found[1].residual is not None:
        return None
    nodes, parts = (node, *found[0]), found[1]
    mean = _mean_of_images(_only_user(parts.out, inside), node)
    name = f"conv2d+{_norm_name(parts)}{'' if mean is None else '+mean'}"
    return (*nodes, *([] if mean is None else [mean])), name, lambda block: _run_conv_norm(block, node, parts, mean)


_WHOLE = 1 << 11
"""Most pixels of a convolution's images whose mean the kernel takes: it holds all of them in cache."""


def _mean_of_images(node: fx.Node | None, conv: fx.Node) -> fx.Node | None:
    """The node, if it is the mean of each channel of each small image and nothing else."""
    if node is None or node.target is not aten.mean.dim or node.kwargs:
        return None
    dims: Any = node.args[1] or ()
    small = conv.meta["val"].shape[2:].numel() <= _WHOLE
    return node if small and {dim % 4 for dim in dims} == {2, 3} else None


def _run_conv_norm(block: Block, conv: fx.Node, parts: _Norm, mean: fx.Node | None) -> Carrier | None:
    dx, dw = block.raw(conv.args[0]), block.raw(conv.args[1])
    gamma, beta = parts.norm.args[1:3]
    if block.dtype is not torch.float32 or any(block.raw(n) is not Zero for n in (conv.args[2], *parts.norm.args[1:5])):
        return None
    geometry, (training, eps, _, _) = Geometry(conv), _statistics(parts.norm)
    one_weight = dx is Zero and isinstance(dw, OneEntry)
    one_channel = dw is Zero and isinstance(dx, OneChannel) and dx.dim == 1 and geometry.groups == 1
    if not (one_weight or one_channel):
        return None
    zc, var, _, _ = _saved(block, parts)
    norm: dict[str, Any] = {
        "zc": zc.planes,
        "var": var,
        "gamma": None if gamma is None else block.exact(gamma),
        "beta": None if beta is None else block.exact(beta),
        "eps": eps,
        "training": training,
        "relu": parts.relu is not None,
        "pool": parts.pool,
    }
    shape = tuple(block.exact(parts.out if mean is None else mean).shape)
    if one_weight:
        out = dzkernels.conv2d_tap_batch_norm(
            block.planes(conv.args[0]),  # type: ignore[arg-type]
            dw.index,
            dw.step,
            kernel=dw.shape[2:],
            **geometry.spacing,
            **norm,
        )
        out = out if mean is None else out.mean((2, 3), keepdim=True)
        return OneChannel(shape, 1, dw.index[:, 0], out.reshape(block.count, shape[0], *shape[2:]))
    spacing = {name: value for name, value in geometry.spacing.items() if name != "groups"}
    out = dzkernels.channel_conv2d_batch_norm(
        dx.values,
        dx.channel,
        block.low(conv.args[1]),
        **spacing,
        **norm,
        mean=mean is not None,
        out_dtype=block.operands,
    )
    return Dense(out if mean is None else out.reshape(block.count, *shape))


# --- linear + cross-entropy of labels, for a difference in one feature


def _head_stretch(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    if node.target is not aten.linear.default or node.meta["val"].dim() != 2:
        return None
    loss = _only_user(node, inside)
    if loss is None or loss.target is not aten.cross_entropy_loss.default or loss.args[0] is not node:
        return None
    return (node, loss), "linear+cross_entropy", lambda block: _run_head(block, node, loss)


def _run_head(block: Block, layer: fx.Node, loss: fx.Node) -> Carrier | None:
    d = block.raw(layer.args[0])
    still = all(block.raw(n) is Zero for n in [*layer.args[1:], *loss.args[1:]])
    if not (isinstance(d, OneChannel) and d.dim == 1 and still and block.dtype is torch.float32):
        return None
    (label, scale), log_p = plain_labels(block, loss)
    if label is None or scale is not None:
        return None
    return Dense(dzkernels.channel_linear_cross_entropy(d.values, d.channel, block.low(layer.args[1]), log_p, label))


# --- linear layers of a transformer: (layer norm +) linear (+ GELU + linear) (+ residual)

_CACHED = 1 << 18
"""Most weights of a layer that the kernel runs through for every few rows, and most numbers of packed keys and values
that it keeps of a sample: more than a cache holds and it is slow."""


@dataclass(frozen=True)
class _Linear:
    norm: fx.Node | None
    layer: fx.Node
    residual: fx.Node | None


@dataclass(frozen=True)
class _Mlp:
    norm: fx.Node | None
    up: fx.Node
    gelu: fx.Node
    down: fx.Node
    residual: fx.Node | None


def _norm_and_linear(node: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes (layer norm, its result,) linear that begin with this one; none where it is neither."""
    if node.target is aten.linear.default:
        return (node,)
    if node.target is not aten.native_layer_norm.default or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return ()
    result = _only_user(node, inside)
    layer = None if result is None or result.args[1] != 0 else _only_user(result, inside)
    if result is None or layer is None or layer.target is not aten.linear.default or layer.args[0] is not result:
        return ()
    return (node, result, layer)


def _sum_after(layer: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], fx.Node | None]:
    """The sum with a residual that alone reads the layer, as (sum,), residual; (), None where there is none."""
    user = _only_user(layer, inside)
    if user is not None and user.target is aten.add.Tensor and not user.kwargs:
        a, b = user.args
        other = b if a is layer else a
        if isinstance(other, fx.Node) and other is not layer and _same_shape(other, layer):
            return (user,), other
    return (), None


def _weights(*layers: fx.Node) -> int:
    return sum(layer.args[1].meta["val"].numel() for layer in layers)  # type: ignore[union-attr]


def _mlp_stretch(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    nodes = _norm_and_linear(node, inside)
    if not nodes:
        return None
    up, norm = nodes[-1], node if len(nodes) > 1 else None
    gelu = _only_user(up, inside)
    if gelu is None or gelu.target is not aten.gelu.default:
        return None
    down = _only_user(gelu, inside)
    if down is None or down.target is not aten.linear.default or down.args[0] is not gelu:
        return None
    if _weights(up, down) > _CACHED:
        return None
    more, residual = _sum_after(down, inside)
    name = ("layer_norm+" if norm else "") + "linear+gelu+linear" + ("+residual" if residual else "")
    parts = _Mlp(norm, up, gelu, down, residual)
    return (*nodes, gelu, down, *more), name, lambda block: _run_mlp(block, parts)


def _linear_stretch(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    nodes = _norm_and_linear(node, inside)
    if not nodes or not 0 < _weights(nodes[-1]) <= _CACHED:
        return None
    layer, norm = nodes[-1], node if len(nodes) > 1 else None
    more, residual = _sum_after(layer, inside)
    if norm is None and residual is None:
        return None
    name = ("layer_norm+" if norm else "") + "linear" + ("+residual" if residual else "")
    parts = _Linear(norm, layer, residual)
    return (*nodes, *more), name, lambda block: _run_linear(block, parts)


def _fits(block: Block, op: str, norm: fx.Node | None, *layers: fx.Node) -> bool:
    """Whether the input of the layers moves, and nothing else of them, in the kernels' dtype and on such a device."""
    still = [n for layer in layers for n in layer.args[1:]] + list(norm.args[2:4] if norm else ())
    d = block.raw((norm or layers[0]).args[0])
    if d is Zero or any(block.raw(n) is not Zero for n in still) or block.dtype is not torch.float32:
        return False
    return backends.fuses(op, block.exact(layers[0]).device) and (norm is not None or isinstance(d, Dense))


def _rows(block: Block, carrier: Carrier) -> Tensor:
    """[P, R, width], R all dimensions but the last."""
    values = dense(carrier)
    values = values.to(block.dtype) if values.dtype is torch.float64 else values
    return values.reshape(block.count, -1, values.shape[-1])


def _in_and_residual(block: Block, first: fx.Node, residual: fx.Node | None) -> tuple[Tensor, Tensor | None]:
    """Rows of the differences of the first node's input and of the residual, which may be the same."""
    d, extra = block.raw(first.args[0]), block.raw(residual)
    values = _rows(block, d)
    return values, None if extra is Zero else values if extra is d else _rows(block, extra)


def _row_norm(block: Block, norm: fx.Node | None) -> dzkernels.RowNorm | None:
    if norm is None:
        return None
    zc, var, _ = layer_base(block, norm)
    gamma = None if norm.args[2] is None else block.low(norm.args[2])
    return dzkernels.RowNorm(zc.reshape(-1, zc.shape[-1]), var.reshape(-1), gamma, float(norm.args[4]))  # type: ignore[arg-type]


def _run_mlp(block: Block, parts: _Mlp) -> Carrier | None:
    norm, up, down = parts.norm, parts.up, parts.down
    if not _fits(block, "mlp_difference", norm, up, down):
        return None
    values, extra = _in_and_residual(block, norm or up, parts.residual)
    z, shape = block.low(up), tuple(block.exact(down).shape)
    out = dzkernels.mlp_difference(
        values, block.low(up.args[1]), z.reshape(-1, z.shape[-1]), block.low(down.args[1]), extra,
        _row_norm(block, norm), approximate=str(parts.gelu.kwargs.get("approximate", "none")), operands=block.operands,
        out_dtype=block.operands if extra is None else block.dtype,
    )  # fmt: skip
    return Dense(out.reshape(block.count, *shape))


def _run_linear(block: Block, parts: _Linear) -> Carrier | None:
    norm, layer = parts.norm, parts.layer
    if not _fits(block, "linear_difference", norm, layer):
        return None
    half = block.operands is torch.bfloat16 and block.exact(layer).device.type == "cpu"
    if block.raw(parts.residual) is Zero and (norm is None or half):
        return None  # rounding the result to bfloat16 takes the CPU's kernel longer than a way through memory
    values, extra = _in_and_residual(block, norm or layer, parts.residual)
    out = dzkernels.linear_difference(
        values, block.low(layer.args[1]), extra, _row_norm(block, norm), operands=block.operands,
        out_dtype=block.operands if extra is None else block.dtype,
    )  # fmt: skip
    return Dense(out.reshape(block.count, *block.exact(layer).shape))


# --- self-attention of a transformer: (layer norm +) linear + attention + linear (+ residual)

_VIEWS = (
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dims,
)
"""What sorts the features of linear layers into queries, keys, values and heads."""


@dataclass(frozen=True)
class _Source:
    """Where the queries, keys or values come from: ``features`` [H, D] of the linear ``layer``, through ``views``."""

    layer: fx.Node
    views: tuple[fx.Node, ...]
    features: Tensor


@dataclass(frozen=True)
class _SelfAttention:
    norm: fx.Node | None
    sources: tuple[_Source, ...]
    attention: fx.Node
    project: fx.Node
    residual: fx.Node | None


def _attention_stretch(node: fx.Node, inside: set[fx.Node]) -> tuple[tuple[fx.Node, ...], str, Apply] | None:
    before: list[fx.Node] = []
    if node.target is aten.native_layer_norm.default and len(node.args[1]) == 1:  # type: ignore[arg-type]
        result = _only_user(node, inside)
        if result is None or result.args[1] != 0:
            return None
        before, entry = [node, result], result
    elif node.target is aten.linear.default and isinstance(node.args[0], fx.Node):
        entry = node.args[0]
    else:
        return None
    attention = _attention_after(entry if before else node, inside)
    if attention is None or entry not in inside:
        return None
    sources = tuple(filter(None, (_source(value) for value in attention.args[:3])))
    layers = list(dict.fromkeys(s.layer for s in sources))
    if len(sources) < 3 or any(layer.args[0] is not entry for layer in layers):
        return None
    after = _merged_heads(attention, inside)
    project = _only_user(after[-1], inside) if after else None
    if project is None or project.target is not aten.linear.default or project.args[0] is not after[-1]:
        return None
    packed = sum(2 * source.features.numel() for source in sources[1:]) * project.meta["val"].shape[1]
    if _weights(*layers, project) > _CACHED or packed > _CACHED:
        return None
    if not backends.fuses("self_attention_difference", project.meta["val"].device):
        return None  # no kernel there: its linear layers are taken by their own
    views = dict.fromkeys(view for source in sources for view in source.views)
    more, residual = _sum_after(project, inside)
    nodes = (*before, *layers, *views, attention, *after, project, *more)
    if residual in nodes or any(u in inside and u not in nodes for part in nodes[:-1] for u in part.users):
        return None  # something else reads what would stay inside
    name = ("layer_norm+" if before else "") + "linear+attention+linear" + ("+residual" if residual else "")
    parts = _SelfAttention(before[0] if before else None, sources, attention, project, residual)
    return nodes, name, lambda block: _run_attention(block, parts)


def _attention_after(start: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    """The attention that ``start`` leads to through at most linear layers and views."""
    todo = [start]
    while todo:
        for user in todo.pop().users:
            if user in inside and user.target is aten.scaled_dot_product_attention.default:
                return user
            if user in inside and user.target in (aten.linear.default, *_VIEWS):
                todo.append(user)
    return None


def _source(value: Any) -> _Source | None:
    """What makes an attention's [N, H, T, D] argument, if it is features of a linear layer's [N, T, width]."""
    views: list[fx.Node] = []
    while isinstance(value, fx.Node) and value.target in _VIEWS:
        views.insert(0, value)
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.target is not aten.linear.default or value.meta["val"].dim() != 3:
        return None
    samples, tokens, width = value.meta["val"].shape
    seen = torch.empty(samples, tokens, width, device="meta")
    for view in views:
        seen = view.target(seen, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    if seen.dim() != 4 or (seen.shape[0], seen.shape[2]) != (samples, tokens):
        return None
    along_samples, along_heads, along_tokens, along = seen.stride()
    if (along_samples != tokens * width and samples > 1) or (along_tokens != width and tokens > 1):
        return None
    heads, each = torch.arange(seen.shape[1])[:, None], torch.arange(seen.shape[3])
    return _Source(value, tuple(views), heads * along_heads + each * along + int(seen.storage_offset()))


def _merged_heads(attention: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes that put the heads of [N, H, T, E] side by side, [N, T, H E]; none where something else follows."""
    turn = _only_user(attention, inside)
    if turn is None or (turn.target, *turn.args[1:]) not in (
        (aten.permute.default, [0, 2, 1, 3]),
        (aten.transpose.int, 1, 2),
    ):
        return ()
    copy = _only_user(turn, inside)
    merge = _only_user(copy, inside) if copy is not None and copy.target is aten.clone.default else copy
    if merge is None or merge.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return ()
    samples, heads, tokens, each = attention.meta["val"].shape
    if merge.meta["val"].shape != (samples, tokens, heads * each):
        return ()
    return (turn, merge) if copy is None or copy is merge else (turn, copy, merge)


def _run_attention(block: Block, parts: _SelfAttention) -> Carrier | None:
    norm, attention, project = parts.norm, parts.attention, parts.project
    layers = [source.layer for source in parts.sources]
    mask = attention.args[3] if len(attention.args) > 3 else None
    if not _fits(block, "self_attention_difference", norm, *layers, project) or block.raw(mask) is not Zero:
        return None

    def features() -> Tensor:
        weights = [(block.low(source.layer.args[1]), source.features) for source in parts.sources]
        return torch.cat([weight[features.to(weight.device)] for weight, features in weights], 1)

    values, extra = _in_and_residual(block, norm or layers[0], parts.residual)
    q, k, v, p = attention_base(block, attention)
    out = dzkernels.self_attention_difference(
        values, block.saved(attention, "features", features), q, k, v, p, block.low(project.args[1]), extra,
        _row_norm(block, norm), scale=attention_scale(attention, q), operands=block.operands,
        out_dtype=block.operands if extra is None else block.dtype,
    )  # fmt: skip
    return Dense(out.reshape(block.count, *block.exact(project).shape))


Pattern = Callable[[fx.Node, set[fx.Node]], tuple[tuple[fx.Node, ...], str, Apply] | None]

PATTERNS: list[Pattern] = [
    _norm_stretch,
    _head_stretch,
    _attention_stretch,
    _mlp_stretch,
    _linear_stretch,
]
"""Tried in order at every node of a suffix."""

NORMS_AROUND: list[Pattern] = [_norm_and_convolution, _convolution_and_moments]
"""For dense differences: convolutions take over norms."""

NORM_AFTER: list[Pattern] = [_convolution_and_norm]
"""For what one weight or one channel moves, which needs no convolution of all channels."""


def around_convolutions(device: torch.device, dtype: torch.dtype) -> Sequence[Pattern]:
    """The patterns of convolutions and norms that kernels on this device are good for."""
    if backends.fuses_convolutions(device, dtype):
        return NORMS_AROUND
    return NORM_AFTER if backends.fuses("channel_conv2d_batch_norm", device) else ()
