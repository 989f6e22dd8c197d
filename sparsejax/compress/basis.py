"""Orthogonal bases: of what flows (principal components), of weights (singular vectors), and fixed ones (Hadamard, random).

A basis is float64 [D, D] with orthonormal columns; x becomes x Q.

    eigenbasis(C)       columns are the eigenvectors of C, by descending eigenvalue. C = mean x^T x gives the (uncentred)
                        principal components; C = W W^T the left singular vectors of a kernel W [in, out]
    hadamard_basis(D)   a Kronecker product of Hadamard matrices, every entry +-1 / sqrt(D), where Sylvester's and Paley's
                        constructions reach D (576 = 12 * 12 * 2 * 2); else a Hartley matrix fills the rest
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# What an order costs that no Hadamard construction here reaches; larger than any sum of orders.
_UNREACHED = 10**9


def eigenbasis(moment: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """Eigenvectors of a symmetric matrix by descending eigenvalue; of each the largest entry is positive.

    The published damping, C + .01 mean(diag C) I, moves eigenvalues alone and so has no place here.
    """
    _, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    vectors = vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return vectors * np.where(largest < 0, -1.0, 1.0)


def random_basis(width: int, seed: int) -> Float[np.ndarray, "D D"]:
    """A rotation drawn uniformly (Haar): QR of Gaussians with the signs of R's diagonal."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return q * np.sign(np.diag(r))


def hadamard_basis(width: int, seed: int | None = None) -> Float[np.ndarray, "D D"]:
    """The Kronecker product of `orthogonal_factors(width)`; with a seed, of rows with random signs (as in QuaRot)."""
    basis = np.ones((1, 1))
    for factor in orthogonal_factors(width):
        basis = np.kron(basis, factor)
    if seed is None:
        return basis
    return np.random.default_rng(seed).choice([-1.0, 1.0], width)[:, None] * basis


def orthogonal_factors(width: int) -> list[np.ndarray]:
    """Orthonormal matrices, largest first, whose Kronecker product has this width: Hadamard ones, and a Hartley one for what is
    left where no product of them reaches it. A fast transform multiplies by them one after another."""
    plan = _cheapest(width)
    factors = [hadamard(order) / np.sqrt(order) for order in sorted(plan.orders, reverse=True)]
    return [*([hartley(plan.rest)] if plan.rest > 1 else []), *factors]


def hartley(size: int) -> Float[np.ndarray, "N N"]:
    """cas(2 pi i j / N) / sqrt(N), cas = cos + sin: real, symmetric, orthonormal, entries at most sqrt(2 / N)."""
    angle = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(size)


def hadamard(order: int) -> np.ndarray:
    """A Hadamard matrix [N, N], rows of +-1: order 2, q + 1 with a prime q = 3 mod 4, or 2 (q + 1) with a prime q = 1 mod 4.

    Raises:
      ValueError: no construction here has this order; `orthogonal_factors` composes others.
    """
    if order == 2:
        return np.array([[1.0, 1.0], [1.0, -1.0]])
    if _is_paley_one(order):
        return _paley_one(order - 1)
    if _is_paley_two(order):
        return _paley_two(order // 2 - 1)
    raise ValueError(f"no Hadamard matrix of order {order} is constructed here")


class _Plan(NamedTuple):
    cost: int
    orders: tuple[int, ...]
    rest: int


@functools.cache
def _cheapest(width: int) -> _Plan:
    """Orders whose product is width: the smallest rest, then the smallest sum, the cost of a fast transform per channel."""
    best = _Plan(0 if width == 1 else _UNREACHED * width, (), width)
    for order in _divisors(width):
        if order == 2 or _is_paley_one(order) or _is_paley_two(order):
            left = _cheapest(width // order)
            best = min(best, _Plan(order + left.cost, (order, *left.orders), left.rest))
    return best


def _divisors(width: int) -> list[int]:
    small = [d for d in range(1, int(width**0.5) + 1) if width % d == 0]
    return sorted({*small, *(width // d for d in small)})


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _is_paley_one(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_paley_two(order: int) -> bool:
    return order % 4 == 0 and order // 2 % 4 == 2 and _is_prime(order // 2 - 1)


def _jacobsthal(q: int) -> np.ndarray:
    """[q, q] of chi(i - j): 1 at squares modulo q, -1 at others, 0 at 0."""
    chi = np.full(q, -1.0)
    chi[np.arange(q) ** 2 % q] = 1.0
    chi[0] = 0.0
    return chi[(np.arange(q)[:, None] - np.arange(q)) % q]


def _bordered(q: int, corner: float) -> np.ndarray:
    c = np.ones((q + 1, q + 1))
    c[0, 0], c[1:, 0], c[1:, 1:] = 0.0, corner, _jacobsthal(q)
    return c


def _paley_one(q: int) -> np.ndarray:
    """I + S with S skew (Paley, 1933)."""
    return np.eye(q + 1) + _bordered(q, -1.0)


def _paley_two(q: int) -> np.ndarray:
    """C kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]] with C symmetric (Paley, 1933)."""
    ones, turned = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(_bordered(q, 1.0), ones) + np.kron(np.eye(q + 1), turned)
