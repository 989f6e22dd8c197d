"""Changing the basis of the residual stream changes no logit in any family with a site map; the others are refused by name."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.compress.basis import eigenbasis, hadamard_basis, orthogonal_factors, random_basis
from sparsejax.compress.surgery import Placed, place
from sparsejax.compress.transforms import basis_change, check_mergeable, fold_norms, folded_kernels, merge_bases
from sparsejax.context import Context
from sparsejax.io.family import family_of
from sparsejax.io.model import Model
from sparsejax.io.safetensors_file import open_safetensors
from sparsejax.io.weights import load_values
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.models.site_map import _check_complete, residual_stream
from sparsejax.models.transformer import Transformer
from sparsejax.plugs import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrained"
TOKENS = np.random.default_rng(0).integers(0, 264, (2, 12))


def recorded(case):
    """A model of random weights that `transformers` made, with its tokens and logits."""
    path = next(p for p in (GOLDEN / "decoders" / case, GOLDEN / "others" / case) if p.is_dir())
    family = family_of(json.loads((path / "config.json").read_text()), case)
    config = dataclasses.replace(family.to_config(json.loads((path / "config.json").read_text())), unroll=1)
    with np.load(path / "reference.npz") as stored:
        tokens, logits = (stored[name] for name in (("tokens", "logits") if "tokens" in stored else ("input_ids", "output")))
    return Model(case, config, *load_values(config, family, open_safetensors(path), dtype="float32")), tokens, logits


def logits_of(model, tokens=TOKENS):
    def forward(values, tokens):
        return nnx_compat.merge(model.structure, values)({"tokens": tokens}, Context(mode="prefill"))[0]

    return np.asarray(jax.jit(forward)(model.values, jnp.asarray(tokens)))


def random_bases(model):
    """Another rotation for every stretch of the stream."""
    return {s.name: random_basis(model.config.d_model, i) for i, s in enumerate(residual_stream(model.config))}


def tiny(seed=1, **fields):
    """Random parameters, also of norms, biases and scales, as training leaves them and no initialisation does."""
    shape = dict(num_layers=2, d_model=16, vocab_size=264, max_length=16, unroll=1, ffn=FFNConfig(24, activation="swiglu"),
                 attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4))  # fmt: skip
    config, rng = ModelConfig(**{**shape, **fields}), np.random.default_rng(seed)
    structure, shapes = nnx_compat.abstract(lambda: Transformer(config, jax.random.key(0)))

    def draw(variable, like):
        drawn = rng.normal(size=like.shape) * (0.25 if variable.role in ("matrix", "embedding", "router") else 0.5)
        dtype = config.dtype if variable.role in nnx_compat.COMPUTE_ROLES else "float32"
        return jnp.asarray(drawn + (variable.role == "norm"), dtype)

    return Model("tiny", config, structure, structure.map(draw, shapes))


# RMSNorm; biases; norms of queries and keys; LayerNorm with biases; parallel; experts, also beside a shared one.
MERGEABLE = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "qwen2_moe"]


@pytest.mark.parametrize("case", MERGEABLE)
def test_logits_in_another_basis_at_every_stretch_are_those_of_the_reference(case):
    model, tokens, expected = recorded(case)
    rotated = merge_bases(model, random_bases(model))
    assert rotated.config.residuals and not rotated.config.tied_embeddings and rotated.config.norm.kind == "rms"
    np.testing.assert_allclose(logits_of(rotated, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["mistral", "opt"])
def test_folding_norms_leaves_gains_of_one_and_the_same_logits(case):
    model, tokens, expected = recorded(case)
    folded = fold_norms(model)
    assert np.ptp(model.parameter("blocks.1.mlp_norm.gain")) > 0.1
    for name in ("blocks.1.attn_norm.gain", "norm.gain"):
        np.testing.assert_array_equal(folded.parameter(name), 1)
    assert not folded.config.residuals
    np.testing.assert_allclose(logits_of(folded, tokens), expected, rtol=0, atol=1e-4)


# What no recorded family has together with a site map.
RARE = {
    "gains of one plus w, scaled embeddings, learned positions, learned scales of what is added": dict(
        norm=NormConfig(plus_one=True), embedding_scale=True, positions=PositionConfig(kind="learned"), layer_scale=0.5
    ),
    "LayerNorm with biases in front of maps without": dict(norm=NormConfig("layer", bias=True), head_bias=True),
    "parallel, no norm": dict(block="parallel", norm=NormConfig("none")),
}


@pytest.mark.parametrize("fields", RARE.values(), ids=RARE)
def test_what_rarely_stands_at_the_stream_is_merged_too(fields):
    model = tiny(**fields)
    expected = logits_of(model)
    rotated = merge_bases(model, random_bases(model))
    np.testing.assert_allclose(logits_of(rotated), expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


def test_maps_stand_only_where_the_basis_changes():
    model = tiny(num_layers=3)
    names = [s.name for s in residual_stream(model.config)]
    assert names == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "blocks.2.attn", "blocks.2.mlp", "head"]
    one = random_basis(16, 0)
    assert not merge_bases(model, dict.fromkeys(names, one)).config.residuals
    layered = {name: random_basis(16, i // 2) for i, name in enumerate(names[:-1])} | {"head": random_basis(16, 2)}
    assert merge_bases(model, layered).config.residuals == ("blocks.0.residual.mlp=map", "blocks.1.residual.mlp=map")
    last = merge_bases(model, {"head": one})
    np.testing.assert_allclose(last.parameter("blocks.2.skip_mlp.0.map"), one, atol=1e-6)


def test_a_bfloat16_model_keeps_its_dtypes():
    model = tiny(dtype="bfloat16", residual_dtype="float32")
    rotated = merge_bases(model, random_bases(model))
    for name in ("embed.table", "head.kernel", "blocks.0.attn.q.kernel", "blocks.0.skip_attn.0.map"):
        assert rotated.parameter(name).dtype == jnp.bfloat16
    assert rotated.parameter("norm.gain").dtype == jnp.float32


REFUSED = [
    (dict(block="post"), "model.block = 'post'"),
    (dict(block="sandwich"), "model.block = 'sandwich'"),
    (dict(embedding_norm=True), "model.embedding_norm = True"),
    (dict(positions=PositionConfig(kind="sinusoidal")), "model.positions.kind = 'sinusoidal'"),
    (dict(kind="encoder"), "model.kind = 'encoder'"),
    (dict(head=False), "model.head = False"),
    (dict(inputs=("blocks.*.attn.q=topk:0.5",)), "blocks.0.attn.q: model.inputs = 'topk:0.5'"),
    (dict(inputs=("head=topk:0.5",), tied_embeddings=False), "head: model.inputs"),
    (dict(residuals=("blocks.1.residual.mlp=map",)), "blocks.1.skip_mlp.0.map"),
]


@pytest.mark.parametrize("fields, message", REFUSED)
def test_a_stretch_that_no_basis_can_be_merged_into_is_refused_by_name(fields, message):
    model = tiny()
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(".", r"\.")):
        check_mergeable(dataclasses.replace(model.config, **fields))


def test_an_op_inside_attention_or_ffn_does_not_mind_the_basis():
    model = place(tiny(num_layers=1), "inputs", {"blocks.0.mlp.down": Placed("topk:0.5")})
    assert merge_bases(model, random_bases(model)).config.inputs == model.config.inputs


def test_a_router_cannot_take_up_the_bias_of_a_norm():
    feed = ("moe:experts=2,k=1,combine=raw,hidden=8",)
    model = tiny(num_layers=1, feed_pattern=feed, norm=NormConfig("layer", bias=True))
    with pytest.raises(ConfigError, match="blocks.0.mlp.router = 'no bias'"):
        fold_norms(model)


def test_a_parameter_at_the_stream_that_the_map_does_not_list_is_refused():
    with pytest.raises(ConfigError, match="blocks.0.mlp.memory.kernel: reads or writes the residual stream"):
        _check_complete([], {"blocks.0.mlp.memory.kernel": ("embed", "mlp"), "blocks.0.attn.q_norm.gain": (None,)})


def test_bases_are_checked():
    model = tiny(num_layers=1)
    for bases, message in (
        ({"blocks.7.attn": np.eye(16)}, "are no stretches"),
        ({"head": np.eye(8)}, r"must be \[16, 16\]"),
        ({"head": 1.01 * np.eye(16)}, "must stay below"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge_bases(model, bases)
    assert basis_change(None, None) is None and basis_change(np.eye(3), np.eye(3)) is None


@given(st.integers(1, 260), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_fixed_bases_are_orthogonal_and_flat_where_hadamard_matrices_reach(width, seed):
    for basis in (hadamard_basis(width), hadamard_basis(width, seed), random_basis(width, seed)):
        np.testing.assert_allclose(basis.T @ basis, np.eye(width), atol=1e-10)
    sizes = [len(factor) for factor in orthogonal_factors(width)]
    assert np.prod(sizes, initial=1) == width
    if all(size == 2 or size % 4 == 0 for size in sizes):
        np.testing.assert_allclose(np.abs(hadamard_basis(width)) * width**0.5, 1, atol=1e-9)
    else:
        assert sum(size % 2 for size in sizes) == 1  # one Hartley matrix


@pytest.mark.parametrize("width, factors", [(576, [12, 12, 2, 2]), (896, [28] + [2] * 5), (1536, [12] + [2] * 7), (18, [9, 2])])
def test_widths_of_real_models_are_products_of_small_hadamard_matrices(width, factors):
    assert [len(factor) for factor in orthogonal_factors(width)] == factors


def test_principal_components_are_those_of_the_reference():
    x = np.random.default_rng(0).normal(size=(500, 24)) * np.linspace(0.2, 3, 24)
    moment = x.T @ x / len(x)
    damped = moment + np.eye(24) * 0.01 * np.mean(np.diag(moment))
    reference = np.linalg.eigh(damped)[1][:, ::-1]
    ours = eigenbasis(moment)
    np.testing.assert_allclose(np.abs(np.sum(ours * reference, axis=0)), 1, atol=1e-10)
    np.testing.assert_allclose(ours.T @ ours, np.eye(24), atol=1e-10)


@given(st.integers(0, 5))
@settings(max_examples=5, deadline=None)
def test_rms_norm_of_gain_one_commutes_with_a_rotation(seed):
    h, q = np.random.default_rng(seed).normal(size=(7, 32)), random_basis(32, seed)
    normed, rotated = (x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) for x in (h, h @ q))
    np.testing.assert_allclose(rotated, normed @ q, atol=1e-14)


def test_folded_kernels_carry_the_gains():
    model = tiny(num_layers=1)
    stretch = residual_stream(model.config)[0]
    gain, kernel = (np.asarray(model.parameter(f"blocks.0.{name}"), np.float64) for name in ("attn_norm.gain", "attn.k.kernel"))
    np.testing.assert_allclose(folded_kernels(model, stretch)["blocks.0.attn.k"], gain[:, None] * kernel, rtol=1e-12)


def test_attention_and_ffn_fields_are_left_as_they_were():
    """Only what folding must change of a config is changed."""
    model = tiny(num_layers=1)
    folded = fold_norms(model).config
    assert folded == dataclasses.replace(model.config, tied_embeddings=False)
    biased = fold_norms(tiny(num_layers=1, norm=NormConfig("layer", bias=True))).config
    assert biased.attention == AttentionConfig(**{**vars(model.config.attention), "bias": True})
    assert biased.ffn == FFNConfig(**{**vars(model.config.ffn), "bias": True})
