"""Dense attention against a NumPy formula, and the exactness of merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads
from problems import BACKENDS, precise
from tolerances import assert_close

import jax_natten as jn

backends = pytest.mark.parametrize("backend", BACKENDS)


def arrays(query_length, key_length, heads=2, heads_kv=2, dim=4, value_dim=3, batch=2, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (query_length, heads, dim), (key_length, heads_kv, dim), (key_length, heads_kv, value_dim)
    return [rng.normal(size=(batch, *shape)).astype(jnp.dtype(dtype)) for shape in shapes]


def formula(query, key, value, is_causal, scale):
    """out and lse for jax to differentiate."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = scale * jnp.einsum("bqhd,bkhd->bqhk", query, key, precision="highest")
    if is_causal:
        logits = jnp.where(jnp.tri(query.shape[1], dtype=bool)[:, None], logits, -jnp.inf)
    return jnp.einsum("bqhk,bkhd->bqhd", jax.nn.softmax(logits), value), jax.nn.logsumexp(logits, axis=-1)


CASES = {
    "square": (dict(query_length=7, key_length=7), {}),
    "causal": (dict(query_length=6, key_length=6), dict(is_causal=True)),
    "few_keys": (dict(query_length=9, key_length=2), {}),
    "few_queries": (dict(query_length=2, key_length=11), dict(scale=0.3)),
    "one_key": (dict(query_length=5, key_length=1), {}),
    "grouped": (dict(query_length=5, key_length=5, heads=6, heads_kv=2), dict(is_causal=True)),
    "one_key_head": (dict(query_length=3, key_length=8, heads=4, heads_kv=1, dim=1), {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shapes", "static"), CASES.values(), ids=CASES)
def test_attention(shapes, static, backend):
    operands = arrays(**shapes, dtype="float64")
    scale = static.get("scale", operands[0].shape[-1] ** -0.5)

    def run(*xs):
        return jn.attention(*xs, **static, return_lse=True, backend=backend)

    def plain(*xs):
        return formula(*xs, static.get("is_causal", False), scale)

    @jax.jit
    def derivatives(operands, bars):
        outs, pull = jax.vjp(run, *operands)
        return outs, pull(bars), jax.vjp(plain, *operands)[1](bars)

    with precise("float64"):
        operands = list(map(jnp.asarray, operands))
        rng = np.random.default_rng(1)
        bars = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in jax.eval_shape(run, *operands))
        (out, lse), grads, expected_grads = derivatives(operands, bars)
    expected_out, expected_lse = reference.dense(*operands, **static)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, factor=4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype):
    operands = arrays(6, 9, dtype=dtype)
    out, lse = jn.attention(*operands, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    expected_out, expected_lse = reference.dense(*operands)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)


def test_unbatched():
    operands = arrays(4, 6, batch=1)
    expected = jn.attention(*operands, return_lse=True)
    for actual, batched in zip(jn.attention(*(x[0] for x in operands), return_lse=True), expected, strict=True):
        np.testing.assert_array_equal(actual, batched[0])
    np.testing.assert_array_equal(jn.attention(*operands), expected[0])


@backends
def test_no_keys(backend):
    """Nothing to attend to: 0 and -inf, and gradients of zeros."""
    operands = list(map(jnp.asarray, arrays(3, 0)))
    (out, lse), pull = jax.vjp(lambda *xs: jn.attention(*xs, return_lse=True, backend=backend), *operands)
    assert not np.any(out) and np.isneginf(lse).all()
    assert not np.any(pull((jnp.ones_like(out), jnp.ones_like(lse)))[0])


@backends
def test_no_queries(backend):
    out, lse = jn.attention(*arrays(0, 3), return_lse=True, backend=backend)
    assert (out.shape, lse.shape) == ((2, 0, 2, 3), (2, 0, 2))


def test_second_order():
    with precise("float64"):
        operands = tuple(map(jnp.asarray, arrays(2, 3, heads_kv=1, dim=2, value_dim=1, batch=1, dtype="float64")))
        run = jax.jit(lambda *xs: jn.attention(*xs, return_lse=True))
        check_grads(run, operands, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


# ---- merging


@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 7), (3, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merging_is_exact(cuts, dtype):
    """Parts over disjoint keys merge to attention over all of them; an empty part changes nothing."""
    query, key, value = arrays(5, 9, dtype="float64")
    key = key * np.linspace(1, 40, 9)[:, None, None]  # parts of very different weight
    parts = [
        reference.dense(query, *part) for part in zip(*(np.split(x, cuts, axis=1) for x in (key, value)), strict=True)
    ]
    with precise(dtype):
        outs, lses = ([jnp.asarray(x, dtype) for x in xs] for xs in zip(*parts, strict=True))
        out, lse = jn.merge_attentions(outs, lses)
    assert out.dtype == lse.dtype == dtype
    expected_out, expected_lse = reference.dense(query, key, value)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merging_in_half_precision(dtype):
    rng = np.random.default_rng(0)
    outs = [jnp.asarray(rng.normal(size=(3, 2, 4)), dtype) for _ in range(3)]
    lses = [jnp.asarray(rng.normal(size=(3, 2)), "float32") for _ in range(3)]
    out, lse = jn.merge_attentions(outs, lses)
    shares = np.exp(np.stack(lses).astype(float) - np.asarray(lse, float))
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    assert_close(out, sum(share[..., None] * np.asarray(x, float) for share, x in zip(shares, outs, strict=True)))


def test_merging_gradients():
    rng = np.random.default_rng(0)
    with precise("float64"):
        outs = [jnp.asarray(rng.normal(size=(2, 3))) for _ in range(3)]
        lses = [jnp.asarray(rng.normal(size=2)) for _ in range(3)]
        run = jax.jit(jn.merge_attentions)
        check_grads(run, (outs, lses), order=2, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_merging_large_logits(shift):
    rng = np.random.default_rng(0)
    outs = [jnp.asarray(rng.normal(size=(4, 3)), "float32") for _ in range(2)]
    lses = [jnp.asarray([0.0, 1, 2, 3], "float32") + shift, jnp.asarray([3.0, 2, 1, 0], "float32") + shift]
    out, lse = jn.merge_attentions(outs, lses)
    share = 1 / (1 + np.exp(np.array([3.0, 1, -1, -3])))
    assert_close(out, share[:, None] * np.asarray(outs[0]) + (1 - share)[:, None] * np.asarray(outs[1]))
    assert_close(lse, shift + np.logaddexp([0, 1, 2, 3], [3, 2, 1, 0]))


def test_merging_nothing():
    """No key anywhere: 0 and -inf; one part without keys: the other; gradients finite."""
    outs = [jnp.zeros((2, 3)), jnp.asarray([[0.0, 0, 0], [1, 2, 3]])]
    lses = [jnp.array([-jnp.inf, -jnp.inf]), jnp.array([-jnp.inf, 0.5])]
    (out, lse), pull = jax.vjp(jn.merge_attentions, outs, lses)
    np.testing.assert_array_equal(out, outs[1])
    np.testing.assert_array_equal(lse, lses[1])
    out_bars, lse_bars = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    np.testing.assert_array_equal(out_bars[1][1], [1, 1, 1])
    assert all(np.isfinite(x).all() for x in (*out_bars, *lse_bars))


MERGE_ERRORS = {
    "no outputs": (([], []), ValueError, r"lses: expected one for each of the outputs, at least one, got 0 and 0"),
    "numbers": (([np.zeros((2, 3), "f")], []), ValueError, r"lses: expected one for each .* got 1 and 0"),
    "not lists": ((np.zeros((2, 3), "f"), [np.zeros(2, "f")]), TypeError, r"expected lists, got ndarray and list"),
    "shapes": (
        ([np.zeros((2, 3), "f"), np.zeros((2, 4), "f")], [np.zeros(2, "f")] * 2),
        ValueError,
        r"outputs\[1\]: expected the shape of outputs\[0\], \(2, 3\), got \(2, 4\)",
    ),
    "lse shape": (
        ([np.zeros((2, 3), "f")], [np.zeros(3, "f")]),
        ValueError,
        r"lses\[0\]: expected shape \(2,\), that of its output, got \(3,\)",
    ),
    "dtypes": (
        ([np.zeros((2, 3), "f"), np.zeros((2, 3), np.float16)], [np.zeros(2, "f")] * 2),
        TypeError,
        r"outputs\[1\]: expected outputs\[0\]'s dtype float32, got float16",
    ),
    "integers": (
        ([np.zeros((2, 3), int)], [np.zeros(2, "f")]),
        TypeError,
        r"outputs\[0\]: expected a dtype .* got int64",
    ),
    "scalars": (([np.float32(1)], [np.float32(1)]), ValueError, r"outputs\[0\]"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), MERGE_ERRORS.values(), ids=MERGE_ERRORS)
def test_merging_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        jn.merge_attentions(*arguments)
