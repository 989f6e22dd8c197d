"""HQQ: zeros of an asymmetric format that fit most weights well, found without data.

"Half-Quadratic Quantization of Large Machine Learning Models" (Badri and Shaji, Mobius Labs, 2023). Acts on the kernels of
linear maps, which become `QTensor`s with zeros stored as floats. With scales s of the extremes, by group and output:

    min over z of ||W - s (q - z)||_p^p,   q = clip(round(W / s + z)),   p = .7
    E = W - s (q - z);   e = sign(E) max(|E| - |E|^(p-1) / beta, 0);   z = mean of q - (W - e) / s;   beta *= 1.01

20 times from beta = 10. Of all steps and the start each group keeps the zero with the least mean |E|, so that none ends above
rounding to nearest with float zeros (the released code stops once the mean over the whole matrix no longer falls).
Published: 4 bits, groups of 64. Scales stay as they are; there (and here) they are stored as float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.compress.packed import float_kernel, note_formats, with_qtensors
from sparsejax.compress.recipe import Work
from sparsejax.compress.surgery import sites_of
from sparsejax.io.model import Model
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.models.config import ModelConfig
from sparsejax.ops.formats.quantize import decode, encode, extent, qparams, spread
from sparsejax.ops.formats.scales import QParams, effective
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check
from sparsejax.quantized_arrays import QTensor, qtensor

NORM, BETA, GROWTH, STEPS = 0.7, 10.0, 1.01, 20


@partial(jax.jit, static_argnums=1)
def hqq(kernel: Float[Array, "*lead in out"], spec: FormatSpec) -> QTensor:
    """A kernel in an asymmetric format with float zeros."""
    w = kernel.astype(jnp.float32)
    start = qparams(w, spec)
    assert start.zero is not None
    shape = w.shape[-2:]
    scale = spread(effective(start, spec), spec, shape)
    divisor = jnp.where(scale == 0, 1, scale)
    # The mean over a group by its extent: that of a format whose statistic is a mean takes magnitudes, so signs go apart.
    means = FormatSpec("binary", spec.granularity, spec.size, spec.axis, spec.ragged)

    def mean(x: Array) -> Array:
        return extent(jnp.maximum(x, 0), means).high - extent(jnp.maximum(-x, 0), means).high

    def rounded(zero: Array) -> tuple[Array, Array, Array]:
        parameters = QParams(start.scale, zero)
        codes = encode(w, parameters, spec)
        error = w - decode(codes, parameters, spec, shape)
        return codes.astype(jnp.float32)[..., : shape[0], : shape[1]], error, mean(jnp.abs(error))

    def step(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        zero, best, least = state
        codes, error, _ = rounded(zero)
        size = jnp.maximum(jnp.abs(error), 1e-12)
        shrunk = jnp.sign(error) * jnp.maximum(size - size ** (NORM - 1) / (BETA * GROWTH**number), 0)
        zero = mean(codes - (w - shrunk) / divisor).astype(zero.dtype)
        _, _, now = rounded(zero)
        return zero, jnp.where(now < least, zero, best), jnp.minimum(now, least)

    first = rounded(start.zero)[2]
    _, best, _ = jax.lax.fori_loop(0, STEPS, step, (start.zero, start.zero, first))
    return qtensor(kernel, spec, parameters=start._replace(zero=best))


@dataclass
class Hqq(Rtn):
    """format: asymmetric with zero=float; sites: the maps."""

    format: str = "int4:asym,group=64,zero=float"
    stage: ClassVar[str] = Rtn.stage

    def check(self, config: ModelConfig) -> None:
        spec = FormatSpec.parse(self.format)
        fits = spec.symmetric == "asym" and spec.zero == "float" and spec.rounding != "stochastic"
        check(fits, "hqq: format", self.format, "has no float zeros to fit; give for example int4:asym,group=64,zero=float")
        check(self.scales == "absmax", "hqq: scales", self.scales, "are those of the extremes while zeros are fitted")
        super().check(config)

    def apply(self, model: Model, work: Work) -> Model:
        spec = FormatSpec.parse(self.format)
        tensors = {site: hqq(float_kernel(model, site), spec) for site in sites_of(model.config, "weights", self.sites)}
        note_formats(work, self.name, model, tensors)
        return with_qtensors(model, tensors)
