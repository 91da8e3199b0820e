"""`jax.export`: serialised, reloaded, differentiated, with symbolic sizes and sharded."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put
from operations import BY_NAME, OPERATIONS, assert_close, dense_gradient, everything, loss

import jax_natten as jn

pytest.importorskip("flatbuffers")  # what jax needs to serialise

KERNELS = ("forward", "tangent", "backward", "qk", "av", "inverse", "spread", "collect")
ALLOWED = [export.DisabledSafetyCheck.custom_call(f"jax_natten_{name}") for name in KERNELS]


def reloaded(function, *arguments, vjp_order: int = 0, **options):
    exported = export.export(jax.jit(function), disabled_checks=ALLOWED, **options)(*arguments)
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_export(operation):
    """The artifact and its gradient."""
    arrays = operation.arrays()
    artifact = reloaded(operation.call, *arrays, vjp_order=1)
    assert_close(artifact.call(*arrays), jax.jit(operation.dense)(*arrays))
    actual = jax.jit(jax.grad(loss(artifact.call), everything(operation)))(*arrays)
    assert_close(actual, dense_gradient(operation)[1])


def symbolic(operation, names: dict[str, str]):
    """Shapes of the arguments with the axes of some layout letters left open."""
    scope = export.SymbolicScope()
    return tuple(
        jax.ShapeDtypeStruct(
            export.symbolic_shape(
                ", ".join(names.get(letter, str(size)) for letter, size in zip(layout, shape, strict=True)), scope=scope
            ),
            jnp.float32,
        )
        for layout, shape in zip(operation.layouts, operation.shapes, strict=True)
    )


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_symbolic_batch(operation):
    artifact = reloaded(operation.call, *symbolic(operation, {"b": "batch"}))
    arrays = operation.arrays()
    expected = jax.jit(operation.dense)(*arrays)
    assert_close(artifact.call(*arrays), expected)
    one = [x[:1] if layout[0] == "b" else x for x, layout in zip(arrays, operation.layouts, strict=True)]
    assert_close(artifact.call(*one), jax.tree.map(lambda x: x[:1], expected))


def test_symbolic_batch_gradient():
    operation = BY_NAME["na1d"]
    arrays = operation.arrays()
    gradient = jax.grad(loss(operation.call), (0, 1, 2, 3))
    artifact = reloaded(gradient, *symbolic(operation, {"b": "batch"}))
    assert_close(artifact.call(*arrays), dense_gradient(operation)[1])


def test_several_platforms():
    operation = BY_NAME["na1d"]
    arrays = operation.arrays()
    platforms = (export.default_export_platform(), "tpu")
    artifact = reloaded(operation.call, *arrays, platforms=platforms)
    assert artifact.platforms == platforms
    assert_close(artifact.call(*arrays), jax.jit(operation.dense)(*arrays))


def test_the_reference_needs_no_permission():
    x = jnp.ones((1, 5, 1, 2))
    exported = export.export(jax.jit(lambda x: jn.na1d(x, x, x, 3, backend="reference")))(x)
    assert_close(export.deserialize(exported.serialize()).call(x), jn.na1d(x, x, x, 3))


@pytest.mark.parametrize("how", ["explicit", "shard_map"])
def test_sharded(how):
    """Auto meshes cannot be exported: the partitioner's callback is not part of an artifact."""
    operation = BY_NAME["na1d"]
    specs = operation.specs(b="data", h="model")
    mesh = make_mesh("explicit" if how == "explicit" else "auto")
    function = operation.call
    if how == "shard_map":
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("data", None, "model"))
    x = put(mesh, operation.arrays(), specs)
    is_default = mesh.devices.flat[0].platform == jax.default_backend()
    platforms = (export.default_export_platform() if is_default else "cpu",)
    with jax.set_mesh(mesh):
        artifact = reloaded(function, *x, platforms=platforms)
        actual = jax.jit(artifact.call)(*x)
    assert artifact.nr_devices == 4
    assert_close(jax.device_get(actual), jax.jit(operation.dense)(*operation.arrays()))
