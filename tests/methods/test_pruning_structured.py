"""Units cut out of a decoder, and n:m kernels: stored, trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.arrays import SparseActivation, dense, kind, matmul
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, run_recipe
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.methods.pruning.magnitude import Magnitude
from sparsejax.methods.pruning.pack_n_of_m import PackNofM
from sparsejax.methods.pruning.slicing import with_head_groups, with_neurons
from sparsejax.methods.pruning.sr_ste import SRSTE, flip_share, n_of_m_inputs
from sparsejax.methods.pruning.structured import Structured, raise_share, share_within
from sparsejax.models.config import AttentionConfig, FFNConfig
from sparsejax.models.sizes import parameter_counts
from sparsejax.plugs import ConfigError
from sparsejax.sparse_arrays import n_of_m_holds, pack_n_of_m
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2))

TOKENS = np.random.default_rng(0).integers(0, 256, (3, 24)).astype(np.int32)


def work(tokens=TOKENS):
    return Work(Calibration(CalibrationSpec("random", *tokens.shape, skip_first=2), tokens, ""), TIERS["quick"])


def forward(model):
    def run(values, tokens):
        return nnx_compat.merge(model.structure, values)({"tokens": tokens}, Context(mode="prefill"))[0]

    return jax.jit(run)


def logits(model):
    return np.asarray(forward(model)(model.values, jnp.asarray(TOKENS)))


def masked(model, maps, kept, width):
    """Rows of these maps outside `kept` as zeros: what their inputs give is masked."""
    arrays = {}
    for layer, index in enumerate(kept):
        keep = np.repeat(np.isin(np.arange(width), index), model.parameter(f"blocks.{layer}.{maps}.kernel").shape[0] // width)
        arrays[f"blocks.{layer}.{maps}.kernel"] = jnp.where(keep[:, None], model.parameter(f"blocks.{layer}.{maps}.kernel"), 0)
    return model.rebuilt(model.config, arrays)


# Slicing


def test_cutting_neurons_out_is_masking_what_they_give():
    model = tiny.tiny_model(layers=2, ffn=FFNConfig(hidden=40, activation="swiglu", bias=True))
    kept = [np.array([0, 3, 4, 11, 39]), np.array([1, 2, 5, 6, 38])]
    sliced = with_neurons(model, kept)
    np.testing.assert_allclose(logits(sliced), logits(masked(model, "mlp.down", kept, 40)), atol=1e-5)
    assert sliced.config.ffn.hidden == 5


def test_cutting_key_value_heads_out_is_masking_what_their_queries_give():
    attention = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=4, bias=True, qk_norm=True)
    model = tiny.tiny_model(layers=2, width=24, attention=attention)
    kept = [np.array([0, 2]), np.array([1, 2])]
    sliced = with_head_groups(model, kept)
    np.testing.assert_allclose(logits(sliced), logits(masked(model, "attn.o", kept, 3)), atol=1e-5)
    assert (sliced.config.attention.num_heads, sliced.config.attention.num_kv_heads) == (4, 2)


def test_a_sliced_model_has_the_parameters_that_its_config_says_and_survives_a_folder(tmp_path):
    model, job = tiny_model(), work()
    sliced = run_recipe([Structured(neurons=0.3, heads=0.5)], model, job)
    count = sum(leaf.size for leaf in jax.tree.leaves(sliced.values))
    assert count == parameter_counts(sliced.config)["total"] == job.notes["0-structured"]["parameters_after"]
    assert sliced.config.ffn.hidden == 64 - round(0.3 * 64) and sliced.config.attention.num_kv_heads == 1
    model_folder.save(sliced, tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(tmp_path / "folder").values, sliced.values)


def test_neurons_that_never_answer_go_first_and_change_nothing():
    model = tiny_model()
    silent = [np.arange(5, 25), np.arange(40, 60)]
    arrays = {}
    for layer, index in enumerate(silent):
        for name in ("gate", "up"):
            site = f"blocks.{layer}.mlp.{name}.kernel"
            arrays[site] = model.parameter(site).at[:, index].set(0)
    model = model.rebuilt(model.config, arrays)
    sliced = run_recipe([Structured(neurons=20 / 64)], model, work())
    assert sliced.config.ffn.hidden == 44
    np.testing.assert_allclose(logits(sliced), logits(model), atol=1e-5)
    random = run_recipe([Structured(neurons=20 / 64, importance="random")], model, work())
    assert np.abs(logits(random) - logits(model)).max() > 1e-2


@given(st.floats(0.01, 0.97))
def test_the_policy_ends_within_its_least_step_below_the_limit(limit):
    share = raise_share(lambda share: share <= limit)
    assert limit - 2 / 80 < share <= limit


def test_cutting_until_the_loss_has_risen_by_so_much():
    model = tiny_model()
    tokens, run = TOKENS.copy(), forward(model)
    for position in range(1, tokens.shape[1]):  # what the model itself finds likeliest, so that cutting costs
        tokens[:, position] = np.asarray(run(model.values, tokens))[:, position - 1].argmax(-1)
    jobs = [work(tokens), work(tokens)]
    for limit, job in zip((0.05, 1.0), jobs, strict=True):
        run_recipe([Structured(until=f"loss:{limit}")], model, job)
    few, many = (job.notes["0-structured"]["share_of_neurons"] for job in jobs)
    assert 0 <= few < many


@pytest.mark.parametrize("allowed", [0.6, 0.83, 0.999, 1.0])
def test_cutting_until_so_many_parameters_are_left(allowed):
    config = tiny_config
    share = share_within(config, allowed)
    hidden = config.ffn.hidden - round(share * config.ffn.hidden)

    def total(hidden):
        return parameter_counts(dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, hidden=hidden)))["total"]

    assert total(hidden) <= allowed * total(config.ffn.hidden) + 1e-6
    assert hidden == config.ffn.hidden or total(hidden + 1) > allowed * total(config.ffn.hidden)


tiny_config = tiny_model().config


@pytest.mark.parametrize(
    ("one", "fields", "match"),
    [
        (Structured(neurons=1.0), {}, "neurons = 1.0"),
        (Structured(heads=0.8), {}, "leaves none of 2 key-value heads"),
        (Structured(until="flops:0.5"), {}, "until = 'flops'"),
        (Structured(until="loss:much"), {}, "loss:NATS"),
        (Structured(until="parameters:0.01"), {}, "with one neuron per layer"),
        (Structured(importance="weight"), {}, "importance = 'weight'"),
        (Structured(), {"inputs": ("blocks.*.mlp.down=topk:0.5",)}, "slice first"),
        (Structured(), {"feed_pattern": ("moe:experts=4,k=2",)}, "experts are not sliced"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_work(one, fields, match):
    with pytest.raises(ConfigError, match=match):
        one.check(dataclasses.replace(tiny_config, **fields))


# n of m, stored


def n_of_m_weight(seed, n, m, groups, outputs, lead=()):
    w = np.random.default_rng(seed).normal(size=(*lead, groups * m, outputs)).astype(np.float32)
    return jnp.where(n_of_m_inputs(jnp.asarray(w), n, m), w, 0)


@pytest.mark.parametrize(("nm", "shape"), [((2, 4), (1, 1)), ((2, 4), (5, 3)), ((3, 7), (5, 2)), ((5, 32), (3, 2))])
def test_an_n_of_m_weight_is_what_it_stores(nm, shape):
    w = n_of_m_weight(0, *nm, *shape)
    w = jnp.where(jnp.arange(w.shape[0])[:, None] % 5 == 0, 0, w)  # groups that keep fewer
    packed = pack_n_of_m(w, *nm)
    np.testing.assert_array_equal(dense(packed), w)
    assert packed.values.shape == (shape[0] * nm[0], shape[1]) and bool(n_of_m_holds(w, *nm))


def test_two_of_four_takes_nine_sixteenths_of_the_bytes():
    w = n_of_m_weight(0, 2, 4, 16, 8, lead=(3,)).astype(jnp.bfloat16)
    packed = pack_n_of_m(w, 2, 4)
    assert 16 * (packed.values.nbytes + packed.indices.nbytes) == 9 * w.nbytes
    np.testing.assert_array_equal(dense(packed), w)


def test_products_with_an_n_of_m_weight_are_those_with_the_dense_one():
    w, x = n_of_m_weight(1, 2, 4, 6, 5), jax.random.normal(jax.random.key(0), (3, 24))
    packed = pack_n_of_m(w, 2, 4)
    assert kind(packed) == "NMSparse[Array]"
    np.testing.assert_allclose(jax.jit(matmul)(x, packed), x @ w, rtol=1e-6, atol=1e-6)
    sparse = SparseActivation(x, x > 0)
    np.testing.assert_allclose(matmul(sparse, packed), jnp.where(x > 0, x, 0) @ w, rtol=1e-6, atol=1e-6)


def test_a_model_trained_with_sr_ste_is_stored_as_it_serves_and_survives_a_folder(tmp_path):
    model, job = tiny_model(weights=("blocks.**=sr_ste:2,4",)), work()
    packed = run_recipe([PackNofM("2:4")], model, job)
    assert job.notes["0-packnofm"]["bytes_after"] == job.notes["0-packnofm"]["bytes_before"] * 17 / 32
    np.testing.assert_allclose(logits(packed), logits(model), atol=1e-5)
    model_folder.save(packed, tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(tmp_path / "folder").values, packed.values)


def test_what_a_pass_pruned_is_packed_and_then_not_pruned_again():
    model = tiny_model()
    packed = run_recipe([Magnitude("2:4"), PackNofM("2:4")], model, work())
    pruned = run_recipe([Magnitude("2:4")], model, work())
    name = "blocks.0.mlp.up.kernel"
    np.testing.assert_array_equal(dense(packed.parameter(name)), pruned.parameter(name))
    with pytest.raises(ConfigError, match="is packed"):
        run_recipe([Magnitude("0.5")], packed, work())


def test_kernels_that_are_not_n_of_m_are_not_packed():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"blocks.0.mlp.up: more than 2 of 4 consecutive inputs are kept; prune to 2:4"):
        run_recipe([PackNofM("2:4", sites="blocks.*.mlp.up")], model, work())
    with pytest.raises(ConfigError, match="in some layers only"):
        run_recipe([PackNofM("2:4", sites="blocks.0.mlp.up")], model, work())


# SR-STE


@given(st.integers(0, 10**6), st.sampled_from([(2, 4), (4, 8)]), st.sampled_from([0.0, 0.3]))
def test_the_gradient_is_straight_through_plus_the_decay_of_what_is_pruned(seed, nm, decay):
    rng = np.random.default_rng(seed)
    w, r = (jnp.asarray(rng.normal(size=(2, 16, 3)), jnp.float32) for _ in range(2))
    op = SRSTE(*nm, decay)
    keep = np.asarray(n_of_m_inputs(w, *nm))
    assert (keep.reshape(2, 16 // nm[1], nm[1], 3).sum(2) == nm[0]).all()
    pruned, pull = jax.vjp(lambda w: op(w, Context()), w)
    np.testing.assert_array_equal(pruned, np.where(keep, w, 0))
    np.testing.assert_allclose(pull(r)[0], r + decay * np.where(keep, 0, w), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(pull(r)[0])[keep], np.asarray(r)[keep])


def test_all_of_m_is_the_dense_weight_and_a_stored_one_stays():
    w = n_of_m_weight(0, 2, 4, 4, 3)
    assert SRSTE(4, 4)(w, Context()) is w
    packed = pack_n_of_m(w, 2, 4)
    assert SRSTE()(packed, Context()) is packed
    with pytest.raises(ConfigError, match="must divide the inputs, 30"):
        SRSTE().validate(30, "model.weights[0]")
    with pytest.raises(ConfigError, match="n = 5"):
        SRSTE(5, 4)


def test_the_decay_makes_masks_flip_less():
    """Noisy regression from random weights: the share of weights whose mask changed, summed over steps."""

    def flips(decay):
        w, op, total = jax.random.normal(jax.random.key(0), (32, 16)) * 0.2, SRSTE(2, 4, decay), 0.0
        target = jax.random.normal(jax.random.key(1), (32, 16))

        @jax.jit
        def step(w, key):
            x = jax.random.normal(key, (16, 32))
            gradient = jax.grad(lambda w: jnp.mean((x @ op(w, Context()) - x @ target) ** 2))(w)
            return w - 0.5 * gradient

        for i in range(60):
            new = step(w, jax.random.key(100 + i))
            total += float(flip_share(w, new, 2, 4))
            w = new
        return total

    assert flips(0.3) < 0.8 * flips(0.0)
