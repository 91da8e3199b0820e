"""The fused triple: forward, its tangent, and the tangent's transpose, backward.

    forward(query, key, value, bias, frame) -> out, lse
    tangent(query, key, value, bias, frame, out, lse; query', key', value', bias') -> out', lse'
    backward(query, key, value, bias, frame, out, lse; out_bar, lse_bar) -> query_bar, key_bar, value_bar, bias_bar

Tangent and backward are linear in what follows the semicolon and each other's transpose, so forward and reverse
mode come from one rule: forward's JVP binds tangent, and reverse mode transposes it to backward without ever
running it. Their own JVPs, which second and higher orders need, are those of the reference.

Layouts: query `[*batch, *spatial, heads, dim]`, key and value alike with their own spatial shape, heads and dim;
bias `[*batch, heads, *offsets]`, of one entry per axis where there is none; frame int32 `[*batch, 5, rank]`. The bias
carries the batch so that the sum of its gradient over a sharded batch is jax's own reduction. out has the query's
dtype, lse and bias the accumulation dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from . import _reference as reference
from ._compat import vary_alike
from ._config import FusedConfig
from ._partitioning import match, per_shard, repeat, spec_of
from ._primitive import define, same, shaped
from ._window import Window

# What a `checkpoint` policy may save: the results of forward, which backward reads.
OUT_NAME, LSE_NAME = "natten_out", "natten_lse"

QUERY, KEY, VALUE, BIAS, FRAME = "*Ihd", "*Jgd", "*Jge", "*hO", "*fr"
OUT, LSE = "*Ihe", "*Ih"
PRIMALS = (QUERY, KEY, VALUE, BIAS, FRAME)
RESIDUALS = (*PRIMALS, OUT, LSE)
FRAME_AT = PRIMALS.index(FRAME)

# Parts of all bias gradients together, where there are fewer tables: enough to fill a GPU.
TABLE_SUMS = 512

# Operands and results.
TANGENT = (*RESIDUALS, QUERY, KEY, VALUE, BIAS), (OUT, LSE)
BACKWARD = (*RESIDUALS, OUT, LSE), (QUERY, KEY, VALUE, BIAS)


# ---- abstract evaluation


def _forward_avals(query, key, value, bias, frame, *, config):
    spec = spec_of(query)[:-1]
    out = shaped(query, (*query.shape[:-1], value.shape[-1]), query.dtype, (*spec, None))
    return [out, shaped(query, query.shape[:-1], bias.dtype, spec)]


def _tangent_avals(query, key, value, bias, frame, out, lse, *dots, config):
    return [same(out), same(lse)]


def _backward_avals(query, key, value, bias, frame, out, lse, *bars, config):
    return [same(query), same(key), same(value), same(bias)]


def _backward_workspace(results, query, key, value, bias, frame, out, lse, *bars, platform):
    """What kernels keep of their own.

    On GPUs lse_bar - out_bar . out of every query, and the parts in which they sum bias_bar. On CPUs the sums of
    key_bar and value_bar where their dtype is too narrow for them.
    """
    rank = frame.shape[-1]
    batch, leading, offsets = frame.shape[:-2], bias.shape[: bias.ndim - rank], bias.shape[bias.ndim - rank :]
    on_gpu, (_, key_bar, value_bar, _) = platform == "cuda", results
    # Rounded up: at least 1, of a symbolic batch too.
    parts = -(-TABLE_SUMS // max(math.prod(leading), 1)) if on_gpu else 0
    sums = 0 if on_gpu or key_bar.dtype == bias.dtype else 1

    def keep(count, like):
        return jax.ShapeDtypeStruct((*batch, count, *like.shape[len(batch) :]), bias.dtype)

    return (
        keep(int(on_gpu), lse),
        jax.ShapeDtypeStruct((*leading, parts, *offsets), bias.dtype),
        keep(sums, key_bar),
        keep(sums, value_bar),
    )


# ---- what the kernels take


def _kernel_operands(layouts, *operands, config: FusedConfig):
    """The bias that stands for none becomes an empty table, which is what tells the kernels so.

    It is not empty before: an empty array that crosses a shard_map crashes the compiler of jaxlib 0.11.
    """

    def view(x, layout):
        placeholder = layout == BIAS and not config.window.has_bias(x)
        return x[(..., *(slice(0),) * config.window.rank)] if placeholder else x

    return [view(x, layout) for x, layout in zip(operands, layouts, strict=True)]


# ---- primitives

forward_p = define(
    "forward",
    abstract=_forward_avals,
    reference=reference.forward,
    operands=PRIMALS,
    results=(OUT, LSE),
    kernel_operands=functools.partial(_kernel_operands, PRIMALS),
)
tangent_p = define(
    "tangent",
    abstract=_tangent_avals,
    reference=reference.tangent,
    operands=TANGENT[0],
    results=TANGENT[1],
    kernel_operands=functools.partial(_kernel_operands, TANGENT[0]),
)
backward_p = define(
    "backward",
    abstract=_backward_avals,
    reference=reference.backward,
    operands=BACKWARD[0],
    results=BACKWARD[1],
    workspace=_backward_workspace,
    kernel_operands=functools.partial(_kernel_operands, BACKWARD[0]),
)


def bias_operand(table: jax.Array | None, query: jax.Array, window: Window) -> jax.Array:
    """The bias that the primitives take, `[batch, heads, *offsets]`, from `[heads, *offsets]` or None."""
    batch, heads = query.shape[0], query.shape[-2]
    dtype = reference.accumulation_dtype(query.dtype)
    if table is None:
        return jnp.zeros((batch, heads, *(1,) * window.rank), dtype)
    return repeat(table.astype(dtype), query)


def bind_forward(operands: tuple, config: FusedConfig) -> list[jax.Array]:
    """out and lse of `(query, key, value, bias, frame)`."""
    return forward_p.bind(*vary_alike(operands), config=config)


# ---- derivatives


def _forward_jvp(primals, tangents, *, config: FusedConfig):
    out, lse = forward_p.bind(*primals, config=config)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    dots = map(ad.instantiate_zeros, tangents[:4])
    return [out, lse], tangent_p.bind(*primals, out, lse, *dots, config=config)


def _transpose(dual, cotangents, *operands, config: FusedConfig):
    """The transpose of tangent is backward, and the other way round; both are linear in what follows lse."""
    residuals, linear = operands[: len(RESIDUALS)], operands[len(RESIDUALS) :]
    bars = dual.bind(*residuals, *map(ad.instantiate_zeros, cotangents), config=config)
    bars = [match(bar, x.aval) if ad.is_undefined_primal(x) else None for bar, x in zip(bars, linear, strict=True)]
    return [None] * len(residuals) + bars


def _linear_jvp(primitive, function, operands, results, primals, tangents, *, config: FusedConfig):
    """JVP of tangent and backward: the kernel where only the linear operands move, the reference's JVP otherwise."""
    outs = primitive.bind(*primals, config=config)
    residuals = len(RESIDUALS)
    if all(type(dot) is ad.Zero for dot in _moving(tangents[:residuals])):
        dots = map(ad.instantiate_zeros, tangents[residuals:])
        return outs, primitive.bind(*primals[:residuals], *dots, config=config)

    def derivative(*xs):
        primals, dots = xs[: len(operands)], xs[len(operands) :]
        frame = primals[FRAME_AT]

        def at(*moving):
            return function(*moving[:FRAME_AT], frame, *moving[FRAME_AT:], config=config)

        return jax.jvp(at, _moving(primals), dots)[1]

    layouts = (*operands, *_moving(operands))
    dots = map(ad.instantiate_zeros, _moving(tangents))
    avals = list(map(jax.typeof, outs))
    return outs, per_shard(derivative, layouts, results, config.window.rank, avals)(*primals, *dots)


def _moving(operands):
    """All operands but the frame, which is of integers and has no tangent."""
    return (*operands[:FRAME_AT], *operands[FRAME_AT + 1 :])


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = functools.partial(_linear_jvp, tangent_p, reference.tangent, *TANGENT)
ad.primitive_jvps[backward_p] = functools.partial(_linear_jvp, backward_p, reference.backward, *BACKWARD)
ad.primitive_transposes[tangent_p] = functools.partial(_transpose, backward_p)
ad.primitive_transposes[backward_p] = functools.partial(_transpose, tangent_p)
