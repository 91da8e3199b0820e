"""Random problems with all features at once, and random nonsense that must end in a clear error."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import Problem, check_fused, check_unfused, fused, unfused

import jax_natten as jn


def steady(examples: int):
    """The same examples every time, however long they take."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


LONGEST = {1: 17, 2: 7, 3: 4}


@st.composite
def axes(draw, longest):
    """(length, kernel_size, stride, dilation, is_causal, border) of one valid axis."""
    length = draw(st.integers(1, longest))
    causal, border = draw(st.booleans()), draw(st.sampled_from(["shift", "shift", "clip", "wrap"]))
    if border == "wrap":
        dilation = draw(st.sampled_from([d for d in range(1, length + 1) if length % d == 0]))
        return length, draw(st.integers(1, length // dilation)), 1, dilation, False, border
    if border == "clip" and not causal:
        return length, draw(st.integers(1, 2 * longest)), 1, draw(st.integers(1, longest)), False, border
    kernel_size = draw(st.integers(1, length))
    dilation = draw(st.integers(1, length // kernel_size))
    stride = 1 if border == "clip" else draw(st.integers(1, kernel_size))
    return length, kernel_size, stride, dilation, causal, border


@st.composite
def problems(draw, dtypes=("float32", "float64")):
    rank = draw(st.integers(1, 3))
    # A window far beyond a clipped border costs time and shows nothing new: at most a few hundred slots.
    window = [draw(axes(LONGEST[rank])) for _ in range(rank)]
    while np.prod([axis[1] for axis in window]) > 200:
        window = [(length, min(k, 4), min(t, 4, k), *rest) for length, k, t, *rest in window]
    spatial, kernel_size, stride, dilation, is_causal, border = zip(*window, strict=True)
    batch = draw(st.integers(1, 2))
    lengths = None
    if "wrap" not in border and draw(st.booleans()):
        lengths = tuple(tuple(draw(st.integers(0, s)) for s in spatial) for _ in range(batch))
    heads_kv = draw(st.integers(1, 2))
    return Problem(
        spatial=spatial,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        border=border,
        batch=batch,
        heads=heads_kv * draw(st.integers(1, 2)),
        heads_kv=heads_kv,
        dim=draw(st.integers(1, 9)),
        value_dim=draw(st.integers(1, 9)),
        rpb=draw(st.booleans()),
        rpb_dtype=draw(st.sampled_from([None, "float32"])),
        scale=draw(st.sampled_from([None, 0.0, 1.3, -0.4])),
        lengths=lengths,
        additional=draw(st.sampled_from([None, None, 0, 1, 3])),
        dtype=draw(st.sampled_from(dtypes)),
    )


@steady(60)
@given(problems())
def test_fused(problem):
    check_fused(problem, "native")


@steady(40)
@given(problems())
def test_unfused(problem):
    check_unfused(problem, "native")


@steady(20)
@given(problems(dtypes=("float16", "bfloat16")))
def test_half_precision(problem):
    check_fused(problem, "native")


@steady(6)
@given(problems())
def test_reference(problem):
    check_fused(problem, "reference")


# ---- nonsense

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-1, 5), max_size=4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from(
        [np.int8(3), np.float32(2), np.True_, np.array([3, 3]), 2**31, 2**63, -(2**70), {}, b"3", object()]
    ),
)
DTYPES = ["float32"] * 6 + ["float16", "float64", "int32", "bool", "complex64", ml_dtypes.float8_e4m3fn]


def array(draw, shape):
    """An array that has about the given shape and probably is float32."""
    shape = list(shape)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 1]))):
        change = draw(st.sampled_from(["resize", "drop", "add"]))
        axis = draw(st.integers(0, len(shape) - 1))
        if change == "resize":
            shape[axis] = draw(st.integers(0, 6))
        elif change == "drop":
            del shape[axis]
        else:
            shape.insert(axis, draw(st.integers(1, 3)))
    return np.ones(shape, draw(st.sampled_from(DTYPES)))


def some(draw, options: dict) -> dict:
    """A few of the options, each with a value that is either sensible or anything."""
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True))
    return {name: draw(st.one_of(st.sampled_from(options[name]), ANYTHING)) for name in names}


WINDOW = {
    "kernel_size": [3, (3, 2)],
    "stride": [1, 2, (1, 3)],
    "dilation": [1, (1, 2)],
    "is_causal": [True, (False, True)],
    "border": ["shift", "clip", ("wrap", "shift")],
    "lengths": [np.array([[4, 3], [5, 6]]), np.array([[9, 3], [5, 6]]), [[1, 2], [3, 4]], np.ones((2, 2))],
    "backend": [None, "native"],
    "precision": [None, "highest"],
}
FUSED = WINDOW | {"scale": [1.0, 0], "return_lse": [True], "deterministic": [None, True]}


def errors_or_result(function, *args, shape, **kwargs):
    """Either one of the documented exceptions with a message, or finite results of the right shape."""
    try:
        result = function(*args, **kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        text = str(error)
        assert ":" in text and "expected" in text or "expects" in text or "too large" in text, text
        return
    out = result[0] if isinstance(result, tuple) else result
    assert out.shape == shape(args), (out.shape, args)
    assert out.dtype == jnp.asarray(args[0]).dtype


@steady(150)
@given(st.data())
def test_nonsense_for_fused(data):
    query, key, value = (array(data.draw, (2, 5, 6, 2, 3)) for _ in range(3))
    kwargs = {"kernel_size": 3, **some(data.draw, FUSED)}
    if data.draw(st.booleans()):
        kwargs |= {name: array(data.draw, (2, 1, 2, 3)) for name in ("additional_keys", "additional_values")}
    if data.draw(st.booleans()):
        kwargs["rpb"] = array(data.draw, (2, 5, 5))
    errors_or_result(fused(2), query, key, value, shape=lambda x: (*x[0].shape[:-1], x[2].shape[-1]), **kwargs)


@steady(80)
@given(st.data())
def test_nonsense_for_unfused(data):
    qk, av = unfused(2)
    kwargs = {"kernel_size": 3, **some(data.draw, WINDOW)}
    if data.draw(st.booleans()):
        errors_or_result(
            qk,
            *(array(data.draw, (2, 2, 5, 6, 3)) for _ in range(2)),
            shape=lambda x: (*x[0].shape[:-1], int(np.prod(np.broadcast_to(kwargs["kernel_size"], 2)))),
            **kwargs,
        )
    else:
        attn, value = array(data.draw, (2, 2, 5, 6, 9)), array(data.draw, (2, 2, 5, 6, 3))
        errors_or_result(av, attn, value, shape=lambda x: (*x[0].shape[:-1], x[1].shape[-1]), **kwargs)


@steady(60)
@given(st.data())
def test_nonsense_for_dense(data):
    options = {name: FUSED[name] for name in ("is_causal", "scale", "return_lse", "backend", "precision")}
    arrays = [array(data.draw, (2, 4, 2, 3)) for _ in range(3)]
    errors_or_result(
        jn.attention, *arrays, shape=lambda x: (*x[0].shape[:-1], x[2].shape[-1]), **some(data.draw, options)
    )


@steady(100)
@given(st.data())
def test_nonsense_for_helpers(data):
    names = ("stride", "dilation", "is_causal", "border")
    window = {"kernel_size": 3, **some(data.draw, {name: WINDOW[name] for name in names})}
    for function, size in ((jn.window_indices, (5, 6)), (jn.flops, (2, 5, 6, 1, 3))):
        size = data.draw(st.one_of(st.just(size), st.lists(st.integers(-1, 7), max_size=6), ANYTHING))
        try:
            result = function(size, **window)
        except (ValueError, TypeError):
            continue
        assert isinstance(result, jn.WindowIndices | jn.Flops)


def test_tracers_are_not_nonsense():
    """Abstract arrays pass the same checks."""
    query = jax.ShapeDtypeStruct((2, 5, 6, 2, 3), jnp.float32)
    lengths = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    out = jax.eval_shape(lambda q, n: jn.na2d(q, q, q, 3, lengths=n), query, lengths)
    assert out.shape == query.shape
