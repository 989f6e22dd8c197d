"""Reports of one compression and of many: tables, refusals, pages and pictures, from invented numbers."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import entry
from experiments import report as verb
from sparsejax.compress import report, report_html, report_plots
from sparsejax.plugs import ConfigError

SITES = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
TEXT = {"data": "stdlib:evaluation", "sha256": "ab", "kind": "perplexity", "rule": "r", "window": 512, "windows": 8,
        "windows_total": 90, "scope": "all", "keep_first": 0}  # fmt: skip
TASK = {"data": "arc_easy", "sha256": "cd", "kind": "choices", "rows": 50, "rows_total": 500, "scope": "all", "keep_first": 0}
PROTOCOL = {"model": "m", "weights": "0123456789abcdef", "dtype": "float32", "scope": "all", "keep_first": 0,
            "data": [TEXT, TASK]}  # fmt: skip
MADE = {"command": "python -m x --out <a>", "device": "cpu: cpu", "versions": {"jax": "0.12"}}


def row(label, sparsity, perplexity, **changes):
    method = label.partition(":")[0]
    text = {**TEXT, "loss": np.log(perplexity), "perplexity": perplexity, "perplexity_error": 0.5, "values": [1.0, 2.0]}
    task = {**TASK, "acc": 0.5, "acc_error": float("nan"), "values": [1.0, 0.0]}
    if method != "dense":
        text |= {"loss_difference": 0.1, "loss_difference_error": 0.01}
        task |= {"acc_difference": -0.02, "acc_difference_error": 0.01}
    layers = {site: [sparsity * (i + 1) / 7] * 4 for i, site in enumerate(SITES)}
    used = 538e6 * (1 - 0.79 * sparsity)
    found = {
        "method": method, "label": label, "requested": sparsity, "results": [text, task], "weight_zeros": 0.0,
        "sparsity": {"model": sparsity, "sites": dict.fromkeys(SITES, sparsity), "layers": layers, "tokens": 10},
        "bytes": {"per_token": used, "relative": used / 538e6, "extra": 120.0}, "ideal_speedup": 538e6 / used,
        "decode": {"tokens_per_second": 20.0 - 2 * sparsity, "executor": "dense masked: x", "new_tokens": 32}, **MADE,
    }  # fmt: skip
    if method != "dense":
        found |= {"tier": "quick", "calibration": {"source": "s", "sha256": "f" * 64}, "passes": [f"{method}({sparsity})"],
                  "cost": {"seconds": 12.0, "peak_bytes": 2**31, "total_seconds": 99.0, "resumed": False},
                  "notes": {"0-x": {"found": [1, 2]}}}  # fmt: skip
    return {**found, **changes}


def one(label, sparsity, perplexity, protocol=PROTOCOL, **changes):
    return report.document(protocol, [row("dense", 0.0, 20.0), row(label, sparsity, perplexity, **changes)])


def write(folder, found):
    folder.mkdir()
    report_html.write(found, folder)
    return folder


def cells(table, label):
    return dict(zip(table.heads, next(line for line in table.rows if line[0] == label), strict=True))


def test_one_report_says_all_of_a_compression(tmp_path):
    found = one("teal:0.4", 0.4, 25.0)
    folder = write(tmp_path / "a", found)
    assert report.read(folder) == found
    first = cells(report.quality(found), "teal:0.4")
    assert first["stdlib:evaluation: perplexity"] == "25.000 +- 0.500" and first["x dense"] == "1.250"
    assert (first["loss - dense"], first["model sparsity"]) == ("+0.1000 +- 0.0100", "40.0 %")
    assert first["arc_easy: acc"] == "0.500" and first["acc - dense"] == "-0.020 +- 0.010"
    spent = cells(report.cost(found), "teal:0.4")
    assert spent["relative bytes"] == "0.684" and spent["ideal speed-up"] == "1.46x" and spent["measured speed-up"] == "0.96x"
    assert (spent["peak GiB"], spent["seconds to compress"], spent["calibration"]) == ("2.00", "12", "f" * 12)
    assert [table.rows[0][0] for table in report.tables(found)] == ["dense"] * 3

    page = (folder / "report.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 4 and not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;a&gt;" in page and "25.000 \u00b1 0.500" in page and "dense 20.00, x 1.250" in page
    text = (folder / "report.md").read_text()
    assert "| teal:0.4 | 0.40 | 40.0 % |" in text and "8 of 90 windows of 512 tokens" in text
    for file in re.findall(r"\]\((.*?)\)", text):
        assert (folder / file).read_bytes().startswith(b"\x89PNG")


def test_many_reports_become_one_table_dense_first_and_sorted(tmp_path, capsys):
    made = {"b": one("teal:0.5", 0.5, 30.0), "a": one("teal:0.25", 0.25, 21.0), "c": one("wina:0.5", 0.49, 28.0)}
    made["c"]["rows"][0]["decode"]["tokens_per_second"] = 10.0  # a slower machine: its own dense row counts
    folders = [str(tmp_path / name) for name in made]
    for folder, found in zip(folders, made.values(), strict=True):
        Path(folder).mkdir()
        Path(folder, "report.json").write_text(json.dumps(found))
    call, _ = entry.parse(["report", *folders, f"--out={tmp_path / 'all'}"], verb.Flags, config=False, names="report folder")
    found = verb.main(call)
    assert [line["label"] for line in found["rows"]] == ["dense", "teal:0.25", "wina:0.5", "teal:0.5"]
    assert cells(report.cost(found), "wina:0.5")["measured speed-up"] == "1.90x"
    assert found["rows"][1]["folder"] == folders[1] and "teal:0.25" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "all").iterdir()} >= {"report.html", "report.md", "report.json", "plot_bytes.png"}
    assert report.read(tmp_path / "all") == found
    names = [path.stem for path in sorted((tmp_path / "all").glob("*.png"))]
    assert names == ["plot_bytes", "plot_quality", "plot_sparsity", "plot_speed"]


def test_the_front_of_bytes_and_perplexity_is_marked():
    rows = [row("dense", 0.0, 20.0), row("a:1", 0.5, 30.0), row("b:1", 0.5, 25.0), row("b:2", 0.25, 26.0)]
    figure = report_plots.pareto(report.document(PROTOCOL, rows), 0)
    front = next(line for line in figure.axes[0].lines if line.get_label() == "front")
    assert front.get_ydata().tolist() == [25.0, 20.0]  # b:1 beats the two others in both


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(scope="decode"), 'scope "decode" and "all"'),
        (lambda p: p["data"][0].update(windows=4), r"data\[0\].windows 4 and 8"),
        (lambda p: p["data"].pop(), "data "),
        (lambda p: p.update(weights="other"), 'weights "other"'),
    ],
)
def test_other_protocols_are_not_mixed(tmp_path, change, message):
    protocol = copy.deepcopy(PROTOCOL)
    change(protocol)
    dense = row("dense", 0.0, 20.0)
    other = report.document(protocol, [dense, row("x:1", 0.1, 21.0)])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text(json.dumps(one("teal:0.4", 0.4, 25.0)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=message):
        report.gather([tmp_path / "a", tmp_path / "b"])


def test_what_is_no_report_is_refused_by_name(tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"format": 7}')
    for folders, message in (
        ([], "give the folders"),
        (["nothing"], "holds no report.json"),
        (["damaged"], "not JSON"),
        (["other"], "no report of format 1"),
        (["damaged", "damaged"], "given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            report.gather([tmp_path / name for name in folders])
