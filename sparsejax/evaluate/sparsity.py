"""How sparse a decoder's activations are, counted as a kernel would meet them.

At every site (the operands of a block's linear maps, after whatever selects there, and the FFN's hidden vector) an entry is
active where it is not exactly zero. From the sets A_t of active entries of token t, of `width` entries each:

    zero_fraction   1 - |A_t| / width, over tokens; also by token position
    dead_units      entries that no token made active
    overlap         |A_t & A_{t-1}| / |A_t|, over neighbouring tokens; what a kernel can keep from one token to the next
    union[B]        |A_t1 | ... | A_tB| / width over B sequences at the same position: rows read to decode a batch of B
    occupancy[b]    aligned blocks of b entries with at least one active, over all: what a kernel of that granularity reads
    coverage[q]     share of all activations that fall on the q most frequently active entries (PowerInfer, arXiv 2312.12456)

The forward pass hands out each token's set as packed bits, one row of them per layer and site; what is counted of them is one
small program for each width. Rows that are sorted by expert have no neighbours and no batch: there overlap, union and occupancy
are None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsejax import nnx_compat
from sparsejax.arrays import dense
from sparsejax.context import Context, Probe, Stat
from sparsejax.evaluate.codes import CodeStatistics, code_statistics, pack, unpack
from sparsejax.evaluate.scope import Scope
from sparsejax.io.model import Model
from sparsejax.plugs import check, resolve

SITES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "mlp.hidden")
UNION = (1, 2, 4, 8, 16)
BLOCKS = (8, 16, 128)
POSITION_BINS = 64
COVERAGE = tuple(round(0.05 * i, 2) for i in range(21))

Advance = Callable[[int], None]


@dataclass(frozen=True)
class SiteActivity:
    """What was measured at one site; L layers that have it.

    Fields:
      width: entries of the tensor.
      zero_fraction: [L]. zero_fraction_position: [L, bins], positions averaged in stretches.
      dead_units: [L]. coverage: [L, 21] at q of `COVERAGE`.
      overlap: [L]. union, occupancy: {B or b: [L]}. None for rows sorted by expert.
    """

    width: int
    zero_fraction: np.ndarray
    zero_fraction_position: np.ndarray
    dead_units: np.ndarray
    coverage: np.ndarray
    overlap: np.ndarray | None
    union: dict[int, np.ndarray] | None
    occupancy: dict[int, np.ndarray] | None


@dataclass(frozen=True)
class Activity:
    """What `ActivityCounter.measure` returns.

    Fields:
      tokens: counted.
      position_edges: of the stretches of `zero_fraction_position`.
      sites: by block-local name (`mlp.down`; `shared.mlp.down` of a shared expert).
      codes: see `evaluate.codes`; None where tokens are sorted by expert.
    """

    tokens: int
    position_edges: np.ndarray
    sites: dict[str, SiteActivity]
    codes: CodeStatistics | None


class ActivityCounter:
    """Counts zeros over windows of one length; what it compiled stays for models of the same structure."""

    def __init__(
        self, length: int, *, scope: Scope = Scope(), union: Sequence[int] = UNION, blocks: Sequence[int] = BLOCKS
    ):
        """Check the protocol.

        Args:
          length: W, tokens of a window.
          scope: where activation sparsity acts; positions out of scope are not counted.
          union: numbers of sequences; those above the number of windows are left out.
          blocks: entries of a block.
        Raises:
          ConfigError: sizes below 1, a scope that leaves no token.
        """
        self.length, self.scope, self.first = length, scope, scope.first_sparse(length)
        check(self.first < length, "--keep-first", scope.keep_first, f"leaves nothing to count of a window of {length} tokens")
        for flag, sizes in (("--union", union), ("--blocks", blocks)):
            check(sizes and min(sizes) >= 1, flag, tuple(sizes), "expected sizes of 1 or more")
        self.union, self.blocks = tuple(sorted(set(union))), tuple(sorted(set(blocks)))
        self._compiled: tuple[Any, Callable[..., Any]] | None = None
        self._reduce = jax.jit(self._trace_reduction, static_argnums=(1, 2))

    def measure(self, model: Model, windows: np.ndarray, advance: Advance = lambda tokens: None) -> Activity:
        """What is counted over windows int[N, W], see `count`."""
        return self.activity(self.count(model, windows, advance))

    def count(self, model: Model, windows: np.ndarray, advance: Advance = lambda tokens: None) -> dict[str, np.ndarray]:
        """Sums over windows by `SITE/COUNTER`, for `activity`.

        Args:
          model: a decoder.
          windows: int[N, W]; sequences of a union are neighbours in it.
          advance: called with the number of tokens finished since the last call.
        Raises:
          ConfigError: no decoder, or too few positions.
        """
        check(model.config.kind == "decoder", "--model", model.name, f"is of kind {model.config.kind!r}; expected a decoder")
        check(self.length <= model.config.max_length, "--window", self.length,
              f"{model.name} has {model.config.max_length} positions")  # fmt: skip
        union = tuple(size for size in self.union if size <= len(windows))
        step, batch = self._forward(model), max(union, default=1)
        totals: dict[str, np.ndarray] = {"tokens": np.asarray(len(windows) * (self.length - self.first))}
        codes = []
        for begin in range(0, len(windows), batch):
            tokens = windows[begin : begin + batch]
            for site, found in step(model.values, jnp.asarray(tokens)).items():
                if "code" in found:
                    code = np.asarray(found["code"])
                    codes.append(code.reshape(len(code), -1, code.shape[-1]))
                if "bits" in found:
                    width = found["width"].shape[-1]
                    _add(totals, site, [jax.device_get(self._reduce(layer, width, union)) for layer in found["bits"]])
                elif "fired" in found:
                    arrays = jax.device_get(found)
                    _add(totals, site, [{k: v[i] for k, v in arrays.items()} for i in range(len(arrays["fired"]))])
            advance(tokens.size)
        if codes:
            statistics = vars(code_statistics(np.concatenate(codes, axis=1), self.length - self.first))
            totals |= {f"codes/{name}": np.asarray(value) for name, value in statistics.items()}
        return totals

    def activity(self, counts: Mapping[str, np.ndarray]) -> Activity:
        """What the sums say."""
        edges = np.linspace(self.first, self.length, min(POSITION_BINS, self.length - self.first) + 1).astype(int)
        by_site: dict[str, dict[str, np.ndarray]] = {}
        for key, value in counts.items():
            site, _, name = key.partition("/")
            by_site.setdefault(site, {})[name] = value
        tokens, codes = int(by_site.pop("tokens")[""]), by_site.pop("codes", None)
        order = sorted(by_site, key=lambda site: (site.startswith("shared."), SITES.index(site.removeprefix("shared."))))
        sites = {site: _site_activity(by_site[site], edges) for site in order}
        return Activity(tokens, edges, sites, None if codes is None else CodeStatistics.of(codes))

    def _trace_reduction(self, bits: Array, width: int, union: tuple[int, ...]) -> dict[str, Array]:
        return batched_counts(unpack(bits, width), union, self.blocks)

    def _forward(self, model: Model) -> Callable[..., Any]:
        if self._compiled is None or self._compiled[0] != model.config:
            step = _forward(model, self.scope.sparse(self.length), self.first, self.length)
            self._compiled = (model.config, step)
        return self._compiled[1]


def _forward(
    model: Model, sparse: np.ndarray | None, first: int, length: int
) -> Callable[[Any, Array], dict[str, dict[str, Array]]]:
    """The compiled pass: (values, tokens) -> {site: what `_active` and `_code` give, stacked over layers}."""
    probes = [Probe(site, functools.partial(_active, first=first, length=length)) for site in SITES]
    spec = resolve("nonlinearity", model.config.ffn.activation, "model.ffn.activation")
    # The sign of what the non-linearity is applied to, also where its output is never exactly zero.
    probes.append(Probe("mlp.gate_out" if spec.has_gate_out else "mlp.hidden", functools.partial(_code, first=first)))

    def run(values: Any, tokens: Array) -> Any:
        module = nnx_compat.merge(model.structure, values)
        mask = None if sparse is None else jnp.broadcast_to(sparse, tokens.shape)
        _, stats, _ = module.features({"tokens": tokens}, Context(mode="prefill", sparsify=mask, probes=tuple(probes)))
        return {site: {name: stat.value for name, stat in group.items()} for site, group in stats.items()}

    return jax.jit(run)


def _code(tensor: Any, ctx: Context, *, first: int) -> dict[str, Stat]:
    return {"code": Stat(pack(dense(tensor)[:, first:] > 0))} if len(tensor.shape) == 3 else {}


def _active(tensor: Any, ctx: Context, *, first: int, length: int) -> dict[str, Stat]:
    """The active entries of a batch as bits [B, T, W], with an empty array that says their number; rows of experts counted."""
    active = dense(tensor) != 0
    if active.ndim == 3:
        return {"bits": Stat(pack(active[:, first:])), "width": Stat(jnp.zeros((0, active.shape[-1])))}
    return {name: Stat(value) for name, value in _row_counts(active, ctx, first, length).items()}


def batched_counts(active: Bool[Array, "B T F"], union: Sequence[int], blocks: Sequence[int]) -> dict[str, Array]:
    """Sums over a batch: nonzeros and entries [T], fired [F], overlap and neighbours [], union/B and unions/B [T],
    occupied/b and blocks/b [T]."""
    batch, length, width = active.shape

    def by_position(flags: Array) -> Array:
        return jnp.sum(flags, axis=(0, 2), dtype=jnp.float32)

    sizes = jnp.sum(active, axis=-1, dtype=jnp.float32)[:, 1:]
    shared = jnp.sum(active[:, 1:] & active[:, :-1], axis=-1, dtype=jnp.float32)
    counts = {
        "nonzeros": by_position(active),
        "entries": jnp.full((length,), batch * width, jnp.float32),
        "fired": jnp.sum(active, axis=(0, 1), dtype=jnp.float32),
        "overlap": jnp.sum(jnp.where(sizes > 0, shared / jnp.maximum(sizes, 1), 0)),
        "neighbours": jnp.sum(sizes > 0, dtype=jnp.float32),
    }
    for size in union:
        groups = batch // size
        joined = active[: groups * size].reshape(groups, size, length, width).any(axis=1)
        counts |= {f"union/{size}": by_position(joined), f"unions/{size}": jnp.full((length,), groups * width, jnp.float32)}
    for block in blocks:
        number = -(-width // block)
        padded = jnp.pad(active, ((0, 0), (0, 0), (0, number * block - width)))
        hit = padded.reshape(batch, length, number, block).any(axis=-1)
        counts |= {f"occupied/{block}": by_position(hit), f"blocks/{block}": jnp.full((length,), batch * number, jnp.float32)}
    return counts


def _row_counts(active: Bool[Array, "R F"], ctx: Context, first: int, length: int) -> dict[str, Array]:
    """Sums over rows in an expert's layout, empty rows and those out of scope left out."""
    rows = (ctx.token_mask & (ctx.positions >= first)).reshape(-1)
    active = active & rows[:, None]
    position = jnp.clip(ctx.positions.reshape(-1) - first, 0, length - first - 1)
    nonzeros = jnp.sum(active, axis=-1, dtype=jnp.float32)
    entries = rows * jnp.float32(active.shape[-1])
    return {
        "nonzeros": jax.ops.segment_sum(nonzeros, position, length - first),
        "entries": jax.ops.segment_sum(entries, position, length - first),
        "fired": jnp.sum(active, axis=0, dtype=jnp.float32),
    }


def coverage(fired: Float[np.ndarray, "... F"]) -> Float[np.ndarray, "... 21"]:
    """cov(q) = activations of the q most frequent units over all activations, q of `COVERAGE`; nan where nothing fired."""
    width = fired.shape[-1]
    ordered = -np.sort(-fired, axis=-1)
    total = np.concatenate([np.zeros((*fired.shape[:-1], 1)), np.cumsum(ordered, axis=-1)], axis=-1)
    with np.errstate(invalid="ignore"):
        curve = total / total[..., -1:]
    return np.stack([_between(curve, q * width) for q in COVERAGE], axis=-1)


def _between(curve: np.ndarray, at: float) -> np.ndarray:
    low = min(int(at), curve.shape[-1] - 2)
    return curve[..., low] + (at - low) * (curve[..., low + 1] - curve[..., low])


def _add(totals: dict[str, np.ndarray], site: str, layers: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Sums in float64, stacked over layers."""
    for name in layers[0]:
        stacked = np.stack([np.asarray(counts[name], np.float64) for counts in layers])
        totals[f"{site}/{name}"] = totals.get(f"{site}/{name}", 0.0) + stacked


def _site_activity(counts: Mapping[str, np.ndarray], edges: np.ndarray) -> SiteActivity:
    nonzeros, entries, fired = counts["nonzeros"], counts["entries"], counts["fired"]
    starts = edges[:-1] - edges[0]
    batched = "neighbours" in counts
    with np.errstate(invalid="ignore"):  # no neighbours, or no token at a position: nan, which is what is known
        binned = 1 - np.add.reduceat(nonzeros, starts, axis=-1) / np.add.reduceat(entries, starts, axis=-1)
        overlap = counts["overlap"] / counts["neighbours"] if batched else None

    def share(part: str, whole: str) -> dict[int, np.ndarray] | None:
        sizes = sorted(int(name.partition("/")[2]) for name in counts if name.startswith(f"{part}/"))
        found = {size: counts[f"{part}/{size}"].sum(-1) / counts[f"{whole}/{size}"].sum(-1) for size in sizes}
        return found if batched else None

    return SiteActivity(
        width=fired.shape[-1],
        zero_fraction=1 - nonzeros.sum(-1) / entries.sum(-1),
        zero_fraction_position=binned,
        dead_units=np.sum(fired == 0, axis=-1),
        coverage=coverage(fired),
        overlap=overlap,
        union=share("union", "unions"),
        occupancy=share("occupied", "blocks"),
    )
