"""One format for each map, so that what quantizing costs the loss is least under budgets: plain functions of tables.

Of N maps and K formats, losses[i, k] is what map i in format k adds to the loss, and a budget has costs[i, k] of its own
(bytes, seconds) whose sum over the maps is limited. Losses of different maps are taken to add up:

    minimise  sum_i losses[i, k_i]    subject to  sum_i costs_r[i, k_i] <= limit_r  for each budget r

Maps that are tied take the same format. `frontier` gives the best loss of every cost at once, for one budget (HAWQ-V2, arXiv
1911.03852; ZeroQ, arXiv 2001.00281); `allocate` the best choice under any number of budgets. Both are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp

from sparsejax.plugs import ConfigError, check

# Of a limit: sums of floats that should meet it exactly may exceed it by their rounding.
TOLERANCE = 1e-9
# The greatest loss as the solver sees it. It stops at an absolute gap of 1e-6, which would hide small losses beside large ones.
SCALED_LOSS = 1e5


class Budget(NamedTuple):
    """What the sum over the maps of costs [N, K] may be at most; messages call it `name` and divide its numbers by `unit`.

    Whole costs (bytes, bits) keep the frontier short: sums that are equal are equal to the bit.
    """

    name: str
    costs: Float[np.ndarray, "N K"]
    limit: float
    unit: float = 1.0

    @property
    def most(self) -> float:
        """The limit with the rounding of sums."""
        return self.limit + TOLERANCE * abs(self.limit)


class Allocation(NamedTuple):
    """choices: int[N], the format of each map; loss: the sum of their losses; spent: of each budget."""

    choices: Int[np.ndarray, " N"]
    loss: float
    spent: tuple[float, ...]


class Frontier(NamedTuple):
    """Costs that rise with losses that fall: no choice has at most the cost of one and less than its loss.

    cost, loss: float64[P]. choices: int[P, N].
    """

    cost: Float[np.ndarray, " P"]
    loss: Float[np.ndarray, " P"]
    choices: Int[np.ndarray, "P N"]


def allocate(
    losses: Float[np.ndarray, "N K"], budgets: Sequence[Budget], ties: Iterable[Sequence[int]] = ()
) -> Allocation:
    """The choice of least loss within all budgets.

    Args:
      losses: finite.
      budgets: at least one.
      ties: groups of maps that take the same format.
    Raises:
      ConfigError: numbers that are not finite, a map in two groups, or budgets that no choice meets: with what can be reached.
    """
    check(budgets, "budgets", [], "give at least one")
    groups = groups_of(len(losses), ties)
    table = _checked(losses, "losses", groups)
    costs = [_checked(budget.costs, budget.name, groups) for budget in budgets]
    for budget, cost in zip(budgets, costs, strict=True):
        least, greatest = (float(ends.sum()) for ends in (cost.min(1), cost.max(1)))
        check(least <= budget.most, budget.name, float(budget.limit / budget.unit),
              f"is out of reach; the formats reach {least / budget.unit:.6g} to {greatest / budget.unit:.6g}")  # fmt: skip
    if len(budgets) == 1:
        found = _frontier(table, costs[0], budgets[0].most)
        chosen = found.choices[-1]
    else:
        chosen = _programmed(table, costs, budgets)
    choices = np.empty(len(losses), np.int64)
    for group, choice in zip(groups, chosen, strict=True):
        choices[group] = choice
    rows = np.arange(len(losses))
    spent = tuple(float(np.asarray(budget.costs, np.float64)[rows, choices].sum()) for budget in budgets)
    return Allocation(choices, float(np.asarray(losses, np.float64)[rows, choices].sum()), spent)


def frontier(
    losses: Float[np.ndarray, "N K"], costs: Float[np.ndarray, "N K"], ties: Iterable[Sequence[int]] = (), points: int = 0
) -> Frontier:
    """The Pareto frontier of cost and loss, by merging one map after another and dropping what is dominated.

    Args:
      losses, costs, ties: as in `allocate`.
      points: of the frontier that are returned, evenly spread over their costs; 0: all.
    """
    groups = groups_of(len(losses), ties)
    found = _frontier(_checked(losses, "losses", groups), _checked(costs, "costs", groups), np.inf)
    picked = np.arange(len(found.cost))
    if points and len(picked) > points:
        picked = np.unique(np.searchsorted(found.cost, np.linspace(found.cost[0], found.cost[-1], points)))
    choices = np.empty((len(picked), len(losses)), np.int64)
    for column, group in enumerate(groups):
        choices[:, group] = found.choices[picked, column, None]
    return Frontier(found.cost[picked], found.loss[picked], choices)


def groups_of(count: int, ties: Iterable[Sequence[int]]) -> list[list[int]]:
    """The groups of `ties`, and every other map by itself, in the order of their first maps.

    Raises:
      ConfigError: a map in two groups, or one that does not exist.
    """
    first: dict[int, list[int]] = {}
    taken: set[int] = set()
    for tie in ties:
        group = sorted(set(tie))
        twice = sorted(taken & set(group))
        check(not twice, "ties", twice, "are in two groups")
        check(not group or 0 <= group[0] <= group[-1] < count, "ties", group, f"must name maps 0 to {count - 1}")
        taken |= set(group)
        first |= {group[0]: group} if group else {}
    first |= {number: [number] for number in range(count) if number not in taken}
    return [first[number] for number in sorted(first)]


def _checked(table: Float[np.ndarray, "N K"], name: str, groups: Sequence[Sequence[int]]) -> Float[np.ndarray, "G K"]:
    """Sums over the maps of each group."""
    table = np.asarray(table, np.float64)
    check(table.ndim == 2 and table.size, name, table.shape, "expected maps by formats")
    bad = np.argwhere(~np.isfinite(table))
    check(not len(bad), f"{name} of (map, format)", bad[:4].tolist(), "are no finite numbers")
    return np.stack([table[group].sum(0) for group in groups])


def _frontier(losses: np.ndarray, costs: np.ndarray, limit: float) -> Frontier:
    """The frontier up to a cost. A step back is kept for every point of every map, not the choices so far."""
    # What the maps that are still to come cost at least: a point that cannot be finished within the limit is dropped at once.
    rest = np.append(np.cumsum(costs.min(1)[::-1])[::-1][1:], 0.0)
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # by map: the point each came from, and the format it took
    for row_loss, row_cost, left in zip(losses, costs, rest, strict=True):
        c, w = (cost[:, None] + row_cost).reshape(-1), (loss[:, None] + row_loss).reshape(-1)
        order = np.lexsort((w, c))
        order = order[c[order] + left <= limit]
        falling = w[order]
        best = np.minimum.accumulate(falling)
        keep = order[np.append(True, falling[1:] < best[:-1])]
        steps.append((keep // len(row_cost), keep % len(row_cost)))
        cost, loss = c[keep], w[keep]
    choices = np.empty((len(cost), len(losses)), np.int64)
    at = np.arange(len(cost))
    for column in reversed(range(len(losses))):
        came, took = steps[column]
        choices[:, column] = took[at]
        at = came[at]
    return Frontier(cost, loss, choices)


def _programmed(losses: np.ndarray, costs: Sequence[np.ndarray], budgets: Sequence[Budget]) -> np.ndarray:
    """int[G]: the choice under several budgets, a mixed-integer program of one binary per map and format."""
    count, formats = losses.shape
    lower = losses - losses.min(1, keepdims=True)
    objective = lower * (SCALED_LOSS / lower.max() if lower.max() > 0 else 1.0)
    sizes = [max(float(np.abs(cost).max()), np.finfo(float).tiny) for cost in costs]
    one_each = LinearConstraint(np.kron(np.eye(count), np.ones(formats)), 1, 1)
    rows = [cost.reshape(-1) / size for cost, size in zip(costs, sizes, strict=True)]
    limits = [budget.most / size for budget, size in zip(budgets, sizes, strict=True)]
    constraints = [one_each, LinearConstraint(np.stack(rows), -np.inf, limits)]
    while True:
        solved = milp(objective.reshape(-1), integrality=np.ones(losses.size), bounds=Bounds(0, 1), constraints=constraints,
                      options={"mip_rel_gap": 0.0})  # fmt: skip
        if solved.x is None:
            raise ConfigError(_out_of_reach(costs, budgets))
        chosen = solved.x.reshape(losses.shape).argmax(1)
        picked = np.arange(count), chosen
        if all(float(cost[picked].sum()) <= budget.most for cost, budget in zip(costs, budgets, strict=True)):
            return chosen
        # The solver allows itself a millionth of a limit: this very choice is cut off, and no other.
        cut = np.zeros(losses.shape)
        cut[picked] = 1
        constraints.append(LinearConstraint(cut.reshape(1, -1), -np.inf, count - 1))


def _out_of_reach(costs: Sequence[np.ndarray], budgets: Sequence[Budget]) -> str:
    """What a message says where each budget can be met but not all of them."""
    text = " and ".join(f"{budget.name} = {budget.limit / budget.unit:g}" for budget in budgets)
    reached = []
    for number, budget in enumerate(budgets):
        others = [other for other in range(len(budgets)) if other != number]
        try:
            found = allocate(costs[number], [Budget(budgets[r].name, costs[r], budgets[r].limit) for r in others])
        except ConfigError:  # the others alone contradict each other
            continue
        reached.append(f"{budget.name} needs at least {found.loss / budget.unit:.6g} where the others are met")
    return f"budgets {text}: no choice of formats meets all of them; {'; '.join(reached)}"
