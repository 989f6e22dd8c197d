import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import nnx_compat, plugs
from sparsejax.context import Context, Probe, Stat
from sparsejax.layers.ffn import FFN
from sparsejax.layers.op import SiteRules
from sparsejax.methods.moe.softmax_top_k import SoftmaxTopK
from sparsejax.models.config import FFNConfig, ModelConfig
from sparsejax.ops.routers import softmax_top_k
from sparsejax.parallel import rules as sharding
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh

B, T, D, F = 4, 6, 16, 32


def config(activation="relu", bias=False):
    return ModelConfig(d_model=D, ffn=FFNConfig(hidden=F, activation=activation, bias=bias))


def build(spec, activation="relu", bias=False, rules=SiteRules()):
    """(structure, values) of one MoE; the router is scaled up so that choices differ and no two logits are near a tie."""
    structure, values = _build(spec, activation, bias, rules)
    return structure, jax.tree.map(lambda v: v, values)


@functools.cache
def _build(spec, activation, bias, rules):
    module = spec.build(config(activation, bias), key=jax.random.key(0), site="blocks.0.mlp", rules=rules)
    structure, values = nnx_compat.split(module)
    values["router"]["kernel"] = values["router"]["kernel"] * 20
    if bias:
        values = jax.tree_util.tree_map_with_path(
            lambda path, v: jax.random.normal(jax.random.key(v.size), v.shape) if "bias" in str(path) else v, values
        )
    return structure, values


def inputs(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, T, D), jnp.float32)


COMPILED = {}


def run(structure, values, x, ctx=Context()):
    """The module's (y, stats), compiled once per structure, mode and probes."""

    def apply(values, x, segments):
        return nnx_compat.merge(structure, values)(x, Context(mode=ctx.mode, probes=ctx.probes, segment_ids=segments))

    key = (id(structure), ctx.mode, ctx.probes)
    fn, _ = COMPILED.setdefault(key, (jax.jit(apply), structure))
    return fn(values, x, ctx.segment_ids)


def expert_values(values, e):
    """The parameters of one expert as those of a dense FFN; the non-linearity's are shared by all."""
    return {
        name: {k: v[e] for k, v in part.items()} if name != "activation" else part for name, part in values["experts"].items()
    }


def loop(spec, values, x, activation="relu", bias=False, keep=None):
    """All experts on all tokens, then the weighted sum over the chosen ones; keep [B, T, k] masks dropped assignments."""
    dense = FFN(config(activation, bias), key=jax.random.key(0), site="s", rules=SiteRules(), hidden=spec.width(config()))
    structure, _ = nnx_compat.split(dense)
    routing = softmax_top_k(x @ values["router"]["kernel"], spec.k, spec.combine)
    weights = routing.weights if keep is None else routing.weights * keep
    y = jnp.zeros_like(x)
    for e in range(spec.experts):
        gate = jnp.sum(jnp.where(routing.experts == e, weights, 0), axis=-1, keepdims=True)
        y += gate * run(structure, expert_values(values, e), x)[0]
    return y


def assert_same_values_and_gradients(f, g, *arguments, atol=2e-5):
    probe = jax.random.normal(jax.random.key(9), (B, T, D))

    def found(h):
        return jax.tree.leaves(jax.jit(jax.value_and_grad(lambda *z: jnp.sum(probe * h(*z)), (0, 1)))(*arguments))

    for a, b in zip(found(f), found(g), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "activation", "bias"),
    [
        (SoftmaxTopK(4, 2), "relu", False),
        (SoftmaxTopK(5, 3), "swiglu", True),
        (SoftmaxTopK(4, 1, combine="raw", capacity=4.0), "relu", True),
        (SoftmaxTopK(5, 3, capacity=5 / 3), "swiglu", False),
    ],
)
def test_dispatch_equals_a_loop_over_experts_in_values_and_gradients(spec, activation, bias):
    structure, values = build(spec, activation, bias)
    assert_same_values_and_gradients(
        lambda v, x: run(structure, v, x)[0], lambda v, x: loop(spec, v, x, activation, bias), values, inputs()
    )


def test_capacity_of_all_experts_over_k_drops_nothing_and_equals_dropless():
    spec = SoftmaxTopK(4, 2, capacity=2.0)
    structure, values = build(spec)
    dropless, _ = build(dataclasses.replace(spec, capacity=0.0))
    y, stats = run(structure, values, inputs())
    assert float(stats["mlp.router"]["dropped"].value) == 0
    np.testing.assert_allclose(y, run(dropless, values, inputs())[0], atol=1e-5)


def test_dropped_assignments_weigh_nothing_and_the_others_are_not_renormalised():
    spec = SoftmaxTopK(4, 2, capacity=0.5)
    structure, values = build(spec)
    x = inputs()
    routing = softmax_top_k(x @ values["router"]["kernel"], 2, "renorm")
    capacity, keep = 2, np.zeros((B, T, 2), np.float32)
    for b in range(B):
        used = np.zeros(4, int)
        for j in range(2):
            for t in range(T):
                e = int(routing.experts[b, t, j])
                keep[b, t, j] = used[e] < capacity
                used[e] += 1
    y, stats = run(structure, values, x)
    assert float(stats["mlp.router"]["dropped"].value) == (1 - keep).sum() > 0
    np.testing.assert_allclose(y, loop(spec, values, x, keep=keep), atol=1e-5)
    assert_same_values_and_gradients(
        lambda v, x: run(structure, v, x)[0], lambda v, x: loop(spec, v, x, keep=keep), values, x
    )


def test_serving_is_dropless_whatever_the_capacity():
    structure, values = build(SoftmaxTopK(4, 2, capacity=0.5))
    y, stats = run(structure, values, inputs(), Context(mode="prefill"))
    np.testing.assert_allclose(y, loop(SoftmaxTopK(4, 2), values, inputs()), atol=1e-5)
    step, _ = run(structure, values, inputs()[:, :1], Context(mode="decode"))
    np.testing.assert_allclose(step, y[:, :1], atol=1e-6)


@pytest.mark.parametrize("capacity", [0.0, 4.0])
def test_an_expert_that_takes_all_and_experts_that_take_none(capacity):
    spec = SoftmaxTopK(4, 1, combine="raw", capacity=capacity)
    structure, values = build(spec)
    x = jnp.abs(inputs())
    values["router"]["kernel"] = jnp.zeros((D, 4)).at[:, 2].set(1.0)
    y, stats = run(structure, values, x)
    np.testing.assert_array_equal(stats["mlp.router"]["load"].value, [0, 0, B * T, 0])
    np.testing.assert_allclose(y, loop(spec, values, x), atol=1e-5)
    gradients = jax.grad(lambda v: jnp.sum(run(structure, v, x)[0] ** 2))(values)["experts"]["up"]["kernel"]
    assert float(jnp.abs(gradients[2]).max()) > 0
    assert float(jnp.abs(gradients[jnp.asarray([0, 1, 3])]).max()) == 0


@pytest.mark.parametrize("capacity", [0.0, 2.0])
def test_identical_experts_with_renorm_are_one_dense_network_and_with_raw_are_not(capacity):
    for combine in ("renorm", "raw"):
        structure, values = build(SoftmaxTopK(4, 2, combine=combine, capacity=capacity))
        values["experts"] = jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), values["experts"])
        dense, _ = nnx_compat.split(FFN(config(), key=jax.random.key(0), site="s", rules=SiteRules(), hidden=F // 2))
        difference = jnp.abs(run(structure, values, inputs())[0] - run(dense, expert_values(values, 0), inputs())[0]).max()
        assert (float(difference) < 1e-5) == (combine == "renorm")


def test_permuting_the_experts_changes_nothing():
    structure, values = build(SoftmaxTopK(4, 2))
    order = jnp.asarray([2, 0, 3, 1])
    permuted = {
        "router": {"kernel": values["router"]["kernel"][:, order]},
        "experts": jax.tree.map(lambda v: v[order], values["experts"]),
    }
    y, stats = run(structure, values, inputs())
    z, moved = run(structure, permuted, inputs())
    np.testing.assert_allclose(y, z, atol=1e-6)
    np.testing.assert_array_equal(stats["mlp.router"]["load"].value[order], moved["mlp.router"]["load"].value)


def test_shared_experts_are_added_for_every_token():
    structure, values = build(SoftmaxTopK(4, 1, combine="raw", shared=1))
    alone, _ = build(SoftmaxTopK(4, 1, combine="raw", hidden=16))
    routed = {name: values[name] for name in ("router", "experts")}
    dense, _ = nnx_compat.split(FFN(config(), key=jax.random.key(0), site="s", rules=SiteRules(), hidden=F // 2))
    expected = run(alone, routed, inputs())[0] + run(dense, values["shared"], inputs())[0]
    np.testing.assert_allclose(run(structure, values, inputs())[0], expected, atol=1e-6)


@pytest.mark.parametrize("capacity", [0.0, 0.75])
def test_padding_takes_no_place_and_is_counted_nowhere(capacity):
    structure, values = build(SoftmaxTopK(4, 2, capacity=capacity))
    lengths = jnp.asarray([6, 2, 4, 0])[:, None]
    segments = (jnp.arange(T)[None] < lengths).astype(jnp.int32)
    x = inputs()
    other = jnp.where(segments[..., None] > 0, x, inputs(7))
    ctx = Context(segment_ids=segments)
    (y, stats), (z, same) = (run(structure, values, v, ctx) for v in (x, other))
    np.testing.assert_array_equal(jnp.where(segments[..., None] > 0, y, 0), jnp.where(segments[..., None] > 0, z, 0))
    for name in stats["mlp.router"]:
        np.testing.assert_array_equal(stats["mlp.router"][name].value, same["mlp.router"][name].value)
    assert float(stats["mlp.router"]["tokens"].value) == 12
    assert float(stats["mlp.router"]["load"].value.sum()) == 24


@pytest.mark.parametrize("capacity", [0.0, 2.0])
def test_probes_see_each_row_of_the_experts_with_its_tokens_mask_and_position(capacity):
    spec = SoftmaxTopK(4, 2, capacity=capacity)
    structure, values = build(spec)
    segments = (jnp.arange(T)[None] < jnp.asarray([6, 2, 4, 0])[:, None]).astype(jnp.int32)

    def measure(hidden, ctx):
        by_position = jnp.zeros(T).at[ctx.positions.reshape(-1)].add(ctx.token_mask.reshape(-1))
        return {"rows": Stat(by_position), "l1": Stat(jnp.sum(jnp.abs(hidden) * ctx.token_mask[..., None]))}

    ctx = Context(segment_ids=segments, probes=(Probe("mlp.hidden", measure),))
    found = run(structure, values, inputs(), ctx)[1]["mlp.hidden"]
    np.testing.assert_array_equal(found["rows"].value, 2 * segments.sum(0))
    routing = softmax_top_k(inputs() @ values["router"]["kernel"], 2, "renorm")
    hidden = jax.nn.relu(jnp.einsum("btd,edf->btef", inputs(), values["experts"]["up"]["kernel"]))
    chosen = jax.nn.one_hot(routing.experts, 4).sum(-2) * segments[..., None]
    np.testing.assert_allclose(found["l1"].value, jnp.sum(hidden.sum(-1) * chosen), rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "capacity"),
    [
        (dict(data=1, expert=4), 1.25),
        (dict(data=2, expert=2, fsdp=2), 1.25),
        (dict(data=1, expert=4), 0.0),
        (dict(data=1, expert=2, tensor=2, sequence=2), 0.0),
    ],
)
def test_sharded_over_the_expert_axis_equals_one_device(mesh, capacity):
    spec = SoftmaxTopK(4, 2, capacity=capacity)
    structure, values = build(spec)
    count = int(np.prod(list(mesh.values())))
    x = jnp.tile(inputs(), (2, 1, 1))
    weights = jax.random.normal(jax.random.key(3), x.shape)
    segments = (jnp.arange(T)[None] < jnp.asarray([6, 2, 4, 0, 5, 6, 1, 3])[:, None]).astype(jnp.int32)

    def measure(hidden, ctx):
        fired = jnp.max(jax.lax.stop_gradient(hidden), axis=tuple(range(hidden.ndim - 1)))
        return {"l1": Stat(jnp.sum(jnp.abs(hidden) * ctx.token_mask[..., None])), "fired": Stat(fired, "max")}

    ctx = Context(segment_ids=segments, probes=(Probe("mlp.hidden", measure),))

    def loss(values, x):
        y, stats = nnx_compat.merge(structure, values)(x, ctx)
        router, hidden = stats["mlp.router"], stats["mlp.hidden"]
        total = jnp.sum(weights * y) + router["balance"].value + router["z"].value + 0.1 * hidden["l1"].value
        return total, (router["load"].value, hidden["fired"].value)

    expected = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(values, x)
    devices = make_mesh(MeshConfig(**mesh), jax.devices()[:count])
    axes = structure.map(lambda w: w.axes)
    placed = jax.device_put(values, sharding.sharding_tree(axes, values, devices))
    with sharding.use_mesh(devices):
        spread = jax.device_put(x, sharding.batch_sharding(devices, x.shape))
        got = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(placed, spread)
    assert placed["experts"]["up"]["kernel"].sharding.spec[0] == "expert"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_router_takes_no_ops_and_stays_in_float32():
    rules = SiteRules.parse((), ("blocks.**=int8",))
    structure, values = build(SoftmaxTopK(4, 2), rules=rules)
    module = nnx_compat.merge(structure, values)
    assert not module.router.weights and module.experts.up.weights
    y, stats = run(structure, values, inputs().astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and stats["mlp.router"]["z"].value.dtype == jnp.float32


def test_widths_keep_the_active_parameters_of_the_dense_network():
    wide = ModelConfig(d_model=D, ffn=FFNConfig(hidden=512))
    assert SoftmaxTopK(8, 2).width(wide) == 256
    assert SoftmaxTopK(8, 3).width(wide) == 168
    assert SoftmaxTopK(8, 2, hidden=40).width(wide) == 40
    assert SoftmaxTopK(8, 2).active_fraction() == 0.25
    assert SoftmaxTopK(8, 2, shared=1).active_fraction() == 3 / 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe:experts=4,k=5", "k = 5: must be 1 to experts = 4"),
        ("moe:experts=4,k=1", "use 'raw'"),
        ("moe:combine=renrom", "Did you mean 'renorm'"),
        ("moe:capacity=-1", "capacity = -1.0"),
        ("moe:balance=token", "allowed are 'batch', 'sequence'"),
        ("moe:expert=4", "Did you mean 'experts'"),
    ],
)
def test_impossible_specs_are_refused_in_the_users_terms(text, message):
    with pytest.raises(plugs.ConfigError, match=message):
        plugs.resolve("feed", text, "model.feed_pattern[0]")
