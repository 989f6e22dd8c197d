"""SR-STE: training n:m sparse networks from scratch (Zhou et al., 2021, arXiv 2102.04010).

Acts on the kernel of a linear map, as the weight op `sr_ste:2,4`; groups are m consecutive inputs of an output:

    W~ = W * M,          M: the n largest |w| of every group, chosen anew in every step
    dL/dW = dL/dW~ + decay * (1 - M) * W         the gradient reaches pruned weights too; these are pulled towards zero

decay = 0 is the plain straight-through estimator. Published: decay 2e-4, added to the gradient before momentum, for SGD.
An optimizer that divides by the gradient's size (Adam) divides the pull as well: its strength is another than with SGD. With
gradient accumulation it is added once in every microbatch, so that `accumulate` microbatches pull that many times as hard.
A flip is a weight whose mask changed; `flip_share` is the paper's SAD between two checkpoints, as a share of all weights.
The forward pass of serving is that of training; `pack_n_of_m` stores what is kept alone.
Not here: the decay decoupled from the optimizer, since a weight op sees gradients and not updates.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsejax.context import Context
from sparsejax.ops.selectors import n_of_m_mask
from sparsejax.plugs import check, register
from sparsejax.sparse_arrays import NMSparse


@functools.partial(jax.jit, static_argnums=(1, 2))
def n_of_m_inputs(w: Float[Array, "*lead in out"], n: int, m: int) -> Bool[Array, "*lead in out"]:
    """True at the n largest magnitudes of every m consecutive inputs of an output; ties to the lowest input."""
    return jnp.swapaxes(n_of_m_mask(jnp.swapaxes(jnp.abs(w), -1, -2), n, m), -1, -2)


def flip_share(before: Float[Array, "*lead in out"], after: Float[Array, "*lead in out"], n: int, m: int) -> Float[Array, ""]:
    """The share of weights whose mask differs between two checkpoints."""
    return jnp.mean(n_of_m_inputs(before, n, m) != n_of_m_inputs(after, n, m))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _pruned(w: Array, n: int, m: int, decay: float) -> Array:
    return jnp.where(n_of_m_inputs(w, n, m), w, 0)


def _forward(w: Array, n: int, m: int, decay: float) -> tuple[Array, Array]:
    keep = n_of_m_inputs(w, n, m)
    return jnp.where(keep, w, 0), jnp.where(keep, 0, w)


def _backward(n: int, m: int, decay: float, dropped: Array, g: Array) -> tuple[Array]:
    return (g + jnp.asarray(decay, g.dtype) * dropped,)


_pruned.defvjp(_forward, _backward)


@register("weight_op", "sr_ste")
@dataclasses.dataclass(frozen=True)
class SRSTE:
    """n of every m consecutive inputs are kept; decay: lambda, of those that are not."""

    n: int = 2
    m: int = 4
    decay: float = 2e-4

    def __post_init__(self) -> None:
        check(1 <= self.n <= self.m, "n", self.n, f"must be 1 to m = {self.m}")
        check(self.decay >= 0, "decay", self.decay, "must not be negative")

    def validate(self, features: int, field: str) -> None:
        """Raise a ConfigError, naming `field`, unless m divides `features`, the inputs."""
        check(features % self.m == 0, f"{field}: sr_ste.m", self.m, f"must divide the inputs, {features}")

    def __call__(self, w: Any, ctx: Context) -> Any:
        """The pruned weight; one that is stored sparse already, and any where n = m, as it is."""
        if isinstance(w, NMSparse) or self.n == self.m:
            return w
        return _pruned(w, self.n, self.m, self.decay)
