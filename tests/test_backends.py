"""What `backends` tells, what `backend=` and `precision=` do, and registration."""

from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PROBLEMS, fused
from tolerances import assert_close

import jax_natten as jn
from jax_natten import _backends

FOREIGN = "tpu"  # a platform that jax lowers for and that has no kernels


def arrays():
    return tuple(map(jnp.asarray, PROBLEMS["plain"].arrays().values()))


def test_backends():
    found = jn.backends()
    assert list(found) == ["native", "reference"]
    assert found["reference"].available
    assert all(isinstance(backend.detail, str) and backend.detail for backend in found.values())


@pytest.mark.parametrize(("platform", "available"), [("cpu", True), (FOREIGN, False)])
def test_platforms(monkeypatch, platform, available):
    """Where the compiled kernels cannot run, the detail names the platform and those that have them."""
    client = SimpleNamespace(platform=platform, platform_version=platform)
    monkeypatch.setattr(jax.extend.backend, "get_backend", lambda: client)
    native = jn.backends()["native"]
    assert native.available is available
    assert platform in native.detail.lower() and "cpu" in native.detail.lower()


def program(backend, platform):
    """The text of the compiled program, or of the lowered one where the platform is not here."""
    run = jax.jit(lambda *xs: jn.na1d(*xs, 3, backend=backend))
    if platform == "cpu":
        return run.lower(*arrays()).compile().as_text()
    return run.trace(*arrays()).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("backend", "platform", "kernels"),
    [
        (None, "cpu", True),
        ("native", "cpu", True),
        ("reference", "cpu", False),
        (None, FOREIGN, False),
        ("reference", FOREIGN, False),
    ],
)
def test_what_runs_where(backend, platform, kernels):
    """Kernels where they exist, unless the reference is asked for."""
    assert ("jax_natten_forward" in program(backend, platform)) is kernels


def test_native_where_there_are_no_kernels():
    with pytest.raises(
        NotImplementedError, match=r"backend: 'native' .*served by 'reference'; kernels exist for .*cpu"
    ):
        run = jax.jit(lambda *xs: jn.na1d(*xs, 3, backend="native"))
        jax.export.export(run, platforms=[FOREIGN])(*arrays())


@pytest.mark.parametrize("name", ["grouped", "lengths", "all_borders"])
def test_backends_agree(name):
    problem = PROBLEMS[name]
    native, reference, default = (
        fused(problem.rank)(**problem.arrays(), **problem.window, return_lse=True, backend=backend)
        for backend in ("native", "reference", None)
    )
    for a, b, c in zip(native, reference, default, strict=True):
        assert_close(a, b)
        np.testing.assert_array_equal(a, c)  # on a CPU the default is native


@pytest.mark.parametrize("precision", [None, "default", "high", "highest", "float32", jax.lax.Precision.HIGHEST])
def test_precision(precision):
    """A low one changes nothing on a CPU; a GPU may round to TF32, of three bits more than bfloat16."""
    x = PROBLEMS["plain"].arrays()
    expected = jn.na1d(**x, kernel_size=3)
    actual = jn.na1d(**x, kernel_size=3, precision=precision)
    if precision in ("default", "high") and jax.default_backend() == "gpu":
        assert_close(actual, expected, dtype="bfloat16")
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("ambient", ["default", "highest", "float32", "bfloat16", "tensorfloat32", "BF16_BF16_F32"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ambient_precision(ambient, backend):
    """Every name that jax takes is understood."""
    x = PROBLEMS["plain"].arrays()
    expected = jn.na1d(**x, kernel_size=3)
    with jax.default_matmul_precision(ambient):
        assert_close(jn.na1d(**x, kernel_size=3, backend=backend), expected, dtype="bfloat16")


@pytest.mark.parametrize("deterministic", [None, True, False, np.True_])
def test_the_same_bits_every_time(deterministic):
    x = PROBLEMS["everything"].arrays()
    window = PROBLEMS["everything"].window
    first, second = (jn.na3d(**x, **window, deterministic=deterministic) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("installed", [(0, 0), (0, 1)])
def test_a_runtime_older_than_the_build_is_refused(monkeypatch, installed):
    """Registering would break all of jax at its first use."""
    monkeypatch.setattr(_backends, "runtime_ffi_version", lambda: installed)
    with pytest.raises(ImportError, match=rf"provides {installed[0]}\.{installed[1]}: install a newer jaxlib"):
        _backends.register()


def test_registering_twice_does_no_harm():
    _backends.register()
    assert jn.na1d(*arrays(), 3).shape == (2, 11, 2, 4)
