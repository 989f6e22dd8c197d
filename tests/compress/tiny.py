"""A decoder small enough to be fitted in a test."""

import dataclasses

import jax

from sparsejax import nnx_compat
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.tokenizers import Bytes
from sparsejax.io.model import Model
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer


def tiny_model(layers=3, width=32, hidden=64, seed=0, activation="swiglu", **fields):
    """Random parameters, bytes as tokens, 4 query and 2 kv heads."""
    config = ModelConfig(
        num_layers=layers,
        d_model=width,
        vocab_size=264,
        max_length=128,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        ffn=FFNConfig(hidden=hidden, activation=activation),
    )
    config = finalize(ExperimentConfig(model=dataclasses.replace(config, **fields))).model
    structure, values = nnx_compat.split(jax.jit(lambda key: Transformer(config, key))(jax.random.key(seed)))
    return Model("tiny", config, structure, values, Bytes().build(None, 0, ()))
