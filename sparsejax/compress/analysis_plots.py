"""The pictures of an analysis: each function takes what was measured and returns a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsejax.compress.analysis import Analysis
from sparsejax.compress.ppl_p import Search
from sparsejax.evaluate.sparsing_law import LawFit
from sparsejax.evaluate.sparsity import COVERAGE, Activity
from sparsejax.train.run_plots import INK, LAYERS, MUTED, PARTS, RULE, SEQUENTIAL

TRUNCATION_LABELS = {"cett": "CETT", "topk": "top-k", "fat": "FAT-eps"}
DOWN = "mlp.down"


def write(analyses: Sequence[Analysis], folder: Path) -> list[Path]:
    """All pictures of analyses as PNG files; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for one in analyses:
        for name, figure in figures(one).items():
            paths.append(folder / f"{slug(one.data)}-{name}.png")
            figure.savefig(paths[-1])
    return paths


def slug(data: str) -> str:
    """What the pictures of a text are named by."""
    return re.sub(r"[^A-Za-z0-9]+", "-", data).strip("-")


def figures(analysis: Analysis) -> dict[str, Figure]:
    """By name; of the model as it is, and under CETT at the smallest p where that was searched."""
    counted = {"as it is": analysis.activity}
    found: dict[str, Figure | None] = {}
    if analysis.searches:
        cett = analysis.searches.get("cett")
        if cett:
            least = min(cett.results, key=lambda result: result.percent)
            counted[f"CETT, PPL-{least.percent:g} %"] = least.activity
            found["ppl-layers"] = ppl_layers(cett)
        found["ppl"] = ppl(analysis.searches)
    found |= {
        "sites": zeros_by_site(counted),
        "positions": zeros_by_position(counted),
        "union": union(counted),
        "blocks": occupancy(counted),
        "coverage": coverage(counted),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def zeros_by_site(counted: Mapping[str, Activity]) -> Figure:
    """Zeros by layer and site, per cent."""
    figure, panels = _panels(len(counted), 4.2, _rows_height(counted), "Exact zeros by layer and site")
    for axes, (name, activity) in zip(panels, counted.items(), strict=True):
        sites = {site: found.zero_fraction for site, found in activity.sites.items()}
        layers = max(len(values) for values in sites.values())
        grid = np.full((layers, len(sites)), np.nan)
        for column, values in enumerate(sites.values()):
            grid[: len(values), column] = 100 * values
        _heat(axes, grid, (-0.5, len(sites) - 0.5))
        axes.set_xticks(range(len(sites)), list(sites), rotation=45, ha="right", rotation_mode="anchor")
        _headed(axes, name)
    _color_bar(figure, panels)
    return figure


def zeros_by_position(counted: Mapping[str, Activity]) -> Figure:
    """Zeros of what enters the down map, by layer and token position."""
    figure, panels = _panels(len(counted), 4.2, _rows_height(counted), "Exact zeros of what enters down, by token position")
    for axes, (name, activity) in zip(panels, counted.items(), strict=True):
        edges = activity.position_edges
        _heat(axes, 100 * activity.sites[DOWN].zero_fraction_position, (edges[0], edges[-1]))
        axes.set_xlabel("token position")
        _headed(axes, name)
    _color_bar(figure, panels)
    return figure


def union(counted: Mapping[str, Activity]) -> Figure | None:
    """Rows of the down map that a batch needs, beside what independent tokens would."""
    counted = {name: activity for name, activity in counted.items() if activity.sites[DOWN].union}
    if not counted:
        return None
    figure, (axes,) = _panels(1, 5.6, 3.6, "What a batch must read")
    for color, (name, activity) in zip(PARTS, counted.items(), strict=False):
        found = activity.sites[DOWN].union or {}
        sizes = sorted(found)
        shares = np.array([100 * found[size] for size in sizes])  # [sizes, L]
        axes.plot(sizes, shares.mean(1), color=color, marker="o", markersize=4, linewidth=1.8, label=f"{name}, mean of layers")
        axes.fill_between(sizes, shares.min(1), shares.max(1), color=color, alpha=0.15, linewidth=0)
        zeros = activity.sites[DOWN].zero_fraction
        if zeros.max() > 0:
            independent = [100 * float(np.mean(1 - zeros**size)) for size in sizes]
            axes.plot(sizes, independent, color=color, linestyle="--", linewidth=1.2, label="if tokens were independent")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(0, 104)
    axes.set_xlabel("batch size")
    axes.set_ylabel("rows of down read, %")
    _legend(axes, loc="lower right")
    return figure


def occupancy(counted: Mapping[str, Activity]) -> Figure | None:
    """Blocks of the down map's input that hold anything, by layer."""
    counted = {name: activity for name, activity in counted.items() if activity.sites[DOWN].occupancy}
    if not counted:
        return None
    figure, panels = _panels(len(counted), 4.6, 3.6, "What enters down: blocks that are not empty")
    for axes, (name, activity) in zip(panels, counted.items(), strict=True):
        site = activity.sites[DOWN]
        series = {1: 1 - site.zero_fraction, **(site.occupancy or {})}
        for color, (size, share) in zip(PARTS, sorted(series.items()), strict=False):
            label = "entries" if size == 1 else f"blocks of {size}"
            axes.plot(range(len(share)), 100 * share, color=color, linewidth=1.6, marker=_marker(share), label=label)
        axes.set_ylim(0, 104)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer")
        _headed(axes, name)
    panels[0].set_ylabel("not empty, %")
    _legend(panels[-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def coverage(counted: Mapping[str, Activity]) -> Figure:
    """Share of activations on the most frequently active units, a line per layer; dashed: all units alike."""
    figure, panels = _panels(len(counted), 4.2, 3.6, "Activations on the most active hidden units")
    for axes, (name, activity) in zip(panels, counted.items(), strict=True):
        curves = activity.sites[DOWN].coverage
        for layer, curve in enumerate(curves):
            named = layer in (0, len(curves) // 2, len(curves) - 1)
            color = to_hex(LAYERS(layer / max(len(curves) - 1, 1)))
            axes.plot(COVERAGE, curve, color=color, linewidth=1.2, label=f"layer {layer}" if named else None)
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("share of units, most active first")
        _headed(axes, name)
    panels[0].set_ylabel("share of all activations")
    _legend(panels[-1], loc="lower right")
    return figure


def ppl(searches: Mapping[str, Search]) -> Figure:
    """Perplexity against the sparsity of the hidden vector: the points evaluated, and PPL-p% with its interval."""
    figure, (axes,) = _panels(1, 5.8, 3.8, "Perplexity against sparsity; points: PPL-p% with one standard error")
    for color, (name, search) in zip(PARTS, searches.items(), strict=False):
        dense = math.exp(search.dense_loss)
        highest = max(result.target for result in search.results) * 1.6
        points = [point for point in search.points if point.rise <= highest]
        label = TRUNCATION_LABELS.get(name, name)
        axes.plot([100 * point.predicted for point in points], [dense * math.exp(point.rise) for point in points],
                  color=color, linewidth=1.0, alpha=0.6)  # fmt: skip
        for result in search.results:
            reach = np.abs([[result.sparsity - result.low], [result.high - result.sparsity]]) * 100
            axes.errorbar(100 * result.sparsity, result.perplexity, xerr=None if np.isnan(reach).any() else reach, color=color,
                          marker="o", markersize=5, capsize=3, linewidth=1.2, label=label)  # fmt: skip
            label = None  # type: ignore[assignment]
    results = next(iter(searches.values())).results
    for result in results:
        level = math.exp(next(iter(searches.values())).dense_loss + result.target)
        axes.axhline(level, color=RULE, linewidth=1, zorder=0)
        axes.annotate(f"+{result.percent:g} %", (0, level), xycoords=("axes fraction", "data"), xytext=(3, 2),
                      textcoords="offset points", fontsize=8.5, color=MUTED)  # fmt: skip
    axes.set_xlabel("zeros of the FFN's hidden vector, %")
    axes.set_ylabel("perplexity")
    _legend(axes, loc="upper left", bbox_to_anchor=(0.08, 1.0))
    return figure


def ppl_layers(search: Search) -> Figure:
    """Sparsity by layer at each p."""
    figure, (axes,) = _panels(1, 5.6, 3.4, "One CETT for all layers")
    for color, result in zip(PARTS, search.results, strict=False):
        layers = 100 * result.layers
        axes.plot(range(len(layers)), layers, color=color, marker=_marker(layers), linewidth=1.6,
                  label=f"PPL-{result.percent:g} %: mean {layers.mean():.1f} %")  # fmt: skip
    axes.set_ylim(0, 104)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("zeros of the hidden vector, %")
    _legend(axes, loc="best")
    return figure


def laws(fits: Mapping[str, LawFit]) -> Figure:
    """Activation ratio against training tokens: what was measured, the fitted curve and its 90 % band."""
    figure, (axes,) = _panels(1, 5.8, 3.8, "Activation ratio against training tokens")
    for color, (name, fit) in zip(PARTS, fits.items(), strict=False):
        axes.plot(fit.tokens, fit.ratio, color=color, marker="o", markersize=3, linestyle="none", alpha=0.5)
        label = f"{name}: A0 {fit.parameters['A0']:.3f} ({fit.low:.3f} to {fit.high:.3f})"
        axes.plot(fit.grid, fit.curve, color=color, linewidth=1.8, label=label)
        axes.fill_between(fit.grid, fit.band_low, fit.band_high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("activation ratio")
    _legend(axes, loc="best")
    return figure


def _panels(columns: int, width: float, height: float, title: str = "") -> tuple[Figure, list[Axes]]:
    """Styled axes in a row, under one title; inches of each."""
    figure = Figure(figsize=(width * columns + 0.6, height), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold")
    found = list(np.atleast_1d(figure.subplots(1, columns)).flat)
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8c0c8")
        axes.tick_params(which="both", colors=MUTED, labelsize=8.5, length=3)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
            label.set_fontsize(9.5)
    return figure, found


def _headed(axes: Axes, heading: str) -> None:
    axes.set_title(heading, loc="left", fontsize=10, color=INK, pad=7)


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, **options)


def _marker(values: np.ndarray) -> str | None:
    return "o" if len(values) == 1 else None


def _rows_height(counted: Mapping[str, Activity]) -> float:
    layers = max(len(activity.sites[DOWN].zero_fraction) for activity in counted.values())
    return min(max(2.8, 1.6 + 0.14 * layers), 6.0)


def _heat(axes: Axes, grid: np.ndarray, span: tuple[float, float]) -> None:
    """Rows are layers, 0 on top; 0 to 100 per cent, what was not measured is white."""
    extent = (span[0], span[1], len(grid) - 0.5, -0.5)
    axes.imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=100, aspect="auto", extent=extent, interpolation="nearest")
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel("layer")


def _color_bar(figure: Figure, panels: Sequence[Axes]) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(0, 100), SEQUENTIAL), ax=list(panels), fraction=0.04, pad=0.02)
    bar.set_label("zeros, %", color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8.5, colors=MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator]


def write_laws(fits: Mapping[str, LawFit], folder: Path) -> Path:
    """The picture of fitted laws as a PNG file; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "law.png"
    laws(fits).savefig(path)
    return path
