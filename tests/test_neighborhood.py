"""Fused neighborhood attention against brute force."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads
from problems import BACKENDS, PROBLEMS, Problem, assert_same, check_fused, fused, precise
from tolerances import assert_close

import jax_natten as jn

backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_numbers(problem):
    check_fused(problem, "native")


@pytest.mark.parametrize("rpb_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["everything", "grouped"])
def test_dtypes(name, dtype, rpb_dtype):
    check_fused(replace(PROBLEMS[name], dtype=dtype, rpb_dtype=rpb_dtype), "native")


def test_half_precision_table_with_single_precision_activations():
    check_fused(replace(PROBLEMS["grouped"], rpb_dtype="bfloat16"), "native")


DIMS = [(1, 1), (1, 9), (3, 3), (8, 12), (12, 8), (24, 1), (40, 24), (64, 40), (3, 65)]


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims):
    check_fused(Problem(spatial=(7,), kernel_size=3, dim=dims[0], value_dim=dims[1]), "native", forward_mode=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(1, 3), (12, 24), (40, 8)], ids=str)
def test_head_dims_in_half_precision(dims, dtype):
    problem = Problem(spatial=(4, 5), kernel_size=3, dim=dims[0], value_dim=dims[1], dtype=dtype)
    check_fused(problem, "native", forward_mode=False)


@pytest.mark.parametrize("scale", [0, 0.0, -0.3, 2, np.float32(0.25)], ids=repr)
def test_scale(scale):
    check_fused(Problem(spatial=(6,), kernel_size=3, scale=scale, rpb=True), "native", forward_mode=False)


@backends
@pytest.mark.parametrize("additional", [None, 1])
def test_large_logits(backend, additional):
    """Softmax saturates; nothing overflows."""
    problem = Problem(spatial=(7,), kernel_size=4, dim=16, scale=100.0, additional=additional)
    arrays = problem.arrays()

    @jax.jit
    def run(arrays):
        function = fused(1)
        return function(**arrays, kernel_size=4, scale=100.0, return_lse=True, backend=backend)

    (out, lse), pull = jax.vjp(run, jax.tree.map(jnp.asarray, arrays))
    (grads,) = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    expected_out, expected_lse = reference.fused(**arrays, kernel_size=4, scale=100.0)
    assert np.abs(expected_lse).max() > 500
    assert_close(out, expected_out, factor=100)  # a logit of 1000 is known to 1e-4
    assert_close(lse, expected_lse)
    bars = np.ones(out.shape), np.ones(lse.shape)
    expected = reference.fused(**arrays, kernel_size=4, scale=100.0, out_bar=bars[0], lse_bar=bars[1])
    for name, grad in grads.items():
        # Kernels sum a logit in one order; the reference's two passes may differ, and so by several such errors.
        assert_close(grad, expected[name], factor=100 if backend == "native" else 400, err_msg=name)


# ---- edges of shapes


@backends
@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_empty(shape, backend):
    """No sample, or no head: empty results of the right shape, and gradients of zeros."""
    batch, heads = shape
    query, value = jnp.zeros((batch, 5, 4, heads, 3)), jnp.zeros((batch, 5, 4, heads, 2))
    rpb, more = jnp.zeros((heads, 5, 3)), jnp.zeros((batch, 2, heads, 3))

    def run(query, value, rpb, more):
        extra = {"additional_keys": more, "additional_values": more[..., :2]}
        return jn.na2d(query, query, value, (3, 2), rpb=rpb, **extra, return_lse=True, backend=backend)

    (out, lse), pull = jax.vjp(run, query, value, rpb, more)
    assert out.shape == value.shape and lse.shape == query.shape[:-1]
    grads = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    assert [x.shape for x in grads] == [x.shape for x in (query, value, rpb, more)]
    assert not np.any(grads[2])


@pytest.mark.parametrize("name", ["everything", "wrap", "lengths", "additional"])
def test_unbatched(name):
    problem = replace(PROBLEMS[name], batch=1, lengths=PROBLEMS[name].lengths and PROBLEMS[name].lengths[-1:])
    arrays, window = problem.arrays(), problem.window
    batched = fused(problem.rank)(**arrays, **window, return_lse=True)
    arrays = {name: x if name == "rpb" else x[0] for name, x in arrays.items()}
    if window["lengths"] is not None:
        window["lengths"] = window["lengths"][0]
    single = fused(problem.rank)(**arrays, **window, return_lse=True)
    for actual, expected in zip(single, batched, strict=True):
        np.testing.assert_array_equal(actual, expected[0])


def test_without_lse_the_output_is_returned_alone():
    arrays = PROBLEMS["plain"].arrays()
    out = jn.na1d(**arrays, kernel_size=3)
    np.testing.assert_array_equal(out, jn.na1d(**arrays, kernel_size=3, return_lse=True)[0])


SPELLINGS = {
    "list": dict(
        kernel_size=[3, 3], stride=[2, 2], dilation=[1, 1], is_causal=[False, False], border=["shift", "shift"]
    ),
    "numpy": dict(kernel_size=np.int64(3), stride=(np.int32(2), 2), dilation=np.uint8(1), is_causal=np.False_),
    "none": dict(kernel_size=3, stride=2, dilation=None, is_causal=None, border=None, scale=None, rpb=None),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_the_window(spelling):
    arrays = Problem(spatial=(5, 6), kernel_size=3).arrays()
    np.testing.assert_array_equal(jn.na2d(**arrays, **spelling), jn.na2d(**arrays, kernel_size=3, stride=2))


@backends
def test_numpy_and_jax_arrays_give_the_same(backend):
    arrays = PROBLEMS["plain"].arrays()
    operands = jax.tree.map(jnp.asarray, arrays)
    results = [jn.na1d(**xs, kernel_size=3, backend=backend) for xs in (arrays, operands)]
    assert all(isinstance(x, jax.Array) for x in results)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("spatial", [(9,), (4, 3)], ids=str)
def test_a_window_of_the_whole_input_is_dense_attention(spatial):
    arrays = Problem(spatial=spatial, kernel_size=spatial, batch=2, heads=4, heads_kv=2, value_dim=3).arrays()
    out, lse = fused(len(spatial))(**arrays, kernel_size=spatial, return_lse=True)
    flat = {name: x.reshape(2, -1, *x.shape[-2:]) for name, x in arrays.items()}
    expected, expected_lse = reference.dense(**flat)
    assert_close(out.reshape(2, -1, 4, 3), expected)
    assert_close(lse.reshape(2, -1, 4), expected_lse)


def test_float64_without_64_bit_types_is_float32():
    arrays = replace(PROBLEMS["plain"], dtype="float64").arrays()
    out, lse = jn.na1d(**arrays, kernel_size=3, return_lse=True)
    assert out.dtype == lse.dtype == "float32"
    assert_close(out, reference.fused(**arrays, kernel_size=3)[0])


# ---- lengths


@backends
def test_traced_lengths(backend):
    """The same numbers as lengths that are known, from one compilation; too large ones mean the whole array."""
    problem = Problem(spatial=(6, 5), kernel_size=3, border=("clip", "shift"), batch=2, rpb=True, additional=1)
    arrays = problem.arrays()

    @jax.jit
    def run(lengths):
        window = {**problem.window, "lengths": lengths}
        return jn.na2d(**arrays, **window, return_lse=True, backend=backend)

    for lengths in ([[6, 5], [2, 4]], [[0, 3], [1, 1]]):
        out, lse = run(np.array(lengths))
        expected = reference.fused(**arrays, **{**problem.window, "lengths": lengths})
        assert_close(out, expected[0])
        assert_close(lse, expected[1])
    for actual, expected in zip(run(np.array([[99, 7], [6, 5]])), run(np.array([[6, 5], [6, 5]])), strict=True):
        np.testing.assert_array_equal(actual, expected)
    out, lse = run(np.array([[-3, 5], [6, 5]]))
    assert not np.any(out[0]) and np.isneginf(lse[0]).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_dtypes_of_lengths(dtype):
    arrays = Problem(spatial=(6,), kernel_size=3, batch=2).arrays()
    lengths = np.array([[4], [6]])
    expected = reference.fused(**arrays, kernel_size=3, lengths=lengths)[0]
    assert_close(jn.na1d(**arrays, kernel_size=3, lengths=lengths.astype(dtype)), expected)


# ---- what must not be seen


@backends
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_tokens_outside_the_window(poison, backend):
    """One dilation group is poisoned in every array: the other's results and gradients are the same bits."""
    problem = Problem(spatial=(6, 4), kernel_size=(3, 2), dilation=(2, 1), heads_kv=1, rpb=True, additional=2)
    clean = problem.arrays()
    static = {name: clean.pop(name) for name in ("rpb", "additional_keys", "additional_values")}
    dirty = {name: x.copy() for name, x in clean.items()}
    for x in dirty.values():
        x[:, 1::2] = poison

    @jax.jit
    def results(arrays):
        def run(arrays):
            return jn.na2d(**arrays, **static, **problem.window, return_lse=True, backend=backend)

        (out, lse), pull = jax.vjp(run, arrays)
        (grads,) = pull((out * 0 + 1, lse * 0 + 1))
        return {"out": out, "lse": lse, **grads}

    actual, expected = (jax.tree.map(lambda x: np.asarray(x)[:, ::2], results(arrays)) for arrays in (dirty, clean))
    for name in expected:
        assert np.isfinite(expected[name]).all()
        assert_same(actual[name], expected[name], backend, name)


@backends
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("window", [dict(is_causal=True), dict(border="clip"), dict(stride=2), {}], ids=str)
def test_one_poisoned_token(what, window, backend):
    """It reaches the queries that see it and no other, but that GPU kernels may let a value reach queries nearby."""
    arrays = Problem(spatial=(12,), kernel_size=3, heads=1).arrays()
    place, seen = 7, np.zeros(12, bool)
    for row in reference.rows(1, (12,), reference.make_window(1, 3, **window)):
        seen[row.query] = place in row.keys[0]
    assert seen.any() and not seen.all()
    expected = jn.na1d(**arrays, kernel_size=3, **window, backend=backend)
    arrays[what][:, place] = np.nan
    out = jn.na1d(**arrays, kernel_size=3, **window, backend=backend)
    reached = np.isnan(out).any(axis=(0, 2, 3))
    if what == "value" and backend == "native" and jax.default_backend() == "gpu":
        assert reached[seen].all()
    else:
        np.testing.assert_array_equal(reached, seen)
    np.testing.assert_array_equal(np.asarray(out)[:, ~reached], np.asarray(expected)[:, ~reached])


# ---- derivatives of higher order

SECOND_ORDER = {
    "stride_rpb": Problem(spatial=(5,), kernel_size=3, stride=2, heads=1, dim=2, rpb=True),
    "causal_grouped": Problem(
        spatial=(3, 2), kernel_size=2, is_causal=(True, False), heads_kv=1, dim=1, value_dim=2, additional=1
    ),
    "clip_lengths": Problem(spatial=(4,), kernel_size=3, border="clip", heads=1, dim=2, batch=2, lengths=((3,), (4,))),
    "wrap_3d": Problem(spatial=(2, 3, 1), kernel_size=(1, 2, 1), border=("clip", "wrap", "shift"), heads=1, dim=2),
}


@pytest.mark.parametrize("problem", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_second_order(problem):
    """out and lse by finite differences, in both modes."""
    exists = problem.exists()[..., None]

    @jax.jit
    def run(arrays):
        out, lse = fused(problem.rank)(**arrays, **problem.window, return_lse=True)
        return out, jnp.where(exists, lse, 0)

    with precise("float64"):
        arrays = {name: jnp.nan_to_num(jnp.asarray(x, "float64")) for name, x in problem.arrays().items()}
        check_grads(run, (arrays,), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@backends
def test_second_derivatives_do_not_see_tokens_beyond_the_lengths(backend):
    """NaN there gives the same Hessian-vector products as zeros there."""
    problem = Problem(spatial=(4, 3), kernel_size=(3, 2), batch=2, lengths=((2, 3), (4, 1)), heads_kv=1, rpb=True)
    exists = problem.exists()[..., None, None]

    def loss(arrays):
        out, lse = jn.na2d(**arrays, **problem.window, return_lse=True, backend=backend)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(exists[..., 0], jnp.sin(lse), 0))

    @jax.jit
    def product(arrays, dots):
        return jax.jvp(jax.grad(loss), (arrays,), (dots,))[1]

    dirty = problem.arrays()
    clean = {name: np.nan_to_num(x) for name, x in dirty.items()}
    dots = {name: np.cos(x) for name, x in dirty.items()}
    expected = product(clean, {name: np.nan_to_num(x) for name, x in dots.items()})
    actual = product(dirty, dots)
    for name in dirty:
        assert np.any(expected[name])
        assert_same(actual[name], expected[name], "reference", name)  # whose derivative it is, on every backend
