"""PPL-p%: how sparse the FFN may be made at a rise of the perplexity by p per cent ("Sparsing Law", 2024, arXiv 2411.02335).

One number x in [0, 1] for all layers decides what every layer truncates; x is raised until the loss on held-out windows has
grown by ln(1 + p / 100), and the sparsity there is the result, 1 less it the activation ratio. What x means:

    cett   the bound on CETT (see `evaluate.cett`); layer l drops |h_i| ||Wd[i, :]|| <= t_l(x)        the paper's metric
    topk   each token keeps the (1 - x) F largest |h_i| ||Wd[i, :]||, in every layer alike
    fat    |gate| <= eps drops the unit, one eps for all layers, the x-quantile of calibration (FAT-eps; |h| without a gate)

Layers are fitted independently on the dense model's activations on calibration text; the loss is that of the whole sparse model
on other text, over all tokens in scope. Error: of the paired loss difference, carried to sparsity through the points evaluated.
The search evaluates few points: bracketed, by interpolation of log loss rise over log x, halved where that stalls. Of what it
has evaluated the largest x the tolerance of the target counts, so that the result cannot fall with p.
Not here: sink protection (`scope` has it), and top-k over a flattened batch as in the released baseline.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.arrays import dense
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import Work
from sparsejax.compress.statistics import Quantiles
from sparsejax.compress.surgery import Placed, chain_at, place
from sparsejax.evaluate.cett import CettCurve, cett_curve, neuron_norms
from sparsejax.evaluate.perplexity import Windows, paired_difference, perplexity
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.scoring import Scorer
from sparsejax.evaluate.sparsity import Activity, ActivityCounter
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.plugs import check, check_choice, resolve

PERCENTS = (1.0, 5.0, 10.0)
TOLERANCE = 0.02  # of the loss rise asked for
ERROR_SHARE = 0.25  # of a point's standard error, where that is more: closer is not worth another evaluation
MOST_POINTS = 12  # evaluations for each p at most
NARROWEST = 1e-3  # bracket in sparsity that is not halved further


def loss_rise(percent: float) -> float:
    """ln(1 + p / 100), by which the loss grows: .00995 at p = 1."""
    return math.log1p(percent / 100)


class Truncation(abc.ABC):
    """What x means. `fit` gathers calibration statistics, one layer at a time; `place` makes the sparse model at an x."""

    start = 0.5  # the first x that is tried

    def __init__(self, pieces: Sequence[Mapping[str, np.ndarray]]):
        """Take what `fit` found of each layer."""
        self.pieces = pieces

    @staticmethod
    @abc.abstractmethod
    def taps(config: ModelConfig) -> tuple[str, ...]:
        """Tensors that `fit` needs of a block."""

    @staticmethod
    @abc.abstractmethod
    def fit(tensors: Sequence[np.ndarray], down: Any) -> dict[str, np.ndarray]:
        """Statistics of one layer: tensors [N, F], down's kernel [F, D]."""

    @abc.abstractmethod
    def place(self, model: Model, x: float) -> Model:
        """The model that truncates by x; models of all x share one structure."""

    @abc.abstractmethod
    def predicted(self, x: float) -> float:
        """The sparsity at x on calibration tokens, mean over layers."""


class CettBound(Truncation):
    """x bounds the CETT of every layer."""

    start = 0.2

    @staticmethod
    def taps(config: ModelConfig) -> tuple[str, ...]:
        return ("mlp.down",)

    @staticmethod
    def fit(tensors: Sequence[np.ndarray], down: Any) -> dict[str, np.ndarray]:
        return {**cett_curve(jnp.asarray(tensors[0]), down)._asdict(), "scale": np.asarray(neuron_norms(down))}

    def curves(self) -> list[CettCurve]:
        """Of each layer."""
        return [CettCurve(*(piece[name] for name in CettCurve._fields)) for piece in self.pieces]

    def place(self, model: Model, x: float) -> Model:
        thresholds = [jnp.float32(curve.at(x)[0]) for curve in self.curves()]
        plan = [{"threshold": t, "scale": piece["scale"]} for t, piece in zip(thresholds, self.pieces, strict=True)]
        return _at_down(model, "threshold:score=weighted", plan)

    def predicted(self, x: float) -> float:
        return float(np.mean([curve.at(x)[1] for curve in self.curves()]))


class TopK(Truncation):
    """x is the share of units that every token drops in every layer."""

    @staticmethod
    def taps(config: ModelConfig) -> tuple[str, ...]:
        return ()

    @staticmethod
    def fit(tensors: Sequence[np.ndarray], down: Any) -> dict[str, np.ndarray]:
        return {"scale": np.asarray(neuron_norms(down))}

    def place(self, model: Model, x: float) -> Model:
        scales = [piece["scale"] for piece in self.pieces]
        plan = [{"count": jnp.float32(self._kept(x, len(scale))), "scale": scale} for scale in scales]
        return _at_down(model, "topk:fitted=true,score=weighted", plan)

    def predicted(self, x: float) -> float:
        return float(np.mean([1 - self._kept(x, len(piece["scale"])) / len(piece["scale"]) for piece in self.pieces]))

    def _kept(self, x: float, width: int) -> int:
        return max(1, round((1 - x) * width))


class FatEpsilon(Truncation):
    """x is the quantile of |gate| over all layers at which one threshold lies."""

    @staticmethod
    def taps(config: ModelConfig) -> tuple[str, ...]:
        return ("mlp.gate_out",) if _gated(config) else ("mlp.down",)

    @staticmethod
    def fit(tensors: Sequence[np.ndarray], down: Any) -> dict[str, np.ndarray]:
        ranks = np.linspace(0, 1, 513)[1:]
        quantiles = Quantiles(np.abs(tensors[0]))
        return {"quantiles": np.array([quantiles(rank) for rank in ranks], np.float32)}

    def place(self, model: Model, x: float) -> Model:
        pooled = np.concatenate([[0.0], np.sort(np.concatenate([piece["quantiles"] for piece in self.pieces]))])
        epsilon = np.interp(x, np.linspace(0, 1, len(pooled)), pooled)
        arrays = {"threshold": jnp.float32(epsilon)}
        if not _gated(model.config):
            return _at_down(model, "threshold", [arrays] * len(self.pieces))
        return place(model, "neurons", {f"blocks.{i}.mlp": Placed("gate_threshold", arrays) for i in range(len(self.pieces))})

    def predicted(self, x: float) -> float:
        return x


TRUNCATIONS: dict[str, type[Truncation]] = {"cett": CettBound, "topk": TopK, "fat": FatEpsilon}


@dataclass(frozen=True)
class Point:
    """The sparse model at one x: its loss less the dense loss on the same windows with its error, and the sparsity expected."""

    x: float
    rise: float
    error: float
    predicted: float


@dataclass(frozen=True)
class PplP:
    """PPL-p% of one truncation.

    Fields:
      percent: p. target: ln(1 + p / 100). x, rise, error: of the point that counts, see `Point`.
      perplexity: exp(dense loss + rise).
      sparsity: zeros of the hidden vector, mean over layers and tokens in scope. layers: [L].
      low, high: sparsity where the loss rise is the target less and plus its standard error.
      activation_ratio: 1 - sparsity.
      activity: everything counted at this point, see `evaluate.sparsity`.
    """

    percent: float
    target: float
    x: float
    rise: float
    error: float
    perplexity: float
    sparsity: float
    low: float
    high: float
    activation_ratio: float
    layers: np.ndarray
    activity: Activity


@dataclass(frozen=True)
class Search:
    """What `ppl_p` returns: results by p, and every point that was evaluated, by x.

    cett_decreases: steps of the calibration grids along which CETT fell, over all layers; None where none was fitted.
    """

    truncation: str
    dense_loss: float
    results: list[PplP]
    points: list[Point]
    cett_decreases: int | None


def check_searchable(config: ModelConfig, truncation: str, percents: Sequence[float]) -> None:
    """Refuse what cannot be searched.

    Raises:
      ConfigError: an unknown truncation, a p that is not positive, layers of experts, neurons that are selected already.
    """
    check_choice("--truncation", truncation, TRUNCATIONS)
    check(percents and min(percents) > 0, "--ppl", tuple(percents), "expected percentages above 0")
    sites = rule_sites(config)
    lacking = [layer for layer in range(config.num_layers) if f"blocks.{layer}.mlp.down" not in sites["inputs"]]
    check(not lacking, "--ppl: layers", lacking, "have no dense FFN, for which CETT is defined")
    if truncation == "fat" and _gated(config):
        taken = [site for site in sites["neurons"] if chain_at(config, "neurons", site)]
        check(not taken, "--truncation=fat: neurons", taken[:4], "already have a selector of hidden units")


def ppl_p(
    model: Model,
    windows: Windows,
    work: Work,
    *,
    truncation: str = "cett",
    percents: Sequence[float] = PERCENTS,
    scope: Scope = Scope(),
    counter: ActivityCounter | None = None,
) -> Search:
    """Search the sparsity at each p.

    Args:
      model: a decoder with a dense FFN in every block, and its tokenizer.
      windows: held out, W tokens each.
      work: calibration tokens; where pieces (calibration, a point's losses, counts) are kept, so that a second call is free.
      truncation: of `TRUNCATIONS`.
      percents: p, positive.
      scope: at which tokens units are dropped, counted and scored.
      counter: what counts at the results, of the same window and scope; None: one with the usual sizes.
    Raises:
      ConfigError: see `check_searchable`.
    """
    check_searchable(model.config, truncation, percents)
    fitted = _fitted(model, truncation, work)
    losses = _Losses(windows, work, scope)
    baseline = losses("dense", lambda: model)
    points: dict[float, Point] = {}
    narrowest = max(NARROWEST, 1 / model.config.ffn.hidden)

    def close(low: float, high: float) -> bool:
        return fitted.predicted(high) - fitted.predicted(low) <= narrowest

    def rise(x: float) -> float:
        found = losses(f"{truncation}-{x:.9f}", lambda: fitted.place(model, x))
        points[x] = Point(x, *paired_difference(found, baseline), fitted.predicted(x))
        return points[x].rise

    def allowed(target: float, x: float) -> float:
        return tolerance(points[x].error, target)

    for percent in sorted(percents):
        target = loss_rise(percent)
        known = {x: point.rise for x, point in points.items()}
        search(rise, target, known, fitted.start, close, functools.partial(allowed, target))
    dense_loss = float(np.mean(baseline))
    counter = counter or ActivityCounter(windows.tokens.shape[1], scope=scope)
    results = []
    for percent in percents:
        chosen = chosen_point(list(points.values()), loss_rise(percent))
        count = functools.partial(_counts, counter, fitted, model, chosen.x, windows)
        counts = work.piece(f"{truncation}-{chosen.x:.9f}-counts", count)
        results.append(_result(percent, chosen, list(points.values()), fitted, dense_loss, counter.activity(counts)))
    decreases = sum(curve.decreases for curve in fitted.curves()) if isinstance(fitted, CettBound) else None
    return Search(truncation, dense_loss, results, [points[x] for x in sorted(points)], decreases)


def _counts(counter: ActivityCounter, fitted: Truncation, model: Model, x: float, windows: Windows) -> dict[str, np.ndarray]:
    return counter.count(fitted.place(model, x), windows.tokens)


def search(
    rise: Callable[[float], float],
    target: float,
    known: dict[float, float],
    start: float,
    close: Callable[[float, float], bool],
    allowed: Callable[[float], float],
) -> None:
    """Evaluate `rise` at x in (0, 1) until it is within `allowed(x)` of the target, or the x around it are close.

    Args:
      rise: 0 at x = 0, growing on the whole.
      target: positive.
      known: x -> rise of what was evaluated before; added to.
      start: the first x where nothing is known.
      close: whether two x around the target need not be told apart. allowed: see `tolerance`.
    """
    for step in range(MOST_POINTS):
        low = max((x for x, value in known.items() if value <= target), default=0.0)
        high = min((x for x, value in known.items() if value > target and x > low), default=1.0)
        if close(low, high) or any(abs(value - target) <= allowed(x) for x, value in known.items()):
            return
        guess = start if not known else _interpolated(low, high, known, target) if step % 3 < 2 else (low + high) / 2
        margin = 0.02 * (high - low)
        x = min(max(guess, low + margin), high - margin)
        known[x] = rise(x)


def _interpolated(low: float, high: float, known: Mapping[float, float], target: float) -> float:
    """Where log rise, linear in log x, reaches the target; from one end with slope 2, as an error's energy would grow."""
    ends = [(math.log(x), math.log(known[x])) for x in (low, high) if x > 0 and known.get(x, 0) > 0]
    if len(ends) == 2:
        (x0, y0), (x1, y1) = ends
        return math.exp(x0 + (x1 - x0) * (math.log(target) - y0) / (y1 - y0))
    return math.exp(ends[0][0] + (math.log(target) - ends[0][1]) / 2) if ends else (low + high) / 2


def tolerance(error: float, target: float) -> float:
    """How far from the target the loss rise of a point may lie."""
    return max(TOLERANCE * target, 0.0 if math.isnan(error) else ERROR_SHARE * error)


def chosen_point(points: Sequence[Point], target: float) -> Point:
    """The largest x whose loss rise is at most the target and its tolerance; x = 0, where nothing changes, if none is."""
    allowed = [point for point in points if point.rise <= target + tolerance(point.error, target)]
    return max(allowed, key=lambda point: point.x, default=Point(0.0, 0.0, 0.0, math.nan))


def _result(
    percent: float, chosen: Point, points: Sequence[Point], fitted: Truncation, dense_loss: float, activity: Activity
) -> PplP:
    layers = activity.sites["mlp.down"].zero_fraction
    sparsity, target = float(np.mean(layers)), loss_rise(percent)

    def at(rise: float) -> float:
        """Sparsity where the loss has grown by `rise`: as calibration tells it for the x there, beside that of the result's."""
        shift = fitted.predicted(x_at(points, rise)) - fitted.predicted(chosen.x)
        return min(max(sparsity + shift, 0.0), 1.0)

    return PplP(
        percent=percent,
        target=target,
        x=chosen.x,
        rise=chosen.rise,
        error=chosen.error,
        perplexity=math.exp(dense_loss + chosen.rise),
        sparsity=sparsity,
        low=at(chosen.rise - chosen.error),
        high=at(chosen.rise + chosen.error),
        activation_ratio=1 - sparsity,
        layers=layers,
        activity=activity,
    )


def x_at(points: Sequence[Point], rise: float) -> float:
    """x at a loss rise, linear in its square root between the points evaluated and 0; beyond them as between the last two."""
    if math.isnan(rise):
        return math.nan
    ordered = sorted(points, key=lambda point: point.x)
    xs = np.array([0.0, *(point.x for point in ordered)])
    roots = np.sqrt(np.maximum.accumulate(np.maximum([0.0, *(point.rise for point in ordered)], 0)))
    root = math.sqrt(max(rise, 0.0))
    if root <= roots[-1]:
        return float(np.interp(root, roots, xs))
    below = int(np.flatnonzero(roots < roots[-1])[-1]) if roots[-1] > 0 else 0
    slope = (xs[-1] - xs[below]) / (roots[-1] - roots[below]) if roots[-1] > roots[below] else 0.0
    return float(min(1.0, xs[-1] + slope * (root - roots[-1])))


class _Losses:
    """Losses of the held-out windows under models that share one structure, or the dense one before them."""

    def __init__(self, windows: Windows, work: Work, scope: Scope):
        self.windows, self.work, self.scope = windows, work, scope
        self.scorers: dict[bool, Scorer] = {}

    def __call__(self, name: str, model: Callable[[], Model]) -> np.ndarray:
        """float64 [n], read where they were kept."""
        return self.work.piece(f"{name}-losses", lambda: {"losses": self._score(name, model())})["losses"]

    def _score(self, name: str, model: Model) -> np.ndarray:
        scorer = self.scorers.setdefault(name == "dense", Scorer(model, scope=self.scope))
        scorer.model = model  # other values; what was compiled for the structure stays
        assert model.tokenizer is not None
        with self.work.progress(f"loss at {name}, tokens", self.windows.tokens.size) as advance:
            return perplexity(scorer, self.windows, model.tokenizer.token_bytes, advance).window_losses


def _fitted(model: Model, truncation: str, work: Work) -> Truncation:
    """Calibrated on the dense model's activations, block by block."""
    kind = TRUNCATIONS[truncation]

    def fit() -> dict[str, np.ndarray]:
        blocks, taps = Blocks(model), kind.taps(model.config)
        found: dict[str, np.ndarray] = {}
        skip, h = work.calibration.spec.skip_first, None
        if taps:
            h = blocks.embed(jnp.asarray(work.calibration.tokens))
        for layer in work.layers(f"{truncation} on calibration text, blocks", len(blocks)):
            tensors: dict[str, Any] = {}
            if h is not None:
                h, tensors = blocks.tensors(layer, h, *taps)
            rows = [np.asarray(tensor, np.float32)[:, skip:].reshape(-1, tensor.shape[-1]) for tensor in tensors.values()]
            down = dense(blocks.values(layer)["mlp"]["down"]["kernel"])
            found |= {f"{layer}/{name}": value for name, value in kind.fit(rows, down).items()}
        return found

    kept = work.piece(f"{truncation}-calibration", fit)
    pieces: list[dict[str, np.ndarray]] = [{} for _ in range(model.config.num_layers)]
    for key, value in kept.items():
        layer, _, name = key.partition("/")
        pieces[int(layer)][name] = value
    return kind(pieces)


def _at_down(model: Model, op: str, plan: Sequence[Mapping[str, Any]]) -> Model:
    """An op at the input of every down map, with each layer's arrays."""
    return place(model, "inputs", {f"blocks.{i}.mlp.down": Placed(op, arrays) for i, arrays in enumerate(plan)})


def _gated(config: ModelConfig) -> bool:
    return resolve("nonlinearity", config.ffn.activation, "model.ffn.activation").has_gate_out
