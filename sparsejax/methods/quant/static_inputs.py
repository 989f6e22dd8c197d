"""Activations rounded with scales that were found by calibration: nothing is computed of the tensor at hand.

Acts on the input x[..., in] of a linear map (activation op `calibrated:FORMAT`), with a scale for the tensor or one by channel:

    q = round(x / s), saturated at the ends of the format's grid;   x^ = s q

Symmetric integers with one scale stay integers, and are multiplied as such where the weights are; other formats are rounded and
multiplied as floats. Zeros stay zeros. What is larger than anything in the calibration is clipped.
Gradients go straight through, where an entry is clipped as well.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax.arrays import QuantizedActivation, SparseActivation
from sparsejax.compress.surgery import Placed
from sparsejax.context import Context
from sparsejax.nnx_compat import Weight, weight
from sparsejax.ops.formats.quantize import Extent, encode, fake, qparams
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, register


@register("activation_op", "calibrated")
@dataclasses.dataclass(frozen=True)
class Calibrated:
    """format: static, symmetric, with a float32 scale of the tensor or of each channel, e.g. "int8:tensor,static"."""

    format: str
    takes_path: ClassVar[bool] = True  # the whole argument is the format, commas and all

    def __post_init__(self) -> None:
        spec = self.spec
        one = spec.static and spec.granularity in ("tensor", "channel")
        fits = one and spec.scale == "f32" and spec.statistic == "magnitude"
        check(fits, "calibrated: format", self.format, "expected one like int8:tensor,static or fp8_e4m3:channel,static: "
              "static, no zero, with a float32 scale of the tensor or of each channel")  # fmt: skip

    @property
    def spec(self) -> FormatSpec:
        return FormatSpec.parse(self.format, "calibrated")

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """scale: [1], or [in] of a format by channel."""
        by_channel = self.spec.granularity == "channel"
        size, axis = (shape[-2], axes[-2]) if by_channel else (1, None)
        return {"scale": weight(jnp.ones((size,), jnp.float32), (axis,), "fitted")}

    def __call__(self, arrays: dict[str, Array], x: Any, ctx: Context) -> Any:
        if isinstance(x, SparseActivation):
            return dataclasses.replace(x, values=self(arrays, x.values, ctx))
        spec, parameters = self.spec, QParams(arrays["scale"].reshape((1,) * (x.ndim - 1) + (-1,)))
        if not spec.multiplies_as_integers or spec.granularity != "tensor":
            return fake(x, spec, parameters=parameters)
        codes = encode(jax.lax.stop_gradient(x), parameters, spec)
        scale = jnp.broadcast_to(parameters.scale, (*x.shape[:-1], 1))
        return QuantizedActivation(codes, scale, x if ctx.mode == "train" else None, x.dtype)


def calibrated(spec: FormatSpec, magnitude: Float[np.ndarray, " in"]) -> Placed:
    """The op with the scales at which the largest magnitudes are the grid's end.

    Args:
      spec: as `Calibrated` takes it.
      magnitude: max |x| by channel, or of what is to remain unclipped.
    """
    high = np.asarray(magnitude, np.float32)[None]
    high = high if spec.granularity == "channel" else high.max(keepdims=True)
    return Placed(f"calibrated:{spec}", {"scale": qparams(jnp.zeros((1, 1)), spec, within=Extent(jnp.asarray(high))).scale[0]})
