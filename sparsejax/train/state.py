"""The train state: one NamedTuple of pure dicts, sharded from birth."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sparsejax import nnx_compat
from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import Transformer


class TrainState(NamedTuple):
    """step: int32[]; trainable: all that is differentiated and that optax sees, float32; optimizer: optax state;
    average: the EMA of `trainable`, or {}; guard: debiased EMA of the loss and its weight, for spikes; rng: key data."""

    step: Array
    trainable: dict[str, Any]
    optimizer: Any
    average: dict[str, Any]
    guard: dict[str, Array]
    rng: Array


def abstract_model(config: ModelConfig) -> tuple[nnx_compat.Structure, dict[str, Any]]:
    """Structure and shapes of the model, without computing anything."""
    return nnx_compat.abstract(lambda: Transformer(config, jax.random.key(0)))


def init_state(config: ModelConfig, seed: int, transformation: optax.GradientTransformation, averaged: bool) -> TrainState:
    """Draw a model's parameters and empty optimizer state; meant to be compiled with `out_shardings`."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    _, trainable = nnx_compat.split(Transformer(config, init_key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        optimizer=transformation.init(trainable),
        average=jax.tree.map(jnp.copy, trainable) if averaged else {},
        guard={"loss_ema": jnp.zeros((), jnp.float32), "weight": jnp.zeros((), jnp.float32)},
        rng=jax.random.key_data(run_key),
    )


def cast_for_compute(structure: nnx_compat.Structure, values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Matrices, embeddings and biases in the compute dtype; norms, routers and scales stay as they are.

    Cast once per step outside the layers: a scanned layer would cast in every iteration, and FSDP gathers half the bytes.
    """
    target = jnp.dtype(dtype)

    def cast(weight: nnx_compat.Weight, value: Any) -> Any:
        if weight.role not in nnx_compat.COMPUTE_ROLES or not isinstance(value, jax.Array):
            return value
        return value.astype(target)

    return structure.map(cast, values)


def build(structure: nnx_compat.Structure, values: dict[str, Any], dtype: str) -> Transformer:
    """The module with its weights in the compute dtype."""
    return nnx_compat.merge(structure, cast_for_compute(structure, values, dtype))
