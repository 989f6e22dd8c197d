"""The feed-forward network: one function for every method that acts in it, and the dense module that holds its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from sparsejax import plugs
from sparsejax.arrays import SparseActivation, dense
from sparsejax.context import Context, Stat, merge_stats
from sparsejax.layers.fused import Fused
from sparsejax.layers.linear import Init, Linear
from sparsejax.layers.op import Op, SiteRules
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
    neurons: Op | None = None,
) -> tuple[Array, Stats]:
    """down(activation(up(x))), or down(activation(gate(x), up(x))) when there is a gate.

    The hidden tensor is measured as `down` multiplies it, after the activation ops of that site, so that counted zeros are the
    zeros a sparse kernel would skip. Probes also see the operand of each map (`mlp.gate`, `mlp.up`, `mlp.down`), the gate's
    activation (`mlp.gate_out`) and what up gives (`mlp.up_out`).

    Args:
      groups: as in `arrays.matmul`, for rows sorted by expert.
      fused: gate and up as one product.
      neurons: selector of the hidden units that are computed: `neurons(x, gate's activation or None, ctx)` -> bool[..., F]. The
        choice is `up`'s outputs and the mask of the hidden vector.
    """
    stats: list[Stats] = [{}]
    chosen: Array | None = None
    gated: tuple[Array, ...] = ()
    if fused is not None:
        entering = fused(x, ctx)
        stats += [ctx.measure("mlp.gate", x), ctx.measure("mlp.up", x)]
    else:
        if gate is not None:
            g, found = gate.measured(x, ctx, "mlp.gate", groups)
            gated, stats = (g,), [*stats, found]
        if neurons is not None:
            chosen = ctx.kept(neurons(x, activation.gate_out(gated[0]) if gated else None, ctx))
        u, found = up.measured(x, ctx, "mlp.up", groups, chosen)
        entering, stats = (*gated, u), [*stats, found]
    hidden: Any = activation(*entering).astype(x.dtype)
    if ctx.probes:
        stats += [ctx.measure("mlp.up_out", entering[-1])]
        if activation.has_gate_out:
            stats += [ctx.measure("mlp.gate_out", activation.gate_out(entering[0]))]
    operand = down.encode(hidden if chosen is None else SparseActivation(hidden, chosen), ctx)
    if ctx.probes:
        stats += [ctx.measure("mlp.down", operand), ctx.measure("mlp.hidden", dense(operand))]
    return down.product(operand, ctx, groups), merge_stats(*stats)


class Nonlinearity(Module):
    """A spec of `sparsejax.ops.activations` with its learned parameters, if it has any."""

    def __init__(self, name: str, width: int):
        self.spec = plugs.resolve("nonlinearity", name, "model.ffn.activation")
        parameters = self.spec.parameters(width)
        self.parameters = data(
            {name: weight(value, ("mlp",) * value.ndim, "nonlinearity") for name, value in parameters.items()}
        )

    def __call__(self, z: Array, u: Array | None = None) -> Array:
        return self.spec(self._values(), z) if u is None else self.spec(self._values(), z, u)

    def gate_out(self, g: Array) -> Array:
        """The gate's activation, see `ops.nonlinearity`."""
        return self.spec.gate_out(self._values(), g)

    @property
    def has_gate_out(self) -> bool:
        return self.spec.has_gate_out

    def _values(self) -> dict[str, Array]:
        return {name: variable.get_value() for name, variable in self.parameters.items()}


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
        selectors = rules.at("neurons", site)
        chosen = dict(shape=(width, hidden), axes=("embed", "mlp"), key=jax.random.fold_in(key, 1))
        self.neurons = Op(selectors[0], **chosen) if selectors else None  # type: ignore[arg-type]

    def __call__(self, x: Array, ctx: Context, groups: Array | None = None) -> tuple[Array, Stats]:
        return ffn(x, self.up, self.gate, self.down, self.activation, ctx, groups, self.gate_up, self.neurons)


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
