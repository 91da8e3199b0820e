"""Dense attention and the exact merge of partial attentions.

Dense attention is a neighborhood whose window is the whole axis: with the longer of the two lengths as extent and
kernel size, every query's window holds every key that exists. So the same kernels, derivatives and sharding serve
it, with memory of the order of its inputs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks as check
from ._config import FusedConfig
from ._frame import Axis, frame
from ._fused import bias_operand, bind_forward
from ._window import Window

Array = jax.Array


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    precision: jax.lax.Precision | str | None = None,
) -> Any:
    """Dense attention: `softmax(scale * query key^T) value`.

    Args:
      query: `[batch, length, heads, head_dim]`, float16, bfloat16, float32 or float64; the batch may be absent.
      key: `[batch, length_kv, heads_kv, head_dim]`; heads is a multiple of heads_kv (grouped queries: query head h
        reads key head `h // (heads / heads_kv)`).
      value: `[batch, length_kv, heads_kv, head_dim_v]`.
      is_causal: query i sees the keys 0 to i; the lengths must be equal.
      scale: factor on the logits, `head_dim ** -0.5` by default.
      return_lse: whether to return the logits' logsumexp too.
      backend, precision: as in `na1d`.

    Returns:
      out `[batch, length, heads, head_dim_v]` in the query's dtype; with `return_lse` also lse
      `[batch, length, heads]`, natural logarithm, float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes that do not fit together; TypeError: dtypes that differ or are not floating.
    """
    check.flag("is_causal", is_causal)
    check.flag("return_lse", return_lse)
    backend, dot_precision = check.backend(backend), check.precision(precision)
    query, key, value = check.attention_arrays(query, key, value, rank=1, equal_spatial=bool(is_causal))
    scale = check.scale(scale, query.shape[-1])
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    out, lse = dense(query, key, value, bool(is_causal), scale, backend, dot_precision)
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def dense(query: Array, key: Array, value: Array, is_causal: bool, scale: float, backend, precision) -> list[Array]:
    """out and lse of checked, batched arguments."""
    queries, keys = query.shape[1], key.shape[1]
    extent = max(queries, keys, 1)
    window = Window((extent,), (1,), (1,), (is_causal,))
    config = FusedConfig(window=window, scale=scale, backend=backend, precision=precision)
    axes = [Axis(extent, 0, queries, 0, keys, wrapped=0)]
    return bind_forward(
        (query, key, value, bias_operand(None, query, window), frame(axes, query.shape[:1], None)), config
    )


def merge_attentions(outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Combines attentions of the same queries over disjoint sets of keys, exactly.

    With `lse = logsumexp(lses)`, the result is `sum(exp(lse_i - lse) * output_i)`.

    Args:
      outputs: any number (at least one) of arrays `[..., heads, head_dim_v]` of one shape and dtype.
      lses: for each output its logsumexp, `[..., heads]`.

    Returns:
      The merged output, in the outputs' dtype, and its lse. Where every lse is -inf (no key anywhere) the output
      is 0 and the lse -inf.

    Raises:
      ValueError: no output, unequal numbers of outputs and lses, or unequal shapes; TypeError: unequal dtypes.
    """
    if not isinstance(outputs, (tuple, list)) or not isinstance(lses, (tuple, list)):
        raise TypeError(f"outputs, lses: expected lists, got {type(outputs).__name__} and {type(lses).__name__}")
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"lses: expected one for each of the outputs, at least one, got {len(outputs)} and {len(lses)}"
        )
    arrays = [check.floating(f"outputs[{i}]", x) for i, x in enumerate(outputs)]
    weights = [check.floating(f"lses[{i}]", x) for i, x in enumerate(lses)]
    for i, (out, lse) in enumerate(zip(arrays, weights, strict=True)):
        check.same_dtype(**{"outputs[0]": arrays[0], f"outputs[{i}]": out})
        check.same_dtype(**{"lses[0]": weights[0], f"lses[{i}]": lse})
        if out.ndim == 0:
            raise ValueError(f"outputs[{i}]: expected at least one axis, [..., heads, head_dim_v], got shape ()")
        if out.shape != arrays[0].shape:
            raise ValueError(f"outputs[{i}]: expected the shape of outputs[0], {arrays[0].shape}, got {out.shape}")
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"lses[{i}]: expected shape {out.shape[:-1]}, that of its output, got {lse.shape}")
    stacked = jnp.stack(weights)
    largest = jax.lax.stop_gradient(jnp.max(stacked, axis=0))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    shares = jnp.exp(stacked - largest)
    total = jnp.sum(shares, axis=0)
    empty = total == 0
    filled = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(filled))
    out = sum(share[..., None] * x.astype(lse.dtype) for share, x in zip(shares / filled, arrays, strict=True))
    return out.astype(arrays[0].dtype), lse
