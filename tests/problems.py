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


# ---- fused


def check_fused(problem: Problem, backend: str | None, *, forward_mode: bool = True, factor: float = 1.0) -> None:
    """out, lse, all gradients (cotangents of both) and a tangent against brute force."""
    arrays = problem.arrays()
    static = {"scale": problem.scale, **problem.window}

    def function(arrays):
        return fused(problem.rank)(**arrays, **static, return_lse=True, backend=backend)

    with precise(problem.dtype, problem.rpb_dtype):
        operands = jax.tree.map(jnp.asarray, arrays)
        (out, lse), pull = jax.vjp(function, operands)
        assert out.dtype == problem.dtype
        assert lse.dtype == ("float64" if problem.dtype == "float64" else "float32")
        bars = _cotangents(1, problem.exists(), out, lse)
        (grads,) = pull(tuple(map(jnp.asarray, bars)))
        assert {name: x.dtype for name, x in grads.items()} == {name: x.dtype for name, x in arrays.items()}
        if forward_mode:
            dots = _tangents(2, arrays)
            _, moved = jax.jvp(function, (operands,), (jax.tree.map(jnp.asarray, dots),))

    expected_out, expected_lse = reference.fused(**arrays, **static)
    assert_close(out, expected_out, err_msg="out")
    assert_close(lse, expected_lse, err_msg="lse")
    expected = reference.fused(**arrays, **static, out_bar=wide(bars[0]), lse_bar=wide(bars[1]))
    compare(grads, expected, problem, 4 * factor)
    if forward_mode:
        names = list(arrays)

        def by_position(*xs):
            return reference.fused(**dict(zip(names, xs, strict=True)), **static)

        steps = reference.complex_step(by_position, [arrays[n] for n in names], [dots[n] for n in names])
        for name, actual, step in zip(("out", "lse"), moved, steps, strict=True):
            assert_close(actual, step, factor=4 * factor, err_msg=f"tangent of {name}")


# ---- unfused


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
        return function(**arrays, **window, backend=backend)

    with precise(problem.dtype, problem.rpb_dtype):
        operands = jax.tree.map(jnp.asarray, arrays)
        out, pull = jax.vjp(run, operands)
        assert out.dtype == problem.dtype
        (bar,) = _cotangents(1, problem.exists()[:, None], out)
        (grads,) = pull(jnp.asarray(bar))
        assert {name: x.dtype for name, x in grads.items()} == {name: x.dtype for name, x in arrays.items()}
        if forward_mode:
            dots = _tangents(2, arrays)
            _, moved = jax.jvp(run, (operands,), (jax.tree.map(jnp.asarray, dots),))

    expected = brute_force(**arrays, **window)
    assert_close(out, expected, err_msg=function.__name__)
    compare(grads, brute_force(**arrays, **window, bar=wide(bar)), problem, 4)
    if forward_mode:
        # Multilinear in the first two groups of arrays, linear in rpb: one term for each array that moves.
        step = np.zeros(expected.shape)
        for names in _factors(function.__name__):
            mixed = {**arrays, **{name: dots[name] for name in names if name in dots}}
            rest = {} if "rpb" not in arrays else {"rpb": np.zeros_like(arrays["rpb"])}
            step += brute_force(**{**mixed, **rest}, **window)
        if "rpb" in arrays:
            still = {name: x * x.dtype.type(0) for name, x in arrays.items()}
            step += brute_force(**{**still, "rpb": dots["rpb"]}, **window)
        step[np.isneginf(expected)] = 0
        assert_close(moved, step, factor=4, err_msg=f"tangent of {function.__name__}")
    return np.asarray(out)


def _factors(name: str) -> tuple:
    """The arrays that move together in each term of the product rule."""
    return (("query",), ("key", "additional_keys")) if name.endswith("qk") else (("attn",), ("value", "additional_values"))
