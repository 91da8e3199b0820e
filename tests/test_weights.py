"""Unfused neighborhood attention against brute force."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads
from problems import BACKENDS, PROBLEMS, Problem, assert_same, check_unfused, heads_first, precise, unfused
from tolerances import assert_close

import jax_natten as jn

problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
backends = pytest.mark.parametrize("backend", BACKENDS)


@problems
def test_numbers(problem):
    check_unfused(problem, "native")


FEATURES = Problem(
    spatial=(5, 4),
    kernel_size=(3, 2),
    batch=2,
    heads_kv=1,
    value_dim=3,
    additional=2,
    lengths=((5, 4), (3, 1)),
    rpb=True,
)


@pytest.mark.parametrize("rpb_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(dtype, rpb_dtype):
    check_unfused(replace(FEATURES, dtype=dtype, rpb_dtype=rpb_dtype), "native")


@pytest.mark.parametrize("dims", [(1, 1), (3, 40), (8, 24), (12, 5), (40, 8), (64, 3)], ids=str)
def test_head_dims(dims):
    check_unfused(Problem(spatial=(7,), kernel_size=3, dim=dims[0], value_dim=dims[1]), "native", forward_mode=False)


@backends
@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_empty(shape, backend):
    """No sample, or no head: empty results of the right shape, and gradients of zeros."""
    query = jnp.zeros((*shape, 5, 4, 3))
    rpb = jnp.zeros((shape[1], 5, 3))

    def run(query, rpb):
        logits = jn.na2d_qk(query, query, (3, 2), rpb=rpb, backend=backend)
        return jn.na2d_av(logits, query, (3, 2), backend=backend), logits

    (out, logits), pull = jax.vjp(run, query, rpb)
    assert out.shape == query.shape and logits.shape == (*shape, 5, 4, 6)
    grads = pull((jnp.zeros_like(out), jnp.zeros_like(logits)))
    assert [x.shape for x in grads] == [query.shape, rpb.shape]
    assert not np.any(grads[1])


@backends
def test_absent_slots_of_a_causal_axis_come_last(backend):
    ones = jnp.ones((1, 1, 4, 1))
    logits = jn.na1d_qk(ones, ones, 3, is_causal=True, backend=backend)[0, 0]
    inf = -np.inf
    np.testing.assert_array_equal(logits, [[1, inf, inf], [1, 1, inf], [1, 1, 1], [1, 1, 1]])


@backends
def test_rows_without_a_token_are_zero(backend):
    """Finite under a softmax, and 0 after it, whatever the arrays hold there."""
    problem = replace(FEATURES, dtype="float32")
    arrays = {name: heads_first(x) for name, x in problem.arrays().items() if name != "rpb"}
    window = problem.window
    qk, av = unfused(2)
    logits = qk(arrays["query"], arrays["key"], **window, additional_keys=arrays["additional_keys"], backend=backend)
    absent = np.broadcast_to(~problem.exists()[:, None], logits.shape[:-1])
    assert absent.any() and not np.any(np.asarray(logits)[absent])
    attn = jax.nn.softmax(logits)
    assert np.isfinite(attn).all()
    out = av(attn, arrays["value"], **window, additional_values=arrays["additional_values"], backend=backend)
    assert np.isfinite(out).all() and not np.any(np.asarray(out)[absent])


def test_agrees_with_the_fused_operation():
    problem = PROBLEMS["everything"]
    arrays, window = problem.arrays(), problem.window
    first = {name: jnp.asarray(x if name == "rpb" else heads_first(x)) for name, x in arrays.items()}
    scale = jnp.float32(problem.scale)
    keys = {name: first[name] for name in ("key", "rpb", "additional_keys")}
    logits = jn.na3d_qk(first["query"] * scale, **keys, **window)
    values = {name: first[name] for name in ("value", "additional_values")}
    out = jn.na3d_av(jax.nn.softmax(logits), **values, **window)
    expected, _ = reference.fused(**arrays, **window, scale=problem.scale)
    assert_close(jnp.moveaxis(out, 1, -2), expected, factor=4)


SECOND_ORDER = {
    "causal_rpb": replace(PROBLEMS["causal"], spatial=(5,), kernel_size=2, heads=1, dim=2),
    "grouped_additional": Problem(spatial=(3, 2), kernel_size=(2, 1), heads_kv=1, dim=2, additional=1, border="wrap"),
}


@pytest.mark.parametrize("problem", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_second_order(problem):
    """Through a softmax, by finite differences, in both modes."""
    arrays = {name: x if name == "rpb" else heads_first(x) for name, x in problem.arrays().items()}
    qk, av = unfused(problem.rank)

    @jax.jit
    def run(arrays):
        keys = {name: arrays[name] for name in ("query", "key", "rpb", "additional_keys") if name in arrays}
        values = {name: arrays[name] for name in ("value", "additional_values") if name in arrays}
        return av(jax.nn.softmax(qk(**keys, **problem.window)), **values, **problem.window)

    with precise("float64"):
        arrays = {name: jnp.asarray(x, "float64") for name, x in arrays.items()}
        check_grads(run, (arrays,), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@backends
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_keys_outside_the_window(poison, backend):
    """One dilation group is poisoned: the other's results and gradients are the same numbers as without."""
    clean = Problem(spatial=(12,), kernel_size=3, dilation=2, rpb=True).arrays()
    table = clean.pop("rpb")
    clean = {name: heads_first(x) for name, x in clean.items()}
    dirty = {name: x.copy() for name, x in clean.items()}
    for x in dirty.values():
        x[:, :, 1::2] = poison

    @jax.jit
    def results(arrays):
        def run(arrays):
            logits = jn.na1d_qk(arrays["query"], arrays["key"], 3, 2, rpb=table, backend=backend)
            return logits, jn.na1d_av(jax.nn.softmax(logits), arrays["value"], 3, 2, backend=backend)

        (logits, out), pull = jax.vjp(run, arrays)
        (grads,) = pull((logits * 0 + 1, out * 0 + 1))
        return {"logits": logits, "out": out, **grads}

    actual, expected = (jax.tree.map(lambda x: np.asarray(x)[:, :, ::2], results(arrays)) for arrays in (dirty, clean))
    for name in expected:
        assert np.isfinite(expected[name]).all()
        assert_same(actual[name], expected[name], backend, name)
