"""Functions of the library compiled as a whole: called as they are, each of their operations is compiled by itself."""

import jax

from sparsejax.ops.formats import quantize
from sparsejax.quantized_arrays import QTensor

dequantized = jax.jit(QTensor.dequantize)
fake = jax.jit(quantize.fake, static_argnums=1)
qparams = jax.jit(quantize.qparams, static_argnums=1)
