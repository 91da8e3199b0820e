"""The unfused trio and the bias pair: operations that are closed under transposition.

    qk(query, key, frame) -> attn          attn[h, i, m] = query[h, i] . key[h, key of slot m of i]
    av(attn, value, frame) -> out          out[h, i] = sum over m of attn[h, i, m] value[h, key of slot m of i]
    inverse(attn, x, frame) -> out         out[h, j] = sum over the (i, m) that hold key j of attn[h, i, m] x[h, i]
    spread(table, frame) -> attn           attn[h, i, m] = table[h, offset of slot m of i]
    collect(attn, frame) -> table          table[h, o] = sum over the (i, m) with offset o of attn[h, i, m]

The first three are bilinear and each one's transposes are the other two; the last two are linear and each other's
transpose. So both modes and every order of derivative come from these five. Absent slots are 0 in every attn that
comes out and are not read in one that goes in.

Layouts: query `[*batch, heads, *spatial, dim]`, key and value alike with their own heads and spatial shape, attn
`[*batch, heads, *spatial, volume]`, table `[*batch, heads, *offsets]`, frame int32 `[*batch, 5, rank]`.
"""

import functools

import jax
from jax.interpreters import ad

from . import _reference as reference
from ._config import UnfusedConfig
from ._partitioning import dividing, match, spec_of
from ._primitive import define, shaped

QUERY, KEY, ATTN, TABLE, FRAME = "*hId", "*gJd", "*hIk", "*hO", "*fr"


# ---- abstract evaluation


def _whole(x, config: UnfusedConfig) -> tuple:
    """Specs of the batch axes and heads of `[*batch, heads, *spatial, dim]`, the rest being whole."""
    return spec_of(x)[: x.ndim - config.window.rank - 1]


def _none(config: UnfusedConfig, extra: int = 0) -> tuple:
    return (None,) * (config.window.rank + extra)


def _qk_avals(query, key, frame, *, config):
    shape = (*query.shape[:-1], config.window.volume)
    return [shaped(query, shape, query.dtype, (*spec_of(query)[:-1], None))]


def _av_avals(attn, value, frame, *, config):
    shape = (*attn.shape[:-1], value.shape[-1])
    return [shaped(attn, shape, attn.dtype, (*spec_of(attn)[:-1], None))]


def _inverse_avals(attn, x, frame, *, config):
    *batch, heads = x.shape[: x.ndim - config.window.rank - 1]
    shape = (*batch, heads // config.group, *config.key_spatial, x.shape[-1])
    *batch_spec, heads_spec = _whole(attn, config)
    heads_spec = dividing(heads_spec, {shape[len(batch)]}, attn.sharding.mesh.shape)
    spec = (*batch_spec, heads_spec, *_none(config, 1))
    return [shaped(attn, shape, x.dtype, spec)]


def _inverse_workspace(results, attn, x, frame, *, platform):
    """On CPUs, the sums of the result where its dtype is too narrow for them."""
    (out,) = results
    batch, dtype = frame.shape[:-2], reference.accumulation_dtype(out.dtype)
    sums = 0 if platform == "cuda" or out.dtype == dtype else 1
    return (jax.ShapeDtypeStruct((*batch, sums, *out.shape[len(batch) :]), dtype),)


def _spread_avals(table, frame, *, config):
    leading = table.ndim - config.window.rank
    shape = (*table.shape[:leading], *config.spatial, config.window.volume)
    return [shaped(table, shape, table.dtype, (*spec_of(table)[:leading], *_none(config, 1)))]


def _collect_avals(attn, frame, *, config):
    leading = _whole(attn, config)
    shape = (*attn.shape[: len(leading)], *config.window.bias_shape)
    return [shaped(attn, shape, attn.dtype, (*leading, *_none(config)))]


# ---- primitives

qk_p = define("qk", abstract=_qk_avals, reference=reference.qk, operands=(QUERY, KEY, FRAME), results=(ATTN,))
av_p = define("av", abstract=_av_avals, reference=reference.av, operands=(ATTN, KEY, FRAME), results=(QUERY,))
inverse_p = define(
    "inverse",
    abstract=_inverse_avals,
    reference=reference.inverse,
    operands=(ATTN, QUERY, FRAME),
    results=(KEY,),
    workspace=_inverse_workspace,
)
spread_p = define(
    "spread",
    abstract=_spread_avals,
    reference=reference.spread,
    operands=(TABLE, FRAME),
    results=(ATTN,),
)
collect_p = define(
    "collect",
    abstract=_collect_avals,
    reference=reference.collect,
    operands=(ATTN, FRAME),
    results=(TABLE,),
)


# ---- derivatives


def _bilinear(primitive, left_transpose, right_transpose) -> None:
    """JVP and transposes of `primitive(left, right, frame)`; each transpose is given (cotangent, other, frame)."""

    def jvp(primals, tangents, *, config):
        left, right, frame = primals
        left_dot, right_dot, _ = tangents
        bind = functools.partial(primitive.bind, config=config)
        terms = []
        if type(left_dot) is not ad.Zero:
            terms += bind(left_dot, right, frame)
        if type(right_dot) is not ad.Zero:
            terms += bind(left, right_dot, frame)
        (out,) = bind(left, right, frame)
        return [out], [sum(terms[1:], terms[0]) if terms else ad.Zero.from_primal_value(out)]

    def transpose(cotangents, left, right, frame, *, config):
        (bar,) = map(ad.instantiate_zeros, cotangents)
        if ad.is_undefined_primal(left):
            return [match(left_transpose(bar, right, frame, config), left.aval), None, None]
        return [None, match(right_transpose(bar, left, frame, config), right.aval), None]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


def _bound(primitive, swap: bool = False):
    """(cotangent, other, frame, config) -> the primitive of (cotangent, other), or of (other, cotangent)."""

    def run(bar, other, frame, config):
        left, right = (other, bar) if swap else (bar, other)
        return primitive.bind(left, right, frame, config=config)[0]

    return run


_bilinear(qk_p, left_transpose=_bound(av_p), right_transpose=_bound(inverse_p))
_bilinear(av_p, left_transpose=_bound(qk_p), right_transpose=_bound(inverse_p, swap=True))
_bilinear(inverse_p, left_transpose=_bound(qk_p, swap=True), right_transpose=_bound(av_p, swap=True))


def _linear(primitive, dual) -> None:
    """JVP and transpose of `primitive(x, frame)`, linear in x."""

    def jvp(primals, tangents, *, config):
        dot = ad.instantiate_zeros(tangents[0])
        return primitive.bind(*primals, config=config), primitive.bind(dot, primals[1], config=config)

    def transpose(cotangents, x, frame, *, config):
        (bar,) = dual.bind(*map(ad.instantiate_zeros, cotangents), frame, config=config)
        return [match(bar, x.aval), None]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose


_linear(spread_p, collect_p)
_linear(collect_p, spread_p)
