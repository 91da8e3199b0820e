"""The backward kernels for Hopper: what they take, and their numbers.

`backend="native"` takes them where they are faster, so problems here have windows that are long for their axes, and
every test asks first: `serves` is the dispatcher's own question.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest
from problems import Problem, check_fused, fused, precise
from test_hopper import hopper, on_hopper, serves
from tolerances import assert_close


@hopper[-1]
def test_what_is_taken():
    long = Problem(spatial=(64, 64), kernel_size=40, dim=64)
    assert all(serves(replace(long, dim=dim), is_backward=True) for dim in range(40, 129, 8))
    assert not any(serves(replace(long, dim=dim), is_backward=True) for dim in (8, 32, 44, 136, 192, 256))
    assert serves(replace(long, dim=128, value_dim=72), is_backward=True)
    assert not any(serves(replace(long, dim=a, value_dim=b), is_backward=True) for a, b in ((64, 136), (60, 64)))
    assert not serves(replace(long, rpb=True), is_backward=True)
    assert not serves(replace(long, scale=-1.0), is_backward=True)
    assert not serves(replace(long, kernel_size=3), is_backward=True)
    assert serves(Problem(spatial=(32768,), kernel_size=2048, stride=256, dim=128), is_backward=True)
    assert serves(Problem(spatial=(30, 48, 80), kernel_size=(18, 24, 24), dim=64, batch=2), is_backward=True)


# ---- numbers, against brute force

PROBLEMS = {
    "1d": Problem(spatial=(700,), kernel_size=500, stride=5, dim=64, heads=4, heads_kv=2),
    "1d_causal": Problem(spatial=(600,), kernel_size=450, is_causal=True, dim=128, batch=2),
    "1d_causal_stride": Problem(spatial=(600,), kernel_size=450, stride=64, is_causal=True, dim=64),
    "1d_whole": Problem(spatial=(420,), kernel_size=420, dim=128, heads=4, heads_kv=1),
    "2d": Problem(spatial=(21, 30), kernel_size=(16, 20), stride=(3, 2), is_causal=(True, False), dim=64),
    "2d_128": Problem(spatial=(21, 30), kernel_size=(16, 20), stride=(3, 2), is_causal=(True, False), dim=128),
    "2d_dilated": Problem(spatial=(40, 50), kernel_size=(18, 24), dilation=2, dim=64, heads_kv=1),
    "2d_dilated_128": Problem(spatial=(30, 50), kernel_size=(22, 24), stride=(1, 4), dilation=(1, 2), dim=128),
    "2d_lengths": Problem(
        spatial=(24, 32), kernel_size=(17, 20), dim=64, batch=4, lengths=((24, 32), (0, 9), (3, 4), (19, 23))
    ),
    "2d_lengths_128": Problem(
        spatial=(24, 32), kernel_size=(17, 20), dim=128, batch=3, heads_kv=1, lengths=((11, 32), (24, 29), (24, 32))
    ),
    "2d_clip": Problem(spatial=(24, 30), kernel_size=(19, 22), border="clip", dim=64),
    "2d_wrap": Problem(spatial=(24, 30), kernel_size=(19, 22), border="wrap", dim=128),
    "2d_scale": Problem(spatial=(16, 24), kernel_size=(12, 20), scale=0.5, dim=64),
    "3d": Problem(
        spatial=(8, 18, 16), kernel_size=(6, 8, 14), stride=(2, 1, 3), is_causal=(False, True, False), dim=64
    ),
    "3d_dilated": Problem(spatial=(8, 18, 16), kernel_size=(4, 8, 14), dilation=(2, 1, 1), dim=128),
    "3d_lengths": Problem(
        spatial=(8, 12, 16), kernel_size=(6, 9, 12), dim=64, batch=2, heads_kv=1, lengths=((8, 7, 16), (5, 12, 11))
    ),
    "padded": Problem(
        spatial=(24, 32), kernel_size=(17, 20), dim=48, value_dim=40, batch=2, lengths=((24, 32), (7, 9))
    ),
    "padded_128": Problem(spatial=(21, 30), kernel_size=(16, 20), dim=80, value_dim=112, batch=2),
    "additional": Problem(spatial=(24, 32), kernel_size=(17, 20), dim=64, additional=3),
}


@hopper[-1]
def test_problems_are_taken():
    assert all(serves(problem, is_backward=True) for problem in [*PROBLEMS.values(), *LARGE.values()])


@on_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name, dtype):
    problem = replace(PROBLEMS[name], dtype=dtype)
    assert serves(problem, is_backward=True)
    check_fused(problem, "native", forward_mode=False)


# ---- numbers of large problems, against the CPU kernels

LARGE = {
    "1d": Problem(spatial=(4000,), kernel_size=700, dim=128, heads=4, heads_kv=2),
    "1d_stride": Problem(spatial=(5000,), kernel_size=1000, stride=100, dim=64),
    "1d_causal": Problem(spatial=(5000,), kernel_size=900, stride=64, is_causal=True, dim=64),
    "2d": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=128),
    "2d_stride": Problem(spatial=(90, 100), kernel_size=(32, 40), stride=(16, 8), dim=128),
    "2d_lengths": Problem(spatial=(70, 80), kernel_size=(30, 31), dim=64, batch=2, lengths=((70, 51), (33, 80))),
    "3d": Problem(spatial=(20, 30, 40), kernel_size=(12, 14, 16), dim=64),
    "3d_stride": Problem(spatial=(16, 32, 40), kernel_size=(8, 16, 16), stride=(4, 8, 8), dim=128),
    "d96": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=96),
}
# Of the norm: what rounding weights, gradients of logits and results leaves.
LARGEST_ERROR = {"bfloat16": 3e-3, "float16": 5e-4}


def gradients(problem: Problem):
    def run(arrays, bars):
        def function(arrays):
            return fused(problem.rank)(**arrays, **problem.window, return_lse=True, backend="native")

        return jax.vjp(function, arrays)[1](bars)[0]

    return jax.jit(run)


def cotangents(problem: Problem, arrays: dict, seed: int) -> tuple:
    rng = np.random.default_rng(seed)
    tokens, value = arrays["query"].shape[:-1], arrays["value"]
    return rng.normal(size=(*tokens, value.shape[-1])).astype(value.dtype), rng.normal(size=tokens).astype(np.float32)


@on_hopper
@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("name", LARGE)
def test_large(name, dtype):
    problem = replace(LARGE[name], dtype=dtype)
    assert serves(problem, is_backward=True)
    seed = np.random.default_rng().integers(2**31)
    arrays = problem.arrays(seed=seed)
    bars = cotangents(problem, arrays, seed + 1)
    run = gradients(problem)
    actual = run(*jax.device_put((arrays, bars)))
    again = run(*jax.device_put((arrays, bars)))
    with precise("float64"):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (arrays, bars))
        expected = run(*jax.device_put(wide, jax.local_devices(backend="cpu")[0]))
    for operand, grad in actual.items():
        x, close_to = np.asarray(grad, np.float64), np.asarray(expected[operand])
        np.testing.assert_array_equal(x, np.asarray(again[operand], np.float64), err_msg=f"{operand}, again")
        error = np.linalg.norm(x - close_to) / np.linalg.norm(close_to)
        assert error < LARGEST_ERROR[dtype], operand


# ---- memory and graphs


@on_hopper
@pytest.mark.parametrize("name", ["1d", "2d_lengths", "2d_clip", "3d_dilated", "padded"])
def test_every_element_is_written(name):
    """Results land in memory that held NaN."""
    problem = replace(PROBLEMS[name], dtype="bfloat16")
    assert serves(problem, is_backward=True)
    arrays = {name: np.nan_to_num(x) for name, x in problem.arrays().items()}
    bars = cotangents(problem, arrays, 1)
    compiled = gradients(problem).lower(arrays, bars).compile()
    for _ in range(3):
        poison = [jax.numpy.full((2**k,), jax.numpy.nan) for k in range(1, 22)]
        jax.block_until_ready(poison)
        del poison
        assert not any(np.isnan(np.asarray(x, np.float32)).any() for x in compiled(arrays, bars).values())


@on_hopper
def test_many_calls_in_one_program():
    """Recorded in graphs, and again where addresses change."""
    problem = replace(PROBLEMS["2d"], dtype="bfloat16")
    assert serves(problem, is_backward=True)
    arrays = problem.arrays()
    bars = cotangents(problem, arrays, 1)
    once = gradients(problem)

    def step(arrays):
        return {name: 0.5 * x + arrays[name] for name, x in once(arrays, bars).items()}

    @jax.jit
    def run(arrays):
        for _ in range(10):
            arrays = step(arrays)
        return arrays

    for seed in range(3):
        arrays = expected = problem.arrays(seed=seed)
        for _ in range(10):
            expected = jax.jit(step)(expected)
        for name, x in run(arrays).items():
            assert_close(x, expected[name], factor=4, err_msg=name)
