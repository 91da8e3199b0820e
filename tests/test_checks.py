"""Every row of the error table: the exception's type, and a message that names argument, expectation and value."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_natten as jn


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


FUSED = dict(query=zeros(2, 8, 6, 4, 3), key=zeros(2, 8, 6, 2, 3), value=zeros(2, 8, 6, 2, 5), kernel_size=3)
QK = dict(query=zeros(2, 4, 8, 6, 3), key=zeros(2, 2, 8, 6, 3), kernel_size=3)
AV = dict(attn=zeros(2, 4, 8, 6, 9), value=zeros(2, 2, 8, 6, 5), kernel_size=3)
DENSE = dict(query=zeros(2, 8, 4, 3), key=zeros(2, 6, 2, 3), value=zeros(2, 6, 2, 5))


def test_the_calls_below_differ_from_valid_ones():
    assert jn.na2d(**FUSED).shape == (2, 8, 6, 4, 5)
    assert jn.na2d_qk(**QK).shape == (2, 4, 8, 6, 9)
    assert jn.na2d_av(**AV).shape == (2, 4, 8, 6, 5)
    assert jn.attention(**DENSE).shape == (2, 8, 4, 5)


def raises(table):
    """Parametrises by (what differs from the valid call, exception, pattern of its message)."""
    return pytest.mark.parametrize(("wrong", "error", "message"), table, ids=[row[2] for row in table])


# ---- the window, which all operations check alike

WINDOW = [
    (dict(kernel_size=0), ValueError, r"kernel_size: expected one positive int or 2 of them .*got 0"),
    (dict(kernel_size=-3), ValueError, r"kernel_size: expected one positive int or 2 of them .*got -3"),
    (dict(kernel_size=(3, 0)), ValueError, r"kernel_size: expected one positive int .*got \(3, 0\)"),
    (dict(kernel_size=(3,)), ValueError, r"kernel_size: expected one positive int or 2 of them .*got \(3,\)"),
    (dict(kernel_size=(3, 3, 3)), ValueError, r"kernel_size: expected .* 2 of them .*got \(3, 3, 3\)"),
    (dict(kernel_size=2**31), ValueError, r"kernel_size: expected .*got 2147483648"),
    (dict(kernel_size=3.0), TypeError, r"kernel_size: expected one positive int .*got 3\.0"),
    (dict(kernel_size="3"), TypeError, r"kernel_size: expected one positive int .*got '3'"),
    (dict(kernel_size=True), TypeError, r"kernel_size: expected one positive int .*got True"),
    (dict(kernel_size=None), TypeError, r"kernel_size: expected one positive int .*got None"),
    (dict(kernel_size=np.array([3, 3])), TypeError, r"kernel_size: expected one positive int .*got array"),
    (dict(stride=0), ValueError, r"stride: expected one positive int .*got 0"),
    (dict(stride=1.5), TypeError, r"stride: expected one positive int .*got 1\.5"),
    (dict(stride=4), ValueError, r"stride: expected at most the kernel_size 3 on axis 0, got 4"),
    (dict(stride=(1, 4)), ValueError, r"stride: expected at most the kernel_size 3 on axis 1, got 4"),
    (dict(dilation=-1), ValueError, r"dilation: expected one positive int .*got -1"),
    (dict(dilation=(1, "2")), TypeError, r"dilation: expected one positive int .*got \(1, '2'\)"),
    (dict(dilation=(1, 3)), ValueError, r"kernel_size: .*<= 6, the length of axis 1, got 3 \* 3 = 9"),
    (dict(kernel_size=(9, 3)), ValueError, r"kernel_size: .*<= 8, the length of axis 0, got 9 \* 1 = 9"),
    (dict(kernel_size=7, is_causal=True), ValueError, r"kernel_size: .*<= 6, the length of axis 1, got 7 \* 1 = 7"),
    (dict(is_causal=1), TypeError, r"is_causal: expected one bool or 2 of them .*got 1"),
    (dict(is_causal=(True, "no")), TypeError, r"is_causal: expected one bool .*got \(True, 'no'\)"),
    (dict(is_causal=(True,)), ValueError, r"is_causal: expected one bool or 2 of them .*got \(True,\)"),
    (dict(border="zero"), ValueError, r"border: expected .* out of \('shift', 'clip', 'wrap'\), got 'zero'"),
    (dict(border=0), TypeError, r"border: expected .* out of \('shift', 'clip', 'wrap'\), got 0"),
    (dict(border=("clip",)), ValueError, r"border: expected .* 2 of them .*got \('clip',\)"),
    (dict(border="clip", stride=2), ValueError, r"border: 'clip' expects stride 1 on axis 0, got stride 2"),
    (dict(border=("shift", "wrap"), stride=2), ValueError, r"border: 'wrap' expects stride 1 on axis 1, got stride 2"),
    (dict(border="wrap", is_causal=True), ValueError, r"border: 'wrap' expects is_causal False on axis 0, got .*True"),
    (dict(border="wrap", lengths=zeros(2, 2, dtype=int)), ValueError, r"border: 'wrap' on axis 0 expects no lengths"),
    (dict(border="wrap", dilation=(3, 1), kernel_size=2), ValueError, r"border: 'wrap' .*got length 8 and dilation 3"),
    (dict(border="wrap", kernel_size=7), ValueError, r"kernel_size: .*<= 6, the length of axis 1, got 7 \* 1 = 7"),
    (dict(border="clip", dilation=2**30), ValueError, r"kernel_size: .* = 3221225472 on axis 0 is too large"),
    (dict(lengths=zeros(2, 2)), TypeError, r"lengths: expected integers, got dtype float32"),
    (dict(lengths=zeros(2, 3, dtype=int)), ValueError, r"lengths: expected shape \(2, 2\), .*got \(2, 3\)"),
    (dict(lengths=zeros(2, dtype=int)), ValueError, r"lengths: expected shape \(2, 2\), .*got \(2,\)"),
    (
        dict(lengths=[[9, 6], [8, 6]]),
        ValueError,
        r"lengths: expected between 0 and .*\(8, 6\), got \[\[9, 6\], \[8, 6\]\]",
    ),
    (dict(lengths=[[8, 6], [-1, 6]]), ValueError, r"lengths: expected between 0 and .*got \[\[8, 6\], \[-1, 6\]\]"),
    (dict(backend="cuda"), ValueError, r"backend: expected None or one of \('native', 'reference'\), got 'cuda'"),
    (dict(backend=1), TypeError, r"backend: expected None or one of .*got 1"),
    (dict(precision="exact"), ValueError, r"precision: expected a jax\.lax\.Precision .*got 'exact'"),
    (dict(precision=3), TypeError, r"precision: expected None, a jax\.lax\.Precision or its name, got 3"),
]


@raises(WINDOW)
@pytest.mark.parametrize(("function", "valid"), [(jn.na2d, FUSED), (jn.na2d_qk, QK), (jn.na2d_av, AV)])
def test_window(function, valid, wrong, error, message):
    with pytest.raises(error, match=message):
        function(**{**valid, **wrong})


# ---- arrays

ADDITIONAL = dict(additional_keys=zeros(2, 3, 2, 3), additional_values=zeros(2, 3, 2, 5))
FUSED_ARRAYS = [
    (dict(query=zeros(8, 6, 4)), ValueError, r"query: expected 5 or 4 axes, .*got shape \(8, 6, 4\)"),
    (dict(query=zeros(1, 2, 8, 6, 4, 3)), ValueError, r"query: expected 5 or 4 axes, .*got shape \(1, 2, 8, 6, 4, 3\)"),
    (dict(key=zeros(8, 6, 2, 3)), ValueError, r"key: expected 5 axes, .*got shape \(8, 6, 2, 3\)"),
    (dict(value=zeros(8, 6, 2, 5)), ValueError, r"value: expected 5 axes, .*got shape \(8, 6, 2, 5\)"),
    (dict(query=[[0.0]]), TypeError, r"query: expected a jax or NumPy array, got list"),
    (dict(key=None), TypeError, r"key: expected a jax or NumPy array, got NoneType"),
    (dict(key=zeros(3, 8, 6, 2, 3)), ValueError, r"key: expected query's batch 2 on axis 0, got 3"),
    (dict(value=zeros(3, 8, 6, 2, 5)), ValueError, r"value: expected key's batch 2 on axis 0, got 3"),
    (dict(key=zeros(2, 8, 5, 2, 3)), ValueError, r"key: expected query's spatial size 6 on axis 2, got 5"),
    (dict(value=zeros(2, 7, 6, 2, 5)), ValueError, r"value: expected key's spatial size 8 on axis 1, got 7"),
    (dict(key=zeros(2, 8, 6, 2, 4)), ValueError, r"key: expected query's head_dim 3 on axis 4, got 4"),
    (dict(value=zeros(2, 8, 6, 4, 5)), ValueError, r"value: expected key's number of heads 2 on axis 3, got 4"),
    (
        dict(key=zeros(2, 8, 6, 3, 3), value=zeros(2, 8, 6, 3, 5)),
        ValueError,
        r"query: expected a number of heads that is a multiple of key's 3, got 4",
    ),
    (
        dict(key=zeros(2, 8, 6, 0, 3), value=zeros(2, 8, 6, 0, 5)),
        ValueError,
        r"query: expected a number of heads that is a multiple of key's 0, got 4",
    ),
    (
        dict(query=zeros(2, 8, 6, 4, 0), key=zeros(2, 8, 6, 2, 0)),
        ValueError,
        r"query: expected a last axis of at least 1, .*got shape \(2, 8, 6, 4, 0\)",
    ),
    (dict(value=zeros(2, 8, 6, 2, 0)), ValueError, r"value: expected a last axis of at least 1, .*got shape"),
    (dict(key=zeros(2, 8, 6, 2, 3, dtype=np.float16)), TypeError, r"key: expected query's dtype float32, got float16"),
    (dict(value=zeros(2, 8, 6, 2, 5, dtype=ml_dtypes.bfloat16)), TypeError, r"value: .*dtype float32, got bfloat16"),
    (dict(query=zeros(2, 8, 6, 4, 3, dtype=int)), TypeError, r"query: expected a dtype out of float16.*got int64"),
    (dict(query=zeros(2, 8, 6, 4, 3, dtype=complex)), TypeError, r"query: expected a dtype .*got complex128"),
    (dict(query=zeros(2, 8, 6, 4, 3, dtype=bool)), TypeError, r"query: expected a dtype .*got bool"),
    (
        dict(query=zeros(2, 8, 6, 4, 3, dtype=ml_dtypes.float8_e4m3fn)),
        NotImplementedError,
        r"query: expected a dtype out of float16.*got float8_e4m3fn",
    ),
    (dict(rpb=zeros(4, 5)), ValueError, r"rpb: expected shape \(4, 5, 5\), .*got \(4, 5\)"),
    (dict(rpb=zeros(2, 5, 5)), ValueError, r"rpb: expected shape \(4, 5, 5\), .*got \(2, 5, 5\)"),
    (dict(rpb=zeros(4, 5, 3)), ValueError, r"rpb: expected shape \(4, 5, 5\), .*got \(4, 5, 3\)"),
    (dict(rpb=zeros(4, 5, 5, dtype=int)), TypeError, r"rpb: expected a dtype .*got int64"),
    (dict(rpb=1.0), TypeError, r"rpb: expected a jax or NumPy array, got float"),
    (
        dict(additional_keys=ADDITIONAL["additional_keys"]),
        ValueError,
        r"additional_values: expected an array, .*got None",
    ),
    (
        dict(additional_values=ADDITIONAL["additional_values"]),
        ValueError,
        r"additional_keys: expected an array, .*None",
    ),
    (
        ADDITIONAL | dict(additional_keys=zeros(1, 3, 2, 3)),
        ValueError,
        r"additional_keys: expected shape \(2, n, 2, 3\) to go with key, got \(1, 3, 2, 3\)",
    ),
    (
        ADDITIONAL | dict(additional_keys=zeros(2, 3, 4, 3)),
        ValueError,
        r"additional_keys: expected shape \(2, n, 2, 3\) to go with key, got \(2, 3, 4, 3\)",
    ),
    (
        ADDITIONAL | dict(additional_values=zeros(2, 4, 2, 5)),
        ValueError,
        r"additional_values: expected shape \(2, 3, 2, 5\) to go with value, got \(2, 4, 2, 5\)",
    ),
    (
        ADDITIONAL | dict(additional_keys=zeros(3, 2, 3)),
        ValueError,
        r"additional_keys: expected shape \(2, n, 2, 3\) to go with key, got \(3, 2, 3\)",
    ),
    (
        ADDITIONAL | dict(additional_values=zeros(2, 3, 2, 5, dtype=np.float64)),
        TypeError,
        r"additional_values: expected value's dtype float32, got float64",
    ),
    (dict(scale="1"), TypeError, r"scale: expected a Python or NumPy number .*got str"),
    (dict(scale=True), TypeError, r"scale: expected a Python or NumPy number .*got bool"),
    (dict(scale=1j), TypeError, r"scale: expected a Python or NumPy number .*got complex"),
    (dict(scale=jnp.float32(1)), TypeError, r"scale: expected a Python or NumPy number .*got ArrayImpl"),
    (dict(scale=float("nan")), ValueError, r"scale: expected a finite number, got nan"),
    (dict(scale=np.float32("inf")), ValueError, r"scale: expected a finite number, got .*inf"),
    (dict(return_lse=1), TypeError, r"return_lse: expected a bool, got 1"),
    (dict(deterministic="yes"), TypeError, r"deterministic: expected None or a bool, got 'yes'"),
]


@raises(FUSED_ARRAYS)
def test_fused_arrays(wrong, error, message):
    with jax.enable_x64(True), pytest.raises(error, match=message):
        jn.na2d(**{**FUSED, **wrong})


QK_ARRAYS = [
    (dict(query=zeros(4, 8, 6, 3)), ValueError, r"query: expected 5 axes, .*got shape \(4, 8, 6, 3\)"),
    (dict(key=zeros(2, 8, 6, 3)), ValueError, r"key: expected 5 axes, .*got shape \(2, 8, 6, 3\)"),
    (dict(key=zeros(1, 2, 8, 6, 3)), ValueError, r"key: expected query's batch 2 on axis 0, got 1"),
    (dict(key=zeros(2, 2, 8, 7, 3)), ValueError, r"key: expected query's spatial size 6 on axis 3, got 7"),
    (dict(key=zeros(2, 2, 8, 6, 2)), ValueError, r"key: expected query's head_dim 3 on axis 4, got 2"),
    (dict(key=zeros(2, 3, 8, 6, 3)), ValueError, r"query: expected .*multiple of key's 3, got 4"),
    (dict(key=zeros(2, 2, 8, 6, 3, dtype=np.float16)), TypeError, r"key: expected query's dtype float32, got float16"),
    (dict(query=zeros(2, 4, 8, 6, 3, dtype=np.int8)), TypeError, r"query: expected a dtype .*got int8"),
    (dict(query=zeros(2, 4, 8, 6, 3, dtype=ml_dtypes.float8_e5m2)), NotImplementedError, r"query: .*got float8_e5m2"),
    (dict(rpb=zeros(2, 5, 5)), ValueError, r"rpb: expected shape \(4, 5, 5\), .*got \(2, 5, 5\)"),
    (
        dict(additional_keys=zeros(2, 4, 1, 3)),
        ValueError,
        r"additional_keys: expected shape \(2, 2, n, 3\) .*got \(2, 4, 1, 3\)",
    ),
]
AV_ARRAYS = [
    (dict(attn=zeros(4, 8, 6, 9)), ValueError, r"attn: expected 5 axes, .*got shape \(4, 8, 6, 9\)"),
    (dict(attn=zeros(2, 4, 8, 6, 8)), ValueError, r"attn: expected a last axis of prod\(kernel_size\) = 9, got 8"),
    (
        dict(additional_values=zeros(2, 2, 3, 5)),
        ValueError,
        r"attn: expected a last axis of prod\(kernel_size\) \+ 3 additional = 12, got 9",
    ),
    (dict(additional_values=zeros(2, 2, 3, 4)), ValueError, r"additional_values: expected shape \(2, 2, n, 5\) .*got"),
    (dict(value=zeros(2, 3, 8, 6, 5)), ValueError, r"attn: expected .*multiple of value's 3, got 4"),
    (dict(value=zeros(3, 2, 8, 6, 5)), ValueError, r"value: expected attn's batch 2 on axis 0, got 3"),
    (dict(value=zeros(2, 2, 7, 6, 5)), ValueError, r"value: expected attn's spatial size 8 on axis 2, got 7"),
    (
        dict(value=zeros(2, 2, 8, 6, 5, dtype=np.float16)),
        TypeError,
        r"value: expected attn's dtype float32, got float16",
    ),
    (dict(attn=zeros(2, 4, 8, 6, 9, dtype=np.uint8)), TypeError, r"attn: expected a dtype .*got uint8"),
]


@raises(QK_ARRAYS)
def test_qk_arrays(wrong, error, message):
    with pytest.raises(error, match=message):
        jn.na2d_qk(**{**QK, **wrong})


@raises(AV_ARRAYS)
def test_av_arrays(wrong, error, message):
    with pytest.raises(error, match=message):
        jn.na2d_av(**{**AV, **wrong})


DENSE_ARRAYS = [
    (dict(query=zeros(8, 4)), ValueError, r"query: expected 4 or 3 axes, .*got shape \(8, 4\)"),
    (dict(is_causal=True), ValueError, r"key: expected query's spatial size 8 on axis 1, got 6"),
    (dict(is_causal=(True,)), TypeError, r"is_causal: expected a bool, got \(True,\)"),
    (dict(value=zeros(2, 5, 2, 5)), ValueError, r"value: expected key's spatial size 6 on axis 1, got 5"),
    (dict(key=zeros(2, 6, 3, 3), value=zeros(2, 6, 3, 5)), ValueError, r"query: .*multiple of key's 3, got 4"),
    (dict(key=zeros(2, 6, 2, 3, dtype=np.float16)), TypeError, r"key: expected query's dtype float32, got float16"),
    (dict(scale=float("inf")), ValueError, r"scale: expected a finite number, got inf"),
    (dict(return_lse=None), TypeError, r"return_lse: expected a bool, got None"),
    (dict(backend="fast"), ValueError, r"backend: expected None or one of .*got 'fast'"),
]


@raises(DENSE_ARRAYS)
def test_dense_arrays(wrong, error, message):
    with pytest.raises(error, match=message):
        jn.attention(**{**DENSE, **wrong})


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_messages_name_the_axis_of_every_rank(rank):
    x = zeros(1, *(4,) * rank, 1, 2)
    window = (*(3,) * (rank - 1), 5)
    with pytest.raises(ValueError, match=rf"<= 4, the length of axis {rank - 1}, got 5 \* 1 = 5"):
        getattr(jn, f"na{rank}d")(x, x, x, window)


def test_errors_are_raised_under_tracing_too():
    run = jax.jit(functools.partial(jn.na2d, kernel_size=(3, 7)))
    with pytest.raises(ValueError, match=r"the length of axis 1, got 7 \* 1 = 7"):
        run(FUSED["query"], FUSED["key"], FUSED["value"])


def test_a_traced_scale_is_refused_with_advice():
    x = zeros(1, 4, 1, 2)
    with pytest.raises(TypeError, match="multiply the query to apply a traced scale"):
        jax.jit(lambda scale: jn.na1d(x, x, x, 3, scale=scale))(0.5)
