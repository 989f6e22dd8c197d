"""The float formats of compressed-tensors: FP8 with float scales, and FP4 in blocks (MXFP4, NVFP4)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from sparsejax.io.codecs.host import bitstream, from_bitstream, held, spread_out
from sparsejax.io.codecs.scheme import Scheme
from sparsejax.io.codecs.store import Parts, need
from sparsejax.ops.formats.scales import STORED
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice
from sparsejax.quantized_arrays import QTensor

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# By the rule of its writers, who alone know how an exponent was chosen.
MXFP4 = FormatSpec.parse("mxfp4:rule=round175")
NVFP4 = FormatSpec.parse("nvfp4")


def decode_fp8(module: str, parts: Parts, scheme: Scheme, shape: tuple[int, int], dtype: Any) -> QTensor:
    """The kernel [in, out] of a map of format float-quantized; `shape` is (in, out)."""
    rows, columns = shape
    weight = need(parts, "weight", module, E4M3, (columns, rows))
    scale = need(parts, "weight_scale", module, None)
    names = {str(np.dtype(stored)): name for name, stored in STORED.items()}
    check_choice(f"{module}.weight_scale: type", str(scale.dtype), names)
    sizes = scheme.block[::-1] if scheme.block else ()
    ragged = "tail" if sizes and (rows % sizes[0] or columns % sizes[1]) else "error"
    spec = FormatSpec("fp8_e4m3", scheme.strategy, sizes, ragged=ragged, scale=names[str(scale.dtype)])
    block = spec.block(shape)
    groups = (-(-columns // block[1]), -(-rows // block[0]))
    scale = scale.reshape(1, 1) if scheme.strategy == "tensor" and scale.size == 1 else scale
    check(scale.shape == groups, f"{module}.weight_scale: shape", scale.shape, f"expected {groups}")
    return held(weight.T, scale.T, spec, dtype)


def encode_fp8(module: str, tensor: QTensor) -> dict[str, np.ndarray]:
    """The tensors of a kernel of FP8."""
    weight = np.asarray(tensor.codes)[: tensor.shape[0], : tensor.shape[1]].T
    scale = np.asarray(tensor.scale)
    return {"weight": weight, "weight_scale": scale.reshape(1) if tensor.spec.granularity == "tensor" else scale.T}


def decode_fp4(module: str, parts: Parts, scheme: Scheme, shape: tuple[int, int], dtype: Any) -> QTensor:
    """The kernel [in, out] of a map of format mxfp4- or nvfp4-pack-quantized; `shape` is (in, out)."""
    rows, columns = shape
    check(rows % scheme.group == 0, f"{module}: inputs", rows, f"expected a multiple of {scheme.group}")
    codes = from_bitstream(need(parts, "weight_packed", module, np.uint8, (columns, rows // 2)), 4, rows).T
    shared = (columns, rows // scheme.group)
    if scheme.format == "mxfp4-pack-quantized":
        return held(codes, need(parts, "weight_scale", module, np.uint8, shared).T, MXFP4, dtype)
    scale = need(parts, "weight_scale", module, E4M3, shared).T
    whole = need(parts, "weight_global_scale", module, np.float32)
    sound = whole.size == 1 and bool(np.isfinite(whole).all()) and bool((whole > 0).all())
    check(sound, f"{module}.weight_global_scale", whole.tolist(), "expected one positive number")
    return held(codes, scale, NVFP4, dtype, second=whole.reshape(1, 1))


def encode_fp4(module: str, tensor: QTensor, scheme: Scheme) -> dict[str, np.ndarray]:
    """The tensors of a kernel of MXFP4 or NVFP4."""
    rows = tensor.shape[0]
    check(rows % scheme.group == 0, f"{module}: inputs", rows, f"allowed are multiples of {scheme.group}")
    codes = spread_out(tensor)[0][:rows]
    parts = {"weight_packed": bitstream(codes.T, 4), "weight_scale": np.asarray(tensor.scale).T}
    return parts if tensor.second is None else {**parts, "weight_global_scale": np.asarray(tensor.second).reshape(1)}
