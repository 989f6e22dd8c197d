"""`python -m experiments.compress` from the command line to a folder that loads, on a tiny Llama that reads bytes."""

import json

import jax
import numpy as np
import pytest

import sparsejax.compress.measure
import sparsejax.compress.session
from experiments import compress, entry, evaluate
from sparsejax.compress import report_plots
from sparsejax.compress.allocators import Uniform as Even
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import CalibrationSpec
from sparsejax.compress.session import Request
from sparsejax.compress.work_folder import WorkFolder
from sparsejax.context import Context
from sparsejax.evaluate.decode_speed import Probe
from sparsejax.evaluate.perplexity import cut_windows
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.texts import open_text
from sparsejax.io import export_hf, model_folder
from sparsejax.io.load import load
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.nnx_compat import merge
from tests.compress.uniform import LAYERS, Uniform, write_dense

TOKENS = np.arange(24).reshape(2, 12) * 7 % 264
SMALL = ("--calibration-sequences=2", "--calibration-length=64", "--window=65", "--limit=3", "--decode-tokens=0")
DECODED = ("--decode-tokens=4", "--executor=gathered")
SITES = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def half(given, tmp_path_factory):
    """The folder at sparsity 0.5, with decoding measured, and the result of the verb."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsejax.compress.measure, "Probe", lambda: Probe(2**22))
        return out, run(given, out, *DECODED)


@pytest.fixture
def without_plots(half, monkeypatch):
    """Drawing takes as long as all else."""
    monkeypatch.setattr(report_plots, "draw", lambda report: [])


def run(given, out, *arguments, argument="0.5"):
    model, recipe = given
    argv = ["compress", f"--model={model}", f"--recipe={recipe}:{argument}", f"--out={out}", *SMALL, *arguments]
    call, _ = entry.parse(argv, compress.Flags, config=False)
    return compress.main(call)


def refusal(capsys, main, flags, *argv):
    with pytest.raises(SystemExit) as stopped:
        entry.run(main, flags, config=False, argv=["verb", *argv])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1 and "Traceback" not in printed
    return printed


def logits(model):
    run = jax.jit(lambda values: merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


def test_a_compressed_folder_loads_and_its_report_tells_what_was_realised(half, given):
    out, report = half
    names = {path.name for path in out.iterdir()}
    plots = {"plot_sparsity.png", "plot_quality.png", "plot_bytes.png", "plot_speed.png"}
    assert names == {"model.json", "model.safetensors", "report.json", "report.md", "report.html", *plots}
    assert json.loads((out / "report.json").read_text()) == report
    dense, row = report["rows"]
    assert dense["method"] == "dense" and (row["label"], row["requested"]) == ("uniform:0.5", 0.5)
    assert set(row["sparsity"]["sites"]) == SITES and 0.4 < row["sparsity"]["model"] < 0.6
    assert dense["sparsity"]["model"] == 0 and dense["bytes"]["relative"] == 1

    # Masks of the saved model, block by block, over the inputs of the scored windows.
    model = load(str(out))
    windows = cut_windows(open_text("stdlib", "evaluation", ()).text, model.tokenizer, 65, 3, "stdlib").tokens
    blocks = Blocks(model)
    h = blocks.embed(windows[:, :-1])
    for layer in range(LAYERS):
        h, tensors = blocks.tensors(layer, h, *sorted(SITES))
        for site in SITES:
            zeros = np.mean(np.asarray(tensors[site]) == 0)
            assert row["sparsity"]["layers"][site][layer] == pytest.approx(zeros, abs=2e-6)
    assert row["sparsity"]["tokens"] == 3 * 64

    (ours,), (theirs,) = row["results"], dense["results"]
    difference = np.array(ours["values"]) - theirs["values"]
    assert ours["loss_difference"] == pytest.approx(difference.mean())
    assert ours["loss_difference_error"] == pytest.approx(difference.std(ddof=1) / 3**0.5)
    executors = [one["decode"]["executor"].partition(":")[0] for one in (dense, row)]
    assert row["decode"]["new_tokens"] == 4 and executors == ["dense masked", "gathered"] and row["cost"]["peak_bytes"] > 2**20
    assert row["calibration"]["sha256"] and "--recipe" in row["command"] and row["versions"]["jax"] == jax.__version__
    assert row["notes"] == {"0-uniform": {"layers": LAYERS}}


def test_fitted_arrays_survive_folders_of_both_kinds_bit_for_bit(half, tmp_path):
    model = load(str(half[0]))
    threshold = np.asarray(model.parameter("blocks.1.mlp.down.inputs.0.threshold"))
    assert threshold > 0 and threshold.dtype == np.float32
    model_folder.save(model, tmp_path / "ours")
    exported = export_hf.write_hf(model, tmp_path / "hf")
    assert {"sparsity_config.json", "sparsity.safetensors"} <= set(exported.files)
    assert "sparsity.safetensors" in exported.notes[0] and "stdlib:calibration" in (tmp_path / "hf/README.md").read_text()
    for again in (load(str(tmp_path / "ours")), load(str(tmp_path / "hf"))):
        assert again.config.inputs == model.config.inputs
        jax.tree.map(np.testing.assert_array_equal, again.values, model.values)
        np.testing.assert_array_equal(logits(again), logits(model))
    (tmp_path / "hf" / "sparsity.safetensors").unlink()
    with pytest.raises(ValueError, match=r"sparsity_config.json: arrays .*threshold.*no value"):
        load(str(tmp_path / "hf"))


@pytest.mark.usefixtures("without_plots")
def test_sparsity_zero_gives_the_dense_logits_bit_for_bit(given, tmp_path):
    report = run(given, tmp_path / "zero", argument="0.0")
    np.testing.assert_array_equal(logits(load(str(tmp_path / "zero"))), logits(load(str(given[0]))))
    dense, row = report["rows"]
    assert row["results"][0]["values"] == dense["results"][0]["values"]
    assert (row["bytes"]["relative"], row["ideal_speedup"], row["results"][0]["loss_difference"]) == (1, 1, 0)


@pytest.mark.usefixtures("without_plots")
def test_a_killed_compression_goes_on_to_the_same_model(half, given, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(Uniform, "dies_at", 2)
    with pytest.raises(KeyboardInterrupt):
        run(given, out)
    assert not (out / "model.json").exists()
    monkeypatch.setattr(Uniform, "dies_at", -1)
    Uniform.computed.clear()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sparsejax.compress.session.report_html, "write", killed)
        run(given, out)
    assert Uniform.computed == [2] and not (out / "model.json").exists()
    capsys.readouterr()
    assert run(given, out)["rows"][1]["cost"]["resumed"]
    assert Uniform.computed == [2] and "scoring" not in capsys.readouterr().err  # neither fitted nor scored again
    assert (out / "model.safetensors").read_bytes() == (half[0] / "model.safetensors").read_bytes()
    assert not (out / "work").exists()


@pytest.mark.parametrize(
    ("recipe", "label", "method"),
    [
        ("a/teal.py:0.5", "teal:0.5", "teal"),
        ("teal.py", "teal", "teal"),
        ("teal.py:.5,topk,uniform", "teal:.5,topk,uniform", "teal,topk,uniform"),
        ("refit.py:isocline:0.5", "refit:isocline:0.5", "refit,isocline"),
    ],
)
def test_variants_of_a_method_are_lines_of_their_own(recipe, label, method):
    given = Request("m", "out", recipe, "", (), (), "quick", CalibrationSpec(), Scope())
    assert (given.label, given.method) == (label, method)


def test_pieces_of_another_recipe_are_not_taken(tmp_path):
    first = WorkFolder(tmp_path, "one")
    assert (first.kept("x", lambda: [1.5, float("nan")])[0], first.kept("x", lambda: 2)[0], first.resumed) == (1.5, 1.5, False)
    assert WorkFolder(tmp_path, "one").resumed and not WorkFolder(tmp_path, "one", resume=False).resumed
    WorkFolder(tmp_path, "one").kept("x", lambda: 3)
    assert WorkFolder(tmp_path, "two").kept("x", lambda: 4) == 4 and not (tmp_path / "work" / "one").exists()


@pytest.mark.usefixtures("without_plots")
def test_pieces_that_serve_every_sparsity_are_shared_between_compressions(given, tmp_path):
    def shared_after(name, *passes):
        small = CalibrationSpec(sequences=2, length=64)
        named = str(given[0]), tmp_path / name, f"{name}.py", "", passes, ("stdlib:evaluation",), "quick", small, Scope()
        request = Request(*named, window=65, limit=2, decode_tokens=0, pieces=tmp_path / "pieces")
        sparsejax.compress.session.compress(request)
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "pieces").rglob("*.npz")}

    first = shared_after("a", Teal(0.3, allocator=Even()))
    assert len(first) >= LAYERS
    assert shared_after("b", Teal(0.6, allocator=Even())) == first
    other = shared_after("c", Teal(0.3, allocator=Even(), sites="blocks.*.mlp.*"))
    behind = shared_after("d", Uniform(0.5, "blocks.*.attn.*"), Teal(0.3, allocator=Even(), sites="blocks.*.mlp.*"))
    assert first.items() < other.items() < behind.items()
    assert not any("block-" in path.name for path in behind)  # of Uniform, whose pieces are of its sparsity


def test_a_finished_folder_is_left_alone_and_another_request_for_it_refused(half, given, monkeypatch, capsys):
    out, report = half
    monkeypatch.setattr(sparsejax.compress.session, "load", None)
    assert run(given, out, *DECODED) == report
    assert "finished before" in capsys.readouterr().out
    model, recipe = given
    argv = [f"--model={model}", f"--recipe={recipe}:0.25", f"--out={out}", *SMALL, *DECODED]
    assert "differing in recipe;" in refusal(capsys, compress.main, compress.Flags, *argv)


@pytest.mark.usefixtures("without_plots")
def test_a_dense_row_is_reused_under_the_same_protocol_alone(half, given, tmp_path, capsys):
    report = run(given, tmp_path / "more", f"--baseline={half[0]}", argument="0.6")
    assert "stdlib:evaluation dense" not in capsys.readouterr().err
    assert report["rows"][0]["results"] == half[1]["rows"][0]["results"]
    model, recipe = given
    argv = [f"--model={model}", f"--recipe={recipe}", f"--out={tmp_path / 'x'}", *SMALL, f"--baseline={half[0]}"]
    printed = refusal(capsys, compress.main, compress.Flags, *argv, "--scope=from:0.5")
    assert 'scope "all" and "from:0.5"' in printed and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe=RECIPEZ"], "Did you mean"),
        (["--recipe=RECIPE:much"], "line 6: ValueError: could not convert string to float: 'much'"),
        (["--recipe=RECIPE:1.0"], r"recipe[0] (uniform): sparsity = 1.0: must be in [0, 1)"),
        (["--recipe=RECIPE:0.5@blocks.*.mlp.dwon"], "names no site of this model. Did you mean 'blocks.*.mlp.down'?"),
        (["--calibration=text:TEXT", "--data=text:TEXT", "--calibration-sequences=9"], "overlaps evaluation: 1 of 3 windows"),
        (["--calibration=sdlib"], "Did you mean 'stdlib'"),
        (["--scope=from:2"], "--scope"),
        (["--scope=from:0.99"], "leaves no target"),
        (["--tier=fast"], "allowed are 'quick', 'full'"),
        (["--calibration-length=4096"], "to 128 (positions of"),
        (["--window=63"], "--window = 63: must be 64"),
        (["--model=nowhere"], "neither a known name nor an existing path"),
        (["--out=FULL"], "is not empty"),
        (["--decode-tokens=1"], "--decode-tokens"),
        (["--baseline=nowhere"], "holds no report.json"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(given, tmp_path, capsys, arguments, message):
    model, recipe = given
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words = {"RECIPE": str(recipe), "FULL": str(tmp_path / "full"), "TEXT": str(model / "model.json")}
    given_flags = {"model": str(model), "recipe": f"{recipe}:0.5", "out": str(tmp_path / "out")}
    for argument in arguments:
        name, _, value = argument[2:].partition("=")
        for word, path in words.items():
            value = value.replace(word, path)
        given_flags[name] = value
    argv = [*SMALL, *(f"--{name}={value}" for name, value in given_flags.items())]
    assert message in refusal(capsys, compress.main, compress.Flags, *argv)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_a_compressed_model_is_not_scored_on_what_it_was_calibrated_on(half, capsys):
    argv = [f"--model={half[0]}", "--data=stdlib:calibration", "--window=128"]
    assert "calibration overlaps evaluation" in refusal(capsys, evaluate.main, evaluate.Flags, *argv)
    call, _ = entry.parse(["evaluate", *argv, "--allow-overlap", "--limit=1"], evaluate.Flags, config=False)
    assert evaluate.main(call)["results"][0]["windows"] == 1
