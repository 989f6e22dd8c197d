"""Learned orthogonal matrices: how one is parametrised and moved, for any objective that is differentiable in it.

    cayley   R itself, moved along the Stiefel manifold by Cayley's transform ("Efficient Riemannian optimization on the Stiefel
             manifold via the Cayley transform", Li et al., 2020, arXiv 2002.01113), with momentum (SGD) or Adam's moments
    qr       R = Q of qr(Z), signs such that the diagonal of the triangle is positive; Z moved by Adam (DartQuant, 2511.04063)

A matrix is float32 [..., n, n], x becomes x R; leading axes are matrices of their own, in one product. Rounding is undone in
every step of `cayley` by one step of Newton's iteration to the nearest orthogonal matrix (the published code draws a QR with
probability 1/101), and `nearest_orthogonal` settles the last digits in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sparsejax.evaluate.progress import Advance
from sparsejax.plugs import check

Matrices = Float[Array, "*lead n n"]
Arrays = Mapping[str, Array]
Loss = Callable[[Arrays, Arrays, Any], Array]

FIXED_POINT_STEPS = 5
EVALUATED_BATCHES = 8  # at most, to tell whether the end is better than the start
EPSILON = 1e-8


class Parametrisation(Protocol):
    """How orthogonal matrices are held and moved."""

    def initial(self, rotation: Matrices) -> tuple[Array, Any]:
        """(what is differentiated, the optimizer's memory) at these matrices."""
        ...

    def rotation(self, held: Array) -> Matrices:
        """The matrices; differentiable."""
        ...

    def step(self, held: Array, memory: Any, gradient: Array, rate: Array) -> tuple[Array, Any]:
        """Both after one step against the gradient with respect to `held`."""
        ...


class CayleyMemory(NamedTuple):
    """First moment [..., n, n], second moment [..., 1, 1] of the gradient's norm, steps taken."""

    first: Array
    second: Array
    steps: Array


@dataclass(frozen=True)
class Cayley:
    """Cayley SGD, or with `second` > 0 Cayley Adam.

    momentum: of the first moment; published 0 (SpinQuant) and .9 (Adam). second: decay of the second, published .99.
    """

    momentum: float = 0.0
    second: float = 0.0

    def initial(self, rotation: Matrices) -> tuple[Array, CayleyMemory]:
        held = jnp.asarray(rotation, jnp.float32)
        return held, CayleyMemory(jnp.zeros_like(held), jnp.zeros((*held.shape[:-2], 1, 1)), jnp.zeros(()))

    def rotation(self, held: Array) -> Matrices:
        return held

    def step(self, held: Array, memory: CayleyMemory, gradient: Array, rate: Array) -> tuple[Array, CayleyMemory]:
        """V = mu V - g^T, A the skew part of V X - X^T X V X / 2, X^T <- Cayley of alpha A; alpha at most 1 / ||A||_1."""
        turned = held.mT
        count = memory.steps + 1
        weight = 1 - self.momentum if self.second else 1.0
        v = self.momentum * memory.first - weight * gradient.mT
        size, scale = memory.second, jnp.ones(())
        if self.second:
            size = self.second * size + (1 - self.second) * jnp.sum(jnp.square(gradient), (-2, -1), keepdims=True)
            scale = (1 - self.momentum**count) * jnp.sqrt(size / (1 - self.second**count) + EPSILON)
        m = v @ held
        m = m - 0.5 * turned @ (held @ m)
        skew = (m - m.mT) / scale
        alpha = jnp.minimum(rate, 1 / (jnp.max(jnp.sum(jnp.abs(skew), -2, keepdims=True), -1, keepdims=True) + EPSILON))
        y = turned + alpha * v / scale
        for _ in range(FIXED_POINT_STEPS):
            y = turned + alpha * skew @ (0.5 * (turned + y))
        moved = y.mT
        return 1.5 * moved - 0.5 * moved @ (moved.mT @ moved), CayleyMemory(scale * skew @ turned, size, count)


@dataclass(frozen=True)
class Qr:
    """The orthogonal factor of a free matrix, moved by Adam."""

    def initial(self, rotation: Matrices) -> tuple[Array, Any]:
        held = jnp.asarray(rotation, jnp.float32)
        return held, optax.scale_by_adam().init(held)

    def rotation(self, held: Array) -> Matrices:
        q, r = jnp.linalg.qr(held)
        return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]

    def step(self, held: Array, memory: Any, gradient: Array, rate: Array) -> tuple[Array, Any]:
        update, memory = optax.scale_by_adam().update(gradient, memory)
        return held - rate * update, memory


class Learned(NamedTuple):
    """What `learn` found.

    Fields:
      rotations: float64, orthogonal.
      free: the other parameters.
      before, after: the mean objective of the first batches, at the start and at the end.
      path: the objective of each step's batch.
    """

    rotations: dict[str, np.ndarray]
    free: dict[str, np.ndarray]
    before: float
    after: float
    path: list[float]


def learn(
    loss: Loss,
    rotations: Mapping[str, np.ndarray],
    batches: Sequence[Any],
    parametrisation: Parametrisation,
    *,
    rate: float,
    steps: int,
    free: Mapping[str, np.ndarray] | None = None,
    free_rate: float = 0.0,
    advance: Advance = lambda count: None,
) -> Learned:
    """Orthogonal matrices that lower an objective; the start where they do not.

    Args:
      loss: (rotations, free parameters, batch) -> a number; traced.
      rotations: where to start, by name, [..., n, n].
      batches: taken in turns.
      rate: the first; it falls to zero along half a cosine.
      free: parameters without a constraint, moved by Adam at `free_rate`, which falls likewise.
      advance: takes the number of steps just finished.
    Raises:
      ConfigError: no batch, or an objective that is no number at the start.
    """
    check(len(batches), "learned rotation: batches", len(batches), "there must be one at least")
    held, memory = {}, {}
    for name, rotation in rotations.items():
        held[name], memory[name] = parametrisation.initial(jnp.asarray(rotation, jnp.float32))
    given = {name: jnp.asarray(value, jnp.float32) for name, value in (free or {}).items()}
    adam = optax.scale_by_adam()

    def total(held: Arrays, free: Arrays, batch: Any) -> Array:
        return loss({name: parametrisation.rotation(value) for name, value in held.items()}, free, batch)

    @jax.jit
    def move(held: Any, memory: Any, free: Any, moments: Any, gradients: Any, share: Array) -> Any:
        of_held, of_free = gradients
        moved = {name: parametrisation.step(held[name], memory[name], of_held[name], rate * share) for name in held}
        updates, moments = adam.update(of_free, moments)
        free = jax.tree.map(lambda p, u: p - free_rate * share * u, free, updates)
        return {n: one for n, (one, _) in moved.items()}, {n: one for n, (_, one) in moved.items()}, free, moments

    # The one large program; evaluating with it costs a gradient too many and saves compiling the model a second time.
    gradient = jax.jit(jax.value_and_grad(total, (0, 1)))

    def evaluate(held: Any, free: Any) -> float:
        return float(np.mean([gradient(held, free, batch)[0] for batch in batches[:EVALUATED_BATCHES]]))

    start, free_start = dict(held), dict(given)
    before = evaluate(held, given)
    check(np.isfinite(before), "learned rotation: objective", before, "is no number at the start; look for NaN in the weights")
    moments, path = adam.init(given), []
    for number in range(steps):
        share = jnp.float32(0.5 * (1 + np.cos(np.pi * number / steps)))
        value, gradients = gradient(held, given, batches[number % len(batches)])
        held, memory, given, moments = move(held, memory, given, moments, gradients, share)
        path.append(float(value))
        advance(1)
    after = evaluate(held, given)
    if not after < before:
        held, given, after = start, free_start, before
    found = {name: nearest_orthogonal(parametrisation.rotation(value)) for name, value in held.items()}
    return Learned(found, {name: np.asarray(value) for name, value in given.items()}, before, after, path)


def nearest_orthogonal(matrix: Any) -> Float[np.ndarray, "*lead n n"]:
    """U V^T of the singular value decomposition, float64."""
    u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64))
    return u @ vt
