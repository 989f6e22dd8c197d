"""AWQ checkpoints (AutoAWQ, version gemm): `qweight`, `qzeros`, `scales`.

Codes and zeros lie along the outputs, eight to a 32-bit word, of which the lowest four bits are column 0, then 2, 4, 6, 1, 3, 5
and 7: qweight int32[in, out / 8], qzeros int32[groups, out / 8], scales [groups, out]. Only 4 bits, zeros as they are;
weights without zeros have zeros 8 and come back so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparsejax.io.codecs.affine import Affine, affine, check_integers, from_words, tensor_of, words
from sparsejax.io.codecs.gptq import one_format
from sparsejax.io.codecs.store import Parts, known_keys, need, need_matrix
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check
from sparsejax.quantized_arrays import QTensor

BITS, SCALES = (4,), ("f16", "bf16")
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # column of each nibble, lowest first
_BACK = np.argsort(ORDER)


@dataclass(frozen=True)
class Awq:
    """group: inputs that share a scale, 0 for all. plain: parts of the names of maps that are not quantized."""

    group: int
    plain: tuple[str, ...] = ()

    mark: ClassVar[str] = "qweight"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> Awq:
        known: dict[str, tuple[Any, ...]] = {
            "bits": BITS, "w_bit": BITS, "group_size": (), "q_group_size": (), "zero_point": (True,),
            "version": ("gemm", "GEMM"), "modules_to_not_convert": (),
        }  # fmt: skip
        ignored = ("quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config")
        known_keys(document, where, known, ignored)
        size = document.get("group_size", document.get("q_group_size"))
        check(type(size) is int and (size == -1 or size > 0), f"{where}: group_size", size, "expected -1 or a positive number")
        check("version" in document, f"{where}: version", None, "is missing; it decides the order of the columns")
        return cls(max(size, 0))

    @classmethod
    def fitting(cls, specs: Mapping[str, FormatSpec], plain: tuple[str, ...]) -> Awq:
        one = one_format(specs, "awq", BITS, SCALES)
        check(one.granularity != "tensor", "awq: format", str(one), "has scales by output; allowed are channel and group")
        return cls(one.size[0] if one.size else 0, tuple(plain))

    def document(self) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.plain) or None,
        }

    def shape(self, module: str, parts: Parts) -> tuple[int, int]:
        rows, columns = need_matrix(parts, "qweight", module, np.int32).shape
        return columns * 8, rows

    def decode(self, module: str, parts: Parts, dtype: Any) -> QTensor:
        columns, rows = self.shape(module, parts)
        check(not self.group or rows % self.group == 0, f"{module}: inputs", rows, f"no multiple of group_size = {self.group}")
        groups = rows // self.group if self.group else 1
        zero = _columns(need(parts, "qzeros", module, np.int32, (groups, columns // 8)))
        scale = need(parts, "scales", module, None, (groups, columns))
        return tensor_of(Affine(_columns(parts["qweight"]), scale, zero, 4, self.group), dtype, module)

    def activation(self, module: str) -> str:
        return ""

    def encode(self, module: str, tensor: QTensor) -> dict[str, np.ndarray]:
        check_integers(tensor.spec, module, BITS, SCALES)
        rows, columns = tensor.shape
        check(columns % 8 == 0, f"{module}: outputs", columns, "allowed are multiples of 8: awq packs them into words")
        check(not self.group or rows % self.group == 0, f"{module}: inputs", rows, f"allowed are multiples of {self.group}")
        integers = affine(tensor)
        return {"qweight": _words(integers.codes), "qzeros": _words(integers.zeros), "scales": integers.scale}


def _words(codes: np.ndarray) -> np.ndarray:
    return words(codes.reshape(len(codes), -1, 8)[:, :, ORDER].reshape(len(codes), -1), 4)


def _columns(stored: np.ndarray) -> np.ndarray:
    codes = from_words(stored, 4, stored.shape[1] * 8)
    return np.ascontiguousarray(codes.reshape(len(codes), -1, 8)[:, :, _BACK].reshape(len(codes), -1))
