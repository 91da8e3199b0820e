"""Frames: where the arrays of a call lie on the global axes, and what borders and lengths make of that.

A frame is int32 `[*batch, 5, rank]`: per sample and axis the extent, the query's origin and count, the key's
origin and count. Borders and lengths need no kernel of their own, only another frame:
    shift   extent s, origins 0
    clip    extent s + 2h, both origins h: the window never reaches a border, keys beyond the edge do not exist
    wrap    the same with keys and values extended by h wrapped tokens on each side, key origin 0
where h = (k div 2) d. With lengths, extent and counts are each sample's own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._window import Window


class Axis(NamedTuple):
    """Static placement of one axis; counts are those of samples that fill their arrays."""

    extent: int
    query_origin: int
    query_count: int
    key_origin: int
    key_count: int
    wrapped: int  # tokens of key and value that are repeated on each side


def place(window: Window, spatial: Sequence[int], border: Sequence[str]) -> list[Axis]:
    """How each axis lies, for query and key arrays that both have shape `spatial`."""
    axes = []
    for axis, size in enumerate(spatial):
        reach = window.kernel_size[axis] // 2 * window.dilation[axis]
        kind = "shift" if window.is_causal[axis] else border[axis]
        if kind == "shift":
            axes.append(Axis(size, 0, size, 0, size, 0))
        elif kind == "clip":
            axes.append(Axis(size + 2 * reach, reach, size, reach, size, 0))
        else:
            axes.append(Axis(size + 2 * reach, reach, size, 0, size + 2 * reach, reach))
    return axes


def has_absent_slots(window: Window, axes: Sequence[Axis], lengths: jax.Array | None) -> bool:
    """Whether some query may have slots without a key, so that unfused weights need a mask."""
    clipped = any(axis.key_count < axis.extent for axis in axes)
    return any(window.is_causal) or clipped or lengths is not None


def frame(axes: Sequence[Axis], batch: Sequence[int], lengths: jax.Array | None) -> jax.Array:
    """The frame `[*batch, 5, rank]` of a call; `lengths` is int32 `[*batch, rank]` or None."""
    rows = [axis[:5] for axis in axes]
    if all(isinstance(entry, int) for row in rows for entry in row):
        full = jnp.asarray(np.array(rows, np.int32).T)
    else:  # symbolic sizes, under export
        full = jnp.stack([jnp.stack([jnp.asarray(x, jnp.int32) for x in row]) for row in rows], axis=1)
    full = jnp.broadcast_to(full, (*batch, *full.shape))
    if lengths is None:
        return full
    sizes = full[..., 2, :]
    missing = sizes - jnp.clip(lengths, jnp.zeros_like(sizes), sizes)
    shorter = jnp.stack([missing, jnp.zeros_like(missing), missing, jnp.zeros_like(missing), missing], axis=-2)
    return full - shorter


def existing_queries(lengths: jax.Array, spatial: Sequence[int]) -> jax.Array:
    """`[batch, *spatial]`: whether a token lies within its sample's lengths."""
    rank = len(spatial)
    exists = jnp.ones((), bool)
    for axis, size in enumerate(spatial):
        inside = jnp.arange(size, dtype=lengths.dtype) < lengths[:, axis, None]
        exists = exists & inside.reshape(-1, *(size if a == axis else 1 for a in range(rank)))
    return exists


def wrap(x: jax.Array, axes: Sequence[Axis], first: int) -> jax.Array:
    """Extends the spatial axes of `x`, which begin at axis `first`, by their wrapped tokens."""
    for axis, placed in enumerate(axes, first):
        if placed.wrapped:
            size = x.shape[axis]
            head = jax.lax.slice_in_dim(x, 0, placed.wrapped, axis=axis)
            tail = jax.lax.slice_in_dim(x, size - placed.wrapped, size, axis=axis)
            x = jnp.concatenate([tail, x, head], axis=axis)
    return x
