"""The pictures of a run folder. Each function takes the run's data and returns a figure, or None where its data is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, MUTED, RULE = "#1b2733", "#66727f", "#e4e8ec"
BLUE, ORANGE = "#1f5fa8", "#d2691e"
PARTS = (BLUE, ORANGE, "#2f8f6f", "#8457a8", "#b23a48", "#7a8b1f", "#3aa0b8", "#8a6d4b")
SEQUENTIAL = LinearSegmentedColormap.from_list("run", ["#f2f6fa", "#a9c8e4", "#4f8fcb", "#1f5fa8", "#0b2545"])
LAYERS = LinearSegmentedColormap.from_list("layers", ["#9cc4e6", "#1f5fa8", "#0b2545"])

Series = tuple[np.ndarray, np.ndarray]


class RunData(NamedTuple):
    """What the pages and plots are made of: rows of metrics.jsonl, watched arrays (`read_watch`), and result.json."""

    rows: Sequence[Mapping[str, float]]
    watch: Mapping[str, Series]
    result: Mapping[str, Any]

    def series(self, name: str) -> Series | None:
        """Steps and finite values of one metric, the last row of a step counting; None without any."""
        found = {int(row["step"]): float(row[name]) for row in self.rows if math.isfinite(row.get(name, math.nan))}
        steps = sorted(found)
        return (np.array(steps), np.array([found[step] for step in steps])) if steps else None

    def watched(self, name: str) -> dict[str, Series]:
        """The series of a watched quantity by prefix: "" alone, or "encoder", "decoder"."""
        found = {key: series for key, series in self.watch.items() if key == name or key.endswith("/" + name)}
        return {key[: -len(name)].rstrip("/"): series for key, series in sorted(found.items())}


def _thousands(value: float, _: object) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,g}"


def _panels(rows: int, columns: int = 1, width: float = 6.4, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Styled axes in a grid; width of the figure and height of a row in inches."""
    figure = Figure(figsize=(width, height * rows), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure, [_styled(axes) for axes in np.atleast_1d(figure.subplots(rows, columns)).flat]


def _styled(axes: Axes) -> Axes:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0c8")
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _headed(axes: Axes, heading: str) -> None:
    axes.set_title(heading, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=9)


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def _line_label(axes: Axes, y: float, text: str) -> None:
    """Name a horizontal line just inside the right edge, above it."""
    axes.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=MUTED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def loss(data: RunData) -> Figure | None:
    """Training loss with its average, held-out points, and what counting achieves; in bits per byte where bytes are known."""
    bytes_per_token = float(data.result.get("bytes_per_token") or math.nan)
    in_bits = math.isfinite(bytes_per_token)
    scale = 1 / (math.log(2) * bytes_per_token) if in_bits else 1.0
    raw, average = data.series("loss"), data.series("loss_ema")
    held_out = data.series("eval/bits_per_byte") if in_bits else data.series("eval/loss")
    if not (raw or average or held_out):
        return None
    figure, (axes,) = _panels(1, width=8.0, height=4.2)
    if raw:
        axes.plot(raw[0], raw[1] * scale, color=BLUE, alpha=0.3, linewidth=0.8, label="training")
    if average:
        axes.plot(average[0], average[1] * scale, color=BLUE, linewidth=1.8, label="training, running mean")
    if held_out:
        axes.plot(*held_out, color=ORANGE, marker="o", markersize=5, linewidth=1.2, label="held-out")
    baselines = data.result.get("baselines") or {} if in_bits else {}
    for name in ("unigram", "bigram"):
        if name in baselines:
            axes.axhline(baselines[name], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            _line_label(axes, baselines[name], f"{name} model {baselines[name]:.2f}")
    _limit_loss(axes, [s for s in (average or raw, held_out) if s], scale, list(baselines.values()))
    _legend(axes, loc="upper right" if not baselines else "lower left")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, bits per byte" if in_bits else "loss, nats")
    _headed(axes, "Loss")
    return figure


def _limit_loss(axes: Axes, curves: list[Series], scale: float, lines: list[float]) -> None:
    """Show what happens after the first steps: a spike at the start must not flatten the rest."""
    train = curves[0][1] * scale
    low = min([float(train.min()), *(float(c[1].min()) for c in curves[1:]), *lines])
    high = max([float(np.quantile(train, 0.99)), *(float(c[1].max()) for c in curves[1:]), *lines])
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - 2 * margin, high + 2 * margin)


def accuracy(data: RunData) -> Figure | None:
    """Held-out accuracy over steps."""
    held_out = data.series("eval/accuracy")
    if held_out is None:
        return None
    figure, (axes,) = _panels(1)
    axes.plot(held_out[0], 100 * held_out[1], color=ORANGE, marker="o", markersize=5, linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out accuracy, %")
    _headed(axes, "Accuracy")
    return figure


def throughput(data: RunData) -> Figure | None:
    """Tokens per second, and below it MFU where the device's peak is known."""
    rate, unit = data.series("tokens_per_second"), "tokens per second"
    if rate is None:
        rate, unit = data.series("examples_per_second"), "examples per second"
    if rate is None:
        return None
    utilisation = data.series("mfu")
    figure, panels = _panels(2 if utilisation else 1)
    panels[0].plot(*rate, color=BLUE, linewidth=1.6)
    panels[0].set_ylim(0, 1.15 * rate[1].max())
    panels[0].yaxis.set_major_formatter(FuncFormatter(_thousands))
    panels[0].set_ylabel(unit)
    _headed(panels[0], f"Throughput: median {np.median(rate[1]):,.0f} {unit}")
    if utilisation:
        panels[1].plot(utilisation[0], 100 * utilisation[1], color=ORANGE, linewidth=1.6)
        panels[1].set_ylim(0, 115 * utilisation[1].max())
        panels[1].set_ylabel("MFU, % of peak")
        _headed(panels[1], "Model flops utilisation")
    panels[-1].set_xlabel("step")
    return figure


def _edges(steps: np.ndarray) -> np.ndarray:
    """Cell borders half-way between the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middle[0] - steps[0])], middle, [steps[-1] + (steps[-1] - middle[-1])]])


def _heat_map(
    figure: Figure, axes: Axes, x_edges: np.ndarray, values: np.ndarray, label: str, limits: tuple[float, float]
) -> None:
    """values [L, N] in cells, layer 0 at the bottom."""
    layers = len(values)
    axes.grid(False)
    mesh = axes.pcolormesh(x_edges, np.arange(layers + 1) - 0.5, values, cmap=SEQUENTIAL, vmin=limits[0], vmax=limits[1])
    axes.yaxis.set_major_locator(MaxNLocator(min(layers, 12), integer=True))
    axes.set_ylabel("layer")
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=18)
    bar.set_label(label, fontsize=9, color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=2)


def _percent_limits(panels: Sequence[np.ndarray]) -> tuple[float, float]:
    """Whole tens around all values: the differences between layers stay visible at 95 % sparsity."""
    low = math.floor(10 * min(float(np.nanmin(p)) for p in panels)) * 10
    high = math.ceil(10 * max(float(np.nanmax(p)) for p in panels) - 1e-6) * 10
    return (low, high) if high > low else (max(low - 10, 0), low + 10 if low < 100 else 100)


def _percent_maps(found: dict[str, Series], heading: str, label: str, last: str) -> Figure | None:
    if not found:
        return None
    limits = _percent_limits([values for _, values in found.values()])
    height = max(3.2, 1.4 + 0.2 * max(values.shape[1] for _, values in found.values()))
    figure, panels = _panels(len(found), height=min(height, 6.0))
    for axes, (prefix, (steps, values)) in zip(panels, found.items(), strict=True):
        _heat_map(figure, axes, _edges(steps), 100 * values.T, label, limits)
        final = f"{last} {100 * float(np.nanmean(values[-1])):.1f} % at step {steps[-1]:,}"
        _headed(axes, f"{heading}{f', {prefix}' if prefix else ''}: {final}")
        axes.set_xlabel("step")
    return figure


def zero_fraction(data: RunData) -> Figure | None:
    """Exact zeros of the FFN's hidden vector, per layer over time."""
    return _percent_maps(data.watched("zero_fraction"), "FFN hidden zeros", "zeros, %", "mean")


def zero_fraction_position(data: RunData) -> Figure | None:
    """The same per token position, at the last watched step."""
    found = data.watched("zero_fraction_position")
    if not found:
        return None
    limits = _percent_limits([values[-1] for _, values in found.values()])
    figure, panels = _panels(len(found))
    for axes, (prefix, (steps, values)) in zip(panels, found.items(), strict=True):
        name = f"{prefix}/zero_fraction_position_length" if prefix else "zero_fraction_position_length"
        length = float(data.watch[name][1][-1]) if name in data.watch else values.shape[-1]
        _heat_map(figure, axes, np.linspace(0, length, values.shape[-1] + 1), 100 * values[-1], "zeros, %", limits)
        _headed(axes, f"Exact zeros by token position{f', {prefix}' if prefix else ''}, step {steps[-1]:,}")
        axes.set_xlabel("position in the sequence")
    return figure


def dead_units(data: RunData) -> Figure | None:
    """Hidden units that were zero on every token of the watched batch, per layer over time."""
    counts, fractions = data.watched("dead_units"), data.watched("dead_fraction")
    if fractions:
        return _percent_maps(fractions, "Dead FFN units", "dead, %", "mean")
    if not counts:
        return None
    return _layer_lines(counts, "Dead FFN units per layer", "units that no token switched on")


def attention_entropy(data: RunData) -> Figure | None:
    """Entropy of the attention weights over keys, mean over heads and sampled queries, per layer over time."""
    return _layer_lines(data.watched("attention_entropy"), "Attention entropy per layer", "entropy, nats")


def _layer_lines(found: dict[str, Series], heading: str, unit: str) -> Figure | None:
    """One line per layer, light (first) to dark (last)."""
    if not found:
        return None
    figure, panels = _panels(len(found))
    for axes, (prefix, (steps, values)) in zip(panels, found.items(), strict=True):
        layers = values.shape[1]
        named = {0, layers // 2, layers - 1} if layers > 6 else set(range(layers))
        for layer in range(layers):
            color = to_hex(LAYERS(layer / max(layers - 1, 1)))
            label = f"layer {layer}" if layer in named else None
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values[:, layer], color=color, linewidth=1.5, marker=marker, label=label)
        top = float(np.nanmax(values))
        axes.set_ylim(-0.04 * top or -0.04, 1.08 * top or 1)  # all of it is non-negative; a layer at 0 stays visible
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        _headed(axes, f"{heading}{f', {prefix}' if prefix else ''}")
        _legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def norms(data: RunData) -> Figure | None:
    """Norms of parameters, gradients and updates by part of the model, on logarithmic axes."""
    kinds = {"param_norm": "parameters", "grad_norm": "gradients", "update_norm": "updates"}
    found = {
        kind: {name.partition("/")[2]: series for name, series in sorted(data.watch.items()) if name.startswith(kind + "/")}
        for kind in kinds
    }
    found = {kind: parts for kind, parts in found.items() if parts}
    if not found:
        return None
    names = sorted({part for parts in found.values() for part in parts})
    figure, columns = _panels(1, len(found))
    for axes, (kind, parts) in zip(columns, found.items(), strict=True):
        for part, (steps, values) in parts.items():
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, color=PARTS[names.index(part) % len(PARTS)], linewidth=1.5, marker=marker, label=part)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("step")
        _headed(axes, kinds[kind].capitalize())
    columns[0].set_ylabel("L2 norm")
    handles = {label: handle for axes in columns for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return figure


# File stem -> (drawing, caption on the page), in the page's order.
PLOTS: dict[str, tuple[Callable[[RunData], Figure | None], str]] = {
    "loss": (loss, "Dashed: the same held-out text under counting models fitted on the training text."),
    "accuracy": (accuracy, "Share of held-out examples whose label has the largest logit."),
    "zero_fraction": (zero_fraction, "Counted on the watched batches: hidden entries that are exactly zero."),
    "zero_fraction_position": (zero_fraction_position, "Whether early tokens are denser than late ones."),
    "dead_units": (dead_units, "Units that no token of the watched batch switched on."),
    "attention_entropy": (attention_entropy, "Low: a head looks at few keys. Mean over heads and sampled queries."),
    "norms": (norms, "L2 norms by part of the model."),
    "throughput": (throughput, "Steps alone: compilation, evaluation and saving are left out."),
}
