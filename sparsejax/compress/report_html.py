"""`report.html`: one self-contained page with its plots, beside `report.json`, `report.md` and the plots as files."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from sparsejax.compress import report as reports


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write all forms of a report into an existing folder."""
    from sparsejax.compress import report_plots  # matplotlib, which an import of the library should not load

    plots = []
    for name, caption, figure in report_plots.draw(report):
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
        (folder / f"{name}.png").write_bytes(image.getvalue())
        plots.append({"name": name, "caption": caption, "png": base64.b64encode(image.getvalue()).decode()})
    links = [(f"{plot['name']}.png", plot["caption"]) for plot in plots]
    (folder / "report.md").write_text(reports.markdown(report, links), encoding="utf-8")
    (folder / "report.html").write_text(page(report, plots), encoding="utf-8")
    (folder / reports.NAME).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def page(report: Mapping[str, Any], plots: list[dict[str, str]]) -> str:
    """The text of the page; plots have name, caption and base64 png."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = report["rows"]
    return environment.from_string(_TEMPLATE).render(
        title=rows[1]["label"] if len(rows) == 2 else f"{len(rows) - 1} compressions",
        style=STYLE,
        model=report["protocol"]["model"],
        tiles=_tiles(report) if len(rows) == 2 else [],
        tables=reports.tables(report),
        plots=plots,
        footnotes=reports.footnotes(report),
        runs=[_run(row) for row in rows[1:]],
    )


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """(value, label, note) of what one compression is about."""
    dense, row = report["rows"]
    tiles = [{"value": reports.percent(row["sparsity"]["model"]), "label": "model sparsity, realised", "note": ""}]
    if row["requested"] is not None:
        tiles[0]["note"] = f"requested {reports.percent(row['requested'])}"
    for ours, theirs in zip(row["results"], dense["results"], strict=True):
        if ours["kind"] == "perplexity":
            ratio = ours["perplexity"] / theirs["perplexity"]
            note = f"dense {theirs['perplexity']:.2f}, x {ratio:.3f}"
            tiles.append({"value": f"{ours['perplexity']:.2f}", "label": f"perplexity, {ours['data']}", "note": note})
        else:
            note = f"dense {reports.percent(theirs['acc'])}"
            tiles.append({"value": reports.percent(ours["acc"]), "label": f"accuracy, {ours['data']}", "note": note})
    used = f"{row['bytes']['per_token'] / 1e6:.0f} of {dense['bytes']['per_token'] / 1e6:.0f} MB"
    tiles.append({"value": reports.percent(row["bytes"]["relative"]), "label": "bytes per token", "note": used})
    measured = reports.speedup(row, dense)
    told = "not measured" if measured is None else f"measured {measured:.2f}x ({row['decode']['executor'].partition(':')[0]})"
    tiles.append({"value": f"{row['ideal_speedup']:.2f}x", "label": "ideal speed-up", "note": told})
    return tiles


def _run(row: Mapping[str, Any]) -> dict[str, Any]:
    """How a row was made, as names and texts."""
    spec, spent = row.get("calibration") or {}, row.get("cost") or {}
    facts = {
        "device": row.get("device", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in (row.get("versions") or {}).items()),
        "tier": row.get("tier", ""),
        "passes": "; ".join(row.get("passes", ())),
        "calibration": ", ".join(f"{name} {value}" for name, value in spec.items()),
        "whole run": f"{spent['total_seconds']:.0f} s" if spent.get("total_seconds") else "",
        "resumed": "yes: the time is that of the last part" if spent.get("resumed") else "",
        "folder": row.get("folder", ""),
    }
    notes = json.dumps(row["notes"], indent=1) if row.get("notes") else ""
    named = [(name, value) for name, value in facts.items() if value]
    return {"label": row["label"], "command": row.get("command", ""), "facts": named, "notes": notes}


STYLE = """:root { --ink: #1b2733; --muted: #66727f; --rule: #e4e8ec; --accent: #1f5fa8; --paper: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 17px; margin: 36px 0 12px; }
.subtitle { color: var(--muted); margin: 4px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 28px 0 0; }
.card { background: white; border: 1px solid var(--rule); border-radius: 10px; overflow-x: auto; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 650; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile:first-child b { color: var(--accent); }
.tile span, .tile small { color: var(--muted); font-size: 13px; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; border-top: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: 13px; border-top: 0; white-space: normal; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; }
tbody tr:first-child td { background: #f9fafb; color: var(--muted); }
tbody tr:hover td { background: #f1f6fb; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--muted); width: 130px; vertical-align: top; }
.facts tr:first-child td { background: none; border-top: 0; }
.facts tr:first-child td + td { color: var(--ink); }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 14px 10px; }
figure:first-child { grid-column: 1 / -1; }
figure:first-child img { max-width: 980px; display: block; margin: 0 auto; }
figure img { width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 13px; padding: 6px 4px 0; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.small { color: var(--muted); font-size: 13.5px; }
.small p { margin: 6px 0; }
details { margin-top: 12px; }
summary { cursor: pointer; padding: 10px 16px; }
details pre { border-top: 1px solid var(--rule); }
@media (max-width: 760px) { .plots { grid-template-columns: 1fr; } main { padding: 24px 14px; } }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - {{ model }}</title>
<style>
{{ style | safe }}
</style>
</head>
<body>
<main>
<header><h1>{{ title }}</h1><p class="subtitle">{{ model }}, compressed</p></header>
{% if tiles %}
<section class="tiles">
{% for tile in tiles %}
<div class="card tile"><b>{{ tile.value }}</b><span>{{ tile.label }}</span>{% if tile.note %}<small>{{ tile.note }}</small>
{% endif %}</div>
{% endfor %}
</section>
{% endif %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="card"><table>
<thead><tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell.replace("+-", "\u00b1") }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
<section class="small">
{% for line in footnotes %}
<p>{{ line.replace("+-", "\u00b1") }}</p>
{% endfor %}
</section>
<h2>Plots</h2>
<section class="plots">
{% for plot in plots %}
<figure class="card"><img alt="{{ plot.name }}" src="data:image/png;base64,{{ plot.png }}">
<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}
</section>
<h2>How it was made</h2>
{% for run in runs %}
<details class="card"{% if runs | length == 1 %} open{% endif %}><summary>{{ run.label }}</summary>
<pre>{{ run.command }}</pre>
<table class="facts">
{% for name, value in run.facts %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% if run.notes %}
<details><summary>What the passes found</summary><pre>{{ run.notes }}</pre></details>
{% endif %}
</details>
{% endfor %}
</main>
</body>
</html>
"""
