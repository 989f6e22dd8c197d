import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.parallel.aot import lower_and_compile
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh


def test_compiling_tells_times_bytes_per_device_and_flops():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    aval = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    found = lower_and_compile(jax.jit(lambda x, y: x * y + 1, donate_argnums=0), aval, aval)
    assert min(found.trace_seconds, found.lower_seconds, found.compile_seconds) > 0
    assert found.memory["arguments"] == 2 * 64 * 64 * 4 // 8
    assert found.memory["output"] == found.memory["aliased"] == 64 * 64 * 4 // 8
    assert found.flops is None or found.flops >= 2 * 64 * 64 / 8
    x = jax.device_put(jnp.ones((64, 64)), aval.sharding)
    assert float(found.compiled(jnp.copy(x), x)[0, 0]) == 2.0


def test_a_plain_function_is_compiled_as_jit_would():
    assert lower_and_compile(lambda x: x + 1, jax.ShapeDtypeStruct((3,), jnp.float32)).compiled(jnp.zeros(3)).shape == (3,)
