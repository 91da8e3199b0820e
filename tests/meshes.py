"""Meshes of the virtual devices, and which collectives a program holds."""

import re
from collections import Counter

import jax
from jax.sharding import AxisType, NamedSharding

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def make_mesh(kind: str, shape: tuple = (2, 2), names: tuple = ("data", "model")) -> jax.sharding.Mesh:
    """A mesh whose axes are all "auto" or all "explicit"."""
    axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def put(mesh, arrays, specs) -> tuple:
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True))


def run(mesh, function, *arguments):
    """What the compiled function returns, on the host, and its collectives: `{name: count}`."""
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
        return jax.device_get(compiled(*arguments)), collectives(compiled)


def collectives(compiled) -> dict[str, int]:
    return dict(Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())))
