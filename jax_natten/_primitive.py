"""How an operation becomes a jax primitive; its derivatives are added by `_fused` and `_unfused`.

`define` builds the chain
    outer primitive (derivatives, batching) -> custom_partitioning -> shard primitive -> FFI call or reference.
The outer primitive is what transforms see. Its lowering hands the partitioner one rule: batch axes and heads may
be sharded, everything else is replicated. The shard primitive is what runs on one device.

Layouts are strings with a term for each operand or result, one letter an axis:
    *       the leading batch axes, the same for every operand
    h, g    query heads, key heads
    others  axes that stay whole; a capital stands for one axis per spatial dimension
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ._compat import Primitive, requires_devices, vary_alike, varying_axes
from ._version import __version__

# Platforms with compiled kernels; elsewhere the reference runs.
KERNEL_PLATFORMS = ("cpu",)


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
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.manual_axes and set(mesh.manual_axes) != set(mesh.axis_names):
            return shard.bind(*xs, config=config)  # partly manual: no NamedSharding reaches the callback
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


def match(x: jax.Array, aval: Any) -> jax.Array:
    """A cotangent sharded as its primal is: on an Explicit mesh the sharding is part of the type."""
    return x if jax.typeof(x).sharding == aval.sharding else jax.reshard(x, aval.sharding)


def _bind(primitive: Primitive, *operands, config):
    return primitive.bind(*operands, config=config)


def _batch(primitive: Primitive, operands, dims, *, config):
    """A new leading batch axis, never a reshape: a sharded batch stays sharded."""
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)

    def lead(x, dim):
        return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)

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


def _partitioning(function: Callable, operands: Sequence[str], results: Sequence[str], rank: int) -> Callable:
    """`function(*operands)` under the partitioner, with one more operand: the cache's tag, which is dropped."""
    terms = [_axes(term, rank) for term in (*operands, "t", *results)]
    n_operands = len(operands) + 1
    first = terms[0]

    def shard(*xs):
        return function(*xs[:-1])

    def sizes(axis, values):
        return {
            value.shape[term.index(axis) - len(term)] for term, value in zip(terms, values, strict=True) if axis in term
        }

    def partition(mesh, args, outs):
        """Batch and heads as the first operand has them; a spec reused for the rest would give wrong numbers."""
        spec = (*args[0].sharding.spec, *(None,) * len(args[0].shape))[: len(args[0].shape)]
        batch = spec[: len(spec) - len(first) + 1]
        heads = spec[first.index("h") - len(first)]
        shards = prod(mesh.shape[name] for name in _mesh_axes(heads))
        if any(size % shards for axis in "hg" for size in sizes(axis, (*args, *outs))):
            heads = None

        def place(term):
            entries = (batch if axis == "*" else [heads if axis in "hg" else None] for axis in term)
            return NamedSharding(mesh, P(*(entry for group in entries for entry in group)))

        shardings = [place(term) for term in terms]
        return mesh, shard, shardings[n_operands:], tuple(shardings[:n_operands])

    def rule(mesh, args, outs):
        factors = {"*": [f"b{i}" for i in range(args[0].rank - len(first) + 1)]}
        if sizes("h", (*args, *outs)) == sizes("g", (*args, *outs)):
            factors["g"] = ["h"]
        sides = [[name for axis in term for name in factors.get(axis, [axis])] for term in terms]
        free = {*factors["*"], "h", "g"}
        whole = dict.fromkeys(name for side in sides for name in side if name not in free)
        sides = [" ".join(side) for side in sides]
        text = ", ".join(sides[:n_operands]) + " -> " + ", ".join(sides[n_operands:])
        return text, {"need_replication_factors": tuple(whole)}

    partitioned = custom_partitioning(shard)
    partitioned.def_partition(partition, sharding_rule=rule)
    return partitioned


def _axes(term: str, rank: int) -> list[str]:
    """One name an axis: a capital letter becomes `rank` names."""
    return [name for axis in term for name in ([f"{axis}{i}" for i in range(rank)] if axis.isupper() else [axis])]


def _mesh_axes(entry: Any) -> tuple:
    """The mesh axes in one entry of a partition spec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
