"""Weights stored in a number format: one type for training, serving and folders, whatever the format."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.ops.formats.packing import codes_together, pack_bits, pack_trits, unpack_bits, unpack_trits
from sparsejax.ops.formats.quantize import Extent, decode, quantize
from sparsejax.ops.formats.scales import STORED, QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check

_ARRAYS = ("codes", "scale", "zero", "second", "mean", "group_of")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[*_ARRAYS, "surrogate"], meta_fields=["spec", "shape", "dtype"]
)
@dataclasses.dataclass
class QTensor:
    """A weight stored in a number format.

    Every array has the weight's rank, so that leading axes (layers, experts) are scanned and each is cut by the weight's axes.

    codes: [..., in, bytes of a row]: a row is one input channel, contiguous and packed by itself (`ops.formats.packing`), since
      products with few active inputs read whole rows of a kernel [in, out]. int8 for symmetric integers of 8 bits and FP8 for
      elements of that name, else uint8.
    scale, zero, second, mean, group_of: of `ops.formats.scales.QParams`, integer zeros of fewer than 8 bits packed as codes.
    spec: the format. shape: the trailing (in, out); what leads it comes from the arrays. dtype: of the weight it stands for.
    surrogate: while training, the float weight that receives the straight-through gradient; None when serving.
    """

    codes: Array
    scale: Array
    spec: FormatSpec
    shape: tuple[int, int]
    dtype: Any
    zero: Any = None
    second: Any = None
    mean: Any = None
    surrogate: Any = None
    group_of: Any = None

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def qparams(self) -> QParams:
        """Scales and zeros, one number to an element."""
        zero = self.zero
        if zero is not None and _packs_zeros(self.spec):
            zero = unpack_bits(zero, self.spec.bits, self.scale.shape[-1], signed=False)
        return QParams(self.scale, zero, self.second, self.mean, self.group_of)

    def unpacked(self) -> Array:
        """The codes, one to an element: those of `ops.formats.quantize.encode`."""
        spec, columns = self.spec, self.spec.padded(self.shape)[1]
        if spec.element == "ternary":
            return unpack_trits(self.codes, columns)
        return self.codes if spec.bits == 8 else unpack_bits(self.codes, spec.bits, columns, spec.grid.signed)

    def dequantize(self) -> Float[Array, "*lead in out"]:
        return decode(self.unpacked(), self.qparams, self.spec, self.shape).astype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored; a surrogate is not."""
        return sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in self._stored())

    @property
    def bits_per_weight(self) -> float:
        """Scales, zeros, and what fills up rows and groups included; of abstract arrays (`jax.eval_shape`) too."""
        return 8 * self.nbytes / (int(np.prod(self.codes.shape[:-2])) * self.shape[0] * self.shape[1])

    def scaled(self, factor: Float[Array, "*lead 1 out"]) -> Any:
        """The weight with each output multiplied by a float32 factor: the same codes with float32 scales; a plain array where
        outputs share scales or these are no numbers to multiply (powers of two, FP8, quantized again)."""
        spec = self.spec
        by_output = spec.granularity == "channel" or (spec.granularity == "group" and spec.axis == -2)
        if spec.scale not in STORED or spec.second != "none" or not by_output:
            return (self.dequantize() * factor).astype(self.dtype)
        zero = self.zero if self.zero is None or spec.zero == "int" else self.zero.astype(jnp.float32)
        zero = zero * factor if spec.zero == "min" else zero
        spec = dataclasses.replace(spec, scale="f32", codes="stored")
        return dataclasses.replace(self, scale=self.scale * factor, zero=zero, spec=spec)

    def check(self, field: str) -> None:
        """Raise a ConfigError unless the arrays have the shapes and dtypes that format and shape ask for."""
        sizes = isinstance(self.shape, tuple) and len(self.shape) == 2 and all(isinstance(n, int) and n > 0 for n in self.shape)
        check(sizes, f"{field}.shape", self.shape, "expected the sizes (in, out)")
        for name in (*_ARRAYS, "surrogate"):
            part = getattr(self, name)
            check(part is None or hasattr(part, "shape"), f"{field}.{name}", part, "expected an array")
        lead = () if self.codes is None else self.codes.shape[:-2]
        weight = jax.ShapeDtypeStruct((*lead, *self.shape), jnp.float32)
        deterministic = dataclasses.replace(self.spec, rounding="even", static=False, indexed=False)
        wanted = jax.eval_shape(lambda w: qtensor(w, deterministic), weight)
        if self.spec.indexed:
            wanted.group_of = jax.ShapeDtypeStruct((*lead, self.shape[0], 1), jnp.uint16)
        for name in _ARRAYS:
            have, want = (_described(getattr(tensor, name)) for tensor in (self, wanted))
            check(have == want, f"{field}.{name}", have, f"{self.spec} of {self.shape} needs {want}")
        if isinstance(self.group_of, jax.Array) and not isinstance(self.group_of, jax.core.Tracer) and self.spec.indexed:
            groups, highest = self.scale.shape[-2], int(jnp.max(self.group_of))
            check(highest < groups, f"{field}.group_of", highest, f"there are scales of {groups} groups")

    def _stored(self) -> list[Array]:
        return [part for name in _ARRAYS if (part := getattr(self, name)) is not None]


def qtensor(
    weight: Float[Array, "*lead in out"],
    spec: FormatSpec,
    *,
    parameters: QParams | None = None,
    within: Extent | None = None,
    second: Float[Array, "*lead 1 1"] | None = None,
    key: Array | None = None,
) -> QTensor:
    """A weight in a number format.

    Args:
      weight: float, of two axes or more.
      spec: the format.
      parameters, within, second, key: as in `ops.formats.quantize`: scales that are given, extents that are, G, random numbers.
    Raises:
      ConfigError: the format does not fit the shape, or it is static and nothing is given.
    """
    codes, found = quantize(weight, spec, parameters=parameters, within=within, second=second, key=key)
    return packed(codes, found, spec, (weight.shape[-2], weight.shape[-1]), weight.dtype)


def packed(
    codes: Int[Array, "*lead in out"], parameters: QParams, spec: FormatSpec, shape: tuple[int, int], dtype: Any
) -> QTensor:
    """The QTensor of codes and parameters as `ops.formats.quantize` has them: where solvers and importers end.

    Args:
      shape: the trailing (in, out) of the weight; dtype: its own.
    """
    if spec.element == "ternary":
        codes = pack_trits(codes)
    elif spec.bits < 8:
        codes = pack_bits(codes, spec.bits)
    zero = parameters.zero
    if zero is not None and _packs_zeros(spec):
        zero = pack_bits(zero, spec.bits)
    optional: dict[str, Any] = dict(second=parameters.second, mean=parameters.mean, group_of=parameters.group_of)
    return QTensor(codes, parameters.scale, spec, shape, jnp.dtype(dtype), zero, **optional)


def fit_side_by_side(tensors: Sequence[QTensor]) -> bool:
    """Whether `side_by_side` can take them: one format, scales of every output that are not quantized again, groups of
    neighbours (others may differ from map to map), rows of whole bytes."""
    spec = tensors[0].spec
    alike = len({(one.spec, one.shape[0], one.codes.shape[:-2], one.dtype) for one in tensors}) == 1
    by_output = spec.granularity == "channel" or (spec.granularity == "group" and spec.axis == -2)
    whole = all(one.shape[1] % codes_together(spec.bits, spec.element == "ternary") == 0 for one in tensors)
    plain = spec.second == "none" and not spec.indexed and all(one.surrogate is None for one in tensors)
    return alike and by_output and whole and plain


def side_by_side(tensors: Sequence[QTensor]) -> QTensor:
    """QTensors [..., in, out] that `fit_side_by_side` as one [..., in, sum of out], of the same codes and scales."""
    first = tensors[0]
    present = [name for name in ("codes", "scale", "zero") if getattr(first, name) is not None]
    arrays: dict[str, Any] = {name: jnp.concatenate([getattr(one, name) for one in tensors], axis=-1) for name in present}
    return dataclasses.replace(first, shape=(first.shape[0], sum(one.shape[1] for one in tensors)), **arrays)


def _packs_zeros(spec: FormatSpec) -> bool:
    return spec.zero == "int" and spec.bits < 8


def _described(array: Any) -> tuple[tuple[int, ...], str] | None:
    return None if array is None else (tuple(array.shape), str(array.dtype))
