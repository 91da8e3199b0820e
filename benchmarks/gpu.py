"""Times of the operations on a GPU as a model sees them, beside the rates of the chip and the alternatives.

Method: N calls are unrolled in one `jax.jit`. Between two calls, and between barriers that no fusion crosses, one
element of the first operand is overwritten in place by a sum of one element of every result: XLA can neither drop,
merge nor overlap calls or parts of their results, and all work on the same random data. The launch that this takes is
counted. Chains of N and 2N calls are timed in turn on the host's clock, after warm-up; (t(2N) - t(N)) / N, its median
over the repeats, is free of what a run costs once, dispatch and waiting. N calls take about 10 ms, but N is at most 10.
`backward` and `tangent` are the linear maps alone: what they need of forward is computed before.

Columns: TFLOP/s counts useful operations, on pairs of a query with a key that it sees. The floor is the larger of their
time on the plain multiply-add units and of that of the bytes, every operand read and every result written once, at the
rate of a copy; tensor cores can pass it. Then the alternatives, in brackets their time over ours: dense attention over
the flattened tokens by cuDNN (causal where the case is) and by XLA under the neighborhood's mask, timed in the same run
with --dense, and figures from elsewhere. Before the table, outputs are checked against NumPy at a few queries.

    python benchmarks/gpu.py --cases vit hr --operations forward backward --dense --json rows.jsonl
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, inf, prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jax_natten import flops, na1d, na1d_av, na1d_qk, na2d, na2d_av, na2d_qk, na3d, na3d_av, na3d_qk, window_indices

PLAIN_FLOPS = 66.9e12  # float32 multiply-adds of an H100 SXM: 132 processors, 128 lanes, 1.98 GHz
COPY_SIZE, MATMUL_SIZE = 2**28, 8192
MASKED_BYTES = 8e9  # limit on the logits of masked dense attention
TOLERANCE = {"bfloat16": 2e-2, "float16": 2e-2, "float32": 1e-4}

# How many products of queries with keys or the like; arrays of the query's shape, and of weights, read or written.
OPERATIONS = {"forward": (2, 4, 0), "backward": (5, 8, 0), "tangent": (5, 8, 0)}
OPERATIONS |= {"qk": (1, 2, 1), "av": (1, 2, 1), "inverse": (1, 2, 1)}


@dataclass(frozen=True)
class Case:
    """One problem: a query shape `[batch, *spatial, heads, head_dim]`, its window, its values and biases."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int = 1
    is_causal: bool = False
    value_dim: int | None = None
    rpb: bool = False

    @property
    def window(self) -> dict:
        return {name: getattr(self, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.shape[-1] if self.value_dim is None else self.value_dim)

    @property
    def weights_shape(self) -> tuple[int, ...]:
        batch, *spatial, heads, _ = self.shape
        return (batch, heads, *spatial, prod(self.kernel_size))

    def bounds(self, axis: int, coordinate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of the windows of coordinates on an axis, in positions of their dilation groups."""
        k, t, d = self.kernel_size[axis], np.broadcast_to(self.stride, len(self.kernel_size))[axis], self.dilation
        group, position = coordinate % d, coordinate // d
        length = -(-(self.shape[1 + axis] - group) // d)
        leader = np.minimum(position // t * t + (t - 1 if self.is_causal else t // 2), length - 1)
        if self.is_causal:
            return np.maximum(leader - k + 1, 0), position + 1
        start = np.clip(leader - k // 2, 0, length - k)
        return start, start + k


CASES = {
    "1d": Case((1, 32768, 24, 128), (2048,)),
    "1d_s": Case((1, 32768, 24, 128), (2048,), 256),
    "2d": Case((1, 256, 256, 24, 128), (80, 80)),
    "2d_s": Case((1, 256, 256, 24, 128), (80, 80), 16),
    "3d": Case((1, 30, 48, 80, 24, 128), (18, 24, 24)),
    "3d_s": Case((1, 30, 48, 80, 24, 128), (18, 24, 24), (16, 8, 8)),
    "3d64": Case((1, 30, 48, 80, 24, 64), (18, 24, 24)),
    "vit": Case((32, 56, 56, 4, 64), (7, 7)),
    "hr": Case((8, 128, 128, 8, 64), (13, 13)),
    "vit32": Case((32, 56, 56, 4, 32), (7, 7)),
    "vit96": Case((32, 56, 56, 4, 96), (7, 7)),
    "hr32": Case((8, 128, 128, 8, 32), (13, 13)),
    "hr96": Case((8, 128, 128, 8, 96), (13, 13)),
    "dil": Case((1, 32, 64, 64, 16, 128), (8, 8, 8), 1, 2),
    "dil64": Case((1, 32, 64, 64, 16, 64), (8, 8, 8), 1, 2),
    "nat": Case((64, 56, 56, 2, 32), (7, 7)),
    "causal": Case((1, 65536, 8, 128), (4096,), is_causal=True),
    "video": Case((1, 8, 64, 64, 8, 64), (4, 8, 8)),
    "vit80": Case((32, 56, 56, 4, 80), (7, 7)),
    "hr48": Case((8, 128, 128, 8, 48), (13, 13)),
    "latent": Case((1, 16384, 16, 192), (1024,), value_dim=128),
    "vit_rpb": Case((32, 56, 56, 4, 64), (7, 7), rpb=True),
    "hr_rpb": Case((8, 128, 128, 8, 64), (13, 13), rpb=True),
}
SMALL, DENSE_BACKWARD = ("nat", "vit", "hr", "dil64"), ("1d", "vit", "hr")

# From elsewhere, not measured by this file: ms on one H100 in bfloat16. FlexAttention with the neighborhood as its
# mask, tokens in raster order; NATTEN's operation, its kernel with the permutes around it.
ROWS = ("1d", "1d_s", "2d", "2d_s", "3d", "3d_s", "vit", "hr", "dil", "dil64")
ELSEWHERE = {
    ("flex_attention", "forward"): dict(zip(ROWS, (2.63, 2.24, 110, 136, 484, 538, 1.16, 5.55), strict=False)),
    ("natten", "forward"): dict(zip(ROWS, (2.22, 1.88, 18.3, 9.78, 76.1, 27.2, 0.477, 1.23, 7.82, 4.67), strict=True)),
    ("natten", "backward"): dict(zip(ROWS, (9.44, 9.02, 62.5, 52.2, 261, 145, 1.39, 3.61, 22.3, 12.6), strict=True)),
}


def milliseconds(function: Callable, operands: tuple, repeats: int) -> float:
    """Time of a call in a chain of calls, as above."""
    barrier = jax.lax.optimization_barrier

    @cache
    def chain(calls: int) -> Callable:
        def run(x, *others):
            for _ in range(calls):
                results = barrier(jax.tree.leaves(function(x, *others)))
                corner = 1e-3 * sum(y[(slice(1),) * y.ndim] for y in results)  # 1e-3: a chain never explodes
                x = barrier(jax.lax.dynamic_update_slice(x, corner, (0,) * x.ndim))
            return x

        return jax.jit(run)

    def wall(calls: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(chain(calls)(*operands))
        return (time.perf_counter() - begin) * 1e3

    wall(1)
    calls = min(10, ceil(10 / wall(1)))
    wall(calls), wall(2 * calls)
    return statistics.median((wall(2 * calls) - wall(calls)) / calls for _ in range(repeats))


def random(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def neighborhood(case: Case, backend: str | None) -> Partial:
    function = partial((na1d, na2d, na3d)[len(case.kernel_size) - 1], **case.window, backend=backend)
    return Partial(function, rpb=biases(case))


def biases(case: Case) -> jax.Array | None:
    shape = (case.shape[-2], *(2 * k - 1 for k in case.kernel_size))
    return jax.random.normal(jax.random.key(1), shape) if case.rpb else None


def fused(
    operation: str, attention: Partial, shapes: tuple[tuple[int, ...], ...], dtype: str
) -> tuple[Callable, tuple]:
    """A function and its operands, among which are the arrays that `attention` may hold; shapes of keys and values."""
    q, k, v = random(dtype, shapes[0], *shapes)
    if operation == "forward":
        return lambda q, k, v, attention: attention(q, k, v), (q, k, v, attention)
    if operation == "backward":
        _, pull = jax.vjp(jax.jit(attention), q, k, v)
        return lambda out_bar, pull: pull(out_bar), (v, pull)
    _, push = jax.linearize(jax.jit(attention), q, k, v)
    return lambda q_dot, k_dot, v_dot, push: push(q_dot, k_dot, v_dot), (q, k, v, push)


def unfused(operation: str, case: Case, dtype: str, backend: str | None) -> tuple[Callable, tuple]:
    qk, av = ((na1d_qk, na1d_av), (na2d_qk, na2d_av), (na3d_qk, na3d_av))[len(case.kernel_size) - 1]
    window = case.window | {"backend": backend}
    rows = (*case.weights_shape[:-1], case.shape[-1])
    x, y = random(dtype, rows, rows)
    if operation == "qk":
        return lambda q, k: qk(q, k, **window), (x, y)
    (attn,) = random(dtype, case.weights_shape[2:])  # of one head: the bits of a draw take several times its memory
    attn = jnp.broadcast_to(attn, case.weights_shape)
    if operation == "av":
        return lambda v, attn: av(attn, v, **window), (x, attn)
    return lambda x, attn: jax.linear_transpose(lambda v: av(attn, v, **window), x)(x), (x, attn)


def dense_milliseconds(case: Case, operation: str, masked: bool, dtype: str, repeats: int) -> float | None:
    """Time of jax's dense attention over the flattened tokens; None where it cannot run."""
    shapes = tuple((x[0], prod(x[1:-2]), *x[-2:]) for x in (case.shape, case.value_shape))
    shape = shapes[0]
    if masked and 4 * prod(shape[:3]) * shape[1] >= MASKED_BYTES or not masked and dtype == "float32":
        return None
    keywords = {"implementation": "xla"} if masked else {"implementation": "cudnn", "is_causal": case.is_causal}
    try:
        arrays = {"mask": mask(case)} if masked else {}
        attention = Partial(partial(jax.nn.dot_product_attention, **keywords), **arrays)
        return milliseconds(*fused(operation, attention, shapes, dtype), repeats)
    except Exception as error:  # limits of another library, which are many
        print(f"dense {operation}, {keywords}: {str(error)[:200]!r}", file=sys.stderr)
        return None


def mask(case: Case) -> jax.Array:
    """Whether a token sees another, `[1, 1, tokens, tokens]`."""
    spatial = case.shape[1:-2]
    coordinates, valid = window_indices(spatial, **case.window)
    queries, _ = np.nonzero(valid.reshape(prod(spatial), -1))
    sees = np.zeros((1, 1, prod(spatial), prod(spatial)), bool)
    sees[0, 0, queries, np.ravel_multi_index(tuple(coordinates[valid].T), spatial)] = True
    return jnp.asarray(sees)


def worst_error(case: Case, dtype: str, backend: str | None) -> float:
    """Largest error over the largest output of a query, of two corners and six random tokens; NaN where any is."""
    q, k, v = random(dtype, case.shape, case.shape, case.value_shape)
    out = jax.jit(neighborhood(case, backend))(q, k, v)
    table = biases(case)

    def error(batch: int, *coordinates: int) -> float:
        bounds = [case.bounds(axis, i) for axis, i in enumerate(coordinates)]
        window = [np.arange(*b) * case.dilation + i % case.dilation for b, i in zip(bounds, coordinates, strict=True)]
        query, found = (np.asarray(x[(batch, *coordinates)], np.float32) for x in (q, out))
        seen = np.ix_([batch], *window)
        keys, values = (np.asarray(x[seen], np.float32).reshape(-1, *x.shape[-2:]) for x in (k, v))
        logits = np.einsum("hd,nhd->nh", query, keys) * query.shape[-1] ** -0.5
        if table is not None:
            offsets = [
                w // case.dilation - i // case.dilation + k - 1
                for w, i, k in zip(window, coordinates, case.kernel_size, strict=True)
            ]
            logits += np.asarray(table[:, *np.ix_(*offsets)]).reshape(logits.shape[::-1]).T
        weights = np.exp(logits - logits.max(axis=0))
        expected = np.einsum("nh,nhd->hd", weights / weights.sum(axis=0), values)
        return np.abs(found - expected).max() / np.abs(expected).max()

    sizes = np.array(case.shape[:-2])
    tokens = [0 * sizes, sizes - 1, *np.random.default_rng(0).integers(sizes, size=(6, len(sizes)))]
    return float(np.max([error(*map(int, token)) for token in tokens]))


def machine(dtype: str, repeats: int) -> dict:
    """What the run is on, and the rates of its chip."""
    status, driver = subprocess.getstatusoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    ones, square = jnp.ones((COPY_SIZE,)), (MATMUL_SIZE, MATMUL_SIZE)
    copy = 2 * ones.nbytes / milliseconds(lambda x: x + 1, (ones,), repeats)
    matmul = partial(jnp.matmul, precision="highest" if dtype == "float32" else None)  # no TF32
    product = 2 * MATMUL_SIZE**3 / milliseconds(matmul, tuple(random(dtype, square, square)), repeats)
    device = dict(device=jax.devices()[0].device_kind, driver="unknown" if status else driver.split()[0])
    return device | dict(jax=jax.__version__, dtype=dtype, copy_tb_s=copy * 1e-9, matmul_tflop_s=product * 1e-9)


def measure(name: str, operation: str, options: argparse.Namespace, copy_rate: float) -> dict:
    """A row; its ms is missing where the operation does not fit in memory."""
    case, dtype, repeats = CASES[name], options.dtype, options.repeats
    products, arrays, weights = OPERATIONS[operation]
    useful = products * flops(case.shape, **case.window, value_dim=case.value_dim).forward / 2
    key_bytes, value_bytes, weights_bytes = (
        prod(s) * jnp.dtype(dtype).itemsize for s in (case.shape, case.value_shape, case.weights_shape)
    )
    array_bytes = (key_bytes + value_bytes) / 2
    floor = 1e3 * max(useful / PLAIN_FLOPS, (arrays * array_bytes + weights * weights_bytes) / copy_rate)
    row = dict(case=name, operation=operation, floor_ms=floor)
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", inf)
    if weights:
        if 4 * array_bytes + 2 * weights_bytes > memory:
            return row
        ms = milliseconds(*unfused(operation, case, dtype, options.backend), repeats)
    else:
        attention = neighborhood(case, options.backend)
        ms = milliseconds(*fused(operation, attention, (case.shape, case.value_shape), dtype), repeats)
    row |= dict(ms=ms, tflop_s=useful / ms * 1e-9, of_the_floor=ms / floor)
    if options.dense and (operation == "forward" or operation == "backward" and name in DENSE_BACKWARD):
        row["cudnn_ms"] = dense_milliseconds(case, operation, False, dtype, repeats)
        row["masked_ms"] = dense_milliseconds(case, operation, True, dtype, repeats)
    if dtype == "bfloat16":
        row |= {f"{who}_ms": ELSEWHERE.get((who, operation), {}).get(name) for who in ("flex_attention", "natten")}
    return row


def table_row(row: dict) -> str:
    if "ms" not in row:
        return f"| {row['case']} | {row['operation']} |" + " - |" * 8
    ours = "{case} | {operation} | {ms:.3f} | {tflop_s:.2f} | {floor_ms:.3f} | {of_the_floor:.2f}x".format(**row)
    others = map(row.get, ("cudnn_ms", "masked_ms", "flex_attention_ms", "natten_ms"))
    figures = ("-" if ms is None else f"{ms:.3g} ({ms / row['ms']:.2f}x)" for ms in others)
    return f"| {' | '.join((ours, *figures))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=SMALL)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of chains whose median is taken")
    parser.add_argument("--dense", action="store_true", help="also time dense attention")
    parser.add_argument("--json", metavar="PATH", help="append every row to this file, one a line")
    parser.add_argument("--backend", help="as na2d takes it")
    options = parser.parse_args()

    run = machine(options.dtype, options.repeats) | {"backend": options.backend}
    print("{device}, driver {driver}, jax {jax}, {dtype}, backend {backend}".format(**run), end=", ")
    print("copy {copy_tb_s:.2f} TB/s, matmul {matmul_tflop_s:.1f} TFLOP/s".format(**run), flush=True)
    for name in options.cases:
        error = worst_error(CASES[name], options.dtype, options.backend)
        print(f"{name}: relative error {error:.1e}", flush=True)
        if not error <= TOLERANCE[options.dtype]:
            raise SystemExit(f"{name}: the output is wrong, relative error over {TOLERANCE[options.dtype]:.0e}")

    print("\n| case | operation | ms | TFLOP/s | floor ms | of the floor", end="")
    print(" | cuDNN dense ms | masked dense ms | FlexAttention ms | NATTEN op ms |\n|" + " --- |" * 10, flush=True)
    for name in options.cases:
        for operation in options.operations:
            row = measure(name, operation, options, run["copy_tb_s"] * 1e12)
            print(table_row(row), flush=True)
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(run | row) + "\n")


if __name__ == "__main__":
    main()
