"""Claims: selection, verdicts by computation, and that one that cannot run says why."""

import pytest

from experiments.claims import quantization, tables, training_free
from experiments.claims.__main__ import page
from experiments.claims.bench import Bench, Rows, gap
from experiments.claims.claim import Claim, Outcome, judge, select
from experiments.claims.registry import CLAIMS
from sparsejax.plugs import ConfigError


def claim(measure, **fields):
    return Claim("one", "a paper", "a claim", "something", measure, 1, **fields)


def row(losses, dense=(2.0, 2.1, 2.2, 2.3), sparsity=0.5):
    def result(values):
        return {"results": [{"data": text, "values": list(values), "perplexity": 2.7 ** (sum(values) / len(values))}
                            for text in ("stdlib:evaluation", "c4_sample:evaluation")]}

    return Rows(result(dense), {**result(losses), "sparsity": {"model": sparsity}, "bytes": {"relative": 0.6}})


class Recorded(Bench):
    """A bench that has computed everything already."""

    def __init__(self, **rows):
        self.rows = rows

    @property
    def texts(self):
        return ("stdlib:evaluation", "c4_sample:evaluation")

    def compressed(self, recipe, *, model="", scope="all", seed=0):
        found = self.rows[recipe]
        return found[seed] if isinstance(found, tuple) else found


GOOD, BAD = row((2.2, 2.3, 2.4, 2.5)), row((2.5, 2.61, 2.7, 2.79))


def test_names_are_unique_and_each_claim_says_what_it_expects():
    assert len({one.name for one in CLAIMS}) == len(CLAIMS) >= 16
    assert all(one.paper and one.claim and one.expected and one.minutes > 0 for one in CLAIMS)
    assert [one.name for one in select(CLAIMS, ["teal_greedy"], False)] == ["teal_greedy"]
    with pytest.raises(ConfigError, match="Did you mean 'teal_greedy'"):
        select(CLAIMS, ["teal_gredy"], False)


def test_an_ordering_holds_only_with_its_margin_and_beyond_its_error():
    bench = Recorded(a=GOOD, b=BAD)
    assert gap(GOOD, BAD, "stdlib:evaluation").mean == pytest.approx(-0.3)
    assert training_free.below("a", "b")(bench).holds and not training_free.below("b", "a")(bench).holds
    assert not training_free.below("a", "b", margin=0.31)(bench).holds
    noisy = Recorded(a=row((1.0, 3.4, 1.4, 3.5)), b=BAD)
    assert not training_free.below("a", "b")(noisy).holds  # lower in the mean, within two standard errors


def test_shares_of_added_perplexity_and_ratios_come_from_the_rows():
    bench = Recorded(a=GOOD, b=BAD)
    share = training_free.excess_at_most(0.6, "a", "b")(bench).numbers["shares"]["stdlib:evaluation"]
    assert share == pytest.approx((2.7**2.35 - 2.7**2.15) / (2.7**2.65 - 2.7**2.15))
    assert training_free.ratio_at_most(1.3, "a", "b")(bench).holds
    assert not training_free.ratio_at_most(1.1, "a", "b")(bench).holds
    assert training_free.alike("a", "b", 0.31)(bench).holds and not training_free.alike("a", "b", 0.29)(bench).holds


TEXT = "stdlib:evaluation"


def at(sparsity, loss, relative_bytes=None):
    """A row that adds `loss` to every window of the dense model."""
    found = row([value + loss for value in (2.0, 2.1, 2.2, 2.3)], sparsity=sparsity)
    return Rows(found.dense, {**found.row, "bytes": {"relative": relative_bytes or 1 - 0.8 * sparsity}})


def test_a_line_passes_through_its_rows_begins_dense_and_ends_at_the_last():
    line = tables.Line.of([at(0.6, 1.0), at(0.4, 0.2)], "sparsity", TEXT)
    for sparsity, loss in ((0.0, 0.0), (0.4, 0.2), (0.6, 1.0), (0.2, 0.1), (0.5, 0.6)):
        assert line(sparsity) == pytest.approx([value + loss for value in (2.0, 2.1, 2.2, 2.3)])
    assert line(0.61) is None


OURS = (0.1, 0.3, 1.0, 1.5)


def lines(ours, theirs, relative_bytes=None):
    """Rows of our method, and the same of every published one."""
    levels = (*tables.DOMINATED, 0.7)
    found = {f"ours:{level}": at(level, loss) for level, loss in zip(levels, ours, strict=True)}
    return found | {one.format(level): at(level, loss, relative_bytes)
                    for one in tables.PUBLISHED for level, loss in zip(tables.DOMINATED, theirs, strict=True)}


def test_a_method_dominates_only_where_it_is_below_everywhere():
    judged = tables.dominates("ours:{}", "sparsity", "bytes")
    assert judged(Recorded(**lines(OURS, (0.15, 0.4, 1.1)))).holds
    outcome = judged(Recorded(**lines(OURS, (0.15, 0.4, 0.9))))
    assert not outcome.holds and "topk:0.65, equal sparsity, stdlib:evaluation +0.100" in outcome.measured
    assert outcome.measured.startswith("40 of 60 comparisons below")
    heavy = judged(Recorded(**lines(OURS, (0.05, 0.25, 0.9), 0.99)))  # better, and reads nearly everything
    assert "equal bytes" not in heavy.measured and "equal sparsity" in heavy.measured


def test_beyond_the_last_row_nothing_is_claimed():
    rows = lines(OURS, (0.15, 0.4, 1.1)) | {"topk:0.65": at(0.75, 9.0)}
    outcome = tables.dominates("ours:{}", "sparsity")(Recorded(**rows))
    assert not outcome.holds and "topk:0.65, equal sparsity, stdlib:evaluation out of reach" in outcome.measured


def test_refinements_are_compared_with_the_base_at_its_own_sparsity():
    def rows(name, losses, shift=0.0):
        return {f"{name}:{level}": at(level + shift, loss) for level, loss in zip(tables.LEVELS, losses, strict=True)}

    base = rows("base", (0.1, 0.2, 0.4, 1.0))
    assert tables.refines("base:{}", "a:{}")(Recorded(**base, **rows("a", (0.09, 0.19, 0.39, 0.99)))).holds
    more = Recorded(**base, **rows("a", (0.13, 0.28, 0.5, 1.2), 0.1))  # loses more, and drops more
    assert tables.refines("base:{}", "a:{}")(more).holds
    mixed = tables.refines("base:{}", "a:{}", "b:{}")(
        Recorded(**base, **rows("a", (0.09, 0.19, 0.39, 0.99)), **rows("b", (0.09, 0.25, 0.39, 0.99))))  # fmt: skip
    assert not mixed.holds and f"not below: b:S against base:0.4, {TEXT} +0.050" in mixed.measured
    assert mixed.numbers["gaps"][f"a:S against base:0.65, {TEXT}"]["mean"] == pytest.approx(-0.01)


def test_an_order_of_lines_names_what_breaks_it():
    rows = {f"{name}:{level}": at(level, loss) for name, loss in (("a", 0.1), ("b", 0.2)) for level in (0.3, 0.5)}
    assert tables.ordered(("a:{}", "b:{}"), (0.3, 0.5))(Recorded(**rows)).holds
    outcome = tables.ordered(("b:{}", "a:{}"), (0.3,))(Recorded(**rows))
    assert outcome.numbers["wrong"] == [f"b:0.3 - a:0.3 on {text} +0.100 +- 0.000" for text in Recorded().texts]


def test_sparsity_zero_means_equal_losses():
    same, other = row((2.0, 2.1, 2.2, 2.3)), row((2.0, 2.1, 2.2, 2.3 + 1e-12))
    assert training_free.at_zero("a")(Recorded(a=same)).holds
    outcome = training_free.at_zero("a", "b")(Recorded(a=same, b=other))
    assert not outcome.holds and outcome.measured == "a: equal, b: DIFFERS"


def test_a_verdict_is_computed_and_an_error_ends_one_claim_alone():
    bench = Recorded()
    assert judge(claim(lambda _: Outcome(True, "1 < 2", {})), bench)["verdict"] == "holds"
    failing = judge(claim(lambda _: Outcome(False, "2 > 1", {"x": 2})), bench)
    assert (failing["verdict"], failing["measured"], failing["numbers"]) == ("fails", "2 > 1", {"x": 2})

    def refused(_):
        raise ConfigError("--model = 'x': is not there")

    broken = judge(claim(lambda _: 1 / 0), bench)
    assert broken["verdict"] == "not run" and "ZeroDivisionError" in broken["measured"]
    assert judge(claim(refused), bench)["measured"] == "--model = 'x': is not there"


def test_the_page_has_every_record_under_its_verdict():
    record = {"claim": "|h| counts", "expected": "less", "measured": "1 < 2", "paper": "P"}
    text = page([{**record, "name": "b", "verdict": "fails"}, {**record, "name": "a", "verdict": "holds"}], "the command")
    order = ["`the command`", "## Holds: 1", "**a**", "## Fails: 1", "**b**"]
    assert sorted(order, key=text.index) == order
    assert "\\|h\\| counts" in text and "Not run" not in text


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("experiments.claims.claim", fromlist=["NEEDS"]).NEEDS, "smollm2-135m", lambda: False)
    found = judge(claim(lambda _: pytest.fail("must not run"), needs=("smollm2-135m",)), Recorded())
    assert (found["verdict"], found["measured"]) == ("not run", "needs smollm2-135m")


def test_quantization_is_judged_over_seeds_and_against_sums():
    seeds = (GOOD, GOOD, row((2.21, 2.31, 2.41, 2.51)))
    bench = Recorded(ours=seeds, same=(GOOD,) * 3, worse=(BAD,) * 3, first=GOOD, second=GOOD, both=row((2.4, 2.5, 2.6, 2.75)))
    assert quantization.no_worse("ours", ("same", "worse"), 0.004)(bench).holds  # .0033 in the mean
    assert not quantization.no_worse("ours", ("same",), 0.003)(bench).holds
    added = quantization.losses_add("first", "second", "both", 0.02)(bench)
    assert added.holds and added.numbers["stdlib:evaluation"]["mean"] == pytest.approx(0.0125)
    assert not quantization.losses_add("first", "second", "both", 0.01)(bench).holds


def quantized(**losses):
    return Recorded(**{name.replace("__", ":").replace("_g", ",group=64"): row([value + d for d in (0, 0.1, 0.2, 0.3)])
                       for name, value in losses.items()})


def test_groups_are_compared_with_methods_and_methods_across_bits():
    gains = dict(rtn__int4__asym=3.0, rtn__int4__asym_g=2.4, gptq__int4__asym=2.5)
    assert quantization.groups_before_methods(quantized(**gains)).holds
    assert not quantization.groups_before_methods(quantized(**gains | dict(gptq__int4__asym=2.3))).holds
    apart = {f"{name}__int{bits}__asym_g": value for name, bits, value in (
        ("rtn", 4, 2.3), ("gptq", 4, 2.2), ("rtn", 3, 3.0), ("gptq", 3, 2.6), ("rtn", 2, 8.0), ("gptq", 2, 5.0))}  # fmt: skip
    assert quantization.methods_separate(quantized(**apart)).holds
    assert not quantization.methods_separate(quantized(**apart | dict(gptq__int3__asym_g=2.8))).holds


def test_recipes_are_joined_in_order():
    from experiments import entry

    joined = entry.from_file("--recipe", "configs/recipes/compose.py:rtn:int8+teal:0.5", "get_recipe")
    assert [one.name for one in joined] == ["rtn", "teal"]
    for argument, message in (("", "compose: recipes = ''"), ("rtn:int8+tael:0.5", "Did you mean 'teal'")):
        with pytest.raises(ConfigError, match=message):
            entry.from_file("--recipe", f"configs/recipes/compose.py:{argument}", "get_recipe")


def test_the_recipes_of_all_claims_exist():
    """Each is parsed as the bench would; nothing is run."""
    from experiments import entry

    asked = set()

    class Asking(Recorded):
        def compressed(self, recipe, *, model="", scope="all", seed=0):
            asked.add(recipe)
            return GOOD

    for one in (*training_free.CLAIMS, *tables.CLAIMS, *quantization.CLAIMS):
        one.measure(Asking())
    assert len(asked) > 40
    for recipe in asked:
        name, colon, argument = recipe.partition(":")
        assert entry.from_file("--recipe", f"configs/recipes/{name}.py{colon}{argument}", "get_recipe")
