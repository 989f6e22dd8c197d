"""KV4 and KV8 as a pass: loss is measured through rounded keys, the folder keeps the format, bytes are told."""

import jax
import numpy as np
import pytest

from configs.recipes import kv_cache as recipe
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.io import model_folder
from sparsejax.io.export_hf import write_hf
from sparsejax.methods.quant.kv_cache import KvCache, with_cache_format
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.models.serving import cache_bytes
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)


def work():
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"])


@pytest.fixture(scope="module")
def model():
    """Keys large enough to be told apart: what random ones mix hardly depends on them."""
    found = tiny_model(layers=2)
    kernels = {f"blocks.{layer}.attn.{name}.kernel": 4 for layer in range(2) for name in "qk"}
    return found.rebuilt(found.config, {name: factor * found.parameter(name) for name, factor in kernels.items()})


@pytest.fixture(scope="module")
def losses(model):
    models = {"dense": model} | {arg: run_recipe(recipe.get_recipe(arg), model, work()) for arg in ("int8", "int4")}
    return {name: Scorer(one).score([Row(row, 1) for row in TOKENS]).nll / 31 for name, one in models.items()}


def test_fewer_bits_lose_more_and_eight_nearly_nothing(losses):
    error = {name: np.abs(found - losses["dense"]).mean() for name, found in losses.items()}
    assert 0 < error["int8"] < error["int4"] / 4 and error["int8"] < 0.02, error


def test_the_folder_keeps_the_format_and_scores_the_same_bits(model, losses, tmp_path):
    using = work()
    quantized = run_recipe([Rtn("int8"), *recipe.get_recipe()], model, using)
    model_folder.save(quantized, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    assert again.config.attention == quantized.config.attention and again.config.attention.cache_format == KvCache().format
    jax.tree.map(np.testing.assert_array_equal, again.values, quantized.values)
    # Two layers, keys and values, two heads of 8 numbers: 4 bytes of codes and 4 of scale and minimum, for 32 of floats.
    note = using.notes["1-kvcache"]
    assert (note["token_bytes"], note["token_bytes_before"]) == (2 * 2 * 2 * 8, 2 * 2 * 2 * 32)
    assert note["bits_per_number"] == 8 and cache_bytes(again.config) == 64


def test_a_published_config_that_has_no_word_for_the_cache_refuses_it_by_name(model, tmp_path):
    with pytest.raises(ConfigError, match="cannot express model.attention.cache_format = 'int8:token'"):
        write_hf(with_cache_format(model, "int8:token"), tmp_path / "hf")


def test_formats_that_do_not_fit_are_refused_before_any_work(model):
    for one, message in [
        (KvCache("int4"), r"recipe\[0\] \(kvcache\): format: .*granularity = 'channel'"),
        (KvCache("int4:group=5,axis=-1"), "8 channels are no multiple of 5"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_recipe([one], model.config)
    with pytest.raises(ConfigError, match="--cache-format: model.attention.cache_format: cache = 'int5x'"):
        with_cache_format(model, "int5x", "--cache-format")
