"""Every public operation on one small problem, beside an independent dense formula of it.

The dense formulas are masked matrix products over all pairs of tokens, made from `window_indices` and from nothing
else of the package; jax itself differentiates them. Features are spread over the table: grouped heads, causality,
dilation, stride, borders, lengths, bias and additional tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tolerances

import jax_natten as jn


class Pairs(NamedTuple):
    """Which tokens see which, as constants; N queries, M = N keys, V slots."""

    slot: np.ndarray  # [batch, N, V, M]: 1 where slot v of query n holds key m
    valid: np.ndarray  # [batch, N, V]
    seen: np.ndarray  # [batch, N, M]
    offset: np.ndarray  # [batch, N, M]: flat index into the bias table, 0 where not seen
    exists: np.ndarray  # [batch, N]: within the lengths


def pairs(batch: int, spatial: tuple, kernel_size: tuple, dilation=1, lengths=None, **window) -> Pairs:
    tokens, volume, rank = prod(spatial), prod(kernel_size), len(spatial)
    slot = np.zeros((batch, tokens, volume, tokens), np.float32)
    offset = np.zeros((batch, tokens, tokens), np.int32)
    exists = np.zeros((batch, tokens), bool)
    table, steps = [2 * k - 1 for k in kernel_size], np.broadcast_to(dilation, rank)
    for sample in range(batch):
        size = spatial if lengths is None else tuple(map(int, lengths[sample]))
        found = jn.window_indices(size, kernel_size, dilation=dilation, **window)
        for where in np.ndindex(*size):
            query = np.ravel_multi_index(where, spatial)
            exists[sample, query] = True
            for m in range(volume):
                if found.valid[where][m]:
                    coordinates = found.coordinates[where][m]
                    key = np.ravel_multi_index(tuple(coordinates), spatial)
                    slot[sample, query, m, key] = 1
                    steps_away = (coordinates - where) // steps + np.array(kernel_size) - 1
                    offset[sample, query, key] = np.ravel_multi_index(tuple(steps_away), table, mode="wrap")
    return Pairs(slot, slot.any(axis=3), slot.any(axis=2), offset, exists)


def dense_fused(p: Pairs, q, k, v, rpb=None, more_keys=None, more_values=None):
    """out and lse of `[batch, *spatial, heads, dim]`."""
    batch, heads, dim = q.shape[0], q.shape[-2], q.shape[-1]
    group = heads // k.shape[-2]
    rows = q.reshape(batch, -1, heads, dim)
    keys, values = (jnp.repeat(x.reshape(batch, -1, *x.shape[-2:]), group, axis=2) for x in (k, v))
    logits = jnp.einsum("bnhd,bmhd->bhnm", rows, keys, precision="highest") * dim**-0.5
    if rpb is not None:
        logits += jnp.moveaxis(rpb.reshape(heads, -1)[:, p.offset], 0, 1)
    seen = jnp.broadcast_to(p.seen[:, None], logits.shape)
    if more_keys is not None:
        keys, more = jnp.repeat(more_keys, group, axis=2), jnp.repeat(more_values, group, axis=2)
        extra = jnp.einsum("bnhd,bmhd->bhnm", rows, keys, precision="highest") * dim**-0.5
        logits, values = jnp.concatenate([logits, extra], axis=3), jnp.concatenate([values, more], axis=1)
        seen = jnp.concatenate([seen, jnp.broadcast_to(p.exists[:, None, :, None], extra.shape)], axis=3)
    lse = jax.scipy.special.logsumexp(logits, axis=3, where=seen)
    finite = jnp.where(p.exists[:, None], lse, 0)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits, 0) - finite[..., None]), 0)
    out = jnp.einsum("bhnm,bmhe->bnhe", weights, values, precision="highest")
    lse = jnp.moveaxis(finite, 1, 2).reshape(q.shape[:-1])
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse


def dense_qk(p: Pairs, q, k, rpb=None, more_keys=None):
    """Logits of `[batch, heads, *spatial, dim]`, 0 where absent."""
    batch, heads, dim = q.shape[0], q.shape[1], q.shape[-1]
    group = heads // k.shape[1]
    rows, keys = q.reshape(batch, heads, -1, dim), jnp.repeat(k.reshape(batch, k.shape[1], -1, dim), group, axis=1)
    logits = jnp.einsum("bhnd,bhmd->bhnm", rows, keys, precision="highest")
    if rpb is not None:
        logits += jnp.moveaxis(rpb.reshape(heads, -1)[:, p.offset], 0, 1)
    logits = jnp.einsum("bhnm,bnvm->bhnv", logits, p.slot, precision="highest")
    if more_keys is not None:
        extra = jnp.einsum("bhnd,bhmd->bhnm", rows, jnp.repeat(more_keys, group, axis=1), precision="highest")
        logits = jnp.concatenate([logits, jnp.where(p.exists[:, None, :, None], extra, 0)], axis=3)
    return logits.reshape(*q.shape[:-1], -1)


def dense_av(p: Pairs, attn, v, more_values=None):
    """Weighted values of `[batch, heads, *spatial, dim]`."""
    batch, heads, dim = attn.shape[0], attn.shape[1], v.shape[-1]
    group, volume = heads // v.shape[1], p.slot.shape[2]
    weights = attn.reshape(batch, heads, -1, attn.shape[-1])
    values = jnp.repeat(v.reshape(batch, v.shape[1], -1, dim), group, axis=1)
    out = jnp.einsum("bhnv,bnvm,bhmd->bhnd", weights[..., :volume], p.slot, values, precision="highest")
    if more_values is not None:
        more = jnp.where(p.exists[:, None, :, None], weights[..., volume:], 0)
        out += jnp.einsum("bhnm,bhmd->bhnd", more, jnp.repeat(more_values, group, axis=1), precision="highest")
    return out.reshape(*attn.shape[:-1], dim)


def dense_merge(first, second, first_lse, second_lse):
    lse = jnp.logaddexp(first_lse, second_lse)
    shares = [jnp.exp(x - lse)[..., None] for x in (first_lse, second_lse)]
    return shares[0] * first + shares[1] * second, lse


def finite(result: Any) -> Any:
    """Logits and lse are -inf where there is no key; the dense formulas have 0 there."""
    return jax.tree.map(lambda x: jnp.where(jnp.isneginf(x), 0, x), result)


def every(length: list, x: jax.Array) -> jax.Array:
    """One length for every sample, whatever part of the batch `x` is."""
    return jnp.broadcast_to(jnp.array(length, jnp.int32), (x.shape[0], len(length)))


@dataclass(frozen=True)
class Operation:
    name: str
    call: Callable  # (*arrays) -> array or tuple of arrays
    dense: Callable  # the same by the dense formula
    shapes: tuple  # of the arrays
    layouts: tuple  # of the arrays: a letter an axis, b for batch, h for heads, anything else for the rest

    def arrays(self, seed: int = 0) -> tuple:
        rng = np.random.default_rng(seed)
        return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in self.shapes)

    def specs(self, **axes: str) -> tuple:
        """Partition specs of the arrays, for mesh axes named by layout letter."""
        return tuple(jax.sharding.PartitionSpec(*map(axes.get, layout)) for layout in self.layouts)

    def __repr__(self) -> str:
        return self.name


def _na1d():
    window = dict(kernel_size=(3,), dilation=(2,), is_causal=(True,))
    p = pairs(2, (7,), **window)
    return Operation(
        "na1d",
        lambda q, k, v, rpb: jn.na1d(q, k, v, rpb=rpb, **window),
        lambda q, k, v, rpb: dense_fused(p, q, k, v, rpb)[0],
        ((2, 7, 4, 3), (2, 7, 2, 3), (2, 7, 2, 2), (4, 5)),
        ("bxhd", "bxhd", "bxhd", "ho"),
    )


def _na2d():
    window, length = dict(kernel_size=(3, 2), stride=(2, 1)), [3, 2]
    p = pairs(2, (4, 4), lengths=[length] * 2, **window)

    def call(q, k, v, more_keys, more_values):
        more = dict(additional_keys=more_keys, additional_values=more_values)
        return finite(jn.na2d(q, k, v, **window, **more, lengths=every(length, q), return_lse=True))

    def dense(q, k, v, more_keys, more_values):
        return dense_fused(p, q, k, v, more_keys=more_keys, more_values=more_values)

    shape = (2, 4, 4, 2, 2)
    return Operation(
        "na2d", call, dense, (shape,) * 3 + ((2, 1, 2, 2),) * 2, ("bxyhd", "bxyhd", "bxyhd", "bnhd", "bnhd")
    )


def _na3d():
    window = dict(kernel_size=(2, 3, 3), dilation=(1, 1, 2), border=("shift", "clip", "clip"))
    p = pairs(2, (2, 3, 2), **window)
    shape = (2, 2, 3, 2, 2, 2)
    return Operation(
        "na3d",
        lambda q, k, v, rpb: finite(jn.na3d(q, k, v, rpb=rpb, return_lse=True, **window)),
        lambda q, k, v, rpb: dense_fused(p, q, k, v, rpb),
        (shape, shape, shape, (2, 3, 5, 5)),
        ("bxyzhd", "bxyzhd", "bxyzhd", "hopq"),
    )


def _na1d_qk():
    window = dict(kernel_size=(3,), is_causal=(True,))
    p = pairs(2, (5,), **window)
    return Operation(
        "na1d_qk",
        lambda q, k, rpb: finite(jn.na1d_qk(q, k, rpb=rpb, **window)),
        lambda q, k, rpb: dense_qk(p, q, k, rpb),
        ((2, 4, 5, 3), (2, 2, 5, 3), (4, 5)),
        ("bhxd", "bhxd", "ho"),
    )


def _na2d_qk():
    window, length = dict(kernel_size=(3, 2), stride=(2, 2)), [3, 2]
    p = pairs(2, (4, 3), lengths=[length] * 2, **window)
    return Operation(
        "na2d_qk",
        lambda q, k, more: finite(jn.na2d_qk(q, k, additional_keys=more, lengths=every(length, q), **window)),
        lambda q, k, more: dense_qk(p, q, k, more_keys=more),
        ((2, 2, 4, 3, 2), (2, 2, 4, 3, 2), (2, 2, 1, 2)),
        ("bhxyd", "bhxyd", "bhnd"),
    )


def _na3d_qk():
    window = dict(kernel_size=(2, 2, 3), border=("shift", "shift", "wrap"))
    p = pairs(2, (2, 2, 4), **window)
    return Operation(
        "na3d_qk",
        lambda q, k: jn.na3d_qk(q, k, **window),
        lambda q, k: dense_qk(p, q, k),
        ((2, 2, 2, 2, 4, 2),) * 2,
        ("bhxyzd",) * 2,
    )


def _na1d_av():
    window = dict(kernel_size=(3,), is_causal=(True,))
    p = pairs(2, (5,), **window)
    return Operation(
        "na1d_av",
        lambda attn, v: jn.na1d_av(attn, v, **window),
        lambda attn, v: dense_av(p, attn, v),
        ((2, 4, 5, 3), (2, 2, 5, 3)),
        ("bhxw", "bhxd"),
    )


def _na2d_av():
    window, length = dict(kernel_size=(3, 2), stride=(2, 2)), [3, 2]
    p = pairs(2, (4, 3), lengths=[length] * 2, **window)
    return Operation(
        "na2d_av",
        lambda attn, v, more: jn.na2d_av(attn, v, additional_values=more, lengths=every(length, v), **window),
        lambda attn, v, more: dense_av(p, attn, v, more),
        ((2, 2, 4, 3, 7), (2, 2, 4, 3, 2), (2, 2, 1, 2)),
        ("bhxyw", "bhxyd", "bhnd"),
    )


def _na3d_av():
    window = dict(kernel_size=(2, 1, 2), dilation=(1, 1, 2))
    p = pairs(2, (2, 2, 4), **window)
    return Operation(
        "na3d_av",
        lambda attn, v: jn.na3d_av(attn, v, **window),
        lambda attn, v: dense_av(p, attn, v),
        ((2, 2, 2, 2, 4, 4), (2, 2, 2, 2, 4, 2)),
        ("bhxyzw", "bhxyzd"),
    )


def _attention():
    everything = np.ones((2, 3, 5), bool)
    p = Pairs(None, None, everything, None, np.ones((2, 3), bool))
    return Operation(
        "attention",
        lambda q, k, v: jn.attention(q, k, v, return_lse=True),
        lambda q, k, v: dense_fused(p, q, k, v),
        ((2, 3, 4, 3), (2, 5, 2, 3), (2, 5, 2, 2)),
        ("bxhd",) * 3,
    )


def _merge_attentions():
    return Operation(
        "merge_attentions",
        lambda first, second, first_lse, second_lse: jn.merge_attentions((first, second), (first_lse, second_lse)),
        dense_merge,
        ((2, 3, 2, 2),) * 2 + ((2, 3, 2),) * 2,
        ("bxhd", "bxhd", "bxh", "bxh"),
    )


OPERATIONS = [
    _na1d(),
    _na2d(),
    _na3d(),
    _na1d_qk(),
    _na2d_qk(),
    _na3d_qk(),
    _na1d_av(),
    _na2d_av(),
    _na3d_av(),
    _attention(),
    _merge_attentions(),
]
BY_NAME = {operation.name: operation for operation in OPERATIONS}


def loss(function: Callable) -> Callable:
    """A scalar that is nonlinear in every result, so that its derivatives of all orders differ from 0."""
    return lambda *arrays: sum(jnp.sum(jnp.sin(x + 0.3)) for x in jax.tree.leaves(function(*arrays)))


def everything(operation: Operation) -> tuple:
    """All argument numbers."""
    return tuple(range(len(operation.shapes)))


@functools.cache
def dense_gradient(operation: Operation) -> tuple:
    """The loss of the dense formula and its gradients."""
    return jax.jit(jax.value_and_grad(loss(operation.dense), everything(operation)))(*operation.arrays())


def ones(tree: Any) -> Any:
    """A cotangent or weight for every entry, no two alike."""
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), tree)


def assert_close(actual: Any, expected: Any, factor: float = 4) -> None:
    """Equal trees of arrays, up to rounding: derivatives pass through several sums."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        tolerances.assert_close(a, e, factor=factor)
