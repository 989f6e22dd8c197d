"""The pictures of a report: each function takes the report and returns a figure, or None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sparsejax.compress.report import speedup
from sparsejax.train.run_plots import INK, MUTED, PARTS, RULE, SEQUENTIAL

Report = Mapping[str, Any]
Row = Mapping[str, Any]
MARKERS = "osD^vPX*"
HEAT_MAPS = 24  # rows drawn at most


def draw(report: Report) -> list[tuple[str, str, Figure]]:
    """(name, caption, figure) of every plot that has data."""
    found: list[tuple[str, str, Figure | None]] = [("plot_sparsity", SPARSITY, sparsity_maps(report))]
    for index, one in enumerate(report["protocol"]["data"]):
        if one["kind"] == "perplexity":
            suffix = f"_{index}" if index else ""
            found += [
                (f"plot_quality{suffix}", QUALITY.format(one["data"]), quality(report, index)),
                (f"plot_bytes{suffix}", BYTES.format(one["data"]), pareto(report, index)),
            ]
    found.append(("plot_speed", SPEED, speed(report)))
    return [(name, caption, figure) for name, caption, figure in found if figure is not None]


SPARSITY = "Share of each map's weights that a token does not need, by layer."
QUALITY = "Perplexity of {} against model sparsity as realised; bars: standard error of the paired difference to dense."
BYTES = "Bytes read to decode one token against perplexity of {}; the line joins what nothing else beats in both."
SPEED = "Decode speed against the dense model: measured against what the bytes allow; the line is the ideal."


def sparsity_maps(report: Report) -> Figure | None:
    """Per-layer heat map of site sparsity for each compression."""
    rows = sorted(report["rows"][1:], key=lambda row: (row["method"], row["sparsity"]["model"]))[:HEAT_MAPS]
    if not rows:
        return None
    columns = 1 if len(rows) == 1 else 2
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(7.2 if columns == 1 else 11.0, 0.7 + 2.1 * lines), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    panels = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    shares = [np.array(list(row["sparsity"]["layers"].values())) for row in rows]
    top = max(0.1, float(np.ceil(20 * max(share.max() for share in shares)) / 20))
    image = None
    for axes, row, share in zip(panels, rows, shares, strict=False):
        image = axes.imshow(share, aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=top, interpolation="nearest")
        axes.set_yticks(range(len(share)), list(row["sparsity"]["layers"]), fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        _quiet(axes)
        _headed(axes, f"{row['label']}: model sparsity {100 * row['sparsity']['model']:.1f} %")
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(rows) - columns) : len(rows)]:
        axes.set_xlabel("layer", color=INK)
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), shrink=0.9, pad=0.015, format=FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    return figure


def quality(report: Report, index: int) -> Figure | None:
    """Perplexity against model sparsity, one line per method."""
    dense, *rows = report["rows"]
    if not rows:
        return None
    figure, axes = _panel()
    base = dense["results"][index]["perplexity"]
    axes.axhline(base, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(f"dense {base:.2f}", (0, base), (2, 4), textcoords="offset points", color=MUTED, fontsize=8.5)
    for color, marker, method, points in _methods(rows):
        x = [100 * row["sparsity"]["model"] for row in points]
        y = [row["results"][index]["perplexity"] for row in points]
        axes.errorbar(x, y, yerr=[_error(row, index) for row in points], color=color, marker=marker, markersize=5.5,
                      linewidth=1.6, elinewidth=1.1, capsize=3, label=method, zorder=3)  # fmt: skip
        if len(rows) <= 3:
            for at, value in zip(x, y, strict=True):
                axes.annotate(f"{value:.2f}", (at, value), (7, 4), textcoords="offset points", color=color, fontsize=9)
    axes.set_xlabel("model sparsity, %")
    axes.set_ylabel("perplexity")
    axes.set_xlim(0, max(10.0, 1.12 * max(100 * row["sparsity"]["model"] for row in rows)))
    _scaled(axes, [base, *(row["results"][index]["perplexity"] for row in rows)])
    _headed(axes, f"{report['protocol']['data'][index]['data']}: perplexity against model sparsity")
    _legend(axes, "upper left")
    return figure


def pareto(report: Report, index: int) -> Figure | None:
    """Bytes per token against perplexity, the front marked."""
    rows = report["rows"]
    if len(rows) < 2:
        return None
    figure, axes = _panel()
    points = [(row["bytes"]["per_token"] / 1e6, row["results"][index]["perplexity"]) for row in rows]
    front = sorted(point for point in points if not any(_beats(other, point) for other in points))
    axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1.1, alpha=0.55, zorder=2, label="front")
    hollow: dict[str, Any] = dict(marker="o", markersize=8, markerfacecolor="white", linestyle="none")
    axes.plot(*points[0], color=MUTED, **hollow, label="dense", zorder=3)
    for color, marker, method, chosen in _methods(rows[1:]):
        here = [(row["bytes"]["per_token"] / 1e6, row["results"][index]["perplexity"]) for row in chosen]
        axes.plot(*zip(*here, strict=True), color=color, marker=marker, markersize=5.5, linestyle="", label=method, zorder=3)
    ringed = [point for point in front if point != points[0]]
    if ringed and len(rows) > 2:
        rings: dict[str, Any] = dict(marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
        axes.plot(*zip(*ringed, strict=True), **rings, zorder=4)
    axes.set_xlabel("MB read per decoded token")
    axes.set_ylabel("perplexity")
    _scaled(axes, [point[1] for point in points])
    _headed(axes, f"{report['protocol']['data'][index]['data']}: perplexity against bytes per token")
    _legend(axes, "best")
    return figure


def speed(report: Report) -> Figure | None:
    """Measured speed-up against the ideal one."""
    dense, *rows = report["rows"]
    rows = [row for row in rows if speedup(row, dense) is not None]
    if not rows:
        return None
    figure, axes = _panel()
    ideal = [row["ideal_speedup"] for row in rows]
    measured = [speedup(row, dense) or 0.0 for row in rows]
    low, high = min(0.9, *ideal, *measured) * 0.95, max(1.1, *ideal, *measured) * 1.05
    axes.plot([low, high], [low, high], color=INK, linewidth=1.1, alpha=0.55, label="ideal")
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for color, marker, method, chosen in _methods(rows):
        here = [(row["ideal_speedup"], speedup(row, dense)) for row in chosen]
        axes.plot(*zip(*here, strict=True), color=color, marker=marker, markersize=5.5, linestyle="none", label=method)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("ideal speed-up (bytes)")
    axes.set_ylabel("measured speed-up")
    executors = sorted({row["decode"]["executor"].partition(":")[0] for row in rows})
    _headed(axes, f"Decode speed-up, executor {', '.join(executors)}")
    _legend(axes, "upper left")
    return figure


def _methods(rows: Sequence[Row]) -> list[tuple[str, str, str, list[Row]]]:
    """(colour, marker, method, its rows by sparsity)."""
    names = list(dict.fromkeys(sorted(row["method"] for row in rows)))
    return [
        (PARTS[i % len(PARTS)], MARKERS[(i // len(PARTS)) % len(MARKERS)], name,
         sorted((row for row in rows if row["method"] == name), key=lambda row: row["sparsity"]["model"]))
        for i, name in enumerate(names)
    ]  # fmt: skip


def _error(row: Row, index: int) -> float:
    """Standard error of the paired difference, in perplexity (delta method)."""
    found = row["results"][index]
    return (found.get("loss_difference_error") or 0.0) * found["perplexity"]


def _beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
    return other != point and other[0] <= point[0] and other[1] <= point[1]


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.9), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _quiet(axes)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _quiet(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_color("#b8c0c8")
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=3)


def _scaled(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where the values span more than a factor of three."""
    if max(values) <= 3 * min(values):
        axes.margins(y=0.16)
        return
    axes.set_yscale("log")
    low, high = 0.85 * min(values), 1.3 * max(values)
    axes.set_ylim(low, high)
    digits = (1, 1.5, 2, 3, 4, 5, 7) if high < 20 * low else (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-1, 9) for digit in digits if low <= digit * 10.0**power <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _headed(axes: Axes, heading: str) -> None:
    axes.set_title(heading, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=8)


def _legend(axes: Axes, place: Literal["upper left", "best"]) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc=place)


