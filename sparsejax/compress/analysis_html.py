"""`index.html` of an analysis: one self-contained page with its tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from sparsejax.compress import analysis_plots, analysis_table
from sparsejax.compress.analysis import Analysis
from sparsejax.compress.report_html import STYLE
from sparsejax.evaluate.sparsing_law import LawFit

# By the end of a picture's name.
CAPTIONS = {
    "ppl": "Perplexity against zeros of the FFN's hidden vector, and PPL-p% with one standard error.",
    "ppl-layers": "Zeros of the hidden vector by layer, all layers truncated at one CETT.",
    "sites": "Exact zeros at the input of each linear map, by layer.",
    "positions": "Zeros of the hidden vector by layer and position in the window.",
    "union": "Share of the hidden units that a batch needs, against its size; dashed: independent tokens.",
    "blocks": "Share of blocks of neighbouring units that hold a non-zero.",
    "coverage": "Share of all activations that the most active units account for.",
    "law": "Activation ratio against training tokens: measured, fitted, and the band that holds 90 % of refits.",
}


def write(
    path: Path,
    title: str,
    analyses: Sequence[Analysis],
    laws: Mapping[str, LawFit],
    pictures: Sequence[Path],
    command: str,
) -> Path:
    """Write the page.

    Args:
      path: of the page.
      title: the model, or the runs.
      analyses: by text. laws: by run.
      pictures: of both, as `analysis_plots` has written them.
      command: that made them.
    """
    sections = []
    for one in analyses:
        named = {f"{analysis_plots.slug(one.data)}-{name}": name for name in CAPTIONS}
        shown = [_picture(file, named[file.stem]) for file in pictures if file.stem in named]
        note = f"PPL-p%: not run: {one.not_run}" if one.not_run else ""
        sections.append({"heading": one.data, "told": analysis_table.heading(one), "tables": analysis_table.tables(one),
                         "pictures": shown, "note": note})  # fmt: skip
    if laws:
        told = [analysis_table.describe_law(name, fit) for name, fit in laws.items()]
        shown = [_picture(file, "law") for file in pictures if file.stem == "law"]
        sections.append({"heading": "Sparsing Law", "told": "", "tables": [], "pictures": shown, "note": "\n".join(told)})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE).render(style=STYLE, title=title, sections=sections, command=command)
    path.write_text(page, encoding="utf-8")
    return path


def _picture(file: Path, name: str) -> dict[str, str]:
    return {"name": name, "caption": CAPTIONS[name], "png": base64.b64encode(file.read_bytes()).decode()}


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: activations</title>
<style>
{{ style | safe }}
tbody tr:first-child td { background: none; color: var(--ink); }
</style>
</head>
<body>
<main>
<header><h1>{{ title }}</h1><p class="subtitle">how sparse its activations are</p></header>
{% for section in sections %}
<h2>{{ section.heading }}</h2>
<section class="small"><p>{{ section.told }}</p></section>
{% for table in section.tables %}
<h2>{{ table.title }}</h2>
<div class="card"><table>
<thead><tr>{% for head in table.rows[0] %}<th>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell.replace("+-", "\u00b1") }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.note %}
<section class="small"><p>{{ table.note }}</p></section>
{% endif %}
{% endfor %}
{% if section.note %}
<pre class="card">{{ section.note }}</pre>
{% endif %}
<h2>Plots</h2>
<section class="plots">
{% for plot in section.pictures %}
<figure class="card"><img alt="{{ plot.name }}" src="data:image/png;base64,{{ plot.png }}">
<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}
</section>
{% endfor %}
<h2>How it was made</h2>
<pre class="card">{{ command }}</pre>
</main>
</body>
</html>
"""
