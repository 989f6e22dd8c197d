"""COUNTDOWN: rows of the down map are read where they matter (Cheon and Kang, 2025, arXiv 2505.17701).

"COUNTDOWN: contextually sparse activation filtering out unnecessary weights in down projection". Acts on the hidden vector h
of an FFN, at the input of down:

    m_i = |h_i| ||W_down[i]||_2 > t,    y = (h * m) W_down

The score is the norm of what unit i adds to the output, so it does not change where a unit is rescaled. t is the
`sparsity`-quantile of the scores of a layer on calibration data. The mask is known behind gate and up: down alone is saved.
Not here: the predictor of these scores (D-COUNTDOWN) and the score by one factor of h (M-COUNTDOWN), which save other maps too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, Tier, Work, check_sparsity
from sparsejax.compress.statistics import input_quantiles
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.teal import check_input_sites
from sparsejax.methods.sparsity.wina import channel_norms
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import register


@register("pass", "countdown")
@dataclass
class Countdown(Pass):
    """One sparsity of the hidden vectors of all dense FFNs."""

    sparsity: float = 0.5
    sites: ClassVar[str] = "blocks.*.mlp.down"
    stage: ClassVar[str] = ACTIVATIONS

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.sparsity)
        check_input_sites(config, self.sites, "countdown: sites")

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x {tier.sequences} x {tier.length} tokens, once"

    def apply(self, model: Model, work: Work) -> Model:
        if self.sparsity == 0:
            return model
        sites = sites_of(model.config, "inputs", self.sites)
        norms = {site: channel_norms(model, site) for site in sites}
        quantiles = input_quantiles(Blocks(model), work, sites, norms)
        plan = {}
        for site in sites:
            arrays = {"threshold": jnp.float32(quantiles[site](self.sparsity)), "scale": jnp.asarray(norms[site])}
            plan[site] = Placed("threshold:score=weighted", arrays)
        return place(model, "inputs", plan)
