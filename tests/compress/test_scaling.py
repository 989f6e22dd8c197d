"""Scales moved between producers and readers leave a model's function alone."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.compress.recipe import TIERS, Work
from sparsejax.compress.scaling import logits, merge_scales, scaled_pairs, verify_equivalence
from sparsejax.compress.surgery import Placed, place
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.models.config import AttentionConfig, NormConfig
from sparsejax.plugs import ConfigError
from tests.compress import tiny

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 16), np.int32)
HEADS = AttentionConfig(num_heads=4, num_kv_heads=4, bias=True, out_bias=True)
KINDS = {
    "gqa": {},
    "gemma": dict(norm=NormConfig(plus_one=True), activation="geglu"),
    "layer_norm": dict(norm=NormConfig("layer"), attention=HEADS, block="parallel"),
    "plain": dict(activation="relu2", attention=HEADS),
}


@functools.cache
def model_of(kind):
    return tiny.tiny_model(layers=2, **KINDS[kind])


def widths(model, pairs):
    return {pair.producer: model.parameter(f"{pair.readers[0]}.kernel").shape[0] for pair in pairs}


@pytest.mark.parametrize("kind", ["gqa", "layer_norm", "plain"])
def test_powers_of_two_change_no_bit_of_the_outputs(kind):
    model = model_of(kind)
    pairs, _ = scaled_pairs(model.config)
    rng = np.random.default_rng(1)
    scales = {name: 2.0 ** rng.integers(-3, 4, width) for name, width in widths(model, pairs).items()}
    scaled = merge_scales(model, pairs, scales)
    np.testing.assert_array_equal(logits(scaled, TOKENS), logits(model, TOKENS))
    for pair in pairs:
        for reader in pair.readers:
            assert (scaled.parameter(f"{reader}.kernel") != model.parameter(f"{reader}.kernel")).any()


@given(st.integers(0, 99))
@settings(max_examples=3)
def test_any_scales_leave_the_function_and_gemmas_gain_is_one_more_than_stored(seed):
    model, rng = model_of("gemma"), np.random.default_rng(seed)
    pairs, _ = scaled_pairs(model.config)
    scales = {name: np.exp(rng.normal(size=width)) for name, width in widths(model, pairs).items()}
    scaled = merge_scales(model, pairs, scales)
    assert verify_equivalence(model, scaled, TOKENS) < 1e-5
    before, after = (np.asarray(one.parameter("blocks.1.mlp_norm.gain")) for one in (model, scaled))
    np.testing.assert_allclose((before + 1) / scales["blocks.1.mlp_norm"] - 1, after, atol=1e-6)


def test_maps_that_no_producer_serves_are_named_with_the_reason():
    pairs, skipped = scaled_pairs(model_of("gqa").config)
    assert [pair.producer for pair in pairs[:3]] == ["blocks.0.attn_norm", "blocks.0.mlp_norm", "blocks.0.mlp.up"]
    assert skipped["blocks.1.attn.o"].startswith("4 query heads share 2 v heads")
    pairs, skipped = scaled_pairs(model_of("plain").config)
    assert pairs[1].producer == "blocks.0.attn.v" and skipped["blocks.0.mlp.down"] == "the hidden vector is not linear in up"
    sparse = place(model_of("gqa"), "inputs", {"blocks.0.mlp.down": Placed("topk:0.5")})
    assert scaled_pairs(sparse.config)[1]["blocks.0.mlp.down"] == "an op acts at blocks.0.mlp.down"


def test_scales_that_change_the_function_or_make_no_sense_are_refused():
    model = model_of("gqa")
    pairs, _ = scaled_pairs(model.config)
    with pytest.raises(ConfigError, match="blocks.0.attn.v.*gives nothing that can be scaled"):
        merge_scales(model, pairs, {"blocks.0.attn.v": np.ones(32)})
    with pytest.raises(ConfigError, match="scales of blocks.0.mlp.up = .*must be 64 positive"):
        merge_scales(model, pairs, {"blocks.0.mlp.up": np.zeros(64)})
    changed = model.rebuilt(model.config, {"norm.gain": model.parameter("norm.gain") * 1.01})
    with pytest.raises(ConfigError, match="equivalence of a transform = 0.01"):
        verify_equivalence(model, changed, TOKENS)
    with pytest.raises(ConfigError, match="expected pre or parallel"):
        scaled_pairs(tiny.tiny_model(layers=1, block="sandwich").config)
    with pytest.raises(ConfigError, match="not linear, or was fitted"):
        scaled_pairs(place(model, "inputs", {"blocks.0.attn.q": Placed("topk:0.5")}).config)


def test_a_quantized_kernel_is_not_scaled():
    model = model_of("gqa")
    quantized = Rtn("int8", sites="blocks.*.mlp.down").apply(model, Work(None, TIERS["quick"]))
    pairs, _ = scaled_pairs(model.config)
    with pytest.raises(ConfigError, match="blocks.0.mlp.down = 'int8': is quantized already"):
        merge_scales(quantized, pairs, {"blocks.0.mlp.up": np.ones(64)})
