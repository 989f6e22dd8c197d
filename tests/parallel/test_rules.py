import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import AXES, make_mesh
from sparsejax.parallel.rules import (
    RULES,
    batch_sharding,
    batch_spec,
    constrain,
    format_table,
    optimizer_sharding,
    require_sharded,
    sharding_tree,
    spec_for,
    table,
    use_mesh,
)
from sparsejax.plugs import ConfigError


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shape_of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


meshes = st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 5).map(lambda sizes: abstract_mesh(*sizes))
logical = st.sampled_from([None, *RULES])
arrays = st.integers(0, 4).flatmap(
    lambda n: st.tuples(st.lists(logical, min_size=n, max_size=n), st.lists(st.integers(0, 48), min_size=n, max_size=n + 2))
)


def cuts_of(spec, ndim):
    cuts = [() if cut is None else (cut,) if isinstance(cut, str) else tuple(cut) for cut in spec]
    return cuts + [()] * (ndim - len(cuts))


@given(meshes, arrays, st.booleans())
def test_every_spec_divides_its_array_and_uses_no_mesh_axis_twice(mesh, array, fall_back):
    axes, shape = array
    cuts = cuts_of(spec_for(tuple(axes), shape, mesh, fall_back=fall_back), len(shape))
    used = [axis for cut in cuts for axis in cut]
    assert len(used) == len(set(used))
    assert all(mesh.shape[axis] > 1 for axis in used)
    for size, cut in zip(shape, cuts, strict=True):
        assert size % math.prod(mesh.shape[axis] for axis in cut) == 0
    undeclared = len(shape) - len(axes)
    for cut, name in zip(cuts, [None] * undeclared + list(axes), strict=True):
        assert name is not None or not cut


@given(meshes, arrays)
def test_falling_back_only_adds_cuts(mesh, array):
    axes, shape = array
    strict = cuts_of(spec_for(tuple(axes), shape, mesh, fall_back=False), len(shape))
    moved = cuts_of(spec_for(tuple(axes), shape, mesh), len(shape))
    assert all(set(a) <= set(b) for a, b in zip(strict, moved, strict=True))
    assert {a for cut in moved for a in cut} <= {a for name in axes if name for a in RULES[name]}


def test_an_axis_that_does_not_divide_moves_to_the_next_dimension():
    mesh = abstract_mesh(1, 4, 2, 1, 1)
    assert spec_for(("vocab", "embed"), (50257, 64), mesh) == P(None, ("fsdp", "tensor"))
    assert spec_for(("embed", "mlp"), (6, 64), mesh) == P(None, ("tensor", "fsdp"))
    assert spec_for(("embed", "mlp"), (64, 7), mesh) == P(("fsdp", "tensor"))
    assert spec_for(("embed", "mlp"), (64, 7), mesh, fall_back=False) == P("fsdp")


def test_stacked_layers_are_not_cut():
    mesh = abstract_mesh(1, 4, 2, 1, 1)
    assert spec_for(("embed", "mlp"), (8, 64, 64), mesh) == P(None, "fsdp", "tensor")
    assert spec_for(("position", "embed"), (64, 64), mesh) == P(None, "fsdp")


def test_unknown_axis_names_offer_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'embed'"):
        spec_for(("embedd",), (8,), abstract_mesh(1, 2, 1, 1, 1))


def test_batches_are_cut_by_rows_and_length():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    assert batch_spec(2) == P(("data", "fsdp", "expert"), "sequence")
    assert batch_sharding(mesh, (8, 16)).spec == P(("data", "fsdp"), "sequence")
    assert batch_sharding(mesh, (8, 15)).spec == P(("data", "fsdp"))
    assert batch_sharding(mesh, (8, 28, 28, 1)).spec == P(("data", "fsdp"))
    with pytest.raises(ConfigError, match="batch_size = 6: .* multiple of 4.*data 2 x fsdp 2"):
        batch_sharding(mesh, (6, 16))


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", "embed_activation") is x
    with use_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert constrain(x, "batch", "embed_activation") is x


def test_constrain_shards_what_was_first_traced_without_a_mesh():
    double = jax.jit(lambda x: constrain(2 * x, "batch", "length", "embed_activation"))
    x = jnp.ones((8, 6, 4))
    assert double(x).sharding.is_fully_replicated
    with use_mesh(make_mesh(MeshConfig(data=4, sequence=2))):
        assert double(x).sharding.spec == P("data", "sequence")


def test_constrain_leaves_the_inside_of_a_shard_map_alone():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    x = jnp.arange(16.0).reshape(8, 2)
    with use_mesh(mesh):
        whole = jax.shard_map(lambda x: constrain(x + 1, "batch", None), in_specs=P("data"), out_specs=P("data"))
        part = jax.shard_map(lambda x: constrain(x + 1, "batch", None), in_specs=P("data"), out_specs=P("data"),
                             axis_names={"data"})
        np.testing.assert_array_equal(jax.jit(whole)(x), x + 1)
        np.testing.assert_array_equal(jax.jit(part)(x), x + 1)


PARAMS = {
    "embed": {"table": shape_of(512, 64)},
    "blocks": {"0": {"mlp": {"up": shape_of(3, 64, 256), "down": shape_of(3, 256, 64)}, "norm": shape_of(3, 64)}},
    "scalar": shape_of(),
}
PARAM_AXES = {
    "embed": {"table": ("vocab", "embed")},
    "blocks": {"0": {"mlp": {"up": ("embed", "mlp"), "down": ("mlp", "embed")}, "norm": ("embed",)}},
    "scalar": (),
}


def specs(shardings):
    return jax.tree.map(lambda s: s.spec, shardings)


def test_a_parameter_tree_is_sharded_by_its_axes():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    assert specs(sharding_tree(PARAM_AXES, PARAMS, mesh)) == {
        "embed": {"table": P("tensor", "fsdp")},
        "blocks": {
            "0": {"mlp": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}, "norm": P(None, "fsdp")}
        },
        "scalar": P(),
    }


class Packed(NamedTuple):
    codes: jax.ShapeDtypeStruct
    scale: jax.ShapeDtypeStruct
    offset: jax.ShapeDtypeStruct


def test_codes_and_scales_are_cut_by_their_parameters_axes():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    packed = Packed(shape_of(3, 32, 256, dtype=jnp.uint8), shape_of(3, 2, 256), shape_of())
    found = sharding_tree({"w": ("embed", "mlp")}, {"w": packed}, mesh)["w"]
    assert found.codes.spec == P(None, "fsdp", "tensor")
    assert found.scale.spec == P(None, None, ("tensor", "fsdp"))
    assert found.offset.spec == P()


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "lion", "lamb"])
def test_moments_are_sharded_as_their_parameters(name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    arguments = {"min_dim_size_to_factor": 32} if name == "adafactor" else {"momentum": 0.9} if name == "sgd" else {}
    mask = jax.tree.map(lambda p: len(p.shape) > 1, PARAMS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(getattr(optax, name)(1e-3, **arguments), mask))
    state = jax.eval_shape(optimizer.init, PARAMS)
    shardings = optimizer_sharding(state, PARAMS, PARAM_AXES, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    wanted = dict(zip(jax.tree.leaves(PARAMS), jax.tree.leaves(sharding_tree(PARAM_AXES, PARAMS, mesh)), strict=False))
    moments = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        sharding.shard_shape(leaf.shape)  # raises unless it divides
        if leaf.shape in {p.shape for p in wanted} and len(leaf.shape) > 1:
            moments += 1
            assert sharding.spec in {s.spec for p, s in wanted.items() if p.shape == leaf.shape}
    assert moments >= 1
    if name == "adafactor":
        rows = jax.tree.leaves(shardings, is_leaf=lambda s: isinstance(s, NamedSharding))
        assert any(s.spec in (P(None, "fsdp"), P(None, "tensor"), P("fsdp"), P("tensor")) for s in rows)


def test_moments_of_equal_shapes_follow_names_not_shapes():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = {"q": shape_of(64, 64), "o": shape_of(64, 64), "mu": shape_of(64, 64)}
    axes = {"q": ("embed", "heads"), "o": ("heads", "embed"), "mu": (None, "embed")}
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    found = optimizer_sharding(state, params, axes, mesh)[0]
    assert specs(found.nu) == {"q": P("fsdp", "tensor"), "o": P("tensor", "fsdp"), "mu": P(None, "fsdp")}
    assert specs(found.mu) == specs(found.nu)
    assert found.count.spec == P()


def test_the_table_adds_up_to_what_the_devices_hold():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = table(PARAM_AXES, PARAMS, mesh)
    placed = jax.jit(lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), PARAMS),
                     out_shardings=sharding_tree(PARAM_AXES, PARAMS, mesh))()
    assert [r.bytes_per_device for r in rows] == [x.addressable_data(0).nbytes for x in jax.tree.leaves(placed)]
    assert [r.parameter for r in rows][-2:] == ["embed.table", "scalar"]
    text = format_table(rows).splitlines()
    assert text[0].split() == ["parameter", "shape", "dtype", "spec", "bytes/device"]
    assert text[-1].split() == ["total", f"{sum(r.bytes_per_device for r in rows):,}"]
    assert len({len(line) for line in text}) == 1


def test_large_replicated_parameters_are_refused_by_name():
    shapes = {"odd": {"w": shape_of(333, 333)}, "small": shape_of(3, 3)}
    axes = {"odd": {"w": ("embed", "mlp")}, "small": (None,)}
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(ConfigError, match=r"fsdp=8.*odd\.w \(333, 333\).*allow_replicated") as error:
        require_sharded(axes, shapes, mesh, MeshConfig(data=1, fsdp=8))
    assert "small" not in str(error.value)
    require_sharded(axes, shapes, mesh, MeshConfig(data=1, fsdp=8, allow_replicated=True))
    require_sharded(axes, shapes, make_mesh(MeshConfig()), MeshConfig())
