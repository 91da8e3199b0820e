"""Eight virtual CPU devices, strict dtype promotion, and float64 only for the tests that ask for it."""

import os

import jax
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share a GPU, of whose memory the first would take most
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Equal programs give equal bits: else each compilation would time several algorithms for a product on a GPU.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def on_cpu():
    """A test of what CPUs do, also where another platform is jax's default."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


@pytest.fixture
def accurate_products():
    """jax's own products to float32's accuracy, which they do not have by default on GPUs."""
    with jax.default_matmul_precision("float32"):
        yield


@pytest.fixture
def x64():
    """64-bit types for one test; everywhere else a float64 array would silently be float32, as for users."""
    with jax.enable_x64(True):
        yield
