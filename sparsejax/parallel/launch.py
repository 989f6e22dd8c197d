"""One program on many hosts: finding the cluster, giving each process its rows, and agreeing on what one of them saw.

`initialize()` must run before anything asks JAX for its devices. On a single machine it does nothing.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sparsejax.parallel.rules import batch_sharding
from sparsejax.plugs import ConfigError, check

_EXPLICIT = ("SPARSEJAX_COORDINATOR", "SPARSEJAX_NUM_PROCESSES", "SPARSEJAX_PROCESS_ID")
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_WORKERS_URL = "http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_METADATA_TIMEOUT = 2.0  # seconds; the server is on the same machine where there is one


class Cluster(NamedTuple):
    """How this process joins its peers. `coordinator` is None where JAX finds the addresses by itself."""

    kind: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Cluster | None:
    """Connect this process to its cluster, if it is part of one.

    In this order: the arguments, the environment variables SPARSEJAX_COORDINATOR (host:port), SPARSEJAX_NUM_PROCESSES and
    SPARSEJAX_PROCESS_ID, a Slurm job step of several tasks, a TPU pod. A second call does nothing.

    Returns:
      What was joined; None on a single machine, or when already connected.
    Raises:
      ConfigError: an incomplete or malformed explicit coordinator.
    """
    if jax.distributed.is_initialized():
        return None
    environment = dict(os.environ)
    given = (coordinator, num_processes, process_id)
    environment.update({key: str(value) for key, value in zip(_EXPLICIT, given, strict=True) if value is not None})
    cluster = detect_cluster(environment)
    if cluster is None:
        return None
    # Without an implementation, a computation over several CPU processes fails when it first communicates.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if cluster.coordinator is None:
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(cluster.coordinator, cluster.num_processes, cluster.process_id,
                                   cluster_detection_method="deactivate")
    return cluster


def detect_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that these environment variables describe, or None.

    Raises:
      ConfigError: an explicit coordinator that is incomplete or malformed.
    """
    if any(environment.get(key) for key in _EXPLICIT):
        return _explicit(environment)
    # A batch script outside srun has SLURM_NTASKS too, but only one process of it runs: the step's variables tell.
    if all(key in environment for key in _SLURM_STEP) and int(environment["SLURM_NTASKS"]) > 1:
        return Cluster("slurm")
    return Cluster("tpu pod") if _num_tpu_workers(environment) > 1 else None


def _explicit(environment: Mapping[str, str]) -> Cluster:
    missing = [key for key in _EXPLICIT if not environment.get(key)]
    if missing:
        given = ", ".join(f"{key}={environment[key]}" for key in _EXPLICIT if environment.get(key))
        raise ConfigError(f"explicit coordinator: {given} given, {' and '.join(missing)} missing; all three are needed")
    coordinator, count, index = (environment[key] for key in _EXPLICIT)
    host, _, port = coordinator.rpartition(":")
    check(host and port.isdigit(), "SPARSEJAX_COORDINATOR", coordinator, "must be host:port")
    check(count.isdigit() and int(count) >= 1, "SPARSEJAX_NUM_PROCESSES", count, "must be a positive number")
    check(index.isdigit() and int(index) < int(count), "SPARSEJAX_PROCESS_ID", index, f"must be 0 to {int(count) - 1}")
    return Cluster("explicit coordinator", coordinator, int(count), int(index))


def _num_tpu_workers(environment: Mapping[str, str]) -> int:
    """Hosts of the TPU slices this machine is part of; 1 where there is no TPU or no neighbour."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return 1
    if environment.get("TPU_WORKER_HOSTNAMES"):
        return len(environment["TPU_WORKER_HOSTNAMES"].split(",")) * int(environment.get("MEGASCALE_NUM_SLICES", "1"))
    if importlib.util.find_spec("libtpu") is None or not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return 1
    return _tpu_workers_of_metadata(environment.get("GCE_METADATA_IP", "metadata.google.internal"))


def _tpu_workers_of_metadata(host: str) -> int:
    """Hosts of the slice as a TPU VM's metadata server lists them; 1 where no such server answers (colab, own machines)."""
    request = urllib.request.Request(_TPU_WORKERS_URL.format(host=host), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_TIMEOUT) as answer:
            return len(answer.read().decode().split(","))
    except (urllib.error.URLError, TimeoutError):
        return 1


def is_main() -> bool:
    """Whether this process writes what is written once: logs, records, plots."""
    return jax.process_index() == 0


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """Which rows of a global batch this process has to read.

    Processes whose devices hold the same rows (tensor parallelism across hosts) read the same ones. Where the mesh interleaves
    the devices of several hosts, a process still reads one contiguous range, and `global_batch` lays the rows out in the
    order of its devices: the batch is the same set of examples on every mesh, its rows may be permuted.

    Raises:
      ConfigError: the rows do not divide over the batch axes, or hosts overlap in only some of their rows.
    """
    placed: dict[int, set[int]] = {}
    blocks = batch_sharding(mesh, (batch_size,)).devices_indices_map((batch_size,))
    for device in mesh.devices.flat:
        (rows,) = blocks[device]
        placed.setdefault(device.process_index, set()).add(rows.start or 0)
    reader, readers = reader_of(jax.process_index(), placed)
    return slice(reader * batch_size // readers, (reader + 1) * batch_size // readers)


def reader_of(process: int, placed: Mapping[int, set[int]]) -> tuple[int, int]:
    """(Index of this process's group among the groups of processes that hold the same rows, number of groups).

    Args:
      process: a process index.
      placed: per process the first rows of the blocks that its devices hold.
    """
    groups = sorted({frozenset(blocks) for blocks in placed.values()}, key=min)
    if sum(map(len, groups)) != len(frozenset().union(*groups)) or len({len(group) for group in groups}) > 1:
        raise ConfigError("mesh: the batch axes split rows unevenly over hosts (some hosts share a part of their rows); "
                          "make data x fsdp x expert a multiple of the number of hosts, or its divisor")
    return groups.index(frozenset(placed[process])), len(groups)


def global_batch(rows: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, sharded by `batch_sharding`.

    Args:
      rows: arrays [b, ...], the rows `process_rows` named, in that order.
      mesh: the run's mesh.
      batch_size: rows of the global batch; default b times the number of reading groups of hosts.
    Raises:
      ConfigError: an array with another number of rows than the process has to read.
    """
    count = {name: len(array) for name, array in rows.items()}
    if batch_size is None:
        batch_size = min(count.values()) * _num_readers(mesh)
    mine = process_rows(batch_size, mesh)
    for name, local in count.items():
        check(local == mine.stop - mine.start, f"batch[{name!r}]", f"{local} rows",
              f"this process reads rows {mine.start} to {mine.stop} of {batch_size}")
    return {name: _global_array(array, mesh, batch_size) for name, array in rows.items()}


def _num_readers(mesh: Mesh) -> int:
    smallest = int(np.prod([mesh.shape[axis] for axis in ("data", "fsdp", "expert")]))
    mine = process_rows(smallest, mesh)
    return smallest // (mine.stop - mine.start)


def _global_array(array: np.ndarray, mesh: Mesh, batch_size: int) -> jax.Array:
    shape = (batch_size, *array.shape[1:])
    return jax.make_array_from_process_local_data(batch_sharding(mesh, shape), np.asarray(array), shape)


def barrier(name: str) -> None:
    """Wait until every process has come to the barrier of this name; from the main thread only (it uses the devices)."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_flag(flag: bool) -> bool:
    """Whether the flag is up on any process; every process gets the same answer (one host's SIGTERM stops all).

    It waits for the devices, so a loop asks on its logging steps, not on each.
    """
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag, np.int32))))
