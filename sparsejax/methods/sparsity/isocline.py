"""Isocline: thresholds at which one more dropped parameter costs the model the same everywhere. A method of this project.

Acts on the input of every linear map of a block, as TEAL does, with WINA's score:

    y = (x * m) W,   m = |x_j| ||W[j, :]|| > t        x[in], W[in, out], t by site

so that a token that is hard keeps more. The thresholds come from the loss. At a plan s (site -> share dropped) the whole sparse
model is run forward and backward, and

    lambda_i = dL/ds_i / n_i       L: mean KL(dense || sparse) per token, in nats; n_i: parameters of site i

is what one more parameter dropped at site i costs, with all other sites as sparse as they are. Where all lambda are equal no
exchange between two sites gains. A share has a gradient through its threshold t_i(s_i): the step score > t passes the gradient
of a ramp of width +- `RAMP` t around it, so that each entry near the threshold counts with x_j dL/dx_j, its effect on the loss.

lambda is noisy and grows steeply with s: it is taken to be a_i s^p, a_i is fitted to all rounds by least squares and averaged
over neighbouring layers, and the next plan goes towards a_i s_i^p equal everywhere, odds by no more than a factor `STRIDE`
before all are moved together to meet the target. p = 3.5 is what SmolLM2 shows (gate and up: the loss rises 7.9-fold from a
share of .3 to .5). Block-wise searches (TEAL) know neither the layers behind a block nor that blocks differ; curves of one site
at a time (`EqualMarginal`) do not see what the other sites drop. No basis is changed and no factor added.
Composed of: TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427). With weights that make up for it: `configs/recipes/refit.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax import nnx_compat
from sparsejax.arrays import dense
from sparsejax.compress.allocate import Plan, Sizes, check_reachable
from sparsejax.compress.allocators import Allocator, Problem
from sparsejax.compress.recipe import Tier
from sparsejax.compress.surgery import Placed, chain_at, place
from sparsejax.context import Context
from sparsejax.io.name_map import parameter_slots
from sparsejax.methods.sparsity.selection import SCORES, along, fitted, score_of
from sparsejax.methods.sparsity.wina import Wina
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import Weight, weight
from sparsejax.plugs import check, check_choice, register

KNOTS = np.linspace(0, 0.98, 50)  # shares at which thresholds are known; straight lines between
LEAST, MOST = 0.02, 0.95  # of a site: beyond, a share has hardly a gradient
RAMP = 0.3  # of the threshold
LOGITS_TOGETHER = 64  # tokens
STRIDE = 2.0  # of a site's odds in one round
WINDOW = np.array([1, 2, 3, 2, 1])  # weights of neighbouring layers
FLOOR = 0.3  # of the mean over the layers of a kind of map: what a site costs at least, where noise says less or nothing

Shares = dict[str, Array]  # by the path of a stack of them


@register("pass", "isocline")
@dataclass
class Isocline(Wina):
    """sparsity: parameter-weighted mean over `sites`, of the whole model."""

    select: str = "threshold"
    allocator: Allocator = field(default_factory=lambda: MarginalLoss())

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        check_choice("isocline: select", self.select, ("threshold",))


@register("activation_op", "share_threshold")
@dataclass(frozen=True)
class ShareThreshold:
    """x where its score is above the threshold that drops a share, with a gradient for that share."""

    score: str = "magnitude"

    def __post_init__(self) -> None:
        check_choice("share_threshold: score", self.score, SCORES)

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...], key: Array) -> dict[str, Weight]:
        """share [], thresholds [K] at `KNOTS`, and scale [in] of weighted scores."""
        table = weight(jnp.zeros((len(KNOTS),), jnp.float32), (None,), "fitted")
        scale = {"scale": fitted(shape[-2])} if self.score == "weighted" else {}
        return {"share": fitted(None), "thresholds": table, **scale}

    def validate(self, features: int, field: str) -> None:
        """Any width will do."""

    def __call__(self, arrays: dict[str, Array], x: Any, ctx: Context) -> Array:
        values, score = dense(x), score_of(x, self.score, arrays)
        threshold = jnp.interp(arrays["share"], jnp.asarray(KNOTS, jnp.float32), arrays["thresholds"])
        width = jax.lax.stop_gradient(2 * RAMP * threshold) + jnp.finfo(jnp.float32).tiny
        ramp = jnp.clip((score - along(threshold, score)) / width + 0.5, 0, 1)
        kept = ctx.kept(score > along(threshold, score)).astype(values.dtype)
        return values * (kept + (ramp - jax.lax.stop_gradient(ramp)).astype(values.dtype))


@register("allocator", "marginal_loss")
@dataclass(frozen=True)
class MarginalLoss(Allocator):
    """See the module. Every calibration sequence is run once, in `rounds` of as many plans; selections must be thresholds.

    power: p of the module docstring.
    """

    rounds: int = 4
    power: float = 3.5
    experts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self.rounds >= 1, "MarginalLoss: rounds", self.rounds, "must be at least 1")
        check(self.power > 0, "MarginalLoss: power", self.power, "must be positive")

    @property
    def most(self) -> float:
        return MOST

    def __call__(self, problem: Problem, target: float) -> Plan:
        check_reachable(problem.sizes, dict.fromkeys(problem.sites, self.most), target)
        sites, key = problem.sites, f"marginal-{self.key(problem)}-{target:g}"
        size = np.array([problem.sizes[site] for site in sites], np.float64)
        shares, losses = np.full(len(sites), np.clip(target, LEAST, MOST)), []
        seen, powers = np.zeros(len(sites)), np.zeros(len(sites))
        slopes = functools.cache(lambda: Slopes(problem))
        tokens = problem.work.calibration.tokens
        with problem.work.progress("marginal losses", len(tokens)) as advance:
            for rows in (part for part in np.array_split(np.arange(len(tokens)), self.rounds) if len(part)):
                found = []
                for row in rows:
                    measure = functools.partial(_measured, slopes, shares, tokens[row : row + 1])
                    found.append(problem.work.piece(f"{key}-{row}", measure))
                    advance(1)
                losses.append(float(np.mean([one["loss"] for one in found])))
                slope = np.mean([one["slopes"] for one in found], axis=0) / size
                seen, powers = seen + slope * shares**self.power, powers + shares ** (2 * self.power)
                wanted = smoothed(sites, seen / powers) ** (-1 / self.power)
                wanted = at_target(wanted / wanted.mean() * target, size, target)
                shares = at_target(within_stride(shares, wanted), size, target)
        problem.work.note("marginal_loss", kl_by_round=[round(loss, 4) for loss in losses])
        return dict(zip(sites, map(float, shares), strict=True))

    def cost(self, sizes: Sizes, target: float, tier: Tier) -> str:
        return f"{tier.sequences} gradients of {tier.length} tokens through the whole model"


def _measured(slopes: Callable[[], Slopes], shares: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A finished piece; the program is made when the first is asked for that was not kept."""
    loss, found = slopes()(shares, tokens)
    return {"loss": np.asarray(loss), "slopes": found}


def at_target(shares: np.ndarray, sizes: np.ndarray, target: float) -> np.ndarray:
    """Shares in [LEAST, MOST] with all odds s / (1 - s) multiplied by one number, so that their mean by size is the target."""
    odds = np.clip(shares, 1e-6, 1 - 1e-6)
    odds = np.log(odds / (1 - odds))

    def shifted(by: float) -> np.ndarray:
        return np.clip(1 / (1 + np.exp(-odds - by)), LEAST, MOST)

    low, high = -30.0, 30.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shifted(middle) @ sizes < target * sizes.sum() else (low, middle)
    return shifted(high)


def within_stride(shares: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`wanted` with odds at most `STRIDE` times, at least 1 / `STRIDE` of those of `shares`."""
    odds = shares / (1 - shares)
    found = np.clip(wanted / (1 - wanted), odds / STRIDE, odds * STRIDE)
    return found / (1 + found)


def smoothed(sites: Sequence[str], costs: np.ndarray) -> np.ndarray:
    """a_i with noise taken off: averaged over the neighbouring layers of one kind of map, where `WINDOW` weighs them, the first
    and the last layer apart, which are known to differ; and at least `FLOOR` of the kind's mean."""
    found = np.empty_like(costs)
    kinds = [site.split(".", 2)[2] for site in sites]
    least = np.abs(costs).mean() * 1e-3 or 1.0
    for kind in set(kinds):
        rows = [number for number, one in enumerate(kinds) if one == kind]  # layers in rising order
        own = costs[rows]
        mixed, inner = own.copy(), own[1:-1]
        if len(inner):
            totals, weights = (np.convolve(x, WINDOW, "full")[2:-2] for x in (inner, np.ones_like(inner)))
            mixed[1:-1] = totals / weights
        found[rows] = np.maximum(mixed, max(FLOOR * own.mean(), least))
    return found


class Slopes:
    """dL/ds of every site at a plan, see the module."""

    def __init__(self, problem: Problem):
        """Place thresholds with gradients.

        Raises:
          ConfigError: the problem's selection is not by thresholds.
        """
        self.dense, self.sites = problem.model, problem.sites
        placed = {site: _with_gradient(problem, site) for site in self.sites}
        self.model = place(self.dense, "inputs", placed)
        number = {site: len(chain_at(self.dense.config, "inputs", site)) for site in self.sites}
        slots = parameter_slots(self.model.module(), self.model.structure.paths)
        self.slots = [slots[f"{site}.inputs.{number[site]}.share"] for site in self.sites]
        self._features = jax.jit(self._dense_features)
        self._step = jax.jit(jax.value_and_grad(self._loss))

    def __call__(self, shares: np.ndarray, tokens: Int[np.ndarray, "1 T"]) -> tuple[float, np.ndarray]:
        """(L, dL/ds float64 by site)."""
        stacks = {".".join(slot.path): np.array(nnx_compat.at(self.model.values, slot.path)) for slot in self.slots}
        for slot, share in zip(self.slots, shares, strict=True):
            stacks[".".join(slot.path)][... if slot.row is None else slot.row] = share
        target = self._features(self.dense.values, jnp.asarray(tokens))
        loss, slopes = self._step(stacks, self.model.values, self.dense.values, jnp.asarray(tokens), target)
        slopes = jax.device_get(slopes)
        found = [slopes[".".join(slot.path)][... if slot.row is None else slot.row] for slot in self.slots]
        return float(loss), np.asarray(found, np.float64)

    def _dense_features(self, values: Any, tokens: Array) -> Float[Array, "1 T D"]:
        return _features(nnx_compat.merge(self.dense.structure, values), tokens)

    def _loss(self, shares: Shares, values: Any, dense_values: Any, tokens: Array, target: Array) -> Array:
        values = jax.tree.map(lambda leaf: leaf, values)
        for path, stack in shares.items():
            nnx_compat.put(values, tuple(path.split(".")), stack)
        sparse = nnx_compat.merge(self.model.structure, values)
        whole, dtype = nnx_compat.merge(self.dense.structure, dense_values), self.dense.config.dtype

        @jax.checkpoint
        def divergence(pair: tuple[Array, Array]) -> Array:
            ours = jax.nn.log_softmax(sparse.logits(pair[0].astype(dtype)))
            theirs = jax.nn.log_softmax(whole.logits(pair[1].astype(dtype)))
            return jnp.sum(jnp.exp(theirs) * (theirs - ours))

        together = np.gcd(tokens.size, LOGITS_TOGETHER)
        features = (_features(sparse, tokens), target)
        parts = jax.lax.map(divergence, tuple(h.reshape(-1, together, h.shape[-1]) for h in features))
        return jnp.sum(parts) / tokens.size


def _features(module: Any, tokens: Array) -> Array:
    return module.features({"tokens": tokens}, Context(mode="prefill"))[0]


def _with_gradient(problem: Problem, site: str) -> Placed:
    """The site's thresholds at `KNOTS` in one op."""
    placed = [problem.select(site, float(share)) for share in KNOTS]
    name, _, options = placed[0].op.partition(":")
    known = name == "threshold" and "channels=true" not in options
    check(known, f"{problem.name}: allocator", "marginal_loss", f"needs one threshold per site, and {site} has {placed[0].op}")
    arrays: Mapping[str, Any] = placed[0].arrays
    scale = {"scale": arrays["scale"]} if "scale" in arrays else {}
    thresholds = np.maximum([float(one.arrays["threshold"]) for one in placed], 0)  # -1 keeps exact zeros, which cost nothing
    op = f"share_threshold:{options}" if options else "share_threshold"
    return Placed(op, {"share": 0.0, "thresholds": thresholds, **scale})
