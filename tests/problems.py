"""One problem, all its numbers: random arrays for a call with any features, and its comparison with brute force.

Tokens beyond `lengths` are NaN in every array, so each problem with lengths also shows that they are never read.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from tolerances import assert_close, tolerance

import jax_natten as jn

BACKENDS = ("native", "reference")


@dataclass(frozen=True, kw_only=True)
class Problem:
    spatial: tuple
    kernel_size: Any
    stride: Any = 1
    dilation: Any = 1
    is_causal: Any = False
    border: Any = "shift"
    batch: int = 1
    heads: int = 2
    heads_kv: int | None = None
    dim: int = 4
    value_dim: int | None = None
    rpb: bool = False
    rpb_dtype: str | None = None
    scale: float | None = None
    lengths: tuple | None = None
    additional: int | None = None
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        return len(self.spatial)

    @property
    def window(self) -> dict:
        """Keyword arguments that the fused and unfused operations share."""
        names = ("kernel_size", "stride", "dilation", "is_causal", "border", "lengths")
        given = {name: getattr(self, name) for name in names}
        return given | {"lengths": None if self.lengths is None else np.array(self.lengths)}

    def arrays(self, seed: int = 0) -> dict:
        """Random arrays in their dtypes, heads last, NaN beyond the lengths."""
        rng = np.random.default_rng(seed)
        heads_kv = self.heads if self.heads_kv is None else self.heads_kv
        value_dim = self.dim if self.value_dim is None else self.value_dim
        tokens = (self.batch, *self.spatial)
        shapes = {
            "query": (*tokens, self.heads, self.dim),
            "key": (*tokens, heads_kv, self.dim),
            "value": (*tokens, heads_kv, value_dim),
        }
        if self.rpb:
            window = reference.make_window(self.rank, self.kernel_size)
            shapes["rpb"] = (self.heads, *window.table_shape)
        if self.additional is not None:
            shapes["additional_keys"] = (self.batch, self.additional, heads_kv, self.dim)
            shapes["additional_values"] = (self.batch, self.additional, heads_kv, value_dim)
        arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        for name in ("query", "key", "value"):
            arrays[name] = np.where(self.exists()[..., None, None], arrays[name], np.nan)
        dtypes = {"rpb": self.rpb_dtype or self.dtype}
        return {name: x.astype(jnp.dtype(dtypes.get(name, self.dtype))) for name, x in arrays.items()}

    def exists(self) -> np.ndarray:
        """`[batch, *spatial]`: whether a token lies within the lengths."""
        exists = np.zeros((self.batch, *self.spatial), bool)
        for sample in range(self.batch):
            sizes = self.spatial if self.lengths is None else self.lengths[sample]
            exists[(sample, *map(slice, sizes))] = True
        return exists


def precise(*dtypes):
    """64-bit types where one of the dtypes needs them."""
    return jax.enable_x64("float64" in dtypes)


def fused(rank: int):
    return getattr(jn, f"na{rank}d")


def unfused(rank: int):
    return getattr(jn, f"na{rank}d_qk"), getattr(jn, f"na{rank}d_av")


def heads_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -2, 1))


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def _cotangents(seed: int, exists: np.ndarray, *outs) -> tuple:
    """Random, and NaN where no query exists: gradients do not hear from there either."""
    rng = np.random.default_rng(seed)
    bars = []
    for x in outs:
        there = exists.reshape(exists.shape + (1,) * (x.ndim - exists.ndim))
        bar = np.where(there, rng.normal(size=x.shape), np.nan)
        bars.append(bar.astype(x.dtype))
    return tuple(bars)


def _tangents(seed: int, arrays: dict) -> dict:
    """Tangents that are NaN where the primals are."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=x.shape).astype(x.dtype) + x * x.dtype.type(0) for name, x in arrays.items()}


def compare(actual: dict, expected: dict, problem: Problem, factor: float) -> None:
    """Gradients by name; that of a float32 table is as accurate as the activations are."""
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        dtype = max(grad.dtype, np.dtype(problem.dtype), key=tolerance)
        assert_close(grad, expected[name], dtype=dtype, factor=factor, err_msg=f"gradient of {name}")


def assert_same(actual, expected, backend: str | None, name: str) -> None:
    """Equal bits of a result, or of the gradient of the array of that name.

    But not of what the reference sums over queries on a GPU: XLA adds there atomically, in an order left to chance.
    """
    if backend == "reference" and name in ("key", "value", "rpb") and jax.default_backend() == "gpu":
        assert_close(actual, expected, factor=4, err_msg=name)
    else:
        np.testing.assert_array_equal(actual, expected, err_msg=name)


# ---- everything at once, compiled once


def _derivatives(function, arrays: dict, exists: np.ndarray, forward_mode: bool):
    """out (a tuple), its random cotangents, the gradients, the tangents of the arrays and of out."""
    operands = jax.tree.map(jnp.asarray, arrays)
    bars = _cotangents(1, exists, *jax.eval_shape(function, operands))
    dots = _tangents(2, arrays)

    @jax.jit
    def run(operands, bars, dots):
        outs, pull = jax.vjp(function, operands)
        (grads,) = pull(bars)
        return outs, grads, jax.jvp(function, (operands,), (dots,))[1] if forward_mode else None

    outs, grads, moved = run(operands, *jax.tree.map(jnp.asarray, (bars, dots)))
    assert {name: x.dtype for name, x in grads.items()} == {name: x.dtype for name, x in arrays.items()}
    return outs, tuple(map(wide, bars)), grads, dots, moved


def check_fused(problem: Problem, backend: str | None, *, forward_mode: bool = True) -> None:
    """out, lse, all gradients (cotangents of both) and a tangent against brute force."""
    arrays = problem.arrays()
    static = {"scale": problem.scale, **problem.window}

    def function(arrays):
        return fused(problem.rank)(**arrays, **static, return_lse=True, backend=backend)

    with precise(problem.dtype, problem.rpb_dtype):
        (out, lse), bars, grads, dots, moved = _derivatives(function, arrays, problem.exists(), forward_mode)
    assert out.dtype == problem.dtype
    assert lse.dtype == ("float64" if problem.dtype == "float64" else "float32")

    expected_out, expected_lse = reference.fused(**arrays, **static)
    assert_close(out, expected_out, err_msg="out")
    assert_close(lse, expected_lse, err_msg="lse")
    compare(grads, reference.fused(**arrays, **static, out_bar=bars[0], lse_bar=bars[1]), problem, 4)
    if forward_mode:

        def by_position(*xs):
            return reference.fused(**dict(zip(arrays, xs, strict=True)), **static)

        steps = reference.complex_step(by_position, [*arrays.values()], [dots[name] for name in arrays])
        for name, actual, step in zip(("out", "lse"), moved, steps, strict=True):
            low = max(actual.dtype, np.dtype(problem.dtype), key=tolerance)
            assert_close(actual, step, dtype=low, factor=4, err_msg=f"tangent of {name}")


def check_unfused(problem: Problem, backend: str | None, *, forward_mode: bool = True) -> None:
    """Logits and weighted sums, all their gradients and tangents against brute force."""
    arrays = problem.arrays()
    table = {"rpb": arrays.pop("rpb")} if problem.rpb else {}
    first = {name: heads_first(x) for name, x in arrays.items()}
    keys = {name: first[name] for name in ("query", "key", "additional_keys") if name in first} | table
    values = {name: first[name] for name in ("value", "additional_values") if name in first}
    qk, av = unfused(problem.rank)

    logits = _check(problem, backend, qk, reference.qk, keys, forward_mode)
    rng = np.random.default_rng(3)
    attn = rng.normal(size=logits.shape).astype(logits.dtype)
    attn[np.isneginf(logits)] = np.nan  # av must not read the weights of absent positions
    attn[np.broadcast_to(~problem.exists()[:, None], logits.shape[:-1])] = np.nan
    _check(problem, backend, av, reference.av, {"attn": attn, **values}, forward_mode)


def _check(problem: Problem, backend, function, brute_force, arrays: dict, forward_mode: bool) -> np.ndarray:
    window = problem.window

    def run(arrays):
        return (function(**arrays, **window, backend=backend),)

    with precise(problem.dtype, problem.rpb_dtype):
        (out,), (bar,), grads, dots, moved = _derivatives(run, arrays, problem.exists()[:, None], forward_mode)
    assert out.dtype == problem.dtype

    expected = brute_force(**arrays, **window)
    assert_close(out, expected, err_msg=function.__name__)
    compare(grads, brute_force(**arrays, **window, bar=bar), problem, 4)
    if forward_mode:
        step = _product_rule(brute_force, arrays, dots, window)
        assert_close(moved[0], np.where(np.isneginf(expected), 0, step), factor=4, err_msg="tangent")
    return np.asarray(out)


def _product_rule(brute_force, arrays: dict, dots: dict, window: dict) -> np.ndarray:
    """The tangent of an operation that is bilinear in its first array and the others, and affine in rpb."""
    first, *others = arrays
    still = {name: np.zeros_like(x) for name, x in arrays.items() if name == "rpb"}
    step = brute_force(**{**arrays, first: dots[first], **still}, **window)
    return step + brute_force(**{**arrays, **{name: dots[name] for name in others}}, **window)


# ---- a table that the fused, the unfused and the pure-JAX tests share

PROBLEMS = {
    "plain": Problem(spatial=(11,), kernel_size=3, batch=2),
    "even": Problem(spatial=(10,), kernel_size=4),
    "one_key": Problem(spatial=(3, 4), kernel_size=1, rpb=True),
    "one_token": Problem(spatial=(1, 1, 1), kernel_size=1, heads=1, dim=1),
    "whole": Problem(spatial=(5, 4), kernel_size=(5, 4), rpb=True),
    "dilation_exact": Problem(spatial=(12,), kernel_size=4, dilation=3),
    "dilation_limit": Problem(spatial=(14,), kernel_size=4, dilation=3, rpb=True),
    "stride": Problem(spatial=(23,), kernel_size=5, stride=3, dilation=2, rpb=True),
    "stride_whole_window": Problem(spatial=(13,), kernel_size=4, stride=4),
    "causal": Problem(spatial=(13,), kernel_size=4, dilation=2, is_causal=True, rpb=True),
    "causal_stride": Problem(spatial=(19,), kernel_size=5, stride=4, dilation=2, is_causal=True, rpb=True),
    "causal_some": Problem(spatial=(7, 6), kernel_size=(3, 4), dilation=(2, 1), is_causal=(True, False)),
    "clip": Problem(spatial=(7,), kernel_size=5, dilation=2, border="clip", rpb=True),
    "clip_far": Problem(spatial=(3,), kernel_size=9, border="clip", rpb=True),
    "clip_even_causal": Problem(spatial=(6, 5), kernel_size=(4, 3), border="clip", is_causal=(False, True), rpb=True),
    "wrap": Problem(spatial=(8, 6), kernel_size=(3, 4), dilation=(2, 1), border="wrap", rpb=True),
    "all_borders": Problem(spatial=(4, 5, 6), kernel_size=(3, 4, 2), border=("shift", "clip", "wrap"), rpb=True),
    "lengths": Problem(
        spatial=(9, 7), kernel_size=(4, 3), stride=(2, 3), dilation=(2, 1), batch=3, lengths=((9, 7), (5, 2), (3, 6))
    ),
    "lengths_causal": Problem(spatial=(9,), kernel_size=3, is_causal=True, batch=2, lengths=((6,), (1,)), rpb=True),
    "lengths_clip": Problem(spatial=(8,), kernel_size=5, border="clip", batch=2, lengths=((4,), (7,)), rpb=True),
    "lengths_zero": Problem(
        spatial=(4, 5), kernel_size=3, batch=3, lengths=((0, 0), (4, 0), (4, 5)), rpb=True, additional=2
    ),
    "grouped": Problem(spatial=(9,), kernel_size=3, heads=6, heads_kv=2, value_dim=3, rpb=True),
    "one_key_head": Problem(spatial=(4, 5), kernel_size=3, heads=4, heads_kv=1, additional=1),
    "additional": Problem(spatial=(5, 4), kernel_size=3, batch=2, additional=3, value_dim=7, rpb=True),
    "additional_none": Problem(spatial=(7,), kernel_size=3, additional=0),
    "stride_3d": Problem(
        spatial=(5, 3, 8),
        kernel_size=(2, 3, 3),
        stride=(2, 1, 3),
        dilation=(2, 1, 2),
        is_causal=(False, True, False),
        heads=1,
        rpb=True,
    ),
    "everything": Problem(
        spatial=(6, 4, 5),
        kernel_size=(3, 2, 4),
        stride=(2, 1, 1),
        dilation=(2, 1, 1),
        is_causal=(False, True, False),
        border=("shift", "shift", "clip"),
        batch=2,
        heads=4,
        heads_kv=2,
        value_dim=3,
        scale=0.7,
        lengths=((5, 4, 3), (2, 3, 5)),
        rpb=True,
        additional=2,
    ),
}
