"""Runs every CUDA kernel once on small problems, without comparing numbers: the program for tests/sanitize.sh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from problems import PROBLEMS, fused, unfused

# Rows that are no multiple of a lane's unit, of few lanes, and of several pieces.
CASES = {"everything": (5, 3), "causal_stride": (16, 24), "wrap": (40, 300)}


def run_fused(problem, arrays):
    def function(arrays):
        return fused(problem.rank)(**arrays, **problem.window, return_lse=True, backend="native")

    outs, pull = jax.vjp(function, arrays)
    return outs, pull(jax.tree.map(jnp.ones_like, outs)), jax.jvp(function, (arrays,), (arrays,))


def run_unfused(problem, arrays):
    qk, av = unfused(problem.rank)

    def function(arrays):
        rpb = {"rpb": arrays["rpb"]} if "rpb" in arrays else {}
        query, key, value = (jnp.moveaxis(arrays[name], -2, 1) for name in ("query", "key", "value"))
        logits = qk(query, key, **rpb, **problem.window, backend="native")
        return av(jax.nn.softmax(logits), value, **problem.window, backend="native")

    out, pull = jax.vjp(function, arrays)
    return out, pull(out)


for name, (dim, value_dim) in CASES.items():
    for dtype in ("float32", "bfloat16"):
        problem = replace(PROBLEMS[name], dim=dim, value_dim=value_dim, dtype=dtype, rpb_dtype=None)
        arrays = {name: jnp.asarray(jnp.nan_to_num(x)) for name, x in problem.arrays().items()}
        for run in (run_fused, run_unfused):
            jax.block_until_ready(jax.jit(run, static_argnums=0)(problem, arrays))
print("done")
