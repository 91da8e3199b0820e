"""Everything that depends on the versions of jax and jaxlib; the only module that may import `jax._src`.

Supported: jax 0.10.2 to 0.12. Each name below says where it lives and why it is needed.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering  # 0.10 to 0.12: no public name
from jax.extend.core import Primitive as Primitive


def requires_devices(primitive: Primitive) -> None:
    """Marks a primitive whose lowering goes through `custom_partitioning` (jax asserts without it)."""
    prim_requires_devices_during_lowering.add(primitive)


def varying_axes(aval: Any) -> frozenset:
    """The manual mesh axes over which a value varies inside a `shard_map`; empty elsewhere."""
    return aval.manual_axis_type.varying


def vary_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Gives all arrays the union of their varying axes: operands that differ would get wrong gradients.

    The transpose of the cast is the sum over the axes, so a replicated operand's gradient is right by itself.
    """
    axes = [varying_axes(jax.typeof(x)) for x in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def runtime_ffi_version() -> tuple[int, int]:
    """(major, minor) of the FFI API of the installed jaxlib, read from the header that it ships.

    jax's own version does not tell it: jax 0.12 accepts a jaxlib of 0.11.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("jax_natten needs jaxlib, which is not installed")
    header = Path(spec.submodule_search_locations[0], "include/xla/ffi/api/c_api.h").read_text()
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise ImportError("jax_natten cannot read the FFI API version in jaxlib's header c_api.h")
    return int(major[1]), int(minor[1])
