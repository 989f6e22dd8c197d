"""The device mesh: five named axes, always present, most of them of size 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from sparsejax.parallel.config import MeshConfig
from sparsejax.plugs import ConfigError, check

# Outermost first: neighbours along `sequence`, `expert` and `tensor` are the devices with the fastest links between them,
# and these axes talk within a layer; `data` talks once per step and may cross hosts.
AXES = ("data", "fsdp", "tensor", "expert", "sequence")


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Size of every axis on `num_devices` devices, with -1 resolved.

    Raises:
      ConfigError: a size below 1 that is not -1, more than one -1, or a product that is not the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        check(isinstance(size, int) and (size >= 1 or size == -1), f"mesh.{axis}", size,
              "must be a positive number, or -1 for the devices that are left")
    free = [axis for axis, size in sizes.items() if size == -1]
    listed = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1:
        raise ConfigError(f"mesh ({listed}): {' and '.join(free)} are both -1; only one axis can take the rest")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if num_devices % fixed:
            raise ConfigError(f"mesh.{free[0]} = -1 in mesh ({listed}): the other axes take {fixed} devices, "
                              f"which does not divide the {num_devices} there are")
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        widest = max(sizes, key=lambda axis: sizes[axis])
        raise ConfigError(f"mesh.{widest} = {sizes[widest]} in mesh ({listed}): the axes multiply to {fixed} devices, "
                          f"but there are {num_devices}; one axis may be -1 to take what is left")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run, with all of `AXES`, whose sharding is left to the compiler (Auto axes).

    Args:
      config: sizes per axis, at most one of them -1.
      devices: default all devices of all processes; the devices of a topology description to compile for absent hardware.
    Raises:
      ConfigError: sizes that these devices cannot have.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def describe(mesh: Mesh) -> str:
    """`8 cpu devices: data=4, fsdp=2` (axes of size 1 are left out)."""
    device = mesh.devices.flat[0]
    used = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    plural = "s" if mesh.size > 1 else ""
    return f"{mesh.size} {device.device_kind} device{plural}" + (f": {used}" if used else "")
