"""The compiled CPU module: FFI handlers, their instruction sets, and the geometry of one axis for tests."""

from collections.abc import Sequence

def registrations() -> dict[str, object]: ...
def ffi_api_version() -> tuple[int, int]: ...
def target() -> str: ...
def available_targets() -> list[str]: ...
def visited_pairs(spatial: Sequence[int], kernel_size: Sequence[int], dilation: int) -> float: ...
def keys_of_queries(
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    frame: Sequence[int],
    query_size: int,
    key_size: int,
) -> list[tuple[int, int, int, int, int]]: ...
def queries_of_keys(
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    frame: Sequence[int],
    query_size: int,
    key_size: int,
) -> list[tuple[int, int, int, list[int], int]]: ...
