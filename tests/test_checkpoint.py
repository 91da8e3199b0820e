"""`jax.checkpoint` with and without policies, and what the names of the results save."""

import re

import jax
import jax.numpy as jnp
import pytest
from operations import BY_NAME, OPERATIONS, assert_close, dense_gradient, everything, loss

NAMES = ("natten_out", "natten_lse")
policies = jax.checkpoint_policies


def gradient(function, operation):
    return jax.grad(loss(function), everything(operation))


def forwards(function, *arrays) -> int:
    """How often the jaxpr runs the forward primitive. (The compiled program merges equal calls.)"""
    return len(re.findall(r"\bnatten_forward\[", str(jax.make_jaxpr(function)(*arrays))))


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_checkpoint(operation):
    arrays = operation.arrays()
    actual = jax.jit(gradient(jax.checkpoint(operation.call), operation))(*arrays)
    assert_close(actual, dense_gradient(operation)[1])


POLICIES = {
    "nothing": (policies.nothing_saveable, 2),
    "everything": (policies.everything_saveable, 1),
    "dots": (policies.dots_saveable, 2),
    "both names": (policies.save_only_these_names(*NAMES), 1),
    "out only": (policies.save_only_these_names("natten_out"), 2),
    "lse only": (policies.save_only_these_names("natten_lse"), 2),
}


@pytest.mark.parametrize("policy, expected", list(POLICIES.values()), ids=list(POLICIES))
@pytest.mark.parametrize("name", ["na1d", "attention"])
def test_policy_decides_how_often_forward_runs(name, policy, expected):
    operation = BY_NAME[name]
    function = gradient(jax.checkpoint(operation.call, policy=policy), operation)
    arrays = operation.arrays()
    assert forwards(function, *arrays) == expected
    assert_close(jax.jit(function)(*arrays), dense_gradient(operation)[1])


def test_names_save_forward_in_a_checkpointed_scan():
    operation = BY_NAME["na1d"]
    q, k, v, rpb = operation.arrays()

    def layers(f, policy):
        def value(k):
            step = jax.checkpoint(lambda x, scale: (x + jnp.sum(f(q, k * scale, v, rpb)), None), policy=policy)
            return jax.lax.scan(step, 0.0, jnp.array([1.0, 2.0]))[0]

        return jax.grad(value)

    saving, plain = (layers(operation.call, p) for p in (policies.save_only_these_names(*NAMES), None))
    assert (forwards(saving, k), forwards(plain, k)) == (1, 2)
    expected = jax.jit(layers(operation.dense, None))(k)
    assert_close(jax.jit(saving)(k), expected)
    assert_close(jax.jit(plain)(k), expected)
