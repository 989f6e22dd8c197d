"""The floor that the training benchmark compares with: a decoder trained in one page of JAX, layers unrolled by hand.

RMSNorm, rotary positions, causal softmax attention, an ungated or gated FFN, tied embeddings, AdamW: what a good engineer
writes first. Of the same shape as the config it is given; it shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax.config import ExperimentConfig

ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda z: jnp.square(jax.nn.relu(z)),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
}
GATED: dict[str, Callable[..., jax.Array]] = {
    "swiglu": lambda g, u: jax.nn.silu(g) * u,
    "geglu_tanh": lambda g, u: jax.nn.gelu(g) * u,
    "reglu": lambda g, u: jax.nn.relu(g) * u,
}


def supports(config: ExperimentConfig) -> bool:
    """Whether the floor has this shape: a plain decoder without methods."""
    model = config.model
    return (
        model.kind == "decoder" and model.block == "pre" and model.tied_embeddings and model.positions.kind == "rope"
        and model.feed_pattern == ("ffn",) and not model.inputs and not model.weights and config.accumulate == 1
        and model.ffn.activation in {**ACTIVATIONS, **GATED} and model.attention.num_kv_heads == model.attention.num_heads
    )


def init(config: ExperimentConfig, key: jax.Array) -> Any:
    """Parameters as nested lists and dicts."""
    model = config.model
    width, hidden = model.d_model, model.ffn.hidden

    def matrix(rows: int, columns: int) -> jax.Array:
        nonlocal key
        key, draw = jax.random.split(key)
        return jax.random.normal(draw, (rows, columns)) * rows**-0.5

    def layer() -> dict[str, jax.Array]:
        made = {"q": matrix(width, width), "k": matrix(width, width), "v": matrix(width, width), "o": matrix(width, width)}
        made |= {"up": matrix(width, hidden), "down": matrix(hidden, width)}
        made |= {"gate": matrix(width, hidden)} if model.ffn.activation in GATED else {}
        return {**made, "norm1": jnp.ones(width), "norm2": jnp.ones(width)}

    table = matrix(width, model.vocab_size).T
    return {"table": table, "layers": [layer() for _ in range(model.num_layers)], "norm": jnp.ones(width)}


def rms(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def rope(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(p: Any, x: jax.Array, heads: int) -> jax.Array:
    batch, length, width = x.shape
    q, k, v = (jnp.reshape(x @ p[name], (batch, length, heads, width // heads)) for name in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", rope(q), rope(k)) * (width // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    return mixed.reshape(batch, length, width) @ p["o"]


def loss(params: Any, batch: Any, config: ExperimentConfig) -> jax.Array:
    """Mean cross-entropy of the next token."""
    name = config.model.ffn.activation
    x = params["table"][batch["tokens"]]
    for p in params["layers"]:
        x = x + attention(p, rms(x, p["norm1"]), config.model.attention.num_heads)
        h = rms(x, p["norm2"])
        hidden = GATED[name](h @ p["gate"], h @ p["up"]) if name in GATED else ACTIVATIONS[name](h @ p["up"])
        x = x + hidden @ p["down"]
    logits = rms(x, params["norm"]) @ params["table"].T
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"])


def make(config: ExperimentConfig) -> tuple[Any, Callable[[Any, Any], tuple[Any, jax.Array]]]:
    """(initial state, jitted step(state, batch) -> (state, loss))."""
    o = config.optimizer
    transformation = optax.chain(
        optax.clip_by_global_norm(o.clip_norm), optax.adamw(o.learning_rate, weight_decay=o.weight_decay)
    )
    params = init(config, jax.random.key(config.seed))

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, optimizer = state
        value, gradients = jax.value_and_grad(loss)(params, batch, config)
        updates, optimizer = transformation.update(gradients, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer), value

    return (params, transformation.init(params)), jax.jit(step, donate_argnums=0)
