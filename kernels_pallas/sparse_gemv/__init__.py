"""A few rows, of each of which few entries count, times a matrix whose other rows need not be read: y = (x * mask) @ w."""

import jax

from kernels_pallas.sparse_gemv.cpu import sparse_gemv_loop
from kernels_pallas.sparse_gemv.reference import sparse_gemv_gather, sparse_gemv_reference
from kernels_pallas.sparse_gemv.rows import Rows, float_rows

__all__ = ["BACKENDS", "Rows", "float_rows", "sparse_gemv", "sparse_gemv_gather", "sparse_gemv_loop", "sparse_gemv_reference"]

BACKENDS = ("masked", "xla", "cpu")


def sparse_gemv(x, mask, w, *, most=None, preferred_element_type=None, backend=None):
    """y = (x * mask) @ w, for few rows of x. Not differentiable.

    Args:
      x: [..., K] floats.
      mask: bool[..., K], the entries that count.
      w: [K, N]. For weights that are stored otherwise there is `sparse_gemv_loop` with `Rows`, on CPU.
      most: no row of mask has more entries than this; None: unknown.
      preferred_element_type: of the result; default x's dtype. Products are accumulated in float32 at least.
      backend: one of BACKENDS; None: "cpu" (a loop over the rows of w that count for any row of x) where the program is lowered
        for CPU, else "xla" (for each row of x those of w are gathered, up to a capacity). "masked", the reference, multiplies
        zeros.
    Raises:
      ValueError: an unknown backend.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"sparse_gemv: backend {backend!r} is not one of {BACKENDS}")
    bodies = {
        "masked": lambda x, m, w: sparse_gemv_reference(x, m, w, preferred_element_type=preferred_element_type),
        "xla": lambda x, m, w: sparse_gemv_gather(x, m, w, most=most, preferred_element_type=preferred_element_type),
        "cpu": lambda x, m, w: sparse_gemv_loop(x, m, w, preferred_element_type=preferred_element_type),
    }
    if backend is not None:
        return bodies[backend](x, mask, w)
    return jax.lax.platform_dependent(x, mask, w, cpu=bodies["cpu"], default=bodies["xla"])
