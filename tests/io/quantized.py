"""Models whose kernels are QTensors, for tests of what is written and read of them."""

import dataclasses
import functools

import jax

from sparsejax import nnx_compat
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import qtensor


@functools.cache
def quantizer(text):
    return jax.jit(lambda w: qtensor(w, FormatSpec.parse(text)))


def quantized(model, text, sites=""):
    """The model with the kernels of its blocks in a format, by the map's name where it is a dict."""
    values: dict = {}
    for path in model.structure.paths:
        value, name = nnx_compat.at(model.values, path), ".".join(path)
        if name.endswith("kernel") and name.startswith("blocks") and sites in name:
            value = quantizer(text if isinstance(text, str) else text.get(path[-2], "int8"))(value)
        nnx_compat.put(values, path, value)
    return dataclasses.replace(model, values=values)
