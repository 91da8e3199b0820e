"""The neighborhood window: its static parameters, and the one Python derivation of its geometry.

`Window` is the frozen, hashable description that every primitive carries as a static parameter.
`axis_slots` is the twin of `cpu/geometry.h`: given a query's place on an axis and the axis' frame it tells
which keys the window holds. Nothing else in the package derives a bound.

On an axis of extent s, with kernel size k, stride t and dilation d, query coordinate i lies in dilation group
g = i mod d at position p = i div d; the group has n = ceil((s - g) / d) positions, and its stride leader is
    l = min((p div t) t + (t - 1 if causal else t div 2), n - 1).
The window is [start, end) in the group's positions:
    not causal: start = clamp(l - k div 2, 0, n - k), end = min(start + k, n);
    causal:     start = max(l - (k - 1), 0),          end = p + 1.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Window:
    """Static parameters of a neighborhood, one entry per axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def volume(self) -> int:
        """Number of window positions (slots) of a query."""
        return prod(self.kernel_size)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of one head's relative positional bias table."""
        return tuple(2 * k - 1 for k in self.kernel_size)

    def has_bias(self, table: Any) -> bool:
        """Whether `[..., *offsets]` is a bias table; one of one entry per axis stands for no bias."""
        return table.shape[-self.rank :] == self.bias_shape

    def attributes(self) -> dict[str, np.ndarray]:
        """The FFI attributes that describe the window to a handler."""
        return {
            "kernel_size": np.array(self.kernel_size, np.int64),
            "stride": np.array(self.stride, np.int64),
            "dilation": np.array(self.dilation, np.int64),
            "is_causal": np.array(self.is_causal, np.int64),
        }


class Slots(NamedTuple):
    """The window positions of queries on one axis; every field is `[queries, kernel_size]`."""

    key: Any  # array index of the key; meaningless where absent
    present: Any  # whether that key exists and lies in the window
    bias: Any  # index into the bias table: key position - query position + kernel_size - 1


def axis_slots(window: Window, axis: int, query: Any, frame: Any) -> Slots:
    """Keys in the windows of the queries with array indices `query` `[queries]` on one axis.

    `frame` holds the axis' extent, query origin, query count, key origin and key count. Works alike on NumPy
    arrays and on traced jax arrays.
    """
    xp = query.__array_namespace__()
    k, t, d = window.kernel_size[axis], window.stride[axis], window.dilation[axis]
    causal = window.is_causal[axis]
    extent, query_origin, query_count, key_origin, key_count = (frame[row] for row in range(5))

    coordinate = query + query_origin
    group, position = coordinate % d, coordinate // d
    length = (extent - group + d - 1) // d
    leader = xp.minimum(position // t * t + (t - 1 if causal else t // 2), length - 1)
    if causal:
        start = xp.maximum(leader - (k - 1), 0)
        end = xp.minimum(position + 1, length)
    else:
        start = xp.maximum(xp.minimum(leader - k // 2, length - k), 0)
        end = xp.minimum(start + k, length)

    slot = start[:, None] + xp.arange(k, dtype=query.dtype)
    key = slot * d + group[:, None] - key_origin
    exists = (query >= 0) & (query < query_count) & (coordinate >= 0) & (coordinate < extent)
    present = exists[:, None] & (slot < end[:, None]) & (key >= 0) & (key < key_count)
    return Slots(key, present, slot - position[:, None] + k - 1)


def neighborhood(window: Window, query: Any, spatial: tuple, frame: Any, key_spatial: tuple) -> Slots:
    """The windows of the queries with flat row-major indices `query` `[queries]`, over all axes.

    `frame` is `[5, rank]`. Every field of the result is `[queries, volume]`, slots row-major over the axes; keys
    and bias entries are flat row-major indices, 0 where absent.
    """
    rank = window.rank
    flat = Slots(0, True, 0)
    for axis in range(rank):
        inner = prod(spatial[axis + 1 :])
        slots = axis_slots(window, axis, query // inner % spatial[axis], frame[:, axis])
        shape = (query.shape[0], *(window.kernel_size[axis] if a == axis else 1 for a in range(rank)))
        key, present, bias = (field.reshape(shape) for field in slots)
        flat = Slots(
            flat.key * key_spatial[axis] + key,
            flat.present & present & (key < key_spatial[axis]),
            flat.bias * window.bias_shape[axis] + bias,
        )
    present = flat.present.reshape(query.shape[0], window.volume)
    xp = query.__array_namespace__()
    key, bias = (xp.where(present, index.reshape(present.shape), 0) for index in (flat.key, flat.bias))
    return Slots(key, present, bias)
