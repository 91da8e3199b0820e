"""Conversion of NATTEN's parameters, and the converted layers against outputs of NATTEN itself."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from flax_layers import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    from_natten,
    to_natten,
)

pytestmark = pytest.mark.usefixtures("accurate_products")

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
GOLDENS = Path(__file__).parents[1].parent / "shared" / "goldens"
CHANNELS = 8


def golden(name):
    """Arrays and metadata of a case computed by NATTEN 0.17.3."""
    path = GOLDENS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"NATTEN's outputs are not here: {path}")
    arrays = dict(np.load(path))
    return arrays, json.loads(str(arrays.pop("meta")))


def state_dict(prefix="", *, channels=CHANNELS, rpb=(2, 5, 5), seed=0):
    """A state dict as NATTEN's module has it."""
    rng = np.random.default_rng(seed)
    shapes = {
        "qkv.weight": (3 * channels, channels),
        "qkv.bias": (3 * channels,),
        "proj.weight": (channels, channels),
        "proj.bias": (channels,),
        "rpb": rpb,
    }
    return {prefix + name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


# ---- numbers


@pytest.mark.parametrize("sow_weights", [False, True], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", ["g1d_rpb_dil", "g2d_rpb_mixed_dil", "g3d_rpb", "g2d_causal_second_dil"])
def test_layer_gives_nattens_outputs_and_gradients(name, sow_weights):
    """x is NATTEN's value, its query and key come in by qk_transform, and the output projection mirrors channels."""
    arrays, meta = golden(name)
    query, key, value, cotangent = (np.moveaxis(arrays[n], 1, -2) for n in ("q", "k", "v", "cotangent"))
    suffix = "_biasunscaled" if meta["has_rpb"] else ""
    x = value.reshape(*value.shape[:-2], -1)
    channels = x.shape[-1]
    mirror = np.eye(channels, dtype=np.float32)[::-1]
    state = state_dict(channels=channels)
    state["qkv.weight"][2 * channels :] = np.eye(channels)
    state |= {"qkv.bias": np.zeros(3 * channels, np.float32), "proj.weight": mirror}
    state["rpb"] = arrays.get("rpb", state["rpb"])
    params = from_natten(state if meta["has_rpb"] else without(state, "rpb"))
    layer = LAYERS[meta["rank"]](
        meta["heads"],
        tuple(meta["kernel_size"]),
        dilation=tuple(meta["dilation"]),
        is_causal=tuple(meta["is_causal"]),
        rel_pos_bias=meta["has_rpb"],
        qk_scale=meta["scale"],
        qk_transform=lambda *_: (jnp.asarray(query), jnp.asarray(key)),
    )

    @jax.jit
    def call(params, x):
        out, pull = jax.vjp(lambda *a: layer.apply({"params": a[0]}, a[1], sow_weights=sow_weights), params, x)
        return out, pull(jnp.asarray(cotangent.reshape(x.shape)[..., ::-1]))

    out, (params_bar, x_bar) = call(params, x)
    expected = np.moveaxis(arrays[f"out{suffix}"], 1, -2).reshape(x.shape)
    assert_close(out, expected[..., ::-1] + state["proj.bias"], factor=2)
    assert_close(x_bar, np.moveaxis(arrays[f"dv{suffix}"], 1, -2).reshape(x.shape), factor=2)
    if meta["has_rpb"]:
        assert_close(params_bar["rpb"], arrays[f"drpb{suffix}"], factor=2)


def test_projections_are_torchs():
    """Windows of one token leave the projections alone: torch computes x W^T + b."""
    state = without(state_dict(), "rpb")
    x = np.random.default_rng(1).standard_normal((2, 5, CHANNELS), dtype=np.float32)
    value = x @ state["qkv.weight"][2 * CHANNELS :].T + state["qkv.bias"][2 * CHANNELS :]
    out = NeighborhoodAttention1D(2, 1).apply({"params": from_natten(state)}, x)
    assert_close(out, value @ state["proj.weight"].T + state["proj.bias"], factor=2)


# ---- names and shapes


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"rel_pos_bias": False}])
def test_structure_is_that_of_the_layer(options):
    layer = NeighborhoodAttention2D(2, 3, **{"rel_pos_bias": True} | options)
    x = jax.ShapeDtypeStruct((1, 4, 4, CHANNELS), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    absent = [{"qkv_bias": "qkv.bias", "rel_pos_bias": "rpb"}[name] for name in options]
    converted = from_natten(without(state_dict(), *absent))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), converted) == jax.tree.map(lambda a: (a.shape, a.dtype), params)


@pytest.mark.parametrize("prefix", ["", "levels.0.blocks.1.attn."])
@pytest.mark.parametrize("absent", [(), ("rpb",), ("qkv.bias", "rpb")])
def test_round_trip(prefix, absent):
    state = without(state_dict(prefix), *(prefix + name for name in absent))
    again = to_natten(from_natten(state), prefix)
    assert again.keys() == state.keys()
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_module_of_a_model():
    first, second = state_dict("blocks.0.attn.", seed=1), state_dict("blocks.1.attn.", seed=2)
    model = first | second | {"blocks.0.norm.weight": np.ones(CHANNELS)}
    jax.tree.map(np.testing.assert_array_equal, from_natten(model, "blocks.1.attn."), from_natten(second))
    with pytest.raises(ValueError, match=r"prefix: expected one module .* got 2 modules"):
        from_natten(model)


def test_whatever_numpy_takes():
    state = without(state_dict(), "rpb") | {"proj.bias": [0.0] * CHANNELS}
    assert from_natten(state)["proj"]["bias"].shape == (CHANNELS,)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(state_dict(), "proj.bias"), r"expected the names \['proj.bias'\]"),
        (without(state_dict(), "qkv.weight"), "prefix: expected one module .* got 0 modules"),
        (state_dict() | {"q_norm.weight": np.ones(4)}, r"got also \['q_norm.weight'\]"),
        (state_dict() | {"qkv.weight": np.ones((CHANNELS, 3 * CHANNELS))}, r"qkv.weight: expected shape \(24, 8\)"),
        (state_dict() | {"qkv.bias": np.ones(CHANNELS)}, r"qkv.bias: expected shape \(24,\)"),
        (state_dict() | {"proj.bias": np.ones((1, CHANNELS))}, "proj.bias: expected one axis"),
        (state_dict(rpb=(2, 4, 5)), "rpb: expected shape"),
        (state_dict(rpb=(3, 5)), "rpb: expected shape .* heads dividing 8"),
    ],
)
def test_errors(state, message):
    with pytest.raises(ValueError, match=message):
        from_natten(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params.pop("proj"), r"expected the names \['proj/kernel', 'proj/bias'\]"),
        (lambda params: params.update(query_ln={"scale": np.ones(4)}), r"got also \['query_ln/scale'\]"),
        (lambda params: params["qkv"].update(kernel=np.ones((8, 8))), "qkv.weight: expected shape"),
    ],
)
def test_errors_on_the_way_back(change, message):
    params = from_natten(state_dict())
    change(params)
    with pytest.raises(ValueError, match=message):
        to_natten(params)
