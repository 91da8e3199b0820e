"""The operations in pure JAX: the specification, the fallback where no kernel exists, and second derivatives.

Every function takes the operands of the primitive of the same name and its config, and returns its results.
Operands have any number of leading batch axes; one sample is written out and mapped over them. Queries are
visited in blocks of about tokens / volume, so that the keys gathered for a block are about as many as the keys
that exist: memory stays a small multiple of the inputs for every window. Each block is rematerialised, which
keeps that bound under reverse mode too.

With s the logits, p = exp(s - lse), c a cotangent and d. a tangent:
    tangent   ds = scale (dq.k + q.dk) + dbias,  dlse = sum p ds,  dout = sum p (ds - dlse) v + p dv
    backward  ds = p (c_out.v - c_out.out + c_lse),  dq = scale sum ds k,  dk = scale sum ds q,
              dv = sum p c_out,  dbias = sum ds
"""

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp

from ._compat import vary_alike
from ._config import FusedConfig, UnfusedConfig
from ._window import Slots, Window, neighborhood

Array = jax.Array

# Below this many queries a block has too little work to be worth a step of the loop.
SMALLEST_BLOCK = 64


# ---- blocks of queries


def _per_sample(function: Callable, operands: tuple) -> list[Array]:
    """Maps a function of one sample over the leading batch axes; the last operand is the frame `[*batch, 5, rank]`."""
    for _ in range(operands[-1].ndim - 2):
        function = jax.vmap(function)
    return list(function(*operands))


def _over_blocks(body: Callable, carry: tuple, spatial: tuple, key_spatial: tuple, window: Window, frame: Array):
    """Scans `body(carry, query, slots) -> carry, results` over blocks of query indices.

    Returns the last carry and the results with the blocks joined along their first axis, one row a query. A
    query past the last one repeats it with no slot present.
    """
    tokens = prod(spatial)
    block = max(-(-tokens // window.volume), min(tokens, SMALLEST_BLOCK), 1)
    blocks = -(-tokens // block)

    @jax.checkpoint
    def step(carry, index):
        query = index * block + jnp.arange(block, dtype=jnp.int32)
        inside = query < tokens
        query = jnp.minimum(query, tokens - 1)
        slots = neighborhood(window, query, spatial, frame, key_spatial)
        return body(carry, query, slots._replace(present=slots.present & inside[:, None]))

    *zeros, _ = vary_alike((*carry, frame))  # they vary over no mesh axis, what is added to them does
    carry, results = jax.lax.scan(step, tuple(zeros), jnp.arange(blocks, dtype=jnp.int32))
    return carry, [x.reshape(blocks * block, *x.shape[2:])[:tokens] for x in results]


def accumulation_dtype(dtype) -> jnp.dtype:
    """float64 for float64, float32 for the rest."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _take(rows: Array, index: Array) -> Array:
    """rows[index]; zeros where there is no row at all, and so none that counts."""
    return rows[index] if rows.shape[0] else jnp.zeros((*index.shape, *rows.shape[1:]), rows.dtype)


def _gather(rows: Array, slots: Slots) -> Array:
    """The key's row of every slot, `[queries, volume, ...]` in the accumulation dtype; 0 where absent.

    A key that does not exist or is not in the window may hold NaN: it is replaced, not multiplied by 0.
    """
    present = slots.present.reshape(*slots.present.shape, *(1,) * (rows.ndim - 1))
    return jnp.where(present, _take(rows, slots.key), 0).astype(accumulation_dtype(rows.dtype))


# ---- fused triple: one sample has tokens first, then heads


class _Sample:
    """One sample of a fused operation, flattened over space and with query heads grouped by their key head."""

    def __init__(self, query: Array, key: Array, value: Array, bias: Array, frame: Array, config: FusedConfig):
        rank = config.window.rank
        self.config = config
        self.frame = frame
        self.spatial, self.key_spatial = query.shape[:rank], key.shape[:rank]
        self.heads, self.key_heads = query.shape[rank], key.shape[rank]
        self.accumulation = accumulation_dtype(query.dtype)
        self.query = self.tokens(query)
        self.key, self.value = (x.reshape(prod(self.key_spatial), *x.shape[rank:]) for x in (key, value))
        self.bias = self.table(bias)

    def tokens(self, x: Array) -> Array:
        """`[*spatial, heads, ...]` -> `[tokens, key heads, heads of each, ...]`."""
        groups = self.heads // max(self.key_heads, 1)
        return x.reshape(prod(self.spatial), self.key_heads, groups, *x.shape[self.config.window.rank + 1 :])

    def table(self, bias: Array) -> Array | None:
        """`[heads, *offsets]` -> `[offsets, key heads, heads of each]`; None where there is no bias."""
        if not self.config.window.has_bias(bias) or bias.shape[0] == 0:
            return None
        groups = self.heads // self.key_heads
        table = bias.reshape(self.key_heads, groups, prod(bias.shape[1:]))
        return jnp.moveaxis(table, -1, 0).astype(self.accumulation)

    def from_tokens(self, x: Array, dtype) -> Array:
        return x.reshape(*self.spatial, self.heads, *x.shape[3:]).astype(dtype)

    def scan(self, body: Callable, carry: tuple = ()):
        return _over_blocks(body, carry, self.spatial, self.key_spatial, self.config.window, self.frame)

    def rows(self, x: Array, query: Array, slots: Slots) -> Array:
        """The rows of a block's queries; 0 for a query without keys, which may not exist and hold NaN."""
        sees = jnp.any(slots.present, axis=1)
        return jnp.where(sees.reshape(-1, *(1,) * (x.ndim - 1)), _take(x, query), 0).astype(self.accumulation)

    def einsum(self, equation: str, *operands: Array) -> Array:
        return jnp.einsum(equation, *operands, precision=self.config.precision)

    def scores(self, query: Array, key: Array) -> Array:
        """scale q.k of a block, `[queries, slots, key heads, heads of each]`."""
        return self.config.scale * self.einsum("nhgd,nkhd->nkhg", query, key)

    def logits(self, query: Array, key: Array, slots: Slots) -> Array:
        logits = self.scores(query, key)
        if self.bias is not None:
            logits = logits + self.bias[slots.bias]
        return jnp.where(slots.present[..., None, None], logits, -jnp.inf)

    def weights(self, query: Array, key: Array, lse: Array, slots: Slots) -> Array:
        """p = exp(s - lse), 0 where absent."""
        finite = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.exp(self.logits(query, key, slots) - finite[:, None])


def forward(*operands: Array, config: FusedConfig) -> list[Array]:
    def one(query, key, value, bias, frame):
        sample = _Sample(query, key, value, bias, frame, config)

        def body(carry, rows, slots):
            key, value = _gather(sample.key, slots), _gather(sample.value, slots)
            logits = sample.logits(sample.rows(sample.query, rows, slots), key, slots)
            largest = jnp.max(logits, axis=1, keepdims=True)
            largest = jnp.where(largest == -jnp.inf, 0, largest)
            weights = jnp.exp(logits - largest)
            total = jnp.sum(weights, axis=1)
            out = sample.einsum("nkhg,nkhe->nhge", weights, value)
            out = out / jnp.where(total == 0, 1, total)[..., None]
            return carry, (out, largest[:, 0] + jnp.log(total))

        _, (out, lse) = sample.scan(body)
        return sample.from_tokens(out, query.dtype), sample.from_tokens(lse, sample.accumulation)

    return _per_sample(one, operands)


def tangent(*operands: Array, config: FusedConfig) -> list[Array]:
    *primals, frame, out, lse, query_dot, key_dot, value_dot, bias_dot = operands

    def one(query, key, value, bias, lse, query_dot, key_dot, value_dot, bias_dot, frame):
        sample = _Sample(query, key, value, bias, frame, config)
        moved = _Sample(query_dot, key_dot, value_dot, bias_dot, frame, config)
        rows_lse = sample.tokens(lse)

        def body(carry, rows, slots):
            key, key_dot = _gather(sample.key, slots), _gather(moved.key, slots)
            query, query_dot = sample.rows(sample.query, rows, slots), sample.rows(moved.query, rows, slots)
            weights = sample.weights(query, key, _take(rows_lse, rows), slots)
            logits_dot = sample.scores(query_dot, key) + sample.scores(query, key_dot)
            if moved.bias is not None:
                logits_dot = logits_dot + moved.bias[slots.bias]
            lse_dot = jnp.sum(weights * logits_dot, axis=1)
            out_dot = sample.einsum(
                "nkhg,nkhe->nhge", weights * (logits_dot - lse_dot[:, None]), _gather(sample.value, slots)
            ) + sample.einsum("nkhg,nkhe->nhge", weights, _gather(moved.value, slots))
            return carry, (out_dot, lse_dot)

        _, (out_dot, lse_dot) = sample.scan(body)
        return sample.from_tokens(out_dot, query.dtype), sample.from_tokens(lse_dot, lse.dtype)

    return _per_sample(one, (*primals, lse, query_dot, key_dot, value_dot, bias_dot, frame))


def backward(*operands: Array, config: FusedConfig) -> list[Array]:
    *primals, frame, out, lse, out_bar, lse_bar = operands

    def one(query, key, value, bias, out, lse, out_bar, lse_bar, frame):
        sample = _Sample(query, key, value, bias, frame, config)
        rows_out, rows_lse, rows_out_bar, rows_lse_bar = map(sample.tokens, (out, lse, out_bar, lse_bar))
        sums = [jnp.zeros(x.shape, sample.accumulation) for x in (sample.key, sample.value)]
        if sample.bias is not None:
            sums.append(jnp.zeros(sample.bias.shape, sample.accumulation))

        def body(sums, rows, slots):
            key, value = _gather(sample.key, slots), _gather(sample.value, slots)
            query, out_bar = sample.rows(sample.query, rows, slots), sample.rows(rows_out_bar, rows, slots)
            weights = sample.weights(query, key, _take(rows_lse, rows), slots)
            delta = sample.rows(rows_lse_bar, rows, slots) - jnp.sum(
                out_bar * sample.rows(rows_out, rows, slots), axis=-1
            )
            logits_bar = weights * (sample.einsum("nhge,nkhe->nkhg", out_bar, value) + delta[:, None])
            query_bar = config.scale * sample.einsum("nkhg,nkhd->nhgd", logits_bar, key)
            parts = [
                (slots.key, config.scale * sample.einsum("nkhg,nhgd->nkhd", logits_bar, query)),
                (slots.key, sample.einsum("nkhg,nhge->nkhe", weights, out_bar)),
                (slots.bias, logits_bar),
            ]
            sums = tuple(x.at[index].add(part) for x, (index, part) in zip(sums, parts, strict=False))
            return sums, (query_bar,)

        (key_bar, value_bar, *bias_bar), (query_bar,) = sample.scan(body, tuple(sums))
        bars = [sample.from_tokens(query_bar, query.dtype)]
        bars += [x.reshape(like.shape).astype(like.dtype) for x, like in ((key_bar, key), (value_bar, value))]
        bars.append(jnp.moveaxis(bias_bar[0], 0, -1).reshape(bias.shape) if bias_bar else jnp.zeros_like(bias))
        return bars

    return _per_sample(one, (*primals, out, lse, out_bar, lse_bar, frame))


# ---- unfused operations: one sample has heads first, then tokens


def _unfused(config: UnfusedConfig, frame: Array, body: Callable, carry: tuple = ()):
    return _over_blocks(body, carry, config.spatial, config.key_spatial, config.window, frame)


def _tokens_first(x: Array, heads: int, groups: int) -> Array:
    """`[heads * groups, *spatial, d]` -> `[tokens, heads, groups, d]`."""
    return jnp.moveaxis(x.reshape(heads, groups, prod(x.shape[1:-1]), x.shape[-1]), 2, 0)


def _heads_first(x: Array, spatial: tuple, dtype) -> Array:
    """`[tokens, ..., d]` -> `[heads, *spatial, d]`, the axes between being the heads."""
    tokens, *heads, dim = x.shape
    rows = jnp.moveaxis(x.reshape(tokens, prod(heads), dim), 0, 1)
    return rows.reshape(prod(heads), *spatial, dim).astype(dtype)


def qk(*operands: Array, config: UnfusedConfig) -> list[Array]:
    """attn[h, i, m] = query[h, i] . key[h, key of slot m]; 0 where absent."""

    def one(query, key, frame):
        queries = _tokens_first(query, key.shape[0], config.group)
        keys = _tokens_first(key, key.shape[0], 1)[:, :, 0]

        def body(carry, rows, slots):
            block = _take(queries, rows).astype(accumulation_dtype(query.dtype))
            attn = jnp.einsum("nhgd,nkhd->nhgk", block, _gather(keys, slots), precision=config.precision)
            return carry, (jnp.where(slots.present[:, None, None], attn, 0),)

        _, (attn,) = _unfused(config, frame, body)
        return (_heads_first(attn, config.spatial, query.dtype),)

    return _per_sample(one, operands)


def av(*operands: Array, config: UnfusedConfig) -> list[Array]:
    """out[h, i] = sum over slots m of attn[h, i, m] value[h, key of slot m]."""

    def one(attn, value, frame):
        weights = _tokens_first(attn, value.shape[0], config.group)
        values = _tokens_first(value, value.shape[0], 1)[:, :, 0]

        def body(carry, rows, slots):
            block = jnp.where(slots.present[:, None, None], _take(weights, rows), 0)
            block = block.astype(accumulation_dtype(attn.dtype))
            return carry, (jnp.einsum("nhgk,nkhd->nhgd", block, _gather(values, slots), precision=config.precision),)

        _, (out,) = _unfused(config, frame, body)
        return (_heads_first(out, config.spatial, attn.dtype),)

    return _per_sample(one, operands)


def inverse(*operands: Array, config: UnfusedConfig) -> list[Array]:
    """out[h, j] = sum over the slots m of queries i that hold key j of attn[h, i, m] x[h, i]."""

    def one(attn, x, frame):
        key_heads = attn.shape[0] // config.group
        weights, rows_x = (_tokens_first(array, key_heads, config.group) for array in (attn, x))
        accumulation = accumulation_dtype(x.dtype)
        total = jnp.zeros((prod(config.key_spatial), key_heads, x.shape[-1]), accumulation)

        def body(carry, rows, slots):
            (total,) = carry
            block = jnp.where(slots.present[:, None, None], _take(weights, rows), 0).astype(accumulation)
            part = jnp.einsum(
                "nhgk,nhgd->nkhd", block, _take(rows_x, rows).astype(accumulation), precision=config.precision
            )
            return (total.at[slots.key].add(jnp.where(slots.present[..., None, None], part, 0)),), ()

        (total,), _ = _unfused(config, frame, body, (total,))
        return (_heads_first(total, config.key_spatial, x.dtype),)

    return _per_sample(one, operands)


def spread(*operands: Array, config: UnfusedConfig) -> list[Array]:
    """attn[h, i, m] = table[h, offset of slot m from query i]; 0 where absent."""

    def one(table, frame):
        rows_table = _tokens_first(table[..., None], table.shape[0], 1)[:, :, 0, 0]

        def body(carry, rows, slots):
            return carry, (jnp.moveaxis(_gather(rows_table, slots._replace(key=slots.bias)), 1, -1),)

        _, (attn,) = _unfused(config, frame, body)
        return (_heads_first(attn, config.spatial, table.dtype),)

    return _per_sample(one, operands)


def collect(*operands: Array, config: UnfusedConfig) -> list[Array]:
    """table[h, o] = sum of attn[h, i, m] over the queries i and slots m whose offset is o."""

    def one(attn, frame):
        weights = _tokens_first(attn, attn.shape[0], 1)[:, :, 0]
        total = jnp.zeros((prod(config.window.bias_shape), attn.shape[0]), attn.dtype)

        def body(carry, rows, slots):
            (total,) = carry
            part = jnp.where(slots.present[..., None], jnp.moveaxis(_take(weights, rows), 1, 2), 0)
            return (total.at[slots.bias].add(part),), ()

        (total,), _ = _unfused(config, frame, body, (total,))
        return (jnp.moveaxis(total, 0, 1).reshape(attn.shape[0], *config.window.bias_shape),)

    return _per_sample(one, operands)
