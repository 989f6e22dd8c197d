"""TEAL: training-free activation sparsity by the magnitude of what enters each linear map.

"Training-Free Activation Sparsity in Large Language Models" (Liu et al., 2024, arXiv 2408.14690). Acts on the input of every
linear map of a block (q, k, v, o, gate, up, down):

    y = S(x) W,   S(x)_j = x_j if |x_j| > t else 0,   t = inf {t : P(|x| <= t) >= s}        x[in], W[in, out], t and s by site

With i.i.d. weights E ||(x - S(x)) W||^2 is proportional to the dropped energy, which is why |x| is the score. Inside a block s
is raised greedily where the block's output error grows least per parameter (`allocators.Greedy`), to the same mean everywhere.

Published defaults: greedy steps of .05; 10 x 2048 calibration tokens. `select="topk"` keeps exactly k = round(in (1 - s))
entries of each token instead, for kernels with static shapes.
Differs from the released code: quantiles of |x| itself (theirs mirror a signed histogram, which misses s where x is not
symmetric); errors are Frobenius norms over all tokens (theirs: norms over the token axis, averaged over channels); the step of
small k and v maps is capped (theirs jumps by .4 and leaves them dense). Left out: the GPU kernel (see `kernels_pallas`), and
that the paper's evaluation keeps the first half of the tokens dense (a scope of `evaluate`). The experts of a
mixture share the threshold of a site, and its router stays dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from sparsejax.compress.allocate import check_reachable
from sparsejax.compress.allocators import Allocator, Greedy, Problem, by_kind, site_sizes
from sparsejax.compress.blocks import EXPERT_INPUTS, INPUTS, Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Tier, Work, check_sparsity
from sparsejax.compress.statistics import input_quantiles
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.compress.trials import Selection
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.models.sizes import expert_sites
from sparsejax.plugs import check, check_choice

SELECTORS = ("threshold", "topk")


@dataclass
class Teal(Pass):
    """sparsity: parameter-weighted mean over `sites`, in every block.

    select: "threshold" (one number per site), or "topk" (k of each token).
    allocator: shares the sparsity between the sites.
    sites: the linear maps whose inputs are sparse.
    """

    sparsity: float = 0.5
    select: str = "threshold"
    allocator: Allocator = field(default_factory=Greedy)
    sites: str = "blocks.**"
    stage: ClassVar[str] = ACTIVATIONS
    levels_share: ClassVar[bool] = True
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.sparsity, f"{self.name}: sparsity")
        check_choice(f"{self.name}: select", self.select, SELECTORS)
        check_input_sites(config, self.sites, f"{self.name}: sites")
        site = next(iter(expert_sites(config)), "")
        check(not site or self.allocator.experts, f"{self.name}: allocator", self.allocator, f"does not reach experts ({site})")
        sizes = site_sizes(config, sites_of(config, "inputs", self.sites))
        check_reachable(sizes, dict.fromkeys(sizes, self.allocator.most), self.sparsity)

    def apply(self, model: Model, work: Work) -> Model:
        if self.sparsity == 0:
            return model
        sites = sites_of(model.config, "inputs", self.sites)
        select = self.selection(model, work, sites)
        problem = Problem(model, tuple(sites), select, work, f"{self.name}:{self.select}")
        plan = self.allocator(problem, self.sparsity)
        work.note(self.name, **by_kind(problem, plan), plan={site: round(share, 6) for site, share in plan.items()})
        return place(model, "inputs", {site: select(site, share) for site, share in plan.items()})

    def selection(self, model: Model, work: Work, sites: Sequence[str]) -> Selection:
        """What a site gets at a share, fitted in one pass over the calibration."""
        scales = self.scales(model, sites)
        quantiles = input_quantiles(Blocks(model), work, sites, scales) if self.select == "threshold" else {}
        widths = {site: shape[0] for site, shape in rule_sites(model.config)["inputs"].items()}

        def select(site: str, share: float) -> Placed:
            weighted = {"scale": scales[site]} if site in scales else {}
            score = "score=weighted" if weighted else "score=magnitude"
            if self.select == "threshold":
                return Placed(f"threshold:{score}", {"threshold": np.float32(quantiles[site](share)), **weighted})
            return Placed(f"topk:fitted=true,{score}", {"count": np.float32(kept(widths[site], share)), **weighted})

        return select

    def scales(self, model: Model, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Weights float32[in] of the channels' scores, by site; ones where a site is not named."""
        return {}

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        sizes = site_sizes(config, sites_of(config, "inputs", self.sites))
        return self.allocator.cost(sizes, self.sparsity, tier)


def kept(features: int, share: float) -> int:
    """Entries that top-k keeps where a share is dropped: max(1, round(features * (1 - share)))."""
    return max(1, round(features * (1 - share)))


def check_input_sites(config: ModelConfig, glob: str, flag: str) -> None:
    """Refuse sites at whose inputs nothing can be measured.

    Raises:
      ConfigError: the glob names no site, or one that is no attention or feed-forward map of a block.
    """
    check(config.kind == "decoder", "--model", config.kind, "expected a decoder")
    maps = {name for names in (INPUTS | EXPERT_INPUTS).values() for name in names}
    wrong = [site for site in sites_of(config, "inputs", glob, flag)
             if not site.startswith("blocks.") or site.split(".", 2)[2] not in maps]
    check(not wrong, flag, glob, f"names {', '.join(wrong[:3])}; allowed are the maps {', '.join(sorted(maps))} of blocks")
