"""Mixture of experts with softmax top-k routing (Shazeer et al. 1701.06538; GShard 2006.16668; Switch 2101.03961; ST-MoE
2202.08906; Mixtral 2401.04088).

Acts as the feed of a block: each token passes k of E feed-forward networks, chosen by a linear router in float32.

    h = x W_r                     [E] logits, W_r ~ N(0, 0.02)
    p = softmax(h)                idx = the k largest
    w = p[idx]  or  p[idx] / sum p[idx]                       combine: raw (Switch) | renorm (Mixtral)
    y = sum_j w_j FFN_{idx_j}(x) + g sum_s FFN_shared_s(x)    shared: DeepSeekMoE 2401.06066, where g = 1
                                                              shared_gate: g = sigmoid(x w), Qwen2-MoE 2407.10671

The auxiliary terms are objectives: `router_balance` (published 1e-2: E sum_e f_e P_e, 1 at balance) and `router_z` (1e-3).
capacity: C = ceil(capacity * T * k / E) rows per expert and batch row while training (published 1.25), first choices first;
0: dropless. Serving is always dropless. Published: Switch k 1 raw; Mixtral E 8, k 2 renorm.
Not here: noisy gating, input jitter and expert dropout; expert choice; the auxiliary-loss-free bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array

from sparsejax.layers.moe import MoE
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.ops.routers import COMBINE, GRANULARITY
from sparsejax.plugs import check, check_choice, register


@register("feed", "moe")
@dataclasses.dataclass(frozen=True)
class SoftmaxTopK:
    """experts: E; k: experts per token; hidden: width F of each (0: as much as makes the active parameters those of the dense
    FFN); capacity: factor, 0: dropless; combine: raw | renorm; shared: experts that every token passes; balance: over the
    batch | sequence; shared_gate: the shared experts have a gate of their own."""

    experts: int = 8
    k: int = 2
    hidden: int = 0
    capacity: float = 0.0
    combine: str = "renorm"
    shared: int = 0
    balance: str = "batch"
    shared_gate: bool = False

    def __post_init__(self) -> None:
        check(self.experts >= 1, "experts", self.experts, "must be at least 1")
        check(1 <= self.k <= self.experts, "k", self.k, f"must be 1 to experts = {self.experts}")
        check(self.hidden >= 0, "hidden", self.hidden, "must not be negative")
        check(0 <= self.capacity < float("inf"), "capacity", self.capacity, "must be a factor such as 1.25, or 0 for dropless")
        check(self.shared >= 0, "shared", self.shared, "must not be negative")
        check(self.shared or not self.shared_gate, "shared_gate", self.shared_gate, "there are no shared experts")
        check_choice("combine", self.combine, COMBINE)
        check_choice("balance", self.balance, GRANULARITY)
        check(self.k > 1 or self.combine == "raw", "combine", self.combine,
              "with k = 1 every weight would be 1 and the router get no gradient; use 'raw'")

    def active_fraction(self) -> float:
        """The share of all experts' parameters, shared ones included, that one token passes."""
        return (self.k + self.shared) / (self.experts + self.shared)

    def width(self, config: ModelConfig) -> int:
        """F of one expert: `hidden`, or ffn.hidden / (k + shared) rounded down to a multiple of 8."""
        return self.hidden or max(8, config.ffn.hidden // (self.k + self.shared) // 8 * 8)

    def build(self, config: ModelConfig, *, key: Array, site: str, rules: SiteRules) -> Any:
        """The module of one block: `module(x[B, T, D], ctx) -> (delta[B, T, D], stats)`."""
        return MoE(
            config, key=key, site=site, rules=rules, experts=self.experts, k=self.k, hidden=self.width(config),
            shared=self.shared, shared_gate=self.shared_gate, capacity_factor=self.capacity, combine=self.combine,
            granularity=self.balance,
        )
