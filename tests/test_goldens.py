"""Numbers stored from NATTEN 0.17.3: outputs, logits, gradients and forward mode, fused and unfused.

The cases lie outside the repository, in ../shared/goldens; its README describes the fields.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import fused, precise, unfused

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "goldens"
CASES = sorted(path.stem for path in FOLDER.glob("g*.npz"))
TOLERANCE = {"float64": 2e-6, "float32": 5e-5}  # the stored values are float32

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden cases in {FOLDER}")


def test_all_cases_are_there():
    assert len(CASES) == len(json.loads((FOLDER / "index.json").read_text())) == 31


def load(name: str) -> tuple[dict, dict]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        arrays = {field: stored[field] for field in stored.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def unfused_path(meta: dict, backend: str, bias_scaled: bool):
    """(q, k, v[, rpb]) -> out, logits."""
    qk, av = unfused(meta["rank"])
    window = [tuple(meta[name]) for name in ("kernel_size", "dilation", "is_causal")]
    scale = meta["scale"]

    def run(q, k, v, *rpb):
        if bias_scaled:
            logits = qk(q, k, *window, rpb=rpb[0] if rpb else None, backend=backend)
            return av(jax.nn.softmax(scale * logits), v, *window, backend=backend), logits
        logits = qk(q * scale, k, *window, rpb=rpb[0], backend=backend)
        return av(jax.nn.softmax(logits), v, *window, backend=backend), logits

    return run


def fused_path(meta: dict, backend: str, bias_scaled: bool):
    """(q, k, v[, rpb]) -> out, None; heads first outside, last inside."""
    keys = ("kernel_size", "dilation", "is_causal", "scale")
    static = {key: tuple(meta[key]) if key != "scale" else meta[key] for key in keys}

    def run(q, k, v, *rpb):
        q, k, v = (jnp.moveaxis(x, 1, -2) for x in (q, k, v))
        table = None if not rpb else rpb[0] * meta["scale"] if bias_scaled else rpb[0]
        return jnp.moveaxis(fused(meta["rank"])(q, k, v, rpb=table, **static, backend=backend), -2, 1), None

    return run


PATHS = {"unfused": unfused_path, "fused": fused_path}


def check(name: str, dtype: str, backend: str, path: str, bias_scaled: bool = True) -> None:
    stored, meta = load(name)
    suffix = "" if bias_scaled else "_biasunscaled"
    inputs = ["q", "k", "v", "rpb"] if meta["has_rpb"] else ["q", "k", "v"]
    function = PATHS[path](meta, backend, bias_scaled)

    @jax.jit
    def run(arrays, cotangent, tangents):
        (out, logits), pull = jax.vjp(function, *arrays)
        grads = pull((cotangent, None if logits is None else jnp.zeros_like(logits)))
        return out, logits, grads, tangents and jax.jvp(function, arrays, tangents)[1][0]

    with precise(dtype):
        cast = [jnp.asarray(stored[name], dtype) for name in inputs]
        moving = meta["has_jvp"] and bias_scaled
        tangents = tuple(jnp.asarray(stored[f"{name}_tangent"], dtype) for name in inputs) if moving else None
        out, logits, grads, moved = run(tuple(cast), jnp.asarray(stored["cotangent"], dtype), tangents)

    def close(actual, field):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, stored[field], rtol=0, atol=TOLERANCE[dtype], err_msg=field)

    close(out, f"out{suffix}")
    for name, grad in zip(inputs, grads, strict=True):
        close(grad, f"d{name}{suffix}")
    if moving:
        close(moved, "out_tangent")
    if logits is not None and meta["has_logits"] and bias_scaled:
        close(logits, "logits")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_native(name, dtype, path):
    check(name, dtype, "native", path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES[::4])
def test_reference(name, path):
    check(name, "float64", "reference", path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in CASES if "rpb" in name])
def test_unscaled_bias(name, path):
    check(name, "float64", "native", path, bias_scaled=False)
