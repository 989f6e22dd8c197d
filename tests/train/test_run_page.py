"""The page and plots of a run folder, from synthetic metrics."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from sparsejax.plugs import ConfigError
from sparsejax.train.metrics import DebiasedEMA, WatchLog, Writers
from sparsejax.train.run_page import shown, write_page
from sparsejax.train.run_plots import PLOTS

RESULT = {
    "name": "tiny_relu2",
    "command": "python -m experiments.train --config configs/tiny_relu2.py",
    "device": "1 x cpu",
    "versions": {"jax": "0.12.0", "sparsejax": "0.1"},
    "config_diff": ["model.num_layers: 4 -> 6", "steps: 100 -> 400"],
    "bytes_per_token": 1.0,
    "baselines": {"unigram": 4.86, "bigram": 3.71},
    "results": {
        "bits_per_byte": 2.61,
        "bits_per_byte_error": 0.02,
        "perplexity": 6.1,
        "zero_fraction": 0.931,
        "zero_fraction_per_layer": [0.9, 0.91, 0.95],
        "parameters": 1_234_567,
        "tokens_per_second": 12_412.3,
        "train_seconds": 131.25,
    },
    "sample": {"prompt": "def ", "text": "forward(self, x):\n    return <b>x</b>"},
}


def make_run(folder, steps=400, layers=6, positions=128, watch=True, bits=True):
    """A run folder as the loop would have written it."""
    rng = np.random.default_rng(0)
    ema = DebiasedEMA()
    with Writers(folder, ("csv", "jsonl"), "{}") as writers:
        for step in range(0, steps, 4):
            loss = 1.8 + 3.7 * math.exp(-step / 60) + 0.06 * rng.normal()
            ema = ema.update(loss)
            row = {"loss": loss, "loss_ema": ema.value, "tokens_per_second": 12_400 + 200 * rng.normal(), "mfu": math.nan}
            writers.write(step, row)
            if step % 100 == 0:
                held_out = 1.9 + 3.7 * math.exp(-step / 60)
                writers.write(step, {"eval/loss": held_out, "eval/bits_per_byte": held_out / math.log(2)})
    if watch:
        log = WatchLog(folder)
        depth = np.linspace(0, 1, layers)
        for step in range(0, steps, 20):
            grown = 0.5 + 0.45 * (1 - math.exp(-step / 80)) * (0.6 + 0.4 * depth)
            arrays = {
                "zero_fraction": grown + 0.005 * rng.normal(size=layers),
                "zero_fraction_position": np.clip(grown[:, None] - 0.1 * np.exp(-np.arange(positions) / 8), 0, 1),
                "dead_units": np.round(40 * grown * depth),
                "attention_entropy": 4.5 - 2 * (1 - math.exp(-step / 100)) * (1 - depth),
            }
            for part, scale in [("embed", 5.0), ("attn", 20.0), ("mlp", 30.0), ("norm", 8.0)]:
                arrays[f"param_norm/{part}"] = scale * (1 + step / 800)
                arrays[f"grad_norm/{part}"] = scale / 30 * math.exp(-step / 300) * (1 + 0.1 * rng.random())
                arrays[f"update_norm/{part}"] = scale / 1000 * (1 - step / steps) + 1e-5
            log.write(step, arrays)
    if bits:
        (folder / "result.json").write_text(json.dumps(RESULT))
        (folder / "config.txt").write_text("steps: 400\nmodel.num_layers: 6\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo")
    write_page(folder)
    return folder


def images(page):
    return re.findall(r'<img alt="(\w+)" src="data:image/png;base64,', page)


def test_every_plot_with_data_is_drawn_and_embedded(run):
    expected = [name for name in PLOTS if name != "accuracy"]
    assert sorted(path.stem for path in (run / "plots").glob("*.png")) == sorted(expected)
    assert images((run / "index.html").read_text()) == expected
    for name in expected:
        with Image.open(run / "plots" / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] >= 900 and pixels.std() > 5  # something is drawn


def test_the_page_shows_results_command_config_versions_and_escaped_text(run):
    page = (run / "index.html").read_text()
    for text in ["2.61", "unigram model 4.86", "93.1 %", "1,234,567", "--config configs/tiny_relu2.py", "0.12.0"]:
        assert text in page, text
    for text in ["model.num_layers: 4 -&gt; 6", "<em>def </em>forward", "&lt;b&gt;x", "model.num_layers: 6"]:
        assert text in page, text
    assert "http" not in page and 'src="data:' in page  # self-contained


def test_writing_the_page_again_gives_the_same_page(run):
    before = (run / "index.html").read_bytes()
    assert write_page(run).read_bytes() == before


def test_a_run_that_is_not_finished_and_watches_nothing_has_a_page(tmp_path):
    page = write_page(make_run(tmp_path / "bare", steps=12, watch=False, bits=False)).read_text()
    assert images(page) == ["loss", "throughput"] and "not finished" in page


def test_an_empty_folder_has_a_page_without_plots(tmp_path):
    assert images(write_page(tmp_path).read_text()) == []


def test_a_plot_that_lost_its_data_is_removed(tmp_path):
    folder = make_run(tmp_path / "run", steps=40, watch=False)
    WatchLog(folder).write(0, {"zero_fraction": np.ones(2)})
    assert images(write_page(folder).read_text()) == ["loss", "zero_fraction", "throughput"]
    WatchLog(folder, first_step=0)  # a new run in the folder
    write_page(folder)
    assert not (folder / "plots" / "zero_fraction.png").exists() and (folder / "plots" / "loss.png").exists()


def test_one_row_one_layer_and_two_stacks_can_be_drawn(tmp_path):
    with Writers(tmp_path, ("jsonl",), "{}") as writers:
        writers.write(0, {"loss": 2.0, "mfu": 0.4, "examples_per_second": 10.0, "eval/accuracy": 0.5})
    one = {"zero_fraction": np.ones(1), "zero_fraction_position": np.zeros((1, 5)), "attention_entropy": np.zeros(1)}
    stacks = {f"{stack}/{name}": value for stack in ("encoder", "decoder") for name, value in one.items()}
    WatchLog(tmp_path).write(0, {**stacks, "dead_fraction": np.zeros(3), "grad_norm/all": 1.0})
    assert len(images(write_page(tmp_path).read_text())) == 8


def test_classification_runs_show_loss_in_nats_and_accuracy(tmp_path):
    with Writers(tmp_path, ("jsonl",), "{}") as writers:
        for step in range(5):
            writers.write(step, {"loss": 1 / (step + 1), "loss_ema": 1 / (step + 1)})
        writers.write(4, {"eval/loss": 0.3, "eval/accuracy": 0.9})
    (tmp_path / "result.json").write_text(json.dumps({"results": {"accuracy": 0.9}}))
    page = write_page(tmp_path).read_text()
    assert images(page) == ["loss", "accuracy"] and "90.0 %" in page


def test_damaged_files_are_named(tmp_path):
    folder = make_run(tmp_path / "run", steps=40)
    (folder / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="result.json is not JSON"):
        write_page(folder)
    (folder / "result.json").unlink()
    (folder / "stats" / "000000020.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ConfigError, match="000000020.npz is damaged"):
        write_page(folder)
    with pytest.raises(ConfigError, match="no such directory"):
        write_page(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("zero_fraction", 0.9312, "93.1 %"),
        ("accuracy_error", 0.0123, "1.23 %"),
        ("parameters", 1234567, "1,234,567"),
        ("tokens_per_second", 12412.3, "12,412"),
        ("train_seconds", 131.25, "131.2 s"),
        ("loss", 1.23456, "1.235"),
        ("mfu", math.nan, "nan"),
        ("layers", [1, 2], "1, 2"),
        ("tied", True, "True"),
    ],
)
def test_values_are_shown_with_their_units(name, value, text):
    assert shown(name, value) == text
