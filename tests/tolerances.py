"""How close is close, from the dtype alone."""

import ml_dtypes
import numpy as np

# Multiples of the dtype's epsilon at the scale of the largest expected entry (at least 1). Low precision is rounded
# at the edges only, sums are at least float32; float32 and float64 sums round at every term.
ULPS = {"float16": 4, "bfloat16": 4, "float32": 32, "float64": 128}


def tolerance(dtype) -> float:
    """Absolute tolerance for results of magnitude 1."""
    dtype = np.dtype(dtype)
    return ULPS[dtype.name] * float(ml_dtypes.finfo(dtype).eps)


def assert_close(actual, expected, *, dtype=None, factor: float = 1.0, err_msg: str = "") -> None:
    """`actual` equals the float64 `expected` to the accuracy of `dtype`, by default its own; infinities exactly.

    Factor multiplies the tolerance, for results that pass through several roundings.
    """
    dtype = np.asarray(actual).dtype if dtype is None else dtype
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{err_msg}: shape {actual.shape}, expected {expected.shape}"
    finite = np.abs(expected[np.isfinite(expected)])
    atol = factor * tolerance(dtype) * max(1.0, finite.max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=err_msg)
