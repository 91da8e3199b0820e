"""Registration of the compiled kernels, and what this machine can run."""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import jax
import jax.extend

from . import _checks as check
from ._compat import runtime_ffi_version


class Backend(NamedTuple):
    """Whether a backend can serve calls on this machine, and what it is or why it cannot."""

    available: bool
    detail: str


def _load(**modules: str) -> tuple[dict[str, ModuleType], dict[str, ImportError]]:
    """The compiled kernels' modules by platform, and of each one that is missing, why."""
    loaded, missing = {}, {}
    for platform, name in modules.items():
        try:
            loaded[platform] = import_module(f"{__package__}.{name}")
        except ImportError as error:
            missing[platform] = error
    return loaded, missing


# By the names that jax gives platforms in lowerings.
MODULES, MISSING = _load(cpu="_cpu", cuda="_cuda")
KERNEL_PLATFORMS = tuple(MODULES)
XLA_NAMES = {"cpu": "cpu", "cuda": "CUDA"}


def register() -> None:
    """Registers the compiled kernels with XLA.

    A handler newer than the runtime would break all of jax at its first use, so versions are compared first.
    """
    if "cpu" in MISSING:
        raise MISSING["cpu"]
    installed = runtime_ffi_version()
    for platform, module in MODULES.items():
        built = tuple(module.ffi_api_version())
        if built[0] != installed[0] or built[1] > installed[1]:
            raise ImportError(
                f"jax_natten was built for XLA FFI API {built[0]}.{built[1]}, but the installed jaxlib provides "
                f"{installed[0]}.{installed[1]}: install a newer jaxlib, or build jax_natten against this one"
            )
        for name, handler in module.registrations().items():
            jax.ffi.register_ffi_target(name, handler, platform=XLA_NAMES[platform])


def backends() -> dict[str, Backend]:
    """The names that `backend=` takes; for each, whether this machine can run it, and why not where it cannot.

    Returns:
      "native": compiled kernels, on the platforms that have them. "reference": pure jax, on every platform.
    """
    platform = _platform()
    missing = _missing_cuda()
    if platform in KERNEL_PLATFORMS:
        native = Backend(True, f"compiled {platform.upper()} kernels, the default here{missing and '; ' + missing}")
    else:
        native = Backend(
            False,
            f"no compiled kernels for {platform}, jax's default platform, only for {', '.join(KERNEL_PLATFORMS)}"
            f"{missing and '; ' + missing}",
        )
    return dict(zip(check.BACKENDS, (native, Backend(True, "pure jax, on every platform")), strict=True))


def _platform() -> str:
    """jax's default platform, NVIDIA's and AMD's GPUs told apart."""
    backend = jax.extend.backend.get_backend()
    return "cuda" if backend.platform_version.lower().startswith("cuda") else backend.platform


def _missing_cuda() -> str:
    """Why there are no CUDA kernels, empty where there are."""
    if "cuda" not in MISSING:
        return ""
    if isinstance(MISSING["cuda"], ModuleNotFoundError):
        return (
            "CUDA kernels were not built: no CUDA compiler or no NVIDIA driver was found when jax_natten was "
            "installed; JAX_NATTEN_CUDA=ON in the environment of pip builds them (docs/building.md)"
        )
    return f"CUDA kernels do not load: {MISSING['cuda']}"
