"""A decoder small enough to be fitted in a test."""

import dataclasses

import jax

from sparsejax import nnx_compat
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.tokenizers import Bytes
from sparsejax.io.model import Model
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer

DRAWN = {}  # drawing parameters compiles longer than most of what is tested with them


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
    key = repr((config, seed))
    if key not in DRAWN:
        DRAWN[key] = nnx_compat.split(jax.jit(lambda key: Transformer(config, key))(jax.random.key(seed)))
    structure, values = DRAWN[key]
    return Model("tiny", config, structure, jax.tree.map(lambda leaf: leaf, values), Bytes().build(None, 0, ()))
