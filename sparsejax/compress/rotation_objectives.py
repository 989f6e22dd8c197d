"""What learned rotations minimise: of tensors that are going to be rounded, or of the logits that come of it.

    kurtosis     mean (y - mu)^4 / sigma^4 over all entries: uniform 1.8, normal 3, Laplace 6; |kurtosis - 1.8| (KurTail)
    whip         mean exp(-|y|): small entries are pushed outward, which under a fixed length pulls outliers in (DartQuant)
    KL-Top       KL of the teacher's k largest logits, both renormalised over these k (OSTQuant)
    QSUR         log of the volume of N(0, C)'s ellipsoid over that of the cube that bounds it (OSTQuant); how well a tensor
                 fills the grid that all its channels share
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

UNIFORM_KURTOSIS = 1.8


def kurtosis(y: Array) -> Float[Array, ""]:
    """Of all entries together; without a unit."""
    centred = y - jnp.mean(y)
    return jnp.mean(centred**4) / jnp.mean(centred**2) ** 2


def kurtosis_gap(y: Array) -> Float[Array, ""]:
    """|kurtosis - that of the uniform distribution|."""
    return jnp.abs(kurtosis(y) - UNIFORM_KURTOSIS)


def whip(y: Array) -> Float[Array, ""]:
    """Mean of exp(-|y|), for entries of root mean square 1; its gradient at 0 is 0."""
    return jnp.mean(jnp.exp(-jnp.abs(y)))


def cross_entropy(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean nats of each token but the first of a row."""
    logs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logs, tokens[:, 1:, None], -1))


def kl_top(
    teacher: Float[Array, "... k"], indices: Int[Array, "... k"], logits: Float[Array, "... V"]
) -> Float[Array, ""]:
    """Mean over tokens of KL(p || q), p and q the softmax of the teacher's and the student's logits at the same k entries.

    Args:
      teacher, indices: the teacher's largest logits and where they stand (`jax.lax.top_k`).
    """
    logs_p = jax.nn.log_softmax(teacher.astype(jnp.float32))
    logs_q = jax.nn.log_softmax(jnp.take_along_axis(logits, indices, -1).astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(logs_p) * (logs_p - logs_q), -1))


def log_qsur(covariance: Float[np.ndarray, "D D"]) -> float:
    """log V_ball(D) + log det C / 2 - D log (2 max_i sqrt C_ii); at most V_ball(D) / 2^D, where C is a multiple of I."""
    covariance = np.asarray(covariance, np.float64)
    size = len(covariance)
    ball = size / 2 * math.log(math.pi) - math.lgamma(size / 2 + 1)
    _, logdet = np.linalg.slogdet(covariance)
    return float(ball + logdet / 2 - size * math.log(2 * math.sqrt(np.diag(covariance).max())))
