"""Whether a published config says everything that ours does: it is read back and compared by what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparsejax.models.config import ModelConfig
from sparsejax.plugs import ConfigError

# How a model is computed, trained or was begun, not what it computes; and rules, which a `config.json` has no place for.
_FREE = ("dtype", "residual_dtype", "scan", "unroll", "remat", "init", "inputs", "weights", "ffn.match", "attention.backend")


def check_inverse(
    config: ModelConfig, published: Mapping[str, Any], to_config: Callable[[Mapping[str, Any]], ModelConfig], family: str
) -> dict[str, Any]:
    """`published`, once reading it has given the model of `config` again. Rules of `inputs` and `weights` are not compared.

    Args:
      config: finalized.
      published: what `family.to_published` has made of it.
      to_config: the family's.
      family: for the message.
    Raises:
      ConfigError: names the fields that the published config cannot express, with what they would become.
    """
    ours, theirs = meaning(config), meaning(to_config(published))
    pairs = ((key, ours.get(key), theirs.get(key)) for key in ours | theirs)
    differing = [f"model.{key} = {mine!r} (but {read!r})" for key, mine, read in pairs if mine != read]
    if differing:
        raise ConfigError(f"a {family} config.json cannot express {', '.join(differing)}")
    return dict(published)


def meaning(config: ModelConfig) -> dict[str, Any]:
    """Field -> value of all that decides what a finalized model computes; equal where configs say the same in other words."""
    fields = _flat(dataclasses.asdict(config))
    a, positions, rope = config.attention, config.positions, config.positions.rope
    patterns = (("attention_pattern", config.attention_pattern), ("feed_pattern", config.feed_pattern))
    for name, pattern in patterns:
        fields[name] = tuple(pattern[layer % len(pattern)] for layer in range(config.num_layers))
    fields["attention.scale"] = a.scale or a.head_dim**-0.5
    fields["layer_scale"] = config.layer_scale > 0
    fields["positions.rope.local_theta"] = rope.local_theta or rope.theta
    fields["positions.rope.local_scaling"] = "none" if rope.local_theta else rope.scaling
    unused = [*_FREE]
    if positions.kind != "rope" or "global" not in config.attention_pattern:
        unused += ["positions.rope.theta", "positions.rope.scaling"]
    if positions.kind != "rope" or "local" not in config.attention_pattern:
        unused += ["positions.rope.local_theta", "positions.rope.local_scaling"]
    if positions.kind != "rope":
        unused += ["positions.rope.fraction"]
    if positions.kind != "relative":
        unused += ["positions.relative_buckets", "positions.relative_max_distance"]
    unused += ["tied_embeddings"] if config.num_classes or not config.head else []  # no head reads the embedding
    unused += [] if config.num_classes else ["pool"]
    if config.kind != "vit":
        unused += [field for field in fields if field.startswith("vision.")]
    return {field: value for field, value in fields.items() if field not in unused}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found
