"""Spark Transformer's FFN: the first dimensions of x predict which hidden units are needed (2025, arXiv 2506.06644).

    h = sigma(StatTopK(x[:r] K_1)) * (x[r:] K_2),   y = h V        K_1 [r, F], K_2 [D - r, F], V [F, D]
    StatTopK(z) = max(z - theta, 0),   theta = mean_F(z) + std_F(z) Phi^-1(1 - fraction)        in float32, std with ddof 0

K_1 and K_2 together are as large as the first matrix of an ordinary FFN: the predictor costs no parameters. Columns of K_2 and
rows of V count only for the about fraction * F units that pass. sigma is `model.ffn.activation`, GELU in the paper; an ungated
one. Published: 8 % of the units; r is not given, a quarter of D is ours.
Registry kind "feed": `model.feed_pattern = ("spark:0.08",)`. The maps' sites are `mlp.gate` (K_1), `mlp.up` (K_2), `mlp.down`.
Not here: the attention of the paper, whose combination of predictor and logits is not published.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax import plugs
from sparsejax.arrays import SparseActivation, dense
from sparsejax.context import Context, Stat, merge_stats
from sparsejax.layers.ffn import Nonlinearity
from sparsejax.layers.linear import Init, Linear
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module
from sparsejax.ops.selectors import check_fraction, stat_topk


@plugs.register("feed", "spark")
@dataclasses.dataclass(frozen=True)
class Spark:
    """fraction: of the units that pass; split: r as a share of D; through_statistics: whether mean and std have gradients."""

    fraction: float = 0.08
    split: float = 0.25
    through_statistics: bool = True

    def __post_init__(self) -> None:
        check_fraction("spark", self.fraction)
        plugs.check(0 < self.split < 1, "spark: split", self.split, "0 < split < 1")

    def build(self, config: ModelConfig, *, key: Array, site: str, rules: SiteRules) -> SparkFFN:
        """The module of one block."""
        return SparkFFN(self, config, key=key, site=site, rules=rules)


class SparkFFN(Module):
    """The feed-forward network above; r is max(1, round(split * D))."""

    def __init__(self, spec: Spark, config: ModelConfig, *, key: Array, site: str, rules: SiteRules):
        plugs.check(not rules.at("neurons", site), "model.neurons", site, "a Spark FFN selects its neurons itself")
        self.spec = spec
        hidden, width = config.ffn.hidden, config.d_model
        self.activation = Nonlinearity(config.ffn.activation, hidden)
        two = self.activation.spec.gated or self.activation.spec.halves
        plugs.check(not two, "model.ffn.activation", config.ffn.activation, "spark needs one of a single tensor, e.g. 'gelu'")
        self.split = max(1, round(spec.split * width))
        plugs.check(self.split < width, "spark: split", spec.split, f"leaves nothing of the {width} dimensions")
        keys = jax.random.split(key, 3)
        shared: dict[str, Any] = dict(
            rules=rules, init=Init.parse(config.init), bias=config.ffn.bias, out_dtype=config.residual_dtype
        )
        entering: dict[str, Any] = dict(axes=("embed", "mlp"), **shared)
        self.gate = Linear(self.split, hidden, key=keys[1], site=f"{site}.gate", **entering)
        self.up = Linear(width - self.split, hidden, key=keys[0], site=f"{site}.up", **entering)
        self.down = Linear(hidden, width, key=keys[2], site=f"{site}.down", axes=("mlp", "embed"), **shared)

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, dict[str, dict[str, Stat]]]:
        scores, gate_stats = self.gate.measured(x[..., : self.split], ctx, "mlp.gate")
        passed = self.passed(scores, ctx)
        u, up_stats = self.up.measured(x[..., self.split :], ctx, "mlp.up", outputs=passed.mask)
        hidden = (self.activation(passed.dense()) * u).astype(x.dtype)
        operand = self.down.encode(SparseActivation(hidden, passed.mask), ctx)
        stats = merge_stats(gate_stats, up_stats, ctx.measure("mlp.down", operand))
        if ctx.probes:
            stats = merge_stats(stats, ctx.measure("mlp.up_out", u), ctx.measure("mlp.hidden", dense(operand)))
        return self.down.product(operand, ctx), stats

    def passed(self, scores: Float[Array, "... F"], ctx: Context) -> SparseActivation:
        """StatTopK of the predictor's scores with its mask; the scores as they are at fraction 1 and out of scope."""
        if self.spec.fraction == 1:
            return SparseActivation(scores, jnp.ones(scores.shape, bool))
        values = stat_topk(scores, 1 - self.spec.fraction, through_statistics=self.spec.through_statistics)
        mask = ctx.kept(values > 0)
        return SparseActivation(values if ctx.sparsify is None else jnp.where(ctx.sparsify[..., None], values, scores), mask)
