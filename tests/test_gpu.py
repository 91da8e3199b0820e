"""The CUDA kernels: what other tests do not ask, since those run on whatever platform is jax's default.

On a GPU the whole suite is the kernels' test; this file adds sizes, dtypes and head dims that a CPU would take too
long for, memory that was not written, and XLA's own machinery: graphs, donation, threads.
"""

import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put, run
from problems import PROBLEMS, Problem, check_fused, check_unfused, fused, precise, unfused
from tolerances import assert_close

import jax_natten as jn
from jax_natten._backends import KERNEL_PLATFORMS

gpu = pytest.mark.gpu

DTYPES = ("float64", "float32", "float16", "bfloat16")


@gpu
def test_the_kernels_are_there():
    assert jn.backends()["native"].available, jn.backends()["native"].detail


@pytest.mark.skipif("cuda" not in KERNEL_PLATFORMS, reason="the CUDA kernels are not built")
@pytest.mark.parametrize("name", ["everything", "plain"])
def test_lowering_for_cuda_needs_no_gpu(name):
    problem = PROBLEMS[name]
    arrays = {name: jnp.asarray(x) for name, x in problem.arrays().items()}

    def loss(arrays):
        return jnp.sum(fused(problem.rank)(**arrays, **problem.window))

    lowered = jax.jit(jax.grad(loss)).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "jax_natten_forward" in lowered and "jax_natten_backward" in lowered


# ---- numbers against brute force


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_dtypes(name, dtype):
    problem = replace(PROBLEMS[name], dtype=dtype, rpb_dtype="float32")
    check_fused(problem, "native")
    check_unfused(problem, "native")


@gpu
@pytest.mark.parametrize("name", ["2d", "whole"])
def test_precision_of_float32(name):
    """Accurate to float32 unless less is asked for, by argument or by jax's setting; then accurate to TF32."""
    problem = replace(LARGE[name], rpb=False)
    arrays = problem.arrays()

    def error(**settings):
        with jax.default_matmul_precision(settings.pop("ambient", None)):
            out = fused(problem.rank)(**jax.device_put(arrays), **problem.window, backend="native", **settings)
        return np.linalg.norm(out - expected) / np.linalg.norm(expected)

    with precise("float64"):
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        wide = jax.device_put(wide, jax.local_devices(backend="cpu")[0])
        expected = np.asarray(fused(problem.rank)(**wide, **problem.window, backend="native"))
    for settings in ({}, {"precision": "highest"}, {"ambient": "float32"}):
        assert error(**settings) < 2e-6, settings
    for settings in ({"precision": "tensorfloat32"}, {"ambient": "tensorfloat32"}, {"precision": "default"}):
        assert 2e-5 < error(**settings) < 2e-3, settings


# Below, at and above what a group of lanes holds; multiples of what a lane loads at once, and not.
DIMS = [1, 8, 12, 24, 31, 32, 33, 40, 48, 64, 80, 96, 128, 130, 160, 192, 256, 257, 300]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(dim, dtype):
    problem = Problem(spatial=(5, 4), kernel_size=(3, 2), dim=dim, heads_kv=1, rpb=True, dtype=dtype)
    check_fused(problem, "native")
    check_unfused(problem, "native")


@gpu
@pytest.mark.parametrize("dims", [(32, 512), (512, 32), (1, 511), (600, 700), (128, 64), (64, 384)], ids=str)
def test_value_dims(dims):
    problem = Problem(spatial=(9,), kernel_size=3, dim=dims[0], value_dim=dims[1], rpb=True)
    check_fused(problem, "native")
    check_unfused(problem, "native")


def random_problem(seed: int) -> Problem:
    """Any window that fits, on any rank, with any features."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    axes = []
    for _ in range(rank):
        size = int(rng.integers(1, (40, 9, 6)[rank - 1]))
        kernel_size = int(rng.integers(1, min(size, 7) + 1))
        dilation = int(rng.integers(1, size // kernel_size + 1))
        border = rng.choice(["shift", "shift", "clip"])
        stride = int(rng.integers(1, kernel_size + 1)) if border == "shift" else 1
        axes.append((size, kernel_size, stride, dilation, bool(rng.integers(2)), str(border)))
    spatial, kernel_size, stride, dilation, is_causal, border = zip(*axes, strict=True)
    batch, group, heads_kv = (int(rng.integers(1, 4)) for _ in range(3))
    lengths = tuple(tuple(int(rng.integers(0, s + 1)) for s in spatial) for _ in range(batch))
    return Problem(
        spatial=spatial,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        border=border,
        batch=batch,
        heads=group * heads_kv,
        heads_kv=heads_kv,
        dim=int(rng.integers(1, 70)),
        value_dim=int(rng.integers(1, 70)),
        rpb=bool(rng.integers(2)),
        lengths=lengths if rng.integers(2) else None,
        additional=int(rng.integers(0, 4)) if rng.integers(2) else None,
        dtype=str(rng.choice(DTYPES)),
    )


@gpu
@pytest.mark.parametrize("seed", range(100))
def test_random_problems(seed):
    problem = random_problem(seed)
    check_fused(problem, "native")
    check_unfused(problem, "native")


# ---- numbers at sizes that fill the device, against the CPU kernels

LARGE = {
    "1d": Problem(spatial=(1000,), kernel_size=100, dilation=3, is_causal=True, batch=2, dim=64, rpb=True),
    "2d": Problem(spatial=(56, 57), kernel_size=(7, 8), heads=4, heads_kv=2, dim=32, batch=3, rpb=True),
    "3d": Problem(spatial=(12, 13, 14), kernel_size=(3, 5, 7), stride=(1, 2, 3), dim=40, value_dim=48, rpb=True),
    "whole": Problem(spatial=(300,), kernel_size=300, dim=128, value_dim=160, heads=4, heads_kv=1),
    "many_heads": Problem(spatial=(5,), kernel_size=3, batch=300, heads=256, dim=8, rpb=True),
}


def value_and_gradients(problem: Problem, operands: dict, bars):
    def run(operands, bars):
        def function(operands):
            return fused(problem.rank)(**operands, **problem.window, return_lse=True, backend="native")

        outs, pull = jax.vjp(function, operands)
        return outs, pull(bars)[0], jax.jvp(function, (operands,), (operands,))[1]

    return jax.jit(run)(operands, bars)


@gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_large_problems(name, dtype):
    problem = replace(LARGE[name], dtype=dtype, rpb_dtype="float32")
    arrays = problem.arrays()
    rng = np.random.default_rng(1)
    shape = arrays["query"].shape[:-1]
    bars = (rng.normal(size=(*shape, arrays["value"].shape[-1])).astype(jnp.dtype(dtype)), rng.normal(size=shape))
    bars = (bars[0], bars[1].astype(np.float32))
    actual = value_and_gradients(problem, *jax.device_put((arrays, bars)))
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    with precise("float64"):
        cpu = jax.local_devices(backend="cpu")[0]
        operands = jax.device_put((wide, tuple(x.astype(np.float64) for x in bars)), cpu)
        expected = value_and_gradients(problem, *operands)
    for path, result in jax.tree_util.tree_leaves_with_path(actual):
        name = jax.tree_util.keystr(path)
        is_table = "rpb" in name  # as accurate as the activations that it sums
        close_to = dict(jax.tree_util.tree_leaves_with_path(expected))[path]
        assert_close(result, close_to, dtype=dtype if is_table else None, factor=8, err_msg=name)


@gpu
@pytest.mark.parametrize("name", ["2d", "3d"])
def test_large_unfused_problems(name):
    problem = replace(LARGE[name], rpb=False)
    qk, av = unfused(problem.rank)

    def run(arrays):
        query, key, value = (jnp.moveaxis(arrays[name], -2, 1) for name in ("query", "key", "value"))

        def function(query, key, value):
            logits = qk(query, key, **problem.window, backend="native")
            return logits, av(jnp.sin(logits), value, **problem.window, backend="native")

        outs, pull = jax.vjp(function, query, key, value)
        return outs, pull(jax.tree.map(jnp.cos, outs))

    arrays = problem.arrays()
    actual = jax.jit(run)(jax.device_put(arrays))
    with precise("float64"):
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        expected = jax.jit(run)(jax.device_put(wide, jax.local_devices(backend="cpu")[0]))
    for result, close_to in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(result, close_to, dtype="float32", factor=64)


@gpu
def test_more_elements_than_32_bits_can_count():
    """The last tokens of a long sequence equal those of a short one that ends in the same tokens."""
    dim, length, tail = 136, 2**31 // 136 + 1000, 64
    assert length * dim > 2**31
    window = dict(kernel_size=5, backend="native")

    @jax.jit
    def run(query):
        def function(query, key, value):
            return jn.na1d(query, key, value, **window)

        out, pull = jax.vjp(function, query, query, query)
        grads = pull(out)
        return [x[:, -tail // 2 :] for x in (out, *grads)]

    @jax.jit
    def last(query):
        return query[:, -tail:]

    query = jax.random.normal(jax.random.key(0), (1, length, 1, dim), jnp.bfloat16)
    for actual, expected in zip(run(query), run(last(query)), strict=True):
        np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(expected, np.float32))
        assert np.any(actual)


# ---- memory


@gpu
@pytest.mark.parametrize("name", ["everything", "stride_3d", "lengths_zero"])
def test_every_element_is_written(name):
    """Results land in memory that held NaN."""
    problem = PROBLEMS[name]
    arrays = {name: jnp.nan_to_num(x) for name, x in problem.arrays().items()}

    def run(arrays):
        def function(arrays):
            return fused(problem.rank)(**arrays, **problem.window, return_lse=True, backend="native")

        outs, pull = jax.vjp(function, arrays)
        return outs, pull(jax.tree.map(jnp.ones_like, outs)), jax.jvp(function, (arrays,), (arrays,))

    compiled = jax.jit(run).lower(arrays).compile()
    for _ in range(3):
        poison = [jnp.full((2**k,), jnp.nan) for k in range(1, 22)]
        jax.block_until_ready(poison)
        del poison
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(compiled(arrays)))


@gpu
@pytest.mark.parametrize("name", LARGE)
def test_equal_calls_give_equal_bits(name):
    problem = replace(LARGE[name], dtype="bfloat16")
    arrays = jax.device_put(problem.arrays())

    @jax.jit
    def run(arrays):
        return jax.grad(lambda arrays: jnp.sum(fused(problem.rank)(**arrays, **problem.window).astype("float32")))(
            arrays
        )

    first = run(arrays)
    for _ in range(3):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(run(arrays)), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# ---- graphs, loops, donation, threads


def step(x):
    """One call and its gradient, scaled so that iterating stays finite."""
    out, pull = jax.vjp(lambda x: jn.na2d(x, x, x, kernel_size=(3, 2), dilation=(1, 2), backend="native"), x)
    return 0.5 * out + 0.1 * pull(jnp.sin(out))[0]


def repeated(x, times: int):
    for _ in range(times):
        x = jax.jit(step)(x)
    return x


@gpu
def test_many_calls_in_one_program():
    """XLA records these in a graph, and again where addresses change."""

    @jax.jit
    def run(x):
        for _ in range(20):
            x = step(x)
        return x

    for seed in range(5):
        x = jax.random.normal(jax.random.key(seed), (2, 8, 9, 2, 16))
        assert_close(run(x), repeated(x, 20), factor=4)
        kept = [run(x + i) for i in range(4)]
        assert all(np.isfinite(y).all() for y in kept)


@gpu
@pytest.mark.parametrize("loop", ["scan", "while_loop", "fori_loop"])
def test_loops_with_donated_buffers(loop):
    def run(x):
        if loop == "scan":
            return jax.lax.scan(lambda x, _: (step(x), None), x, length=30)[0]
        if loop == "fori_loop":
            return jax.lax.fori_loop(0, 30, lambda _, x: step(x), x)
        return jax.lax.while_loop(lambda c: c[0] < 30, lambda c: (c[0] + 1, step(c[1])), (0, x))[1]

    compiled = jax.jit(run, donate_argnums=0)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 8, 9, 2, 16)))
    expected = repeated(jnp.asarray(x), 30)
    for _ in range(3):
        assert_close(compiled(jnp.asarray(x)), expected, factor=4)


@gpu
def test_calls_from_several_threads():
    x = jax.random.normal(jax.random.key(0), (2, 8, 9, 2, 16))
    expected, results = np.asarray(repeated(x, 20)), {}

    def work(number):
        results[number] = np.asarray(repeated(x, 20))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_array_equal(results[number], expected)


@gpu
def test_every_gpu_takes_a_share():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    x = jax.random.normal(jax.random.key(0), (2 * len(devices), 8, 9, 2, 16))
    out = jax.jit(step, in_shardings=sharding, out_shardings=sharding)(x)
    assert out.sharding.is_equivalent_to(sharding, x.ndim)
    assert_close(out, jax.jit(step)(x))


@gpu
@pytest.mark.parametrize("axis", ["batch", "heads", "space"])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_gradients(kind, axis):
    """Over all GPUs; samples and heads without communication."""
    count = jax.device_count()
    mesh = make_mesh(kind, (count,), ("gpus",))
    spec = P(*("gpus" if axis == name else None for name in ("batch", "space", None, "heads")))
    shape = (2 * count, 4 * count, 9, 2 * count, 16)
    arrays = [jax.random.normal(jax.random.key(i), shape) for i in range(3)]

    def loss(q, k, v):
        return jnp.sum(jnp.sin(jn.na2d(q, k, v, kernel_size=(3, 4), dilation=(1, 2), backend="native")))

    gradient = jax.grad(loss, (0, 1, 2))
    actual, communication = run(mesh, gradient, *put(mesh, arrays, [spec] * 3))
    for a, e in zip(actual, jax.jit(gradient)(*arrays), strict=True):
        assert_close(a, e, factor=4)
    assert bool(communication) == (axis == "space" and count > 1)
