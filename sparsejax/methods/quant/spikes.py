"""Spike-aware mixed precision: static int8 everywhere but at the few maps whose inputs spike.

"Precision Where It Matters: A Novel Spike Aware Mixed-Precision Quantization Strategy for LLaMA-based Language Models"
(Maisonnave et al., 2025, arXiv 2504.21553). With p(site) = max |x| of what enters a map over the calibration,

    a map spikes where  p(site) > ratio * median of p over the layers, of maps of its kind

and stays float, or becomes FP8 E4M3. All other maps: int8 weights with a scale per output, int8 inputs with one scale for the
tensor, which is found once. In models like Llama the spikes are at `down` of an early layer and near the end.
Ours is the rule (the paper picks layers by eye). Of an even number of layers the median is the lower one of the two in the
middle, so that one spike in two layers is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_kernels, float_kernel, note_formats, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.compress.statistics import channel_ranges
from sparsejax.compress.surgery import place
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, maps_of
from sparsejax.methods.quant.static_inputs import calibrated
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice
from sparsejax.quantized_arrays import qtensor

SPIKING = ("float", "fp8_e4m3")
LEAST = 1e-30


def over_median(peaks: Mapping[str, float]) -> dict[str, float]:
    """By site, its peak over the median of the maps of its kind; finite, also where that is 0."""
    by_kind: dict[str, list[float]] = {}
    for site, peak in peaks.items():
        by_kind.setdefault(site.split(".", 2)[2], []).append(peak)
    median = {kind: sorted(found)[(len(found) - 1) // 2] for kind, found in by_kind.items()}
    return {site: peak / max(median[site.split(".", 2)[2]], LEAST) for site, peak in peaks.items()}


@dataclass
class SpikeAware(Pass):
    """ratio: above which a map spikes; spiking: of `SPIKING`, what becomes of it; sites: the maps."""

    ratio: float = 10.0
    spiking: str = "fp8_e4m3"
    sites: str = ALL_MAPS
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        check(self.ratio >= 1, "spikes: ratio", self.ratio, "must be at least 1; inf: no map spikes")
        check_choice("spikes: spiking", self.spiking, SPIKING)
        maps_of(config, self.sites)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, maps_of(model.config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 2 passes of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        sites = maps_of(model.config, self.sites)
        magnitudes = {site: found.magnitude for site, found in channel_ranges(Blocks(model), work, sites).items()}
        ratios = over_median({site: float(magnitude.max()) for site, magnitude in magnitudes.items()})
        spiking = {site: ratio for site, ratio in ratios.items() if ratio > self.ratio}
        element = {site: self.spiking if site in spiking else "int8" for site in sites}
        rounded = [site for site in sites if element[site] != "float"]
        tensors = {site: qtensor(float_kernel(model, site), FormatSpec(element[site])) for site in rounded}
        statics = {site: FormatSpec(element[site], "tensor", static=True) for site in rounded}
        inputs = {site: calibrated(statics[site], magnitudes[site]) for site in rounded}
        note_formats(work, self.name, model, tensors, spiking=spiking, activation_bits=self._bits(model, element))
        return place(with_qtensors(model, tensors), "inputs", inputs)

    def _bits(self, model: Model, element: Mapping[str, str]) -> float:
        """Bits of an input of a product, in the mean over all products."""
        shapes = rule_sites(model.config)["weights"]
        own = 8 * np.dtype(model.config.dtype).itemsize
        products = np.array([np.prod(shapes[site]) for site in element], float)
        bits = np.array([own if name == "float" else FormatSpec(name).bits for name in element.values()], float)
        return float(bits @ products / products.sum())
