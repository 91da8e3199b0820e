"""Many calls from many threads at once: the kernels share one pool of threads, and must neither mix nor wait."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from subprocesses import outputs, start

THREADS, ROUNDS = 8, 6

PROGRAM = f"""
from test_threads import stress

stress({THREADS}, {ROUNDS})
"""


def stress(threads: int, rounds: int) -> None:
    """Every thread calls and differentiates its own problems on its own device and across all devices."""
    jax.config.update("jax_num_cpu_devices", 8)
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import jax_natten as jn

    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    windows = (3, 5, 7)

    def gradient(window):
        return jax.jit(jax.grad(lambda x: (jn.na2d(x, x, x, window) ** 2).sum()))

    functions = [gradient(window) for window in windows]
    inputs = [np.random.default_rng(i).normal(size=(8, 12, 12, 2, 8)).astype(np.float32) for i in range(threads)]
    expected = [[np.asarray(f(x)) for f in functions] for x in inputs]

    def work(thread):
        device = jax.devices()[thread % 8]
        placed = [jax.device_put(inputs[thread], to) for to in (device, NamedSharding(mesh, P("data")))]
        for turn in range(rounds):
            # All are started before the first is waited for.
            results = [f(x) for f in functions for x in placed]
            for i, result in enumerate(results):
                np.testing.assert_allclose(
                    np.asarray(result), expected[thread][i // 2], rtol=1e-5, atol=1e-4, err_msg=f"{thread} {turn}"
                )

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, thread) for thread in range(threads)]:
            future.result()


@pytest.mark.parametrize("pool", ["8", "1"])
def test_threads(pool):
    """In a process of its own, so that a hang fails the test; also where XLA's pool has a single thread."""
    outputs([start(PROGRAM, NPROC=pool)], timeout=180)
