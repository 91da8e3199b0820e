"""Meshes of devices, and which collectives a program holds."""

import re
from collections import Counter
from math import prod

import jax
from jax.sharding import AxisType, NamedSharding

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(
    kind: str | tuple[str, ...], shape: tuple = (2, 2), names: tuple = ("data", "model")
) -> jax.sharding.Mesh:
    """A mesh whose axes are "auto" or "explicit", all or one by one; of CPU devices where there are too few others."""
    kinds = (kind,) * len(shape) if isinstance(kind, str) else kind
    devices = jax.devices() if prod(shape) <= jax.device_count() else jax.devices("cpu")
    types = tuple(AXIS_TYPES[kind] for kind in kinds)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices[: prod(shape)])


def put(mesh, arrays, specs) -> tuple:
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True))


def run(mesh, function, *arguments):
    """What the compiled function returns, on the host, and its collectives: `{name: count}`."""
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
        return jax.device_get(compiled(*arguments)), collectives(compiled)


def collectives(compiled) -> dict[str, int]:
    return dict(Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())))
