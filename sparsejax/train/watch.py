"""What a watching step measures. The step without it compiles to code that knows nothing of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.context import Context, Probe, Stat
from sparsejax.nnx_compat import Structure


def probes(length: int) -> tuple[Probe, ...]:
    """Zeros and dead units of the FFN hidden vector, and attention entropy; `length` positions are told apart."""

    def hidden(tensor: Array, ctx: Context) -> dict[str, Stat]:
        return hidden_statistics(jax.lax.stop_gradient(tensor), ctx, length)

    return Probe("mlp.hidden", hidden), Probe("attn.entropy", lambda tensor, ctx: {})


def hidden_statistics(hidden: Float[Array, "... F"], ctx: Context, length: int) -> dict[str, Stat]:
    """Counts of exact zeros (all, and by token position) over tokens that are not padding, and which units ever fired.

    The tensor may be in any layout (a batch, or rows sorted by expert): `ctx.positions` and `ctx.token_mask` follow it.
    """
    width = hidden.shape[-1]
    rows = hidden.reshape(-1, width)
    mask = jnp.ones(rows.shape[0], bool) if ctx.token_mask is None else ctx.token_mask.reshape(-1)
    if ctx.positions is None:
        positions = jnp.broadcast_to(jnp.arange(hidden.shape[-2]), hidden.shape[:-1]).reshape(-1)
    else:
        positions = ctx.positions.reshape(-1)
    active = (rows != 0) & mask[:, None]
    zeros = (width - jnp.sum(active, axis=-1, dtype=jnp.float32)) * mask
    tokens = mask.astype(jnp.float32)

    def by_position(values: Array) -> Array:
        return jax.ops.segment_sum(values, positions, length)

    return {
        "zeros": Stat(jnp.sum(zeros)),
        "entries": Stat(jnp.sum(tokens) * width),
        "zeros_by_position": Stat(by_position(zeros)),
        "entries_by_position": Stat(by_position(tokens) * width),
        "fired": Stat(jnp.any(active, axis=0).astype(jnp.float32), "max"),
    }


def summarize(stats: dict[str, Any]) -> dict[str, Array]:
    """The counts as what is drawn: per layer zero_fraction [L], zero_fraction_position [L, T], dead_units [L],
    attention_entropy [L]; layers of an encoder come first. Empty where nothing was measured."""
    hidden = _hidden(stats)
    entropy = [found["entropy"].value for site, found in sorted(stats.items(), reverse=True) if site.endswith("attn")]
    drawn: dict[str, Array] = {}
    if hidden:

        def ratio(numerator: str, denominator: str) -> Array:
            pairs = [found[numerator].value / jnp.maximum(found[denominator].value, 1.0) for found in hidden]
            return jnp.concatenate(pairs)

        drawn["zero_fraction"] = ratio("zeros", "entries")
        drawn["zero_fraction_position"] = ratio("zeros_by_position", "entries_by_position")
        drawn["dead_units"] = jnp.concatenate([jnp.sum(found["fired"].value == 0, axis=-1) for found in hidden])
    if entropy:
        drawn["attention_entropy"] = jnp.concatenate([value.reshape(value.shape[0], -1).mean(-1) for value in entropy])
    for site, found in stats.items():
        if site.endswith("mlp.router") and "load" in found:
            load = found["load"].value
            drawn["expert_load"] = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    return drawn


def zero_counts(stats: dict[str, Any]) -> dict[str, Array]:
    """Exact zeros and entries of the FFN hidden vector, each [L]; layers of an encoder come first."""
    hidden = _hidden(stats)
    return {name: jnp.concatenate([found[name].value for found in hidden]) for name in ("zeros", "entries")}


def _hidden(stats: dict[str, Any]) -> list[dict[str, Stat]]:
    # "encoder" sorts behind "decoder".
    return [found for site, found in sorted(stats.items(), reverse=True) if site.endswith("mlp.hidden") and "zeros" in found]


def norms(structure: Structure, **trees: Any) -> dict[str, Array]:
    """L2 norms by part of the model: `KIND_norm/PART` for each tree given by keyword (param, grad, update)."""
    return {
        f"{kind}_norm/{part}": jnp.sqrt(sum(squares))
        for kind, tree in trees.items()
        for part, squares in _squares_by_part(structure, tree).items()
    }


def _squares_by_part(structure: Structure, tree: Any) -> dict[str, list[Array]]:
    parts: dict[str, list[Array]] = {}
    leaves = jax.tree.leaves(structure.map(lambda w, v: jnp.sum(jnp.square(v.astype(jnp.float32))), tree))
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    for path, square in zip(paths, leaves, strict=True):
        parts.setdefault(part_of([str(key.key) for key in path]), []).append(square)
    return parts


def part_of(path: list[str]) -> str:
    """The part of the model a parameter belongs to: embed, attn, mlp, norms, head, ..."""
    for name in ("attn", "cross", "mlp"):
        if name in path:
            return name
    return "norms" if "norm" in path[-2 if len(path) > 1 else -1] else path[0]
