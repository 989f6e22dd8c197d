"""Formats by map: plans of HAWQ through RTN and GPTQ, their budgets, their reports, resumed and reloaded; refusals."""

import functools

import jax
import numpy as np
import pytest

from configs.recipes import compose, mixed, teal
from configs.recipes import hawq as recipe
from sparsejax.compress.bit_allocation import MENU, BitProblem, parse_budget, stored_bytes
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.curvature import Curvature, Eigenvalue
from sparsejax.compress.recipe import TIERS, Work, check_recipe, run_recipe
from sparsejax.io import model_folder
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.hawq import Hawq
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.ops.formats.quantize import fake
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor
from tests.compress import tiny

tiny_model = functools.cache(functools.partial(tiny.tiny_model, layers=2, width=16, hidden=32))
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 16), np.int32)
SMALL = ("int2:asym,group=16", "int4:asym,group=16", "int8:asym,group=16")
SITES = [f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up",
                                                                   "mlp.down")]  # fmt: skip
PLAN = Hawq("5bits", SMALL, curvature="fisher", draws=3)


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=16), TOKENS, ""), TIERS["quick"], folder)


@pytest.fixture(scope="module")
def quantized():
    """(model, notes, draws of traces by seed)."""
    using, drawn, real = work(), {}, Curvature.fisher

    def fisher(self, tokens, seed):
        assert tokens.shape == (1, 16) and (tokens == TOKENS[seed // 3]).all()
        return drawn.setdefault(seed, real(self, tokens, seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curvature, "fisher", fisher)
        return run_recipe([Rtn(PLAN)], tiny_model(), using), using.notes, drawn


def test_every_map_is_rounded_to_the_format_that_the_report_plans_within_the_budget(quantized):
    model, notes, _ = quantized
    plan = notes["0-hawq"]["plan"]
    assert set(plan) == set(SITES) and len(set(plan.values())) > 1
    kernels = {site: model.parameter(f"{site}.kernel") for site in SITES}
    problem = BitProblem(tiny_model(), work(), tuple(SITES), PLAN.specs, ())
    for site, text in plan.items():
        assert str(kernels[site].spec) == text
        np.testing.assert_array_equal(kernels[site].dequantize(), problem.rounded(site, FormatSpec.parse(text)))
    sizes = {site: kernel.shape[0] * kernel.shape[1] for site, kernel in kernels.items()}
    true_bits = 8 * sum(kernel.nbytes for kernel in kernels.values()) / sum(sizes.values())
    assert true_bits <= 5 and notes["0-hawq"]["spent"]["bits"] == pytest.approx(true_bits)
    assert notes["0-rtn"]["bits_per_weight"] == pytest.approx(true_bits)
    for tied in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")):
        assert all(len({plan[f"blocks.{layer}.{name}"] for name in tied}) == 1 for layer in (0, 1))


def test_no_other_plan_within_the_budget_is_predicted_to_lose_less_and_the_frontier_agrees(quantized):
    note = quantized[1]["0-hawq"]
    points = np.array(note["frontier_of_bits_and_loss"])
    assert np.all(np.diff(points[:, 0]) > 0) and np.all(np.diff(points[:, 1]) < 0)
    assert np.all(points[points[:, 0] <= 5, 1] >= note["predicted_loss"] - 1e-12)
    chosen = [note["loss_of"][site][note["menu"].index(text)] for site, text in note["plan"].items()]
    assert sum(chosen) == pytest.approx(note["predicted_loss"])
    formats = [note["plan"][f"blocks.{layer}.attn.o"] for layer in (0, 1)]
    assert note["layers_of"]["attn.o"] == {text: formats.count(text) for text in formats}


def test_losses_are_half_the_mean_trace_times_the_squared_error_and_the_report_tells_its_error(quantized):
    note, draws = quantized[1]["0-hawq"], np.array([quantized[2][seed] for seed in range(12)])
    of_down = draws.reshape(4, 3, -1).mean(1)[:, list(note["plan"]).index(SITES[6])]
    kernel = np.asarray(tiny_model().parameter(f"{SITES[6]}.kernel"))
    for k, text in enumerate(SMALL):
        error = np.sum((kernel - np.asarray(fake(kernel, FormatSpec.parse(text)))) ** 2)
        assert note["loss_of"][SITES[6]][k] == pytest.approx(of_down.mean() / kernel.size / 2 * error, rel=1e-4)
    assert note["trace_and_error_of"][SITES[6]] == pytest.approx([of_down.mean(), of_down.std(ddof=1) / 2])


def test_a_folder_of_mixed_formats_gives_the_same_bits(quantized, tmp_path):
    model_folder.save(quantized[0], tmp_path / "out")
    again = model_folder.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.values, quantized[0].values)
    assert again.config.weights == quantized[0].config.weights != ()


def test_an_interrupted_allocation_goes_on_at_its_sequence_and_gptq_takes_the_same_plan(quantized, tmp_path, monkeypatch):
    drawn = []

    def dying(self, tokens, seed):
        drawn.append(seed)
        if len(drawn) == 8:  # in the third of four sequences
            raise KeyboardInterrupt
        return np.random.default_rng(seed).gamma(0.3, size=len(self.sites))

    monkeypatch.setattr(Curvature, "fisher", dying)
    passes = [Gptq(PLAN, "group", sites="blocks.*.mlp.*")]
    with pytest.raises(KeyboardInterrupt):
        run_recipe(passes, tiny_model(), work(tmp_path / "pieces"))
    using = work(tmp_path / "pieces")
    model = run_recipe(passes, tiny_model(), using)
    assert drawn == [*range(8), *range(6, 12)]
    plan = using.notes["0-hawq"]["plan"]
    assert len(set(plan.values())) > 1 and all(str(model.parameter(f"{site}.kernel").spec) == plan[site] for site in plan)
    assert not isinstance(model.parameter("blocks.0.attn.q.kernel"), QTensor)
    assert all(0 <= loss < 0.5 for loss in using.notes["0-gptq"]["relative_loss_of"].values())


@pytest.mark.parametrize("curvature", ["trace", "eigenvalue"])
def test_the_other_curvatures_scale_the_same_errors(curvature, monkeypatch):
    """By numbers that are given: the programs are tested with `Curvature`."""
    sites, traces = SITES[:4], np.array([4.0, -1, 9, 2])
    monkeypatch.setattr(Curvature, "traces", lambda self, tokens, seed: traces + tokens[0, 0])
    monkeypatch.setattr(Curvature, "eigenvalue", lambda self, tokens, group: Eigenvalue(-3.0 * group[0], 5))
    using = work()
    one = Hawq("5bits", SMALL, tied=False, curvature=curvature)
    one.plan(tiny_model(), using, sites)
    losses = np.array(list(using.notes["0-hawq"]["loss_of"].values()))
    problem = BitProblem(tiny_model(), using, tuple(sites), one.specs, ())
    by_sequence = traces[:, None] + TOKENS[:, 0]
    wanted = by_sequence.mean(1) / problem.sizes if curvature == "trace" else np.array([0.0, 3, 6, 9])
    np.testing.assert_allclose(losses, wanted[:, None] / 2 * problem.squared_errors, rtol=1e-6)


def test_a_trace_that_is_lost_in_its_noise_counts_as_its_error(monkeypatch):
    monkeypatch.setattr(Curvature, "traces", lambda self, tokens, seed: np.array([float(seed % 2) - 0.6, 5]))
    using = work()
    Hawq("5bits", SMALL, tied=False, draws=1).plan(tiny_model(), using, SITES[:2])
    mean, error = using.notes["0-hawq"]["trace_and_error_of"][SITES[0]]
    assert mean < 0 < error and min(using.notes["0-hawq"]["loss_of"][SITES[0]]) > 0


def test_gptq_walks_maps_of_one_input_by_the_groups_of_each_ones_own_format():
    found = []
    for formats in ({"**.q": "int4:asym,group=4", "**": "int4:asym,group=8"}, "int4:asym,group=8"):
        model = run_recipe([Gptq(formats, "group", sites="blocks.0.attn.{q,k}")], tiny_model(), work())
        found.append([model.parameter(f"blocks.0.attn.{name}.kernel") for name in "qk"])
    (q, k), (other_q, same_k) = found
    jax.tree.map(np.testing.assert_array_equal, k, same_k)
    assert q.scale.shape != other_q.scale.shape


def test_a_plan_can_be_written_by_hand_and_every_glob_must_count():
    formats = {"blocks.0.mlp.down": "int8", "**": "int4:asym,group=16"}
    model = run_recipe([Rtn(formats, sites="blocks.*.mlp.down")], tiny_model(), work())
    assert [str(model.parameter(f"blocks.{n}.mlp.down.kernel").spec) for n in (0, 1)] == list(formats.values())
    config = tiny_model().config
    with pytest.raises(ConfigError, match=r"give blocks.0.attn.q, .* no format; end with '\*\*'"):
        check_recipe([Gptq({"blocks.*.mlp.*": "int8"})], config)
    with pytest.raises(ConfigError, match=r"format: globs = \['blocks.9.\*\*'\]: name no map"):
        check_recipe([Rtn({"blocks.9.**": "int8", "**": "int4"})], config)
    with pytest.raises(ConfigError, match=r"format of \*\*: element.*Did you mean 'int4'"):
        check_recipe([Rtn({"**": "int44"})], config)


def test_the_argument_of_the_recipe_of_plans_by_hand():
    formats = {"blocks.*.mlp.down": "int8", "**": "int4:asym,group=64"}
    assert mixed.get_recipe() == [Rtn(formats)]
    assert mixed.get_recipe("blocks.*.mlp.down=int8/**=int4:asym,group=64/gptq") == [Gptq(formats)]
    for arg, message in [("int8", "mixed: part = 'int8': expected GLOB=FORMAT"), ("**=int8/**=int4", "are not all different")]:
        with pytest.raises(ConfigError, match=message):
            mixed.get_recipe(arg)


def test_true_bytes_are_those_of_the_packed_tensors():
    spec, sites = FormatSpec.parse("int3:asym,group=12,ragged=pad"), SITES[5:7]
    model = run_recipe([Rtn(str(spec), sites="blocks.0.mlp.{up,down}")], tiny_model(), work())
    stored = [model.parameter(f"{site}.kernel").nbytes for site in sites]
    assert stored_bytes(model.config, sites, [spec])[:, 0].tolist() == stored


def test_budgets_and_menus_that_cannot_be_are_refused_before_any_work():
    config = tiny_model().config
    for one, message in [
        (Hawq("2bits", SMALL), r"hawq: bits = 2.0: is out of reach; the formats reach 3\.\d+ to 9\.5"),
        (Hawq("5bits,0.001MB", SMALL), "hawq: MB = 0.001: is out of reach"),
        (Hawq("5bits", ("int4", "int4:narrow")), "hawq: menu = .*expected two different formats"),
        (Hawq("5bits", ("int4", "int8:round=stochastic")), "rounds at random"),
        (Hawq("5bits"), r"blocks.0.attn.q \[16, 16\]: .*no multiple of 64"),
        (Hawq("5bits", ("int4", "int9")), "hawq: menu: element.*int9"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_recipe([Rtn(one)], config)
    with pytest.raises(ConfigError, match="hawq: budget = '4bit': unit = 'bit': allowed are 'bits', 'MB'. Did you mean 'bits'"):
        Hawq("4bit")
    for text in ("", "bits", "-4bits", "0bits", "4bits,5bits"):
        with pytest.raises(ConfigError, match="budget"):
            parse_budget(text, ("bits",), "budget")
    with pytest.raises(ConfigError, match="hawq: curvature = 'hessian'"):
        Hawq(curvature="hessian")


def test_the_argument_of_the_recipe_is_budget_menu_and_options():
    (one,) = recipe.get_recipe("60MB,4bits/int4:asym,group=64/int8/fisher/gptq")
    assert one == Gptq(Hawq("60MB,4bits", ("int4:asym,group=64", "int8"), curvature="fisher"))
    assert recipe.get_recipe() == [Rtn(Hawq("4.25bits", MENU))]
    assert "32 gradients of 512 tokens; 2 blocks x 5" in one.cost(tiny_model().config, TIERS["quick"])
    assert compose.get_recipe("hawq:5bits/gptq+teal:0.4") == [Gptq(Hawq("5bits")), *teal.get_recipe("0.4")]
    with pytest.raises(ConfigError, match="hawq: menu: element = 'fischer': allowed"):
        check_recipe(recipe.get_recipe("4bits/fischer"), tiny_model().config)
