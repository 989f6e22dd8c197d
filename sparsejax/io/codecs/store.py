"""What every way of storing quantized maps looks like from here, and a checkpoint that is stored so, as a `TensorSource`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from sparsejax.io.tensors import TensorInfo, TensorSource
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, check
from sparsejax.quantized_arrays import QTensor

Parts = Mapping[str, np.ndarray]  # what follows the map's name and a dot, e.g. `qweight` -> the tensor


class Store(Protocol):
    """How the maps of a checkpoint are stored, by its `quantization_config`; each is a file of this folder.

    mark: a map X is stored this way where there is a tensor `X.MARK`.
    suffixes: all that a map may have, without its bias.
    """

    mark: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> Store:
        """The store that a `quantization_config` describes; ConfigError, by key, for what is not known."""
        ...

    @classmethod
    def fitting(cls, specs: Mapping[str, FormatSpec], plain: tuple[str, ...]) -> Store:
        """The store that holds maps of these formats, by published name, beside `plain` ones; ConfigError if none does."""
        ...

    def document(self) -> dict[str, Any]:
        """The `quantization_config`."""
        ...

    def shape(self, module: str, parts: Parts) -> tuple[int, int]:
        """(out, in) of a map."""
        ...

    def decode(self, module: str, parts: Parts, dtype: Any) -> QTensor:
        """The kernel [in, out] of a map, in the codes and scales stored; ConfigError for what a QTensor cannot hold."""
        ...

    def activation(self, module: str) -> str:
        """The number format to which the inputs of a map are rounded as they come; "": they stay floats."""
        ...

    def encode(self, module: str, tensor: QTensor) -> dict[str, np.ndarray]:
        """The tensors of a kernel [in, out]; ConfigError for what they cannot hold. Decoding gives the same numbers bitwise."""
        ...


def need(parts: Parts, suffix: str, module: str, dtype: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A tensor of a map, of this type and shape.

    Raises:
      ConfigError: it is missing, or of another type or shape; named.
    """
    if suffix not in parts:
        raise ConfigError(f"{module}.{suffix} is missing; there are {', '.join(sorted(parts))}")
    array = parts[suffix]
    check(dtype is None or array.dtype == np.dtype(dtype), f"{module}.{suffix}: type", str(array.dtype), f"expected {dtype}")
    check(shape is None or array.shape == shape, f"{module}.{suffix}: shape", array.shape, f"expected {shape}")
    return array


def need_matrix(parts: Parts, suffix: str, module: str, dtype: Any) -> np.ndarray:
    """The same, of two axes, neither of them empty."""
    array = need(parts, suffix, module, dtype)
    check(array.ndim == 2 and array.size, f"{module}.{suffix}: shape", array.shape, "expected a matrix")
    return array


def known_keys(document: Mapping[str, Any], where: str, known: Mapping[str, tuple[Any, ...]], ignored: tuple[str, ...]) -> None:
    """Raise a ConfigError for a key of a `quantization_config` that may change what the tensors mean.

    Args:
      document: the object; where: its place, for the message.
      known: key -> the values that it may have; no values: any, it is read elsewhere.
      ignored: keys that say how the weights were found, not what they are.
    """
    for key, value in document.items():
        if key in known:
            allowed = known[key]
            fits = not allowed or any(type(value) is type(one) and value == one for one in allowed)  # 4.0 is no number of bits
            check(fits, f"{where}: {key}", value, f"allowed: {', '.join(map(repr, allowed))}")
        else:
            rule = "is not known and may change what the tensors mean; remove the key if it does not"
            check(key in ignored or not value, f"{where}: {key}", value, rule)


class PackedSource:
    """A checkpoint with quantized maps: each of them is one tensor `X.weight` here, which `packed` gives as a QTensor.

    `read` gives its numbers, float32[out, in].
    """

    def __init__(self, source: TensorSource, store: Store):
        self.path: Path = source.path
        self.store, self._source = store, source
        marked = [name.removesuffix(f".{store.mark}") for name in source.tensors if name.endswith(f".{store.mark}")]
        self._stored = {
            f"{module}.weight": {s: f"{module}.{s}" for s in store.suffixes if f"{module}.{s}" in source.tensors}
            for module in marked
        }
        taken = {stored for parts in self._stored.values() for stored in parts.values()}
        self.tensors = {name: info for name, info in source.tensors.items() if name not in taken}
        for name in self._stored:
            shape = self._named(lambda m, parts: store.shape(m, parts), name)
            self.tensors[name] = TensorInfo(shape, np.dtype(np.float32))

    def is_packed(self, name: str) -> bool:
        return name in self._stored

    def packed(self, name: str, dtype: Any) -> QTensor:
        """The kernel [in, out] of a quantized map, to be computed with in `dtype`."""
        return self._named(lambda module, parts: self.store.decode(module, parts, dtype), name)

    def activation(self, name: str) -> str:
        """The format of what enters a quantized map, see `Store.activation`."""
        return self.store.activation(name.removesuffix(".weight"))

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.packed(name, np.float32).dequantize()).T if self.is_packed(name) else self._source.read(name)

    def _named(self, act: Any, name: str) -> Any:
        parts = {suffix: self._source.read(stored) for suffix, stored in self._stored[name].items()}
        try:
            return act(name.removesuffix(".weight"), parts)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error
