"""How a sparsity budget is shared between sites: plain functions of the sites' sizes and of what dropping costs there.

A plan is {site: share of the input that is dropped}; its sparsity is the mean weighted by the sites' parameters,

    S(plan) = sum_i n_i s_i / sum_i n_i

Every allocator gives a plan with S = target, to rounding. None of them knows a model: the costs are functions or curves, see
`compress.allocators` for those of a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparsejax.plugs import check

Sizes = Mapping[str, int]
Plan = dict[str, float]

# Shares above it would leave a token nearly nothing of an input.
MOST = 0.99
# The largest step of one site in a greedy search; larger ones freeze small maps at 0, see `greedy_steps`.
LARGEST_STEP = 0.05


class State(NamedTuple):
    """One state of a greedy search: its sparsity (see the module), its error, and the plan."""

    sparsity: float
    error: float
    plan: Plan


def plan_sparsity(sizes: Sizes, plan: Mapping[str, float]) -> float:
    """S(plan) of the module docstring; sites that a plan leaves out are dense."""
    return sum(size * plan.get(site, 0.0) for site, size in sizes.items()) / sum(sizes.values())


def proportional(sizes: Sizes, ratios: Mapping[str, float], target: float, most: float = MOST) -> Plan:
    """s_i = min(most, c * ratio_i), with c such that the target is met.

    Raises:
      ConfigError: the sites cannot reach the target.
    """
    check_reachable(sizes, {site: most if ratio > 0 else 0.0 for site, ratio in ratios.items()}, target)

    def plan(scale: float) -> Plan:
        return {site: min(most, scale * ratio) for site, ratio in ratios.items()}

    low, high = 0.0, most / min(ratio for ratio in ratios.values() if ratio > 0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if plan_sparsity(sizes, plan(middle)) < target else (low, middle)
    return plan(high)


def greedy_steps(sizes: Sizes, step: float) -> Plan:
    """Each site's step: equal numbers of parameters, `step` of the site "attn.q" (else of the largest), at most `LARGEST_STEP`.

    Without the cap a map of an eighth of the size steps by 8 * step, looks expensive at its first trial, and stays dense.
    """
    reference = next((size for site, size in sizes.items() if site.endswith("attn.q")), max(sizes.values()))
    return {site: min(LARGEST_STEP, step * reference / size) for site, size in sizes.items()}


def greedy(
    error: Callable[[Sequence[tuple[str, float]]], Iterable[float]],
    commit: Callable[[str, float], None],
    sizes: Sizes,
    steps: Mapping[str, float],
    start: State | None = None,
    lazy: bool = True,
    most: float = MOST,
) -> Iterator[State]:
    """States of TEAL's search until every site is at `most`: each is the last plus the step that costs least per parameter.

    The cost of a step is what it adds to the squared error (errors of different sites are nearly orthogonal, so squares add).
    Between steps of equally many parameters that is the least error, as published.

    Args:
      error: trials (site, share) -> the error of the last committed plan with each of them in turn.
      commit: called with the trial that is taken, which is one of the last made for its site.
      start: the state to go on from (not given again); default all dense.
      lazy: a site is tried again only once its step looks cheapest by the cost it had when it was last tried. The same search
        where steps do not get cheaper as others are taken, with a third of the trials.
    """
    plan, reached = dict.fromkeys(sizes, 0.0), 0.0
    if start is not None:
        plan, reached = dict(start.plan), start.error
    costs: dict[str, tuple[float, float]] = {}  # by site: cost per parameter, and the error that its trial had

    def measure(sites: Sequence[str]) -> None:
        trials = [(site, min(most, plan[site] + steps[site])) for site in sites]
        for (site, share), found in zip(trials, error(trials) if trials else (), strict=True):
            costs[site] = ((float(found) ** 2 - reached**2) / ((share - plan[site]) * sizes[site]), float(found))

    while left := [site for site in sizes if plan[site] < most - 1e-9]:
        fresh = [site for site in left if not lazy or site not in costs]
        measure(fresh)
        while (best := min(left, key=lambda site: costs[site][0])) not in fresh:
            measure([best])
            fresh.append(best)
        plan[best], reached = min(most, plan[best] + steps[best]), costs.pop(best)[1]
        commit(best, plan[best])
        yield State(plan_sparsity(sizes, plan), reached, dict(plan))


def at_sparsity(states: Sequence[State], target: float) -> Plan:
    """The plan of a table of states at a target: on the straight line between the two states around it.

    Args:
      states: in order of sparsity; the dense state at 0 may be left out.
    Raises:
      ConfigError: the table ends before the target.
    """
    last = states[-1]
    check(target <= last.sparsity + 1e-9, "sparsity", target, f"the search went to {last.sparsity:.3f}")
    after = next((state for state in states if state.sparsity >= target), last)
    before = ([State(0.0, 0.0, dict.fromkeys(last.plan, 0.0))] + [s for s in states if s.sparsity < target])[-1]
    gap = after.sparsity - before.sparsity
    share = min(1.0, (target - before.sparsity) / gap) if gap > 0 else 0.0
    return {site: before.plan[site] + share * (s - before.plan[site]) for site, s in after.plan.items()}


def equal_marginal(sizes: Sizes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], target: float) -> Plan:
    """The plan with the least sum of costs at the target, exactly, for costs that are piecewise linear and add up.

    Where it ends, one more parameter costs the same at every site. A curve is replaced by its lower convex hull: between two
    grid points that a chord passes under, the chord is what a mixture of both would reach.

    Args:
      curves: by site (shares, costs): shares increasing from 0 to at most 1; costs finite.
    Raises:
      ConfigError: the curves end before the target.
    """
    check_reachable(sizes, {site: float(shares[-1]) for site, (shares, _) in curves.items()}, target)
    segments = []
    for site, (shares, costs) in curves.items():
        corners = convex_hull(shares, costs)
        for (s0, c0), (s1, c1) in zip(corners, corners[1:], strict=False):
            segments.append(((c1 - c0) / ((s1 - s0) * sizes[site]), site, s1 - s0))
    plan = dict.fromkeys(curves, 0.0)
    budget = target * sum(sizes.values())
    for _, site, length in sorted(segments, key=lambda segment: segment[0]):
        taken = min(length, budget / sizes[site])
        plan[site] += taken
        budget -= taken * sizes[site]
    return plan


def convex_hull(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of the lower convex hull of points whose xs increase."""
    corners: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append((float(x), float(y)))
    return corners


def check_reachable(sizes: Sizes, most: Mapping[str, float], target: float) -> None:
    """Raise a ConfigError unless the sites, each at its most, reach the target."""
    reached = plan_sparsity(sizes, most)
    check(target <= reached + 1e-9, "sparsity", target, f"the chosen sites reach {reached:.3f} at most")


def evolve(
    fitness: Callable[[np.ndarray], float],
    start: np.ndarray,
    *,
    population: int,
    generations: int,
    seed: int,
    noise: float = 0.05,
    advance: Callable[[int], None] = lambda genomes: None,
) -> tuple[np.ndarray, list[float]]:
    """The genome in [0, 1]^n of least fitness found, and the least fitness after each generation (never increasing).

    The first generation is `start` and copies of it with noise. Each later one keeps the best quarter and fills up with
    children: uniform crossover of two of the kept, N(0, noise) added to every gene, clipped. One seed, one result.

    Args:
      fitness: of one genome; lower is better.
      start: float[n] in [0, 1].
      population: genomes of a generation, at least 2.
      generations: after the first.
      advance: called with the number of genomes just measured.
    """
    check(population >= 2, "population", population, "must be at least 2")
    rng = np.random.default_rng(seed)

    def measured(genome: np.ndarray) -> tuple[float, np.ndarray]:
        found = float(fitness(genome))
        advance(1)
        return (found if np.isfinite(found) else np.inf), genome

    def mutated(genome: np.ndarray) -> np.ndarray:
        return np.clip(genome + rng.normal(0, noise, genome.shape), 0, 1)

    ranked = [measured(start.copy())] + [measured(mutated(start)) for _ in range(population - 1)]
    ranked.sort(key=lambda entry: entry[0])
    history = [ranked[0][0]]
    for _ in range(generations):
        kept = ranked[: max(2, population // 4)]
        while len(kept) < population:
            parents = rng.choice(max(2, population // 4), 2, replace=False)
            crossed = np.where(rng.random(start.shape) < 0.5, kept[parents[0]][1], kept[parents[1]][1])
            kept.append(measured(mutated(crossed)))
        ranked = sorted(kept, key=lambda entry: entry[0])
        history.append(ranked[0][0])
    return ranked[0][1], history
