"""One optimizer step: loss over microbatches, gradients, clipping, update, guard. Pure, compiled once per (stage, watch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sparsejax.config import ExperimentConfig
from sparsejax.context import Context, Probe, Stat
from sparsejax.evaluate.likelihood import label_sums, token_sums
from sparsejax.models.transformer import Transformer
from sparsejax.nnx_compat import Structure
from sparsejax.train import watch as watching
from sparsejax.train.loss import Outputs, chunks_for, per_token, score, score_chunked
from sparsejax.train.optim import clip_by_norm
from sparsejax.train.partition import Partition, joined
from sparsejax.train.state import TrainState, build

Batch = dict[str, Array]
GUARD_DECAY = 0.98


def model_outputs(model: Transformer, batch: Batch, ctx: Context, devices: int) -> tuple[Outputs, dict[str, dict[str, Stat]]]:
    """Sums over the batch's scored positions, and the statistics the model left."""
    h, stats, _ = model.features(batch, ctx)
    if "labels" in batch:
        return score(model.logits(h, ctx), batch["labels"], batch["weights"]), stats
    config = model.config.value
    batch_size, length = batch["targets"].shape
    chunks = chunks_for(batch_size, length, config.vocab_size, devices)
    outputs = score_chunked(lambda piece: model.logits(piece, ctx), h, batch["targets"], batch["weights"], chunks=chunks)
    return outputs, stats


def loss_function(
    structure: Structure, config: ExperimentConfig, objectives: tuple[Any, ...], devices: int, frozen: dict[str, Any]
) -> Callable[..., tuple[Array, tuple[Outputs, dict[str, Any], dict[str, Array]]]]:
    """`loss(trainable, batch, ctx, denominators)`: this microbatch's share of the loss of the whole batch.

    `frozen` are the parameters that are not trained.
    """

    def loss(trainable: Any, batch: Batch, ctx: Context, denominators: list[Array]) -> tuple[Array, Any]:
        model = build(structure, joined(trainable, frozen), config.model.dtype)
        outputs, stats = model_outputs(model, batch, ctx, devices)
        terms = {
            name: term.numerator(outputs, batch, stats, ctx.step) / denominator
            for name, term, denominator in zip(config.objectives, objectives, denominators, strict=True)
        }
        return sum(terms.values(), jnp.zeros((), jnp.float32)), (outputs, stats, terms)

    return loss


def gradients_of(
    loss: Callable[..., Any],
    trainable: Any,
    batch: Batch,
    ctx: Context,
    objectives: tuple[Any, ...],
    names: tuple[str, ...],
    accumulate: int,
) -> tuple[Any, Array, Outputs, dict[str, Any], dict[str, Array]]:
    """(gradients, loss, outputs, stats, terms) of the whole batch, taken in `accumulate` microbatches; `names` are the terms'.

    Denominators are computed for the whole batch first, so that ragged masks give the large batch's gradient.
    """
    denominators = [jnp.maximum(term.denominator(batch), 1e-9) for term in objectives]
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (value, (outputs, stats, terms)), gradients = value_and_grad(trainable, batch, ctx, denominators)
        return gradients, value, outputs, stats, terms

    def split(x: Array) -> Array:
        # Microbatch a takes rows a, a + A, ...: each keeps the batch's sharding over all devices.
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 1, 0)

    def body(total: Any, xs: tuple[Batch, Array]) -> tuple[Any, Any]:
        microbatch, index = xs
        here = ctx._replace(rng=jax.random.fold_in(ctx.rng, index))
        (value, (outputs, stats, terms)), gradients = value_and_grad(trainable, microbatch, here, denominators)
        total = jax.tree.map(jnp.add, total, (gradients, value, outputs, terms))
        return total, stats

    # Written out rather than asked of eval_shape, which would trace the whole model a second time.
    zero = jnp.zeros((), jnp.float32)
    zeros = (
        jax.tree.map(jnp.zeros_like, trainable),
        zero,
        Outputs(*(zero for _ in Outputs._fields)),
        {name: zero for name in names},
    )
    (gradients, value, outputs, terms), stats = jax.lax.scan(body, zeros, (jax.tree.map(split, batch), jnp.arange(accumulate)))
    return gradients, value, outputs, _reduce_microbatches(stats), terms


def _reduce_microbatches(stats: dict[str, Any]) -> dict[str, Any]:
    reductions: dict[str, Callable[..., Array]] = {"sum": jnp.sum, "max": jnp.max, "mean": jnp.mean}
    return jax.tree.map(
        lambda stat: Stat(reductions[stat.reduction](stat.value, axis=0), stat.reduction),
        stats,
        is_leaf=lambda v: isinstance(v, Stat),
    )


def make_train_step(
    structure: Structure,
    parts: Partition,
    config: ExperimentConfig,
    objectives: tuple[Any, ...],
    transformation: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    devices: int,
    stage: int = 0,
    watch: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """`step(state, batch) -> (state, metrics)`.

    Args:
      parts: which parameters of `structure` are trained.
      stage: the schedule boundary that the step has reached (see `Context.stage`).
      watch: also measure what `train.watch` measures; a static choice.
    """
    probes: tuple[Probe, ...] = tuple(probe for term in objectives for probe in term.probes())
    if watch:
        probes += watching.probes(config.data.sequence_length)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        ctx = Context(step=state.step, rng=key, mode="train", stage=stage, probes=probes)
        loss = loss_function(structure, config, objectives, devices, state.frozen)
        gradients, value, outputs, stats, terms = gradients_of(
            loss, state.trainable, batch, ctx, objectives, config.objectives, config.accumulate
        )
        norm = optax.tree.norm(gradients)
        gradients = clip_by_norm(gradients, norm, config.optimizer.clip_norm)
        updates, optimizer = transformation.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        good, guard = _guard(config, state.guard, value, norm)
        new = state._replace(
            trainable=trainable,
            optimizer=optimizer,
            average=_average(state.average, trainable, config.optimizer.ema_decay),
            guard=guard,
        )
        if config.checkpoint.on_nan == "skip":
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        metrics = {
            "loss": value,
            "nll": outputs.nll_sum / jnp.maximum(outputs.weight_sum, 1e-9),
            "accuracy": outputs.correct_sum / jnp.maximum(outputs.weight_sum, 1e-9),
            "tokens": outputs.weight_sum,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "bad": ~good,
            **{f"loss/{name}": term for name, term in terms.items() if len(terms) > 1},
        }
        if watch:
            metrics["watch"] = watching.summarize(stats)
            metrics |= watching.norms(parts.trained, param=state.trainable, grad=gradients, update=updates)
        return new._replace(step=state.step + 1), metrics

    return step


def _guard(config: ExperimentConfig, guard: dict[str, Array], loss: Array, norm: Array) -> tuple[Array, dict[str, Array]]:
    """Whether the step is usable, and the guard's EMA with a usable loss taken in."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    ema = guard["loss_ema"] / jnp.maximum(guard["weight"], 1e-9)
    factor = config.checkpoint.spike_factor
    spike = (loss > factor * ema) & (guard["weight"] > 1 - GUARD_DECAY**20) if factor else jnp.zeros((), bool)
    good = finite & ~spike
    blend = {"loss_ema": jnp.where(finite, loss, 0.0), "weight": jnp.ones((), jnp.float32)}
    taken = {k: GUARD_DECAY * guard[k] + (1 - GUARD_DECAY) * blend[k] for k in guard}
    return good, jax.tree.map(lambda a, b: jnp.where(good, a, b), taken, guard)


def _average(average: Any, trainable: Any, decay: float) -> Any:
    if not decay:
        return average
    return jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, trainable)


def make_evaluation_step(
    structure: Structure,
    config: ExperimentConfig,
    *,
    devices: int,
    stage: float,
    watch: bool,
) -> Callable[[Any, Array, Batch], dict[str, Any]]:
    """`evaluate(values, token_bytes, batch) -> {nll, weight, bytes, correct: [B]}` per sequence, in inference mode.

    `values` are all parameters; `token_bytes` float32[V] is the number of UTF-8 bytes of each token. With `watch` also the
    zeros and entries of the FFN hidden vector per layer, under "counts".
    """
    probes = watching.probes(config.data.sequence_length) if watch else ()

    def evaluate(values: Any, token_bytes: Array, batch: Batch) -> dict[str, Any]:
        model = build(structure, values, config.model.dtype)
        ctx = Context(mode="prefill", stage=stage, probes=probes)
        h, stats, _ = model.features(batch, ctx)
        if "labels" in batch:
            sums: dict[str, Any] = label_sums(model.logits(h, ctx), batch["labels"], batch["weights"])
        else:
            sums = _sequence_sums(model, h, batch, ctx, devices, token_bytes)
        return {**sums, "counts": watching.zero_counts(stats)} if watch else sums

    return evaluate


def _sequence_sums(
    model: Transformer, h: Array, batch: Batch, ctx: Context, devices: int, token_bytes: Array
) -> dict[str, Array]:
    """`evaluate.likelihood.token_sums` piece by piece along the sequence."""
    batch_size, length = batch["targets"].shape
    chunks = chunks_for(batch_size, length, model.config.value.vocab_size, devices)

    def pieces(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    def piece(xs: tuple[Array, Array, Array]) -> dict[str, Array]:
        h_piece, targets, weights = xs
        nll, _, correct = per_token(model.logits(h_piece, ctx), targets)
        return token_sums(nll, weights, targets, token_bytes, correct)

    found = jax.lax.map(piece, (pieces(h), pieces(batch["targets"]), pieces(batch["weights"])))
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), found)
