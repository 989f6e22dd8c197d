"""AWQ against its card: the scales, the search for caps, and what both do to a decoder with salient channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.recipes import awq as recipe
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.methods.quant import awq as module
from sparsejax.methods.quant.awq import CAPS, RATIOS, Awq, awq_scales, best_caps, scaled_and_rounded
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from tests.compiled import fake
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (8, 32), np.int32)
TEXT = "int3:asym,group=16"


@functools.cache
def salient_model():
    """Two blocks in which three channels behind each norm, and two hidden units, are twenty times the others."""
    model, arrays = tiny.tiny_model(layers=2), {}
    for layer in range(2):
        for norm in ("attn_norm", "mlp_norm"):
            name = f"blocks.{layer}.{norm}.gain"
            arrays[name] = model.parameter(name).at[jnp.array([3, 11, 20])].multiply(20.0)
        name = f"blocks.{layer}.mlp.up.kernel"
        arrays[name] = model.parameter(name).at[:, jnp.array([5, 40])].multiply(20.0)
    return model.rebuilt(model.config, arrays)


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=8, length=32), TOKENS, ""), TIERS["quick"], folder)


def block_error(model):
    """The sum over blocks of what each gives wrong for what enters it in the float model."""
    blocks, wanted = Blocks(model), Blocks(salient_model())
    h, total = wanted.embed(TOKENS), 0.0
    for layer in range(2):
        ours, h = blocks.run(layer, h)[0], wanted.run(layer, h)[0]
        total += np.sum(np.square(np.asarray(ours) - np.asarray(h))) / np.sum(np.square(h))
    return total


def test_the_golden_scales_of_the_card():
    mean = np.array([4, 1, 0.25, 1])
    np.testing.assert_allclose(awq_scales(mean, 0.25), [1.41421, 1, 0.70711, 1], atol=1e-5)
    np.testing.assert_allclose(awq_scales(mean, 0.5), [2, 1, 0.5, 1])
    np.testing.assert_array_equal(awq_scales(mean, 0.0), np.ones(4))


@given(st.sampled_from(RATIOS), st.floats(0.1, 100))
def test_scales_do_not_depend_on_the_size_of_all_activations(ratio, factor):
    mean = np.abs(np.random.default_rng(1).normal(size=12)) + 0.1
    np.testing.assert_allclose(awq_scales(factor * mean, ratio), awq_scales(mean, ratio), rtol=1e-9)


def test_powers_of_two_scale_and_round_without_a_trace_in_whole_columns():
    kernel = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    spec = FormatSpec.parse("int4")
    np.testing.assert_array_equal(scaled_and_rounded(jnp.asarray(kernel), jnp.full(16, 4.0), spec), fake(kernel, spec))


@pytest.mark.parametrize("text", ["int3:asym,group=8", "int3:group=10,ragged=tail", "int2:asym"])
def test_caps_are_those_of_the_search_over_tokens(text):
    """The card's loop: partial sums of every token, group and output."""
    rng, spec = np.random.default_rng(2), FormatSpec.parse(text)
    x, w = rng.normal(size=(50, 24)).astype(np.float32), rng.normal(size=(24, 5)).astype(np.float32)
    size = min(spec.block(w.shape)[0], 24)
    caps = np.asarray(best_caps(jnp.asarray(w), jnp.asarray(x.T @ x / 50), spec))
    starts = range(0, 24, size)
    errors, limits = np.zeros((len(CAPS), len(starts), 5)), np.zeros((len(CAPS), 24, 5), np.float32)
    for i, p in enumerate(CAPS):
        for start in starts:
            limits[i, start : start + size] = np.float32(p) * np.abs(w[start : start + size]).max(0)
        d = w - np.asarray(fake(np.clip(w, -limits[i], limits[i]), spec))
        for g, start in enumerate(starts):
            errors[i, g] = np.mean(np.square(x[:, start : start + size] @ d[start : start + size]), axis=0)
    for g, start in enumerate(starts):
        found = caps[start : start + size]
        assert (found == found[0]).all()
        best = errors[:, g].min(0)
        mine = [errors[np.argmin(np.abs(limits[:, start, n] - found[0, n])), g, n] for n in range(5)]
        np.testing.assert_allclose(mine, best, rtol=1e-4)
        largest = np.abs(w[start : start + size]).max(0)
        assert (found[0] <= largest).all() and (found[0] >= 0.549 * largest).all()


@pytest.fixture(scope="module")
def found():
    """The model of AWQ alone, before it is rounded, and what the report says."""
    using = work()
    return run_recipe([Awq(TEXT)], salient_model(), using), using.notes["0-awq"]


def test_the_search_never_ends_above_rounding_to_nearest_and_names_what_stays(found):
    _, note = found
    producers = [f"blocks.{layer}.{name}" for layer in range(2) for name in ("attn_norm", "mlp_norm", "mlp.up")]
    assert list(note["ratios"]) == producers and note["equivalence"] < 1e-5
    assert all(0 < gain <= 1 for gain in note["error_of_rounding"].values())
    assert max(note["ratios"].values()) > 0.2 and min(note["error_of_rounding"].values()) < 0.7
    assert set(note["unscaled"]) == {"blocks.0.attn.o", "blocks.1.attn.o"}


def test_salient_channels_are_rounded_better_and_best_with_compensation(found):
    scaled, _ = found
    rtn, gptq = Rtn(TEXT, sites="blocks.*.mlp.*"), Gptq(TEXT, "static", sites="blocks.*.mlp.*")
    ways = {"rtn": (rtn, salient_model()), "awq": (rtn, scaled), "both": (gptq, scaled)}
    errors = {name: block_error(run_recipe([one], model, work())) for name, (one, model) in ways.items()}
    assert errors["awq"] < 0.7 * errors["rtn"] and errors["both"] < 0.9 * errors["awq"], errors


def test_an_interrupted_search_goes_on_at_its_block(found, tmp_path, monkeypatch):
    seen, real = [], module._Search.block

    def dying(self, layer, *arguments):
        if layer == 1 and len(seen) == 1:
            seen.append("died")
            raise KeyboardInterrupt
        seen.append(layer)
        return real(self, layer, *arguments)

    monkeypatch.setattr(module._Search, "block", dying)
    with pytest.raises(KeyboardInterrupt):
        run_recipe([Awq(TEXT)], salient_model(), work(tmp_path))
    resumed = run_recipe([Awq(TEXT)], salient_model(), work(tmp_path))
    assert seen == [0, "died", 1]
    jax.tree.map(np.testing.assert_array_equal, resumed.values, found[0].values)


def test_recipes_and_what_they_refuse():
    config = salient_model().config
    assert recipe.get_recipe("int4:asym,group=16/gptq") == [Awq("int4:asym,group=16"), Gptq("int4:asym,group=16", "static")]
    check_recipe(recipe.get_recipe("int4:asym,group=16"), config)
    for passes, message in [
        ([Rtn("int8"), Awq("int8")], r"recipe\[1\] \(awq\): changes weights after rtn has fitted formats"),
        ([Awq("int4:tensor")], "has no scales of single outputs"),
        ([Awq("int4", scale=False, clip=False)], "nothing to search for"),
        ([Awq("int4:group=24")], "no multiple of 24"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_recipe(passes, config)
    with pytest.raises(ConfigError, match="awq: rounding = 'gtpq'.*Did you mean 'gptq'"):
        recipe.get_recipe("int4/gtpq")
