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
from sparsejax.train.partition import Partition


class TrainState(NamedTuple):
    """step: int32[]; trainable: all that is differentiated and that optax sees, float32; frozen: the other parameters (fitted,
    packed, or left out by `optimizer.train`) in the compute dtype; optimizer: optax state; average: the EMA of `trainable`, or
    {}; guard: debiased EMA of the loss and its weight, for spikes; rng: key data."""

    step: Array
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    optimizer: Any
    average: dict[str, Any]
    guard: dict[str, Array]
    rng: Array


def abstract_model(config: ModelConfig) -> tuple[nnx_compat.Structure, dict[str, Any]]:
    """Structure and shapes of the model, without computing anything."""
    return nnx_compat.abstract(lambda: Transformer(config, jax.random.key(0)))


def initial_values(config: ModelConfig, seed: int) -> dict[str, Any]:
    """All parameters of a model as its seed draws them."""
    return nnx_compat.split(Transformer(config, jax.random.split(jax.random.key(seed))[0]))[1]


def init_state(
    values: dict[str, Any],
    parts: Partition,
    seed: int,
    transformation: optax.GradientTransformation,
    averaged: bool,
    dtype: str,
) -> TrainState:
    """The state before the first step; meant to be compiled with `out_shardings`.

    Args:
      values: of all parameters, see `initial_values`.
      parts: which of them are trained.
      dtype: the compute dtype.
    """
    trainable = parts.trained.map(lambda _, value: value.astype(jnp.float32), values)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=cast_for_compute(parts.frozen, values, dtype),
        optimizer=transformation.init(trainable),
        average=jax.tree.map(jnp.copy, trainable) if averaged else {},
        guard={"loss_ema": jnp.zeros((), jnp.float32), "weight": jnp.zeros((), jnp.float32)},
        rng=jax.random.key_data(jax.random.split(jax.random.key(seed))[1]),
    )


def cast_for_compute(structure: nnx_compat.Structure, values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Matrices, embeddings and biases in the compute dtype; norms, routers and scales stay as they are.

    Cast once per step outside the layers: a scanned layer would cast in every iteration, and FSDP gathers half the bytes.
    """

    def cast(weight: nnx_compat.Weight, value: Any) -> Any:
        if weight.role not in nnx_compat.COMPUTE_ROLES or not isinstance(value, jax.Array):
            return value
        return value.astype(nnx_compat.held_in(weight.role, dtype))

    return structure.map(cast, values)


def build(structure: nnx_compat.Structure, values: dict[str, Any], dtype: str) -> Transformer:
    """The module with its weights in the compute dtype."""
    return nnx_compat.merge(structure, cast_for_compute(structure, values, dtype))
