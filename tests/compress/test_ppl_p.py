"""PPL-p%: the search, and what its truncations do to a model; oracles from the card of Sparsing Law."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.ppl_p import TOLERANCE, CettBound, FatEpsilon, Point, TopK, chosen_point, loss_rise, ppl_p, search, x_at
from sparsejax.compress.recipe import TIERS, Work
from sparsejax.compress.surgery import Placed, place
from sparsejax.context import Context
from sparsejax.evaluate.perplexity import Windows
from sparsejax.evaluate.sparsity import ActivityCounter
from sparsejax.nnx_compat import merge
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

RNG = np.random.default_rng(0)
WINDOWS = Windows(RNG.integers(0, 256, (3, 16)).astype(np.int32), 3)
CALIBRATION = Calibration(CalibrationSpec("none", 2, 16), RNG.integers(0, 256, (2, 16)).astype(np.int32), "")


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr("sparsejax.compress.ppl_p.MOST_POINTS", 3)


def work(folder=None):
    return Work(CALIBRATION, TIERS["quick"], folder)


@pytest.fixture(scope="module")
def relu():
    """ReGLU whose down maps matter, with targets that its own weights make likely enough for losses to rise."""
    model = tiny_model(layers=2, hidden=64, activation="reglu")
    return dataclasses.replace(model, values=jax.tree.map(lambda a: a * 2 if a.ndim == 3 else a, model.values))


def test_one_per_cent_of_perplexity_is_a_loss_rise_of_00995():
    assert loss_rise(1) == pytest.approx(0.00995, abs=5e-6)
    assert loss_rise(10) == pytest.approx(math.log(1.1))


@settings(max_examples=40, deadline=None)
@given(power=st.floats(0.7, 6), scale=st.floats(0.01, 30), percent=st.sampled_from((1.0, 10.0)), start=st.floats(0.05, 0.9))
def test_the_search_ends_within_tolerance_of_the_target_in_few_points(power, scale, percent, start):
    known: dict[float, float] = {}
    target = loss_rise(percent)
    search(lambda x: scale * x**power, target, known, start, lambda low, high: high - low < 1e-6, lambda x: TOLERANCE * target)
    assert len(known) <= 12 and all(0 < x < 1 for x in known)
    if 1e-3 < (target / scale) ** (1 / power) < 0.97:  # where the curve meets the target
        assert min(abs(value - target) for value in known.values()) <= 2 * TOLERANCE * target


@settings(max_examples=40, deadline=None)
@given(rises=st.lists(st.floats(-0.02, 0.3), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_the_result_never_falls_with_p_however_noisy_the_losses(rises, seed):
    xs = np.sort(np.random.default_rng(seed).uniform(0.01, 1, len(rises)))
    points = [Point(float(x), rise, 0.001, float(x)) for x, rise in zip(xs, rises, strict=True)]
    chosen = [chosen_point(points, loss_rise(p)).x for p in (0.5, 1, 5, 10, 20)]
    assert chosen == sorted(chosen)
    shares = [x_at(points, rise) for rise in (0, 0.01, 0.05, 0.2, 0.5)]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1


def test_nothing_truncated_is_the_dense_model_and_relu_keeps_its_natural_zeros(relu, few_points):
    still = CettBound([_curve_piece(relu, layer) for layer in range(2)]).place(relu, 0.0)
    np.testing.assert_array_equal(_logits(still), _logits(relu))
    found = ppl_p(relu, WINDOWS, work(), percents=(5.0,))
    assert found.points and found.cett_decreases is not None
    (result,) = found.results
    natural = np.mean(np.asarray(Blocks(relu).tensors(0, Blocks(relu).embed(WINDOWS.tokens), "mlp.down")[1]["mlp.down"]) == 0)
    assert result.layers[0] > natural > 0.3 and result.layers.shape == (2,)
    assert result.low <= result.sparsity <= result.high and result.activation_ratio == 1 - result.sparsity
    assert result.perplexity == pytest.approx(math.exp(found.dense_loss + result.rise))
    assert result.activity.sites["mlp.down"].union is not None


def _curve_piece(model, layer):
    hidden = np.abs(np.random.default_rng(layer).standard_normal((8, model.config.ffn.hidden))).astype(np.float32)
    return CettBound.fit([hidden], model.parameter(f"blocks.{layer}.mlp.down.kernel"))


def _logits(model):
    def run(values):
        return merge(model.structure, values)({"tokens": WINDOWS.tokens}, Context(mode="prefill"))[0]

    return np.asarray(jax.jit(run)(model.values))


def test_each_truncation_drops_by_its_own_score(relu):
    """Of one layer, against numpy on the dense model's tensors; both layers have their own arrays."""
    blocks = Blocks(relu)
    h = blocks.embed(WINDOWS.tokens)
    _, tensors = blocks.tensors(0, h, "mlp.hidden", "mlp.gate_out")
    hidden, gate = (np.asarray(tensors[name]) for name in ("mlp.hidden", "mlp.gate_out"))
    scale = np.linalg.norm(np.asarray(relu.parameter("blocks.0.mlp.down.kernel")), axis=1)
    weighted = np.abs(hidden) * scale
    pieces = {kind: [_piece(kind, relu, layer, hidden, gate) for layer in range(2)] for kind in (CettBound, TopK, FatEpsilon)}

    def zeros(kind, x):
        placed = kind(pieces[kind]).place(relu, x)
        return np.asarray(Blocks(placed).tensors(0, h, "mlp.down")[1]["mlp.down"]) == 0

    threshold = CettBound(pieces[CettBound]).curves()[0].at(0.3)[0]
    np.testing.assert_array_equal(zeros(CettBound, 0.3), weighted <= np.float32(threshold))
    kept = 64 - round(0.9 * 64)
    assert ((~zeros(TopK, 0.9)).sum(-1) <= kept).all()
    smallest_kept = np.sort(weighted, axis=-1)[..., -kept:]
    np.testing.assert_array_equal(~zeros(TopK, 0.9), (weighted >= smallest_kept[..., :1]) & (hidden != 0))
    epsilon = np.quantile(np.abs(gate), 0.8)
    np.testing.assert_allclose(np.mean(zeros(FatEpsilon, 0.8)), 0.8, atol=0.02)
    wrong = (np.abs(gate) > epsilon * 1.1) & zeros(FatEpsilon, 0.8) & (hidden != 0)
    assert not wrong.any()
    plain = tiny_model(layers=1, activation="relu2")
    assert FatEpsilon.taps(plain.config) == ("mlp.down",) and FatEpsilon.taps(relu.config) == ("mlp.gate_out",)


def _piece(kind, model, layer, hidden, gate):
    rows = (gate if kind is FatEpsilon else hidden).reshape(-1, 64)
    return kind.fit([rows], model.parameter(f"blocks.{layer}.mlp.down.kernel"))


def test_a_second_search_reads_what_was_kept(relu, few_points, tmp_path, monkeypatch):
    first = ppl_p(relu, WINDOWS, work(tmp_path), truncation="topk", percents=(5.0,))
    written = sorted(tmp_path.iterdir())
    monkeypatch.setattr("sparsejax.compress.ppl_p.perplexity", None)  # any further scoring would fail
    monkeypatch.setattr(ActivityCounter, "count", None)
    again = ppl_p(relu, WINDOWS, work(tmp_path), truncation="topk", percents=(5.0,))
    assert sorted(tmp_path.iterdir()) == written
    assert again.results[0].sparsity == first.results[0].sparsity and again.points == first.points


def test_what_cannot_be_searched_is_refused_by_name(relu):
    with pytest.raises(ConfigError, match="--truncation = 'cet': .*Did you mean 'cett'"):
        ppl_p(relu, WINDOWS, work(), truncation="cet")
    with pytest.raises(ConfigError, match="--ppl = .*percentages above 0"):
        ppl_p(relu, WINDOWS, work(), percents=(0.0,))
    experts = tiny_model(layers=2, feed_pattern=("ffn", "moe:experts=4,k=2"))
    with pytest.raises(ConfigError, match=r"--ppl: layers = \[1\]: have no dense FFN"):
        ppl_p(experts, WINDOWS, work())
    chosen = place(relu, "neurons", {"blocks.1.mlp": Placed("gate_threshold", {"threshold": np.float32(0.1)})})
    with pytest.raises(ConfigError, match="already have a selector"):
        ppl_p(chosen, WINDOWS, work(), truncation="fat")
