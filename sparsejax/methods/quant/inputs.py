"""Activations in low precision: what enters linear maps is rounded as it is computed, with scales of its own.

Acts on the inputs of maps by an activation op (`methods.quant.qat` has `int8`, one scale per token). Integers of both operands
are multiplied as integers where the weights' format allows it (per-channel int8, int4, ternary); else both are dequantized.
Behind a pass that selects entries the kept ones alone set the scale, and zeros stay zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import resolve_chain


@dataclass
class QuantizedInputs(Pass):
    """op: an `activation_op` that quantizes, e.g. "int8", put behind those that act there already; sites: the maps."""

    op: str = "int8"
    sites: str = ALL_MAPS
    stage: ClassVar[str] = ACTIVATIONS
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        resolve_chain("activation_op", self.op, "inputs: op")
        sites_of(config, "inputs", self.sites)

    def apply(self, model: Model, work: Work) -> Model:
        return place(model, "inputs", dict.fromkeys(sites_of(model.config, "inputs", self.sites), Placed(self.op)))
