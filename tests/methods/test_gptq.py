"""GPTQ against its card: the golden vector, the identity of the loss, order and blocks, and the pass on a tiny decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.recipes import gptq as recipe
from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.io import model_folder
from sparsejax.methods.quant import gptq as module
from sparsejax.methods.quant.gptq import Gptq, gptq, sweep_of
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from tests.compiled import dequantized, fake, qparams
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2))
TOKENS = np.random.default_rng(0).integers(0, 256, (8, 32), np.int32)
GOLDEN_H = np.array([[23, 27, -2, -4], [27, 35, 5, 0], [-2, 5, 30, 22], [-4, 0, 22, 17]]) / 3
GOLDEN_W = np.array([[1, -0.75, -1.25, -0.625], [-0.25, 1, -0.125, -1.25]], np.float32).T
PASSES = [Gptq("int3:asym,group=16", "dynamic", sites="blocks.*.mlp.*")]
FORMATS = ["int4", "int4:asym,group=8", "int3:asym,group=7,ragged=tail", "int4:group=7,ragged=pad", "nf4:group=4", "mxfp4",
           "nvfp4", "int4:group=2,axis=-1", "int8:block=4x2,ragged=tail"]  # fmt: skip
SORTABLE = ("int4:asym,group=8", "int3:asym,group=7,ragged=tail", "nf4:group=4", "mxfp4", "nvfp4")


def work(folder=None, tokens=TOKENS):
    spec = CalibrationSpec(sequences=len(tokens), length=tokens.shape[1])
    return Work(Calibration(spec, tokens, ""), TIERS["quick"], folder)


def drawn(seed, inputs=32, outputs=4, tokens=200):
    """(kernel, H) of inputs that are correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + 0.4 * rng.normal(size=(inputs, inputs)))
    x *= rng.uniform(0.2, 3, inputs)
    return rng.normal(size=(inputs, outputs)).astype(np.float32), x.T @ x / tokens


def solved(kernel, h, text, order="none", **options):
    spec = FormatSpec.parse(text)
    fixed = qparams(jnp.asarray(kernel), spec) if order == "static" else None
    return gptq(kernel, sweep_of(h, spec.block(kernel.shape)[0], order), spec, parameters=fixed, **options)


@pytest.mark.parametrize("order", ["none", "static"])
def test_scales_searched_by_the_hessian_lose_less_over_many_maps(order):
    totals = dict.fromkeys(("absmax", "hessian"), 0.0)
    spec = FormatSpec.parse("int2:asym,group=8")
    for seed in range(4):
        kernel, h = drawn(seed, outputs=16)
        for scales in totals:
            weights = np.diag(h).astype(np.float32) if scales == "hessian" else None
            fixed = module.searched_parameters(kernel, None, weights, spec, scales) if order == "static" else None
            found = gptq(kernel, sweep_of(h, 8, order), spec, parameters=fixed, scales=scales, weights=weights)
            error = kernel - np.asarray(found.tensor.dequantize())
            totals[scales] += np.sum(error * (h @ error))
    assert totals["hessian"] < totals["absmax"], totals


@pytest.mark.parametrize(
    ("order", "codes", "loss"),
    [("none", [[2, -1, -4, 0], [-1, 3, -1, -2]], 0.709203125), ("static", [[3, -2, -3, -1], [0, 2, 0, -3]], 0.390453125)],
)
def test_the_golden_vector_of_the_card(order, codes, loss):
    fixed = QParams(jnp.full((1, 2), 0.45, jnp.float32))
    found = gptq(GOLDEN_W, sweep_of(GOLDEN_H, 4, order), FormatSpec.parse("int4"), parameters=fixed)
    np.testing.assert_array_equal(found.tensor.unpacked(), np.array(codes).T)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    if order == "static":
        assert sweep_of(GOLDEN_H, 4, order).order.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("text", "order"), [(text, order) for text in FORMATS for order in module.ORDERS if order != "dynamic" or text in SORTABLE]
)
def test_the_reported_loss_is_the_trace_under_the_damped_hessian(text, order):
    kernel, h = drawn(1)
    found = solved(kernel, h, text, order)
    error = kernel.astype(np.float64) - np.asarray(dequantized(found.tensor), np.float64)
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    assert found.loss == pytest.approx(np.trace(error.T @ damped @ error), rel=1e-9)
    found.tensor.check("tensor")


def test_groups_of_the_dynamic_order_are_those_of_the_permuted_kernel():
    kernel, h = drawn(3)
    found = solved(kernel, h, "int3:asym,group=8", "dynamic")
    order = np.argsort(-np.diag(h), kind="stable")
    sorted_ = solved(kernel[order], h[np.ix_(order, order)], "int3:asym,group=8")
    np.testing.assert_array_equal(np.asarray(found.tensor.dequantize())[order], sorted_.tensor.dequantize())
    np.testing.assert_array_equal(np.asarray(found.tensor.group_of)[order, 0], np.arange(32) // 8)
    assert found.loss == pytest.approx(sorted_.loss, rel=1e-9) and str(found.tensor.spec) == "int3:asym,group=8,indexed"
    # Two bytes more for each input, and nothing else.
    assert found.tensor.nbytes == sorted_.tensor.nbytes + 2 * 32


def test_an_index_of_a_group_that_there_is_not_shows_as_nan():
    tensor = solved(*drawn(3), "int3:asym,group=8", "dynamic").tensor
    damaged = dataclasses.replace(tensor, group_of=tensor.group_of.at[5].set(9)).dequantize()
    assert np.flatnonzero(np.isnan(damaged).any(1)).tolist() == [5]
    with pytest.raises(ConfigError, match="tensor.group_of = 9: there are scales of 4 groups"):
        dataclasses.replace(tensor, group_of=tensor.group_of.at[5].set(9)).check("tensor")
    with pytest.raises(ConfigError, match=r"tensor.group_of = None: int3:asym,group=8,indexed of \(32, 4\) needs"):
        dataclasses.replace(tensor, group_of=None).check("tensor")


def test_scales_that_are_quantized_together_are_those_of_the_original_weights():
    kernel, h = drawn(1)
    spec = FormatSpec.parse("nf4:group=8,double")
    found = solved(kernel, h, str(spec), "static").tensor
    wanted = qparams(jnp.asarray(kernel), spec)
    for name in ("scale", "second", "mean"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    found.check("tensor")


@given(st.integers(0, 10**6), st.sampled_from(FORMATS))
@settings(max_examples=12)
def test_white_inputs_leave_rounding_to_nearest(seed, text):
    kernel, spec = drawn(seed)[0], FormatSpec.parse(text)
    found = gptq(kernel, sweep_of(3 * np.eye(32), spec.block(kernel.shape)[0]), spec)
    np.testing.assert_array_equal(dequantized(found.tensor), fake(jnp.asarray(kernel), spec))


@pytest.mark.parametrize("text", ["int4:asym,group=8", "int3:asym,group=7,ragged=tail"])
@pytest.mark.parametrize("order", module.ORDERS)
def test_the_size_of_blocks_does_not_change_the_codes(text, order):
    kernel, h = drawn(2)
    codes = [np.asarray(solved(kernel, h, text, order, block=block).tensor.codes) for block in (1, 16, 32, 128)]
    for other in codes[1:]:
        np.testing.assert_array_equal(other, codes[0])


def test_without_clipping_the_loss_is_at_most_that_of_half_steps():
    kernel, h = drawn(3)
    fixed = QParams(jnp.full((1, 4), 0.25, jnp.float32))
    sweep = sweep_of(h, 32)
    found = gptq(kernel, sweep, FormatSpec.parse("int8"), parameters=fixed)
    assert found.loss <= 4 * np.sum(0.25**2 / (4 * np.diag(sweep.inverse.upper) ** 2))


@pytest.mark.parametrize("text", ["int4", "int3:asym,group=8", "mxfp4"])
def test_over_many_maps_compensation_and_order_each_lower_the_error(text):
    orders = [order for order in module.ORDERS if order != "dynamic" or text in SORTABLE or "group" in text]
    losses = {"rtn": 0.0, **dict.fromkeys(orders, 0.0)}
    for seed in range(6):
        kernel, h = drawn(seed)
        kernels = {order: dequantized(solved(kernel, h, text, order).tensor) for order in orders}
        kernels["rtn"] = fake(jnp.asarray(kernel), FormatSpec.parse(text))
        for name, other in kernels.items():
            error = kernel - np.asarray(other, np.float64)
            losses[name] += np.trace(error.T @ h @ error)
    assert losses["none"] < 0.8 * losses["rtn"] and max(losses[order] for order in orders[1:]) < losses["none"], losses


def test_order_by_groups_keeps_groups_whole_and_the_short_one_last():
    h = np.diag(np.array([1.0, 2, 3, 9, 8, 7, 99]))
    sweep = sweep_of(h, 3, "group")
    assert sweep.order.tolist() == [3, 4, 5, 2, 1, 0, 6] and sweep.groups.tolist() == [1, 0, 2]


def test_inputs_that_are_always_zero_lose_their_weights():
    kernel, h = drawn(4)
    h[:, 5] = h[5] = 0
    found = solved(kernel, h, "int4:group=8")
    assert not np.asarray(dequantized(found.tensor))[5].any() and np.isfinite(found.loss)


@pytest.fixture(scope="module")
def quantized():
    using = work()
    return run_recipe(PASSES, tiny_model(), using), using.notes["0-gptq"]


def test_a_model_errs_less_than_rounded_to_nearest_at_the_same_bytes_and_an_index(quantized):
    model, note = quantized
    rounded = run_recipe([Rtn("int3:asym,group=16", sites="blocks.*.mlp.*")], tiny_model(), work())

    def error(other):
        blocks, wanted = Blocks(other), Blocks(tiny_model())
        h = g = blocks.embed(TOKENS)
        for layer in range(2):
            h, g = blocks.run(layer, h)[0], wanted.run(layer, g)[0]
        return np.sum(np.square(np.asarray(h) - np.asarray(g)))

    assert error(model) < 0.8 * error(rounded)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one.values)) for one in (model, rounded)]
    assert sizes[0] == sizes[1] + 2 * 2 * (32 + 32 + 64)
    assert note["bits_per_weight"] == pytest.approx(3 + (16 + 3) / 16 + 16 * (32 + 32 + 64) / (3 * 32 * 64), rel=0.02)
    assert len(note["relative_loss_of"]) == 6 and all(0 < loss < 0.5 for loss in note["relative_loss_of"].values())
    assert not note["dead_inputs"] and not note["raised_damping_of"]


def test_every_map_is_fed_by_the_quantized_maps_before_it(quantized):
    """The last map of the last block, solved again from what enters it in the finished model."""
    model, _ = quantized
    blocks, spec = Blocks(model), FormatSpec.parse("int3:asym,group=16")
    h, _ = blocks.run(0, blocks.embed(TOKENS))
    x = np.asarray(blocks.tensors(1, h, *INPUTS)[1]["mlp.down"]).reshape(-1, 64).astype(np.float64)
    kernel = np.asarray(tiny_model().parameter("blocks.1.mlp.down.kernel"))
    again = solved(kernel, x.T @ x / len(x), str(spec), "dynamic").tensor
    mine = model.parameter("blocks.1.mlp.down.kernel")
    assert np.mean(np.asarray(again.codes) == np.asarray(mine.codes)) > 0.99


def test_an_interrupted_compression_goes_on_at_its_block_with_the_same_bits(quantized, tmp_path, monkeypatch):
    solved_sites, real = [], module.gptq

    def dying(*arguments, **options):
        solved_sites.append(1)
        if len(solved_sites) == 5:  # in the second block of three maps each
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "gptq", dying)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(PASSES, tiny_model(), work(tmp_path / "pieces"))
    using = work(tmp_path / "pieces")
    resumed = run_recipe(PASSES, tiny_model(), using)
    assert len(solved_sites) == 5 + 3
    model, note = quantized
    jax.tree.map(np.testing.assert_array_equal, resumed.values, model.values)
    assert using.notes["0-gptq"] == note
    model_folder.save(resumed, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(tmp_path / "out").values, model.values)


def test_the_argument_of_the_recipe_is_a_format_and_an_order():
    assert recipe.get_recipe("nf4:group=64/static") == [Gptq("nf4:group=64", "static")] and recipe.get_recipe() == [Gptq()]


def test_what_must_fail_is_refused_before_the_work():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"blocks.0.mlp.down: calibration tokens = 40: are fewer than its 64 inputs.*raise "
                                          "--calibration-sequences"):  # fmt: skip
        run_recipe([Gptq("int4")], model, work(tokens=TOKENS[:2, :20]))
    for passes, message in [
        ([Gptq("int4", "actorder")], "order = 'actorder': allowed are"),
        ([Gptq("int4", "dynamic")], "order = 'dynamic': sorts inputs into groups, and int4 has none"),
        ([Gptq("int4:group=16,indexed")], "leave indexed out"),
        ([Rtn("int4:group=16,indexed")], "gptq with order dynamic makes such groups"),
        ([Gptq("int4:group=24")], r"blocks.0.attn.q \[32, 32\]: .*no multiple of 24"),
        ([Gptq("int4", damping=0.0)], "damping = 0.0: must be positive"),
        ([Gptq("int4:round=stochastic")], "rounds at random"),
        ([Gptq("nf4:group=16,double")], "order = 'none': .*expected static"),
        ([Gptq("int4", sites="blocks.*.mlp.dwn")], "names no site.*Did you mean"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_recipe(passes, model.config)
