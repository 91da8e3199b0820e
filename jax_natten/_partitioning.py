"""Sharding: batch and heads may be sharded, everything else is whole on every device.

`partitioning` tells so to the partitioner of Auto meshes, `per_shard` does it by `shard_map` on Explicit ones, where
types tell the shardings. Both take the shardings from the first operand.

Layouts are strings with a term for each operand or result, one letter an axis:
    *       the leading batch axes, the same for every operand
    h, g    query heads, key heads
    others  axes that stay whole; a capital stands for one axis per spatial dimension
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ._compat import vary_alike
from ._version import __version__

# ---- shardings as part of types, on an Explicit mesh


def spec_of(aval: Any) -> tuple:
    """One entry an axis: the mesh axes that shard it, on an Explicit mesh."""
    return (*aval.sharding.spec, *(None,) * aval.ndim)[: aval.ndim]


def repeat(x: jax.Array, like: jax.Array, axis: int = 0) -> jax.Array:
    """`x` along a new leading axis, which is as long as that axis of `like` and sharded as it is.

    On an Explicit mesh an unsharded copy would make gradients gather what they should sum.
    """
    entry = spec_of(jax.typeof(like))[axis]
    shape = (like.shape[axis], *x.shape)
    if entry is None:
        return jnp.broadcast_to(x, shape)
    spec = P(entry, *spec_of(jax.typeof(x)))
    return jnp.broadcast_to(x, shape, out_sharding=NamedSharding(jax.typeof(like).sharding.mesh, spec))


def match(x: jax.Array, aval: Any) -> jax.Array:
    """A cotangent sharded as its primal is: on an Explicit mesh the sharding is part of the type."""
    return x if jax.typeof(x).sharding == aval.sharding else jax.reshard(x, aval.sharding)


# ---- shardings of an operation


def cache_tag(name: str, config: Any) -> np.ndarray:
    """Tells executables apart in the persistent compilation cache.

    The cache hashes a custom_partitioning call by a pointer, which is reused: without this constant the
    program of one window could be served for another.
    """
    digest = hashlib.sha256(repr((name, __version__, config)).encode()).digest()
    return np.frombuffer(digest[:16], np.int32)


class _Layouts:
    """The axes of operands and results by name, and how they lie on a mesh."""

    def __init__(self, operands: Sequence[str], results: Sequence[str], rank: int):
        self.operands, self.results = ([_axes(term, rank) for term in side] for side in (operands, results))
        self.terms = [*self.operands, *self.results]

    def sizes(self, axis: str, shapes: Sequence[tuple]) -> set[int]:
        """Sizes of the axis in arrays of these shapes, which are those of the operands, then of the results."""
        return {
            shape[term.index(axis) - len(term)] for term, shape in zip(self.terms, shapes, strict=True) if axis in term
        }

    def specs(self, spec: Sequence, shapes: Sequence[tuple], mesh_shape: Mapping[str, int]) -> list[P]:
        """Specs of operands and results: batch and heads as the first operand has them, in `spec`, the rest whole.

        The first operand's own spec, reused for the others, would give wrong numbers without an error.
        """
        first, shape = self.operands[0], shapes[0]
        spec = (*spec, *(None,) * len(shape))[: len(shape)]
        n_batch = len(shape) - len(first) + 1
        batch = [dividing(entry, {size}, mesh_shape) for entry, size in zip(spec[:n_batch], shape, strict=False)]
        sizes = self.sizes("h", shapes) | self.sizes("g", shapes)
        heads = dividing(spec[first.index("h") - len(first)], sizes, mesh_shape)

        def place(term):
            entries = (batch if axis == "*" else [heads if axis in "hg" else None] for axis in term)
            return P(*(entry for group in entries for entry in group))

        return [place(term) for term in self.terms]

    def rule(self, shapes: Sequence[tuple], mesh_shape: Mapping[str, int]) -> tuple[str, dict]:
        """The same as a Shardy rule, which tells the partitioner what to propagate.

        Grouped heads are a compound of the key's head and the head within its group. That is left out where a mesh
        axis does not divide the key heads: the partitioner would split the axis, which no spec can express.
        """
        factors, sizes = {"*": [f"b{i}" for i in range(len(shapes[0]) - len(self.operands[0]) + 1)]}, {}
        for heads in self.sizes("h", shapes):
            for key_heads in self.sizes("g", shapes):
                if heads == key_heads:
                    factors["g"] = ["h"]
                elif all(key_heads % size == 0 for size in mesh_shape.values()):
                    factors["h"], sizes = ["(g h)"], {"h": heads // key_heads}
        sides = [[factor for axis in term for factor in factors.get(axis, [axis])] for term in self.terms]
        free = {*factors["*"], "h", "g", "(g h)"}
        whole = dict.fromkeys(factor for side in sides for factor in side if factor not in free)
        arrays = [" ".join(side) for side in sides]
        text = ", ".join(arrays[: len(self.operands)]) + " -> " + ", ".join(arrays[len(self.operands) :])
        return text, {"need_replication_factors": tuple(whole), **sizes}


def partitioning(function: Callable, operands: Sequence[str], results: Sequence[str], rank: int) -> Callable:
    """`function(*operands)` under the partitioner, with one more operand: the cache's tag, which is dropped."""
    layouts = _Layouts((*operands, "t"), results, rank)
    split = len(layouts.operands)

    def shard(*xs):
        return function(*xs[:-1])

    def shapes(args, outs):
        return [x.shape for x in (*args, *outs)]

    def partition(mesh, args, outs):
        specs = layouts.specs(args[0].sharding.spec, shapes(args, outs), mesh.shape)
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        return mesh, shard, shardings[split:], tuple(shardings[:split])

    def rule(mesh, args, outs):
        return layouts.rule(shapes(args, outs), mesh.shape)

    partitioned = custom_partitioning(shard)
    partitioned.def_partition(partition, sharding_rule=rule)
    return partitioned


def per_shard(
    function: Callable, operands: Sequence[str], results: Sequence[str], rank: int, avals: Sequence[Any]
) -> Callable:
    """`function`, on an Explicit mesh run shard by shard: its steps then need no rules for sharded types.

    The results are sharded as `avals`, which are their types.
    """
    layouts = _Layouts(operands, results, rank)
    split = len(layouts.operands)

    def shard(*xs):
        return function(*vary_alike(xs))

    def run(*xs):
        first = jax.typeof(xs[0]).sharding
        kinds = zip(first.mesh.axis_names, first.mesh.axis_types, strict=True)
        axes = {name for name, kind in kinds if kind == AxisType.Explicit}
        if not axes:
            return function(*xs)
        specs = layouts.specs(first.spec, [x.shape for x in (*xs, *avals)], first.mesh.shape)
        xs = [jax.reshard(x, NamedSharding(first.mesh, spec)) for x, spec in zip(xs, specs, strict=False)]
        outs = jax.shard_map(
            shard, mesh=first.mesh, in_specs=tuple(specs[:split]), out_specs=specs[split:], axis_names=axes
        )(*xs)
        return [match(out, aval) for out, aval in zip(outs, avals, strict=True)]

    return run


def dividing(entry: Any, sizes: set[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...] | None:
    """The mesh axes of one entry of a spec, as many of the first ones as together divide all the sizes."""
    axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    for n in range(len(axes), 0, -1):
        if all(size % prod(mesh_shape[name] for name in axes[:n]) == 0 for size in sizes):
            return axes[:n]
    return None


def _axes(term: str, rank: int) -> list[str]:
    """One name an axis: a capital letter becomes `rank` names."""
    return [name for axis in term for name in ([f"{axis}{i}" for i in range(rank)] if axis.isupper() else [axis])]
