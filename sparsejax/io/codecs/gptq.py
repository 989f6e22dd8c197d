"""GPTQ checkpoints (AutoGPTQ, GPTQModel): `qweight`, `qzeros`, `scales`, `g_idx`.

Codes lie along the inputs in 32-bit words, lowest bits first: qweight int32[in bits / 32, out]. Zeros lie along the outputs:
qzeros int32[groups, out bits / 32]; scales [groups, out]; g_idx int32[in] has the group of each input: neighbours share one,
unless inputs were sorted by activation (`desc_act`), which makes the format `indexed`.
Version 1 (`checkpoint_format: gptq`, and where nothing is said) stores zeros less one, version 2 (`gptq_v2`) as they are. A
zero of 0 has no sound form in version 1: its writers borrow from the neighbours, its readers take it for 0 or 2^bits.
Symmetric weights (`sym`) have zeros 2^(bits - 1) throughout, and scales of 15 steps at 4 bits (`full15`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparsejax.io.codecs.affine import Affine, affine, check_integers, from_words, groups_of, tensor_of, words
from sparsejax.io.codecs.store import Parts, known_keys, need, need_matrix
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check
from sparsejax.quantized_arrays import QTensor

BITS = (2, 3, 4, 8)
SCALES = ("f16", "bf16")
FORMATS = ("gptq", "gptq_v2")
_IGNORED = (
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path", "model_file_base_name",
    "meta", "quant_method", "dataset", "tokenizer", "batch_size", "use_exllama", "exllama_config", "max_input_length",
    "use_cuda_fp16", "block_name_to_quantize", "module_name_preceding_first_block", "model_seqlen", "pad_token_id",
    "cache_block_outputs", "modules_in_block_to_quantize", "disable_exllama", "backend", "mse", "device", "lm_head",
    "pack_dtype", "quantizer", "version",
)  # fmt: skip


@dataclass(frozen=True)
class Gptq:
    """bits: of a code. group: inputs that share a scale, 0 for all. symmetric: see above. version: 1 or 2.

    blocks: names of the maps that are quantized inside a block, where not all of them are.
    indexed: whether groups of some map may not be of neighbours.
    """

    bits: int
    group: int
    symmetric: bool
    version: int = 1
    blocks: tuple[str, ...] = ()
    indexed: bool = False

    mark: ClassVar[str] = "qweight"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> Gptq:
        known: dict[str, tuple[Any, ...]] = {
            "bits": BITS, "group_size": (), "sym": (True, False), "checkpoint_format": (*FORMATS, "", None),
            "format": (*FORMATS, "", None), "is_marlin_format": (False,), "dynamic": (None, {}),
            "desc_act": (True, False, None),
        }  # fmt: skip
        known_keys(document, where, known, _IGNORED)
        for key in ("bits", "group_size", "sym"):
            check(key in document, f"{where}: {key}", None, "is missing")
        size = document["group_size"]
        check(type(size) is int and (size == -1 or size > 0), f"{where}: group_size", size, "expected -1 or a positive number")
        named = document.get("checkpoint_format") or document.get("format") or "gptq"
        version, indexed = 1 + FORMATS.index(named), bool(document.get("desc_act"))
        return cls(document["bits"], max(size, 0), document["sym"], version, indexed=indexed)

    @classmethod
    def fitting(cls, specs: Mapping[str, FormatSpec], plain: tuple[str, ...], version: int = 1) -> Gptq:
        one = one_format(specs, "gptq", BITS, SCALES, indexed=True)
        check(one.granularity != "tensor", "gptq: format", str(one), "has scales by output; allowed are channel and group")
        blocks = _names_in_blocks(specs, plain)
        indexed = any(spec.indexed for spec in specs.values())
        return cls(one.bits, one.size[0] if one.size else 0, one.symmetric != "asym", version, blocks, indexed)

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group or -1,
            "desc_act": self.indexed,
            "sym": self.symmetric,
            "lm_head": False,
            "checkpoint_format": FORMATS[self.version - 1],
        }
        return {**found, "modules_in_block_to_quantize": [list(self.blocks)]} if self.blocks else found

    def shape(self, module: str, parts: Parts) -> tuple[int, int]:
        rows, columns = need_matrix(parts, "qweight", module, np.int32).shape
        check(rows * 32 % self.bits == 0, f"{module}.qweight: shape", (rows, columns), f"no whole codes of {self.bits} bits")
        return columns, rows * 32 // self.bits

    def decode(self, module: str, parts: Parts, dtype: Any) -> QTensor:
        columns, rows = self.shape(module, parts)
        check(columns * self.bits % 32 == 0, f"{module}: outputs", columns, f"no whole words of {self.bits} bits")
        groups = -(-rows // self.group) if self.group else 1
        codes = from_words(parts["qweight"].T, self.bits, rows).T
        stored = need(parts, "qzeros", module, np.int32, (groups, columns * self.bits // 32))
        scale = need(parts, "scales", module, None, (groups, columns))
        group_of = groups_of(need(parts, "g_idx", module, np.int32, (rows,)), self.group, groups, f"{module}.g_idx")
        zero = from_words(stored, self.bits, columns)
        if self.version == 1:
            top = 2**self.bits - 1
            rule = f"means 0 to some readers of checkpoint_format gptq and {top + 1} to others; allowed are 0 to {top - 1}"
            check(zero.max() < top, f"{module}.qzeros: a stored zero", top, rule)
            zero = zero + np.uint8(1)
        half = 2 ** (self.bits - 1)
        if self.symmetric:
            check((zero == half).all(), f"{module}.qzeros: zeros", np.unique(zero)[:4].tolist(), f"sym means {half} for all")
        return tensor_of(Affine(codes, scale, None if self.symmetric else zero, self.bits, self.group, group_of), dtype, module)

    def activation(self, module: str) -> str:
        return ""

    def encode(self, module: str, tensor: QTensor) -> dict[str, np.ndarray]:
        check_integers(tensor.spec, module, (self.bits,), SCALES, indexed=True)
        rows, columns = tensor.shape
        for name, count in (("inputs", rows), ("outputs", columns)):
            rule = f"allowed are multiples of {32 // np.gcd(32, self.bits)}: codes of {self.bits} bits fill whole words"
            check(count * self.bits % 32 == 0, f"{module}: {name}", count, rule)
        integers = affine(tensor)
        zero, group_of = integers.zeros, integers.group_of
        if group_of is None:
            group_of = np.arange(rows) // (self.group or rows)
        if self.version == 1:
            least = int(zero.min())
            check(least > 0, f"{module}: a zero", least, "checkpoint_format gptq stores zeros less one; allowed is gptq_v2")
            zero = zero - np.uint8(1)
        return {
            "qweight": words(integers.codes.T, self.bits).T,
            "qzeros": words(zero, self.bits),
            "scales": integers.scale,
            "g_idx": group_of.astype(np.int32),
        }


def one_format(
    specs: Mapping[str, FormatSpec], name: str, bits: tuple[int, ...], scales: tuple[str, ...], *, indexed: bool = False
) -> FormatSpec:
    """The format of all maps, for stores that have a single one.

    Raises:
      ConfigError: no maps, several formats, or one that is not integers of this kind.
    """
    check(specs, f"{name}: quantized maps", 0, "there are none; quantize the model first")
    first = next(iter(specs))
    for module, spec in specs.items():
        alike = (spec.element, spec.granularity, spec.size, spec.symmetric == "asym")
        wanted = specs[first]
        same = alike == (wanted.element, wanted.granularity, wanted.size, wanted.symmetric == "asym")
        check(same, f"{module}: format", str(spec), f"{name} has one format for all maps, {first} is {wanted}")
    for module, spec in specs.items():
        check_integers(spec, module, bits, scales, indexed=indexed)
    return specs[first]


def _names_in_blocks(specs: Mapping[str, FormatSpec], plain: tuple[str, ...]) -> tuple[str, ...]:
    """Names inside their block of the quantized maps, where some map of a block is not; () where all are."""
    inside = {name for name in map(_in_block, specs) if name}
    left = {name for name in map(_in_block, plain) if name}
    outside = [name for name in specs if not _in_block(name)]
    check(not outside, "gptq: quantized maps", outside[:4], "allowed are those of blocks, not embeddings or heads")
    both = sorted(inside & left)
    check(not both, "gptq: maps", both, "are quantized in some blocks and plain in others; all blocks must be alike")
    return tuple(sorted(inside)) if left else ()


def _in_block(module: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`; empty of what is in no block."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else ""

