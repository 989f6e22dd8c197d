"""Optimizers of optax by name, learning-rate schedules, and which parameters decay."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sparsejax import plugs
from sparsejax.nnx_compat import Structure
from sparsejax.train.config import OptimizerConfig

# These search along a line, sample a Hessian or take a second gradient; optax has deprecated the last.
_LEFT_OUT = ("lbfgs", "polyak_sgd", "sophia", "sam", "opaque_sam", "momo", "momo_adam", "acprop", "optimistic_adam")


def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Every optimizer of optax that is driven by gradients and a learning rate."""
    found: dict[str, Callable[..., optax.GradientTransformation]] = {}
    for module in (optax.contrib, optax):
        for name, function in vars(module).items():
            if not inspect.isfunction(function) or name.startswith(("_", "scale_by_")) or name in _LEFT_OUT:
                continue
            signature = inspect.signature(function)
            required = [p.name for p in signature.parameters.values() if p.default is inspect.Parameter.empty]
            if "learning_rate" in signature.parameters and set(required) <= {"learning_rate"}:
                found[name] = function
    return found


def takes_schedule(function: Callable[..., Any]) -> bool:
    """Whether the learning rate may be a function of the step; optax annotates those that take a number alone so."""
    annotation = inspect.signature(function).parameters["learning_rate"].annotation
    return "Callable" in str(annotation)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then `config.schedule`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    final = peak * config.final_fraction
    left = max(1, steps - warmup)
    if config.schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, left, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * steps))
        stable = max(0, left - decay)
        after = optax.join_schedules([optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [stable])
    else:
        start = max(1, warmup)

        def after(step: Any) -> Any:
            return peak * jnp.sqrt(start / (step + start))

    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def schedule_notes(config: OptimizerConfig, steps: int) -> list[str]:
    """What a run of this many steps does not get of its schedule, for people; empty where it gets all."""
    warmup = config.warmup_steps
    if warmup >= steps:
        return [f"note: warm-up takes {warmup} steps and the run has {steps}: the learning rate stays below its peak"]
    decay = round(config.decay_fraction * steps) if config.schedule == "wsd" else 0
    if warmup + decay > steps:
        return [f"note: {warmup} steps of warm-up and {decay} of decay exceed its {steps}: it ends above the final rate"]
    return []


def optimizer(config: OptimizerConfig, steps: int, structure: Structure) -> optax.GradientTransformation:
    """The optax optimizer that the config names, with decay on the roles it names.

    Clipping is not part of it: the training step clips, since it reports the norm.

    Raises:
      plugs.ConfigError: unknown optimizer or argument, or weight decay where the optimizer has none.
    """
    available = optimizers()
    plugs.check_choice("optimizer.name", config.name, sorted(available))
    function = available[config.name]
    accepted = inspect.signature(function).parameters
    rate: Any = schedule(config, steps)
    if not takes_schedule(function):
        plugs.check(
            config.schedule == "constant" and not config.warmup_steps,
            "optimizer.schedule",
            config.schedule,
            f"{config.name} takes one rate: schedule 'constant' without warm-up (schedule_free_*: arguments 'warmup_steps=N')",
        )
        rate = config.learning_rate
    arguments: dict[str, Any] = {"learning_rate": rate, **_arguments(config, accepted)}
    decayed = structure.map(lambda w: w.role in config.decay_roles)
    if "weight_decay" in accepted:
        arguments["weight_decay"] = config.weight_decay
        for mask in ("mask", "weight_decay_mask"):
            if mask in accepted:
                arguments[mask] = decayed
    else:
        plugs.check(
            not config.weight_decay,
            "optimizer.weight_decay",
            config.weight_decay,
            f"{config.name} has none; set it to 0 or choose e.g. adamw",
        )
    if "muon_weight_dimension_numbers" in accepted:
        arguments["muon_weight_dimension_numbers"] = structure.map(_muon_dimensions)
    return function(**arguments)


def _muon_dimensions(weight: Any) -> Any:
    """Matrices (layers and experts leading) are orthogonalised, everything else falls back to Adam."""
    value = jax.tree.leaves(weight.get_value())[0]
    return optax.contrib.MuonDimensionNumbers((value.ndim - 2,), (value.ndim - 1,)) if weight.role == "matrix" else None


def _arguments(config: OptimizerConfig, accepted: Any) -> dict[str, Any]:
    """`"b2=0.95,nesterov=true"` as keyword arguments."""
    found: dict[str, Any] = {}
    for part in filter(None, config.arguments.split(",")):
        name, _, text = part.partition("=")
        plugs.check_choice(f"optimizer.arguments of {config.name}", name.strip(), [p for p in accepted if p != "learning_rate"])
        found[name.strip()] = _literal(text.strip(), name)
    return found


def _literal(text: str, name: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        if text in ("float32", "bfloat16"):
            return jnp.dtype(text)
        raise plugs.ConfigError(f"optimizer.arguments: {name} = {text!r}: expected a number, true, false or a dtype") from error


def evaluated(config: OptimizerConfig, optimizer_state: Any, trainable: Any) -> Any:
    """The weights that an optimizer means to be evaluated: for the schedule-free ones not those that are trained."""
    if config.name.startswith("schedule_free"):
        return optax.contrib.schedule_free_eval_params(optimizer_state, trainable)
    return trainable


def clip_by_norm(gradients: Any, norm: Array, limit: float) -> Any:
    """Gradients scaled so that their global norm is at most `limit` (0: unchanged)."""
    if not limit:
        return gradients
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)
