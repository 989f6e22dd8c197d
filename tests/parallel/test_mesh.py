import jax
import pytest
from jax.sharding import AxisType

from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import AXES, describe, make_mesh, mesh_sizes
from sparsejax.plugs import ConfigError


def test_the_default_mesh_spreads_data_over_all_devices():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1, "expert": 1, "sequence": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert describe(mesh) == "8 cpu devices: data=8"


def test_a_free_axis_takes_the_devices_that_are_left():
    assert mesh_sizes(MeshConfig(data=2, fsdp=-1, tensor=2), 16)["fsdp"] == 4


def test_a_mesh_can_be_made_of_given_devices():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[4:6])
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()[4:6]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=3, fsdp=1), ["mesh.data = 3", "multiply to 3", "there are 8"]),
        (MeshConfig(data=-1, tensor=3), ["mesh.data = -1", "tensor=3", "does not divide the 8"]),
        (MeshConfig(data=-1, fsdp=-1), ["data and fsdp are both -1"]),
        (MeshConfig(expert=0), ["mesh.expert = 0", "positive"]),
        (MeshConfig(sequence=-2), ["mesh.sequence = -2"]),
        (MeshConfig(data=1, tensor=16), ["mesh.tensor = 16", "multiply to 16", "there are 8"]),
    ],
)
def test_an_impossible_mesh_names_axis_sizes_and_devices(config, words):
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    for word in words:
        assert word in str(error.value)
