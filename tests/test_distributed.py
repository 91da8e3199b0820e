"""Two processes on one machine, the batch sharded over both."""

import json
import socket

import numpy as np
from operations import BY_NAME, assert_close, dense_gradient
from subprocesses import outputs, start

PROGRAM = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding

address, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, process, initialization_timeout=60)
from operations import BY_NAME, loss
from meshes import collectives

operation = BY_NAME["na1d"]
mesh = jax.sharding.Mesh(jax.devices(), ("data",))
assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
arrays = [
    jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index, x=np.asarray(x): x[index])
    for x, spec in zip(operation.arrays(), operation.specs(b="data"))
]
compiled = jax.jit(jax.value_and_grad(loss(operation.call), (0, 1, 2, 3))).lower(*arrays).compile()
value, (q, k, v, rpb) = compiled(*arrays)
mine = [np.asarray(x.addressable_data(0)).tolist() for x in (value, q, k, v, rpb)]
print(json.dumps([mine, collectives(compiled)]))
jax.distributed.shutdown()
"""


def test_batch_over_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    results = []
    for text in outputs([start(PROGRAM, address, str(i)) for i in range(2)]):
        # The collectives' library prints too.
        results.append(json.loads(next(line for line in text.splitlines() if line.startswith("[["))))
    value, bars = dense_gradient(BY_NAME["na1d"])
    for process, (mine, communication) in enumerate(results):
        expected = (value, *(bar[process : process + 1] for bar in bars[:3]), bars[3])
        assert_close([np.asarray(x, np.float32) for x in mine], list(expected))
        assert set(communication) == {"all-reduce"}
