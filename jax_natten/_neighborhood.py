"""Fused neighborhood attention: `na1d`, `na2d`, `na3d`.

The public edge: arguments are checked and made canonical, borders and lengths become a frame, and one primitive is
bound. Additional tokens are dense attention over them, merged exactly.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks as check
from ._config import FusedConfig
from ._dense import dense, merge_attentions
from ._frame import existing_queries, frame, place, wrap
from ._fused import bias_operand, bind_forward
from ._rank import of_rank

Array = jax.Array
PerAxisInt = int | tuple[int, ...] | list[int]
PerAxisBool = bool | tuple[bool, ...] | list[bool]
PerAxisStr = str | tuple[str, ...] | list[str]


def _neighborhood_attention(
    rank: int,
    query: Array,
    key: Array,
    value: Array,
    kernel_size: PerAxisInt,
    stride: PerAxisInt | None = 1,
    dilation: PerAxisInt | None = 1,
    is_causal: PerAxisBool | None = False,
    *,
    border: PerAxisStr | None = "shift",
    rpb: Array | None = None,
    scale: float | None = None,
    lengths: Any = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    precision: jax.lax.Precision | str | None = None,
    deterministic: bool | None = None,
) -> Any:
    """<rank>-D neighborhood attention: softmax attention of every token over its own sliding window.

    `out = softmax(scale * query key^T + bias) value`, each query over the keys of its own window. At a border the
    window is shifted inward, so that every query sees exactly `kernel_size` keys per axis; on a causal axis it ends
    at the query. Rule: Neighborhood Attention Transformer (arXiv 2204.07143), dilation: arXiv 2209.15001, stride
    and causality: Generalized Neighborhood Attention (arXiv 2504.16922).

    Per-axis arguments take one value for all axes, or a tuple or list with one for each. Every argument that is an
    array can be differentiated, in forward and reverse mode and to any order.

    Args:
      query: `[batch, <axes>, heads, head_dim]`, float16, bfloat16, float32 or float64; the batch may be absent.
      key: the same with `heads_kv` heads; heads is a multiple of heads_kv (grouped queries: query head h reads key
        head `h // (heads / heads_kv)`).
      value: as key, with a head_dim of its own.
      kernel_size: tokens in a window, per axis; `kernel_size * dilation` is at most the axis' length.
      stride: queries in groups of `stride` share the window of the group's leader; at most kernel_size.
      dilation: distance between neighbors in a window.
      is_causal: whether a query sees no key behind itself, per axis.
      border: per axis, "shift" (above), "clip" (the window stays centred, keys beyond the edge are absent) or
        "wrap" (centred and periodic). The last two need stride 1; "wrap" also a non-causal axis, no lengths and a
        length that the dilation divides. With "clip", `kernel_size * dilation` may exceed the length.
      rpb: relative positional bias `[heads, <offsets>]`, any floating dtype; entry
        `(key - query) / dilation + kernel_size - 1` per axis is added to the logits, unscaled.
      scale: factor on `query key^T`, a number; `head_dim ** -0.5` by default.
      lengths: integers `[batch, <rank>]`: each sample is the leading corner of its arrays, with borders of its own.
        Tokens beyond are never seen and give 0 (lse -inf). May be traced.
      additional_keys, additional_values: `[batch, n, heads_kv, head_dim]` tokens that every query sees besides its
        window, unmasked and unbiased; both or neither.
      return_lse: whether to return the logsumexp of the logits too.
      backend: None picks the fastest that serves the call; "native" (compiled kernels) or "reference" (pure jax)
        forces one. See `backends()`.
      precision: a `jax.lax.Precision` or its name; by default that of `jax.default_matmul_precision`, and without
        one float32 accuracy. Where less is asked for, GPU kernels may round float32 products to TF32; CPU kernels
        always compute at float32 accuracy or better.
      deterministic: whether equal calls must give equal bits. Those of kernels always do, so it changes nothing;
        the reference on a GPU adds gradients up as XLA's own flag `--xla_gpu_deterministic_ops` says.

    Returns:
      out `[batch, <axes>, heads, head_dim_v]` in the query's dtype; with `return_lse` also lse
      `[batch, <axes>, heads]`, natural logarithm, float32 (float64 for float64 inputs).
      Under `jax.checkpoint` their names for policies are "natten_out" and "natten_lse".

    Raises:
      ValueError: shapes or values that do not fit; TypeError: a wrong type or dtype, dtypes that differ;
      NotImplementedError: float8, or a backend that cannot serve the call.
    """
    window, borders = check.window(rank, kernel_size, stride, dilation, is_causal, border)
    backend, dot_precision = check.backend(backend), check.precision(precision)
    check.flag("return_lse", return_lse)
    check.flag("deterministic", deterministic, optional=True)
    query, key, value = check.attention_arrays(query, key, value, rank, equal_spatial=True)
    extra = check.additional(key, value, additional_keys, additional_values, rank)
    batch, spatial, heads = query.shape[: -2 - rank], query.shape[-2 - rank : -2], query.shape[-2]
    check.fits(window, borders, spatial)
    scale = check.scale(scale, query.shape[-1])
    table = check.bias(rpb, heads, window)
    lengths = check.lengths(lengths, batch, spatial, borders)

    if not batch:
        query, key, value, *extra = (x[None] for x in (query, key, value, *extra))
        lengths = None if lengths is None else lengths[None]
    config = FusedConfig(window=window, scale=scale, backend=backend, precision=dot_precision)
    axes = place(window, spatial, borders)
    operands = (
        query,
        wrap(key, axes, first=1),
        wrap(value, axes, first=1),
        bias_operand(table, query, window),
        frame(axes, query.shape[:1], lengths),
    )
    out, lse = bind_forward(operands, config)
    if extra and extra[0].shape[1] > 0:
        out, lse = _merge_additional(query, extra[0], extra[1], out, lse, lengths, config)
    if not batch:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _merge_additional(query, keys, values, out, lse, lengths, config: FusedConfig) -> tuple[Array, Array]:
    """Lets every query that exists also see the additional tokens."""
    spatial = query.shape[1:-2]
    if lengths is not None:
        # What lies beyond the lengths may hold anything, NaN too, and must reach neither result nor gradient.
        exists = existing_queries(lengths, spatial)[..., None]
        query = jnp.where(exists[..., None], query, 0)
    flat = query.reshape(query.shape[0], prod(spatial), *query.shape[-2:])
    more, more_lse = dense(flat, keys, values, False, config.scale, config.backend, config.precision)
    more, more_lse = more.reshape(out.shape), more_lse.reshape(lse.shape)
    if lengths is not None:
        more, more_lse = jnp.where(exists[..., None], more, 0), jnp.where(exists, more_lse, -jnp.inf)
    return merge_attentions((out, more), (lse, more_lse))


na1d = of_rank(1, "na1d", _neighborhood_attention)
na2d = of_rank(2, "na2d", _neighborhood_attention)
na3d = of_rank(3, "na3d", _neighborhood_attention)
