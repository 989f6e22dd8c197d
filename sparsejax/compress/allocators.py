"""Allocators: the share that each site of a decoder drops, so that the parameter-weighted mean is the target.

    Uniform        the same everywhere
    FixedRatio     fixed ratios between kinds of sites, scaled to meet the target (La RoSA: o and down 1.2, all others .8)
    Greedy         in every block, step by step where the block's output error grows least (TEAL)
    EqualMarginal  over all blocks at once, from each site's own error curve: equal marginal error per parameter

An allocator is a frozen dataclass, named in recipes as `greedy:step=0.05`, that is called with a `Problem` and a target. Sizes
are parameters that a token passes: of the maps, of so many experts as it is sent to.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparsejax.compress.allocate import (
    MOST,
    Plan,
    Sizes,
    State,
    at_sparsity,
    check_reachable,
    equal_marginal,
    greedy,
    greedy_steps,
    plan_sparsity,
    proportional,
)
from sparsejax.compress.recipe import Tier, Work
from sparsejax.compress.trials import BlockTrials, Entering, Selection, Trials
from sparsejax.context import site_matches
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.models.sizes import expert_sites
from sparsejax.plugs import check, check_choice, register

# A greedy search is kept in pieces of so much sparsity of a block: they resume it, and serve later runs to other targets.
PIECE = 0.1
# Trials of one step of a lazy search (2.6 measured).
LAZY_TRIALS = 3


@dataclass(frozen=True)
class Problem:
    """What is to be allocated.

    Fields:
      model: dense, and what errors are measured against.
      sites: where something may be dropped.
      select: what a site gets at a share, see `trials.Selection`.
      work: calibration, tier, and where finished pieces are kept.
      name: of what is selected by, so that pieces of another selection are not taken for this one's.
    """

    model: Model
    sites: tuple[str, ...]
    select: Selection
    work: Work
    name: str = ""

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Parameters of each site's map that a token passes."""
        return site_sizes(self.model.config, self.sites)

    def of_layer(self, layer: int) -> dict[str, int]:
        """Sizes of a block's sites, by block-local name."""
        return sizes_by_layer(self.sizes)[layer]

    def each_layer(self, title: str) -> Iterator[int]:
        """The blocks that have a site, under a progress bar."""
        layers = sorted(sizes_by_layer(self.sizes))
        return (layers[number] for number in self.work.layers(title, len(layers)))


def site_sizes(config: ModelConfig, sites: Sequence[str]) -> dict[str, int]:
    """Parameters of each site's map that a token passes."""
    shapes, experts = rule_sites(config)["inputs"], expert_sites(config)
    return {site: math.prod(shapes[site]) * experts.get(site, (1, 1))[0] for site in sites}


def sizes_by_layer(sizes: Sizes) -> dict[int, dict[str, int]]:
    """By layer, and then by block-local name."""
    found: dict[int, dict[str, int]] = {}
    for site, size in sizes.items():
        _, layer, local = site.split(".", 2)
        found.setdefault(int(layer), {})[local] = size
    return found


def allocation_tokens(work: Work) -> np.ndarray:
    """int32[B, T]: the calibration's first tokens, as many as the tier gives allocation, of every text it was drawn from."""
    tokens, most = work.calibration.tokens, work.tier.allocation_tokens
    rows = max(len(work.calibration.spec.texts), most // tokens.shape[1])
    return tokens[:rows, : most // rows]


class Allocator(abc.ABC):
    """How a budget is shared, see the module; `experts`: whether also between the maps of experts."""

    experts: ClassVar[bool] = True

    @property
    def most(self) -> float:
        """The largest share that a site can get."""
        return MOST

    @abc.abstractmethod
    def __call__(self, problem: Problem, target: float) -> Plan:
        """{site: share}, whose parameter-weighted mean is the target.

        Raises:
          ConfigError: the sites cannot reach it.
        """

    def cost(self, sizes: Sizes, target: float, tier: Tier) -> str:
        """What it will take to share the target between sites of these sizes, for people; empty: next to nothing."""
        return ""

    def key(self, problem: Problem) -> str:
        """Of the pieces of this allocation: equal where they are."""
        told = (self, problem.name, problem.sites, problem.work.calibration.sha256, problem.work.tier)
        return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


@register("allocator", "uniform")
@dataclass(frozen=True)
class Uniform(Allocator):
    """The target at every site."""

    def __call__(self, problem: Problem, target: float) -> Plan:
        check_reachable(problem.sizes, dict.fromkeys(problem.sites, MOST), target)
        return dict.fromkeys(problem.sites, target)


@register("allocator", "fixed_ratio")
@dataclass(frozen=True)
class FixedRatio(Allocator):
    """Shares in fixed ratios, scaled to meet the target: the published .8 and 1.2 drop .92 of it when taken as they are.

    ratios: (glob, ratio); the first that names a site counts.
    """

    ratios: tuple[tuple[str, float], ...] = (("**.{attn.o,down}", 1.2), ("**", 0.8))

    def __call__(self, problem: Problem, target: float) -> Plan:
        found: dict[str, float] = {}
        for site in problem.sites:
            ratio = next((ratio for glob, ratio in self.ratios if site_matches(glob, site)), -1.0)
            check(ratio >= 0, "FixedRatio: ratios", self.ratios, f"must give {site} a ratio of 0 or more")
            found[site] = ratio
        return proportional(problem.sizes, found, target)


@register("allocator", "greedy")
@dataclass(frozen=True)
class Greedy(Allocator):
    """TEAL's search in every block, on the block's dense input; the error is the Frobenius norm over all tokens.

    step: of attn.q, in shares; others step by as many parameters, at most `LARGEST_STEP` (0: the tier's).
    lazy: see `allocate.greedy`.
    """

    step: float = 0.0
    lazy: bool = True

    def __call__(self, problem: Problem, target: float) -> Plan:
        check_reachable(problem.sizes, dict.fromkeys(problem.sites, MOST), target)
        return {f"blocks.{layer}.{local}": share for layer, states in self.tables(problem, target).items()
                for local, share in at_sparsity(states, target).items()}

    def tables(self, problem: Problem, upto: float) -> dict[int, list[State]]:
        """The states of each block's search, the dense one first, until all have reached a sparsity."""
        search = _Search(problem, self)
        return {layer: search.table(layer, upto) for layer in problem.each_layer("greedy allocation")}

    def cost(self, sizes: Sizes, target: float, tier: Tier) -> str:
        blocks = sizes_by_layer(sizes)
        steps = greedy_steps(next(iter(blocks.values())), self.step or tier.allocation_step)
        count = round(sum(target / step for step in steps.values()))
        trials = LAZY_TRIALS if self.lazy else len(steps)
        return f"{len(blocks)} blocks x about {count} steps x {trials} trials of {tier.allocation_tokens} tokens"


class _LayerTrials:
    """The trials of a problem by layer, in rising order; nothing is placed or run until a layer is asked for."""

    def __init__(self, problem: Problem, by_token: bool = False):
        self.problem, self.by_token = problem, by_token
        self._block: tuple[int, BlockTrials] | None = None

    @functools.cached_property
    def _all(self) -> tuple[Trials, Entering]:
        trials = Trials(self.problem.model, self.problem.sites, self.problem.select, self.by_token)
        return trials, Entering(trials.dense, allocation_tokens(self.problem.work))

    def at(self, layer: int) -> BlockTrials:
        if self._block is None or self._block[0] != layer:
            trials, entering = self._all
            self._block = layer, trials.block(layer, entering.at(layer))
        return self._block[1]


class _Search:
    """Greedy searches in the blocks of a problem, by pieces."""

    def __init__(self, problem: Problem, allocator: Greedy):
        self.problem, self.allocator, self.key = problem, allocator, allocator.key(problem)
        self.step = allocator.step or problem.work.tier.allocation_step
        self.trials = _LayerTrials(problem)

    def table(self, layer: int, upto: float) -> list[State]:
        sizes = self.problem.of_layer(layer)
        states = [State(0.0, 0.0, dict.fromkeys(sizes, 0.0))]
        while states[-1].sparsity < upto - 1e-9:
            number = int(states[-1].sparsity / PIECE + 1e-6) + 1
            piece = functools.partial(self._piece, layer, sizes, states[-1], number * PIECE)
            found = self.problem.work.piece(f"greedy-{self.key}-{layer}-{number}", piece)
            rows = zip(found["sparsity"], found["error"], found["shares"], strict=True)
            states += [State(float(s), float(e), dict(zip(sizes, map(float, row), strict=True))) for s, e, row in rows]
        return states

    def _piece(self, layer: int, sizes: Mapping[str, int], start: State, upto: float) -> dict[str, np.ndarray]:
        block, states = self.trials.at(layer), []
        block.start(start.plan)
        for state in greedy(block.errors, block.commit, sizes, greedy_steps(sizes, self.step), start, self.allocator.lazy):
            states.append(state)
            if state.sparsity >= upto - 1e-9:
                break
        return {
            "sparsity": np.array([state.sparsity for state in states]),
            "error": np.array([state.error for state in states]),
            "shares": np.array([list(state.plan.values()) for state in states]),
        }


@register("allocator", "equal_marginal")
@dataclass(frozen=True)
class EqualMarginal(Allocator):
    """Every site alone is dropped to each share of a grid; then equal marginal error per parameter, see `equal_marginal`.

    A curve is the squared error of the block's output relative to the dense one. Errors of different sites and blocks are taken
    to add up, so one measurement serves every target.

    grid: shares at which the curves are measured, increasing; their ends are 0 and the last.
    within: "model": one budget for all blocks; "block": the target in each of them.
    by_token: errors relative to each token's own output; else to the norm over all tokens.
    """

    grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, MOST)
    within: str = "model"
    by_token: bool = True

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.grid), self.grid, strict=False)) and self.grid
        check(rising and self.grid[-1] <= 1, "EqualMarginal: grid", self.grid, "must rise within (0, 1]")
        check_choice("EqualMarginal: within", self.within, ("model", "block"))

    @property
    def most(self) -> float:
        return self.grid[-1]

    def __call__(self, problem: Problem, target: float) -> Plan:
        curves = self.curves(problem)
        if self.within == "model":
            return equal_marginal(problem.sizes, curves, target)
        plan: Plan = {}
        for layer, local in sizes_by_layer(problem.sizes).items():
            sizes = {f"blocks.{layer}.{name}": size for name, size in local.items()}
            plan.update(equal_marginal(sizes, {site: curves[site] for site in sizes}, target))
        return plan

    def curves(self, problem: Problem) -> dict[str, tuple[list[float], list[float]]]:
        """By site: the shares from 0 on, and the squared errors there."""
        key = dataclasses.replace(self, within="model").key(problem)
        trials = _LayerTrials(problem, self.by_token)

        def measure(layer: int, local: Sequence[str]) -> dict[str, np.ndarray]:
            return {name: trials.at(layer).errors([(name, share) for share in self.grid]) ** 2 for name in local}

        found = {}
        for layer in problem.each_layer("error curves"):
            local = list(problem.of_layer(layer))
            piece = problem.work.piece(f"curves-{key}-{layer}", functools.partial(measure, layer, local))
            found.update({f"blocks.{layer}.{name}": ([0.0, *self.grid], [0.0, *map(float, piece[name])]) for name in local})
        return found

    def cost(self, sizes: Sizes, target: float, tier: Tier) -> str:
        return f"{len(sizes)} maps x {len(self.grid)} trials of {tier.allocation_tokens} tokens"


def by_kind(problem: Problem, plan: Plan) -> dict[str, Any]:
    """For reports: the plan's sparsity, and the mean share of each kind of site over layers."""
    kinds: dict[str, list[float]] = {}
    for site, share in plan.items():
        kinds.setdefault(site.split(".", 2)[2], []).append(share)
    means = {kind: round(float(np.mean(shares)), 4) for kind, shares in kinds.items()}
    return {"planned_sparsity": plan_sparsity(problem.sizes, plan), "mean_share": means}
