"""QuaRot, SpinQuant, KurTail, DartQuant and OSTQuant on a model with outliers, as recipes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.recipes import dartquant, kurtail, ostquant, quarot, spinquant
from sparsejax.compress.basis import random_basis
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.head_bases import merge_heads
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.compress.rotated import HEADS, STREAM, Rotated, free_scales, merge_rotations
from sparsejax.compress.rotation_objectives import cross_entropy
from sparsejax.compress.scaling import logits
from sparsejax.compress.surgery import chain_at
from sparsejax.compress.transforms import check_mergeable, fold_norms
from sparsejax.methods.pruning.sequential import ALL_MAPS
from sparsejax.methods.quant.dartquant import DartQuant
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.inputs import QuantizedInputs, rounding
from sparsejax.methods.quant.kurtail import KurTail
from sparsejax.methods.quant.learned_rotation import samples
from sparsejax.methods.quant.ostquant import OstQuant
from sparsejax.methods.quant.quarot import OnlineRotate, RotateValues
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.quant.spinquant import SpinQuant
from sparsejax.methods.sparsity.rotate import Rotate
from sparsejax.plugs import ConfigError
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (8, 32), np.int32)
SITES = [f"blocks.{i}.{name}" for i in range(2) for name in
         ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
DOWNS = ["blocks.0.mlp.down", "blocks.1.mlp.down"]


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=8, length=32), TOKENS, ""), TIERS["quick"], folder)


@functools.cache
def outlier_model():
    """Two blocks with a few channels of the stream, behind each norm, between v and o and in front of down above the others."""
    model, arrays = tiny.tiny_model(layers=2, unroll=1), {}

    def scale(name, factor, axis=0, channels=(3, 11)):
        index = (slice(None),) * axis + (jnp.array(channels),)
        arrays[name] = arrays.get(name, model.parameter(name)).at[index].multiply(factor)

    scale("embed.table", 8.0, axis=1)
    for i in range(2):
        for norm, readers in (("attn_norm", ("attn.q", "attn.k", "attn.v")), ("mlp_norm", ("mlp.gate", "mlp.up"))):
            scale(f"blocks.{i}.{norm}.gain", 30.0)
            for reader in readers:
                scale(f"blocks.{i}.{reader}.kernel", 1 / 30)
        scale(f"blocks.{i}.mlp.up.kernel", 30.0, axis=1)
        scale(f"blocks.{i}.mlp.down.kernel", 1 / 30)
        scale(f"blocks.{i}.attn.v.kernel", 30.0, axis=1)
        scale(f"blocks.{i}.attn.o.kernel", 1 / 30, channels=(3, 11, 8 + 3, 16 + 3, 24 + 3))
    return model.rebuilt(model.config, arrays)


@functools.cache
def drawn():
    """Rotations and scales that are nothing in particular."""
    rng = np.random.default_rng(2)
    heads = np.stack([random_basis(8, seed) for seed in range(4)]).reshape(2, 2, 8, 8)
    free = {name: 0.5 * rng.normal(size=zero.shape) for name, zero in free_scales(fold_norms(outlier_model())).items()}
    return {STREAM: random_basis(32, 9), HEADS: heads}, free


@pytest.fixture(scope="module")
def rotated():
    """(the model under QuaRot's three rotations, what the passes noted)."""
    done = work()
    return run_recipe([Rotate("hadamard"), RotateValues(), OnlineRotate()], outlier_model(), done), done.notes


@functools.cache
def dense_logits():
    return logits(outlier_model(), TOKENS)


def rounded_logits(model):
    """With inputs of 4 bits."""
    return logits(QuantizedInputs("int4").apply(model, work()), TOKENS)


def error_of(found):
    return float(np.mean(np.square(found - dense_logits())))


def test_what_is_differentiated_is_the_model_that_is_merged():
    model = outlier_model()
    rotations, free = drawn()
    assert set(free) == {"attn.v", "attn_norm", "mlp_norm", "mlp.up"}
    merged = merge_rotations(model, rotations, free, DOWNS)
    traced = Rotated(fold_norms(model), DOWNS)
    found = dataclasses.replace(traced.model, values=jax.jit(traced.values)(rotations, free))
    assert found.config == merged.config
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn_norm.gain", "mlp_norm.gain")]
    for name in ("embed.table", "head.kernel", *blocks, *(f"{site}.kernel" for site in SITES)):
        np.testing.assert_allclose(found.parameter(name), merged.parameter(name), rtol=2e-4, atol=2e-4)


def test_quarot_changes_no_logit_and_is_where_spinquant_starts(rotated, learned):
    model, notes = rotated
    assert [note["equivalence"] < 1e-4 for note in notes.values()] == [True] * 3
    one, folded = SpinQuant(), fold_norms(outlier_model())
    start = merge_rotations(outlier_model(), one.start(folded), {}, DOWNS)
    for site in SITES:
        np.testing.assert_allclose(model.parameter(f"{site}.kernel"), start.parameter(f"{site}.kernel"), atol=1e-5)
    before = learned["spinquant"][1]["objective_cross_entropy"]["before"]
    np.testing.assert_allclose(before, cross_entropy(rounded_logits(model), TOKENS), rtol=1e-3)


def test_every_rotation_helps_four_bit_activations(rotated):
    plain = error_of(rounded_logits(outlier_model()))
    first = error_of(rounded_logits(Rotate("hadamard").apply(outlier_model(), work())))
    assert plain > first > 2 * error_of(rounded_logits(rotated[0]))


def test_behind_quarot_gptq_fits_the_rotated_input_and_all_is_better_than_activations_alone_without(rotated):
    passes = quarot.get_recipe()
    check_recipe(passes, outlier_model().config)
    assert [one.name for one in passes] == ["rotate", "rotatevalues", "onlinerotate", "gptq", "quantizedinputs"]
    done = run_recipe([Gptq("int4", sites="blocks.*.mlp.down"), passes[4]], rotated[0], work())
    assert str(done.parameter("blocks.0.mlp.down.kernel").spec) == "int4"
    assert chain_at(done.config, "inputs", DOWNS[1]) == ("hadamard", "int4")
    assert error_of(logits(done, TOKENS)) < error_of(rounded_logits(outlier_model()))


LEARNED = {
    "spinquant": (SpinQuant(steps=12), "objective_cross_entropy"),
    "ostquant": (OstQuant(steps=12, top=20), "objective_kl_top"),
    "kurtail": (KurTail(steps=30, batch=256), "objective_stream"),
    "dartquant": (DartQuant(steps=30, rate=0.01, batch=256), "objective_stream"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of pieces that were kept."""
    return tmp_path_factory.mktemp("pieces")


@pytest.fixture(scope="module")
def learned(folder):
    found = {}
    for name, (one, _) in LEARNED.items():
        done = work(folder / name)
        found[name] = (one.apply(outlier_model(), done), done.notes[f"0-{one.name}"])
    return found


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_rotation_lowers_its_objective_and_changes_no_logit(learned, name):
    model, note = learned[name]
    objective = note[LEARNED[name][1]]
    assert objective["after"] < objective["before"] and len(objective["path"]) == LEARNED[name][0].steps
    assert note["equivalence"] < 1e-4
    assert model.config.inputs == ("blocks.*.mlp.down=hadamard",) and not model.config.residuals
    check_mergeable(model.config)


@pytest.mark.parametrize("name", ["kurtail", "dartquant"])
def test_the_heads_have_rotations_of_their_own(learned, name):
    model, note = learned[name]
    objective = note["objective_heads"]
    assert objective["after"] < objective["before"]
    kernels = [np.asarray(m.parameter("blocks.0.attn.v.kernel")) for m in (model, merged_start())]
    products = [k.T @ k for k in kernels]  # the residual stream's rotation cancels
    assert not np.allclose(*products, atol=1e-2)
    for head in (slice(0, 8), slice(8, 16)):  # orthogonal in each head: lengths are those of the model
        np.testing.assert_allclose(np.trace(products[0][head, head]), np.trace(products[1][head, head]), rtol=1e-4)


@functools.cache
def merged_start():
    one, folded = KurTail(), fold_norms(outlier_model())
    return merge_rotations(outlier_model(), one.start(folded), {}, DOWNS)


def test_the_start_of_ostquant_fills_more_of_the_grid_than_plain_channels(learned):
    space = learned["ostquant"][1]["log_qsur"]
    assert set(space) == {"plain", "start", "learned"} and space["plain"] < min(space["start"], space["learned"])


def test_scales_are_learned_where_they_are_asked_for(learned):
    gains = np.asarray(learned["ostquant"][0].parameter("blocks.0.mlp_norm.gain"))
    assert np.all(gains > 0) and np.ptp(gains) > 0.01
    np.testing.assert_array_equal(learned["spinquant"][0].parameter("blocks.0.mlp_norm.gain"), 1)
    assert OstQuant(scale_rate=0.0).check(outlier_model().config) is None


def test_samples_have_unit_rows_without_the_first_token_and_know_their_heads():
    model = fold_norms(outlier_model())
    taken = samples(model, work(), rows=64, seed=0)
    assert taken.stream.shape == (64, 32) and taken.heads.shape == (2, 2, 32, 8)
    np.testing.assert_allclose(np.mean(taken.stream**2, -1), 1, rtol=1e-5)
    # A basis of the heads turns the samples of its own head alone.
    basis = np.stack([np.stack([np.eye(8), random_basis(8, 1)])] * 2)
    turned = samples(merge_heads(model, dict(enumerate(basis))), work(), rows=64, seed=0)
    np.testing.assert_allclose(turned.heads[:, 0], taken.heads[:, 0], atol=1e-4)
    np.testing.assert_allclose(turned.heads[0, 1], taken.heads[0, 1] @ basis[0, 1], atol=1e-4)


def test_an_interrupted_pass_takes_up_what_it_had_learned(learned, folder):
    again = work(folder / "dartquant")
    found = LEARNED["dartquant"][0].apply(outlier_model(), again)
    np.testing.assert_array_equal(found.parameter("head.kernel"), learned["dartquant"][0].parameter("head.kernel"))
    assert "objective_stream" not in again.notes["0-dartquant"]


@pytest.mark.parametrize("module", [spinquant, kurtail, dartquant, ostquant])
def test_every_recipe_fits_and_ends_with_rounding(module):
    passes = module.get_recipe("int4/rtn")
    check_recipe(passes, outlier_model().config)
    assert isinstance(passes[1], Rtn) and passes[2] == QuantizedInputs("int4")


def test_recipes_say_what_they_do_not_understand():
    assert rounding("int3:asym,group=16//none") == [Gptq("int3:asym,group=16")]
    for text, message in (("int4/obq", "rounding: solver = 'obq'"), ("a/b/c/d", "expected FORMAT/SOLVER/OP")):
        with pytest.raises(ConfigError, match=message):
            rounding(text)
    with pytest.raises(ConfigError, match="quarot: rotations = 'r3'"):
        quarot.get_recipe("int4/rtn/int4/r3")
    config = outlier_model().config
    for one, message in (
        (SpinQuant(steps=0), "steps = 0"), (KurTail(rate=0.0), "rate = 0.0"), (OstQuant(top=1), "top = 1"),
        (DartQuant(batch=0), "batch = 0"), (OstQuant(scale_rate=-1.0), "scale_rate = -1.0"),
        (SpinQuant(activations="int5"), "int5"), (KurTail(online="blocks.*.mlp.dwn"), "names no site"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            one.check(config)


def test_all_maps_are_rounded_while_learning():
    rounded = OstQuant().rounded(fold_norms(outlier_model()), "int4").model.config
    assert ALL_MAPS and all(chain_at(rounded, "inputs", site)[-1] == "int4" for site in SITES)
    assert chain_at(rounded, "inputs", DOWNS[0]) == ("hadamard", "int4") and chain_at(rounded, "weights", SITES[0]) == ("int4",)
