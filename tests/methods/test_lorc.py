"""LoRC: the best product of low rank, plain and weighted; its factors in a model, their bytes, and where they are refused."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.recipes import lorc as recipe
from sparsejax.arrays import dense
from sparsejax.compress import accounting
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.scaling import logits
from sparsejax.compress.statistics import second_moment
from sparsejax.io import model_folder
from sparsejax.io.sparsity_config import arrays_of_ops
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.inputs import QuantizedInputs
from sparsejax.methods.quant.lorc import Lorc, compensation, damped
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2))
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
SITES, Q = "blocks.*.{attn.q,mlp.down}", "blocks.0.attn.q"


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], folder)


@functools.cache
def compensated(how):
    using = work()
    rounded = Rtn("int3:asym", sites=SITES)
    return run_recipe([rounded if how == "none" else Lorc(rounded, 4, how == "weighted")], tiny_model(), using), using


def drawn(seed, inputs=9, outputs=13):
    rng = np.random.default_rng(seed)
    error, x = rng.standard_normal((inputs, outputs)), rng.standard_normal((40, inputs)) @ rng.standard_normal((inputs, inputs))
    return error, damped(x.T @ x / 40, 0.01)


def lost(error, a, b, hessian):
    rest = error - a.astype(np.float64) @ b
    return np.sum(rest * (hessian @ rest))


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_what_stays_are_the_small_singular_values_and_full_rank_leaves_nothing(seed):
    error, hessian = drawn(seed)
    for weight, given_to in ((np.eye(9), None), (hessian, hessian)):
        singular = np.linalg.svd(np.linalg.cholesky(weight).T @ error)[1]
        stays = [lost(error, *compensation(error, rank, given_to), weight) for rank in range(1, 10)]
        expected = [np.sum(singular[rank:] ** 2) for rank in range(1, 10)]
        np.testing.assert_allclose(stays, expected, rtol=1e-4, atol=1e-4 * np.sum(singular**2))
        a, b = compensation(error, 9, given_to)
        np.testing.assert_allclose(a @ b, error, atol=1e-3)


@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(max_examples=30)
def test_weighted_is_never_worse_at_the_outputs_nor_plain_at_the_weights(seed, rank):
    error, hessian = drawn(seed)
    plain, weighted = compensation(error, rank), compensation(error, rank, hessian)
    assert lost(error, *weighted, hessian) <= lost(error, *plain, hessian) * (1 + 1e-5)
    assert lost(error, *plain, np.eye(9)) <= lost(error, *weighted, np.eye(9)) * (1 + 1e-5)


def test_unstructured_error_has_next_to_no_low_rank_part_as_the_card_measured():
    error = np.random.default_rng(0).standard_normal((256, 256))
    for rank, share in ((4, 0.970), (8, 0.942), (16, 0.887), (64, 0.607)):
        a, b = compensation(error, rank)
        assert np.linalg.norm(error - a @ b) / np.linalg.norm(error) == pytest.approx(share, abs=0.01)


def test_inputs_that_are_always_zero_need_no_weights():
    error = np.ones((4, 3))
    a, b = compensation(error, 1, damped(np.zeros((4, 4)), 0.01))
    np.testing.assert_allclose(a @ b, error, atol=1e-6)


@pytest.mark.parametrize("how", ["plain", "weighted"])
def test_kernels_stay_those_of_the_base_and_int8_factors_take_error_off_every_one(how):
    (rounded, _), (model, using) = compensated("none"), compensated(how)
    note = using.notes["0-lorc"]
    sites = [f"blocks.{layer}.{name}" for layer in range(2) for name in ("attn.q", "mlp.down")]
    assert set(note["error_left_of"]) == set(sites) and all(0 < left < 0.8 for left in note["error_left_of"].values())
    for site in sites:
        kernel, a, b = (model.parameter(f"{site}.{name}") for name in ("kernel", "weights.0.a", "weights.0.b"))
        np.testing.assert_array_equal(kernel.codes, rounded.parameter(f"{site}.kernel").codes)
        assert isinstance(a, QTensor) and (a.shape[1], b.shape[0]) == (4, 4)
        assert a.scale.shape == (1, 4) and b.scale.shape == (4, 1)  # one of each for a component
    first = tiny_model().parameter(f"{Q}.kernel"), rounded.parameter(f"{Q}.kernel")
    error = np.asarray(first[0] - dense(first[1]), np.float64)
    product = np.asarray(dense(model.parameter(f"{Q}.weights.0.a")) @ dense(model.parameter(f"{Q}.weights.0.b")))
    singular = np.linalg.svd(error)[1] ** 2
    left, least = np.sum((error - product) ** 2) / np.sum(error**2), singular[4:].sum() / singular.sum()
    assert left >= least * (1 - 1e-6)
    if how == "plain":  # int8 factors lose next to nothing
        assert left == pytest.approx(note["error_left_of"][Q], rel=1e-4) and left < 1.02 * least


def test_in_a_model_the_weighted_factors_lose_less_at_the_outputs():
    blocks = Blocks(tiny_model())
    moment = second_moment(blocks.tensors(0, blocks.embed(TOKENS), "attn.q")[1]["attn.q"])
    losses = {}
    for how in ("plain", "weighted"):
        model = compensated(how)[0]
        error = np.asarray(tiny_model().parameter(f"{Q}.kernel") - dense(model.parameter(f"{Q}.kernel")), np.float64)
        losses[how] = lost(error, *(np.asarray(dense(model.parameter(f"{Q}.weights.0.{name}"))) for name in "ab"), moment)
    assert losses["weighted"] < losses["plain"]


def test_every_byte_of_the_factors_is_counted_and_the_folder_gives_the_same_bits(tmp_path):
    (rounded, _), (model, using) = compensated("none"), compensated("weighted")
    note = using.notes["0-lorc"]
    added = accounting.bytes_per_token(model).total - accounting.bytes_per_token(rounded).total
    assert added == note["factor_bytes"] == 2 * (4 * (32 + 32 + 64 + 32) + 2 * 2 * 4 * 4)
    base = using.notes["0-rtn"]
    assert note["bits_per_weight"] == pytest.approx(8 * (base["bytes"] + added) / (2 * (32 * 32 + 64 * 32)))
    model_folder.save(model, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.values, model.values)
    np.testing.assert_array_equal(logits(again, TOKENS[:1]), logits(model, TOKENS[:1]))


def test_files_that_hold_no_packed_factors_refuse_them_by_name():
    with pytest.raises(ConfigError, match=r"arrays of rules = \['blocks.0.attn.q.weights.0.a'.*are in a number format"):
        arrays_of_ops(compensated("plain")[0])


def test_what_was_interrupted_goes_on_at_its_block_to_the_same_bits(tmp_path):
    passes = [Lorc(Rtn("int3:asym", sites=SITES), 4)]
    run_recipe(passes, tiny_model(), work(tmp_path))
    (tmp_path / "0-factors1.npz").unlink()
    again = run_recipe(passes, tiny_model(), work(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.values, compensated("weighted")[0].values)


def test_recipes_of_every_kind_go_before_quantized_activations():
    config = tiny_model().config
    (weighted,), (plain,), (gptq,) = map(recipe.get_recipe, ("int4:group=16/3", "/2/plain", "int3:asym/8/gptq"))
    assert weighted == Lorc(Rtn("int4:group=16"), 3) and plain == Lorc(Rtn("int3:asym"), 2, False)
    assert gptq == Lorc(Gptq("int3:asym"), 8)
    check_recipe([gptq, QuantizedInputs()], config)
    with pytest.raises(ConfigError, match=r"lorc: how = 'best': allowed are 'plain', 'weighted', 'gptq'"):
        recipe.get_recipe("int4/8/best")
    with pytest.raises(ConfigError, match="lorc: rank = 'x': expected a whole number"):
        recipe.get_recipe("int4/x")


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Lorc(QuantizedInputs()), "lorc: base = .*does not only round kernels"),
        (Lorc(Rtn("int4:group=24")), "blocks.0.attn.q .*no multiple of 24"),
        (Lorc(Rtn("int4"), 0), "lorc: rank = 0: must be at least 1"),
        (Lorc(Rtn("int4"), 17), "lorc: blocks.0.attn.k: rank = 17: is above 16"),
        (Lorc(Rtn("int4"), 4, damping=0.0), "lorc: damping = 0.0: must be positive"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(one, message):
    with pytest.raises(ConfigError, match=message):
        check_recipe([one], tiny_model().config)
