"""The tiled CPU kernels: problems of many tiles, blocks and slabs, every instruction set, any number of threads."""

import functools
import hashlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Problem, fused, precise, unfused
from subprocesses import outputs, start
from tolerances import assert_close

_cpu = pytest.importorskip("jax_natten._cpu")

# Each has several tiles; rows are no multiple of a panel of channels, and most have more than one.
PROBLEMS = {
    "sequence": Problem(spatial=(300,), kernel_size=37, dim=40, value_dim=72, batch=2),
    "long_window": Problem(spatial=(500,), kernel_size=300, dim=8, heads=1),
    "causal_sequence": Problem(spatial=(333,), kernel_size=20, dilation=3, is_causal=True, dim=33, rpb=True),
    "strided_sequence": Problem(spatial=(200,), kernel_size=13, stride=5, dim=16, heads=4, heads_kv=2),
    "image": Problem(spatial=(61, 57), kernel_size=(5, 7), dim=24),
    "image_of_heads": Problem(spatial=(40, 23), kernel_size=3, dim=64, heads=6, heads_kv=2, value_dim=8, batch=2),
    "dilated_image": Problem(spatial=(37, 41), kernel_size=(4, 5), dilation=(5, 8), dim=32, heads=3),
    "strided_image": Problem(spatial=(48, 30), kernel_size=(8, 6), stride=(4, 3), dim=32, rpb=True),
    "ragged_images": Problem(
        spatial=(33, 31), kernel_size=5, dilation=(1, 2), dim=32, batch=3, lengths=((33, 31), (9, 4), (20, 1))
    ),
    "clipped_image": Problem(spatial=(30, 34), kernel_size=(7, 9), border=("clip", "wrap"), dim=20, rpb=True),
    "volume": Problem(spatial=(9, 14, 19), kernel_size=(3, 5, 4), is_causal=(True, False, False), dim=32),
    "wide_rows": Problem(spatial=(12, 13), kernel_size=5, dim=160, value_dim=200, heads=1),
}


def derivatives(problem: Problem, backend: str, seed: int = 0) -> dict:
    """out, lse, all gradients for random cotangents, and tangents, by name."""
    arrays = {name: jnp.asarray(np.nan_to_num(x)) for name, x in problem.arrays(seed).items()}

    def function(arrays):
        return fused(problem.rank)(**arrays, **problem.window, return_lse=True, backend=backend)

    @jax.jit
    def run(arrays):
        (out, lse), pull = jax.vjp(function, arrays)
        lse = jnp.where(jnp.isneginf(lse), 0, lse)
        (grads,) = pull((jnp.cos(out), jnp.sin(lse)))
        moved = jax.jvp(function, (arrays,), (jax.tree.map(jnp.sin, arrays),))[1]
        return {"out": out, "lse": lse, **grads, "out'": moved[0], "lse'": moved[1]}

    return run(arrays)


def unfused_results(problem: Problem, backend: str, seed: int = 0) -> dict:
    """Logits, weighted sums, and the gradients of both."""
    arrays = {name: jnp.moveaxis(jnp.asarray(np.nan_to_num(x)), -2, 1) for name, x in problem.arrays(seed).items()}
    qk, av = unfused(problem.rank)

    @jax.jit
    def run(query, key, value):
        logits, pull_logits = jax.vjp(lambda q, k: qk(q, k, **problem.window, backend=backend), query, key)
        attn = jnp.where(jnp.isneginf(logits), 0, jnp.sin(logits))
        out, pull = jax.vjp(lambda a, v: av(a, v, **problem.window, backend=backend), attn, value)
        names = ("logits", "out", "query", "key", "attn", "value")
        return dict(zip(names, (logits, out, *pull_logits(attn), *pull(jnp.cos(out))), strict=True))

    return run(*(arrays[name] for name in ("query", "key", "value")))


@functools.cache
def expected_derivatives(name: str) -> dict:
    """Of the pure-JAX reference in float64, for both dtypes: it takes seconds to compile."""
    return derivatives(replace(PROBLEMS[name], dtype="float64"), "reference")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_many_tiles(name, dtype):
    """The kernels agree with the reference."""
    with precise("float64"):
        actual, expected = derivatives(replace(PROBLEMS[name], dtype=dtype), "native"), expected_derivatives(name)
        for result in expected:
            assert_close(actual[result], expected[result], dtype=dtype, factor=4, err_msg=result)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["image_of_heads", "causal_sequence", "ragged_images"])
def test_half_types(name, dtype):
    """Sums are wider than their dtype: the results are those of float32 on the same numbers, rounded."""
    problem = replace(PROBLEMS[name], dtype=dtype, rpb_dtype="float32")
    rounded = {name: x.astype(np.float32) for name, x in problem.arrays().items()}

    class Rounded(Problem):
        def arrays(self, seed=0):
            return rounded

    wide = Rounded(**{**vars(problem), "dtype": "float32"})
    actual, expected = derivatives(problem, "native"), derivatives(wide, "native")
    for result in ("out", "lse", "query", "value"):
        assert_close(actual[result], expected[result], dtype=dtype, factor=2, err_msg=result)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dim", [32, 16])
@pytest.mark.parametrize("weight", [1, 0.3, 2**-12, 3000])
def test_every_float16(weight, dim):
    """Every float16 is read as what it is, and products are rounded to it as NumPy does."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(1, 1, -1, dim)
    attn = np.full((1, 1, values.shape[2], 1), weight, np.float16)
    actual = unfused(1)[1](jnp.asarray(attn), jnp.asarray(values), kernel_size=1, backend="native")
    with np.errstate(all="ignore"):
        expected = (attn.astype(np.float32) * values.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(actual), expected)


@pytest.mark.parametrize("name", ["sequence", "image_of_heads", "dilated_image", "ragged_images", "volume"])
def test_unfused(name):
    with precise("float64"):
        problem = replace(PROBLEMS[name], dtype="float64", rpb=False)
        actual, expected = (unfused_results(problem, backend) for backend in ("native", "reference"))
        for result in expected:
            assert_close(actual[result], expected[result], factor=4, err_msg=result)


LINE = 64  # bytes of a line of the caches


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_large_results(dtype, more):
    """Results of more than 4 MiB, which pass the caches where rows are whole lines, have the bits of smaller ones."""
    with precise("float64"):
        dim = LINE // jnp.dtype(dtype).itemsize + more
        problem = Problem(spatial=(67, 61), kernel_size=3, dim=dim, heads=4, batch=5, dtype=dtype)
        arrays = {name: jnp.asarray(x) for name, x in problem.arrays().items()}
        assert arrays["query"].nbytes > 4 << 20 > arrays["query"][0].nbytes

        @jax.jit
        def run(query, key, value):
            def function(*qkv):
                return fused(2)(*qkv, **problem.window, backend="native")

            out, pull = jax.vjp(function, query, key, value)
            _, moved = jax.jvp(function, (query, key, value), (key, value, query))
            qk, av = unfused(2)
            query, key, value = (jnp.moveaxis(x, -2, 1) for x in (query, key, value))
            attn = qk(query, key, **problem.window, backend="native")
            return out, pull(out), moved, av(attn, value, **problem.window, backend="native")

        large = run(**arrays)
        for sample in range(problem.batch):
            one = slice(sample, sample + 1)
            small = run(**{name: x[one] for name, x in arrays.items()})
            for actual, expected in zip(jax.tree.leaves(large), jax.tree.leaves(small), strict=True):
                np.testing.assert_array_equal(np.asarray(actual)[one], np.asarray(expected))


# ---- where a kernel's arithmetic could carry what is not finite


@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_stays_among_neighbors(what, poison, request):
    """One poisoned token changes no bit of the results of tokens that neither see it nor are seen by it."""
    if what == "value":  # which on a GPU may reach queries nearby
        request.getfixturevalue("on_cpu")
    problem = PROBLEMS["image"]
    clean = problem.arrays()
    dirty = {name: x.copy() for name, x in clean.items()}
    place, reach = np.array((30, 25)), np.array(problem.kernel_size) // 2
    dirty[what][(0, *place)] = poison

    def results(arrays):
        def function(arrays):
            return fused(2)(**arrays, **problem.window, return_lse=True, backend="native")

        outs, pull = jax.vjp(function, arrays)
        return dict(zip(("out", "lse"), outs, strict=True)) | pull(jax.tree.map(jnp.ones_like, outs))[0]

    distance = np.abs(np.indices(problem.spatial).T - place).T
    # A key's gradient has the weights of the queries that see it, and theirs come from all that they see.
    far = (distance > 2 * reach[:, None, None]).any(axis=0)
    actual, expected = results(dirty), results(clean)
    for name in expected:
        np.testing.assert_array_equal(np.asarray(actual[name])[0][far], np.asarray(expected[name])[0][far], name)


# ---- the same bits, whoever computes them

BITS = """
from test_cpu_kernels import print_bits

print_bits()
"""


def print_bits() -> None:
    """A digest of all results of all problems, twice, which must be equal."""
    names = ("sequence", "image", "image_of_heads", "dilated_image", "strided_image", "volume")
    digests = []
    for _ in range(2):
        digest = hashlib.sha256()
        for name, dtype in ((name, dtype) for name in names for dtype in ("float32", "bfloat16")):
            problem = replace(PROBLEMS[name], dtype=dtype)
            for result in (derivatives(problem, "native"), unfused_results(replace(problem, rpb=False), "native")):
                for x in jax.tree.leaves(result):
                    digest.update(np.asarray(x).tobytes())
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]
    print(digests[0])


def test_bits_do_not_depend_on_threads():
    printed = outputs([start(BITS, NPROC=threads) for threads in ("1", "2", "4")], timeout=600)
    assert len(set(printed)) == 1 and len(printed[0].strip()) == 64


# ---- every instruction set

SUITE = ("test_goldens.py", "test_fuzz.py", "test_neighborhood.py", "test_frame.py", "test_cpu_kernels.py")
# What is Python or pure JAX, as second derivatives are, is the same with all of them.
COMMON = ("instruction_set", "nonsense", "reference", "second")

RUN_SUITE = """
import sys

import pytest

from jax_natten import _cpu

assert _cpu.target() == sys.argv[1]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", *sys.argv[2:]]))
"""


def test_instruction_sets():
    """The default is the best that the processor has."""
    targets = _cpu.available_targets()
    assert targets[0] == "baseline" and _cpu.target() in targets


@pytest.mark.parametrize("target", [target for target in _cpu.available_targets() if target != _cpu.target()])
def test_suite_on_instruction_set(target):
    folder = Path(__file__).parent
    arguments = (f"not ({' or '.join(COMMON)})", *(str(folder / name) for name in SUITE))
    # What XLA compiles around the kernels has been through all tests; here it need not be fast.
    environment = {"JAX_NATTEN_CPU_TARGET": target, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    outputs([start(RUN_SUITE, target, *arguments, **environment)], timeout=1200)


def test_unknown_instruction_set():
    process = start("import jax_natten", JAX_NATTEN_CPU_TARGET="abacus")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "JAX_NATTEN_CPU_TARGET is abacus" in errors and "baseline" in errors
