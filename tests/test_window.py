"""The Python geometry of the window against brute force, on every small axis."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jax_natten._window import Window, axis_slots, neighborhood

AXES = [
    (k, t, d, causal)
    for k, d, causal in itertools.product((1, 2, 3, 4, 5, 6), (1, 2, 3, 4), (False, True))
    for t in range(1, k + 1)
]


def window_of(*axes) -> Window:
    return Window(*zip(*axes, strict=True))


def table(slots, query) -> dict:
    """{(query, slot): (key, bias)} of the slots that are present."""
    where = np.argwhere(slots.present)
    return {(int(query[i]), int(m)): (int(slots.key[i, m]), int(slots.bias[i, m])) for i, m in where}


def brute_force(axis, size, first_query=0, queries=None, first_key=0, keys=None) -> dict:
    """The same by definition, in array indices."""
    found = {}
    for i in range(size if queries is None else queries):
        if 0 <= i + first_query < size:
            for slot, (key, bias) in reference.axis_keys(i + first_query, size, *axis).items():
                if 0 <= key - first_key < (size if keys is None else keys):
                    found[i, slot] = key - first_key, bias
    return found


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_every_size(axis):
    """Also the sizes whose groups are shorter than the window."""
    for size in range(1, 27):
        query = np.arange(size)
        slots = axis_slots(window_of(axis), 0, query, (size, 0, size, 0, size))
        assert table(slots, query) == brute_force(axis, size), size


FRAMES = [
    (17, 5, 4, 3, 9),  # a shard with its halo
    (17, 0, 6, 0, 8),
    (17, 9, 8, 6, 11),
    (11, 0, 11, 0, 7),  # keys end before the axis does
    (20, 4, 12, 4, 12),  # a clipped border
    (20, 4, 12, 0, 20),  # a wrapped border
    (12, -3, 9, -5, 20),  # arrays that begin before the axis
    (12, 8, 9, 8, 20),  # and that pass beyond it
    (9, 0, 0, 0, 9),  # no query exists
    (9, 0, 9, 0, 0),  # no key exists
]


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_frames(frame):
    extent, first_query, queries, first_key, keys = frame
    query = np.arange(12, dtype=np.int32)
    for axis in AXES:
        slots = axis_slots(window_of(axis), 0, query, frame)
        queries_there = min(queries, query.size)
        assert table(slots, query) == brute_force(axis, extent, first_query, queries_there, first_key, keys), axis


@pytest.mark.parametrize("axis", [(5, 1, 1, False), (3, 2, 2, False), (4, 1, 2, True), (4, 3, 1, True)], ids=str)
def test_offsets_lie_in_the_bias_table(axis):
    slots = axis_slots(window_of(axis), 0, np.arange(19), (19, 0, 19, 0, 19))
    offsets = slots.bias[slots.present]
    assert offsets.min() >= 0 and offsets.max() <= 2 * axis[0] - 2


def test_traced_and_known_arrays_give_the_same():
    window = window_of((3, 2, 2, False))
    frame = np.array([13, 1, 10, 0, 11], np.int32)
    known = axis_slots(window, 0, np.arange(12, dtype=np.int32), frame)
    traced = axis_slots(window, 0, jnp.arange(12, dtype=jnp.int32), jnp.asarray(frame))
    for a, b in zip(known, traced, strict=True):
        np.testing.assert_array_equal(a, b)


PRODUCTS = {
    "2d": (window_of((3, 1, 1, False), (2, 2, 2, True)), (4, 5)),
    "3d": (window_of((2, 1, 1, True), (3, 2, 1, False), (1, 1, 2, False)), (3, 4, 2)),
}


@pytest.mark.parametrize(("window", "spatial"), PRODUCTS.values(), ids=PRODUCTS)
def test_the_neighborhood_is_the_product_of_the_axes(window, spatial):
    tokens = int(np.prod(spatial))
    frame = np.array([(s, 0, s, 0, s) for s in spatial], np.int32).T
    slots = neighborhood(window, np.arange(tokens, dtype=np.int32), spatial, frame, spatial)
    expected = {}
    plain = reference.Window(
        *(getattr(window, name) for name in ("kernel_size", "stride", "dilation", "is_causal")),
        ("shift",) * len(spatial),
    )
    for row in reference.rows(1, spatial, plain):
        keys, offsets = np.ravel_multi_index(row.keys, spatial), np.ravel_multi_index(row.offsets, window.bias_shape)
        query = int(np.ravel_multi_index(row.query, spatial))
        for slot, key, offset in zip(row.slots, keys, offsets, strict=True):
            expected[query, int(slot)] = int(key), int(offset)
    assert table(slots, np.arange(tokens)) == expected
    assert not np.any(slots.key[~slots.present]) and not np.any(slots.bias[~slots.present])


def test_properties():
    window = window_of((3, 1, 2, False), (4, 2, 1, True))
    assert (window.rank, window.volume, window.bias_shape) == (2, 12, (5, 7))
    attributes = {name: (x.dtype, x.tolist()) for name, x in window.attributes().items()}
    assert attributes == {
        "kernel_size": (np.int64, [3, 4]),
        "stride": (np.int64, [1, 2]),
        "dilation": (np.int64, [2, 1]),
        "is_causal": (np.int64, [0, 1]),
    }
    assert hash(window) == hash(window_of((3, 1, 2, False), (4, 2, 1, True)))
