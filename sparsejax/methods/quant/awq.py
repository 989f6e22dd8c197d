"""AWQ: input channels that carry much are scaled up before rounding, and weights are clipped where that costs least.

"AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (Lin et al., 2023, arXiv 2306.00978). Acts on
float weights; `Rtn` or `Gptq` of the same format comes after it. For a tensor x[N, in] and the maps W[in, out] that read it:

    s(r) = max(m^r, 1e-4),  s <- s / sqrt(max s min s),   m_k = mean |x_k|
    r* = argmin over r of 0, .05, ..., .95 of || M(x; Q(diag(s) W) / s) - M(x; W) ||^2
    cap* = argmin over p of 1, .95, ..., .55: mean (sum_{k in group} x_k (w_k - Q(clip(w_k, +-p max |w|))))^2  by group, output

M is the attention or the feed-forward network behind a norm, and the map itself behind v and up. s is merged into what gives x
(`compress.scaling`): r = 0 changes nothing, so that the search never ends above rounding to nearest. Then weights are clamped;
not those of q and k, whose errors meet in the softmax.
Where x comes from v with heads shared by several queries, or the hidden vector is not linear in up, maps stay unscaled: the
report names them. All inputs are those of the float model. Published: groups of 128, 128 x 512 tokens.
Differs from the released code: ranges of asymmetric formats hold 0; the errors of clipping are those of all tokens, by the
second moment of each group (theirs: 512 tokens). Not here: scales by weights and activations (duo scaling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax import nnx_compat
from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.packed import check_format, check_kernels, float_kernel
from sparsejax.compress.recipe import WEIGHTS, Pass, Tier, Work
from sparsejax.compress.scaling import Pair, merge_scales, note_equivalence, scaled_pairs
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of, maps_of, with_kernels
from sparsejax.models.config import ModelConfig
from sparsejax.ops.formats.quantize import fake
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check

RATIOS = tuple(step / 20 for step in range(20))
CAPS = tuple(1 - step / 20 for step in range(10))
UNCLIPPED = ("attn.q", "attn.k")


def awq_scales(mean: Float[np.ndarray, " in"], ratio: float) -> Float[np.ndarray, " in"]:
    """s(r) of the module docstring, float64; `mean`: of |x| by channel."""
    s = np.maximum(np.asarray(mean, np.float64) ** ratio, 1e-4)
    return s / np.sqrt(s.max() * s.min())


@partial(jax.jit, static_argnums=2)
def scaled_and_rounded(kernel: Float[Array, "in out"], s: Float[Array, " in"], spec: FormatSpec) -> Float[Array, "in out"]:
    """Q(diag(s) W) / s: what a map multiplies unscaled inputs by, once its scaled kernel is rounded."""
    column = s[:, None].astype(jnp.float32)
    return fake(kernel.astype(jnp.float32) * column, spec) / column


@partial(jax.jit, static_argnums=2)
def best_caps(kernel: Float[Array, "in out"], moment: Float[Array, "in in"], spec: FormatSpec) -> Float[Array, "in out"]:
    """The cap of |w| at each weight: one per group and output, that of `CAPS` with the least error of the group's partial sums.

    Args:
      kernel: as it will be rounded, scaled already.
      moment: the mean of x x^T of its inputs, of the same scale.
      spec: with scales of single outputs.
    """
    inputs, outputs = kernel.shape
    size = min(spec.block(kernel.shape)[0], inputs)
    fill, numbers = -inputs % size, jnp.arange(-(-inputs // size))

    def by_group(w: Array) -> Array:
        return jnp.pad(w, ((0, fill), (0, 0))).reshape(-1, size, outputs)

    squares = jnp.pad(moment, ((0, fill), (0, fill))).reshape(len(numbers), size, len(numbers), size)
    own = squares[numbers, :, numbers]  # of each group with itself
    largest = jnp.max(jnp.abs(by_group(kernel)), axis=1)  # [groups, out]

    def cap(share: Array) -> Array:
        return jnp.repeat(share * largest, size, axis=0)[:inputs]

    def error(share: Array) -> Array:
        limit = cap(share)
        d = by_group(kernel - fake(jnp.clip(kernel, -limit, limit), spec))
        return jnp.einsum("gko,gkl,glo->go", d, own, d)

    shares = jnp.asarray(CAPS, jnp.float32)
    best = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
    return jnp.repeat(best * largest, size, axis=0)[:inputs]


@dataclass
class Awq(Pass):
    """format: in which the weights will be rounded; scale, clip: whether to search for either; sites: the maps."""

    format: str = "int4:asym,group=64"
    scale: bool = True
    clip: bool = True
    sites: str = ALL_MAPS
    stage: ClassVar[str] = WEIGHTS

    def check(self, config: ModelConfig) -> None:
        spec, sites = FormatSpec.parse(self.format), maps_of(config, self.sites)
        check(self.scale or self.clip, "awq: scale, clip", False, "there is nothing to search for")
        check(spec.rounding != "stochastic", "awq: format", self.format, "rounds at random, so that no two errors compare")
        by_output = spec.granularity == "channel" or (spec.granularity == "group" and spec.axis == -2)
        rule = "has no scales of single outputs, by which weights are clipped; give channel or group, or clip=False"
        check(by_output or not self.clip, "awq: format", self.format, rule)
        check_format(config, sites, spec)
        if self.scale:
            scaled_pairs(config)

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, maps_of(model.config, self.sites))

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        searches = f" x {2 + len(RATIOS)}" if self.scale else ""
        return f"{config.num_layers} blocks{searches} passes of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        sites, search = maps_of(model.config, self.sites), _Search(model, FormatSpec.parse(self.format), work)
        pairs, skipped = scaled_pairs(model.config) if self.scale else ([], {})
        chosen = [pair for pair in pairs if set(pair.readers) <= set(sites)]  # a reader that stays as it is has no say
        streams = [search.blocks.embed(tokens) for tokens in batches_of(work.calibration)]
        found: dict[str, np.ndarray] = {}
        for layer in work.layers(self.name, len(search.blocks)):
            here = [site for site in sites if site.split(".")[1] == str(layer)]
            mine = [pair for pair in chosen if pair.layer == layer]
            clipped = [site for site in here if self.clip and site.split(".", 2)[2] not in UNCLIPPED]
            found |= work.piece(f"block{layer}", partial(search.block, layer, mine, clipped, streams))
            streams = [search.blocks.run(layer, h)[0] for h in streams]
        scales = {pair.producer: found[f"{pair.producer}:scale"] for pair in chosen}
        scaled = merge_scales(model, chosen, scales)
        note_equivalence(work, self.name, model, scaled)
        ratios = {pair.producer: float(found[f"{pair.producer}:ratio"]) for pair in chosen}
        gains = {pair.producer: float(found[f"{pair.producer}:gain"]) for pair in chosen}
        unscaled = {site: why for site, why in skipped.items() if site in sites}
        work.note(self.name, ratios=ratios, error_of_rounding=gains, unscaled=unscaled)
        caps = {name.removesuffix(":cap"): cap for name, cap in found.items() if name.endswith(":cap")}
        return _clamped(scaled, caps)


def _clamped(model: Model, caps: dict[str, np.ndarray]) -> Model:
    kernels = {}
    for site, cap in caps.items():
        kernel = float_kernel(model, site)
        kernels[f"{site}.kernel"] = jnp.clip(kernel, -jnp.asarray(cap, kernel.dtype), jnp.asarray(cap, kernel.dtype))
    return model.rebuilt(model.config, kernels)


class _Search:
    """The searches in one block, on what enters it in the float model."""

    def __init__(self, model: Model, spec: FormatSpec, work: Work):
        self.model, self.spec, self.blocks = model, spec, Blocks(model)
        self.skip = work.calibration.spec.skip_first
        self.parts: dict[Any, Any] = {}

    def block(self, layer: int, pairs: Sequence[Pair], clipped: Sequence[str], streams: Sequence[Array]) -> dict[str, Any]:
        """By `PRODUCER:scale`, `:ratio`, `:gain` (error over that of no scale), and `SITE:cap`."""
        entering = [self.blocks.tensors(layer, h, *INPUTS)[1] for h in streams]
        found: dict[str, Any] = {}
        of_site: dict[str, np.ndarray] = {}
        for pair in pairs:
            tap = _tap(pair.readers[0])
            s, ratio, gain = self._ratio(pair, [tensors[tap] for tensors in entering])
            found |= {f"{pair.producer}:scale": s, f"{pair.producer}:ratio": ratio, f"{pair.producer}:gain": gain}
            of_site |= {reader: s for reader in pair.readers}
        produced = {pair.producer: found[f"{pair.producer}:scale"] for pair in pairs}
        moments: dict[str, Array] = {}
        for site in clipped:
            tap = _tap(site)
            if tap not in moments:
                moments[tap] = self._moment([tensors[tap] for tensors in entering])
            kernel = float_kernel(self.model, site).astype(jnp.float32)
            taken = jnp.asarray(of_site.get(site, np.ones(len(kernel))), jnp.float32)
            given = jnp.asarray(produced.get(site, np.ones(kernel.shape[1])), jnp.float32)
            moment = moments[tap] / (taken[:, None] * taken[None])
            found[f"{site}:cap"] = best_caps(kernel * taken[:, None] / given[None], moment, self.spec)
        return {name: np.asarray(value) for name, value in found.items()}

    def _ratio(self, pair: Pair, entering: Sequence[Array]) -> tuple[np.ndarray, float, float]:
        """(s, r, error over that of r = 0) of the best ratio."""
        rows = [self._rows(x) for x in entering]
        mean = np.sum([np.asarray(jnp.sum(jnp.abs(x), axis=0), np.float64) for x in rows], axis=0) / sum(map(len, rows))
        error = self._error_of_part(pair, entering) if pair.of_norm else self._error_of_map(pair, entering)
        errors = [error(awq_scales(mean, ratio)) for ratio in RATIOS]
        best = int(np.argmin(errors))
        gain = errors[best] / errors[0] if errors[0] else 1.0
        return awq_scales(mean, RATIOS[best]), RATIOS[best], gain

    def _error_of_map(self, pair: Pair, entering: Sequence[Array]) -> Any:
        """(s) -> the mean square of what one map gives wrong."""
        (site,) = pair.readers
        kernel, moment = float_kernel(self.model, site), self._moment(entering)

        def error(s: np.ndarray) -> float:
            d = scaled_and_rounded(kernel, jnp.asarray(s, jnp.float32), self.spec) - kernel
            return float(jnp.sum(d * (moment @ d))) / kernel.shape[1]

        return error

    def _error_of_part(self, pair: Pair, entering: Sequence[Array]) -> Any:
        """(s) -> the mean square of what attention or the feed-forward network gives wrong."""
        layer, part = pair.layer, pair.readers[0].split(".")[2]
        run, own = self._part(layer, part), self.blocks.values(layer)
        wanted = [run(own, x) for x in entering]
        kernels = {site: float_kernel(self.model, site) for site in pair.readers}

        def error(s: np.ndarray) -> float:
            column = jnp.asarray(s, jnp.float32)
            values = with_kernels(own, {site: scaled_and_rounded(k, column, self.spec) for site, k in kernels.items()})
            found = (self._rows(run(values, x) - y) for x, y in zip(entering, wanted, strict=True))
            squares = [float(jnp.sum(jnp.square(d.astype(jnp.float32)))) for d in found]
            return sum(squares) / sum(y.size for y in wanted)

        return error

    def _part(self, layer: int, part: str) -> Any:
        """Attention or the feed-forward network of layers of one kind, as a function of (values, what its norm gives)."""
        key = (self.blocks.kind(layer), part)
        if key not in self.parts:

            def run(values: dict[str, Any], x: Array) -> Array:
                block, ctx = self.blocks.module(layer, values), self.blocks.context(x.shape[1], x.shape[0])
                with nnx_compat.read_only():
                    return block.attn(x, ctx, None)[0] if part == "attn" else block.mlp(x, ctx)[0]

            self.parts[key] = jax.jit(run)
        return self.parts[key]

    def _moment(self, entering: Sequence[Array]) -> Array:
        """The mean of x x^T, float32 [in, in]."""
        rows = [self._rows(x).astype(jnp.float32) for x in entering]
        return sum(x.T @ x for x in rows) / sum(map(len, rows))  # type: ignore[return-value]

    def _rows(self, x: Array) -> Array:
        return x[:, self.skip :].reshape(-1, x.shape[-1])


def _tap(site: str) -> str:
    local = site.split(".", 2)[2]
    return next(tap for tap, maps in INPUTS.items() if local in maps)
