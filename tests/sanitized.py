"""Runs every CUDA kernel once on small problems, without comparing numbers: the program for tests/sanitize.sh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from problems import PROBLEMS, Problem, fused, precise, unfused

# Rows that are no multiple of what a lane copies at once, short and long ones, too long ones for matrix units; and
# windows of several tiles.
CASES = (
    replace(PROBLEMS["everything"], dim=5, value_dim=3),
    replace(PROBLEMS["causal_stride"], dim=16, value_dim=24),
    replace(PROBLEMS["lengths"], dim=128, value_dim=72),
    replace(PROBLEMS["wrap"], dim=40, value_dim=300),
    Problem(spatial=(19, 18), kernel_size=(13, 14), heads=2, heads_kv=1, dim=64, rpb=True),
)


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


for case in CASES:
    for dtype in ("float64", "float32", "bfloat16"):
        with precise(dtype):
            problem = replace(case, dtype=dtype, rpb_dtype=None)
            arrays = {name: jnp.asarray(jnp.nan_to_num(x)) for name, x in problem.arrays().items()}
            for run in (run_fused, run_unfused):
                jax.block_until_ready(jax.jit(run, static_argnums=0)(problem, arrays))
print("done")
