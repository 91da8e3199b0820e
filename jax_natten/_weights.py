"""Unfused neighborhood attention: `na{1,2,3}d_qk` gives logits, `na{1,2,3}d_av` applies weights.

They spell the weights out, `volume` of them a query: for dropout, for looking at them, for anything that goes
between logits and weights. Slots are row-major over the axes, the last axis fastest; slot m on an axis is window
position start + m.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks as check
from ._compat import vary_alike
from ._config import UnfusedConfig
from ._frame import Axis, existing_queries, frame, has_absent_slots, place, wrap
from ._neighborhood import PerAxisBool, PerAxisInt, PerAxisStr
from ._partitioning import repeat
from ._rank import of_rank
from ._reference import accumulation_dtype
from ._unfused import av_p, qk_p, spread_p
from ._window import Window, neighborhood

Array = jax.Array


def _qk(
    rank: int,
    query: Array,
    key: Array,
    kernel_size: PerAxisInt,
    dilation: PerAxisInt | None = 1,
    is_causal: PerAxisBool | None = False,
    *,
    stride: PerAxisInt | None = 1,
    border: PerAxisStr | None = "shift",
    rpb: Array | None = None,
    lengths: Any = None,
    additional_keys: Array | None = None,
    precision: jax.lax.Precision | str | None = None,
    backend: str | None = None,
) -> Array:
    """<rank>-D neighborhood logits: `query . key` for every key of a query's window, unscaled, plus the bias.

    Args:
      query: `[batch, heads, <axes>, head_dim]`, float16, bfloat16, float32 or float64.
      key: the same with `heads_kv` heads, of which heads is a multiple.
      kernel_size, dilation, is_causal, stride, border, lengths: the window, as in `na<rank>d`.
      rpb: relative positional bias `[heads, <offsets>]`, any floating dtype, added to the logits.
      additional_keys: `[batch, heads_kv, n, head_dim]` tokens that every query sees; their logits come last.
      precision, backend: as in `na<rank>d`.

    Returns:
      Logits `[batch, heads, <axes>, prod(kernel_size) + n]` in the query's dtype. Absent window positions (before
      the beginning of a causal axis, beyond a clipped border or the lengths) are -inf; they take the last slots of
      a causal axis. A query beyond the lengths has a row of zeros, so that a softmax stays finite.

    Raises:
      ValueError: shapes or values that do not fit; TypeError: a wrong type or dtype, dtypes that differ;
      NotImplementedError: float8, or a backend that cannot serve the call.
    """
    window, borders = check.window(rank, kernel_size, stride, dilation, is_causal, border)
    backend, dot_precision = check.backend(backend), check.precision(precision)
    query = check.array("query", query, (rank + 3,), check.HEADS_FIRST)
    key = check.array("key", key, (rank + 3,), check.HEADS_FIRST)
    check.same_dtype(query=query, key=key)
    spatial = query.shape[2:-1]
    same = {0: "batch", -1: "head_dim"} | {axis: "spatial size" for axis in range(2, rank + 2)}
    check.same_axes("query", query, "key", key, same)
    group = check.head_groups("query", query.shape[1], "key", key.shape[1])
    check.fits(window, borders, spatial)
    table = check.bias(rpb, query.shape[1], window)
    lengths = check.lengths(lengths, query.shape[:1], spatial, borders)
    if additional_keys is not None:
        expected = (*key.shape[:2], None, key.shape[-1])
        additional_keys = check.tokens("additional_keys", additional_keys, "key", key, expected)

    axes = place(window, spatial, borders)
    config = _config(window, spatial, axes, group, backend, dot_precision)
    where = frame(axes, query.shape[:1], lengths)
    logits = _bind(qk_p, query, wrap(key, axes, first=2), where, config=config)
    if table is not None:
        accumulation = accumulation_dtype(query.dtype)
        tables = repeat(table.astype(accumulation), query)
        logits = (logits.astype(accumulation) + _bind(spread_p, tables, where, config=config)).astype(query.dtype)
    if has_absent_slots(window, axes, lengths):
        logits = jnp.where(_present(window, axes, lengths, config), logits, -jnp.inf)
    if additional_keys is not None:
        # A query beyond the lengths may hold NaN, which would reach the gradient of the additional keys.
        rows = _grouped(_existing(query, lengths), group)
        more = jnp.einsum("bhg...d,bhnd->bhg...n", rows, additional_keys, precision=dot_precision)
        logits = jnp.concatenate([logits, more.reshape(*query.shape[:-1], more.shape[-1])], axis=-1)
    return _existing(logits, lengths)


def _av(
    rank: int,
    attn: Array,
    value: Array,
    kernel_size: PerAxisInt,
    dilation: PerAxisInt | None = 1,
    is_causal: PerAxisBool | None = False,
    *,
    stride: PerAxisInt | None = 1,
    border: PerAxisStr | None = "shift",
    lengths: Any = None,
    additional_values: Array | None = None,
    precision: jax.lax.Precision | str | None = None,
    backend: str | None = None,
) -> Array:
    """<rank>-D neighborhood aggregation: the weighted sum of the values in every query's window.

    Args:
      attn: weights `[batch, heads, <axes>, prod(kernel_size) + n]`, slots as `na<rank>d_qk` gives them; those of
        absent window positions are ignored.
      value: `[batch, heads_kv, <axes>, head_dim]` in the dtype of attn; heads is a multiple of heads_kv.
      kernel_size, dilation, is_causal, stride, border, lengths: the window, as in `na<rank>d`.
      additional_values: `[batch, heads_kv, n, head_dim]`, weighted by the last n weights.
      precision, backend: as in `na<rank>d`.

    Returns:
      `[batch, heads, <axes>, head_dim]` in the dtype of attn; 0 for queries beyond the lengths.

    Raises:
      ValueError: shapes or values that do not fit; TypeError: a wrong type or dtype, dtypes that differ;
      NotImplementedError: float8, or a backend that cannot serve the call.
    """
    window, borders = check.window(rank, kernel_size, stride, dilation, is_causal, border)
    backend, dot_precision = check.backend(backend), check.precision(precision)
    attn = check.array("attn", attn, (rank + 3,), "[batch, heads, *spatial, weights]")
    value = check.array("value", value, (rank + 3,), check.HEADS_FIRST)
    check.same_dtype(attn=attn, value=value)
    spatial = attn.shape[2:-1]
    same = {0: "batch"} | {axis: "spatial size" for axis in range(2, rank + 2)}
    check.same_axes("attn", attn, "value", value, same)
    group = check.head_groups("attn", attn.shape[1], "value", value.shape[1])
    check.fits(window, borders, spatial)
    lengths = check.lengths(lengths, attn.shape[:1], spatial, borders)
    if additional_values is not None:
        expected = (*value.shape[:2], None, value.shape[-1])
        additional_values = check.tokens("additional_values", additional_values, "value", value, expected)
    check.weights(attn, window.volume, 0 if additional_values is None else additional_values.shape[2])

    axes = place(window, spatial, borders)
    config = _config(window, spatial, axes, group, backend, dot_precision)
    where = frame(axes, attn.shape[:1], lengths)
    inner, more = attn[..., : window.volume], attn[..., window.volume :]
    out = _bind(av_p, inner, wrap(value, axes, first=2), where, config=config)
    if additional_values is not None:
        # Weights and cotangents beyond the lengths may be NaN, which would reach the additional values' gradient.
        rows = _grouped(_existing(more, lengths), group)
        part = jnp.einsum("bhg...n,bhnd->bhg...d", rows, additional_values, precision=dot_precision)
        out = out + _existing(part.reshape(out.shape), lengths)
    return out


def _config(window: Window, spatial, axes: list[Axis], group: int, backend, precision) -> UnfusedConfig:
    key_spatial = tuple(size + 2 * axis.wrapped for size, axis in zip(spatial, axes, strict=True))
    return UnfusedConfig(
        window=window, spatial=spatial, key_spatial=key_spatial, group=group, backend=backend, precision=precision
    )


def _bind(primitive, *operands: Array, config: UnfusedConfig) -> Array:
    (out,) = primitive.bind(*vary_alike(operands), config=config)
    return out


def _existing(x: Array, lengths: Array | None) -> Array:
    """`[batch, heads, *spatial, ...]` with 0 for the queries beyond the lengths."""
    if lengths is None:
        return x
    return jnp.where(existing_queries(lengths, x.shape[2:-1])[:, None, ..., None], x, 0)


def _grouped(x: Array, group: int) -> Array:
    """`[batch, heads, ...]` -> `[batch, heads_kv, group, ...]`."""
    return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:])


def _present(window: Window, axes: list[Axis], lengths: Array | None, config: UnfusedConfig) -> Array:
    """Which slots hold a key, `[batch or 1, 1, *spatial, volume]`."""
    where = frame(axes, (1,) if lengths is None else lengths.shape[:1], lengths)
    queries = jnp.arange(prod(config.spatial), dtype=jnp.int32)

    def present(sample_frame):
        return neighborhood(window, queries, config.spatial, sample_frame, config.key_spatial).present

    return jax.vmap(present)(where).reshape(where.shape[0], 1, *config.spatial, window.volume)


na1d_qk = of_rank(1, "na1d_qk", _qk)
na2d_qk = of_rank(2, "na2d_qk", _qk)
na3d_qk = of_rank(3, "na3d_qk", _qk)
na1d_av = of_rank(1, "na1d_av", _av)
na2d_av = of_rank(2, "na2d_av", _av)
na3d_av = of_rank(3, "na3d_av", _av)
