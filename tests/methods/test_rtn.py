"""Round to nearest, and what all that quantizes weights shares: kernels replaced by site, pieces, the order of passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.recipes import rtn as recipe
from sparsejax import nnx_compat
from sparsejax.compress import accounting
from sparsejax.compress.allocators import Uniform
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.pieces import flattened, restored
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.context import Context
from sparsejax.evaluate.generate import Params, decoder
from sparsejax.io import model_folder
from sparsejax.methods.pruning.magnitude import Magnitude
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.inputs import QuantizedInputs
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.sparsity.refit import Refit
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.models.serving import serving_form
from sparsejax.nnx_compat import merge
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor, qtensor
from tests.compiled import dequantized, fake
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2))
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
DOWN = "blocks.1.mlp.down"


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], folder)


def logits(model):
    run = jax.jit(lambda values: merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


@pytest.mark.parametrize("text", ["int8", "int3:asym,group=24,ragged=tail", "nf4:group=16,double", "nvfp4", "ternary"])
def test_every_kernel_becomes_its_rounding_and_the_notes_tell_the_true_bytes(text):
    model, using, spec = tiny_model(), work(), FormatSpec.parse(text)
    quantized = run_recipe([Rtn(text, sites="blocks.*.mlp.down")], model, using)
    kernel = quantized.parameter(f"{DOWN}.kernel")
    assert isinstance(kernel, QTensor) and kernel.spec == spec and quantized.config == model.config
    np.testing.assert_array_equal(dequantized(kernel), fake(model.parameter(f"{DOWN}.kernel"), spec))
    (note,) = using.notes.values()
    kernels = [leaf for leaf in jax.tree.leaves(quantized.values, is_leaf=lambda v: isinstance(v, QTensor))
               if isinstance(leaf, QTensor)]  # fmt: skip
    stored = sum(leaf.nbytes for part in kernels for leaf in jax.tree.leaves(part))
    weights = 2 * 64 * 32
    assert note["bytes"] == stored and note["bytes_before"] == 4 * weights and note["formats"] == [text]
    assert note["bits_per_weight"] == pytest.approx(8 * stored / weights)
    saved = accounting.bytes_per_token(model).total - accounting.bytes_per_token(quantized).total
    assert saved == note["bytes_before"] - note["bytes"]


def test_searched_scales_bring_the_pass_closer_to_the_weights():
    kernels = [run_recipe([Rtn("int3:asym,group=16", DOWN, scales=scales)], tiny_model(), work()).parameter(f"{DOWN}.kernel")
               for scales in ("absmax", "mse")]  # fmt: skip
    plain, searched = (np.abs(kernel.dequantize() - tiny_model().parameter(f"{DOWN}.kernel")) ** 2.4 for kernel in kernels)
    assert searched.sum() < 0.97 * plain.sum() and kernels[0].spec == kernels[1].spec


def test_the_folder_of_a_quantized_model_gives_the_same_bits(tmp_path):
    mixed = [Rtn("int4:asym,group=16", sites="blocks.0.mlp.*"), Rtn("nvfp4", sites="blocks.*.attn.{q,k}")]
    quantized = run_recipe(mixed, tiny_model(), work())
    model_folder.save(quantized, tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    assert again.config.weights == quantized.config.weights
    jax.tree.map(np.testing.assert_array_equal, again.values, quantized.values)
    np.testing.assert_array_equal(logits(again), logits(quantized))


def test_layers_of_different_formats_leave_their_stack_and_compute_as_if_each_were_rounded():
    model = tiny_model()
    sites = {"blocks.0.mlp.down": "int8", "blocks.1.mlp.down": "int4", "blocks.1.attn.q": "int3:asym,group=16"}
    quantized = run_recipe([Rtn(text, sites=site) for site, text in sites.items()], model, work())
    assert set(quantized.config.weights) == {f"{site}=stored:{text}" for site, text in sites.items()}
    names = {f"{site}.kernel": FormatSpec.parse(text) for site, text in sites.items()}
    rounded = model.rebuilt(model.config, {name: fake(model.parameter(name), spec) for name, spec in names.items()})
    np.testing.assert_allclose(logits(quantized), logits(rounded), atol=2e-5)
    assert not isinstance(quantized.parameter("blocks.0.attn.q.kernel"), QTensor)


def test_stochastic_rounding_draws_by_its_seed_another_number_for_every_map():
    kernels = [run_recipe([Rtn("int4:round=stochastic", seed=seed)], tiny_model(), work()).parameter for seed in (0, 0, 1)]
    first, same, other = (np.asarray(parameter(f"{DOWN}.kernel").codes) for parameter in kernels)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_sparse_activations_go_on_top_of_quantized_weights_in_one_recipe(tmp_path):
    passes = [*recipe.get_recipe("int4:asym,group=16"), Teal(0.4, allocator=Uniform())]
    model = run_recipe(passes, tiny_model(), work())
    kernel, threshold = (model.parameter(f"{DOWN}.{name}") for name in ("kernel", "inputs.0.threshold"))
    assert isinstance(kernel, QTensor) and float(threshold) > 0 and np.isfinite(logits(model)).all()
    model_folder.save(model, tmp_path / "out")
    np.testing.assert_array_equal(logits(model_folder.load(tmp_path / "out")), logits(model))


def test_an_order_that_would_change_quantized_weights_is_refused_before_any_work():
    config = tiny_model().config
    with pytest.raises(ConfigError, match=r"recipe\[1\] \(magnitude\): changes weights after rtn has fitted formats"):
        check_recipe([Rtn("int8"), Magnitude()], config)
    with pytest.raises(ConfigError, match=r"recipe\[2\] \(refit\): after = 'rtn': changes weights as floats"):
        check_recipe([Rtn("int8"), Teal(), Refit()], config)
    check_recipe([Magnitude(), Rtn("int8"), Teal()], config)


def test_bad_formats_and_bad_weights_are_refused_by_site_before_any_work():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"blocks.0.attn.q \[32, 32\]: .*32 channels are no multiple of 24.*ragged=tail"):
        run_recipe([Rtn("int4:group=24")], model, work())
    with pytest.raises(ConfigError, match="format: element.*Did you mean 'int4'"):
        run_recipe([Rtn("int44")], model, work())
    with pytest.raises(ConfigError, match="is static"):
        run_recipe([Rtn("int8:static")], model, work())
    kernel = model.parameter(f"{DOWN}.kernel").at[5, 3].set(jnp.nan)
    spoiled = model.rebuilt(model.config, {f"{DOWN}.kernel": kernel})
    with pytest.raises(ConfigError, match=r"recipe\[0\] \(rtn\): blocks.1.mlp.down.kernel: input channels = \[5\]: hold NaN"):
        run_recipe([Rtn("int8")], spoiled, work())
    with pytest.raises(ConfigError, match=r"blocks.0.attn.q = 'int8': is quantized already"):
        run_recipe([Rtn("int4")], run_recipe([Rtn("int8")], model, work()), work())


def test_channels_without_weights_are_told_by_site_before_the_work_and_decode_to_zeros(caplog):
    model = tiny_model()
    kernel = model.parameter(f"{DOWN}.kernel").at[jnp.array([1, 7])].set(0)
    pruned = model.rebuilt(model.config, {f"{DOWN}.kernel": kernel})
    quantized = run_recipe([Rtn("int4:asym,group=16", sites=DOWN)], pruned, work())
    assert "blocks.1.mlp.down: 2 of 64 input channels have no weight but 0" in caplog.text
    assert not np.asarray(dequantized(quantized.parameter(f"{DOWN}.kernel")))[[1, 7]].any()


@pytest.mark.parametrize("text", ["nvfp4", "int4:asym,group=16,scale=bf16", "fp8_e4m3", "nf4:group=16,double"])
def test_a_piece_of_work_holds_quantized_tensors_and_small_floats_bit_for_bit(text, tmp_path):
    numbers = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    tensor = jax.jit(qtensor, static_argnums=1)(numbers, FormatSpec.parse(text))
    found = {"a": tensor, "b": np.arange(3), "c": jnp.ones(2, jnp.bfloat16)}
    np.savez(tmp_path / "piece.npz", **flattened(found))
    with np.load(tmp_path / "piece.npz") as kept:
        again = restored(dict(kept))
    assert list(again) == ["a", "b", "c"] and again["a"].spec == tensor.spec and again["c"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_the_serving_form_joins_maps_of_one_input_and_reads_their_codes():
    """One token at a time, as `generate` decodes; q, k and v, gate and up are one QTensor each."""
    model = run_recipe([Rtn("int4:asym,group=16")], tiny_model(), work())
    served = serving_form(model.structure, model.values)
    joined = [nnx_compat.at(served[1], path) for path in served[0].paths if path[-2] in ("qkv", "gate_up")]
    assert len(joined) == 4 and all(isinstance(kernel, QTensor) for kernel in joined)
    step = decoder(served[0])
    cache, apply = step.empty_cache(1, 8), jax.jit(step.apply)
    for at, expected in enumerate(logits(model)[0, :3]):
        batch = {"tokens": TOKENS[:1, at : at + 1], "positions": np.full((1, 1), at, np.int32)}
        found, cache = apply(Params(served[1]), batch, cache)
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def test_experts_are_rounded_each_by_itself():
    model = tiny_model(feed_pattern=("ffn", "moe:experts=4,k=2"))
    rounded = run_recipe([Rtn("int8"), QuantizedInputs("int8")], model, work())
    for name in ("up", "gate", "down"):
        kernel = rounded.parameter(f"blocks.1.mlp.experts.{name}.kernel")
        assert isinstance(kernel, QTensor) and kernel.codes.shape[0] == 4
    difference = logits(rounded) - logits(model)
    assert 0 < np.sqrt(np.mean(np.square(difference))) < 0.1 * np.sqrt(np.mean(np.square(logits(model))))


def test_a_map_is_rounded_once():
    with pytest.raises(ConfigError, match=r"recipe\[1\] \(gptq\): blocks.0.mlp.down = 'rtn': has rounded this map before"):
        check_recipe([Rtn("int8", sites="blocks.*.mlp.down"), Gptq("int4")], tiny_model().config)
    check_recipe([Rtn("int8", sites="blocks.*.mlp.*"), Gptq("int4", sites="blocks.*.attn.*")], tiny_model().config)
    with pytest.raises(ConfigError, match="log2_4.*has no negative numbers"):
        check_recipe([Rtn("log2_4")], tiny_model().config)
