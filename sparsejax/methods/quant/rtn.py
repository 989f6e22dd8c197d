"""RTN: every weight rounded to the nearest code of a number format, without looking at data.

The baseline of all quantization of weights; scales as in "Quantizing deep convolutional networks for efficient inference"
(Krishnamoorthi, 2018, arXiv 1806.08342), with whichever groups, zeros and scale storage the format names:

    q = clip(round(w / s) + z),   w^ = (q - z) s        s, z from the extremes of each group of W[in, out]

Acts on the kernels of linear maps, which become `QTensor`s; experts by themselves. `scales`: `absmax`, those of the extremes,
or `mse`, extremes clipped where that loses less (`ops.formats.clipping`; 80 times the work). Stochastic rounding
(`round=stochastic`) draws by `seed`, another number for each map.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax

from sparsejax.compress.bit_allocation import BitAllocator, Formats, check_formats, specs_for, specs_in
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_kernels, float_kernel, note_formats, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.compress.surgery import sites_of
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.ops.formats.clipping import check_search, searched_extent
from sparsejax.ops.formats.quantize import qparams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import QTensor, qtensor

SCALES = ("absmax", "mse")  # without data


@dataclass
class Rtn(Pass):
    """format: e.g. "int4:asym,group=64", or one for each map (`compress.bit_allocation`); scales: of `SCALES`; sites: the maps;
    seed: of stochastic rounding."""

    format: Formats = "int4:asym,group=64"
    sites: str = "blocks.**"
    seed: int = 0
    scales: str = "absmax"
    stage: ClassVar[str] = FORMATS
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        for spec in specs_in(self.format):
            check_search(self.scales, spec, SCALES)
        check_formats(self.format, config, sites_of(config, "weights", self.sites))

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, sites_of(model.config, "weights", self.sites))
        if isinstance(self.format, BitAllocator):
            self.format.check_inputs(model, calibration)

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return self.format.cost(sites_of(config, "weights", self.sites), tier) if isinstance(self.format, BitAllocator) else ""

    def apply(self, model: Model, work: Work) -> Model:
        key, tensors = jax.random.key(self.seed), {}
        for site, spec in specs_for(self.format, model, work, sites_of(model.config, "weights", self.sites)).items():
            drawn = jax.random.fold_in(key, zlib.crc32(site.encode()))
            tensors[site] = _rounded(float_kernel(model, site), drawn, spec, self.scales)
        note_formats(work, self.name, model, tensors)
        return with_qtensors(model, tensors)


@partial(jax.jit, static_argnums=(2, 3))
def _rounded(kernel: jax.Array, key: jax.Array, spec: FormatSpec, scales: str) -> QTensor:
    if scales == "absmax":
        return qtensor(kernel, spec, key=key if spec.rounding == "stochastic" else None)
    second = qparams(kernel, spec).second
    return qtensor(kernel, spec, within=searched_extent(kernel, spec, scales, second=second), second=second)
