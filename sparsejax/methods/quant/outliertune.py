"""OutlierTune: static scales by input channel, whose dequantization is executed in advance, in the weights.

"OutlierTune: Efficient Channel-Wise Quantization for Large Language Models" (Wang et al., 2024, arXiv 2406.18832). Acts on the
inputs and kernels of linear maps, which become `QTensor`s. With the range of each channel over the calibration,

    q_j = round((x_j - c_j) / s_j),   s_j = max |x_j - c_j| / most          most: the greatest code
    y   = q W' + b',   W' = Q(diag(s) W),   b' = b + c W                    x[in], W[in, out]

so that a product of integers needs no scale of the inputs behind it. Symmetrization, c_j = (max + min) / 2, is done where the
map has a bias that takes up c W; c = 0 where it has none (Llama). The subtraction is part of the rounding.
What is hard about activations is now in the weights, as of SmoothQuant with alpha = 1: rows of W' differ as channels of x do,
so that weights want groups or 8 bits. Ranges are static: what is larger than in the calibration is clipped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.arrays import QuantizedActivation, dense
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_format, check_kernels, float_kernel, note_formats, with_qtensors
from sparsejax.compress.recipe import FORMATS, Pass, Tier, Work
from sparsejax.compress.statistics import Range, channel_ranges
from sparsejax.compress.surgery import Placed, place
from sparsejax.context import Context
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, maps_of
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_map import parameter_axes
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.formats.grids import INTEGERS
from sparsejax.ops.formats.quantize import encode
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice, register
from sparsejax.quantized_arrays import qtensor


@register("activation_op", "channel_codes")
@dataclasses.dataclass(frozen=True)
class ChannelCodes:
    """q of the module docstring, in place of x: the weight behind it holds the scales.

    A tensor with zeros in it (behind a pass that selects) gets the codes of these zeros, which are none where c is none.
    """

    merged: ClassVar[bool] = True  # without the op the kernel is that of another function

    element: str = "int8"

    def __post_init__(self) -> None:
        check_choice("channel_codes: element", self.element, INTEGERS)

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """scale and center [in]."""
        axis = (axes[-2],)
        return {
            "scale": weight(jnp.ones((shape[-2],), jnp.float32), axis, "fitted"),
            "center": weight(jnp.zeros((shape[-2],), jnp.float32), axis, "fitted"),
        }

    def __call__(self, arrays: dict[str, Array], x: Any, ctx: Context) -> QuantizedActivation:
        x = dense(x)
        scale, center = (arrays[name].reshape((1,) * (x.ndim - 1) + (-1,)) for name in ("scale", "center"))
        moved = x.astype(jnp.float32) - center
        codes = encode(jax.lax.stop_gradient(moved), QParams(scale), FormatSpec(self.element, "channel", static=True))
        ones = jnp.ones((*x.shape[:-1], 1), jnp.float32)
        surrogate = (moved / jnp.where(scale == 0, 1, scale)).astype(x.dtype) if ctx.mode == "train" else None
        return QuantizedActivation(codes, ones, surrogate, x.dtype)


def channel_scales(
    found: Range, most: float, symmetrize: bool
) -> tuple[Float[np.ndarray, " in"], Float[np.ndarray, " in"]]:
    """(s, c) of the module docstring, float32."""
    center = (found.high + found.low) / 2 if symmetrize else np.zeros_like(found.high)
    return (np.maximum(found.high - center, center - found.low) / most).astype(np.float32), center.astype(np.float32)


@dataclass
class OutlierTune(Pass):
    """weights: the format of W'; inputs: the element of q, symmetric integers; sites: the maps."""

    weights: str = "int8"
    inputs: str = "int8"
    sites: str = ALL_MAPS
    stage: ClassVar[str] = FORMATS

    def check(self, config: ModelConfig) -> None:
        check_choice("outliertune: inputs", self.inputs, INTEGERS)
        spec = FormatSpec.parse(self.weights, "outliertune: weights")
        check(spec.rounding != "stochastic", "outliertune: weights", str(spec), "rounds at random, and nothing is drawn here")
        check_format(config, maps_of(config, self.sites), spec)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, maps_of(model.config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x 2 passes of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        sites, names = maps_of(model.config, self.sites), set(parameter_axes(model.config))
        spec, most = FormatSpec.parse(self.weights), FormatSpec(self.inputs).grid.greatest
        tensors, plan, biases = {}, {}, {}
        for site, found in channel_ranges(Blocks(model), work, sites).items():
            biased = f"{site}.bias" in names
            scale, center = channel_scales(found, most, biased)
            kernel = np.asarray(float_kernel(model, site), np.float32)
            dtype = model.parameter(f"{site}.kernel").dtype
            tensors[site] = dataclasses.replace(qtensor(jnp.asarray(scale[:, None] * kernel), spec), dtype=dtype)
            plan[site] = Placed(f"channel_codes:{self.inputs}", {"scale": scale, "center": center})
            if biased:
                bias = model.parameter(f"{site}.bias")
                biases[f"{site}.bias"] = jnp.asarray(np.asarray(bias, np.float32) + center @ kernel, bias.dtype)
        moved = [name.removesuffix(".bias") for name in biases]
        note_formats(work, self.name, model, tensors, activation_bits=FormatSpec(self.inputs).bits, symmetrized=moved)
        scaled = model.rebuilt(model.config, biases) if biases else model
        return place(with_qtensors(scaled, tensors), "inputs", plan)
