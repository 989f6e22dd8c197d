"""Integers with scales and zeros, as GPTQ, AWQ and compressed-tensors store them and as a QTensor does: the form in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejax.io.codecs.host import bitstream, from_bitstream, held, spread_out
from sparsejax.ops.formats.grids import INTEGERS
from sparsejax.ops.formats.scales import STORED
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice
from sparsejax.quantized_arrays import QTensor

_NAMES = {np.dtype(dtype): name for name, dtype in STORED.items()}


class Affine(NamedTuple):
    """A kernel [in, out] as w = (codes - zero) scale.

    codes: uint8[in, out], 0 to 2^bits - 1.
    scale: a float [groups, out], [1, out] where all inputs share one, [1, 1] where all of the kernel does.
    zero: uint8 of the scale's shape; None where each is 2^(bits - 1), which published formats call symmetric.
    bits: of a code, 2 to 8.
    group: inputs that share a scale, the last group may be shorter; 0 where all do.
    group_of: uint16[in], the group of each input where these are not neighbours; else None.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int
    group: int
    group_of: np.ndarray | None = None

    @property
    def zeros(self) -> np.ndarray:
        """`zero`, written out where it is None."""
        return np.full(self.scale.shape, 2 ** (self.bits - 1), np.uint8) if self.zero is None else self.zero


def check_integers(
    spec: FormatSpec, field: str, bits: Sequence[int], scales: Sequence[str], *, indexed: bool = False
) -> None:
    """Raise a ConfigError unless a format is integers with scales that an `Affine` of these widths holds.

    Args:
      spec: the format.
      field: the kernel, for the message.
      bits: allowed; scales: storage that is allowed, of `ops.formats.spec.SCALES`.
      indexed: whether a group may hold any inputs, not neighbours alone.
    """
    rule = "the inputs of a group must be neighbours; allowed are gptq and compressed-tensors, or another order of gptq"
    check(indexed or not spec.indexed, f"{field}: indexed of {spec}", True, rule)
    check_choice(f"{field}: element of {spec}", spec.element, [name for name in INTEGERS if int(name[3:]) in bits])
    check(spec.zero == "int", f"{field}: zero of {spec}", spec.zero, "allowed is 'int': a zero is stored as a code")
    check_choice(f"{field}: granularity of {spec}", spec.granularity, ("tensor", "channel", "group"))
    check(spec.axis == -2, f"{field}: axis of {spec}", spec.axis, "allowed is -2: groups lie along the inputs")
    check(spec.second == "none", f"{field}: second of {spec}", spec.second, "allowed is 'none'")
    check_choice(f"{field}: scale of {spec}", spec.scale, scales)


def affine(tensor: QTensor) -> Affine:
    """The integers of one kernel of a format that passes `check_integers`."""
    spec, bits = tensor.spec, tensor.spec.bits
    codes, zero = spread_out(tensor)
    codes = codes[: tensor.shape[0]]
    if spec.symmetric != "asym":
        codes = (codes + np.int16(2 ** (bits - 1))).astype(np.uint8)
    group = spec.size[0] if spec.granularity == "group" else 0
    group_of = None if tensor.group_of is None else np.asarray(tensor.group_of)[:, 0]
    return Affine(codes, np.asarray(tensor.scale), zero, bits, group, group_of)


def tensor_of(integers: Affine, dtype: Any, field: str) -> QTensor:
    """The QTensor of integers: `full15` where there are no zeros, which has all codes, else `asym`.

    Raises:
      ConfigError: scales of another type, or shapes that do not fit.
    """
    codes, scale, zero, bits, group, group_of = integers
    rows, columns = codes.shape
    check_choice(f"{field}: type of the scales", str(scale.dtype), [str(dtype) for dtype in _NAMES])
    groups = -(-rows // group) if group else 1
    allowed = [(groups, columns)] + ([(1, 1)] if not group else [])
    check(scale.shape in allowed, f"{field}: shape of the scales", scale.shape, f"expected {(groups, columns)} [groups, out]")
    fits = zero is None or zero.shape == scale.shape
    check(fits, f"{field}: shape of the zeros", None if zero is None else zero.shape, f"expected {scale.shape}")
    whole = "tensor" if scale.shape == (1, 1) else "channel"
    spec = FormatSpec(
        f"int{bits}",
        "group" if group else whole,
        (group,) if group else (),
        ragged="tail" if group and rows % group else "error",
        symmetric="full15" if zero is None else "asym",
        scale=_NAMES[scale.dtype],
        indexed=group_of is not None,
    )
    if zero is None:
        codes = (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return held(codes, scale, spec, dtype, zero=zero, group_of=group_of)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32[..., ceil(count * bits / 32)]: unsigned codes [..., count] as a dense little-endian bitstream, the last word filled
    up with zeros. At 3 bits a code may lie in two words."""
    stream = bitstream(codes, bits)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 4)])
    return np.ascontiguousarray(stream).view("<i4")


def from_words(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8[..., count], the inverse of `words`."""
    return from_bitstream(np.ascontiguousarray(stream, "<i4").view(np.uint8), bits, count)


def groups_of(g_idx: np.ndarray, group: int, groups: int, field: str) -> np.ndarray | None:
    """The group of each input, uint16[in]; None where groups are of neighbours (no activation order, or static groups).

    Args:
      g_idx: as stored, int[in].
      group: inputs to a group, 0: all. groups: how many there are scales for.
      field: the tensor, for the message.
    Raises:
      ConfigError: a group that has no scales.
    """
    inputs = np.arange(len(g_idx))
    if np.array_equal(g_idx, inputs // group if group else np.zeros_like(inputs)):
        return None
    wrong = np.flatnonzero((g_idx < 0) | (g_idx >= groups))
    check(not len(wrong), f"{field}: groups of inputs {wrong[:4].tolist()}", g_idx[wrong[:4]].tolist(), f"there are {groups}")
    check(group and groups <= 2**16, f"{field}: groups", groups, "expected groups of inputs, at most 65536 of them")
    return g_idx.astype(np.uint16)
