"""`vmap` of every public operation, over every choice of mapped arguments and over any axis."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from operations import BY_NAME, OPERATIONS, assert_close, loss

import jax_natten as jn

SIZE = 2


@functools.cache
def dense(operation):
    return jax.jit(operation.dense)


def stacked(operation, n: int = SIZE):
    """`n` problems, each argument with them along a new leading axis."""
    return tuple(map(jnp.stack, zip(*map(operation.arrays, range(n)), strict=True)))


def choices():
    for operation in OPERATIONS:
        for mapped in itertools.product((True, False), repeat=len(operation.shapes)):
            if any(mapped):
                yield pytest.param(operation, mapped, id=f"{operation}-{''.join('ux'[m] for m in mapped)}")


@pytest.mark.parametrize("operation, mapped", list(choices()))
def test_vmap(operation, mapped):
    arrays = stacked(operation)
    # A different axis for every argument, from the front and from the back.
    axes = [
        (i % x.ndim if i % 2 == 0 else -1) if m else None for i, (x, m) in enumerate(zip(arrays, mapped, strict=True))
    ]
    given = [x[0] if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip(arrays, axes, strict=True)]
    actual = jax.jit(jax.vmap(operation.call, in_axes=axes, out_axes=1))(*given)
    samples = [[x[i if m else 0] for x, m in zip(arrays, mapped, strict=True)] for i in range(SIZE)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *(dense(operation)(*sample) for sample in samples))
    assert_close(actual, expected)


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_vmap_of_grad(operation):
    def gradient(f):
        return jax.grad(loss(f), tuple(range(len(operation.shapes))))

    arrays = stacked(operation)
    actual = jax.jit(jax.vmap(gradient(operation.call)))(*arrays)
    assert_close(actual, jax.jit(jax.vmap(gradient(operation.dense)))(*arrays))


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_grad_of_nested_vmap(operation):
    """Pairs of problems: the first argument is mapped by the inner vmap only, the second by the outer only."""

    def value(f):
        inner = jax.vmap(f, in_axes=(0, *(None,) * (len(operation.shapes) - 1)))
        outer = jax.vmap(inner, in_axes=(None, 0, *(None,) * (len(operation.shapes) - 2)))
        return jax.grad(loss(outer), (0, 1))

    first, second, *rest = stacked(operation)
    arrays = (first, second, *(x[0] for x in rest))
    assert_close(jax.jit(value(operation.call))(*arrays), jax.jit(value(operation.dense))(*arrays))


def test_hessian_vector_product_of_vmap():
    operation = BY_NAME["na1d"]

    def product(f):
        return lambda x, t: jax.jvp(jax.grad(loss(jax.vmap(f)), (0, 1, 2, 3)), x, t)[1]

    x, t = stacked(operation), stacked(operation, SIZE + 1)
    t = tuple(leaf[1:] for leaf in t)
    assert_close(jax.jit(product(operation.call))(x, t), jax.jit(product(operation.dense))(x, t))


@pytest.mark.parametrize("unmapped", [(), (0,), (1, 2)], ids=["all", "query", "key and value"])
def test_lengths_can_be_mapped(unmapped):
    query, key, value = (jax.random.normal(jax.random.key(i), (3, 1, 6, 1, 2)) for i in range(3))
    lengths = jnp.array([[[6]], [[4]], [[2]]], jnp.int32)
    arrays = [x[0] if i in unmapped else x for i, x in enumerate((query, key, value))]
    axes = [None if i in unmapped else 0 for i in range(3)]

    def call(q, k, v, lengths):
        return jn.na1d(q, k, v, 3, lengths=lengths)

    actual = jax.jit(jax.vmap(call, in_axes=(*axes, 0)))(*arrays, lengths)
    for i, length in enumerate((6, 4, 2)):
        sample = [x if axis is None else x[i] for x, axis in zip(arrays, axes, strict=True)]
        short = [x[:, :length] for x in sample]
        # A window of 3 on an axis of 2 is the whole axis.
        expected = jn.na1d(*short, 3) if length >= 3 else jn.attention(*short)
        assert_close(actual[i, :, :length], expected)
        assert not actual[i, :, length:].any()
