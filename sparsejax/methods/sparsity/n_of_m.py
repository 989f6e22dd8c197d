"""Activation N:M: of every m consecutive entries of an input the n largest are kept ("Motivating next-gen accelerators with
flexible N:M activation sparsity", 2025, arXiv 2509.22166).

Acts on the inputs of linear maps, without calibration: sparsity 1 - n / m, exactly, at each token. The constraint costs quality
against top-k, the less the longer m is: 8:16 and 16:32 are far ahead of 2:4.
Not here: the paper's corrections of the variance of what is kept, and its per-token shifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.selection import NofM
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.plugs import register


@register("pass", "n_of_m")
@dataclass
class ActivationNofM(Pass):
    """n of every m at all inputs that `sites` names."""

    n: int = 8
    m: int = 16
    sites: str = "blocks.**"
    stage: ClassVar[str] = ACTIVATIONS
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        spec, shapes = NofM(self.n, self.m), rule_sites(config)["inputs"]
        for site in sites_of(config, "inputs", self.sites):
            spec.validate(shapes[site][0], site)

    def apply(self, model: Model, work: Work) -> Model:
        if self.n == self.m:
            return model
        sites = sites_of(model.config, "inputs", self.sites)
        return place(model, "inputs", dict.fromkeys(sites, Placed(f"n_of_m:{self.n},{self.m}")))
