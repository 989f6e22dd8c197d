"""Rotary positions in a `config.json`: `rope_theta` and `rope_scaling` up to transformers 4, `rope_parameters` since 5.

Both are read. The old spelling is written, which 4.43 and newer read, 5 included.
"""

from __future__ import annotations

from typing import Any

from sparsejax.models.config import RopeConfig
from sparsejax.models.families.keys import Keys
from sparsejax.ops.rope import LinearScaling, Llama3Scaling, parse_scaling

_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}


def read_rope(keys: Keys, theta: float = 10_000.0) -> RopeConfig:
    """One rotation for all layers and all of each head.

    Args:
      keys: of the whole config.
      theta: where nothing gives it.
    Raises:
      ConfigError: a kind of scaling other than linear and llama3, or partial rotation.
    """
    inner = _parameters(keys)
    for place in (keys, inner):
        place.only("partial_rotary_factor", 1.0, "a rotation of a part of each head")
    return _rope(keys, inner, keys.number("rope_theta", theta, above=1.0))


def read_partial_rope(keys: Keys, *, theta_key: str, fraction_key: str, fraction: float) -> RopeConfig:
    """One rotation for all layers, of the leading share of each head.

    Args:
      keys: of the whole config.
      theta_key, fraction_key: what the family calls them outside of `rope_parameters`.
      fraction: where nothing gives it.
    """
    inner = _parameters(keys)
    share = inner.number("partial_rotary_factor", keys.number("partial_rotary_factor", keys.number(fraction_key, fraction)))
    rope = _rope(keys, inner, keys.number(theta_key, keys.number("rope_theta", 10_000.0, above=1.0), above=1.0))
    rope.fraction = share
    return rope


def read_layered_rope(keys: Keys, *, theta: float, local_theta: float, layered: bool) -> RopeConfig:
    """One theta and scaling for global layers; another theta, never scaled, for local ones (Gemma 3).

    Args:
      keys: of the whole config.
      theta, local_theta: where nothing gives them.
      layered: whether there are local layers.
    """
    inner = _parameters(keys)
    outer = keys.number("rope_theta", theta, above=1.0)
    outer_local = keys.number("rope_local_base_freq", local_theta, above=1.0)
    if not any(inner.given(key) for key in ("full_attention", "sliding_attention")):
        rope = _rope(keys, inner, outer)
    else:
        rope = _rope(keys, inner.inner("full_attention"), outer)
        local = _rope(keys, inner.inner("sliding_attention"), outer_local)
        inner.check(local.scaling == "none", "sliding_attention", "only the rotation of full_attention may be scaled")
        inner.finish()
        outer_local = local.theta
    rope.local_theta = outer_local if layered else 0.0
    return rope


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`."""
    scaling = parse_scaling(rope.scaling)
    published: dict[str, Any] | None = None
    if isinstance(scaling, LinearScaling):
        published = {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        published = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {"rope_theta": rope.theta, "rope_scaling": published}


def _parameters(keys: Keys) -> Keys:
    """The object that describes the rotation, `rope_scaling` or `rope_parameters`, whichever is there."""
    both = keys.given("rope_scaling") and keys.given("rope_parameters")
    keys.check(not both, "rope_scaling", "rope_parameters is given too; one of them is expected")
    found = [keys.inner(key) for key in ("rope_scaling", "rope_parameters")]
    return found[0] if keys.given("rope_scaling") else found[1]


def _rope(keys: Keys, inner: Keys, theta: float) -> RopeConfig:
    """Theta and scaling that one object describes; `theta` where it gives none."""
    kind = inner.choice("rope_type", _TYPES, inner.value("type", "default"))
    theta = inner.number("rope_theta", theta, above=1.0)
    inner.value("partial_rotary_factor", None)
    scaling = kind
    if kind != "none":
        factor = inner.number("factor")
        inner.check(factor >= 1, "factor", "expected at least 1")
        scaling = f"{kind}:{factor}"
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        inner.check(low < high, "low_freq_factor", f"must be less than high_freq_factor = {high}")
        length = inner.integer("original_max_position_embeddings", keys.value("max_position_embeddings", None))
        scaling += f",{low},{high},{length}"
    inner.finish()
    return RopeConfig(theta=theta, scaling=scaling)
