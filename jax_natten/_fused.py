"""The fused triple: forward, its tangent, and the tangent's transpose, backward.

    forward(query, key, value, bias, frame) -> out, lse
    tangent(query, key, value, bias, frame, out, lse; query', key', value', bias') -> out', lse'
    backward(query, key, value, bias, frame, out, lse; out_bar, lse_bar) -> query_bar, key_bar, value_bar, bias_bar

Tangent and backward are linear in what follows the semicolon and each other's transpose, so forward and reverse
mode come from one rule: forward's JVP binds tangent, and reverse mode transposes it to backward without ever
running it. Their own JVPs, which second and higher orders need, are those of the reference.

Layouts: query `[*batch, *spatial, heads, dim]`, key and value alike with their own spatial shape, heads and dim;
bias `[*batch, heads, *offsets]`, of no offsets where there is none; frame int32 `[*batch, 5, rank]`. The bias
carries the batch so that the sum of its gradient over a sharded batch is jax's own reduction. out has the query's
dtype, lse and bias the accumulation dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from . import _reference as reference
from ._compat import vary_alike
from ._config import FusedConfig
from ._primitive import define, match, same, shaped, spec_of
from ._window import Window

# What a `checkpoint` policy may save: the results of forward, which backward reads.
OUT_NAME, LSE_NAME = "natten_out", "natten_lse"

QUERY, KEY, VALUE, BIAS, FRAME = "*Ihd", "*Jgd", "*Jge", "*hO", "*fr"
OUT, LSE = "*Ihe", "*Ih"
PRIMALS = (QUERY, KEY, VALUE, BIAS, FRAME)
RESIDUALS = (*PRIMALS, OUT, LSE)


# ---- abstract evaluation


def _forward_avals(query, key, value, bias, frame, *, config):
    spec = spec_of(query)[:-1]
    out = shaped(query, (*query.shape[:-1], value.shape[-1]), query.dtype, (*spec, None))
    return [out, shaped(query, query.shape[:-1], bias.dtype, spec)]


def _tangent_avals(query, key, value, bias, frame, out, lse, *dots, config):
    return [same(out), same(lse)]


def _backward_avals(query, key, value, bias, frame, out, lse, *bars, config):
    return [same(query), same(key), same(value), same(bias)]


def _backward_workspace(query, key, value, bias, frame, out, lse, *bars):
    """lse_bar - out_bar . out of every query, in the layout of lse."""
    return (jax.ShapeDtypeStruct(lse.shape, lse.dtype),)


# ---- primitives

forward_p = define(
    "forward",
    abstract=_forward_avals,
    reference=reference.forward,
    operands=PRIMALS,
    results=(OUT, LSE),
)
tangent_p = define(
    "tangent",
    abstract=_tangent_avals,
    reference=reference.tangent,
    operands=(*RESIDUALS, QUERY, KEY, VALUE, BIAS),
    results=(OUT, LSE),
)
backward_p = define(
    "backward",
    abstract=_backward_avals,
    reference=reference.backward,
    operands=(*RESIDUALS, OUT, LSE),
    results=(QUERY, KEY, VALUE, BIAS),
    workspace=_backward_workspace,
)


def bias_operand(table: jax.Array | None, query: jax.Array, window: Window) -> jax.Array:
    """The bias that the primitives take, `[batch, heads, *offsets]`, from `[heads, *offsets]` or None."""
    batch, heads = query.shape[0], query.shape[-2]
    dtype = reference.accumulation_dtype(query.dtype)
    if table is None:
        return jnp.zeros((batch, heads, *(0,) * window.rank), dtype)
    return jnp.broadcast_to(table.astype(dtype), (batch, *table.shape))


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


def _reference_jvp(primitive, function, primals, tangents, *, config: FusedConfig):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    outs = primitive.bind(*primals, config=config)
    return outs, jax.jvp(functools.partial(function, config=config), tuple(primals), tangents)[1]


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = functools.partial(_reference_jvp, tangent_p, reference.tangent)
ad.primitive_jvps[backward_p] = functools.partial(_reference_jvp, backward_p, reference.backward)
ad.primitive_transposes[tangent_p] = functools.partial(_transpose, backward_p)
ad.primitive_transposes[backward_p] = functools.partial(_transpose, tangent_p)
