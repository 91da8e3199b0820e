"""Times of the CUDA kernels beside the time that their work would take at the rates of the chip.

The floor of an operation is the larger of two times: its arithmetic (`jax_natten.flops` and the like: useful
operations only) at the rate of the plain multiply-add units, and its bytes (every operand read once, every result
written once) at the rate at which a copy moves bytes. Times are medians over repeats of several calls in a row, so
that the cost of a launch is hidden. Usage:

    python benchmarks/gpu.py [--cases NAME ...] [--operations NAME ...] [--dtype bfloat16] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from jax_natten import flops, na1d, na1d_av, na1d_qk, na2d, na2d_av, na2d_qk, na3d, na3d_av, na3d_qk

PLAIN_FLOPS = 66.9e12  # float32 multiply-adds of an H100 SXM: 132 processors, 128 lanes, 1.98 GHz


@dataclass(frozen=True)
class Case:
    """One problem: a query shape `[batch, *spatial, heads, head_dim]` and its window."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int = 1

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def window(self) -> dict:
        return dict(kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation)

    @property
    def product_flops(self) -> float:
        """Of one product of queries and keys."""
        return 2.0 * prod(self.shape) * prod(self.kernel_size)

    @property
    def weights_shape(self) -> tuple[int, ...]:
        batch, *spatial, heads, _ = self.shape
        return (batch, heads, *spatial, prod(self.kernel_size))


CASES = {
    "1d": Case((1, 32768, 24, 128), (2048,)),
    "1d_s": Case((1, 32768, 24, 128), (2048,), 256),
    "2d": Case((1, 256, 256, 24, 128), (80, 80)),
    "2d_s": Case((1, 256, 256, 24, 128), (80, 80), 16),
    "3d": Case((1, 30, 48, 80, 24, 128), (18, 24, 24)),
    "3d_s": Case((1, 30, 48, 80, 24, 128), (18, 24, 24), (16, 8, 8)),
    "vit": Case((32, 56, 56, 4, 64), (7, 7)),
    "hr": Case((8, 128, 128, 8, 64), (13, 13)),
    "dil": Case((1, 32, 64, 64, 16, 128), (8, 8, 8), 1, 2),
    "dil64": Case((1, 32, 64, 64, 16, 64), (8, 8, 8), 1, 2),
}
SMALL = ("vit", "hr", "dil64")


def heads_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -2, 1)


@dataclass(frozen=True)
class Work:
    """A compiled function, its operands, and what it has to do."""

    function: Callable
    operands: tuple
    flops: float
    bytes: float


def bytes_of(*arrays) -> float:
    return float(sum(prod(x.shape) * x.dtype.itemsize for x in arrays))


def work(operation: str, case: Case, dtype: str) -> Work:
    q, k, v = (jax.random.normal(key, case.shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
    fused = (na1d, na2d, na3d)[case.rank - 1]
    qk = (na1d_qk, na2d_qk, na3d_qk)[case.rank - 1]
    av = (na1d_av, na2d_av, na3d_av)[case.rank - 1]

    def attention(q, k, v):
        return fused(q, k, v, **case.window)

    if operation == "forward":
        useful = flops(case.shape, **case.window).forward
        return Work(jax.jit(attention), (q, k, v), useful, bytes_of(q, k, v, q))
    if operation == "backward":
        useful = flops(case.shape, **case.window).backward
        _, pull = jax.vjp(attention, q, k, v)
        return Work(jax.jit(lambda pull, out_bar: pull(out_bar)), (pull, q), useful, 8 * bytes_of(q))
    q, k, v = map(heads_first, (q, k, v))
    weights = jax.ShapeDtypeStruct(case.weights_shape, jnp.dtype(dtype))
    if operation == "qk":
        function = jax.jit(lambda q, k: qk(q, k, **case.window))
        return Work(function, (q, k), case.product_flops, bytes_of(q, k, weights))
    attn = jax.random.normal(jax.random.key(1), weights.shape, dtype)
    if operation == "av":
        function = jax.jit(lambda attn, v: av(attn, v, **case.window))
        return Work(function, (attn, v), case.product_flops, bytes_of(weights, v, q))
    if operation == "inverse":
        function = jax.jit(lambda attn, x, like: jax.linear_transpose(lambda v: av(attn, v, **case.window), like)(x))
        return Work(function, (attn, q, v), case.product_flops, bytes_of(weights, v, q))
    raise ValueError(f"operation: expected one of {OPERATIONS}, got {operation!r}")


OPERATIONS = ("forward", "backward", "qk", "av", "inverse")


def milliseconds(function: Callable, operands: tuple, repeats: int) -> float:
    """Median time of a call; enough calls in a row to take 20 ms."""
    jax.block_until_ready(function(*operands))

    def run(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            out = function(*operands)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) * 1e3 / calls

    calls = max(1, min(50, int(20 / run(1))))
    return statistics.median(run(calls) for _ in range(repeats))


def copy_bytes_per_second(repeats: int) -> float:
    x = jnp.ones((2**28,), jnp.float32)
    return 2 * bytes_of(x) / (milliseconds(jax.jit(lambda x: x + 1), (x,), repeats) * 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(SMALL))
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    device = jax.devices()[0]
    bandwidth = copy_bytes_per_second(options.repeats)
    print(f"{device.device_kind}, jax {jax.__version__}, {options.dtype}, copy {bandwidth * 1e-12:.2f} TB/s\n")
    print("| case | operation | ms | TFLOP/s | floor ms | of the floor |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.cases:
        for operation in options.operations:
            todo = work(operation, CASES[name], options.dtype)
            ms = milliseconds(todo.function, todo.operands, options.repeats)
            floor = 1e3 * max(todo.flops / PLAIN_FLOPS, todo.bytes / bandwidth)
            print(
                f"| {name} | {operation} | {ms:.3f} | {todo.flops / ms * 1e-9:.2f} | {floor:.3f} | {ms / floor:.1f}x |"
            )


if __name__ == "__main__":
    main()
