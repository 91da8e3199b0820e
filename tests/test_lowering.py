"""What a call compiles to: which kernels run, on which platforms, and how jax's debugging switches see it."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from operations import BY_NAME, OPERATIONS, assert_close, dense_gradient, everything, loss

import jax_natten as jn
from jax_natten._primitive import KERNEL_PLATFORMS

operations = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)


def kernels(function, *arrays) -> dict[str, int]:
    """How often the compiled program calls each kernel."""
    text = jax.jit(function).lower(*arrays).compile().as_text()
    return dict(Counter(re.findall(r'custom_call_target="jax_natten_(\w+)"', text)))


# ---- efficiency


CALLS = {
    "na1d": ({"forward": 1}, {"forward": 1, "backward": 1}, {"forward": 1, "tangent": 1}),
    "attention": ({"forward": 1}, {"forward": 1, "backward": 1}, {"forward": 1, "tangent": 1}),
    "na1d_qk": ({"qk": 1, "spread": 1}, {"qk": 1, "spread": 1, "av": 1, "inverse": 1, "collect": 1}, None),
    "na1d_av": ({"av": 1}, {"av": 1, "qk": 1, "inverse": 1}, {"av": 3}),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_kernel_runs_without_need(name):
    """A call runs forward, reverse mode adds backward and never the tangent, forward mode adds the tangent."""
    operation = BY_NAME[name]
    x, t = operation.arrays(), operation.arrays(1)
    forward, reverse, tangent = CALLS[name]
    assert kernels(operation.call, *x) == forward
    assert kernels(jax.value_and_grad(loss(operation.call), everything(operation)), *x) == reverse
    if tangent is not None:
        assert kernels(lambda x, t: jax.jvp(operation.call, x, t), x, t) == tangent


def test_derivatives_of_linear_operands_run_kernels_only():
    """A pullback is linear in its cotangents: its own derivative is the kernel again, not the reference's."""
    operation = BY_NAME["na1d"]
    x = operation.arrays()
    out = operation.call(*x)

    def pull_twice(bar, bar_dot):
        pullback = jax.vjp(operation.call, *x)[1]
        return jax.jvp(pullback, (bar,), (bar_dot,))

    assert kernels(pull_twice, out, out) == {"forward": 1, "backward": 2}
    bars, dots = jax.jit(pull_twice)(out, 2 * out)
    assert_close(dots, jax.tree.map(lambda bar: 2 * bar, bars))
    assert_close(bars, jax.jit(lambda bar: jax.vjp(operation.dense, *x)[1](bar))(out))


def test_vmap_is_one_call():
    operation = BY_NAME["na1d"]
    x = tuple(jnp.stack([leaf] * 3) for leaf in operation.arrays())
    assert kernels(jax.vmap(operation.call), *x) == {"forward": 1}


# ---- platforms


@operations
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_cross_lowering(platform, operation):
    """Programs for other platforms can be made here; where there are no kernels, they hold the reference."""
    gradient = jax.jit(jax.value_and_grad(loss(operation.call), everything(operation)))
    text = gradient.trace(*operation.arrays()).lower(lowering_platforms=(platform,)).as_text()
    has_kernels = platform in KERNEL_PLATFORMS and operation.name != "merge_attentions"
    assert ("jax_natten_" in text) == has_kernels


def test_native_for_a_platform_without_kernels():
    traced = jax.jit(lambda x: jn.na1d(x, x, x, 3, backend="native")).trace(jnp.ones((1, 5, 1, 2)))
    with pytest.raises(NotImplementedError, match="native.*reference.*cpu"):
        traced.lower(lowering_platforms=("tpu",))


def test_reference_runs_no_kernel():
    x = jnp.ones((1, 5, 1, 2))
    assert kernels(lambda x: jn.na1d(x, x, x, 3, backend="reference"), x) == {}
    assert kernels(lambda x: jn.na1d(x, x, x, 3, backend="native"), x) == {"forward": 1}


# ---- precision


ARGUMENTS = {None: False, "highest": False, "float32": False, "high": True, "tensorfloat32": True, "default": True}
AMBIENT = {
    **ARGUMENTS,
    "bfloat16": True,
    "F16_F16_F32": True,
    "BF16_BF16_F32": True,
    "BF16_BF16_F32_X3": False,
    "BF16_BF16_F32_X6": False,
    "BF16_BF16_F32_X9": False,
    "TF32_TF32_F32": True,
    "TF32_TF32_F32_X3": False,
    "F32_F32_F32": False,
    "F64_F64_F64": False,
}


def allows_tf32(**precision) -> bool:
    """Whether all kernels of a program that calls each of them are told that they may use TF32."""
    x = jnp.ones((1, 5, 5, 2))

    def fused(x):
        return jn.na1d(x, x, x, 3, **precision)

    def unfused(x):
        return jn.na1d_av(jn.na1d_qk(x, x, 3, rpb=x[0, ..., 0], **precision), x, 3, **precision)

    def run(x):
        return [(jax.vjp(f, x)[1](x), jax.jvp(f, (x,), (x,))) for f in (fused, unfused)]

    calls = re.findall(r"@jax_natten_(\w+)\(.*tf32 = (\w+)", jax.jit(run).lower(x).as_text())
    names, (told,) = {name for name, _ in calls}, {told for _, told in calls}
    assert names == {"forward", "tangent", "backward", "qk", "av", "inverse", "spread", "collect"}
    return {"true": True, "false": False}[told]


@pytest.mark.parametrize("precision", ARGUMENTS)
def test_precision_tells_the_kernels_whether_tf32_will_do(precision):
    assert allows_tf32(precision=precision) == ARGUMENTS[precision]


@pytest.mark.parametrize("ambient", AMBIENT)
def test_ambient_precision_tells_the_kernels_whether_tf32_will_do(ambient):
    with jax.default_matmul_precision(ambient):
        assert allows_tf32() == AMBIENT[ambient]
        assert not allows_tf32(precision="highest")


# ---- debugging switches


@operations
def test_disable_jit(operation):
    x = operation.arrays()
    with jax.disable_jit():
        actual = jax.value_and_grad(loss(operation.call), everything(operation))(*x)
    assert_close(actual, dense_gradient(operation))


@pytest.mark.parametrize("name", ["na1d", "na1d_av", "attention"])
def test_eager(name):
    operation = BY_NAME[name]
    x, t = operation.arrays(), operation.arrays(1)

    def derivatives(f):
        return lambda x, t: (jax.value_and_grad(loss(f), everything(operation))(*x), jax.jvp(f, x, t))

    assert_close(derivatives(operation.call)(x, t), jax.jit(derivatives(operation.dense))(x, t))


@pytest.mark.parametrize("name", ["na1d", "na2d_qk", "na1d_av", "attention"])
def test_no_tracer_leaks(name):
    operation = BY_NAME[name]
    x, t = operation.arrays(), operation.arrays(1)
    gradient = jax.grad(loss(operation.call), everything(operation))
    with jax.checking_leaks():
        jax.jit(lambda x, t: jax.jvp(lambda *x: gradient(*x), x, t))(x, t)
        jax.jit(jax.vmap(operation.call))(*(leaf[None] for leaf in x))
        mesh = jax.make_mesh((min(2, jax.device_count()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        jax.jit(gradient)(*(jax.device_put(leaf, sharding) if leaf.shape[0] == 2 else leaf for leaf in x))


def test_debug_nans():
    operation = BY_NAME["na2d"]  # lengths: queries without a key
    with jax.debug_nans(True):
        jax.grad(loss(operation.call), everything(operation))(*operation.arrays())


@operations
def test_eval_shape(operation):
    x = operation.arrays()
    shapes = jax.eval_shape(operation.call, *x)
    results = operation.call(*x)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(lambda r: (r.shape, r.dtype), results)


def test_donation():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, 2, 4)) for i in range(3))
    expected = jn.na1d(q, k, v, 3)
    actual = jax.jit(lambda q, k, v: jn.na1d(q, k, v, 3), donate_argnums=0)(q, k, v)
    assert_close(actual, expected)
    assert q.is_deleted() and not k.is_deleted()
