import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.config import DataConfig
from sparsejax.models import sizes
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig, VisionConfig
from sparsejax.plugs import ConfigError
from sparsejax.train.state import abstract_model

WIDTHS = st.integers(1, 512).map(lambda n: 8 * n)


@given(WIDTHS, st.booleans(), st.sampled_from(["parameters", "flops"]))
def test_the_width_is_the_multiple_of_eight_that_comes_nearest_to_the_plain_ffn(d_model, bias, match):
    plain = getattr(sizes.ffn_size(d_model, 4 * d_model, gated=False, bias=bias), match)

    def off(hidden):
        return abs(getattr(sizes.ffn_size(d_model, hidden, gated=True, bias=bias), match) - plain)

    width = sizes.ffn_width(d_model, gated=True, match=match, bias=bias)
    assert width % 8 == 0 and width > 0
    assert off(width) <= min(off(width + 8), off(width - 8) if width > 8 else math.inf)


@given(WIDTHS, st.booleans(), st.sampled_from(["parameters", "flops"]))
def test_a_plain_ffn_is_its_own_reference(d_model, bias, match):
    assert sizes.ffn_width(d_model, gated=False, match=match, bias=bias) == 4 * d_model


def test_the_known_widths_of_published_models():
    assert sizes.ffn_width(4096, gated=True, multiple=256) == 11008  # Llama 7B
    assert sizes.ffn_width(768, gated=True, multiple=64) == 2048


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="'flops'"):
        sizes.ffn_width(64, gated=True, match="flop")


@given(st.integers(1, 40), st.integers(0, 50), st.booleans())
def test_the_mean_number_of_keys_is_that_of_the_mask(length, window, causal):
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    mask = np.ones((length, length), bool)
    if causal:
        mask &= key <= query
    if window:
        mask &= abs(query - key) < window
    assert sizes._mean_keys(length, causal, window) == pytest.approx(mask.sum() / length)


MODELS = {
    "plain decoder": ModelConfig(),
    "gated, grouped, biased": ModelConfig(
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, bias=True, out_bias=True, qk_norm=True),
        ffn=FFNConfig(activation="swiglu", bias=True), tied_embeddings=False, head_bias=True, layer_scale=0.1,
    ),
    "sandwich": ModelConfig(block="sandwich", norm=NormConfig(kind="layer", bias=True)),
    "post, learned positions": ModelConfig(block="post", positions=PositionConfig(kind="learned", offset=2)),
    "no norm, parallel": ModelConfig(block="parallel", norm=NormConfig(kind="none"), positions=PositionConfig(kind="none")),
    "experts": ModelConfig(feed_pattern=("ffn", "moe:experts=4,k=2,hidden=64,shared=1")),
    "encoder-decoder": ModelConfig(kind="encoder_decoder", encoder_layers=2, positions=PositionConfig(kind="relative")),
    "encoder": ModelConfig(kind="encoder", token_types=2, ffn=FFNConfig(activation="gelu")),
    "vit": ModelConfig(
        kind="vit", num_classes=10, positions=PositionConfig(kind="learned"), vision=VisionConfig(12, 3, 4, class_token=True)
    ),
    "vit, mean": ModelConfig(
        kind="vit", num_classes=7, positions=PositionConfig(kind="none"), vision=VisionConfig(8, 1, 2, class_token=False)
    ),
    "norm over the projection": ModelConfig(
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True, qk_norm_over="projection")
    ),
    "encoder, masked-token head": ModelConfig(
        kind="encoder", token_types=2, ffn=FFNConfig(activation="gelu"), block="post", norm=NormConfig("layer", bias=True),
        embedding_norm=True, head_transform=True, head_bias=True,
    ),
    "shared expert with a gate": ModelConfig(feed_pattern=("moe:experts=4,k=2,hidden=64,shared=2,shared_gate=true",)),
    "two activations": ModelConfig(feed_pattern=("ffn:stat_topk_geglu:0.05", "ffn"), ffn=FFNConfig(activation="geglu_tanh")),
    "learned activation": ModelConfig(ffn=FFNConfig(activation="xielu")),
    "halved activation": ModelConfig(ffn=FFNConfig(activation="simple_gate")),
}
DATA = {
    "decoder": DataConfig(),
    "encoder": DataConfig(task="masked_lm"),
    "encoder_decoder": DataConfig(task="ul2"),
    "vit": DataConfig(source="digits", task="classification"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_counts_are_those_of_the_model(name):
    model = finalize(ExperimentConfig(model=dataclasses.replace(MODELS[name], d_model=64), data=DATA[MODELS[name].kind])).model
    _, shapes = abstract_model(model)
    counts = sizes.parameter_counts(model)
    actual = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert counts["total"] == actual == sum(count for part, count in counts.items() if part != "total")


def test_flops_are_six_per_matmul_parameter_and_twelve_per_query_key_pair():
    config = finalize(ExperimentConfig(model=ModelConfig(num_layers=2, d_model=64, vocab_size=512)))
    counts = sizes.parameter_counts(config.model)
    matrices = counts["attention"] + counts["feed"] + 64 * 512
    assert sizes.flops_per_token(config.model, 7) == 6 * matrices + 12 * 2 * 64 * (1 + 7) / 2


def test_flops_count_active_experts_only():
    def flops(feed):
        return sizes.flops_per_token(finalize(ExperimentConfig(model=ModelConfig(feed_pattern=(feed,)))).model, 128)

    router = 6 * 4 * 128 * 4
    assert flops("moe:experts=4,k=2,hidden=256") - router == pytest.approx(flops("ffn"))


def test_a_window_saves_flops_only_in_local_layers():
    def flops(pattern, window):
        model = ModelConfig(attention=AttentionConfig(window=window), attention_pattern=pattern)
        return sizes.flops_per_token(finalize(ExperimentConfig(model=model)).model, 128)

    full, half, local = flops(("global",), 0), flops(("global", "local"), 16), flops(("local",), 16)
    assert full - half == pytest.approx(half - local) and local < half


def test_the_comparison_names_both_measures():
    config = finalize(ExperimentConfig(model=ModelConfig(ffn=FFNConfig(activation="swiglu"))))
    line = sizes.ffn_comparison(config.model)
    assert "gated F=344" in line and "132,096 parameters" in line and "flops per token (1.008 and 1.008 of plain F=512)" in line
