"""window_indices and flops against brute force."""

import numpy as np
import pytest
import reference

import jax_natten as jn

WINDOWS = {
    "plain": ((9,), dict(kernel_size=3)),
    "even": ((8,), dict(kernel_size=4)),
    "one": ((4,), dict(kernel_size=1)),
    "whole": ((5, 3), dict(kernel_size=(5, 3))),
    "dilated": ((13,), dict(kernel_size=4, dilation=3)),
    "stride": ((14,), dict(kernel_size=5, stride=3, dilation=2)),
    "causal": ((9,), dict(kernel_size=4, dilation=2, is_causal=True)),
    "causal_stride": ((11,), dict(kernel_size=5, stride=2, is_causal=True)),
    "clip": ((6,), dict(kernel_size=5, dilation=2, border="clip")),
    "clip_far": ((2,), dict(kernel_size=8, border="clip")),
    "clip_causal": ((6,), dict(kernel_size=4, border="clip", is_causal=True)),
    "wrap": ((8,), dict(kernel_size=4, dilation=2, border="wrap")),
    "mixed_2d": ((5, 7), dict(kernel_size=(3, 4), stride=(2, 1), border=("shift", "clip"))),
    "mixed_3d": (
        (4, 5, 6),
        dict(
            kernel_size=(3, 2, 3), dilation=(1, 2, 1), is_causal=(False, True, False), border=("wrap", "shift", "clip")
        ),
    ),
}
windows = pytest.mark.parametrize(("spatial", "window"), WINDOWS.values(), ids=WINDOWS)


def rows(spatial, window):
    return reference.rows(1, spatial, reference.make_window(len(spatial), **window))


@windows
def test_window_indices(spatial, window):
    found = jn.window_indices(spatial, **window)
    volume = int(np.prod(np.broadcast_to(window["kernel_size"], len(spatial))))
    assert found.coordinates.shape == (*spatial, volume, len(spatial)) and found.coordinates.dtype == np.int32
    assert found.valid.shape == (*spatial, volume) and found.valid.dtype == bool
    coordinates, valid = np.zeros_like(found.coordinates), np.zeros_like(found.valid)
    for row in rows(spatial, window):
        valid[row.query][row.slots] = True
        coordinates[row.query][row.slots] = np.stack(row.keys, axis=-1)
    np.testing.assert_array_equal(found.valid, valid)
    np.testing.assert_array_equal(found.coordinates, coordinates)


@windows
@pytest.mark.parametrize("value_dim", [None, 5])
def test_flops(spatial, window, value_dim):
    """Two operations a multiply-add: scores and output forward, five products backward."""
    batch, heads, dim = 2, 3, 4
    pairs = batch * heads * sum(len(row.slots) for row in rows(spatial, window))
    out = dim if value_dim is None else value_dim
    found = jn.flops((batch, *spatial, heads, dim), **window, value_dim=value_dim)
    assert found == (2 * pairs * (dim + out), 2 * pairs * (3 * dim + 2 * out))
    assert all(type(count) is int for count in found)


def test_flops_by_hand():
    assert jn.flops((1, 10, 1, 8), 3) == (2 * 30 * 16, 2 * 30 * 40)
    assert jn.flops((1, 4, 1, 1), 2, is_causal=True).forward == 2 * 7 * 2
    assert jn.flops((0, 4, 1, 1), 2) == (0, 0)


def test_flops_do_not_overflow():
    assert jn.flops((2**20, 2**12, 2**12, 2**10, 128), 64).forward == 4 * 2**20 * 2**24 * 2**10 * 64**2 * 128


@pytest.mark.parametrize("spatial", [(), (3, 3, 3, 3), []], ids=str)
def test_spatial_has_one_to_three_axes(spatial):
    with pytest.raises(ValueError, match=r"spatial: expected the lengths of 1 to 3 axes, got"):
        jn.window_indices(spatial, 3)


@pytest.mark.parametrize(
    ("spatial", "error"), [((0,), ValueError), ((-3, 4), ValueError), ((2.0,), TypeError)], ids=str
)
def test_spatial_is_of_positive_ints(spatial, error):
    with pytest.raises(error, match=r"spatial: expected one positive int"):
        jn.window_indices(spatial, 1)


@pytest.mark.parametrize("shape", [(8, 1, 4), (1, 2, 2, 2, 2, 1, 4)], ids=str)
def test_flops_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match=r"query_shape: expected \[batch, \*spatial, heads, head_dim\]"):
        jn.flops(shape, 2)


@pytest.mark.parametrize(
    "function", [lambda **w: jn.window_indices((5,), **w), lambda **w: jn.flops((1, 5, 1, 1), **w)]
)
def test_the_window_is_checked(function):
    with pytest.raises(ValueError, match=r"kernel_size: .*<= 5, the length of axis 0, got 6 \* 1 = 6"):
        function(kernel_size=6)
    with pytest.raises(ValueError, match="stride: expected at most the kernel_size 3 on axis 0, got 4"):
        function(kernel_size=3, stride=4)
