"""Multi-head neighborhood self-attention as a linen module, one implementation for every rank.

    x -> qkv -> (normalize_qk) -> (qk_transform) -> neighborhood attention -> proj -> dropout

The fused operation serves every call that does not need the weights themselves. Attention dropout and `sow_weights`
do, so they take the unfused pair: logits, softmax in float32, dropout, aggregation. Both paths compute the same
function of the same parameters:

    qkv/kernel [channels, 3 * channels], qkv/bias    outputs ordered (query, key, value), heads, head_dim
    proj/kernel [channels, channels], proj/bias
    rpb [num_heads, 2 * k - 1 per axis]              with rel_pos_bias
    query_ln/scale, key_ln/scale [head_dim]          with normalize_qk

The window's arguments are checked by `jax_natten`'s own functions, whose messages name them.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer

import jax_natten
from jax_natten import _checks as check
from jax_natten._reference import accumulation_dtype

Array = jax.Array
PerAxisInt = int | tuple[int, ...]
PerAxisBool = bool | tuple[bool, ...]
PerAxisStr = str | tuple[str, ...]
QKTransform = Callable[[Array, Array], tuple[Array, Array]]

_FUSED = {1: jax_natten.na1d, 2: jax_natten.na2d, 3: jax_natten.na3d}
_QK = {1: jax_natten.na1d_qk, 2: jax_natten.na2d_qk, 3: jax_natten.na3d_qk}
_AV = {1: jax_natten.na1d_av, 2: jax_natten.na2d_av, 3: jax_natten.na3d_av}

_DOC = """<rank>-D multi-head neighborhood self-attention.

    Every token attends to its own window of `kernel_size` tokens per axis; per-axis attributes take one value for all
    axes, or a tuple with one for each.

    Attributes:
      num_heads: number of heads; the channels must be a multiple of it.
      kernel_size, stride, dilation, is_causal, border: the window, as in `jax_natten.na<rank>d`.
      rel_pos_bias: whether to learn a bias for every head and relative position, added to the scaled logits.
      qkv_bias: whether the qkv projection has a bias; the output projection always has one.
      qk_scale: factor on query . key, a finite number; `head_dim ** -0.5` by default.
      attn_drop: rate at which attention weights are dropped. Where it acts the weights are spelled out, which costs
        `prod(kernel_size)` numbers a query and head.
      proj_drop: rate at which outputs are dropped.
      normalize_qk: whether queries and keys pass a LayerNorm over head_dim, with a scale and no bias.
      qk_transform: `(query, key) -> (query, key)`, applied right before attention to arrays
        `[batch, <axes>, num_heads, head_dim]`: rotary embeddings, learned scales.
      dtype: dtype of the computation; by default that of inputs and parameters together. The softmax is computed in
        float32 (float64 for float64) whatever it is.
      param_dtype: dtype of the parameters.
      precision: None, a `jax.lax.Precision` or its name, for the projections and the attention.
      kernel_init, bias_init: initialisers of the projections.
      out_kernel_init: initialiser of the output projection's kernel, kernel_init by default.
      rpb_init: initialiser of the relative positional bias. The default is a normal distribution of standard
        deviation 0.02; NATTEN truncates it at +-2, a hundred standard deviations away.
      deterministic: whether dropout is off; here or in the call, and needed only where a dropout rate is above 0.
      backend: as in `jax_natten.na<rank>d`.
    """


class _HeadNorm(nn.Module):
    """LayerNorm over head_dim with a scale only, in at least float32. Flax's own fails under strict dtype promotion."""

    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], self.param_dtype)
        wide = x.astype(accumulation_dtype(x.dtype))
        variance = jnp.var(wide, axis=-1, keepdims=True)
        normal = jax.nn.standardize(wide, axis=-1, variance=variance, epsilon=1e-6)
        return (normal * scale.astype(wide.dtype)).astype(x.dtype)


class _NeighborhoodAttention(nn.Module):
    """Neighborhood self-attention over `rank` axes; the subclasses fix the rank."""

    rank: ClassVar[int]

    num_heads: int
    kernel_size: PerAxisInt
    stride: PerAxisInt = 1
    dilation: PerAxisInt = 1
    is_causal: PerAxisBool = False
    border: PerAxisStr = "shift"
    rel_pos_bias: bool = False
    qkv_bias: bool = True
    qk_scale: float | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    normalize_qk: bool = False
    qk_transform: QKTransform | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: jax.lax.Precision | str | None = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    rpb_init: Initializer = nn.initializers.normal(0.02)
    deterministic: bool | None = None
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        lengths: Any = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
    ) -> Array:
        """Attends within the windows of `x`.

        Args:
          x: `[batch, *spatial, channels]`.
          lengths: integers `[batch, rank]`: each sample is the leading corner of its arrays, with borders of its own.
            Tokens beyond are never seen and get no attention: their output is the projection's bias. May be traced.
          deterministic: whether dropout is off. Needed, here or as an attribute but not both, where a dropout rate is
            above 0; dropout draws from the rng stream "dropout".
          sow_weights: whether to sow the attention weights (after softmax, before dropout, in float32) into the
            collection "intermediates" as "attention_weights": `[batch, num_heads, *spatial, prod(kernel_size)]`, the
            last axis as `jax_natten.window_indices` orders it.

        Returns:
          `[batch, *spatial, channels]` in the dtype of the computation.

        Raises:
          ValueError: x of another rank, channels that are not a multiple of num_heads, a rate outside [0, 1];
            and whatever the operation raises for the window.
        """
        self._check(x)
        channels = x.shape[-1]
        uses_dropout = self.attn_drop > 0 or self.proj_drop > 0
        off = not uses_dropout or nn.merge_param("deterministic", self.deterministic, deterministic)

        qkv = self._dense(3 * channels, "qkv", self.kernel_init, self.qkv_bias)(x)
        heads = (*x.shape[:-1], self.num_heads, channels // self.num_heads)
        query, key, value = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))  # its gradient is one copy
        if self.normalize_qk:
            query, key = (
                _HeadNorm(self.param_dtype, name="query_ln")(query),
                _HeadNorm(self.param_dtype, name="key_ln")(key),
            )
        if self.qk_transform is not None:
            query, key = self.qk_transform(query, key)
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)

        if sow_weights or (self.attn_drop > 0 and not off):
            out = self._unfused(query, key, value, lengths, off, sow_weights)
        else:
            out = _FUSED[self.rank](
                query, key, value, **self._window(), rpb=self._rpb(), scale=self.qk_scale, lengths=lengths
            )

        out = out.reshape(x.shape)
        out = self._dense(channels, "proj", self.out_kernel_init or self.kernel_init, True)(out)
        return nn.Dropout(self.proj_drop)(out, deterministic=off)

    def _check(self, x: Array) -> None:
        expected = self.rank + 2
        if x.ndim != expected:
            raise ValueError(f"x: expected {expected} axes, [batch, *spatial, channels], got shape {x.shape}")
        if self.num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {self.num_heads}")
        if x.shape[-1] == 0 or x.shape[-1] % self.num_heads:
            raise ValueError(
                f"x: expected a number of channels that is a multiple of num_heads {self.num_heads}, "
                f"got {x.shape[-1]} (shape {x.shape})"
            )
        for name, rate in {"attn_drop": self.attn_drop, "proj_drop": self.proj_drop}.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}: expected a rate from 0 to 1, got {rate}")

    def _dense(self, features: int, name: str, kernel_init: Initializer, use_bias: bool) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=kernel_init,
            bias_init=self.bias_init,
            name=name,
        )

    def _rpb(self) -> Array | None:
        if not self.rel_pos_bias:
            return None
        sizes = check.per_axis("kernel_size", self.kernel_size, self.rank, "positive int", None)
        shape = (self.num_heads, *(2 * size - 1 for size in sizes))
        return self.param("rpb", self.rpb_init, shape, self.param_dtype)

    def _window(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "dilation", "is_causal", "border", "precision", "backend")
        return {name: getattr(self, name) for name in names}

    def _unfused(self, query: Array, key: Array, value: Array, lengths: Any, off: bool, sow_weights: bool) -> Array:
        """Attention by way of its weights."""
        window = self._window() | {"lengths": lengths}
        scale = check.scale(self.qk_scale, query.shape[-1])
        query, key, value = (jnp.moveaxis(a, -2, 1) for a in (query * scale, key, value))
        logits = _QK[self.rank](query, key, **window, rpb=self._rpb())
        weights = jax.nn.softmax(logits.astype(accumulation_dtype(logits.dtype)), axis=-1)
        if sow_weights:
            self.sow("intermediates", "attention_weights", weights)
        weights = nn.Dropout(self.attn_drop)(weights, deterministic=off)
        out = _AV[self.rank](weights.astype(value.dtype), value, **window)
        return jnp.moveaxis(out, 1, -2)


def _doc(rank: int) -> str:
    return _DOC.replace("<rank>", str(rank)).replace("<axes>", ", ".join("XYZ"[:rank]))


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _doc(1)
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _doc(2)
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _doc(3)
    rank = 3
