"""Rates of the CPU kernels beside the matrix-multiply rate of the same cores in the same run, and their memory.

Useful operations only are counted (`jax_natten.flops`), so the ratio to the matmul rate is what the kernels make of
the machine. Times are medians. Usage:

    python benchmarks/cpu.py [--cases NAME ...] [--repeats 7] [--json FILE]
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_natten import flops, na1d, na2d, na3d


@dataclass(frozen=True)
class Case:
    """One problem: a query shape `[batch, *spatial, heads, head_dim]` and its window."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: int = 1

    @property
    def operation(self) -> Callable:
        return (na1d, na2d, na3d)[len(self.kernel_size) - 1]


CASES = {
    "2d 56x56 w7": Case((4, 56, 56, 4, 32), (7, 7)),
    "2d 56x56 w7 dilation 8": Case((4, 56, 56, 4, 32), (7, 7), 8),
    "2d 128x128 w13": Case((1, 128, 128, 4, 32), (13, 13)),
    "1d 4096 w127": Case((1, 4096, 4, 32), (127,)),
    "3d 8x32x32 w3x7x7": Case((1, 8, 32, 32, 4, 32), (3, 7, 7)),
    "3d 16x32x32 w5x9x9 d64": Case((1, 16, 32, 32, 4, 64), (5, 9, 9)),
}
PASSES = ("forward", "forward+backward")
MEMORY_CASE = Case((1, 256, 256, 4, 32), (13, 13))


def seconds(function: Callable, *args, repeats: int) -> float:
    """Median time of a compiled call, after one to warm up."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matmul_rate(repeats: int, size: int = 2048) -> float:
    """GFLOP/s of a float32 matrix product."""
    a, b = arrays((size, size), 2)
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), a, b, repeats=repeats) / 1e9


def arrays(shape: tuple[int, ...], count: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(count)]


def forward_and_backward(case: Case) -> tuple[Callable, Callable]:
    """The operation, and the same with its gradients for a given cotangent."""

    def forward(query, key, value):
        return case.operation(query, key, value, case.kernel_size, dilation=case.dilation)

    def both(query, key, value, cotangent):
        out, pull = jax.vjp(forward, query, key, value)
        return out, *pull(cotangent)

    return jax.jit(forward), jax.jit(both)


def rates(case: Case, repeats: int) -> dict[str, float]:
    """Useful GFLOP/s of forward, and of forward and backward together."""
    query, key, value, cotangent = arrays(case.shape, 4)
    forward, both = forward_and_backward(case)
    useful = flops(case.shape, case.kernel_size, dilation=case.dilation)
    return {
        "forward": useful.forward / seconds(forward, query, key, value, repeats=repeats) / 1e9,
        "forward+backward": sum(useful) / seconds(both, query, key, value, cotangent, repeats=repeats) / 1e9,
    }


def memory(name: str) -> float:
    """Peak memory of a call over that of its inputs and outputs; needs Linux with glibc and a process of its own."""
    inputs = jax.block_until_ready(arrays(MEMORY_CASE.shape, 4))
    size = inputs[0].nbytes
    function, n_inputs, n_outputs = {
        "forward": (forward_and_backward(MEMORY_CASE)[0], 3, 1),
        "forward+backward": (forward_and_backward(MEMORY_CASE)[1], 4, 4),
    }[name]
    compiled = function.lower(*inputs[:n_inputs]).compile()
    before, peak = peak_growth(compiled, inputs[:n_inputs])
    return (n_inputs * size + peak - before) / ((n_inputs + n_outputs) * size)


def peak_growth(function: Callable, args: list[jax.Array]) -> tuple[int, int]:
    """Resident bytes before a call and their peak during it."""
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed, so that the call cannot reuse it unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = resident_bytes("VmRSS")
    jax.block_until_ready(function(*args))
    return before, resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="which rows (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls a figure (default: 7)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    ceiling = matmul_rate(args.repeats)
    report: dict = {"jax": jax.__version__, "matmul GFLOP/s": ceiling, "cases": {}}
    print(f"jax {jax.__version__}, float32 matmul {ceiling:.1f} GFLOP/s; useful GFLOP/s (share of matmul):")
    for name in args.cases:
        row = report["cases"][name] = rates(CASES[name], args.repeats)
        print(f"  {name:24}", *(f"{key} {rate:6.2f} ({rate / ceiling:.3f})" for key, rate in row.items()), sep="  ")
    if Path("/proc/self/clear_refs").exists():
        fresh = ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1)  # nothing freed to reuse
        report["memory"] = dict(zip(PASSES, fresh.map(memory, PASSES), strict=True))
        figures = ", ".join(f"{key} {ratio:.2f}" for key, ratio in report["memory"].items())
        print(f"  peak memory over inputs and outputs, 256x256 w13: {figures}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
