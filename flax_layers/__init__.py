"""Flax linen layers of neighborhood attention, and conversion of NATTEN's weights.

`NeighborhoodAttention1D`, `2D` and `3D` are self-attention layers over `[batch, *spatial, channels]`; they follow the
conventions of `flax.linen.MultiHeadDotProductAttention`. `from_natten` and `to_natten` convert parameters.
"""

from .attention import NeighborhoodAttention1D as NeighborhoodAttention1D
from .attention import NeighborhoodAttention2D as NeighborhoodAttention2D
from .attention import NeighborhoodAttention3D as NeighborhoodAttention3D
from .convert import from_natten as from_natten
from .convert import to_natten as to_natten
