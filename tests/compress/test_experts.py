"""Mixtures of experts, compressed: what is selected at the inputs of experts, counted by token, and what is refused."""

import json

import jax
import numpy as np
import pytest

from experiments import compress, entry
from sparsejax.compress import accounting, report_plots
from sparsejax.compress.allocators import Greedy, Uniform
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration, CalibrationSpec
from sparsejax.compress.recipe import TIERS, Work, check_experts, run_recipe
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.io import model_folder
from sparsejax.io.load import load
from sparsejax.methods.sparsity.griffin import Griffin
from sparsejax.methods.sparsity.isocline import MarginalLoss
from sparsejax.methods.sparsity.n_of_m import ActivationNofM
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.methods.sparsity.wina import Wina, channel_norms
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

D, F, K, E = 16, 24, 2, 4
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32)
MIXED = [f"mlp.{network}.{name}" for network in ("experts", "shared") for name in ("gate", "up", "down")]
SITES = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", *MIXED]


@pytest.fixture(scope="module")
def model():
    """A dense block and one of four experts, two to a token, beside a shared one."""
    feeds = ("ffn", f"moe:experts={E},k={K},shared=1,hidden={F}")
    return tiny_model(layers=2, width=D, hidden=F, feed_pattern=feeds)


def work(folder=None):
    return Work(Calibration(CalibrationSpec(sequences=4, length=32), TOKENS, ""), TIERS["quick"], folder)


def zeros(model, tokens=TOKENS):
    """By layer and site, the share of zeros at the inputs of a model, from its blocks alone."""
    blocks, found = Blocks(model), {}
    h = blocks.embed(tokens)
    for layer in range(2):
        here = [site for site in SITES if site in ([*SITES[:7]] if layer == 0 else [*SITES[:4], *MIXED])]
        h, tensors = blocks.tensors(layer, h, *here)
        found.update({(layer, site): float(np.mean(np.asarray(x) == 0)) for site, x in tensors.items()})
        assert all(x.shape[2] == K for site, x in tensors.items() if ".experts." in site)
    return found


@pytest.fixture(scope="module")
def teal(model):
    """Half of every input dropped, by thresholds; its zeros."""
    fitted = run_recipe([Teal(0.5, allocator=Uniform())], model, work())
    return fitted, zeros(fitted)


def test_thresholds_drop_about_their_share_at_every_input_of_every_expert(teal):
    """They are fitted to dense inputs: what stands behind sparse ones here drops another share than was asked for."""
    assert len(teal[1]) == 7 + 4 + 6 and all(abs(share - 0.5) < 0.15 for share in teal[1].values()), teal[1]


@pytest.mark.parametrize("one", [Wina(0.5, allocator=Uniform()), ActivationNofM(1, 2)], ids=["wina", "n_of_m"])
def test_exact_counts_are_dropped_at_every_input_of_every_expert(model, one):
    found = zeros(run_recipe([one], model, work()))
    assert len(found) == 7 + 4 + 6 and all(share == 0.5 for share in found.values()), found


def test_zeros_of_experts_are_counted_by_token_and_weigh_as_often_as_a_token_passes_them(model, teal):
    fitted, counted = teal
    scorer = Scorer(fitted, meter=accounting.meter(fitted.config))
    scorer.score([Row(np.append(row, 0), 1) for row in TOKENS])
    realised = accounting.sparsity(fitted.config, scorer.measured())
    saved, passed = 0.0, 0
    for (layer, site), share in counted.items():
        assert realised.sites[site][layer] == pytest.approx(share, abs=1e-6)
        saved, passed = saved + share * realised.sizes[site][layer], passed + realised.sizes[site][layer]
    attention, network = 2 * D * D + 2 * D * D // 2, 3 * D * F
    assert passed == 2 * attention + network + (K + 1) * network
    assert realised.model == pytest.approx(saved / passed, abs=1e-6)
    dense, sparse = accounting.bytes_per_token(model), accounting.bytes_per_token(fitted, realised)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.values))
    assert dense.total == whole - 4 * (E - K) * network and sparse.saved == pytest.approx(4 * saved, rel=1e-5)


def test_experts_share_the_norms_that_weigh_their_channels(model):
    kernel = np.asarray(model.parameter("blocks.1.mlp.experts.down.kernel"), np.float64)
    assert kernel.shape == (E, F, D)
    expected = np.sqrt((kernel**2).sum(-1).mean(0))
    np.testing.assert_allclose(channel_norms(model, "blocks.1.mlp.experts.down"), expected, rtol=1e-6)


def test_a_mixture_is_compressed_from_the_command_line_and_its_folder_loads(model, tmp_path, monkeypatch):
    monkeypatch.setattr(report_plots, "draw", lambda report: [])  # takes as long as all else
    model_folder.save(model, tmp_path / "dense")
    out = tmp_path / "out"
    argv = ["compress", f"--model={tmp_path / 'dense'}", "--recipe=configs/recipes/teal.py:0.4", f"--out={out}",
            "--calibration-sequences=2", "--calibration-length=64", "--window=65", "--limit=2",
            "--decode-tokens=0"]  # fmt: skip
    call, _ = entry.parse(argv, compress.Flags, config=False)
    report = compress.main(call)
    dense, row = report["rows"]
    assert set(row["sparsity"]["sites"]) == set(SITES) and 0.25 < row["sparsity"]["model"] < 0.55
    assert row["bytes"]["relative"] < 0.9
    plan = json.dumps(row["notes"])
    assert "blocks.1.mlp.experts.down" in plan and "router" not in plan
    assert any(rule.startswith("blocks.*.mlp.experts.up=threshold") for rule in load(str(out)).config.inputs)


def test_what_cannot_choose_among_experts_is_refused_by_pass_and_site(model):
    with pytest.raises(ConfigError, match=r"recipe\[0\] \(griffin\): site = 'blocks.1.mlp.experts'"):
        check_experts([Griffin()], model.config)
    check_experts([Griffin()], tiny_model().config)
    with pytest.raises(ConfigError, match="teal: allocator = MarginalLoss.*blocks.1.mlp.experts"):
        Teal(0.5, allocator=MarginalLoss()).check(model.config)
    Teal(0.5, allocator=Greedy()).check(model.config)
