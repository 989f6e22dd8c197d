"""The name of a number format: what its codes stand for, which of them share a scale, and how both are stored.

    element[:option,...]    int4  int4:asym,group=128,ragged=tail  nf4:group=64,double  fp8_e4m3:token,static  mxfp4:rule=ceil

The element is one of `grids.ELEMENTS`, or a published format (`PUBLISHED`), an element with its options. Options are words
(`tensor`, `channel`, `token`; `narrow`, `full15`, `signed_max`, `asym`; `double`, `two_level`; `static`; `indexed`) and values
(`group=64`, `block=128x128`, `axis=-1`, `ragged=tail`, `round=away`, `zero=float`, `scale=bf16`, `rule=ceil`, `codes=exact`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from sparsejax.ops.formats.grids import ELEMENTS, INTEGERS, LOGARITHMS, Grid, grid_of
from sparsejax.ops.formats.rounding import ROUNDINGS
from sparsejax.plugs import ConfigError, check, check_choice, nearest, parse_int

SYMMETRIC = ("narrow", "full15", "signed_max", "asym")
RAGGED = ("error", "pad", "tail")
ZEROS = ("int", "float", "min")
SCALES = ("f32", "f16", "bf16", "e8m0", "e4m3")
RULES = ("floor", "round175", "ceil", "rne")
SECOND = ("none", "double", "two_level")
CODES = ("stored", "exact")
WHOLE = ("tensor", "channel", "token")
DOUBLE_BLOCK = 256  # scales that share a second-level scale

_MX: dict[str, Any] = dict(granularity="group", size=(32,), scale="e8m0")
_GGML: dict[str, Any] = dict(granularity="group", size=(32,), scale="f16", codes="exact")
_OFFSET: dict[str, Any] = dict(symmetric="asym", zero="min", rounding="half_up")
_SIGNED_MAX: dict[str, Any] = dict(symmetric="signed_max", rounding="half_up")
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    # OCP Microscaling 1.0 (2310.10537)
    "mxfp8_e4m3": {"element": "fp8_e4m3", **_MX},
    "mxfp8_e5m2": {"element": "fp8_e5m2", **_MX},
    "mxfp6_e2m3": {"element": "fp6_e2m3", **_MX},
    "mxfp6_e3m2": {"element": "fp6_e3m2", **_MX},
    "mxfp4": {"element": "fp4_e2m1", **_MX},
    "mxint8": {"element": "int8", **_MX},
    "nvfp4": dict(element="fp4_e2m1", granularity="group", size=(16,), scale="e4m3", second="two_level"),
    # llama.cpp's blocks, quantized as its C code does
    "q4_0": {"element": "int4", **_GGML, **_SIGNED_MAX},
    "q4_1": {"element": "int4", **_GGML, **_OFFSET},
    "q5_0": {"element": "int5", **_GGML, **_SIGNED_MAX},
    "q5_1": {"element": "int5", **_GGML, **_OFFSET},
    "q8_0": {"element": "int8", **_GGML, "rounding": "away"},
}

# Option -> the field that it sets, where it is `option=value`.
_VALUED = {"axis": "axis", "ragged": "ragged", "round": "rounding", "zero": "zero", "scale": "scale", "rule": "rule",
           "codes": "codes"}  # fmt: skip
_WORDS: dict[str, tuple[str, Any]] = {
    **{word: ("granularity", word) for word in WHOLE},
    **{word: ("symmetric", word) for word in SYMMETRIC},
    **{word: ("second", word) for word in SECOND[1:]},
    "static": ("static", True),
    "indexed": ("indexed", True),
}
OPTIONS = (*_WORDS, "group", "block", *_VALUED)


@dataclasses.dataclass(frozen=True, repr=False)
class FormatSpec:
    """A number format; hashable, and the same as its string: `FormatSpec.parse(str(spec)) == spec`.

    Axes are those of the array at hand, of which the last two count: of a kernel [in, out], -2 is the input axis; of an
    activation [..., T, in] it is the tokens', and -1 the one that is contracted.

    element: of `grids.ELEMENTS`.
    granularity: what shares a scale. `tensor`: the whole trailing matrix. `channel`: all of axis -2, so that each output of a
      kernel has its own. `token`: all of axis -1. `group`: `size` = (g,) consecutive entries along `axis`. `block`: `size` =
      (a, b) of axes -2 and -1.
    ragged: what becomes of a last group that is not full: `error`, `tail` (it is a shorter one), or `pad` (codes are filled up
      to whole groups, for kernels that read nothing else; the scale is that of the true entries).
    symmetric: of integers of b bits with h = 2^(b-1). `narrow`: scale amax / (h - 1), codes +-(h - 1). `full15`: scale
      2 amax / (2h - 1), codes -h to h - 1, so that +amax clips by half a step (GPTQ, 15 steps at 4 bits). `signed_max`: scale
      -m / h of the entry m of largest magnitude, of either sign, codes -h to h - 1 (GGUF Q4_0). `asym`: scale
      (max - min) / (2h - 1), codes 0 to 2h - 1 and a zero.
    zero: of `asym`. `int`: a code, b bits, x = (q - z) s, the range holds 0. `float`: z is stored like the scale (HQQ). `min`:
      x = q s + m with the least entry m stored like the scale (GGUF's _1 types, key-value caches).
    rounding: of `rounding.ROUNDINGS`.
    scale: storage of the scales; "" becomes `f16` for groups and blocks, but `f32` for tables and for `double`, `e4m3` for
      `two_level`; and `f32` for all else. `e8m0`: powers of two, one byte; `e4m3`: FP8.
    rule: how e8m0 takes the exponent of amax / (greatest element): `floor` of both exponents (OCP; the largest may saturate),
      `round175` (up where amax's mantissa reaches 1.75, as compressed-tensors), `ceil` (nothing saturates), `rne` (amax to the
      nearest power of two).
    second: `double`: scales less their mean as 8-bit dynamic codes, in blocks of 256 in the order of [out, in] (QLoRA);
      `two_level`: float32 G = 448 greatest / amax of the matrix, stored scales are G times the true ones (NVFP4).
    static: scales come from calibration and are never computed from the tensor at hand.
    codes: by the `stored` scale, or by the `exact` one in float32 before it is rounded for storage (ggml).
    indexed: groups along -2 are not of neighbours: each entry of that axis has the number of its group (GPTQ's g_idx), which a
      solver chooses and nothing here does.
    """

    element: str
    granularity: str = "channel"
    size: tuple[int, ...] = ()
    axis: int = -2
    ragged: str = "error"
    symmetric: str = "narrow"
    zero: str = "int"
    rounding: str = "even"
    scale: str = ""
    rule: str = "floor"
    second: str = "none"
    static: bool = False
    codes: str = "stored"
    indexed: bool = False

    def __post_init__(self) -> None:
        if not self.scale:
            object.__setattr__(self, "scale", _default_scale(self))
        for name, value, allowed in (
            ("element", self.element, ELEMENTS),
            ("granularity", self.granularity, (*WHOLE, "group", "block")),
            ("axis", self.axis, (-2, -1)),
            ("ragged", self.ragged, RAGGED),
            ("symmetric", self.symmetric, SYMMETRIC),
            ("zero", self.zero, ZEROS),
            ("round", self.rounding, ROUNDINGS),
            ("scale", self.scale, SCALES),
            ("rule", self.rule, RULES),
            ("second", self.second, SECOND),
            ("codes", self.codes, CODES),
        ):
            check_choice(name, value, allowed)
        self._check_size()
        self._check_scale()

    def _check_size(self) -> None:
        count = {"group": 1, "block": 2}.get(self.granularity, 0)
        whole = len(self.size) == count and all(isinstance(size, int) and size > 0 for size in self.size)
        check(whole, self.granularity, self.size, f"needs {count} positive whole numbers")
        grouped = self.granularity in ("group", "block")
        check(self.ragged == "error" or grouped, "ragged", self.ragged, "is for groups and blocks")
        check(self.axis == -2 or self.granularity == "group", "axis", self.axis, "is for groups")
        sortable = self.granularity == "group" and self.axis == -2 and self.ragged != "pad" and self.second != "double"
        check(not self.indexed or sortable, "indexed", True, "is for groups along axis -2, not with ragged=pad or double")

    def _check_scale(self) -> None:
        integers = self.element in INTEGERS
        check(self.symmetric == "narrow" or integers, "symmetric", self.symmetric, f"is for integers, not {self.element}")
        check(self.zero == "int" or self.symmetric == "asym", "zero", self.zero, "is for asym")
        check(self.rule == "floor" or self.scale == "e8m0", "rule", self.rule, "is for scale=e8m0")
        narrow = self.symmetric == "narrow" and self.statistic == "magnitude" and self.element not in LOGARITHMS
        fits = narrow or self.scale not in ("e8m0", "e4m3")
        check(fits, "scale", self.scale, f"holds no scale of {self.element} {self.symmetric}")
        doubled = self.granularity in ("group", "block") and self.scale == "f32" and self.zero == "int"
        check(self.second != "double" or doubled, "second", "double", "is for the float32 scales of groups and blocks")
        check(self.second != "two_level" or self.scale == "e4m3", "second", "two_level", "is for scale=e4m3")
        rounded = self.scale in ("f16", "bf16") and (self.symmetric != "asym" or self.zero == "min")
        check(self.codes == "stored" or rounded, "codes", self.codes, "is for scale=f16 and bf16, and no zero or zero=min")

    @property
    def grid(self) -> Grid:
        """What the codes stand for, before the scale."""
        return grid_of(self.element, self.symmetric)

    @property
    def bits(self) -> int:
        """Of a code; ternary digits are packed closer than their 2."""
        return self.grid.bits

    @property
    def statistic(self) -> str:
        """What a group's scale is made of: `mean` |x|, its `magnitude` max |x|, or its `range` (least, greatest)."""
        if self.element in ("ternary", "binary"):
            return "mean"
        return "range" if self.symmetric in ("asym", "signed_max") else "magnitude"

    @property
    def multiplies_as_integers(self) -> bool:
        """Whether x @ w is a product of integers, scaled afterwards by output: no zero, no scale along the inputs."""
        symmetric = (self.element in INTEGERS and self.symmetric != "asym") or self.element == "ternary"
        return symmetric and self.granularity in ("tensor", "channel") and self.scale not in ("e8m0", "e4m3")

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Entries along axes -2 and -1 of a matrix of this shape that share a scale.

        Raises:
          ConfigError: the last group would not be full, and `ragged` is `error`.
        """
        rows, columns = shape
        blocks: dict[str, tuple[int, ...]] = {
            "tensor": (rows, columns),
            "channel": (rows, 1),
            "token": (1, columns),
            "group": (*self.size, 1) if self.axis == -2 else (1, *self.size),
            "block": self.size,
        }
        block = blocks[self.granularity]
        rest = [(length, size) for length, size in zip(shape, block, strict=True) if length % size]
        for length, size in rest if self.ragged == "error" else []:
            fitting = max(g for g in range(1, size) if length % g == 0)
            raise ConfigError(f"format = {str(self)!r}: {length} channels are no multiple of {size}; "
                              f"allowed are ragged=tail, ragged=pad, or groups that divide it, such as {fitting}")
        return block[0], block[1]

    def padded(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the codes of a packed matrix of this shape."""
        block = self.block(shape)
        fill = self.ragged == "pad"
        rows, columns = (-(-length // size) * size if fill else length for length, size in zip(shape, block, strict=True))
        return rows, columns

    @classmethod
    def parse(cls, text: str, field: str = "format") -> FormatSpec:
        """The spec that a string names.

        Args:
          text: as above.
          field: where the string was found, for the message.
        Raises:
          ConfigError: names the field, what was given, what is allowed and the nearest spelling.
        """
        check(isinstance(text, str), field, text, "expected the name of a number format as a string")
        name, _, tail = text.strip().partition(":")
        check_choice(f"{field}: element", name, (*ELEMENTS, *PUBLISHED))
        fields: dict[str, Any] = dict(PUBLISHED.get(name, {"element": name}))
        given: set[str] = set()
        for part in tail.split(",") if tail.strip() else []:
            changes = _option(part.strip(), f"{field} = {text!r}")
            twice = sorted(given & set(changes))
            check(not twice, field, text, f"{part.strip()!r} sets what was set before ({', '.join(twice)})")
            given |= set(changes)
            fields |= changes
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{field} = {text!r}: {error}") from error

    def __str__(self) -> str:
        return _text(self)

    def __repr__(self) -> str:
        return f"FormatSpec({str(self)!r})"


def _default_scale(spec: FormatSpec) -> str:
    tables = ("nf4", "fp4_bnb", "iq4_nl")
    plain = spec.granularity in WHOLE or spec.second == "double" or spec.element in tables
    return "f32" if plain else "e4m3" if spec.second == "two_level" else "f16"


def _option(part: str, where: str) -> dict[str, Any]:
    """The fields that one option sets."""
    name, equals, value = (word.strip() for word in part.partition("="))
    if name not in OPTIONS or bool(equals) == (name in _WORDS):
        spelled = [word if word in _WORDS else f"{word}=" for word in OPTIONS]
        hint = nearest(f"{name}=" if equals else name, spelled)
        raise ConfigError(f"{where}: option {part!r}: allowed are {', '.join(spelled)}.{hint}")
    if name in _WORDS:
        field, chosen = _WORDS[name]
        return {"granularity": chosen, "size": (), "axis": -2} if field == "granularity" else {field: chosen}
    check(value, f"{where}: {name}", value, "needs a value")
    if name in ("group", "block"):
        return {"granularity": name, "size": tuple(_whole(number, name, where) for number in value.split("x"))}
    return {_VALUED[name]: _whole(value, name, where) if name == "axis" else value}


def _whole(text: str, name: str, where: str) -> int:
    try:
        return parse_int(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {name} = {text!r}: expected a whole number") from error


@functools.cache
def _text(spec: FormatSpec) -> str:
    """The one spelling of a spec: by a published format, where it changes no option that this sets, else by its element."""
    for name, fields in PUBLISHED.items():
        if all(getattr(spec, field) == value for field, value in fields.items() if field != "rounding"):
            return _spelled(spec, name, {**_DEFAULTS, **fields})
    return _spelled(spec, spec.element, {**_DEFAULTS, "scale": _default_scale(spec)})


def _spelled(spec: FormatSpec, name: str, base: Mapping[str, Any]) -> str:
    """`name` and the options that make `spec` of what the name alone stands for."""
    size = "x".join(map(str, spec.size))
    options = {
        "symmetric": spec.symmetric,
        "granularity": f"{spec.granularity}={size}" if size else spec.granularity,
        **{field: f"{option}={getattr(spec, field)}" for option, field in _VALUED.items()},
        "second": spec.second,
        "static": "static",
        "indexed": "indexed",
    }
    changes = [text for field, text in options.items() if getattr(spec, field) != base[field]]
    return f"{name}:{','.join(changes)}" if changes else name


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(FormatSpec) if field.name != "element"}
