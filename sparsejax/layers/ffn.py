"""The feed-forward network: one function for every method that acts in it, and the dense module that holds its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from sparsejax import plugs
from sparsejax.arrays import dense
from sparsejax.context import Context, Stat
from sparsejax.layers.fused import Fused
from sparsejax.layers.linear import Init, Linear, SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module, data, weight

Stats = dict[str, dict[str, Stat]]


def ffn(
    x: Float[Array, "... D"],
    up: Linear,
    gate: Linear | None,
    down: Linear,
    activation: Nonlinearity,
    ctx: Context,
    groups: Array | None = None,
    fused: Fused | None = None,
) -> tuple[Array, Stats]:
    """down(activation(up(x))), or down(activation(gate(x), up(x))) when there is a gate.

    The hidden tensor is measured as `down` multiplies it, after the activation ops of that site, so that counted zeros are the
    zeros a sparse kernel would skip. `groups` as in `arrays.matmul`, for rows sorted by expert; `fused`: gate and up as one.
    """
    if fused is not None:
        entering = fused(x, ctx)
    else:
        entering = (up(x, ctx, groups),) if gate is None else (gate(x, ctx, groups), up(x, ctx, groups))
    hidden = activation(*entering).astype(x.dtype)
    operand = down.encode(hidden, ctx)
    stats = ctx.measure("mlp.hidden", dense(operand)) if ctx.probes else {}
    return down.product(operand, ctx, groups), stats


class Nonlinearity(Module):
    """A spec of `sparsejax.ops.activations` with its learned parameters, if it has any."""

    def __init__(self, name: str, width: int):
        self.spec = plugs.resolve("nonlinearity", name, "model.ffn.activation")
        parameters = self.spec.parameters(width)
        self.parameters = data(
            {name: weight(value, ("mlp",) * value.ndim, "nonlinearity") for name, value in parameters.items()}
        )

    def __call__(self, z: Array, u: Array | None = None) -> Array:
        parameters = {name: variable.get_value() for name, variable in self.parameters.items()}
        return self.spec(parameters, z) if u is None else self.spec(parameters, z, u)


class FFN(Module):
    """The dense feed-forward network of one block; sites `SITE.up`, `SITE.gate` (gated activations), `SITE.down`."""

    def __init__(self, config: ModelConfig, *, key: Array, site: str, rules: SiteRules, experts: int = 0, hidden: int = 0):
        width, hidden = config.d_model, hidden or config.ffn.hidden
        self.activation = Nonlinearity(config.ffn.activation, hidden)
        spec = self.activation.spec
        keys = jax.random.split(key, 3)
        shared: dict[str, Any] = dict(
            rules=rules, init=Init.parse(config.init), bias=config.ffn.bias, experts=experts, out_dtype=config.residual_dtype
        )
        entering = hidden * (2 if spec.halves else 1)
        self.up = Linear(width, entering, key=keys[0], site=f"{site}.up", axes=("embed", "mlp"), **shared)
        gate = dict(key=keys[1], site=f"{site}.gate", axes=("embed", "mlp"), **shared)
        self.gate = Linear(width, hidden, **gate) if spec.gated else None
        self.gate_up: Fused | None = None  # both as one product, in a serving form
        self.down = Linear(hidden, width, key=keys[2], site=f"{site}.down", axes=("mlp", "embed"), **shared)

    def __call__(self, x: Array, ctx: Context, groups: Array | None = None) -> tuple[Array, Stats]:
        return ffn(x, self.up, self.gate, self.down, self.activation, ctx, groups, self.gate_up)


@plugs.register("feed", "ffn")
@dataclasses.dataclass(frozen=True)
class DenseFeed:
    """Every token through one feed-forward network.

    activation: of these layers where it is not `ffn.activation` (Gemma 3n's first layers: `ffn:stat_topk_geglu:0.05`).
    """

    activation: str = ""

    def __post_init__(self) -> None:
        if self.activation:
            plugs.resolve("nonlinearity", self.activation, "activation")

    def build(self, config: ModelConfig, *, key: Array, site: str, rules: SiteRules) -> FFN:
        """The module of one block: `module(x[B, T, D], ctx) -> (delta[B, T, D], stats)`."""
        if self.activation:
            config = dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, activation=self.activation))
        return FFN(config, key=key, site=site, rules=rules)
