"""Rows sorted by group, each group times its own matrix: y[r] = x[r] @ w[group of r]."""

import jax

from kernels_pallas.grouped_matmul.cpu import grouped_matmul_blocked
from kernels_pallas.grouped_matmul.reference import grouped_matmul_reference

__all__ = ["BACKENDS", "grouped_matmul", "grouped_matmul_blocked", "grouped_matmul_reference"]

BACKENDS = ("xla", "cpu")


def grouped_matmul(x, w, groups, *, preferred_element_type=None, backend=None):
    """y[r] = x[r] @ w[g] for row r of group g; rows beyond sum(groups) are zero.

    Args:
      x: [n, K] float or int8 rows, those of one group next to each other, groups in order.
      w: [E, K, N] of x's dtype.
      groups: int32[E], rows per group, zero allowed, sum at most n.
      preferred_element_type: of the result; default x's dtype. Floats accumulate in float32 at least, int8 in int32.
      backend: one of BACKENDS; None: "cpu" where the program is lowered for CPU, else "xla" (`jax.lax.ragged_dot`).
    Raises:
      ValueError: an unknown backend.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"grouped_matmul: backend {backend!r} is not one of {BACKENDS}")
    bodies = {
        "cpu": lambda x, w, groups: grouped_matmul_blocked(x, w, groups, preferred_element_type=preferred_element_type),
        "xla": lambda x, w, groups: grouped_matmul_reference(x, w, groups, preferred_element_type=preferred_element_type),
    }
    if backend is not None:
        return bodies[backend](x, w, groups)
    return jax.lax.platform_dependent(x, w, groups, cpu=bodies["cpu"], default=bodies["xla"])
