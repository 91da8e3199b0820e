"""Frames: what borders and lengths make of them, and the arrays that go with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_natten._frame import Axis, existing_queries, frame, has_absent_slots, place, wrap
from jax_natten._window import Window

WINDOW = Window((4, 3, 5), (1, 1, 1), (2, 1, 1), (False, False, True))
PLACED = {
    # border: one axis each of length 9 with kernel size 4 and dilation 2, so a reach of 4
    "shift": Axis(9, 0, 9, 0, 9, 0),
    "clip": Axis(17, 4, 9, 4, 9, 0),
    "wrap": Axis(17, 4, 9, 0, 17, 4),
}


@pytest.mark.parametrize(("border", "placed"), PLACED.items())
def test_place(border, placed):
    axes = place(WINDOW, (9, 6, 7), (border, "shift", "clip"))
    assert axes == [placed, Axis(6, 0, 6, 0, 6, 0), Axis(7, 0, 7, 0, 7, 0)]  # clip on a causal axis is shift


@pytest.mark.parametrize(
    ("causal", "border", "lengths", "absent"),
    [
        (False, "shift", None, False),
        (False, "wrap", None, False),
        (False, "clip", None, True),
        (True, "shift", None, True),
        (False, "shift", np.array([[3]]), True),
    ],
)
def test_has_absent_slots(causal, border, lengths, absent):
    window = Window((3,), (1,), (1,), (causal,))
    assert has_absent_slots(window, place(window, (8,), (border,)), lengths) is absent


def test_frame_without_lengths():
    where = frame([PLACED["wrap"], PLACED["shift"]], (2, 3), None)
    assert where.dtype == jnp.int32 and where.shape == (2, 3, 5, 2)
    np.testing.assert_array_equal(where[1, 2], [[17, 9], [4, 0], [9, 9], [0, 0], [17, 9]])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("lengths", [[[9, 9]], [[3, 0]], [[0, 5]]], ids=str)
def test_frame_with_lengths(lengths, traced):
    """Extent and counts shrink by what is missing; origins stay."""
    axes = [PLACED["clip"], PLACED["shift"]]
    build = jax.jit(lambda x: frame(axes, (1,), x)) if traced else lambda x: frame(axes, (1,), x)
    (a, b), where = lengths[0], build(jnp.array(lengths, jnp.int32))
    np.testing.assert_array_equal(where[0], [[a + 8, b], [4, 0], [a, b], [4, 0], [a, b]])


def test_frame_clamps_lengths_to_the_array():
    where = frame([PLACED["shift"]], (2,), jnp.array([[-2], [30]], jnp.int32))
    np.testing.assert_array_equal(where[..., 0], [[0, 0, 0, 0, 0], [9, 0, 9, 0, 9]])


def test_existing_queries():
    exists = existing_queries(jnp.array([[2, 1], [0, 3], [9, 9]], jnp.int32), (2, 3))
    assert exists.tolist() == [[[True, False, False]] * 2, [[False] * 3] * 2, [[True] * 3] * 2]


def test_wrap():
    x = jnp.arange(24).reshape(1, 4, 6, 1)
    axes = [Axis(6, 1, 4, 0, 6, wrapped=1), Axis(10, 2, 6, 0, 10, wrapped=2)]
    expected = np.pad(np.asarray(x), ((0, 0), (1, 1), (2, 2), (0, 0)), mode="wrap")
    np.testing.assert_array_equal(wrap(x, axes, first=1), expected)
    np.testing.assert_array_equal(wrap(x, [PLACED["shift"], PLACED["clip"]], first=1), x)
