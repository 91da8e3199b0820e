"""The compiled CPU module: FFI handlers, their instruction sets, and for tests one axis' geometry and the tiles."""

from collections.abc import Sequence

def registrations() -> dict[str, object]: ...
def ffi_api_version() -> tuple[int, int]: ...
def target() -> str: ...
def available_targets() -> list[str]: ...
def visited_pairs(spatial: Sequence[int], kernel_size: Sequence[int], dilation: int) -> float: ...
def tiling(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    rows_are_keys: bool,
    tokens: int,
    columns: int,
) -> tuple[tuple[int, int, int], tuple[int, int, int], float]: ...
def seen_together(
    query_size: int,
    key_size: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    rows_are_keys: bool,
    first: int,
    size: int,
) -> int: ...
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
