"""The pure-JAX backend against brute force; also where it walks over many blocks of queries."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PROBLEMS, Problem, check_fused, check_unfused

import jax_natten as jn
from jax_natten._reference import SMALLEST_BLOCK

# Each with a feature that the others lack: a compilation costs seconds.
FUSED = ["stride", "all_borders", "lengths", "lengths_zero", "one_key_head", "one_token", "everything"]
UNFUSED = ["wrap", "lengths_causal", "clip_even_causal", "everything"]


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    check_fused(PROBLEMS[name], "reference")


@pytest.mark.parametrize("name", UNFUSED)
def test_unfused(name):
    check_unfused(PROBLEMS[name], "reference")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(dtype):
    problem = replace(PROBLEMS["additional"], dtype=dtype, rpb_dtype="float32")
    check_fused(problem, "reference", forward_mode=False)
    check_unfused(problem, "reference", forward_mode=False)


@pytest.mark.parametrize("tokens", [SMALLEST_BLOCK, 2 * SMALLEST_BLOCK + 3])
def test_blocks(tokens):
    """Full blocks only, and a last block that is mostly padding."""
    problem = Problem(spatial=(tokens,), kernel_size=5, dilation=3, heads=1, dim=2, rpb=True)
    check_fused(problem, "reference", forward_mode=False)
    check_unfused(problem, "reference", forward_mode=False)


@pytest.mark.parametrize("order", [1, 2])
def test_higher_derivatives_of_the_kernels_are_those_of_the_reference(order):
    query = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 2)), "float32")

    def derivative(backend):
        def function(x):
            return jnp.sum(jnp.sin(jn.na1d(x, x, x, 3, backend=backend)))

        for _ in range(order):
            function = jax.grad(lambda x, inner=function: jnp.sum(inner(x) * jnp.cos(x)))
        return jax.jit(function)(query)

    np.testing.assert_allclose(derivative("native"), derivative("reference"), rtol=0, atol=2e-5)
