"""OmniQuant's learned weight clipping: the range of each group of weights is fitted so that blocks give what they gave before.

"OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models" (Shao et al., 2023, arXiv 2308.13137). Acts on
the kernels of linear maps, which become `QTensor`s, one block after the other:

    high' = sigmoid(u) max w,   low' = sigmoid(l) min w      by group and output; s = (high' - low') / (2^b - 1), z = -low' / s
    min over u, l of mean (B^(h^) - B(h))^2                  B: the block; h, h^: what enters it in the float and rounded model

by Adam through the rounding (straight through), one sequence a step. Symmetric ranges have u alone. u = l = infinity is
rounding to nearest; where that has the smaller loss over all sequences a block keeps it, so that none ends above.
Published: u = l = 4 at first (sigmoid .982), rate .01, 20 epochs (40 at 2 bits), 128 sequences of 2,048 tokens.
The forward pass rounds as the stored weights do, half-precision scales included. Not here: learned equivalent transforms (LET),
and the second target of `aug_loss`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.compress.block_learning import BlockLearning, in_turn
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_format, check_kernels, float_kernel, note_formats, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of, maps_of, with_kernels
from sparsejax.models.config import ModelConfig
from sparsejax.ops.formats.grids import INTEGERS
from sparsejax.ops.formats.quantize import Extent, extent, fake, spread
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check
from sparsejax.quantized_arrays import QTensor, qtensor

START = 4.0
Logits = Mapping[str, Array]  # "high" and, of asymmetric formats, "low", float32 [groups, out]


def clipped(kernel: Float[Array, "in out"], spec: FormatSpec, logits: Logits) -> Extent:
    """The ranges of the module docstring, by group and output."""
    whole = extent(kernel, spec)
    high = whole.high * jax.nn.sigmoid(logits["high"])
    return Extent(high) if whole.low is None else Extent(high, whole.low * jax.nn.sigmoid(logits["low"]))


def learnable(kernel: Float[Array, "in out"], spec: FormatSpec, logits: Logits) -> Float[Array, "in out"]:
    """The kernel as it is rounded within `clipped`, float32, with gradients for the logits: straight through round alone."""
    w, within = kernel.astype(jnp.float32), clipped(kernel, spec, logits)
    most = spec.grid.greatest
    if within.low is None:
        scale = _positive(spread(within.high / most, spec, w.shape))
        soft = _limited(_round(w / scale), -most, most) * scale
    else:
        low, high = jnp.minimum(within.low, 0), jnp.maximum(within.high, 0)
        by_group = _positive((high - low) / most)
        zero = spread(_limited(_round(-low / by_group), 0, most), spec, w.shape)
        scale = spread(by_group, spec, w.shape)
        soft = (_limited(_round(w / scale) + zero, 0, most) - zero) * scale
    stored = fake(w, spec, within=jax.tree.map(jax.lax.stop_gradient, within))
    return soft + jax.lax.stop_gradient(stored - soft)


@functools.partial(jax.jit, static_argnums=2)
def _stored(kernel: Array, logits: Logits, spec: FormatSpec) -> QTensor:
    return qtensor(kernel, spec, within=clipped(kernel, spec, logits))


def _round(x: Array) -> Array:
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _limited(x: Array, least: float, most: float) -> Array:
    """Clipped; both ends have the whole gradient (of jnp.clip the half), and codes lie on them often."""
    return jnp.where(x > most, most, jnp.where(x < least, least, x))


def _positive(scale: Array) -> Array:
    return jnp.where(scale == 0, 1, scale)


@dataclass
class OmniQuant(Pass):
    """format: integers, asymmetric or narrow; epochs, rate: of the learning; sites: the maps."""

    format: str = "int3:asym,group=64"
    epochs: int = 20
    rate: float = 1e-2
    sites: str = ALL_MAPS
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        spec = FormatSpec.parse(self.format)
        by_output = spec.granularity == "channel" or (spec.granularity == "group" and spec.axis == -2)
        kinds = spec.symmetric == "narrow" or (spec.symmetric == "asym" and spec.zero == "int")
        plain = spec.scale in ("f32", "f16", "bf16") and spec.second == "none" and spec.rounding == "even"
        check(spec.element in INTEGERS and by_output and kinds and plain, "omniquant: format", self.format,
              "expected integers, asym or narrow, by channel or group, e.g. int3:asym,group=64")  # fmt: skip
        check(self.epochs >= 1, "omniquant: epochs", self.epochs, "must be at least 1")
        check(self.rate > 0, "omniquant: rate", self.rate, "must be positive")
        check_format(config, maps_of(config, self.sites), spec)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, maps_of(model.config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x {self.epochs} x {tier.sequences} steps of {tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        sites, spec = maps_of(model.config, self.sites), FormatSpec.parse(self.format)
        rates, skip = {"high": self.rate, "low": self.rate}, work.calibration.spec.skip_first
        learning = BlockLearning(model, lambda kernel, logits: learnable(kernel, spec, logits), rates, self.epochs, skip)
        blocks = learning.blocks
        # Of the float and of the rounded model, float[sequences, T, D].
        dense = rounded = jnp.concatenate([blocks.embed(tokens) for tokens in batches_of(work.calibration)])
        found: dict[str, Any] = {}
        for layer in work.layers(self.name, len(blocks)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            target = in_turn(blocks, layer, dense)
            learn = functools.partial(self._block, learning, model, layer, here, rounded, target)
            fitted = work.piece(f"block{layer}", learn) if here else {}
            kernels = {name: value for name, value in fitted.items() if isinstance(value, QTensor)}
            dense, rounded = target, in_turn(blocks, layer, rounded, with_kernels(blocks.values(layer), kernels))
            found |= fitted
        tensors = {site: found[site] for site in sites}
        losses = {name: [float(found[f"{name}:{layer}"]) for layer in range(len(blocks)) if f"{name}:{layer}" in found]
                  for name in ("nearest", "learned")}  # fmt: skip
        note_formats(work, self.name, model, tensors, block_losses=losses)
        return with_qtensors(model, tensors)

    def _block(
        self, learning: BlockLearning, model: Model, layer: int, sites: Sequence[str], entering: Array, target: Array
    ) -> dict[str, Any]:
        """QTensors by site, and the mean squared error of the block: `nearest:LAYER`, `learned:LAYER`."""
        spec = FormatSpec.parse(self.format)
        kernels = {site.split(".", 2)[2]: float_kernel(model, site) for site in sites}
        unclipped = {name: _logits(kernel, spec, np.inf) for name, kernel in kernels.items()}
        start = {name: _logits(kernel, spec, START) for name, kernel in kernels.items()}
        learned = learning.learn(layer, kernels, start, entering, (target,))
        nearest, after = (learning.mean_loss(layer, kernels, one, entering, (target,)) for one in (unclipped, learned))
        best, kept = (learned, after) if after < nearest else (unclipped, nearest)  # also where it is no number
        tensors = {site: _stored(kernels[name], best[name], spec) for site, name in zip(sites, kernels, strict=True)}
        return {**tensors, f"nearest:{layer}": np.float64(nearest), f"learned:{layer}": np.float64(kept)}


def _logits(kernel: Array, spec: FormatSpec, value: float) -> Logits:
    whole = jax.eval_shape(functools.partial(extent, spec=spec), kernel)
    names = ("high",) if whole.low is None else ("high", "low")
    return {name: jnp.full(whole.high.shape, value, jnp.float32) for name in names}
