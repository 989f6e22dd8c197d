"""`python -m experiments.evaluate`, from the command line to its JSON, on a model of random weights."""

import dataclasses
import io
import json
import math
import re

import jax
import numpy as np
import pytest

import sparsejax.io.load
from experiments import entry, evaluate
from experiments.bench_evaluate import plain_products, smollm2_shape
from sparsejax.evaluate.progress import progress_bar
from sparsejax.evaluate.report import describe
from sparsejax.evaluate.texts import join_rows
from sparsejax.io.model import Model
from sparsejax.models.sizes import parameter_counts
from sparsejax.plugs import ConfigError
from tests.evaluate.tiny_model import random_model, slow_log_probabilities, tokenizer

TEXT = " \n = Title = \n \n He had a guest @-@ starring <unk> . \n" * 6
ROWS = [{"query": "a b", "choices": ["c", "dd"], "gold": 1}, {"query": "e", "choices": ["f", "g", "h"], "gold": 0}] * 3


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Models by name, in place of `load`."""

    models: dict[str, Model]

    def load(self, name, *, dtype="float32", mesh=None):
        model = self.models[name]
        return dataclasses.replace(model, values=jax.tree.map(lambda a: a.astype(dtype), model.values))


@pytest.fixture(scope="module")
def models():
    one = random_model(num_layers=1, name="m")
    other = dataclasses.replace(one, name="m0", values=jax.tree.map(lambda a: 0.9 * a, one.values))
    deaf = dataclasses.replace(one, name="deaf", tokenizer=None)
    foreign = dataclasses.replace(one, name="foreign", tokenizer=dataclasses.replace(tokenizer(), eos_id=259))
    small = random_model(num_layers=1, name="small", vocab_size=64)
    encoder = random_model(num_layers=1, name="encoder", kind="encoder")
    return {model.name: model for model in (one, other, deaf, foreign, small, encoder)}


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    monkeypatch.setattr(sparsejax.io.load, "load", Shelf(models).load)
    (tmp_path / "wikitext2_test.txt").write_text(TEXT)
    (tmp_path / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "cloze.jsonl").write_text(json.dumps({"context": "a", "continuation": "b"}))
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + "\n{")
    return tmp_path


def run(folder, *arguments):
    """The JSON that the command writes."""
    path = folder / "result.json"
    with pytest.raises(SystemExit) as stopped:
        entry.run(evaluate.main, evaluate.Flags, config=False,
                  argv=["evaluate", "--model=m", f"--data-dir={folder}", f"--json={path}", *arguments])  # fmt: skip
    assert stopped.value.code == 0
    return json.loads(path.read_text())


def refusal(folder, capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        entry.run(evaluate.main, evaluate.Flags, config=False, argv=["evaluate", f"--data-dir={folder}", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_texts_and_tasks_are_scored_beside_a_baseline_with_their_protocol(folder, models, capsys):
    found = run(folder, "--data=wikitext2,arc_easy", "--data=jsonl:cloze.jsonl", "--window=16", "--limit=4", "--baseline=m0")
    assert (found["model"], found["baseline"], found["limit"], found["dtype"]) == ("m", "m0", 4, "float32")
    assert found["device"].startswith("cpu") and found["versions"]["jax"] == jax.__version__
    assert "--window=16" in found["command"]
    text, choices, cloze = found["results"]
    ids = tokenizer().encode(join_rows(TEXT))
    windows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    assert (text["data"], text["window"], text["windows"], text["windows_total"]) == ("wikitext2-tok", 16, 4, len(windows))
    assert text["tokens"] == 4 * 15 and text["bytes"] == 4 * 15 and len(text["sha256"]) == 64
    losses = {}
    for name in ("m", "m0"):
        log_p = [slow_log_probabilities(models[name], row)[np.arange(15), row[1:]] for row in windows[:4]]
        losses[name] = -np.mean(log_p, axis=1)
    assert text["perplexity"] == pytest.approx(np.exp(losses["m"].mean()), rel=1e-4)
    assert text["baseline"]["perplexity"] == pytest.approx(np.exp(losses["m0"].mean()), rel=1e-4)
    differences = losses["m"] - losses["m0"]
    assert text["baseline"]["loss_difference"] == pytest.approx(differences.mean(), abs=1e-5)
    assert text["baseline"]["loss_difference_error"] == pytest.approx(differences.std(ddof=1) / 2, rel=1e-2)
    assert choices["kind"] == "choices" and (choices["rows"], choices["rows_total"]) == (4, 6)
    assert choices["baseline"]["acc_difference"] == pytest.approx(choices["acc"] - choices["baseline"]["acc"])
    assert cloze["kind"] == "cloze" and cloze["perplexity"] > 1 and cloze["perplexity_error"] is None
    printed = capsys.readouterr()
    assert f"{text['perplexity']:.3f} +-" in printed.out and "wikitext2-tok" in printed.out and "acc_norm" in printed.out
    assert f"4 of {len(windows)} x 16" in printed.out
    assert "scoring wikitext2-tok m0: 64 tokens" in printed.err and "scoring" not in printed.out


def test_bfloat16_and_the_batch_size_change_little(folder):
    whole = run(folder, "--data=wikitext2", "--window=16", "--limit=5")["results"][0]
    single = run(folder, "--data=wikitext2", "--window=16", "--limit=5", "--batch=2")["results"][0]
    assert single["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    half = run(folder, "--data=wikitext2", "--window=16", "--limit=5", "--dtype=bfloat16")
    assert half["dtype"] == "bfloat16" and half["results"][0]["loss"] == pytest.approx(whole["loss"], rel=0.05)


def test_the_librarys_own_text_needs_no_file(folder):
    (found,) = run(folder, "--data=stdlib:evaluation", "--window=48", "--limit=2")["results"]
    assert found["data"] == "stdlib:evaluation" and found["path"] == "stdlib" and found["windows"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=wikitext2"], "--model = '': give the name or path of a model"),
        (["--model=m"], "--data = '': give what to evaluate on"),
        (["--model=m", "--data=wikitext"], "--data = 'wikitext': .*Did you mean 'wikitext2'"),
        (["--model=m", "--data=arc_esay"], "Did you mean 'arc_easy'"),
        (["--model=m", "--data=text:none.txt"], "'none.txt': no such file"),
        (["--model=m", "--data=jsonl:broken.jsonl"], r"broken\.jsonl:2: not JSON"),
        (["--model=m", "--data=wikitext2", "--window=1"], "--window = 1: must be at least 2"),
        (["--model=m", "--data=wikitext2", "--limit=-1"], "--limit = -1"),
        (["--model=m", "--data=wikitext2", "--batch=-1"], "--batch = -1"),
        (["--model=m", "--data=wikitext2", "--dtype=float16"], "--dtype = 'float16': allowed are"),
        (["--model=m", "--data=wikitext2"], "--window = 2048: m has 48 positions; give --window=48 or less"),
        (["--model=m", "--data=jsonl:cloze.jsonl,text:cloze.jsonl", "--window=40"], "text:cloze.jsonl.* less than one window"),
        (["--model=deaf", "--data=wikitext2", "--window=16"], "--model = 'deaf': has no tokenizer"),
        (["--model=encoder", "--data=arc_easy"], "--model = 'encoder': is of kind 'encoder'"),
        (["--model=small", "--data=arc_easy"], "--model = 'small': its tokenizer gives id .*, its embedding has 64 rows"),
        (["--model=m", "--data=wikitext2", "--window=16", "--baseline=foreign"], "'foreign': its tokenizer differs"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_message(folder, capsys, arguments, message):
    error = refusal(folder, capsys, *arguments)
    assert error.startswith("error: ") and re.search(message, error), error


def test_tasks_alone_can_be_compared_across_tokenizers(folder):
    (found,) = run(folder, "--data=arc_easy", "--baseline=foreign")["results"]
    assert found["baseline"]["acc_difference"] == 0


def test_the_table_leaves_out_errors_that_are_not_known_and_columns_without_a_baseline():
    numbers = {"loss": 1.0, "perplexity": 2.71828, "bits_per_byte": 0.5}
    record = {"kind": "perplexity", "data": "t", "windows": 1, "windows_total": 9, "window": 2048, **numbers}
    record |= {f"{name}_error": math.nan for name in numbers}
    heads, row = describe([record]).splitlines()
    assert heads.split() == ["text", "windows", "loss", "perplexity", "bits", "per", "byte"]
    assert row.split() == ["t", "1", "of", "9", "x", "2,048", "1.0000", "2.718", "0.5000"]


def test_a_terminal_gets_a_bar_with_the_time_left():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress_bar("wiki", 1000, stream) as advance:
        advance(400)
        advance(600)
    assert "wiki" in stream.getvalue() and "ETA" in stream.getvalue() and "1,000/1,000 tokens" in stream.getvalue()


def test_the_plain_products_of_the_bench_are_all_linear_maps_of_the_model():
    config = smollm2_shape()
    counts = parameter_counts(config)
    products = plain_products(config, rows=7, passes=3)
    assert sum(math.prod(p) for p in products) == 7 * 3 * (counts["attention"] + counts["feed"] + counts["embedding"])


def test_a_data_folder_that_is_not_there_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="no such folder"):
        evaluate.main(entry.Call(None, None, evaluate.Flags(model="m", data=("wikitext2",), data_dir="/nowhere")))
