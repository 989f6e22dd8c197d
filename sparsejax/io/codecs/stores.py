"""Which store a `quantization_config` names, and which a model is exported in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from sparsejax.io.codecs.awq import Awq
from sparsejax.io.codecs.bitsandbytes import BitsAndBytes
from sparsejax.io.codecs.compressed_tensors import CompressedTensors
from sparsejax.io.codecs.gptq import Gptq
from sparsejax.io.codecs.store import Store
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check, check_choice

KEY = "quantization_config"
READERS: dict[str, Callable[[Mapping[str, Any], str], Store]] = {
    "gptq": Gptq.read,
    "awq": Awq.read,
    "compressed-tensors": CompressedTensors.read,
    "bitsandbytes": BitsAndBytes.read,
}
# What `--format` names, and what chooses the store for the formats of a model's maps.
EXPORTS: dict[str, Callable[[Mapping[str, FormatSpec], tuple[str, ...]], Store]] = {
    "compressed-tensors": CompressedTensors.fitting,
    "gptq": Gptq.fitting,
    "gptq_v2": functools.partial(Gptq.fitting, version=2),
    "awq": Awq.fitting,
}


def without_quantization(published: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as it was before its model was quantized: what a family reads."""
    return {key: value for key, value in published.items() if key != KEY}


def store_of(published: Mapping[str, Any], path: str) -> Store | None:
    """How the maps of a `config.json` are stored; None where nothing is quantized.

    Raises:
      ConfigError: a method that is not known, or a key of it; names the file and the key.
    """
    document, where = published.get(KEY), f"{path}: config.json: {KEY}"
    if not document:
        return None
    check(isinstance(document, dict), where, document, "expected an object")
    method = document.get("quant_method")
    check_choice(f"{where}: quant_method", method, READERS)
    return READERS[method](document, where)
