"""Runs Python programs of the tests in processes of their own, with the package and the tests importable."""

import os
import subprocess
import sys
from pathlib import Path

import jax_natten

PATHS = (Path(jax_natten.__file__).parents[1], Path(__file__).parent)


def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen:
    paths = [*map(str, PATHS), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *arguments],  # -P: not the sources that the tests may be run beside
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(processes: list[subprocess.Popen], timeout: float = 120) -> list[str]:
    """What each process prints; fails with its errors, and leaves none behind."""
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [out for out, _ in results]
