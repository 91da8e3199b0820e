"""One public function per rank from one implementation: rank is a parameter, never a copy."""

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def of_rank(
    rank: int, name: str, function: Callable[Concatenate[int, Parameters], Result]
) -> Callable[Parameters, Result]:
    """`function` with its first argument fixed to `rank`, under its own public name.

    In the docstring `<axes>` stands for one name per spatial axis, `<offsets>` for one bias table size per axis and
    `<rank>` for the rank.
    """

    @functools.wraps(function)
    def public(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return function(rank, *args, **kwargs)

    axes = ["X", "Y", "Z"][:rank]
    names = {
        "<axes>": ", ".join(axes),
        "<offsets>": ", ".join(f"2 * k_{axis} - 1" for axis in axes),
        "<rank>": str(rank),
    }
    doc = function.__doc__ or ""
    for placeholder, text in names.items():
        doc = doc.replace(placeholder, text)
    signature = inspect.signature(function)
    public.__signature__ = signature.replace(parameters=[*signature.parameters.values()][1:])  # type: ignore[attr-defined]
    public.__doc__ = doc
    public.__name__ = public.__qualname__ = name
    del public.__wrapped__
    return public
