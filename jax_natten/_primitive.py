"""How an operation becomes a jax primitive; its derivatives are added by `_fused` and `_unfused`.

`define` builds the chain
    outer primitive (derivatives, batching) -> custom_partitioning -> shard primitive -> FFI call or reference.
The outer primitive is what transforms see. Its lowering hands the partitioner one rule: batch axes and heads may
be sharded, everything else is replicated. On an Explicit mesh, where types tell the shardings, `shard_map` does the
same without the partitioner's callback, so that the program can be exported. The shard primitive is what runs on
one device.

Layouts are strings with a term for each operand or result, one letter an axis:
    *       the leading batch axes, the same for every operand
    h, g    query heads, key heads
    others  axes that stay whole; a capital stands for one axis per spatial dimension
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ._backends import KERNEL_PLATFORMS
from ._compat import Primitive, requires_devices, vary_alike, varying_axes
from ._version import __version__


def define(
    name: str,
    *,
    abstract: Callable,
    reference: Callable,
    operands: Sequence[str],
    results: Sequence[str],
    workspace: Callable = lambda *operands: (),
) -> Primitive:
    """The outer primitive of operation `name`.

    Args:
      name: the kernel's FFI target is `jax_natten_<name>`.
      abstract: (*operand avals, config) -> list of result avals, each made from an operand's aval with
        `shaped`, which keeps its sharding and varying axes.
      reference: (*operands, config) -> list of results, in pure JAX.
      operands, results: layouts; the first operand decides how batch and heads are sharded.
      workspace: (*operands) -> shapes and dtypes of further results that only the kernel uses.
    """
    outer, shard = Primitive(f"natten_{name}"), Primitive(f"natten_{name}_shard")

    def abstract_eval(*avals, config):
        if len({varying_axes(aval) for aval in avals}) != 1:
            raise ValueError(f"natten_{name}: operands vary over different mesh axes")
        return abstract(*avals, config=config)

    for primitive in (outer, shard):
        primitive.multiple_results = True
        primitive.def_abstract_eval(abstract_eval)
        bind = jax.jit(functools.partial(_bind, primitive), static_argnames="config")
        primitive.def_impl(jax.disable_jit(False)(bind))  # jit of a bind recurses without end where jit is off

    def run_kernel(*xs, config):
        if config.backend == "reference":
            return reference(*xs, config=config)
        outs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in abstract(*map(jax.typeof, xs), config=config)]
        call = jax.ffi.ffi_call(f"jax_natten_{name}", [*outs, *workspace(*xs)])
        return call(*xs, **config.attributes())[: len(outs)]

    def run_reference(*xs, config):
        if config.backend not in (None, "reference"):
            raise NotImplementedError(
                f"backend: {config.backend!r} has no kernels for this platform, which is served by 'reference'; "
                f"kernels exist for {', '.join(KERNEL_PLATFORMS)}"
            )
        return reference(*xs, config=config)

    for platform in KERNEL_PLATFORMS:
        mlir.register_lowering(shard, mlir.lower_fun(run_kernel, multiple_results=True), platform=platform)
    mlir.register_lowering(shard, mlir.lower_fun(run_reference, multiple_results=True))

    @functools.lru_cache  # one partitioning a config: as a static argument, config would leak tracers
    def partitioned(config):
        return _partitioning(functools.partial(shard.bind, config=config), operands, results, config.window.rank)

    def lower(*xs, config):
        kinds = set(jax.sharding.get_abstract_mesh().axis_types)
        bind = functools.partial(shard.bind, config=config)
        if AxisType.Explicit in kinds and AxisType.Auto not in kinds:  # shardings are known: no partitioner needed
            avals = abstract(*map(jax.typeof, xs), config=config)
            return per_shard(bind, operands, results, config.window.rank, avals)(*xs)
        if AxisType.Manual in kinds and len(kinds) > 1:
            return bind(*xs)  # partly manual: no NamedSharding would reach the partitioner's callback
        return partitioned(config)(*xs, _tag(name, config))

    mlir.register_lowering(outer, mlir.lower_fun(lower, multiple_results=True))
    requires_devices(outer)
    batching.primitive_batchers[outer] = functools.partial(_batch, outer)
    return outer


def shaped(aval: Any, shape: tuple, dtype: Any, spec: tuple) -> Any:
    """An aval with the mesh and varying axes of `aval` and its own shape, dtype and partition spec."""
    return aval.update(
        shape=shape, dtype=np.dtype(dtype), weak_type=False, sharding=aval.sharding.update(spec=P(*spec))
    )


def same(aval: Any) -> Any:
    """The aval of a result shaped, sharded and varying as an operand is."""
    return aval.update(weak_type=False)


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


def _bind(primitive: Primitive, *operands, config):
    return primitive.bind(*operands, config=config)


def _batch(primitive: Primitive, operands, dims, *, config):
    """A new leading batch axis, never a reshape: a sharded batch stays sharded."""
    mapped, axis = next((x, dim) for x, dim in zip(operands, dims, strict=True) if dim is not None)

    def lead(x, dim):
        return repeat(x, mapped, axis) if dim is None else jnp.moveaxis(x, dim, 0)

    outs = primitive.bind(*vary_alike(list(map(lead, operands, dims))), config=config)
    return outs, [0] * len(outs)


# ---- partitioning


def _tag(name: str, config: Any) -> np.ndarray:
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


def _partitioning(function: Callable, operands: Sequence[str], results: Sequence[str], rank: int) -> Callable:
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
