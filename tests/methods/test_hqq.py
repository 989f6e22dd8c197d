"""HQQ: the error of the card, float zeros, and what is refused."""

import jax
import numpy as np
import pytest

from configs.recipes import hqq as recipe
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.methods.quant.hqq import Hqq, hqq
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor, qtensor
from tests.compiled import dequantized
from tests.compress.tiny import tiny_model

nearest_of = jax.jit(qtensor, static_argnums=1)


def weights(inputs=256, outputs=64):
    """Gaussian weights times t6 columns' sizes, as the card's."""
    rng = np.random.default_rng(0)
    return (0.02 * rng.normal(size=(inputs, outputs)) * np.abs(rng.standard_t(6, size=(inputs, 1)))).astype(np.float32)


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.99), (3, 0.98), (2, 0.93)])
def test_the_mean_error_falls_the_more_the_fewer_the_bits(bits, gain):
    w, spec = weights(), FormatSpec.parse(f"int{bits}:asym,group=64,zero=float")
    fitted, nearest = (np.abs(w - np.asarray(dequantized(tensor))).mean() for tensor in (hqq(w, spec), nearest_of(w, spec)))
    assert fitted < gain * nearest


def test_no_group_is_worse_than_rounded_to_nearest_and_scales_stay():
    w, spec = weights(), FormatSpec.parse("int3:asym,group=96,zero=float,ragged=tail")
    fitted, nearest = hqq(w, spec), nearest_of(w, spec)
    errors = [np.abs(w - np.asarray(dequantized(tensor))) for tensor in (fitted, nearest)]
    for start in (0, 96, 192):
        ours, theirs = (error[start : start + 96].mean(0) for error in errors)
        assert (ours <= theirs * (1 + 1e-5)).all()
    np.testing.assert_array_equal(fitted.scale, nearest.scale)
    assert fitted.zero.dtype == np.float16 and fitted.zero.shape == (3, 64)


def test_a_recipe_quantizes_a_model_and_integer_zeros_are_refused():
    model = tiny_model(layers=1)
    using = Work(None, TIERS["quick"])
    quantized = run_recipe(recipe.get_recipe("int4:asym,group=16,zero=float"), model, using)
    assert isinstance(quantized.parameter("blocks.0.mlp.down.kernel"), QTensor)
    assert using.notes["0-hqq"]["bits_per_weight"] == pytest.approx(4 + 2)
    with pytest.raises(ConfigError, match="hqq: format = 'int4:asym,group=16': has no float zeros"):
        check_recipe([Hqq("int4:asym,group=16")], model.config)
