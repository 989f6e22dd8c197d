"""compressed-tensors checkpoints (llm-compressor, vLLM): tensors [out, in], groups along the inputs.

| format | tensors of a map |
|---|---|
| pack-quantized | weight_packed int32[out, words], codes + 2^(bits - 1), lowest first; weight_shape int64[2]; weight_scale |
| int-quantized | weight int8[out, in]; weight_scale |
| float-quantized | weight float8_e4m3[out, in]; weight_scale |
| mxfp4-pack-quantized | weight_packed uint8[out, in / 2], even inputs low; weight_scale uint8[out, in / 32], exponents |
| nvfp4-pack-quantized | the same; weight_scale float8_e4m3[out, in / 16]; weight_global_scale float32[1], which divides |

weight_scale is [1] (strategy tensor), [out, 1] (channel), [out, groups] (group) or [out / a, in / b] (block). Maps that
are not symmetric have a weight_zero_point like it, int8; of packed integers by channel or group it is packed along the outputs.
Where inputs were sorted into groups by activation (actorder group), weight_g_idx int32[in] has the group of each.
The library multiplies codes by scales in the scale's type; here that is float32, rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparsejax.io.codecs.affine import Affine, affine, check_integers, from_words, groups_of, tensor_of, words
from sparsejax.io.codecs.scheme import Scheme, read_scheme, scheme_of
from sparsejax.io.codecs.small_floats import decode_fp4, decode_fp8, encode_fp4, encode_fp8
from sparsejax.io.codecs.store import Parts, known_keys, need, need_matrix
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, check
from sparsejax.quantized_arrays import QTensor

SCALES = ("f32", "f16", "bf16")
_IGNORED = ("quant_method", "quantization_status", "global_compression_ratio", "version", "run_compressed")


@dataclass(frozen=True)
class CompressedTensors:
    """groups: (targets, scheme) in the order of the file; a target is a map's name, `re:` with a pattern, or `Linear` for all.
    ignore: targets of maps that are not quantized."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...] = ()

    mark: ClassVar[str] = "weight_scale"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx",
    )  # fmt: skip

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> CompressedTensors:
        known: dict[str, tuple[Any, ...]] = {
            "format": (), "config_groups": (), "ignore": (), "kv_cache_scheme": (None,), "sparsity_config": (),
            "transform_config": (None, {}),
        }  # fmt: skip
        known_keys(document, where, known, _IGNORED)
        sparsity = document.get("sparsity_config") or {}
        check(isinstance(sparsity, dict), f"{where}: sparsity_config", sparsity, "expected an object")
        kind = sparsity.get("format", "dense")
        check(kind == "dense", f"{where}: sparsity_config: format", kind, "allowed: 'dense'")
        groups = document.get("config_groups")
        check(isinstance(groups, dict) and groups, f"{where}: config_groups", groups, "expected an object of groups")
        assert isinstance(groups, dict)
        found = []
        for name, group in groups.items():
            inside = f"{where}: config_groups.{name}"
            check(isinstance(group, dict), inside, group, "expected an object")
            scheme = read_scheme(group, document.get("format"), inside)
            found.append((_texts(group.get("targets"), f"{inside}.targets"), scheme))
        return cls(tuple(found), _texts(document.get("ignore") or [], f"{where}: ignore"))

    @classmethod
    def fitting(cls, specs: Mapping[str, FormatSpec], plain: tuple[str, ...]) -> CompressedTensors:
        check(specs, "compressed-tensors: quantized maps", 0, "there are none; quantize the model first")
        by_scheme: dict[Scheme, list[str]] = {}
        for module, spec in specs.items():
            by_scheme.setdefault(scheme_of(spec, module), []).append(module)
        one = len(by_scheme) == 1
        groups = ((("Linear",) if one else tuple(modules), scheme) for scheme, modules in by_scheme.items())
        return cls(tuple(groups), tuple(plain))

    def document(self) -> dict[str, Any]:
        formats = {scheme.format for _, scheme in self.groups}
        groups = {
            f"group_{number}": {"targets": list(targets), **scheme.document()}
            for number, (targets, scheme) in enumerate(self.groups)
        }
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": list(self.ignore),
        }

    def scheme(self, module: str) -> Scheme:
        """How a map is stored: by its name before a pattern before its class.

        Raises:
          ConfigError: no group has it, or `ignore` does, though it is quantized.
        """
        ignored = [target for target in self.ignore if _hits(target, module)]
        check(not ignored, f"{module}: ignore of quantization_config", ignored, "has it, but there is a weight_scale")
        places = [(target, place) for place, (targets, _) in enumerate(self.groups) for target in targets]
        ranked = sorted((_rank(target), place) for target, place in places if _hits(target, module))
        if not ranked:
            targets = ", ".join(target for target, _ in places)
            raise ConfigError(f"{module}: no group of quantization_config has it; their targets are {targets}")
        return self.groups[ranked[0][1]][1]

    def shape(self, module: str, parts: Parts) -> tuple[int, int]:
        scheme = self.scheme(module)
        if scheme.format == "pack-quantized":
            stored = need(parts, "weight_shape", module, None, (2,))
            rows, columns = (int(size) for size in stored)
            check(rows > 0 and columns > 0, f"{module}.weight_shape", [rows, columns], "expected two positive sizes")
            return rows, columns
        if scheme.format in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
            rows, columns = need_matrix(parts, "weight_packed", module, np.uint8).shape
            return rows, 2 * columns
        rows, columns = need_matrix(parts, "weight", module, None).shape
        return rows, columns

    def decode(self, module: str, parts: Parts, dtype: Any) -> QTensor:
        scheme = self.scheme(module)
        columns, rows = self.shape(module, parts)
        if scheme.format in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
            return decode_fp4(module, parts, scheme, (rows, columns), dtype)
        if scheme.format == "float-quantized":
            return decode_fp8(module, parts, scheme, (rows, columns), dtype)
        scale = _groups_of(need(parts, "weight_scale", module, None), scheme)
        codes = self._codes(module, parts, scheme)
        zero, group_of = self._zeros(module, parts, scheme, scale.shape[0]), None
        if scheme.indexed or "weight_g_idx" in parts:
            stored = need(parts, "weight_g_idx", module, None, (rows,))
            group_of = groups_of(stored, scheme.group, scale.shape[0], f"{module}.weight_g_idx")
        return tensor_of(Affine(codes, scale, zero, scheme.bits, scheme.group, group_of), dtype, module)

    def _codes(self, module: str, parts: Parts, scheme: Scheme) -> np.ndarray:
        """uint8[in, out]."""
        columns, rows = self.shape(module, parts)
        half, bits = 2 ** (scheme.bits - 1), scheme.bits
        if scheme.format == "pack-quantized":
            return from_words(need(parts, "weight_packed", module, np.int32, (columns, -(-rows * bits // 32))), bits, rows).T
        weight = need(parts, "weight", module, np.int8, (columns, rows))
        least, most = int(weight.min()), int(weight.max())
        check(-half <= least and most < half, f"{module}.weight", [least, most], f"expected {-half} to {half - 1}")
        return (weight.T + np.int16(half)).astype(np.uint8)

    def _zeros(self, module: str, parts: Parts, scheme: Scheme, groups: int) -> np.ndarray | None:
        """uint8[groups, out], or None of symmetric maps."""
        name, half = "weight_zero_point", np.int16(2 ** (scheme.bits - 1))
        if scheme.symmetric:
            found = parts.get(name)
            check(found is None or not found.any(), f"{module}.{name}", found, "symmetric maps have none but 0")
            return None
        columns, _ = self.shape(module, parts)
        if scheme.packs_zeros:
            stored = need(parts, name, module, np.int32, (-(-columns * scheme.bits // 32), groups))
            return from_words(stored.T, scheme.bits, columns)
        return (_groups_of(need(parts, name, module, np.int8), scheme) + half).astype(np.uint8)

    def activation(self, module: str) -> str:
        return self.scheme(module).activation

    def encode(self, module: str, tensor: QTensor) -> dict[str, np.ndarray]:
        scheme = scheme_of(tensor.spec, module)
        if scheme.format in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
            return encode_fp4(module, tensor, scheme)
        if scheme.format == "float-quantized":
            return encode_fp8(module, tensor)
        check_integers(tensor.spec, module, (scheme.bits,), SCALES, indexed=True)
        codes, scale, zero, bits, _, group_of = affine(tensor)
        half = np.int16(2 ** (bits - 1))
        parts = {"weight_scale": _stored(scale, scheme)}
        if group_of is not None:
            parts["weight_g_idx"] = group_of.astype(np.int32)
        if zero is not None:
            packs = scheme.packs_zeros
            parts["weight_zero_point"] = words(zero, bits).T if packs else _stored((zero - half).astype(np.int8), scheme)
        if scheme.format == "int-quantized":
            return {"weight": (codes.T - half).astype(np.int8), **parts}
        shape = np.array([tensor.shape[1], tensor.shape[0]], np.int64)
        return {"weight_packed": words(codes.T, bits), "weight_shape": shape, **parts}


def _groups_of(stored: np.ndarray, scheme: Scheme) -> np.ndarray:
    """[groups, out] of scales or zeros [out, groups]; [1, 1] of a single number."""
    return stored.reshape(1, 1) if scheme.strategy == "tensor" and stored.size == 1 else stored.T


def _stored(groups: np.ndarray, scheme: Scheme) -> np.ndarray:
    return groups.reshape(1) if scheme.strategy == "tensor" else groups.T


def _texts(value: Any, where: str) -> tuple[str, ...]:
    check(isinstance(value, list) and all(isinstance(text, str) for text in value), where, value, "expected a list of names")
    for text in value:
        try:
            re.compile(text.removeprefix("re:") if text.startswith("re:") else "")
        except re.error as error:
            raise ConfigError(f"{where} = {text!r}: no pattern ({error})") from error
    return tuple(value)


def _hits(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)


def _rank(target: str) -> int:
    return 2 if target == "Linear" else 1 if target.startswith("re:") else 0
