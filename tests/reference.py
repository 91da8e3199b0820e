"""Neighborhood attention by brute force in NumPy float64: one query, one head at a time, keys found one by one.

Written from the definition and sharing no code with the package. Array layouts and argument names are those of the
public functions. Keys that a query does not see are never read, so they may hold anything.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Parameters of the neighborhood, one entry per axis."""

    kernel_size: tuple
    stride: tuple
    dilation: tuple
    is_causal: tuple
    border: tuple

    @property
    def table_shape(self) -> tuple:
        return tuple(2 * k - 1 for k in self.kernel_size)


class Row(NamedTuple):
    """One query that exists and the keys that it sees."""

    sample: int
    query: tuple  # coordinates
    slots: np.ndarray  # window positions, flat row-major
    keys: tuple  # coordinates, one array per axis
    offsets: tuple  # index into the bias table, one array per axis


def make_window(rank, kernel_size, stride=1, dilation=1, is_causal=False, border="shift") -> Window:
    values = (kernel_size, stride, dilation, is_causal, border)
    return Window(*(tuple(x) if isinstance(x, (tuple, list)) else (x,) * rank for x in values))


def axis_keys(i, size, kernel_size, stride=1, dilation=1, is_causal=False, border="shift") -> dict:
    """{slot: (key coordinate, key position - query position + kernel_size - 1)} of query i on an axis of `size`."""
    k, p = kernel_size, i // dilation
    group = range(i % dilation, size, dilation)
    n = len(group)
    if border == "shift" or is_causal:
        leader = min(p // stride * stride + (stride - 1 if is_causal else stride // 2), n - 1)
        if is_causal:
            positions = range(max(leader - (k - 1), 0), p + 1)
        elif n < k:  # only with lengths: the window is the whole group
            positions = range(n)
        else:
            start = min(max(leader - k // 2, 0), n - k)
            positions = range(start, start + k)
        return {m: (group[x], x - p + k - 1) for m, x in enumerate(positions)}
    centred = enumerate(range(p - k // 2, p - k // 2 + k))
    if border == "wrap":
        return {m: (group[x % n], x - p + k - 1) for m, x in centred}
    return {m: (group[x], x - p + k - 1) for m, x in centred if 0 <= x < n}


def rows(batch, spatial, window: Window, lengths=None) -> Iterator[Row]:
    """Every query of every sample."""
    for sample in range(batch):
        sizes = spatial if lengths is None else [int(x) for x in lengths[sample]]
        for query in product(*map(range, sizes)):
            axes = [axis_keys(*axis) for axis in zip(query, sizes, *window, strict=True)]
            slots = [np.ravel_multi_index(m, window.kernel_size) for m in product(*axes)]
            seen = [[axis[m] for axis, m in zip(axes, ms, strict=True)] for ms in product(*axes)]
            seen = np.array(seen, int).reshape(len(slots), len(spatial), 2)
            keys, offsets = (tuple(seen[..., i].T) for i in (0, 1))
            yield Row(sample, query, np.array(slots, int), keys, offsets)


def _wide(*arrays):
    """float64, or complex where the complex step asks for it."""
    return [None if x is None else np.asarray(x, complex if np.iscomplexobj(x) else np.float64) for x in arrays]


def _softmax(logits):
    """Weights and logsumexp; also of complex numbers, analytically."""
    if logits.size == 0:
        return logits, -np.inf
    largest = logits.real.max()
    weights = np.exp(logits - largest)
    return weights / weights.sum(), largest + np.log(weights.sum())


# ---- fused


def fused(
    query,
    key,
    value,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    *,
    border="shift",
    rpb=None,
    scale=None,
    lengths=None,
    additional_keys=None,
    additional_values=None,
    out_bar=None,
    lse_bar=None,
):
    """out and lse of a batched call; with cotangents, the gradients of all arrays instead (a dict by name)."""
    arrays = _wide(query, key, value, rpb, additional_keys, additional_values)
    query, key, value, rpb, more_keys, more_values = arrays
    rank = query.ndim - 3
    batch, spatial, heads, dim = query.shape[0], query.shape[1:-2], query.shape[-2], query.shape[-1]
    window = make_window(rank, kernel_size, stride, dilation, is_causal, border)
    scale = dim**-0.5 if scale is None else scale
    group = max(heads // max(key.shape[-2], 1), 1)
    dtype = np.result_type(*(x for x in arrays if x is not None))
    out, lse = np.zeros((*query.shape[:-1], value.shape[-1]), dtype), np.full(query.shape[:-1], -np.inf, dtype)
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    bars = {name: np.zeros(x.shape) for name, x in zip(names, arrays, strict=True) if x is not None}

    for row in rows(batch, spatial, window, lengths):
        for h in range(heads):
            at = (row.sample, *row.query, h)
            seen = (row.sample, *row.keys, h // group)
            own_keys, own_values = key[seen], value[seen]
            logits = scale * (own_keys @ query[at])
            if rpb is not None:
                logits = logits + rpb[(h, *row.offsets)]
            if more_keys is not None:
                extra = (row.sample, slice(None), h // group)
                own_keys = np.concatenate([own_keys, more_keys[extra]])
                own_values = np.concatenate([own_values, more_values[extra]])
                logits = np.concatenate([logits, scale * (more_keys[extra] @ query[at])])
            weights, lse[at] = _softmax(logits)
            out[at] = weights @ own_values
            if out_bar is None:
                continue
            weights_bar = own_values @ out_bar[at]
            logits_bar = weights * (weights_bar - weights @ weights_bar + lse_bar[at])
            bars["query"][at] = scale * (logits_bar @ own_keys)
            keys_bar, values_bar = scale * np.outer(logits_bar, query[at]), np.outer(weights, out_bar[at])
            count = len(row.slots)
            np.add.at(bars["key"], seen, keys_bar[:count])
            np.add.at(bars["value"], seen, values_bar[:count])
            if rpb is not None:
                np.add.at(bars["rpb"], (h, *row.offsets), logits_bar[:count])
            if more_keys is not None:
                bars["additional_keys"][extra] += keys_bar[count:]
                bars["additional_values"][extra] += values_bar[count:]
    return (out, lse) if out_bar is None else bars


def complex_step(function, primals, tangents):
    """The derivative of `function(*primals)` (analytic, of complex arrays) along `tangents`, to machine precision."""
    step = 1e-30
    primals, tangents = ([np.asarray(x, np.float64) for x in xs] for xs in (primals, tangents))
    moved = [x + 1j * step * dx for x, dx in zip(primals, tangents, strict=True)]
    return [x.imag / step for x in function(*moved)]


# ---- dense


def dense(query, key, value, *, is_causal=False, scale=None):
    """out and lse of dense attention on `[batch, length, heads, head_dim]`."""
    query, key, value = _wide(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[2] // key.shape[2]
    dtype = np.result_type(query, key, value)
    out, lse = np.zeros((*query.shape[:-1], value.shape[-1]), dtype), np.full(query.shape[:-1], -np.inf, dtype)
    for b, i, h in product(*map(range, query.shape[:-1])):
        end = i + 1 if is_causal else key.shape[1]
        weights, lse[b, i, h] = _softmax(scale * (key[b, :end, h // group] @ query[b, i, h]))
        out[b, i, h] = weights @ value[b, :end, h // group]
    return out, lse


# ---- unfused


def qk(
    query,
    key,
    kernel_size,
    dilation=1,
    is_causal=False,
    *,
    stride=1,
    border="shift",
    rpb=None,
    lengths=None,
    additional_keys=None,
    bar=None,
):
    """Logits; with their cotangent `bar`, the gradients of all arrays instead (a dict by name)."""
    query, key, rpb, more_keys = _wide(query, key, rpb, additional_keys)
    batch, heads, *spatial, _ = query.shape
    window = make_window(len(spatial), kernel_size, stride, dilation, is_causal, border)
    group, volume = max(heads // max(key.shape[1], 1), 1), int(np.prod(window.kernel_size))
    extra = 0 if more_keys is None else more_keys.shape[2]
    logits = np.zeros((batch, heads, *spatial, volume + extra))  # zeros for queries that do not exist
    given = {"query": query, "key": key, "rpb": rpb, "additional_keys": more_keys}
    bars = {name: np.zeros(x.shape) for name, x in given.items() if x is not None}
    for row in rows(batch, spatial, window, lengths):
        for h in range(heads):
            at, seen = (row.sample, h, *row.query), (row.sample, h // group, *row.keys)
            logits[at][:volume] = -np.inf
            logits[at][row.slots] = key[seen] @ query[at]
            if rpb is not None:
                logits[at][row.slots] += rpb[(h, *row.offsets)]
            if extra:
                logits[at][volume:] = more_keys[row.sample, h // group] @ query[at]
            if bar is None:
                continue
            own = bar[at][row.slots]
            bars["query"][at] = own @ key[seen]
            np.add.at(bars["key"], seen, np.outer(own, query[at]))
            if rpb is not None:
                np.add.at(bars["rpb"], (h, *row.offsets), own)
            if extra:
                bars["query"][at] += bar[at][volume:] @ more_keys[row.sample, h // group]
                bars["additional_keys"][row.sample, h // group] += np.outer(bar[at][volume:], query[at])
    return logits if bar is None else bars


def av(
    attn,
    value,
    kernel_size,
    dilation=1,
    is_causal=False,
    *,
    stride=1,
    border="shift",
    lengths=None,
    additional_values=None,
    bar=None,
):
    """The weighted sum; with its cotangent `bar`, the gradients of all arrays instead (a dict by name)."""
    attn, value, more_values = _wide(attn, value, additional_values)
    batch, heads, *spatial, _ = attn.shape
    window = make_window(len(spatial), kernel_size, stride, dilation, is_causal, border)
    group, volume = max(heads // max(value.shape[1], 1), 1), int(np.prod(window.kernel_size))
    out = np.zeros((*attn.shape[:-1], value.shape[-1]))
    given = {"attn": attn, "value": value, "additional_values": more_values}
    bars = {name: np.zeros(x.shape) for name, x in given.items() if x is not None}
    for row in rows(batch, spatial, window, lengths):
        for h in range(heads):
            at, seen = (row.sample, h, *row.query), (row.sample, h // group, *row.keys)
            weights, tokens = attn[at][row.slots], (row.sample, h // group)
            out[at] = weights @ value[seen]
            if more_values is not None:
                out[at] += attn[at][volume:] @ more_values[tokens]
            if bar is None:
                continue
            bars["attn"][at][row.slots] = value[seen] @ bar[at]
            np.add.at(bars["value"], seen, np.outer(weights, bar[at]))
            if more_values is not None:
                bars["attn"][at][volume:] = more_values[tokens] @ bar[at]
                bars["additional_values"][tokens] += np.outer(attn[at][volume:], bar[at])
    return out if bar is None else bars
