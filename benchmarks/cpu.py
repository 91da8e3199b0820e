"""Rates of the CPU kernels beside the matrix-multiply rate of the same cores in the same run, and their memory.

Useful operations only are counted (`jax_natten.flops`), so the ratio to the matmul rate is what the kernels make of
the machine. Every figure is the best of its repeats; each number of threads and each instruction set has a process of
its own, which measures its own ceiling: jax's float32 matmul, or where an instruction set is forced NumPy's OpenBLAS
held to the same, since jax's cannot be.

The limit of a row is the share that its kernel would have if nothing took time but its arithmetic: the products of all
pairs that tiles visit, at the ceiling, and an exponential each. Peers are what a jax user has without this package:
`jax.nn.dot_product_attention` under the neighborhood's mask, and a gather of every neighborhood.

    python benchmarks/cpu.py [--cases NAME ...] [--threads 1 2] [--targets avx2 ...] [--json FILE] [--plot FILE]
"""

import argparse
import ctypes
import functools
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_natten as jn
from jax_natten import _cpu


@dataclass(frozen=True)
class Case:
    """One problem: a query shape `[batch, *spatial, heads, head_dim]` and its window."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: int = 1

    @property
    def window(self) -> dict:
        return {"kernel_size": self.kernel_size, "dilation": self.dilation}

    @property
    def spatial(self) -> tuple[int, ...]:
        return self.shape[1:-2]

    def operation(self, suffix: str = "") -> Callable:
        return getattr(jn, f"na{len(self.kernel_size)}d{suffix}")


CASES = {
    "1d 4096 w127": Case((1, 4096, 4, 32), (127,)),
    "2d 56x56 w7": Case((4, 56, 56, 4, 32), (7, 7)),
    "2d 56x56 w7 dilation 8": Case((4, 56, 56, 4, 32), (7, 7), 8),
    "2d 128x128 w13": Case((1, 128, 128, 4, 32), (13, 13)),
    "3d 8x32x32 w3x7x7": Case((1, 8, 32, 32, 4, 32), (3, 7, 7)),
    "3d 16x32x32 w5x9x9 d64": Case((1, 16, 32, 32, 4, 64), (5, 9, 9)),
}
MEMORY_CASE = Case((1, 256, 256, 4, 32), (13, 13))
PEER_BYTES = 1.5e9  # limit on a peer's largest array

# OpenBLAS's names of processors with these instruction sets and no more.
CORES = {"avx2": "Haswell", "baseline": "Nehalem"}

LEAST_SECONDS = 0.2  # of timed calls a figure
# Of a kernel's arithmetic beside its products: multiply-adds and the like that an exponential and its mask take.
EXPONENTIAL = 17


# ---- measuring


def seconds(function: Callable, *args, repeats: int) -> float:
    """The best time of a compiled call, after one to warm up.

    Of more calls than asked for where these are short: threads that another function's calls have left take a while
    to come to rest.
    """
    jax.block_until_ready(function(*args))
    times = []
    while len(times) < repeats or sum(times) < LEAST_SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return min(times)


def matmul_rate(repeats: int, size: int = 2048) -> float:
    """GFLOP/s of a float32 matrix product with this process's instruction set."""
    a, b = arrays((size, size), 2)
    if os.environ.get("JAX_NATTEN_CPU_TARGET") in CORES:
        a, b = np.asarray(a), np.asarray(b)
        return 2 * size**3 / seconds(np.matmul, a, b, repeats=repeats) / 1e9
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), a, b, repeats=repeats) / 1e9


def arrays(shape: tuple[int, ...], count: int, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(count)]


def forward_and_backward(case: Case) -> tuple[Callable, Callable]:
    """The operation, and the same with its gradients for a given cotangent."""

    def forward(query, key, value):
        return case.operation()(query, key, value, **case.window)

    def both(query, key, value, cotangent):
        out, pull = jax.vjp(forward, query, key, value)
        return out, *pull(cotangent)

    return jax.jit(forward), jax.jit(both)


def fused_rates(case: Case, dtype: str, repeats: int) -> dict[str, float]:
    """Useful GFLOP/s of forward, and of forward and backward together."""
    query, key, value, cotangent = arrays(case.shape, 4, dtype)
    forward, both = forward_and_backward(case)
    useful = jn.flops(case.shape, **case.window)
    return {
        "forward": useful.forward / seconds(forward, query, key, value, repeats=repeats) / 1e9,
        "forward+backward": sum(useful) / seconds(both, query, key, value, cotangent, repeats=repeats) / 1e9,
    }


def unfused_rates(case: Case, repeats: int) -> dict[str, float]:
    """The same of the unfused products and of their transpose, whose work is half of forward's."""
    query, key = (jnp.moveaxis(x, -2, 1) for x in arrays(case.shape, 2))
    qk, av = (jax.jit(functools.partial(case.operation(name), **case.window)) for name in ("_qk", "_av"))
    attn = jax.block_until_ready(qk(query, key))
    _, pull = jax.vjp(lambda value: av(attn, value), key)
    useful = jn.flops(case.shape, **case.window).forward / 2
    calls = {"qk": (qk, query, key), "av": (av, attn, key), "inverse": (jax.jit(pull), query)}
    return {name: useful / seconds(*call, repeats=repeats) / 1e9 for name, call in calls.items()}


def rates(names: list[str], repeats: int) -> dict:
    """Everything but peers and memory, of this process's threads and instruction set."""
    ceilings, rows = [matmul_rate(repeats)], {}
    for name in names:
        rows[name] = row = fused_rates(CASES[name], "float32", repeats)
        for dtype in ("bfloat16", "float16"):
            row |= {f"{key} {dtype}": rate for key, rate in fused_rates(CASES[name], dtype, repeats).items()}
        row |= unfused_rates(CASES[name], repeats)
        ceilings.append(matmul_rate(repeats))
    return {"target": _cpu.target(), "matmul": max(ceilings), "cases": rows}


def limit(case: Case) -> tuple[float, float]:
    """Pairs visited for each useful one, and with them the share of the ceiling that arithmetic allows forward."""
    dim = case.shape[-1]
    tokens, useful = math.prod(case.spatial), jn.flops(case.shape, **case.window).forward / 4 / dim
    pairs = useful / case.shape[0] / case.shape[-2]
    visited = _cpu.visited_pairs(case.spatial, case.kernel_size, case.dilation) / pairs
    assert pairs == tokens * math.prod(case.kernel_size)
    return visited, 1 / (visited * (1 + EXPONENTIAL / (2 * dim)))


# ---- peers


def neighborhoods(case: Case) -> np.ndarray:
    """`[tokens, slots]`: which keys every query sees."""
    found = jn.window_indices(case.spatial, **case.window)
    slots = math.prod(case.kernel_size)
    return np.ravel_multi_index(tuple(np.moveaxis(found.coordinates, -1, 0)), case.spatial).reshape(-1, slots)


def masked_dense(case: Case) -> Callable | None:
    tokens = math.prod(case.spatial)
    if 4 * case.shape[0] * case.shape[-2] * tokens**2 > PEER_BYTES:
        return None
    mask = np.zeros((tokens, tokens), bool)
    np.put_along_axis(mask, neighborhoods(case), True, axis=1)

    def run(query, key, value):
        rows = (x.reshape(x.shape[0], tokens, *x.shape[-2:]) for x in (query, key, value))
        return jax.nn.dot_product_attention(*rows, mask=mask[None, None])

    return run


def gather(case: Case) -> Callable | None:
    index, dim = neighborhoods(case), case.shape[-1]
    if 4 * case.shape[0] * index.size * case.shape[-2] * dim > PEER_BYTES:
        return None

    def run(query, key, value):
        rows = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
        query, key, value = rows
        logits = jnp.einsum("bthd,btwhd->bhtw", query, key[:, index]) * dim**-0.5
        return jnp.einsum("bhtw,btwhd->bthd", jax.nn.softmax(logits), value[:, index])

    return run


def peer_rates(names: list[str]) -> dict:
    """Useful GFLOP/s of forward by other means, None where they take too much memory."""
    rows: dict = {}
    for name in names:
        case = CASES[name]
        useful, inputs = jn.flops(case.shape, **case.window).forward, arrays(case.shape, 3)
        rows[name] = {}
        for peer in (masked_dense, gather):
            run = peer(case)
            time = run and seconds(jax.jit(run), *inputs, repeats=2)
            rows[name][peer.__name__] = time and useful / time / 1e9
    return rows


# ---- memory


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


# ---- the report


def in_process(function: Callable, *args, **environment: str):
    """The result of a call in a fresh process, with these variables set from its start."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(names: list[str], threads: int, target: str | None, repeats: int) -> dict:
    environment = {"NPROC": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    if target:
        environment |= {"JAX_NATTEN_CPU_TARGET": target}
        if target in CORES:
            environment |= {"OPENBLAS_CORETYPE": CORES[target]}
    return {"threads": threads, **in_process(rates, names, repeats, **environment)}


def show(run: dict) -> None:
    ceiling = run["matmul"]
    print(f"\n{run['target']}, {run['threads']} threads, float32 matmul {ceiling:.1f} GFLOP/s; GFLOP/s (share of it):")
    columns = list(next(iter(run["cases"].values())))
    print(" " * 24, *(f"{column.replace('forward', 'fwd').replace('backward', 'bwd'):>17}" for column in columns))
    for name, row in run["cases"].items():
        print(f"{name:24}", *(f"{f'{rate:.1f} ({rate / ceiling:.3f})':>17}" for rate in row.values()))


def show_limits(report: dict) -> None:
    print(f"\n{'':24} {'visited/useful':>16} {'limit of share':>16} {'reached':>9} {'masked dense':>13} {'gather':>8}")
    for name, (visited, share) in report["limits"].items():
        best = report["runs"][0]
        rate = best["cases"][name]["forward"]
        peers = [f"{rate / peer:.0f}x" if peer else "-" for peer in report["peers"].get(name, {}).values()]
        reached = rate / best["matmul"]
        print(f"{name:24} {visited:16.2f} {share:16.2f} {reached:9.3f}", *(f"{peer:>11}" for peer in peers))


def plot(report: dict, path: Path) -> None:
    """The share of the ceiling of every case, one group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    run = report["runs"][0]
    names = list(run["cases"])
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    limits = [report["limits"][name][1] for name in names]
    axes.bar(range(len(names)), limits, 0.8, color="0.9", label="limit of forward's arithmetic")
    for i, (column, color) in enumerate((("forward", "C0"), ("forward+backward", "C1"))):
        shares = [run["cases"][name][column] / run["matmul"] for name in names]
        axes.bar([at + 0.36 * i - 0.18 for at in range(len(names))], shares, 0.34, color=color, label=column)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8)
    axes.set_ylabel("useful rate / float32 matmul")
    axes.set_title(f"{run['target']}, {run['threads']} threads, matmul {run['matmul']:.0f} GFLOP/s", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="which rows (default: all)")
    parser.add_argument("--threads", nargs="*", type=int, default=[2, 1], help="how many (default: 2 1)")
    parser.add_argument("--targets", nargs="*", default=[None], help="instruction sets to force (default: the best)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls a figure, at least (default: 15)")
    parser.add_argument("--no-peers", action="store_true", help="do not time the alternatives")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw the shares of the first run")
    args = parser.parse_args()

    report: dict = {"jax": jax.__version__, "runs": []}
    for target in args.targets:
        for threads in args.threads:
            report["runs"].append(measure(args.cases, threads, target, args.repeats))
            show(report["runs"][-1])
    report["limits"] = {name: limit(CASES[name]) for name in args.cases}
    report["peers"] = {} if args.no_peers else in_process(peer_rates, args.cases)
    show_limits(report)
    if Path("/proc/self/clear_refs").exists():
        report["memory"] = {name: in_process(memory, name) for name in ("forward", "forward+backward")}
        figures = ", ".join(f"{key} {ratio:.2f}" for key, ratio in report["memory"].items())
        print(f"\npeak memory over inputs and outputs, 256x256 w13: {figures}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
