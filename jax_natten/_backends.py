"""Registration of the compiled kernels, and what this machine can run."""

from typing import NamedTuple

import jax

from . import _checks as check
from ._compat import runtime_ffi_version


class Backend(NamedTuple):
    """Whether a backend can serve calls on this machine, and what it is or why it cannot."""

    available: bool
    detail: str


def register() -> None:
    """Registers the CPU kernels with XLA.

    A handler newer than the runtime would break all of jax at its first use, so versions are compared first.
    """
    from . import _cpu

    built, installed = tuple(_cpu.ffi_api_version()), runtime_ffi_version()
    if built[0] != installed[0] or built[1] > installed[1]:
        raise ImportError(
            f"jax_natten was built for XLA FFI API {built[0]}.{built[1]}, but the installed jaxlib provides "
            f"{installed[0]}.{installed[1]}: install a newer jaxlib, or build jax_natten against this one"
        )
    for name, handler in _cpu.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def backends() -> dict[str, Backend]:
    """The names that `backend=` takes; for each, whether this machine can run it, and why not where it cannot.

    Returns:
      "native": compiled kernels, on the platforms that have them. "reference": pure jax, on every platform.
    """
    platform = jax.default_backend()
    kernels = {"cpu": "compiled CPU kernels"}
    if platform in kernels:
        native = Backend(True, f"{kernels[platform]}, the default here")
    else:
        native = Backend(
            False, f"no compiled kernels for {platform}, jax's default platform, only for {', '.join(kernels)}"
        )
    return dict(zip(check.BACKENDS, (native, Backend(True, "pure jax, on every platform")), strict=True))
