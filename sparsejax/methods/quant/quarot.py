"""QuaRot: Hadamard rotations that spread outliers over all channels, so that 4 bits are enough for activations.

"QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (Ashkboos et al., 2024, arXiv 2404.00456). As a recipe of passes:

    R1  Rotate("hadamard")     the residual stream: random signs and a Hadamard matrix, merged (`methods.sparsity.rotate`)
    R2  RotateValues()         every key-value head between v and o: a Hadamard matrix [K, K], merged (`compress.head_bases`)
    R4  OnlineRotate()         h <- h H in front of `down`, H^T merged into its kernel (`compress.hadamard`)
    weights to int4 by Gptq or Rtn, then QuantizedInputs("int4"): what enters the maps, per token

    s = c max |x| / 7, codes -7 to 7; c = 1 as in the released code (the paper: .9)

Gains of norms are folded and a tied head gets a kernel of its own first. R4 excludes what skips hidden units. The paper also
rotates across heads in front of o (R5), which needs a Hadamard matrix of the order of the number of heads;
`OnlineRotate("blocks.*.attn.o")` mixes all of o's input instead, whatever their number.
Not here: R3 and the 4-bit cache. Queries are out of a cache format's reach; one that quantizes keys may store k H and give back
k = (k H) H^T from `encode` and `decode`. The released fold also subtracts the embedding's mean, which changes RMSNorm models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsejax.compress.basis import hadamard_basis
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.hadamard import check_online, rotate_online
from sparsejax.compress.head_bases import check_heads, merge_heads
from sparsejax.compress.packed import check_kernels
from sparsejax.compress.recipe import STRUCTURE, Pass, Work
from sparsejax.compress.scaling import note_equivalence
from sparsejax.compress.surgery import sites_of
from sparsejax.io.model import Model
from sparsejax.methods.sparsity.activity import has_exact_zeros
from sparsejax.models.config import ModelConfig

log = logging.getLogger(__name__)


@dataclass
class RotateValues(Pass):
    """R2: no options."""

    stage: ClassVar[str] = STRUCTURE
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        check_heads(config)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, sites_of(model.config, "weights", "blocks.*.attn.{v,o}"))

    def apply(self, model: Model, work: Work) -> Model:
        a = model.config.attention
        basis = np.broadcast_to(hadamard_basis(a.head_dim), (a.num_kv_heads, a.head_dim, a.head_dim))
        turned = merge_heads(model, dict.fromkeys(range(model.config.num_layers), basis))
        note_equivalence(work, self.name, model, turned)
        return turned


@dataclass
class OnlineRotate(Pass):
    """R4. sites: the maps; by_head: transform the input of an attention map head by head."""

    sites: str = "blocks.*.mlp.down"
    by_head: bool = False
    stage: ClassVar[str] = STRUCTURE
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        check_online(config, self._plan(config))
        if has_exact_zeros(config) and any(site.endswith(".down") for site in self._plan(config)):
            log.warning("%s: the exact zeros of %s are gone behind the rotation: nothing is skipped at down", self.name,
                        config.ffn.activation)  # fmt: skip

    def after(self, config: ModelConfig) -> ModelConfig:
        return check_online(config, self._plan(config))

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, list(self._plan(model.config)))

    def apply(self, model: Model, work: Work) -> Model:
        turned = rotate_online(model, self._plan(model.config))
        note_equivalence(work, self.name, model, turned)
        return turned

    def _plan(self, config: ModelConfig) -> dict[str, int]:
        heads = config.attention.num_heads if self.by_head else 1
        return {site: heads if site.endswith(".attn.o") else 1 for site in sites_of(config, "inputs", self.sites)}
