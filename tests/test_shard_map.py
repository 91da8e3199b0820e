"""Operations inside `shard_map`, with its default checks: sharded, replicated and partly manual."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put, run
from operations import BY_NAME, OPERATIONS, assert_close, dense_gradient, everything, loss

import jax_natten as jn

operations = pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
AXES = ("data", "model")


def total(f):
    """The loss of all shards."""
    return lambda *arrays: jax.lax.psum(loss(f)(*arrays), AXES)


@operations
def test_grad_inside(operation):
    """Inside, the gradient of a table that the batch shares is already the sum over the shards."""
    mesh, specs = make_mesh("auto"), operation.specs(b="data", h="model")
    inside = jax.value_and_grad(total(operation.call), everything(operation))
    f = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=(P(), specs))
    assert_close(jax.jit(f)(*operation.arrays()), dense_gradient(operation))


@operations
def test_grad_outside(operation):
    mesh, specs = make_mesh("auto"), operation.specs(b="data", h="model")
    f = jax.shard_map(total(operation.call), mesh=mesh, in_specs=specs, out_specs=P())
    actual, communication = run(mesh, jax.value_and_grad(f, everything(operation)), *operation.arrays())
    assert_close(actual, dense_gradient(operation))
    assert set(communication) <= {"all-reduce"}


@operations
def test_hessian_vector_product_inside(operation):
    mesh, specs = make_mesh("auto"), operation.specs(b="data", h="model")

    def product(value):
        return lambda x, t: jax.jvp(jax.grad(value, everything(operation)), x, t)[1]

    f = jax.shard_map(product(total(operation.call)), mesh=mesh, in_specs=(specs, specs), out_specs=specs)
    x, t = operation.arrays(), operation.arrays(1)
    assert_close(jax.jit(f)(x, t), jax.jit(product(loss(operation.dense)))(x, t))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("replicated", [(1, 2), (0,), (0, 1, 2)], ids=["key and value", "query", "all"])
def test_replicated_arguments(replicated, check_vma):
    """Heads are sharded for some arguments, and others have one head for all: their gradient is the sum."""
    shapes = [(1, 5, 1 if i in replicated else 2, 2) for i in range(3)]
    x = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    rpb = jax.random.normal(jax.random.key(3), (1, 5))
    specs = tuple(P() if i in replicated else P(None, None, "model") for i in range(3)) + (P(),)
    mesh = make_mesh("auto", (2,), ("model",))
    f = jax.shard_map(
        lambda q, k, v, rpb: jn.na1d(q, k, v, 3, rpb=rpb)[None],
        mesh=mesh,
        in_specs=specs,
        out_specs=P("model"),
        check_vma=check_vma,
    )

    def one_by_one(*arrays):
        def head(x, i):
            return x[:, :, i : i + 1] if x.ndim == 4 and x.shape[2] == 2 else x

        return jnp.stack([jn.na1d(*[head(x, i) for x in arrays[:3]], 3, rpb=arrays[3]) for i in range(2)])

    actual, expected = (jax.jit(jax.grad(loss(g), (0, 1, 2, 3)))(*x, rpb) for g in (f, one_by_one))
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["na1d", "na2d", "na1d_qk", "na2d_av"])
@pytest.mark.parametrize("heads", [None, "model"], ids=["heads whole", "heads sharded"])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_partly_manual(kind, heads, name):
    """The batch is manual. Heads that are left to the partitioner may be gathered, Explicit ones stay sharded."""
    operation, mesh = BY_NAME[name], make_mesh(kind)
    specs = operation.specs(b="data")

    def inside(*x):
        return jax.lax.psum(loss(operation.call)(*x), "data")

    f = jax.shard_map(inside, mesh=mesh, axis_names={"data"}, in_specs=specs, out_specs=P())
    x = put(mesh, operation.arrays(), operation.specs(b="data", h=heads))
    actual, communication = run(mesh, jax.value_and_grad(f, everything(operation)), *x)
    assert_close(actual, dense_gradient(operation))
    if heads is None or (kind == "explicit" and not entering_gathers(mesh, x[0], specs[0])):
        assert set(communication) == {"all-reduce"}


def entering_gathers(mesh, x, spec) -> bool:
    """Whether the shard_map itself gathers, whatever runs inside: jax 0.10 does on Explicit meshes."""
    f = jax.shard_map(jnp.sin, mesh=mesh, axis_names={"data"}, in_specs=spec, out_specs=spec)
    return "all-gather" in run(mesh, f, x)[1]


@pytest.mark.parametrize("name", ["na1d", "na1d_qk"])
def test_nested(name):
    """Both axes manual, one shard_map inside the other: nothing is gathered.

    The gradient is taken inside, because jax itself cannot transpose a nested shard_map.
    """
    operation, mesh = BY_NAME[name], make_mesh("auto")
    batch, heads = operation.specs(b="data"), operation.specs(h="model")

    def outer(*x):
        return jax.shard_map(
            jax.value_and_grad(total(operation.call), everything(operation)),
            axis_names={"model"},
            in_specs=heads,
            out_specs=(P(), heads),
        )(*x)

    f = jax.shard_map(outer, mesh=mesh, axis_names={"data"}, in_specs=batch, out_specs=(P(), batch))
    x = put(mesh, operation.arrays(), operation.specs(b="data", h="model"))
    actual, communication = run(mesh, f, *x)
    assert_close(actual, dense_gradient(operation))
    assert set(communication) == {"all-reduce"}


UNFUSED = {
    "qk": lambda q, k, rpb, backend: jn.na1d_qk(q, k, 3, rpb=rpb, backend=backend),
    "av": lambda attn, v, rpb, backend: jn.na1d_av(attn, v, 3, backend=backend) + rpb[:, :1, None],
}


@pytest.mark.parametrize("f", list(UNFUSED.values()), ids=list(UNFUSED))
def test_reference_backend_unfused(f):
    """The reference sums over blocks of queries; its sums must vary over the mesh as the operands do."""
    x = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 2, 5, 3), (2, 2, 5, 3), (2, 5)])]
    mesh, specs = make_mesh("auto"), (P("data", "model"), P("data", "model"), P("model"))

    def sharded(backend):
        value = total(functools.partial(f, backend=backend))
        return jax.shard_map(jax.grad(value, (0, 1, 2)), mesh=mesh, in_specs=specs, out_specs=specs)

    expected = jax.jit(jax.grad(loss(functools.partial(f, backend="native")), (0, 1, 2)))(*x)
    assert_close(jax.jit(sharded("reference"))(*x), expected)


def test_reference_backend_fused():
    operation, mesh = BY_NAME["na1d"], make_mesh("auto")
    specs = operation.specs(b="data", h="model")

    def value(q, k, v, rpb):
        return jn.na1d(q, k, v, 3, dilation=2, is_causal=True, rpb=rpb, backend="reference")

    inside = jax.value_and_grad(total(value), everything(operation))
    f = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=(P(), specs))
    assert_close(jax.jit(f)(*operation.arrays()), dense_gradient(operation))


def test_vmap_of_shard_map():
    operation, mesh = BY_NAME["na1d"], make_mesh("auto")
    specs = operation.specs(b="data", h="model")
    out = P("data", None, "model", None)
    f = jax.vmap(jax.shard_map(operation.call, mesh=mesh, in_specs=specs, out_specs=out))
    arrays = tuple(jnp.stack(pair) for pair in zip(operation.arrays(), operation.arrays(1), strict=True))
    assert_close(jax.jit(f)(*arrays), jax.jit(jax.vmap(operation.dense))(*arrays))
