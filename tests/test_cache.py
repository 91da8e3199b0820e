"""The persistent compilation cache must tell sharded programs of different windows apart.

jax hashes a partitioned call by a pointer only, which may be reused, or is left out of the key on request: then two
windows give the same text, and the executable of one would be served for the other.
"""

import json

import pytest
from subprocesses import outputs, start

PROGRAM = """
import gc, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_natten as jn

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", sys.argv[2] == "without pointer")
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
mesh = jax.sharding.Mesh(jax.devices(), ("data",))
x = jax.random.normal(jax.random.key(0), (2, 8, 1, 2))
sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
result = []
for window in (1, 3, 5, 3, 1):
    expected = jn.na1d(x, x, x, window)
    del hits[:]
    actual = jax.jit(lambda x: jn.na1d(x, x, x, window))(sharded)
    hit = any(hits)
    result.append([window, float(jnp.abs(jax.device_get(actual) - expected).max()), hit])
    jax.clear_caches()
    gc.collect()
print(json.dumps(result))
"""


@pytest.mark.parametrize("key", ["with pointer", "without pointer"])
def test_every_window_gets_its_own_executable(tmp_path, key):
    """Twice in processes of their own: the second finds what the first has stored."""
    for process in range(2):
        (text,) = outputs([start(PROGRAM, str(tmp_path), key)])
        result = json.loads(text)
        assert [window for window, _, _ in result] == [1, 3, 5, 3, 1]
        assert max(error for _, error, _ in result) < 1e-5
        if key == "without pointer":
            # Without hits the test would say nothing: the first process meets windows 3 and 1 again.
            assert [hit for _, _, hit in result] == ([True] * 5 if process else [False, False, False, True, True])
