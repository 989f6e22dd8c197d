import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.launch import (
    Cluster,
    broadcast_flag,
    detect_cluster,
    global_batch,
    initialize,
    is_main,
    process_rows,
    reader_of,
)
from sparsejax.parallel.mesh import make_mesh
from sparsejax.plugs import ConfigError

ROOT = Path(__file__).parents[2]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
EXPLICIT = {"SPARSEJAX_COORDINATOR": "h:1234", "SPARSEJAX_NUM_PROCESSES": "4", "SPARSEJAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        (EXPLICIT, Cluster("explicit coordinator", "h:1234", 4, 3)),
        ({**SLURM, "SLURM_NTASKS": "4"}, Cluster("slurm")),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Cluster("tpu pod")),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Cluster("tpu pod")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_the_environment_tells_the_cluster(environment, cluster):
    assert detect_cluster(environment) == cluster


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SPARSEJAX_PROCESS_ID": ""}, "SPARSEJAX_PROCESS_ID missing"),
        ({"SPARSEJAX_COORDINATOR": "host"}, "host:port"),
        ({"SPARSEJAX_NUM_PROCESSES": "many"}, "SPARSEJAX_NUM_PROCESSES = 'many'"),
        ({"SPARSEJAX_PROCESS_ID": "4"}, "must be 0 to 3"),
    ],
)
def test_a_malformed_coordinator_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        detect_cluster({**EXPLICIT, **change})


def test_a_single_machine_reads_every_row_and_connects_to_nothing():
    assert initialize() is None and not jax.distributed.is_initialized()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    assert process_rows(8, mesh) == slice(0, 8)
    assert is_main() and broadcast_flag(True) and not broadcast_flag(False)
    rows = {"tokens": np.arange(8 * 6, dtype=np.int32).reshape(8, 6), "labels": np.arange(8, dtype=np.int32)}
    batch = global_batch(rows, mesh)
    for name, array in rows.items():
        np.testing.assert_array_equal(batch[name], array)
    assert batch["tokens"].sharding.shard_shape((8, 6)) == (2, 3)


def test_a_batch_with_the_wrong_number_of_rows_is_refused():
    with pytest.raises(ConfigError, match=r"batch\['x'\] = '8 rows': this process reads rows 0 to 16 of 16"):
        global_batch({"x": np.zeros((8, 2), np.float32)}, make_mesh(MeshConfig()), 16)


def test_hosts_with_the_same_rows_read_as_one():
    shared = {0: {0, 2}, 1: {0, 2}, 2: {4, 6}, 3: {4, 6}}
    assert [reader_of(p, shared) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    interleaved = {0: {0, 4}, 1: {2, 6}}
    assert [reader_of(p, interleaved) for p in range(2)] == [(0, 2), (1, 2)]
    with pytest.raises(ConfigError, match="unevenly over hosts"):
        reader_of(0, {0: {0, 2}, 1: {2, 4}})


WORKER = """
import numpy as np, jax
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.launch import *
from sparsejax.parallel.mesh import make_mesh
joined = initialize()
assert joined.kind == "explicit coordinator" and initialize() is None
assert jax.process_count() == 2 and jax.device_count() == 4
me = jax.process_index()
tokens = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
half, whole = slice(4 * me, 4 * me + 4), slice(0, 8)
for config, mine in (
    (MeshConfig(), half),
    (MeshConfig(data=1, fsdp=2, tensor=2), half),
    (MeshConfig(data=1, fsdp=2, sequence=2), half),
    (MeshConfig(data=1, tensor=4), whole),
    (MeshConfig(data=1, sequence=2, tensor=2), whole),
):
    mesh = make_mesh(config)
    assert process_rows(8, mesh) == mine, (config, process_rows(8, mesh))
    batch = global_batch({"tokens": tokens[mine]}, mesh)["tokens"]
    assert batch.shape == (8, 6)
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, tokens[shard.index])
    assert int(jax.jit(lambda x: x.sum())(batch)) == tokens.sum()
barrier("middle")
assert broadcast_flag(me == 1) and not broadcast_flag(False)
assert is_main() == (me == 0)
print("worker", me, "done")
"""


def run_processes(script, count=2, devices=2, timeout=120):
    """Run a script as `count` connected processes of `devices` CPU devices each; returns their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                   "SPARSEJAX_COORDINATOR": f"127.0.0.1:{port}", "SPARSEJAX_NUM_PROCESSES": str(count)}
    workers = [
        subprocess.Popen([sys.executable, "-c", script], env={**environment, "SPARSEJAX_PROCESS_ID": str(index)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        for index in range(count)
    ]
    try:
        return [(worker.communicate(timeout=timeout)[0], worker.returncode) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def test_two_processes_build_the_batch_that_one_would():
    for index, (output, status) in enumerate(run_processes(WORKER)):
        assert status == 0 and f"worker {index} done" in output, output
