"""The check that the kernels' FFI version suits the installed jaxlib, and what depends on the version of jax."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

from jax_natten import _backends, _compat


def test_runtime_version_is_that_of_a_supported_jaxlib():
    major, minor = _compat.runtime_ffi_version()
    assert major == 0 and minor >= 3


@pytest.mark.parametrize("built", [(0, 99), (1, 0)])
def test_newer_kernels_are_refused_before_they_are_registered(monkeypatch, built):
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **kwargs: registered.append(args))
    monkeypatch.setattr("jax_natten._cpu.ffi_api_version", lambda: built)
    installed = ".".join(map(str, _compat.runtime_ffi_version()))
    with pytest.raises(ImportError, match=re.escape(f"API {built[0]}.{built[1]}") + f".*{re.escape(installed)}"):
        _backends.register()
    assert registered == []


@pytest.mark.parametrize("header", ["", "#define XLA_FFI_API_MAJOR 0\n"])
def test_unreadable_version(monkeypatch, tmp_path, header):
    path = tmp_path / "include/xla/ffi/api/c_api.h"
    path.parent.mkdir(parents=True)
    path.write_text(header)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(_compat.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match="FFI API version"):
        _compat.runtime_ffi_version()


def test_no_jaxlib(monkeypatch):
    monkeypatch.setattr(_compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="jaxlib"):
        _compat.runtime_ffi_version()


def test_vary_alike():
    """Inside shard_map, operands that vary over different axes get the union, elsewhere nothing changes."""
    x = jnp.ones(4)
    assert _compat.vary_alike([x, x])[0] is x
    seen = []

    def shard(x, y):
        seen.extend(_compat.varying_axes(jax.typeof(z)) for z in _compat.vary_alike([x, y]))
        return x

    jax.eval_shape(jax.shard_map(shard, mesh=make_mesh("auto"), in_specs=(P("data"), P()), out_specs=P("data")), x, x)
    assert seen == [frozenset({"data"})] * 2
