"""The static parameters of one primitive call: frozen, hashable, canonicalised once at the public edge."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ._window import Window

Precision = jax.lax.Precision | jax.lax.DotAlgorithmPreset

# Products of more than TF32's 11 significant bits.
_BEYOND_TF32 = {
    jax.lax.Precision.HIGHEST,
    jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
    jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
    jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X9,
    jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    jax.lax.DotAlgorithmPreset.F32_F32_F32,
    jax.lax.DotAlgorithmPreset.F64_F64_F64,
}


def allows_tf32(precision: Precision) -> bool:
    """Whether float32 products may be rounded to TF32, as jax's own do on GPUs at this precision."""
    return precision not in _BEYOND_TF32


@dataclass(frozen=True, kw_only=True)
class FusedConfig:
    """Static parameters of the fused triple (forward, tangent, backward)."""

    window: Window
    scale: float
    backend: str | None
    precision: Precision

    def attributes(self) -> dict[str, Any]:
        """The FFI attributes of the kernels."""
        return {
            **self.window.attributes(),
            "tf32": np.bool_(allows_tf32(self.precision)),
            "scale": np.float64(self.scale),
        }


@dataclass(frozen=True, kw_only=True)
class UnfusedConfig:
    """Static parameters of the unfused operations; one config serves an operation and its transposes."""

    window: Window
    spatial: tuple[int, ...]  # shape of the query's tokens
    key_spatial: tuple[int, ...]  # shape of the key's tokens
    group: int  # query heads that share a key head
    backend: str | None
    precision: Precision

    def attributes(self) -> dict[str, Any]:
        """The FFI attributes of the kernels."""
        return {**self.window.attributes(), "tf32": np.bool_(allows_tf32(self.precision))}
