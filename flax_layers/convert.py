"""Parameters of NATTEN's torch modules as parameters of these layers, and back.

NATTEN's NeighborhoodAttention{1,2,3}D and ours hold the same numbers; only names differ, and torch keeps the kernel of
a linear layer as [out, in]:

    qkv.weight [3 C, C]    qkv/kernel [C, 3 C]        proj.weight [C, C]    proj/kernel [C, C]
    qkv.bias [3 C]         qkv/bias                   proj.bias [C]         proj/bias
    rpb [heads, 2 k - 1 per axis]                     rpb

qkv.bias is absent where the module has none (qkv_bias=False), rpb where it has no relative positional bias.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

_REQUIRED = ("qkv.weight", "proj.weight", "proj.bias")
_OPTIONAL = ("qkv.bias", "rpb")


def from_natten(state_dict: Mapping[str, Any], prefix: str | None = None) -> dict[str, Any]:
    """Parameters of a `NeighborhoodAttention{1,2,3}D` from the state dict of NATTEN's module of that name.

    Args:
      state_dict: names to arrays, or to whatever `numpy.asarray` takes (torch's CPU tensors); may be that of a whole
        model.
      prefix: what stands before the names of the module, as in "levels.0.blocks.0.attn."; by default found from the
        names, where they hold one such module only.

    Returns:
      `{"qkv": {"kernel", "bias"}, "proj": {"kernel", "bias"}, "rpb"}` of NumPy arrays in their own dtype: apply the
      layer to `{"params": ...}`.

    Raises:
      ValueError: names that are missing or unexpected under the prefix, no or several modules where the prefix is to
        be found, shapes that do not belong together.
    """
    prefix = _only_prefix(state_dict) if prefix is None else prefix
    found = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    missing = [prefix + name for name in _REQUIRED if name not in found]
    if missing:
        raise ValueError(f"state_dict: expected the names {missing}, got {sorted(state_dict)}")
    unexpected = [prefix + name for name in found if name not in _REQUIRED + _OPTIONAL]
    if unexpected:
        known = [prefix + name for name in (*_REQUIRED, *_OPTIONAL)]
        raise ValueError(f"state_dict: expected no names but {known}, got also {sorted(unexpected)}")

    arrays = {name: np.asarray(value) for name, value in found.items()}
    _check_shapes(arrays, prefix)
    params: dict[str, Any] = {
        layer: {"kernel": np.ascontiguousarray(arrays[f"{layer}.weight"].T)} for layer in ("qkv", "proj")
    }
    for layer in ("qkv", "proj"):
        if f"{layer}.bias" in arrays:
            params[layer]["bias"] = arrays[f"{layer}.bias"]
    if "rpb" in arrays:
        params["rpb"] = arrays["rpb"]
    return params


def to_natten(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of `from_natten`: a state dict of NumPy arrays, every name behind `prefix`.

    Args:
      params: parameters of a `NeighborhoodAttention{1,2,3}D` without `normalize_qk`, which NATTEN does not have.
      prefix: what stands before the names.

    Raises:
      ValueError: names that are missing or unexpected, shapes that do not belong together.
    """
    names = {
        "qkv.weight": ("qkv", "kernel"),
        "qkv.bias": ("qkv", "bias"),
        "proj.weight": ("proj", "kernel"),
        "proj.bias": ("proj", "bias"),
        "rpb": ("rpb",),
    }
    leaves = dict(_leaves(params))
    missing = ["/".join(names[name]) for name in _REQUIRED if names[name] not in leaves]
    if missing:
        raise ValueError(f"params: expected the names {missing}, got {sorted(map('/'.join, leaves))}")
    unexpected = ["/".join(path) for path in leaves if path not in names.values()]
    if unexpected:
        known = ["/".join(path) for path in names.values()]
        raise ValueError(f"params: expected no names but {known}, got also {sorted(unexpected)}")

    arrays = {name: np.asarray(leaves[path]) for name, path in names.items() if path in leaves}
    for name in ("qkv.weight", "proj.weight"):
        arrays[name] = np.ascontiguousarray(arrays[name].T)
    _check_shapes(arrays, prefix)
    return {prefix + name: value for name, value in arrays.items()}


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    """(path, array) for every array of nested mappings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _only_prefix(state_dict: Mapping[str, Any]) -> str:
    """What stands before "qkv.weight", where that is found exactly once."""
    marker = "qkv.weight"
    prefixes = [name.removesuffix(marker) for name in state_dict if name == marker or name.endswith("." + marker)]
    if len(prefixes) != 1:
        raise ValueError(
            f"prefix: expected one module in the state dict, or the prefix of one, got {len(prefixes)} modules: "
            f"prefixes {sorted(prefixes)}, names {sorted(state_dict)}"
        )
    return prefixes[0]


def _check_shapes(arrays: Mapping[str, np.ndarray], prefix: str) -> None:
    channels = arrays["proj.bias"].shape[0] if arrays["proj.bias"].ndim == 1 else None
    if channels is None:
        raise ValueError(f"{prefix}proj.bias: expected one axis, got shape {arrays['proj.bias'].shape}")
    expected = {
        "qkv.weight": (3 * channels, channels),
        "qkv.bias": (3 * channels,),
        "proj.weight": (channels, channels),
    }
    for name, shape in expected.items():
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(f"{prefix}{name}: expected shape {shape} (torch's order), got {arrays[name].shape}")
    if "rpb" in arrays:
        heads, *offsets = arrays["rpb"].shape or (0,)
        if not heads or channels % heads or not 1 <= len(offsets) <= 3 or any(size % 2 == 0 for size in offsets):
            raise ValueError(
                f"{prefix}rpb: expected shape [heads, 2 * kernel_size - 1 per axis] with heads dividing {channels}, "
                f"got {arrays['rpb'].shape}"
            )
