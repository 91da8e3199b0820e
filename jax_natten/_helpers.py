"""What a window is and what it costs, for plots, tests and benchmarks: `window_indices` and `flops`."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from . import _checks as check
from ._frame import place
from ._neighborhood import PerAxisBool, PerAxisInt, PerAxisStr
from ._window import Window, axis_slots


class WindowIndices(NamedTuple):
    """The keys in every query's window."""

    coordinates: np.ndarray
    """int32 `[*spatial, volume, rank]`: the key's coordinates; 0 where not valid."""
    valid: np.ndarray
    """bool `[*spatial, volume]`: whether the slot holds a key."""


class Flops(NamedTuple):
    """Useful floating-point operations: two for each multiply-add of a query with a key in its window."""

    forward: int
    backward: int


def window_indices(
    spatial: Sequence[int],
    kernel_size: PerAxisInt,
    stride: PerAxisInt | None = 1,
    dilation: PerAxisInt | None = 1,
    is_causal: PerAxisBool | None = False,
    border: PerAxisStr | None = "shift",
) -> WindowIndices:
    """Which keys every query sees: what weight m of query i, as `na2d_qk` orders them, refers to.

    Args:
      spatial: lengths of the 1 to 3 axes.
      kernel_size, stride, dilation, is_causal, border: the window, as in `na2d`.

    Returns:
      NumPy arrays: coordinates int32 `[*spatial, volume, rank]` and valid bool `[*spatial, volume]`, with
      volume = prod(kernel_size), slots row-major over the axes.

    Raises:
      ValueError, TypeError: as `na2d` for the window; ValueError where spatial is not 1 to 3 positive lengths.
    """
    window, spatial, axes = _axes(spatial, kernel_size, stride, dilation, is_causal, border)
    rank = window.rank
    coordinates = np.zeros((*spatial, *window.kernel_size, rank), np.int32)
    valid = np.ones((*spatial, *window.kernel_size), bool)
    for axis, placed in enumerate(axes):
        slots = axis_slots(window, axis, np.arange(spatial[axis]), placed[:5])
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = slots.key.shape
        coordinates[..., axis] = ((slots.key - placed.wrapped) % spatial[axis]).reshape(shape)
        valid &= slots.present.reshape(shape)
    coordinates *= valid[..., None]
    return WindowIndices(coordinates.reshape(*spatial, window.volume, rank), valid.reshape(*spatial, window.volume))


def flops(
    query_shape: Sequence[int],
    kernel_size: PerAxisInt,
    stride: PerAxisInt | None = 1,
    dilation: PerAxisInt | None = 1,
    is_causal: PerAxisBool | None = False,
    *,
    border: PerAxisStr | None = "shift",
    value_dim: int | None = None,
) -> Flops:
    """Useful floating-point operations of a fused call, counting the keys that exist.

    Args:
      query_shape: `[batch, *spatial, heads, head_dim]`, 1 to 3 spatial axes.
      kernel_size, stride, dilation, is_causal, border: the window, as in `na2d`.
      value_dim: head_dim of the value; that of the query by default.

    Returns:
      forward (the two products of attention) and backward (five products, scores included).

    Raises:
      ValueError, TypeError: as `na2d` for the window, ValueError for the shape.
    """
    if len(query_shape) not in (4, 5, 6):
        raise ValueError(
            f"query_shape: expected [batch, *spatial, heads, head_dim] of 4 to 6 axes, got {query_shape!r}"
        )
    batch, *spatial, heads, dim = query_shape
    window, lengths, axes = _axes(spatial, kernel_size, stride, dilation, is_causal, border)
    value_dim = dim if value_dim is None else value_dim
    pairs = batch * heads * prod(_pairs(window, axis, lengths[axis], placed) for axis, placed in enumerate(axes))
    return Flops(2 * pairs * (dim + value_dim), 2 * pairs * (3 * dim + 2 * value_dim))


def _axes(
    spatial: Sequence[int], kernel_size, stride, dilation, is_causal, border
) -> tuple[Window, tuple[int, ...], list]:
    """The window, the lengths of the axes, and per axis where its tokens lie, checked."""
    spatial = check.spatial(spatial)
    window, borders = check.window(len(spatial), kernel_size, stride, dilation, is_causal, border)
    check.fits(window, borders, spatial)
    return window, spatial, list(place(window, spatial, borders))


def _pairs(window: Window, axis: int, length: int, placed) -> int:
    """Pairs of a query with a key that it sees on one axis, counted a few million slots at a time."""
    step = max(2**22 // window.kernel_size[axis], 1)
    blocks = (np.arange(begin, min(begin + step, length)) for begin in range(0, length, step))
    return sum(int(axis_slots(window, axis, queries, placed[:5]).present.sum()) for queries in blocks)
