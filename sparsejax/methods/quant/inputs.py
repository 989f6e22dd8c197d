"""Activations in low precision: what enters linear maps is rounded as it is computed, with scales of its own.

Acts on the inputs of maps by an activation op (`methods.quant.qat` has `int8` and `int4`, one scale per token). Integers of
both operands are multiplied as integers where the weights' format allows it (per-channel int8, int4, ternary); else both are
dequantized. Behind a pass that selects entries the kept ones alone set the scale, and zeros stay zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.io.model import Model
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, check_choice, resolve_chain


@dataclass
class QuantizedInputs(Pass):
    """op: an `activation_op` that quantizes, e.g. "int8", put behind those that act there already; sites: the maps."""

    op: str = "int8"
    sites: str = "blocks.**"
    stage: ClassVar[str] = ACTIVATIONS
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        resolve_chain("activation_op", self.op, "inputs: op")
        sites_of(config, "inputs", self.sites)

    def apply(self, model: Model, work: Work) -> Model:
        return place(model, "inputs", dict.fromkeys(sites_of(model.config, "inputs", self.sites), Placed(self.op)))


def rounding(text: str) -> list[Pass]:
    """The passes that round weights and what enters their maps: `FORMAT/SOLVER/OP`, by default int4/gptq/int4.

    FORMAT: of `FormatSpec.parse`; SOLVER: gptq or rtn; OP: an activation op, or none. Parts at the end may be left out.

    Raises:
      ConfigError: an unknown solver, or more parts.
    """
    given = text.split("/")
    check(len(given) <= 3, "rounding", text, "expected FORMAT/SOLVER/OP")
    parts = [part or default for part, default in zip([*given, "", ""], ("int4", "gptq", "int4"), strict=False)]
    check_choice("rounding: solver", parts[1], ("gptq", "rtn"))
    weights: Pass = Gptq(parts[0]) if parts[1] == "gptq" else Rtn(parts[0])
    return [weights] if parts[2] == "none" else [weights, QuantizedInputs(parts[2])]
