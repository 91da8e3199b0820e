"""Neighborhood attention for JAX: attention over a sliding window, in 1, 2 or 3 dimensions.

`na1d`, `na2d` and `na3d` are fused operations on `[batch, *spatial, heads, head_dim]`; `na1d_qk`, `na1d_av` and their
siblings spell the weights out. They compose with every jax transformation.
"""

from ._version import __version__ as __version__  # isort: split

from ._backends import Backend as Backend
from ._backends import backends as backends
from ._backends import register as _register
from ._dense import attention as attention
from ._dense import merge_attentions as merge_attentions
from ._helpers import Flops as Flops
from ._helpers import WindowIndices as WindowIndices
from ._helpers import flops as flops
from ._helpers import window_indices as window_indices
from ._neighborhood import na1d as na1d
from ._neighborhood import na2d as na2d
from ._neighborhood import na3d as na3d
from ._weights import na1d_av as na1d_av
from ._weights import na1d_qk as na1d_qk
from ._weights import na2d_av as na2d_av
from ._weights import na2d_qk as na2d_qk
from ._weights import na3d_av as na3d_av
from ._weights import na3d_qk as na3d_qk

_register()
