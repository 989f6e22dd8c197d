"""The choice of formats: against every choice there is, the fixture of HAWQ-V3, and refusals that say what can be reached."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.compress.bits import Budget, allocate, frontier, groups_of
from sparsejax.plugs import ConfigError

# ResNet18 of HAWQ-V3 (arXiv 2011.10680), 19 layers; the three pairs share an input by a shortcut.
TRACE = [.06857826, .03162379, .03298575, .01205663, .02222431, .00596336, .06931772, .00807129, .00372905, .00530698,
         .00209011, .00737569, .00210454, .00151197, .00158041, .00078146, .00451841, .00098745, .00072944]  # fmt: skip
ERROR_8 = [.0235, .0125, .0102, .0082, .0145, .0344, .0023, .0287, .0148, .0333, .0682, .0027, .0448, .0336, .0576, .1130,
           .0102, .0947, .0532]  # fmt: skip
ERROR_4 = [6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, .6827, 9.0942, 4.8857, 10.7599, 21.7546, .8603, 14.5324, 10.9651,
           18.7706, 36.4044, 3.1572, 29.6994, 17.4016]  # fmt: skip
PARAMETERS = [36864, 36864, 36864, 36864, 73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824, 1179648,
              2359296, 131072, 2359296, 2359296]  # fmt: skip
MACS = [115605504, 115605504, 115605504, 115605504, 57802752, 115605504, 6422528, 115605504, 115605504, 57802752, 115605504,
        6422528, 115605504, 115605504, 57802752, 115605504, 6422528, 115605504, 115605504]  # fmt: skip
LATENCY_4 = [.21094404, .21092674, .21104113, .21086851, .13642465, .19167506, .02532183, .19148203, .19142914, .11395316,
             .20556011, .01917474, .20566918, .20566509, .13185102, .22287786, .01790088, .22304611, .22286099]  # fmt: skip
LATENCY_8 = [.36189111, .36211718, .31141909, .30454471, .19184896, .38948934, .0334169, .38904905, .3892859, .19134735,
             .34307431, .02802354, .34313329, .34310756, .21117103, .37376585, .02896843, .37398187, .37405185]  # fmt: skip
TIES = [(4, 6), (9, 11), (14, 16)]
HAWQ_LOSSES = np.array(TRACE)[:, None] * np.stack([ERROR_4, ERROR_8], 1)
HAWQ_COSTS = {
    "size": np.array(PARAMETERS)[:, None] / 2**20 * [0.5, 1],
    "bops": np.array(MACS)[:, None] / 1e6 / [64, 16],
    "latency": np.stack([LATENCY_4, LATENCY_8], 1),
}


def halfway(name):
    """The budget of the fixture: half of the way from all 4 to all 8 bits."""
    costs = HAWQ_COSTS[name]
    return Budget(name, costs, costs[:, 0].sum() + 0.5 * (costs[:, 1] - costs[:, 0]).sum())


@pytest.mark.parametrize(("name", "limit", "cost", "gain", "eight"), [
    ("size", 7.98047, 7.26562, 1.233207, [*range(15), 16]),
    ("bops", 66.23232, 65.0281, 1.092024, [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]),
    ("latency", 4.24618, 4.2201, 1.105039, [0, 1, 2, 3, 4, 6, 7, 9, 10, 11, 14, 16]),
])  # fmt: skip
def test_the_fixture_of_hawq_v3(name, limit, cost, gain, eight):
    budget = halfway(name)
    found = allocate(HAWQ_LOSSES, [budget], TIES)
    assert budget.limit == pytest.approx(limit, abs=5e-5) and found.spent[0] == pytest.approx(cost, abs=5e-5)
    assert HAWQ_LOSSES[:, 0].sum() - found.loss == pytest.approx(gain, abs=2e-6)
    assert np.flatnonzero(found.choices).tolist() == eight


def test_the_fixture_under_all_of_its_budgets_at_once_meets_each_and_gains_no_more_than_any():
    alone = [allocate(HAWQ_LOSSES, [halfway(name)], TIES).loss for name in HAWQ_COSTS]
    found = allocate(HAWQ_LOSSES, [halfway(name) for name in HAWQ_COSTS], TIES)
    assert all(spent <= halfway(name).limit for name, spent in zip(HAWQ_COSTS, found.spent, strict=True))
    assert found.loss >= max(alone) - 1e-12


@st.composite
def problems(draw, budgets):
    """(losses, budgets, ties): integers, so that sums meet limits exactly; losses over many orders of magnitude."""
    maps, formats = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    losses = rng.integers(0, 50, (maps, formats)) * 10.0 ** rng.integers(-3, 4, (maps, 1))
    costs = rng.integers(0, 9, (budgets, maps, formats)).astype(float)
    ties = [(0, maps - 1)] if maps > 2 and draw(st.booleans()) else []
    shares = draw(st.lists(st.floats(0, 1), min_size=budgets, max_size=budgets))
    limits = [np.floor((1 - share) * c.min(1).sum() + share * c.max(1).sum()) for share, c in zip(shares, costs, strict=True)]
    return losses, [Budget(f"b{r}", costs[r], limits[r]) for r in range(budgets)], ties


def every_choice(losses, ties):
    for choice in itertools.product(range(losses.shape[1]), repeat=len(losses)):
        if all(choice[a] == choice[b] for a, b in ties):
            yield np.array(choice)


def total(table, choice):
    return float(table[np.arange(len(table)), choice].sum())


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_the_choice_is_the_best_of_all_there_are(budgets):
    @given(problems(budgets))
    @settings(max_examples=40 if budgets == 1 else 25)
    def holds(problem):
        losses, limited, ties = problem
        met = [total(losses, choice) for choice in every_choice(losses, ties)
               if all(total(one.costs, choice) <= one.limit for one in limited)]  # fmt: skip
        if not met:
            with pytest.raises(ConfigError, match="out of reach|no choice of formats meets"):
                allocate(losses, limited, ties)
            return
        found = allocate(losses, limited, ties)
        assert found.loss == pytest.approx(min(met), rel=1e-9, abs=1e-12)
        assert all(spent <= one.limit for spent, one in zip(found.spent, limited, strict=True))
        assert all(found.choices[a] == found.choices[b] for a, b in ties)
        assert found.loss == total(losses, found.choices)

    holds()


@given(problems(1))
@settings(max_examples=30)
def test_the_frontier_is_what_is_not_dominated(problem):
    losses, (budget,), ties = problem
    points = {(total(budget.costs, choice), total(losses, choice)) for choice in every_choice(losses, ties)}
    best = sorted((c, w) for c, w in points if not any(d <= c and v < w - 1e-9 or d < c and v <= w for d, v in points))
    found = frontier(losses, budget.costs, ties)
    np.testing.assert_allclose(np.stack([found.cost, found.loss], 1), best, rtol=1e-9, atol=1e-9)
    for cost, loss, choice in zip(found.cost, found.loss, found.choices, strict=True):
        assert cost == total(budget.costs, choice) and loss == pytest.approx(total(losses, choice), rel=1e-12)


def test_a_larger_budget_never_costs_more_loss_and_a_budget_of_the_same_costs_changes_nothing():
    rng = np.random.default_rng(3)
    losses, costs = rng.gamma(0.3, size=(40, 4)), rng.integers(1, 9, (40, 4)).astype(float)
    limits = np.linspace(costs.min(1).sum(), costs.max(1).sum(), 9)
    found = [allocate(losses, [Budget("size", costs, limit)]) for limit in limits]
    assert all(b.loss <= a.loss for a, b in itertools.pairwise(found)) and found[-1].loss == losses.min(1).sum()
    doubled = [Budget("size", costs, limits[4]), Budget("time", 3 * costs, 3 * limits[4])]
    assert allocate(losses, doubled).loss == pytest.approx(found[4].loss, rel=1e-9)  # a latency that is the size


def test_as_many_maps_and_formats_as_a_model_of_thirty_blocks_has_are_solved_exactly_either_way():
    rng = np.random.default_rng(0)
    sizes = np.tile([576 * 576, 576 * 192, 576 * 192, 576 * 576, 576 * 1536, 576 * 1536, 1536 * 576], 30)
    costs = sizes[:, None] * np.array([2.28, 3.3, 4.31, 8.375])
    losses = rng.lognormal(0, 2, (210, 1)) * sizes[:, None] * [1, 0.2, 0.05, 0.0002]
    ties = [tuple(range(7 * n, 7 * n + 3)) for n in range(30)] + [(7 * n + 4, 7 * n + 5) for n in range(30)]
    budget = Budget("bits", costs, 4.25 * sizes.sum())
    free = Budget("free", 0 * costs, 0)
    by_merging, by_program = allocate(losses, [budget], ties), allocate(losses, [budget, free], ties)
    assert by_merging.loss == pytest.approx(by_program.loss, rel=1e-9)
    assert by_merging.spent[0] <= budget.most


def test_a_thinned_frontier_keeps_both_of_its_ends():
    losses, costs = np.random.default_rng(1).random((12, 3)), np.random.default_rng(2).random((12, 3))
    whole, some = frontier(losses, costs), frontier(losses, costs, points=9)
    assert 2 < len(some.cost) <= 9 < len(whole.cost)
    assert (some.cost[0], some.cost[-1]) == (whole.cost[0], whole.cost[-1]) and np.isin(some.loss, whole.loss).all()


def test_what_cannot_be_met_is_refused_with_what_can():
    losses, costs = np.ones((2, 2)), np.array([[1.0, 2], [3, 5]])
    with pytest.raises(ConfigError, match=r"megabytes = 3.0: is out of reach; the formats reach 4 to 7"):
        allocate(losses, [Budget("megabytes", costs, 3)])
    with pytest.raises(ConfigError, match="no choice of formats meets all of them; a needs at least 7 where"):
        allocate(losses, [Budget("a", costs, 4), Budget("b", -costs, -7)])
    with pytest.raises(ConfigError, match=r"losses of \(map, format\) = \[\[1, 0\]\]: are no finite numbers"):
        allocate(np.array([[1, 2], [np.nan, 1]]), [Budget("a", costs, 9)])
    with pytest.raises(ConfigError, match=r"ties = \[1\]: are in two groups"):
        groups_of(3, [(0, 1), (1, 2)])
    with pytest.raises(ConfigError, match="must name maps 0 to 2"):
        groups_of(3, [(0, 3)])
