"""How well a model predicts held-out data: loss, perplexity, bits per byte, accuracy, each with its standard error.

Per-sequence sums are made on the device inside the caller's jitted step (`token_sums`, `label_sums`), kept there while the
batches run, and fetched once at the end; means are taken on the host in float64.

    step = jax.jit(lambda params, batch: token_sums(nll(params, batch), batch["weights"], batch["targets"], token_bytes))
    result = evaluate(lambda batch: step(params, batch), batches)

Classifiers are also asked whether they know how sure they may be: see `calibration_error`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.plugs import ConfigError

CALIBRATION_BINS = 15
_IN_FLIGHT = 8  # batches dispatched beyond the last finished one: bounds the inputs that wait on the device


class Likelihood(NamedTuple):
    """Result of `evaluate`; quantities that were not measured are nan."""

    loss: float  # nats per token (per example, for labels), the weighted mean
    loss_error: float  # its standard error, with the sequence as the unit of sampling
    perplexity: float  # exp(loss)
    bits_per_byte: float  # total nats / ln 2 / UTF-8 bytes of the predicted tokens
    bits_per_byte_error: float
    accuracy: float  # fraction, weighted
    accuracy_error: float
    calibration_error: float  # expected, over `CALIBRATION_BINS` bins of confidence; of labels only
    tokens: float  # sum of the weights
    bytes: float  # UTF-8 bytes of the predicted tokens
    sequences: int  # rows with any weight


def token_sums(
    nll: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    targets: Int[Array, "B T"] | None = None,
    token_bytes: Int[Array, " V"] | None = None,
    correct: Array | None = None,
) -> dict[str, Float[Array, " B"]]:
    """Per sequence sums of a language-model batch; pure, for use inside jit.

    Args:
      nll: negative log-likelihood of each target, nats.
      weights: 0 where a target does not count.
      targets, token_bytes: with both, the UTF-8 bytes of the targets that count are summed; `Tokenizer.token_bytes` [V].
      correct: bool [B, T], whether the target was the most likely token.
    Returns:
      nll, weight, and bytes and correct where they were given; each [B], float32.
    """

    def counted(values: Array) -> Array:
        # A padded position may hold any value, also inf, which a product with 0 would turn into nan.
        return jnp.sum(jnp.where(weights > 0, weights * values, 0), axis=-1, dtype=jnp.float32)

    sums = {"nll": counted(nll), "weight": jnp.sum(weights, axis=-1, dtype=jnp.float32)}
    if targets is not None and token_bytes is not None:
        sums["bytes"] = jnp.sum(jnp.where(weights > 0, token_bytes[targets], 0), axis=-1, dtype=jnp.float32)
    if correct is not None:
        sums["correct"] = counted(correct.astype(jnp.float32))
    return sums


def label_sums(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> dict[str, Float[Array, " B"]]:
    """The same for a classification batch, per example [B].

    Returns:
      nll; weight; correct, whether the label has the largest logit; confidence, the probability of the largest logit.
    """
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    nll = -jnp.take_along_axis(log_probability, labels[:, None], axis=-1)
    correct = jnp.argmax(logits, axis=-1, keepdims=True) == labels[:, None]
    confidence = jnp.where(weights > 0, weights * jnp.exp(jnp.max(log_probability, axis=-1)), 0)
    return {**token_sums(nll, weights[:, None], correct=correct), "confidence": confidence}


def evaluate(
    step: Callable[[Any], Mapping[str, jax.Array]], batches: Iterable[Any], fetch: Callable[[Any], Any] = jax.device_get
) -> Likelihood:
    """`summarise` of `gather`."""
    return summarise(gather(step, batches, fetch))


def gather(
    step: Callable[[Any], Mapping[str, jax.Array]], batches: Iterable[Any], fetch: Callable[[Any], Any] = jax.device_get
) -> dict[str, np.ndarray]:
    """Run `step` over the batches; one fetch, after the last batch was dispatched.

    Args:
      step: batch -> `token_sums` or `label_sums`; on several hosts its outputs must be replicated.
      batches: an iterable that ends.
      fetch: device arrays to numpy.
    Returns:
      The sums of all sequences in order, float64 [N] each.
    Raises:
      ConfigError: no batch.
    """
    found: list[Mapping[str, jax.Array]] = []
    for batch in batches:
        found.append(step(batch))
        if len(found) > _IN_FLIGHT:
            jax.block_until_ready(found[-1 - _IN_FLIGHT])
    if not found:
        raise ConfigError("evaluate: the held-out data gave no batch; fewer examples than one batch holds?")
    fetched = fetch(found)
    return {name: np.concatenate([np.asarray(sums[name], np.float64) for sums in fetched]) for name in fetched[0]}


def summarise(sums: Mapping[str, np.ndarray]) -> Likelihood:
    """Means and standard errors of per-sequence sums.

    Args:
      sums: nll, weight, optionally bytes, correct and confidence, each float64 [N] over all sequences.
    Raises:
      ConfigError: no sequence has any weight.
    """
    used = sums["weight"] > 0
    if not used.any():
        raise ConfigError("evaluate: every target of the held-out batches is masked, so that there is nothing to score")
    nll, weight = sums["nll"][used], sums["weight"][used]
    loss, loss_error = _ratio(nll, weight)
    bits, bits_error = _ratio(nll / math.log(2), sums["bytes"][used]) if "bytes" in sums else (math.nan, math.nan)
    accuracy, accuracy_error = _ratio(sums["correct"][used], weight) if "correct" in sums else (math.nan, math.nan)
    calibration = math.nan
    if "confidence" in sums:
        calibration = calibration_error(sums["confidence"][used] / weight, sums["correct"][used] / weight, weight)
    return Likelihood(
        loss=loss,
        loss_error=loss_error,
        perplexity=float(np.exp(loss)),
        bits_per_byte=bits,
        bits_per_byte_error=bits_error,
        accuracy=accuracy,
        accuracy_error=accuracy_error,
        calibration_error=calibration,
        tokens=float(weight.sum()),
        bytes=float(sums["bytes"][used].sum()) if "bytes" in sums else math.nan,
        sequences=int(used.sum()),
    )


def calibration_error(
    confidence: Float[np.ndarray, " N"],
    correct: Float[np.ndarray, " N"],
    weight: Float[np.ndarray, " N"] | None = None,
    bins: int = CALIBRATION_BINS,
) -> float:
    """ECE = sum_b n_b / n |accuracy_b - mean confidence_b| over equal bins of confidence (Guo et al., 2017, arXiv 1706.04599).

    Args:
      confidence: probability of the predicted label, in [0, 1]; bin b is ((b - 1) / bins, b / bins].
      correct: 1 where the prediction is right, else 0.
      weight: of each example; by default all alike.
    """
    weight = np.ones_like(confidence) if weight is None else weight
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weight * (correct - confidence), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """sum(numerator) / sum(denominator) and the standard error of that ratio estimator (Cochran 1977, section 6.4)."""
    n, total = len(numerator), float(denominator.sum())
    if total <= 0:
        return math.nan, math.nan
    ratio = float(numerator.sum()) / total
    if n < 2:
        return ratio, math.nan
    residual = numerator - ratio * denominator
    return ratio, math.sqrt(n / (n - 1) * float(residual @ residual)) / total
