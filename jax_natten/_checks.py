"""Validation of everything that a public function receives, once, before anything is traced.

Wrong values raise ValueError, wrong types TypeError, valid requests that cannot be served NotImplementedError;
the message names the argument, what was expected and what came. No user input is checked anywhere else.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._window import Window

BORDERS = ("shift", "clip", "wrap")
BACKENDS = ("native", "reference")
DTYPES = ("float16", "bfloat16", "float32", "float64")

# What a shape means, for messages: `{spatial}` stands for one name per axis.
HEADS_LAST = "[batch, *spatial, heads, head_dim]"
HEADS_FIRST = "[batch, heads, *spatial, head_dim]"


def per_axis(name: str, value: Any, rank: int, kind: str, default: Any) -> tuple:
    """One value per axis from one value for all, a tuple or list of `rank` values, or None for the default."""
    if value is None:
        value = default
    values = list(value) if isinstance(value, (tuple, list)) else [value] * rank
    if len(values) != rank:
        raise ValueError(f"{name}: expected one {kind} or {rank} of them (one per axis), got {value!r}")
    return tuple(_entry(name, value, entry, rank, kind) for entry in values)


def _entry(name: str, value: Any, entry: Any, rank: int, kind: str) -> Any:
    wanted = f"expected one {kind} or {rank} of them (one per axis)"
    if kind == "bool":
        if not isinstance(entry, (bool, np.bool_)):
            raise TypeError(f"{name}: {wanted}, got {value!r}")
        return bool(entry)
    if kind == "positive int":
        if isinstance(entry, (bool, np.bool_)) or not isinstance(entry, numbers.Integral):
            raise TypeError(f"{name}: {wanted}, got {value!r}")
        if not 1 <= int(entry) < 2**31:
            raise ValueError(f"{name}: {wanted}, below 2**31, got {value!r}")
        return int(entry)
    if not isinstance(entry, str):
        raise TypeError(f"{name}: {wanted} out of {BORDERS}, got {value!r}")
    if entry not in BORDERS:
        raise ValueError(f"{name}: {wanted} out of {BORDERS}, got {value!r}")
    return entry


def window(
    rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, border: Any
) -> tuple[Window, tuple]:
    """The canonical window and the border of each axis."""
    if kernel_size is None:
        raise TypeError(f"kernel_size: expected one positive int or {rank} of them (one per axis), got None")
    w = Window(
        per_axis("kernel_size", kernel_size, rank, "positive int", None),
        per_axis("stride", stride, rank, "positive int", 1),
        per_axis("dilation", dilation, rank, "positive int", 1),
        per_axis("is_causal", is_causal, rank, "bool", False),
    )
    borders = per_axis("border", border, rank, "border", "shift")
    for axis in range(rank):
        if w.stride[axis] > w.kernel_size[axis]:
            raise ValueError(
                f"stride: expected at most the kernel_size {w.kernel_size[axis]} on axis {axis}, got {w.stride[axis]}"
            )
        if borders[axis] != "shift" and w.stride[axis] != 1:
            raise ValueError(f"border: {borders[axis]!r} expects stride 1 on axis {axis}, got stride {w.stride[axis]}")
        if borders[axis] == "wrap" and w.is_causal[axis]:
            raise ValueError(f"border: 'wrap' expects is_causal False on axis {axis}, got is_causal True")
    return w, borders


def fits(w: Window, borders: Sequence[str], spatial: Sequence[int]) -> None:
    """The window lies within the axes: k d <= s, except where the border clips it."""
    for axis, size in enumerate(spatial):
        k, d = w.kernel_size[axis], w.dilation[axis]
        if borders[axis] == "clip" and not w.is_causal[axis]:
            if (k // 2 * d) * 2 + size >= 2**31:
                raise ValueError(f"kernel_size: kernel_size * dilation = {k * d} on axis {axis} is too large")
            continue
        if k * d > size:
            raise ValueError(
                f"kernel_size: expected kernel_size * dilation <= {size}, the length of axis {axis}, "
                f"got {k} * {d} = {k * d}"
            )
        if borders[axis] == "wrap" and size % d != 0:
            raise ValueError(
                f"border: 'wrap' expects a length that the dilation divides on axis {axis}, "
                f"got length {size} and dilation {d}"
            )


def floating(name: str, value: Any) -> jax.Array:
    """A jax or NumPy array of a dtype that the kernels compute in."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"{name}: expected a jax or NumPy array, got {type(value).__name__}")
    if value.dtype.name.startswith("float8"):
        raise NotImplementedError(f"{name}: expected a dtype out of {', '.join(DTYPES)}, got {value.dtype.name}")
    if value.dtype.name not in DTYPES:
        raise TypeError(f"{name}: expected a dtype out of {', '.join(DTYPES)}, got {value.dtype.name}")
    return jnp.asarray(value)


def array(name: str, value: Any, ndims: Sequence[int], layout: str) -> jax.Array:
    """A floating array with one of the given numbers of axes, and at least one entry on its last."""
    x = floating(name, value)
    if x.ndim not in ndims:
        expected = " or ".join(map(str, ndims))
        raise ValueError(f"{name}: expected {expected} axes, {layout}, got shape {x.shape}")
    if x.shape[-1] < 1:
        raise ValueError(f"{name}: expected a last axis of at least 1, {layout}, got shape {x.shape}")
    return x


def attention_arrays(query: Any, key: Any, value: Any, rank: int, equal_spatial: bool) -> list[jax.Array]:
    """query, key and value of a fused call: heads behind the `rank` spatial axes, the batch optional."""
    query = array("query", query, (rank + 3, rank + 2), HEADS_LAST)
    key = array("key", key, (query.ndim,), HEADS_LAST)
    value = array("value", value, (query.ndim,), HEADS_LAST)
    same_dtype(query=query, key=key, value=value)
    batch = {axis: "batch" for axis in range(query.ndim - 2 - rank)}
    spatial = {axis: "spatial size" for axis in range(query.ndim - 2 - rank, query.ndim - 2)}
    same_axes("query", query, "key", key, {**batch, **(spatial if equal_spatial else {}), -1: "head_dim"})
    same_axes("key", key, "value", value, {**batch, **spatial, -2: "number of heads"})
    head_groups("query", query.shape[-2], "key", key.shape[-2])
    return [query, key, value]


def additional(key: jax.Array, value: jax.Array, keys: Any, values: Any, rank: int) -> list[jax.Array]:
    """Additional tokens of a fused call, both or neither; without batch where key has none."""
    if keys is None and values is None:
        return []
    if keys is None or values is None:
        missing, given = ("additional_keys", "additional_values")[:: 1 if keys is None else -1]
        raise ValueError(f"{missing}: expected an array, because {given} is given, got None")
    batch = key.shape[: -2 - rank]
    keys = tokens("additional_keys", keys, "key", key, (*batch, None, *key.shape[-2:]))
    values = tokens("additional_values", values, "value", value, (*batch, keys.shape[-3], *value.shape[-2:]))
    return [keys, values]


def tokens(name: str, value: Any, like_name: str, like: jax.Array, expected: tuple[int | None, ...]) -> jax.Array:
    """Additional tokens that go with `like`; None in the expected shape stands for any number of them."""
    x = floating(name, value)
    same_dtype(**{like_name: like, name: x})
    fitting = len(x.shape) == len(expected) and all(e in (None, s) for e, s in zip(expected, x.shape, strict=True))
    if not fitting:
        shown = ", ".join("n" if entry is None else str(entry) for entry in expected)
        raise ValueError(f"{name}: expected shape ({shown}) to go with {like_name}, got {x.shape}")
    return x


def same_dtype(**arrays: jax.Array | None) -> None:
    """All of the arrays that are there share one dtype."""
    dtypes = {name: x.dtype.name for name, x in arrays.items() if x is not None}
    first, *rest = dtypes
    for name in rest:
        if dtypes[name] != dtypes[first]:
            raise TypeError(f"{name}: expected {first}'s dtype {dtypes[first]}, got {dtypes[name]}")


def same_axes(first: str, a: jax.Array, second: str, b: jax.Array, axes: dict[int, str]) -> None:
    """The two arrays agree on the given axes, named for the message."""
    for axis, meaning in axes.items():
        if a.shape[axis] != b.shape[axis]:
            raise ValueError(
                f"{second}: expected {first}'s {meaning} {a.shape[axis]} on axis {axis % b.ndim}, "
                f"got {b.shape[axis]} (shapes {a.shape} and {b.shape})"
            )


def head_groups(name: str, heads: int, key_name: str, key_heads: int) -> int:
    """How many query heads share a key head."""
    if heads == key_heads:
        return 1
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(
            f"{name}: expected a number of heads that is a multiple of {key_name}'s {key_heads}, got {heads}"
        )
    return heads // key_heads


def bias(rpb: Any, heads: int, w: Window) -> jax.Array | None:
    """The relative positional bias table `[heads, 2 k - 1 per axis]`."""
    if rpb is None:
        return None
    x = floating("rpb", rpb)
    expected = (heads, *w.bias_shape)
    if x.shape != expected:
        raise ValueError(f"rpb: expected shape {expected}, [heads, 2 * kernel_size - 1 per axis], got {x.shape}")
    return x


def lengths(value: Any, batch: Sequence[int], spatial: Sequence[int], borders: Sequence[str]) -> jax.Array | None:
    """int32 `[*batch, rank]`; values that are known now must lie within the array."""
    if value is None:
        return None
    for axis, border in enumerate(borders):
        if border == "wrap":
            raise ValueError(f"border: 'wrap' on axis {axis} expects no lengths, got lengths")
    known = not isinstance(value, jax.Array)
    if known:
        value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"lengths: expected integers, got dtype {value.dtype.name}")
    expected = (*batch, len(spatial))
    if value.shape != expected:
        raise ValueError(f"lengths: expected shape {expected}, [batch, rank], got {value.shape}")
    if known and not ((value >= 0) & (value <= np.array(spatial))).all():
        raise ValueError(f"lengths: expected between 0 and the spatial shape {tuple(spatial)}, got {value.tolist()}")
    return jnp.asarray(value, jnp.int32)


def spatial(value: Any) -> tuple[int, ...]:
    """Lengths of 1 to 3 axes."""
    entries = list(value) if isinstance(value, (tuple, list)) else [value]
    if not 1 <= len(entries) <= 3:
        raise ValueError(f"spatial: expected the lengths of 1 to 3 axes, got {value!r}")
    return per_axis("spatial", entries, len(entries), "positive int", None)


def weights(attn: jax.Array, volume: int, additional: int) -> None:
    """The last axis of unfused weights: one for each slot of the window and each additional token."""
    if attn.shape[-1] != volume + additional:
        extra = f" + {additional} additional" if additional else ""
        raise ValueError(
            f"attn: expected a last axis of prod(kernel_size){extra} = {volume + additional}, got {attn.shape[-1]}"
        )


def scale(value: Any, head_dim: int) -> float:
    """The factor on the logits, head_dim ** -0.5 by default."""
    if value is None:
        return head_dim**-0.5
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"scale: expected a Python or NumPy number (multiply the query to apply a traced scale), "
            f"got {type(value).__name__}"
        )
    if not math.isfinite(value):
        raise ValueError(f"scale: expected a finite number, got {value!r}")
    return float(value)


def backend(value: Any) -> str | None:
    """One of the names that `backends()` lists, or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"backend: expected None or one of {BACKENDS}, got {value!r}")
    if value is not None and value not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {BACKENDS}, got {value!r}")
    return value


def flag(name: str, value: Any, optional: bool = False) -> None:
    if not isinstance(value, (bool, np.bool_)) and not (optional and value is None):
        raise TypeError(f"{name}: expected {'None or ' if optional else ''}a bool, got {value!r}")


def precision(value: Any) -> jax.lax.Precision | jax.lax.DotAlgorithmPreset:
    """jax's own names; None takes the ambient default, which without one means float32 accuracy."""
    if value is None:
        ambient = jax.config.jax_default_matmul_precision or "highest"  # type: ignore[attr-defined]
        presets = jax.lax.DotAlgorithmPreset.__members__
        return presets[ambient] if ambient in presets else jax.lax.Precision(ambient)
    if not isinstance(value, (str, jax.lax.Precision)):
        raise TypeError(f"precision: expected None, a jax.lax.Precision or its name, got {value!r}")
    try:
        return jax.lax.Precision(value)
    except ValueError:
        raise ValueError(f"precision: expected a jax.lax.Precision or one of its names, got {value!r}") from None
