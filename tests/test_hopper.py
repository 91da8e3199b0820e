"""The forward kernels for Hopper: what serves them, their tiles, and their numbers.

`backend="native"` takes them wherever they serve a call, so a test forces them by asking first: `serves` is the
dispatcher's own question, and a problem that they do not serve fails.
"""

import itertools
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
import reference
from problems import Problem, check_fused, fused, precise
from reference import axis_keys, make_window
from tolerances import assert_close

import jax_natten as jn

_cuda = pytest.importorskip("jax_natten._cuda", reason="the CUDA kernels are not built")

hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "not any(getattr(device, 'compute_capability', '') == '9.0' for device in __import__('jax').devices())",
        reason="needs a Hopper GPU",
    ),
    pytest.mark.skipif("not serves(Problem(spatial=(64,), kernel_size=3, dim=64))", reason="not built for Hopper"),
]


def on_hopper(test):
    for mark in hopper:
        test = mark(test)
    return test


def serves(problem: Problem, is_backward: bool = False) -> bool:
    """Whether the dispatcher takes these kernels for a problem of half types."""
    window = make_window(
        problem.rank, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, problem.border
    )
    dim, value_dim = problem.dim, problem.value_dim or problem.dim
    scale = problem.dim**-0.5 if problem.scale is None else problem.scale
    axes = (window.kernel_size, window.stride, window.dilation, window.is_causal)
    sizes = (problem.batch, dim, value_dim)
    shapes = (problem.spatial, problem.spatial)
    return _cuda.hopper_serves(*shapes, *map(list, axes), *sizes, scale, problem.rpb, is_backward)


# ---- what is served


@hopper[-1]
def test_what_is_served():
    plain = Problem(spatial=(64, 64), kernel_size=7, dim=64)
    assert all(serves(replace(plain, dim=dim, batch=3)) for dim in range(8, 257, 8))
    assert not any(serves(replace(plain, dim=dim)) for dim in (1, 4, 12, 36, 260, 264, 512))
    assert all(serves(replace(plain, dim=a, value_dim=b)) for a in (8, 64, 192) for b in (16, 40, 128, 256))
    assert not any(serves(replace(plain, dim=a, value_dim=b)) for a, b in ((64, 12), (12, 64), (64, 264), (264, 64)))
    assert all(serves(replace(plain, dilation=d)) for d in range(1, 9))
    assert not serves(replace(plain, dilation=9))
    assert not any(serves(replace(plain, scale=scale)) for scale in (0.0, -1.0))


@hopper[-1]
def test_biases_whose_table_fits_in_shared_memory_are_served():
    plain = Problem(spatial=(64, 64), kernel_size=7, dim=64, rpb=True)
    assert all(serves(replace(plain, dim=dim, batch=2)) for dim in range(8, 129, 8))
    assert not any(serves(replace(plain, dim=dim)) for dim in range(136, 257, 8))
    assert serves(replace(plain, dim=64, value_dim=128)) and not serves(replace(plain, dim=192, value_dim=128))
    for dim in (32, 64, 96, 128):
        assert all(serves(replace(plain, kernel_size=size, dim=dim)) for size in (1, 13, 31))
        assert not serves(replace(plain, kernel_size=61, dim=dim))
        assert serves(replace(plain, spatial=(2000,), kernel_size=1500, dim=dim))
        assert not serves(replace(plain, spatial=(8, 400), kernel_size=(8, 400), dim=dim))
        assert serves(replace(plain, spatial=(12, 20, 30), kernel_size=(5, 7, 9), dim=dim))
    assert serves(replace(plain, scale=1e-3)) and not serves(replace(plain, scale=1e-30))


@hopper[-1]
def test_padded_rows_of_three_axes_are_of_one_sample():
    """A tensor map has five axes, and heads are one where rows are padded."""
    video = Problem(spatial=(6, 12, 12), kernel_size=3, dim=64, batch=2)
    assert all(serves(replace(video, dim=dim)) for dim in (32, 64, 96, 128, 192, 256))
    assert all(serves(replace(video, dim=a, value_dim=128)) for a in (64, 192))
    assert not any(serves(replace(video, dim=dim)) for dim in (8, 48, 80, 112, 160, 224))
    assert not any(serves(replace(video, dim=a, value_dim=b)) for a, b in ((64, 32), (32, 64), (192, 96), (256, 128)))
    assert all(serves(replace(video, batch=1, dim=dim)) for dim in range(8, 257, 8))
    assert serves(replace(video, spatial=(1, 12, 12), kernel_size=(1, 3, 3), dim=40))


# ---- tiles, against brute force

WINDOWS = [
    (k, t, d, causal)
    for k, d, causal in itertools.product((1, 3, 4, 8, 13), (1, 2, 3), (False, True))
    for t in {1, 2, k}
    if t <= k
]


def count(size: int, part: int) -> int:
    """How many parts hold so many."""
    return (size + part - 1) // part


def tiles_of(size: int, window: tuple, queries: int, keys: int, rows_are_keys: bool = False) -> tuple[int, int]:
    """Tiles of keys that blocks of queries visit, and those that every query of the block sees whole.

    Or the same of queries that blocks of keys visit, those whose windows hold a key.
    """
    dilation = window[2]
    seen_by = {row: sorted(key for key, _ in axis_keys(row, size, *window).values()) for row in range(size)}
    if rows_are_keys:
        seen_by = {key: [query for query in range(size) if key in seen_by[query]] for key in range(size)}
    visited = inner = 0
    for group in range(min(dilation, size)):
        rows = list(range(group, size, dilation))
        for begin in range(0, count(size, dilation), queries):
            block = rows[begin : begin + queries]
            seen = [seen_by[row] for row in block]
            if not seen:
                continue
            first, last = seen[0][0], max(s[-1] for s in seen)
            box = list(range(first, last + 1, dilation))
            tiles = [box[i : i + keys] for i in range(0, len(box), keys)]
            visited += len(tiles)
            inner += sum(len(tile) == keys and all(set(tile) <= set(s) for s in seen) for tile in tiles)
    return visited, inner


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tiles(window):
    """Exact for as many blocks as are looked at, in groups of one length."""
    for size, queries, keys in itertools.product((window[0] * window[2], 60), (1, 4, 16, 24), (1, 2, 8, 16)):
        if size // window[2] // queries <= 31:
            for rows_are_keys in (False, True):
                expected = tiles_of(size, window, queries, keys, rows_are_keys)
                actual = _cuda.hopper_tiles(size, size, *window, queries, keys, rows_are_keys)
                assert actual == expected, (size, queries, keys, rows_are_keys)


SHAPES = [
    ((300,), (31,), (1,), (1,), (False,)),
    ((300,), (31,), (8,), (2,), (True,)),
    ((40, 50), (7, 9), (1, 1), (1, 2), (False, False)),
    ((12, 20, 30), (3, 7, 9), (1, 2, 1), (2, 1, 1), (False, True, False)),
]


@pytest.mark.parametrize("consumers, keys", [(1, 64), (2, 128), (3, 128), (2, 96)])
@pytest.mark.parametrize("problem", SHAPES, ids=str)
def test_shape(problem, consumers, keys):
    """A shape that the copy engine can load, and whose cost is that of its blocks and tiles."""
    spatial, *window = problem
    costs = (3000.0, 1300.0, 1000.0)
    queries, box, cost = _cuda.hopper_shape(spatial, spatial, *window, consumers, keys, costs)
    assert np.prod(queries) == consumers * 64 and np.prod(box) == keys and box[-1] % 8 == 0
    rank = len(spatial)
    assert all((b - 1) * d < 256 for b, d in zip(box[-rank:], window[2], strict=True))
    assert all(b == 1 for b in queries[:-rank])
    blocks = visited = inner = 1
    for a, size in enumerate(spatial):
        along = -rank + a
        axis = tuple(entries[a] for entries in window)
        blocks *= min(axis[2], size) * count(count(size, axis[2]), queries[along])
        tiles = tiles_of(size, axis, queries[along], box[along])
        visited, inner = visited * tiles[0], inner * tiles[1]
    inner = inner if all(b == 1 for b in box[:-rank]) else 0
    assert cost == pytest.approx(blocks * costs[0] + (visited - inner) * costs[1] + inner * costs[2])


# ---- numbers

PROBLEMS = {
    "1d": Problem(spatial=(300,), kernel_size=37, stride=5, dilation=3, dim=64, heads=4, heads_kv=2),
    "1d_causal": Problem(spatial=(270,), kernel_size=101, dilation=2, is_causal=True, dim=32),
    "1d_short": Problem(spatial=(5,), kernel_size=3, dim=64, batch=3),
    "1d_whole": Problem(spatial=(200,), kernel_size=200, dim=128),
    "2d": Problem(
        spatial=(21, 30), kernel_size=(12, 9), stride=(3, 2), dilation=(1, 2), is_causal=(True, False), dim=64
    ),
    "2d_lengths": Problem(
        spatial=(20, 25), kernel_size=(5, 7), dim=64, batch=4, lengths=((20, 25), (0, 9), (3, 4), (19, 11))
    ),
    "2d_clip": Problem(spatial=(20, 25), kernel_size=(9, 6), dilation=(1, 2), border="clip", dim=32),
    "2d_wrap": Problem(spatial=(20, 24), kernel_size=(5, 6), dilation=(2, 1), border="wrap", dim=64),
    "2d_scale": Problem(spatial=(16, 16), kernel_size=7, scale=0.5, dim=96),
    "3d": Problem(spatial=(7, 9, 11), kernel_size=(4, 5, 6), stride=(2, 1, 3), is_causal=(True, False, False), dim=64),
    "3d_dilated": Problem(spatial=(6, 9, 12), kernel_size=(2, 3, 5), dilation=(2, 3, 1), dim=96, heads_kv=1),
    "3d_lengths": Problem(spatial=(5, 8, 11), kernel_size=(3, 4, 5), dim=128, batch=2, lengths=((4, 8, 3), (5, 2, 11))),
    "d192": Problem(spatial=(12, 13), kernel_size=(5, 6), dim=192, batch=2, lengths=((12, 13), (7, 9))),
    "d256": Problem(spatial=(4, 6, 9), kernel_size=(3, 2, 5), dim=256),
    "additional": Problem(spatial=(12, 12), kernel_size=5, dim=64, additional=3),
    "padded": Problem(spatial=(12, 13), kernel_size=(5, 6), dim=72, value_dim=40, batch=2, lengths=((12, 13), (7, 9))),
    "rpb": Problem(spatial=(20, 25), kernel_size=(5, 7), dim=64, batch=2, lengths=((20, 25), (19, 11)), rpb=True),
    "rpb_additional": Problem(spatial=(12, 12), kernel_size=5, dim=32, additional=3, rpb=True, rpb_dtype="float32"),
}


@on_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_fused(name, dtype):
    problem = replace(PROBLEMS[name], dtype=dtype)
    assert serves(problem)
    check_fused(problem, "native")


# Rows that the kernels pad, and values of other lengths than keys.
DIMS = [(8, 8), (24, 24), (40, 40), (48, 48), (72, 72), (80, 80), (104, 104), (112, 112), (136, 136), (200, 200)]
DIMS += [(64, 128), (192, 128), (8, 64), (40, 24), (32, 128), (128, 64), (96, 128), (168, 120), (256, 16), (64, 256)]
PADDED = {
    "1d": Problem(spatial=(150,), kernel_size=37, stride=5, dilation=3, is_causal=True, heads=4, heads_kv=2, batch=2),
    "2d": Problem(spatial=(12, 17), kernel_size=(5, 6), dilation=(2, 1), batch=2, lengths=((12, 17), (11, 9))),
    "3d": Problem(spatial=(5, 7, 9), kernel_size=(3, 4, 5), stride=(2, 1, 3), is_causal=(False, True, False)),
}


@cache
def forward(problem: Problem):
    """out and lse of arrays by name."""
    static = {"scale": problem.scale, **problem.window}
    return jax.jit(lambda arrays: fused(problem.rank)(**arrays, **static, return_lse=True, backend="native"))


BIASED = {
    "1d": PADDED["1d"],
    "1d_long": Problem(spatial=(300,), kernel_size=200, heads=4, heads_kv=1, scale=0.3),
    "2d": PADDED["2d"],
    "2d_stride": Problem(
        spatial=(21, 30), kernel_size=(12, 9), stride=(3, 2), dilation=(1, 2), is_causal=(True, False)
    ),
    "2d_clip": Problem(spatial=(20, 25), kernel_size=(9, 6), dilation=(1, 2), border="clip", heads_kv=1),
    "2d_wrap": Problem(spatial=(20, 24), kernel_size=(5, 6), dilation=(2, 1), border="wrap", batch=2),
    "2d_13": Problem(spatial=(30, 33), kernel_size=13),
    "3d": PADDED["3d"],
    "3d_even": Problem(spatial=(7, 9, 17), kernel_size=(4, 6, 8), dilation=(1, 1, 2)),
}


def check_forward(problem: Problem) -> None:
    """out and lse against brute force, also beside heads of NaN: heads do not hear of their neighbors in memory."""
    assert serves(problem)
    arrays = problem.arrays()
    expected_out, expected_lse = reference.fused(**arrays, scale=problem.scale, **problem.window)
    for heads in (slice(None), slice(0, problem.heads // 2)):
        out, lse = forward(problem)(arrays)
        assert_close(out[..., heads, :], expected_out[..., heads, :], err_msg=f"out of {heads}")
        assert_close(lse[..., heads], expected_lse[..., heads], err_msg=f"lse of {heads}")
        for name in ("query", "key", "value"):
            arrays[name][..., (arrays[name].shape[-2] + 1) // 2 :, :] = np.nan
        if problem.rpb:
            arrays["rpb"][problem.heads // 2 :] = np.nan


@on_hopper
@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_dims(dims, name):
    dtype = "bfloat16" if DIMS.index(dims) % 2 else "float16"
    check_forward(replace(PADDED[name], dim=dims[0], value_dim=dims[1], dtype=dtype))


@on_hopper
@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (96, 96), (128, 128), (40, 56)], ids=str)
def test_biases(dims, name):
    dtypes = {"dtype": "bfloat16"} if dims[0] < 96 else {"dtype": "float16", "rpb_dtype": "float32"}
    check_forward(replace(BIASED[name], dim=dims[0], value_dim=dims[1], rpb=True, **dtypes))


@on_hopper
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_infinite_biases_exclude_keys(dim):
    problem = Problem(spatial=(20, 25), kernel_size=(5, 7), dim=dim, rpb=True, dtype="bfloat16")
    arrays = problem.arrays()
    arrays["rpb"][:, :, ::3] = -np.inf
    out, lse = forward(problem)(arrays)
    expected_out, expected_lse = reference.fused(**arrays, **problem.window)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)


LARGE = {
    "1d": Problem(spatial=(4000,), kernel_size=700, dim=128, heads=4, heads_kv=2),
    "1d_causal": Problem(spatial=(5000,), kernel_size=900, stride=64, is_causal=True, dim=64),
    "2d": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=128),
    "2d_small": Problem(spatial=(56, 57), kernel_size=7, dim=64, heads=4, batch=8),
    "2d_lengths": Problem(spatial=(70, 80), kernel_size=(30, 21), dim=64, batch=2, lengths=((70, 51), (33, 80))),
    "3d": Problem(spatial=(20, 30, 40), kernel_size=(9, 12, 16), dim=64),
    "3d_dilated": Problem(spatial=(16, 24, 40), kernel_size=(5, 6, 8), dilation=(2, 2, 3), dim=128),
    "3d_128": Problem(spatial=(19, 29, 41), kernel_size=(9, 12, 16), dim=128),
    "3d_lengths": Problem(
        spatial=(12, 20, 30), kernel_size=(8, 10, 14), dim=128, batch=2, lengths=((12, 13, 30), (9, 20, 17)), heads_kv=1
    ),
    "3d_96": Problem(
        spatial=(12, 20, 30), kernel_size=(8, 10, 14), dim=96, batch=2, lengths=((12, 13, 30), (9, 20, 17))
    ),
    "d32": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=32),
    "d96": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=96),
    "d192": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=192),
    "d256": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=256),
    "rpb_2d": Problem(spatial=(128, 128), kernel_size=13, dim=64, batch=2, rpb=True),
    "rpb_1d": Problem(spatial=(4000,), kernel_size=700, dim=128, heads=4, heads_kv=2, rpb=True),
    "rpb_3d": Problem(spatial=(16, 24, 40), kernel_size=(5, 6, 8), dim=96, rpb=True),
    "rpb_d32": Problem(spatial=(56, 57), kernel_size=7, dim=32, heads=4, batch=16, rpb=True),
    "rpb_d64": Problem(spatial=(56, 57), kernel_size=7, dim=64, heads=4, batch=16, rpb=True),
    "rpb_d128": Problem(spatial=(90, 100), kernel_size=31, dim=128, rpb=True),
    "d80": Problem(spatial=(90, 100), kernel_size=(31, 40), dim=80, batch=2),
    "d48": Problem(spatial=(56, 57), kernel_size=7, dim=48, heads=4, batch=8),
    "d64_128": Problem(spatial=(4000,), kernel_size=700, dim=64, value_dim=128, heads=4, heads_kv=2),
    "d192_128": Problem(spatial=(20, 30, 40), kernel_size=(9, 12, 16), dim=192, value_dim=128),
}
# Of the norm: what rounding weights and outputs leaves.
LARGEST_ERROR = {"bfloat16": 3e-3, "float16": 5e-4}


@hopper[-1]
def test_problems_are_served():
    assert all(map(serves, [*PROBLEMS.values(), *LARGE.values()]))


def check_large(problem: Problem, arrays: dict) -> None:
    """Equal bits twice, against float64 on CPU."""
    assert serves(problem)

    def run(arrays):
        return fused(problem.rank)(**arrays, **problem.window, return_lse=True, backend="native")

    out, lse = jax.jit(run)(jax.device_put(arrays))
    again, lse_again = jax.jit(run)(jax.device_put(arrays))
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(again, np.float32))
    np.testing.assert_array_equal(lse, lse_again)
    with precise("float64"):
        wide = {name: x.astype(np.float64) for name, x in arrays.items()}
        results = jax.jit(run)(jax.device_put(wide, jax.local_devices(backend="cpu")[0]))
    expected, lse_expected = map(np.asarray, results)
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert error < LARGEST_ERROR[problem.dtype]
    assert_close(lse, lse_expected, dtype="float32", factor=8)


@on_hopper
@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("name", LARGE)
def test_large(name, dtype):
    problem = replace(LARGE[name], dtype=dtype)
    check_large(problem, problem.arrays(seed=np.random.default_rng().integers(2**31)))


# Of keys, by their place among all, so that logits grow and fall from tile to tile.
GAINS = {
    "large": lambda place: np.full_like(place, 30),
    "rising": lambda place: 60 * place,
    "falling": lambda place: 60 * (1 - place),
    "peaks": lambda place: np.where(np.floor(40 * place) % 5 == 4, 60, 0.5),
}


@on_hopper
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize(
    "name", ["1d", "1d_causal", "2d", "2d_small", "3d", "3d_128", "3d_96", "3d_dilated", "d32", "d256", "d192_128"]
)
def test_logits_of_any_size(name, gain):
    dtype = "float16" if gain == "rising" else "bfloat16"
    problem = replace(LARGE[name], dtype=dtype)
    arrays = problem.arrays()
    place = np.linspace(0, 1, int(np.prod(problem.spatial))).reshape(1, *problem.spatial, 1, 1)
    arrays["key"] = (arrays["key"].astype(np.float64) * GAINS[gain](place)).astype(arrays["key"].dtype)
    check_large(problem, arrays)


@on_hopper
@pytest.mark.parametrize("name", ["rpb_1d", "rpb_2d", "rpb_3d"])
def test_first_logits_far_below_the_others(name):
    """A query's first keys count until others come, however small their weights will be."""
    problem = replace(LARGE[name], dtype="bfloat16", rpb_dtype="float32")
    arrays = problem.arrays()
    half = arrays["rpb"].shape[-1] // 2
    arrays["rpb"][..., : half - 3] -= 3e4
    check_large(problem, arrays)


@on_hopper
@pytest.mark.parametrize("name", ["1d", "2d_lengths", "3d_dilated", "padded", "rpb"])
def test_every_element_is_written(name):
    """Results land in memory that held NaN."""
    problem = replace(PROBLEMS[name], dtype="bfloat16") if name in PROBLEMS else LARGE[name]
    assert serves(problem)
    arrays = {name: np.nan_to_num(x) for name, x in problem.arrays().items()}

    def run(arrays):
        return fused(problem.rank)(**arrays, **problem.window, return_lse=True, backend="native")

    compiled = jax.jit(run).lower(arrays).compile()
    for _ in range(3):
        poison = [jax.numpy.full((2**k,), jax.numpy.nan) for k in range(1, 22)]
        jax.block_until_ready(poison)
        del poison
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(compiled(arrays)))


@on_hopper
def test_many_calls_in_one_program():
    """Recorded in graphs, and again where addresses change."""

    def step(x):
        return 0.5 * jn.na2d(x, x, x, kernel_size=(3, 2), dilation=(1, 2), backend="native") + 0.1 * x

    @jax.jit
    def run(x):
        for _ in range(20):
            x = step(x)
        return x

    for seed in range(4):
        x = jax.random.normal(jax.random.key(seed), (2, 8, 9, 2, 64), jax.numpy.bfloat16)
        expected = x
        for _ in range(20):
            expected = jax.jit(step)(expected)
        assert_close(run(x), expected, factor=4)
