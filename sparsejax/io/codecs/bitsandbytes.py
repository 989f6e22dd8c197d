"""bitsandbytes 4-bit checkpoints (QLoRA, 2305.14314): NF4 and its FP4, with plain or nested (double quantized) scales.

A map [out, in] is one row of codes, two to a byte, the first in the high nibble: weight uint8[out in / 2, 1]. Beside it lie
`weight.absmax`, the scale of every `blocksize` codes, `weight.quant_map`, the 16 numbers that codes stand for, and
`weight.quant_state.bitsandbytes__nf4`, a JSON text as bytes. Nested, absmax is uint8: codes of `weight.nested_quant_map`, times
`weight.nested_absmax` per 256 of them, plus `nested_offset`. Blocks must end with rows: in is a multiple of the blocksize.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparsejax.io.codecs.host import held, spread_out
from sparsejax.io.codecs.store import Parts, known_keys, need
from sparsejax.ops.formats.spec import DOUBLE_BLOCK, FormatSpec
from sparsejax.ops.formats.tables import DYNAMIC_8, FP4_BNB, NF4
from sparsejax.plugs import ConfigError, check, check_choice
from sparsejax.quantized_arrays import QTensor

TYPES = {"nf4": ("nf4", NF4), "fp4": ("fp4_bnb", FP4_BNB)}
_STATE = "weight.quant_state.bitsandbytes__"
_NEAR = 2e-7  # relative: maps are computed anew by every version, and differ in the last bit of float32


@dataclass(frozen=True)
class BitsAndBytes:
    """All that matters is said map by map."""

    mark: ClassVar[str] = "weight.absmax"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        *(f"{_STATE}{name}" for name in TYPES),
    )  # fmt: skip

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> BitsAndBytes:
        known: dict[str, tuple[Any, ...]] = {
            "load_in_4bit": (True,), "_load_in_4bit": (True,), "bnb_4bit_quant_type": tuple(TYPES), "load_in_8bit": (False,),
            "bnb_4bit_quant_storage": ("uint8",),
        }  # fmt: skip
        ignored = ("quant_method", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_threshold",
                   "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight")  # fmt: skip
        known_keys(document, where, known, ignored)
        return cls()

    @classmethod
    def fitting(cls, specs: Mapping[str, FormatSpec], plain: tuple[str, ...]) -> BitsAndBytes:
        for module, spec in specs.items():
            _type_of(spec, module)
        return cls()

    def document(self) -> dict[str, Any]:
        return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "uint8"}

    def shape(self, module: str, parts: Parts) -> tuple[int, int]:
        rows, columns = _state(module, parts)["shape"]
        return rows, columns

    def decode(self, module: str, parts: Parts, dtype: Any) -> QTensor:
        state = _state(module, parts)
        element, table = TYPES[state["quant_type"]]
        (columns, rows), size = state["shape"], state["blocksize"]
        check(rows % size == 0, f"{module}: inputs", rows, f"no multiple of blocksize = {size}: blocks run from row to row")
        _near(need(parts, "weight.quant_map", module, np.float32, (16,)), table, f"{module}.weight.quant_map")
        count = columns * rows
        stored = need(parts, "weight", module, np.uint8)
        check(stored.size * 2 == count, f"{module}.weight: shape", stored.shape, f"expected {count // 2} bytes")
        codes = np.stack([stored.ravel() >> 4, stored.ravel() & 15], axis=-1).reshape(columns, rows).T
        nested = "weight.nested_absmax" in parts
        absmax = need(parts, "weight.absmax", module, np.uint8 if nested else np.float32, (count // size,))
        scale = absmax.reshape(columns, rows // size).T
        spec = FormatSpec(element, "group", (size,), scale="f32", second="double" if nested else "none")
        if not nested:
            return held(codes, scale, spec, dtype)
        check_choice(f"{module}: nested_blocksize", state.get("nested_blocksize"), (DOUBLE_BLOCK,))
        name = "weight.nested_quant_map"
        _near(need(parts, name, module, np.float32, (256,)), DYNAMIC_8, f"{module}.{name}")
        second = need(parts, "weight.nested_absmax", module, np.float32, (-(-absmax.size // DOUBLE_BLOCK),))
        offset = state.get("nested_offset")
        check(type(offset) in (int, float), f"{module}: nested_offset", offset, "expected a number")
        mean = np.full((1, 1), offset, np.float32)
        return held(codes, scale, spec, dtype, second=second.reshape(1, -1), mean=mean)

    def activation(self, module: str) -> str:
        return ""

    def encode(self, module: str, tensor: QTensor) -> dict[str, np.ndarray]:
        name = _type_of(tensor.spec, module)
        (rows, columns), size = tensor.shape, tensor.spec.size[0]
        check(rows % size == 0 and rows % 2 == 0, f"{module}: inputs", rows, f"allowed are even multiples of {size}")
        codes = spread_out(tensor)[0].T.reshape(-1, 2)
        state: dict[str, Any] = {"quant_type": name, "blocksize": size, "dtype": str(tensor.dtype), "shape": [columns, rows]}
        parts = {
            "weight": (codes[:, 0] << 4 | codes[:, 1])[:, None],
            "weight.absmax": np.asarray(tensor.scale).T.reshape(-1),
            "weight.quant_map": TYPES[name][1],
        }
        if tensor.spec.second == "double":
            state |= {"nested_blocksize": DOUBLE_BLOCK, "nested_dtype": "float32", "nested_offset": float(tensor.mean[0, 0])}
            parts |= {"weight.nested_absmax": np.asarray(tensor.second).reshape(-1), "weight.nested_quant_map": DYNAMIC_8}
        return {**parts, f"{_STATE}{name}": np.frombuffer(json.dumps(state).encode(), np.uint8)}


def _type_of(spec: FormatSpec, module: str) -> str:
    """`quant_type` of a format; ConfigError where bitsandbytes has none."""
    names = {element: name for name, (element, _) in TYPES.items()}
    check_choice(f"{module}: element of {spec}", spec.element, names)
    grouped = spec.granularity == "group" and spec.axis == -2 and spec.ragged != "pad"
    check(grouped, f"{module}: format", str(spec), "allowed are groups along the inputs, not filled up")
    check_choice(f"{module}: scale of {spec}", spec.scale, ("f32",))
    return names[spec.element]


def _state(module: str, parts: Parts) -> dict[str, Any]:
    """The map's `quant_state`, with `shape` (out, in)."""
    names = [name for name in TYPES if f"{_STATE}{name}" in parts]
    check(len(names) == 1, f"{module}.{_STATE}", names, f"expected one of {', '.join(TYPES)}")
    where = f"{module}.{_STATE}{names[0]}"
    try:
        state = json.loads(np.asarray(parts[f"{_STATE}{names[0]}"]).tobytes())
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    check(isinstance(state, dict), where, state, "expected an object")
    check_choice(f"{where}: quant_type", state.get("quant_type"), (names[0],))
    shape, size = state.get("shape"), state.get("blocksize")
    two = isinstance(shape, list) and len(shape) == 2 and all(type(edge) is int and edge > 0 for edge in shape)
    check(two, f"{where}: shape", shape, "expected two positive numbers")
    check(type(size) is int and size > 0, f"{where}: blocksize", size, "expected a positive number")
    return state


def _near(found: np.ndarray, table: np.ndarray, field: str) -> None:
    close = np.allclose(found, table, rtol=_NEAR, atol=0)
    check(close, field, found[:4].tolist(), f"other numbers than those known here, {table[:4].tolist()}, ...")
