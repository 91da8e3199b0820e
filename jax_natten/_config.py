"""The static parameters of one primitive call: frozen, hashable, canonicalised once at the public edge."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ._window import Window


@dataclass(frozen=True, kw_only=True)
class FusedConfig:
    """Static parameters of the fused triple (forward, tangent, backward)."""

    window: Window
    scale: float
    backend: str | None
    precision: jax.lax.Precision | jax.lax.DotAlgorithmPreset

    def attributes(self) -> dict[str, Any]:
        """The FFI attributes of the kernels."""
        return {**self.window.attributes(), "scale": np.float64(self.scale)}


@dataclass(frozen=True, kw_only=True)
class UnfusedConfig:
    """Static parameters of the unfused operations; one config serves an operation and its transposes."""

    window: Window
    spatial: tuple[int, ...]  # shape of the query's tokens
    key_spatial: tuple[int, ...]  # shape of the key's tokens
    group: int  # query heads that share a key head
    backend: str | None
    precision: jax.lax.Precision | jax.lax.DotAlgorithmPreset

    def attributes(self) -> dict[str, Any]:
        """The FFI attributes of the kernels."""
        return self.window.attributes()
