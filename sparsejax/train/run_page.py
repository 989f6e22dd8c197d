"""`plots/*.png` and a self-contained `index.html` for a run folder, from what the run has written there.

Read: metrics.jsonl, stats/*.npz (see train.metrics), config.txt, result.json. Each may be missing: the page leaves out what it
has no data for, and may be made again at any time, also while the run goes on. Of result.json it uses

  name, command, device: text;  versions: {package: version};  config_diff: text or lines
  bytes_per_token: UTF-8 bytes per token of the text (1 for bytes); turns the loss axis into bits per byte
  baselines: {"unigram": bits per byte, "bigram": bits per byte}
  results: {name: number, text or list}, in the order of the table
  sample: text, or {"prompt": text, "text": continuation}
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from sparsejax.plugs import ConfigError
from sparsejax.train.metrics import read_metrics, read_watch

if TYPE_CHECKING:
    from sparsejax.train.run_plots import RunData

# Results that are shown large at the top when present: name -> what is printed under the number.
_TILES = {
    "bits_per_byte": "held-out bits per byte",
    "accuracy": "held-out accuracy",
    "perplexity": "held-out perplexity",
    "zero_fraction": "exact zeros in the FFN",
    "parameters": "parameters",
    "tokens_per_second": "tokens per second",
    "train_seconds": "training time",
}
_FRACTIONS = ("fraction", "accuracy", "mfu", "sparsity")


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Draw the plots and write the page of a run folder; the path of `index.html`.

    Raises:
      ConfigError: the folder does not exist, or a file in it is damaged (named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a run folder: no such directory")
    from sparsejax.train.run_plots import RunData  # matplotlib, which an import of the library should not load

    data = RunData(read_metrics(folder), read_watch(folder), read_result(folder))
    page = folder / "index.html"
    temporary = page.with_suffix(".html.partial")
    temporary.write_text(_render(folder, data, _draw(folder, data)), encoding="utf-8")
    os.replace(temporary, page)
    return page


def read_result(folder: Path) -> dict[str, Any]:
    """`result.json` of a run folder, {} where there is none; raises a ConfigError when it is damaged."""
    path = folder / "result.json"
    if not path.exists():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    if not isinstance(result, dict):
        raise ConfigError(f"{path} must hold an object, not {type(result).__name__}")
    return result


def _draw(folder: Path, data: RunData) -> list[dict[str, str]]:
    """Write every plot that has data, remove those of an earlier page that no longer have any, and embed them."""
    from sparsejax.train.run_plots import PLOTS

    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    drawn = []
    for name, (draw, caption) in PLOTS.items():
        path, figure = plots / f"{name}.png", draw(data)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
        path.write_bytes(image.getvalue())
        drawn.append({"name": name, "caption": caption, "png": base64.b64encode(image.getvalue()).decode()})
    return drawn


def _render(folder: Path, data: RunData, plots: list[dict[str, str]]) -> str:
    result, results = data.result, data.result.get("results") or {}
    config, diff, sample = folder / "config.txt", result.get("config_diff") or "", result.get("sample") or ""
    steps = max((int(row["step"]) for row in data.rows), default=0)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        name=str(result.get("name") or folder.resolve().name),
        subtitle=" · ".join(part for part in (f"{steps:,} steps" if steps else "", str(result.get("device") or "")) if part),
        finished=bool(result),
        tiles=_tiles(results, result.get("baselines") or {}),
        rows=[(label(name), shown(name, value)) for name, value in _flat(results)],
        plots=plots,
        sample={"prompt": "", "text": "", **(sample if isinstance(sample, Mapping) else {"text": str(sample)})},
        command=str(result.get("command") or ""),
        diff=diff if isinstance(diff, str) else "\n".join(map(str, diff)),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        versions=sorted((result.get("versions") or {}).items()),
    )


def _flat(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Results with those of a group under `group/name`."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _tiles(results: Mapping[str, Any], baselines: Mapping[str, float]) -> list[dict[str, Any]]:
    notes = {"bits_per_byte": [f"{n} model {baselines[n]:.2f}" for n in ("unigram", "bigram") if n in baselines]}
    return [
        {"value": shown(name, results[name]), "label": text, "notes": notes.get(name, [])}
        for name, text in _TILES.items()
        if name in results
    ]


def label(name: str) -> str:
    """A result's name as words."""
    return name.replace("_", " ").replace("/", ": ")


def shown(name: str, value: Any) -> str:
    """A result as text: fractions in per cent, seconds as such, large counts grouped, four digits otherwise."""
    if isinstance(value, list | tuple):
        return ", ".join(shown(name, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else str(value)
    if any(word in name for word in _FRACTIONS):
        return f"{100 * value:.2f} %" if abs(value) < 0.1 or name.endswith("error") else f"{100 * value:.1f} %"
    if name.endswith("seconds"):
        return f"{value:,.1f} s" if value < 600 else f"{value / 60:,.0f} min"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
:root { --ink: #1b2733; --muted: #66727f; --rule: #e4e8ec; --accent: #1f5fa8; --paper: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 17px; margin: 40px 0 12px; }
.subtitle { color: var(--muted); margin: 4px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 28px 0 0; }
.card { background: white; border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 650; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile:first-child b { color: var(--accent); }
.tile span, .tile small { color: var(--muted); font-size: 13px; display: block; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 14px 10px; }
figure:first-child { grid-column: 1 / -1; }
figure:first-child img { max-width: 860px; display: block; margin: 0 auto; }
figure img { width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: 13px; padding: 6px 4px 0; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; }
pre.text em { font-style: normal; color: var(--accent); font-weight: 600; }
table { border-collapse: collapse; width: 100%; }
td { padding: 7px 16px; border-top: 1px solid var(--rule); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr:first-child td { border-top: 0; }
td:first-child { color: var(--muted); width: 40%; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 0 24px; align-items: start; }
details { margin-top: 12px; }
summary { cursor: pointer; padding: 10px 16px; color: var(--muted); }
details pre { border-top: 1px solid var(--rule); }
@media (max-width: 760px) { .plots { grid-template-columns: 1fr; } main { padding: 24px 14px; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ name }}</h1>
<p class="subtitle">{{ subtitle }}{% if not finished %}{{ " · " if subtitle }}not finished{% endif %}</p>
</header>
{% if tiles %}
<section class="tiles">
{% for tile in tiles %}
<div class="card tile"><b>{{ tile.value }}</b><span>{{ tile.label }}</span>
{%- for note in tile.notes %}<small>{{ note }}</small>{% endfor %}</div>
{% endfor %}
</section>
{% endif %}
{% if plots %}
<h2>Curves</h2>
<section class="plots">
{% for plot in plots %}
<figure class="card"><img alt="{{ plot.name }}" src="data:image/png;base64,{{ plot.png }}">
<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}
</section>
{% endif %}
{% if sample.text %}
<h2>Generated text</h2>
<pre class="card text">{% if sample.prompt %}<em>{{ sample.prompt }}</em>{% endif %}{{ sample.text }}</pre>
{% endif %}
{% if command %}
<h2>Command</h2>
<pre class="card">{{ command }}</pre>
{% endif %}
<div class="columns">
{% if rows %}
<section><h2>Results</h2><div class="card"><table>
{% for name, value in rows %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></div></section>
{% endif %}
{% if versions %}
<section><h2>Versions</h2><div class="card"><table>
{% for name, value in versions %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></div></section>
{% endif %}
</div>
{% if diff or config %}
<h2>Config</h2>
{% if diff %}
<pre class="card">{{ diff }}</pre>
{% endif %}
{% if config %}
<details class="card"><summary>The whole resolved config</summary><pre>{{ config }}</pre></details>
{% endif %}
{% endif %}
</main>
</body>
</html>
"""
