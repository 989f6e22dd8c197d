"""A decoder of random weights that reads bytes, and a slow float64 scorer to compare with."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import nnx_compat
from sparsejax.context import Context
from sparsejax.data.tokenizers import Bytes
from sparsejax.io.model import Model
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, PositionConfig
from sparsejax.models.transformer import Transformer

LENGTH = 48


def tokenizer():
    return Bytes().build(None, 0, ())


def random_model(seed=0, name="tiny", **changes):
    """Logits spread enough that losses differ from row to row."""
    base = dict(
        num_layers=2,
        d_model=16,
        vocab_size=264,
        max_length=LENGTH,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        ffn=FFNConfig(hidden=24, activation="swiglu"),
        positions=PositionConfig(kind="learned"),
    )
    config = ModelConfig(**{**base, **changes})
    structure, values = nnx_compat.split(Transformer(config, jax.random.key(seed)))
    values = jax.tree.map(lambda a: a * 3 if a.ndim >= 2 else a, values)
    return Model(name, config, structure, values, tokenizer())


_FORWARD = {}  # id of a structure -> (the structure, which keeps the id its own; the compiled forward pass)


def slow_log_probabilities(model, tokens, padding=0):
    """float64 [N - 1, V]: of what follows each of the first N - 1 tokens; one row, no chunks, by default no padding."""
    structure = model.structure
    if id(structure) not in _FORWARD:

        def forward(values, tokens):
            return nnx_compat.merge(structure, values)({"tokens": tokens}, Context(mode="prefill"))[0]

        _FORWARD[id(structure)] = structure, jax.jit(forward)
    inputs = jnp.pad(jnp.asarray(tokens)[None, :-1], ((0, 0), (0, padding)))
    logits = np.asarray(_FORWARD[id(structure)][1](model.values, inputs)[0, : len(tokens) - 1], np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def slow_score(model, tokens, start, padding=0):
    """(-log p, whether greedy decoding gives it) of `tokens[start:]`."""
    log_p = slow_log_probabilities(model, tokens, padding)[start - 1 :]
    targets = np.asarray(tokens)[start:]
    return -log_p[np.arange(len(targets)), targets].sum(), bool((log_p.argmax(-1) == targets).all())
