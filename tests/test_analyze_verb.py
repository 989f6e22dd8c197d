"""`python -m experiments.analyze`, from the command line to its tables, pictures and JSON, on models of random weights."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import sparsejax.io.load
from experiments import analyze, entry
from sparsejax import config_text
from sparsejax.compress import run_laws
from sparsejax.config import ExperimentConfig
from sparsejax.evaluate.sparsing_law import activation_ratio
from sparsejax.plugs import ConfigError
from sparsejax.train.metrics import WatchLog
from tests.compress.tiny import tiny_model

TEXT = "".join(chr(97 + n % 26) for n in np.random.default_rng(0).integers(0, 999, 400))
OTHER = "".join(chr(65 + n % 26) for n in np.random.default_rng(1).integers(0, 999, 600))


@pytest.fixture(scope="module")
def models():
    return {
        "relu": tiny_model(layers=1, width=16, hidden=32, activation="reglu"),
        "experts": tiny_model(layers=2, width=16, hidden=32, activation="reglu", feed_pattern=("moe:experts=4,k=2",)),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    monkeypatch.setattr(sparsejax.io.load, "load", lambda name, *, dtype="float32": models[name])
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(OTHER)
    return tmp_path


def run(folder, *arguments, status=0):
    """The JSON that the command writes."""
    path = folder / "result.json"
    with pytest.raises(SystemExit) as stopped:
        entry.run(analyze.main, analyze.Flags, config=False,
                  argv=["analyze", f"--data-dir={folder}", f"--json={path}", *arguments])  # fmt: skip
    assert stopped.value.code == status
    return json.loads(path.read_text()) if not status else None


def test_a_text_is_counted_and_searched_and_a_second_call_computes_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr("sparsejax.compress.ppl_p.MOST_POINTS", 3)
    out = folder / "out"
    arguments = ("--model=relu", "--data=text:text.txt", "--window=16", "--limit=4", "--ppl=10", "--calibration=text:other.txt",
                 "--union=1,2", f"--out={out}")  # fmt: skip
    found = run(folder, *arguments)
    (result,) = found["results"]
    assert result["data"] == "text:text.txt" and (result["windows"], result["window"]) == (4, 16)
    site = result["activity"]["sites"]["mlp.down"]
    assert 0.3 < site["zero_fraction"][0] < 0.7 and list(site["union"]) == ["1", "2"] and len(site["coverage"][0]) == 21
    search = result["searches"]["cett"]["results"][0]
    assert search["percent"] == 10 and search["sparsity"] >= site["zero_fraction"][0] - 1e-9
    assert search["activation_ratio"] == pytest.approx(1 - search["sparsity"])
    assert result["calibration"]["source"] == "text:other.txt"
    printed = capsys.readouterr().out
    assert "mlp.down" in printed and "PPL-p%" in printed and "read at 2" in printed and "redundancy" in printed
    pictures = {path.name for path in (out / "plots").iterdir()}
    names = ("sites", "positions", "union", "blocks", "coverage", "ppl", "ppl-layers")
    assert pictures == {f"text-text-txt-{name}.png" for name in names}
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") == len(names) and "PPL-10 %" in page and "--union=1,2" in page
    assert json.loads((out / "analysis.json").read_text())["results"][0]["sha256"] == result["sha256"]

    monkeypatch.setattr("sparsejax.evaluate.sparsity.ActivityCounter.count", None)
    monkeypatch.setattr("sparsejax.compress.ppl_p.perplexity", None)
    again = run(folder, *arguments)
    assert again["results"] == found["results"]


def test_a_model_of_experts_is_counted_and_says_why_nothing_was_searched(folder, capsys):
    found = run(folder, "--model=experts", "--data=text:text.txt", "--window=16", "--limit=2")
    assert found["results"][0]["searches"] == {} and "have no dense FFN" in found["results"][0]["not_run"]
    assert "not run: --ppl: layers" in capsys.readouterr().out


def run_folder(path, ratio, steps, d_model=32, **ffn):
    """A run folder as training leaves it, with logged zeros."""
    config = ExperimentConfig()
    config.model.d_model, config.batch_size, config.data.sequence_length = d_model, 8, 100
    for name, value in {"activation": "relu2", **ffn}.items():
        setattr(config.model.ffn, name, value)
    path.mkdir()
    (path / "config.json").write_text(config_text.to_json(config))
    log = WatchLog(path)
    for step in steps:
        log.write(step, {"zero_fraction": 1 - np.full(2, ratio(800 * max(step, 1)), np.float32)})
    return path


def test_laws_are_fitted_to_the_zeros_that_runs_have_logged(folder, capsys):
    planted = {"a": 0.449, "b": -3.05, "c": 286.0, "A0": 0.0674}
    shapes = {"narrow": 32, "middle": 64, "wide": 96}
    runs = [
        run_folder(folder / name, lambda tokens, d=d: float(activation_ratio("decreasing", planted, tokens)) + d / 1e4,
                   range(0, 2000, 100), d_model=d)  # fmt: skip
        for name, d in shapes.items()
    ]
    found = run(folder, f"--runs={','.join(map(str, runs))}", f"--out={folder / 'laws'}")
    fit = found["laws"][str(runs[0])]
    assert fit["law"] == "decreasing" and fit["residual"] < 1e-3 and fit["tokens"][0] == 80_000
    assert found["width_depth"]["slope"] == pytest.approx(1e-4 * ExperimentConfig().model.num_layers, rel=1e-3)
    assert "decreasing law" in (folder / "laws/index.html").read_text()
    assert (folder / "laws/plots/law.png").exists() and "width / depth" in capsys.readouterr().out


def test_the_law_of_a_run_without_exact_zeros_is_fitted_to_its_checkpoints(folder, monkeypatch):
    planted = {"a": 0.8, "c": 1e-6, "A0": 0.41}
    swiglu = run_folder(folder / "swiglu", lambda tokens: 1.0, [0, 5], activation="swiglu")
    with pytest.raises(ConfigError, match="'swiglu': gives no exact zeros; give --data"):
        run_laws.logged_ratios(swiglu)
    monkeypatch.setattr(run_laws.checkpoint_files, "steps", lambda folder: [0, 1, *range(50, 1001, 50)])
    monkeypatch.setattr(run_laws, "load_run", lambda folder, *, name, step: SimpleNamespace(step=step))
    ratios = run_laws.checkpoint_ratios(swiglu, lambda model: float(activation_ratio("increasing", planted, model.step * 800)))
    assert ratios.law == "increasing" and ratios.tokens[0] == 40_000 and len(ratios.tokens) == 20
    fits, line = run_laws.fit_runs([ratios])
    assert line is None and fits[str(swiglu)].residual < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model = '': give a model, or --runs"),
        (["--model=relu"], "--data = '': give the texts"),
        (["--model=relu", "--data=arc_easy"], "--data = 'arc_easy': allowed are"),
        (["--model=relu", "--data=text:text.txt", "--truncation=cet"], "Did you mean 'cett'"),
        (["--model=relu", "--data=text:text.txt", "--ppl=one"], "--ppl = 'one': expected numbers"),
        (["--model=relu", "--data=text:text.txt", "--ppl=-1"], "--ppl = '-1': expected percentages above 0"),
        (["--model=relu", "--data=text:text.txt"], "--window = 512: must be 2 to 128, the positions of tiny"),
        (["--model=relu", "--data=text:text.txt", "--window=16", "--scope=half"], "--scope = 'half': allowed are"),
        (["--model=relu", "--data=text:text.txt", "--window=64", "--calibration=text:text.txt"], "calibration overlaps"),
        (["--runs=nowhere"], "--runs = 'nowhere': is not a run folder"),
    ],
)
def test_what_cannot_be_analyzed_is_refused_in_one_message(folder, capsys, arguments, message):
    run(folder, *arguments, status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error
