"""Stretches of the graph that one fused kernel takes whole, found by pattern for any module.

A pattern looks only at ops, never at names. Where the carriers at run time are not the kernel's, or a parameter inside
the stretch moves, the generic rules run its nodes one by one: fusing changes speed, never meaning.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dzkernels
import torch
from torch import Tensor, fx

from .base import Layouts
from .carriers import Carrier, Dense, OneChannel, Zero
from .rules.norm import centred

if TYPE_CHECKING:
    from .run import Block

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
    """

    nodes: tuple[fx.Node, ...]
    kernel: str
    apply: Apply | None
    frees: tuple[fx.Node, ...]


def schedule(suffix: Sequence[fx.Node], loss: fx.Node) -> tuple[Step, ...]:
    """The suffix as steps: fused where a pattern matches, otherwise node by node."""
    inside = set(suffix)
    taken: set[fx.Node] = set()
    groups: dict[fx.Node, tuple[tuple[fx.Node, ...], str, Apply | None]] = {}
    for node in suffix:
        if node in taken:
            continue
        for match in PATTERNS:
            found = match(node, inside)
            if found is not None and not taken & set(found[0]):
                taken.update(found[0])
                groups[found[0][-1]] = found
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
        Step(nodes, name, apply, tuple(s for s, k in last.items() if k == i and s is not loss))
        for i, (nodes, name, apply) in enumerate(ordered)
    )


def _only_user(node: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    users = [u for u in node.users if u in inside]
    return users[0] if len(users) == 1 else None


# --- batch norm (+ residual) (+ ReLU) (+ max pool)

_TRAINING = (aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.default)
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
    if node.target not in (*_TRAINING, *_RUNNING) or node.args[0].meta["val"].dim() != 4:  # type: ignore[union-attr]
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
    parts = _Norm(node, residual, before, relu, pool, at)
    name = "batch_norm" + ("+residual" if residual else "") + ("+relu" if relu else "") + ("+pool" if pool > 1 else "")
    return tuple(nodes), name, lambda run: _run_norm(run, parts)


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


def _run_norm(run: Block, parts: _Norm) -> Carrier | None:
    x, gamma, beta = parts.norm.args[:3]
    d = run.raw(x)
    moving = run.raw(parts.residual)
    if run.dtype is not torch.float32 or run.d(gamma) is not Zero or run.d(beta) is not Zero or d is Zero:
        return None
    training, eps, mean, var = _statistics(run, parts.norm)
    if run.d(mean) is not Zero or run.d(var) is not Zero:
        return None
    relu = parts.relu is not None
    zc, v, y, gap = run.saved(parts.norm, "fused", lambda: _saves(run, parts, training, mean, var))
    weight = None if gamma is None else run.saved(parts.norm, "gamma", lambda: run.exact(gamma).double())
    if isinstance(d, Dense):
        extra = run.raw(parts.residual)
        channel = extra.channel if isinstance(extra, OneChannel) else None
        if isinstance(extra, OneChannel) and extra.dim != 1:
            return None
        values = None if extra is Zero else extra.values
        out = dzkernels.dense_batch_norm(
            d.values, zc.images, v, weight, eps=eps, training=training, residual=values, residual_channel=channel,
            y=y.images if relu else None, relu=relu, pool=parts.pool, gap=gap.images if parts.pool > 1 else None,
            out_dtype=run.operands,
        )  # fmt: skip
        return Dense(out)
    if isinstance(d, OneChannel) and d.dim == 1 and moving is Zero:
        out = dzkernels.channel_batch_norm(
            d.values, d.channel, zc.planes, torch.zeros_like(v), v, weight, eps=eps, training=training,
            y=y.planes if relu else None, relu=relu, pool=parts.pool, gap=gap.planes if parts.pool > 1 else None,
        )  # fmt: skip
        return OneChannel(tuple(run.exact(parts.out).shape), 1, d.channel, out)
    return None


def _statistics(run: Block, norm: fx.Node) -> tuple[bool, float, Any, Any]:
    """(training, eps, running mean, running variance) of a batch-norm node."""
    rest = norm.args[3:]
    if norm.target in _RUNNING:
        return False, float(rest[3]), rest[0], rest[1]  # type: ignore[arg-type]
    return bool(rest[2]), float(rest[4]), rest[0], rest[1]  # type: ignore[arg-type]


def _saves(run: Block, parts: _Norm, training: bool, mean: Any, var: Any) -> tuple[Layouts, Tensor, Any, Any]:
    z = run.exact(parts.norm.args[0])
    if training:
        zc, v = centred(z, [0, 2, 3])
        v = v.reshape(-1)
    else:
        v = run.exact(var).double()
        zc = z - run.exact(mean).reshape(1, -1, 1, 1)
    y = run.exact(parts.before_relu)
    gap = None
    if parts.pool > 1:
        a, k = y.clamp(min=0), parts.pool
        best = torch.nn.functional.max_pool2d(a, k)
        wide = best.repeat_interleave(k, 2).repeat_interleave(k, 3)
        gap = torch.zeros_like(a)
        gap[..., : wide.shape[2], : wide.shape[3]] = a[..., : wide.shape[2], : wide.shape[3]] - wide
    layouts = [None if t is None else Layouts(t, run.dtype) for t in (zc, y, gap)]
    return layouts[0], v, layouts[1], layouts[2]  # type: ignore[return-value]


PATTERNS: list[Callable[[fx.Node, set[fx.Node]], tuple[tuple[fx.Node, ...], str, Apply] | None]] = [_norm_stretch]
"""Tried in order at every node of a suffix."""
