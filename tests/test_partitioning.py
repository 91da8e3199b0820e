"""Sharded programs: right numbers, and no communication that the mathematics does not ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put, run
from operations import BY_NAME, OPERATIONS, assert_close, dense_fused, loss, pairs

import jax_natten as jn

kinds = pytest.mark.parametrize("kind", ["auto", "explicit"])


def gradient(f, n: int):
    return jax.grad(loss(f), tuple(range(n)))


def forward(f, x, t):
    return f(*x)


def grad(f, x, t):
    return gradient(f, len(x))(*x)


def jvp(f, x, t):
    return jax.jvp(f, x, t)


def hessian_vector_product(f, x, t):
    return jax.jvp(gradient(f, len(x)), x, t)[1]


@functools.cache
def dense_result(transform, operation):
    return jax.jit(transform, static_argnums=0)(operation.dense, operation.arrays(), operation.arrays(1))


@pytest.mark.parametrize("transform", [forward, grad, jvp, hessian_vector_product], ids=lambda f: f.__name__)
@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
@kinds
def test_batch_and_heads(kind, operation, transform):
    """The bias table is the only argument that the batch shares: its gradient alone is summed over devices."""
    mesh, specs = make_mesh(kind), operation.specs(b="data", h="model")
    x, t = put(mesh, operation.arrays(), specs), put(mesh, operation.arrays(1), specs)
    actual, communication = run(mesh, functools.partial(transform, operation.call), x, t)
    assert_close(actual, dense_result(transform, operation))
    shared = any("b" not in layout for layout in operation.layouts) and transform in (grad, hessian_vector_product)
    assert communication == ({"all-reduce": 1} if shared else {})


@kinds
def test_no_gradient_of_the_bias_no_communication(kind):
    operation = BY_NAME["na1d"]
    mesh = make_mesh(kind)
    x = put(mesh, operation.arrays(), operation.specs(b="data"))
    actual, communication = run(mesh, jax.grad(loss(operation.call), (0, 1, 2)), *x)
    assert_close(actual, dense_result(grad, operation)[:3])
    assert communication == {}


@pytest.mark.parametrize("transform", [forward, grad], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["na2d", "na3d", "na2d_qk", "na2d_av"])
@kinds
def test_spatial_axes(kind, name, transform):
    """The keys are gathered: windows cross the shards."""
    operation, mesh = BY_NAME[name], make_mesh(kind)
    specs = operation.specs(x="data", b="model")
    x = put(mesh, operation.arrays(), specs)
    actual, communication = run(mesh, functools.partial(transform, operation.call), x, None)
    assert_close(actual, dense_result(transform, operation))
    assert communication


def grouped_heads(heads: int, key_heads: int):
    arrays = tuple(
        jax.random.normal(jax.random.key(i), (2, 5, n, 2)) for i, n in enumerate((heads, key_heads, key_heads))
    )
    return arrays, functools.partial(dense_fused, pairs(2, (5,), (3,)))


def call(q, k, v):
    return jn.na1d(q, k, v, 3, return_lse=True)


def call_unfused(q, k, v):
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.moveaxis(jn.na1d_av(jax.nn.softmax(jn.na1d_qk(q, k, 3)), v, 3), 1, 2)


# (query heads, key heads), mesh shape, specs of the query's and the key's heads
HEADS = {
    "one mesh axis": ((8, 4), (1, 4), "model", "model"),
    "two mesh axes": ((8, 4), (2, 2), ("data", "model"), ("data", "model")),
    "key heads take the first of two": ((8, 2), (2, 2), ("data", "model"), "data"),
    "key heads not divisible": ((8, 2), (1, 4), "model", None),
    "one key head": ((4, 1), (1, 4), "model", None),
}


@pytest.mark.parametrize("f", [call, call_unfused], ids=["fused", "unfused"])
@pytest.mark.parametrize("heads, shape, query_spec, key_spec", list(HEADS.values()), ids=list(HEADS))
@kinds
def test_grouped_heads(kind, heads, shape, query_spec, key_spec, f):
    (q, k, v), dense = grouped_heads(*heads)
    mesh = make_mesh(kind, shape)
    specs = [P(None, None, spec, None) for spec in (query_spec, key_spec, key_spec)]
    x = put(mesh, (q, k, v), specs)
    expected = jax.jit(gradient(dense if f is call else lambda *x: dense(*x)[0], 3))(q, k, v)
    actual, communication = run(mesh, gradient(f, 3), *x)
    assert_close(actual, expected)
    if query_spec == key_spec:
        assert communication == {}


def test_gradient_of_grouped_keys_is_sharded_without_being_told():
    """The partitioner learns from the rule that key heads follow the heads of the queries."""
    (q, k, v), _ = grouped_heads(4, 2)
    mesh = make_mesh("auto", (1, 2))
    x = put(mesh, (q, k, v), [P(None, None, "model", None)] * 3)
    bar = jax.jit(jax.grad(loss(call_unfused), 1))(*x)
    assert bar.sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "model", None)), 4)


@kinds
@pytest.mark.parametrize("mapped", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
def test_vmap_over_a_sharded_axis(kind, mapped):
    """A mapped axis is a batch axis: sharded, it costs nothing."""
    (q, k, v), dense = grouped_heads(2, 2)
    mesh = make_mesh(kind)
    arrays = tuple(jnp.stack([x, 2 * x]) if m else x for x, m in zip((q, k, v), mapped, strict=True))
    specs = [P("data") if m else P() for m in mapped]
    axes = [0 if m else None for m in mapped]
    x = put(mesh, arrays, specs)
    actual, communication = run(mesh, jax.vmap(call, in_axes=axes), *x)
    assert_close(actual, jax.jit(jax.vmap(dense, in_axes=axes))(*arrays))
    assert communication == {}


@kinds
def test_vmap_keeps_a_sharded_batch(kind):
    (q, k, v), dense = grouped_heads(2, 2)
    mesh = make_mesh(kind)
    arrays = tuple(jnp.stack([x, 2 * x], axis=1) for x in (q, k, v))
    x = put(mesh, arrays, [P("data", None, None, "model")] * 3)
    mapped = functools.partial(jax.vmap, in_axes=1)
    actual, communication = run(mesh, gradient(mapped(call), 3), *x)
    assert_close(actual, jax.jit(gradient(mapped(dense), 3))(*arrays))
    assert communication == {}


@kinds
def test_scan_over_layers(kind):
    (q, k, v), dense = grouped_heads(2, 2)
    mesh = make_mesh(kind)

    def layers(f):
        def value(q, k, v):
            return jax.lax.scan(lambda x, scale: (f(x * scale, k, v)[0], None), q, jnp.array([1.0, 2.0]))[0]

        return gradient(value, 3)

    x = put(mesh, (q, k, v), [P("data", None, "model", None)] * 3)
    actual, communication = run(mesh, layers(call), *x)
    assert_close(actual, jax.jit(layers(dense))(q, k, v))
    assert communication == {}


@kinds
def test_lengths_sharded_with_the_batch(kind):
    (q, k, v), _ = grouped_heads(2, 2)
    lengths = jnp.array([[5], [3]], jnp.int32)
    mesh = make_mesh(kind)
    x = put(mesh, (q, k, v, lengths), [P("data")] * 4)
    actual, communication = run(mesh, lambda q, k, v, n: jn.na1d(q, k, v, 3, lengths=n), *x)
    p = pairs(2, (5,), (3,), lengths=np.array(lengths))
    assert_close(actual, dense_fused(p, q, k, v)[0])
    assert communication == {}


@pytest.mark.parametrize("backend", ["native", "reference"])
@kinds
def test_backends(kind, backend):
    (q, k, v), dense = grouped_heads(2, 2)
    mesh = make_mesh(kind)
    x = put(mesh, (q, k, v), [P("data", None, "model", None)] * 3)

    def named(q, k, v):
        return jn.na1d(q, k, v, 3, return_lse=True, backend=backend)

    actual, communication = run(mesh, gradient(named, 3), *x)
    assert_close(actual, jax.jit(gradient(dense, 3))(q, k, v))
    assert communication == {}


@kinds
def test_eager_call(kind):
    (q, k, v), dense = grouped_heads(2, 2)
    mesh = make_mesh(kind)
    x = put(mesh, (q, k, v), [P("data", None, "model", None)] * 3)
    with jax.set_mesh(mesh):
        out, lse = call(*x)
        bars = gradient(call, 3)(*x)
    assert_close((out, lse), dense(q, k, v))
    assert_close(bars, gradient(dense, 3)(q, k, v))
    assert out.sharding.is_equivalent_to(x[0].sharding, 4)


@pytest.mark.parametrize("transform", [grad, hessian_vector_product], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["na1d", "na1d_qk"])
@pytest.mark.parametrize("explicit", ["data", "model"])
def test_mesh_of_both_kinds(explicit, name, transform):
    """One axis Auto, the other Explicit."""
    operation = BY_NAME[name]
    kinds = tuple("explicit" if axis == explicit else "auto" for axis in ("data", "model"))
    mesh, specs = make_mesh(kinds), operation.specs(b="data", h="model")
    x, t = put(mesh, operation.arrays(), specs), put(mesh, operation.arrays(1), specs)
    actual, _ = run(mesh, functools.partial(transform, operation.call), x, t)
    assert_close(actual, dense_result(transform, operation))
