"""Activations in any number format with scales of its own per token: what W8A8 and FP8 checkpoints say of the inputs of maps.

Affine quantization of activations as they come ("dynamic"), after "Quantizing deep convolutional networks for efficient
inference" (Krishnamoorthi, 2018, arXiv 1806.08342). Acts on the inputs of linear maps, x [..., T, in]:

    rounded:int8:full15,token    s_t = max |x_t| / 127.5, codes -128 to 127      (compressed-tensors' int8)
    rounded:fp8_e4m3:token       s_t = max |x_t| / 448                           (its dynamic FP8)

The largest entry of a token is at 127.5 steps there: whether it becomes -127 or -128 the last bit of s_t decides, here as in
the library, which divides in the model's dtype. Symmetric integers go into the product as they are
(`arrays.QuantizedActivation`), all else as the floats that it stands for. Backward: straight through. Of a SparseActivation the
kept entries set the scale, and the others stay zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.arrays import QuantizedActivation, SparseActivation
from sparsejax.context import Context
from sparsejax.ops.formats.grids import INTEGERS, LOGARITHMS
from sparsejax.ops.formats.quantize import encode, fake, qparams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, check, register


@register("activation_op", "rounded")
@dataclass(frozen=True)
class Rounded:
    """format: of `FormatSpec.parse`; scales must belong to one token (`token`, or groups along axis -1)."""

    format: str

    def __post_init__(self) -> None:
        spec = _parsed(self.format)
        own = spec.granularity == "token" or (spec.granularity == "group" and spec.axis == -1)
        rule = "shares scales among tokens; allowed are token, and group=SIZE,axis=-1"
        check(own and spec.second == "none", "rounded: granularity", spec.granularity, rule)
        check(not spec.static, "rounded: static", True, "scales are computed as tokens come; leave it out")
        check(spec.element not in LOGARITHMS, "rounded: element", spec.element, "has no negative numbers")
        check(spec.rounding != "stochastic", "rounded: round", spec.rounding, "allowed are even, away, half_up")

    def validate(self, features: int, path: str) -> None:
        try:
            _parsed(self.format).block((1, features))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def __call__(self, x: Any, ctx: Context) -> Any:
        if isinstance(x, SparseActivation):
            return replace(x, values=self._rounded(x.values, jnp.where(x.mask, x.values, 0), ctx))
        return self._rounded(x, x, ctx)

    def _rounded(
        self, x: Float[Array, "... in"], counted: Float[Array, "... in"], ctx: Context
    ) -> Array | QuantizedActivation:
        """x by the scales of `counted`."""
        spec = _parsed(self.format)
        integers = spec.element in INTEGERS and spec.symmetric != "asym" and spec.granularity == "token"
        parameters = qparams(jax.lax.stop_gradient(counted), spec)
        if not integers or spec.scale != "f32":
            return fake(x, spec, parameters=parameters)
        fixed = jax.lax.stop_gradient(x)
        surrogate = x if ctx.mode == "train" else None
        return QuantizedActivation(encode(fixed, parameters, spec), parameters.scale, surrogate, x.dtype)


_parsed = functools.cache(FormatSpec.parse)
