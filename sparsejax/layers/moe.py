"""A mixture of experts as the feed of a block: a router, a dispatch, and one FFN whose kernels lead with the expert axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from sparsejax.context import Context, Stat
from sparsejax.layers.ffn import FFN, Stats
from sparsejax.layers.linear import Init, Linear
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Module
from sparsejax.ops.routers import (
    Routing,
    capacity_per_expert,
    dispatch_dropless,
    dispatch_with_capacity,
    expert_load,
    load_balance,
    permute_rows,
    router_z,
    softmax_top_k,
)
from sparsejax.parallel.rules import RULES, constrain, spec_for
from sparsejax.plugs import check

# Fan-in is too large for a router: its softmax would start peaked. Zero would start with ties, all of them expert 0.
ROUTER_STD = 0.02


class MoE(Module):
    """y = sum_j w_j FFN_{e_j}(x) (+ the shared experts' FFN): sites `SITE.experts.{up,gate,down}`, `SITE.shared.*`.

    With `shared_gate` the shared experts' sum is multiplied by sigmoid(x w), w [D, 1] (Qwen2-MoE).
    The router (`SITE.router`) and that gate take no activation or weight ops and stay in float32. While training with a
    capacity, each row of the batch is its own routing group and overflowing assignments are dropped; all else is dropless.
    Statistics at `mlp.router`: balance and z (see ops.routers), load [E], dropped (assignments), tokens. Where dispatch is
    dropless, statistics by token come back to [B, T, k, ...].
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        key: Array,
        site: str,
        rules: SiteRules,
        experts: int,
        k: int,
        hidden: int,
        shared: int = 0,
        shared_gate: bool = False,
        capacity_factor: float = 0.0,
        combine: str = "renorm",
        granularity: str = "batch",
    ):
        keys = jax.random.split(key, 3)
        self.num_experts, self.k, self.combine = experts, k, combine
        self.capacity_factor, self.granularity = capacity_factor, granularity
        init = Init(ROUTER_STD)
        scores: dict[str, Any] = dict(axes=("embed", None), init=init, role="router")
        self.router = Linear(config.d_model, experts, key=keys[0], site=f"{site}.router", **scores)
        gate = dict(key=jax.random.fold_in(keys[0], 1), site=f"{site}.shared_gate", **scores)
        self.shared_gate = Linear(config.d_model, 1, **gate) if shared_gate else None
        self.experts = FFN(config, key=keys[1], site=f"{site}.experts", rules=rules, experts=experts, hidden=hidden)
        self.shared = FFN(config, key=keys[2], site=f"{site}.shared", rules=rules, hidden=shared * hidden) if shared else None

    def __call__(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Stats]:
        ctx = _with_layout(ctx, x.shape[:2])
        # On GPU and TPU the default precision of a float32 product is less than float32.
        with jax.default_matmul_precision("float32"):
            logits = self.router(x.astype(jnp.float32), ctx)
            openness = None if self.shared_gate is None else self.shared_gate(x.astype(jnp.float32), ctx)
        routing = softmax_top_k(logits, self.k, self.combine)
        limited = self.capacity_factor > 0 and ctx.mode == "train"
        y, stats, dropped = (self._with_capacity if limited else self._dropless)(x, routing, ctx)
        weighted = jnp.sum(y.astype(jnp.float32) * routing.weights[..., None], axis=-2).astype(y.dtype)
        if self.shared is not None:
            delta, found = self.shared(x, ctx)
            weighted = weighted + (delta if openness is None else jax.nn.sigmoid(openness).astype(delta.dtype) * delta)
            stats = {**stats, **{f"shared.{site}": value for site, value in found.items()}}
        return weighted, {**stats, "mlp.router": self._router_stats(logits, routing, dropped, ctx)}

    def _router_stats(self, logits: Array, routing: Routing, dropped: Array, ctx: Context) -> dict[str, Stat]:
        mask = ctx.token_mask
        return {
            "balance": Stat(load_balance(routing, mask, self.granularity), "mean"),
            "z": Stat(router_z(logits, mask), "mean"),
            "load": Stat(expert_load(routing.experts, mask, self.num_experts)),
            "dropped": Stat(dropped),
            "tokens": Stat(jnp.sum(mask, dtype=jnp.float32)),
        }

    def _dropless(self, x: Array, routing: Routing, ctx: Context) -> tuple[Array, Stats, Array]:
        """Each assignment's expert output [B, T, k, D], from rows sorted by expert.

        On a mesh every device sorts its own tokens and the experts' weights are gathered to them: the partitioner cannot cut a
        sort, it would give all tokens to every device.
        """

        def sort_and_run(experts: FFN, x: Array, chosen: Array, *by_token: Array) -> tuple[Array, Stats]:
            segment_ids = by_token[0]
            sent = dispatch_dropless(chosen.reshape(-1, self.k), segment_ids.reshape(-1) > 0, self.num_experts)
            rows = permute_rows(jnp.repeat(x.reshape(-1, x.shape[-1]), self.k, axis=0), sent.assignments, sent.rows)
            layout = [_follow(a.reshape(1, -1), sent.assignments[None] // self.k)[0] for a in by_token]
            y, stats = experts(rows, _dispatched(ctx, *layout), sent.groups)
            returned = _by_token(stats, lambda value: _returned(value, sent.rows, chosen.shape))
            return permute_rows(y, sent.rows, sent.assignments).reshape(*chosen.shape, -1), returned

        y, stats = _per_token_shard(sort_and_run, self.experts, x, routing.experts, *_layout(ctx))
        return y, stats, jnp.zeros((), jnp.float32)

    def _with_capacity(self, x: Array, routing: Routing, ctx: Context) -> tuple[Array, Stats, Array]:
        """As `_dropless` from C rows per expert and batch row; zeros for what was dropped."""
        batch, length, width = x.shape
        experts = self.num_experts
        capacity = capacity_per_expert(self.capacity_factor, length, self.k, experts)
        sent = jax.vmap(lambda e, m: dispatch_with_capacity(e, m, experts, capacity))(routing.experts, ctx.token_mask)
        copies = jnp.repeat(x, self.k, axis=1)
        rows = jax.vmap(permute_rows)(copies, sent.assignments, sent.rows)
        layout = [_by_expert(_follow(a, sent.assignments // self.k), experts) for a in _layout(ctx)]
        y, stats = self.experts(_by_expert(rows, experts), _dispatched(ctx, *layout))
        back = jax.vmap(permute_rows)(_by_batch_row(y, batch), sent.rows, sent.assignments)
        kept = jnp.sum(sent.rows < experts * capacity, dtype=jnp.float32)
        dropped = self.k * jnp.sum(ctx.token_mask, dtype=jnp.float32) - kept
        return back.reshape(batch, length, self.k, width), stats, dropped


def _by_token(stats: Stats, move: Callable[[Array], Array]) -> Stats:
    """The statistics, those by token moved."""

    def moved(stat: Stat) -> Stat:
        return Stat(move(stat.value), stat.reduction) if stat.reduction == "token" else stat

    return {site: {name: moved(stat) for name, stat in found.items()} for site, found in stats.items()}


def _returned(value: Array, rows: Array, shape: tuple[int, ...]) -> Array:
    """[B, T, k, ...] of a value [N, ...] by row of the experts' layout; zeros at padding."""
    return value.at[rows].get(mode="fill", fill_value=0).reshape(*shape, *value.shape[1:])


def _per_token_shard(fn: Callable[..., tuple[Array, Stats]], module: Any, *by_token: Array) -> tuple[Array, Stats]:
    """fn(module, *by_token) on each device's part of arrays [B, T, ...]; its statistics are reduced as they declare."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    rules = {name: tuple(a for a in RULES[name] if a in free) for name in ("batch", "length")}
    spec = spec_for(("batch", "length"), by_token[0].shape[:2], mesh, rules, fall_back=False)
    axes = tuple(a for cut in spec if cut is not None for a in ((cut,) if isinstance(cut, str) else cut))
    if not axes:
        return fn(module, *by_token)

    def body(module: Any, *parts: Array) -> tuple[Array, Stats]:
        y, stats = fn(module, *parts)
        by_token = [site for site, found in stats.items() if any(stat.reduction == "token" for stat in found.values())]
        check(not by_token, "probes", by_token, "statistics by token are not gathered from the devices of a mesh")
        reductions = {"sum": jax.lax.psum, "max": jax.lax.pmax, "mean": jax.lax.pmean}
        reduced = {
            site: {name: Stat(reductions[stat.reduction](stat.value, axes), stat.reduction) for name, stat in found.items()}
            for site, found in stats.items()
        }
        return y, reduced

    in_specs = (PartitionSpec(), *(spec for _ in by_token))
    sharded = jax.shard_map(body, in_specs=in_specs, out_specs=(spec, PartitionSpec()), axis_names=set(axes), check_vma=False)
    return sharded(module, *by_token)


def _with_layout(ctx: Context, shape: tuple[int, ...]) -> Context:
    """Segments and positions made explicit, so that they can follow the tokens to their experts."""
    segments, positions = ctx.segment_ids, ctx.positions
    if segments is None:
        segments = jnp.ones(shape, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return ctx._replace(segment_ids=segments, positions=positions)


def _layout(ctx: Context) -> tuple[Array, ...]:
    """What follows the tokens to their experts."""
    return (ctx.segment_ids, ctx.positions) if ctx.sparsify is None else (ctx.segment_ids, ctx.positions, ctx.sparsify)


def _dispatched(ctx: Context, segment_ids: Array, positions: Array, sparsify: Array | None = None) -> Context:
    """The context of rows in the experts' layout: each row's own segment (0: an empty row), position and scope."""
    return ctx._replace(segment_ids=segment_ids, positions=positions, prefix=None, sparsify=sparsify)


def _follow(per_token: Array, token: Array) -> Array:
    """per_token [B, T] at each row's token [B, R]; 0 for a row that has none."""
    return jax.vmap(lambda values, index: values.at[index].get(mode="fill", fill_value=0))(per_token, token)


def _by_expert(rows: Array, experts: int) -> Array:
    """[B, E * C, ...] to [E, B * C, ...]; under an expert mesh axis this is the all-to-all."""
    batch, total, *rest = rows.shape
    grouped = jnp.moveaxis(rows.reshape(batch, experts, total // experts, *rest), 0, 1)
    grouped = constrain(grouped, "expert", "batch", *(None,) * (1 + len(rest)))
    return grouped.reshape(experts, -1, *rest)


def _by_batch_row(rows: Array, batch: int) -> Array:
    """The inverse of `_by_expert`."""
    experts, _, *rest = rows.shape
    grouped: Any = jnp.moveaxis(rows.reshape(experts, batch, -1, *rest), 0, 1)
    return constrain(grouped, "batch", *(None,) * (2 + len(rest))).reshape(batch, -1, *rest)
