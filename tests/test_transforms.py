"""Every derivative of every public operation against the same derivative of a dense formula."""

import functools

import jax
import jax.numpy as jnp
import pytest
from operations import OPERATIONS, assert_close, loss, ones

operations = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)


# Derivatives of f at x along t, and along u where there is a second direction.


def _everything(arrays):
    return tuple(range(len(arrays)))


def jit(f, x, t, u):
    return f(*x)


def grad(f, x, t, u):
    return jax.grad(loss(f), _everything(x))(*x)


def value_and_grad(f, x, t, u):
    return jax.value_and_grad(loss(f), _everything(x))(*x)


def vjp(f, x, t, u):
    out, pull = jax.vjp(f, *x)
    return out, pull(ones(out))


def jvp(f, x, t, u):
    return jax.jvp(f, x, t)


def linearize(f, x, t, u):
    out, push = jax.linearize(f, *x)
    return out, push(*t)


def linear_transpose(f, x, t, u):
    out, push = jax.linearize(f, *x)
    return out, jax.linear_transpose(push, *t)(ones(out))


def jacfwd(f, x, t, u):
    return jax.jacfwd(f, _everything(x))(*x)


def jacrev(f, x, t, u):
    return jax.jacrev(f, _everything(x))(*x)


def forward_over_reverse(f, x, t, u):
    return jax.jvp(jax.grad(loss(f), _everything(x)), x, t)[1]


def reverse_over_forward(f, x, t, u):
    return jax.grad(lambda *x: jax.jvp(loss(f), x, t)[1], _everything(x))(*x)


def forward_over_forward(f, x, t, u):
    return jax.jvp(lambda *x: jax.jvp(loss(f), x, t)[1], x, u)[1]


def reverse_over_reverse(f, x, t, u):
    def slope(*x):
        return sum(map(jnp.vdot, jax.grad(loss(f), _everything(x))(*x), t))

    return jax.grad(slope, _everything(x))(*x)


def third_order(f, x, t, u):
    def curvature(*x):
        return sum(map(jnp.vdot, forward_over_reverse(f, x, t, u), u))

    return jax.grad(curvature, _everything(x))(*x)


# Transformations that must agree with one another share the dense formula's result.
DERIVATIVES = {
    jit: jit,
    grad: grad,
    value_and_grad: value_and_grad,
    vjp: vjp,
    jvp: jvp,
    linearize: jvp,
    linear_transpose: vjp,
    jacfwd: jacrev,
    jacrev: jacrev,
    forward_over_reverse: forward_over_reverse,
    reverse_over_forward: forward_over_reverse,
    reverse_over_reverse: forward_over_reverse,
    forward_over_forward: forward_over_forward,
    third_order: third_order,
}


@functools.cache
def dense_result(derivative, operation):
    return jax.jit(derivative, static_argnums=0)(operation.dense, *map(operation.arrays, (0, 1, 2)))


@operations
@pytest.mark.parametrize("derivative", list(DERIVATIVES), ids=lambda derivative: derivative.__name__)
def test_derivative(operation, derivative):
    actual = jax.jit(derivative, static_argnums=0)(operation.call, *map(operation.arrays, (0, 1, 2)))
    assert_close(actual, dense_result(DERIVATIVES[derivative], operation), 16 if derivative is third_order else 4)
