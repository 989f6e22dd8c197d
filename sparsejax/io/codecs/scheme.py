"""A scheme of compressed-tensors: the `weights` of a group of its config beside a FormatSpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsejax.io.codecs.store import known_keys
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice

# Format -> (type, bits) that it holds. Only `pack-quantized` is read at widths that divide no word.
FORMATS: dict[str, tuple[str, tuple[int, ...]]] = {
    "pack-quantized": ("int", tuple(range(2, 9))),
    "int-quantized": ("int", tuple(range(2, 9))),
    "float-quantized": ("float", (8,)),
    "mxfp4-pack-quantized": ("float", (4,)),
    "nvfp4-pack-quantized": ("float", (4,)),
}
# Type of 8-bit activations -> their format. Integers are divided by half of their 255 steps, not by 127.
ACTIVATIONS = {"int": "int8:full15,token", "float": "fp8_e4m3:token"}
STRATEGIES = {
    "pack-quantized": ("tensor", "channel", "group"),
    "int-quantized": ("tensor", "channel", "group"),
    "float-quantized": ("tensor", "channel", "block"),
    "mxfp4-pack-quantized": ("group",),
    "nvfp4-pack-quantized": ("tensor_group",),
}
_SIZES = {"mxfp4-pack-quantized": 32, "nvfp4-pack-quantized": 16}
_SCALES = {"mxfp4-pack-quantized": "torch.uint8", "nvfp4-pack-quantized": "torch.float8_e4m3fn"}
_IGNORED = ("observer", "observer_kwargs", "zp_dtype", "scale_dtype")


@dataclass(frozen=True)
class Scheme:
    """format: of `FORMATS`. bits: of a code. strategy: what shares a scale, of `STRATEGIES`. symmetric: no zeros.

    group: inputs that share a scale, 0 but for strategies of groups. block: (outputs, inputs) of strategy block.
    indexed: inputs are sorted into groups by activation order.
    activation: the number format to which inputs are rounded as they come; "": they stay floats.
    """

    format: str
    bits: int
    strategy: str
    symmetric: bool = True
    group: int = 0
    block: tuple[int, int] | None = None
    indexed: bool = False
    activation: str = ""

    @property
    def packs_zeros(self) -> bool:
        return self.format == "pack-quantized" and self.strategy in ("channel", "group")

    def document(self) -> dict[str, Any]:
        """The keys of a group beside its targets."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": FORMATS[self.format][0],
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group or None,
            "block_structure": None if self.block is None else list(self.block),
            "dynamic": False,
            "actorder": "group" if self.indexed else None,
        }
        if self.format in _SCALES:
            weights["scale_dtype"] = _SCALES[self.format]
        return {"format": self.format, "weights": weights, "input_activations": self._inputs(), "output_activations": None}

    def _inputs(self) -> dict[str, Any] | None:
        if not self.activation:
            return None
        kind = next(kind for kind, text in ACTIVATIONS.items() if text == self.activation)
        return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def read_scheme(group: Mapping[str, Any], whole: Any, where: str) -> Scheme:
    """The scheme of one of `config_groups`.

    Args:
      group: its object; whole: `format` of the config, which counts where the group has none; where: for messages.
    Raises:
      ConfigError: by key, for what is not known here.
    """
    outputs = group.get("output_activations")
    check(outputs is None, f"{where}: output_activations", outputs, "quantized outputs of maps; allowed is null")
    activation = _activation(group.get("input_activations"), f"{where}: input_activations")
    known_keys(group, where, dict.fromkeys(("targets", "weights", "format", "input_activations", "output_activations"), ()), ())
    name = group.get("format") or whole
    name = "int-quantized" if name == "naive-quantized" else name
    check_choice(f"{where}: format", name, FORMATS)
    weights = group.get("weights")
    check(isinstance(weights, dict), f"{where}: weights", weights, "expected an object")
    assert isinstance(weights, dict)
    kind, bits = FORMATS[name]
    known: dict[str, tuple[Any, ...]] = {
        "num_bits": bits, "type": (kind,), "symmetric": (True, False), "strategy": STRATEGIES[name], "group_size": (),
        "block_structure": (), "dynamic": (False,), "actorder": (None, False, "static", "weight", "group"),
    }  # fmt: skip
    known_keys(weights, f"{where}: weights", known, _IGNORED)
    for key in ("num_bits", "type", "strategy"):
        check(key in weights, f"{where}: weights: {key}", None, f"is missing; allowed: {', '.join(map(str, known[key]))}")
    symmetric = weights.get("symmetric", True)
    check(symmetric or kind == "int", f"{where}: weights: symmetric", symmetric, "floats have no zeros")
    strategy, size, block = weights["strategy"], weights.get("group_size"), weights.get("block_structure")
    grouped = strategy in ("group", "tensor_group")
    whole_size = type(size) is int and size > 0 and _SIZES.get(name, size) == size
    check(whole_size or not grouped, f"{where}: weights: group_size", size, f"expected {_SIZES.get(name, 'a positive number')}")
    check(grouped or size in (None, -1), f"{where}: weights: group_size", size, f"strategy {strategy} has none")
    two = isinstance(block, list) and len(block) == 2 and all(type(edge) is int and edge > 0 for edge in block)
    check(two or strategy != "block", f"{where}: weights: block_structure", block, "expected two positive numbers")
    edges = (block[0], block[1]) if two and block is not None and strategy == "block" else None
    indexed = weights.get("actorder") == "group"
    return Scheme(name, weights["num_bits"], strategy, symmetric, int(size or 0) if grouped else 0, edges, indexed, activation)


def _activation(found: Any, where: str) -> str:
    """The format of activations as they come, by token; "" where there is none.

    Raises:
      ConfigError: by key, for calibrated scales, scales of a whole batch, and other widths.
    """
    if found is None:
        return ""
    check(isinstance(found, dict), where, found, "expected an object or null")
    known: dict[str, tuple[Any, ...]] = {
        "num_bits": (8,), "type": tuple(ACTIVATIONS), "symmetric": (True,), "strategy": ("token",), "dynamic": (True,),
        "group_size": (None,), "block_structure": (None,), "actorder": (None, False),
    }  # fmt: skip
    known_keys(found, where, known, _IGNORED)
    for key in ("num_bits", "strategy", "dynamic"):
        check(key in found, f"{where}: {key}", None, f"is missing; allowed: {known[key][0]!r}")
    return ACTIVATIONS[found.get("type", "int")]


def scheme_of(spec: FormatSpec, module: str) -> Scheme:
    """The scheme that holds kernels of a format: integers packed, but whole int8 where scales are by channel or tensor.

    Raises:
      ConfigError: none; says what compressed-tensors has.
    """
    check(not spec.indexed or spec.element.startswith("int"), f"{module}: indexed of {spec}", True, "is for integers")
    if spec.element == "fp4_e2m1":
        names = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
        base = str(spec).partition(":")[0]
        check_choice(f"{module}: format {spec}", base, names)
        check(spec.axis == -2, f"{module}: axis of {spec}", spec.axis, "allowed is -2: groups lie along the inputs")
        return Scheme(names[base], 4, "group" if base == "mxfp4" else "tensor_group", True, spec.size[0])
    if spec.element == "fp8_e4m3":
        check_choice(f"{module}: granularity of {spec}", spec.granularity, ("tensor", "channel", "block"))
        check_choice(f"{module}: scale of {spec}", spec.scale, ("f32", "f16", "bf16"))
        check(spec.second == "none", f"{module}: second of {spec}", spec.second, "allowed is 'none'")
        block = (spec.size[1], spec.size[0]) if spec.granularity == "block" else None
        return Scheme("float-quantized", 8, spec.granularity, True, 0, block)
    integers = spec.element.startswith("int")
    check(integers, f"{module}: format", str(spec), "compressed-tensors has int2 to int8, fp8_e4m3, mxfp4 and nvfp4")
    check_choice(f"{module}: granularity of {spec}", spec.granularity, ("tensor", "channel", "group"))
    name = "int-quantized" if spec.bits == 8 and spec.granularity != "group" else "pack-quantized"
    group = spec.size[0] if spec.granularity == "group" else 0
    return Scheme(name, spec.bits, spec.granularity, spec.symmetric != "asym", group, None, spec.indexed)
