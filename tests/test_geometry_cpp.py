"""The C++ geometry of one axis against the definition of the window, key by key.

The definition here is written from the rules alone: it asks of every query and every key whether
the one sees the other. Frames that lie about their arrays, or that no call could want, must still
give indices inside the arrays.
"""

import itertools

import numpy as np
import pytest

from jax_natten._window import Window, axis_slots

_cpu = pytest.importorskip("jax_natten._cpu")

WINDOWS = [
    (k, t, d, causal)
    for k, d, causal in itertools.product((1, 2, 3, 4, 5, 7), (1, 2, 3), (False, True))
    for t in range(1, k + 1)
]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def window_of(x, extent, k, t, d, causal):
    """The global coordinates in the window of the query at x, in the order of their slots."""
    group = list(range(x % d, extent, d))
    p, n = x // d, len(group)
    leader = min(p // t * t + (t - 1 if causal else t // 2), n - 1)
    if causal:
        return group[max(leader - (k - 1), 0) : p + 1]
    start = min(max(leader - k // 2, 0), max(n - k, 0))
    return group[start : start + k]


def expected(k, t, d, causal, frame, query_size, key_size):
    """{(query index, key index): (slot, bias index)} of all pairs that see each other."""
    extent, query_origin, query_count, key_origin, key_count = frame
    pairs = {}
    for i in range(min(query_count, query_size)):
        x = query_origin + i
        if not 0 <= x < extent:
            continue
        for slot, y in enumerate(window_of(x, extent, k, t, d, causal)):
            j = y - key_origin
            if 0 <= j < min(key_count, key_size):
                pairs[i, j] = slot, (y - x) // d + k - 1
    return pairs


def from_queries(*args):
    pairs = {}
    for i, (first, count, step, slot, bias) in enumerate(_cpu.keys_of_queries(*args)):
        for m in range(count):
            pairs[i, first + m * step] = slot + m, bias + m
    return pairs


def from_keys(*args):
    pairs = {}
    for j, (first, count, step, slots, bias) in enumerate(_cpu.queries_of_keys(*args)):
        assert len(slots) == count
        for m in range(count):
            pairs[first + m * step, j] = slots[m], bias - m
    return pairs


def check(window, frame, query_size, key_size):
    args = (*window, frame, query_size, key_size)
    pairs = expected(*args)
    assert from_queries(*args) == pairs, args
    assert from_keys(*args) == pairs, args


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_plain_call(window):
    """Every size, also those with groups that are shorter than the window."""
    for size in range(0, 25):
        check(window, (size, 0, size, 0, size), size, size)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_frames(window):
    """Halos, mixed sizes, clipped borders: arrays that are parts of the axis or pass beyond it."""
    frames = [
        (17, 5, 4, 3, 9),
        (17, 0, 6, 0, 8),
        (17, 9, 8, 6, 11),
        (11, 0, 11, 0, 11),
        (20, 4, 12, 4, 12),
        (20, 4, 12, 0, 20),
        (12, -3, 9, -5, 20),
        (12, 8, 9, 8, 20),
    ]
    for frame in frames:
        check(window, frame, 12, 20)


@pytest.mark.parametrize("frame", [(20, 0, 20, 0, 20), (17, 5, 4, 3, 9), (12, -3, 9, -5, 20)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_python_twin(window, frame):
    """`axis_slots` is the same geometry, which the reference and the other platforms run."""
    slots = axis_slots(Window(*((entry,) for entry in window)), 0, np.arange(20), frame)
    pairs = {
        (int(i), int(slots.key[i, slot])): (int(slot), int(slots.bias[i, slot]))
        for i, slot in np.argwhere(slots.present)
    }
    assert from_queries(*window, frame, 20, 20) == pairs


HOSTILE = [
    (0, 0, 9, 0, 9),
    (-4, 0, 9, 0, 9),
    (9, 0, -1, 0, 9),
    (9, 0, 9, 0, INT32_MIN),
    (9, 0, INT32_MAX, 0, INT32_MAX),
    (INT32_MAX, INT32_MAX - 4, INT32_MAX, INT32_MAX - 4, INT32_MAX),
    (INT32_MAX, INT32_MIN, INT32_MAX, INT32_MAX, INT32_MAX),
    (INT32_MAX, 1000, 9, INT32_MIN, INT32_MAX),
    (INT32_MAX, INT32_MAX // 2, 9, INT32_MAX // 2 - 3, 11),
]


@pytest.mark.parametrize("frame", HOSTILE, ids=str)
@pytest.mark.parametrize("window", [(1, 1, 1, False), (5, 3, 2, False), (4, 4, 3, True)], ids=str)
def test_hostile_frames(window, frame):
    """Indices stay inside the arrays, and both directions agree."""
    args = (*window, frame, 9, 11)
    pairs = from_queries(*args)
    assert pairs == from_keys(*args)
    for (i, j), (slot, bias) in pairs.items():
        assert 0 <= i < 9 and 0 <= j < 11
        assert 0 <= slot < window[0] and 0 <= bias < 2 * window[0] - 1
