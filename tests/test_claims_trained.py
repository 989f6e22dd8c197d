"""Claims of trained methods: verdicts from recorded results, runs that are shared, and one that is really trained."""

import json

import numpy as np
import pytest

from experiments.claims import digits, images, laws, trained
from experiments.claims.bench import Bench, Rows, Run, Truncated
from experiments.claims.registry import CLAIMS
from sparsejax.train.final import HELD_OUT

LOSSES = np.random.default_rng(0).gamma(20, 0.1, 512)


def run(loss, zeros=0.0, **found):
    """A run whose held-out losses differ from `LOSSES` by a constant."""
    one = Run(None, {"results": {"loss": loss, "zero_fraction": zeros, **found}})
    one.__dict__["losses"] = LOSSES + loss - LOSSES.mean()
    return one


def rows(rise, hidden=(0.85, 0.86), recall=0.95, precision=0.5):
    def row(loss, zeros):
        results = [{"data": "stdlib:evaluation", "values": [loss, loss + 1]}]
        notes = {"0-dejavu": {"recall": {"0": recall}, "precision": {"0": precision}}}
        return {"results": results, "sparsity": {"sites": {"mlp.down": zeros}}, "notes": notes}

    return Rows(row(2.0, hidden[0]), row(2.0 + rise, hidden[1]))


class Recorded(Bench):
    """A bench that has trained everything already; runs by the beginning of their name and an override."""

    def __init__(self, runs=None, rows=None, cuts=None):
        self.runs, self.rows, self.cuts = runs or {}, rows or {}, cuts or {}

    def trained(self, config, *, seed=0, **overrides):
        activation = overrides.get("model__ffn__activation", "")
        names = (f"{config}/{activation}/{seed}", f"{config}/{activation}", f"{config}/{seed}", config)
        return next(self.runs[name] for name in names if name in self.runs)

    def compressed(self, recipe, *, model="", scope="all"):
        return self.rows[recipe] if recipe in self.rows else self.rows[recipe, round(model.loss, 6)]

    def ppl_p(self, run, *, percent=1.0, step=None):
        return self.cuts[round(run.loss, 6)][laws.STEPS.index(step) if step else 0]


START = {"tiny_swiglu": run(2.2), "relufied_tiny:1": run(2.0, 0.62), "relufied_tiny:control": run(1.99)}


def test_relufication_needs_the_control_nearby_and_zeros():
    assert trained.relufication(Recorded(START)).holds
    assert not trained.relufication(Recorded({**START, "relufied_tiny:1": run(2.0, 0.59)})).holds
    assert not trained.relufication(Recorded({**START, "relufied_tiny:1": run(2.02, 0.7)})).holds
    assert trained.second_stage(Recorded({**START, "relufied_tiny:2": run(2.04, 0.5)})).holds
    assert not trained.second_stage(Recorded({**START, "relufied_tiny:2": run(2.06, 0.5)})).holds


@pytest.mark.parametrize(("loss", "zeros", "holds"), [(2.039, 0.81, True), (2.041, 0.81, False), (1.9, 0.79, False)])
def test_prosparse_needs_its_zeros_within_two_per_cent_and_tells_what_the_control_costs(loss, zeros, holds):
    runs = {**START, "prosparse_tiny:0.015": run(loss, zeros), "prosparse_tiny:control": run(1.85, 0.6)}
    outcome = trained.eighty_per_cent(Recorded(runs))
    assert outcome.holds == holds and f"costs {100 * (loss / 1.85 - 1):+.1f} %" in outcome.measured
    assert "62.0 % zeros" in outcome.measured and outcome.numbers["control"] == {"loss": 1.85, "zeros": 0.6}


def test_a_raised_threshold_adds_zeros_for_nothing_or_not():
    runs = {**START, "prosparse_tiny:0.015": run(2.0, 0.85)}
    recorded = {"fatrelu:0.01": rows(0.001), "fatrelu:0.05": rows(0.1, (0.85, 0.9))}
    assert trained.raised_threshold(Recorded(runs, recorded)).holds
    for bad in (rows(0.003), rows(0.001, (0.85, 0.854))):
        assert not trained.raised_threshold(Recorded(runs, {**recorded, "fatrelu:0.01": bad})).holds


def test_a_density_loss_is_judged_at_the_weights_whose_loss_is_like_the_plain_one():
    weighted = {"0": run(2.0, 0.5), "0.3": run(2.0, 0.6), "0.5": run(2.01, 0.66)}
    runs = {**START, **{f"deft_lora_tiny:{weight}": one for weight, one in weighted.items()}}
    assert trained.density_loss(Recorded(runs)).holds  # density .5 to .34
    assert not trained.density_loss(Recorded({**runs, "deft_lora_tiny:0.5": run(2.021, 0.66)})).holds
    assert not trained.density_loss(Recorded({**runs, "deft_lora_tiny:0.5": run(2.01, 0.64)})).holds


def test_gaps_are_means_over_seeds():
    def bench(masked):
        return Recorded({f"qsparse_tiny:{arm}/{seed}": run(2.0 + gap + 0.005 * seed)
                         for arm, gap in (("dense", 0), ("", 0.03), ("masked", masked)) for seed in trained.SEEDS})

    assert trained.straight_through(bench(0.065)).holds and not trained.straight_through(bench(0.055)).holds
    assert "by seed +0.0300, +0.0300" in trained.straight_through(bench(0.065)).measured


def test_laws_need_their_directions_beyond_their_errors():
    def cuts(first, last, zeros=(0.5, 0.6), error=0.01):
        values = np.linspace(first, last, len(laws.STEPS))
        exact = np.linspace(*zeros, len(laws.STEPS))
        return [Truncated(v, v - error, v + error, z) for v, z in zip(values, exact, strict=True)]

    def bench(relu, silu):
        return Recorded({"tiny_swiglu/swiglu": run(2.0), "tiny_swiglu/reglu": run(2.1)}, cuts={2.1: relu, 2.0: silu})

    up, down = cuts(0.7, 0.85), cuts(0.8, 0.5)
    assert laws.sparsing_law(bench(down, down)).holds and not laws.sparsing_law(bench(down, up)).holds
    assert not laws.sparsing_law(bench(cuts(0.8, 0.9, (0.5, 0.5)), down)).holds
    assert not laws.sparsing_law(bench(up, cuts(0.8, 0.5, error=0.15))).holds
    assert laws.one_metric(bench(up, down)).holds and not laws.one_metric(bench(down, down)).holds
    assert laws.activation_gap(bench(up, down)).holds and not laws.activation_gap(bench(down, down)).holds
    found = {"tiny_relu2": run(2.0), "tiny_relu2/relu": run(2.1)}
    assert laws.squared(Recorded(found, cuts={2.1: up, 2.0: down})).holds
    assert not laws.squared(Recorded(found, cuts={2.1: down, 2.0: up})).holds


def test_a_predictor_must_find_the_relu_models_units_and_more_of_them_than_swiglus():
    runs = {**START, "prosparse_tiny:0.015": run(2.0, 0.85)}
    recipe = "deja_vu:0.7,rank=32"

    def bench(**changes):
        return Recorded(runs, {(recipe, 2.0): rows(0.01, **changes), (recipe, 2.2): rows(0.2, recall=0.93)})

    assert trained.predicted(bench()).holds
    assert not trained.predicted(bench(recall=0.92)).holds and not trained.predicted(bench(precision=0.3)).holds


def test_top_k_images_claims_need_every_seed():
    def found(accuracy):
        return run(1.0, accuracy=accuracy, calibration_error=accuracy / 10, corrupted={"noise": {"accuracy": accuracy}})

    def holds(name, top, relu):
        runs = {f"vit_fashion_mnist/{arm}/{seed}": found(value) for arm, values in (("topk:0.05", top), ("relu", relu))
                for seed, value in zip(images.SEEDS, values, strict=True)}
        return next(claim for claim in images.CLAIMS if claim.name == name).measure(Recorded(runs)).holds

    low, high = ([value] * len(images.SEEDS) for value in (0.8, 0.9))
    mixed = [0.7, *high[1:]]
    assert holds("lazy_corruption", high, low) and holds("lazy_label_noise", high, low)
    assert not holds("lazy_corruption", mixed, low) and not holds("lazy_calibration", high, low)
    assert holds("lazy_calibration", low, high)


def test_runs_are_named_by_their_resolved_config_and_found_again(tmp_path, monkeypatch):
    calls, signals = [], []

    def train(config, *, base, out, command, loader):
        calls.append(config)
        print("noise")
        np.savez(out / HELD_OUT, nll=np.array([4.0, 9.0, 7.0]), weight=np.array([2.0, 3.0, 0.0]))
        return {"results": {"loss": 2.6, "zero_fraction": 0.5}, "finished": not signals}

    monkeypatch.setattr("sparsejax.train.run.train", train)
    bench = Bench(tmp_path)
    first = bench.trained("tiny_swiglu", model__d_model=64)
    assert (first.loss, first.zeros) == (2.6, 0.5) and first.losses.tolist() == [2.0, 3.0]
    assert bench.trained("tiny_swiglu", model__d_model=64) == first and len(calls) == 1
    assert (first.folder / "log.txt").read_text() == "noise\n"
    others = [bench.trained("tiny_swiglu", model__d_model=32), bench.trained("tiny_swiglu", seed=1, model__d_model=64)]
    onward = bench.trained("relufied_tiny:2", init=first)
    assert calls[-1].init == str(first.folder) and calls[-1].model.ffn.activation == "reglu"
    assert bench.trained("relufied_tiny:2", init=others[0]).folder != onward.folder
    assert len({one.folder for one in (first, *others, onward)}) == 4
    signals.append("SIGINT")
    with pytest.raises(KeyboardInterrupt):  # a run that was stopped ends the verb, and is no result
        bench.trained("tiny_swiglu", seed=7)
    signals.clear()
    assert bench.trained("tiny_swiglu", seed=7).loss == 2.6 and len(calls) == 7
    elsewhere = Bench(tmp_path / "moved")
    again = elsewhere.trained("relufied_tiny:2", init=elsewhere.trained("tiny_swiglu", model__d_model=64))
    assert again.folder.name == onward.folder.name  # wherever the bench lies


def test_a_run_is_trained_for_real_under_noise_and_judged_under_more(tmp_path):
    tiny = {"model__num_layers": 1, "model__d_model": 16, "model__attention__num_heads": 2, "steps": 2, "batch_size": 32,
            "data__label_noise": 0.4, "data__train_images": 64, "evaluate__batches": 2, "log__watch_every": 0}
    one = Bench(tmp_path).trained("vit_digits", evaluate__corruptions=("gaussian_noise:5", "shot_noise"), **tiny)
    saved = json.loads((one.folder / "claim_result.json").read_text())
    assert saved["finished"] and saved["results"]["loss"] == one.loss and len(one.losses) == 64
    assert one.loss == pytest.approx(one.losses.mean()) and one.above(one) == (0, 0)
    assert 0 < images.calibration_error(one) < 100 and 0 <= images.accuracy(one) <= 100
    noisy = one.found["corrupted"]
    assert list(noisy) == ["gaussian_noise:5", "shot_noise"]
    assert all({"accuracy", "calibration_error"} <= set(under) and under["loss"] != one.loss for under in noisy.values())
    assert "under gaussian_noise:5" in (one.folder / "log.txt").read_text()
    page = (one.folder / "index.html").read_text()
    assert "corrupted: gaussian noise:5: accuracy" in page and "calibration error" in page


def test_networks_of_digits_are_pruned_and_streamed_as_stated():
    network = digits.drawn(0)
    x, labels = digits.images()["evaluation"]
    assert digits._fall(network, lambda inputs, kernel: np.abs(kernel)) == pytest.approx(0, abs=30)
    frames, shown = digits._fading(x, labels, 20)
    assert frames.shape == (20 * digits.FRAMES, 64) and shown.tolist() == labels[:20].tolist()
    np.testing.assert_array_equal(frames[:: digits.FRAMES], x[:20])
    fine, coarse = (digits._streamed(network, frames, shown, share) for share in (1e-3, 1.0))
    assert fine.by_frame == coarse.by_frame and fine.changes > coarse.changes and fine.fall == 0


def test_the_fast_set_is_there_and_claims_name_what_they_need():
    fast = [claim for claim in CLAIMS if claim.fast]
    assert {"prosparse", "relufication", "ap_dead_rate", "relative_importance", "proact"} <= {claim.name for claim in fast}
    assert sum(claim.minutes for claim in fast) <= 4.5 and not any(claim.needs for claim in fast)
    assert all(claim.needs == ("fashion_mnist",) for claim in images.CLAIMS)
