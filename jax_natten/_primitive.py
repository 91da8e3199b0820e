"""How an operation becomes a jax primitive; its derivatives are added by `_fused` and `_unfused`.

`define` builds the chain
    outer primitive (derivatives, batching) -> custom_partitioning -> shard primitive -> FFI call or reference.
The outer primitive is what transforms see. Its lowering hands the partitioner one rule: batch axes and heads may
be sharded, everything else is replicated. On an Explicit mesh, where types tell the shardings, `shard_map` does the
same without the partitioner's callback, so that the program can be exported. The shard primitive is what runs on
one device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching, mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ._backends import KERNEL_PLATFORMS
from ._compat import Primitive, requires_devices, vary_alike, varying_axes
from ._partitioning import cache_tag, partitioning, per_shard, repeat


def define(
    name: str,
    *,
    abstract: Callable,
    reference: Callable,
    operands: Sequence[str],
    results: Sequence[str],
    workspace: Callable = lambda results, *operands, platform: (),
    kernel_operands: Callable = lambda *operands, config: operands,
) -> Primitive:
    """The outer primitive of operation `name`.

    Args:
      name: the kernel's FFI target is `jax_natten_<name>`.
      abstract: (*operand avals, config) -> list of result avals, each made from an operand's aval with
        `shaped`, which keeps its sharding and varying axes.
      reference: (*operands, config) -> list of results, in pure JAX.
      operands, results: layouts (see `_partitioning`); the first operand decides how batch and heads are sharded.
      workspace: (results, *operands, platform) -> shapes and dtypes of further results that only the kernel uses.
      kernel_operands: (*operands, config) -> the operands as the kernel takes them. Results that the kernel then
        gives in another shape are placeholders, and 0.
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

    def run_kernel(platform, *xs, config):
        if config.backend == "reference":
            return reference(*xs, config=config)
        avals = abstract(*map(jax.typeof, xs), config=config)
        xs = kernel_operands(*xs, config=config)
        outs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in abstract(*map(jax.typeof, xs), config=config)]
        call = jax.ffi.ffi_call(f"jax_natten_{name}", [*outs, *workspace(outs, *xs, platform=platform)])
        results = call(*xs, **config.attributes())
        return [
            out if out.shape == aval.shape else jnp.zeros(aval.shape, aval.dtype)
            for out, aval in zip(results[: len(avals)], avals, strict=True)
        ]

    def run_reference(*xs, config):
        if config.backend not in (None, "reference"):
            raise NotImplementedError(
                f"backend: {config.backend!r} has no kernels for this platform, which is served by 'reference'; "
                f"kernels exist for {', '.join(KERNEL_PLATFORMS)}"
            )
        return reference(*xs, config=config)

    for platform in KERNEL_PLATFORMS:
        run = functools.partial(run_kernel, platform)
        mlir.register_lowering(shard, mlir.lower_fun(run, multiple_results=True), platform=platform)
    mlir.register_lowering(shard, mlir.lower_fun(run_reference, multiple_results=True))

    @functools.lru_cache  # one partitioning a config: as a static argument, config would leak tracers
    def partitioned(config):
        return partitioning(functools.partial(shard.bind, config=config), operands, results, config.window.rank)

    def lower(*xs, config):
        kinds = set(jax.sharding.get_abstract_mesh().axis_types)
        bind = functools.partial(shard.bind, config=config)
        if AxisType.Explicit in kinds and AxisType.Auto not in kinds:  # shardings are known: no partitioner needed
            avals = abstract(*map(jax.typeof, xs), config=config)
            return per_shard(bind, operands, results, config.window.rank, avals)(*xs)
        if AxisType.Manual in kinds and len(kinds) > 1:
            return bind(*xs)  # partly manual: no NamedSharding would reach the partitioner's callback
        return partitioned(config)(*xs, cache_tag(name, config))

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


def _bind(primitive: Primitive, *operands, config):
    return primitive.bind(*operands, config=config)


def _batch(primitive: Primitive, operands, dims, *, config):
    """A new leading batch axis, never a reshape: a sharded batch stays sharded."""
    mapped, axis = next((x, dim) for x, dim in zip(operands, dims, strict=True) if dim is not None)

    def lead(x, dim):
        return repeat(x, mapped, axis) if dim is None else jnp.moveaxis(x, dim, 0)

    outs = primitive.bind(*vary_alike(list(map(lead, operands, dims))), config=config)
    return outs, [0] * len(outs)
