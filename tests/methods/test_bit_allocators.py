"""Q-BERT, ZeroQ, OHQ and the inter-layer Hessian: what each makes of what it measures. What is measured by programs of its own
(`Curvature`, generation) is tested there; here numbers are given."""

import functools
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.recipes import interlayer as interlayer_recipe
from configs.recipes import ohq as ohq_recipe
from configs.recipes import qbert as qbert_recipe
from configs.recipes import zeroq as zeroq_recipe
from experiments.bench_formats import bench_shapes
from sparsejax.compress.bit_allocation import BitProblem, stored_bytes, tied_maps
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.curvature import Curvature, Eigenvalue
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.evaluate.decode_speed import Probe
from sparsejax.methods.quant.interlayer import Interlayer, largest, order_by_marginal, predicted
from sparsejax.methods.quant.ohq import CostTable, Ohq, device_name, read_table, table_json
from sparsejax.methods.quant.qbert import Qbert
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.quant.zeroq import Zeroq, written
from sparsejax.models.site_rules import rule_sites
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2, width=16, hidden=32))
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 16), np.int32)
SMALL = ("int2:asym,group=16", "int4:asym,group=16", "int8:asym,group=16")
SITES = list(rule_sites(tiny_model().config)["weights"])


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=16), TOKENS, ""), TIERS["quick"], folder)


def test_qbert_adds_the_spread_over_parts_of_the_data_to_the_mean(monkeypatch):
    def eigenvalue(self, tokens, group):
        assert tokens.shape == (2, 16)
        return Eigenvalue(float(group[0]) - 4 * (tokens == TOKENS[:2]).all(), 1)

    monkeypatch.setattr(Curvature, "eigenvalue", eigenvalue)
    using, one = work(), Qbert("5bits", SMALL, parts=2)
    plan = one.plan(tiny_model(), using, SITES[:4])
    assert list(plan) == SITES[:4]
    problem = BitProblem(tiny_model(), using, tuple(SITES[:4]), one.specs, ())
    wanted = np.array([abs(-2) + 2] * 3 + [abs(3 - 2) + 2])  # q, k and v are one group; the first part has 4 less
    losses = np.array(list(using.notes["0-qbert"]["loss_of"].values()))
    np.testing.assert_allclose(losses, wanted[:, None] / 2 * problem.squared_errors, rtol=1e-6)
    assert using.notes["0-qbert"]["eigenvalue_mean_and_std_of"][SITES[3]] == [1, 2]
    with pytest.raises(ConfigError, match="qbert: parts = 10: are more than the 4 calibration sequences"):
        run_recipe([Rtn(Qbert("5bits", SMALL))], tiny_model(), work())


def test_zeroq_rounds_the_maps_of_a_group_together_and_nothing_else(monkeypatch, tmp_path):
    rounded = []

    def divergence(self, tokens, features, kernels):
        np.testing.assert_array_equal(features, tokens)
        rounded.append(list(kernels))
        if len(rounded) == 8:
            raise KeyboardInterrupt
        return sum(float(np.sum((np.asarray(kernels[site]) - self.model.parameter(f"{site}.kernel")) ** 2)) for site in kernels)

    monkeypatch.setattr(Curvature, "features", lambda self, tokens: tokens)
    monkeypatch.setattr(Curvature, "divergence", divergence)
    one, using = Zeroq("5bits", SMALL, data="calibration"), work(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        one.plan(tiny_model(), using, SITES[:4])  # nothing: four maps are two groups in three formats
        one.plan(tiny_model(), using, SITES)
    one.plan(tiny_model(), using, SITES)
    groups = [[SITES[number] for number in group] for group in tied_maps(SITES)]
    assert rounded[:6] == [group for group in groups[:2] for _ in SMALL] and len(rounded) == 6 + 2 + 3 * len(groups) - 1
    found = np.array(list(using.notes["0-zeroq"]["loss_of"].values()))
    errors = BitProblem(tiny_model(), using, tuple(SITES), one.specs, ()).squared_errors
    for group in tied_maps(SITES):
        np.testing.assert_allclose(found[group].sum(0), errors[group].sum(0), rtol=1e-5)


def test_text_that_a_model_writes_begins_with_its_begin_token_and_follows_the_seed():
    texts = [written(tiny_model(), 3, 20, seed) for seed in (0, 0, 7)]
    assert texts[0].shape == (3, 20) and (texts[0][:, 0] == tiny_model().tokenizer.bos_id).all()
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).mean() > 0.5 and len({tuple(row) for row in texts[0]}) == 3


def times(factor=lambda spec: 1.0, model=tiny_model):
    """A table of times in proportion to bytes, times a factor by format."""
    shapes, specs = rule_sites(model().config)["weights"], [FormatSpec.parse(text) for text in SMALL]
    sizes = stored_bytes(model().config, shapes, specs)
    seconds = {(*shape, str(spec)): 1e-6 * sizes[i, k] * factor(spec) for i, shape in enumerate(shapes.values())
               for k, spec in enumerate(specs)}  # fmt: skip
    return CostTable(device_name(), "x", 1, seconds)


def test_ohq_with_times_in_proportion_to_bytes_plans_as_for_the_size_and_else_by_the_times(monkeypatch, tmp_path):
    losses = np.random.default_rng(1).gamma(0.5, size=(len(SITES), 1)) * [16, 1, 0.01]
    monkeypatch.setattr(Zeroq, "losses", lambda self, problem: losses)
    path = tmp_path / "times.json"
    path.write_text(json.dumps(table_json(times())))
    bytes_allowed = 0.5 * stored_bytes(tiny_model().config, SITES, [FormatSpec.parse(SMALL[2])]).sum()
    by_size = Zeroq(f"{bytes_allowed / 1e6}MB", SMALL).plan(tiny_model(), work(), SITES)
    using = work()
    by_time = Ohq(f"{bytes_allowed / 1e3}ms", SMALL, table=str(path)).plan(tiny_model(), using, SITES)
    assert by_time == by_size and len(set(by_size.values())) > 1
    assert using.notes["0-ohq"]["spent"]["ms"] <= bytes_allowed / 1e3
    # Where 4 bits are slow and 8 are fast nothing is left for 4, unless the size is limited too.
    slow = times(lambda spec: 9.0 if spec.bits == 4 else 0.1)
    path.write_text(json.dumps(table_json(slow)))
    budget = f"{bytes_allowed / 4e3}ms"
    alone = Ohq(budget, SMALL, table=str(path)).plan(tiny_model(), work(), SITES)
    assert {spec.bits for spec in alone.values()} == {8}
    both = Ohq(f"{budget},{bytes_allowed / 1e6}MB", SMALL, table=str(path)).plan(tiny_model(), using, SITES)
    assert 2 in {spec.bits for spec in both.values()} and using.notes["0-ohq"]["spent"]["MB"] <= bytes_allowed / 1e6


def test_tables_that_are_missing_foreign_or_broken_are_refused_before_any_work(tmp_path):
    path = tmp_path / "times.json"
    one, config = Ohq("1ms", SMALL, table=str(path)), tiny_model().config
    with pytest.raises(ConfigError, match="ohq: table = .*cannot be read .*experiments.bench formats"):
        check_recipe([Rtn(one)], config)
    for text, message in [
        ("[]", "format_times = None: expected 1"),
        (json.dumps({**table_json(times()), "times": [{"in": 3}]}), "times: not as the benchmark writes them"),
        (json.dumps(table_json(times(lambda spec: 0.0))), "must be positive numbers"),
        (json.dumps(table_json(times()._replace(seconds={(16, 16, SMALL[0]): 1.0}))), r"times of \(in, out.* = .*are missing"),
        (json.dumps(table_json(times())), "ohq: ms = 1.0: is out of reach; the formats reach"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            check_recipe([Rtn(one)], config)
    path.write_text(json.dumps(table_json(times()._replace(device="tpu: v9"))))
    with pytest.raises(ConfigError, match=r"device = 'tpu: v9': times of another device say nothing of cpu"):
        run_recipe([Rtn(Ohq("50ms", SMALL, table=str(path)))], tiny_model(), work())
    with pytest.raises(ConfigError, match="ohq: budget = '4bits': names no time"):
        Ohq("4bits")


def test_the_benchmark_writes_a_table_that_is_read_and_tells_what_it_moved(tmp_path, capsys):
    specs = [FormatSpec.parse(text) for text in SMALL[1:]]
    found = bench_shapes([(16, 32), (32, 16)], specs, rows=1, rounds=2, probe=Probe(2**18), model="tiny")
    (tmp_path / "times.json").write_text(json.dumps(found))
    table = read_table(str(tmp_path / "times.json"))
    assert table.device == device_name() and set(table.seconds) == {(a, 48 - a, text) for a in (16, 32) for text in SMALL[1:]}
    of = {(row["in"], row["format"]): row for row in found["measured"]}
    assert of[16, "float32"]["bytes"] == 4 * (16 * 32 + 16 + 32)
    assert of[16, SMALL[2]]["bytes"] == 16 * 32 + 32 * (2 + 1) + 4 * (16 + 32)
    text = capsys.readouterr().out
    assert text.count("int8:asym,group=16") == 2 and "memory reads" in text and "of read rate" in text


@given(st.integers(1, 7), st.integers(0, 10**6))
@settings(max_examples=30)
def test_the_next_group_is_always_the_one_that_adds_least_per_byte(groups, seed):
    rng = np.random.default_rng(seed)
    root, saved = rng.normal(size=(groups, groups)), rng.uniform(1, 3, groups)
    pairs = root @ root.T
    order = order_by_marginal(pairs, saved).tolist()
    assert sorted(order) == list(range(groups))
    for count in range(groups):
        before, rest = order[:count], order[count:]
        rises = [(predicted(pairs, [*before, group]) - predicted(pairs, before)) / saved[group] for group in rest]
        assert rises[0] == pytest.approx(min(rises))


@given(st.integers(0, 40), st.integers(0, 40))
def test_bisection_finds_the_largest_count_that_fits_in_few_trials(most, fitting):
    tried = []
    found = largest(most, lambda count: not tried.append(count) and count <= fitting)
    assert found == min(most, fitting) and len(tried) <= np.ceil(np.log2(most + 1)) + 1


@pytest.fixture
def quadratic(monkeypatch):
    """A loss that is quadratic in the kernels' moves: (Hessian of all maps' moves, calls of the loss)."""
    model, rng, calls = tiny_model(), np.random.default_rng(5), []
    sizes = [int(np.prod(model.parameter(f"{site}.kernel").shape)) for site in SITES]
    ends = np.cumsum([0, *sizes])
    root = rng.normal(size=(ends[-1], 40)) / np.sqrt(ends[-1])
    start = np.concatenate([np.asarray(model.parameter(f"{site}.kernel"), np.float64).reshape(-1) for site in SITES])

    def flat(arrays):
        found = np.zeros(ends[-1])
        for site, array in arrays.items():
            number = SITES.index(site)
            found[ends[number] : ends[number + 1]] = np.asarray(array, np.float64).reshape(-1)
        return found

    def loss(self, tokens, kernels=None):
        calls.append(kernels)
        return 2.0 + (0 if kernels is None else 0.5 * np.sum(((flat(kernels) - start) @ root) ** 2))

    def pairs(self, tokens, moves, group):
        mine = flat({SITES[number]: moves[SITES[number]] for number in group})
        product = root @ (mine @ root)
        return np.array([flat(moves)[a:b] @ product[a:b] for a, b in itertools.pairwise(ends)])

    monkeypatch.setattr(Curvature, "stacked", lambda self, arrays: arrays)
    monkeypatch.setattr(Curvature, "loss", loss)
    monkeypatch.setattr(Curvature, "pairs", pairs)
    return calls


def test_with_pairs_the_rise_of_a_quadratic_loss_is_predicted_and_without_them_it_is_not(quadratic):
    using, one = work(), Interlayer(10.0, SMALL[0], SMALL[2])
    plan = one.plan(tiny_model(), using, SITES)
    note = using.notes["0-interlayer"]
    assert set(map(str, plan.values())) == {SMALL[0]}  # so large a rise allows all
    problem = BitProblem(tiny_model(), using, tuple(SITES), one.specs, ())
    loss = Curvature(tiny_model(), SITES).loss(TOKENS, {site: problem.rounded(site, one.specs[0]) for site in SITES})
    assert note["predicted_rise_of_low"] == pytest.approx(loss - 2.0, rel=1e-5)
    assert note["measured_rise"] == pytest.approx(loss - 2.0)
    without = np.trace(note["pairs"]) / 2
    assert abs(without - (loss - 2.0)) > 0.02 * (loss - 2.0)


def test_as_many_groups_as_keep_the_loss_within_its_rise_get_the_low_format_and_pieces_are_kept(quadratic, tmp_path):
    whole = work()
    Interlayer(10.0, SMALL[0], SMALL[2]).plan(tiny_model(), whole, SITES)
    rise = whole.notes["0-interlayer"]["measured_rise"] / 3
    using, one = work(tmp_path), Interlayer(rise, SMALL[0], SMALL[2])
    plan = one.plan(tiny_model(), using, SITES)
    note = using.notes["0-interlayer"]
    assert note["measured_rise"] <= rise and 0 < list(map(str, plan.values())).count(SMALL[0]) < len(SITES)
    assert note["bits_per_weight"] < 9.5
    before = len(quadratic)
    assert one.plan(tiny_model(), work(tmp_path), SITES) == plan and len(quadratic) == before
    with pytest.raises(ConfigError, match="interlayer: rise = 1e-09: is less than that of int8:asym,group=16 at all maps"):
        Interlayer(1e-9, SMALL[0], SMALL[2]).plan(tiny_model(), work(), SITES)
    with pytest.raises(ConfigError, match="interlayer: low = 'int8:asym,group=16': is not smaller"):
        Interlayer(0.1, SMALL[2], SMALL[0]).check(tiny_model().config, SITES)


def test_the_arguments_of_the_recipes():
    assert qbert_recipe.get_recipe("4bits/int4/int8") == [Rtn(Qbert("4bits", ("int4", "int8")))]
    assert zeroq_recipe.get_recipe("60MB/calibration") == [Rtn(Zeroq("60MB", data="calibration"))]
    assert ohq_recipe.get_recipe("9ms/int4/int8@a/b.json") == [Rtn(Ohq("9ms", ("int4", "int8"), table="a/b.json"))]
    assert interlayer_recipe.get_recipe("0.05/int2:asym,group=16/int8") == [Rtn(Interlayer(0.05, "int2:asym,group=16", "int8"))]
    assert interlayer_recipe.get_recipe() == [Rtn(Interlayer())]
    with pytest.raises(ConfigError, match="interlayer: rise = 'low': expected a number"):
        interlayer_recipe.get_recipe("low")
