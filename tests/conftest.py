"""Eight virtual CPU devices, strict dtype promotion, and float64 only for the tests that ask for it."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def x64():
    """64-bit types for one test; everywhere else a float64 array would silently be float32, as for users."""
    with jax.enable_x64(True):
        yield
