"""The kernels' tiles against brute force, those of GPUs too: their choice is host code and needs none.

What a tile's rows see together is found here by the definition of the window, one query at a time. How many pairs
the tiles visit decides how fast the kernels are, so a bad choice is a failure although no result would be wrong.
"""

import itertools
from functools import cache, reduce
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import axis_keys

_cpu = pytest.importorskip("jax_natten._cpu")

sides = pytest.mark.parametrize("rows_are_keys", [False, True], ids=["queries", "keys"])

# An axis is (size, kernel_size, stride, dilation, is_causal), and a problem a tuple of them.


@cache
def sees(axis):
    """`[query, key]`: whether the one sees the other."""
    result = np.zeros((axis[0], axis[0]), bool)
    for query in range(axis[0]):
        result[query, [key for key, _ in axis_keys(query, *axis).values()]] = True
    return result


def tiles_of(size, dilation, length):
    """The rows of every tile of a length; the last of a dilation group that is shorter than others may have none."""
    groups = [range(group, size, dilation) for group in range(min(dilation, size))]
    tiles = range(-(-len(groups[0]) // length))
    return [group[tile * length : (tile + 1) * length] for tile in tiles for group in groups]


def boxes(sees, dilation, length):
    """How many columns the rows of each tile see together."""

    def count(rows):
        columns = np.flatnonzero(sees[list(rows)].any(axis=0))
        return (columns[-1] - columns[0]) // dilation + 1 if columns.size else 0

    return np.array([count(rows) for rows in tiles_of(len(sees), dilation, length)])


# ---- what a tile sees along an axis

WINDOWS = [
    (k, t, d, causal)
    for k, d, causal in itertools.product((1, 2, 3, 4, 5, 8), (1, 2, 3), (False, True))
    for t in range(1, k + 1)
]
LENGTHS = (1, 2, 4, 8, 32)


def seen_together(queries, keys, window, rows_are_keys, length):
    rows = keys if rows_are_keys else queries
    tiles = tiles_of(rows, window[2], length)
    first = [tile.start for tile in tiles]
    return [_cpu.seen_together(queries, keys, *window, rows_are_keys, index, length) for index in first]


@sides
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_seen_together(window, rows_are_keys):
    """Exact for every tile: at borders, with strides, of dilation groups that are shorter than others."""
    shortest = window[0] * window[2]
    for size, length in itertools.product((shortest, shortest + 1, 37), LENGTHS):
        matrix = sees((size, *window))
        expected = boxes(matrix.T if rows_are_keys else matrix, window[2], length)
        found = seen_together(size, size, window, rows_are_keys, length)
        np.testing.assert_array_equal(found, expected, err_msg=f"{size} tokens, tiles of {length}")


@sides
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_seen_together_with_a_halo(window, rows_are_keys):
    """Fewer queries than keys, as in a shard with its neighbors' keys: exact where they are as many on both sides."""
    for halo, length in itertools.product((window[2], window[0] * window[2]), LENGTHS):
        matrix = sees((24 + 2 * halo, *window))[halo : 24 + halo]
        expected = boxes(matrix.T if rows_are_keys else matrix, window[2], length)
        found = seen_together(24, 24 + 2 * halo, window, rows_are_keys, length)
        np.testing.assert_array_equal(found, expected, err_msg=f"halo of {halo}, tiles of {length}")


@sides
@pytest.mark.parametrize("is_causal", [False, True])
def test_seen_together_far_from_borders(is_causal, rows_are_keys):
    for kernel_size, length in itertools.product((1, 2, 7, 8, 100), LENGTHS):
        window = kernel_size, 1, 1, is_causal
        assert _cpu.seen_together(1000, 1000, *window, rows_are_keys, 480, length) == kernel_size + length - 1


# ---- the choice


def choose(problem, rows_are_keys, tokens, columns):
    """(shape, tiles along the axes, estimated pairs), the first two with three axes."""
    spatial, *window = zip(*problem, strict=True)
    log_size, tiles, pairs = _cpu.tiling(spatial, spatial, *window, rows_are_keys, tokens, columns)
    return tuple(2**log for log in log_size), tiles, pairs


def in_three_axes(problem):
    return ((1, 1, 1, 1, False),) * (3 - len(problem)) + problem


def check_cover(problem, rows_are_keys, tokens):
    """Every row is in one tile, as blocks find theirs: by a number that tiles of an axis, then groups, divide."""
    shape, tiles, _ = choose(problem, rows_are_keys, tokens, 64)
    assert prod(shape) == tokens
    axes = in_three_axes(problem)
    sizes = [size for size, *_ in axes]
    groups = [min(dilation, size) for size, _, _, dilation, _ in axes]
    places = np.unravel_index(np.arange(prod(groups) * prod(tiles)), (*groups, *tiles))
    count = np.zeros(sizes, int)
    for steps in itertools.product(*map(range, shape)):
        index = []
        for a, (size, _, _, dilation, _) in enumerate(axes):
            assert (tiles[a] - 1) * shape[a] * dilation < size, "a tile without a row"
            group, tile = places[a], places[3 + a]
            index.append((tile * shape[a] + steps[a]) * dilation + group)
        exists = np.all([i < size for i, size in zip(index, sizes, strict=True)], axis=0)
        np.add.at(count, tuple(i[exists] for i in index), 1)
    assert (count == 1).all(), f"{problem}: {shape}"


@cache
def boxes_of_axis(axis, rows_are_keys, length):
    return boxes(sees(axis).T if rows_are_keys else sees(axis), axis[3], length)


def visited(problem, rows_are_keys, shape, columns):
    """The pairs that all tiles of a shape visit."""
    each = [boxes_of_axis(axis, rows_are_keys, length) for axis, length in zip(problem, shape, strict=True)]
    volumes = reduce(np.multiply.outer, each)
    return prod(shape) * columns * int(np.sum(-(-volumes // columns)))


def compare(problem, rows_are_keys, tokens, columns):
    """The estimate of the visited pairs, and the pairs of the best shape, both by those of the chosen shape."""
    shape, _, estimate = choose(problem, rows_are_keys, tokens, columns)
    axes = in_three_axes(problem)
    lengths = [2**i for i in range(tokens.bit_length())]
    shapes = [shape for shape in itertools.product(lengths, repeat=3) if prod(shape) == tokens]
    pairs = {shape: visited(axes, rows_are_keys, shape, columns) for shape in shapes}
    return estimate / pairs[shape], min(pairs.values()) / pairs[shape]


def plain(*sizes, kernel_size, stride=1, dilation=1, is_causal=False):
    return tuple((size, kernel_size, stride, dilation, is_causal) for size in sizes)


# Layers of models, and what else a window may be.
PROBLEMS = {
    "image": plain(56, 56, kernel_size=7),
    "image_28": plain(28, 28, kernel_size=7),
    "image_14": plain(14, 14, kernel_size=7),
    "one_window": plain(7, 7, kernel_size=7),
    "powers": plain(64, 64, kernel_size=8),
    "large_window": plain(128, 128, kernel_size=33),
    "fits_tiles": plain(64, 64, kernel_size=9),
    "dilated": plain(56, 56, kernel_size=7, dilation=8),
    "dilated_2": plain(56, 56, kernel_size=7, dilation=2),
    "dilated_unevenly": plain(59, 61, kernel_size=5, dilation=3),
    "strided": plain(64, 64, kernel_size=16, stride=4),
    "strided_oddly": plain(64, 60, kernel_size=8, stride=3),
    "blocks": plain(64, 64, kernel_size=8, stride=8),
    "causal_rows": plain(64, kernel_size=5, is_causal=True) + plain(48, kernel_size=9),
    "sequence": plain(1000, kernel_size=128),
    "causal_sequence": plain(1000, kernel_size=129, is_causal=True),
    "causal_strided_sequence": plain(1024, kernel_size=100, stride=24, is_causal=True),
    "dilated_sequence": plain(1001, kernel_size=50, dilation=20),
    "volume": plain(16, 16, 16, kernel_size=3),
    "volume_of_large_windows": plain(16, 16, 16, kernel_size=7),
    "video": plain(8, kernel_size=8, is_causal=True) + plain(32, 30, kernel_size=5),
    "strided_video": plain(30, kernel_size=18, stride=2) + plain(48, 80, kernel_size=24, stride=8),
    "whole_axis": plain(8, kernel_size=8) + plain(14, 14, kernel_size=7),
}

# (tokens of a tile of rows, columns at a time)
TILES = [(64, 64), (64, 16), (128, 64), (128, 32)]


@sides
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_row_is_in_one_tile(name, rows_are_keys):
    for tokens in (1, 64, 128):
        check_cover(PROBLEMS[name], rows_are_keys, tokens)


@sides
@pytest.mark.parametrize("name", PROBLEMS)
def test_pairs(name, rows_are_keys):
    """The estimate is good to 6 %, and no shape visits 2 % fewer pairs than the chosen one."""
    for tiles in TILES:
        estimate, best = compare(PROBLEMS[name], rows_are_keys, *tiles)
        assert abs(estimate - 1) < 0.06 and best > 0.98, (tiles, estimate, best)


def random_problem(rng):
    """Larger than a tile, with any window of up to half an axis."""
    rank = int(rng.integers(1, 4))
    axes = []
    for _ in range(rank):
        size = int(rng.integers(*((200, 1000), (24, 130), (10, 50))[rank - 1]))
        kernel_size = int(rng.integers(1, min(size // 2, (200, 24, 9)[rank - 1]) + 1))
        dilation = int(rng.integers(1, min(size // kernel_size, 3) + 1))
        stride = int(rng.integers(1, kernel_size + 1)) if rng.integers(2) else 1
        axes.append((size, kernel_size, stride, dilation, bool(rng.integers(2))))
    return tuple(axes)


@sides
def test_pairs_of_random_problems(rows_are_keys):
    """On average nothing is lost; a few problems, of axes not much longer than their windows, lose up to a fifth."""
    rng = np.random.default_rng(0)
    estimate, best = np.transpose([compare(random_problem(rng), rows_are_keys, *TILES[i % 4]) for i in range(400)])
    assert 1 - best.mean() < 0.003 and best.min() > 0.8
    assert abs(estimate - 1).mean() < 0.02 and abs(estimate - 1).max() < 0.25


@st.composite
def small_axes(draw):
    size = draw(st.integers(1, 40))
    kernel_size = draw(st.integers(1, size))
    dilation = draw(st.integers(1, size // kernel_size))
    return size, kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans())


steady = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@sides
@steady
@given(axis=small_axes(), length=st.sampled_from(LENGTHS))
def test_seen_together_on_small_axes(axis, length, rows_are_keys):
    size, *window = axis
    matrix = sees(axis)
    expected = boxes(matrix.T if rows_are_keys else matrix, axis[3], length)
    assert seen_together(size, size, window, rows_are_keys, length) == expected.tolist()


@sides
@steady
@given(problem=st.lists(small_axes(), min_size=1, max_size=3).map(tuple), tokens=st.sampled_from([1, 2, 16, 64, 128]))
def test_every_row_of_small_problems_is_in_one_tile(problem, tokens, rows_are_keys):
    check_cover(problem, rows_are_keys, tokens)


@sides
@pytest.mark.parametrize("queries, keys", [(0, 0), (0, 9), (9, 0)])
def test_no_tokens(queries, keys, rows_are_keys):
    _, tiles, pairs = _cpu.tiling([queries, 5], [keys, 5], [3, 3], [1, 1], [2, 1], [False, True], rows_are_keys, 64, 64)
    assert pairs == 0
    assert (prod(tiles) == 0) == ((keys if rows_are_keys else queries) == 0)
