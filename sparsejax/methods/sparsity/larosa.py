"""La RoSA: the k largest entries of every token, in the basis of principal components (Liu et al., 2025, arXiv 2507.01299).

"La RoSA: enhancing LLM efficiency via layerwise rotated sparse activation". Acts on the inputs of all linear maps of a block,
as the recipe `[Rotate("pca"), LaRosa(p)]`:

    y = S_k(x Q) (Q^T W)       S_k keeps the k entries of largest magnitude of each token, k = max(1, round(in (1 - s)))

h1 (to q, k, v) and h3 (to gate, up) are seen in the rotated basis, h2 (to o) and h4 (to down) as they are. s depends on the
kind of input alone, so that k is the same at all layers and tokens: s(h1, h3) = .8 c p and s(h2, h4) = 1.2 c p, p the model
sparsity. Published with c = 1, which gives less than p (.938 p for Llama-3-8B and SmolLM2): `AsPublished`. By default c is such
that p is met.
Without a rotation before it this is top-k of magnitudes, TEAL's score with exact counts.
Not here: the released code rotates online in float64, merges nothing, and keeps more than k at ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from sparsejax.compress.allocate import Plan
from sparsejax.compress.allocators import Allocator, FixedRatio, Problem
from sparsejax.compress.recipe import Work
from sparsejax.compress.surgery import Placed
from sparsejax.compress.trials import Selection
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.teal import Teal, kept
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.plugs import check, check_choice

INNER = (".o", ".down")  # maps whose input lies inside attention or FFN, in no rotated basis


@dataclass(frozen=True)
class AsPublished(Allocator):
    """.8 and 1.2 of the target as they are; what is realised is their mean over parameters."""

    def __call__(self, problem: Problem, target: float) -> Plan:
        plan = {site: target * (1.2 if site.endswith(INNER) else 0.8) for site in problem.sites}
        check(max(plan.values()) < 1, "sparsity", target, "1.2 of it must stay below 1")
        return plan


@dataclass
class LaRosa(Teal):
    """TEAL's pass with La RoSA's selector and ratios; sparsity: p, allocator: one that gives all layers the same."""

    select: str = "topk"
    allocator: Allocator = field(default_factory=FixedRatio)
    experts: ClassVar[bool] = False

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        check_choice("larosa: select", self.select, ("topk",))

    def selection(self, model: Model, work: Work, sites: Sequence[str]) -> Selection:
        """k as part of the program: maps that read one input share its mask, and a kernel's shapes are static."""
        widths = {site: shape[0] for site, shape in rule_sites(model.config)["inputs"].items()}
        return lambda site, share: Placed(f"topk:k={kept(widths[site], share)}")
