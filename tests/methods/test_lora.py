"""LoRA and DoRA as weight ops: the base at the start, float64 oracles, packed bases, and what is folded for export."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import nnx_compat
from sparsejax.arrays import LowRank, QTensor, dense, matmul
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.context import Context
from sparsejax.data.config import DataConfig
from sparsejax.io.model import Model
from sparsejax.methods.peft.dora import Dora, norm_ratio
from sparsejax.methods.peft.lora import Lora
from sparsejax.methods.peft.merge import MergeAdapters, merged
from sparsejax.methods.quant.qat import Int4Weight, Int8Weight
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.plugs import ConfigError

CTX = Context(mode="prefill")
BATCH = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 8)), jnp.int32)}


def arrays(spec, shape, seed=0):
    """A spec's arrays, drawn away from their zeros."""
    axes = ("expert",) * (len(shape) - 2) + ("embed", "mlp")
    declared = spec.parameters(shape, axes, jax.random.key(seed))
    draws = np.random.default_rng(seed)
    return {name: w.get_value() + 0.3 * draws.standard_normal(w.shape).astype(np.float32) for name, w in declared.items()}


def model(**rules) -> Model:
    config = finalize(ExperimentConfig(
        model=ModelConfig(num_layers=2, d_model=16, vocab_size=40, attention=AttentionConfig(num_heads=2),
                          ffn=FFNConfig(hidden=24, activation="swiglu"), **rules),
        data=DataConfig(source="copy", sequence_length=8),
    )).model
    structure, values = nnx_compat.split(Transformer(config, jax.random.key(1)))
    return Model("tiny", config, structure, values)


def moved(m: Model) -> Model:
    """The model with adapters that are not zero."""
    def move(w, v):
        return v + 0.1 * jax.random.normal(jax.random.key(v.size), v.shape) if w.role == "adapter" else v

    return dataclasses.replace(m, values=m.structure.map(move, m.values))


def logits(m: Model):
    return jax.jit(lambda v: nnx_compat.merge(m.structure, v)(BATCH, CTX)[0])(m.values)


@pytest.mark.parametrize("op", ["lora:rank=4", "dora:rank=4,alpha=8"])
def test_an_untrained_adapter_is_the_base_bit_for_bit(op):
    base = model()
    adapted = model(weights=(f"blocks.**={op}",))
    np.testing.assert_array_equal(logits(base), logits(adapted))
    roles = {w.role for w, path in zip(adapted.structure.variables, adapted.structure.paths, strict=True) if "weights" in path}
    assert roles == {"adapter"}


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([(1, 1, 1), (9, 4, 3)]), st.integers(0, 99))  # each shape is compiled for
def test_lora_and_dora_are_their_equations_in_float64(shape, seed):
    features, outputs, rank = shape
    rng = np.random.default_rng(seed)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((features, outputs), (3, features)))
    for spec in (Lora(rank, 3.0), Dora(rank, 3.0)):
        found = arrays(spec, w.shape, seed)
        a, b = (np.asarray(found[name], np.float64) for name in "ab")
        expected = w + 3.0 / rank * a @ b
        if isinstance(spec, Dora):
            norms = np.linalg.norm(w.astype(np.float64), axis=0) / np.linalg.norm(expected, axis=0)
            expected = expected * (1 + np.asarray(found["magnitude"], np.float64)) * norms
        y = matmul(jnp.asarray(x), spec(found, jnp.asarray(w), CTX))
        np.testing.assert_allclose(y, x @ expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_dora_columns_keep_the_base_magnitudes_whatever_the_direction():
    w = jax.random.normal(jax.random.key(0), (12, 7))
    found = arrays(Dora(3), w.shape) | {"magnitude": jnp.zeros(7)}
    adapted = dense(Dora(3)(found, w, CTX))
    np.testing.assert_allclose(jnp.linalg.norm(adapted, axis=0), jnp.linalg.norm(w, axis=0), rtol=1e-5)
    assert not np.allclose(adapted, w, atol=0.05)
    zero = LowRank(found["a"], jnp.zeros_like(found["b"]))
    np.testing.assert_array_equal(norm_ratio(w, zero), 1.0)


@pytest.mark.parametrize("packing", [Int8Weight(), Int4Weight()])
@pytest.mark.parametrize("spec", [Lora(3), Dora(3)])
def test_the_base_may_be_packed_and_stays_so(spec, packing):
    w, x = jax.random.normal(jax.random.key(0), (12, 7)), jax.random.normal(jax.random.key(1), (5, 12))
    packed, found = packing.encode(w), arrays(spec, w.shape)
    operand = spec(found, packed, CTX)
    assert isinstance(operand.base, QTensor) and operand.base.codes is packed.codes
    expected = dense(spec(found, packed.dequantize(), CTX))
    np.testing.assert_allclose(matmul(x, operand), x @ expected, rtol=1e-4, atol=1e-4)
    gradients = jax.grad(lambda v: jnp.sum(matmul(x, spec(v, packed, CTX)) ** 2))(found)
    assert all(float(jnp.abs(g).max()) > 0 for g in gradients.values())


def test_adapters_work_per_expert():
    w, found = jax.random.normal(jax.random.key(0), (3, 6, 5)), arrays(Dora(2), (3, 6, 5))
    whole = dense(Dora(2)(found, w, CTX))
    for expert in range(3):
        one = Dora(2)({name: value[expert] for name, value in found.items()}, w[expert], CTX)
        np.testing.assert_allclose(whole[expert], dense(one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["lora:rank=4", "dora:rank=4"])
def test_merged_weights_equal_the_adapted_model_to_rounding(op):
    adapted = moved(model(weights=(f"blocks.*.mlp.*={op}", "blocks.0.attn.q=lora:2")))
    folded = merged(adapted)
    assert folded.config.weights == () and not any("weights" in path for path in folded.structure.paths)
    np.testing.assert_allclose(logits(folded), logits(adapted), rtol=1e-4, atol=1e-4)
    assert np.abs(logits(folded) - logits(model())).max() > 1e-2


def test_merging_refuses_a_model_without_adapters_and_ops_that_would_act_after_them():
    with pytest.raises(ConfigError, match="no rule is an adapter"):
        MergeAdapters().check(model().config)
    with pytest.raises(ConfigError, match="site blocks.0.mlp.up = .*int8"):
        MergeAdapters().check(model(weights=("blocks.*.mlp.up=int8|lora",)).config)


@pytest.mark.parametrize("text", ["lora:0", "lora:8,-1", "dora:rank=0"])
def test_adapters_refuse_numbers_that_make_none(text):
    with pytest.raises(ConfigError, match="must be"):
        model(weights=(f"blocks.**={text}",))
