"""The layers against NumPy: projections written out here, attention by the brute force of reference.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from tolerances import assert_close

from flax_layers import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

pytestmark = pytest.mark.usefixtures("accurate_products")

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
HEADS, CHANNELS = 2, 6
TINY = {"num_heads": HEADS, "kernel_size": 3}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def filled(variables, seed=1):
    """Every parameter replaced by normal numbers, so that biases and tables count."""
    leaves, tree = jax.tree.flatten(variables)
    return tree.unflatten([normal(*x.shape, seed=seed + i, dtype=x.dtype) / 2 for i, x in enumerate(leaves)])


def built(rank, x, **options):
    """A layer and parameters for it."""
    layer = LAYERS[rank](**TINY | options)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    deterministic = True if layer.deterministic is None else None
    return layer, filled(jax.eval_shape(lambda: layer.init(rngs, x, deterministic=deterministic)))


def expected(params, x, *, qk_scale=None, normalize_qk=False, qk_transform=None, lengths=None, **window):
    """out and weights, float64, from the definition of the layer."""
    params, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    qkv = x @ params["qkv"]["kernel"] + params["qkv"].get("bias", 0.0)
    query, key, value = np.moveaxis(qkv.reshape(*x.shape[:-1], 3, HEADS, -1), -3, 0)
    if normalize_qk:
        query, key = (
            (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6) * params[f"{name}_ln"]["scale"]
            for name, a in {"query": query, "key": key}.items()
        )
    if qk_transform is not None:
        query, key = qk_transform(query, key)
    scale = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    window = {"kernel_size": 3, "rpb": params.get("rpb"), "lengths": lengths} | window
    out, _ = reference.fused(query, key, value, scale=scale, **window)
    heads_first = [np.moveaxis(a, -2, 1) for a in (scale * query, key)]
    logits = reference.qk(*heads_first, **window)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = out.reshape(x.shape) @ params["proj"]["kernel"] + params["proj"]["bias"]
    return out, weights / weights.sum(-1, keepdims=True)


def sown(layer, variables, x, **options):
    out, state = layer.apply(variables, x, sow_weights=True, mutable=["intermediates"], **options)
    (weights,) = state["intermediates"]["attention_weights"]
    return out, weights


# ---- numbers

OPTIONS = {
    "plain": {},
    "dilation": {"dilation": 2},
    "stride": {"stride": 2},
    "causal": {"is_causal": True},
    "clip": {"border": "clip"},
    "wrap": {"border": "wrap"},
    "no qkv bias": {"qkv_bias": False},
    "rpb": {"rel_pos_bias": True},
    "scale": {"qk_scale": 0.25, "rel_pos_bias": True},
    "normalize": {"normalize_qk": True},
    "precision and backend": {"precision": "highest", "backend": "reference"},
    "transform": {"qk_transform": lambda query, key: (2 * query, key[..., ::-1])},
}
SHAPING = ("rel_pos_bias", "qkv_bias", "precision", "backend")  # options that the definition need not be told
CASES = [(1, (7,), options) for options in OPTIONS.values()]
CASES += [
    (2, (5, 6), {"kernel_size": (3, 2), "dilation": (1, 3), "is_causal": (True, False), "rel_pos_bias": True}),
    (3, (3, 4, 4), {"kernel_size": (2, 3, 1), "rel_pos_bias": True}),
]
IDS = [*OPTIONS, "2-D", "3-D"]


@pytest.mark.parametrize(("rank", "spatial", "options"), CASES, ids=IDS)
def test_layer_is_its_definition_on_both_paths(rank, spatial, options):
    x = normal(2, *spatial, CHANNELS)
    layer, variables = built(rank, x, **options)
    out, weights = expected(variables["params"], x, **{k: v for k, v in options.items() if k not in SHAPING})
    assert_close(layer.apply(variables, x), out, factor=4)
    unfused, given = sown(layer, variables, x)
    assert_close(unfused, out, factor=4)
    assert given.dtype == jnp.float32
    assert_close(given, weights, factor=4)


def test_lengths_known_and_traced():
    x, lengths = normal(3, 5, 6, CHANNELS), np.array([[5, 6], [2, 4], [0, 3]], np.int32)
    layer, variables = built(2, x, rel_pos_bias=True)
    out, _ = expected(variables["params"], x, lengths=lengths)
    beyond = (np.indices((5, 6)).T.swapaxes(0, 1) >= lengths[:, None, None]).any(-1)
    x = jnp.where(beyond[..., None], jnp.nan, x)
    known = layer.apply(variables, x, lengths=lengths)
    traced = jax.jit(lambda n: layer.apply(variables, x, lengths=n))(jnp.asarray(lengths))
    unfused, _ = sown(layer, variables, x, lengths=lengths)
    for result in (known, traced, unfused):
        assert_close(result[~beyond], out[~beyond], factor=4)


def test_gradients_of_both_paths_agree():
    x = normal(2, 5, 6, CHANNELS)
    layer, variables = built(2, x, rel_pos_bias=True, normalize_qk=True, is_causal=(True, False))

    def loss(variables, x, sow_weights):
        return jnp.sum(jnp.sin(layer.apply(variables, x, sow_weights=sow_weights)))

    fused, unfused = (jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(variables, x, sow) for sow in (False, True))
    jax.tree.map(lambda a, b: assert_close(a, b, factor=8), fused, unfused)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(fused))


# ---- parameters and dtypes


def test_parameters():
    x = jax.ShapeDtypeStruct((2, 5, 6, CHANNELS), jnp.float32)
    layer = NeighborhoodAttention2D(
        HEADS, (3, 2), rel_pos_bias=True, normalize_qk=True, dtype=jnp.float32, param_dtype=jnp.float16
    )
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float16")}
    assert jax.tree.map(lambda a: a.shape, params) == {
        "qkv": {"kernel": (CHANNELS, 3 * CHANNELS), "bias": (3 * CHANNELS,)},
        "proj": {"kernel": (CHANNELS, CHANNELS), "bias": (CHANNELS,)},
        "rpb": (HEADS, 5, 3),
        "query_ln": {"scale": (3,)},
        "key_ln": {"scale": (3,)},
    }


def test_initialisers():
    constant = nn.initializers.constant
    x = normal(1, 4, CHANNELS)
    layer = NeighborhoodAttention1D(**TINY, rel_pos_bias=True, kernel_init=constant(1.0), bias_init=constant(2.0))
    params = layer.init(jax.random.key(0), x)["params"]
    assert np.all(params["proj"]["kernel"] == 1) and np.all(params["qkv"]["bias"] == 2)
    params = layer.clone(out_kernel_init=constant(3.0), rpb_init=constant(4.0)).init(jax.random.key(0), x)["params"]
    assert np.all(params["qkv"]["kernel"] == 1) and np.all(params["proj"]["kernel"] == 3)
    assert np.all(params["rpb"] == 4)
    table = NeighborhoodAttention1D(HEADS, 401, rel_pos_bias=True).rpb_init(
        jax.random.key(0), (HEADS, 801), jnp.float32
    )
    assert abs(float(jnp.std(table)) - 0.02) < 0.002


def test_partitioned_initialisers():
    names = {"qkv": (None, "model"), "proj": ("model", None)}
    init = nn.initializers.lecun_normal()
    layer = NeighborhoodAttention1D(
        **TINY,
        rel_pos_bias=True,
        kernel_init=nn.with_partitioning(init, names["qkv"]),
        out_kernel_init=nn.with_partitioning(init, names["proj"]),
        rpb_init=nn.with_partitioning(nn.initializers.normal(0.02), ("model", None)),
    )
    x = normal(1, 4, CHANNELS)
    variables = layer.init(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)["params"]
    assert tuple(specs["rpb"]) == ("model", None)
    assert {name: tuple(specs[name]["kernel"]) for name in names} == names
    assert_close(layer.apply(variables, x), layer.apply(nn.unbox(variables), x))


@pytest.mark.parametrize("sow_weights", [False, True])
def test_bfloat16_with_float32_parameters(sow_weights):
    x = normal(2, 5, 6, CHANNELS)
    layer, variables = built(2, x, rel_pos_bias=True, normalize_qk=True, dtype=jnp.bfloat16)
    out = layer.apply(variables, x, sow_weights=sow_weights)
    assert out.dtype == jnp.bfloat16
    correct, _ = expected(variables["params"], x, normalize_qk=True)
    assert_close(out, correct, factor=4)
    loss = jax.jit(jax.grad(lambda v: layer.apply(v, x, sow_weights=sow_weights).sum(dtype=jnp.float32)))
    gradient = loss(variables)
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {np.dtype("float32")}


def test_float64(x64):
    x = normal(1, 5, CHANNELS, dtype=jnp.float64)
    layer, variables = built(1, x, rel_pos_bias=True, normalize_qk=True, param_dtype=jnp.float64)
    out, weights = expected(variables["params"], x, normalize_qk=True)
    assert_close(layer.apply(variables, x), out, dtype=jnp.float64)
    assert_close(sown(layer, variables, x)[1], weights, dtype=jnp.float64)


# ---- dropout


def test_attention_dropout_drops_and_scales_weights():
    rate, x = 0.25, normal(8, 40, CHANNELS)
    layer, variables = built(1, x, attn_drop=rate)
    # With values that are all ones and an identity projection, an output is the sum of the weights that are left.
    params = variables["params"]
    params["qkv"]["kernel"] = params["qkv"]["kernel"].at[:, 2 * CHANNELS :].set(0)
    params["qkv"]["bias"] = params["qkv"]["bias"].at[2 * CHANNELS :].set(1)
    params["proj"] = {"kernel": jnp.eye(CHANNELS), "bias": jnp.zeros(CHANNELS)}
    apply = jax.jit(lambda key: layer.apply(variables, x, deterministic=False, rngs={"dropout": key}))
    sums = apply(jax.random.key(0))[..., :: CHANNELS // HEADS]
    _, weights = expected(params, x)
    variance = rate / (1 - rate) * np.sum(weights**2, axis=-1).mean()
    assert abs(float(jnp.mean(sums)) - 1) < 5 * np.sqrt(variance / sums.size)
    assert abs(float(jnp.var(sums)) / variance - 1) < 0.2
    lost = np.mean(np.asarray(sums) == 0)
    assert abs(lost - rate**3) < 5 * np.sqrt(rate**3 / sums.size)
    assert np.array_equal(apply(jax.random.key(0)), apply(jax.random.key(0)))
    assert not np.array_equal(apply(jax.random.key(0)), apply(jax.random.key(1)))


def test_output_dropout():
    rate, x = 0.25, normal(8, 40, CHANNELS)
    layer, variables = built(1, x, proj_drop=rate, deterministic=False)
    out = layer.apply(variables, x, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(out) != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
    assert_close(out, np.where(kept, expected(variables["params"], x)[0] / (1 - rate), 0), factor=4)


@pytest.mark.parametrize("rates", [{"attn_drop": 0.5}, {"proj_drop": 0.5}], ids=["attention", "output"])
def test_deterministic_is_needed_where_dropout_is(rates):
    x = normal(1, 4, CHANNELS)
    layer, variables = built(1, x, **rates)
    assert_close(layer.apply(variables, x, deterministic=True), expected(variables["params"], x)[0], factor=4)
    assert_close(layer.clone(deterministic=True).apply(variables, x), expected(variables["params"], x)[0], factor=4)
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, x)
    with pytest.raises(ValueError, match="deterministic"):
        layer.clone(deterministic=True).apply(variables, x, deterministic=True)
    layer.clone(**dict.fromkeys(rates, 0.0)).apply(variables, x)  # without dropout nobody asks


def test_everything_dropped():
    x = normal(1, 4, CHANNELS)
    layer, variables = built(1, x, attn_drop=1.0)
    out = layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert_close(out, np.broadcast_to(variables["params"]["proj"]["bias"], out.shape))


def test_weights_are_sown_before_dropout():
    x = normal(2, 5, CHANNELS)
    layer, variables = built(1, x, attn_drop=0.5, deterministic=False)
    _, weights = sown(layer, variables, x, rngs={"dropout": jax.random.key(0)})
    assert_close(weights, expected(variables["params"], x)[1], factor=4)


# ---- lifted transformations


class Residual(nn.Module):
    """The body of a scan over layers: one layer for each dilation, which is static."""

    dilations: tuple
    options: dict

    @nn.compact
    def __call__(self, x, _=None):
        for dilation in self.dilations:
            x = x + NeighborhoodAttention1D(**TINY, dilation=dilation, rel_pos_bias=True, **self.options)(x)
        return x, None


def scanned(body, *args):
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
    return nn.scan(body, length=2, **axes)(*args)


def value_and_grad(function, variables):
    return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(function(v)))))(variables)


def test_scan_of_remat_over_layers():
    x, body = normal(2, 6, CHANNELS), ((1, 2), {})
    module = scanned(nn.remat(Residual), *body)
    variables = filled(jax.eval_shape(lambda: module.init(jax.random.key(0), x, None)))

    def unrolled(variables):
        y = x
        for i in range(2):
            y, _ = Residual(*body).apply(jax.tree.map(lambda a, i=i: a[i], variables), y)
        return y

    results = value_and_grad(lambda v: module.apply(v, x, None)[0], variables), value_and_grad(unrolled, variables)
    jax.tree.map(lambda a, b: assert_close(a, b, factor=8), *results)


def test_remat_and_scan_repeat_dropout():
    x, body, rngs = (
        normal(2, 6, CHANNELS),
        ((1,), {"attn_drop": 0.5, "deterministic": False}),
        {"dropout": jax.random.key(2)},
    )
    plain, remat = scanned(Residual, *body), scanned(nn.remat(Residual), *body)
    variables = filled(jax.eval_shape(lambda: plain.init({"params": jax.random.key(0)} | rngs, x, None)))
    results = [value_and_grad(lambda v, m=m: m.apply(v, x, None, rngs=rngs)[0], variables) for m in (plain, remat)]
    jax.tree.map(lambda a, b: assert_close(a, b, factor=8), *results)


def test_vmap_over_parameters():
    x = normal(3, 2, 6, CHANNELS)
    many = nn.vmap(NeighborhoodAttention1D, variable_axes={"params": 0}, split_rngs={"params": True})
    layer = many(**TINY, rel_pos_bias=True)
    variables = filled(jax.eval_shape(lambda: layer.init(jax.random.key(0), x)))
    out = layer.apply(variables, x)
    for i in range(len(x)):
        params = jax.tree.map(lambda a, i=i: a[i], variables["params"])
        assert_close(out[i], expected(params, x[i])[0], factor=4)


# ---- errors and documentation


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (5, CHANNELS), r"x: expected 3 axes, .*got shape \(5, 6\)"),
        ({}, (1, 5, 5, CHANNELS), r"x: expected 3 axes, .*got shape \(1, 5, 5, 6\)"),
        ({"num_heads": 4}, (1, 5, CHANNELS), r"x: expected .* multiple of num_heads 4, got 6"),
        ({"num_heads": 0}, (1, 5, CHANNELS), "num_heads: expected at least 1, got 0"),
        ({"attn_drop": 1.5}, (1, 5, CHANNELS), "attn_drop: expected a rate from 0 to 1, got 1.5"),
        ({"proj_drop": -0.1}, (1, 5, CHANNELS), "proj_drop: expected a rate from 0 to 1, got -0.1"),
        ({"kernel_size": 7}, (1, 5, CHANNELS), "kernel_size: expected .* <= 5"),
        ({"kernel_size": (3, 3), "rel_pos_bias": True}, (1, 5, CHANNELS), "kernel_size: expected"),
        ({"kernel_size": 0, "rel_pos_bias": True}, (1, 5, CHANNELS), "kernel_size: expected"),
        ({"backend": "fast"}, (1, 5, CHANNELS), "backend: expected"),
    ],
)
def test_errors(options, shape, message):
    layer = NeighborhoodAttention1D(**TINY | options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, deterministic=True), normal(*shape))


def test_documentation_names_the_rank():
    for rank, layer in LAYERS.items():
        assert f"`jax_natten.na{rank}d`" in layer.__doc__ and "<" not in layer.__doc__
