"""GRIFFIN, CoreInfer and the random control: sets against the cards' oracles, masks against real decoding with sliced maps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.arrays import SparseActivation
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.neuron_sets import carried, decoding_model, select_neurons, with_neurons
from sparsejax.compress.recipe import TIERS, Work, run_recipe
from sparsejax.context import Context
from sparsejax.methods.sparsity.coreinfer import CoreInfer, CoreSet, k_means
from sparsejax.methods.sparsity.griffin import Griffin, GriffinSet
from sparsejax.methods.sparsity.sequence_sets import FixedSet, RandomSet
from sparsejax.plugs import ConfigError, resolve
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(1).integers(0, 256, (8, 96)).astype(np.int32)
PROMPT = 32
F = 20


def work(folder=None):
    spec = CalibrationSpec(sequences=8, length=96)
    return Work(Calibration(spec, TOKENS, ""), TIERS["quick"], folder)


def griffin_set(z, k):
    z = z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    return np.sort(np.argsort(-np.linalg.norm(z, axis=0), kind="stable")[:k])


def coreinfer_set(z, alpha, k):
    votes = np.zeros(z.shape[1])
    for row in z:
        n = int(alpha * (row > 0).sum())
        votes[np.argsort(-row, kind="stable")[:n]] += 1
    return np.sort(np.argsort(-votes, kind="stable")[:k])


@functools.cache
def compiled(op):
    return jax.jit(lambda h, prompt: op.chosen({}, h, prompt))


def sets(op, h, prompt=None):
    """Chosen units of each row of h [B, T, F]."""
    prompt = np.ones(h.shape[:2], bool) if prompt is None else prompt
    return [np.flatnonzero(row).tolist() for row in np.asarray(compiled(op)(jnp.asarray(h, jnp.float32), prompt))]


def hidden(seed, batch=2, length=6):
    """Values that float32 holds exactly and that tie often in votes."""
    return np.random.default_rng(seed).integers(-40, 41, (batch, length, F)) / 8


@given(seed=st.integers(0, 2**16), sizes=st.sampled_from([(1, 0.1), (7, 0.7)]))
def test_sets_are_the_card_s_of_each_sequence_and_see_its_prompt_alone(seed, sizes):
    k, alpha = sizes
    h = hidden(seed) * np.exp(np.random.default_rng(seed).normal(size=F))
    length = 1 + seed % 6
    prompt = np.broadcast_to(np.arange(6) < length, h.shape[:2])
    loud = np.where(prompt[..., None], h, 1e6)
    wide = loud.astype(np.float32).astype(np.float64)[:, :length]
    assert sets(GriffinSet(k / F), loud, prompt) == [griffin_set(z, k).tolist() for z in wide]
    assert sets(CoreSet(k / F, alpha, signed=True), loud, prompt) == [coreinfer_set(z, alpha, k).tolist() for z in wide]
    assert sets(CoreSet(k / F, alpha), loud, prompt) == [coreinfer_set(np.abs(z), alpha, k).tolist() for z in wide]


def test_griffin_is_deaf_to_the_loudness_of_a_token_and_of_one_token_takes_the_largest():
    h, loud = hidden(0), np.array([1, 100, 1, 1, 0.01, 1])[None, :, None]
    assert sets(GriffinSet(), h * loud) == sets(GriffinSet(), h)
    assert sets(GriffinSet(score="raw"), h * loud) != sets(GriffinSet(score="raw"), h)
    equal = h / np.linalg.norm(h, axis=-1, keepdims=True)
    assert sets(GriffinSet(score="raw"), equal) == sets(GriffinSet(), equal)
    top = [sorted(np.argsort(-np.abs(z[0]), kind="stable")[:10].tolist()) for z in hidden(1, length=1)]
    assert sets(GriffinSet(), hidden(1, length=1)) == sets(GriffinSet(score="max"), hidden(1, length=1)) == top


@pytest.mark.parametrize("op", [GriffinSet(0.25), GriffinSet(0.25, "max"), CoreSet(0.25), CoreSet(0.25, signed=True)])
def test_sets_ignore_the_order_of_tokens_and_follow_a_permutation_of_the_units(op):
    h, rng = np.random.default_rng(3).normal(size=(1, 40, F)), np.random.default_rng(0)
    assert sets(op, h[:, rng.permutation(40)]) == sets(op, h)
    order = rng.permutation(F)
    if isinstance(op, GriffinSet):  # equal votes go to the lowest index, which a permutation moves
        assert sorted(order[sets(op, h[..., order])[0]].tolist()) == sets(op, h)[0]


def test_the_core_of_one_token_is_its_largest_positive_entries_when_the_sizes_agree():
    h = np.abs(hidden(5, 1, 1)) + 1 / 16 * np.arange(F)
    alpha = 0.4  # floor(.4 * 20) = 8 units
    assert sets(CoreSet(8 / F, alpha, signed=True), h) == [sorted(np.argsort(-h[0, 0], kind="stable")[:8].tolist())]


def test_a_shared_set_is_that_of_all_prompts_together():
    h = hidden(6)
    for op in (GriffinSet(0.3), CoreSet(0.3)):
        assert sets(dataclasses.replace(op, shared=True), h) == sets(op, h.reshape(1, -1, F))


def test_masks_act_behind_the_prompt_padding_has_no_say_and_keeping_all_is_the_tensor_itself():
    h = jnp.asarray(hidden(7), jnp.float32)
    sparsify = jnp.asarray(np.arange(6) >= 3)[None].repeat(2, 0)
    segments = jnp.asarray([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    operand = GriffinSet(0.3)(h, Context(sparsify=sparsify, segment_ids=segments))
    assert isinstance(operand, SparseActivation) and operand.values is h
    mask = np.asarray(operand.mask)
    assert mask[:, :3].all() and (mask[:, 3:].sum(-1) == 6).all()
    prompt = np.array([[0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]], bool)
    assert [np.flatnonzero(row).tolist() for row in mask[:, 4]] == sets(GriffinSet(0.3), hidden(7), prompt)
    assert GriffinSet(1.0)(h, Context()) is h


@pytest.mark.parametrize("op", [GriffinSet(), CoreSet(), FixedSet()])
def test_without_a_prompt_there_is_nothing_to_choose_from_which_is_refused_by_name(op):
    arrays = ({"score": jnp.ones(F)},) if isinstance(op, FixedSet) else ()
    with pytest.raises(ConfigError, match=rf"{type(op).__name__.lower()}: chooses .* prompt.*--scope=from:FRACTION"):
        jax.eval_shape(lambda x: op(*arrays, x, Context()), jnp.zeros((1, 4, F)))


# A whole model: masks in one forward pass against a prefill and token-by-token decoding with sliced maps.


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=3, unroll=1)


def masked_logits(model, tokens, sparse=True):
    sparsify = jnp.arange(tokens.shape[1])[None].repeat(len(tokens), 0) >= PROMPT if sparse else None
    ctx = Context(mode="prefill", sparsify=sparsify)
    run = jax.jit(lambda values: nnx_compat.merge(model.structure, values)({"tokens": tokens}, ctx)[0])
    return np.asarray(run(model.values))


def decoded_logits(model, small, tokens):
    """Of the tokens behind the prompt, each decoded against the cache that the whole model and its predecessors filled."""

    def step(one, mode, values, token, position, cache):
        module = nnx_compat.merge(one.structure, values)
        batch = {"tokens": token, "positions": position, "segment_ids": jnp.ones_like(token)}
        h, _, cache = module.features(batch, Context(mode=mode), cache)
        return module.logits(h[:, -1]), cache

    prefill = jax.jit(functools.partial(step, model, "prefill"))
    decode = jax.jit(functools.partial(step, small, "decode"))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    cache = model.module().empty_cache(*tokens.shape)
    _, cache = prefill(model.values, tokens[:, :PROMPT], positions[:, :PROMPT], cache)
    cache, found = carried(cache, model, small), []
    for t in range(PROMPT, tokens.shape[1]):
        logits, cache = decode(small.values, tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        found.append(np.asarray(logits))
    return np.stack(found, axis=1)


PASSES = {
    "griffin, one set for two rows": (Griffin(0.75, shared=True), 2),
    "clusters before a dense end": (CoreInfer(0.5, dense_first=0, dense_last=1, clusters=3, prompt=32), 1),
}


@pytest.mark.parametrize("name", PASSES)
def test_decoding_by_masks_in_one_pass_is_real_decoding_with_the_sliced_model(model, name):
    one, rows = PASSES[name]
    tokens = TOKENS[:rows]  # 32 tokens of prompt, 64 decoded
    fitted = run_recipe([one], model, work())
    masked = masked_logits(fitted, tokens)
    small = select_neurons(fitted, tokens[:, :PROMPT])
    widths = [small.parameter(f"blocks.{i}.mlp.down.kernel").shape[0] for i in range(3)]
    kept = round(64 * (1 - one.sparsity))
    assert widths == [kept if i in one.layers(model.config) else 64 for i in range(3)]
    np.testing.assert_allclose(decoded_logits(model, small, tokens), masked[:, PROMPT:], atol=3e-5, rtol=1e-4)
    moved = np.abs(masked - masked_logits(model, tokens, sparse=False)).max(axis=(0, 2))
    assert moved[:PROMPT].max() < 1e-5 and moved[PROMPT:].min() > 1e-3


def test_an_index_of_units_in_another_order_is_the_same_function_and_its_inverse_the_same_bits(model):
    rng = np.random.default_rng(0)
    order = {layer: rng.permutation(64) for layer in range(3)}
    permuted = with_neurons(model, order)
    assert permuted.config == model.config
    np.testing.assert_allclose(masked_logits(permuted, TOKENS[:1], False), masked_logits(model, TOKENS[:1], False), atol=1e-5)
    back = with_neurons(permuted, {layer: np.argsort(units) for layer, units in order.items()})
    jax.tree.map(np.testing.assert_array_equal, back.values, model.values)


def test_what_has_no_sets_or_more_than_one_is_refused(model):
    with pytest.raises(ConfigError, match="nothing is to be selected"):
        select_neurons(model, TOKENS[:1])
    assert decoding_model(model, TOKENS[:1]) is model
    fitted = run_recipe([Griffin()], model, work())
    with pytest.raises(ConfigError, match="each row has its own set"):
        select_neurons(fitted, TOKENS[:2])
    with pytest.raises(ConfigError, match="blocks.0.mlp.down.*is fitted to all hidden units"):
        run_recipe([Griffin(), CoreInfer(dense_first=0, dense_last=0)], model, work())
    with pytest.raises(ConfigError, match="is fitted to all hidden units"):
        with_neurons(fitted, {0: np.arange(8)})
    stacked = model.with_rules(inputs=("blocks.*.mlp.down=griffin|topk:0.5",))
    with pytest.raises(ConfigError, match="others act beside the set"):
        select_neurons(stacked, TOKENS[:1])
    with pytest.raises(ConfigError, match="leave none of 3 layers"):
        CoreInfer().check(model.config)
    assert resolve("pass", "coreinfer:0.5,signed=true,dense_first=0") == CoreInfer(0.5, signed=True, dense_first=0)


def test_a_pass_notes_what_it_leaves_out_and_sparsity_zero_places_nothing(model):
    done = work()
    fitted = run_recipe([RandomSet(0.5, dense_first=1)], model, done)
    assert done.notes["0-randomset"]["kept_units"] == 32 and done.notes["0-randomset"]["layers"] == [1, 2]
    assert fitted.config.inputs[0].startswith("blocks.1.mlp.down=fixed_set") and Griffin.scope == "from:0.5"
    assert run_recipe([Griffin(0.0)], model, work()) is model


def test_k_means_finds_what_is_apart_and_leaves_no_cluster_empty():
    rng = np.random.default_rng(0)
    centres = np.eye(4) * 10
    points = np.repeat(centres, 5, axis=0) + rng.normal(size=(20, 4)) * 0.1
    found, member = k_means(points, 4, seed=0)
    assert {tuple(np.flatnonzero(member == one)) for one in range(4)} == {tuple(range(i, i + 5)) for i in (0, 5, 10, 15)}
    np.testing.assert_allclose(sorted(found.max(axis=1)), [10] * 4, atol=0.2)
    _, same = k_means(np.zeros((6, 3)), 3, seed=0)
    assert np.bincount(same, minlength=3).min() >= 1


def test_clusters_are_fitted_per_layer_to_prompts_and_kept(model, tmp_path):
    one = CoreInfer(0.5, dense_first=0, dense_last=1, clusters=3, prompt=32)
    done = work(tmp_path)
    fitted = run_recipe([one], model, done)
    assert all(sum(sizes) == 24 and min(sizes) > 0 for sizes in done.notes["0-coreinfer"]["cluster_sizes"].values())
    chosen = np.asarray(fitted.parameter("blocks.1.mlp.down.inputs.0.sets"))
    assert chosen.shape == (3, 64) and (chosen.sum(1) == 32).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-block-0.npz", "0-block-1.npz"]
