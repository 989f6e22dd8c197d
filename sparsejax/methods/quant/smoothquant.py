"""SmoothQuant: outliers of activations are moved into the weights, so that both can be rounded to 8 bits.

"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (Xiao et al., 2022, arXiv
2211.10438). Acts on float weights, at tensors that come from a norm (into q, k, v and into gate, up):

    s_k = max |x_k|^alpha / max |W_k|^(1 - alpha)          x[N, in] over all tokens, W[in, out] over all readers of x
    x' = x / s,   W' = diag(s) W                           merged into the norm and its readers (`compress.scaling`)

Rounding follows as passes of its own: `Rtn("int8")` for the weights, `QuantizedInputs("int8")` for what enters the maps, one
scale per token. alpha = 1 gives every channel of x' the maximum 1, alpha = 0 every row of W', alpha = .5 makes both equal.
Published: alpha .5 (OPT, BLOOM), .85 (Llama-2), .8 (Mistral); 512 x 512 tokens; what enters o and down stays as it is.
A channel that is always zero is scaled by the least s, 1e-5. Not here: static scales of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float

from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_kernels, float_kernel
from sparsejax.compress.recipe import WEIGHTS, Pass, Tier, Work
from sparsejax.compress.scaling import Pair, merge_scales, note_equivalence, scaled_pairs
from sparsejax.compress.statistics import largest_by_channel, tensor_of
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import batches_of
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check

LEAST = 1e-5


def smooth_scales(
    largest: Float[np.ndarray, " in"], weights: Float[np.ndarray, " in"], alpha: float
) -> Float[np.ndarray, " in"]:
    """s of the module docstring, float64.

    Args:
      largest, weights: max |x_k| and max |W_k| by channel.
      alpha: share of the difficulty that moves to the weights, 0 to 1.
    """
    held = np.maximum(np.asarray(weights, np.float64), LEAST)
    return np.maximum(np.asarray(largest, np.float64) ** alpha / held ** (1 - alpha), LEAST)


@dataclass
class SmoothQuant(Pass):
    """alpha: see `smooth_scales`; 0.85 for models like Llama, worth a sweep on small ones."""

    alpha: float = 0.5
    stage: ClassVar[str] = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        check(0 <= self.alpha <= 1, "smoothquant: alpha", self.alpha, "must be in [0, 1]")
        check(self._pairs(config), "smoothquant: model.norm", config.norm.kind, "has no gain into which scales can be merged")

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, [site for pair in self._pairs(model.config) for site in pair.readers])

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 2 passes of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        blocks, pairs = Blocks(model), self._pairs(model.config)
        streams = [blocks.embed(tokens) for tokens in batches_of(work.calibration)]
        largest: dict[str, np.ndarray] = {}
        for layer in work.layers(self.name, len(blocks)):
            mine = [pair for pair in pairs if pair.layer == layer]
            skip = work.calibration.spec.skip_first
            largest |= work.piece(f"block{layer}", partial(_largest, blocks, layer, mine, streams, skip))
            streams = [blocks.run(layer, h)[0] for h in streams]
        scales = {}
        for pair in pairs:
            rows = [np.abs(np.asarray(float_kernel(model, site), np.float64)).max(-1) for site in pair.readers]
            scales[pair.producer] = smooth_scales(largest[pair.producer], np.max(rows, axis=0), self.alpha)
        smoothed = merge_scales(model, pairs, scales)
        note_equivalence(work, self.name, model, smoothed)
        spread = {name: float(found.max() / max(np.median(found), LEAST)) for name, found in largest.items()}
        work.note(self.name, alpha=self.alpha, largest_over_median=spread)
        return smoothed

    def _pairs(self, config: ModelConfig) -> list[Pair]:
        return [pair for pair in scaled_pairs(config)[0] if pair.of_norm]


def _largest(blocks: Blocks, layer: int, pairs: Sequence[Pair], streams: Sequence[Array], skip: int) -> dict[str, np.ndarray]:
    """max |x_k| of what each producer gives, by its site."""
    taps = {pair.producer: tensor_of(pair.readers[0].split(".", 2)[2]) for pair in pairs}
    found = largest_by_channel(blocks, layer, streams, list(taps.values()), skip)
    return {producer: found[tap] for producer, tap in taps.items()}
