"""Quantization-aware training with symmetric integers (Krishnamoorthi, 1806.08342; ranges per token as in LLM-QAT, 2305.17888).

Acts on the input of a linear map (activation ops `int8`, `int4`) and on its weight (weight ops of the same names):

    s = max |x| / q_max         per token for x [..., in] (`int4:token`); per output channel for w [in, out] (`int4`)
    q = clip(round(x / s), -q_max, q_max)         q_max = 127 or 7; half to even; narrow range, so that -x quantizes to -q
    y = (q_x @ q_w) * s_x * s_w                   int32 accumulator

Backward: straight through, dL/dx = dL/dx_hat; nothing is clipped when s is the maximum, so no mask is needed.
`start`: steps before which the op leaves its operand as it is (delayed quantization; published: the first 1 to 5 %).
The forward pass of training is that of serving: the same integers, the same product, whether the weight is quantized in
the step or was exported (`sparsejax.compress.export`).
Not here: learned or averaged ranges, per-tensor activations, asymmetric grids.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.arrays import QTensor, QuantizedActivation, SparseActivation
from sparsejax.context import Context
from sparsejax.ops.formats.quantize import encode, qparams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, register
from sparsejax.quantized_arrays import qtensor


def _check_start(start: int) -> None:
    check(start >= 0, "start", start, "must not be negative")


@dataclasses.dataclass(frozen=True)
class IntegerActivation:
    """x as integers with one scale per token; of a SparseActivation the kept values set the scale."""

    start: int = 0
    format: ClassVar[FormatSpec]

    def __post_init__(self) -> None:
        _check_start(self.start)

    def __call__(self, x: Any, ctx: Context) -> Any:
        if not ctx.reached(self.start):
            return x
        if isinstance(x, SparseActivation):
            return dataclasses.replace(x, values=self._quantize(x.values, jnp.where(x.mask, x.values, 0), ctx))
        return self._quantize(x, x, ctx)

    def _quantize(self, x: Array, counted: Array, ctx: Context) -> QuantizedActivation:
        fixed = jax.lax.stop_gradient
        parameters = qparams(fixed(counted), self.format)
        codes = encode(fixed(x), parameters, self.format)
        return QuantizedActivation(codes, parameters.scale, x if ctx.mode == "train" else None, x.dtype)


@register("activation_op", "int8")
@dataclasses.dataclass(frozen=True)
class Int8Activation(IntegerActivation):
    """Codes in [-127, 127]."""

    format: ClassVar[FormatSpec] = FormatSpec("int8", "token")


@register("activation_op", "int4")
@dataclasses.dataclass(frozen=True)
class Int4Activation(IntegerActivation):
    """Codes in [-7, 7], held in int8: XLA has no product of 4-bit integers on CPU, nor Hopper an instruction for it."""

    format: ClassVar[FormatSpec] = FormatSpec("int4", "token")


@dataclasses.dataclass(frozen=True)
class IntegerWeight:
    """w as integers with one scale per output channel; a weight that is packed (a QTensor of any format) stays as it is."""

    start: int = 0
    format: ClassVar[FormatSpec]

    def __post_init__(self) -> None:
        _check_start(self.start)

    def __call__(self, w: Any, ctx: Context) -> Any:
        if isinstance(w, QTensor) or not ctx.reached(self.start):
            return w
        return dataclasses.replace(self.encode(jax.lax.stop_gradient(w)), surrogate=w if ctx.mode == "train" else None)

    def encode(self, w: Float[Array, "*lead in out"]) -> QTensor:
        """The packed weight that serving multiplies."""
        return qtensor(w, self.format)


@register("weight_op", "int8")
@dataclasses.dataclass(frozen=True)
class Int8Weight(IntegerWeight):
    """Codes in [-127, 127]."""

    format: ClassVar[FormatSpec] = FormatSpec("int8")


@register("weight_op", "int4")
@dataclasses.dataclass(frozen=True)
class Int4Weight(IntegerWeight):
    """Codes in [-7, 7], two to a byte."""

    format: ClassVar[FormatSpec] = FormatSpec("int4")
