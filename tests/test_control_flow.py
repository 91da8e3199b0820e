"""Every public operation inside scan, while_loop and cond, with the derivatives that those have."""

import jax
import jax.numpy as jnp
import pytest
from operations import OPERATIONS, assert_close, loss

operations = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)


def step(f, x, carry):
    """Makes the next carry depend on every argument and on the carry."""
    return 0.01 * loss(f)(*(leaf * (1 + 0.1 * carry) for leaf in x))


def compare(transformed, operation, *more):
    arrays = operation.arrays()
    actual, expected = (jax.jit(transformed(f))(arrays, *more) for f in (operation.call, operation.dense))
    assert_close(actual, expected, 8)


@operations
def test_grad_of_scan(operation):
    def scanned(f):
        def value(x):
            def body(carry, scale):
                carry = step(f, x, carry * scale)
                return carry, carry

            return jnp.sum(jax.lax.scan(body, 0.5, jnp.array([1.0, 2.0, -1.0]))[1])

        return jax.value_and_grad(value)

    compare(scanned, operation)


@operations
def test_jvp_of_while_loop(operation):
    """The number of steps is known at run time only; reverse mode is not defined for it."""

    def looped(f):
        def value(x, n):
            def body(state):
                return state[0] + 1, step(f, x, state[1])

            return jax.lax.while_loop(lambda state: state[0] < n, body, (0, 0.5))[1]

        return lambda x, t, n: jax.jvp(lambda x: value(x, n), (x,), (t,))

    compare(looped, operation, operation.arrays(1), 3)


@operations
def test_grad_of_cond(operation):
    """Both branches, by a predicate known at run time only."""

    def chosen(f):
        def value(x, yes):
            return jax.lax.cond(yes, lambda x: step(f, x, 0.5), lambda x: step(f, x, -2.0), x)

        return lambda x: [jax.value_and_grad(value)(x, yes) for yes in (jnp.array(True), jnp.array(False))]

    compare(chosen, operation)
